"""The statements of the papers about the one-layer network, each turned into numbers that a test can hold to a bound.

Every function returns a plain dict; :mod:`one_layer` prints and saves it, and python_tests/examples/test_one_layer.py
holds it to bounds.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

import rvsm_kernels as rk
from one_layer_model import (
    SLOPE,
    NonOverlapNet,
    angle,
    binarized_loss,
    coarse_gradient,
    curvature,
    monte_carlo,
    population_gradient,
    population_loss,
)
from one_layer_runs import (
    PENALTIES,
    PENALTY_STRENGTH,
    Ensemble,
    K,
    Trace,
    at_angle,
    random_directions,
    relu_gradient,
    trace,
)

LAM, BETA = PENALTY_STRENGTH["lam"], PENALTY_STRENGTH["beta"]
Numbers = dict[str, Any]


# ---- closed forms ----------------------------------------------------------------------------------------------------


def closed_forms(generator: torch.Generator, batches: int = 100, size: int = 2_000) -> Numbers:
    """(3.2), (3.16), (3.4) and (3.23) against autograd and against Gaussian inputs.

    Returns:
        ``autograd``: the largest relative difference between (3.16) and the derivative of (3.2), over k = 1, 2, 5.
        The others: the largest distance between closed form and estimate, in standard errors.
    """
    worst = 0.0
    for k in (1, 2, 5):
        target = random_directions(50, 7, generator) * 1.3
        w = random_directions(50, 7, generator).mul_(0.6).requires_grad_()
        (expected,) = torch.autograd.grad(population_loss(w, target, k).sum(), w)
        difference = (population_gradient(w.detach(), target, k) - expected).norm(dim=1) / expected.norm(dim=1)
        worst = max(worst, difference.max().item())
    numbers: Numbers = {"autograd": worst}

    d, k = 5, 3
    target = random_directions(1, d, generator)[0]
    w = 0.8 * at_angle(target[None], 1.1, generator)[0]
    for name, loss, gradient, net in (
        ("relu", population_loss, population_gradient, NonOverlapNet(w)),
        ("binarized", binarized_loss, coarse_gradient, NonOverlapNet(w, binarized=True)),
    ):
        estimate = monte_carlo(net, target, k, batches, size, generator)
        for what, exact in (("loss", loss(w, target, k)), ("gradient", gradient(w, target, k))):
            distance = (estimate[what] - exact).abs() / estimate[f"{what}_error"]
            numbers[f"{name}_{what}"] = distance.max().item()
    return numbers


# ---- Theorem 3.1 and Corollary 2: RVSM -------------------------------------------------------------------------------


def smallest_delta(k: int, beta: float) -> float:
    """The smallest delta that the theorem allows: delta sin(delta) = k pi beta, by bisection."""
    low, high = 0.0, math.pi / 2
    if high * math.sin(high) < k * math.pi * beta:
        raise ValueError(f"Invalid beta value: {beta}: the theorem has no delta for it")
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * math.sin(middle) < k * math.pi * beta else (low, middle)
    return high


def multiple_of_w(w: Tensor, u: Tensor, target: Tensor, pull: Tensor | float) -> tuple[Tensor, Tensor]:
    """How nearly w* - pull (w - u) is C w: the relative residual and C for each row."""
    left = target - torch.as_tensor(pull, dtype=w.dtype).reshape(-1, 1) * (w - u)
    c = (left * w).sum(1) / w.square().sum(1)
    return (left - c[:, None] * w).norm(dim=1) / target.norm(dim=1), c


def _starts(target: Tensor, delta: float, generator: torch.Generator) -> Tensor:
    """Half of them as far from w* as the theorem allows, half anywhere nearer."""
    count = len(target)
    theta = torch.full((count,), math.pi - delta, dtype=target.dtype)
    theta[count // 2 :] *= torch.rand(count - count // 2, generator=generator, dtype=target.dtype)
    return at_angle(target, theta, generator)


def _summary(runs: Ensemble, highest: dict[str, Tensor], lowest: dict[str, Tensor]) -> list[Numbers]:
    """For each option its settings, the largest values of some numbers over its runs and the smallest of others."""
    rows: list[Numbers] = [dict(o) for o in runs.options]
    for values, pick in ((highest, torch.amax), (lowest, torch.amin)):
        for name, x in values.items():
            for row, part in zip(rows, runs.split(x), strict=True):
                row[name] = pick(part).item()
    return rows


def _descent(seen: Trace, delta: float) -> dict[str, Tensor]:
    """What both theorems say of the way to the limit, for each run."""
    steps = seen.theta.diff(dim=0)
    return {
        "lagrangian_rise": seen.rise("lagrangian"),
        "theta_max": seen.theta.amax(0),
        "theta": seen.theta[-1],
        "theta_rise": steps.amax(0),
        "rise_above_delta": torch.where(seen.theta[:-1] > delta, steps, -math.inf).amax(0),
        "theta_above_minimum": seen.theta[-1] - seen.theta.amin(0),
    }


def _count_rising(rows: list[Numbers], runs: Ensemble, seen: Trace) -> None:
    """Add to each row how many runs have an angle that ever increased by more than rounding."""
    for row, part in zip(rows, runs.split(seen.rise("theta")), strict=True):
        row["rising"] = int((part > 1e-12).sum())


def rvsm_theorem(d: int, seeds: int, generator: torch.Generator, max_steps: int = 20_000) -> list[Numbers]:
    """Theorem 3.1 and Corollary 2 (Theorem 1 and Corollary 1.1 of arXiv 1812.05719) for each penalty.

    Learning rates are 0.99 of the largest allowed: 1/(beta + L) with unit norm and, as condition (i), without;
    without, also 2/(beta + L), up to which the proof of Lemma 7 shows that L_beta never increases.

    Returns:
        For each option, the worst of all runs: ``lagrangian_rise`` and ``theta_rise``, the largest increases in one
        step; ``rise_above_delta`` counts only steps that start above
        delta; ``theta_max`` of all steps; ``theta`` of the limit, and ``theta_above_minimum``, by how much it is above
        the smallest; ``rising``, the number of runs whose angle ever increases; ``residual`` of (12), the range of
        its C and ``c_bound``; ``slack_13`` and ``slack_14``, bound minus distance, so that (13) and (14) hold where
        they are not negative. (14) uses ||w - u|| <= tau sqrt(d), which only l1 has: None for the others.
    """
    delta, limit = smallest_delta(K, BETA), 1 / (BETA + curvature(K))
    target = random_directions(seeds, d, generator)
    variants = ({"unit_norm": True, "lr": 0.99 * limit}, {"lr": 0.99 * limit}, {"lr": 0.99 * 2 * limit})
    options = [{"penalty": penalty, "unit_norm": False, **v} for v in variants for penalty in PENALTIES]
    runs = Ensemble(target, _starts(target, delta, generator), options)
    seen = trace(runs, max_steps)

    w, u, target = runs.w, runs.u(), runs.target
    residual, c = multiple_of_w(w, u, target, K * math.pi / (math.pi - seen.theta[-1]) * BETA)
    bound = 4 * K * BETA * angle(w, u).sin().nan_to_num(1.0)  # gamma means nothing where u = 0: the weakest bound
    slack_13 = bound - (target - w).norm(dim=1)
    slack_14 = bound + LAM / BETA * math.sqrt(d) - (target - u).norm(dim=1)
    rows = _summary(
        runs,
        {**_descent(seen, delta), "residual": residual, "c_high": c},
        {"c_low": c, "slack_13": slack_13, "slack_14": slack_14},
    )
    _count_rising(rows, runs, seen)
    for row in rows:
        row |= {"d": d, "seeds": seeds, "steps": len(seen.theta) - 1, "delta": delta}
        row["c_bound"] = 1 / (1 - 2 * K * LAM * math.sqrt(d))
        if row["penalty"] != "l1":
            row["slack_14"] = None
    return rows


# ---- Theorem 3.2: RVSCGD ---------------------------------------------------------------------------------------------

CONSTANT = {SLOPE: 2 * math.pi / K, 1.0: 2 * math.sqrt(2 * math.pi) / K}
"""The constant of (3.14) that belongs to the coarse gradient with a slope; printed is the one of slope 1."""


def rvscgd_theorem(d: int, seeds: int, generator: torch.Generator, max_steps: int = 20_000) -> list[Numbers]:
    """Theorem 3.2 for each penalty, with the slope sqrt(2/pi) of (3.6) and with slope 1.

    At a limit the coarse gradient plus the pull is a multiple of w. The coarse gradient is (w - w*)/c on the sphere,
    c from CONSTANT, so w* - c beta (w - u) is a multiple of w: (3.14) holds with the c of the slope in use.

    Returns:
        As :func:`rvsm_theorem`. ``residual`` is that of (3.14) with the matching constant, ``residual_other`` with the
        other one; ``slack_15`` belongs to (3.15) as printed. ``lagrangian_rise`` has f = k theta/(2 pi), as the proofs
        do; ``potential_rise`` has in its place the function whose gradient on the sphere the coarse gradient is.
    """
    rows: list[Numbers] = []
    delta = math.asin(2 * math.sqrt(2 * math.pi) * BETA / K)
    for (slope, c), other in zip(CONSTANT.items(), reversed(CONSTANT.values()), strict=True):
        # All conditions (iii): L = k/(4 pi), and a step of at most 1/2 before the normalisation.
        lr = min(1 / (BETA + K / (4 * math.pi)), 2 * math.sqrt(2 * math.pi) / K, 0.5 / (2 / c + BETA))
        target = random_directions(seeds, d, generator)
        options = [{"penalty": penalty, "unit_norm": True, "lr": lr} for penalty in PENALTIES]
        coarse = functools.partial(coarse_gradient, k=K, slope=slope)
        runs = Ensemble(target, _starts(target, delta, generator), options, coarse)
        seen = trace(runs, max_steps, loss=lambda w, v: binarized_loss(w, v, K) / 2)

        w, u, target = runs.w, runs.u(), runs.target
        penalty_part = seen.lagrangian - K / (2 * math.pi) * seen.theta
        potential = penalty_part + (1 - seen.theta.cos()) / c  # ||w - w*||^2/(2c) on the sphere
        bound = 4 * math.sqrt(2 * math.pi) * BETA / K * angle(w, u).sin().nan_to_num(1.0)
        part = _summary(
            runs,
            {
                **_descent(seen, delta),
                "potential_rise": potential.diff(dim=0).amax(0),
                "residual": multiple_of_w(w, u, target, c * BETA)[0],
                "residual_other": multiple_of_w(w, u, target, other * BETA)[0],
            },
            {"slack_15": bound - (target - w).norm(dim=1)},
        )
        _count_rising(part, runs, seen)
        extra = {"slope": slope, "d": d, "seeds": seeds, "steps": len(seen.theta) - 1, "delta": delta}
        rows += [row | extra for row in part]
    return rows


# ---- Theorem 2 of arXiv 1812.05719: adaptive hard thresholding -------------------------------------------------------


def hard_thresholding(d: int, s: int, seeds: int, generator: torch.Generator, lr: float = 1.0) -> Numbers:
    """Algorithm 2 on s-sparse targets, from the s largest entries of random vectors.

    Returns:
        ``recovered``: how many limits have exactly the support of w*; ``eligible``: how many starts fulfil the
        condition of the theorem (w^0 is not 0 on that support); ``eligible_recovered``; ``distance``: the largest
        ||w - w*|| over those.
    """

    def sparse(x: Tensor) -> Tensor:
        x = x.scatter(1, x.abs().topk(d - s, dim=1, largest=False).indices, 0.0)
        return x / x.norm(dim=1, keepdim=True)

    target, start = sparse(random_directions(seeds, d, generator)), sparse(random_directions(seeds, d, generator))
    runs = Ensemble(
        target,
        start,
        [{}],
        relu_gradient,
        lambda groups: rk.AdaptiveHardThreshold(groups, lr=lr, density=s / d),
    )
    steps = runs.converge()
    eligible = (start * (target != 0)).abs().sum(1) > 0
    right = ((runs.w != 0) == (target != 0)).all(1)
    return {
        "d": d,
        "s": s,
        "seeds": seeds,
        "lr": lr,
        "steps": steps,
        "recovered": int(right.sum()),
        "eligible": int(eligible.sum()),
        "eligible_recovered": int((right & eligible).sum()),
        "distance": (runs.w - target).norm(dim=1)[eligible].max().item(),
    }


# ---- ADMM ------------------------------------------------------------------------------------------------------------


def admm_gap(d: int, seeds: int, generator: torch.Generator, steps: int = 2_000, lr: float = 1.0) -> list[Numbers]:
    """RVSM and ADMM with a gradient step in w on the same problems (dissertation, section 3.1.4).

    ADMM's multiplier closes w - u, and u loses the zeros that RVSM's has.

    Returns:
        For each penalty and method, means over the runs: ``zeros`` of u, ``gap`` ||w - u||, ``angle_u``, ``loss_u``,
        and ``change``, the largest ||w^{t+1} - w^t|| of the last step.
    """
    target, start = random_directions(seeds, d, generator), random_directions(seeds, d, generator)
    keys = [(penalty, method) for penalty in PENALTIES for method in ("rvsm", "admm")]
    runs = Ensemble(target, start, [{"penalty": penalty, "method": method, "lr": lr} for penalty, method in keys])
    for _ in range(steps):
        change = runs.step()
    with runs.optimizer.sparse_weights():
        u = runs.w.clone()
    per_run = {
        "zeros": (u == 0).sum(1).to(u.dtype),
        "gap": (runs.w - u).norm(dim=1),
        "angle_u": angle(u, runs.target),
        "loss_u": population_loss(u, runs.target, K),
    }
    parts = {name: runs.split(x) for name, x in per_run.items()}
    changes = runs.split(change)
    rows: list[Numbers] = []
    for j, (penalty, method) in enumerate(keys):
        row: Numbers = {"penalty": penalty, "method": method, "d": d, "seeds": seeds, "steps": steps, "lr": lr}
        row |= {name: part[j].nanmean().item() for name, part in parts.items()}
        rows.append({**row, "change": changes[j].max().item()})
    return rows


# ---- The lemmas on the loss: its saddle, its gradient away from 0 ----------------------------------------------------


def saddle_share(k: int) -> float:
    """c: the degenerate saddle is at w = -c w* (Lemma 5.1.1 of arXiv 1812.05719)."""
    return (k * k - k) / (k * k + (math.pi - 1) * k)


def saddle(d: int, generator: torch.Generator, ks: tuple[int, ...] = (2, 5, 20)) -> list[Numbers]:
    """Lemma 5.1.1: the saddle is a critical point, and degenerate: across w* the loss falls with the third power.

    A step of size h across gives f(w + h v) - f(w) = -h^3/(3 pi k c^2) to the first order: the quadratic term is 0.

    Returns:
        For each k: ``gradient``, the norm of (3.16) at the saddle; ``cubic``, the change of f over that prediction, for
        h = c/1000 in random directions, the farthest from 1; ``along``, the second difference of f along w* over
        its largest curvature.
    """
    rows = []
    for k in ks:
        target, c = random_directions(1, d, generator)[0], saddle_share(k)
        point, h = -c * target, c / 1000
        across = torch.stack([at_angle(target[None], math.pi / 2, generator)[0] for _ in range(20)])
        here = population_loss(point, target, k)
        change = (population_loss(point + h * across, target, k) - here) / (-(h**3) / (3 * math.pi * k * c * c))
        both = population_loss(point + h * target, target, k) + population_loss(point - h * target, target, k)
        rows.append(
            {
                "k": k,
                "c": c,
                "gradient": population_gradient(point, target, k).norm().item(),
                "cubic": change[(change - 1).abs().argmax()].item(),
                "along": ((both - 2 * here) / (h * h * curvature(k))).item(),
            }
        )
    return rows


def escape(
    d: int,
    seeds: int,
    generator: torch.Generator,
    noises: tuple[float, ...] = (1e-1, 1e-2, 1e-3),
    lr: float = 1.0,
    max_steps: int = 60_000,
) -> list[Numbers]:
    """Gradient descent on f from w^0 = -w*: it ends at the saddle, unless noise is added to w^0 (Lemma 5.4.3).

    Returns:
        For each size of the noise (0 first, its Gaussian vector has that norm): ``saddle`` and ``target``, the largest
        distance of the end from -c w* and from w*; ``steps``, the mean number until theta is below pi/2.
    """
    target = random_directions(seeds, d, generator)
    noise = random_directions(seeds, d, generator)
    rows: list[Numbers] = []
    for size in (0.0, *noises):
        w, passed = -target + size * noise, torch.full((seeds,), math.nan, dtype=target.dtype)
        for step in range(1, max_steps + 1 if size else 1_001):
            new = w - lr * population_gradient(w, target, K)
            if not size:  # rounding is a noise too: what is exactly opposite to w* is kept there
                new = (new * target).sum(1, keepdim=True) * target
            moved, w = (new - w).norm(dim=1).max(), new
            over = passed.isnan() & ((w * target).sum(1) > 0)
            passed[over] = step
            if moved <= 1e-12 and (not size or not passed.isnan().any()):
                break
        distance = {"saddle": w + saddle_share(K) * target, "target": w - target}
        rows.append(
            {
                "noise": size,
                **{name: x.norm(dim=1).max().item() for name, x in distance.items()},
                "steps": passed.mean().item(),
            }
        )
    return rows


def annulus(generator: torch.Generator, pairs: int = 200_000, ks: tuple[int, ...] = (1, 2, 5)) -> list[Numbers]:
    """Lemma 5.1.2: ||grad f(w1) - grad f(w2)|| <= (1 + 3 ||w*||/M) ||w1 - w2|| outside the ball of radius M.

    The pairs lie in one half-plane that w* bounds, half of them close together and near the ball, where it is worst.

    Returns:
        For each k and M, with ||w*|| = 1: the largest ``ratio`` of the two norms, and the ``bound``.
    """
    target = torch.tensor([1.0, 0.0], dtype=torch.float64)
    rows: list[Numbers] = []
    for k in ks:
        for m in (0.05, 0.2, 1.0, 5.0):

            def points(count: int, near: bool, m: float = m) -> Tensor:
                stretch = torch.rand(count, generator=generator, dtype=torch.float64)
                r = m * (1 + 0.01 * stretch if near else 1 / (1 - 0.99 * stretch))
                theta = math.pi * torch.rand(count, generator=generator, dtype=torch.float64)
                return torch.stack([r * theta.cos(), r * theta.sin()], dim=1)

            first = torch.cat([points(pairs // 2, False), points(pairs // 2, True)])
            second = points(pairs // 2, False)
            step = 1e-4 * m * random_directions(pairs // 2, 2, generator)
            close = first[pairs // 2 :] + step
            inside = (close.norm(dim=1) < m) | (close[:, 1] < 0)
            close = torch.where(inside[:, None], first[pairs // 2 :] * 1.0001, close)
            second = torch.cat([second, close])
            difference = population_gradient(first, target, k) - population_gradient(second, target, k)
            ratio = difference.norm(dim=1) / (first - second).norm(dim=1)
            rows.append({"k": k, "M": m, "ratio": ratio.nan_to_num(0.0).max().item(), "bound": 1 + 3 / m})
    return rows
