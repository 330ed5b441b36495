"""rk.to_semi_structured: which weights are converted, why others are not, and that an error changes nothing.

No GPU is needed: torch's conversion is that of CUTLASS, which is written in plain tensor operations.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import rvsm_kernels as rk
from models import assert_same_weights, small, weights
from rvsm_kernels.model import semi_structured

CUTLASS = torch.sparse.SparseSemiStructuredTensorCUTLASS


def pruned(layer: nn.Linear) -> nn.Linear:
    """A layer whose weight follows 2:4."""
    with torch.no_grad():
        layer.weight.view(layer.out_features, -1, 4)[..., 1:3] = 0
    return layer


def converted(t: Tensor) -> Tensor:
    """What ``torch.sparse.to_sparse_semi_structured`` does with CUTLASS, for a tensor on the CPU."""
    if t.shape[0] % 32 or t.shape[1] % 64 or t.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError(f"Error original_tensor.shape {t.shape} is not supported!\nTwo lines")
    packed, meta = torch.sparse.semi_structured.sparse_semi_structured_from_dense_cutlass(t)
    return CUTLASS(t.shape, packed=packed, meta=meta, packed_t=None, meta_t=None, compressed_swizzled_bitmask=None)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine that has sparse tensor cores, as far as the function can tell."""
    monkeypatch.setattr(semi_structured, "_missing", lambda weight: None)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", converted)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor", UserWarning)
        yield


class Net(nn.Module):
    """A weight of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 64)
        self.conv = nn.Conv2d(4, 8, 3)
        self.good, self.bare = pruned(nn.Linear(64, 32)), pruned(nn.Linear(128, 64, bias=False))
        self.transposed = pruned(nn.Linear(64, 64))
        self.transposed.weight.data = self.transposed.weight.detach().t().contiguous().t()
        self.dense = nn.Linear(64, 32)
        self.odd = pruned(nn.Linear(64, 10))
        self.tied, self.other = pruned(nn.Linear(64, 64)), nn.Linear(64, 64)
        self.other.weight = self.tied.weight
        self.changed = parametrize.register_parametrization(pruned(nn.Linear(64, 32)), "weight", nn.Identity())
        self.masked = prune.identity(pruned(nn.Linear(64, 32)), "weight")
        self.attention = nn.MultiheadAttention(64, 2)
        pruned(self.attention.out_proj)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "data-parallel"])
def test_which_weights_are_converted(wrapped: bool) -> None:
    net = Net().half()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    report = rk.to_semi_structured(nn.DataParallel(net) if wrapped else net)
    assert report.converted == ("good.weight", "bare.weight", "transposed.weight")
    for name in report.converted:
        weight = net.get_parameter(name)
        assert isinstance(weight, CUTLASS) and isinstance(weight, nn.Parameter) and not weight.requires_grad
        assert torch.equal(weight.to_dense(), before[name])
    same = {name: p for name, p in net.named_parameters() if name not in report.converted}
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in same.items())
    reasons = {
        "embed.weight": "not the weight of an nn.Linear",
        "conv.weight": "not the weight of an nn.Linear",
        "dense.weight": "more than 2 of 4",
        "odd.weight": r"torch refuses it: Error original_tensor.shape torch.Size([10, 64]) is not supported!",
        "tied.weight": "one tensor with several names: tied.weight, other.weight",
        "changed.weight": "parametrised",
        "masked.weight": "parametrised",
        "attention.out_proj.weight": "torch's attention",
    }
    assert all(report.left[name].startswith(why) for name, why in reasons.items()), report
    assert set(report.left) == {*reasons, "attention.in_proj_weight"}
    text = str(report)
    assert text.startswith("3 weights converted\n  good.weight") and "embed.weight, conv.weight" in text


@pytest.mark.usefixtures("gpu")
def test_what_is_converted_is_left_the_second_time() -> None:
    net = nn.Sequential(pruned(nn.Linear(64, 32))).half()
    assert rk.to_semi_structured(net).converted == ("0.weight",)
    again = rk.to_semi_structured(net)
    assert again.converted == () and "SparseSemiStructured" in again.left["0.weight"]
    with pytest.raises(TypeError, match=r"0\.weight is a .*SparseSemiStructured"):
        rk.save_sparse(net, "nowhere")
    assert "0.weight" in rk.sparsity(net).uncounted


@pytest.mark.usefixtures("gpu")
def test_nm_trains_what_can_be_converted() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    optimizer = rk.RVSM(rk.param_groups(net, penalty="nm", pattern=(2, 4), beta=1.0), lr=0.1)
    assert rk.to_semi_structured(net.half()).converted == ()
    net.float()
    optimizer.sparsify_()
    assert rk.to_semi_structured(net.half()).converted == ("0.weight", "2.weight")


@pytest.mark.usefixtures("gpu")
def test_memory_that_runs_out_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []

    def full(t: Tensor) -> Tensor:
        calls.append(t)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        return converted(t)

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", full)
    net = nn.Sequential(pruned(nn.Linear(64, 32)), pruned(nn.Linear(64, 32))).half()
    before = weights(net)
    with pytest.raises(torch.OutOfMemoryError):
        rk.to_semi_structured(net)
    assert all(torch.equal(p, q) and not isinstance(p, CUTLASS) for p, q in zip(net.parameters(), before, strict=True))


def test_a_machine_without_sparse_tensor_cores(monkeypatch: pytest.MonkeyPatch, on_cpu: None) -> None:
    net, same = small(), small()
    with pytest.raises(RuntimeError, match=r"hidden\.weight cannot be semi-structured: it is on cpu"):
        rk.to_semi_structured(net)
    assert_same_weights(net, same)
    for found in ((7, 5), (8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=found: found)
        why = semi_structured._missing(_OnCuda())  # type: ignore[arg-type]
        assert why is None if found >= (8, 0) else "compute capability 7.5" in str(why)


class _OnCuda:
    device = torch.device("cuda", 0)


@pytest.mark.parametrize("model", [3, torch.zeros(4, 4)], ids=["number", "tensor"])
def test_something_else_than_a_module(model: Any) -> None:
    with pytest.raises(TypeError, match="to_semi_structured takes a module, but got a"):
        rk.to_semi_structured(model)
