"""param_groups on models that users have, checkpoints between groupings, counting the zeros of any model."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

import rvsm_kernels as rk
from models import Conv1D, Small, dims_of, small, train
from runner import same_bits

BASE: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
SPLIT: dict[str, Any] = {"penalty": "l0", "lam": 1e-4, "beta": 0.5}

# ---- checkpoints -----------------------------------------------------------------------------------------------------


def pair(named: bool = False, **options: Any) -> tuple[Small, torch.optim.Optimizer]:
    model = small()
    sgd = torch.optim.SGD(model.named_parameters() if named else model.parameters(), **BASE)
    train(model, sgd, range(3))
    return model, sgd


@pytest.mark.parametrize("theirs", [False, True])
@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("structure", [None, "in_channels"])
def test_sgd_and_back(engine: str, theirs: bool, ours: bool, structure: str | None) -> None:
    """README's own diff, with and without names: momentum lands with its parameter, and comes back."""
    model, sgd = pair(theirs)
    saved = copy.deepcopy(sgd.state_dict())
    groups = rk.param_groups(model, structure=structure, named=ours, **SPLIT)
    optimizer = rk.RVSM(groups, lr=9.0, engine=engine)
    optimizer.load_state_dict(saved)
    assert [g["penalty"] for g in optimizer.param_groups] == ["l0", None]
    assert all(g[key] == value for g in optimizer.param_groups for key, value in BASE.items())
    for p in model.parameters():
        assert same_bits(optimizer.state[p]["momentum_buffer"], sgd.state[p]["momentum_buffer"])
    optimizer.load_state_dict(saved)  # the order is still known
    back = rk.to_torch_state_dict(optimizer, model)
    other = torch.optim.SGD(model.parameters(), lr=7.0)
    other.load_state_dict(back)
    for p in model.parameters():
        assert same_bits(other.state[p]["momentum_buffer"], sgd.state[p]["momentum_buffer"])
    assert other.param_groups[0]["lr"] == BASE["lr"] and other.param_groups[0]["nesterov"]
    train(model, optimizer, range(3, 5))
    again = rk.RVSM(rk.param_groups(model, named=not ours, **SPLIT), lr=9.0, engine=engine)
    again.load_state_dict(optimizer.state_dict())
    for p in model.parameters():
        assert same_bits(again.state[p]["momentum_buffer"], optimizer.state[p]["momentum_buffer"])


def test_names_in_another_order(engine: str) -> None:
    model, sgd = pair(True)
    named = list(model.named_parameters())[::-1]
    optimizer = rk.RVSM([{"params": named[:2]}, {"params": named[2:], "penalty": None}], lr=1.0, engine=engine)
    optimizer.load_state_dict(sgd.state_dict())
    for p in model.parameters():
        assert same_bits(optimizer.state[p]["momentum_buffer"], sgd.state[p]["momentum_buffer"])
    reordered = rk.RVSM(named, lr=1.0, engine=engine)
    reordered.load_state_dict(sgd.state_dict())
    for p in model.parameters():
        assert same_bits(reordered.state[p]["momentum_buffer"], sgd.state[p]["momentum_buffer"])


