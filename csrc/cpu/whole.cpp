// The loops of WholeKernels. Compiled once per instruction set, with RVSM_ISA naming it; contraction is off, so every
// instruction set gives the same bits.

#include "whole.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa.h"
#include "tiles.h"
#include "weights.h"

namespace rvsm::cpu {

namespace {

template <class T>
inline void divide_loop(T* __restrict w, int64_t n, T norm) {
  for (int64_t i = 0; i < n; ++i) w[i] /= norm;
}

void divide(const TensorArgs& args, double norm, int64_t at, int64_t n) {
  float tile[kPiece];
  for (int64_t i = at; i < at + n; i += kPiece) {
    const int64_t m = std::min(kPiece, at + n - i);
    prefetch_plane(args.w, args.dtype, i, m);
    if (args.dtype == Dtype::f64) {
      divide_loop(static_cast<double*>(args.w) + i, m, norm);
    } else if (args.dtype == Dtype::f32) {
      divide_loop(static_cast<float*>(args.w) + i, m, float(norm));
    } else {
      load_plane(tile, args.w, args.dtype, i, m);
      divide_loop(tile, m, float(norm));
      store_plane(args.w, tile, args.dtype, i, m);
    }
  }
}

// ---- the support ------------------------------------------------------------------------------------------------

// Places of memory that are read in turns, and how far ahead of each: see magnitudes.cpp.
constexpr int64_t kStreams = 4;
constexpr int64_t kAheadOfStream = 512;

// Which of eight numbers are not at most `cut` in magnitude, in the bits of a byte.
template <class T>
inline uint8_t support_of_eight(const T* x, T cut) {
  uint8_t bits = 0;
  for (int k = 0; k < 8; ++k) bits |= uint8_t(!(std::fabs(x[k]) <= cut)) << k;
  return bits;
}

#if defined(__AVX__)
template <>
inline uint8_t support_of_eight(const float* x, float cut) {
  const __m256 r = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_loadu_ps(x));
  return uint8_t(_mm256_movemask_ps(_mm256_cmp_ps(r, _mm256_set1_ps(cut), _CMP_NLE_UQ)));
}
#elif defined(__SSE2__)
template <>
inline uint8_t support_of_eight(const float* x, float cut) {
  const __m128 sign = _mm_set1_ps(-0.0f), limit = _mm_set1_ps(cut);
  const __m128 low = _mm_andnot_ps(sign, _mm_loadu_ps(x)), high = _mm_andnot_ps(sign, _mm_loadu_ps(x + 4));
  return uint8_t(_mm_movemask_ps(_mm_cmpnle_ps(low, limit)) | _mm_movemask_ps(_mm_cmpnle_ps(high, limit)) << 4);
}
#endif

template <class T>
inline void support_of_tile(uint8_t* __restrict bits, const T* x, int64_t n, T cut) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) bits[i / 8] = support_of_eight(x + i, cut);
  if (i == n) return;
  T last[8];
  for (int64_t k = 0; k < 8; ++k) last[k] = i + k < n ? x[i + k] : T(0);
  // A cut of -1 takes nothing, not the zeros behind the last element either.
  bits[i / 8] = support_of_eight(last, cut) & uint8_t((1 << (n - i)) - 1);
}

// Calls f(the packed support of a tile, its first byte among those of the tensor, its bytes) until it returns false.
template <class F>
bool for_supports(const TensorArgs& args, int64_t at, int64_t n, const F& f) {
  return with_storage(args.dtype, [&](auto s) {
    using S = decltype(s);
    using T = Opmath<S>;
    const T cut = *static_cast<const T*>(args.cut);
    const int64_t length = ceil_div(ceil_div(n, kSupportTile), kStreams) * kSupportTile;
    uint8_t bits[kSupportTile / 8];
    for (int64_t k = 0; k < length * kStreams / kSupportTile; ++k) {
      const int64_t offset = k % kStreams * length + k / kStreams * kSupportTile;
      if (offset >= n) continue;
      const int64_t m = std::min(kSupportTile, n - offset), from = at + offset;
      const S* const w = static_cast<const S*>(args.w) + from;
      prefetch(Weights<S>{w} + kAheadOfStream, kSupportTile);
      if constexpr (sizeof(S) == 2) {
        T tile[kSupportTile];
        load_tile(tile, w, m);
        support_of_tile(bits, tile, m, cut);
      } else {
        support_of_tile(bits, w, m, cut);
      }
      if (!f(bits, from / 8, ceil_div(m, 8))) return false;
    }
    return true;
  });
}

int64_t support(const TensorArgs& args, uint8_t* bits, int64_t at, int64_t n) {
  int64_t count = 0;
  for_supports(args, at, n, [&](const uint8_t* tile, int64_t first, int64_t bytes) {
    std::memcpy(bits + first, tile, size_t(bytes));
    int64_t i = 0;
    for (uint64_t word; i + 8 <= bytes; i += 8) {
      std::memcpy(&word, tile + i, 8);
      count += __builtin_popcountll(word);
    }
    for (; i < bytes; ++i) count += __builtin_popcount(tile[i]);
    return true;
  });
  return count;
}

bool has_support(const TensorArgs& args, const uint8_t* bits, int64_t at, int64_t n) {
  return for_supports(args, at, n, [&](const uint8_t* tile, int64_t first, int64_t bytes) {
    return std::memcmp(bits + first, tile, size_t(bytes)) == 0;
  });
}

template <class S>
inline void threshold_loop(S* __restrict w, int64_t n, Opmath<S> cut) {
  for (int64_t i = 0; i < n; ++i) w[i] = std::fabs(load(w[i])) <= cut ? S{} : w[i];
}

void threshold(const TensorArgs& args, int64_t at, int64_t n) {
  with_storage(args.dtype, [&](auto s) {
    using S = decltype(s);
    threshold_loop(static_cast<S*>(args.w) + at, n, *static_cast<const Opmath<S>*>(args.cut));
  });
}

}  // namespace

extern const WholeKernels RVSM_WHOLE_KERNELS;
const WholeKernels RVSM_WHOLE_KERNELS = {divide, support, has_support, threshold};

}  // namespace rvsm::cpu
