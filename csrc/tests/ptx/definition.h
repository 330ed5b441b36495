// The step and the penalty of docs/method.md once more: by plain loops, in long double, apart from prox.h and update.h.
// A result is a range, since a threshold may fall to either side within the rounding of its input.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "../../row.h"

namespace rvsm::definition {

using Real = long double;

struct Range {
  Real low, high;
};

// ---- one number -----------------------------------------------------------------------------------------------------

inline Real cut(Penalty p, Real tau, Real a) {
  switch (p) {
    case Penalty::l1:
      return tau;
    case Penalty::l0:
      return std::sqrt(2 * tau);
    case Penalty::tl1:
      return tau <= a * a / (2 * (a + 1)) ? tau * (a + 1) / a : std::sqrt(2 * tau * (a + 1)) - a / 2;
    default:
      return -1;
  }
}

// shrink(r) of an r that is known to lie above the cut.
inline Real shrink_above(Penalty p, Real r, Real tau, Real a) {
  if (p == Penalty::l1) return std::max<Real>(0, r - tau);
  if (p != Penalty::tl1) return r;
  const Real q = std::min<Real>(1, 27 * tau * a * (a + 1) / (4 * (a + r) * (a + r) * (a + r)));
  const Real s = std::sin(std::asin(std::sqrt(q)) / 3);
  return std::max<Real>(0, r - Real(4) / 3 * (a + r) * s * s);
}

inline Real shrink(Penalty p, Real r, Real cut, Real tau, Real a) {
  return p != Penalty::none && r <= cut ? 0 : shrink_above(p, r, tau, a);
}

inline Real penalty(Penalty p, Real u, Real a) {
  switch (p) {
    case Penalty::l1:
      return u;
    case Penalty::l0:
      return u != 0;
    case Penalty::tl1:
      return (a + 1) * u / (a + u);
    default:
      return 0;
  }
}

// shrink(r) for all r within a relative `error`; shrink rises with r. The norm of a group may fall to either side of
// the cut. The magnitude of an element is exact: what decides is the cut in the arithmetic type.
inline Range shrink_within(const Row& row, Real r, Real cut, Real error) {
  const Prox<double>& p = row.step.prox;
  const Real low = r * (1 - error), high = r * (1 + error);
  if (row.grouped || p.penalty == Penalty::none)
    return {shrink(p.penalty, low, cut, p.tau, p.a), shrink(p.penalty, high, cut, p.tau, p.a)};
  const Real rounded = row.dtype == Dtype::f64 ? Real(double(cut)) : Real(float(cut));
  if (r <= rounded) return {0, 0};
  return {shrink_above(p.penalty, low, p.tau, p.a), shrink_above(p.penalty, high, p.tau, p.a)};
}

// ---- one element ----------------------------------------------------------------------------------------------------

// The arrays of a tensor.
struct Arrays {
  std::vector<double> w, g, m, kept;
};

struct Element {
  Real w, m, kept;
};

// `scale`: what rounding errors are relative to.
struct Result {
  Element low, high, scale;
  Range u;
};

// The step of an element whose u lies in a range. `unit`: w_G / ||w_G||; `grad`: the gradient after the scaling.
inline Result step_element(const Row& row, const Element& before, Real grad, Range u, Real unit) {
  const Step<double>& s = row.step;
  const bool split = s.prox.penalty != Penalty::none, momentum = row.momentum != Momentum::none;
  const bool nesterov = row.momentum == Momentum::nesterov;
  const auto with = [&](Real ui) {
    Element e = before;
    Real gap = e.w - ui;
    if (row.method == Method::delayed) {
      gap = e.w - e.kept;
      e.kept = ui;
    }
    if (row.method == Method::admm) {
      e.kept = e.w + e.kept - ui;
      gap += e.kept;
    }
    Real d = grad * Real(s.grad);
    if (split) e.w -= Real(s.pull) * gap;
    d += Real(s.lasso) * unit + Real(s.decay) * e.w;
    if (split) d += Real(s.coupling) * gap;
    if (momentum) {
      e.m = Real(s.keep) * e.m + Real(s.add) * d;
      d = nesterov ? d + Real(s.look) * e.m : e.m;
    }
    e.w -= Real(s.lr) * d;
    return e;
  };
  const Element x = with(u.low), y = with(u.high);
  Result r;
  r.low = {std::min(x.w, y.w), std::min(x.m, y.m), std::min(x.kept, y.kept)};
  r.high = {std::max(x.w, y.w), std::max(x.m, y.m), std::max(x.kept, y.kept)};
  r.u = u;
  const Real most = std::max(std::fabs(u.low), std::fabs(u.high));
  const Real weights = std::fabs(before.w) + most + (row.method == Method::rvsm ? 0 : std::fabs(before.kept));
  Real d = std::fabs(grad * s.grad) + std::fabs(s.lasso * unit) + std::fabs(s.decay) * weights;
  if (split) d += std::fabs(s.coupling) * weights;
  const Real buffer = std::fabs(s.keep * before.m) + std::fabs(s.add) * d;
  if (momentum) d = nesterov ? d + std::fabs(s.look) * buffer : buffer;
  r.scale = {weights + s.lr * d, buffer, weights};
  return r;
}

// ---- a tensor -------------------------------------------------------------------------------------------------------

inline size_t group_of(const GroupView& v, int64_t i) {
  const int64_t columns = v.groups * v.inner;
  return size_t(i / (v.outer * columns) * v.groups + i % columns / v.inner);
}

// Square roots of the sums of squares: of groups, or the magnitudes of the elements. f(i): the element.
template <class F>
std::vector<Real> norms(const Row& row, const F& f) {
  std::vector<Real> r(size_t(row.grouped ? row.view.count() : row.numel), 0);
  for (int64_t i = 0; i < row.numel; ++i) {
    const Real x = f(size_t(i));
    r[row.grouped ? group_of(row.view, i) : size_t(i)] += x * x;
  }
  for (Real& x : r) x = std::sqrt(x);
  return r;
}

// All elements of a step, or of a prox of `arrays.w` (of which only u is of interest). `cut_by_data`: of top-k.
// `error`: of the number that is compared with the cut.
inline std::vector<Result> run(const Row& row, const Arrays& arrays, double cut_by_data, double grad_scale,
                               Real error) {
  const Prox<double>& p = row.step.prox;
  const Real threshold = row.topk ? Real(cut_by_data) : cut(p.penalty, p.tau, p.a);
  // What is thresholded: a sum is rounded as in the arithmetic type.
  const auto argument = [&](size_t i) -> Real {
    if (row.method != Method::admm) return arrays.w[i];
    if (row.dtype == Dtype::f64) return arrays.w[i] + arrays.kept[i];
    return float(arrays.w[i]) + float(arrays.kept[i]);
  };
  const std::vector<Real> r = norms(row, argument);
  std::vector<Range> ratio;  // u over what is thresholded, of each group
  for (const Real x : r) {
    const Range s = x == 0 ? Range{0, 0} : shrink_within(row, x, threshold, error);
    ratio.push_back(x == 0 ? s : Range{s.low / x, s.high / x});
  }
  const bool lasso = row.grouped && row.step.lasso != 0;
  const std::vector<Real> lengths =
      lasso ? norms(row, [&](size_t i) -> Real { return arrays.w[i]; }) : std::vector<Real>{};
  std::vector<Result> results;
  for (size_t i = 0; i < size_t(row.numel); ++i) {
    const size_t q = row.grouped ? group_of(row.view, int64_t(i)) : i;
    const Real v = argument(i), length = lasso ? lengths[q] : 0;
    const Real grad = grad_scale == 0 ? Real(arrays.g[i]) : arrays.g[i] / Real(grad_scale);
    results.push_back(step_element(row, {arrays.w[i], arrays.m[i], arrays.kept[i]}, grad,
                                   {v * ratio[q].low, v * ratio[q].high}, length > 0 ? arrays.w[i] / length : 0));
  }
  return results;
}

// lam P(u) + beta/2 |w - u|^2 of a tensor, and in `slack` what it may be off by for that `error` of each norm.
inline Real value(const Row& row, const std::vector<double>& w, Real error, Real& slack) {
  const Prox<double>& p = row.step.prox;
  const Real threshold = cut(p.penalty, p.tau, p.a), half = Real(row.beta) / 2;
  const auto term = [&](Real r) {
    const Real u = shrink(p.penalty, r, threshold, p.tau, p.a);
    return row.lam * penalty(p.penalty, u, p.a) + half * (r - u) * (r - u);
  };
  Real sum = 0;
  for (const Real r : norms(row, [&](size_t i) -> Real { return w[i]; })) {
    const Real t = term(r);
    sum += t;
    const Real off = std::max(std::fabs(term(r * (1 + error)) - t), std::fabs(term(r * (1 - error)) - t));
    slack += off + 4 * error * (t + row.beta * r * r + row.lam * r);
  }
  return sum;
}

}  // namespace rvsm::definition
