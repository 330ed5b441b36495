// Counts and collections of magnitudes for a selection. Compiled once per instruction set, with RVSM_ISA naming it.
// Integers only: every instruction set gives the same.

#include <algorithm>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "isa.h"
#include "selection.h"
#include "weights.h"

namespace rvsm::cpu {

namespace {

// Magnitudes that are made at a time; they stay in the first-level cache.
constexpr int64_t kTile = 128;
// Places of memory that are read in turns, and how far ahead of each: a processor that reads one place alone waits for
// half of the time, and it does not look beyond the end of a page by itself.
constexpr int64_t kStreams = 4;
constexpr int64_t kAhead = 512;
// Magnitudes that are counted together before those inside are looked for.
constexpr int64_t kPiece = 64;
// What a vector may write behind the last magnitude that it collects.
constexpr int64_t kSlack = 64;

// Magnitudes are compared as signed integers, which every instruction set can; the sign is free.
template <class S>
using Magnitude = std::conditional_t<std::is_same_v<Opmath<S>, double>, int64_t, int32_t>;

// The same for reading memory that holds floating-point numbers.
template <class M>
struct Aliased;
template <>
struct Aliased<int32_t> {
  typedef int32_t __attribute__((may_alias)) type;
};
template <>
struct Aliased<int64_t> {
  typedef int64_t __attribute__((may_alias)) type;
};

template <class M>
constexpr M kNoSign = std::is_same_v<M, int32_t> ? M(0x7fffffff) : M(0x7fffffffffffffff);

template <class Source>
inline void load_tile(Magnitude<typename Source::S>* __restrict to, const Source from, int64_t n) {
  using M = Magnitude<typename Source::S>;
  for (int64_t i = 0; i < n; ++i) {
    const auto value = from.value(i);
    M bits;
    std::memcpy(&bits, &value, sizeof bits);
    to[i] = bits & kNoSign<M>;
  }
}

// Calls f(bits, n) for tiles of magnitudes, which may still have a sign, until it returns false.
template <class F>
bool for_tiles(const TensorArgs& args, int64_t at, int64_t n, const F& f) {
  return with_thresholded(args, [&](const auto source) {
    using Source = std::decay_t<decltype(source)>;
    using M = Magnitude<typename Source::S>;
    const int64_t length = ceil_div(ceil_div(n, kTile), kStreams) * kTile;
    for (int64_t k = 0; k < length * kStreams / kTile; ++k) {
      const int64_t offset = k % kStreams * length + k / kStreams * kTile;
      if (offset >= n) continue;
      const int64_t i = at + offset, m = std::min(kTile, n - offset);
      prefetch(source + i + kAhead, kTile);
      if constexpr (std::is_same_v<Source, Weights<float>> || std::is_same_v<Source, Weights<double>>) {
        if (!f(reinterpret_cast<const typename Aliased<M>::type*>(source.w + i), m)) return false;
      } else {
        alignas(64) M tile[kTile];
        load_tile(tile, source + i, m);
        if (!f(static_cast<const M*>(tile), m)) return false;
      }
    }
    return true;
  });
}

#if defined(__AVX512F__)

// A vector of magnitudes and its comparisons.
template <class M>
struct Vector;

template <>
struct Vector<int32_t> {
  static constexpr int64_t kWidth = 16;
  using Mask = __mmask16;
  __m512i x;
  explicit Vector(int32_t all) : x(_mm512_set1_epi32(all)) {}
  Vector(const void* from, Mask lanes) : x(_mm512_maskz_loadu_epi32(lanes, from)) {}
  void clear_sign() { x = _mm512_and_si512(x, _mm512_set1_epi32(kNoSign<int32_t>)); }
  Mask above(const Vector& y) const { return _mm512_cmpgt_epi32_mask(x, y.x); }
  // first <= x <= first + length: what lies below becomes large without a sign.
  Mask within(const Vector& first, const Vector& length) const {
    return _mm512_cmple_epu32_mask(_mm512_sub_epi32(x, first.x), length.x);
  }
  void collect(Mask lanes, void* to) const { _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(lanes, x)); }
};

template <>
struct Vector<int64_t> {
  static constexpr int64_t kWidth = 8;
  using Mask = __mmask8;
  __m512i x;
  explicit Vector(int64_t all) : x(_mm512_set1_epi64(all)) {}
  Vector(const void* from, Mask lanes) : x(_mm512_maskz_loadu_epi64(lanes, from)) {}
  void clear_sign() { x = _mm512_and_si512(x, _mm512_set1_epi64(kNoSign<int64_t>)); }
  Mask above(const Vector& y) const { return _mm512_cmpgt_epi64_mask(x, y.x); }
  Mask within(const Vector& first, const Vector& length) const {
    return _mm512_cmple_epu64_mask(_mm512_sub_epi64(x, first.x), length.x);
  }
  void collect(Mask lanes, void* to) const { _mm512_storeu_si512(to, _mm512_maskz_compress_epi64(lanes, x)); }
};

// Compressed stores: no branch depends on the magnitudes.
template <bool kCollects, class M, class Bits>
inline void scan_tile(const Bits* bits, int64_t n, M low, M high, Found& found) {
  using V = Vector<M>;
  using Mask = typename V::Mask;
  const V first(low), length(high - low), last(high);
  M* const collected = static_cast<M*>(found.collected);
  int64_t inside = found.inside, above = 0;
  const auto step = [&](int64_t i, Mask lanes) {
    V x(bits + i, lanes);
    x.clear_sign();
    const Mask within = Mask(x.within(first, length) & lanes);
    above += __builtin_popcount(unsigned(x.above(last) & lanes));
    if constexpr (kCollects) x.collect(within, collected + inside);
    inside += __builtin_popcount(unsigned(within));
  };
  int64_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) step(i, Mask(-1));
  if (i < n) step(i, Mask((1u << (n - i)) - 1));
  found.above += above;
  found.inside = inside;
}

