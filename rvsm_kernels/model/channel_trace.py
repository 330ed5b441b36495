"""One forward pass that follows the channels: the labels of every activation, and which weights make and read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from .channels import FIXED, PADDING, Channels, varying

SMALL = 1 << 16
"""Parameters up to this size may be permuted or computed with; of larger ones only whole dimensions are followed."""


class Role(NamedTuple):
    """A view of a parameter or a buffer.

    Attributes:
        name: as in ``model.named_parameters()``.
        dims: for each dimension of the view (dimension of the parameter, first index there); None where the view's is
            not one of the parameter's.
    """

    name: str
    dims: list[tuple[int, int] | None]


class Later(NamedTuple):
    """What has to hold of labels once all ties are known.

    Attributes:
        kind: "whole": what leaves are whole slices along one dimension; "split": the tensor is cut into ``pieces``
            equal parts along ``dim``, and these shrink alike; "cut": into unequal ones; "index": the indices of
            ``dim`` are numbers in the model's code, so that none may leave.
        by_number: the model's code says where it is cut. Heads may leave all the same: their count is an attribute.
    """

    kind: str
    labels: Tensor
    dim: int = 0
    pieces: int = 1
    by_number: bool = False


Rule = Callable[["ChannelTrace", Any, tuple[Any, ...], dict[str, Any], Any], Any]


class Uses(TorchDispatchMode):
    """Counts the operations of a forward pass and notes what each reads and writes, to tell which of them matter."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._operations: list[tuple[list[int], list[int], bool]] = []
        self._count = 0

    def _number(self, value: Any) -> list[int]:
        found = []
        for t in tree_leaves(value):
            if isinstance(t, Tensor):
                if t not in self._numbers:
                    self._numbers[t] = self._count
                    self._count += 1
                found.append(self._numbers[t])
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note it; what composite ones are made of counts where they are followed."""
        read = self._number((args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self._operations.append((read, self._number(out), bool(func._schema.is_mutable)))
        return out

    def idle(self, outputs: list[Tensor]) -> set[int]:
        """The operations of which nothing reaches the outputs, such as the mean of an attention's weights."""
        needed = {n for t in outputs for n in self._number(t)}
        idle = set()
        for k in range(len(self._operations) - 1, -1, -1):
            read, written, mutates = self._operations[k]
            if mutates or not needed.isdisjoint(written):
                needed.update(read)
            else:
                idle.add(k)
        return idle


