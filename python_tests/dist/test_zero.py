"""ZeroRedundancyOptimizer: each rank has an optimizer of some parameters, and reading u reads those of all."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import model_of, on_ranks, train, wholes
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

import rvsm_kernels as rk
from runner import same_bits

GROUPS: dict[str, Any] = {"penalty": "l0", "lam": 0.1, "beta": 0.5, "group_lasso": 0.01, "structure": "in_channels"}


def groups_of(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    return rk.param_groups(model, named=False, **{**GROUPS, **options})


def same_models(a: nn.Module, b: nn.Module) -> None:
    for x, y in zip(wholes(a), wholes(b), strict=True):
        assert same_bits(x, y)


def zero_of(model: nn.Module, cls: type, buckets: bool = False, **options: Any) -> Any:
    return ZeroRedundancyOptimizer(
        groups_of(model, **options), optimizer_class=cls, parameters_as_bucket_view=buckets, lr=0.1
    )


def follow_one_process(folder: Path) -> None:
    """Training, u for a while and for good, counts and values; all bit for bit, for groups are whole on their rank."""
    for cls, buckets, options in (
        (rk.RVSM, False, {}),
        (rk.RVSMAdamW, True, {"method": "admm"}),
        (rk.RVSMAdamW, False, {"method": "rvsm-delayed", "lam": 0.05}),
    ):
        model, plain = model_of(), model_of()
        zero, theirs = zero_of(model, cls, buckets, **options), cls(groups_of(plain, **options), lr=0.1)
        train(model, zero, range(3))
        train(plain, theirs, range(3))
        same_models(model, plain)
        ours = rk.unwrap(zero)
        assert str(ours.sparsity()) == str(theirs.sparsity())
        assert 0 < ours.sparsity().total.zeros < ours.sparsity().total.numel, (cls, ours.sparsity())
        torch.testing.assert_close(ours.penalty_value(), theirs.penalty_value())
        with ours.sparse_weights(), theirs.sparse_weights():
            same_models(model, plain)
            with pytest.raises(RuntimeError, match="inside sparse_weights"):
                zero.step()
        same_models(model, plain)
        with pytest.raises(ZeroDivisionError), ours.sparse_weights():
            raise ZeroDivisionError
        same_models(model, plain)
        ours.sparsify_()
        theirs.sparsify_()
        same_models(model, plain)
        assert str(ours.sparsity()) == str(theirs.sparsity())
        train(model, zero, range(3, 5))
        train(plain, theirs, range(3, 5))
        same_models(model, plain)


def checkpoints(folder: Path) -> None:
    """What rank 0 has consolidated is loaded by a ZeroRedundancyOptimizer, and by one process."""
    model = model_of()
    zero = zero_of(model, rk.RVSMAdamW, method="admm")
    train(model, zero, range(3))
    zero.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        torch.save(zero.state_dict(), folder / "zero.pt")
    dist.barrier()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    train(model, zero, range(3, 6))
    again, alone = model_of(), model_of()
    for other, optimizer in (
        (again, zero_of(again, rk.RVSMAdamW, method="admm")),
        (alone, rk.RVSMAdamW(groups_of(alone, method="admm"), lr=0.1)),
    ):
        other.load_state_dict(weights)
        train(other, optimizer, range(1))  # a state to be replaced
        other.load_state_dict(weights)
        optimizer.load_state_dict(torch.load(folder / "zero.pt"))
        train(other, optimizer, range(3, 6))
        same_models(other, model)


def edits_and_errors(folder: Path) -> None:
    """Options are edited in the groups of the ZeroRedundancyOptimizer; an error on one rank is raised on all."""
    model = model_of()
    zero = zero_of(model, rk.RVSM)
    ours = rk.unwrap(zero)
    train(model, zero, range(1))
    for lam in (1e-9, 1e3):  # seen at once, not in the next step
        for group in zero.param_groups:
            group["lam"] = lam
        assert ours.sparsity().total.zeros == (0 if lam < 1 else ours.sparsity().total.numel)
    if dist.get_rank() == 1:
        zero.param_groups[0]["lam"] = -1.0
    with pytest.raises((ValueError, RuntimeError), match="Invalid lam"):
        ours.sparsity()
    with pytest.raises((ValueError, RuntimeError), match="Invalid lam"):
        ours.sparsify_()
    zero = zero_of(model, rk.RVSM, penalty="topk", density=0.5, budget="global")
    for read in (rk.unwrap(zero).sparsity, rk.unwrap(zero).sparsify_, rk.unwrap(zero).sparse_weights().__enter__):
        with pytest.raises(ValueError, match="one cut for each rank's parameters"):
            read()
    for group in zero.param_groups:
        group["budget"] = "tensor"
    assert 0 < rk.unwrap(zero).sparsity().share < 1
    with pytest.raises(ValueError, match="no supported functional"):  # torch's own words
        ZeroRedundancyOptimizer(model.parameters(), optimizer_class=rk.RVSM, overlap_with_ddp=True, lr=0.1)


def copies_of_u(folder: Path) -> None:
    """Every rank gets the whole u, and statistics of it."""
    model, plain = (nn.Sequential(*model_of(), nn.BatchNorm1d(1)) for _ in range(2))
    zero = ZeroRedundancyOptimizer(groups_of(model), optimizer_class=rk.RVSM, lr=0.1)
    one = rk.RVSM(groups_of(plain), lr=0.1)
    same_models(rk.sparse_copy(model, zero), rk.sparse_copy(plain, one))
    state, wanted = rk.sparse_state_dict(model, zero), rk.sparse_state_dict(plain, one)
    assert all(same_bits(value, wanted[name]) for name, value in state.items())
    same_models(model, plain)
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(1))
    statistics = []
    for m, optimizer in ((model, rk.unwrap(zero)), (plain, one)):
        with optimizer.sparse_weights(m, recalibrate=[x]):
            statistics.append(m[-1].running_mean.clone())
        assert m[-1].running_mean == 0
    assert same_bits(*statistics)


def all_checks(folder: Path) -> None:
    for check in (follow_one_process, checkpoints, edits_and_errors, copies_of_u):
        check(folder)


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_zero(ranks: int, tmp_path: Path, on_cpu: None) -> None:
    on_ranks(all_checks, ranks, tmp_path)


def test_unwrap() -> None:
    """Ours is found inside wrappers of any depth; what has none is refused by name."""
    p = nn.Parameter(torch.ones(3))
    for ours in (rk.RVSM([p]), rk.RVSMAdamW([p]), rk.RVSMWrapper(torch.optim.AdamW([p]))):
        assert rk.unwrap(ours) is ours
        assert rk.unwrap(SimpleNamespace(optimizer=ours)) is ours
        assert rk.unwrap(SimpleNamespace(optimizer=SimpleNamespace(_optimizer=ours))) is ours
        assert rk.unwrap(SimpleNamespace(optim=ours)) is ours
        # As Lightning does: the wrapper's class is made of the wrapper and the wrapped.
        lightning = object.__new__(type("Lightning", (type(ours),), {}))
        lightning.__dict__.update(ours.__dict__, _optimizer=ours)
        assert rk.unwrap(lightning) is ours
    loop = SimpleNamespace()
    loop.optimizer = loop
    for other in (torch.optim.SGD([p]), None, [rk.RVSM([p])], loop, SimpleNamespace(optimizer=torch.optim.SGD([p]))):
        with pytest.raises(TypeError, match=f"no optimizer of rvsm_kernels in a {type(other).__name__}"):
            rk.unwrap(other)
