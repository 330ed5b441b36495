"""DTensor parameters: each rank steps its shards, as one process steps the whole."""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pairs import DIMS, GROUPED, METHODS, Pair, mesh_of, placements
from ranks import model_of, on_ranks, sharded_model, wholes
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor

import rvsm_kernels as rk
from runner import same_bits


def follow_one_process(folder: Path) -> None:
    mesh = mesh_of()
    for cls, dims, placement, method in itertools.product((rk.RVSM, rk.RVSMAdamW), DIMS, placements(), METHODS):
        options = {} if dims is None else {"group_dim": dims, "group_scale": method != "admm", **GROUPED}
        options |= {"decoupled": method != "rvsm-delayed", "statistics": True}
        pair = Pair(cls, mesh, [placement], method=method, **options)
        pair.step(3)
        pair.check(exact=dims is None)
        pair.check_statistics()
        with pair.ours.sparse_weights(), pair.theirs.sparse_weights():
            for p, q in zip(pair.sharded, pair.whole, strict=True):
                assert torch.equal(p.full_tensor() == 0, q == 0)
        assert str(pair.ours.sparsity()) == str(pair.theirs.sparsity())
        torch.testing.assert_close(pair.ours.penalty_value(), pair.theirs.penalty_value())


def blocks_follow_one_process(folder: Path) -> None:
    """Blocks of indices of which each is whole on its rank, or is divided along another dimension."""
    mesh, shapes = mesh_of(), ((8, 4), (4, 8, 3))
    for placement, dim, method in itertools.product(placements(), (0, 1), METHODS):
        options = {"group_dim": dim, "group_block": 2, "group_scale": method != "admm", **GROUPED}
        pair = Pair(rk.RVSM, mesh, [placement], shapes=shapes, method=method, statistics=True, **options)
        pair.step(3)
        pair.check(exact=False)
        pair.check_statistics()
        with pair.ours.sparse_weights(), pair.theirs.sparse_weights():
            for p, q in zip(pair.sharded, pair.whole, strict=True):
                assert torch.equal(p.full_tensor() == 0, q == 0)
        assert str(pair.ours.sparsity()) == str(pair.theirs.sparsity())
        torch.testing.assert_close(pair.ours.penalty_value(), pair.theirs.penalty_value())


def blocks_that_a_shard_cuts(folder: Path) -> None:
    """An error on every rank, before anything changes or is sent."""
    pair = Pair(rk.RVSM, mesh_of(), placements()[:1], shapes=((4, 2), (6, 2)), group_dim=0, group_block=2, **GROUPED)
    before = [p.full_tensor().clone() for p in pair.sharded]
    pair.give_gradients()
    for action in (pair.ours.step, pair.ours.sparsify_):
        with pytest.raises(ValueError, match=r"group_block value: 2: dimension 0 of parameter 1 .* shards of 3"):
            action()
    assert all(same_bits(p.full_tensor(), w) for p, w in zip(pair.sharded, before, strict=True))


def half_types_follow(folder: Path) -> None:
    """Masters and states of another type lie beside the shards."""
    mesh = mesh_of()
    for options, placement in itertools.product(({"master_weights": True}, {"state_dtype": "float32"}), placements()):
        for dims in (None, 1):
            more = {} if dims is None else {"group_dim": dims, **GROUPED}
            pair = Pair(rk.RVSMAdamW, mesh, [placement], torch.bfloat16, method="admm", **options, **more)
            pair.step(3)
            if dims is None:
                pair.check(exact=True)
            for p, q in zip(pair.sharded, pair.whole, strict=True):
                torch.testing.assert_close(p.full_tensor(), q.detach(), rtol=0.02, atol=0.02)
            if dims is None:
                _reads_what_one_process_reads(pair)


