// The split and the base steps against section 3 of docs/method.md, written out once more in long double.

#include <cmath>

#include "options.h"

using namespace rvsm;
using Real = long double;

namespace {

struct State {
  Real w, m, v = 0, largest = 0;
};

// AdamW after the split, from its states.
State expected_adamw(const Options& o, State s, Real grad, Real gap, Real unit, bool fresh) {
  Real d = (o.maximize ? -grad : grad) + Real(o.group_lasso) * unit;
  if (o.decoupled)
    s.w -= Real(o.lr) * o.beta * gap;
  else
    d += Real(o.beta) * gap;
  const int t = fresh ? 1 : o.count + 1;
  s.w *= 1 - Real(o.lr) * o.weight_decay;
  s.m = o.beta1 * s.m + (1 - Real(o.beta1)) * d;
  s.v = o.beta2 * s.v + (1 - Real(o.beta2)) * d * d;
  s.largest = std::max(s.largest, s.v);
  const Real corrected = (o.amsgrad ? s.largest : s.v) / (1 - std::pow(Real(o.beta2), t));
  s.w -= Real(o.lr) / (1 - std::pow(Real(o.beta1), t)) * s.m / (std::sqrt(corrected) + Real(o.eps));
  return s;
}

State expected(const Options& o, Real w, Real m, Real grad, Real gap, Real unit, bool fresh) {
  Real g = o.maximize ? -grad : grad;
  g += Real(o.group_lasso) * unit;
  Real d;
  if (o.decoupled) {
    w -= Real(o.lr) * o.beta * gap;
    d = g + Real(o.weight_decay) * w;
  } else {
    d = g + Real(o.weight_decay) * w + Real(o.beta) * gap;
  }
  if (o.momentum != 0) {
    m = fresh ? d : Real(o.momentum) * m + (1 - Real(o.dampening)) * d;
    d = o.nesterov ? d + Real(o.momentum) * m : m;
  }
  return {w - Real(o.lr) * d, m};
}

template <class T>
void compare(const Options& o, bool fresh) {
  T w = T(uniform(-1, 1)), grad = T(uniform(-1, 1)), m[4] = {fresh ? T(0) : T(uniform(-1, 1))};
  const T u = T(uniform(-1, 1)), unit = T(uniform(-1, 1)), gap = w - u;
  std::deque<NumberRow> records;
  TensorArgs args;
  apply(o, args, fresh, records);
  const State want = expected(o, w, m[0], grad, gap, unit, fresh);
  plain_step(w, grad, m, unit, args, [&](T) { return u; });
  // Every operand is at most 2 in size and there are a dozen roundings.
  const Real bound = 16 * std::numeric_limits<T>::epsilon() * (2 + 2 * Real(o.beta));
  CHECK(std::fabs(Real(w) - want.w) <= bound && std::fabs(Real(m[0]) - want.m) <= bound,
        "decoupled %d momentum %g nesterov %d fresh %d: w %.17g want %.17Lg, m %.17g want %.17Lg", o.decoupled,
        o.momentum, o.nesterov, fresh, double(w), want.w, double(m[0]), want.m);
}

template <class T>
void compare_adamw(const Options& o, bool fresh) {
  T w = T(uniform(-1, 1)), grad = T(uniform(-1, 1)), states[4] = {};
  if (!fresh) {
    states[0] = T(uniform(-1, 1));
    states[1] = T(uniform(0.1, 1));
    states[2] = T(uniform(0.1, 1));
  }
  const T u = T(uniform(-1, 1)), unit = T(uniform(-1, 1)), gap = w - u;
  std::deque<NumberRow> records;
  TensorArgs args;
  apply(o, args, fresh, records);
  const State before{w, states[0], states[1], states[2]}, want = expected_adamw(o, before, grad, gap, unit, fresh);
  const Real d = Real(grad) + std::fabs(o.beta * gap) + std::fabs(o.group_lasso * unit);
  plain_step(w, grad, states, unit, args, [&](T) { return u; });
  // The first step divides by the size of a gradient whose terms cancel.
  const Real small = fresh ? std::max<Real>(std::fabs(want.m) / (1 - Real(o.beta1)), Real(1e-6)) : 0.1;
  const Real bound = 64 * std::numeric_limits<T>::epsilon() * (2 + 2 * Real(o.beta)) * (1 + (2 + std::fabs(d)) / small);
  const auto near = [&](T x, Real y) { return std::fabs(Real(x) - y) <= bound; };
  CHECK(near(w, want.w) && near(states[0], want.m) && near(states[1], want.v) &&
            (!o.amsgrad || near(states[2], want.largest)),
        "AdamW, decoupled %d amsgrad %d fresh %d: w %.17g want %.17Lg, exp_avg %.17g want %.17Lg", o.decoupled,
        o.amsgrad, fresh, double(w), want.w, double(states[0]), want.m);
}

// The pull alone: no other term reaches the weights; what is coupled, and group lasso, ends in the gradient.
template <class T>
void compare_pull(const Options& o) {
  T w = T(uniform(-1, 1)), grad = T(uniform(-1, 1)), none[4] = {};
  const T u = T(uniform(-1, 1)), unit = T(uniform(-1, 1)), gap = w - u;
  std::deque<NumberRow> records;
  TensorArgs args;
  apply(o, args, false, records);
  const Real want_w = o.decoupled ? Real(w) - Real(o.lr) * o.beta * gap : Real(w);
  const bool written = !o.decoupled || o.group_lasso != 0;
  const Real want_grad = !written ? Real(grad)
                                  : (o.maximize ? -Real(grad) : Real(grad)) + Real(o.group_lasso) * unit +
                                        (o.decoupled ? 0 : Real(o.beta) * gap);
  plain_step(w, grad, none, unit, args, [&](T) { return u; });
  const Real bound = 8 * std::numeric_limits<T>::epsilon() * (2 + 2 * Real(o.beta));
  CHECK(std::fabs(Real(w) - want_w) <= bound && std::fabs(Real(grad) - want_grad) <= bound,
        "the pull, decoupled %d: w %.17g want %.17Lg, the gradient %.17g want %.17Lg", o.decoupled, double(w), want_w,
        double(grad), want_grad);
}

}  // namespace

