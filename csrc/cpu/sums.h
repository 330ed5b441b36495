// Counts and sums of the CPU engine over tiles of w, u and d. Part of elements.cpp, so compiled once per instruction
// set. Sums are in double precision, in lanes of a fixed number, so every instruction set gives the same bits.
#pragma once

#include <limits>
#include <type_traits>

#include "../math/statistics.h"
#include "engine.h"

namespace rvsm::cpu {

namespace {

// Independent sums that an instruction or two can take together.
constexpr int kSumLanes = 16;

// Sums of a tile, lane by lane.
template <class T>
struct LaneSums {
  using Count = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  double gap[kSumLanes] = {}, grad[kSumLanes] = {}, value[kSumLanes] = {};
  Count zeros[kSumLanes] = {}, finite[kSumLanes] = {};

  void add_to(Sums& sums) const {
    for (int k = 0; k < kSumLanes; ++k) {
      sums.gap += gap[k];
      sums.grad += grad[k];
      sums.value += value[k];
      sums.zeros += zeros[k];
      sums.nonfinite -= finite[k];
    }
  }
};

// The next kSumLanes elements, or fewer. kGrad: d is there; finite elements are counted then.
template <Penalty kPenalty, bool kGrad, class T>
inline __attribute__((always_inline)) void add_lanes(LaneSums<T>& s, const T* __restrict w, const T* __restrict u,
                                                     const T* __restrict d, int n, T a) {
  using Count = typename LaneSums<T>::Count;
  constexpr T kMost = std::numeric_limits<T>::max();
  for (int k = 0; k < n; ++k) {
    const double gap = double(w[k]) - double(u[k]);
    s.gap[k] += gap * gap;
    s.zeros[k] += Count(u[k] == T(0));
    if (kGrad) {
      s.grad[k] += double(d[k]) * double(d[k]);
      s.finite[k] += Count((std::fabs(w[k]) <= kMost) & (std::fabs(d[k]) <= kMost));
    }
    if (kPenalty == Penalty::l1 || kPenalty == Penalty::tl1) s.value[k] += double(value<kPenalty>(std::fabs(u[k]), a));
  }
}

// Adds a tile of elements. Penalty::none leaves out g.
template <Penalty kPenalty, bool kGrad, class T>
void add_tile(Sums& sums, const T* w, const T* u, const T* d, int64_t n, T a) {
  LaneSums<T> s;
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes) add_lanes<kPenalty, kGrad>(s, w + i, u + i, d + i, kSumLanes, a);
  add_lanes<kPenalty, kGrad>(s, w + i, u + i, d + i, int(n - i), a);
  const int64_t before = sums.zeros;
  s.add_to(sums);
  if (kGrad) sums.nonfinite += n;
  if (kPenalty == Penalty::l0) sums.value += double(n - (sums.zeros - before));
}

}  // namespace

}  // namespace rvsm::cpu