def _reads_what_one_process_reads(pair: Pair) -> None:
    """u for a while and for good, counts, values, and a first u: of the float32 weights behind half types too."""
    assert str(pair.ours.sparsity()) == str(pair.theirs.sparsity())
    torch.testing.assert_close(pair.ours.penalty_value(), pair.theirs.penalty_value())
    with pair.ours.sparse_weights(), pair.theirs.sparse_weights():
        for p, q in zip(pair.sharded, pair.whole, strict=True):
            assert same_bits(p.full_tensor().detach(), q.detach())
    for optimizer in (pair.ours, pair.theirs):
        optimizer.param_groups[0]["method"] = "rvsm-delayed"
    pair.step(2)
    pair.check(exact=True)
    for optimizer in (pair.ours, pair.theirs):
        optimizer.sparsify_()
    pair.check(exact=True)


def zeros_stay_after_sparsify(folder: Path) -> None:
    """``sparsify_(hold=True)`` and the steps after it: shard by shard, with states beside them."""
    for make, placement in itertools.product((rk.RVSM, rk.RVSMAdamW), placements()):
        pair = Pair(make, mesh_of(), [placement], method="admm")
        pair.step(2)
        for optimizer in (pair.ours, pair.theirs):
            optimizer.sparsify_(hold=True)
        zeros = [p.full_tensor() == 0 for p in pair.sharded]
        assert any(bool(z.any()) for z in zeros)
        pair.step(3)
        pair.check(exact=True)
        assert all(torch.equal(p.full_tensor() == 0, z) for p, z in zip(pair.sharded, zeros, strict=True))


def topk_with_masters(folder: Path) -> None:
    """The cut is that of the float32 weights."""
    for placement in placements():
        options = {"penalty": "topk", "density": 0.5, "master_weights": True}
        pair = Pair(rk.RVSM, mesh_of(), [placement], torch.bfloat16, **options)
        pair.step(6)
        pair.check(exact=True)


def send_one_message(folder: Path) -> None:
    """All norms that cross ranks in one all-reduce; elementwise steps, and groups inside a shard, send nothing."""
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = mesh_of()
    for placement, dims in itertools.product(placements(), DIMS):
        pair = Pair(rk.RVSMAdamW, mesh, [placement], group_dim=dims, **({} if dims is None else GROUPED))
        pair.step()
        pair.give_gradients()
        with CommDebugMode() as messages:
            pair.ours.step()
        divided = getattr(placement, "dim", None)
        inside = dims is None or divided is None or divided in (dims if isinstance(dims, tuple) else (dims,))
        assert messages.get_total_counts() == (0 if inside else 1), (placement, dims)
        pair.give_gradients()
        with torch.profiler.profile(record_shapes=True) as profile:
            pair.ours.step()
        numbers = [math.prod(e.input_shapes[0]) for e in profile.events() if e.name == "gloo:all_reduce"]
        groups = sum(row.groups for row in pair.theirs.sparsity().rows)
        # float64, of the groups that this rank's shards have a part of
        assert not inside or not numbers
        assert inside or (len(numbers) == 1 and 0 < numbers[0] <= groups)
        if divided == 0 and dims == 1:
            assert numbers == [groups]


def reading_gathers_nothing(folder: Path) -> None:
    """Counts and values are sums of what each rank finds in its shards, and u is made there."""
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = mesh_of()
    for placement, dims in itertools.product(placements(), DIMS):
        pair = Pair(rk.RVSM, mesh, [placement], group_dim=dims, **({} if dims is None else GROUPED))
        model = nn.ParameterList(pair.sharded)
        whole = nn.ParameterList(pair.whole)
        with CommDebugMode() as messages:
            report, value = pair.ours.sparsity(), pair.ours.penalty_value()
            of_model = rk.sparsity(model, dims)
        assert {str(kind) for kind in messages.get_comm_counts()} <= {"c10d.allreduce_"}, messages.get_comm_counts()
        assert str(report) == str(pair.theirs.sparsity())
        assert str(of_model) == str(rk.sparsity(whole, dims))
        torch.testing.assert_close(value, pair.theirs.penalty_value())


