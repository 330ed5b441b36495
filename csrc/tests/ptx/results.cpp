// What an instruction computes from its operands.

#include <algorithm>
#include <cmath>

#include "machine.h"

namespace rvsm::ptx {

namespace {

template <class T>
bool holds(Comparison c, T a, T b) {
  switch (c) {
    case Comparison::equal:
      return a == b;
    case Comparison::not_equal:
      return a < b || a > b;
    case Comparison::less:
      return a < b;
    case Comparison::less_equal:
      return a <= b;
    case Comparison::greater:
      return a > b;
    case Comparison::greater_equal:
      return a >= b;
    case Comparison::equal_or_nan:
      return !(a < b || a > b);
    case Comparison::not_equal_or_nan:
      return a != b;
    case Comparison::less_or_nan:
      return !(a >= b);
    case Comparison::less_equal_or_nan:
      return !(a > b);
    case Comparison::greater_or_nan:
      return !(a <= b);
    case Comparison::greater_equal_or_nan:
      return !(a < b);
    default:
      return a != a || b != b;
  }
}

}  // namespace

// a + b or a - b; where ptxas may contract the product p q into it, perhaps so.
template <class T>
T Machine::sum(const Instruction& x, T a, T b, T p, T q) const {
  const bool minus = x.op == Op::subtract_f32 || x.op == Op::subtract_f64;
  const bool contracted =
      x.product >= 0 && (mode.contraction == Mode::always ||
                         (mode.contraction == Mode::some && (mix(mode.seed ^ uint64_t(x.line) << 20) & 1) != 0));
  if (!contracted) return minus ? a - b : a + b;
  return x.product == 0 ? std::fma(p, q, minus ? -b : b) : std::fma(minus ? -p : p, q, a);
}

// Of integers; a division without a result is reported, and gives 0.
uint64_t Machine::quotient(const Instruction& x, uint64_t a, uint64_t b, int index, int thread) {
  const bool remainder = x.op == Op::remainder_signed || x.op == Op::remainder_unsigned;
  if (x.op == Op::divide_signed || x.op == Op::remainder_signed) {
    const int64_t u = sign_extended(a, x.bits), v = sign_extended(b, x.bits);
    if (v == 0 || (v == -1 && u == sign_extended(uint64_t(1) << (x.bits - 1), x.bits))) {
      report("division", index, thread, "an integer division by zero, or one that overflows");
      return 0;
    }
    return low_bits(uint64_t(remainder ? u % v : u / v), x.bits);
  }
  const uint64_t u = low_bits(a, x.bits), v = low_bits(b, x.bits);
  if (v == 0) {
    report("division", index, thread, "an integer division by zero");
    return 0;
  }
  return remainder ? u % v : u / v;
}

// Towards zero, within the range; NaN is 0.
static uint64_t to_s32(double x) {
  if (x != x) return 0;
  return uint32_t(int32_t(std::clamp(std::trunc(x), -2147483648.0, 2147483647.0)));
}

uint64_t Machine::result_of(const Instruction& x, const uint64_t* registers, int index, int thread) {
  const uint64_t a = x.operands > 0 ? registers[x.operand[0]] : 0, b = x.operands > 1 ? registers[x.operand[1]] : 0,
                 c = x.operands > 2 ? registers[x.operand[2]] : 0;
  const int bits = x.bits;
  const auto is = [&](uint64_t y) { return sign_extended(y, bits); };
  const auto iu = [&](uint64_t y) { return low_bits(y, bits); };
  const auto f = [](uint64_t y) { return as_float(y); };
  const auto d = [](uint64_t y) { return as_double(y); };
  const auto factor = [&](int i) { return x.product < 0 ? 0 : registers[x.factor[i]]; };
  const uint32_t shift = uint32_t(b);
  constexpr uint64_t kSign32 = uint64_t(1) << 31, kSign64 = uint64_t(1) << 63;
  switch (x.op) {
    case Op::move:
      return iu(a);
    case Op::thread_index:
      return uint64_t(thread);
    case Op::block_index:
      return block_;
    case Op::pack:
      return low_bits(a, bits / 2) | low_bits(b, bits / 2) << (bits / 2);
    case Op::select:
      return iu(c != 0 ? a : b);

    case Op::add:
      return iu(a + b);
    case Op::subtract:
      return iu(a - b);
    case Op::multiply_low:
      return iu(a * b);
    case Op::multiply_wide_signed:
      return low_bits(uint64_t(is(a) * is(b)), 2 * bits);
    case Op::multiply_wide_unsigned:
      return low_bits(iu(a) * iu(b), 2 * bits);
    case Op::multiply_high_signed:
      return iu(uint64_t(__int128(is(a)) * is(b) >> bits));
    case Op::multiply_high_unsigned:
      return iu(uint64_t(__extension__(unsigned __int128)(iu(a)) * iu(b) >> bits));
    case Op::multiply_add_low:
      return iu(a * b + c);
    case Op::divide_signed:
    case Op::divide_unsigned:
    case Op::remainder_signed:
    case Op::remainder_unsigned:
      return quotient(x, a, b, index, thread);
    case Op::negate:
      return iu(0 - a);
    case Op::absolute:
      return iu(is(a) < 0 ? 0 - a : a);
    case Op::minimum_signed:
      return iu(uint64_t(std::min(is(a), is(b))));
    case Op::minimum_unsigned:
      return std::min(iu(a), iu(b));
    case Op::maximum_signed:
      return iu(uint64_t(std::max(is(a), is(b))));
    case Op::maximum_unsigned:
      return std::max(iu(a), iu(b));
    case Op::bits_and:
      return iu(a & b);
    case Op::bits_or:
      return iu(a | b);
    case Op::bits_xor:
      return iu(a ^ b);
    case Op::bits_not:
      return iu(~a);
    case Op::shift_left:
      return shift >= uint32_t(bits) ? 0 : iu(a << shift);
    case Op::shift_right_unsigned:
      return shift >= uint32_t(bits) ? 0 : iu(a) >> shift;
    case Op::shift_right_signed:
      return iu(uint64_t(is(a) >> std::min(shift, uint32_t(bits - 1))));
    case Op::bit_field: {
      const int from = int(b & 255), length = int(c & 255);
      return from >= bits ? 0 : low_bits(iu(a) >> from, std::min(length, bits));
    }

    case Op::insert_bits: {
      const int from = int(c & 255), length = int(registers[x.operand[3]] & 255);
      const uint64_t inserted = from >= bits ? 0 : iu(low_bits(~uint64_t(0), length) << from);
      return (iu(b) & ~inserted) | (from >= bits ? 0 : a << from & inserted);
    }
    case Op::permute_bytes: {
      // The bytes of b stand above those of a; a selector's upper bit asks for copies of the byte's sign.
      const uint64_t bytes = low_bits(b, 32) << 32 | low_bits(a, 32);
      uint64_t made = 0;
      for (int k = 0; k < 4; ++k) {
        const uint64_t byte = bytes >> (c >> 4 * k & 7) * 8 & 255;
        made |= ((c >> 4 * k & 8) == 0 ? byte : byte >> 7 != 0 ? 255 : 0) << 8 * k;
      }
      return made;
    }

    case Op::add_f32:
    case Op::subtract_f32:
      return as_bits(sum(x, f(a), f(b), f(factor(0)), f(factor(1))));
    case Op::multiply_f32:
      return as_bits(f(a) * f(b));
    case Op::multiply_add_f32:
      return as_bits(std::fma(f(a), f(b), f(c)));
    case Op::multiply_add_saturated_f32:  // NaN becomes 0
      return as_bits(std::fmin(std::fmax(std::fma(f(a), f(b), f(c)), 0.0f), 1.0f));
    case Op::divide_approx_f32:
      return as_bits(approximation(double(f(a)) / double(f(b)), 2, false, mode, a << 32 ^ b));
    case Op::divide_f32:
      return as_bits(f(a) / f(b));
    case Op::reciprocal_approx_f32:
      return as_bits(approximation(1.0 / double(f(a)), 1, false, mode, a ^ 0x51));
    case Op::reciprocal_approx_flushed_f32:
      return as_bits(flushed(approximation(1.0 / double(flushed(f(a))), 1, false, mode, a ^ 0x51)));
    case Op::reciprocal_f32:
      return as_bits(1.0f / f(a));
    case Op::root_approx_f32:
      return as_bits(approximation(std::sqrt(double(f(a))), 1, true, mode, a ^ 0x77));
    case Op::root_approx_flushed_f32:
      return as_bits(flushed(approximation(std::sqrt(double(flushed(f(a)))), 1, true, mode, a ^ 0x77)));
    case Op::root_f32:
      return as_bits(std::sqrt(f(a)));
    case Op::absolute_f32:
      return low_bits(a, 32) & ~kSign32;
    case Op::negate_f32:
      return low_bits(a, 32) ^ kSign32;
    case Op::copy_sign_f32:
      return (low_bits(b, 32) & ~kSign32) | (a & kSign32);
    case Op::minimum_f32:
      return as_bits(std::fmin(f(a), f(b)));
    case Op::maximum_f32:
      return as_bits(std::fmax(f(a), f(b)));

    case Op::add_f64:
    case Op::subtract_f64:
      return as_bits(sum(x, d(a), d(b), d(factor(0)), d(factor(1))));
    case Op::multiply_f64:
      return as_bits(d(a) * d(b));
    case Op::multiply_add_f64:
      return as_bits(std::fma(d(a), d(b), d(c)));
    case Op::divide_f64:
      return as_bits(d(a) / d(b));
    case Op::reciprocal_f64:
      return as_bits(1.0 / d(a));
    case Op::root_f64:
      return as_bits(std::sqrt(d(a)));
    case Op::absolute_f64:
      return a & ~kSign64;
    case Op::negate_f64:
      return a ^ kSign64;
    case Op::copy_sign_f64:
      return (b & ~kSign64) | (a & kSign64);
    case Op::minimum_f64:
      return as_bits(std::fmin(d(a), d(b)));
    case Op::maximum_f64:
      return as_bits(std::fmax(d(a), d(b)));

    case Op::compare_integers:
      return x.is_signed ? holds(x.comparison, is(a), is(b)) : holds(x.comparison, iu(a), iu(b));
    case Op::compare_f32:
      return holds(x.comparison, f(a), f(b));
    case Op::compare_f64:
      return holds(x.comparison, d(a), d(b));
    case Op::integer_to_integer:
      return iu(x.is_signed ? uint64_t(sign_extended(a, x.source_bits)) : low_bits(a, x.source_bits));
    case Op::f16_to_f32:
      return as_bits(half_to_float(uint16_t(a)));
    case Op::f32_to_u32:
      return uint64_t(std::clamp(std::trunc(double(f(a))), 0.0, 4294967295.0));
    case Op::f32_to_s32:
      return to_s32(double(f(a)));
    case Op::f64_to_s32:
      return to_s32(d(a));
    case Op::s32_to_f32:
      return as_bits(float(int32_t(uint32_t(a))));
    case Op::s32_to_f64:
      return as_bits(double(int32_t(uint32_t(a))));
    case Op::f32_to_f64:
      return as_bits(double(f(a)));
    case Op::f64_to_f32:
      return as_bits(float(d(a)));
    case Op::f32_to_bf16:
      return float_to_bf16(f(a));
    case Op::f32_pair_to_bf16:
      return uint64_t(float_to_bf16(f(a))) << 16 | float_to_bf16(f(b));
    case Op::f32_to_f16:
      return float_to_half(f(a));
    case Op::f32_pair_to_f16:
      return uint64_t(float_to_half(f(a))) << 16 | float_to_half(f(b));
    default:  // the rest is done by Machine::run
      std::abort();
  }
}

}  // namespace rvsm::ptx
