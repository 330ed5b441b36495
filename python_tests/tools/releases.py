"""Records what the optimizers of a release save, for later versions to load: a part of each release.

    python -m python_tests.tools.releases --record   # python_tests/fixtures/release_<version>.pt

A file that is there stays as it is: see tools/checkpoints.py.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rvsm_kernels as rk

from .checkpoints import FIXTURES, clone, numbers, states, step, values

SHAPES = (((8, 6, 3, 3), (6, 8)), ((5, 7),))
"""The shapes of the parameters, for each param group."""

L0: dict[str, Any] = {"penalty": "l0", "lam": 0.2, "beta": 0.8}
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
COUPLED: dict[str, Any] = {"group_dim": 1, "coupling_name": "channels"}

Params = list[list[nn.Parameter]]


def groups(params: Params, *options: dict[str, Any]) -> list[dict[str, Any]]:
    """A param group for each list of parameters; the last options are those of all further ones."""
    return [{"params": ps, **(options[min(i, len(options) - 1)])} for i, ps in enumerate(params)]


def coupled(params: Params) -> list[dict[str, Any]]:
    """A group for each parameter: the columns of the first two that have equal numbers are one."""
    couplings = (tuple(range(1, 7)), tuple(range(1, 9)), tuple(range(11, 18)))
    flat = [p for ps in params for p in ps]
    return [{"params": [p], "coupling": k, **COUPLED, **L0} for p, k in zip(flat, couplings, strict=True)]


KINDS: dict[str, tuple[torch.dtype, Callable[[Params], torch.optim.Optimizer]]] = {
    "adamw": (torch.float32, lambda ps: rk.RVSMAdamW(groups(ps, L0, {**L0, "group_dim": 1}), lr=0.02, amsgrad=True)),
    "masters": (torch.bfloat16, lambda ps: rk.RVSMAdamW(groups(ps, L0), lr=0.02, master_weights=True)),
    "stochastic": (torch.bfloat16, lambda ps: rk.RVSM(groups(ps, L0), **SGD, rounding="stochastic", seed=3)),
    "held": (torch.float32, lambda ps: rk.RVSM(groups(ps, {**L0, "hold_zeros": True}), **SGD)),
    "budget": (
        torch.float32,
        lambda ps: rk.RVSM(groups(ps, {"penalty": "topk", "density": 0.4, "budget": "global"}), **SGD, beta=0.5),
    ),
    "nm": (torch.float32, lambda ps: rk.RVSM([{"params": ps[0]}], penalty="nm", pattern=(1, 2), beta=0.5, **SGD)),
    "coupled": (torch.float32, lambda ps: rk.RVSM(coupled(ps), **SGD)),
    "wrapper": (
        torch.float32,
        lambda ps: rk.RVSMWrapper(torch.optim.NAdam(groups(ps, {}), lr=0.02), **L0, method="rvsm-delayed"),
    ),
    "threshold": (
        torch.float32,
        lambda ps: rk.AdaptiveHardThreshold(groups(ps, {}), lr=0.1, momentum=0.9, density=0.3),
    ),
    "schedule": (torch.float32, lambda ps: rk.RVSM(groups(ps, {"penalty": "l0"}), **SGD)),
}
"""Name to the type of the parameters and the optimizer over them."""


def schedule_of(kind: str, optimizer: torch.optim.Optimizer) -> rk.SparsitySchedule | None:
    """The schedule of the kind that has one."""
    return rk.SparsitySchedule(optimizer, 0.7, end=8, every=2, pull_rate=0.2) if kind == "schedule" else None


def train(kind: str, optimizer: torch.optim.Optimizer, schedule: Any, grads: list[list[list[Tensor]]]) -> None:
    """Steps of the optimizer, and of its schedule."""
    for gs in grads:
        step(optimizer, gs)
        if schedule is not None:
            schedule.step()


def saved(kind: str) -> dict[str, Any]:
    """A training that was saved after three steps, and how it goes on for three more."""
    rng = random.Random(list(KINDS).index(kind))
    dtype, make = KINDS[kind]
    params = [[nn.Parameter(numbers(shape, rng).to(dtype)) for shape in shapes] for shapes in SHAPES]
    optimizer = make(params)
    schedule = schedule_of(kind, optimizer)
    shapes = [[p.shape for p in group["params"]] for group in optimizer.param_groups]
    grads = [[[numbers(shape, rng).to(dtype) for shape in ss] for ss in shapes] for _ in range(6)]
    train(kind, optimizer, schedule, grads[:3])
    found = {
        "params": [[p.detach().clone() for p in ps] for ps in params],
        "optimizer": clone(optimizer.state_dict()),
        "schedule": None if schedule is None else schedule.state_dict(),
        "grads": grads[3:],
    }
    train(kind, optimizer, schedule, grads[3:])
    return {**found, "expected": values(optimizer), "expected_state": states(optimizer)}


def resumed(kind: str, file: dict[str, Any]) -> torch.optim.Optimizer:
    """An optimizer that has loaded what was saved and gone on."""
    params = [[nn.Parameter(w.clone()) for w in ps] for ps in file["params"]]
    optimizer = KINDS[kind][1](params)
    schedule = schedule_of(kind, optimizer)
    optimizer.load_state_dict(clone(file["optimizer"]))
    if schedule is not None:
        schedule.load_state_dict(file["schedule"])
    train(kind, optimizer, schedule, file["grads"])
    return optimizer


def main() -> int:
    """Write the file of this version, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", required=True)
    parser.parse_args()
    torch.set_num_threads(1)
    path: Path = FIXTURES / f"release_{rk.__version__.replace('.', '_')}.pt"
    if path.exists():
        print(f"{path.name} is there, and stays as it is")
        return 1
    torch.save({kind: saved(kind) for kind in KINDS}, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
