// The register arithmetic of one step (section 3 of docs/method.md). Without torch, for host and device.
#pragma once

#include <type_traits>

#include "prox.h"

namespace rvsm {

// What a step does, apart from its numbers. A kernel that knows it when it is compiled gives constants. Terms that are
// off are left out, not multiplied by 0, so that an Inf goes where torch.optim.SGD would let it go.
template <Momentum kMomentum, bool kDecay, bool kPull, bool kLasso>
struct StepKind {
  static constexpr Momentum momentum = kMomentum;
  static constexpr bool decay = kDecay, pull = kPull, lasso = kLasso;
};

// What a method thresholds. `kept` is what it keeps of the element: u of the step before (delayed), the dual (admm).
template <Method kMethod, class T>
RVSM_HD T argument(T w, T kept) {
  return kMethod == Method::admm ? w + kept : w;
}

// The gap that pulls, from v = argument(w, kept) and u = prox(v), and what is kept from now on:
//
//   rvsm:     gap = w - u
//   delayed:  gap = w - kept,  kept' = u
//   admm:     kept' = v - u,   gap = w - u + kept'
template <Method kMethod, class T>
RVSM_HD T gap_of(T w, T v, T u, T& kept) {
  if (kMethod == Method::delayed) {
    const T gap = w - kept;
    kept = u;
    return gap;
  }
  if (kMethod == Method::admm) {
    kept = v - u;
    return w - u + kept;
  }
  return w - u;
}

// Calls f(std::integral_constant<Method, ...>).
template <class F>
RVSM_HD void with_method(Method method, const F& f) {
  switch (method) {
    case Method::delayed:
      return f(std::integral_constant<Method, Method::delayed>{});
    case Method::admm:
      return f(std::integral_constant<Method, Method::admm>{});
    default:
      return f(std::integral_constant<Method, Method::rvsm>{});
  }
}

// One element. `gap` is w - u and `unit` is w_G / ||w_G||, both of the weights that the forward pass used.
//
//   decoupled:  w' = w - lr beta gap,  d = g + lasso unit + wd w'
//   coupled:    w' = w,                d = g + lasso unit + wd w + beta gap
//   m = d at the first step, else mu m + (1 - dampening) d;   d = d + mu m if nesterov, else m
//   w = w' - lr d
template <class T, class Kind>
RVSM_HD void sgd_step(T& w, T& m, T grad, T gap, T unit, const Step<T>& s, Kind kind) {
  T d = grad * s.grad;
  if (kind.pull) w = w - s.pull * gap;
  if (kind.lasso) d = d + s.lasso * unit;
  if (kind.decay) d = d + s.decay * w;
  if (kind.pull) d = d + s.coupling * gap;
  if (kind.momentum != Momentum::none) {
    m = s.keep * m + s.add * d;
    d = kind.momentum == Momentum::nesterov ? d + s.look * m : m;
  }
  w = w - s.lr * d;
}

// The contribution of one r (an element's magnitude or a group's norm) to lam P(u) + beta/2 ||w - u||^2, in double.
// A group's w and u are collinear, so ||w_G - u_G|| = r - shrink(r).
template <Penalty kPenalty, class T>
RVSM_HD double penalty_term(T r, const Prox<T>& f, double lam, double beta) {
  const T s = shrink<kPenalty>(r, f);
  const double gap = double(r) - double(s);
  return lam * value<kPenalty>(double(s), double(f.a)) + beta / 2 * gap * gap;
}

// ---- host only: the options of a group become the numbers of one tensor, in double precision --------------------

// lam of a tensor with groups of that many elements.
RVSM_HD double strength(const Options& o, int64_t group_size) {
  return o.group_scale ? o.lam * std::sqrt(double(group_size)) : o.lam;
}

// Whether there is a splitting at all: without one, u is w.
RVSM_HD bool is_split(const Options& o) { return o.penalty != Penalty::none && o.lam > 0 && o.beta > 0; }

// Whether the groups' norms matter to a step.
RVSM_HD bool needs_norms(const Options& o) { return is_split(o) || o.group_lasso != 0; }

// The step of one tensor with groups of that many elements. The momentum buffer of a first step holds zeros.
RVSM_HD Step<double> make_step(const Options& o, int64_t group_size, bool first) {
  Step<double> s{};
  const bool split = is_split(o);
  s.prox = make_prox(split ? o.penalty : Penalty::none, split ? strength(o, group_size) / o.beta : 0, o.a);
  s.grad = o.maximize ? -1 : 1;  // over grad_scale, which the engine knows only at the step
  s.pull = split && o.decoupled ? o.lr * o.beta : 0;
  s.coupling = split && !o.decoupled ? o.beta : 0;
  s.decay = o.weight_decay;
  s.lasso = o.group_lasso;
  s.keep = first ? 0 : o.momentum;
  s.add = first ? 1 : 1 - o.dampening;
  s.look = o.momentum;
  s.lr = o.lr;
  return s;
}

RVSM_HD Momentum momentum_of(const Options& o) {
  return o.momentum == 0 ? Momentum::none : o.nesterov ? Momentum::nesterov : Momentum::plain;
}

// The same numbers in the arithmetic type of a kernel.
template <class T>
RVSM_HD Step<T> narrow(const Step<double>& s) {
  return {narrow<T>(s.prox), T(s.grad), T(s.pull), T(s.coupling), T(s.decay),
          T(s.lasso),        T(s.keep), T(s.add),  T(s.look),     T(s.lr)};
}

}  // namespace rvsm
