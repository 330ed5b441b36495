"""The attacks of the papers (arXiv 2020, appendix B): FGSM, IFGSM^M with or without a random start, C&W, and NAttack.

A model takes images in [0, 1], ``(n, ...)``, and gives logits, ``(n, classes)``. Radii and step sizes are in the same
unit: 8/255 is eight grey levels. An attack leaves the model as it is, also its mode and its parameters' ``.grad``: it
asks autograd for the gradient of the images and no other, NAttack for none. Losses are computed in float32 at least.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 8 / 255
"""The papers' radius of the l-infinity ball."""

ALPHA = 2 / 255
"""The papers' step size of IFGSM."""

Model = Callable[[Tensor], Tensor]


def _check(**options: Any) -> None:
    """Each option by its name; NaN passes none of the comparisons."""
    for name, value in options.items():
        if name in ("steps", "population"):
            good, what = type(value) is int and value >= 1, "an int of at least 1"
        elif name == "epsilon":
            good, what = 0 <= value <= 1, "in [0, 1]"
        elif name in ("alpha", "lr", "sigma"):
            good, what = 0 < value < math.inf, "positive and finite"
        else:
            good, what = 0 <= value < math.inf, "finite and not negative"
        if not good:
            raise ValueError(f"Invalid {name} value: {value!r} (it must be {what})")


def _check_images(x: Tensor) -> None:
    """Only the type: a look at the values would make the host wait for a GPU."""
    if not x.is_floating_point():
        raise TypeError(f"Images must be floats in [0, 1], but got {x.dtype}")


def _logits(model: Model, x: Tensor) -> Tensor:
    """In float32 at least: in half types a large probability rounds to 1 and the gradient of its logit to 0."""
    logits = model(x)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _margins(logits: Tensor, y: Tensor) -> Tensor:
    """The logit of the right class minus the largest other one, ``(n,)``; below 0 the model is wrong."""
    own = logits.gather(1, y[:, None]).squeeze(1)
    return own - logits.scatter(1, y[:, None], -math.inf).amax(1)


def _losses_and_gradient(losses: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    """The losses of the images, ``(n,)``, and the gradient of their sum at a point; a NaN of it is made 0.

    A sum, not a mean: the gradient of an image then has nothing to do with the size of its batch, and does not shrink
    to 0 with it in float16.
    """
    with torch.enable_grad():
        at = at.detach().requires_grad_()
        values = losses(at)
        (gradient,) = torch.autograd.grad(values.sum(), at)
    return values.detach(), gradient.nan_to_num(nan=0.0)


def ifgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    steps: int = 20,
    alpha: float = ALPHA,
    epsilon: float = EPSILON,
    random_start: bool = False,
) -> Tensor:
    """IFGSM^M: x^m = Clip{x^(m-1) + alpha * sign(grad L(x^(m-1), y))}, x^0 = x, L the cross entropy (appendix B).

    Clip is the projection on the pixels that are within epsilon of x and in [0, 1]. With a random start, x^0 is
    uniform in that ball (clipped to [0, 1]) and this is PGD; adversarial training takes 10 steps of it (section 5).

    Args:
        model: from images to logits.
        x: images in [0, 1], ``(n, ...)``, of a floating type.
        y: labels, ``(n,)``, int64.
        steps: M.
        alpha: step size in units of a pixel.
        epsilon: radius of the l-infinity ball in units of a pixel; with 0 the images stay.
        random_start: whether x^0 is random; the numbers come from the default generator of x's device.

    Returns:
        The perturbed images: shape, type and device of x, detached.

    Raises:
        ValueError: a bad option.
        TypeError: images that are not of a floating type.
    """
    _check(steps=steps, alpha=alpha, epsilon=epsilon)
    _check_images(x)
    x = x.detach()
    low, high = (x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1)
    perturbed = x
    if random_start:
        perturbed = (x + torch.empty_like(x).uniform_(-epsilon, epsilon)).clamp(low, high)
    for _ in range(steps):
        _, gradient = _losses_and_gradient(lambda z: F.cross_entropy(_logits(model, z), y, reduction="none"), perturbed)
        perturbed = (perturbed + alpha * gradient.sign()).clamp(low, high)
    return perturbed


