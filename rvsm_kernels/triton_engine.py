"""The Triton engine: the same kernels where the build has none for the device.

One launch serves all parameters of a device, storage type and kind of step. The host looks at every parameter each
step, as torch.optim does, but touches only what changed: in the usual step one comparison of all tensors with what was
seen before, and one list of addresses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .groups import GroupDim, GroupView, kept_dims
from .interface import Engine, check_gradient
from .memory import kind_of, turns_of
from .methods import is_topk, state_name
from .options import METHODS, OPTIONS, differ, is_split, param_name, snapshot, strength
from .triton_launch import Launch, Row
from .triton_prox import make_prox
from .triton_staging import Staged, is_dense, on_device, view_of
from .triton_table import capturing
from .triton_update import make_step

try:  # one call compares types, dtypes, devices, sizes and strides of all tensors
    from torch._C._dynamo import guards as _guards
except ImportError:  # every step is then prepared as if it were the first
    _guards = None  # type: ignore[assignment]

_read = itemgetter(*OPTIONS)
_NAME = "momentum_buffer"
_momentum = itemgetter(_NAME)


class Part(NamedTuple):
    """A launch of a step, and where its rows are among the active parameters, the buffers and what methods keep.

    Attributes:
        turn: launches of later turns have parameters that share memory with those of earlier ones.
        which: None for all in their order.
        buffers, kept: None where the launch has none.
    """

    launch: Launch
    turn: int
    which: list[int] | None
    buffers: list[int] | None
    kept: list[int] | None


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two lists hold the same objects; == would compare tensors."""
    return len(a) == len(b) and all(map(is_, a, b))


def needs_norms(group: Mapping[str, Any]) -> bool:
    """Whether the groups' norms matter to a step."""
    return group["group_dim"] is not None and (is_split(group) or group["group_lasso"] != 0)


