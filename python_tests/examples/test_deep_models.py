"""The networks of the deep experiments: parameter counts of the papers, noise, skips, ensembles, normalisation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deep import models


def counts(model: nn.Module) -> tuple[int, int, int]:
    """Parameters, those in convolutions, and the convolutions' input channels."""
    convolutions = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    return (
        sum(p.numel() for p in model.parameters()),
        sum(w.numel() for w in convolutions),
        sum(w.shape[1] for w in convolutions),
    )


@pytest.mark.parametrize(
    ("name", "channels", "expected"),
    [
        # The counts in papers/README.md.
        ("resnet20", 3, (272_282, 270_256, 675)),
        ("en2resnet20", 3, (544_564, 2 * 270_256, 2 * 675)),
        ("resnet38", 3, (563_930, None, 1347)),
        # 1 + 6 input channels; 61,706 is LeNet-5's well-known count.
        ("lenet5", 1, (61_706, 6 * 25 + 16 * 6 * 25, 7)),
        # The usual nets for CIFAR-10; VGG-16 without the biases that its norms would take off.
        ("resnet18", 3, (11_173_962, None, None)),
        ("vgg16", 3, (14_724_042, None, None)),
        # The two 1x1 convolutions of the shortcuts go.
        ("resnet20-noskip", 3, (272_282 - 16 * 32 - 32 * 64, None, 675 - 16 - 32)),
    ],
)
def test_parameter_counts(name: str, channels: int, expected: tuple[int | None, ...]) -> None:
    for found, printed in zip(counts(models.build(name, channels)), expected, strict=True):
        assert printed is None or found == printed


@pytest.mark.parametrize(
    ("name", "size", "channels"),
    [
        ("lenet5", 28, 1),
        ("lenet5", 32, 3),
        ("vgg16", 32, 3),
        ("resnet18", 32, 1),
        ("resnet8", 28, 1),
        ("resnet14-noskip", 28, 1),
        ("en3resnet8", 28, 1),
    ],
)
def test_logits_and_gradients(name: str, size: int, channels: int) -> None:
    model = models.build(name, channels, classes=7, size=size, width=4)
    logits = model(torch.rand(2, channels, size, size))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("resnet19", 32, "6n + 2"),
        ("resnet2", 32, "6n + 2"),
        ("en0resnet20", 32, "unknown model"),
        ("alexnet", 32, "resnetD"),
        ("vgg16", 28, "--pad 32"),
        ("lenet5", 30, "28x28 or 32x32"),
    ],
)
def test_models_that_are_not(name: str, size: int, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("+", r"\+")):
        models.build(name, 1, size=size)


def test_noise_has_the_asked_size_and_is_active_in_evaluation() -> None:
    torch.manual_seed(0)
    x = 3 * torch.randn(8, 16, 20, 20) + 5
    noise = models.Noise(0.1).eval()
    added = noise(x) - x
    assert not torch.equal(noise(x), noise(x))
    # 51,200 draws: the standard error of their deviation is 0.3 %.
    assert added.std().item() == pytest.approx(0.1 * x.std().item(), rel=0.02)
    assert abs(added.mean().item()) < 0.01
    assert torch.equal(models.Noise(0.0)(x), x)


def test_an_ensemble_is_noisy_in_evaluation_and_a_single_net_is_not() -> None:
    torch.manual_seed(0)
    x = torch.rand(4, 1, 28, 28)
    for name, noisy in (("en2resnet8", True), ("en1resnet8", True), ("resnet8", False)):
        model = models.build(name, 1, size=28, width=4).eval()
        assert torch.equal(model(x), model(x)) != noisy, name
    quiet = models.build("en2resnet8", 1, size=28, width=4, noise=0.0).eval()
    assert torch.equal(quiet(x), quiet(x))


def test_every_block_of_an_ensemble_adds_noise() -> None:
    model = models.build("en2resnet20", 3)
    assert sum(isinstance(module, models.Noise) for module in model.modules()) == 2 * 9


def test_an_ensemble_is_the_mean_of_its_members() -> None:
    torch.manual_seed(0)
    model = models.build("en3resnet8", 1, size=28, width=4, noise=0.0).eval()
    x = torch.rand(4, 1, 28, 28)
    members = [member(x) for member in model.members]
    assert not torch.equal(members[0], members[1]), "members start from weights of their own"
    torch.testing.assert_close(model(x), sum(members) / 3)


def test_skips_carry_the_input() -> None:
    """With its convolutions at zero, a block with a skip is the identity; without, it is zero."""
    x = torch.rand(2, 4, 8, 8)
    for skip in (True, False):
        block = models.PreActBlock(4, 4, 1, skip, noise=None)
        nn.init.zeros_(block.conv2.weight)
        assert torch.equal(block(x), x if skip else torch.zeros_like(x))


def test_normalisation_is_inside_the_model() -> None:
    class Same(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    model = models.Normalized(Same(), [0.5, 0.25], [0.5, 0.25])
    x = torch.rand(3, 2, 4, 4)
    expected = torch.stack([(x[:, 0] - 0.5) / 0.5, (x[:, 1] - 0.25) / 0.25], 1)
    torch.testing.assert_close(model(x), expected)
    assert not model.state_dict(), "the data's numbers are no part of a checkpoint"


@pytest.mark.parametrize("bad", [{"noise": -1.0}, {"noise": float("nan")}, {"width": 0}])
def test_bad_numbers(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        models.build("en2resnet8", 1, **bad)