int main() {
  int64_t cases = 0;
  for (int i = 0; i < 20000; ++i) {
    Options o;
    o.penalty = Penalty::l0;
    o.lam = 0.1;
    o.beta = uniform(0, 2);
    o.lr = uniform(0, 1);
    o.momentum = integer(0, 2) == 0 ? 0 : uniform(0.1, 1);
    o.nesterov = o.momentum != 0 && integer(0, 1);
    o.dampening = o.nesterov ? 0 : uniform(0, 1);
    o.weight_decay = integer(0, 1) ? uniform(0, 1) : 0;
    o.group_lasso = integer(0, 1) ? uniform(0, 1) : 0;
    o.decoupled = integer(0, 1);
    o.maximize = integer(0, 1);
    const bool fresh = integer(0, 3) == 0;
    compare<float>(o, fresh);
    compare<double>(o, fresh);
    o.base = BaseKind::none;
    compare_pull<float>(o);
    compare_pull<double>(o);
    o.base = BaseKind::adamw;
    o.amsgrad = integer(0, 1);
    compare_adamw<float>(o, fresh);
    compare_adamw<double>(o, fresh);
    cases += 6;
  }
  // What a method pulls with, and its state from then on, by hand.
  double state = 0.25;
  CHECK(thresholded<Method::rvsm>(1.0, state) == 1 && thresholded<Method::delayed>(1.0, state) == 1,
        "w is thresholded");
  CHECK(thresholded<Method::admm>(1.0, state) == 1.25, "w + dual is thresholded");
  CHECK(gap_of<Method::rvsm>(1.0, 1.0, 0.5, state) == 0.5 && state == 0.25, "w - u");
  CHECK(gap_of<Method::delayed>(1.0, 1.0, 0.5, state) == 0.75 && state == 0.5, "w - the u of the step before");
  state = 0.25;
  CHECK(gap_of<Method::admm>(1.0, 1.25, 0.75, state) == 0.75 && state == 0.5, "w - u + dual, the dual v - u");
  // Zeros of both signs are held where the options ask for it, and nothing else is.
  for (const bool hold : {false, true}) {
    Options o;
    o.hold_zeros = hold;
    const Split<float> s = split_of<float>(record_of(o, 1, false).data(), 1);
    CHECK(is_held(0.f, s) == hold && is_held(-0.f, s) == hold, "zeros");
    for (const float w : {1e-45f, -1.f, INFINITY, NAN}) CHECK(!is_held(w, s), "%g is no zero", double(w));
  }
  CHECK(unless_held(true, NAN) == 0 && unless_held(false, 2.f) == 2, "what is held counts as 0");
  return finish("split", cases);
}
