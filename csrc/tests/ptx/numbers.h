// The arithmetic of a thread: bits and numbers, rounding to half types, and the freedom that the hardware has.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace rvsm::ptx {

// ---- bits of a register ---------------------------------------------------------------------------------------------

inline float as_float(uint64_t bits) {
  const uint32_t low = uint32_t(bits);
  float x;
  std::memcpy(&x, &low, sizeof x);
  return x;
}

inline double as_double(uint64_t bits) {
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint64_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline uint64_t as_bits(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline uint64_t low_bits(uint64_t x, int bits) { return bits >= 64 ? x : x & ((uint64_t(1) << bits) - 1); }

inline int64_t sign_extended(uint64_t x, int bits) {
  return bits >= 64 ? int64_t(x) : int64_t(x << (64 - bits)) >> (64 - bits);
}

inline uint64_t mix(uint64_t x) {
  x ^= x >> 31;
  x *= 0x9e3779b97f4a7c15u;
  x ^= x >> 29;
  x *= 0xbf58476d1ce4e5b9u;
  return x ^ x >> 32;
}

// ---- half types -----------------------------------------------------------------------------------------------------

// Written apart from half.h, whose conversions the host's kernels use: by arithmetic in double precision.
inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  double magnitude = std::ldexp(1024.0 + mantissa, exponent - 25);
  if (exponent == 0) magnitude = std::ldexp(double(mantissa), -24);
  if (exponent == 31) magnitude = mantissa != 0 ? std::nan("") : double(INFINITY);
  return float(bits & 0x8000 ? -magnitude : magnitude);
}

// To nearest, ties to even.
inline uint16_t float_to_half(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double magnitude = std::fabs(double(x));
  if (magnitude >= 65520.0) return uint16_t(sign | 0x7c00);
  int exponent;
  std::frexp(magnitude, &exponent);
  const int unit = std::max(exponent - 11, -24);  // the result is a multiple of 2^unit
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(magnitude, -unit)), unit);
  if (rounded < std::ldexp(1.0, -14)) return uint16_t(sign | uint16_t(std::ldexp(rounded, 24)));
  const double mantissa = std::frexp(rounded, &exponent);
  return uint16_t(sign | ((exponent + 14) << 10) | (uint16_t(std::ldexp(mantissa, 11)) & 1023));
}

inline uint16_t float_to_bf16(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint32_t bits = uint32_t(as_bits(x)), lost = bits & 0xffff, kept = bits >> 16;
  const bool up = lost > 0x8000 || (lost == 0x8000 && (kept & 1) != 0);
  return uint16_t(kept + up);
}

// ---- what the hardware and ptxas may do in more than one way
// ---------------------------------------------------------

struct Mode {
  enum Order { forward, reverse, shuffled, interleaved };
  enum Approximation { exact, largest, smallest, any };
  enum Contraction { never, always, some };

  Order order = forward;                // of the threads of a block between two barriers, and of the blocks
  Approximation approximation = exact;  // within the documented error
  Contraction contraction = never;      // of a product without a rounding modifier into a sum
  uint64_t seed = 1;
};

// A subnormal number becomes 0 of its sign.
inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// What an approximation with an error of `ulps` units may return for the real number `exact`: the nearest float, the
// largest, the smallest, or one of them by a hash of the operands, so that the same operands give the same result.
// `relative`: a unit is 2^-23 times the number; else that of the last place.
inline float approximation(double exact, double ulps, bool relative, const Mode& mode, uint64_t operands) {
  const float nearest = float(exact);
  if (mode.approximation == Mode::exact || !std::isfinite(nearest) || nearest == 0) return nearest;
  int exponent;
  std::frexp(exact, &exponent);
  const double unit = relative ? std::ldexp(std::fabs(exact), -23) : std::ldexp(1.0, std::max(exponent - 24, -149));
  const auto farthest = [&](float direction) {
    float best = nearest;
    while (true) {
      const float next = std::nextafter(best, direction);
      if (!std::isfinite(next) || std::fabs(double(next) - exact) > ulps * unit) return best;
      best = next;
    }
  };
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  if (mode.approximation == Mode::largest) return farthest(kInfinity);
  if (mode.approximation == Mode::smallest) return farthest(-kInfinity);
  switch (mix(operands ^ mode.seed * 77) % 3) {
    case 0:
      return nearest;
    case 1:
      return farthest(kInfinity);
    default:
      return farthest(-kInfinity);
  }
}

}  // namespace rvsm::ptx
