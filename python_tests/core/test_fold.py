"""shrink folds channels whose filters are zero where they are made into the biases of what reads them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import SMALL, TRANSFORMERS, Architecture, close, images, outputs, randomise
from torch import Tensor, nn

import rvsm_kernels as rk
from rvsm_kernels.model.coupled import coupled_channels
from rvsm_kernels.model.fold import other_inputs


def run(model: nn.Module, x: Any) -> Tensor:
    return copy.deepcopy(model).eval()(x).detach()


def zero_filters(layer: Any, *channels: int) -> None:
    with torch.no_grad():
        layer.weight[list(channels)] = 0


def chain(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return randomise(nn.Sequential(*layers))  # type: ignore[return-value]


class Stream(nn.Module):
    """A residual stream that two layers make, without padding where it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.back = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.silu(self.norm(self.stem(x)))
        x = x + self.back(torch.sigmoid(self.inner(x)))
        return self.head(torch.tanh(x).mean((2, 3)))


def mlp() -> nn.Module:
    return chain(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 7), nn.BatchNorm1d(7), nn.Sigmoid(), nn.Linear(7, 3))


def cnn(padding_mode: str = "zeros", padding: int = 0) -> nn.Module:
    options: dict[str, Any] = {"padding": padding, "padding_mode": padding_mode}
    return chain(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.Conv2d(8, 6, 3, **options),
        nn.BatchNorm2d(6),
        nn.Softplus(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * (9 if padding else 4), 4),
    )


def check(model: nn.Module, x: Any, gone: int, **before: int) -> rk.ShrinkReport:
    """So many channels are folded, outputs stay, of other inputs too, and training goes on."""
    others = [x, torch.randn_like(x) * 3]
    expected = [run(model, o) for o in others]
    report = rk.shrink(model, example_inputs=x)
    assert report.groups == gone, report
    for o, want in zip(others, expected, strict=True):
        torch.testing.assert_close(run(model, o), want, rtol=1e-5, atol=1e-5)
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    return report


def test_mlp() -> None:
    model = mlp()
    zero_filters(model[0], 2, 5)
    zero_filters(model[2], 0)
    report = check(model, torch.randn(5, 6), 3)
    assert {(f.weight, f.channels, f.bias) for f in report.folded} == {
        ("2.weight", (2, 5), "2.bias"),
        ("5.weight", (0,), "5.bias"),
    }
    assert "2.weight: 2 constant inputs (2, 5) folded into 2.bias" in str(report) and not report.kept


@pytest.mark.parametrize("mode", ["none", "reflect", "circular", "replicate"])
def test_convolutions_and_norms(mode: str) -> None:
    model = cnn() if mode == "none" else cnn(mode, 1)
    zero_filters(model[0], 1, 6)
    zero_filters(model[3], 2)
    report = check(model, images(), 3)
    assert report.removed["8.weight"] == ((4, 24) if mode == "none" else (9, 54))


def test_grouped_convolutions_and_dimensions() -> None:
    model = chain(nn.Conv1d(2, 8, 3), nn.Sigmoid(), nn.Conv1d(8, 6, 3, groups=2), nn.Tanh(), nn.Conv1d(6, 4, 1))
    zero_filters(model[0], 1, 5)  # the same place in both groups
    check(model, torch.randn(2, 2, 12), 1)
    model = chain(nn.Conv3d(2, 5, 2), nn.ELU(), nn.Conv3d(5, 4, 2, dilation=2))
    zero_filters(model[0], 4)
    check(model, torch.randn(2, 2, 7, 7, 7), 1)


def test_a_residual_stream() -> None:
    """Where both makers are zero the channel goes, in all that reads it; where one is not, it stays."""
    torch.manual_seed(0)
    model = randomise(Stream())
    zero_filters(model.stem, 1, 4)
    zero_filters(model.back, 1, 6)
    zero_filters(model.inner, 3)
    report = check(model, images(), 2)
    assert {f.weight for f in report.folded} == {"inner.weight", "head.weight", "back.weight"}
    reason = "zero where it is made, and still read by head.weight, inner.weight"
    assert {(k.weight, k.channels, k.reason) for k in report.kept} == {
        ("stem.weight", (4,), reason),
        ("back.weight", (6,), reason),
    }


