"""What an optimizer asks of an engine."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..method.groups import Grouping
from ..method.precision import Stored
from ..method.selection import Room, Selection, normalize_, select
from ..method.step_options import StepOptions
from ..method.support import Support, TorchSupport

Group = MutableMapping[str, Any]


@dataclass(slots=True)
class StepInputs:
    """All that a step needs beside the parameters and their gradients; made by the optimizer, once a step.

    Attributes:
        grad_scale: what the gradients are to be divided by, a 1-element tensor, or None for 1.
        found_inf: a 1-element tensor, above 0 where the step must change nothing; or None.
        options: of each param group that the engine is given.
        states: ``optimizer.state``. An engine finds the states of a parameter there by the names in its group's
            options. Those of the base and a dual that are missing begin with zeros and are made by the engine, which
            puts them there when the step is launched; a state of another floating dtype than its parameter is replaced
            by its conversion then.
        instead: states to read and write in the place of those in ``states``, by parameter and name: the first "u" of
            a parameter, copies where a step must not change a state. The engine does not put them into ``states``.
        cuts: of parameters with top-k, a 0-dim tensor in the type of the arithmetic, on the parameter's device. It
            holds its value when the step is launched, not yet when it is prepared.
        norms: norms of groups that were made elsewhere (on another rank, over several tensors): float64, one number
            for each group in the order of its group view (batch * groups + group), on the parameter's device; with
            ADMM and a group lasso two rows, of w + dual and of w. Norms that are missing here the engine sums itself.
        statistics: where the step is to write its statistics: seven float64 numbers for each parameter, contiguous and
            on the device of its memory (:data:`rvsm_kernels.method.statistics.COLUMNS`). Empty where none are wanted.
            Of a parameter that occurs twice they are those of the last occurrence.
        new_squares: 1-element float64 tensors on the CPU: where the sum of squares of the new weights of a parameter
            goes, for an engine that adds it up in its step. Others leave it as it is, and so does a step that is called
            off.
        changed: the places of the groups whose options are new since the last step that this engine prepared; None for
            all of them.
    """

    grad_scale: Tensor | None
    found_inf: Tensor | None
    options: Sequence[StepOptions]
    states: MutableMapping[Tensor, MutableMapping[str, Any]]
    instead: Mapping[Tensor, Mapping[str, Tensor]] = field(default_factory=dict)
    cuts: Mapping[Tensor, Tensor] = field(default_factory=dict)
    norms: Mapping[Tensor, Tensor] = field(default_factory=dict)
    statistics: Mapping[Tensor, Tensor] = field(default_factory=dict)
    new_squares: Mapping[Tensor, Tensor] = field(default_factory=dict)
    changed: Collection[int] | None = None

    def state_of(self, p: Tensor, name: str) -> Tensor | None:
        """The state of that name that a step of a parameter reads and writes, None where it is missing."""
        replaced = self.instead.get(p)
        if replaced is not None and name in replaced:
            return replaced[name]
        return self.states[p].get(name) if p in self.states else None


class Ready(enum.IntEnum):
    """What :meth:`Engine.prepare` answers."""

    NO = 0
    """The engine does not serve a parameter that has a gradient."""
    YES = 1
    """The step can be launched."""
    LACKS = 2
    """A state "u" is missing. Only the optimizer can make it; it does, and asks again."""


class Engine(ABC):
    """Does the arithmetic of steps, of the prox and of the penalty's value. One object belongs to one optimizer."""

    name: str

    @abstractmethod
    def prepare(self, groups: Sequence[Group], inputs: StepInputs) -> Ready:
        """Check everything that a step over these groups needs; change nothing.

        Raises:
            RuntimeError, TypeError, ValueError: what :func:`rvsm_kernels.engines.checks.check_entry` raises.
        """

    @abstractmethod
    def launch(self) -> None:
        """Do the step that was prepared."""

    def step(self, groups: Sequence[Group], inputs: StepInputs) -> Ready:
        """:meth:`prepare`, and :meth:`launch` if the answer was YES."""
        ready = self.prepare(groups, inputs)
        if ready == Ready.YES:
            self.launch()
        return ready

    def drop(self) -> None:  # noqa: B027 - not every engine holds something
        """Forget what was prepared and let go of its tensors."""

    def check(self, p: Tensor, group: Mapping[str, Any], name: str) -> None:  # noqa: B027 - most need none
        """Raise ValueError if this engine cannot sum over the groups of a parameter."""

    def select(self, selections: Sequence[Selection]) -> None:
        """Fill the cuts of top-k of parameters that this engine serves."""
        select(selections)

    def normalize_(
        self, tensors: Sequence[Stored], found_inf: Tensor | None, lr: Any, squares: Mapping[Tensor, Tensor]
    ) -> None:
        """w <- w / ||w||_2 of each of some parameters; see :func:`rvsm_kernels.method.selection.normalize_`.

        Args:
            squares: :attr:`StepInputs.new_squares` after the step; a negative one is not known.
        """
        normalize_(tensors, found_inf, lr)

    def support_of(self, p: Tensor, density: float, grouping: Grouping, room: Room) -> Support:
        """The support of H_s of a parameter as it is now.

        Args:
            room: where the cut may go, and what may be remembered of it from call to call.
        """
        return TorchSupport(p, density, grouping)

    def copy_of(self, p: Tensor) -> Tensor:
        """A copy of a parameter in its layout."""
        return p.detach().clone()

    @abstractmethod
    def prox_(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> None:
        """w <- prox_{tau P}(w) in place, for parameters of one split group."""

    def sums_of_u(
        self, weights: Sequence[Tensor], group: Mapping[str, Any], cuts: Sequence[Tensor], zeros: bool
    ) -> Tensor | None:
        """Sums over u = prox(weights), which is not made; None where the engine has no such kernel.

        Args:
            group: a split group; its penalty top-k needs ``cuts``, one for each tensor.
            zeros: False leaves zeros of u in groups uncounted, and the weights are read once.

        Returns:
            For each tensor four float64 numbers on the CPU: zeros, zero groups, ||w - u||^2, P(u).
        """
        return None

    @abstractmethod
    def penalty_value(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> Tensor:
        """lam P(u) + beta/2 ||w - u||^2 over the parameters of one split group, 0-dim float64."""
