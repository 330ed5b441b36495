"""The training loop: epochs, measurements, checkpoints, logs."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import rvsm_kernels as rk
from deep import data, files, methods, models, pruning
from deep.data import Dataset, Images
from deep.settings import PRUNERS, Settings, SettingsError

CHECKPOINT = "checkpoint.pt"
EVALUATION_BATCH = 1000

Perturb = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, images in [0, 1], labels) to the images to train on."""

Row = dict[str, Any]


class Stopped(Exception):
    """A training that ended before its last epoch, in one line that says how to go on."""

    status = 1


class Interrupted(Stopped):
    """A training that Ctrl-C ended."""

    status = 130  # what a shell reports for SIGINT


def to_float(x: Tensor, device: str, channels_last: bool = False) -> Tensor:
    """Images of bytes to float32 in [0, 1] on a device."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = x.to(device)
    return (x.float() / 255 if x.dtype == torch.uint8 else x).contiguous(memory_format=layout)


class Clock:
    """Seconds of many short intervals; on a GPU between events, so that nothing waits for them meanwhile."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Adds the time of its body."""
        if not self._cuda:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._events.append((start, end))

    def seconds(self) -> float:
        """The sum so far; waits for a GPU."""
        if self._events:
            torch.cuda.synchronize()
            self._seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1e3
            self._events.clear()
        return self._seconds


