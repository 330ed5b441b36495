// u of N:M sparsity on the CPU: made for a piece of a tensor that stays in the first-level cache, just before the step
// of that piece. Part of elements.cpp, so compiled once per instruction set.
#pragma once

#include <type_traits>

#include "tiles.h"

namespace rvsm::cpu {

namespace {

// Elements of a piece at most: where windows are long, pieces are the m rows of some columns.
constexpr int64_t kPieceOfWindows = 1024;
// Elements of a piece of short windows. What the next piece reads is fetched while u of this one is made: with pieces
// as short as this the memory is never idle, and 2:4 takes hardly longer than l0.
constexpr int64_t kShortPiece = 256;

// u stands in memory, made of the method's state as it was, also where an element is held.
template <class T>
struct WindowPull {
  static constexpr bool kPull = true, kLasso = false;
  const T* kept;
  T u(T, int64_t i) const { return kept[i]; }
  T direction(T, int64_t) const { return T(0); }
  WindowPull at(int64_t i) const { return {kept + i}; }
};

// A piece: what is thresholded, which becomes u; the keys of its elements, and the place of each in its window. Beside
// the keys there is room for those that the loop reads of windows that end before; they do not matter.
template <class T>
struct WindowPiece {
  alignas(64) T u[kPieceOfWindows];
  alignas(64) Key<T> place[kPieceOfWindows];
  alignas(64) Key<T> room[3 * kPieceOfWindows] = {};

  Key<T>* keys() { return room + kPieceOfWindows; }
};

// Zeros in the place of what does not survive of `count` elements. kM: the m of the windows, 0 for any.
template <int kM, class T>
void keep_largest(WindowPiece<T>& piece, int64_t count, const Windows windows) {
  using K = Key<T>;
  const int64_t inner = windows.inner;
  const K n = windows.n, m = kM > 0 ? kM : windows.m;
  const K* const keys = piece.keys();
  const K* const place = piece.place;
  T* const u = piece.u;
  if constexpr (kM > 0) {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
      K before = 0;
#pragma GCC unroll 16
      for (int d = 1; d < kM; ++d) {
        before += K(place[i] + d < m) & K(keys[i + d * inner] > keys[i]);
        before += K(place[i] >= d) & K(keys[i - d * inner] >= keys[i]);
      }
      u[i] = (K(before < n) | K(keys[i] > kInfinityKey<T>)) != 0 ? u[i] : T(0);
    }
  } else {
    alignas(64) K before[kPieceOfWindows] = {};
    for (K d = 1; d < m; ++d) {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) {
        before[i] += K(place[i] + d < m) & K(keys[i + d * inner] > keys[i]);
        before[i] += K(place[i] >= d) & K(keys[i - d * inner] >= keys[i]);
      }
    }
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) u[i] = (K(before[i] < n) | K(keys[i] > kInfinityKey<T>)) != 0 ? u[i] : T(0);
  }
}

