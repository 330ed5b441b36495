// shrink against its definition: the argmin of (s - r)^2 / 2 + tau g(s), found by search, never by a formula.

#include <cmath>
#include <limits>

#include "../math/penalty.h"
#include "check.h"

using rvsm::Penalty;
using Real = long double;

namespace {

Real g(Penalty p, Real s, Real a) {
  if (p == Penalty::l1) return s;
  if (p == Penalty::l0) return s != 0 ? 1 : 0;
  return (a + 1) * s / (a + s);
}

Real g_slope(Penalty p, Real s, Real a) {
  if (p == Penalty::l1) return 1;
  if (p == Penalty::l0) return 0;
  return a * (a + 1) / ((a + s) * (a + s));
}

Real objective(Penalty p, Real s, Real r, Real tau, Real a) { return (s - r) * (s - r) / 2 + tau * g(p, s, a); }

// The best s > 0. On s > 0 the derivative s - r + tau g'(s) is convex in s for every penalty, so the last place where
// it rises through zero is the only local minimum; a scan down from r brackets it, bisection finds it.
Real best_positive(Penalty p, Real r, Real tau, Real a) {
  const auto slope = [&](Real s) { return s - r + tau * g_slope(p, s, a); };
  const int steps = 20000;
  Real high = r;
  for (int k = 1; k <= steps; ++k) {
    Real low = r * (1 - Real(k) / steps);
    if (slope(low) < 0) {
      for (int i = 0; i < 120; ++i) {
        const Real middle = (low + high) / 2;
        (slope(middle) < 0 ? low : high) = middle;
      }
      return high;
    }
    high = low;
  }
  return 0;  // the derivative is positive all the way down: the minimum is at 0
}

template <class T>
T run(Penalty p, T r, const rvsm::Prox<T>& f) {
  return rvsm::with_penalty(p, [&](auto tag) { return rvsm::shrink<decltype(tag)::value>(r, f); });
}

template <class T>
void compare(Penalty p, Real r_exact, double tau, double a) {
  const rvsm::Prox<double> wide = rvsm::make_prox(p, tau, a);
  const rvsm::Prox<T> f = rvsm::narrow<T>(wide);
  const T r = T(r_exact);
  const T s = run(p, r, f);
  const Real ulp = std::numeric_limits<T>::epsilon() * Real(r);
  CHECK(s >= 0 && s <= r, "p %d r %.17g tau %g a %g s %.17g", int(p), double(r), tau, a, double(s));

  const Real best = best_positive(p, r, tau, a);
  const Real gain = objective(p, 0, r, tau, a) - objective(p, best, r, tau, a);
  // Which side of the cut: by the objective, not by the cut. Within 4 ulp of the cut either is right.
  const Real distance = std::fabs(Real(r) - Real(wide.cut));
  if (distance > 4 * ulp) {
    CHECK((s > 0) == (best > 0 && gain > 0) || std::fabs(gain) < 1e-17L * r * r,
          "support: p %d r %.17g tau %g a %g s %g", int(p), double(r), tau, a, double(s));
  }
  if (s == 0 || best == 0) return;
  // 8 ulp, times how far a change of r moves the root: a slope of 1 far from tl1's critical point, without bound at it,
  // where the rounding of r alone moves the root by slope ulp.
  const Real curvature = p == Penalty::tl1 ? -2 * Real(a) * (Real(a) + 1) / std::pow(Real(a) + best, 3) : 0;
  const Real slope = 1 / (1 + tau * curvature);
  const Real allowed = 8 * slope;
  CHECK(std::fabs(Real(s) - best) <= allowed * ulp,
        "value: p %d r %.17g tau %g a %g got %.17g, argmin %.17Lg (%.1Lf ulp of %.1Lf)", int(p), double(r), tau, a,
        double(s), best, std::fabs(Real(s) - best) / ulp, allowed);
  // Everywhere, also there: as good as the argmin, to the precision of the weights.
  CHECK(objective(p, s, r, tau, a) - objective(p, best, r, tau, a) <= 4 * ulp * Real(r),
        "objective: p %d r %.17g tau %g a %g", int(p), double(r), tau, a);
}

}  // namespace

int main() {
  int64_t cases = 0;
  const Penalty all[] = {Penalty::l1, Penalty::l0, Penalty::tl1};
  for (int i = 0; i < 1500; ++i) {
    for (const Penalty p : all) {
      const double tau = log_uniform(1e-8, 1), a = log_uniform(0.01, 100);
      const double cut = rvsm::cut(p, tau, a);
      const double at[] = {log_uniform(1e-6, 10), cut * (1 + 1e-5),          cut * (1 - 1e-5),
                           cut * uniform(1, 2),   cut * log_uniform(1, 1e4), cut * (1 + 1e-3)};
      for (const double r : at) {
        compare<float>(p, r, tau, a);
        compare<double>(p, r, tau, a);
        cases += 2;
      }
    }
  }
  for (int i = 0; i < 500; ++i) {  // around tl1's critical tau
    const double a = log_uniform(0.01, 100), critical = a * a / (2 * (a + 1));
    for (const double tau :
         {critical, critical * (1 + 1e-7), critical * (1 - 1e-7), critical * 1.01, critical * 0.99}) {
      compare<double>(Penalty::tl1, rvsm::cut(Penalty::tl1, tau, a) * uniform(0.5, 2), tau, a);
      compare<float>(Penalty::tl1, rvsm::cut(Penalty::tl1, tau, a) * uniform(0.5, 2), tau, a);
      cases += 2;
    }
  }
  for (const Penalty p : all) {
    for (const double a : {0.01, 1.0, 100.0}) {
      const auto zero = rvsm::narrow<float>(rvsm::make_prox(p, 0, a));
      for (const float r : {0.0f, 1e-30f, 1e-3f, 1.0f, 1e30f})  // lam = 0: u is w
        CHECK(run(p, r, zero) == r, "p %d a %g r %g gives %g", int(p), a, r, run(p, r, zero));
      for (const double tau : {1e-8, 1e-3, 1.0}) {
        const auto f = rvsm::narrow<float>(rvsm::make_prox(p, tau, a));
        CHECK(run(p, 0.0f, f) == 0, "p %d tau %g a %g at 0", int(p), tau, a);
        CHECK(run(p, f.cut, f) == 0, "ties go to zero: p %d tau %g a %g", int(p), tau, a);
        CHECK(std::isnan(run(p, NAN, f)), "NaN stays NaN: p %d", int(p));
        CHECK(run(p, 1e30f, f) > 0.99e30f, "large r: p %d gives %g", int(p), run(p, 1e30f, f));
        CHECK(rvsm::shrink_ratio<Penalty::l1>(0.0f, f) == 0, "the zero group");
        cases += 5;
      }
    }
  }
  for (int i = 0; i < 200000; ++i) {
    const double x = i == 0    ? 0
                     : i == 1  ? INFINITY
                     : i == 2  ? 1.7e308
                     : i < 100 ? 4.9e-324 * i
                               : log_uniform(1e-320, 1e308);
    // In extended precision: the double one of a C library may be off by four ulp.
    const double root = double(std::cbrt(static_cast<long double>(x))), got = rvsm::cube_root(x);
    CHECK(got == root || std::fabs(got - root) <= 4.5e-16 * root, "the cube root of %g is %.17g, not %.17g", x, got,
          root);
    ++cases;
  }
  CHECK(std::isnan(rvsm::cube_root(NAN)), "the cube root of NaN");
  return finish("penalty", cases);
}