def fgsm(model: Model, x: Tensor, y: Tensor, epsilon: float = EPSILON) -> Tensor:
    """FGSM: x + epsilon * sign(grad L(x, y)), clipped to [0, 1] (appendix B).

    That is one step of IFGSM, of any size from epsilon on. Arguments, result and errors: as :func:`ifgsm`.
    """
    return ifgsm(model, x, y, steps=1, alpha=1.0, epsilon=epsilon)


def cw(
    model: Model,
    x: Tensor,
    y: Tensor,
    epsilon: float = EPSILON,
    steps: int = 50,
    lr: float = 6e-4,
    c: float = 10.0,
    kappa: float = 0.0,
) -> Tensor:
    """C&W, untargeted, in the l2 form, with the perturbation brought to the sup norm epsilon.

    For each image, Adam from delta = 0 lowers, for x + delta in place of x and without a box on delta,

        ||delta||_2^2 + c * max(logit_y - max_{j != y} logit_j, -kappa)

    Of all the deltas that it meets, that of the lowest objective is scaled to ||delta||_inf = epsilon, up as well as
    down, and x + delta is clipped to [0, 1]. An image whose delta is 0 stays: with kappa = 0, one that the model gets
    wrong anyway.

    The paper prints another problem, min ||delta||_inf subject to F(x + delta) = t, t != y (appendix B), and no method.
    The released attack (BaoWangMath/EnResNet) has these defaults, this objective but for its classes (it moves from the
    predicted class to the one that is second on the clean image) and this choice of delta but for a shift by one step.
    Then it multiplies delta, at most about steps * lr = 0.03, by epsilon and does not clip: a change of about 0.001.

    Args:
        model, x, y: as for :func:`ifgsm`, and so are the result and the errors.
        epsilon: sup norm of the perturbation in units of a pixel; with 0 the images stay.
        steps: steps of Adam.
        lr: learning rate of Adam, about the most that a pixel moves in a step.
        c: weight of the margin of the logits against the squared norm.
        kappa: how far, in logits, the attack goes on beyond the decision boundary.
    """
    _check(epsilon=epsilon, steps=steps, lr=lr, c=c, kappa=kappa)
    _check_images(x)
    x = x.detach()

    def objective(delta: Tensor) -> Tensor:
        margins = _margins(_logits(model, (x + delta).to(x.dtype)), y)
        return delta.flatten(1).square().sum(1) + c * margins.clamp(min=-kappa)

    # Adam's eps of 1e-8 is 0 in float16, and 0/0 would follow.
    delta = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    adam = torch.optim.Adam([delta], lr=lr)
    best = torch.zeros_like(delta)
    lowest = torch.full((len(x),), math.inf, dtype=delta.dtype, device=x.device)
    each = (-1, *[1] * (x.dim() - 1))
    for step in range(steps + 1):
        losses, delta.grad = _losses_and_gradient(objective, delta)
        lower = losses < lowest
        lowest = torch.where(lower, losses, lowest)
        best = torch.where(lower.view(each), delta, best)
        if step < steps:  # the last delta is only judged
            adam.step()
    norm = best.flatten(1).abs().amax(1).view(each)
    best = best / norm.clamp(min=torch.finfo(best.dtype).tiny) * epsilon  # 0 stays 0
    return (x + best).clamp(0, 1).to(x.dtype)


AT_ONCE = 4096
"""About so many samples NAttack shows to the model in one call."""