class ChannelTrace(TorchDispatchMode):
    """Follows the channels while it is entered.

    Attributes:
        channels: the labels.
        makers, readers: by (name of a weight, dimension): the labels that its indices make or read.
        passing: the depthwise weights among the makers, which pass channels on.
        adopted: by name: the labels of a parameter's elements that stand beside channels (norms, biases, gates).
        later: what ``settle`` holds the labels to.
        blocked: parameters of which something is used that the rules do not know.
        unknown: (module, operation) that the rules do not know.
        trained: the names of parameters, as opposed to buffers.
        stack: the names of the modules whose forward is running.
    """

    def __init__(self, model: nn.Module, rules: Callable[[Any], Rule | None], idle: set[int]) -> None:
        super().__init__()
        self._idle, self._place, self._nested = idle, -1, 0
        self.channels = Channels()
        self.makers: dict[tuple[str, int], Tensor] = {}
        self.readers: dict[tuple[str, int], Tensor] = {}
        self.passing: set[str] = set()
        self.adopted: dict[str, Tensor] = {}
        self.later: list[Later] = []
        self.blocked: dict[str, str] = {}
        self.unknown: list[tuple[str, str]] = []
        self.stack: list[str] = []
        self._rules = rules
        self._labels: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._tensors: dict[str, Tensor] = {}
        self._by_storage: dict[int, list[str]] = {}
        self.trained = {name for name, _ in model.named_parameters()}
        for name, t in _tensors_of(model):
            if t.numel() > 0:
                self._tensors[name] = t
                self._by_storage.setdefault(t.untyped_storage().data_ptr(), []).append(name)

    # ---- tensors -----------------------------------------------------------------------------------------------------

    def parameter(self, t: Tensor) -> str | None:
        """The name of the parameter or buffer that a tensor is a view of."""
        if t.numel() == 0 or not self._by_storage:
            return None
        try:
            names = self._by_storage.get(t.untyped_storage().data_ptr(), ())
        except (NotImplementedError, RuntimeError):
            return None
        at = t.storage_offset()
        for name in names:
            p = self._tensors[name]
            last = p.storage_offset() + sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True))
            if p.storage_offset() <= at <= last:
                return name
        return None

    def labels(self, t: Tensor) -> Tensor | None:
        """The labels of an activation, as they were noted; None of anything else."""
        return self._labels.get(t)

    def hold(self, kind: str, labels: Tensor, dim: int = 0, pieces: int = 1, by_number: bool = False) -> None:
        """Note what has to hold of labels; of a dimension along which they are constant one index is kept."""
        if bool((labels > FIXED).any()):
            for d in range(labels.dim()):
                if d != dim and labels.shape[d] > 1 and bool((labels == labels.narrow(d, 0, 1)).all()):
                    labels = labels.narrow(d, 0, 1)
            self.later.append(Later(kind, labels.clone(), dim, pieces, by_number))

    def note(self, t: Tensor, labels: Tensor, inplace: bool = False) -> None:
        """Give an activation its labels. Those of its views change along when an operation works in place."""
        old = self._labels.get(t)
        labels = labels.int() if labels.dtype != torch.int32 else labels
        if inplace and old is not None and old.shape == labels.shape:
            old.copy_(labels)
        else:
            self._labels[t] = labels

    def role(self, t: Tensor) -> Role | None:
        """Which dimensions of which parameter a tensor's dimensions are; None where it is no plain view of any."""
        name = self.parameter(t)
        if name is None or self._labels.get(t) is not None:
            return None
        p = self._tensors[name]
        if t.shape == p.shape and t.stride() == p.stride() and t.storage_offset() == p.storage_offset():
            return Role(name, [(d, 0) for d in range(p.dim())])
        offset = int(t.storage_offset()) - int(p.storage_offset())
        strides = [int(s) for s in p.stride()]
        start = [0] * p.dim()
        for d in sorted(range(p.dim()), key=lambda d: -strides[d]):
            if p.shape[d] > 1:
                start[d], offset = divmod(offset, strides[d])
        free = list(range(p.dim()))
        dims: list[tuple[int, int] | None] = [None] * t.dim()
        for k in range(t.dim()):
            if t.shape[k] > 1:
                fits = [d for d in free if p.shape[d] > 1 and p.stride(d) == t.stride(k)]
                if fits and start[fits[0]] + t.shape[k] <= p.shape[fits[0]]:
                    dims[k] = (fits[0], start[fits[0]])
                    free.remove(fits[0])
        for k in range(t.dim()):
            if t.shape[k] == 1 and (ones := [d for d in free if p.shape[d] == 1]):
                dims[k] = (ones[0], 0)
                free.remove(ones[0])
        return Role(name, dims)

    def elements(self, t: Tensor) -> Tensor | None:
        """The labels of the elements of a view of a parameter: writing them writes the parameter's."""
        name = self.parameter(t)
        if name is None:
            return None
        p = self._tensors[name]
        if name not in self.adopted:
            size = 1 + sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True))
            self.adopted[name] = torch.zeros(size, dtype=torch.int32).as_strided(p.shape, p.stride())
        return self.adopted[name].as_strided(t.shape, t.stride(), t.storage_offset() - p.storage_offset())

    def named_elements(self, t: Tensor) -> Tensor:
        """The same with a label for each element of a small parameter, so that it can be moved about like channels."""
        labels = self.elements(t)
        if labels is None:
            return torch.full(t.shape, FIXED, dtype=torch.int32)
        if t.numel() > SMALL:
            self.block(t, "moved about")
            return torch.full(t.shape, FIXED, dtype=torch.int32)
        base = _once(labels)
        new = base == PADDING
        base[new] = self.channels.fresh(int(new.sum()))
        return labels.clone()

    # ---- what weights do ---------------------------------------------------------------------------------------------

    def block(self, t: Tensor, why: str) -> None:
        """Let no channel that a parameter makes, reads or stands beside ever leave."""
        name = self.parameter(t)
        if name is not None:
            self.blocked.setdefault(name, why)

    def reads(self, weight: Tensor, dim: int, labels: Tensor) -> None:
        """Note that the indices of a dimension of a weight read channels."""
        role = self.role(weight)
        place = role.dims[dim] if role is not None else None
        if role is None or place is None:
            self.channels.freeze(labels, "read by a weight that is computed from others")
            self.give_up([weight], "a weight that is computed from others")
            return
        part = self._part(self.readers, role.name, place, weight.shape[dim])
        self.channels.tie(part, labels)
        part.copy_(torch.where(part > FIXED, part, labels))

    def makes(self, weight: Tensor, dim: int) -> Tensor:
        """The labels of the channels that the indices of a dimension of a weight make."""
        role = self.role(weight)
        place = role.dims[dim] if role is not None else None
        if role is None or place is None:
            self.give_up([weight], "a weight that is computed from others")
            return torch.full((weight.shape[dim],), FIXED, dtype=torch.int32)
        part = self._part(self.makers, role.name, place, weight.shape[dim])
        new = part == PADDING
        part[new] = self.channels.fresh(int(new.sum()))
        return part.clone()

    def _part(self, table: dict[tuple[str, int], Tensor], name: str, place: tuple[int, int], size: int) -> Tensor:
        dim, start = place
        if (name, dim) not in table:
            table[name, dim] = torch.zeros(self._tensors[name].shape[dim], dtype=torch.int32)
        return table[name, dim][start : start + size]

    def give_up(self, tensors: list[Any], what: str) -> None:
        """Let nothing leave that goes into an operation without a rule."""
        touched = False
        for t in tensors:
            if not isinstance(t, Tensor):
                continue
            labels = self._labels.get(t)
            if labels is not None:
                touched |= bool((self.channels.removable(labels) != PADDING).any())
                self.channels.freeze(labels, f"{what} is not followed")
            elif self.parameter(t) is not None:
                touched = True
                self.block(t, what)
        if touched and (entry := (self.stack[-1] if self.stack else "the model", what)) not in self.unknown:
            self.unknown.append(entry)

    # ---- the pass ----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and then its rule on the labels."""
        kwargs = kwargs or {}
        self._place += not self._nested
        if self._place in self._idle and not self._nested:
            return func(*args, **kwargs)
        rule = self._rules(func)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        active = any(self._labels.get(t) is not None or self.parameter(t) is not None for t in tensors)
        if rule is None and active:
            self._nested += 1
            with self:
                out = func.decompose(*args, **kwargs)
            self._nested -= 1
            if out is not NotImplemented:
                return out
        before = {id(t) for t in tensors}
        out = func(*args, **kwargs)
        if active and rule is not None:
            rule(self, func, args, kwargs, out)
        elif active:
            self.give_up(tensors, str(func).removesuffix(".default"))
        for t in tree_leaves(out):
            known = not isinstance(t, Tensor) or self._labels.get(t) is not None or self.parameter(t) is not None
            if not known and id(t) not in before:
                self._labels[t] = torch.full(t.shape, FIXED, dtype=torch.int32)
        return out


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of parameters and buffers, each once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _once(labels: Tensor) -> Tensor:
    """A view that holds each element of an expanded tensor once."""
    for d in range(labels.dim()):
        if labels.stride(d) == 0 and labels.shape[d] > 1:
            labels = labels.narrow(d, 0, 1)
    return labels


def spread(labels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Labels of their own for every element of a shape."""
    return labels.expand(shape).contiguous().clone()


def noted(trace: ChannelTrace, labels: Tensor) -> None:
    """Note a tensor whose labels vary along several dimensions."""
    if len(varying(trace.channels.roots(labels))) > 1:
        trace.hold("whole", labels)
