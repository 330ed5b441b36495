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
// Elements that a step takes at a time, and how far ahead of them it asks for memory: a processor does not look beyond
// the end of a page by itself, and reads little ahead of loops with many instructions.
constexpr int64_t kPiece = 256;
constexpr int64_t kAhead = 384;

constexpr int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// Asks for n elements of an array, kAhead behind element `at`.
inline void prefetch_plane(const void* memory, Dtype dtype, int64_t at, int64_t n) {
  const char* const begin = static_cast<const char*>(memory) + (at + kAhead) * bytes_of(dtype);
  for (int64_t k = 0; k < n * bytes_of(dtype); k += 64) __builtin_prefetch(begin + k);
}

// The same of the weights, with what stands behind them. A function without an effect that the compiler knows of, whose
// calls it would leave out but for the empty statement.
[[maybe_unused]] __attribute__((noinline)) void prefetch_weights(const TensorArgs& args, int64_t at, int64_t n) {
  asm volatile("");
  prefetch_plane(args.w, args.dtype, at, n);
  if (args.precision.master != Master::none)
    prefetch_plane(args.master_state(), args.precision.master == Master::low ? Dtype::bf16 : Dtype::f32, at, n);
}

// The same of all arrays of a step.
[[maybe_unused]] __attribute__((noinline)) void prefetch_planes(const TensorArgs& args, bool reads_grad, int64_t at,
                                                                int64_t n) {
  prefetch_weights(args, at, n);
  const Precision& p = args.precision;
  if (reads_grad) prefetch_plane(args.g, p.mixed ? p.grad : args.dtype, at, n);
  for (int k = 0; k < args.states(); ++k) prefetch_plane(args.state[k], p.mixed ? p.states[k] : args.dtype, at, n);
}

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
