"""What a run looks like while it goes on: sparsity, L_beta, cuts and the schedule, for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from ..method.options import shown, whole_number
from .cuts_now import cuts_now
from .split_optimizer import SplitOptimizer
from .unwrap import optimizer_in


class Writer(Protocol):
    """What a monitor writes to: ``torch.utils.tensorboard.SummaryWriter`` and what looks like it."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Write one number."""


class Monitor:
    """Write to TensorBoard, every few steps, what an optimizer makes sparse.

    ::

        monitor = rk.Monitor(optimizer, "runs/sparse", schedule=schedule)
        for batch in batches:
            ...
            optimizer.step()
            schedule.step()
            monitor.step()

    Tags: ``sparsity/total`` and ``sparsity/<parameter>``, the share of zeros of u, and with groups
    ``zero_groups/<parameter>``; ``L_beta/penalty`` = lam P(u) + beta/2 ||w - u||^2; ``cut/<parameter>``, the magnitude
    (of groups: the norm) up to which u is 0; ``options/lam``, ``options/beta`` and ``options/pull_rate`` = lr * beta of
    each group; ``schedule/sparsity``, what a schedule asks for. After a :func:`rvsm_kernels.shrink` that is still a
    share of what was there when the schedule began; ``schedule/removed`` is the share that is gone then, and
    ``schedule/sparsity_left`` what is asked for of what is left, of which all other tags are.

    Where the optimizer gathers statistics (``statistics=True``), shares and L_beta are those of its last step, of the
    weights as the step found them, and cost nothing; else they are counted when they are written, which reads the
    weights. Either waits for a GPU.

    Args:
        optimizer: RVSM, RVSMAdamW, RVSMWrapper or a wrapper around one of them (:func:`rvsm_kernels.unwrap`).
        writer: a ``SummaryWriter``, or the folder for one, which needs tensorboard (``pip install tensorboard``).
        schedule: a :class:`SparsitySchedule`, whose sparsity is written too.
        every: steps from one writing to the next, >= 1.

    Raises:
        ImportError: a folder, and no tensorboard.
        TypeError, ValueError: an argument of the wrong type or out of range.
    """

    def __init__(self, optimizer: Any, writer: Writer | str | Path, *, schedule: Any = None, every: int = 100) -> None:
        self._optimizer = optimizer_in(optimizer, "Monitor")
        self.every = whole_number("every", every, 1)
        self.schedule = schedule
        self.last_step = 0
        if isinstance(writer, (str, Path)):
            from torch.utils.tensorboard import SummaryWriter  # an extra, imported only here

            writer = SummaryWriter(str(writer))  # type: ignore[no-untyped-call]
        if not hasattr(writer, "add_scalar"):
            raise TypeError(f"Monitor writes to a SummaryWriter or into a folder, not to {shown(writer)}")
        self.writer: Writer = writer

    def step(self) -> None:
        """Go on by one step, and write if it is time; call it after ``optimizer.step()``."""
        self.last_step += 1
        if self.last_step % self.every == 0:
            self.write()

    def write(self) -> None:
        """Write everything now."""
        for tag, value in self._scalars().items():
            self.writer.add_scalar(tag, value, self.last_step)

    def _scalars(self) -> dict[str, float]:
        optimizer = self._optimizer
        found = _of_last_step(optimizer) if optimizer.collect_statistics else _counted(optimizer)
        found |= {f"cut/{now.name}": now.cut for now in cuts_now(optimizer)}
        for i, group in enumerate(optimizer.param_groups):
            if group["penalty"] is None:
                continue
            lam, beta, lr = (float(group[key]) for key in ("lam", "beta", "lr"))
            for option, value in (("lam", lam), ("beta", beta), ("pull_rate", lr * beta)):
                found[f"options/{option}/group {i}"] = value
        if self.schedule is not None:
            found["schedule/sparsity"] = self.schedule.sparsity
            if self.schedule.removed:
                found["schedule/removed"] = self.schedule.removed
                found["schedule/sparsity_left"] = self.schedule.sparsity_left
        return found

    def state_dict(self) -> dict[str, Any]:
        """The steps so far."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.last_step = int(state_dict["last_step"])


def _of_last_step(optimizer: SplitOptimizer) -> dict[str, float]:
    """Shares and L_beta from the statistics of the last step."""
    last = optimizer.statistics()
    found = {"L_beta/penalty": float(last.split.value)}
    for row in (last.split, *(row for row in last.rows if row.split)):
        name = "total" if row is last.split else row.name
        found[f"sparsity/{name}"] = int(row.zeros) / max(row.elements, 1)
        if row is not last.split and row.groups not in (0, row.elements):
            found[f"zero_groups/{name}"] = int(row.zero_groups) / row.groups
    return found


def _counted(optimizer: SplitOptimizer) -> dict[str, float]:
    """The same of the weights as they are."""
    report = optimizer.sparsity()
    found = {"sparsity/total": report.share, "L_beta/penalty": float(optimizer.penalty_value())}
    for row in report.rows:
        found[f"sparsity/{row.name}"] = row.share
        if row.groups not in (0, row.numel):
            found[f"zero_groups/{row.name}"] = row.group_share
    return found
