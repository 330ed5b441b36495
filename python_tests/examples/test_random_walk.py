"""examples/random_walk.py: closed forms against enumeration and long sums, the simulation against closed forms."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import random_walk
from random_walk_model import (
    LOG_LIMIT,
    NOISES,
    Walk,
    diffusion,
    law,
    nu,
    second_moments,
    series,
    simulate,
    survival,
)

WALKS = [Walk(1), Walk(2), Walk(3), *(Walk(d, 0.1, noise) for d in (1, 2) for noise in NOISES)]
every_walk = pytest.mark.parametrize("walk", WALKS, ids=str)


def enumerated(walk: Walk, n: int) -> tuple[float, float]:
    """E|S_n|^2, and P(the first edge is crossed n times or more), over every path of n steps, by the definition."""
    steps = [sign * axis for axis in np.eye(walk.d, dtype=int) for sign in (1, -1)]
    stay = walk.stay(np.arange(1.0, n + 1))
    moment = long = 0.0
    for path in itertools.product(steps, repeat=n):
        probability, m = 1 / (2 * walk.d), 1
        for before, step in itertools.pairwise(path):
            if (step == -before).all():
                probability, m = probability * stay[m - 1], m + 1
            else:
                probability, m = probability * (1 - stay[m - 1]) / (2 * walk.d - 1), 1
        moment += probability * float(np.square(np.sum(path, axis=0)).sum())
        long += probability * (m == n)
    return moment, long


@every_walk
def test_second_moments_and_the_law_are_those_of_all_paths(walk: Walk) -> None:
    for n in range(1, 9 if walk.d == 1 else 5):
        moment, long = enumerated(walk, n)
        assert second_moments(walk, 20)[n] == pytest.approx(moment, abs=1e-11)
        assert survival(walk, n)[-1] == pytest.approx(long, abs=1e-13)


def test_the_law_without_perturbation() -> None:
    """d = 1: 2/((n + 1)(n + 2)); d >= 2: P(tau >= n) = (2d)!/((n + 1)...(n + 2d - 1)) and E[tau] = d/(d - 1)."""
    n = np.arange(1, 101)
    np.testing.assert_allclose(law(Walk(1), 100), 2 / ((n + 1) * (n + 2)), rtol=1e-11)
    assert series(Walk(1)).mean == math.inf
    assert series(Walk(1)).odd == pytest.approx(2 * (1 - math.log(2)), abs=series(Walk(1)).odd_error)
    for d in (2, 3, 4):
        product = np.prod([n + j for j in range(1, 2 * d)], axis=0)
        np.testing.assert_allclose(survival(Walk(d), 100), math.factorial(2 * d) / product, rtol=1e-12)
        assert series(Walk(d)).mean == pytest.approx(d / (d - 1), rel=1e-14)


@pytest.mark.parametrize("noise", [noise for noise in NOISES if noise != "III gamma"])
@pytest.mark.parametrize("delta", [0.3, 1e-2, 1e-3, 1e-4])
def test_series_are_long_sums_within_the_stated_error(delta: float, noise: str) -> None:
    walk = Walk(1, delta, noise)
    p = survival(walk, 1_000_000)
    assert p[-1] < 1e-13
    found, signs = series(walk), 1 - 2.0 * (np.arange(len(p)) % 2)
    assert abs(found.mean - p.sum()) <= found.mean_error + 1e-13 * found.mean
    assert abs(found.odd - (p * signs).sum()) <= found.odd_error + 1e-13
    assert found.mean_error < 1e-7 * found.mean and found.odd_error < 1e-8


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("delta", [0.02, 0.7])
def test_capped_means_are_those_of_the_draws(noise: str, delta: float) -> None:
    rng = np.random.default_rng(1)
    for a, m in ((0.6, 1.0), (0.9, 4.0)):
        ms = np.full(200_000, m)
        sample = np.minimum(delta * NOISES[noise].draw(rng, ms), a)
        exact = NOISES[noise].capped(np.array([a]), delta, np.array([m]))[0]
        assert abs(sample.mean() - exact) <= 4.5 * sample.std() / math.sqrt(len(ms)) + 1e-12


def test_model_iii_has_its_mean_and_variance() -> None:
    rng = np.random.default_rng(2)
    m = np.full(1_000_000, 2.0)
    for noise in ("III lognormal", "III gamma"):
        sample = NOISES[noise].draw(rng, m)
        assert sample.mean() == pytest.approx(1, abs=5 * 2 / 1000)
        assert sample.var() == pytest.approx(4, rel=0.2)


def test_diffusion_is_that_of_the_simple_walk_and_of_exact_second_moments() -> None:
    """(2.1) is 1 for a walk that takes each direction with 1/(2d); it is the slope of E|S_n|^2 for ours."""
    for d in (1, 2, 3):
        again = 1 / (2 * d)
        assert diffusion(1 / (1 - again), 1 / (1 + again), d) == pytest.approx(1, rel=1e-15)
    for walk in (Walk(1, 0.1), Walk(2, 0.1, "II Cauchy"), Walk(1, 0.2, "II slow"), Walk(2, 0.2, "III lognormal")):
        moments = second_moments(walk, 3_000)
        assert (moments[3_000] - moments[2_000]) / 1_000 == pytest.approx(nu(walk), rel=1e-6)
    odd = series(Walk(1, 0.1)).odd
    assert nu(Walk(1, 0.1)) == pytest.approx(odd / (1 - odd) / series(Walk(1, 0.1)).mean, rel=1e-14)  # (2.2)


def test_the_limit_without_perturbation_is_approached_as_stated() -> None:
    moments = second_moments(Walk(1), 1 << 16)
    excess = [(moments[n] * math.log(n) / n / LOG_LIMIT - 1) * math.log(n) for n in (1 << 13, 1 << 16)]
    assert excess[0] > excess[1] > 2 - 0.5772156649
    assert excess[1] < 1.6


def test_rates_in_one_dimension() -> None:
    rows = random_walk.one_dimension()
    for noise in NOISES:
        values = [row["times_rate"] for row in rows if row["noise"] == noise]
        if noise == "III gamma":
            assert values == [0.0] * len(values)
        else:
            assert values == sorted(values, reverse=True)
            assert LOG_LIMIT < values[-1] < 2
    assert all(row["over_square"] > 1e3 for row in rows if row["over_square"])
    assert next(row["times_rate"] for row in rows if row["noise"] == "I" and row["delta"] == 1e-12) < 1.05 * LOG_LIMIT


def test_rates_in_higher_dimensions() -> None:
    rows = random_walk.higher_dimensions()
    for d in random_walk.DIMENSIONS:
        for noise, rates in random_walk.HIGHER.items():
            for rate in rates:
                found = [r["over_rate"] for r in rows if (r["d"], r["noise"], r["rate"]) == (d, noise, rate)]
                last = found[-1] / found[-2]
                if rate == "1/log²δ":  # the printed rate does not hold
                    assert last > 5
                else:
                    assert last == pytest.approx(1, abs={"δ": 1e-3}.get(rate, 0.05))
    slopes = {r["noise"]: r["over_rate"] for r in rows if r["d"] == 2 and r["rate"] == "δ" and r["delta"] == 1e-8}
    assert max(slopes.values()) == pytest.approx(min(slopes.values()), rel=1e-3)


def test_model_iii_with_gamma_laws_is_not_diffusive() -> None:
    """E[min(tau, n)] grows by the same amount from power to power of ten; with lognormal laws it does not."""
    means = {noise: [] for noise in ("III lognormal", "III gamma")}
    for row in random_walk.cut_means(0.1, (3, 4, 5)):
        means[row["noise"]].append(row["mean"])
    steps = np.diff(means["III gamma"])
    assert steps[1] == pytest.approx(steps[0], rel=0.02) and steps[0] > 1
    assert np.diff(means["III lognormal"])[1] < 1e-6


@every_walk
def test_the_simulation_is_within_a_few_standard_errors(walk: Walk) -> None:
    walkers, times = 20_000, (3, 60)
    paths = simulate(walk, walkers, times, seed=7)
    exact = second_moments(walk, 60)
    for n, squares in zip(times, paths.squares, strict=True):
        assert abs(squares.mean() - exact[n]) <= 4.5 * squares.std() / math.sqrt(walkers)
    for j, probability in enumerate(law(walk, 4), start=1):
        assert abs((paths.tau == j).mean() - probability) <= 4.5 * math.sqrt(probability / walkers)
    assert abs((paths.tau == 0).mean() - survival(walk, 61)[-1]) <= 4.5 / math.sqrt(walkers)


def test_a_seed_is_a_simulation() -> None:
    first, same, other = (simulate(Walk(2, 0.1, "II Cauchy"), 50, (20,), seed) for seed in (1, 1, 2))
    assert np.array_equal(first.squares, same.squares) and np.array_equal(first.tau, same.tau)
    assert not np.array_equal(first.squares, other.squares)


@pytest.mark.parametrize(("arguments", "what"), [((0,), "d"), ((1, -1.0), "delta"), ((1, math.nan), "delta")])
def test_bad_walks(arguments: tuple[float, ...], what: str) -> None:
    with pytest.raises(ValueError, match=f"Invalid {what} value"):
        Walk(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Invalid noise: 'IV'"):
        Walk(1, 0.1, "IV")


def test_the_script(tmp_path: Path) -> None:
    random_walk.main(["--quick", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "walk.json").read_text(encoding="utf-8"))
    assert random_walk.worst(result) < 4.5
    assert (tmp_path / "walk.png").stat().st_size > 10_000
    for bad in (["--seed", "-1"], ["--record", "--quick"]):
        with pytest.raises(SystemExit):
            random_walk.main(bad)
