// The list of bases: a base is a file of its own and one row here. No kernel, plan or table is touched.
#pragma once

#include "base_adamw.h"
#include "base_none.h"
#include "base_sgd.h"

namespace rvsm {

// The base of a tensor as the kernels tell it apart.
struct BaseKey {
  BaseKind kind = BaseKind::sgd;
  uint8_t states = 0;  // how many the base has beside each weight
  bool writes_grad = false;

  friend bool operator==(const BaseKey& a, const BaseKey& b) {
    return a.kind == b.kind && a.states == b.states && a.writes_grad == b.writes_grad;
  }
};

template <class Base>
RVSM_HD constexpr BaseKey key_of() {
  return {Base::kKind, uint8_t(Base::kStates), Base::kWritesGrad};
}

// Calls f(Base{}) for every base.
template <class F>
RVSM_HD void for_each_base(F&& f) {
  f(Sgd<false>{});
  f(Sgd<true>{});
  f(NoBase<false>{});
  f(NoBase<true>{});
  f(AdamW<false>{});
  f(AdamW<true>{});
}

// Calls f(Base{}) with the base of a key.
template <class F>
RVSM_HD void with_base(BaseKey key, const F& f) {
  if (key.kind == BaseKind::none) return key.writes_grad ? f(NoBase<true>{}) : f(NoBase<false>{});
  if (key.kind == BaseKind::adamw) return key.states > 2 ? f(AdamW<true>{}) : f(AdamW<false>{});
  return key.states > 0 ? f(Sgd<true>{}) : f(Sgd<false>{});
}

// Whether a base has numbers that follow from the count of steps.
inline bool has_corrections(BaseKind kind) {
  bool has = false;
  for_each_base([&](auto base) { has = has || (decltype(base)::kKind == kind && decltype(base)::kCorrections > 0); });
  return has;
}

// These numbers of the step with count `step`, and as the host has made them.
RVSM_HD void corrections_of(BaseKind kind, const double* numbers, float step, double* out) {
  if (kind == BaseKind::adamw) AdamW<false>::corrections(numbers, step, out);
}
RVSM_HD void corrections_on_host(BaseKind kind, const double* numbers, double* out) {
  if (kind == BaseKind::adamw) AdamW<false>::corrections_on_host(numbers, out);
}

// The factors that stand on a device come into a base's numbers of the host; a factor that does not is 1.
RVSM_HD void fill_in_base(BaseKind kind, double* numbers, double lr, double decay) {
  if (kind == BaseKind::sgd) Sgd<true>::fill_in(numbers, lr, decay);
  if (kind == BaseKind::adamw) AdamW<false>::fill_in(numbers, lr, decay);
}

// Names and lengths of the records of the bases, in the order of BaseKind.
struct BaseName {
  const char* name;
  int numbers;
};
constexpr BaseName kBases[] = {
    {"sgd", Sgd<true>::kNumbers}, {"none", NoBase<true>::kNumbers}, {"adamw", AdamW<true>::kNumbers}};

}  // namespace rvsm
