"""What is wrong with a parameter, its gradient or its states, in the same words for every engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..method.dtypes import DTYPES
from ..method.groups import check_grouping, group_count, group_size, grouping_of, view_of
from ..method.memory import kind_of, refuse
from ..method.options import shown
from ..method.parameters import is_flattened, is_left_alone, param_name
from ..method.step_options import StepOptions
from ..method.windows import check_windows


def validate_param(p: Tensor, group: Mapping[str, Any], name: str) -> None:
    """Check that a parameter can be trained with the options of its group.

    Raises:
        TypeError: a dtype or layout without a kernel, of a parameter that is trained.
        ValueError: a ``group_dim`` that the tensor does not have, a ``group_block`` that does not divide it, a
            ``coupling`` of another length than its slices are, a ``pattern`` whose windows do not fit it.
    """
    if torch.nn.parameter.is_lazy(p) or is_left_alone(p):
        return  # a lazy parameter has no shape yet; one that is left alone is never trained
    if p.layout != torch.strided:
        raise TypeError(f"RVSM does not support parameters of layout {p.layout} ({name})")
    if p.dtype not in DTYPES:
        raise TypeError(f"RVSM does not support parameters of dtype {p.dtype} ({name})")
    check_grouping(p.shape, grouping_of(group), name)
    if group["coupling"] is not None and len(group["coupling"]) != group_count(p.shape, grouping_of(group)):
        raise ValueError(
            f"Invalid coupling value: {len(group['coupling'])} integers for {name}, whose group_dim"
            f" {group['group_dim']!r} has {group_count(p.shape, grouping_of(group))} slices"
        )
    if group["penalty"] == "nm":
        check_windows(p.shape, group["pattern"], name)
    if group["group_dim"] is not None and is_flattened(p):
        raise ValueError(
            f"Invalid group_dim value: {group['group_dim']!r}: {name} was flattened by FullyShardedDataParallel, so"
            " that its groups cannot be told; shard with fully_shard (FSDP2), or leave group_dim=None"
        )


def refuse_expanded(p: Tensor, name: str) -> None:
    """Raise RuntimeError for a tensor that cannot be written element by element."""
    if p.numel() > 0 and any(n > 1 and stride == 0 for n, stride in zip(p.shape, p.stride(), strict=True)):
        raise RuntimeError(f"{name} is expanded: several of its elements are one in memory")


def check_groups(p: Tensor, group: Mapping[str, Any], name: str) -> None:
    """Raise ValueError for groups that do not collapse in memory into one index, as the kernels need them to."""
    try:
        view_of(p, grouping_of(group))
    except ValueError as error:
        raise ValueError(f"Invalid group_dim value for {name}: {group['group_dim']!r}: {error}") from None


def check_state(state: Any, p: Tensor, name: str, key: str) -> None:
    """Raise RuntimeError if a state does not fit its parameter, TypeError if it has no memory as the parameter has.

    Args:
        name: the parameter's.
        key: the state's.
    """
    fits = isinstance(state, Tensor) and state.shape == p.shape and state.device == p.device
    right_type = fits and (state.dtype == torch.int16 if key == "low" else state.is_floating_point())
    if not right_type or state.layout != torch.strided:
        what = f"{state.dtype} {list(state.shape)} on {state.device}" if isinstance(state, Tensor) else repr(state)
        raise RuntimeError(
            f"the {key} of {name} is {what}, the parameter {p.dtype} {list(p.shape)} on {p.device}; delete it from the"
            " optimizer's state to begin anew"
        )
    if kind_of(p) is None:
        refuse(state, f"the {key} of {name}")
    refuse_expanded(state, f"the {key} of {name}")


def check_norms(norms: Tensor, p: Tensor, options: StepOptions) -> None:
    """Raise ValueError for norms that were made elsewhere and do not fit the groups of their parameter.

    Args:
        norms: as :class:`~rvsm_kernels.engines.interface.StepInputs` describes them.
        p: has elements, and options with a ``grouping``.
    """
    count = options.norm_rows * (p.numel() // group_size(p.shape, options.grouping))
    if norms.dtype != torch.float64 or norms.numel() != count or not norms.is_contiguous() or norms.device != p.device:
        raise ValueError(
            f"norms that were made elsewhere must be {count} contiguous float64 numbers on the device of their"
            " parameter"
        )


def check_counter(counter: Any, name: str) -> None:
    """Raise RuntimeError for what cannot count the steps of a parameter.

    Args:
        name: the parameter's.
    """
    if counter is None or (isinstance(counter, Tensor) and counter.numel() == 1 and counter.is_floating_point()):
        return
    raise RuntimeError(
        f"the step of {name} is {shown(counter)}, not a 1-element tensor of floating dtype; delete the states of the"
        " parameter from the optimizer's state to begin anew"
    )


def check_device_numbers(p: Tensor, i: int, options: StepOptions) -> None:
    """Raise RuntimeError for options that the kernels are to read on the device of a parameter, and that are elsewhere.

    Args:
        i: the place of the parameter's group.
    """
    for number in options.on_device:
        if number is not None and number.device != p.device:
            raise RuntimeError(
                f"an option of param group {i} is a tensor on {number.device}, but a parameter of the group is on"
                f" {p.device}"
            )


def check_entry(
    p: Tensor, group: Mapping[str, Any], i: int, j: int, states: Mapping[str, Any], counter: Any = None
) -> None:
    """Raise if a parameter, its gradient or its states cannot be stepped; nothing is changed.

    Args:
        p: has a gradient. If it has memory, what stands beside it must have memory too.
        group: its param group, of which it is parameter ``j``.
        i: the place of the group.
        states: by the names in the group's options, None for a state that is missing.
        counter: the tensor that counts its steps, None where there is none.

    Raises:
        RuntimeError: a sparse or complex gradient; a gradient or a state of another shape or on another device; a
            parameter or state whose elements share memory; freed memory.
        TypeError: a dtype or layout without a kernel; a gradient or state without memory.
        ValueError: a ``group_dim`` that the parameter does not have, a ``group_block`` that does not divide it.
    """
    grad, name = p.grad, param_name(group, i, j)
    assert grad is not None
    if grad.layout != torch.strided:
        raise RuntimeError(f"RVSM does not support sparse gradients ({name} has layout {grad.layout})")
    if grad.is_complex():
        raise RuntimeError(f"RVSM does not support complex gradients ({name})")
    if grad.shape != p.shape:
        raise RuntimeError(f"the gradient of {name} has shape {list(grad.shape)}, the parameter {list(p.shape)}")
    if grad.device != p.device:
        raise RuntimeError(f"the gradient of {name} is on {grad.device}, the parameter on {p.device}")
    refuse_expanded(p, name)
    validate_param(p, group, name)
    if kind_of(p) is None:
        refuse(p, name)
        refuse(grad, f"the gradient of {name}")
    for key, state in states.items():
        if state is not None:
            check_state(state, p, name, key)
    check_counter(counter, name)
