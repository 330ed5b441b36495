"""Adversarial training (PGD) with RVSM, RGSM or ADMM on top; the papers' robust experiments.

    python examples/robust.py --model resnet8 --method rgsm --penalty l1 --lam 0.05 --beta 1 --group-lasso 1e-5
    python examples/robust.py --recipe table4.5/en2resnet20-0.05               # a row of the papers' tables
    python examples/robust.py --adversarial 0                                  # natural training, attacked in the end
    python examples/robust.py --attacks A3,A5 --attacked 100                   # IFGSM and NAttack, on 100 test images

Every batch is attacked by IFGSM from a random start, and the net is trained on what comes of it. In the end w and u are
tested on clean images and under FGSM, IFGSM and C&W, with --attacks also under NAttack. examples/README.md says more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from deep.missing import explain

try:
    from torch import Tensor, nn

    from deep import attacks, cli
    from deep.loop import EVALUATION_BATCH, Perturb, Training
    from deep.settings import Settings, SettingsError, number, option
except ModuleNotFoundError as error:
    explain(error, __name__)
    raise

ATTACKS = ("A1", "A2", "A3", "A4", "A5")
"""The papers' names of clean images, FGSM, IFGSM, C&W and NAttack."""

SMOKE = {
    **{"epochs": 2, "milestones": (1,), "train_images": 512, "test_images": 200, "attacked": 50, "width": 4},
    **{"attacks": ATTACKS, "nattack_steps": 4, "nattack_population": 20},
}


def attack_list(text: str) -> tuple[str, ...]:
    """ "A2,A5" as names, for argparse; which names there are is checked with the other settings."""
    return tuple(text.split(","))


@dataclass(frozen=True)
class RobustSettings(Settings):
    """A run of ``robust.py``; radii and step sizes are those of the papers."""

    free: ClassVar[tuple[str, ...]] = (
        *Settings.free,
        # after the training
        *("attacks", "attacked", "ifgsm_steps", "cw_steps", "cw_lr", "cw_c", "cw_kappa", "fgsm_epsilon"),
        *("nattack_steps", "nattack_population", "nattack_sigma", "nattack_lr", "nattack_start"),
    )

    model: str = option("resnet8", Settings.__dataclass_fields__["model"].metadata["help"])
    adversarial: int = option(10, "steps of the attack on each batch; 0 trains on clean images")
    alpha: float = option(attacks.ALPHA, "step size of the attacks, the images being in [0, 1]")
    epsilon: float = option(attacks.EPSILON, "radius of the attacks")
    random_start: bool = option(True, "begin the attack on a batch anywhere in the ball")
    ifgsm_steps: int = option(20, "steps of the IFGSM that tests")
    cw_steps: int = option(50, "steps of the C&W attack")
    cw_lr: float = option(6e-4, "learning rate of the C&W attack")
    cw_c: float = option(10.0, "weight of the margin in the C&W attack")
    cw_kappa: float = option(0.0, "confidence of the C&W attack")
    nattack_steps: int = option(500, "steps of NAttack")
    nattack_population: int = option(300, "samples in each step of NAttack")
    nattack_sigma: float = option(0.1, "standard deviation of NAttack's samples")
    nattack_lr: float = option(0.02, "learning rate of NAttack's mean")
    nattack_start: float = option(1.0, "standard deviation of NAttack's first mean")
    attacks: tuple[str, ...] = option(
        ATTACKS[:4],
        "what to test under; A5, NAttack, asks 150,000 times for an image that it cannot fool",
        type=attack_list,
    )
    attacked: int | None = option(None, "attack only the first so many test images", type=int)
    fgsm_epsilon: float | None = option(None, "radius of FGSM, if not epsilon", type=number)

    def check(self) -> None:
        """Raise SettingsError, naming the option, for what no run can be."""
        super().check()
        self._at_least("adversarial", 0)
        if self.attacked is not None:
            self._at_least("attacked", 1)
        unknown = sorted(set(self.attacks) - set(ATTACKS))
        if unknown or len(set(self.attacks)) < len(self.attacks) or not self.attacks:
            raise SettingsError(f"--attacks must be some of {','.join(ATTACKS)}, not {','.join(self.attacks)!r}")
        try:
            testers(self)
        except ValueError as error:
            raise SettingsError(str(error)) from error


def testers(settings: RobustSettings) -> list[attacks.Attack]:
    """The attacks that test, with their settings. A1, clean images, is measured in any case and has no attack."""
    s = settings
    fgsm_epsilon = s.epsilon if s.fgsm_epsilon is None else s.fgsm_epsilon
    nattack = {"population": s.nattack_population, "sigma": s.nattack_sigma, "start": s.nattack_start}
    all_of_them = {
        "A2": attacks.Attack("fgsm", epsilon=fgsm_epsilon),
        "A3": attacks.Attack("ifgsm", steps=s.ifgsm_steps, alpha=s.alpha, epsilon=s.epsilon),
        "A4": attacks.Attack("cw", steps=s.cw_steps, epsilon=s.epsilon, lr=s.cw_lr, c=s.cw_c, kappa=s.cw_kappa),
        "A5": attacks.Attack("nattack", epsilon=s.epsilon, steps=s.nattack_steps, lr=s.nattack_lr, **nattack),
    }
    return [attack for name, attack in all_of_them.items() if name in s.attacks]


def perturbation(settings: RobustSettings) -> Perturb | None:
    """What is done to a batch before the net is trained on it; None for natural training."""
    s = settings
    if not s.adversarial:
        return None

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        # In training mode, as the released code does: the net is attacked as it is being trained.
        return attacks.ifgsm(model, x, y, s.adversarial, s.alpha, s.epsilon, s.random_start)

    return attack


def test(training: Training) -> dict[str, Any]:
    """Accuracy and sparsity on the test images, and accuracy under attack, of w and of u."""
    settings = training.settings
    assert isinstance(settings, RobustSettings)
    images = training.test_images.first(settings.attacked)

    def under_attack() -> tuple[dict[str, float], dict[str, float]]:
        """Accuracies, and the mean number of queries for an image."""
        batches = list(images.batches(min(EVALUATION_BATCH, settings.batch)))
        queries: dict[str, int] = {}
        found = attacks.accuracies(training.forward, batches, testers(settings), settings.device, queries)
        return found, {label: count / len(images) for label, count in queries.items()}

    result = training.measure(training.test_images)
    result["attacked_images"] = len(images)
    result["robust_w"], result["queries_w"] = under_attack()
    result["robust_u"], result["queries_u"] = result["robust_w"], result["queries_w"]
    if training.has_u:
        with training.sparse_weights():
            result["robust_u"], result["queries_u"] = under_attack()
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """One run."""
    cli.script(argv, "examples/robust.py", __doc__.partition("\n")[0], RobustSettings, SMOKE, test, perturbation)


if __name__ == "__main__":
    cli.guarded(main)
