// The step and the penalty of docs/method.md once more: by plain loops, in long double, apart from csrc/math.
// A result is a range, since a threshold may fall to either side within the rounding of its input.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "../../math/types.h"

namespace rvsm::definition {

using Real = long double;

struct Range {
  Real low, high;
};

// ---- what a step is asked for ---------------------------------------------------------------------------------------

struct Step {
  Penalty penalty = Penalty::none;
  Method method = Method::rvsm;
  BaseKind base = BaseKind::sgd;
  double lam = 0, beta = 0, a = 1;
  double group_lasso = 0;
  double lr = 0, momentum = 0, dampening = 0, weight_decay = 0;
  bool group_scale = false, nesterov = false, decoupled = true, maximize = false, hold_zeros = false;
  bool topk = false;   // l0 with a cut that comes with the step
  bool first = false;  // the states of the base are new
  bool amsgrad = false;
  double beta1 = 0.9, beta2 = 0.99, eps = 1e-8;
  int count = 3;  // steps before this one, where it is not the first

  bool has_momentum() const { return base == BaseKind::sgd && momentum != 0; }
  // The pull alone leaves its terms in the gradient to another optimizer.
  bool writes_grad() const {
    return base == BaseKind::none && ((is_split() && !decoupled) || group_lasso != 0 || hold_zeros);
  }
  bool is_split() const { return penalty != Penalty::none && lam > 0 && beta > 0; }
};

struct Tensor {
  Dtype dtype = Dtype::f32;
  bool grouped = false;
  GroupView view;      // grouped
  int64_t single = 0;  // elements of a tensor without groups
  Step step;