def test_a_constant_zero_goes_whoever_reads_it() -> None:
    """Behind a ReLU, read by a convolution with padding and without a bias."""
    model = chain(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1, bias=False), nn.Conv2d(5, 2, 1))
    zero_filters(model[0], 0, 2)
    with torch.no_grad():
        model[0].bias[[0, 2]] = torch.tensor([-1.0, 1.0])
    report = check(model, images(), 1)
    assert [(f.weight, f.channels, f.bias) for f in report.folded] == [("2.weight", (0,), None)]
    assert "nothing had to be folded" in str(report)
    assert [(k.weight, k.channels) for k in report.kept] == [("0.weight", (2,))]


def test_depthwise_filters_pass_constants_on() -> None:
    model = chain(
        nn.Conv2d(3, 6, 1), nn.SiLU(), nn.Conv2d(6, 6, 3, groups=6), nn.SiLU(), nn.Conv2d(6, 4, 1), nn.Flatten()
    )
    zero_filters(model[0], 3)
    check(model, images(), 1)
    padded = chain(nn.Conv2d(3, 6, 1), nn.SiLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 4, 1))
    zero_filters(padded[0], 3)
    report = rk.shrink(padded, example_inputs=images())
    assert report.groups == 0 and "no constant: it varies where 3.weight reads it" in report.kept[0].reason


def zero_makers(model: nn.Module, inputs: Any) -> None:
    """Zeros all that makes a random half of the channels."""
    gen, params = torch.Generator().manual_seed(0), dict(model.named_parameters())
    for _, made in sorted(coupled_channels(model, inputs).made.items()):
        if torch.rand((), generator=gen) < 0.5:
            for name, dim, indices in made:
                with torch.no_grad():
                    params[name].index_fill_(dim, torch.tensor(indices), 0.0)


def check_architecture(arch: Architecture) -> int:
    model, x = randomise(arch.build()), arch.inputs()
    zero_makers(model, x)
    tried = [x, *other_inputs(x, 1)]
    before = [outputs(model, inputs) for inputs in tried]
    report = rk.shrink(model, example_inputs=x)
    for want, inputs in zip(before, tried, strict=True):
        close(want, outputs(model, inputs))
    for kept in report.kept:
        assert "model's code" not in kept.reason and "random inputs" not in kept.reason, report
    return len(report.folded)


@pytest.mark.parametrize("arch", SMALL, ids=[a.name for a in SMALL])
def test_outputs_stay(arch: Architecture) -> None:
    check_architecture(arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", TRANSFORMERS, ids=[a.name for a in TRANSFORMERS])
def test_outputs_of_transformers_stay(arch: Architecture) -> None:
    pytest.importorskip("transformers")
    check_architecture(arch)


def test_numbers_in_the_code_are_no_inputs() -> None:
    torch.manual_seed(0)
    model = randomise(Beside(lambda m, h, x: (2.0 * h + 1) / 3.0**0.5))
    zero_filters(model.first, 2)
    check(model, images(), 1)


# ---- what stays ------------------------------------------------------------------------------------------------------


class Beside(nn.Module):
    """A hidden layer that something else is done to before it is read."""

    def __init__(self, how: Callable[[Any, Tensor, Tensor], Tensor], **more: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)
        self.how = how
        for name, module in more.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.how(self, torch.sigmoid(self.first(x)), x))


def _masked(m: Any, h: Tensor, x: Tensor) -> Tensor:
    return h * (x[:, :1, 2:, 2:] * 0 + 1)  # ones, but made of the input


def _attended(m: Any, h: Tensor, x: Tensor) -> Tensor:
    return h * torch.sigmoid(m.map(x))[:, :, 2:, 2:]


