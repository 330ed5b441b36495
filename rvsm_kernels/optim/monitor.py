"""What a run looks like while it goes on: sparsity, L_beta, cuts and the schedule, for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from ..method.options import shown, whole_number
from .cuts_now import cuts_now
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
    each group; ``schedule/sparsity``, what a schedule asks for.

    All of it is counted when it is written, which reads the weights and waits for a GPU.

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
        report = optimizer.sparsity()
        found = {"sparsity/total": report.share, "L_beta/penalty": float(optimizer.penalty_value())}
        for row in report.rows:
            found[f"sparsity/{row.name}"] = row.share
            if row.groups not in (0, row.numel):
                found[f"zero_groups/{row.name}"] = row.group_share
        found |= {f"cut/{now.name}": now.cut for now in cuts_now(optimizer)}
        for i, group in enumerate(optimizer.param_groups):
            if group["penalty"] is None:
                continue
            lam, beta, lr = (float(group[key]) for key in ("lam", "beta", "lr"))
            for option, value in (("lam", lam), ("beta", beta), ("pull_rate", lr * beta)):
                found[f"options/{option}/group {i}"] = value
        if self.schedule is not None:
            found["schedule/sparsity"] = self.schedule.sparsity
        return found

    def state_dict(self) -> dict[str, Any]:
        """The steps so far."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.last_step = int(state_dict["last_step"])