  int64_t numel() const { return grouped ? view.count() * view.size() : single; }
  Real lam() const { return step.lam * (grouped && step.group_scale ? std::sqrt(Real(view.size())) : 1); }
  Penalty penalty() const { return step.is_split() ? step.penalty : Penalty::none; }
  Real tau() const { return step.is_split() ? lam() / step.beta : 0; }
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

// shrink(r) for all r within a relative `error`; shrink rises with r. `exact`: only the arithmetic of shrink has that
// error, r itself has none, so that the cut in the arithmetic type decides. Else r may lie on either side.
inline Range shrink_within(const Tensor& t, Real r, bool exact, Real cut, Real error) {
  const Penalty p = t.penalty();
  const Real tau = t.tau(), a = t.step.a;
  if (p == Penalty::l0 && !exact) return {r * (1 - error) <= cut ? 0 : r, r * (1 + error) <= cut ? 0 : r};
  if (p == Penalty::none) return {r, r};
  const Real low = r * (1 - error), high = r * (1 + error);
  if (!exact) return {shrink(p, low, cut, tau, a), shrink(p, high, cut, tau, a)};
  const Real rounded = t.dtype == Dtype::f64 ? Real(double(cut)) : Real(float(cut));
  if (r <= rounded) return {0, 0};
  if (p == Penalty::l0) return {r, r};
  return {shrink_above(p, low, tau, a), shrink_above(p, high, tau, a)};
}

// ---- one element ----------------------------------------------------------------------------------------------------

// The arrays of a tensor.
struct Arrays {
  std::vector<double> w, g, m, kept, v, largest;  // m, v, largest: the states of the base
};

struct Element {
  Real w, m, kept, g, v, largest;
};

// `scale`: what rounding errors are relative to.
struct Result {
  Element low, high, scale;
  Range u;
};

// The step of an element whose u lies in a range. `unit`: w_G / ||w_G||; `grad`: the gradient after the scaling.
// `relative`: the error of the arithmetic, for AdamW.
inline Result step_element(const Tensor& t, const Element& before, Real grad, Range u, Real unit, Real relative) {
  const Step& s = t.step;
  const bool split = t.penalty() != Penalty::none;
  const Real pull = split && s.decoupled ? Real(s.lr) * s.beta : 0, coupling = split && !s.decoupled ? s.beta : 0;
  const Real keep = s.first ? 0 : s.momentum, add = s.first ? 1 : 1 - s.dampening;
  const int step = s.first ? 1 : s.count + 1;
  const Real step_size = s.lr / (1 - std::pow(Real(s.beta1), step));
  const Real correction = 1 / std::sqrt(1 - std::pow(Real(s.beta2), step));
  if (s.maximize) grad = -grad;
  const auto moved = [&](Real ui) {
    Element e = before;
    Real gap = e.w - ui;
    if (s.method == Method::delayed) {
      gap = e.w - e.kept;
      e.kept = ui;
    }
    if (s.method == Method::admm) {
      e.kept = e.w + e.kept - ui;
      gap += e.kept;
    }
    if (split) e.w -= pull * gap;
    Real d = grad + s.group_lasso * unit;
    if (split) d += coupling * gap;
    if (s.base == BaseKind::none) {
      e.g = d;
      return e;
    }
    if (s.base == BaseKind::adamw) {
      e.w *= 1 - Real(s.lr) * s.weight_decay;
      e.m = s.beta1 * e.m + (1 - Real(s.beta1)) * d;
      e.v = s.beta2 * e.v + (1 - Real(s.beta2)) * d * d;
      e.largest = std::max(e.largest, e.v);
      e.w -= step_size * e.m / (std::sqrt(s.amsgrad ? e.largest : e.v) * correction + s.eps);
      return e;
    }
    d += s.weight_decay * e.w;
    if (s.momentum != 0) {
      e.m = keep * e.m + add * d;
      d = s.nesterov ? d + s.momentum * e.m : e.m;
    }
    e.w -= s.lr * d;
    return e;
  };
  const bool held = s.hold_zeros && before.w == 0;
  const auto with = [&](Real ui) {
    Element e = moved(ui);
    if (!held) return e;
    e.w = 0;
    if (s.method != Method::rvsm) e.kept = 0;
    if (s.base == BaseKind::none) e.g = 0;
    if (s.has_momentum() || s.base == BaseKind::adamw) e.m = 0;
    if (s.base == BaseKind::adamw) e.v = e.largest = 0;
    return e;
  };
  const Element x = with(u.low), y = with(u.high);
  Result r{};
  r.low = {std::min(x.w, y.w), std::min(x.m, y.m), std::min(x.kept, y.kept),
           std::min(x.g, y.g), std::min(x.v, y.v), std::min(x.largest, y.largest)};
  r.high = {std::max(x.w, y.w), std::max(x.m, y.m), std::max(x.kept, y.kept),
            std::max(x.g, y.g), std::max(x.v, y.v), std::max(x.largest, y.largest)};
  r.u = u;
  if (held) return r;  // exactly 0
  const Real most = std::max(std::fabs(u.low), std::fabs(u.high));
  const Real weights = std::fabs(before.w) + most + (s.method == Method::rvsm ? 0 : std::fabs(before.kept));
  if (s.base == BaseKind::adamw) {
    // A quotient of two numbers with an error has no bound that is linear in it: the scale is that of the error itself.
    const Real d = std::fabs(grad) + std::fabs(s.group_lasso * unit) + coupling * weights;
    const Real m = std::fabs(before.m) + (1 - s.beta1) * d, v = s.beta2 * before.v + 3 * (1 - Real(s.beta2)) * d * d;
    const Real largest = std::max(v, before.largest), used = s.amsgrad ? largest : v;
    Real worst = 0;
    for (const Element& e : {x, y}) {
      const Real exact = s.amsgrad ? e.largest : e.v;
      const Real least =
          std::sqrt(std::max<Real>(0, exact - relative * used)) * correction * (1 - relative) + s.eps / 2;
      const Real quotient = std::fabs(e.m) / (std::sqrt(exact) * correction + s.eps);
      worst = std::max(worst, quotient + ((std::fabs(e.m) + relative * m) / least - quotient) / relative);
    }
    r.scale = {weights + step_size * worst, m, weights, 0, v, largest};
    return r;
  }
  Real d = std::fabs(grad) + std::fabs(s.group_lasso * unit) + (s.weight_decay + coupling) * weights;
  const Real direction = d, buffer = std::fabs(keep * before.m) + add * d;
  if (s.momentum != 0) d = s.nesterov ? d + s.momentum * buffer : buffer;
  r.scale = {weights + s.lr * d, buffer, weights, direction, 0, 0};
  return r;
}

// ---- a tensor -------------------------------------------------------------------------------------------------------

inline size_t group_of(const GroupView& v, int64_t i) {
  const int64_t columns = v.groups * v.inner;
  return size_t(i / (v.outer * columns) * v.groups + i % columns / v.inner);
}

// The square root of a sum of squares.
struct Norm {
  Real r = 0;
  int terms = 0;  // that are not 0

