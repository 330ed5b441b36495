// The step of torch.optim.SGD. Without torch, for host and device.
//
//   d = d + decay w
//   m = keep m + add d;  d = d + momentum m with Nesterov, else m      (with momentum)
//   w = w - lr d
//
// At the first step m holds zeros, keep is 0 and add is 1.
#pragma once

#include "numbers.h"

namespace rvsm {

// kMomentum: there is a state, momentum_buffer.
template <bool kMomentum>
struct Sgd {
  static constexpr BaseKind kKind = BaseKind::sgd;
  static constexpr int kStates = kMomentum;
  static constexpr bool kReadsGrad = true, kWritesGrad = false, kWritesWeight = true;
  static constexpr int kNumbers = 6;
  static constexpr int kCorrections = 0;

  template <class T>
  struct Numbers {
    T decay, keep, add, momentum, nesterov, lr;
  };

  template <class T, class N>
  RVSM_HD Numbers<T> numbers(const N* n) {
    return {T(n[0]), T(n[1]), T(n[2]), T(n[3]), T(n[4]), T(n[5])};
  }

  // The factors that stand on a device come into the numbers of the host.
  RVSM_HD void fill_in(double* n, double lr, double decay) {
    n[0] *= decay;
    n[5] *= lr;
  }

  // Switches known at compile time, and switches known only at run time.
  template <bool kDecay, bool kNesterov>
  struct Known {
    static constexpr bool decay = kDecay, nesterov = kNesterov;
  };
  struct Switches {
    bool decay, nesterov;
  };

  // The switches that follow from the numbers of a base.
  template <class N>
  RVSM_HD Switches switches(const N* n) {
    return {n[0] != 0, n[4] != 0};
  }

  // Calls f(Known<...>{}).
  template <class F>
  RVSM_HD void with_switches(const double* n, const F& f) {
    const Switches on = switches(n);
    if (kMomentum && on.nesterov)
      on.decay ? f(Known<true, kMomentum>{}) : f(Known<false, kMomentum>{});
    else
      on.decay ? f(Known<true, false>{}) : f(Known<false, false>{});
  }

  template <class T, class On>
  RVSM_HD void step(T& w, T* state, T& d, const Numbers<T>& n, On on) {
    T direction = d;
    if (on.decay) direction = direction + n.decay * w;
    if (kMomentum) {
      state[0] = n.keep * state[0] + n.add * direction;
      direction = on.nesterov ? direction + n.momentum * state[0] : state[0];
    }
    w = w - n.lr * direction;
  }
};

}  // namespace rvsm
