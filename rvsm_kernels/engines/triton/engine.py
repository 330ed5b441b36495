"""The Triton engine: the same kernels where the build has none for the device.

One launch serves all parameters of a device, storage type and kind of step. The host looks at every parameter each
step, as torch.optim does, but touches only what changed: in the usual step one comparison of all tensors with those of
the last step, and one list of addresses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...method.selection import Selection
from ...method.split import is_nm
from ..checks import check_groups
from ..interface import Engine, Group, Ready, StepInputs
from ..windows import keep_largest_, value_of_windows
from . import u
from .launch import Launch
from .selection import Selecting
from .staging import on_device
from .step_table import StepTable
from .table import capturing


class TritonEngine(Engine):
    """Serves CUDA, ROCm and XPU tensors; in Triton's interpreter, CPU tensors."""

    name = "triton"

    def __init__(self, device_types: Sequence[str]) -> None:
        self._served = tuple(device_types)
        self._table = StepTable()
        self._selecting = Selecting(device_types)
        self._structures: list[Any] = []  # of the groups that the table was made for
        self._captured: list[Launch] = []  # graphs go on reading their tables
        self._constants: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._inputs: StepInputs | None = None
        self._skip = False

    # ---- the step ----------------------------------------------------------------------------------------------------

    def prepare(self, groups: Sequence[Group], inputs: StepInputs) -> Ready:
        self._inputs, self._skip = inputs, False
        is_new = inputs.changed is None or len(inputs.changed) > 0
        structures = [options.structure for options in inputs.options] if is_new else self._structures
        known = structures == self._structures and (is_new or not self._table.numbers_moved(inputs.options))
        try:
            if known and self._table.refresh(groups, inputs):
                if is_new:
                    self._table.set_numbers(inputs.options)
            else:
                ready = self._build(groups, inputs)
                if ready != Ready.YES:
                    self._forget()
                    return ready
        except BaseException:
            self._forget()
            raise
        self._structures = structures
        # New states are put into optimizer.state only if the step happens: a first step waits here for found_inf.
        if self._table.new_states and inputs.found_inf is not None:
            self._skip = inputs.found_inf.item() > 0
        return Ready.YES

    def _build(self, groups: Sequence[Group], inputs: StepInputs) -> Ready:
        """Look at everything anew; raises before anything is changed."""
        self._table = StepTable()
        slots = self._table.find(groups, inputs, self._served)
        if slots is None:
            return Ready.NO
        for slot in slots:
            if slot.options.method.starts_from_u and slot.states[slot.options.base_states] is None:
                return Ready.LACKS
        self._table.build(slots, inputs)
        self._table.set_numbers(inputs.options)
        return Ready.YES

    def _forget(self) -> None:
        """The next step is prepared from the start."""
        self._table = StepTable()
        self._inputs = None

    def launch(self) -> None:
        assert self._inputs is not None
        table, inputs = self._table, self._inputs
        if not self._skip:
            for p, name, state in table.new_states:
                inputs.states[p][name] = state
            for turn in range(max(table.turns, default=-1) + 1):
                self._run_turn(turn, inputs)
            torch.autograd.graph.increment_version(table.changed)
        self.drop()

    def _run_turn(self, turn: int, inputs: StepInputs) -> None:
        """The launches of the parameters that have their turn, and the copies that these need."""
        for staged, _, its_turn in self._table.copies:
            if its_turn == turn:
                staged.load()
        for launch, its_turn, *_ in self._table.launches:
            if its_turn != turn:
                continue
            with on_device(launch.device):
                captured = capturing(launch.device)
                launch.run(*self._scaling_on(launch.device, launch.opmath, inputs), captured=captured)
            if captured:
                self._captured.append(launch)
        for staged, writes, its_turn in self._table.copies:
            if its_turn == turn and writes:
                staged.store()

    def _scaling_on(self, device: torch.device, opmath: torch.dtype, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """grad_scale and found_inf as the kernels read them; 1 and 0 where there are none."""
        key = device, opmath
        if key not in self._constants:
            one = torch.ones(1, dtype=opmath, device=device)
            self._constants[key] = one, torch.zeros(1, dtype=torch.int8, device=device)
        scale, skip = self._constants[key]
        if inputs.grad_scale is not None:
            scale = inputs.grad_scale.detach().to(device, opmath)
        if inputs.found_inf is not None:
            skip = inputs.found_inf.detach().to(device, torch.float32)
        return scale, skip

    def drop(self) -> None:
        self._inputs = None
        self._table.held = None
        if self._table.new_states or self._table.copies:
            self._forget()

    def select(self, selections: Sequence[Selection]) -> None:
        self._selecting.select(selections)

    # ---- u -----------------------------------------------------------------------------------------------------------

    def check(self, p: Tensor, group: Mapping[str, Any], name: str) -> None:
        check_groups(p, group, name)

    def prox_(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> None:
        (keep_largest_ if is_nm(group) else u.prox_)(params, group)

    def penalty_value(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> Tensor:
        return (value_of_windows if is_nm(group) else u.penalty_value)(params, group)
