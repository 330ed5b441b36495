// The step of torch.optim.AdamW. Without torch, for host and device.
//
//   w = w - lr decay w
//   m = beta1 m + (1 - beta1) d,  v = beta2 v + (1 - beta2) d^2
//   w = w - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps), with amsgrad for v the largest v so far
//
// What depends on t is a number of the record, which the host makes in double precision, or a correction, which is made
// of the record and a counter on the device.
#pragma once

#include <cmath>

#include "numbers.h"

namespace rvsm {

// kAmsgrad: a third state, max_exp_avg_sq, behind exp_avg and exp_avg_sq.
template <bool kAmsgrad>
struct AdamW {
  static constexpr BaseKind kKind = BaseKind::adamw;
  static constexpr int kStates = 2 + kAmsgrad;
  static constexpr bool kReadsGrad = true, kWritesGrad = false, kWritesWeight = true;
  static constexpr int kNumbers = 9;  // those of Numbers, lr, beta1
  static constexpr int kCorrections = 2;

  template <class T>
  struct Numbers {
    T keep;             // 1 - lr * weight_decay
    T add;              // 1 - beta1
    T keep_sq;          // beta2
    T add_sq;           // 1 - beta2
    T step_size;        // lr / (1 - beta1^t)
    T correction, eps;  // 1 / sqrt(1 - beta2^t)
  };

  template <class T, class N>
  RVSM_HD Numbers<T> numbers(const N* n) {
    return {T(n[0]), T(n[1]), T(n[2]), T(n[3]), T(n[4]), T(n[5]), T(n[6])};
  }

  // The factors that stand on a device come into the numbers of the host.
  RVSM_HD void fill_in(double* n, double lr, double decay) {
    n[0] = 1 - (1 - n[0]) * lr * decay;
    n[4] *= lr;
    n[7] *= lr;
  }

  // step_size and correction of step t, in double precision.
  RVSM_HD void corrections(const double* n, float t, double* out) {
    out[0] = n[7] / (1 - power(n[8], t));
    out[1] = 1 / std::sqrt(1 - power(n[2], t));
  }
  // The same as the host has made them.
  RVSM_HD void corrections_on_host(const double* n, double* out) {
    out[0] = n[4];
    out[1] = n[5];
  }
  template <class T>
  RVSM_HD Numbers<T> corrected(Numbers<T> n, const double* corrections) {
    n.step_size = T(corrections[0]);
    n.correction = T(corrections[1]);
    return n;
  }

  struct Switches {};
  template <class N>
  RVSM_HD Switches switches(const N*) {
    return {};
  }
  template <class F>
  RVSM_HD void with_switches(const double*, const F& f) {
    f(Switches{});
  }

  template <class T, class On>
  RVSM_HD void step(T& w, T* state, T& d, const Numbers<T>& n, On) {
    w = w * n.keep;
    state[0] = state[0] + n.add * (d - state[0]);
    state[1] = n.keep_sq * state[1] + n.add_sq * (d * d);
    T v = state[1];
    if constexpr (kAmsgrad) {
      // As torch.maximum: a NaN stays.
      v = state[2] = state[2] > v || state[2] != state[2] ? state[2] : v;
    }
    w = w - n.step_size * (state[0] / (std::sqrt(v) * n.correction + n.eps));
  }
};

}  // namespace rvsm
