// Tiles of arrays on the CPU: how numbers of any storage type come into the type of the arithmetic and back. Part of
// elements.cpp, so compiled once per instruction set.
#pragma once

#include <cstring>

#include "../math/precision.h"
#include "engine.h"

namespace rvsm::cpu {

namespace {

// Storage types are converted in tiles that stay in the first-level cache.
constexpr int64_t kTile = 512;
template <class S, class T>
inline void load_tile(T* __restrict to, const S* __restrict from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = load(from[i]);
}

template <class S, class T>
inline void store_tile(S* __restrict to, const T* __restrict from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(to[i], from[i]);
}

// A tile of an array of any type with float32 arithmetic. Functions of their own: no base, method or penalty needs
// another copy of them.
__attribute__((noinline)) void load_plane(float* to, const void* from, Dtype dtype, int64_t at, int64_t n) {
  if (dtype == Dtype::bf16) return load_tile(to, static_cast<const BFloat16*>(from) + at, n);
  if (dtype == Dtype::f16) return load_tile(to, static_cast<const Float16*>(from) + at, n);
  load_tile(to, static_cast<const float*>(from) + at, n);
}

__attribute__((noinline)) void store_plane(void* to, const float* from, Dtype dtype, int64_t at, int64_t n) {
  if (dtype == Dtype::bf16) return store_tile(static_cast<BFloat16*>(to) + at, from, n);
  if (dtype == Dtype::f16) return store_tile(static_cast<Float16*>(to) + at, from, n);
  store_tile(static_cast<float*>(to) + at, from, n);
}

template <class Half, class Rest>
inline void join_tile(float* __restrict to, const Half* __restrict param, const Rest* __restrict rest, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = join(param[i], rest[i]);
}

template <class Half, class Rest>
inline void split_tile(Half* __restrict param, Rest* __restrict rest, const float* __restrict from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) split(param[i], rest[i], from[i]);
}

// Calls of Philox that an instruction or two can take together.
constexpr int kCalls = 16;
// Random bits of a tile, which may begin and end within a call.
constexpr int64_t kRandom = kTile + (kCalls + 1) * kElementsOfCall;

// The random bits of the elements of calls [first, first + calls); up to kCalls - 1 calls behind them are made too.
inline void random_tile(uint32_t* __restrict to, uint64_t first, int64_t calls, const RandomKey key) {
  for (int64_t c = 0; c < calls; c += kCalls) {
    uint32_t x0[kCalls], x1[kCalls], x2[kCalls], x3[kCalls];
    for (int k = 0; k < kCalls; ++k) {
      const uint64_t call = first + uint64_t(c) + uint64_t(k);
      x0[k] = uint32_t(call);
      x1[k] = uint32_t(call >> 32);
      x2[k] = key.step;
      x3[k] = 0;
    }
    uint32_t key0 = uint32_t(key.seed), key1 = uint32_t(key.seed >> 32);
    for (int r = 0; r < kPhiloxRounds; ++r) {
      for (int k = 0; k < kCalls; ++k) philox_round(x0[k], x1[k], x2[k], x3[k], key0, key1);
      key0 += kPhiloxKey0;
      key1 += kPhiloxKey1;
    }
    for (int k = 0; k < kCalls; ++k) {
      to[4 * (c + k)] = x0[k];
      to[4 * (c + k) + 1] = x1[k];
      to[4 * (c + k) + 2] = x2[k];
      to[4 * (c + k) + 3] = x3[k];
    }
  }
}

template <class Half>
inline void round_tile(Half* __restrict to, const float* __restrict from, const uint16_t* __restrict random,
                       int64_t n) {
  for (int64_t i = 0; i < n; ++i) store_rounded(to[i], from[i], random[i]);
}

__attribute__((noinline)) void load_weights(float* to, const TensorArgs& args, int64_t at, int64_t n) {
  if (args.precision.master == Master::low)
    return join_tile(to, static_cast<const BFloat16*>(args.w) + at,
                     static_cast<const int16_t*>(args.master_state()) + at, n);
  if (args.precision.master == Master::whole)
    return join_tile(to, static_cast<const Float16*>(args.w) + at, static_cast<const float*>(args.master_state()) + at,
                     n);
  load_plane(to, args.w, args.dtype, at, n);
}

__attribute__((noinline)) void store_weights(const TensorArgs& args, const float* from, int64_t at, int64_t n) {
  const Precision& precision = args.precision;
  if (precision.master == Master::low)
    return split_tile(static_cast<BFloat16*>(args.w) + at, static_cast<int16_t*>(args.master_state()) + at, from, n);
  if (precision.master == Master::whole)
    return split_tile(static_cast<Float16*>(args.w) + at, static_cast<float*>(args.master_state()) + at, from, n);
  if (!precision.rounds) return store_plane(args.w, from, args.dtype, at, n);
  uint32_t words[kRandom / 2];
  const int64_t skip = at % kElementsOfCall;
  random_tile(words, uint64_t(at / kElementsOfCall), ceil_div(skip + n, kElementsOfCall), precision.random);
  uint16_t random[kRandom];
  std::memcpy(random, words, sizeof random);
  if (args.dtype == Dtype::bf16)
    round_tile(static_cast<BFloat16*>(args.w) + at, from, random + skip, n);
  else
    round_tile(static_cast<Float16*>(args.w) + at, from, random + skip, n);
}

// The tile of an array: its own memory where that is float32, else `tile`.
inline float* tile_of(void* memory, Dtype dtype, int64_t at, float* tile) {
  return dtype == Dtype::f32 ? static_cast<float*>(memory) + at : tile;
}

}  // namespace

}  // namespace rvsm::cpu
