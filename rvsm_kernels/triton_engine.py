"""The Triton engine: the same kernels where the build has none for the device.

One launch serves all parameters of a device, storage type and kind of step. The host looks at every parameter each
step, as torch.optim does, but touches only what changed: in the usual step one comparison of all tensors with what was
seen before, and one list of addresses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from .base import Engine, check_gradient
from .groups import GroupDim, GroupView, group_view, kept_dims
from .options import OPTIONS, differ, is_split, param_name, snapshot, strength
from .triton_launch import Launch, Row, arithmetic_type
from .triton_prox import make_prox
from .triton_update import make_step

try:  # one call compares types, dtypes, devices, sizes and strides of all tensors
    from torch._C._dynamo import guards as _guards
except ImportError:  # every step is then prepared as if it were the first
    _guards = None  # type: ignore[assignment]

_read = itemgetter(*OPTIONS)
_NAME = "momentum_buffer"


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Triton launches on the current device."""
    if device.type == "cpu":
        yield
        return
    module = torch.get_device_module(device)
    if module.current_device() == device.index:
        yield
        return
    with module.device(device):
        yield


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill their memory, in any order of the dimensions, each once."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def same_layout(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors put every element at the same offset."""
    return x.shape == y.shape and all(a == b for a, b, n in zip(x.stride(), y.stride(), x.shape, strict=True) if n != 1)


def _plain(t: Tensor) -> bool:
    return not t.is_neg() and not t._is_zerotensor()


class Staged:
    """A tensor as the kernels need it: itself, or a dense copy to load before and to store after."""

    def __init__(self, tensor: Tensor, dtype: torch.dtype, like: Tensor | None = None) -> None:
        self.tensor = tensor
        fits = tensor.dtype == dtype and _plain(tensor)
        if like is None:
            fits = fits and is_dense(tensor)
            self.dense = tensor if fits else torch.empty_like(tensor, dtype=dtype)
        else:
            fits = fits and same_layout(tensor, like)
            self.dense = tensor if fits else torch.empty_like(like, dtype=dtype)

    @property
    def is_copy(self) -> bool:
        """Whether the kernels work on a copy."""
        return self.dense is not self.tensor

    def load(self) -> None:
        """Fill the copy."""
        if self.is_copy:
            self.dense.copy_(self.tensor)

    def store(self) -> None:
        """Bring the copy back."""
        if self.is_copy:
            self.tensor.copy_(self.dense)


def view_of(dense: Tensor, group_dim: GroupDim) -> GroupView | None:
    """The groups of a dense tensor, None for elements and for no elements.

    Raises:
        ValueError: they do not collapse in memory.
    """
    kept = kept_dims(group_dim, dense.dim())
    return None if kept is None or dense.numel() == 0 else group_view(dense.shape, dense.stride(), kept)


def needs_norms(group: Mapping[str, Any]) -> bool:
    """Whether the groups' norms matter to a step."""
    return group["group_dim"] is not None and (is_split(group) or group["group_lasso"] != 0)