  // sqrt(x x) is |x|, in every precision.
  bool exact() const { return terms <= 1; }
};

// Those of the groups, or of each element alone. f(i): the element.
template <class F>
std::vector<Norm> norms(const Tensor& t, const F& f) {
  std::vector<Norm> all(size_t(t.grouped ? t.view.count() : t.numel()));
  for (int64_t i = 0; i < t.numel(); ++i) {
    const Real x = f(size_t(i));
    Norm& n = all[t.grouped ? group_of(t.view, i) : size_t(i)];
    n.r += x * x;
    n.terms += x != 0;
  }
  for (Norm& n : all) n.r = std::sqrt(n.r);
  return all;
}

// All elements of a step, or of a prox of `arrays.w` (of which only u is of interest). `cut_by_data`: of top-k.
// `error`: of the number that is compared with the cut.
inline std::vector<Result> run(const Tensor& t, const Arrays& arrays, double cut_by_data, double grad_scale,
                               Real error) {
  const Real threshold = t.step.topk ? Real(cut_by_data) : definition::cut(t.penalty(), t.tau(), t.step.a);
  // What is thresholded: a sum is rounded as in the arithmetic type.
  const auto argument = [&](size_t i) -> Real {
    if (t.step.method != Method::admm) return arrays.w[i];
    if (t.dtype == Dtype::f64) return arrays.w[i] + arrays.kept[i];
    return float(arrays.w[i]) + float(arrays.kept[i]);
  };
  std::vector<Range> ratio;  // u over what is thresholded, of each group
  for (const Norm& n : norms(t, argument)) {
    const Range s = n.r == 0 ? Range{0, 0} : shrink_within(t, n.r, n.exact(), threshold, error);
    ratio.push_back(n.r == 0 ? s : Range{s.low / n.r, s.high / n.r});
  }
  std::vector<Norm> lengths;
  if (t.step.group_lasso != 0) lengths = norms(t, [&](size_t i) -> Real { return arrays.w[i]; });
  std::vector<Result> results;
  for (size_t i = 0; i < size_t(t.numel()); ++i) {
    const size_t q = t.grouped ? group_of(t.view, int64_t(i)) : i;
    const Real v = argument(i), length = lengths.empty() ? 0 : lengths[q].r;
    const Real grad = grad_scale == 0 ? Real(arrays.g[i]) : arrays.g[i] / Real(grad_scale);
    results.push_back(
        step_element(t, {arrays.w[i], arrays.m[i], arrays.kept[i], arrays.g[i], arrays.v[i], arrays.largest[i]}, grad,
                     {v * ratio[q].low, v * ratio[q].high}, length > 0 ? arrays.w[i] / length : 0,
                     t.dtype == Dtype::f64 ? 1e-15L : 6e-7L));
  }
  return results;
}

// lam P(u) + beta/2 |w - u|^2 of a tensor, and in `slack` what it may be off by for that `error` of each norm.
inline Real value(const Tensor& t, const std::vector<double>& w, Real error, Real& slack) {
  const Penalty p = t.penalty();
  const Real lam = t.lam(), tau = t.tau(), a = t.step.a, beta = t.step.beta, threshold = definition::cut(p, tau, a);
  const auto term = [&](Real r) {
    const Real u = shrink(p, r, threshold, tau, a);
    return lam * penalty(p, u, a) + beta / 2 * (r - u) * (r - u);
  };
  Real sum = 0;
  for (const Norm& n : norms(t, [&](size_t i) -> Real { return w[i]; })) {
    const Real r = n.r, here = term(r);
    sum += here;
    const Real off = std::max(std::fabs(term(r * (1 + error)) - here), std::fabs(term(r * (1 - error)) - here));
    slack += off + 4 * error * (here + beta * r * r + lam * r);
  }
  return sum;
}

}  // namespace rvsm::definition
