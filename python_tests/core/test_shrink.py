"""shrink: outputs stay, and training goes on from the same states."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import SMALL, TRANSFORMERS, Architecture, Chain, ResNet, close, images, outputs, randomise
from torch import Tensor, nn

import rvsm_kernels as rk
from runner import same_bits
from rvsm_kernels.model.coupled import as_arguments, coupled_channels, outputs_of


def zero_groups(model: nn.Module, inputs: Any, share: float = 0.5, seed: int = 0) -> int:
    """Zeros the readers of a random share of the coupled groups; returns how many."""
    gen = torch.Generator().manual_seed(seed)
    groups = coupled_channels(model, inputs).groups
    params = dict(model.named_parameters())
    chosen = [g for g in groups if torch.rand((), generator=gen) < share]
    with torch.no_grad():
        for g in chosen:
            for name, dim, indices in groups[g]:
                params[name].index_fill_(dim, torch.tensor(indices), 0.0)
    return len(chosen)


def check_architecture(arch: Architecture, share: float) -> None:
    torch.manual_seed(3)
    model, x = randomise(arch.build()), arch.inputs()
    chosen = zero_groups(model, x, share)
    identities = {name: id(p) for name, p in model.named_parameters()}
    before = outputs(model, x)
    report = rk.shrink(model, example_inputs=x)
    assert model.training
    close(before, outputs(model, x))
    stay = {k.reason for k in report.kept if not k.reason.startswith("zero where it is made")}
    assert stay <= {"the last channel of a layer"}, report
    assert report.groups == chosen or stay
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert report.parameters[1] == sum(p.numel() for p in model.parameters()) < report.parameters[0]
    assert report.macs[0] is not None and report.macs[1] is not None and report.macs[1] < report.macs[0]
    again = rk.shrink(model, example_inputs=x).groups
    # A grouped convolution of which each group has kept one channel is a depthwise one.
    assert again == 0 or "the last channel of a layer" in stay
    close(before, outputs(copy.deepcopy(model), x))
    sum(t.float().square().sum() for t in outputs_of(model(*as_arguments(x)[0], **as_arguments(x)[1]))).backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("share", [0.5, 1.0], ids=["half", "all"])
@pytest.mark.parametrize("arch", SMALL, ids=[a.name for a in SMALL])
def test_outputs_stay(arch: Architecture, share: float) -> None:
    check_architecture(arch, share)


@pytest.mark.slow
@pytest.mark.parametrize("arch", TRANSFORMERS, ids=[a.name for a in TRANSFORMERS])
def test_outputs_of_transformers_stay(arch: Architecture) -> None:
    pytest.importorskip("transformers")
    check_architecture(arch, 0.5)


# ---- attention of torch ----------------------------------------------------------------------------------------------


class Attended(nn.Module):
    """An attention of torch and a layer behind it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, **options)
        self.out = nn.Linear(12, 4)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return self.out(self.attention(q, k, v, **options)[0])


@pytest.mark.parametrize(
    "options",
    [{"batch_first": True}, {"bias": False}, {"add_bias_kv": True}, {"kdim": 7, "vdim": 5, "batch_first": True}],
    ids=["batch-first", "sequence-first", "bias-kv", "other-widths"],
)
def test_heads_of_multihead_attention(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = randomise(Attended(**options)).eval()
    shapes = (2, 5, 12), (2, 6, options.get("kdim", 12)), (2, 6, options.get("vdim", 12))
    inputs = [torch.randn(s) if options.get("batch_first") else torch.randn(s).transpose(0, 1) for s in shapes]
    padding, mask = torch.rand(2, 6) < 0.2, torch.rand(5, 6) < 0.2
    calls: list[dict[str, Any]] = [
        {},
        {"key_padding_mask": padding, "average_attn_weights": False},
        {"attn_mask": mask, "key_padding_mask": padding, "need_weights": False},
        {"attn_mask": torch.randn(5, 6)},
    ]
    with torch.no_grad():
        model.attention.out_proj.weight[:, 4:8] = 0
    before = [model(*inputs, **c) for c in calls]
    assert rk.shrink(model, example_inputs=tuple(inputs)).removed == {"attention.out_proj.weight": (4, 12)}
    model = pickle.loads(pickle.dumps(model))
    close(before, [model(*inputs, **c) for c in calls])
    assert model.attention.num_heads == 2


def test_encoder_of_torch() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 4, 16, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 12)
    with torch.no_grad():
        model.layers[0].self_attn.out_proj.weight[:, :6] = 0
        model.layers[1].linear2.weight[:, ::2] = 0
    before = outputs(model, x)
    report = rk.shrink(model, example_inputs=x)
    assert report.groups == 10
    # Of ten tokens and two layers: q, k, v, the output projection and the MLP, and twice 5 x 5 of each sample's heads.
    whole, halved_heads, halved_mlp = (36 + 12 + 32) * 12, (18 + 6 + 32) * 12, (36 + 12 + 16) * 12
    assert report.macs == (20 * whole + 4 * 2 * 25 * 12, 10 * (halved_heads + halved_mlp) + 2 * 2 * 25 * (6 + 12))
    close(before, outputs(model, x))