def _structure(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of the options decides about launches, not only about numbers."""
    dims = group["group_dim"]
    dims = tuple(dims) if isinstance(dims, list) else dims  # a list can be edited in place
    norms, scaled = needs_norms(group), bool(group["group_scale"])
    switches = group["group_lasso"] != 0, group["momentum"] != 0, state_name(group), is_topk(group)
    return group["penalty"], dims, norms, scaled, *switches


def _invalid(name: str, group: Mapping[str, Any], error: ValueError) -> ValueError:
    return ValueError(f"Invalid group_dim value for {name}: {group['group_dim']!r}: {error}")


class TritonEngine(Engine):
    """Serves CUDA, ROCm and XPU tensors; in Triton's interpreter, CPU tensors."""

    name = "triton"

    def __init__(self, device_types: Sequence[str]) -> None:
        self._served = tuple(device_types)
        self._seen: list[tuple[Any, ...] | None] = []
        self._structures: list[tuple[Any, ...]] = []
        self._captured: list[Launch] = []  # graphs go on reading their tables
        self._constants: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._state: MutableMapping[Tensor, Any] = {}
        self._kept: Mapping[Tensor, Tensor] = {}
        self._scaling: tuple[Tensor | None, Tensor | None] = (None, None)
        self._forget()

    def _forget(self) -> None:
        """The next step is prepared from the start."""
        self._params: list[Tensor] = []
        self._lengths: list[int] = []  # of the param groups
        self._active: list[bool] = []
        self._all_active = False
        self._state_keys: list[Tensor] = []
        self._state_values: list[dict[str, Any]] = []
        self._states: list[dict[str, Any]] = []  # of the active parameters that have momentum
        self._buffers: list[Tensor] = []
        self._keepers: list[Tensor] = []  # the parameters whose method keeps something
        self._selected: list[Tensor] = []  # those with top-k
        self._cuts: list[Tensor] = []  # and their cuts
        self._changed: list[Tensor] = []  # what a step writes
        self._launches: list[Part] = []
        self._guards: Any = None
        self._addresses: list[int] = []
        self._staged: list[tuple[Staged, bool, int]] = []  # whether a step writes to it, and in which turn
        self._turns: list[int] = []  # of the active parameters
        self._held: Any = None  # the tensors of a step that was prepared: other threads may take them away
        self._new: list[tuple[Tensor, Tensor]] = []

    # ---- the step ----------------------------------------------------------------------------------------------------

    def prepare(
        self,
        groups: Sequence[MutableMapping[str, Any]],
        state: MutableMapping[Tensor, Any],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        kept: Mapping[Tensor, Tensor],
        cuts: Mapping[Tensor, Tensor],
    ) -> bool:
        self._scaling, self._skip, self._state, self._kept = (grad_scale, found_inf), False, state, kept
        values = [_read(group) for group in groups]
        stale = len(values) != len(self._seen) or any(map(differ, values, self._seen))
        structures = [_structure(group) for group in groups] if stale else self._structures
        known = structures == self._structures
        try:
            if not (known and self._refresh(groups, state, stale, cuts)) and not self._build(groups, state, cuts):
                return False
        except BaseException:
            self._forget()
            raise
        if stale:
            self._seen = [snapshot(v) for v in values]
            self._structures = structures
        # Whether buffers appear is decided here, so that a first step waits for the device; no other does.
        if self._new and found_inf is not None:
            self._skip = found_inf.item() > 0
        return True

    def _refresh(
        self,
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, Any],
        stale: bool,
        cuts: Mapping[Tensor, Tensor],
    ) -> bool:
        """Addresses and numbers of the tensors that are known; False where they are others, or lie otherwise."""
        if self._guards is None:
            return False
        params: list[Tensor] = []
        for group in groups:
            params += group["params"]
        if not _same(params, self._params) or [len(group["params"]) for group in groups] != self._lengths:
            return False
        grads: list[Any] = [p.grad for p in params]
        if [g is not None for g in grads] != self._active:  # also where one has no elements: it may get some
            return False
        tensors: list[Tensor] = params + grads
        if not self._all_active:
            tensors = [t for t, active in zip(tensors, self._active * 2, strict=True) if active]
        if self._buffers:
            # Walking the state compares every key and value by identity; a look-up would hash every parameter.
            if not (_same(list(state), self._state_keys) and _same(list(state.values()), self._state_values)):
                return False
            try:
                buffers = list(map(_momentum, self._states))
            except KeyError:
                return False
            if not _same(buffers, self._buffers):
                return False
            tensors += buffers
        tensors += [self._kept[p] for p in self._keepers]
        if self._selected and not _same([cuts[p] for p in self._selected], self._cuts):
            return False
        if not self._guards.check(*tensors):
            return False
        addresses = list(map(Tensor.data_ptr, tensors))
        if addresses != self._addresses:
            count = sum(self._active)
            if 0 in addresses or (
                addresses[:count] != self._addresses[:count] and turns_of(tensors[:count]) != self._turns
            ):
                return False
            self._move(addresses)
        self._held = tensors
        if stale:
            self._set(groups)
        return True

    def _move(self, addresses: list[int]) -> None:
        """`addresses`: of all active parameters, their gradients, what buffers there are, and what methods keep."""
        self._addresses = addresses
        kept = len(addresses) - len(self._keepers)
        n = (kept - len(self._buffers)) // 2
        w, g, m, x = addresses[:n], addresses[n : 2 * n], addresses[2 * n : kept], addresses[kept:]
        for launch, _, which, buffers, keepers in self._launches:
            launch.move(
                w if which is None else [w[k] for k in which],
                g if which is None else [g[k] for k in which],
                None if buffers is None else [m[k] for k in buffers],
                None if keepers is None else [x[k] for k in keepers],
            )

    def _set(self, groups: Sequence[Mapping[str, Any]]) -> None:
        for part in self._launches:
            part.launch.set(self._numbers(part.launch, groups))

    @staticmethod
    def _numbers(launch: Launch, groups: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], tuple[float, ...]]:
        """Those of each key: the place of the param group, the shape or None, whether the step is the first."""
        return {
            (i, shape, first): make_step(
                groups[i], float(groups[i]["lam"]) if shape is None else strength(groups[i], shape), first
            )
            for i, shape, first in launch.keys
        }

    def _build(
        self,
        groups: Sequence[MutableMapping[str, Any]],
        state: MutableMapping[Tensor, Any],
        cuts: Mapping[Tensor, Tensor],
    ) -> bool:
        """Look at everything anew; raises before anything is changed."""
        self._forget()
        kinds: dict[tuple[Any, ...], tuple[list[Row], list[int], list[int], list[int]]] = {}
        params, active, names = [], [], []
        rows: list[tuple[int, Tensor]] = []
        for i, group in enumerate(groups):
            for j, p in enumerate(group["params"]):
                if p.grad is not None and (p.device.type not in self._served or kind_of(p) is not None):
                    return False
                params.append(p)
                active.append(p.grad is not None)
                if p.grad is not None:
                    check_gradient(p, state, group, i, j, memory=True)
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
        addresses: list[list[int]] = [[], [], [], []]
        lasso, tl1 = set(), set()
        self._turns = turns_of([p for _, p in rows])
        for k, ((i, p), view) in enumerate(zip(rows, views, strict=True)):
            group = groups[i]
            grad, momentum = p.grad, group["momentum"] != 0
            assert grad is not None
            half = p.dtype in (torch.bfloat16, torch.float16)
            dtype = torch.float32 if half and grad.dtype != p.dtype else p.dtype
            turn = self._turns[k]
            w = self._stage(p, dtype, None, True, turn)
            g = self._stage(grad, dtype, w, False, turn)
            m = None
            first = False
            method = METHODS.index(group["method"]) if is_split(group) else 0
            kind = (self._turns[k], p.device, dtype, momentum, method)
            own, which, buffers, keepers = kinds.setdefault(kind, ([], [], [], []))
            if momentum:
                buffer = state[p].get(_NAME) if p in state else None
                first = buffer is None
                if buffer is None or buffer.dtype != p.dtype:  # its momentum follows it to another dtype
                    old, buffer = buffer, torch.zeros_like(w, dtype=p.dtype)
                    if old is not None:
                        buffer.copy_(old)
                    self._new.append((p, buffer))
                m = self._stage(buffer, dtype, w, True, turn)
                buffers.append(len(self._buffers))
                self._buffers.append(buffer)
                addresses[2].append(m.data_ptr())
            if method != 0:
                keepers.append(len(self._keepers))
                self._keepers.append(p)
                addresses[3].append(self._stage(self._kept[p], dtype, w, True, turn).data_ptr())
            cut = 0
            if is_topk(group):
                self._selected.append(p)
                self._cuts.append(cuts[p])
                cut = cuts[p].data_ptr()
            addresses[0].append(w.data_ptr())
            addresses[1].append(g.data_ptr())
            # With group_scale the strength depends on the size of the groups, and so on the shape.
            key = (i, p.shape if view is not None and group["group_scale"] else None, first)
            own.append(Row(w, g, view, key, cut))
            which.append(k)
            if group["group_lasso"] != 0:
                lasso.add(kind)
            if group["penalty"] == "tl1":
                tl1.add(kind)
        for kind, (own, which, buffers, keepers) in sorted(kinds.items(), key=lambda item: item[0][0]):
            turn, device, dtype, momentum, method = kind
            launch = Launch("step", dtype, device, own, kind in lasso, kind in tl1, momentum, method)
            all_of_them = len(which) == len(rows)
            self._launches.append(Part(launch, turn, None if all_of_them else which, buffers or None, keepers or None))
        self._move([a for of in addresses for a in of])
        self._set(groups)
        self._changed = [t for t in (*(p for _, p in rows), *self._buffers) if not t.is_inference()]
        self._params, self._active, self._all_active = params, active, all(active)
        self._lengths = [len(group["params"]) for group in groups]
        for launch, *_ in self._launches:
            for row in launch.rows:  # the tensors are found by address from now on
                row.w = row.g = None  # type: ignore[assignment]
        if _guards is not None and not self._staged and not self._new and rows:
            self._states = [state[p] for i, p in rows if groups[i]["momentum"] != 0]
            self._state_keys, self._state_values = list(state), list(state.values())
            kept = [self._kept[p] for p in self._keepers]
            tensors = [*(p for _, p in rows), *(p.grad for _, p in rows), *self._buffers, *kept]
            self._held = tensors
            self._guards = _guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        return True

    def _stage(self, tensor: Tensor, dtype: torch.dtype, like: Tensor | None, writes: bool, turn: int) -> Tensor:
        staged = Staged(tensor.detach(), dtype, like)
        if staged.is_copy:
            self._staged.append((staged, writes, turn))
        return staged.dense

    def _scaling_on(self, device: torch.device, arithmetic: torch.dtype) -> tuple[Tensor, Tensor]:
        """grad_scale and found_inf as the kernels read them; 1 and 0 where there are none."""
        key = device, arithmetic
        if key not in self._constants:
            one = torch.ones(1, dtype=arithmetic, device=device)
            self._constants[key] = one, torch.zeros(1, dtype=torch.int8, device=device)
        scale, skip = self._constants[key]
        grad_scale, found_inf = self._scaling
        if grad_scale is not None:
            scale = grad_scale.detach().to(device, arithmetic)
        if found_inf is not None:
            skip = found_inf.detach().to(device, torch.float32)
        return scale, skip

    def launch(self) -> None:
        if not self._skip:
            for p, buffer in self._new:
                self._state[p][_NAME] = buffer
            for turn in range(max(self._turns, default=-1) + 1):
                self._run_turn(turn)
            kept = [self._kept[p] for p in self._keepers]
            torch.autograd.graph.increment_version([*self._changed, *kept] if kept else self._changed)
        self.drop()

    def _run_turn(self, turn: int) -> None:
        """The launches of the parameters that have their turn, and the copies that these need."""
        for staged, _, own in self._staged:
            if own == turn:
                staged.load()
        for launch, own, *_ in self._launches:
            if own != turn:
                continue
            with on_device(launch.device):
                captured = capturing(launch.device)
                launch.run(*self._scaling_on(launch.device, launch.arithmetic), captured=captured)
            if captured:
                self._captured.append(launch)
        for staged, writes, own in self._staged:
            if own == turn and writes:
                staged.store()

    def drop(self) -> None:
        self._scaling = (None, None)
        self._held = None
        self._state, self._kept = {}, {}
        if self._new or self._staged:
            self._forget()

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
            launch.run(captured=capturing(launch.device))
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
            launch.run(captured=capturing(launch.device))
            if launch.totals.numel():
                total = total + launch.totals.sum().to(total.device)
            norms += [Row(t, t, None, row.key) for t, row in launch.norms]
        for launch in _run("penalty", norms):
            launch.run(captured=capturing(launch.device))
            total = total + launch.totals.sum().to(total.device)
        return total


