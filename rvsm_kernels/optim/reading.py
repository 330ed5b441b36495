"""What every split optimizer says of u, and of its last step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from ..method.options import shown
from ..model.recalibrate import check_recalibration
from ..model.sparsity import SparsityReport
from .hold import begin_to_hold, penalised_groups
from .sparse_view import SparseView
from .sparse_weights import SparseWeights
from .statistics import Statistics, StepStatistics

if TYPE_CHECKING:
    from .split_optimizer import SplitOptimizer


class ReadsU:
    """The methods of :class:`SplitOptimizer` that read u, put it into the parameters, and read statistics."""

    _view: SparseView
    _statistics: StepStatistics
    _lock: Any

    def sparse_weights(
        self,
        model: nn.Module | None = None,
        *,
        frozen: bool = False,
        recalibrate: Iterable[Any] | None = None,
        batches: int | None = None,
    ) -> SparseWeights:
        """Hold u = prox_{tau P}(w) in the parameters, and give w back bit for bit afterwards.

        ::

            with optimizer.sparse_weights():
                validate(model)

        w comes back also when the body raises. Inside, :meth:`step` and a second :meth:`sparse_weights` raise
        RuntimeError. Costs one copy of the split parameters while it is open.

        What shares memory with the parameters shows w again afterwards: ``model.state_dict()``, and what
        ``torch.export`` or ``torch.jit.trace`` made of the model. To keep u, take
        :func:`rvsm_kernels.sparse_copy` or :func:`rvsm_kernels.sparse_state_dict`.

        Args:
            model: its batch norms' running statistics are given back too. Without it, a forward pass in training mode
                changes them for good, which is warned about.
            frozen: also parameters with ``requires_grad=False``, which else stay as they are.
            recalibrate: batches, from which :func:`rvsm_kernels.recalibrate` estimates the running statistics of the
                model for u; afterwards those of w come back, bit for bit.
            batches: at most so many of them; None takes all.

        Raises:
            TypeError: something else than a module.
            ValueError: ``recalibrate`` without the model, ``batches`` without ``recalibrate``; when it is entered, what
                :func:`rvsm_kernels.recalibrate` raises, and then the parameters hold w.
        """
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"sparse_weights takes a module or nothing, but got a {type(model).__name__}")
        check_recalibration(model, recalibrate, batches)
        to_recalibrate = None if recalibrate is None else (recalibrate, batches)
        return SparseWeights(cast("SplitOptimizer", self), model, frozen, to_recalibrate)

    def sparsify_(self, *, frozen: bool = False, hold: bool = False) -> None:
        """w <- u for good. Momentum is left alone, so a pruned weight may grow again, unless it is held.

        Until a step or an edit changes them, the weights are u: a second call changes nothing, :meth:`sparse_weights`
        holds what they are, and :meth:`sparsity` counts it. The dual of ``method="admm"`` becomes what the step makes
        of it, w + dual - u, so that u stays what it is.

        Args:
            frozen: also parameters with ``requires_grad=False``, which else stay as they are.
            hold: what is 0 now stays 0: ``hold_zeros`` becomes True in all groups with a penalty, and the states of
                what is 0 become 0.

        Raises:
            RuntimeError: inside :meth:`sparse_weights`; parameters of FullyShardedDataParallel (FSDP1).
            TypeError: ``hold`` is neither True nor False.
            ValueError: zeros that cannot be held: AdamW with an eps of 0.
        """
        if not isinstance(hold, bool):
            raise TypeError(f"Invalid hold value: {shown(hold)} (True or False is needed)")
        with self._lock:
            if hold:  # all that can fail comes before the first write
                penalised_groups(cast("SplitOptimizer", self))
            self._view.sparsify_(frozen)
            if hold:
                begin_to_hold(cast("SplitOptimizer", self))

    def penalty_value(self) -> Tensor:
        """lam P(u) + beta/2 ||w - u||^2 over all split parameters: ``loss + penalty_value()`` is L_beta(w, u).

        Returns:
            A 0-dim float64 tensor on the parameters' device; not differentiable.
        """
        with self._lock:
            return self._view.penalty_value()

    def sparsity(self) -> SparsityReport:
        """How sparse u is: zeros and zero groups of every parameter with a penalty, and in total.

        Frozen parameters (``requires_grad=False``), and weights that :meth:`sparsify_` has made u, are counted as they
        are.
        """
        with self._lock:
            return self._view.sparsity()

    @property
    def collect_statistics(self) -> bool:
        """Whether steps make statistics, as the argument ``statistics`` says at first; can be set between steps."""
        return self._statistics.on

    @collect_statistics.setter
    def collect_statistics(self, on: bool) -> None:
        if not isinstance(on, bool):
            raise TypeError(f"Invalid statistics value: {shown(on)} (True or False is needed)")
        self._statistics.on = on

    def statistics(self) -> Statistics:
        """What the last step with ``statistics=True`` has counted and added up, of each parameter and in total.

        ::

            optimizer.step()
            last = optimizer.statistics()
            log(zeros=last.split.zeros, L=loss + last.total.value, grad=last["layer.weight"].grad)

        They belong to the weights as the step found them, with the options of that step: the u that pulled. A step that
        ``found_inf`` has called off leaves the numbers of the step before. Parameters without a gradient are not among
        them, with a wrapper only those with a penalty.

        Returns:
            Tensors on the parameters' devices, copies that later steps leave alone; nothing waits for a device. Of
            DTensors they are sums over all ranks, so that every rank must ask; under ZeroRedundancyOptimizer those of
            this rank's parameters.

        Raises:
            RuntimeError: no step has made any yet.
        """
        return self._statistics.report()
