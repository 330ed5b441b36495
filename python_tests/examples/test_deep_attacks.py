"""examples/deep/attacks.py: the attacks in closed form, written out again, and on a small net that knows real digits.

pyproject.toml puts examples/ on the path. The digits are those of scikit-learn, 8 x 8 pixels of 17 grey levels.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builds import DEVICE
from torch import Tensor, nn

from deep.attacks import ALPHA, EPSILON, Attack, accuracies, cw, fgsm, ifgsm, nattack

ROUNDING = 1e-6
"""x + epsilon and the way back are each rounded once, by half an ulp of 1 at most; eight times that."""

ATTACKS: dict[str, Callable[..., Tensor]] = {
    "fgsm": fgsm,
    "ifgsm": functools.partial(ifgsm, steps=4),
    "pgd": functools.partial(ifgsm, steps=3, random_start=True),
    "cw": functools.partial(cw, steps=5),
    "nattack": functools.partial(nattack, steps=5, population=20),
}
RADII = [0.0, 1 / 255, EPSILON, 0.3, 1.0]

every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """All 1,797 digits as uint8, ``(n, 1, 8, 8)``, and their labels."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    return torch.tensor(data.images * 15.9375).byte()[:, None], torch.tensor(data.target)


def batch(first: int, last: int) -> tuple[Tensor, Tensor]:
    """Some digits as floats in [0, 1]."""
    images, labels = digits()
    return images[first:last] / 255, labels[first:last]


