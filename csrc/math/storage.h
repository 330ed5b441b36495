// bfloat16 and float16 as storage: conversions to and from float in integer arithmetic, so that every compiler
// vectorises them for every instruction set. Round to nearest even; NaN stays NaN.
#pragma once

#include <cstdint>
#include <cstring>

#include "numbers.h"

namespace rvsm {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

RVSM_HD float float_of(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

RVSM_HD uint32_t bits_of(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return bits;
}

RVSM_HD float load(float x) { return x; }
RVSM_HD double load(double x) { return x; }
RVSM_HD float load(BFloat16 x) {
#if defined(__CUDA_ARCH__)
  float f;
  asm("mov.b32 %0, {0, %1};" : "=f"(f) : "h"(x.bits));
  return f;
#else
  return float_of(uint32_t(x.bits) << 16);
#endif
}

RVSM_HD float load(Float16 x) {
#if defined(__CUDA_ARCH__)
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
  return f;
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  // Exponent 31 is Inf or NaN; exponent 0 a multiple of 2^-24, made by subtracting 2^-14 from 2^-14 + magnitude, so
  // that no float32 subnormal occurs on the way (it would be lost where they are flushed).
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t special = magnitude + (224u << 23);
  const uint32_t tiny = bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
  const uint32_t r = magnitude >= (31u << 23) ? special : (magnitude < (1u << 23) ? tiny : normal);
  return float_of(r | sign);
#endif
}

RVSM_HD void store(float& to, float x) { to = x; }
RVSM_HD void store(double& to, double x) { to = x; }

RVSM_HD void store(BFloat16& to, float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  const uint32_t b = bits_of(x);
  const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  to.bits = uint16_t((b & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
#endif
}

RVSM_HD void store(Float16& to, float x) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  const uint32_t b = bits_of(x);
  const uint32_t sign = (b >> 16) & 0x8000u;
  const uint32_t magnitude = b & 0x7fffffffu;
  // Normal range: move the exponent and round the 13 bits that fall away to even.
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 1/2 lets the float unit round to multiples of 2^-24.
  const uint32_t tiny = bits_of(float_of(magnitude < (113u << 23) ? magnitude : 0u) + 0.5f) - bits_of(0.5f);
  uint32_t r = magnitude < (113u << 23) ? tiny : normal;
  r = magnitude >= 0x477ff000u ? 0x7c00u : r;  // 65520 and above round to Inf
  r = magnitude > 0x7f800000u ? 0x7e00u : r;   // NaN
  to.bits = uint16_t(r | sign);
#endif
}

// Two neighbours: on a device one conversion and one register.
template <class S, class T>
RVSM_HD void store_pair(S* to, T x, T y) {
  store(to[0], x);
  store(to[1], y);
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
RVSM_HD void store_pair(Float16* to, float x, float y) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
  std::memcpy(to, &pair, sizeof pair);
}
RVSM_HD void store_pair(BFloat16* to, float x, float y) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
  std::memcpy(to, &pair, sizeof pair);
}
#endif

// The type of the arithmetic on a storage type (torch's opmath).
template <class S>
struct OpmathOf {
  using type = float;
};
template <>
struct OpmathOf<double> {
  using type = double;
};
template <class S>
using Opmath = typename OpmathOf<S>::type;

// Calls f(S{}) with the storage type of a dtype.
template <class F>
RVSM_HD auto with_storage(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f64:
      return f(double{});
    case Dtype::bf16:
      return f(BFloat16{});
    case Dtype::f16:
      return f(Float16{});
    default:
      return f(float{});
  }
}

}  // namespace rvsm
