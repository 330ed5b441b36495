"""Records checkpoints and pickled optimizers, which later versions have to load.

    python -m python_tests.tools.checkpoints --record
    PYTHONPATH=<older code> python python_tests/tools/checkpoints.py --pickle <file>

`optimizer_0_1_0.pkl` is from the code of commit 61a74ee, whose pickles name the engine alone; the code after it names
whether the step unscales gradients too.

The fixtures stay as they are when the code changes: a checkpoint that the code of today writes says nothing about the
files that users have.
"""

from __future__ import annotations

import argparse
import pickle
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rvsm_kernels as rk

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
METHODS = ("rvsm", "rvsm-delayed", "admm")

SHAPES = (((40,), (7, 5), (5, 3, 3, 3)), ((6, 9), (4, 6, 3, 3)))
"""The shapes of the parameters, for each param group."""

GROUPS: tuple[dict[str, Any], ...] = (
    {"penalty": "l1", "lam": 0.02, "beta": 0.1, "weight_decay": 0.01, "nesterov": True},
    {"penalty": "tl1", "lam": 0.04, "beta": 0.1, "a": 2.0, "group_dim": 1, "group_scale": True, "decoupled": False},
)
"""The options of each param group."""

BASE: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}


def numbers(shape: tuple[int, ...], rng: random.Random) -> Tensor:
    """Random float32 numbers."""
    return torch.tensor([rng.gauss(0.0, 1.0) for _ in range(torch.Size(shape).numel())]).reshape(shape)


def make(params: list[list[nn.Parameter]], method: str, engine: str | None, **options: Any) -> rk.RVSM:
    """An optimizer over the param groups of the fixtures."""
    groups = [{"params": ps, **group} for ps, group in zip(params, GROUPS, strict=True)]
    return rk.RVSM(groups, **BASE, method=method, engine=engine, **options)


def start(rng: random.Random) -> list[list[nn.Parameter]]:
    """New parameters, by group."""
    return [[nn.Parameter(numbers(shape, rng)) for shape in shapes] for shapes in SHAPES]


def step(optimizer: torch.optim.Optimizer, grads: list[list[Tensor]]) -> None:
    """A step with these gradients, by group."""
    for group, gs in zip(optimizer.param_groups, grads, strict=True):
        for p, g in zip(group["params"], gs, strict=True):
            p.grad = g.clone()
    optimizer.step()


def values(optimizer: torch.optim.Optimizer) -> list[list[Tensor]]:
    """Copies of the weights, by group."""
    return [[p.detach().clone() for p in group["params"]] for group in optimizer.param_groups]


def states(optimizer: torch.optim.Optimizer) -> list[list[dict[str, Tensor]]]:
    """Copies of what the optimizer keeps of each parameter, by group."""
    return [
        [{key: value.clone() for key, value in optimizer.state[p].items()} for p in group["params"]]
        for group in optimizer.param_groups
    ]


def checkpoint(method: str) -> dict[str, Any]:
    """A training that was saved after three steps, and how it goes on for three more.

    Returns:
        ``params`` and ``state_dict`` as saved, ``grads`` of the further steps, ``expected_params`` and
        ``expected_state`` after them; all but the state_dict by param group. The native engine computed them.
    """
    rng = random.Random(METHODS.index(method))
    optimizer = make(start(rng), method, "native")
    grads = [[[numbers(shape, rng) for shape in shapes] for shapes in SHAPES] for _ in range(6)]
    for gs in grads[:3]:
        step(optimizer, gs)
    optimizer.param_groups[1]["lr"] = 0.05  # the file says it, the constructor does not
    saved = {"params": values(optimizer), "state_dict": clone(optimizer.state_dict()), "grads": grads[3:]}
    for gs in grads[3:]:
        step(optimizer, gs)
    return {**saved, "expected_params": values(optimizer), "expected_state": states(optimizer)}


def clone(tree: Any) -> Any:
    """A copy of dicts and lists whose tensors are copies too."""
    if isinstance(tree, Tensor):
        return tree.clone()
    if isinstance(tree, dict):
        return {key: clone(value) for key, value in tree.items()}
    return [clone(value) for value in tree] if isinstance(tree, list) else tree


def dump(path: Path, **options: Any) -> None:
    """Pickle a whole optimizer, parameters included, after two steps."""
    rng = random.Random(7)
    optimizer = make(start(rng), "admm", None, **options)
    for _ in range(2):
        step(optimizer, [[numbers(shape, rng) for shape in shapes] for shapes in SHAPES])
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None
    path.write_bytes(pickle.dumps(optimizer, protocol=4))


def main() -> int:
    """Write what the options say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--record", action="store_true", help="write the checkpoints, and an optimizer of this code")
    action.add_argument("--pickle", type=Path, metavar="PATH", help="write an optimizer of the code on PYTHONPATH")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.pickle is not None:
        warnings.simplefilter("ignore")  # without its compiled module that code warns that it is slow
        dump(arguments.pickle)
        return 0
    FIXTURES.mkdir(exist_ok=True)
    for method in METHODS:
        torch.save(checkpoint(method), FIXTURES / f"checkpoint_{method}.pt")
    dump(FIXTURES / "optimizer_after_0_1_0.pkl", amp_scaling=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
