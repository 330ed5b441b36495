// N:M sparsity: of each window of m elements along dimension 1 the n of largest magnitude survive; among equal ones the
// earlier element. A NaN is above every number and always survives. Without torch, for host and device.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "numbers.h"

namespace rvsm {

// The longest window (MOST in method/windows.py).
constexpr int kMostOfWindow = 16;

// An integer of the width of T.
template <class T>
using Key = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

// Integers in the order of the magnitudes, NaN above infinity: whether subnormal numbers are flushed does not matter.
template <class T>
RVSM_HD Key<T> key_of(T x) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  Bits bits;
  std::memcpy(&bits, &x, sizeof bits);
  return Key<T>(bits & (Bits(-1) >> 1));
}

// Keys above this are NaNs.
template <class T>
constexpr Key<T> kInfinityKey = sizeof(T) == 8 ? Key<T>(0x7ff0000000000000) : Key<T>(0x7f800000);

// Whether another element of the window stands before this one in the order of survivors.
template <class K>
RVSM_HD bool stands_before(K other, K key, bool is_earlier) {
  return is_earlier ? other >= key : other > key;
}

// The windows of a dense tensor with these sizes and strides; throws std::invalid_argument where it has no whole ones.
inline Windows windows_of(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t n,
                          int32_t m) {
  if (n < 1 || n >= m || m > kMostOfWindow) throw std::invalid_argument("a pattern that no kernel has");
  if (sizes.size() < 2 || sizes[1] % m != 0)
    throw std::invalid_argument("dimension 1 is no whole number of windows of " + std::to_string(m));
  return {n, m, sizes[1] > 1 ? strides[1] : 1};
}

}  // namespace rvsm