def test_what_cannot_be_mapped(engine: str) -> None:
    """It raises, says how to build groups that match, and changes nothing."""
    model, sgd = pair()
    params = list(model.parameters())
    by_hand = rk.RVSM([{"params": params[:1]}, {"params": params[1:], "penalty": None}], lr=1.0, engine=engine)
    two = torch.optim.SGD([{"params": params[:2]}, {"params": params[2:], "lr": 0.5}], **BASE)
    other = nn.Linear(3, 3)
    for optimizer, state in (
        (by_hand, sgd.state_dict()),
        (rk.RVSM(rk.param_groups(model, **SPLIT), lr=1.0, engine=engine), two.state_dict()),
        (rk.RVSM(rk.param_groups(other, **SPLIT), lr=1.0, engine=engine), sgd.state_dict()),
    ):
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match="same groups"):
            optimizer.load_state_dict(state)
        assert optimizer.state_dict() == before
    by_hand.param_groups[0]["lr"] = 0.25
    with pytest.raises(ValueError, match="same groups"):
        rk.to_torch_state_dict(by_hand, model)
    with pytest.raises(ValueError, match="not those of the model"):
        rk.to_torch_state_dict(by_hand, other)


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "RMSprop", "Adagrad", "NAdam"])
def test_other_optimizers(engine: str, kind: str) -> None:
    model = small()
    adam = getattr(torch.optim, kind)(model.parameters())
    train(model, adam, range(1))
    for groups in (model.parameters(), rk.param_groups(model, **SPLIT)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = rk.RVSM(groups, lr=0.3, engine=engine)
        with pytest.raises(ValueError, match=r"no checkpoint of RVSM or torch\.optim\.SGD"):
            optimizer.load_state_dict(adam.state_dict())
        assert all(g["lr"] == 0.3 and "eps" not in g for g in optimizer.param_groups)


# ---- models ----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """One of each."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(4, 6, 3)
        self.depthwise = nn.Conv2d(32, 32, 3, groups=32)
        self.multiplied = nn.Conv2d(4, 8, 3, groups=4)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.up = nn.ConvTranspose2d(4, 6, 3)
        self.grouped_up = nn.ConvTranspose2d(4, 6, 3, groups=2)
        self.depthwise_up = nn.ConvTranspose2d(4, 4, 3, groups=4)
        self.mlp = Conv1D(6, 3)
        self.lstm = nn.LSTM(3, 5, proj_size=2)
        self.rnn = nn.RNN(3, 5)
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True)
        self.bilinear = nn.Bilinear(2, 3, 4)
        self.embedding = nn.Embedding(7, 3)
        self.norm = nn.LayerNorm(3)


def test_groups_are_channels() -> None:
    with pytest.warns(UserWarning, match=r"multiplied\.weight, grouped\.weight.*groups"):
        inputs = dims_of(Net(), "in_channels")
    assert inputs == {
        **{"plain.weight": 1, "depthwise.weight": 0, "up.weight": 0, "grouped_up.weight": 0, "depthwise_up.weight": 0},
        **{"mlp.weight": 0, "lstm.weight_ih_l0": 1, "lstm.weight_hh_l0": 1, "lstm.weight_hr_l0": 1},
        **{"rnn.weight_ih_l0": 1, "rnn.weight_hh_l0": 1, "attention.out_proj.weight": 1},
        **{f"attention.{x}_proj_weight": 1 for x in "qkv"},
    }
    with pytest.warns(UserWarning, match=r"grouped_up\.weight"):
        outputs = dims_of(Net(), "out_channels")
    assert outputs == {
        **{"plain.weight": 0, "depthwise.weight": 0, "multiplied.weight": 0, "grouped.weight": 0, "up.weight": 1},
        **{"depthwise_up.weight": 0, "mlp.weight": 1, "lstm.weight_hr_l0": 0, "rnn.weight_ih_l0": 0},
        **{"rnn.weight_hh_l0": 0, "attention.out_proj.weight": 0, "bilinear.weight": 0},
        **{f"attention.{x}_proj_weight": 0 for x in "qkv"},
    }


def test_every_channel_of_a_depthwise_convolution() -> None:
    model = nn.Conv2d(32, 32, 3, groups=32)
    optimizer = rk.RVSM(rk.param_groups(model, structure="in_channels", **SPLIT), lr=0.1)
    assert optimizer.sparsity().total.groups == 32


def test_weights_taken_by_default() -> None:
    for model, count in (
        (nn.MultiheadAttention(4, 2), 2),
        (nn.LSTM(3, 4, num_layers=2, bidirectional=True), 8),
        (nn.GRUCell(3, 4), 2),
        (nn.Bilinear(2, 3, 4), 1),
        (nn.TransformerEncoderLayer(4, 2, 8), 4),
        (Conv1D(3, 4), 1),
    ):
        groups = rk.param_groups(model, **SPLIT)
        assert len(groups[0]["params"]) == count
        assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_experts_by_include() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gate_bias = nn.Parameter(torch.randn(3, 4, 5)), nn.Parameter(torch.randn(3, 4))

    model = nn.Sequential(nn.Linear(2, 2), Experts())
    text = rk.describe(model)
    assert "1.up" in text and "not included" in text
    groups = rk.param_groups(model, include=(Experts,), **SPLIT)
    assert [name for name, _ in groups[0]["params"]] == ["1.up"]
    assert [name for name, _ in rk.param_groups(model, include=Experts)[0]["params"]] == ["1.up"]
    report = rk.sparsity(model)
    assert {r.name for r in report.rows} == {"0.weight", "1.up"} and "1.up" in str(report).splitlines()[-1]
    with pytest.warns(UserWarning, match="Bilinear"):
        rk.param_groups(model, include=(nn.Linear, nn.Bilinear))
    with pytest.raises(ValueError, match="Experts"):
        rk.param_groups(model[1:])
    with pytest.raises(ValueError, match="frozen"):
        rk.param_groups(nn.Linear(2, 2).requires_grad_(False))