# ---- what stays ------------------------------------------------------------------------------------------------------


def kept(report: rk.ShrinkReport) -> dict[str, str]:
    return {k.weight: k.reason for k in report.kept}


def test_a_channel_that_someone_reads_stays_and_is_reported() -> None:
    torch.manual_seed(0)
    model, x = randomise(ResNet()), images()
    with torch.no_grad():
        model.blocks[0].conv1.weight[:, [1, 2]] = 0
        model.blocks[1].conv1.weight[:, [2, 3]] = 0
        model.blocks[1].conv2.weight[:, 5] = 0
    report = rk.shrink(model, example_inputs=x)
    assert report.removed == {"blocks.1.conv2.weight": (1, 12)}
    assert [(k.weight, k.channels, k.reason) for k in report.kept] == [
        ("blocks.0.conv1.weight", (1,), "still read by blocks.1.conv1.weight, blocks.1.short.weight"),
        ("blocks.0.conv1.weight", (2,), "still read by blocks.1.short.weight"),
        ("blocks.1.conv1.weight", (2,), "still read by blocks.1.short.weight"),
        ("blocks.1.conv1.weight", (3,), "still read by blocks.0.conv1.weight, blocks.1.short.weight"),
    ]
    text = str(report)
    assert "1 of 12 inputs removed" in text and "still read by" in text and "MACs" in text
    assert dataclasses.is_dataclass(report)


class WrittenDown(nn.Module):
    """A size in the code of the forward pass, beside a part that can shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 1), nn.Linear(5 * 36, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(torch.relu(self.c(self.b(torch.relu(self.a(x))).view(-1, 180))))


def test_sizes_in_the_code_keep_their_channels() -> None:
    torch.manual_seed(0)
    model, x = WrittenDown(), images()
    with torch.no_grad():
        model.b.weight[:, 2] = 0
        model.c.weight.view(7, 5, 36)[:, 3] = 0
        model.d.weight[:, 4] = 0
    before = outputs(model, x)
    report = rk.shrink(model, example_inputs=x)
    assert report.removed == {"b.weight": (1, 6), "d.weight": (1, 7)}
    assert kept(report)["c.weight"].startswith("the model's code keeps it: shape '[-1, 180]' is invalid")
    close(before, outputs(model, x))


def test_a_cut_that_changes_outputs_is_not_made() -> None:
    class Third(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x))[:, 2:4])  # where it begins is written down

    torch.manual_seed(0)
    model, x = Third(), torch.randn(5, 3)
    with torch.no_grad():
        model.b.weight[:, 0] = 0
    before = outputs(model, x)
    report = rk.shrink(model, example_inputs=x)
    assert report.groups == 0 and "b.weight" in kept(report)
    close(before, outputs(model, x))


# ---- refusals --------------------------------------------------------------------------------------------------------


def _frozen(model: nn.Module, optimizer: Any) -> Callable[[], None]:
    states = model.state_dict()
    weights = {k: v.clone() for k, v in states.items() if not nn.parameter.is_lazy(v) and not v.is_meta}

    def same() -> None:
        for k, v in weights.items():
            assert same_bits(model.state_dict()[k], v), k

    return same


class OddState(torch.optim.SGD):
    """An optimizer whose state is not of the parameter's shape."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["history"] = torch.zeros(7, p.numel())


def _odd() -> tuple[nn.Module, Any]:
    model = Chain()
    optimizer = OddState(model.parameters(), lr=0.1)
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: (torch.compile(Chain()), None), TypeError, "compiled: shrink needs its _orig_mod"),
        (lambda: (nn.DataParallel(Chain()), None), TypeError, "shrink needs its .module"),
        (lambda: (nn.Sequential(nn.LazyLinear(4)), None), TypeError, "0.weight is lazy"),
        (lambda: (nn.Linear(3, 4, device="meta"), None), TypeError, "weight is"),
        (lambda: (Chain(), 3), TypeError, "takes an optimizer, but got a int"),
        (lambda: (3, None), TypeError, "takes a module, but got a int"),
        (lambda: (nn.Sequential(nn.Linear(5, 4)), None), RuntimeError, "does not run on example_inputs"),
        (_odd, TypeError, "state history of .* it is 7x"),
    ],
    ids=["compiled", "data-parallel", "lazy", "meta", "no-optimizer", "no-module", "inputs", "odd-state"],
)
def test_refusals_change_nothing(build: Callable[[], tuple[Any, Any]], error: type[Exception], text: str) -> None:
    model, optimizer = build()
    same = _frozen(model, optimizer) if isinstance(model, nn.Module) else lambda: None
    if isinstance(model, Chain):
        with torch.no_grad():
            model.head.weight[:, 1] = 0
        same = _frozen(model, optimizer)
    with pytest.raises(error, match=text):
        rk.shrink(model, optimizer, example_inputs=images())
    same()
