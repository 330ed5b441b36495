"""Options that are numbers on a device: the kernels read them there, and no host waits for them.

``lr``, ``lam``, ``beta`` and ``weight_decay`` may be 1-element tensors on the device of their group's parameters. The
step then reads what they hold when its kernels run, so that a scheduler may fill them in place, also between two
replays of a captured graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .dtypes import DTYPES

NAMES = ("lr", "lam", "beta", "weight_decay")
"""The options that the kernels can read on a device, in the kernels' order (``DeviceNumbers`` in
``csrc/math/device_numbers.h``)."""

HOST_TYPES = {"cpu"}
"""The types of devices whose numbers the host reads before a step: it need not wait for them."""


def is_on_device(value: Any) -> bool:
    """Whether reading an option's value would wait for a device."""
    return isinstance(value, Tensor) and value.device.type not in HOST_TYPES


def stays(name: str, group: Mapping[str, Any]) -> bool:
    """Whether an option of a group is left to the kernels: it lies where all parameters of the group lie."""
    value = group[name]
    if name not in NAMES or not is_on_device(value) or value.dtype not in DTYPES:
        return False
    return all(p.device == value.device for p in group["params"])


def is_positive(value: Any) -> bool:
    """Whether an option is above 0; a number on a device counts as such, since it may become so at any time."""
    return is_on_device(value) or value > 0


def read(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group with the numbers on a device replaced by what they hold now, which waits for it."""
    found = {name: float(group[name]) for name in NAMES if name in group and is_on_device(group[name])}
    return {**group, **found}


def put(group: dict[str, Any], name: str, value: Any) -> None:
    """Set an option; where it is a tensor, what the tensor holds. A number that is not finite sets nothing."""
    if isinstance(group[name], Tensor):
        group[name].copy_(torch.as_tensor(value), non_blocking=True)
    elif math.isfinite(value):
        group[name] = float(value)
