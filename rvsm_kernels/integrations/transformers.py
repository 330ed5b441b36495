"""Sparse weights in the Trainer of transformers: evaluated, saved and logged by one callback.

::

    optimizer = rk.RVSMAdamW(rk.param_groups(model, penalty="l0", lam=1e-5, beta=8.0), lr=1e-3)
    trainer = Trainer(model, args, ..., optimizers=(optimizer, None), callbacks=[SparseWeightsCallback()])
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial, wraps
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from ..method.options import SPLIT_OPTIONS, choice, names_of
from ..model.param_groups import InOrder, param_groups
from ..optim import RVSM, RVSMAdamW
from ..optim.unwrap import unwrap
from .held import HeldSparseWeights, Recalibration, measured, share_of_zeros, sparsify


class SparseWeightsCallback(TrainerCallback):
    """Evaluates, saves and logs the sparse weights u while a Trainer trains w.

    - ``trainer.evaluate()`` and ``trainer.predict()`` measure u, during training and afterwards. w is back bit for bit
      when they return or raise, so that whatever is logged or saved next is of w.
    - The training logs get ``sparsity`` (the share of zeros of u among the penalised weights), ``penalty_value`` and
      ``L_beta`` (the logged loss and the penalty); the metrics of an evaluation get ``eval_sparsity``.
    - ``Trainer(optimizer_cls_and_kwargs=(rk.RVSMAdamW, {...}))`` penalises what ``rk.param_groups(model)`` takes and
      leaves biases, norms and embeddings dense; without the callback the Trainer hands the optimizer all parameters
      alike. The options of ``rk.param_groups`` (``structure``, ``include``) may stand among the others. ``lr`` and
      ``weight_decay`` are those of the TrainingArguments where the options have none, and biases and norms do not
      decay, as in the Trainer.

    Give it to the constructor, ``Trainer(..., callbacks=[SparseWeightsCallback()])``, or to a Trainer that exists,
    ``SparseWeightsCallback().attach(trainer)``. ``trainer.add_callback`` does the same, but only when the training
    begins; ``trainer.remove_callback`` ends it.

    Args:
        evaluate: ``"u"``; ``"w"``; ``"both"``: ``eval_loss`` and the other metrics are those of u, and ``eval_w_loss``
            and so on those of w, at the price of a second evaluation.
        sparsify_at_end: w <- u for good at the end of the training, so that ``trainer.save_model()`` writes exact
            zeros. Checkpoints that were written before hold w.
        save: what ``trainer.save_model()`` and the checkpoints hold: ``"w"``, from which a training resumes bit for
            bit; ``"u"``, to ship, not to resume; ``"both"``: w, and u in the folder ``sparse`` inside.
        recalibrate: batches for the running statistics of batch norms, whenever the weights are u
            (:func:`rvsm_kernels.recalibrate`). True: of the training's data. The statistics of w are back afterwards,
            but for those that ``sparsify_at_end`` leaves. None: u is measured with those of w.
        batches: of them at most so many, each time; None takes all.

    Raises:
        ValueError: another value; a second such callback in one Trainer.
        TypeError: when the training begins with another optimizer than those of this library.
    """

    def __init__(
        self,
        evaluate: str = "u",
        sparsify_at_end: bool = False,
        save: str = "w",
        recalibrate: Iterable[Any] | bool | None = None,
        batches: int | None = None,
    ) -> None:
        choice(("u", "w", "both"))("evaluate", evaluate)
        self.evaluate = evaluate
        choice(("w", "u", "both"))("save", save)
        self.save = save
        self.sparsify_at_end = bool(sparsify_at_end)
        self._recalibration = Recalibration(recalibrate, batches)

    def recalibrate(self, trainer: Trainer, model: nn.Module) -> None:
        """Estimate the running statistics of a Trainer's model anew, where the callback was asked to."""

        def training() -> tuple[Any, int]:
            now = trainer.callback_handler.train_dataloader
            return trainer.get_train_dataloader() if now is None else now, trainer.args.train_batch_size

        self._recalibration.run(model, training)

    def attach(self, trainer: Trainer) -> None:
        """Add the callback to a Trainer, around what that does to evaluate, save and log; once is enough."""
        # The Trainer has no hook before an evaluation, and none after one that raises. Its calls of optimizer.eval()
        # and optimizer.train() could hold u too, but an error in between would leave u in the weights.
        before = getattr(trainer, "_sparse_weights", None)
        if before is not None:
            if before.callback is not self:
                raise ValueError("this Trainer has a SparseWeightsCallback already")
            return
        cls = _class_for(trainer)
        if cls is not None and trainer.optimizer is not None:
            raise ValueError(
                f"the Trainer has made {cls.__name__} of all parameters alike before it knew the callback: give it to"
                " the constructor, Trainer(callbacks=[SparseWeightsCallback()])"
            )
        trainer._sparse_weights = _Attached(self, trainer)
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.attach(_calling_trainer())

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.attach(_calling_trainer())
        unwrap(optimizer)  # raises where there is none of ours

    def on_train_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if self.sparsify_at_end:
            sparsify([unwrap(optimizer)])
            trainer = _calling_trainer()
            self.recalibrate(trainer, trainer.model)


