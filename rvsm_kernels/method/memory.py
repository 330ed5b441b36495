"""Tensors without memory, and code that is being traced: where the kernels must not be run.

A kernel reads and writes addresses. A DTensor, a FakeTensor, a meta tensor or another subclass with
``__torch_dispatch__`` has no address that holds its values, and what a kernel writes while torch records a graph is not
in that graph. The reference engine calls torch's operators alone, so it serves such tensors as far as torch does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_KEYS = torch._C.DispatchKey


def kind_of(t: Tensor) -> str | None:
    """What a tensor is that has no memory of its own, in words; None for one that has."""
    if t.device.type == "meta":
        return "a meta tensor"
    keys = torch._C._dispatch_keys(t)
    if keys.has(_KEYS.Python):
        return f"a {type(t).__name__}, a subclass of Tensor with a __torch_dispatch__ of its own"
    if torch._C._functorch.is_functorch_wrapped_tensor(t):
        return "a tensor that torch.func has wrapped"
    if keys.has(_KEYS.Functionalize):
        return "a tensor that functionalization has wrapped"
    return None


def tracer() -> str | None:
    """What records or transforms the operators that are called now, in words; None where nothing does."""
    if torch._C._len_torch_dispatch_stack() > 0:
        keys = torch._C._TorchDispatchModeKey
        for key, text in (
            (keys.PROXY, "make_fx"),
            (keys.FAKE, "a FakeTensorMode"),
            (keys.FUNCTIONAL, "functionalization"),
        ):
            if torch._C._get_dispatch_mode(key) is not None:
                return text
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    included = torch._C._dispatch_tls_is_dispatch_key_included
    if included(_KEYS.PreDispatch):
        return "make_fx"
    return "functionalization" if included(_KEYS.Functionalize) else None


def is_dense(t: Tensor) -> bool:
    """Whether the elements of a tensor fill its memory, in any order of the dimensions, each once."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def is_allocated(t: Tensor) -> bool:
    """Whether the storage of a tensor is as large as the tensor says; it can be resized or freed under it."""
    if kind_of(t) is not None or t._is_zerotensor() or t.layout != torch.strided or t.numel() == 0:
        return True
    last = t.storage_offset() + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size() <= t.untyped_storage().nbytes()


def refuse(t: Tensor, name: str) -> None:
    """Raise for a tensor that no kernel can work on.

    Raises:
        TypeError: a tensor without memory of its own; names it and says what it is.
        RuntimeError: a tensor whose memory was freed.
    """
    kind = kind_of(t)
    if kind is not None:
        raise TypeError(f"{name} is {kind}: it has no memory that the kernels could work on")
    if not is_allocated(t):
        raise RuntimeError(
            f"the memory of {name} was freed: its storage holds {t.untyped_storage().nbytes()} bytes,"
            f" a tensor of {t.dtype} {list(t.shape)} needs more"
        )


def turns_of(tensors: Sequence[Tensor]) -> list[int]:
    """The turn of each of some tensors: tensors that share memory are stepped in different turns.

    Returns:
        0 for the first, 1 for those that share memory with one of them, ...: the twin of ``turns_of`` in
        ``csrc/plan/tensors.cpp``. A tensor without memory shares it with no other object.
    """
    ranges = []
    for i, t in enumerate(tensors):
        if kind_of(t) is None and t.layout == torch.strided and not t._is_zerotensor() and t.numel() > 0:
            span = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
            ranges.append((t.data_ptr(), t.data_ptr() + span * t.element_size(), i))
        elif t.layout == torch.strided:
            ranges.append((-1 - id(t), -id(t), i))  # the same object twice
    turns = [0] * len(tensors)
    run: list[tuple[int, int, int]] = []
    end = None
    for begin, stop, i in sorted(ranges):
        if end is None or begin >= end:
            _order(run, turns)
            run, end = [], stop
        run.append((begin, stop, i))
        end = max(end, stop)
    _order(run, turns)
    return turns


def _order(run: list[tuple[int, int, int]], turns: list[int]) -> None:
    """Give the tensors of a run of overlapping ranges their turns."""
    if len(run) > 1:
        run.sort(key=lambda r: r[2])
        for k, (begin, stop, i) in enumerate(run):
            before = [turns[j] + 1 for b, s, j in run[:k] if b < stop and begin < s]
            turns[i] = max(before, default=0)


def named(error: Exception, t: Tensor, name: str) -> Exception:
    """An error of torch about a tensor without memory, with the name and the kind of the tensor in it."""
    kind = kind_of(t)
    if kind is None or isinstance(error, TypeError):
        return error
    return TypeError(f"{name} is {kind}; torch cannot do this with it: {error}")


def whole(t: Tensor) -> Tensor:
    """The whole of a tensor; of a DTensor also what lies on other ranks, so that every rank must call this."""
    gather: Callable[[], Tensor] | None = getattr(t, "full_tensor", None)
    return t if gather is None else gather()


def serves_ops(t: Tensor) -> bool:
    """Whether ``torch.ops.rvsm_kernels`` can be called with a tensor: torch knows what they make of fake and wrapped
    ones, but not what they make of a DTensor or of another subclass.
    """
    return type(t) in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling() or _is_fake_or_plain(t)


def _is_fake_or_plain(t: Tensor) -> bool:
    return not torch._C._dispatch_keys(t).has(_KEYS.Python) or type(t).__name__ == "FakeTensor"
