"""DTensors as their shards: what a rank has of a parameter, and which of its dimensions lie on other ranks too.

``torch.distributed`` is not imported here: who has a DTensor has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..method.groups import Blocks, Grouping, group_dims, size_of_block
from ..method.memory import kind_of
from ..method.windows import DIM, Pattern


def is_sharded(t: Any) -> bool:
    """Whether a tensor is a DTensor: each rank has a shard of it, or a copy."""
    if type(t) is Tensor:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def shard_of(t: Tensor) -> Tensor:
    """What this rank has of a DTensor, or the tensor itself; the same object in every step. Call without gradients."""
    if not is_sharded(t):
        return t
    # to_local() makes a new object of a parameter's shard each time.
    local: Tensor = t._local_tensor  # type: ignore[attr-defined]
    if type(local) is Tensor:
        return local
    wait = getattr(local, "trigger_wait", None)  # the result of a collective that may still be on its way
    return local if wait is None else wait()


def is_of_shards(t: Any) -> bool:
    """Whether a tensor is a DTensor with shards in memory, none of whose values is a sum that is still to be made."""
    return is_sharded(t) and not any(p.is_partial() for p in t.placements) and kind_of(shard_of(t)) is None


def placed_like(t: Tensor, p: Tensor) -> Tensor:
    """A DTensor with the placements of another one; any other tensor as it is."""
    if not (is_sharded(t) and is_sharded(p)) or tuple(t.placements) == tuple(p.placements):  # type: ignore[attr-defined]
        return t
    placed: Tensor = t.redistribute(placements=p.placements)  # type: ignore[attr-defined]
    return placed


def sharded_like(shard: Tensor, p: Tensor) -> Tensor:
    """The DTensor of these shards, with the mesh, the placements and the shape of a parameter."""
    from torch.distributed.tensor import DTensor

    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=p.shape, stride=p.stride())


def _sharded_dim(placement: Any) -> int | None:
    """The dimension of the tensor that a placement divides among ranks; None where each rank has all."""
    return None if placement.is_replicate() or placement.is_partial() else placement.dim


def refuse_partial(p: Tensor, name: str) -> None:
    """Raise TypeError for a DTensor whose values are sums that nobody has made yet."""
    if any(placement.is_partial() for placement in p.placements):  # type: ignore[attr-defined]
        raise TypeError(
            f"{name} is a DTensor with placements {list(p.placements)}: no rank knows its values."  # type: ignore[attr-defined]
            " Redistribute it first"
        )


def gradient_of(p: Tensor, name: str) -> Tensor | None:
    """The shard of a parameter's gradient that belongs to its own shard, None without a gradient.

    A gradient with other placements on the same mesh is redistributed, as torch's operators do.

    Raises:
        TypeError: a gradient that is no DTensor.
        ValueError: a gradient on another mesh.
    """
    grad = p.grad
    if grad is None:
        return None
    if not is_sharded(grad):
        raise TypeError(f"the gradient of {name} is a {type(grad).__name__}, the parameter a DTensor")
    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    if grad.device_mesh != mesh:  # type: ignore[attr-defined]
        raise ValueError(f"the gradient of {name} is on {grad.device_mesh}, the parameter on {mesh}")  # type: ignore[attr-defined]
    if tuple(grad.placements) != tuple(placements):  # type: ignore[attr-defined]
        grad = p.grad = grad.detach().redistribute(placements=placements)  # type: ignore[attr-defined]
    return shard_of(grad)


def dividing_ranks(p: Tensor) -> list[tuple[Any, int]]:
    """(process group, dimension) of each dimension that lies on several ranks, in the order of the mesh."""
    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    divided = [(k, _sharded_dim(placement)) for k, placement in enumerate(placements)]
    return [(mesh.get_group(k), dim) for k, dim in divided if dim is not None and mesh.size(k) > 1]


def ranks_of_groups(p: Tensor, group_dim: Grouping, name: str = "the tensor") -> tuple[Any, ...]:
    """The process groups over which the groups of a parameter lie; empty where each group is inside one shard.

    Raises:
        ValueError: shards that cut a block of indices.
    """
    dims = group_dims(group_dim, p.dim(), name)
    if dims is None:
        return ()
    refuse_cut_blocks(p, group_dim, name, "group_block")
    return tuple(ranks for ranks, dim in dividing_ranks(p) if dim not in dims)


def first_index_here(p: Tensor, dim: int) -> int:
    """The first index along a dimension of a DTensor that this rank's shard has.

    Raises:
        ValueError: shards that are no run of indices (a ``_StridedShard`` along that dimension).
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    if any(_sharded_dim(x) == dim and hasattr(x, "split_factor") for x in placements):
        raise ValueError(f"the indices of dimension {dim} that a rank has are no run of them: {list(placements)}")
    return int(compute_local_shape_and_global_offset(p.shape, mesh, placements)[1][dim])


def refuse_cut_blocks(p: Tensor, group_dim: Grouping, name: str, option: str) -> None:
    """Raise ValueError where the border of a shard is inside a block; every rank finds the same.

    Args:
        option: which one says how long a block is.
    """
    block = size_of_block(group_dim)
    if block == 1:
        return
    (dim,) = group_dims(group_dim, p.dim()) or (0,)
    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    divided = [k for k, placement in enumerate(placements) if _sharded_dim(placement) == dim]
    divided.sort(key=lambda k: hasattr(placements[k], "split_factor"))  # a _StridedShard divides what the others leave
    sizes = {p.shape[dim]}  # of the shards, uneven ones too: a dimension is divided by one of the mesh after the other
    for ranks in (mesh.size(k) for k in divided):
        largest = {n: -(-n // ranks) for n in sizes}
        sizes = {min(most, max(n - k * most, 0)) for n, most in largest.items() for k in range(ranks)}
    cut = sorted(n for n in sizes if n % block != 0)
    if cut:
        raise ValueError(
            f"Invalid {option} value: {block}: dimension {dim} of {name} is divided into shards of {cut[-1]} indices,"
            " no multiple of it: a block would lie on two ranks"
        )


def refuse_cut_windows(p: Tensor, pattern: Pattern, name: str) -> None:
    """Raise ValueError where the border of a shard is inside a window of N:M sparsity; every rank finds the same."""
    refuse_cut_blocks(p, Blocks(DIM, pattern[1]), name, "pattern")


def shards_of(states: Mapping[str, Any]) -> dict[str, Any]:
    """The states of a parameter, each DTensor among them as its shard."""
    return {name: shard_of(s) if isinstance(s, Tensor) else s for name, s in states.items()}


def note_writes(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that DTensors were written to: a kernel that writes to a shard tells it of the shard alone."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
