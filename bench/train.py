"""``python -m bench train``: the training tasks, ``--task digits`` (the default) and ``--task text``.

A task is what bench/training.py calls so; its settings, table and plot stand in its module.
"""

from __future__ import annotations

from . import digits_task, text_task, training
from .config import Config

TASKS: dict[str, training.Task] = {"digits": digits_task.TASK, "text": text_task.TASK}
"""Name on the command line to task."""


def digits(config: Config) -> None:
    """Train the convolutional net on handwritten digits and write train.json."""
    training.run(TASKS["digits"], config)


def text(config: Config) -> None:
    """Train the transformer on text and write text.json."""
    training.run(TASKS["text"], config)
