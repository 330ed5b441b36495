// Random bits of a tile on the CPU. Part of elements.cpp, so compiled once per instruction set; the same bits in each.
#pragma once

#include <cstring>

#include "../math/precision.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rvsm::cpu {

namespace {

// Vectors of 64-bit lanes that hold 32 bits each: the product of two lanes is one instruction then, and what stands in
// the upper half of a factor does not matter.
#if defined(__AVX512F__)
using Words = uint64_t __attribute__((vector_size(64)));
inline Words product(Words a, Words b) { return (Words)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
using Words = uint64_t __attribute__((vector_size(32)));
inline Words product(Words a, Words b) { return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
#elif defined(__x86_64__)
using Words = uint64_t __attribute__((vector_size(16)));
inline Words product(Words a, Words b) { return (Words)_mm_mul_epu32((__m128i)a, (__m128i)b); }
#else
using Words = uint64_t __attribute__((vector_size(16)));
inline Words product(Words a, Words b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
#endif

constexpr int kWords = sizeof(Words) / 8;
// Vectors that hide each other's latency.
constexpr int kVectors = kWords == 8 ? 4 : 2;
// Calls that are made together.
constexpr int kCalls = kWords * kVectors;

// The random bits of the elements of calls [first, first + calls), 16 bytes a call, in the order of memory; up to
// kCalls - 1 calls behind them are made too.
inline void random_bits(char* to, uint64_t first, int64_t calls, const RandomKey key) {
  Words lanes, zero{};
  for (int k = 0; k < kWords; ++k) lanes[k] = uint64_t(k);
  const Words low = zero + 0xffffffffu, factor0 = zero + kPhiloxFactor0, factor1 = zero + kPhiloxFactor1;
  for (int64_t c = 0; c < calls; c += kCalls) {
    Words x0[kVectors], x1[kVectors], x2[kVectors], x3[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const Words call = lanes + (first + uint64_t(c) + uint64_t(v * kWords));
      x0[v] = call & low;
      x1[v] = call >> 32;
      x2[v] = zero + key.step;
      x3[v] = zero;
    }
    uint32_t key0 = uint32_t(key.seed), key1 = uint32_t(key.seed >> 32);
#pragma GCC unroll 1
    for (int r = 0; r < kPhiloxRounds; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const Words a = product(x0[v], factor0), b = product(x2[v], factor1);
        x0[v] = (b >> 32) ^ x1[v] ^ (zero + key0);
        x1[v] = b;
        x2[v] = (a >> 32) ^ x3[v] ^ (zero + key1);
        x3[v] = a;
      }
      key0 += kPhiloxKey0;
      key1 += kPhiloxKey1;
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Words p = (x0[v] & low) | (x1[v] << 32), q = (x2[v] & low) | (x3[v] << 32);
      char* const here = to + 16 * (c + v * kWords);
#if defined(__AVX512F__)
      const Words a = __builtin_shuffle(p, q, Words{0, 8, 1, 9, 2, 10, 3, 11});
      const Words b = __builtin_shuffle(p, q, Words{4, 12, 5, 13, 6, 14, 7, 15});
      std::memcpy(here, &a, sizeof a);
      std::memcpy(here + sizeof a, &b, sizeof b);
#else
      for (int k = 0; k < kWords; ++k) {
        const uint64_t pair[2] = {p[k], q[k]};
        std::memcpy(here + 16 * k, pair, sizeof pair);
      }
#endif
    }
  }
}

}  // namespace

}  // namespace rvsm::cpu
