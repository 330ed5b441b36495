"""Sets of channels that can only leave a network together, as a forward pass finds them.

Every element of every activation has a label. Elements of one label leave together: label ``FIXED`` never does
(constants, what is the model's input), ``PADDING`` is a zero that leaves with whatever channel it pads. A union-find
ties labels, and a label that is frozen takes its whole set along.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PADDING, FIXED = 0, 1


class Channels:
    """The labels of a forward pass: which are tied, and which can never leave."""

    def __init__(self) -> None:
        self._parent = [PADDING, FIXED]
        self._frozen: dict[int, str] = {}
        self._heads: set[int] = set()
        self._varying: dict[int, str] = {}
        self._table: Tensor | None = None
        self._leaving: tuple[tuple[int, int], Tensor] | None = None
        self.changes = 0

    def fresh(self, n: int) -> Tensor:
        """n labels that nothing is tied to yet, int32."""
        start = len(self._parent)
        self._parent.extend(range(start, start + n))
        self._table = None
        return torch.arange(start, start + n, dtype=torch.int32)

    def _root(self, label: int) -> int:
        parent = self._parent
        root = label
        while parent[root] != root:
            root = parent[root]
        while parent[label] != root:
            parent[label], label = root, parent[label]
        return root

    def roots(self, labels: Tensor) -> Tensor:
        """The representative of each label's set, in the same shape."""
        if self._table is None:
            table = torch.tensor(self._parent)
            while not torch.equal(up := table[table], table):
                table = up
            self._table = table.int()
        return self._table.index_select(0, labels.reshape(-1)).view(labels.shape)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Let a[i] and b[i] leave together, of two tensors that broadcast; constants and padding tie nothing."""
        a, b = torch.broadcast_tensors(self.roots(a), self.roots(b))
        differ = (a != b) & (a > FIXED) & (b > FIXED)
        if not bool(differ.any()):
            return
        pairs = torch.stack([a[differ], b[differ]], 1).long()
        keys = torch.unique(pairs[:, 0] * len(self._parent) + pairs[:, 1])
        for key in keys.tolist():
            x, y = (self._root(k) for k in divmod(key, len(self._parent)))
            if x == y:
                continue
            self.changes += 1
            low, high = min(x, y), max(x, y)
            self._parent[high] = low
            if high in self._frozen:
                self._frozen.setdefault(low, self._frozen[high])
            if high in self._heads:
                self._heads.add(low)
            if high in self._varying:
                self._varying.setdefault(low, self._varying[high])
        self._table = None

    def tie_along(self, labels: Tensor, dims: Sequence[int]) -> Tensor:
        """Let the labels of each fibre along some dimensions leave together; returns each fibre's label (keepdim)."""
        dims = list(dims)
        if not dims or labels.numel() == 0:
            return labels
        labels = self.roots(labels)
        top = labels.amax(dims, keepdim=True)
        mixed = (labels == FIXED) & (top > FIXED)
        if bool(mixed.any()):  # what does not shrink stands in the same fibre
            self.freeze(top.expand_as(labels)[mixed], "added up with what does not shrink")
        self.tie(labels, top)
        return self.roots(top)

    def freeze(self, labels: Tensor, why: str) -> None:
        """Let no set of these labels ever leave."""
        for label in torch.unique(self.roots(labels)).tolist():
            if label > FIXED and label not in self._frozen:
                self._frozen[label] = why
                self.changes += 1

    def vary(self, labels: Tensor, why: str) -> None:
        """Note that the values of these channels follow from more than what makes them and from parameters."""
        for label in torch.unique(self.roots(labels)).tolist():
            if label > FIXED:
                self._varying.setdefault(label, why)

    def why_varying(self, label: int) -> str | None:
        """What else the values of a channel follow from; None where there is nothing."""
        return self._varying.get(self._root(label))

    def mark_heads(self, labels: Tensor) -> None:
        """Note that an attention mixes these: they are heads."""
        self._heads.update(k for k in torch.unique(self.roots(labels)).tolist() if k > FIXED)

    def tie_whole(self, labels: Tensor, dims: Sequence[int], why: str) -> None:
        """As :meth:`tie_along`, and freeze what stands in a fibre with a label that can never leave."""
        roots = self.roots(labels)
        stuck = (self.removable(labels) == PADDING) & (roots != PADDING)
        self.freeze(roots[stuck.any(list(dims), keepdim=True).expand_as(roots)], why)
        self.tie(roots, roots.amax(list(dims), keepdim=True))

    def reason(self, label: int) -> str | None:
        """Why a label can never leave; None where it can."""
        if label <= FIXED:
            return "a constant or an input of the model"
        return self._frozen.get(self._root(label))

    def removable(self, labels: Tensor) -> Tensor:
        """The representatives of the labels that may leave, 0 for the others."""
        now = self.changes, len(self._parent)
        if self._leaving is None or self._leaving[0] != now:
            leaving = self.roots(torch.arange(len(self._parent), dtype=torch.int32))
            frozen = self.roots(torch.tensor([PADDING, FIXED, *self._frozen], dtype=torch.int32))
            stay = torch.zeros(len(self._parent), dtype=torch.bool)
            stay[frozen.long()] = True
            self._leaving = now, leaving.masked_fill(stay[leaving.long()], PADDING)
        return self._leaving[1].index_select(0, labels.reshape(-1)).view(labels.shape)

    def heads(self, labels: Tensor) -> Tensor:
        """Which labels belong to heads of an attention."""
        found = torch.zeros(len(self._parent), dtype=torch.bool)
        found[self.roots(torch.tensor([*self._heads], dtype=torch.int32)).long()] = True
        return found[self.roots(labels).long()]


def varying(labels: Tensor) -> list[int]:
    """The dimensions along which a tensor of labels is not constant."""
    return [d for d in range(labels.dim()) if labels.shape[d] > 1 and bool((labels != labels.narrow(d, 0, 1)).any())]