def prox_of_dtensors(folder: Path) -> None:
    """rk.prox and its derivative keep the placements."""
    for placement, dims in itertools.product(placements(), DIMS):
        whole = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
        w = distribute_tensor(whole, mesh_of(), [placement]).requires_grad_()
        whole.requires_grad_()
        u, want = rk.prox(w, "tl1", 0.3, 1.0, dims), rk.prox(whole, "tl1", 0.3, 1.0, dims)
        u.sum().backward()
        want.sum().backward()
        assert u.placements == w.placements
        torch.testing.assert_close(u.full_tensor(), want)
        torch.testing.assert_close(w.grad.full_tensor(), whole.grad)
    with pytest.raises((NotImplementedError, RuntimeError), match="sharding strategy"):  # torch's words, of any op
        torch.ops.rvsm_kernels.prox(w, "l0", 0.1)


def a_schedule_finds_the_same_cuts(folder: Path) -> None:
    for placement, dims in itertools.product(placements(), (None, 0, 1)):
        more = {} if dims is None else {"group_dim": dims, "group_scale": True}
        pair = Pair(rk.RVSM, mesh_of(), [placement], lam=0.0, **more)
        of = "elements" if dims is None else "groups"
        ours, theirs = (rk.SparsitySchedule(o, 0.5, end=3, every=1, of=of) for o in (pair.ours, pair.theirs))
        for _ in range(3):
            pair.step()
            ours.step()
            theirs.step()
        assert pair.ours.param_groups[0]["lam"] == pytest.approx(pair.theirs.param_groups[0]["lam"], rel=1e-6)
        assert str(pair.ours.sparsity()) == str(pair.theirs.sparsity())
        pair.check(exact=False)


