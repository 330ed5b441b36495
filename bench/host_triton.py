"""``python -m bench.host_triton``: microseconds that a step of the Triton engine costs the host, without a GPU.

A driver that launches nothing stands in for the device: what is measured is the walk over the parameters, the tables
and Triton's own way to the driver. The calls of a real driver (a launch, and a copy where something changed) come on
top. The step has as many tensors as ResNet-18; beside it, in turns, runs the native engine on tensors of that size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import rvsm_kernels as rk
from rvsm_kernels.engines.interface import Engine
from rvsm_kernels.engines.triton.engine import TritonEngine
from rvsm_kernels.optim.chosen_engines import ChosenEngines

from .timing import Timings, wall_clock

TENSORS, PENALISED = 62, 21


class _Utils:
    def load_binary(self, *args: Any) -> tuple[int, ...]:
        return 0, 0, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}


class StandIn:
    """A driver that compiles for sm_90 and launches nothing."""

    utils = _Utils()

    def launcher_cls(self, *args: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class _OnlyTriton(ChosenEngines):
    """The Triton engine, whatever the device."""

    def _key_for(self, p: torch.Tensor, name: str) -> tuple[str, bool]:
        return "triton", False

    def _engine_for(self, key: tuple[str, bool]) -> Engine:
        return self._engines.setdefault(key, TritonEngine(("cpu",)))


class OnCpu(rk.RVSM):
    """RVSM whose CPU tensors go to the Triton engine."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._engines = _OnlyTriton(None)


def parameters() -> list[nn.Parameter]:
    """As many as ResNet-18 has, each with a gradient."""
    params = [nn.Parameter(torch.randn(8, 8)) for _ in range(TENSORS)]
    for p in params:
        p.grad = torch.randn(8, 8)
    return params


def optimizer_of(kind: type[rk.RVSM], params: list[nn.Parameter]) -> rk.RVSM:
    """The step of a ResNet: a part with a penalty, the rest without."""
    groups = [{"params": params[:PENALISED]}, {"params": params[PENALISED:], "penalty": None}]
    optimizer = kind(groups, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True, lam=1e-6, beta=0.08)
    for _ in range(5):
        optimizer.step()
    return optimizer


def contenders() -> dict[str, tuple[Callable[[], None], Callable[[], Any]]]:
    """What comes before a step and is not measured, and the step."""
    params = parameters()
    plain, native = optimizer_of(OnCpu, params), optimizer_of(rk.RVSM, parameters())
    measured = optimizer_of(OnCpu, parameters())
    measured.collect_statistics = True
    others = [[torch.randn(8, 8) for _ in params] for _ in range(2)]
    turn = 0

    def move() -> None:
        nonlocal turn
        turn ^= 1
        for p, grad in zip(params, others[turn], strict=True):
            p.grad = grad

    def edit() -> None:
        plain.param_groups[0]["lr"] *= 0.9999

    def nothing() -> None:
        pass

    return {
        "triton, same addresses": (nothing, plain.step),
        "triton, gradients elsewhere": (move, plain.step),
        "triton, another lr": (edit, plain.step),
        "triton, with statistics": (nothing, measured.step),
        "native on the CPU": (nothing, native.step),
    }


def main(rounds: int = 2000) -> int:
    """Measure in turns and print medians."""
    driver.set_active(StandIn())
    torch.set_num_threads(1)
    steps = contenders()
    samples: dict[str, dict[int, float]] = {name: {} for name in steps}
    for i in range(rounds):
        for name, (prepare, step) in steps.items():
            prepare()
            samples[name][i] = wall_clock(step, 1)
    timings = Timings(samples)
    for name in steps:
        print(f"{name:<30} {timings.seconds(name).median * 1e6:7.1f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
