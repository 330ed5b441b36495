// sgd_step against section 3 of docs/method.md, written out once more in long double.

#include <cmath>

#include "../update.h"
#include "check.h"

using namespace rvsm;
using Real = long double;

namespace {

struct State {
  Real w, m;
};

State expected(const Options& o, Real w, Real m, Real grad, Real gap, Real unit, bool first) {
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
    m = first ? d : Real(o.momentum) * m + (1 - Real(o.dampening)) * d;
    d = o.nesterov ? d + Real(o.momentum) * m : m;
  }
  return {w - Real(o.lr) * d, m};
}

template <class T, Momentum kMomentum>
void step(T& w, T& m, T grad, T gap, T unit, const Step<double>& s) {
  if (s.decay != 0)
    sgd_step(w, m, grad, gap, unit, narrow<T>(s), StepKind<kMomentum, true, true, true>{});
  else
    sgd_step(w, m, grad, gap, unit, narrow<T>(s), StepKind<kMomentum, false, true, true>{});
}

template <class T>
void compare(const Options& o, bool first) {
  const T w = T(uniform(-1, 1)), grad = T(uniform(-1, 1)), gap = T(uniform(-1, 1)), unit = T(uniform(-1, 1));
  const T m = first ? T(0) : T(uniform(-1, 1));
  const Step<double> s = make_step(o, 1, first);
  T got_w = w, got_m = m;
  switch (momentum_of(o)) {
    case Momentum::none:
      step<T, Momentum::none>(got_w, got_m, grad, gap, unit, s);
      break;
    case Momentum::plain:
      step<T, Momentum::plain>(got_w, got_m, grad, gap, unit, s);
      break;
    case Momentum::nesterov:
      step<T, Momentum::nesterov>(got_w, got_m, grad, gap, unit, s);
      break;
  }
  const State want = expected(o, w, m, grad, gap, unit, first);
  // Every operand is at most 1 in size and there are a dozen roundings.
  const Real bound = 16 * std::numeric_limits<T>::epsilon() * (2 + Real(o.beta));
  CHECK(std::fabs(Real(got_w) - want.w) <= bound && std::fabs(Real(got_m) - want.m) <= bound,
        "decoupled %d momentum %g nesterov %d first %d: w %.17g want %.17Lg, m %.17g want %.17Lg", o.decoupled,
        o.momentum, o.nesterov, first, double(got_w), want.w, double(got_m), want.m);
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
    const bool first = integer(0, 3) == 0;
    compare<float>(o, first);
    compare<double>(o, first);
    cases += 2;
  }
  // What a method pulls with and what it keeps, by hand.
  double kept = 0.25;
  CHECK(argument<Method::rvsm>(1.0, kept) == 1 && argument<Method::delayed>(1.0, kept) == 1, "w is thresholded");
  CHECK(argument<Method::admm>(1.0, kept) == 1.25, "w + dual is thresholded");
  CHECK(gap_of<Method::rvsm>(1.0, 1.0, 0.5, kept) == 0.5 && kept == 0.25, "w - u");
  CHECK(gap_of<Method::delayed>(1.0, 1.0, 0.5, kept) == 0.75 && kept == 0.5, "w - the u of the step before");
  kept = 0.25;
  CHECK(gap_of<Method::admm>(1.0, 1.25, 0.75, kept) == 0.75 && kept == 0.5, "w - u + dual, the dual v - u");
  // No splitting: nothing pulls, and u is w.
  for (const auto& [lam, beta] : {std::pair{0.0, 1.0}, std::pair{1.0, 0.0}}) {
    Options o;
    o.penalty = Penalty::l1;
    o.lam = lam;
    o.beta = beta;
    const Step<double> s = make_step(o, 1, false);
    CHECK(s.pull == 0 && s.coupling == 0 && s.prox.penalty == Penalty::none, "lam %g beta %g", lam, beta);
  }
  Options o;
  o.penalty = Penalty::l1;
  o.lam = 0.5;
  o.beta = 2;
  o.group_scale = true;
  CHECK(make_step(o, 16, false).prox.tau == 1.0, "group_scale multiplies lam by sqrt(group size)");
  return finish("update", cases);
}
