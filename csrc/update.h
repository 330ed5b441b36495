// The register arithmetic of one step (section 2.3 of the design). Without torch, for host and device.
#pragma once

#include "prox.h"

namespace rvsm {

// One element. `pull` is w - u and `unit` is w_G / ||w_G|| (0 without a group lasso), both of the weights that the
// forward pass used.
//
//   decoupled:  w' = w - lr beta pull,  d = g + lasso unit + wd w'
//   coupled:    w' = w,                 d = g + lasso unit + wd w + beta pull
//   m = d at the first step, else mu m + (1 - dampening) d;   d = d + mu m if nesterov, else m
//   w = w' - lr d
template <bool kMomentum, class T>
RVSM_HD void sgd_step(T& w, T& m, T grad, T pull, T unit, const Step<T>& s) {
  T d = grad * s.grad;
  const T pulled = s.pull * pull;
  w = s.decoupled ? w - pulled : w;
  d = s.lasso != T(0) ? d + s.lasso * unit : d;
  d = s.decay != T(0) ? d + s.decay * w : d;
  d = s.decoupled ? d : d + pulled;
  if (kMomentum) {
    m = s.first ? d : s.mu * m + s.nu * d;
    d = s.nesterov ? d + s.mu * m : m;
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

// The step of one tensor with groups of that many elements.
RVSM_HD Step<double> make_step(const Options& o, int64_t group_size, bool first) {
  Step<double> s{};
  const bool split = is_split(o);
  s.prox = make_prox(split ? o.penalty : Penalty::none, split ? strength(o, group_size) / o.beta : 0, o.a);
  s.grad = o.maximize ? -1 : 1;  // over grad_scale, which the engine knows only at the step
  s.pull = !split ? 0 : o.decoupled ? o.lr * o.beta : o.beta;
  s.decay = o.weight_decay;
  s.lasso = o.group_lasso;
  s.mu = o.momentum;
  s.nu = 1 - o.dampening;
  s.lr = o.lr;
  s.decoupled = o.decoupled;
  s.nesterov = o.nesterov;
  s.first = first;
  return s;
}

// The same numbers in the arithmetic type of a kernel.
template <class T>
RVSM_HD Step<T> narrow(const Step<double>& s) {
  Step<T> n{};
  n.prox = narrow<T>(s.prox);
  n.grad = T(s.grad);
  n.pull = T(s.pull);
  n.decay = T(s.decay);
  n.lasso = T(s.lasso);
  n.mu = T(s.mu);
  n.nu = T(s.nu);
  n.lr = T(s.lr);
  n.decoupled = s.decoupled;
  n.nesterov = s.nesterov;
  n.first = s.first;
  return n;
}

}  // namespace rvsm