def a_group_without_gradients(folder: Path) -> None:
    """Biases that are frozen after a warm-up, and learn again; of shards alone, and beside a plain parameter."""
    for plain in (False, True):
        sharded, whole = sharded_model(), model_of()
        heads = [nn.Linear(1, 2), nn.Linear(1, 2)]
        heads[1].load_state_dict(heads[0].state_dict())
        optimizers = []
        for model, head in zip((sharded, whole), heads, strict=True):
            groups = rk.param_groups(nn.ModuleList([model, head]) if plain else model, penalty="l0", lam=0.01, beta=1.0)
            optimizers.append(rk.RVSM([{"params": [g]} if isinstance(g, Tensor) else g for g in groups], lr=0.1))
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
        for step in range(6):
            for model, head, optimizer in zip((sharded, whole), heads, optimizers, strict=True):
                for name, p in model.named_parameters():
                    p.requires_grad_(not name.endswith("bias") or step not in (2, 3))
                optimizer.zero_grad()
                head(model(x)).square().mean().backward()
                optimizer.step()
        for p, q in zip(wholes(sharded), wholes(whole), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def twice_across_ranks_is_refused(folder: Path) -> None:
    p = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh_of(), placements()[:1]))
    p.grad = distribute_tensor(torch.ones(4, 3), mesh_of(), placements()[:1])
    for dims, raises in ((1, True), (0, False), (None, False)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = rk.RVSM([p, p], lr=0.1, group_dim=dims)
        if raises:
            with pytest.raises(ValueError, match="occurs twice"):
                optimizer.step()
            assert (p.full_tensor() == 1).all()
        else:
            optimizer.step()


def a_gradient_of_another_type(folder: Path) -> None:
    if not hasattr(torch.Tensor, "grad_dtype"):
        return
    p = nn.Parameter(distribute_tensor(torch.ones(4, 3).bfloat16(), mesh_of(), placements()[:1]))
    p.grad_dtype = torch.float32
    p.grad = distribute_tensor(torch.ones(4, 3), mesh_of(), placements()[:1])
    rk.RVSM([p], lr=0.5, penalty=None).step()
    assert (p.full_tensor() == 0.5).all()


def zeros_are_held(folder: Path) -> None:
    """From the end of a schedule on, also where gradients have other placements; one rank has nothing of a tensor."""
    for cls, placement, options in itertools.product(
        (rk.RVSM, rk.RVSMAdamW), placements(), ({}, {"dtype": torch.bfloat16, "master_weights": True})
    ):
        pair = Pair(cls, mesh_of(), [placement], **options)
        led = [rk.SparsitySchedule(o, 0.5, end=2, every=1, hold=True) for o in (pair.ours, pair.theirs)]
        for step in range(5):
            pair.give_gradients()
            if step == 4:
                for p in pair.sharded:
                    p.grad = p.grad.redistribute(placements=placements()[2:])
            pair.ours.step()
            pair.theirs.step()
            for schedule in led:
                schedule.step()
            pair.check(exact=True)
            if step == 1:
                zeros = [q == 0 for q in pair.whole]
        assert all(torch.equal(q == 0, z) and z.any() for q, z in zip(pair.whole, zeros, strict=True))


def a_nan_on_one_rank(folder: Path) -> None:
    """It goes where it goes in one process: into its group on every rank, and no further."""
    for dims, method in itertools.product((None, 1), METHODS):
        more = {} if dims is None else {"group_dim": dims, **GROUPED}
        pair = Pair(rk.RVSM, mesh_of(), placements()[:1], method=method, **more)
        pair.step()
        pair.give_gradients()
        with torch.no_grad():
            pair.whole[0].grad[0, 2] = float("nan")
            pair.sharded[0].grad = distribute_tensor(pair.whole[0].grad.clone(), mesh_of(), placements()[:1])
        pair.ours.step()
        pair.theirs.step()
        pair.step()
        for p, q in zip(pair.sharded, pair.whole, strict=True):
            assert torch.equal(p.full_tensor().isnan(), q.isnan())
        assert pair.whole[0].isnan().any() and not pair.whole[0].isnan().all()


def a_rank_that_dies(folder: Path) -> None:
    """The others raise what torch raises, long before the time-out."""
    pair = Pair(rk.RVSM, mesh_of(), placements()[:1], group_dim=1, **GROUPED)
    pair.step()
    before = [p.to_local().clone() for p in pair.sharded]
    pair.give_gradients()
    if dist.get_rank() == 1:
        os._exit(0)
    with pytest.raises(RuntimeError, match=r"(?i)gloo|connection|peer"):
        pair.ours.step()
    for p, w in zip(pair.sharded, before, strict=True):
        assert same_bits(p.to_local().detach(), w)
    (folder / "raised").touch()
    os._exit(0)


def test_a_rank_that_dies(tmp_path: Path, on_cpu: None) -> None:
    on_ranks(a_rank_that_dies, 2, tmp_path)
    assert (tmp_path / "raised").exists()


def two_dimensional_meshes(folder: Path) -> None:
    """Sharded along both dimensions of a mesh, along one of them, and twice along the same."""
    from torch.distributed.tensor import Replicate, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2))
    for placement in ([Shard(0), Shard(1)], [Shard(0), Replicate()], [Replicate(), Shard(1)], [Shard(0), Shard(0)]):
        for dims in DIMS:
            more = {} if dims is None else {"group_dim": dims, **GROUPED}
            pair = Pair(rk.RVSMAdamW, mesh, placement, method="admm", **more)
            pair.step(3)
            pair.check(exact=dims is None)