def _row(w: Tensor, source: Tensor, group_dim: GroupDim, numbers: tuple[float, ...]) -> Row:
    return Row(w, source, view_of(w, group_dim), numbers)


def _run(action: str, rows: Sequence[Row]) -> Iterator[Launch]:
    """Launches of rows that are their own records, filled, each on its device."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Row]] = {}
    for row in rows:
        if row.w.numel() > 0:
            kinds.setdefault((row.w.device, row.w.dtype), []).append(row)
    for (device, dtype), own in kinds.items():
        with on_device(device):
            launch = Launch(action, dtype, device, own)
            launch.move([r.w.data_ptr() for r in own], [r.g.data_ptr() for r in own])
            launch.set({key: key for key in launch.keys})
            yield launch


@torch.library.custom_op("rvsm_kernels_triton::prox", mutates_args=())
def _prox(w: Tensor, penalty: str | None, tau: float, a: float, group_dim: list[int] | None) -> Tensor:
    u = torch.empty_like(w)
    staged = Staged(w.detach(), w.dtype, u)
    staged.load()
    try:
        row = _row(u, staged.dense, group_dim, (*make_prox(penalty, tau, a),))
    except ValueError as error:
        raise ValueError(f"Invalid group_dim value: {error}") from None
    for launch in _run("prox", [row]):
        launch.run(captured=capturing(launch.device))
    return u


@_prox.register_fake
def _(w: Tensor, penalty: str | None, tau: float, a: float, group_dim: list[int] | None) -> Tensor:
    return torch.empty_like(w)


def prox(w: Tensor, penalty: str | None, tau: float, a: float = 1.0, group_dim: GroupDim = None) -> Tensor:
    """Twin of :func:`rvsm_kernels.reference.prox`, an op of its own under torch.compile."""
    dims = kept_dims(group_dim, w.dim())
    return _prox(w, penalty, float(tau), float(a), None if dims is None else list(dims))