#else

// Few pieces have something inside, so that the branch is mostly foreseen.
template <bool kCollects, class M, class Bits>
inline void scan_tile(const Bits* bits, int64_t n, M low, M high, Found& found) {
  M* const collected = static_cast<M*>(found.collected);
  for (int64_t i = 0; i < n; i += kPiece) {
    const int64_t m = std::min(kPiece, n - i);
    M above = 0, from_low = 0;
    for (int64_t k = 0; k < m; ++k) {
      const M x = bits[i + k] & kNoSign<M>;
      above += x > high;
      from_low += x >= low;
    }
    found.above += above;
    if (!kCollects) found.inside += from_low - above;
    if (!kCollects || from_low == above) continue;
    for (int64_t k = 0; k < m; ++k) {
      const M x = bits[i + k] & kNoSign<M>;
      collected[found.inside] = x;
      found.inside += x >= low && x <= high;
    }
  }
}

#endif

void load_magnitudes(const TensorArgs& args, int64_t at, int64_t n, void* magnitudes) {
  with_thresholded(args, [&](const auto source) {
    using M = Magnitude<typename std::decay_t<decltype(source)>::S>;
    load_tile(static_cast<M*>(magnitudes), source + at, n);
  });
}

bool scan(const TensorArgs& args, int64_t at, int64_t n, const Bracket& bracket, Found& found) {
  return for_tiles(args, at, n, [&](const auto* bits, int64_t m) {
    using M = std::conditional_t<sizeof(*bits) == 8, int64_t, int32_t>;
    if (found.collected == nullptr) {
      scan_tile<false>(bits, m, M(bracket.low), M(bracket.high), found);
      return true;
    }
    if (found.inside + m + kSlack > found.room) return false;
    scan_tile<true>(bits, m, M(bracket.low), M(bracket.high), found);
    return true;
  });
}

void histogram(const TensorArgs& args, int64_t at, int64_t n, const Bins& bins, int32_t* counts) {
  for_tiles(args, at, n, [&](const auto* bits, int64_t m) {
    using M = std::conditional_t<sizeof(*bits) == 8, int64_t, int32_t>;
    const M low = M(bins.range.low), high = M(bins.range.high);
    int32_t numbers[kTile];
    for (int64_t k = 0; k < m; ++k) {
      const M x = bits[k] & kNoSign<M>;
      const M bin = (x - low) >> bins.shift;
      numbers[k] = x < low || x > high ? int32_t(Bins::kCount) : int32_t(bin);
    }
    for (int64_t k = 0; k < m; ++k) ++counts[k % Bins::kCopies * (Bins::kCount + 1) + numbers[k]];
    return true;
  });
}

}  // namespace

extern const MagnitudeKernels RVSM_MAGNITUDE_KERNELS;
const MagnitudeKernels RVSM_MAGNITUDE_KERNELS = {load_magnitudes, scan, histogram};

}  // namespace rvsm::cpu