def tensor_parallel_under_fsdp(folder: Path) -> None:
    """Placements of both (_StridedShard), on two of three layers; then a layer that is no DTensor begins to learn."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def parts() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(7, 10), nn.Tanh(), nn.Linear(10, 6)), nn.Linear(6, 3)

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    (inner, last), (whole, whole_last) = parts(), parts()
    parallelize_module(inner, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(inner, mesh=mesh["dp"])
    assert any("Strided" in str(p.placements) for p in inner.parameters())
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    for dims in (None, 0, 1):
        more = {} if dims is None else {"group_dim": dims, **GROUPED}
        options: dict[str, Any] = {"lam": 0.05, "beta": 0.5, "penalty": "l1", **more}
        ours, theirs = (
            rk.RVSMAdamW(rk.param_groups(nn.ModuleList(modules), **options), lr=0.05)
            for modules in ((inner, last), (whole, whole_last))
        )
        for learns in (False, False, True, True, False):
            for body, head, optimizer in ((inner, last, ours), (whole, whole_last, theirs)):
                head.requires_grad_(learns)
                optimizer.zero_grad()
                head(body(x)).square().mean().backward()
                optimizer.step()
        for p, q in zip(
            [*inner.parameters(), *last.parameters()], [*whole.parameters(), *whole_last.parameters()], strict=True
        ):
            torch.testing.assert_close(getattr(p, "full_tensor", lambda p=p: p)(), q, rtol=1e-4, atol=1e-5)
        last.requires_grad_(True)
        whole_last.requires_grad_(True)
        assert ours.sparsity().to_dict()["total"] == theirs.sparsity().to_dict()["total"]
        torch.testing.assert_close(ours.penalty_value(), theirs.penalty_value(), rtol=1e-4, atol=1e-6)


def found_inf_changes_nothing(folder: Path) -> None:
    pair = Pair(rk.RVSMAdamW, mesh_of(), placements()[:1], group_dim=1, **GROUPED)
    for after in range(2):
        before = [p.full_tensor().clone() for p in pair.sharded]
        pair.give_gradients()
        pair.ours.grad_scale, pair.ours.found_inf = torch.tensor(2.0), torch.tensor(1.0)
        pair.ours.step()
        assert all(same_bits(p.full_tensor(), w) for p, w in zip(pair.sharded, before, strict=True))
        assert all(float(pair.ours.state[p]["step"]) == 1 if after else not pair.ours.state[p] for p in pair.sharded)
        del pair.ours.grad_scale, pair.ours.found_inf
        pair.step()
    pair.check(exact=False)


def a_step_with_lr_0_moves_nothing(folder: Path) -> None:
    """What get_optimizer_state_dict does to a new optimizer."""
    for method in METHODS:
        pair = Pair(rk.RVSM, mesh_of(), placements()[:1], method=method, group_dim=1, **{**GROUPED, "lr": 0.0})
        before = [p.full_tensor().clone() for p in pair.sharded]
        pair.step(2)
        assert all(same_bits(p.full_tensor(), w) for p, w in zip(pair.sharded, before, strict=True))
        pair.check(exact=False)


def what_is_refused(folder: Path) -> None:
    from torch.distributed.tensor import DTensor, Partial, Shard, init_device_mesh

    mesh = mesh_of()
    p = nn.Parameter(DTensor.from_local(torch.ones(3, 2), mesh, [Partial()]))
    p.grad = DTensor.from_local(torch.ones(3, 2), mesh, [Partial()])
    with pytest.raises(TypeError, match="Partial"):
        rk.RVSM([("sum", p)]).step()
    q = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
    other = init_device_mesh("cpu", (1, dist.get_world_size()))
    q.grad = distribute_tensor(torch.ones(4, 2), other, [Shard(0), Shard(0)])
    with pytest.raises(ValueError, match=r"the gradient of layer is on .*, the parameter on"):
        rk.RVSM([("layer", q)]).step()
    assert torch.equal(q.full_tensor(), torch.ones(4, 2))


def gradients_elsewhere(folder: Path) -> None:
    """A gradient that is replicated, or a sum that nobody has made yet, is brought to the parameter's placements."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh = mesh_of()
    for placement in (Replicate(), Partial()):
        p = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
        share = torch.ones(4, 2) / (dist.get_world_size() if placement.is_partial() else 1)
        p.grad = DTensor.from_local(share, mesh, [placement])
        rk.RVSM([p], lr=0.5, penalty=None).step()
        torch.testing.assert_close(p.full_tensor().detach(), torch.full((4, 2), 0.5))


