"""Makes the coefficients of Tl1Fit in penalty.h: ``python csrc/math/fit_tl1.py`` prints them (needs mpmath).

The function is H(p) = h(q) / q with q = 1 - p^2 and h(q) = 4/3 sin^2(asin(sqrt q) / 3), fitted on [0, 1] by a
polynomial in p - 1/2 that is minimax in the relative error (Remez exchange).
"""

import mpmath as mp

mp.mp.dps = 60
HALF = mp.mpf(1) / 2


def target(p):
    """H(p), with its limit 4/27 at p = 1."""
    if abs(1 - p) < mp.mpf(10) ** -30:
        return mp.mpf(4) / 27
    return mp.mpf(4) / 3 * mp.sin(mp.acos(p) / 3) ** 2 / (1 - p * p)


def remez(degree, rounds=8):
    """(coefficients, largest relative error)."""
    points = [HALF + mp.cos(mp.pi * k / (degree + 1)) / 2 for k in range(degree + 2)]
    for _ in range(rounds):
        system, right = mp.matrix(degree + 2, degree + 2), mp.matrix(degree + 2, 1)
        for i, x in enumerate(points):
            for j in range(degree + 1):
                system[i, j] = (x - HALF) ** j
            system[i, degree + 1] = (-1) ** i * target(x)
            right[i] = target(x)
        solution = mp.lu_solve(system, right)
        coefficients = [solution[j] for j in range(degree + 1)]
        steps = 40 * (degree + 2)
        grid = [(1 - mp.cos(mp.pi * k / steps)) / 2 for k in range(steps + 1)]
        error = [mp.polyval(coefficients[::-1], x - HALF) / target(x) - 1 for x in grid]
        extrema = []
        for k in range(steps + 1):
            inner = 0 < k < steps
            if inner and (error[k] - error[k - 1]) * (error[k + 1] - error[k]) > 0:
                continue
            if extrema and mp.sign(error[k]) == mp.sign(error[extrema[-1]]):
                if abs(error[k]) > abs(error[extrema[-1]]):
                    extrema[-1] = k
            else:
                extrema.append(k)
        if len(extrema) < degree + 2:
            break
        while len(extrema) > degree + 2:
            extrema.pop(0 if abs(error[extrema[0]]) < abs(error[extrema[-1]]) else -1)
        points = sorted((grid[k] for k in extrema), reverse=True)
    return coefficients, max(map(abs, error))


if __name__ == "__main__":
    for name, degree, digits in (("float", 10, 10), ("double", 22, 20)):
        coefficients, error = remez(degree)
        print(f"{name}: degree {degree}, relative error {mp.nstr(error, 2)}")
        print(",\n".join(mp.nstr(c, digits) for c in coefficients))
