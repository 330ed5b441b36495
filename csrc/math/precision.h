// Half types that learn: float32 weights behind a half-type parameter, and stochastic rounding. The twin of
// method/precision.py, bit for bit. Without torch, for host and device; integer arithmetic that vectorises.
#pragma once

#include <cmath>

#include "storage.h"

namespace rvsm {

// What stands behind a half-type parameter: nothing, the rest of its bits (bfloat16), or the whole weight (float16).
enum class Master : uint8_t { none, low, whole };

// ---- the weights behind a parameter ---------------------------------------------------------------------------------

// What the master says is taken only as far as the parameter rounds to it, so that an edit of the parameter counts: a
// magnitude of 0 or of infinity has nothing on its far side. The bits of a float are a sign above a magnitude, and no
// other sum changes the sign.
RVSM_HD float join(BFloat16 high, int16_t low) {
  const uint32_t magnitude = high.bits & 0x7fffu;
  int32_t rest = low;
  rest = magnitude == 0 && rest < 0 ? 0 : rest;
  rest = magnitude == 0x7f80u && rest > 0 ? 0 : rest;
  return float_of((uint32_t(high.bits) << 16) + uint32_t(rest));
}

RVSM_HD float join(Float16 param, float master) {
  Float16 rounded;
  store(rounded, master);
  return rounded.bits == param.bits ? master : load(param);
}

// The parameter is w rounded half away from zero, so that the lower 16 bits, as a signed number, are what it is off by,
// and the pair is exact. A NaN becomes the canonical one: a carry cannot make an infinity or a zero of it.
RVSM_HD void split(BFloat16& high, int16_t& low, float w) {
  const uint32_t bits = (bits_of(w) & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : bits_of(w);
  high.bits = uint16_t((bits + 0x8000u) >> 16);
  low = int16_t(uint16_t(bits));
}

RVSM_HD void split(Float16& param, float& master, float w) {
  store(param, w);
  master = w;
}

// ---- stochastic rounding
// ---------------------------------------------------------------------------------------------

// `random`: 16 random bits. What is above the largest number of the type is rounded to nearest.
RVSM_HD void store_rounded(BFloat16& to, float w, uint32_t random) {
  const uint32_t magnitude = bits_of(w) & 0x7fffffffu;
  const uint32_t bits = magnitude > 0x7f800000u ? 0x7fc00000u : bits_of(w);
  const uint32_t added = magnitude > 0x7f7f0000u ? 0x8000u : random;  // the sign stands above the carry
  to.bits = uint16_t((bits + added) >> 16);
}

RVSM_HD void store_rounded(Float16& to, float w, uint32_t random) {
  const uint32_t bits = bits_of(w), magnitude = bits & 0x7fffffffu;
  // Selected by masks: compilers make branches of comparisons here, and the loop is not vectorised then.
  const uint32_t is_tiny = uint32_t(int32_t(magnitude - (113u << 23)) >> 31);
  const uint32_t in_range = uint32_t(int32_t(magnitude - 0x477fe001u) >> 31);
  const uint32_t is_finite = uint32_t(int32_t(magnitude - 0x477ff000u) >> 31);
  const uint32_t is_nan = uint32_t(int32_t(0x7f800000u - magnitude) >> 31);
  const uint32_t normal = (magnitude - (112u << 23) + (random >> 3)) >> 13;
  // Below 2^-14: multiples of the smallest number, 2^-24. The product is exact, and so is the fraction.
  const float scaled = float_of(magnitude & is_tiny) * 16777216.0f;
  const int32_t whole = int32_t(scaled);
  const float fraction = (scaled - float(whole)) * 65536.0f;
  // Up where the random number is below the fraction: where the difference has a sign.
  const uint32_t tiny = uint32_t(whole) + (bits_of(float(int32_t(random)) + 0.5f - fraction) >> 31);
  const uint32_t below = (tiny & is_tiny) | (normal & ~is_tiny);
  const uint32_t above = (0x7bffu & is_finite) | (0x7c00u & ~is_finite) | (0x0200u & is_nan);
  to.bits = uint16_t((below & in_range) | (above & ~in_range) | (bits >> 16 & 0x8000u));
}

// The key and the part of the counter that all elements of a step share.
struct RandomKey {
  uint64_t seed = 0;
  uint32_t step = 0;
};

// Philox4x32-7 (Salmon et al., SC 2011): seven rounds are the fewest that pass the tests of that paper.
constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhiloxFactor0 = 0xd2511f53u, kPhiloxFactor1 = 0xcd9e8d57u;
constexpr uint32_t kPhiloxKey0 = 0x9e3779b9u, kPhiloxKey1 = 0xbb67ae85u;

// One round.
RVSM_HD void philox_round(uint32_t& x0, uint32_t& x1, uint32_t& x2, uint32_t& x3, uint32_t key0, uint32_t key1) {
  const uint64_t a = uint64_t(x0) * kPhiloxFactor0, b = uint64_t(x2) * kPhiloxFactor1;
  x0 = uint32_t(b >> 32) ^ x1 ^ key0;
  x1 = uint32_t(b);
  x2 = uint32_t(a >> 32) ^ x3 ^ key1;
  x3 = uint32_t(a);
}

// A call gives 128 bits: 16 for each of eight elements.
constexpr int kElementsOfCall = 8;

}  // namespace rvsm
