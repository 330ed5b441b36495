"""group_block: consecutive indices of a dimension as one group, as an attention head is."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from builds import generator
from torch import Tensor, nn

import definition
import rvsm_kernels as rk
from runner import check_reading, checked_step, real, same_bits

SPLIT: dict[str, Any] = {"lam": 0.5, "beta": 0.5, "group_dim": 0, "group_block": 3}


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    p = nn.Parameter(torch.randn(shape or (6, 4), generator=generator(0)).to(dtype))
    p.grad = torch.ones_like(p)
    return p


# ---- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_dim", [0, 1, -2])
@pytest.mark.parametrize("options", [{}, {"group_scale": True}, {"group_lasso": 0.1}, {"method": "admm"}], ids=str)
@pytest.mark.parametrize("penalty", ["l0", "l1", "tl1", "topk"])
def test_steps(engine: str, penalty: str, options: dict[str, Any], group_dim: int) -> None:
    """Against the definition; so is u."""
    split = {**SPLIT, "penalty": penalty, "group_dim": group_dim, "density": 0.5 if penalty == "topk" else None}
    optimizer = rk.RVSM([weight(6, 9), weight(3, 12, 2)], lr=0.1, momentum=0.9, engine=engine, **{**split, **options})
    for _ in range(2):
        checked_step(optimizer)
    check_reading(optimizer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", [{}, {"master_weights": True}, {"rounding": "stochastic"}], ids=str)
def test_half_types(engine: str, dtype: torch.dtype, precision: dict[str, Any]) -> None:
    """Blocks live or die as a whole, whatever holds the weights."""
    p = weight(8, 5, dtype=dtype)
    with torch.no_grad():
        p[2:6] *= 0.1
    optimizer = rk.RVSMAdamW([p], lr=1e-3, penalty="l0", lam=1.0, beta=1.0, group_dim=0, group_block=2, engine=engine)
    optimizer.param_groups[0].update(precision)
    optimizer.step()
    with optimizer.sparse_weights():
        assert [bool(block.any()) for block in p.detach().split(2)] == [True, False, False, True]


def test_counts_and_values(engine: str) -> None:
    p = weight(6, 4)
    optimizer = rk.RVSM([("w", p)], penalty="l0", engine=engine, **SPLIT)
    with torch.no_grad():
        p[3:] *= 1e-3
    (row,) = optimizer.sparsity().rows
    assert (row.zero_groups, row.groups, row.zeros, row.numel) == (1, 2, 12, 24)
    optimizer.sparsify_()
    assert p[3:].count_nonzero() == 0 and p[:3].count_nonzero() == 12
    model = nn.Linear(4, 6, bias=False)
    model.weight = p
    (row,) = rk.sparsity(model, 0, 3).rows
    assert (row.zero_groups, row.groups, row.zeros, row.numel) == (1, 2, 12, 24)
    assert optimizer.penalty_value() == 0.5


def test_it_is_a_group_of_the_reshaped_weight(engine: str) -> None:
    """Blocks of dimension 0 of (6, 4) are rows of (2, 12)."""
    p, q = weight(6, 4), nn.Parameter(weight(6, 4).detach().reshape(2, 12))
    q.grad = torch.ones_like(q)
    options = {"lr": 0.1, "penalty": "tl1", "lam": 0.5, "beta": 0.5, "group_lasso": 0.1, "engine": engine}
    ours, theirs = (rk.RVSM([x], group_dim=0, group_block=block, **options) for x, block in ((p, 3), (q, 1)))
    for _ in range(3):
        ours.step()
        theirs.step()
    torch.testing.assert_close(p.reshape(2, 12), q)


def test_adaptive(engine: str) -> None:
    p = weight(6, 4)
    with torch.no_grad():
        p[3:] *= 1e-3
    p.grad = torch.cat([torch.full((3, 4), 10.0) * p.detach()[:3], torch.zeros(3, 4)])
    optimizer = rk.AdaptiveHardThreshold([p], lr=0.1, density=0.5, group_dim=0, group_block=3, engine=engine)
    optimizer.step()  # the other block is the larger one now
    assert p[:3].count_nonzero() == 0 and p[3:].count_nonzero() == 12


def test_around_another_optimizer() -> None:
    p, q = weight(), weight()
    wrapper = rk.RVSMWrapper(torch.optim.SGD([p], lr=0.1), penalty="l0", **SPLIT)
    plain = rk.RVSM([q], lr=0.1, penalty="l0", **SPLIT)
    for _ in range(2):
        wrapper.step()
        plain.step()
    torch.testing.assert_close(p, q)


# ---- the prox --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_dim", [0, 1, (-1,)])
@pytest.mark.parametrize("penalty", ["l0", "l1", "tl1"])
def test_gradient_of_prox(penalty: str, group_dim: Any) -> None:
    w = torch.randn(4, 6, generator=generator(3), dtype=torch.float64) * 2
    dim = group_dim if isinstance(group_dim, int) else group_dim[0]
    w.narrow(dim, 0, 2).mul_(0.05)
    u = rk.prox(w, penalty, 1.0, 1.0, group_dim, 2)
    want = definition.prox(real(w), penalty, 1.0, 1.0, definition.Blocks(dim, 2))
    assert np.allclose(real(u), want, rtol=1e-14) and 0 < int((u == 0).sum()) < u.numel()
    assert torch.autograd.gradcheck(lambda x: rk.prox(x, penalty, 1.0, 1.0, group_dim, 2), w.requires_grad_())


def test_prox_under_compile() -> None:
    def function(x: Tensor) -> Tensor:
        return rk.prox(2 * x, "l1", 0.3, group_dim=0, group_block=2)

    x, y = (torch.linspace(-1, 1, 70).reshape(10, 7).requires_grad_() for _ in range(2))
    want, got = function(x), torch.compile(function, backend="aot_eager", fullgraph=True)(y)
    assert same_bits(want, got)
    want.sum().backward()
    got.sum().backward()
    assert x.grad is not None and y.grad is not None and same_bits(x.grad, y.grad)


# ---- errors ----------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"group_block": 0}, ValueError, "group_block value: 0"),
    ({"group_block": -2}, ValueError, "group_block value: -2"),
    ({"group_block": 2.0}, TypeError, "integer"),
    ({"group_block": True}, TypeError, "integer"),
    ({"group_dim": None}, ValueError, "one dimension.*None"),
    ({"group_dim": ()}, ValueError, r"one dimension.*\(\)"),
    ({"group_dim": (0, 1)}, ValueError, r"one dimension.*\(0, 1\)"),
    ({"group_block": 4}, ValueError, r"dimension 0 of layer\.weight has 6 indices"),
    ({"group_dim": 1}, ValueError, r"dimension 1 of layer\.weight has 4 indices"),
    ({"group_dim": 2}, ValueError, "has 2 dimensions"),
]


@pytest.mark.parametrize(("change", "error", "text"), WRONG)
def test_errors(engine: str, change: dict[str, Any], error: type[Exception], text: str) -> None:
    """In a constructor, in a group that is added, after an edit, in a checkpoint: nothing has changed."""
    with pytest.raises(error, match=text):
        rk.RVSM([("layer.weight", weight())], engine=engine, **{**SPLIT, **change})
    p = weight()
    optimizer = rk.RVSM([("layer.weight", p)], lr=0.1, momentum=0.9, engine=engine, **SPLIT)
    with pytest.raises(error, match=text):
        optimizer.add_param_group({"params": [("layer.weight", weight())], **change})
    assert len(optimizer.param_groups) == 1
    before, saved = p.detach().clone(), optimizer.state_dict()
    saved["param_groups"][0].update(change)
    with pytest.raises(error, match=text):
        optimizer.load_state_dict(saved)
    optimizer.step()
    stepped = p.detach().clone()
    assert not torch.equal(before, stepped)
    optimizer.param_groups[0].update(change)
    for action in (optimizer.step, optimizer.sparsity, optimizer.sparsify_, optimizer.penalty_value):
        with pytest.raises(error, match=text):
            action()
    assert torch.equal(p, stepped)
    optimizer.param_groups[0].update(SPLIT)
    optimizer.step()


def test_errors_of_prox() -> None:
    with pytest.raises(ValueError, match=r"dimension 0 of .* has 6 indices"):
        rk.prox(weight(), "l0", 0.1, group_dim=0, group_block=4)
    for dims in (None, (0, 1), ()):
        with pytest.raises(ValueError, match="one dimension"):
            rk.prox(weight(), "l0", 0.1, group_dim=dims, group_block=2)
    with pytest.raises(TypeError, match="integer"):
        rk.prox(weight(), "l0", 0.1, group_dim=0, group_block=1.5)  # type: ignore[arg-type]


def test_errors_of_sparsity() -> None:
    model = nn.Linear(4, 6)
    for block, text in ((0, "group_block value: 0"), (4, "dimension 0 of weight has 6 indices")):
        with pytest.raises(ValueError, match=text):
            rk.sparsity(model, 0, block)


def test_weights_of_another_shape(engine: str) -> None:
    p = weight(6, 4)
    optimizer = rk.RVSM([("layer.weight", p)], lr=0.1, engine=engine, **SPLIT)
    checked_step(optimizer)
    p.data = torch.randn(9, 4)
    p.grad = torch.ones(9, 4)
    checked_step(optimizer)
    p.data = torch.randn(8, 4)
    p.grad = torch.ones(8, 4)
    with pytest.raises(ValueError, match=r"dimension 0 of layer\.weight has 8 indices"):
        optimizer.step()


def test_a_tensor_without_elements(engine: str) -> None:
    p = weight(0, 4)
    optimizer = rk.RVSM([p], lr=0.1, engine=engine, **SPLIT)
    optimizer.step()
    assert optimizer.sparsity().total.groups == 0


# ---- edits, copies, checkpoints --------------------------------------------------------------------------------------


def test_edits(engine: str) -> None:
    """A block is read anew in each step."""
    optimizer = rk.RVSM([weight(12, 4)], lr=0.1, penalty="tl1", engine=engine, **SPLIT)
    for block, dims in ((3, 0), (4, 0), (1, 0), (2, 1), (6, 0), (1, (0, 1)), (1, None)):
        optimizer.param_groups[0].update(group_block=block, group_dim=dims)
        checked_step(optimizer, f"{block} of {dims}")


def test_a_block_is_no_pair_of_dimensions(engine: str) -> None:
    """Blocks of two rows, after kernels (0, 2)."""
    optimizer = rk.RVSM([weight(6, 4, 3)], lr=0.1, penalty="tl1", engine=engine, **{**SPLIT, "group_block": 1})
    for dims, block in (((0, 2), 1), (0, 2), ((0, 2), 1)):
        optimizer.param_groups[0].update(group_dim=dims, group_block=block)
        checked_step(optimizer, f"{block} of {dims}")


def test_what_holds_u_is_u_of_these_blocks(engine: str) -> None:
    """After sparsify_() another block makes another u."""
    p = weight(6, 4)
    with torch.no_grad():
        p[0] *= 1e-3
    optimizer = rk.RVSM([p], penalty="l0", engine=engine, **SPLIT)
    optimizer.sparsify_()
    assert p[0].count_nonzero() == 4
    optimizer.param_groups[0]["group_block"] = 1
    optimizer.sparsify_()
    assert p[0].count_nonzero() == 0


@pytest.mark.parametrize("how", ["deepcopy", "file"])
def test_copies(engine: str, how: str) -> None:
    p = weight()
    optimizer = rk.RVSM([p], lr=0.1, momentum=0.9, engine=engine, **SPLIT)
    optimizer.step()
    if how == "deepcopy":
        other = copy.deepcopy(optimizer)
        (q,) = other.param_groups[0]["params"]
        q.grad = torch.ones_like(q)
    else:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        q = nn.Parameter(p.detach().clone())
        q.grad = torch.ones_like(q)
        other = rk.RVSM([q], lr=9.0, engine=engine)
        other.load_state_dict(torch.load(file, weights_only=True))
    assert other.param_groups[0]["group_block"] == 3
    optimizer.step()
    other.step()
    assert same_bits(p, q)


def test_a_checkpoint_of_a_version_without_blocks(engine: str) -> None:
    """Its option keeps the value that the optimizer has."""
    optimizer = rk.RVSM([weight()], lr=0.1, engine=engine, **SPLIT)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["group_block"]
    for block in (1, 2):
        other = rk.RVSM([weight()], lr=0.1, engine=engine, **{**SPLIT, "group_block": block})
        other.load_state_dict(saved)
        assert other.param_groups[0]["group_block"] == block
        other.step()


def test_to_torch_and_back(engine: str) -> None:
    """torch.optim.SGD knows no blocks, and its checkpoint leaves them as they are."""
    model = nn.Linear(4, 6)
    groups = rk.param_groups(model, penalty="l0", **SPLIT)
    optimizer = rk.RVSM(groups, lr=0.1, momentum=0.9, engine=engine)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    saved = rk.to_torch_state_dict(optimizer, model)
    assert "group_block" not in saved["param_groups"][0]
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    sgd.load_state_dict(saved)
    optimizer.load_state_dict(sgd.state_dict())
    assert [g["group_block"] for g in optimizer.param_groups] == [3, 1]


def test_dense_groups_have_no_blocks() -> None:
    """The rest of a model needs no block, whatever the optimizer's default is."""
    model = nn.Linear(4, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = rk.RVSM(rk.param_groups(model), lr=0.1, **SPLIT)
    assert [(g["group_dim"], g["group_block"]) for g in optimizer.param_groups] == [(0, 3), (None, 1)]