@torch.no_grad()
def nattack(
    model: Model,
    x: Tensor,
    y: Tensor,
    epsilon: float = EPSILON,
    steps: int = 500,
    population: int = 300,
    sigma: float = 0.1,
    lr: float = 0.02,
    start: float = 1.0,
) -> Tensor:
    """NAttack (Li et al. 2019, arXiv 1905.00441), untargeted: a search that sees the model's logits and no gradient.

    For each image it moves the mean mu of a Gaussian so that its samples, squashed to [0, 1] by tanh and projected on
    the ball, fool the model. With z = artanh(2x - 1), clipped just inside, and e_i ~ N(0, 1), i up to the population:

        x_i = x + clip((1 + tanh(z + mu + sigma e_i))/2 - x, -epsilon, epsilon)
        r_i = -max(log p_y(x_i) - max_{j != y} log p_j(x_i), 0)/2, of which the mean is subtracted and by whose standard
              deviation it is divided
        mu  = mu + lr/(population sigma) sum_i r_i e_i

    A black or a white pixel has a z of -7.3 or 7.3, where tanh is flat, and hardly moves.

    An image is done with as soon as a sample fools the model; the one of the lowest margin is its result. If none does,
    the result is the sample of the lowest margin of all. An image that the model gets wrong stays.

    Steps, population, sigma, lr and the start are the defaults of the toolbox that the paper names (cmhcbb/attackbox),
    which begins at mu ~ N(0, 1); the code of Li et al. has a population of 200 to 500 and a start of 0.001. An image
    takes at most 1 + steps * population queries, 150,001.

    Args:
        model, x, y: as for :func:`ifgsm`, and so are the result and the errors. The model is never differentiated.
        epsilon: radius of the l-infinity ball in units of a pixel; with 0 the images stay.
        steps: steps of mu.
        population: samples in a step.
        sigma: standard deviation of the samples around mu.
        lr: learning rate of mu.
        start: standard deviation of the first mu. All numbers come from the default generator of x's device.
    """
    _check(epsilon=epsilon, steps=steps, population=population, sigma=sigma, lr=lr, start=start)
    _check_images(x)
    found = x.detach().clone()
    right = (_margins(_logits(model, found), y) >= 0).nonzero().squeeze(1)
    for part in right.split(max(1, AT_ONCE // population)) if len(right) else ():
        found[part] = _search(model, found[part], y[part], epsilon, steps, population, sigma, lr, start)
    return found


def _search(
    model: Model,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    steps: int,
    population: int,
    sigma: float,
    lr: float,
    start: float,
) -> Tensor:
    """NAttack on images that are right, as many at once as there is memory for."""
    pixels = x.to(torch.promote_types(x.dtype, torch.float32))
    z = torch.atanh((2 * pixels - 1) * (1 - 1e-6))
    mu = start * torch.randn_like(z)
    best, lowest = x.clone(), torch.full((len(x),), math.inf, dtype=z.dtype, device=x.device)
    left = torch.arange(len(x), device=x.device)  # the images that no sample has fooled the model with
    for _ in range(steps):
        noise = torch.randn(len(left), population, *x.shape[1:], dtype=z.dtype, device=x.device)
        squashed = (1 + torch.tanh((z[left] + mu[left])[:, None] + sigma * noise)) / 2
        near = pixels[left][:, None]
        samples = (near + (squashed - near).clamp(-epsilon, epsilon)).clamp(0, 1).to(x.dtype)
        logits = _logits(model, samples.flatten(0, 1))
        margins = _margins(logits, y[left].repeat_interleave(population)).nan_to_num(nan=math.inf).to(z.dtype)
        margins = margins.view(len(left), population)
        least, which = margins.min(1)
        lower = least < lowest[left]
        better = left[lower]
        best[better], lowest[better] = samples[lower, which[lower]], least[lower]
        rewards = -margins.clamp(0, 1000) / 2  # attackbox's bound; it makes an infinite margin a number
        rewards = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, correction=0, keepdim=True) + 1e-7)
        mu[left] += lr / (population * sigma) * torch.einsum("np,np...->n...", rewards, noise)
        left = left[least >= 0]
        if not len(left):
            break
    return best