def _structure(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of the options decides about launches, not only about numbers."""
    dims = group["group_dim"]
    dims = tuple(dims) if isinstance(dims, list) else dims  # a list can be edited in place
    return group["penalty"], dims, needs_norms(group), group["group_lasso"] != 0, group["momentum"] != 0


def _invalid(name: str, group: Mapping[str, Any], error: ValueError) -> ValueError:
    return ValueError(f"Invalid group_dim value for {name}: {group['group_dim']!r}: {error}")


class TritonEngine(Engine):
    """Serves CUDA, ROCm and XPU tensors; in Triton's interpreter, CPU tensors."""

    name = "triton"

    def __init__(self, device_types: Sequence[str]) -> None:
        self._served = tuple(device_types)
        self._seen: list[tuple[Any, ...] | None] = []
        self._structures: list[tuple[Any, ...]] = []
        self._constants: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._forget()

    def _forget(self) -> None:
        """The next step is prepared from the start."""
        self._params: list[Tensor] = []
        self._lengths: list[int] = []  # of the param groups
        self._active: list[bool] = []
        self._buffers: list[Tensor | None] = []
        self._launches: list[tuple[Launch, list[int]]] = []  # and which of the active parameters its rows are
        self._guards: Any = None
        self._addresses: list[int] = []
        self._staged: list[tuple[Staged, bool]] = []
        self._new: list[tuple[Tensor, Tensor]] = []

    # ---- the step ----------------------------------------------------------------------------------------------------

    def prepare(
        self,
        groups: Sequence[MutableMapping[str, Any]],
        state: MutableMapping[Tensor, Any],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> bool:
        self._scaling, self._skip, self._state = (grad_scale, found_inf), False, state
        values = [_read(group) for group in groups]
        stale = len(values) != len(self._seen) or any(map(differ, values, self._seen))
        known = not stale or [_structure(group) for group in groups] == self._structures
        try:
            if not (known and self._refresh(groups, state, stale)) and not self._build(groups, state):
                return False
        except BaseException:
            self._forget()
            raise
        self._seen = [snapshot(v) for v in values]
        self._structures = [_structure(group) for group in groups] if stale else self._structures
        # Whether buffers appear is decided here, so that a first step waits for the device; no other does.
        if self._new and found_inf is not None:
            self._skip = found_inf.item() > 0
        return True

    def _refresh(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Any], stale: bool) -> bool:
        """Addresses and numbers of the tensors that are known; False where they are others, or lie otherwise."""
        if self._guards is None:
            return False
        params = [p for group in groups for p in group["params"]]
        if list(map(id, params)) != list(map(id, self._params)):
            return False
        if [len(group["params"]) for group in groups] != self._lengths:
            return False
        grads = [p.grad for p in params]
        if [g is not None for g in grads] != self._active:  # also where one has no elements: it may get some
            return False
        active = [p for p, g in zip(params, grads, strict=True) if g is not None]
        tensors = [*active, *(g for g in grads if g is not None)]
        for p, buffer in zip(active, self._buffers, strict=True):
            if buffer is not None:
                own = state.get(p)
                if own is None or own.get(_NAME) is not buffer:
                    return False
                tensors.append(buffer)
        if not self._guards.check(*tensors):
            return False
        addresses = [t.data_ptr() for t in tensors]
        if stale or addresses != self._addresses:
            self._fill(groups, addresses)
        return True

    def _fill(self, groups: Sequence[Mapping[str, Any]], addresses: list[int]) -> None:
        """`addresses`: of all active parameters, their gradients, and what buffers there are."""
        self._addresses = addresses
        count = len(self._buffers)
        following = iter(addresses[2 * count :])
        buffers = [0 if b is None else next(following) for b in self._buffers]
        rows = list(zip(addresses, addresses[count:], buffers, strict=False))
        for launch, which in self._launches:
            launch.fill([rows[k] for k in which], self._records(launch, groups))

    @staticmethod
    def _records(launch: Launch, groups: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], tuple[float, ...]]:
        """The numbers of each key: the place of the param group, the shape or None, whether the step is the first."""
        keys = {row.key for row in launch.rows}
        return {
            key: make_step(groups[key[0]], strength(groups[key[0]], key[1] or torch.Size()), key[2])
            if key[1] is not None
            else make_step(groups[key[0]], float(groups[key[0]]["lam"]), key[2])
            for key in keys
        }

    def _build(self, groups: Sequence[MutableMapping[str, Any]], state: MutableMapping[Tensor, Any]) -> bool:
        """Look at everything anew; raises before anything is changed."""
        self._forget()
        kinds: dict[tuple[Any, ...], tuple[list[Row], list[int]]] = {}
        params, active, names = [], [], []
        rows: list[tuple[int, Tensor]] = []
        for i, group in enumerate(groups):
            for j, p in enumerate(group["params"]):
                if p.device.type not in self._served:
                    return False
                params.append(p)
                active.append(p.grad is not None)
                if p.grad is not None:
                    check_gradient(p, state, group, i, j)
                    active[-1] = p.numel() > 0
                if active[-1]:
                    rows.append((i, p))
                    names.append(param_name(group, i, j))
        views: list[GroupView | None] = []
        for (i, p), name in zip(rows, names, strict=True):
            try:
                dense = p if is_dense(p) else torch.empty_like(p, device="meta")
                views.append(view_of(dense, groups[i]["group_dim"]) if needs_norms(groups[i]) else None)
            except ValueError as error:
                raise _invalid(name, groups[i], error) from None
        addresses: list[list[int]] = [[], [], []]
        lasso, tl1 = set(), set()
        for k, ((i, p), view) in enumerate(zip(rows, views, strict=True)):
            group = groups[i]
            grad, momentum = p.grad, group["momentum"] != 0
            assert grad is not None
            half = p.dtype in (torch.bfloat16, torch.float16)
            dtype = torch.float32 if half and grad.dtype != p.dtype else p.dtype
            w = self._stage(p, dtype, None, True)
            g = self._stage(grad, dtype, w, False)
            m = buffer = None
            first = False
            if momentum:
                buffer = state[p].get(_NAME) if p in state else None
                first = buffer is None
                if buffer is None or buffer.dtype != p.dtype:  # its momentum follows it to another dtype
                    old, buffer = buffer, torch.zeros_like(w, dtype=p.dtype)
                    if old is not None:
                        buffer.copy_(old)
                    self._new.append((p, buffer))
                m = self._stage(buffer, dtype, w, True)
            self._buffers.append(buffer)
            addresses[0].append(w.data_ptr())
            addresses[1].append(g.data_ptr())
            if m is not None:
                addresses[2].append(m.data_ptr())
            kind = (p.device, dtype, momentum)
            # With group_scale the strength depends on the size of the groups, and so on the shape.
            key = (i, p.shape if view is not None else None, first)
            kinds.setdefault(kind, ([], []))
            kinds[kind][0].append(Row(w, g, m, view, key))
            kinds[kind][1].append(k)
            if group["group_lasso"] != 0:
                lasso.add(kind)
            if group["penalty"] == "tl1":
                tl1.add(kind)
        self._params, self._active = params, active
        self._lengths = [len(group["params"]) for group in groups]
        for kind, (entries, which) in kinds.items():
            device, dtype, momentum = kind
            launch = Launch("step", dtype, device, entries, kind in lasso, kind in tl1, momentum)
            self._launches.append((launch, which))
        self._fill(groups, [*addresses[0], *addresses[1], *addresses[2]])
        for launch, _ in self._launches:
            for row in launch.rows:  # the tensors are found by address from now on
                row.w = row.g = row.m = None  # type: ignore[assignment]
        if _guards is not None and not self._staged and not self._new and rows:
            tensors = [*(p for _, p in rows), *(p.grad for _, p in rows), *(b for b in self._buffers if b is not None)]
            self._guards = _guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        return True

    def _stage(self, tensor: Tensor, dtype: torch.dtype, like: Tensor | None, writes: bool) -> Tensor:
        staged = Staged(tensor.detach(), dtype, like)
        if staged.is_copy:
            self._staged.append((staged, writes))
        return staged.dense

    def _scaling_on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """grad_scale and found_inf as the kernels read them; 1 and 0 where there are none."""
        out = []
        for given, kind, default in zip(
            self._scaling, (arithmetic_type(dtype), torch.float32), (1.0, 0.0), strict=True
        ):
            if given is None:
                key = (device, kind if default else torch.int8)
                if key not in self._constants:
                    self._constants[key] = torch.full((1,), default, dtype=kind, device=device)
                out.append(self._constants[key])
            else:
                out.append(given.detach().to(device, kind))
        return out[0], out[1]

    def launch(self) -> None:
        written = [p for p, a in zip(self._params, self._active, strict=True) if a]
        if not self._skip:
            for p, buffer in self._new:
                self._state[p][_NAME] = buffer
            for staged, _ in self._staged:
                staged.load()
            for launch, _ in self._launches:
                with on_device(launch.device):
                    launch.run(*self._scaling_on(launch.device, launch.dtype))
            for staged, writes in self._staged:
                if writes:
                    staged.store()
            changed = [*written, *(b for b in self._buffers if b is not None)]
            torch.autograd.graph.increment_version([t for t in changed if not t.is_inference()])
        if self._staged or self._new:
            self._forget()
        self._scaling = (None, None)
        del self._state

    # ---- reading u ---------------------------------------------------------------------------------------------------

    def check(self, p: Tensor, group: Mapping[str, Any], name: str) -> None:
        try:
            view_of(p if is_dense(p) else torch.empty_like(p, device="meta"), group["group_dim"])
        except ValueError as error:
            raise _invalid(name, group, error) from None

    def prox_(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> None:
        staged = [Staged(p.detach(), p.dtype) for p in params]
        for s in staged:
            s.load()
        beta, a = float(group["beta"]), float(group["a"])
        rows = []
        for s in staged:
            tau = strength(group, s.dense.shape) / beta
            rows.append(_row(s.dense, s.dense, group["group_dim"], (*make_prox(group["penalty"], tau, a),)))
        for launch in _run("prox", rows):
            launch.run()
        for s in staged:
            s.store()
        torch.autograd.graph.increment_version([p for p in params if not p.is_inference()])

    def penalty_value(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> Tensor:
        beta, a = float(group["beta"]), float(group["a"])
        rows = []
        for p in params:
            staged = Staged(p.detach(), p.dtype)
            staged.load()
            lam = strength(group, p.shape)
            numbers = (*make_prox(group["penalty"], lam / beta, a), lam, beta)
            rows.append(_row(staged.dense, staged.dense, group["group_dim"], numbers))
        total = torch.zeros((), dtype=torch.float64, device=params[0].device)
        norms = []
        for launch in _run("penalty", rows):
            launch.run()
            if launch.entries:
                total = total + launch.totals.sum().to(total.device)
            norms += [Row(t, t, None, None, row.key) for t, row in launch.norms]
        for launch in _run("penalty", norms):
            launch.run()
            total = total + launch.totals.sum().to(total.device)
        return total


def _row(w: Tensor, source: Tensor, group_dim: GroupDim, numbers: tuple[float, ...]) -> Row:
    return Row(w, source, None, view_of(w, group_dim), numbers)


def _run(action: str, rows: Sequence[Row]) -> Iterator[Launch]:
    """Launches of rows that are their own records, filled, each on its device."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Row]] = {}
    for row in rows:
        if row.w.numel() > 0:
            kinds.setdefault((row.w.device, row.w.dtype), []).append(row)
    for (device, dtype), own in kinds.items():
        with on_device(device):
            launch = Launch(action, dtype, device, own)
            launch.fill([(r.w.data_ptr(), r.g.data_ptr(), 0) for r in own], {r.key: r.key for r in own})
            yield launch


def prox(w: Tensor, penalty: str | None, tau: float, a: float = 1.0, group_dim: GroupDim = None) -> Tensor:
    """Twin of :func:`rvsm_kernels.reference.prox`."""
    u = torch.empty_like(w)
    staged = Staged(w.detach(), w.dtype, u)
    staged.load()
    try:
        row = _row(u, staged.dense, group_dim, (*make_prox(penalty, float(tau), float(a)),))
    except ValueError as error:
        raise ValueError(f"Invalid group_dim value: {error}") from None
    for launch in _run("prox", [row]):
        launch.run()
    return u
