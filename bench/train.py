"""``python -m bench train``: the training tasks, ``--task digits`` (the default), ``text`` and ``targets``.

A task is what bench/training.py calls so; its settings, table and plot stand in its module.
"""

from __future__ import annotations

from . import digits_task, targets_task, text_task, training
from .config import Config

TASKS: dict[str, training.Task] = {"digits": digits_task.TASK, "text": text_task.TASK, "targets": targets_task.TASK}
"""Name on the command line to task."""


def digits(config: Config) -> None:
    """Train the convolutional net on handwritten digits and write train.json."""
    training.run(TASKS["digits"], config)


def text(config: Config) -> None:
    """Train the transformer on text and write text.json."""
    training.run(TASKS["text"], config)


def targets(config: Config) -> None:
    """Train the convolutional net to several sparsities and write targets.json."""
    training.run(TASKS["targets"], config)
