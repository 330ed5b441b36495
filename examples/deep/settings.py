"""What a run is asked for: one dataclass, from which the command line, the checks and the recorded command follow."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
from dataclasses import dataclass
from typing import Any, ClassVar

from deep import data, models

METHODS = ("dense", "rvsm", "rgsm", "admm", "l1norm", "slimming")
PRUNERS = ("l1norm", "slimming")
"""Methods that remove channels by Torch-Pruning after a dense training, and train on."""

ENGINES = ("native", "triton", "reference", "loop")
MOST_THREADS = 1024
"""More of them only take memory."""
LARGEST = 2**63 - 1
"""What torch takes as an integer."""


class SettingsError(Exception):
    """Settings that cannot be run, in one line."""


def option(default: Any, text: str, **more: Any) -> Any:
    """A field of :class:`Settings` with what argparse is told of it."""
    return dataclasses.field(default=default, metadata={"help": text, **more})


def number(text: str) -> float:
    """A finite number, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {text!r}")
    return value


def epoch_list(text: str) -> tuple[int, ...]:
    """ "80,120" to (80, 120), for argparse; an empty text to ()."""
    try:
        return tuple(int(word) for word in text.split(",") if word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be epochs, as 80,120,160, not {text!r}") from None


@dataclass(frozen=True)
class Settings:
    """A run of ``train.py``; the papers' base settings are the defaults where they fit any data set."""

    free: ClassVar[tuple[str, ...]] = ("engine", "device", "amp", "channels_last", "compile", "threads")
    """Settings that say how a run is computed, not what: a checkpoint may be resumed under others."""

    data: str = option("digits", "data set", choices=data.NAMES)
    pad: int | None = option(None, "zero-pad the images to this height and width", type=int)
    pool: int | None = option(None, "take the means of squares of so many pixels by so many", type=int)
    train_images: int | None = option(None, "use only the first so many training images", type=int)
    test_images: int | None = option(None, "use only the first so many test images", type=int)
    validation: int = option(0, "training images set aside; the best epoch on them is tested, not the last")
    augment: bool | None = option(None, "random crops and flips (default: on CIFAR)", type=bool)

    model: str = option("lenet5", models.NAMES)
    width: int = option(16, "channels of the first stage of a pre-activation ResNet")
    noise: float = option(models.NOISE, "EnResNet's noise, times the standard deviation of what it is added to")

    method: str = option("dense", "how to train", choices=METHODS)
    penalty: str = option("l0", "rgsm: l1 is the group lasso, l0 group l0", choices=("l0", "l1", "tl1", "topk"))
    lam: float = option(1e-6, "strength of the penalty")
    beta: float = option(1e-2, "strength of the pull; ADMM's rho")
    a: float = option(1.0, "the parameter of tl1")
    density: float | None = option(None, "topk: the share that stays", type=number)
    structure: str | None = option(
        None, "groups (rgsm: in_channels unless given)", choices=("in_channels", "out_channels", "kernels", "layers")
    )
    group_scale: bool = option(False, "multiply lam by the square root of the group's size")
    group_lasso: float = option(0.0, "RGSM's lambda_2")
    decoupled: bool = option(True, "the pull moves the weights before the step, not the gradient")
    sparsify: bool = option(False, "replace w by u for good after each epoch")
    recalibrate: int = option(0, "batches that re-estimate the batch norms' statistics whenever u is tested")
    ratio: float = option(0.5, "l1norm, slimming: the share of channels that goes")
    scale_lasso: float = option(1e-4, "slimming: strength of the l1 penalty on the scales of the norms")
    finetune: int = option(0, "l1norm, slimming: epochs after the pruning")
    scratch: bool = option(False, "l1norm, slimming: train the pruned net from a new initialisation")

    epochs: int = option(20, "epochs")
    batch: int = option(128, "images in a batch")
    lr: float = option(0.1, "learning rate")
    momentum: float = option(0.9, "momentum, Nesterov's")
    weight_decay: float = option(5e-4, "weight decay")
    milestones: tuple[int, ...] = option((), "epochs after which lr is divided by 10, as 80,120,160", type=epoch_list)
    seed: int = option(0, "seed of weights, order of the images, noise, validation images")

    engine: str | None = option(None, "engine of the optimizer; loop is a loop over channels", choices=ENGINES)
    device: str = option("cpu", "device to train on")
    threads: int | None = option(None, "threads on a CPU", type=int)
    amp: bool = option(False, "mixed precision: float16 on a GPU, bfloat16 on a CPU")
    channels_last: bool = option(False, "weights and images in channels-last layout")
    compile: bool = option(False, "torch.compile the model")

    def check(self) -> None:
        """Raise SettingsError, naming the option, for what no run can be."""
        self._at_least("batch", 1)
        self._at_least("epochs", 0 if self.method in PRUNERS else 1)
        for name in ("validation", "finetune", "recalibrate", "lr", "weight_decay", "noise", "scale_lasso", "seed"):
            self._at_least(name, 0)
        for name in ("lam", "beta", "group_lasso"):
            self._at_least(name, 0)
        self._at_least("width", 1)
        for name in ("train_images", "test_images", "pad", "pool", "threads"):
            if getattr(self, name) is not None:
                self._at_least(name, 1)
        if self.threads is not None and self.threads > MOST_THREADS:
            raise SettingsError(f"--threads must be at most {MOST_THREADS}, not {self.threads}")
        if not self.a > 0:
            raise SettingsError(f"--a must be greater than 0, not {self.a}")
        if self.density is not None and not 0 < self.density <= 1:
            raise SettingsError(f"--density must lie between 0 and 1, not {self.density}")
        if not 0 < self.ratio < 1:
            raise SettingsError(f"--ratio must lie between 0 and 1, not {self.ratio}")
        if not 0 < self.momentum < 1:
            raise SettingsError(f"--momentum must lie between 0 and 1 (Nesterov's), not {self.momentum}")
        if self.penalty == "topk" and self.density is None:
            raise SettingsError("--penalty topk needs --density")
        if self.scratch and not self.finetune:
            raise SettingsError("--scratch needs --finetune: epochs for the new training")
        if bool(self.finetune) != (self.method in PRUNERS):
            raise SettingsError(
                f"--method {' and '.join(PRUNERS)} need --finetune, epochs after the pruning; others none"
            )
        if any(m < 1 for m in self.milestones) or list(self.milestones) != sorted(set(self.milestones)):
            raise SettingsError(f"--milestones must be epochs in ascending order, not {list(self.milestones)}")
        if self.group_lasso and self.groups is None:
            raise SettingsError("--group-lasso needs --method rgsm or --structure")
        simple = self.method == "rgsm" and self.groups == "in_channels" and self.decoupled and not self.group_scale
        if self.engine == "loop" and not (simple and self.penalty != "topk" and self.beta > 0):
            raise SettingsError(
                "--engine loop is plain --method rgsm: input channels, l0, l1 or tl1, decoupled, beta > 0"
            )

    def _at_least(self, name: str, least: int) -> None:
        if not getattr(self, name) >= least:  # so that NaN is refused too
            raise SettingsError(f"{flag(name)} must be at least {least}, not {getattr(self, name)}")
        if getattr(self, name) > LARGEST:
            raise SettingsError(f"{flag(name)} must be at most {LARGEST}, not {getattr(self, name)}")

    @property
    def groups(self) -> str | None:
        """The structure of the penalised weights; None if they are elements."""
        return "in_channels" if self.method == "rgsm" and self.structure is None else self.structure

    @property
    def total_epochs(self) -> int:
        """Epochs with those after a pruning."""
        return self.epochs + self.finetune

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and checkpoints."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def command(self, script: str) -> str:
        """The command line that gives this run again: what differs from the defaults, and no path."""
        words = ["python", script]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if isinstance(value, bool):
                words.append(flag(field.name) if value else flag(field.name).replace("--", "--no-", 1))
            elif isinstance(value, tuple):
                words += [flag(field.name), ",".join(map(str, value))]
            else:
                words += [flag(field.name), str(value)]
        return shlex.join(words)


def flag(name: str) -> str:
    """ "group_lasso" to "--group-lasso"."""
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser, kind: type[Settings]) -> None:
    """One option for each field; one that is not given leaves no trace, so that a recipe's value can stand."""
    group = parser.add_argument_group("settings")
    for field in dataclasses.fields(kind):
        told = dict(field.metadata)
        read = told.pop("type", str if field.default is None else type(field.default))
        text = told.pop("help")
        if field.default not in (None, (), False) and field.default is not True:
            text += f" (default: {field.default})"
        if read is bool:
            told["action"] = argparse.BooleanOptionalAction
        else:
            told["type"] = number if read is float else read
        group.add_argument(flag(field.name), default=argparse.SUPPRESS, help=text.replace("%", "%%"), **told)


def from_arguments(
    kind: type[Settings], given: argparse.Namespace, recipe: dict[str, Any], smoke: dict[str, Any]
) -> Settings:
    """Settings from the defaults, over them the recipe, over them what was given; checked.

    Args:
        smoke: values that stand in for what was not given; they go over the recipe. Empty: no smoke run.

    Raises:
        SettingsError: settings that cannot be run.
    """
    names = {field.name for field in dataclasses.fields(kind)}
    told = {name: value for name, value in vars(given).items() if name in names}
    if smoke:
        few = {name: min(recipe[name], most) for name, most in SMOKE_MOST.items() if name in recipe}
        smoke = {**smoke, **few}
    settings = kind(**{**recipe, **smoke, **told})
    settings.check()
    return settings


SMOKE_MOST = {"validation": 64, "finetune": 1}
"""What a recipe may ask of a smoke run."""
