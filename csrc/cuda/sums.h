// The sums of squares of groups and what follows from them, block by block. For host and device, like step.h: a block
// works in phases, and `each(f)` runs f for every thread of the block and waits for all of them.
//
// Sums are in double precision along a fixed order, so they need no atomics and give the same bits in every run. Where
// a group is long, or there are too few groups for all multiprocessors, it is summed in parts; a second launch of the
// same lines sums the parts.
#pragma once

#include <algorithm>

#include "../row.h"
#include "step.h"

namespace rvsm::cuda {

// What becomes of the sum of a group.
enum class Finish : uint8_t {
  part,     // out[part * count + group]
  factors,  // ratio = shrink(norm) / norm and, where it is wanted, length = norm (1 for the zero group)
  norms,    // length = norm
  total,    // out[group], as it is
};

// One tensor: batches of outer x groups x inner elements. Its blocks go batch by batch, tile of groups by tile, part by
// part.
struct alignas(16) SumEntry {
  const void* x;
  double* out;
  void* ratio;
  void* length;
  Prox<double> prox;
  int64_t outer, groups, inner, count;  // count: the groups of all batches
  uint32_t first;                       // its first block
  uint32_t tiles, parts;
  uint16_t tile;       // groups of a tile
  uint16_t lanes : 9;  // threads that share one row of a group (team) or of the tile (strip)
  uint16_t strip : 1, vectors : 1, cut_rows : 1, finish : 2;
};

struct SumTable {
  uint32_t entries = 0;
  uint32_t blocks = 0;
  SumEntry at[255];
};
static_assert(sizeof(SumEntry) == 128 && sizeof(SumTable) <= 32764);

// Where a block works: groups [g0, g1) of a batch, rows [o0, o1), and of a group cut along a row elements [i0, i1).
struct Tile {
  int64_t batch, g0, g1, o0, o1, i0, i1;
  uint32_t part;
};

template <class S>
RVSM_HD Tile tile_of(const SumEntry& e, uint32_t index) {
  Tile t{};
  t.part = index % e.parts;
  index /= e.parts;
  t.batch = index / e.tiles;
  t.g0 = int64_t(index % e.tiles) * e.tile;
  t.g1 = t.g0 + e.tile < e.groups ? t.g0 + e.tile : e.groups;
  const int64_t unit = e.vectors ? kWidth<S> : 1;  // a cut along a row leaves whole vectors
  const int64_t length = e.cut_rows ? e.outer : e.inner / unit;
  const int64_t from = length * t.part / e.parts, to = length * (t.part + 1) / e.parts;
  t.o0 = e.cut_rows ? from : 0;
  t.o1 = e.cut_rows ? to : e.outer;
  t.i0 = e.cut_rows ? 0 : from * unit;
  t.i1 = e.cut_rows ? e.inner : to * unit;
  return t;
}

// ---- phase 1: every thread adds up its elements ---------------------------------------------------------------------

// The sums of a block are a matrix: of rows x columns, to be added along the rows, then `inner` columns to a group.
struct Matrix {
  int rows, columns, inner;
};

RVSM_HD Matrix matrix_of(const SumEntry& e, int width) {
  if (e.strip) return {kThreads / e.lanes, e.lanes * width, int(e.inner)};
  return {e.lanes, kThreads / e.lanes, 1};
}

template <bool kSquares, class S>
RVSM_HD void add_to(double& sum, S s) {
  const double x = double(load(s));
  sum += kSquares ? x * x : x;
}

// A vector of kLoad elements at p: one access, or one element.
template <int kLoad, bool kSquares, class S>
RVSM_HD void add_vector(double* sums, const S* p) {
  if constexpr (kLoad == 1) {
    add_to<kSquares>(sums[0], *p);
  } else {
    const Vector<S> v = *reinterpret_cast<const Vector<S>*>(p);
    RVSM_UNROLL
    for (int k = 0; k < kLoad; ++k) add_to<kSquares>(sums[k], v.at[k]);
  }
}

// Short rows of several groups: lanes across the columns, and each thread its column down several rows.
template <int kLoad, bool kSquares, class S>
RVSM_HD void sum_strip(const SumEntry& e, const Tile& t, const Matrix& m, int thread, double* sums) {
  const int lane = thread % e.lanes, row = thread / e.lanes;
  if (row >= m.rows) return;
  const int64_t columns = e.groups * e.inner, column = t.g0 * e.inner + lane * kLoad;
  double own[kLoad] = {};
  if (column < t.g1 * e.inner) {
    const S* p = static_cast<const S*>(e.x) + (t.batch * e.outer + t.o0 + row) * columns + column;
    const int64_t step = columns * m.rows;
    const int count = int((t.o1 - t.o0 - row + m.rows - 1) / m.rows);
#if defined(__CUDACC__)
#pragma unroll 4
#endif
    for (int k = 0; k < count; ++k, p += step) add_vector<kLoad, kSquares>(own, p);
  }
  RVSM_UNROLL
  for (int k = 0; k < kLoad; ++k) sums[row * m.columns + lane * kLoad + k] = own[k];
}

// Long rows: several threads to a group.
template <int kLoad, bool kSquares, class S>
RVSM_HD void sum_team(const SumEntry& e, const Tile& t, const Matrix& m, int thread, double* sums) {
  const int lane = thread % e.lanes, place = thread / e.lanes;
  double own[kLoad] = {};
  if (t.g0 + place < t.g1) {
    const S* const x = static_cast<const S*>(e.x);
    for (int64_t o = t.o0; o < t.o1; ++o) {
      const S* const p = x + ((t.batch * e.outer + o) * e.groups + t.g0 + place) * e.inner;
#if defined(__CUDACC__)
#pragma unroll 4
#endif
      for (int64_t i = t.i0 + lane * kLoad; i < t.i1; i += e.lanes * kLoad) add_vector<kLoad, kSquares>(own, p + i);
    }
  }
  double sum = 0;
  RVSM_UNROLL
  for (int k = 0; k < kLoad; ++k) sum += own[k];
  sums[lane * m.columns + place] = sum;
}

template <int kLoad, bool kSquares, class S>
RVSM_HD void sum_thread(const SumEntry& e, const Tile& t, const Matrix& m, int thread, double* sums) {
  if (e.strip)
    sum_strip<kLoad, kSquares, S>(e, t, m, thread, sums);
  else
    sum_team<kLoad, kSquares, S>(e, t, m, thread, sums);
}

// ---- phase 2: the rows of the matrix become one ---------------------------------------------------------------------

template <class Each>
RVSM_HD void fold(double* sums, int rows, int columns, const Each& each) {
  while (rows > 1) {
    const int half = (rows + 1) / 2;
    each([&](int thread) {
      for (int i = thread; i < (rows - half) * columns; i += kThreads) sums[i] += sums[half * columns + i];
    });
    rows = half;
  }
}

// ---- phase 3: the groups of the tile --------------------------------------------------------------------------------

// T: the type of the factors.
template <class T>
RVSM_HD void finish_group(const SumEntry& e, uint32_t part, int64_t group, double sum) {
  const Finish finish = Finish(e.finish);
  if (finish == Finish::part || finish == Finish::total) {
    e.out[(finish == Finish::part ? int64_t(part) * e.count : 0) + group] = sum;
    return;
  }
  const T norm = T(std::sqrt(sum));
  if (finish == Finish::factors) {
    const Prox<T> prox = narrow<T>(e.prox);
    static_cast<T*>(e.ratio)[group] =
        with_penalty(prox.penalty, [&](auto tag) { return shrink_ratio<decltype(tag)::value>(norm, prox); });
  }
  if (e.length != nullptr) static_cast<T*>(e.length)[group] = finish == Finish::factors ? length_of(norm) : norm;
}

// ---- a block --------------------------------------------------------------------------------------------------------

// Numbers that `sums` needs room for.
template <class S>
constexpr int kSums = kThreads * kWidth<S>;

template <class S, bool kSquares, class T, class Each>
RVSM_HD void sum_block(const SumTable& table, uint32_t block, double* sums, const Each& each) {
  const SumEntry& e = table.at[find(table.at, int(table.entries), block)];
  const Tile t = tile_of<S>(e, block - e.first);
  const Matrix m = matrix_of(e, e.vectors ? kWidth<S> : 1);
  each([&](int thread) {
    if (e.vectors)
      sum_thread<kWidth<S>, kSquares, S>(e, t, m, thread, sums);
    else
      sum_thread<1, kSquares, S>(e, t, m, thread, sums);
  });
  fold(sums, m.rows, m.columns, each);
  each([&](int thread) {
    for (int g = thread; g < int(t.g1 - t.g0); g += kThreads) {
      double sum = 0;
      for (int i = 0; i < m.inner; ++i) sum += sums[g * m.inner + i];
      finish_group<T>(e, t.part, t.batch * e.groups + t.g0 + g, sum);
    }
  });
}

// The penalty's value over one block of a Table: totals[block].
template <class S, class Each>
RVSM_HD void penalty_block(const Table& table, uint32_t block, double* sums, const Each& each) {
  const Place place = place_of<S>(table, block);
  each([&](int thread) { sums[thread] = penalty_thread<S>(table, place, thread); });
  fold(sums, kThreads, 1, each);
  each([&](int thread) {
    if (thread == 0) table.totals[block] = sums[0];
  });
}

// ---- host: how a tensor is divided ----------------------------------------------------------------------------------

// Elements of a block: enough to keep it busy, few enough that small tensors fill a device.
constexpr int64_t kFewest = 8192, kMost = 65536;
// Rows of fewer elements than this are shared by the threads that follow one another.
constexpr int64_t kShortRow = 64;

// The largest power of two up to n, from 1 to kThreads.
inline int power_below(int64_t n) {
  int p = 1;
  while (p < kThreads && 2 * p <= n) p *= 2;
  return p;
}

// All of an entry but where it stands, what it reads and what becomes of its sums. `aligned`: the tensor begins on a
// 16-byte boundary.
inline SumEntry divide_sums(const GroupView& v, int64_t element_size, bool aligned) {
  const int64_t whole = 16 / element_size;
  SumEntry e{};
  e.outer = v.outer;
  e.groups = v.groups;
  e.inner = v.inner;
  e.count = v.count();
  e.strip = v.outer > 1 && v.inner < kShortRow;
  const int64_t row = e.strip ? v.groups * v.inner : v.inner;
  e.vectors = aligned && row % whole == 0;
  const int64_t width = e.vectors ? whole : 1;
  if (e.strip) {
    // Whole groups and whole vectors, about 64 lanes to a row.
    int64_t unit = v.inner;
    while (unit % width != 0) unit += v.inner;
    const int64_t units = std::max<int64_t>(1, std::min<int64_t>(64 * width / unit, ceil_div(row, unit)));
    e.lanes = uint16_t(units * unit / width);
    e.tile = uint16_t(units * unit / v.inner);
    e.cut_rows = true;
  } else {
    e.lanes = uint16_t(power_below(v.inner / (4 * width)));
    e.tile = uint16_t(kThreads / e.lanes);
    e.cut_rows = v.outer > v.inner;
  }
  e.tiles = uint32_t(ceil_div(v.groups, e.tile));
  const int64_t numel = v.count() * v.size(), most = std::clamp(numel / 2048, kFewest, kMost);
  const int64_t pieces = e.cut_rows ? v.outer : v.inner / width;
  e.parts = uint32_t(std::clamp<int64_t>(ceil_div(e.tile * v.size(), most), 1, std::max<int64_t>(pieces, 1)));
  return e;
}

}  // namespace rvsm::cuda