KEPT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no-bias": (
        lambda: chain(nn.Conv2d(3, 6, 3), nn.SiLU(), nn.Conv2d(6, 4, 1, bias=False)),
        "2.weight has no bias that could hold the constant",
    ),
    "padding": (
        lambda: chain(nn.Conv2d(3, 6, 3), nn.SiLU(), nn.Conv2d(6, 4, 3, padding="same")),
        "2.weight pads with zeros, beside which the constant is none",
    ),
    "transposed": (
        lambda: chain(nn.Conv2d(3, 6, 3), nn.SiLU(), nn.ConvTranspose2d(6, 4, 3)),
        "2.weight is not read by one Linear or convolution of its own",
    ),
    "mask": (lambda: randomise(Beside(_masked)), "no constant: it meets values that are no parameters"),
    "map": (
        lambda: randomise(Beside(_attended, map=nn.Conv2d(3, 1, 1))),
        "no constant: it meets what several channels share",
    ),
    "position": (
        lambda: randomise(Beside(lambda m, h, x: h.cumsum(-1))),
        "no constant: a softmax or a sum runs over positions",
    ),
    "size": (
        lambda: randomise(Beside(lambda m, h, x: h.sum((2, 3), keepdim=True))),
        "no constant: a sum over positions grows with their number",
    ),
    "border": (
        lambda: randomise(Beside(lambda m, h, x: nn.functional.avg_pool2d(h, 3, 1, padding=1))),
        "no constant: it varies where last.weight reads it",
    ),
    "functional": (
        lambda: randomise(Beside(lambda m, h, x: nn.functional.conv2d(h, m.other.weight), other=nn.Conv2d(6, 6, 1))),
        "other.weight is not read by one Linear or convolution of its own",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_stays_says_why(name: str) -> None:
    build, reason = KEPT[name]
    torch.manual_seed(0)
    model = build()
    layer = model[0] if isinstance(model, nn.Sequential) else model.first
    zero_filters(layer, 2)
    x = images()
    before = run(model, x)
    report = rk.shrink(model, example_inputs=x)
    assert report.groups == 0 and not report.folded
    (kept,) = report.kept
    assert kept.channels == (2,) and kept.weight in ("0.weight", "first.weight")
    assert kept.reason.startswith("zero where it is made, and still read by") and kept.reason.endswith(reason)
    torch.testing.assert_close(run(model, x), before)


def test_a_dead_channel_is_no_constant() -> None:
    """A filter that is not zero may come to life on other inputs."""
    model = chain(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].bias[1] = -1e6
    assert rk.shrink(model, example_inputs=torch.randn(3, 4)).groups == 0


def test_the_last_channel_of_a_layer_stays() -> None:
    model = mlp()
    zero_filters(model[0], *range(9))
    report = check(model, torch.randn(5, 6), 8)
    assert ("2.weight", "the last channel of a layer") in [(k.weight, k.reason) for k in report.kept]


# ---- optimizers ------------------------------------------------------------------------------------------------------

SPLIT: dict[str, Any] = {"penalty": "l0", "lam": 0.0, "beta": 1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [rk.RVSM, rk.RVSMAdamW], ids=["sgd", "adamw"])
def test_filters_that_training_has_zeroed(make: Any, dtype: torch.dtype) -> None:
    """u decides, and the biases' w gets what folds; masters hold it in full."""
    model, x = mlp().to(dtype), torch.randn(16, 6).to(dtype)
    groups = rk.param_groups(model, structure="out_channels", **SPLIT)
    options = {"master_weights": True} if dtype != torch.float32 else {}
    optimizer = make(groups, lr=0.05, **options)
    schedule = rk.SparsitySchedule(optimizer, 0.4, of="groups", end=4, every=1)
    for _ in range(6):
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
        schedule.step()
    with optimizer.sparse_weights():
        expected = run(model, x)
    bias, sparse = model[2].bias, rk.sparse_copy(model, optimizer)
    report = rk.shrink(model, optimizer, example_inputs=x)
    assert report.groups > 2 and report.folded
    assert not [k for k in report.kept if k.reason.startswith("zero where it is made")]
    # Norms of the filters that remain are others now, and so may u be: the copy is u as it was.
    assert rk.shrink(sparse, example_inputs=x) == report
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(run(sparse, x), expected, rtol=tolerance, atol=tolerance)
    assert bias is model[2].bias
    for ours, theirs in zip(model.parameters(), sparse.parameters(), strict=True):
        if ours.dim() == 1:
            torch.testing.assert_close(ours, theirs)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
        schedule.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_masters_hold_what_folds_in_full() -> None:
    model = chain(nn.Linear(6, 4), nn.Sigmoid(), nn.Linear(4, 3)).bfloat16()
    optimizer = rk.RVSM(rk.param_groups(model, **SPLIT), lr=1e-3, master_weights=True)
    x = torch.randn(5, 6).bfloat16()
    model(x).float().sum().backward()
    optimizer.step()
    zero_filters(model[0], 1)
    optimizer.state[model[0].weight]["low"][1] = 0
    from rvsm_kernels.method.precision import join

    bias, constant = model[2].bias, torch.sigmoid(model[0].bias[1]).double()
    before = join(bias.detach(), optimizer.state[bias]["low"]).double()
    added = model[2].weight[:, 1].double() * constant
    assert rk.shrink(model, optimizer, example_inputs=x).groups == 1
    after = join(bias.detach(), optimizer.state[bias]["low"]).double()
    torch.testing.assert_close(after, before + added, rtol=1e-6, atol=1e-6)


def test_a_penalised_bias_takes_nothing() -> None:
    model, x = mlp(), torch.randn(5, 6)
    zero_filters(model[0], 2)
    with pytest.warns(UserWarning, match="penalises biases"):
        optimizer = rk.RVSM(model.named_parameters(), lr=0.1, **{**SPLIT, "lam": 1e-9})
    report = rk.shrink(model, optimizer, example_inputs=x)
    assert report.groups == 0 and report.kept[0].reason.endswith("2.bias has a penalty, which would move the constant")


def test_schedulefree_moves_its_iterate_too() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    model, x = mlp(), torch.randn(5, 6)
    optimizer = schedulefree.SGDScheduleFree(model.parameters(), lr=0.1)
    optimizer.train()
    model(x).sum().backward()
    optimizer.step()
    zero_filters(model[0], 2)
    bias = model[2].bias
    gap = bias.detach() - optimizer.state[bias]["z"]
    assert rk.shrink(model, optimizer, example_inputs=x).groups == 1
    torch.testing.assert_close(bias.detach() - optimizer.state[bias]["z"], gap)


def test_an_error_changes_nothing() -> None:
    model, x = mlp(), torch.randn(5, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    zero_filters(model[0], 2)
    optimizer.state[model[2].weight]["history"] = torch.zeros(7, 3)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(TypeError, match="state history"):
        rk.shrink(model, optimizer, example_inputs=x)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_infinite_outputs_hide_nothing() -> None:
    """A bias that code reads too, beside logits that are masked: folding would change the finite ones."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.b(torch.relu(self.a(x))) + 2 * self.b.bias
            return torch.cat([y, torch.full_like(y[:, :1], -torch.inf)], 1)

    torch.manual_seed(0)
    model, x = Masked().eval(), torch.randn(32, 8)
    with torch.no_grad():
        model.a.weight[:5], model.a.bias[:5] = 0, 1
        before = model(x)
        report = rk.shrink(model, example_inputs=x)
        torch.testing.assert_close(model(x), before)
    assert not report.folded


def test_a_bias_with_another_name_is_left() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
            self.first = self.b.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x)))

    model, x = Named().eval(), torch.randn(3, 8)
    model._parameters["first"] = model._parameters.pop("first")
    with torch.no_grad():
        model.a.weight[:5], model.a.bias[:5] = 0, 1
        before = model(x)
        rk.shrink(model, example_inputs=x)
        torch.testing.assert_close(model(x), before)


def test_a_half_type_that_varies_is_no_constant() -> None:
    """A padded depthwise convolution makes border and inside of a constant: 0.1 apart is not the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 2, 1)).bfloat16()
    with torch.no_grad():
        model[0].weight[:2], model[0].bias[:2] = 0, 0.1
    x = torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)
    before = model.eval()(x)
    report = rk.shrink(model, example_inputs=x)
    assert not report.folded and torch.equal(model(x), before)
