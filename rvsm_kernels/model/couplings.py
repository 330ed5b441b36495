"""From coupled channels to the weights of param groups: which inputs are one group with which others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..method.warn import some, warn
from .coupled import NOBODY, CoupledChannels, check_model, coupled_channels
from .structures import COUPLED

NO_INPUTS = "no coupled group: "
"""How a reason begins why a weight is left dense under this structure."""


def couplings(
    model: nn.Module, example_inputs: Any, taken: Iterable[str]
) -> Callable[[str], tuple[int | None, tuple[int, ...] | None, str | None]]:
    """What each weight gets.

    Args:
        model: a module.
        example_inputs: what its forward pass is followed with.
        taken: the names of the weights that may be penalised. A group that another weight reads too can never leave:
            it is nobody's.

    Returns:
        A function of a weight's name: (group_dim, coupling, None), or (None, None, why it stays dense). Of a coupling
        the positive integers are groups, the same for all weights; an index of no group has a negative one of its own.
    """
    found = coupled_channels(model, example_inputs)
    if found.untraced:
        entries = some([f"{operation} in {module}" for module, operation in found.untraced])
        warn(f"structure='coupled': not followed: {entries}: the channels that meet there belong to no group")
    names = set(taken)
    dense = [(name, reader) for name, reader in found.readers.items() if name not in names]
    stuck = {k: name for name, reader in dense for k in reader.labels if k != NOBODY}

    def of_weight(name: str) -> tuple[int | None, tuple[int, ...] | None, str | None]:
        reader = found.readers.get(name)
        if reader is None:
            return None, None, f"{NO_INPUTS}the forward pass reads no channels with it"
        labels = tuple(NOBODY if k in stuck else k for k in reader.labels)
        if not any(labels):
            return None, None, NO_INPUTS + _why(found, name, stuck)
        return reader.dim, tuple(k if k != NOBODY else -1 - i for i, k in enumerate(labels)), None

    return of_weight


def _why(found: CoupledChannels, name: str, stuck: dict[int, str]) -> str:
    reader = found.readers[name]
    others = sorted({stuck[k] for k in reader.labels if k in stuck})
    reasons = sorted(set(reader.kept.values())) + ([f"{some(others)} reads them, and stays dense"] if others else [])
    return "; ".join(reasons[:3]) if reasons else "nothing reads it"


def check_inputs(model: nn.Module, structure: str | None, example_inputs: Any) -> None:
    """Refuse example inputs that are missing or not asked for.

    Raises:
        TypeError: so it is, or the model cannot be followed.
    """
    if structure != COUPLED:
        if example_inputs is not None:
            raise TypeError(f"example_inputs go with structure='coupled', not with structure={structure!r}")
        return
    if example_inputs is None:
        raise TypeError(
            "structure='coupled' follows a forward pass: give example_inputs, a tensor, a tuple of arguments or a dict"
            " of named ones"
        )
    check_model(model, "structure='coupled'")
