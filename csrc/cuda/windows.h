// N:M sparsity where the elements of a window are not in one vector of a thread: a launch before the step finds out
// which elements survive, for weights of any type and layout. For host and device, like elements.h.
#pragma once

#include "general.h"

namespace rvsm::cuda {

// One tensor.
struct WindowEntry {
  const void* w;
  const void* rest;  // of the weights, where they have a master
  const void* dual;  // what is added to the weights, or null
  uint8_t* bits;     // bit i % 8 of byte i / 8: whether element i survives
  int64_t numel;
  int64_t inner;   // as in Windows
  uint32_t first;  // its first block
  uint8_t keep, window;
  uint8_t weight_type, dual_type;  // Dtype
  uint8_t master;                  // Master
};

struct WindowTable {
  uint32_t entries = 0;
  uint32_t blocks = 0;
  WindowEntry at[500];
};
static_assert(sizeof(WindowTable) <= 32764);

// Elements of a thread, whose bits are a byte, and of a block.
constexpr int kOfByte = 8;
constexpr int64_t kWindowChunk = int64_t(kThreads) * kOfByte;

// The key of what a method thresholds of element i.
template <class T>
RVSM_HD Key<T> window_key(const WindowEntry& e, int64_t i) {
  T v[1], dual[1];
  load_weights<1>(v, e.w, e.rest, e.weight_type, e.master, i);
  if (e.dual != nullptr) {
    load_array<1>(dual, e.dual, e.dual_type, i);
    v[0] = thresholded<Method::admm>(v[0], dual[0]);
  }
  return key_of(v[0]);
}

// The bits of the elements from `at` on.
template <class T>
RVSM_HD uint8_t bits_of_windows(const WindowEntry& e, int64_t at) {
  const int64_t row = at / e.inner;
  int64_t column = at - row * e.inner;
  int place = int(row % e.window);  // in the window
  uint32_t bits = 0;
  RVSM_NO_UNROLL
  for (int b = 0; b < kOfByte && at + b < e.numel; ++b) {
    const Key<T> key = window_key<T>(e, at + b);
    int before = 0;
    RVSM_NO_UNROLL
    for (int j = 0; j < e.window; ++j)
      if (j != place) before += int(stands_before(window_key<T>(e, at + b + (j - place) * e.inner), key, j < place));
    bits |= uint32_t(before < e.keep || key > kInfinityKey<T>) << b;
    if (++column == e.inner) {
      column = 0;
      place = place + 1 == e.window ? 0 : place + 1;
    }
  }
  return uint8_t(bits);
}

// One thread of one block.
RVSM_HD void window_thread(const WindowTable& t, uint32_t block, int thread) {
  const WindowEntry& e = t.at[find(t.at, int(t.entries), block)];
  const int64_t at = int64_t(block - e.first) * kWindowChunk + int64_t(thread) * kOfByte;
  if (at >= e.numel) return;
  e.bits[at / kOfByte] =
      e.weight_type == uint8_t(Dtype::f64) ? bits_of_windows<double>(e, at) : bits_of_windows<float>(e, at);
}

}  // namespace rvsm::cuda
