"""The senile reinforced random walk on Z^d with f(m) = m and its perturbations: closed forms, and the walk itself.

Dissertation, sections 2.1 and 2.2. The walk has crossed its current edge m times in a row. It crosses the edge once
more with probability (1 + m)/(2d + m), and with the rest it takes one of the other 2d - 1 edges, all equally likely. A
perturbation lowers the first probability to max{(1 + m)/(2d + m) - delta xi_m, 0}. The xi are independent, so the law
of the walk depends on the mean of that probability only: :meth:`Walk.stay` is that mean, and all closed forms follow
from it. The simulation draws each xi.

Two things are read into the text. In its models II and III the index of xi is n as the time is, but its proofs have
one xi for each m, and so it is here; for iid xi that is the same. And section 2.4.6 adds delta xi to each of the
2d - 1 other edges, which would make the sum of the probabilities larger than 1: here they share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]

LOG_LIMIT = (1 - math.log(2)) / (2 * math.log(2) - 1)
"""Proposition 2.2.1: the limit of (log n / n) E|S_n|^2 for d = 1 without perturbation, 0.7944."""


# ---- perturbations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """The law of xi_m.

    Attributes:
        capped: from a, delta and m to E[min(delta xi_m, a)], which is what the perturbation takes from a probability a.
        draw: from a generator and the m of each walker to one xi for each.
    """

    label: str
    capped: Callable[[Array, float, Array], Array]
    draw: Callable[[np.random.Generator, Array], Array]


def _slow_capped(a: Array, delta: float, m: Array) -> Array:
    """Integral of delta / (1 + log(1 + x)) for x from 0 to a/delta, by Gauss-Legendre.

    With y = log(1 + a/delta) and x = (1 + a/delta) exp(-s) - 1 it is (a + delta) int_0^y exp(-s)/(1 + y - s) ds. The
    part beyond s = 40 is below rounding, unless y is smaller.
    """
    y = np.log1p(a / delta)
    nodes, weights = np.polynomial.legendre.leggauss(64)
    upper = np.minimum(y, 40.0)
    total = np.zeros_like(a)
    for node, weight in zip(nodes, weights, strict=True):
        s = (node + 1) / 2 * upper
        total += weight / 2 * upper * np.exp(-s) / (1 + y - s)
    return (a + delta) * total


def _lognormal_capped(a: Array, delta: float, m: Array) -> Array:
    spread, cut = np.sqrt(np.log1p(m * m)), np.log(a / delta)

    def normal(x: Array) -> Array:
        return np.asarray(torch.special.ndtr(torch.from_numpy(x)))

    return delta * normal(cut / spread - spread / 2) + a * normal(-cut / spread - spread / 2)


def _gamma_capped(a: Array, delta: float, m: Array) -> Array:
    shape, cut = torch.from_numpy(m**-2.0), torch.from_numpy(a / delta * m**-2.0)
    below, above = torch.special.gammainc(1 + shape, cut), torch.special.gammaincc(shape, cut)
    return np.asarray(delta * below + torch.from_numpy(a) * above)


def _slow_draw(rng: np.random.Generator, m: Array) -> Array:
    with np.errstate(over="ignore"):  # beyond the largest float: infinite, and the walker leaves
        return np.expm1(1 / (1 - rng.random(m.shape)) - 1)


def _lognormal_draw(rng: np.random.Generator, m: Array) -> Array:
    variance = np.log1p(m * m)
    return np.exp(np.sqrt(variance) * rng.standard_normal(m.shape) - variance / 2)


NOISES: dict[str, Noise] = {
    "I": Noise(
        "I: ξ = 1",
        lambda a, delta, m: np.minimum(a, delta),
        lambda rng, m: np.ones_like(m),
    ),
    "II exponential": Noise(
        "II: exponential, mean 1",
        lambda a, delta, m: -delta * np.expm1(-a / delta),
        lambda rng, m: rng.standard_exponential(m.shape),
    ),
    "II Cauchy": Noise(
        "II: |Cauchy|, density ~ x⁻²",
        lambda a, delta, m: 2 / math.pi * (a * np.arctan(delta / a) + delta * np.log(np.hypot(1, a / delta))),
        lambda rng, m: np.abs(rng.standard_cauchy(m.shape)),
    ),
    "II Pareto": Noise(
        "II: P(ξ > x) = (1 + x)^(-1/2)",
        lambda a, delta, m: 2 * delta * np.expm1(np.log1p(a / delta) / 2),
        lambda rng, m: (1 - rng.random(m.shape)) ** -2.0 - 1,
    ),
    "II slow": Noise("II: P(ξ > x) = 1/(1 + log(1 + x))", _slow_capped, _slow_draw),
    "III lognormal": Noise("III: lognormal, mean 1, variance m²", _lognormal_capped, _lognormal_draw),
    "III gamma": Noise(
        "III: gamma, mean 1, variance m²",
        _gamma_capped,
        lambda rng, m: rng.gamma(m**-2.0, m**2.0),
    ),
}


@dataclass(frozen=True)
class Walk:
    """A walk: its dimension, delta, and the key of its noise; with delta = 0 the noise does not matter."""

    d: int
    delta: float = 0.0
    noise: str = "I"

    def __post_init__(self) -> None:
        if self.d < 1:
            raise ValueError(f"Invalid d value: {self.d} (it must be at least 1)")
        if not 0 <= self.delta < math.inf:
            raise ValueError(f"Invalid delta value: {self.delta} (it must be finite and not negative)")
        if self.noise not in NOISES:
            raise ValueError(f"Invalid noise: {self.noise!r} (choose one of {', '.join(NOISES)})")

    def stay(self, m: Array) -> Array:
        """P(the walk crosses its edge again | it has crossed it m times in a row)."""
        a = (1 + m) / (2 * self.d + m)
        return a - NOISES[self.noise].capped(a, self.delta, m) if self.delta else a


# ---- closed forms ----------------------------------------------------------------------------------------------------


def survival(walk: Walk, n: int) -> Array:
    """P(tau >= j) for j = 1 to n: the product of stay(m) over m < j. Without perturbation and d = 1: 2/(j + 1)."""
    factors = walk.stay(np.arange(1, n, dtype=np.float64))
    return np.concatenate([[1.0], np.cumprod(factors)])


def law(walk: Walk, n: int) -> Array:
    """P(tau = j) for j = 1 to n."""
    p = survival(walk, n + 1)
    return p[:-1] - p[1:]


@dataclass(frozen=True)
class Series:
    """E[tau] and P(tau odd), each with a bound of its truncation error; E[tau] is infinite where its series is."""

    mean: float
    mean_error: float
    odd: float
    odd_error: float


HEAD = 1 << 14
"""So many terms of a series are summed one by one."""
PER_UNIT = 1 << 13
"""Points of the tail's grid for each unit of log x."""


