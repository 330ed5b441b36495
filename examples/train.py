"""Train a sparse network by RVSM, RGSM, ADMM, or prune it as others do; the papers' natural experiments.

    python examples/train.py --method rgsm --penalty l1 --lam 0.1 --beta 1     # LeNet-5 on scikit-learn's digits
    python examples/train.py --recipe table4.1/gl                              # a row of the papers' tables
    python examples/train.py --list                                            # which rows there are

Writes a checkpoint after each epoch and, in the end, ``result.json`` and plots. examples/README.md says more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deep.missing import explain

try:
    from deep import cli
    from deep.loop import Training
    from deep.settings import Settings
except ModuleNotFoundError as error:
    explain(error, __name__)
    raise

SMOKE = {"epochs": 2, "milestones": (1,), "train_images": 1280, "test_images": 500}


def test(training: Training) -> dict[str, Any]:
    """Accuracy and sparsity of w and of u on the test images."""
    return training.measure(training.test_images)


def main(argv: Sequence[str] | None = None) -> None:
    """One run."""
    cli.script(argv, "examples/train.py", __doc__.partition("\n")[0], Settings, SMOKE, test)


if __name__ == "__main__":
    cli.guarded(main)
