// Float32 weights behind half types: every bit pattern comes back. Stochastic rounding: the generator's known answers,
// and every result is a neighbour, as often as its distance says.

#include <cmath>

#include "../math/precision.h"
#include "check.h"

using namespace rvsm;

namespace {

// A sanitized build is slow: it walks over a share of the patterns.
#if defined(__SANITIZE_ADDRESS__)
constexpr uint64_t kStride = 1009;
#else
constexpr uint64_t kStride = 1;
#endif

bool is_nan(uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }

// Whether a pair is exact, and its upper half the weight rounded half away from zero.
bool pair_is_right(uint32_t bits) {
  BFloat16 high;
  int16_t low;
  split(high, low, float_of(bits));
  const uint32_t back = bits_of(join(high, low));
  if (is_nan(bits)) return back == 0x7fc00000u && high.bits == 0x7fc0u && low == 0;
  const int64_t rest = int64_t(bits & 0x7fffffffu) - (int64_t(high.bits & 0x7fffu) << 16);
  return back == bits && rest == low && (high.bits >> 15) == (bits >> 31) && rest < 0x8000 && rest >= -0x8000;
}

void pairs() {
  uint64_t wrong = 0, first = 0;
  for (uint64_t bits = 0; bits <= 0xffffffffu; bits += kStride) {
    const bool right = pair_is_right(uint32_t(bits));
    first = right || wrong > 0 ? first : bits;
    wrong += !right;
  }
  CHECK(wrong == 0, "%llu pairs are wrong, the first of %08llx", static_cast<unsigned long long>(wrong),
        static_cast<unsigned long long>(first));
}

// What stands beside a parameter after an edit by hand: never a NaN, and within half a unit in the last place.
void edited() {
  for (uint32_t b = 0; b < 65536; ++b) {
    const BFloat16 high{uint16_t(b)};
    for (const int low : {-32768, -1, 0, 1, 32767}) {
      const float w = join(high, int16_t(low));
      if (is_nan(bits_of(load(high)))) {
        CHECK(bits_of(w) == 0x7fc00000u, "the NaN %04x gives %08x", b, bits_of(w));
        continue;
      }
      const int64_t distance = int64_t(bits_of(w)) - int64_t(b << 16);
      CHECK(!std::isnan(w) && std::abs(distance) <= 0x8000 && std::signbit(w) == std::signbit(load(high)),
            "%04x beside %d gives %g", b, low, w);
      CHECK(std::isinf(load(high)) || !std::isinf(w) || distance != 0, "%04x beside %d gives %g", b, low, w);
    }
    const Float16 param{uint16_t(b)};
    const float behind = load(param) * 1.0001f;
    Float16 rounded;
    store(rounded, behind);
    const float w = join(param, behind), other = join(param, 12345.0f);
    CHECK(rounded.bits == param.bits ? bits_of(w) == bits_of(behind) : bits_of(w) == bits_of(load(param)), "%04x", b);
    CHECK(param.bits == 0x7207u || bits_of(other) == bits_of(load(param)), "%04x beside another master", b);
  }
}

void known_answers() {
  // Of the generator's authors (Random123, kat_vectors), for seven rounds.
  struct Answer {
    uint32_t counter[4], key[2], want[4];
  };
  const Answer answers[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48}},
      {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
       {0xffffffff, 0xffffffff},
       {0x5207ddc2, 0x45165e59, 0x4d8ee751, 0x8c52f662}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0x4dfccaba, 0x190a87f0, 0xc47362ba, 0xb6b5242a}},
  };
  for (const Answer& a : answers) {
    uint32_t x[4] = {a.counter[0], a.counter[1], a.counter[2], a.counter[3]}, key[2] = {a.key[0], a.key[1]};
    for (int r = 0; r < kPhiloxRounds; ++r) {
      philox_round(x[0], x[1], x[2], x[3], key[0], key[1]);
      key[0] += kPhiloxKey0;
      key[1] += kPhiloxKey1;
    }
    for (int k = 0; k < 4; ++k) CHECK(x[k] == a.want[k], "word %d is %08x, want %08x", k, x[k], a.want[k]);
  }
}

// The share of the 65,536 random numbers that round up is the distance to the lower neighbour, within half a random
// number; a number of the type stays what it is.
template <class Half>
void shares(const char* name) {
  Half largest{0};
  for (uint32_t b = 0; b < 0x7fff; ++b)
    if (std::isfinite(load(Half{uint16_t(b)})) && load(Half{uint16_t(b)}) >= load(largest)) largest.bits = uint16_t(b);
  for (uint32_t b = 0; b < largest.bits; b += 257) {
    const float low = load(Half{uint16_t(b)}), high = load(Half{uint16_t(b + 1)});
    for (const float part : {0.0f, 0.001f, 0.25f, 0.6f, 0.999f}) {
      const float w = low + part * (high - low);
      for (const float signed_w : {w, -w}) {
        int64_t up = 0;
        for (uint32_t random = 0; random < 65536; random += 7) {
          Half rounded;
          store_rounded(rounded, signed_w, random);
          const float r = std::fabs(load(rounded));
          CHECK((r == low || r == high) && std::signbit(load(rounded)) == std::signbit(signed_w), "%s %g gives %g",
                name, signed_w, load(rounded));
          up += r == high;
        }
        const double share = (double(w) - low) / (double(high) - low), got = double(up) * 7 / 65536;
        CHECK(std::fabs(got - share) < 3e-4, "%s %g is rounded up in %g of all cases, want %g", name, w, got, share);
      }
    }
  }
  // Beyond the largest number: to nearest.
  const double step = double(load(largest)) - load(Half{uint16_t(largest.bits - 1)});
  const float above[] = {load(largest), float(load(largest) + step / 4), float(load(largest) + step), INFINITY, NAN};
  for (const float w : above) {
    for (const uint32_t random : {0u, 0xffffu}) {
      Half rounded, nearest;
      store_rounded(rounded, w, random);
      store(nearest, w);
      CHECK(rounded.bits == nearest.bits, "%s %g gives %04x, want %04x", name, w, rounded.bits, nearest.bits);
    }
  }
}

}  // namespace

int main() {
  pairs();
  edited();
  known_answers();
  shares<BFloat16>("bfloat16");
  shares<Float16>("float16");
  return finish("precision", int64_t(0x100000000u / kStride));
}