@functools.cache
def trained() -> nn.Module:
    """A small net after 60 steps on the first 1,400 digits; about 9 of 10 of the others are right."""
    x, y = batch(0, 1400)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
        net = nn.Sequential(*features, nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        for part in torch.randint(0, len(y), (60, 128)):
            optimizer.zero_grad()
            F.cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()
    net.zero_grad()
    return net.eval()


@pytest.fixture
def net() -> nn.Module:
    """A copy in evaluation mode, which a test may change."""
    return copy.deepcopy(trained())


def mean_loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return F.cross_entropy(model(x), y).item()


def gradient(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Of the cross entropy of each image, by the other road: backward."""
    x = x.clone().requires_grad_()
    F.cross_entropy(model(x), y, reduction="sum").backward()
    assert x.grad is not None
    return x.grad


def bits_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# The ball


@pytest.mark.parametrize("epsilon", RADII)
@every_attack
def test_images_stay_in_the_ball_and_in_range(net: nn.Module, attack: Callable[..., Tensor], epsilon: float) -> None:
    """Digits, a black image and a white one: many pixels are on the border of [0, 1]."""
    x, y = batch(0, 30)
    x[0], x[1] = 0, 1
    before = x.clone()
    perturbed = attack(net, x.requires_grad_(), y, epsilon=epsilon)
    assert torch.equal(x, before) and x.grad is None
    assert perturbed.shape == x.shape and perturbed.dtype == x.dtype and not perturbed.requires_grad
    assert perturbed.min() >= 0 and perturbed.max() <= 1
    assert (perturbed - before).abs().max() <= epsilon + ROUNDING
    assert torch.equal(perturbed, before) == (epsilon == 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@every_attack
def test_types(net: nn.Module, attack: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """The pixels of a half type lie up to eps apart; so far x + epsilon may be rounded, and epsilon itself.

    One column has a gradient of 0, which an Adam in float16 divides by 0: the image is NaN then, and stays.
    """
    x, y = batch(0, 30)
    x = x.to(dtype)
    perturbed = attack(lambda z: net(z.float() * (torch.arange(8) > 0)), x, y)
    assert (perturbed != x).flatten(1).any(1).sum() > 15
    assert perturbed.dtype == dtype and perturbed.isfinite().all()
    assert perturbed.min() >= 0 and perturbed.max() <= 1
    assert 0 < (perturbed - x).abs().max() <= EPSILON + torch.finfo(dtype).eps + ROUNDING


# FGSM and IFGSM


@pytest.mark.parametrize("epsilon", RADII[1:])
@pytest.mark.parametrize("factor", [1.0, 1.5, 300.0])
def test_fgsm_is_one_step_of_ifgsm(net: nn.Module, epsilon: float, factor: float) -> None:
    x, y = batch(0, 30)
    perturbed = fgsm(net, x, y, epsilon)
    assert torch.equal(perturbed, ifgsm(net, x, y, steps=1, alpha=factor * epsilon, epsilon=epsilon))
    assert torch.equal(perturbed, (x + epsilon * gradient(net, x, y).sign()).clamp(0, 1))


@pytest.mark.parametrize(("steps", "alpha", "epsilon"), [(3, ALPHA, EPSILON), (5, 0.05, 0.12), (20, 0.3, 0.2)])
def test_ifgsm_is_its_formula(net: nn.Module, steps: int, alpha: float, epsilon: float) -> None:
    """Every step is projected: the last case leaves the ball at each of them."""
    x, y = batch(30, 60)
    expected = x
    for _ in range(steps):
        expected = expected + alpha * gradient(net, expected, y).sign()
        expected = torch.maximum(torch.minimum(expected, x + epsilon), x - epsilon).clamp(0, 1)
    assert torch.equal(ifgsm(net, x, y, steps, alpha, epsilon), expected)


@pytest.mark.parametrize("epsilon", [0.01, 0.1, 0.2])
def test_the_closed_form_on_a_linear_model(epsilon: float) -> None:
    """Two classes: the loss is log(1 + exp(-m)), and FGSM lowers the margin m by epsilon ||w_y - w_other||_1.

    No other image in the ball has a larger loss, so IFGSM that can reach the ball's corner stays in it.
    """
    linear = nn.Linear(12, 2).double()
    x, y = 0.3 + 0.4 * torch.rand(20, 12, dtype=torch.float64), torch.arange(20) % 2
    with torch.no_grad():
        logits = linear(x)
        margin = logits.gather(1, y[:, None])[:, 0] - logits.gather(1, 1 - y[:, None])[:, 0]
        slope = (linear.weight[0] - linear.weight[1]).abs().sum()
        expected = F.softplus(-(margin - epsilon * slope))
        for perturbed in (fgsm(linear, x, y, epsilon), ifgsm(linear, x, y, 20, epsilon / 7, epsilon)):
            actual = F.cross_entropy(linear(perturbed), y, reduction="none")
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_more_steps_raise_the_loss(net: nn.Module) -> None:
    """A net is not linear in the ball, so a step may lose a little: 1 %. Twenty steps gain a third on one."""
    x, y = batch(1400, 1600)
    losses = [mean_loss(net, ifgsm(net, x, y, steps, 0.025, 0.1), y) for steps in (1, 2, 4, 8, 12, 16, 20)]
    assert losses[0] > mean_loss(net, x, y)
    for fewer, more in pairwise(losses):
        assert more >= 0.99 * fewer
    assert losses[-1] > 4 / 3 * losses[0]


def flat(x: Tensor) -> Tensor:
    """Logits that depend on x with gradient 0 everywhere."""
    return 0 * x.flatten(1)[:, :3]


def test_the_sign_of_zero_is_zero() -> None:
    x, _ = batch(0, 10)
    assert torch.equal(ifgsm(flat, x, torch.arange(10) % 3), x)


@pytest.mark.parametrize("grey", [0.5, 0.0, 1.0])
def test_the_random_start(grey: float) -> None:
    """A model without a gradient leaves the start as it is: uniform in the ball, clipped to [0, 1]."""
    x, y, epsilon = torch.full((50, 1, 8, 8), grey), torch.zeros(50, dtype=torch.int64), 0.25

    def flat_in_range(z: Tensor) -> Tensor:
        assert z.min() >= 0 and z.max() <= 1
        return flat(z)

    def start(seed: int | None = None) -> Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        return ifgsm(flat_in_range, x, y, 2, 0.1, epsilon, random_start=True)

    first, second = start(1), start()
    assert not torch.equal(first, second)
    assert torch.equal(first, start(1)) and not torch.equal(first, start(2))
    assert first.min() >= 0 and first.max() <= 1
    offset = (first - x) / epsilon
    assert offset.abs().max() <= 1 + ROUNDING
    if grey == 0.5:  # 3,200 uniform numbers: five standard errors of the mean, and of the mean square
        assert offset.mean().abs() < 5 * math.sqrt(1 / 3 / 3200)
        assert (offset.square().mean() - 1 / 3).abs() < 5 * math.sqrt(4 / 45 / 3200)
    else:  # half of them are clipped
        assert 0.4 < (offset == 0).float().mean() < 0.6


def test_adversarial_training_starts_in_the_ball_and_climbs(net: nn.Module) -> None:
    x, y = batch(1400, 1600)
    perturbed = ifgsm(net, x, y, steps=10, epsilon=0.05, random_start=True)
    assert (perturbed - x).abs().max() <= 0.05 + ROUNDING
    assert mean_loss(net, perturbed, y) > 1.5 * mean_loss(net, x, y)


# C&W


@pytest.mark.parametrize("epsilon", [1 / 255, EPSILON, 0.3])
def test_cw_moves_what_is_right_to_the_sphere(net: nn.Module, epsilon: float) -> None:
    """Grey images are clipped nowhere. What the model gets wrong has an objective of 0 at delta = 0 and stays."""
    x, y = batch(0, 200)
    x = 0.35 + 0.3 * x
    right = net(x).argmax(1) == y
    assert 5 < right.sum() < 195
    size = (cw(net, x, y, epsilon, steps=5) - x).abs().flatten(1).amax(1)
    assert (size[right] - epsilon).abs().max() <= ROUNDING
    assert size[~right].max() == 0


@pytest.mark.parametrize(
    ("steps", "lr", "c", "kappa"), [(1, 6e-4, 10.0, 0.0), (50, 6e-4, 10.0, 0.0), (25, 0.02, 3.0, 0.0), (25, 0.01, 1, 4)]
)
def test_cw_is_its_formula(net: nn.Module, steps: int, lr: float, c: float, kappa: float) -> None:
    """One image after the other, in float64, with an Adam of our own; then all at once, with the attack."""
    net.double()
    x, y = batch(0, 8)
    x = x.double()
    for image, label, actual in zip(x, y.tolist(), cw(net, x, y, 0.1, steps, lr, c, kappa), strict=True):
        delta, first, second = torch.zeros_like(image), torch.zeros_like(image), torch.zeros_like(image)
        met = []
        for step in range(1, steps + 2):
            delta.requires_grad_()
            logits = net((image + delta)[None])[0]
            other = max(logits[j] for j in range(10) if j != label)
            objective = (delta**2).sum() + c * max(logits[label] - other, torch.tensor(-kappa).double())
            met.append((objective.item(), delta.detach()))
            (slope,) = torch.autograd.grad(objective, delta)
            first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
            delta = delta.detach() - lr * first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        best = min(met, key=lambda pair: pair[0])[1]
        expected = (image + 0.1 * best / best.abs().max() if best.any() else image).clamp(0, 1)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


def test_cw_goes_on_to_kappa_and_stays_without_a_margin(net: nn.Module) -> None:
    x, y = batch(1400, 1500)
    wrong = net(x).argmax(1) != y
    assert wrong.any()
    assert torch.equal(cw(net, x, y, c=0.0), x)
    assert not torch.equal(cw(net, x, y, kappa=100.0)[wrong], x[wrong])


# NAttack

WEAK = 0.02
"""Too small a radius for the linear models below: no sample fools them, and every step is made."""


def linear_pair(seed: int = 0) -> tuple[nn.Linear, Tensor, Tensor, Tensor, Tensor]:
    """A linear model of two classes, grey images that it gets right, their margins, and the least margins in the ball.

    The margin falls fastest to that corner of the ball which the signs of the difference of the two rows name.
    """
    torch.manual_seed(seed)
    model = nn.Linear(20, 2).double()
    x = 0.3 + 0.4 * torch.rand(30, 20, dtype=torch.float64)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([3.0, 0.0]))
        margins = model(x) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
        least = margins - WEAK * (model.weight[0] - model.weight[1]).abs().sum()
    assert least.min() > 0
    return model, x, torch.zeros(30, dtype=torch.int64), margins, least


def margin_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x) @ torch.tensor([1.0, -1.0], dtype=x.dtype)


@pytest.mark.parametrize(("start", "share"), [(1.0, 0.45), (1e-3, 0.95)])
def test_nattack_comes_nearer_to_a_known_optimum_with_more_steps(start: float, share: float) -> None:
    """The toolbox's start of 1 puts most pixels so far outside of the ball that all their samples are clipped alike."""
    model, x, y, margins, least = linear_pair()
    shares = []
    for steps in (1, 20, 100, 400):
        torch.manual_seed(1)
        found = margin_of(model, nattack(model, x, y, WEAK, steps, population=50, lr=0.3, start=start))
        assert (found >= least - 1e-12).all()
        shares.append(((margins - found) / (margins - least)).mean().item())
    assert shares == sorted(shares)
    assert shares[0] < 0.6 * shares[-1] and shares[-1] > share


def test_nattack_is_its_formula() -> None:
    """Two steps for one image after the other, with the same random numbers."""
    model, x, y, _, _ = linear_pair()
    x, y = x[:1], y[:1]
    torch.manual_seed(3)
    actual = nattack(model, x, y, WEAK, steps=2, population=7, sigma=0.2, lr=0.5, start=0.1)
    torch.manual_seed(3)
    mu = 0.1 * torch.randn(1, 20, dtype=torch.float64)
    met = []
    for _ in range(2):
        noise = torch.randn(7, 20, dtype=torch.float64)
        squashed = (1 + torch.tanh(torch.atanh((2 * x - 1) * (1 - 1e-6)) + mu + 0.2 * noise)) / 2
        samples = x + (squashed - x).clamp(-WEAK, WEAK)
        p = model(samples).softmax(1).log().detach()
        rewards = -(p[:, 0] - p[:, 1]) / 2
        met += list(zip(rewards.tolist(), samples, strict=True))
        rewards = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-7)
        mu = mu + 0.5 / (7 * 0.2) * (rewards[:, None] * noise).sum(0)
    torch.testing.assert_close(actual[0], max(met, key=lambda pair: pair[0])[1], rtol=0, atol=1e-12)


def test_nattack_follows_the_seed(net: nn.Module) -> None:
    x, y = batch(1400, 1420)

    def images(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return nattack(net, x, y, 0.1, steps=3, population=10)

    assert torch.equal(images(0), images(0)) and not torch.equal(images(0), images(1))


def test_nattack_asks_for_no_gradient(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of autograd, nor of a model that has none: its logits come out of NumPy."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a gradient was asked for")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    monkeypatch.setattr(torch.autograd, "backward", refuse)

    def black_box(z: Tensor) -> Tensor:
        assert not torch.is_grad_enabled() and not z.requires_grad
        return torch.tensor(net(z).numpy())

    x, y = batch(1400, 1500)
    torch.manual_seed(0)
    with torch.no_grad():
        right = net(x).argmax(1) == y
        fooled = net(nattack(black_box, x, y, 0.3, steps=30, population=40)).argmax(1) != y
    assert right.sum() > 80 and (fooled & right).sum() > 0.4 * right.sum()


def test_nattack_stops_asking_when_an_image_is_fooled(net: nn.Module) -> None:
    """One query for each image, a population for each step of an image that is right and not fooled yet."""
    x, y = batch(1400, 1450)
    wrong = net(x).argmax(1) != y
    asked: dict[str, int] = {}
    accuracies(net, [(x, y)], [Attack("nattack", 0.0, steps=4, population=9)], DEVICE, asked)
    assert asked == {"NAttack": 50 + 4 * 9 * int((~wrong).sum())}
    accuracies(net, [(x, y)], [Attack("nattack", 0.3, steps=60, population=9)], DEVICE, asked)
    assert asked["NAttack"] < 0.5 * (50 + 60 * 9 * int((~wrong).sum()))
    torch.manual_seed(0)
    perturbed = nattack(net, x, y, 0.3, steps=60, population=9)
    assert torch.equal(perturbed[wrong], x[wrong])


def test_queries_are_counted_for_each_attack(net: nn.Module) -> None:
    x, y = batch(0, 10)
    asked: dict[str, int] = {}
    attacks = [Attack("fgsm"), Attack("ifgsm", steps=7), Attack("cw", steps=3)]
    accuracies(net, [(x[:6], y[:6]), (x[6:], y[6:])], attacks, DEVICE, asked)
    assert asked == {"FGSM": 10, "IFGSM^7": 70, "C&W": 40}


# What an attack leaves alone, and what it bears


@every_attack
def test_the_model_stays_as_it_is(net: nn.Module, attack: Callable[..., Tensor]) -> None:
    """Gradients that are there and that are not, modes, buffers, and which parameters are trained."""
    x, y = batch(0, 20)
    parameters = list(net.parameters())
    parameters[0].grad, parameters[1].requires_grad = torch.ones_like(parameters[0]), False
    before = bits_of(net)
    attack(net, x, y)
    assert not any(module.training for module in net.modules())
    assert torch.equal(parameters[0].grad, torch.ones_like(parameters[0]))
    assert all(p.grad is None for p in parameters[1:])
    assert [p.requires_grad for p in parameters] == [i != 1 for i in range(len(parameters))]
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    attack(net.train(), x, y)
    assert all(module.training for module in net.modules())


@every_attack
def test_callers_without_gradients(net: nn.Module, attack: Callable[..., Tensor]) -> None:
    """Frozen parameters and no_grad, alone and together, change no bit."""
    x, y = batch(0, 20)

    def images() -> Tensor:
        torch.manual_seed(0)
        return attack(net, x, y)

    expected = images()
    with torch.no_grad():
        assert torch.equal(images(), expected)
        assert not torch.is_grad_enabled()
        net.requires_grad_(False)
        assert torch.equal(images(), expected)
    assert torch.equal(images(), expected)


@every_attack
def test_a_gradient_of_nan_moves_nothing(attack: Callable[..., Tensor]) -> None:
    """The left half of the image has a gradient of NaN; the others are attacked as ever."""
    x, y = batch(0, 20)
    weight = torch.randn(32, 10)

    def broken(z: Tensor) -> Tensor:
        left, right = z.flatten(2).chunk(2, dim=2)
        return 30 * (right - 0.5).flatten(1) @ weight + (0 * left).sqrt().sum()

    assert gradient(broken, x, y).flatten(2)[..., :32].isnan().all()
    perturbed = attack(broken, x, y)
    assert perturbed.isfinite().all()
    assert not torch.equal(perturbed, x)
    if attack not in (ATTACKS["pgd"], ATTACKS["nattack"]):  # a start and samples that are random
        assert torch.equal(perturbed.flatten(2)[..., :32], x.flatten(2)[..., :32])
    assert attack(lambda z: broken(z) * math.nan, x, y).isfinite().all()


@every_attack
def test_autocast(net: nn.Module, attack: Callable[..., Tensor]) -> None:
    x, y = batch(1400, 1600)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert net(x).dtype == torch.bfloat16
        perturbed = attack(net, x, y, epsilon=0.1)
    assert perturbed.dtype == torch.float32 and perturbed.isfinite().all()
    assert (perturbed - x).abs().max() <= 0.1 + ROUNDING
    # Black pixels do not move under NAttack, and its five steps are few.
    assert mean_loss(net, perturbed, y) > (1.05 if attack is ATTACKS["nattack"] else 1.2) * mean_loss(net, x, y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_sure_net_in_a_half_type_is_attacked(dtype: torch.dtype) -> None:
    """Logits 0 and 10, and only the second depends on x: in a half type its probability is 1, its gradient 0."""
    x, y = torch.full((4, 1, 2, 2), 0.5), torch.ones(4, dtype=torch.int64)

    def sure(z: Tensor) -> Tensor:
        total = z.flatten(1).to(dtype).sum(1)
        return torch.stack([0 * total, 5 * total], dim=1)

    assert gradient(sure, x, y).count_nonzero() == 0
    assert torch.equal(fgsm(sure, x, y, 0.25), x - 0.25)


def test_logits_in_float64_keep_their_digits() -> None:
    """A margin of 1 beside 1e9 is none in float32, and C&W would find nothing to do."""
    x, y = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64), torch.ones(1, dtype=torch.int64)
    perturbed = cw(lambda z: 1e9 + z.flatten(1) * torch.tensor([0.0, 2.0]), x, y, 0.25)
    torch.testing.assert_close(perturbed.flatten(), torch.tensor([0.5, 0.25], dtype=torch.float64))


BAD: list[tuple[Callable[..., Tensor], str, list[Any]]] = [
    *((f, "epsilon", [-0.01, 1.01, math.nan, math.inf]) for f in (fgsm, ifgsm, cw, nattack)),
    *((f, "steps", [0, -1, 2.0, True]) for f in (ifgsm, cw, nattack)),
    (nattack, "population", [0, -1, 2.0, True]),
    *((nattack, name, [0.0, -0.1, math.nan, math.inf]) for name in ("sigma", "lr")),
    (nattack, "start", [-1.0, math.nan, math.inf]),
    (ifgsm, "alpha", [0.0, -0.1, math.nan, math.inf]),
    (cw, "lr", [0.0, -0.1, math.nan, math.inf]),
    (cw, "c", [-1.0, math.nan, math.inf]),
    (cw, "kappa", [-1.0, math.nan, math.inf]),
]


@pytest.mark.parametrize(("attack", "name", "value"), [(f, name, value) for f, name, bad in BAD for value in bad])
def test_bad_options(attack: Callable[..., Tensor], name: str, value: Any) -> None:
    x, y = torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"Invalid {name} value: {value!r}"):
        attack(flat, x, y, **{name: value})
    with pytest.raises(ValueError, match=f"Invalid {name} value: {value!r}"):
        Attack(attack.__name__, **{name: value})


@every_attack
def test_images_must_be_floats(attack: Callable[..., Tensor]) -> None:
    with pytest.raises(TypeError, match=r"floats in \[0, 1\], but got torch.uint8"):
        attack(flat, torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))


