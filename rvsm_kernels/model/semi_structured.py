"""2:4 weights for sparse tensor cores: ``to_semi_structured``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..method.memory import kind_of
from .param_groups import counted_weights
from .sparsity import follows
from .wrappers import unwrapped

PATTERN = (2, 4)
_LEAST = (8, 0)
"""The first compute capability with sparse tensor cores (Ampere)."""


@dataclasses.dataclass(frozen=True)
class SemiStructuredReport:
    """What :func:`rvsm_kernels.to_semi_structured` did. ``print`` gives a list.

    Attributes:
        converted: the names of the weights that are semi-structured now.
        left: by name: why a weight is as it was.
    """

    converted: tuple[str, ...]
    left: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} weights converted", *(f"  {name}" for name in self.converted)]
        reasons: dict[str, list[str]] = {}
        for name, why in self.left.items():
            reasons.setdefault(why, []).append(name)
        lines += [f"left ({why}): {', '.join(names)}" for why, names in reasons.items()]
        return "\n".join(lines)


@torch.no_grad()
def to_semi_structured(model: nn.Module) -> SemiStructuredReport:
    """Give the 2:4 weights of ``nn.Linear`` the layout of sparse tensor cores, in place, for inference on a GPU.

    ::

        optimizer.sparsify_()  # penalty="nm", pattern=(2, 4)
        print(rk.to_semi_structured(model.half().cuda().eval()))

    Each weight with at most two elements of every four along its inputs that are not zero goes through
    ``torch.sparse.to_sparse_semi_structured``. All others stay as they are: torch would drop elements of a weight that
    does not follow the pattern. What a weight needs beside it is torch's to say, and is in the report: a half type
    (the sizes are multiples of 16 with cuSPARSELt, of 32 and 64 with CUTLASS). A converted weight takes no gradient,
    and ``rk.save_sparse`` refuses it: train, shrink and save before.

    Args:
        model: any module; DDP, ``nn.DataParallel`` and what ``torch.compile`` returned are left away. Convert before
            ``torch.compile``.

    Returns:
        Which weights of two dimensions and more were converted, and why the others were not.

    Raises:
        TypeError: something else than a module.
        RuntimeError: the weight of an ``nn.Linear`` is not on a GPU that has sparse tensor cores (compute capability
            8.0 and more).

    Nothing has changed when an error is raised; memory that runs out while a weight is converted is one, too.
    """
    net = unwrapped(model, "to_semi_structured")
    layers = {
        f"{prefix}.weight" if prefix else "weight": module
        for prefix, module in net.named_modules()
        if isinstance(module, nn.Linear)
    }
    for name, layer in layers.items():
        missing = _missing(layer.weight)
        if missing is not None:
            raise RuntimeError(f"{name} cannot be semi-structured: {missing}; move the model to such a GPU before")
    holders: dict[int, list[str]] = {}
    for name, p in net.named_parameters(remove_duplicate=False):
        holders.setdefault(id(p), []).append(name)
    new: dict[str, Tensor] = {}
    left: dict[str, str] = {}
    for name, weight, _ in counted_weights(net):
        found = layers.get(name)
        why = "not the weight of an nn.Linear" if found is None else _why_not(found, weight, holders)
        if why is not None:
            left[name] = why
            continue
        try:
            new[name] = torch.sparse.to_sparse_semi_structured(weight.contiguous())
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # of a type or a size that its kernels do not have
            left[name] = f"torch refuses it: {str(error).splitlines()[0]}"
    for name, value in new.items():
        layers[name].weight = nn.Parameter(value, requires_grad=False)
    return SemiStructuredReport(tuple(new), left)


def _missing(weight: Tensor) -> str | None:
    """What a weight's device lacks, None where it has sparse tensor cores."""
    if weight.device.type != "cuda":
        return f"it is on {weight.device}, and sparse tensor cores are those of a GPU"
    found = torch.cuda.get_device_capability(weight.device)
    if found < _LEAST:
        return f"the GPU has compute capability {found[0]}.{found[1]}, and sparse tensor cores come with 8.0"
    return None


def _why_not(layer: nn.Linear, weight: Tensor, holders: Mapping[int, list[str]]) -> str | None:
    """Why a weight of a linear layer stays, None where torch is to convert it."""
    if parametrize.is_parametrized(layer, "weight") or "weight" not in layer._parameters:
        return "parametrised: the layer makes it anew each time"
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "torch's attention reads it with kernels of its own"
    kind = kind_of(weight)
    if kind is not None:
        return f"{kind}"
    others = holders[id(layer.weight)]
    if len(others) > 1:
        return f"one tensor with several names: {', '.join(others)}"
    return None if follows(weight, PATTERN) else "more than 2 of 4 elements along the inputs are not zero"