class Training:
    """A model in training: what a checkpoint holds.

    Args:
        settings: what to train, and how.
        dataset: its images.
        perturb: what is done to the images of a batch before the model is trained on them (an attack, say).

    Raises:
        SettingsError: settings that do not fit each other or the data.
    """

    def __init__(self, settings: Settings, dataset: Dataset, perturb: Perturb | None = None) -> None:
        self.settings = s = settings
        self.perturb = perturb
        _use_device(s.device)
        dataset, self.validation = data.divide(dataset, s.validation, s.seed)
        self.train_images, self.test_images = dataset.train, dataset.test
        self.augment = dataset.augment if s.augment is None else s.augment
        self.order = torch.Generator().manual_seed(s.seed)
        torch.manual_seed(s.seed)
        try:
            net = models.build(s.model, dataset.channels, dataset.classes, dataset.size, width=s.width, noise=s.noise)
        except ValueError as error:
            raise SettingsError(str(error)) from error
        self.example = to_float(self.train_images.x[:2], s.device)
        self.model: nn.Module = models.Normalized(net, *dataset.statistics()).to(s.device)
        if s.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.sizes = methods.sizes(self.model)
        """Weights and channels of each layer before any pruning."""
        self.first_map = methods.map_layer(self.model)
        kind = torch.device(s.device).type
        self.scaler = torch.amp.GradScaler(kind, enabled=s.amp and kind == "cuda")
        self.pruned: list[Any] | None = None
        self.epoch = 0
        self.history: list[Row] = []
        self.best: dict[str, Any] | None = None
        self._set_up()

    def _set_up(self) -> None:
        """Optimizer, compiled model and pruner for the model as it is now."""
        self.optimizer = methods.optimizer_for(self.settings, self.model)
        self.reader = methods.reader_for(self.settings, self.model, self.optimizer)
        self.forward = torch.compile(self.model) if self.settings.compile else self.model
        # What network slimming adds to the gradients chooses the channels; after that it has done its work.
        done = self.pruned is not None
        self.regularize = None if done else pruning.regularizer(self.settings, self.model, self.example)

    def lr(self) -> float:
        """The learning rate of the next epoch: divided by 10 at every milestone.

        A training from scratch after a pruning goes through the schedule again, in its own time; else it keeps the
        last learning rate.
        """
        s = self.settings
        epoch, milestones = self.epoch, s.milestones
        if epoch >= s.epochs and s.scratch:
            epoch -= s.epochs
            milestones = tuple(m * s.finetune // max(1, s.epochs) for m in milestones)
        return s.lr * 0.1 ** sum(epoch >= m for m in milestones)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision, if it is asked for."""
        kind = "cuda" if self.settings.device.startswith("cuda") else "cpu"
        dtype = torch.float16 if kind == "cuda" else torch.bfloat16
        return torch.autocast(kind, dtype=dtype, enabled=self.settings.amp)

    # ---- one epoch ---------------------------------------------------------------------------------------------------

    def train_epoch(self) -> Row:
        """Train on all images once.

        Returns:
            Mean loss (of the images trained on), seconds of the epoch and of the optimizer's steps in it.

        Raises:
            Stopped: the loss or a weight is not finite any more.
        """
        s = self.settings
        if self.epoch == s.epochs and s.method in PRUNERS and self.pruned is None:
            self._prune()
        lr = self.lr()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        start, clock = time.perf_counter(), Clock(s.device)
        total = torch.zeros((), device=s.device)
        batches = math.ceil(len(self.train_images) / s.batch)
        title = f"epoch {self.epoch + 1}/{s.total_epochs}"
        with tqdm(total=batches, desc=title, unit="batch", leave=False, disable=None) as bar:
            for x, y in self.train_images.batches(s.batch, self.order):
                total += self._step(x, y, clock) * len(y)
                bar.update()
        loss = total.item() / len(self.train_images)
        # The losses were taken before their steps: the last step can still have broken the weights.
        if not (math.isfinite(loss) and all(bool(p.isfinite().all()) for p in self.model.parameters())):
            raise Stopped(f"loss {loss}: not all numbers are finite in epoch {self.epoch + 1}: try a smaller --lr")
        self.epoch += 1
        seconds = time.perf_counter() - start
        if s.sparsify and self.reader is not None:
            self.reader.sparsify_()
        return {"epoch": self.epoch, "lr": lr, "loss": loss, "seconds": seconds, "step_seconds": clock.seconds()}

    def _perturbed(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """A batch on the device, perturbed if this is adversarial training."""
        x, y = to_float(x, self.settings.device, self.settings.channels_last), y.to(self.settings.device)
        if self.perturb is not None:
            with self.autocast():
                x = self.perturb(self.forward, x, y)
        return x, y

    def _step(self, x: Tensor, y: Tensor, clock: Clock) -> Tensor:
        """One batch; returns its loss."""
        if self.augment:
            x = data.augment(x, self.order)
        x, y = self._perturbed(x, y)
        self.optimizer.zero_grad()
        with self.autocast():
            loss = nn.functional.cross_entropy(self.forward(x), y)
        self.scaler.scale(loss).backward()
        if self.regularize is not None:
            self.scaler.unscale_(self.optimizer)
            self.regularize()
        with clock.running():
            self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def _prune(self) -> None:
        self.pruned = pruning.prune(self.settings, self.model, self.example)
        if self.settings.scratch:
            pruning.initialize(self.model, self.settings.seed)
        self._set_up()

    # ---- measurements ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def accuracy(self, images: Images) -> float:
        """The share of right answers of the weights as they stand, in evaluation mode."""
        self.model.eval()
        right = 0
        for x, y in images.batches(EVALUATION_BATCH):
            with self.autocast():
                logits = self.forward(to_float(x, self.settings.device, self.settings.channels_last))
            right += int((logits.argmax(1) == y.to(logits.device)).sum())
        return right / len(images)

    def measure(self, images: Images) -> Row:
        """Accuracy of w and of u, and how sparse both are."""
        row: Row = {"accuracy_w": self.accuracy(images), "w": methods.weight_statistics(self.model, self.sizes)}
        if not self.has_u:
            return {**row, "accuracy_u": row["accuracy_w"], "u": dict(row["w"])}
        with self.sparse_weights():
            row |= {"accuracy_u": self.accuracy(images), "u": methods.weight_statistics(self.model, self.sizes)}
        return row

    @property
    def has_u(self) -> bool:
        """Whether there is a u beside w: not in dense training, nor where w has become u (prox is not idempotent)."""
        return self.reader is not None and not self.settings.sparsify

    @contextlib.contextmanager
    def sparse_weights(self) -> Iterator[None]:
        """A context in which the weights are u, if there is one.

        The statistics of the batch norms stay those of w; with ``recalibrate``, they are those of u inside.
        """
        if self.reader is None or not self.has_u:
            yield
            return
        with self.reader.sparse_weights(self.model):
            if self.settings.recalibrate:
                batches = self.train_images.batches(self.settings.batch)
                # The attack's forward passes count too, as they do in training.
                inputs = (self._perturbed(x, y)[0] for x, y in batches)
                with self.autocast():
                    rk.recalibrate(self.model, inputs, self.settings.recalibrate)
            yield

    def lagrangian(self, loss: float) -> float:
        """f + lam P(u) + beta/2 ||w - u||^2 + lam_2 ||w||_GL of the weights as they stand.

        Args:
            loss: f; the mean over an epoch stands in for it. ADMM's multiplier term is left out.
        """
        if self.reader is None:
            return loss
        return loss + self.reader.penalty_value().item() + methods.group_lasso(self.reader)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that the rest of the training depends on."""
        cuda = self.settings.device.startswith("cuda")
        return {
            "settings": self.settings.to_dict(),
            "epoch": self.epoch,
            "history": self.history,
            "best": self.best,
            "pruned": self.pruned,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "order": self.order.get_state(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state() if cuda else None,  # of the current device, which is ours
        }

    def load(self, state: dict[str, Any], path: Path) -> None:
        """Go on from a state.

        Raises:
            SettingsError: it is the state of another run.
            FileError: it does not fit the model.
        """
        mine, theirs = self.settings.to_dict(), state.get("settings")
        if not isinstance(theirs, dict):
            raise files.FileError(f"{path} has no settings")
        names = dict.fromkeys([*mine, *theirs])  # a robust run is no natural one, whatever they share
        other = [name for name in names if name not in self.settings.free and mine.get(name) != theirs.get(name)]
        if other:
            told = ", ".join(f"{name} {theirs.get(name)!r} (now {mine.get(name)!r})" for name in other)
            raise SettingsError(f"{path} is of a run with other settings: {told}")
        try:
            if state["pruned"] is not None:
                pruning.prune_again(self.model, self.example, state["pruned"])
                self.pruned = state["pruned"]
                self._set_up()
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scaler.is_enabled() and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
            self.order.set_state(state["order"])
            torch.set_rng_state(state["random"])
            if state["random_cuda"] is not None and self.settings.device.startswith("cuda"):
                torch.cuda.set_rng_state(state["random_cuda"])
            self.epoch, self.history, self.best = state["epoch"], list(state["history"]), state["best"]
            if not (isinstance(self.epoch, int) and len(self.history) == self.epoch):
                raise ValueError(f"{len(self.history)} rows of history after epoch {self.epoch!r}")
            if self.best is not None and not {"epoch", "accuracy", "model", "optimizer"} <= set(self.best):
                raise ValueError("the best epoch is incomplete")
        except (AttributeError, AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).split("\n")[0] or type(error).__name__
            raise files.FileError(f"{path} does not fit this version of the script: {reason}") from error

    def keep_best(self, accuracy: float) -> None:
        """Remember model and optimizer if no epoch before was better on the validation images."""
        if self.best is None or accuracy > self.best["accuracy"]:
            self.best = {
                "epoch": self.epoch,
                "accuracy": accuracy,
                # Copies of the moment, in plain values; deepcopy would keep the optimizer's tensors alive in graphs.
                "model": {name: value.clone() for name, value in self.model.state_dict().items()},
                "optimizer": _copied(self.optimizer.state_dict()),
            }

    def use_best(self) -> int:
        """Take the best epoch's weights, if validation images chose one; returns the epoch that is in use."""
        if self.best is None:
            return self.epoch
        self.model.load_state_dict(self.best["model"])
        self.optimizer.load_state_dict(_copied(self.best["optimizer"]))
        return self.best["epoch"]

    # ---- the whole ---------------------------------------------------------------------------------------------------

    def fit(self, out: Path, tell: Callable[[Row], None] = lambda row: None) -> None:
        """Train up to the last epoch, with a checkpoint in the folder after each.

        Args:
            tell: gets the row of an epoch after its checkpoint was saved.

        Raises:
            Stopped: Ctrl-C, or a loss that is not finite; the last checkpoint is intact.
            FileError: a checkpoint could not be saved; the one before is intact.
        """
        path = out / CHECKPOINT
        images = self.validation if len(self.validation) else self.test_images
        number = self.epoch + 1
        try:
            while self.epoch < self.settings.total_epochs:
                number = self.epoch + 1
                row = self.train_epoch()
                row |= {"lagrangian": self.lagrangian(row["loss"]), **self.measure(images)}
                if not math.isfinite(row["lagrangian"]):
                    raise Stopped(f"L_beta became {row['lagrangian']} in epoch {number}: try a smaller --lr")
                # A pruned model and the one before are not the same model.
                comparable = self.settings.method not in PRUNERS or self.epoch > self.settings.epochs
                if len(self.validation) and comparable:
                    self.keep_best(row["accuracy_u"])
                layers = {which: row[which].pop("layers") for which in ("w", "u")}
                self.history.append(row)
                files.save_checkpoint(path, self.state())
                tell({**row, "layers": layers["u"]})
        except KeyboardInterrupt:
            raise Interrupted(f"stopped in epoch {number}; {_go_on(path)}") from None
        except Stopped as error:
            raise Stopped(f"{error}; {_go_on(path)}") from None


def _use_device(name: str) -> None:
    """Make a device the current one.

    Raises:
        SettingsError: it is not there, or neither a CPU nor a GPU.
    """
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise SettingsError(f"--device must be cpu or cuda, not {name}")
        torch.empty(1, device=device)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # random numbers and events are those of the current device
    except (AssertionError, RuntimeError) as error:
        what = str(error).split("\n")[0].rstrip(".")
        raise SettingsError(f"--device {name}: {what}; --device cpu needs no GPU") from error


def _go_on(path: Path) -> str:
    """What the checkpoint holds, read from itself: an interruption can come between writing it and noting that."""
    if not path.exists():
        return "no epoch was completed"
    return f"{path} holds epoch {files.load_checkpoint(path)['epoch']}: --resume goes on"


def _copied(value: Any) -> Any:
    """A state dict with copies of its tensors."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value