# Attack and accuracies


def test_an_attack_is_its_function(net: nn.Module) -> None:
    x, y = batch(0, 20)
    cases = [
        (Attack("fgsm"), "FGSM", fgsm(net, x, y)),
        (Attack("fgsm", 0.1), "FGSM", fgsm(net, x, y, 0.1)),
        (Attack("ifgsm"), "IFGSM^20", ifgsm(net, x, y)),
        (Attack("ifgsm", 0.1, steps=3, alpha=0.05), "IFGSM^3", ifgsm(net, x, y, 3, 0.05, 0.1)),
        (Attack("cw"), "C&W", cw(net, x, y)),
        (Attack("cw", 0.1, steps=9, lr=0.1, c=2.0, kappa=3.0), "C&W", cw(net, x, y, 0.1, 9, 0.1, 2.0, 3.0)),
    ]
    for attack, label, expected in cases:
        assert attack.label == label
        assert torch.equal(attack(net, x, y), expected)
    assert not torch.equal(cases[-1][2], cw(net, x, y, 0.1))
    torch.manual_seed(0)
    expected = nattack(net, x, y, 0.1, 2, 9, 0.2, 0.5, 0.3)
    torch.manual_seed(0)
    attack = Attack("nattack", 0.1, steps=2, population=9, sigma=0.2, lr=0.5, start=0.3)
    assert attack.label == "NAttack" and torch.equal(attack(net, x, y), expected)