FUNCTIONS: dict[str, Callable[..., Tensor]] = {"fgsm": fgsm, "ifgsm": ifgsm, "cw": cw, "nattack": nattack}


@dataclass(frozen=True)
class Attack:
    """An attack with its options, to be called as ``attack(model, x, y)``.

    Args:
        name: "fgsm", "ifgsm", "cw" or "nattack".
        epsilon: radius in units of a pixel.
        steps, alpha, lr, c, kappa, population, sigma, start: as the function of that name has them; None: its default.

    Raises:
        ValueError: an unknown name, or a bad value.
        TypeError: an option that the attack does not have.
    """

    name: str
    epsilon: float = EPSILON
    steps: int | None = None
    alpha: float | None = None
    lr: float | None = None
    c: float | None = None
    kappa: float | None = None
    population: int | None = None
    sigma: float | None = None
    start: float | None = None

    def __post_init__(self) -> None:  # here and not after the training of what is to be attacked
        if self.name not in FUNCTIONS:
            raise ValueError(f"Invalid attack: {self.name!r} (choose one of {', '.join(map(repr, FUNCTIONS))})")
        _check(**self._options())
        inspect.signature(FUNCTIONS[self.name]).bind(None, None, None, **self._options())

    def _options(self) -> dict[str, Any]:
        options = {field.name: getattr(self, field.name) for field in fields(self)[1:]}  # all but the name
        return {name: value for name, value in options.items() if value is not None}

    @property
    def label(self) -> str:
        """The papers' name: FGSM, IFGSM^20, C&W, NAttack."""
        if self.name != "ifgsm":
            return {"fgsm": "FGSM", "cw": "C&W", "nattack": "NAttack"}[self.name]
        return f"IFGSM^{self.steps or inspect.signature(ifgsm).parameters['steps'].default}"

    def __call__(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        return FUNCTIONS[self.name](model, x, y, **self._options())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module is in the mode in which it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def accuracies(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    attacks: Sequence[Attack],
    device: torch.device | str,
    queries: dict[str, int] | None = None,
) -> dict[str, float]:
    """The share of right answers on clean images and under each attack, all on the same images, in evaluation mode.

    An image counts as robust if the model is right on it both clean and perturbed: the adversary keeps what is worse,
    so no attack gives more than the natural accuracy.

    Args:
        model: from images to logits, on the device.
        batches: images, ``(n, ...)``, uint8 or floats in [0, 1], and labels, ``(n,)``.
        attacks: with labels that differ.
        device: where the images go.
        queries: gets, for the label of each attack, how many images it showed to the model, all batches together.

    Returns:
        Shares in [0, 1]: "natural", then the label of each attack.

    Raises:
        ValueError: no images, or two attacks of one label.
        TypeError: images of another type.
    """
    labels = ["natural", *(attack.label for attack in attacks)]
    if len(set(labels)) < len(labels):
        raise ValueError(f"Two attacks have the same label: {', '.join(labels[1:])}")
    counts = dict.fromkeys(labels[1:], 0)

    def counted(label: str) -> Model:
        def ask(z: Tensor) -> Tensor:
            counts[label] += len(z)
            return model(z)

        return ask

    right, seen = torch.zeros(len(labels), dtype=torch.int64, device=device), 0  # one tensor: the host waits once
    with _evaluating(model), torch.no_grad():
        for images, targets in batches:
            x, y = images.to(device), targets.to(device)
            if x.dtype == torch.uint8:
                x = x.float() / 255
            _check_images(x)
            clean = model(x).argmax(1) == y
            hits = [clean]
            for attack in attacks:
                perturbed = attack(counted(attack.label), x, y)
                hits.append(clean & (model(perturbed).argmax(1) == y))
            right += torch.stack(hits).sum(1)
            seen += len(y)
    if not seen:
        raise ValueError("There are no images")
    if queries is not None:
        queries.update(counts)
    return {label: count / seen for label, count in zip(labels, right.tolist(), strict=True)}