def what_looks_at_whole_tensors(folder: Path) -> None:
    """Top-k, the unit norm, u for good; one rank has no elements of one of the tensors."""
    topk = {"penalty": "topk", "density": 0.5}
    blocks = {**topk, "group_dim": 0, "group_block": 2, "shapes": ((8, 4), (4, 8, 3))}
    for options in (topk, {**topk, "group_dim": 1}, blocks, {**topk, "method": "admm"}, {"unit_norm": True}, {}):
        for placement in placements():
            pair = Pair(rk.RVSM, mesh_of(), [placement], **options)
            pair.step(3)
            pair.check(exact=False)
            with pair.ours.sparse_weights(), pair.theirs.sparse_weights():
                for p, q in zip(pair.sharded, pair.whole, strict=True):
                    assert torch.equal(p.full_tensor() == 0, q == 0)
            torch.testing.assert_close(pair.ours.penalty_value(), pair.theirs.penalty_value())
            pair.ours.sparsify_()
            pair.theirs.sparsify_()
            assert str(pair.ours.sparsity()) == str(pair.theirs.sparsity())
            pair.step()
            pair.check(exact=False)


def ddp_keeps_ranks_equal(folder: Path) -> None:
    """Each rank steps the whole model: weights are equal bit for bit after 100 steps with groups."""
    model = nn.Sequential(nn.Linear(9, 33), nn.ReLU(), nn.Linear(33, 4))
    for p in model.parameters():
        nn.init.normal_(p, generator=torch.Generator().manual_seed(0))
    parallel = nn.parallel.DistributedDataParallel(model)
    options = {"penalty": "l0", "lam": 0.05, "beta": 0.5, "group_lasso": 0.01, "structure": "in_channels"}
    optimizer = rk.RVSM(rk.param_groups(model, **options), lr=0.05, momentum=0.9)
    gen = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(100):
        optimizer.zero_grad()
        parallel(torch.randn(5, 9, generator=gen)).square().mean().backward()
        optimizer.step()
    for p in model.parameters():
        others = [torch.empty_like(p) for _ in range(dist.get_world_size())]
        dist.all_gather(others, p.detach())
        assert all(same_bits(p.detach(), other) for other in others)


CHECKS = (
    blocks_follow_one_process, blocks_that_a_shard_cuts, half_types_follow, send_one_message,
    found_inf_changes_nothing, a_step_with_lr_0_moves_nothing, what_is_refused, gradients_elsewhere,
    reading_gathers_nothing, topk_with_masters, a_group_without_gradients, twice_across_ranks_is_refused,
    a_gradient_of_another_type, prox_of_dtensors, a_schedule_finds_the_same_cuts, zeros_are_held,
    zeros_stay_after_sparsify, a_nan_on_one_rank, what_looks_at_whole_tensors, ddp_keeps_ranks_equal,
)  # fmt: skip


def all_checks(folder: Path) -> None:
    for check in CHECKS:
        check(folder)


def on_two_dimensional_meshes(folder: Path) -> None:
    two_dimensional_meshes(folder)
    tensor_parallel_under_fsdp(folder)


SLOW = [pytest.param(*c, marks=pytest.mark.slow) for c in ((follow_one_process, 3), (on_two_dimensional_meshes, 4))]


@pytest.mark.parametrize(("work", "ranks"), [(follow_one_process, 2), (all_checks, 2), *SLOW])
def test_ranks(work: Callable[[Path], None], ranks: int, tmp_path: Path, on_cpu: None) -> None:
    on_ranks(work, ranks, tmp_path)