def test_bad_attacks() -> None:
    with pytest.raises(ValueError, match=r"Invalid attack: 'pgd' .*'fgsm', 'ifgsm', 'cw', 'nattack'"):
        Attack("pgd")
    with pytest.raises(TypeError, match="steps"):
        Attack("fgsm", steps=3)
    with pytest.raises(TypeError, match="alpha"):
        Attack("cw", alpha=0.1)


STRONG = [Attack("fgsm", 0.3), Attack("ifgsm", 0.3, steps=10, alpha=0.06), Attack("cw", 0.3, steps=20)]


@pytest.mark.parametrize("epsilon", [0.0, EPSILON, 0.1])
def test_robust_is_at_most_natural(net: nn.Module, epsilon: float) -> None:
    attacks = [Attack("fgsm", epsilon), Attack("ifgsm", epsilon, steps=5), Attack("cw", epsilon, steps=5)]
    shares = accuracies(net, [batch(1400, 1797)], attacks, DEVICE)
    assert list(shares) == ["natural", "FGSM", "IFGSM^5", "C&W"]
    for attack in attacks:
        assert shares[attack.label] == shares["natural"] if epsilon == 0 else shares[attack.label] < shares["natural"]


def test_attacks_hurt(net: nn.Module) -> None:
    """With a radius of 0.3 nothing is left of a net that was not trained against it: below one image in ten."""
    shares = accuracies(net, [batch(1400, 1797)], STRONG, DEVICE)
    assert shares["natural"] > 0.85
    assert max(shares[attack.label] for attack in STRONG) < 0.1


