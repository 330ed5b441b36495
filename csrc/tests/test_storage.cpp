// bfloat16 and float16: every stored value, and every rounding boundary between neighbours.

#include <cmath>

#include "../math/storage.h"
#include "check.h"

using namespace rvsm;

namespace {

// The value of a 16-bit pattern by the definition of the format.
double value(uint16_t bits, int exponent_bits, int fraction_bits) {
  const int sign = bits >> 15, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const int fraction = bits & ((1 << fraction_bits) - 1);
  double v;
  if (exponent == (1 << exponent_bits) - 1)
    v = fraction != 0 ? NAN : INFINITY;
  else if (exponent == 0)
    v = std::ldexp(fraction, 1 - bias - fraction_bits);
  else
    v = std::ldexp((1 << fraction_bits) + fraction, exponent - bias - fraction_bits);
  return sign ? -v : v;
}

template <class S>
void all(const char* name, int exponent_bits, int fraction_bits) {
  for (uint32_t b = 0; b < 65536; ++b) {
    const double v = value(uint16_t(b), exponent_bits, fraction_bits);
    const float got = load(S{uint16_t(b)});
    S back;
    store(back, got);
    if (std::isnan(v)) {
      CHECK(std::isnan(got) && std::isnan(load(back)), "%s %04x", name, b);
      continue;
    }
    CHECK(got == float(v) && std::signbit(got) == std::signbit(v), "%s %04x is %g, want %g", name, b, got, v);
    CHECK(back.bits == b, "%s %04x comes back as %04x", name, b, back.bits);
    // Halfway to the next one goes to the even pattern, just beside it to the nearer. Beyond the largest, the next one
    // is the Inf that stands one pattern further.
    if ((b & 0x7fff) >= ((1u << (exponent_bits + fraction_bits)) - (1u << fraction_bits))) continue;
    const bool last = std::isinf(value(uint16_t(b + 1), exponent_bits, fraction_bits));
    const double step = last ? v - value(uint16_t(b - 1), exponent_bits, fraction_bits)
                             : value(uint16_t(b + 1), exponent_bits, fraction_bits) - v;
    const float half = float(v + step / 2);
    if (double(half) != v + step / 2) continue;  // below float's own subnormals
    const uint32_t even = b % 2 == 0 ? b : b + 1;
    store(back, half);
    CHECK(back.bits == even, "%s halfway above %04x gives %04x", name, b, back.bits);
    const float beyond = std::nextafter(half, v < 0 || (b >> 15) ? -INFINITY : INFINITY);
    store(back, beyond);
    CHECK(back.bits == b + 1, "%s above halfway of %04x gives %04x", name, b, back.bits);
    store(back, std::nextafter(half, 0.0f));
    CHECK(back.bits == b, "%s below halfway of %04x gives %04x", name, b, back.bits);
  }
}

}  // namespace

int main() {
  all<Float16>("float16", 5, 10);
  all<BFloat16>("bfloat16", 8, 7);
  return finish("storage", 2 * 65536);
}
