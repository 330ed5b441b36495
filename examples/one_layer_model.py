"""The one-layer network without overlap (dissertation, section 3.1): network, population losses, their gradients.

A filter w of d entries meets the k patches of an input, each of d standard normal numbers:

    L(x, w) = 1/k sum_i relu(w . x_i)                                        the ReLU network, section 3.1.1
    B(x, w) = sum_i [w . x_i > 0]                                            binarized activation, section 3.1.2

The labels come from the same network with the filter w*. All functions below take w and the target w* as ``(..., d)``
and give one number, or one gradient, for each row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

SLOPE = math.sqrt(2 / math.pi)
"""The factor in front of the coarse gradient (3.6): the slope of the ReLU that stands in for the step function."""


def angle(w: Tensor, v: Tensor) -> Tensor:
    """The angle between w and v, ``(...)``; NaN where one of them is 0.

    Not acos: it loses half of the digits near 0, where every run ends.
    """
    w, v = w / w.norm(dim=-1, keepdim=True), v / v.norm(dim=-1, keepdim=True)
    return 2 * torch.atan2((w - v).norm(dim=-1), (w + v).norm(dim=-1))


def correlation(w: Tensor, v: Tensor) -> Tensor:
    """g(w, v) = E[relu(w . x) relu(v . x)] for a standard normal x (Lemma 1), ``(...)``."""
    theta = angle(w, v).nan_to_num(0.0)  # no angle with 0, but then a norm is 0 and so is g
    return w.norm(dim=-1) * v.norm(dim=-1) * (theta.sin() + (math.pi - theta) * theta.cos()) / (2 * math.pi)


def coefficients(k: int) -> tuple[float, float]:
    """a and b of (3.2)."""
    b = (k * k - k) / (2 * math.pi)
    return b + k / 2, b


def population_loss(w: Tensor, target: Tensor, k: int) -> Tensor:
    """f(w) = E[(L(x, w) - L(x, w*))^2] in closed form (3.2), ``(...)``."""
    a, b = coefficients(k)
    norm, norm_target = w.norm(dim=-1), target.norm(dim=-1)
    squares = a * (norm**2 + norm_target**2)
    return (squares - 2 * k * correlation(w, target) - 2 * b * norm * norm_target) / k**2


def population_gradient(w: Tensor, target: Tensor, k: int) -> Tensor:
    """The gradient of :func:`population_loss` (3.16), ``(..., d)``; f has none at w = 0."""
    theta = angle(w, target)[..., None]
    ratio = target.norm(dim=-1, keepdim=True) / w.norm(dim=-1, keepdim=True)
    cross = (k * k - k) / math.pi
    along_w = k + cross - k / math.pi * ratio * theta.sin() - cross * ratio
    return (along_w * w - k / math.pi * (math.pi - theta) * target) / k**2


def curvature(k: int) -> float:
    """L, the largest eigenvalue of the Hessian of f: 2a/k^2 = 1/k + (k-1)/(pi k), the same at every w.

    With r = ||w||, t = theta and ||w*|| = 1 the Hessian is diagonal: along w it is 2a/k^2; in the plane of w and w*,
    across w, (2a - 2b/r - 2k sin(t)/(pi r))/k^2; in all other directions (2a - 2b/r - k sin(t)/(pi r))/k^2. So
    f(v) <= f(w) + <grad f(w), v - w> + L/2 ||v - w||^2 for all v and w, which is what the proofs use. (Lemma 5 of the
    dissertation has 1 + 3 ||w*||/M, because it bounds the smallest eigenvalue as well.)
    """
    return 2 * coefficients(k)[0] / k**2


def binarized_loss(w: Tensor, target: Tensor, k: int) -> Tensor:
    """E[(B(x, w) - B(x, w*))^2] (3.4), ``(...)``: k theta/pi.

    A patch counts for one of the two filters only with probability theta/pi, with either sign equally often. (3.22) is
    the gradient of half of it, and half of it is what :func:`coarse_gradient` descends.
    """
    return k / math.pi * angle(w, target)


def coarse_gradient(w: Tensor, target: Tensor, k: int, slope: float = SLOPE) -> Tensor:
    """The expectation of (3.6): slope * k/(2 sqrt(2 pi)) * (w/||w|| - w*) for ||w*|| = 1, ``(..., d)``.

    With the slope of (3.6) this is (3.23) and (3.26), k/(2 pi) (w - w*) on the unit sphere.
    """
    return slope * k / (2 * math.sqrt(2 * math.pi)) * (w / w.norm(dim=-1, keepdim=True) - target)


class _Step(torch.autograd.Function):
    """[z > 0] with the derivative of slope * relu(z) in the place of 0 (3.6)."""

    @staticmethod
    def forward(ctx, z: Tensor, slope: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(z)
        ctx.slope = slope
        return (z > 0).to(z.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def, override]
        (z,) = ctx.saved_tensors
        return grad * ctx.slope * (z > 0), None


class NonOverlapNet(nn.Module):
    """The network itself, for inputs ``(samples, k, d)``; gives ``(samples,)``.

    Args:
        weight: the filter, ``(d,)``.
        binarized: B, with the coarse derivative in backward, in the place of L.
        slope: of the coarse derivative.
    """

    def __init__(self, weight: Tensor, *, binarized: bool = False, slope: float = SLOPE) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.binarized, self.slope = binarized, slope

    def forward(self, x: Tensor) -> Tensor:
        z = x @ self.weight
        return _Step.apply(z, self.slope).sum(-1) if self.binarized else z.relu().mean(-1)


def monte_carlo(
    net: NonOverlapNet, target: Tensor, k: int, batches: int, size: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """The loss and the gradient that backward() gives, estimated from Gaussian inputs.

    The gradient is that of the squared error for the ReLU network and of half of it for the binarized one: in (3.6)
    the factor 2 is left out, and so are the products of different patches, whose expectation is 0.

    Returns:
        ``loss`` and ``gradient``, and the standard errors ``loss_error`` and ``gradient_error``, from the spread of
        the batches' means.
    """
    truth = NonOverlapNet(target, binarized=net.binarized).requires_grad_(False)
    losses, gradients = [], []
    for _ in range(batches):
        x = torch.randn(size, k, len(target), generator=generator, dtype=target.dtype)
        loss = (net(x) - truth(x)).square().mean()
        (gradient,) = torch.autograd.grad(loss / 2 if net.binarized else loss, net.weight)
        losses.append(loss.detach())
        gradients.append(gradient)
    loss_rows, gradient_rows = torch.stack(losses), torch.stack(gradients)
    return {
        "loss": loss_rows.mean(),
        "loss_error": loss_rows.std() / math.sqrt(batches),
        "gradient": gradient_rows.mean(0),
        "gradient_error": gradient_rows.std(0) / math.sqrt(batches),
    }