// The same of consecutive windows of kM elements, window by window: a comparison of two elements serves both.
template <int kM, class T>
void keep_largest_of_consecutive(T* __restrict u, int64_t count, const Windows windows) {
  using K = Key<T>;
  const K n = windows.n;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; i += kM) {
    T v[kM];
    K key[kM], before[kM] = {};
#pragma GCC unroll 4
    for (int k = 0; k < kM; ++k) {
      v[k] = u[i + k];
      key[k] = key_of(v[k]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < kM; ++j) {
#pragma GCC unroll 4
      for (int k = j + 1; k < kM; ++k) {
        const K later = key[k] > key[j];
        before[j] += later;
        before[k] += 1 - later;
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < kM; ++k) u[i + k] = (K(before[k] < n) | K(key[k] > kInfinityKey<T>)) != 0 ? v[k] : T(0);
  }
}

// u of a piece whose `u` holds what is thresholded. A function of its own: no base or method needs another copy.
template <class T>
__attribute__((noinline)) void fill_u(WindowPiece<T>& piece, int64_t count, const Windows windows) {
  if (windows.inner == 1 && windows.m == 2) return keep_largest_of_consecutive<2>(piece.u, count, windows);
  if (windows.inner == 1 && windows.m == 4) return keep_largest_of_consecutive<4>(piece.u, count, windows);
  Key<T>* const keys = piece.keys();
  for (int64_t i = 0; i < count; ++i) keys[i] = key_of(piece.u[i]);
  switch (windows.m) {
    case 2:
      return keep_largest<2>(piece, count, windows);
    case 4:
      return keep_largest<4>(piece, count, windows);
    case 8:
      return keep_largest<8>(piece, count, windows);
    default:
      return keep_largest<0>(piece, count, windows);
  }
}

// The places of elements in windows that begin at the first of them.
template <class K>
void fill_places(K* place, int64_t count, const Windows& windows) {
  for (int64_t i = 0; i < count;)
    for (int32_t k = 0; k < windows.m; ++k)
      for (int64_t j = 0; j < windows.inner; ++j) place[i++] = K(k);
}

// What a method thresholds of elements [at, at + n). `Stored`: the storage type, or Mixed.
template <class Stored, Method kMethod, class T>
void load_thresholded(T* __restrict to, const TensorArgs& args, int64_t at, int64_t n) {
  if constexpr (std::is_same_v<Stored, Mixed>) {
    load_weights(to, args, at, n);
    if constexpr (kMethod == Method::admm) {
      T dual[kPieceOfWindows];
      load_plane(dual, args.method_state(), args.precision.states[args.base.states], at, n);
      for (int64_t i = 0; i < n; ++i) to[i] = thresholded<kMethod>(to[i], dual[i]);
    }
  } else {
    const Stored* const w = static_cast<const Stored*>(args.w) + at;
    if constexpr (kMethod == Method::admm) {
      const Stored* const dual = static_cast<const Stored*>(args.method_state()) + at;
      for (int64_t i = 0; i < n; ++i) to[i] = thresholded<kMethod>(load(w[i]), load(dual[i]));
    } else {
      load_tile(to, w, n);
    }
  }
}

// Inlined, all three: GCC drops calls of a function that does nothing but fetch.
#define RVSM_FETCHES inline __attribute__((always_inline))

RVSM_FETCHES void fetch_array(const void* array, int64_t size, int64_t at, int64_t n) {
  const char* const from = static_cast<const char*>(array) + at * size;
  for (int64_t k = 0; k < n * size; k += 64) __builtin_prefetch(from + k, 1);
}

// The size of an element of an array; `Stored`: the storage type, or Mixed.
template <class Stored>
RVSM_FETCHES int64_t size_of(Dtype type) {
  if constexpr (std::is_same_v<Stored, Mixed>) return with_storage(type, [](auto s) { return int64_t(sizeof s); });
  return sizeof(Stored);
}

// Fetches what the step of elements [at, at + n) will read.
template <class Stored>
RVSM_FETCHES void fetch(const TensorArgs& args, int64_t at, int64_t n) {
  const Precision& p = args.precision;
  fetch_array(args.w, size_of<Stored>(args.dtype), at, n);
  if (args.base.kind != BaseKind::none || args.base.writes_grad) fetch_array(args.g, size_of<Stored>(p.grad), at, n);
  for (int k = 0; k < args.states(); ++k)
    fetch_array(args.state[size_t(k)], size_of<Stored>(p.states[size_t(k)]), at, n);
  if (std::is_same_v<Stored, Mixed> && p.master != Master::none)
    fetch_array(args.master_state(), p.master == Master::low ? sizeof(int16_t) : sizeof(float), at, n);
}

// Calls span(offset, length, pull) for the pieces of a block: consecutive windows or, of windows longer than a piece,
// the m rows of some columns.
template <class Stored, Method kMethod, class T, class Span>
void for_windows(const TensorArgs& args, const Block& block, const Span& span) {
  const Windows& all = args.windows;
  const int64_t whole = all.whole();
  const bool apart = whole > kPieceOfWindows;
  const int64_t rows = apart ? all.m : 1;
  const int64_t most = apart ? kPieceOfWindows / all.m : std::max<int64_t>(kShortPiece / whole, 1) * whole;
  // A block is one row of consecutive elements, or the m rows of one batch.
  const bool has_rows = block.o1 - block.o0 > 1;
  const int64_t first = has_rows ? block.batch : apart ? block.c0 / whole : 0;
  const int64_t last = has_rows || !apart ? first + 1 : block.c1 / whole;
  const int64_t c0 = has_rows || !apart ? block.c0 : 0, c1 = has_rows || !apart ? block.c1 : all.inner;
  WindowPiece<T> piece;
  Windows inside{all.n, all.m, 0};  // of the piece
  for (int64_t b = first; b < last; ++b) {
    for (int64_t c = c0; c < c1; c += most) {
      const int64_t columns = std::min(most, c1 - c), inner = apart ? columns : all.inner;
      if (inside.inner != inner) {
        inside.inner = inner;
        fill_places(piece.place, apart ? inside.whole() : most, inside);
      }
      const auto start = [&](int64_t row) { return b * whole + row * all.inner + c; };
      for (int64_t row = 0; row < rows; ++row)
        fetch<Stored>(args, start(row) + columns, std::min(most, c1 - c - columns));
      for (int64_t row = 0; row < rows; ++row)
        load_thresholded<Stored, kMethod>(piece.u + row * columns, args, start(row), columns);
      fill_u(piece, rows * columns, inside);
      for (int64_t row = 0; row < rows; ++row) span(start(row), columns, WindowPull<T>{piece.u + row * columns});
    }
  }
}

}  // namespace

}  // namespace rvsm::cpu
