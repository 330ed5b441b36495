// Tiles of arrays on the CPU: how numbers of any storage type come into the type of the arithmetic and back. Part of
// elements.cpp, so compiled once per instruction set.
#pragma once

#include "../math/precision.h"
#include "engine.h"
#include "philox.h"

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

// Elements whose random bits are made for a tile, which may begin and end within a call.
constexpr int64_t kRandom = kTile + (kCalls + 1) * kElementsOfCall;

template <class Half>
inline void round_tile(Half* __restrict to, const float* __restrict from, const uint16_t* __restrict random,
                       int64_t n) {
  for (int64_t i = 0; i < n; ++i) store_rounded(to[i], from[i], random[i]);
}

[[maybe_unused]] __attribute__((noinline)) void load_weights(float* to, const TensorArgs& args, int64_t at, int64_t n) {
  if (args.precision.master == Master::low)
    return join_tile(to, static_cast<const BFloat16*>(args.w) + at,
                     static_cast<const int16_t*>(args.master_state()) + at, n);
  if (args.precision.master == Master::whole)
    return join_tile(to, static_cast<const Float16*>(args.w) + at, static_cast<const float*>(args.master_state()) + at,
                     n);
  load_plane(to, args.w, args.dtype, at, n);
}

[[maybe_unused]] __attribute__((noinline)) void store_weights(const TensorArgs& args, const float* from, int64_t at,
                                                              int64_t n) {
  const Precision& precision = args.precision;
  if (precision.master == Master::low)
    return split_tile(static_cast<BFloat16*>(args.w) + at, static_cast<int16_t*>(args.master_state()) + at, from, n);
  if (precision.master == Master::whole)
    return split_tile(static_cast<Float16*>(args.w) + at, static_cast<float*>(args.master_state()) + at, from, n);
  if (!precision.rounds) return store_plane(args.w, from, args.dtype, at, n);
  uint16_t random[kRandom];
  const int64_t skip = at % kElementsOfCall;
  random_bits(reinterpret_cast<char*>(random), uint64_t(at / kElementsOfCall), ceil_div(skip + n, kElementsOfCall),
              precision.random);
  if (args.dtype == Dtype::bf16)
    round_tile(static_cast<BFloat16*>(args.w) + at, from, random + skip, n);
  else
    round_tile(static_cast<Float16*>(args.w) + at, from, random + skip, n);
}

// Stands for the storage type of a tensor whose arrays have the types of TensorArgs::precision, found out tile by tile.
struct Mixed {};

// The tile of an array: its own memory where that is float32, else `tile`.
inline float* tile_of(void* memory, Dtype dtype, int64_t at, float* tile) {
  return dtype == Dtype::f32 ? static_cast<float*>(memory) + at : tile;
}

}  // namespace

}  // namespace rvsm::cpu
