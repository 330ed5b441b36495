// The pull alone, for an optimizer that steps by itself afterwards. Without torch, for host and device.
#pragma once

#include "numbers.h"

namespace rvsm {

// The weights stay as the pull has left them. kGradient: the split has terms in the gradient (a coupling, group lasso),
// and the step writes the direction into the gradient; else the gradient is not even read.
template <bool kGradient>
struct NoBase {
  static constexpr BaseKind kKind = BaseKind::none;
  static constexpr int kStates = 0;
  static constexpr bool kReadsGrad = kGradient, kWritesGrad = kGradient, kWritesWeight = true;
  static constexpr int kNumbers = 0;
  static constexpr int kCorrections = 0;

  template <class T>
  struct Numbers {};
  template <class T, class N>
  RVSM_HD Numbers<T> numbers(const N*) {
    return {};
  }
  RVSM_HD void fill_in(double*, double, double) {}

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
  RVSM_HD void step(T&, T*, T&, const Numbers<T>&, On) {}
};

}  // namespace rvsm