class _Attached:
    """A callback in a Trainer: methods of the Trainer, with u where the callback wants it."""

    def __init__(self, callback: SparseWeightsCallback, trainer: Trainer) -> None:
        self.callback = callback
        self._trainer = trainer
        self._held = HeldSparseWeights(lambda model: callback.recalibrate(trainer, model))
        for name in ("create_optimizer", "evaluation_loop", "save_model", "log"):
            original = getattr(trainer, name)
            setattr(trainer, name, wraps(original)(partial(getattr(self, name), original)))

    @property
    def _optimizers(self) -> list[Any]:
        """The optimizer of this library; none before the Trainer has made it, or once the callback is removed."""
        removed = self.callback not in self._trainer.callback_handler.callbacks
        return [] if removed or self._trainer.optimizer is None else [unwrap(self._trainer.optimizer)]

    def create_optimizer(self, original: Callable[..., Any], model: nn.Module | None = None) -> Any:
        trainer, cls = self._trainer, _class_for(self._trainer)
        if cls is not None and trainer.optimizer is None:
            options = trainer.optimizer_cls_and_kwargs[1]
            trainer.optimizer = _optimizer_for(trainer, cls, trainer.model if model is None else model, **options)
        return original() if model is None else original(model)  # keeps an optimizer that is there

    def evaluation_loop(
        self,
        original: Callable[..., Any],
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **more: Any,
    ) -> Any:
        optimizers, trainer = self._optimizers, self._trainer
        evaluate = partial(original, dataloader, description, prediction_loss_only, ignore_keys, **more)
        if not optimizers or self.callback.evaluate == "w":
            return evaluate(metric_key_prefix=metric_key_prefix)
        switch = getattr(trainer.optimizer, "eval", None)
        if switch is not None:  # the Trainer does so too, but later: modes must not change while the weights are u
            switch()
        with self._held.holding(True, optimizers, trainer.model):
            output = evaluate(metric_key_prefix=metric_key_prefix)
        output.metrics[f"{metric_key_prefix}_sparsity"] = share_of_zeros(optimizers)
        if self.callback.evaluate == "both":
            # A data loader draws a seed, even where it shuffles nothing; the training must not see the second draw.
            random = torch.get_rng_state()
            of_w = evaluate(metric_key_prefix=f"{metric_key_prefix}_w")
            torch.set_rng_state(random)
            output.metrics.update(of_w.metrics)
        return output

    def save_model(
        self, original: Callable[..., Any], output_dir: str | None = None, _internal_call: bool = False
    ) -> None:
        save, optimizers, model = self.callback.save, self._optimizers, self._trainer.model
        with self._held.holding(save == "u" and bool(optimizers), optimizers, model):
            original(output_dir, _internal_call)
        if save == "both" and optimizers:
            inside = os.path.join(self._trainer.args.output_dir if output_dir is None else output_dir, "sparse")
            with self._held.holding(True, optimizers, model):
                original(inside, True)  # an internal call is not pushed to the hub

    def log(self, original: Callable[..., Any], logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        optimizers = self._optimizers
        if "loss" in logs and optimizers:  # the logs of a training step
            logs.update(measured(optimizers, logs["loss"]))
        original(logs, *args, **kwargs)


def _calling_trainer() -> Trainer:
    """The Trainer among the callers of a hook: it hands its callbacks everything but itself."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back
    raise RuntimeError("no Trainer calls this SparseWeightsCallback: give it the Trainer, callback.attach(trainer)")


def _class_for(trainer: Trainer) -> type[RVSM | RVSMAdamW] | None:
    """The class of this library in ``optimizer_cls_and_kwargs``, which the Trainer would hand two plain groups."""
    cls = (trainer.optimizer_cls_and_kwargs or (None,))[0]
    return cls if isinstance(cls, type) and issubclass(cls, (RVSM, RVSMAdamW)) else None


def _optimizer_for(trainer: Trainer, cls: type[RVSM | RVSMAdamW], model: nn.Module, **options: Any) -> RVSM | RVSMAdamW:
    """The optimizer of ``optimizer_cls_and_kwargs`` over the groups of ``rk.param_groups``."""
    options = {"lr": trainer.args.learning_rate, "weight_decay": trainer.args.weight_decay, **options}
    of_groups = {*inspect.signature(param_groups).parameters, *names_of(SPLIT_OPTIONS)}
    of_groups -= {"model", "named", "maximize"}  # the rest is maximized too
    groups = param_groups(model, **{name: options.pop(name) for name in of_groups & set(options)})
    decaying = set(trainer.get_decay_parameter_names(model))
    divided = []
    for group in groups:
        named = group["params"]
        for decays in (True, False):
            places = [i for i, (name, _) in enumerate(named) if (name in decaying) == decays]
            if places:
                members = InOrder(named[i] for i in places)
                members.order = [named.order[i] for i in places]
                divided.append({**group, "params": members, **({} if decays else {"weight_decay": 0.0})})
    return cls(divided, **options)