def test_accuracies_are_counts(net: nn.Module) -> None:
    """In one batch or in uneven ones, as uint8 or as floats."""
    x, y = batch(1400, 1500)
    attack = Attack("ifgsm", 0.1, steps=3, alpha=0.05)
    clean, perturbed = net(x).argmax(1) == y, net(attack(net, x, y)).argmax(1) == y
    expected = {"natural": clean.sum().item() / 100, "IFGSM^3": (clean & perturbed).sum().item() / 100}
    raw = digits()[0][1400:1500]
    seen: list[Tensor] = []
    net.register_forward_pre_hook(lambda _, images: seen.append(images[0]))
    for images in (x, raw):
        seen.clear()
        assert accuracies(net, [(images, y)], [attack], DEVICE) == expected
        assert torch.equal(seen[0], x)
        assert accuracies(net, zip(images.split(33), y.split(33), strict=True), [attack], DEVICE) == expected


def test_the_adversary_keeps_what_is_worse() -> None:
    """Class 1 is far from grey 0.5. FGSM pushes a wrong image across to the other side, where it is right."""

    class FarFromGrey(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            far = (x.flatten(1)[:, 0] - 0.5).abs()
            return torch.stack([0 * far, far - 0.2], dim=1)

    model, x, y = FarFromGrey(), torch.full((1, 1, 1, 1), 0.6), torch.ones(1, dtype=torch.int64)
    assert model(x).argmax() == 0 and model(fgsm(model, x, y, 0.4)).argmax() == 1
    assert accuracies(model, [(x, y)], [Attack("fgsm", 0.4)], DEVICE) == {"natural": 0.0, "FGSM": 0.0}


@pytest.mark.parametrize("fails", [False, True])
def test_the_mode_comes_back(net: nn.Module, fails: bool) -> None:
    """Module by module: a batch norm that was in evaluation mode in a net in training mode still is."""
    net.train()
    net[1].eval()
    modes = [module.training for module in net.modules()]
    before, seen = bits_of(net), []
    net[4].register_forward_hook(lambda module, *_: seen.append(module.training))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield batch(0, 10)
        if fails:
            raise RuntimeError("the disk is gone")

    if fails:
        with pytest.raises(RuntimeError, match="the disk is gone"):
            accuracies(net, batches(), [Attack("fgsm")], DEVICE)
    else:
        accuracies(net, batches(), [Attack("fgsm")], DEVICE)
    assert seen and not any(seen)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_bad_calls_of_accuracies(net: nn.Module) -> None:
    x, y = batch(0, 10)
    with pytest.raises(ValueError, match="the same label: FGSM, FGSM"):
        accuracies(net, [(x, y)], [Attack("fgsm", 0.1), Attack("fgsm", 0.2)], DEVICE)
    with pytest.raises(ValueError, match="no images"):
        accuracies(net, [], [Attack("fgsm")], DEVICE)
    with pytest.raises(TypeError, match=r"torch\.int64"):
        accuracies(net, [(x.long(), y)], [Attack("fgsm")], DEVICE)