def series(walk: Walk) -> Series:
    """Sum P(tau >= j) over j, and (-1)^(j-1) P(tau >= j), which is P(tau odd).

    The alternating series is cut after HEAD terms and half of the next one is added: where the terms are convex the
    rest is at most half of their last difference. The tail of the other series is an integral (midpoint rule), and
    log P in it the integral of log stay, both on a grid that is even in log x, until nothing is left. The error is that
    of the midpoint rule, |derivative of the integrand at HEAD|/24 for each, and that of the grid's trapezoidal rule.
    """
    p = survival(walk, HEAD + 2)
    signs = 1 - 2.0 * (np.arange(HEAD) % 2)
    odd = float(np.sum(signs * p[:HEAD]) + p[HEAD] / 2)  # HEAD is even: the next term has a plus
    head, tail = float(np.sum(p[:HEAD])), 0.0
    # P(tau >= j) ends with the factor of m = j - 1, so that the integral of log stay ends at x = j - 1/2; the terms
    # from j = HEAD + 1 on, whose first is p[HEAD], are the integral over x from HEAD on.
    half = np.array([HEAD + 0.25])
    log_p, start = math.log(max(p[HEAD], 1e-300)) - math.log(walk.stay(half)[0]) / 2, math.log(HEAD)
    step = 1 / PER_UNIT
    while log_p + start > math.log(1e-15 * head):
        if start > 100:  # p x has not become small at x = 1e43: the series diverges
            return Series(math.inf, math.inf, odd, float(p[HEAD] - p[HEAD + 1]) / 2)
        x = np.exp(start + step * np.arange(PER_UNIT + 1))
        with np.errstate(divide="ignore"):
            slope = np.log(walk.stay(x)) * x
        logs = log_p + np.concatenate([[0.0], np.cumsum((slope[1:] + slope[:-1]) * (step / 2))])
        values = np.exp(logs) * x
        tail += float(np.sum(values[1:] + values[:-1])) * step / 2
        log_p, start = float(logs[-1]), start + 1
    leaving = float(p[HEAD - 1] - p[HEAD])
    error = leaving / 24 + tail / (24 * HEAD**2) * 2 * walk.d + tail * step**2 * 4 * walk.d
    return Series(head + tail, error, odd, float(p[HEAD] - p[HEAD + 1]) / 2)