def test_pruned_and_parametrised(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    parametrizations.orthogonal(model[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight_norm(model[2])
    with pytest.warns(UserWarning, match=r"0\.weight_orig.*parametrizations"):
        groups = rk.param_groups(model, verbose=True, **SPLIT)
    assert [name for name, _ in groups[0]["params"]] == ["3.weight"]
    assert "0.weight_orig" in capsys.readouterr().out
    report = rk.sparsity(model)
    assert [r.name for r in report.rows] == [f"{k}.weight" for k in range(4)]
    assert report.rows[0].zeros == 8


def test_tensors_that_are_counted_otherwise() -> None:
    """Sparse ones as what they stand for, meta by name."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, device="meta"), nn.Linear(4, 4))
    w = torch.eye(4)
    model[0].weight = nn.Parameter(w.to_sparse_csr())
    model[1].weight = nn.Parameter(w.to_sparse())
    model[3].weight = nn.Parameter(torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), requires_grad=False)
    report = rk.sparsity(model)
    assert [r.zeros for r in report.rows] == [12, 12, 12]
    assert list(report.uncounted) == ["2.weight"] and "2.weight" in str(report)


class Held(nn.Module):
    """Weights that are no parameters."""

    def __init__(self, w: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("csr", w.to_sparse_csr())
        self.register_buffer("values", (w * 127).to(torch.int8))
        self.register_buffer("mask", w != 0)  # no weight
        self.register_buffer("scale", torch.ones(4, dtype=torch.int8))


def test_buffers_that_are_weights() -> None:
    report = rk.sparsity(nn.Sequential(Held(torch.eye(4)), nn.Linear(4, 4)), group_dim=0)
    assert [(r.name, r.zeros, r.zero_groups) for r in report.rows] == [
        ("1.weight", 0, 0), ("0.csr", 12, 0), ("0.values", 12, 0),
    ]  # fmt: skip
    assert "not penalised by param_groups (a buffer, which is not trained): 0.csr, 0.values" in str(report)


@pytest.mark.filterwarnings("ignore")
def test_layers_that_torch_has_quantized() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight.data = torch.eye(4)
    report = rk.sparsity(torch.ao.quantization.quantize_dynamic(model, {nn.Linear}))
    assert [(r.name, r.zeros) for r in report.rows] == [("0.weight", 12)]


@pytest.mark.slow  # the import of torchao
@pytest.mark.filterwarnings("ignore")
def test_int8_of_torchao() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    for config in (quantization.Int8WeightOnlyConfig(), quantization.Int8DynamicActivationInt8WeightConfig()):
        model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
        model[0].weight.data[model[0].weight.abs() < 0.06] = 0
        before = [r.zeros for r in rk.sparsity(model).rows]
        quantization.quantize_(model, config)
        report = rk.sparsity(model)
        assert not report.uncounted
        assert report.rows[0].zeros >= before[0] > 500 > report.rows[1].zeros
        with pytest.raises(TypeError, match=r"0\.weight is a .*save_sparse cannot store it"):
            rk.save_sparse(model, "nowhere")


def test_plain_tensors_for_wrappers() -> None:
    """ZeroRedundancyOptimizer knows no names."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        model = nn.Linear(4, 3)
        groups = rk.param_groups(model, named=False, **SPLIT)
        assert all(isinstance(p, nn.Parameter) for g in groups for p in g["params"])
        optimizer = ZeroRedundancyOptimizer(groups, optimizer_class=rk.RVSM, lr=0.1, momentum=0.9)
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    finally:
        dist.destroy_process_group()


def test_transformers_is_not_imported() -> None:
    code = "import sys, torch, rvsm_kernels as rk; rk.param_groups(torch.nn.Linear(2, 2)); assert {}"
    code = code.format("'transformers' not in sys.modules")
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=Path(rk.__file__).parents[1])
