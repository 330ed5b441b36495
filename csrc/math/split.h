// The split: what stands before every base step (section 3 of docs/method.md). Without torch, for host and device.
//
//   u = prox(thresholded),  gap by the method
//   d = grad + lasso unit + coupling gap      (grad comes with its sign and 1 / grad_scale)
//   w = w - pull gap
//
// and then the base: w = base(w, d, states). Where w is held, grad and all states count as 0, and then every base
// leaves them and w at 0. With `decoupled` coupling is 0 and pull lr beta; without, pull is 0 and coupling beta.
#pragma once

#include <type_traits>

#include "penalty.h"

namespace rvsm {

// Which terms the split has: KnownSplit at compile time, SplitSwitches at run time. Terms that are off are left out,
// not multiplied by 0, so that an Inf spreads no further than in torch.optim.
template <bool kPull, bool kLasso>
struct KnownSplit {
  static constexpr bool pull = kPull, lasso = kLasso;
};

struct SplitSwitches {
  bool pull, lasso;
};

// States that a method has beside each weight: `u` of the step before (delayed), `dual` (admm).
RVSM_HD constexpr int method_states(Method method) { return method == Method::rvsm ? 0 : 1; }

// What a method thresholds. `state` is the method's.
template <Method kMethod, class T>
RVSM_HD T thresholded(T w, T state) {
  return kMethod == Method::admm ? w + state : w;
}

// The gap that pulls, from v = thresholded(w, state) and u = prox(v), and the state from now on:
//
//   rvsm:     gap = w - u
//   delayed:  gap = w - state,  state' = u
//   admm:     state' = v - u,   gap = w - u + state'
template <Method kMethod, class T>
RVSM_HD T gap_of(T w, T v, T u, T& state) {
  if (kMethod == Method::delayed) {
    const T gap = w - state;
    state = u;
    return gap;
  }
  if (kMethod == Method::admm) {
    state = v - u;
    return w - u + state;
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

// Pulls w, and turns d from the gradient into the direction for the base. `gap` and `unit` = w_G / ||w_G|| are those of
// the weights that the forward pass used.
template <class T, class Switches>
RVSM_HD void split_step(T& w, T& d, T gap, T unit, const Split<T>& s, Switches on) {
  if (on.lasso) d = d + s.lasso * unit;
  if (on.pull) {
    w = w - s.pull * gap;
    d = d + s.coupling * gap;
  }
}

// Whether an element of this weight, as the step finds it, is held.
template <class T>
RVSM_HD bool is_held(T w, const Split<T>& s) {
  return w == s.held;
}

// A gradient or a state of an element as the step takes it: 0 where that is held. To be asked right after the loads, so
// that nothing has to be kept for it.
template <class T>
RVSM_HD T unless_held(bool held, T loaded) {
  return held ? T(0) : loaded;
}

}  // namespace rvsm
