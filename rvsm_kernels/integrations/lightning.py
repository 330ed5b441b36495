"""Sparse weights in Lightning: validated, saved and logged by one callback.

::

    trainer = lightning.Trainer(callbacks=[SparseWeightsCallback()])

``configure_optimizers`` returns one of our optimizers, for example ``rk.RVSM(rk.param_groups(self.net, ...), lr=0.1)``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import wraps
from typing import Any

try:
    import lightning.pytorch as pl
except ImportError:  # the same library under its other name; with both, the callback serves the Trainers of both
    import pytorch_lightning as pl
from torch import nn

from ..method.options import choice
from ..optim.unwrap import unwrap
from .held import HeldSparseWeights, Recalibration, measured, sparsify


class SparseWeightsCallback(pl.Callback):
    """Holds the sparse weights u during validation, test and prediction while a Trainer trains w.

    - w is back bit for bit after each of them, also after an error or Ctrl-C, and before a ModelCheckpoint saves. A
      checkpoint holds w even if it is written inside a validation.
    - ``sparsity`` (the share of zeros of u among the penalised weights), ``penalty_value`` and, where the training step
      returns a loss, ``L_beta`` (loss and penalty) are logged every ``log_every_n_steps`` steps.
    - After a ``fit()``, ``trainer.validate()`` and ``trainer.test()`` of the same trainer measure u. A trainer that has
      no optimizer measures the weights as they are, and so does the sanity check before the training.

    Several optimizers are served together; those of other libraries are left alone.

    Args:
        evaluate: ``"u"``, or ``"w"``.
        sparsify_at_end: w <- u for good at the end of ``fit()``.
        save: what ``trainer.save_checkpoint()``, and so a ModelCheckpoint, writes: ``"w"``, from which a training
            resumes bit for bit, or ``"u"``, to ship, not to resume.
        recalibrate: batches for the running statistics of batch norms, whenever the weights are u: of a tuple or list
            the first item goes to the module's ``forward``. True: of the training loader's data. The statistics of w
            are back afterwards, but for those that ``sparsify_at_end`` leaves. None: u is measured with those of w.
        batches: of them at most so many, each time; None takes all.

    Raises:
        ValueError: another value.
        TypeError: when ``fit()`` begins with optimizers of other libraries only; ``recalibrate`` of a module without a
            ``forward``.
    """

    def __init__(
        self,
        evaluate: str = "u",
        sparsify_at_end: bool = False,
        save: str = "w",
        recalibrate: Iterable[Any] | bool | None = None,
        batches: int | None = None,
    ) -> None:
        choice(("u", "w"))("evaluate", evaluate)
        self.evaluate = evaluate
        choice(("w", "u"))("save", save)
        self.save = save
        self.sparsify_at_end = bool(sparsify_at_end)
        self._recalibration = Recalibration(recalibrate, batches)
        self._held = HeldSparseWeights(self._recalibrate)
        self._steps_before = 0
        self._training: Any = None  # the loader, which the trainer forgets when fit() ends

    # ---- u -----------------------------------------------------------------------------------------------------------

    def _open(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # The sanity check runs before the training: u of weights that nothing has trained says nothing.
        if self.evaluate == "u" and not trainer.sanity_checking:
            self._held.open(_ours(trainer), module)

    def _recalibrate(self, module: nn.Module) -> None:
        def training() -> tuple[Any, int]:
            loader = self._training
            sizes = [getattr(x, "batch_size", None) for x in (loader, getattr(loader, "batch_sampler", None))]
            return loader, next((size for size in sizes if size is not None), 1)

        trainer: Any = module.trainer
        precision = trainer.precision_plugin
        with precision.forward_context():
            self._recalibration.run(module, training, precision.convert_input)  # of bf16-true: into bfloat16

    def _close(self, *_: Any) -> None:
        self._held.close()

    on_validation_start = _open
    on_validation_end = _close
    on_test_start = _open
    on_test_end = _close
    on_predict_start = _open
    on_predict_end = _close
    on_exception = _close

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # on_save_checkpoint would see less: it is not called for checkpoints of the weights alone.
        if self._recalibration.is_on and type(pl_module).forward is pl.LightningModule.forward:
            raise TypeError(
                f"recalibrate calls the module with batches: {type(pl_module).__name__} has no forward; write one, or"
                " leave recalibrate=None"
            )
        original = trainer.save_checkpoint
        if getattr(original, "of_callback", None) is self:
            return

        @wraps(original)
        def save_checkpoint(filepath: Any, *args: Any, **kwargs: Any) -> Any:
            ours = _ours(trainer)
            # The tuner (LearningRateFinder, BatchSizeFinder) saves to a hidden file, to undo what it does.
            u = self.save == "u" and bool(ours) and not os.path.basename(filepath).startswith(".")
            with self._held.holding(u, ours, trainer.lightning_module):
                return original(filepath, *args, **kwargs)

        save_checkpoint.of_callback = self  # type: ignore[attr-defined]
        trainer.save_checkpoint = save_checkpoint

    # ---- the training ------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._training = trainer.train_dataloader
        if not _ours(trainer):
            for optimizer in trainer.optimizers:
                unwrap(optimizer)  # raises, and says why

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._steps_before = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        every = trainer.log_every_n_steps
        if not every or trainer.global_step // every == self._steps_before // every:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        # Lightning has divided the loss by the number of batches of a step.
        whole = None if loss is None else float(loss) * trainer.accumulate_grad_batches
        pl_module.log_dict(measured(_ours(trainer), whole), on_step=True, on_epoch=False, batch_size=1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.sparsify_at_end:
            sparsify(_ours(trainer))
            self._recalibrate(pl_module)


def _ours(trainer: pl.Trainer) -> list[Any]:
    """The optimizers of this library among those of a trainer."""
    ours = []
    for optimizer in trainer.optimizers:
        try:
            ours.append(unwrap(optimizer))
        except TypeError:
            continue
    return ours