def diffusion(mean: float, odd: float, d: int) -> float:
    """(2.1): the limit of E|S_n|^2 / n. With d = 1 it is (2.2), P(tau odd)/(P(tau even) E[tau])."""
    return odd / (1 - odd / d) / mean


def nu(walk: Walk) -> float:
    """The diffusion constant of a walk; 0 where E[tau] is infinite."""
    found = series(walk)
    return diffusion(found.mean, found.odd, walk.d)


# Power series as arrays of their coefficients.


def _multiply(a: Array, b: Array) -> Array:
    size, length = len(a), 2 << (len(a) - 1).bit_length()  # a power of two: other lengths cost speed and digits
    return np.fft.irfft(np.fft.rfft(a, length) * np.fft.rfft(b, length), length)[:size]


def _inverse(a: Array) -> Array:
    """1/a by Newton's method, which doubles the number of right coefficients in each step."""
    found = np.array([1 / a[0]])
    while len(found) < len(a):
        size = min(2 * len(found), len(a))
        known = np.concatenate([found, np.zeros(size - len(found))])
        correction = -_multiply(a[:size], known)
        correction[0] += 2
        found = _multiply(known, correction)
    return found


def second_moments(walk: Walk, n: int) -> Array:
    """E|S_j|^2 for j = 0 to n, exactly up to rounding, for any law of tau.

    The walk is renewed whenever it changes its edge: it has then moved along the old edge if tau was odd, and the new
    direction is uniform among all but the way back over the old edge. With o and e the generating functions of odd and
    even tau, t that of P(tau >= j) and t_o its odd part, u = 1/(1 - o - e) counts renewals, B = u o/(2d - 1 - o + e) is
    the sum of E[position . next direction] over renewals, and sum_j E|S_j|^2 z^j = (2 B + u)(o u t + t_o).
    """
    p = survival(walk, n + 2)
    t, odd, even = (np.zeros(n + 1) for _ in range(3))
    t[1:] = p[:n]
    odd[1::2], even[2::2] = (p[:-1] - p[1:])[0:n:2], (p[:-1] - p[1:])[1:n:2]
    t_odd = np.where(np.arange(n + 1) % 2 == 1, t, 0.0)
    one = np.zeros(n + 1)
    one[0] = 1.0
    u = _inverse(one - odd - even)
    b = _multiply(_multiply(u, odd), _inverse((2 * walk.d - 1) * one - odd + even))
    return _multiply(2 * b + u, _multiply(_multiply(odd, u), t) + t_odd)


# ---- simulation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paths:
    """What was seen of many walkers.

    Attributes:
        times: when the squared distances were taken.
        squares: |S_n|^2, ``(times, walkers)``.
        tau: how often each walker crossed its first edge before it left it; 0: it has not left it yet.
    """

    times: tuple[int, ...]
    squares: Array
    tau: NDArray[np.int64]


def simulate(
    walk: Walk, walkers: int, times: tuple[int, ...], seed: int, progress: Callable[[int], object] = lambda steps: None
) -> Paths:
    """Walk step by step, all walkers at once, with a xi of its own for each step of each walker.

    Direction 2i + s is +e_i for s = 0 and -e_i for s = 1, so that an exclusive or with 1 turns it around.

    Args:
        times: ascending; the walk ends at the last.
        progress: told of steps that were made.
    """
    rng, d = np.random.default_rng(seed), walk.d
    noise, everyone = NOISES[walk.noise], np.arange(walkers)
    position = np.zeros((walkers, d), dtype=np.int64)
    direction = rng.integers(0, 2 * d, walkers)
    m = np.ones(walkers)
    tau = np.zeros(walkers, dtype=np.int64)
    squares = np.zeros((len(times), walkers))
    position[everyone, direction >> 1] += 1 - 2 * (direction & 1)
    for n in range(1, times[-1] + 1):
        if n in times:
            squares[times.index(n)] = np.square(position).sum(1)
        again = (1 + m) / (2 * d + m)
        if walk.delta:
            again = again - walk.delta * noise.draw(rng, m)
        back = direction ^ 1
        left = np.flatnonzero(rng.random(walkers) >= again)
        tau[left[tau[left] == 0]] = n
        direction = back
        direction[left] = (back[left] + rng.integers(1, 2 * d, len(left))) % (2 * d)
        m += 1
        m[left] = 1
        position[everyone, direction >> 1] += 1 - 2 * (direction & 1)
        if n % 100 == 0:
            progress(100)
    return Paths(times, squares, tau)
