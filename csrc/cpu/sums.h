// Counts and sums of the CPU engine over elements of w, u and d. Part of elements.cpp, so compiled once per instruction
// set. There is a fixed number of lanes, added in a fixed order, so every instruction set gives the same bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "../math/statistics.h"
#include "engine.h"

namespace rvsm::cpu {

namespace {

// Independent sums that an instruction or two can take together.
constexpr int kSumLanes = 16;

// Elements whose terms are added up in the type of the arithmetic, lane by lane; sums of stretches are in double.
constexpr int64_t kStretch = 256;

// The sum of the lanes, in pairs.
template <class T>
inline double fold(T* lane) {
  for (int half = kSumLanes / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) lane[k] += lane[k + half];
  return double(lane[0]);
}

// Sums of squares below this may have lost terms that are smaller than any number. Terms of double are not that small.
template <class T>
constexpr double kVanishing = sizeof(T) == 4 ? 0x1p-100 : 0.0;

// Whether elements [begin, end) have a gap or a d whose square may be lost, in a sum that is so small.
template <bool kGrad, class T, class Element>
__attribute__((noinline)) bool has_lost(int64_t begin, int64_t end, bool gaps, bool grads, const Element& element) {
  int32_t any = 0;
  for (int64_t i = begin; i < end; ++i) {
    T w = T(0), u = T(0), d = T(0);
    element(i, w, u, d);
    any |= int32_t(gaps) & int32_t(w != u);
    if (kGrad) any |= int32_t(grads) & int32_t(d != T(0));
  }
  return any != 0;
}

// Adds elements [begin, end) one by one, in double: exact where terms are out of the range of a float, or not finite.
template <Penalty kPenalty, bool kGrad, class T, class Element>
__attribute__((noinline)) void add_slowly(Sums& sums, int64_t begin, int64_t end, T a, const Element& element) {
  constexpr T kMost = std::numeric_limits<T>::max();
  for (int64_t i = begin; i < end; ++i) {
    T w = T(0), u = T(0), d = T(0);
    element(i, w, u, d);
    const double gap = double(w) - double(u);
    sums.gap += gap * gap;
    sums.zeros += u == T(0);
    if (kGrad) {
      sums.grad += double(d) * double(d);
      sums.nonfinite += !((std::fabs(w) <= kMost) & (std::fabs(d) <= kMost));
    }
    sums.value += double(value<kPenalty>(std::fabs(u), a));
  }
}

// Adds n elements; element(i, w, u, d) gives those of place i. kGrad: d is there, and what is not finite is counted.
// Penalty::none leaves out g. Where w or d of an element is not finite, a sum is not either: w - u is NaN then.
template <Penalty kPenalty, bool kGrad, class T, class Element>
inline __attribute__((always_inline)) void add_elements(Sums& sums, int64_t n, T a, const Element& element) {
  constexpr bool kValue = kPenalty == Penalty::l1 || kPenalty == Penalty::tl1;
  for (int64_t begin = 0; begin < n; begin += kStretch) {
    const int64_t end = std::min(n, begin + kStretch);
    T gaps[kSumLanes] = {}, grads[kSumLanes] = {}, values[kSumLanes] = {};
    std::conditional_t<sizeof(T) == 8, int64_t, int32_t> zeros[kSumLanes] = {};
    const auto add = [&](int64_t i, int k) __attribute__((always_inline)) {
      T w = T(0), u = T(0), d = T(0);
      element(i + k, w, u, d);
      const T gap = w - u;
      gaps[k] += gap * gap;
      zeros[k] += u == T(0);
      if (kGrad) grads[k] += d * d;
      if (kValue) values[k] += value<kPenalty>(std::fabs(u), a);
    };
    int64_t i = begin;
    for (; i + kSumLanes <= end; i += kSumLanes)
      for (int k = 0; k < kSumLanes; ++k) add(i, k);
    for (int k = 0; k < end - i; ++k) add(i, k);
    const double gap = fold(gaps), grad = kGrad ? fold(grads) : 0, of_u = kValue ? fold(values) : 0;
    const bool small_gap = gap < kVanishing<T>, small_grad = kGrad && grad < kVanishing<T>;
    if (!(std::fabs(gap + grad + of_u) <= std::numeric_limits<double>::max()) ||
        ((small_gap || small_grad) && has_lost<kGrad, T>(begin, end, small_gap, small_grad, element))) {
      add_slowly<kPenalty, kGrad>(sums, begin, end, a, element);
      continue;
    }
    int64_t none = 0;
    for (const auto z : zeros) none += z;
    sums.zeros += none;
    sums.gap += gap;
    sums.grad += grad;
    sums.value += kPenalty == Penalty::l0 ? double(end - begin - none) : of_u;
  }
}

}  // namespace

}  // namespace rvsm::cpu
