// The norms of groups and the factors that follow from them, block by block. For host and device, like elements.h: a
// block works in phases, and `for_threads(f)` runs f for every thread of the block and waits for all of them.
//
// Sums are in double precision along a fixed order, so they need no atomics and give the same bits in every run. Where
// a group is long, or there are too few groups for all multiprocessors, it is summed in parts; a second launch of the
// same lines sums the parts, and makes the factors of norms that were made elsewhere.
#pragma once

#include <algorithm>

#include "../math/tensor_args.h"
#include "elements.h"

namespace rvsm::cuda {

// What becomes of the sum of a group.
enum class Finish : uint8_t {
  part,     // out[part * count + group]
  factors,  // ratio = shrink(norm) / norm and, where it is wanted, length = norm (1 for the zero group)
  norms,    // length = norm
  total,    // out[group], as it is
};

// What is known of the arrays of a general step only when it runs.
struct GeneralArrays {
  const void* rest;  // of the weights, where there is a master
  Dtype x_type, dual_type;
  Master master;
};

// One tensor: batches of outer x groups x inner elements. Its blocks go batch by batch, tile of groups by tile, part by
// part.
struct alignas(16) SumEntry {
  const void* x;
  const void* dual;  // added to x, or null
  void* out;         // sums (part, total), or the ratios (factors; null: only the lengths are wanted)
  void* length;
  union {
    Prox<double> prox;
    const void* cut;        // where reads_cut: the cut of top-k, in the type of the factors
    GeneralArrays general;  // of general weights, whose norms are all that is wanted
  };
  int64_t outer, groups, inner, count;  // count: the groups of all batches
  uint32_t first;                       // its first block
  uint32_t tiles, parts;
  uint16_t tile : 15;        // groups of a tile
  uint16_t keeps_norms : 1;  // factors: the norms are wanted too, behind the ratios of all groups
  uint16_t lanes : 9;        // threads that share one row of a group (team) or of the tile (strip)
  // parts_are_rows: a part of a group is some of its rows, else a piece of each row. are_norms: x holds norms, not what
  // they are made of.
  uint16_t strip : 1, vectors : 1, parts_are_rows : 1, finish : 2, reads_cut : 1, are_norms : 1;
};

struct SumTable {
  uint32_t entries = 0;
  uint32_t blocks = 0;
  SumEntry at[255];
};
static_assert(sizeof(SumEntry) == 128 && sizeof(SumTable) <= 32764);

// The share of a block: `rows` rows from element `begin` on; in each row `groups` groups, the first of which has the
// number `group`; of each group `length` consecutive elements.
struct Tile {
  int64_t begin, group;
  int rows, groups, length;
  uint32_t part;
};

// kLoad: elements of an access. Where parts are pieces of rows, each piece is a whole number of accesses.
template <int kLoad>
RVSM_HD Tile tile_of(const SumEntry& e, uint32_t index) {
  const uint32_t part = index % e.parts, tile = index / e.parts % e.tiles, batch = index / e.parts / e.tiles;
  const int64_t first = int64_t(tile) * e.tile;
  const int64_t pieces = e.parts_are_rows ? e.outer : e.inner / kLoad;
  const int64_t from = pieces * part / e.parts, count = pieces * (part + 1) / e.parts - from;
  const int64_t row = batch * e.outer + (e.parts_are_rows ? from : 0);
  Tile t;
  t.begin = (row * e.groups + first) * e.inner + (e.parts_are_rows ? 0 : from * kLoad);
  t.group = batch * e.groups + first;
  t.rows = int(e.parts_are_rows ? count : e.outer);
  t.groups = int(first + e.tile < e.groups ? e.tile : e.groups - first);
  t.length = int(e.parts_are_rows ? e.inner : count * kLoad);
  t.part = part;
  return t;
}

// ---- phase 1: every thread adds up its elements ---------------------------------------------------------------------

// The sums of a block are a matrix of rows x columns. First the rows are added up, then `inner` columns for each group.
struct Matrix {
  int rows, columns, inner;
};

template <int kLoad>
RVSM_HD Matrix matrix_of(const SumEntry& e) {
  if (e.strip) return {kThreads / e.lanes, e.lanes * kLoad, int(e.inner)};
  return {e.lanes, kThreads / e.lanes, 1};
}

template <bool kSquares>
RVSM_HD void add_to(double& sum, double x) {
  sum += kSquares ? x * x : x;
}

// kLoad elements, as one access reads them.
template <int kLoad, class S>
struct Loaded {
  using Type = Vector<S>;
};
template <class S>
struct Loaded<1, S> {
  using Type = S;
};

template <class S>
RVSM_HD S element_of(const S& x, int) {
  return x;
}
template <class S>
RVSM_HD S element_of(const Vector<S>& v, int k) {
  return v.at[k];
}

// Adds the elements at p, p + step, ... below `end` to the sums, kLoad of them by one access and kAhead accesses before
// the first is looked at: they wait for memory together. A dual is added to them in the type of the arithmetic, as the
// step does. `dual`: its distance from p in bytes, 0 where there is none; kDual: whether there may be a dual.
template <int kLoad, int kAhead, bool kSquares, bool kDual, class S, class Step>
RVSM_HD void add_run(double* sums, const S* p, uint32_t i, uint32_t end, uint32_t distance, Step step, int64_t dual) {
  using Access = typename Loaded<kLoad, S>::Type;
  RVSM_NO_UNROLL
  for (; i < end; i += kAhead * distance, p += kAhead * step) {
    Access x[kAhead], y[kAhead];
    // What is behind the end is read from the first place again, and a dual that is not there from x; neither is added.
    RVSM_UNROLL
    for (uint32_t a = 0; a < kAhead; ++a) {
      const S* const q = p + (i + a * distance < end ? a * step : 0);
      x[a] = *reinterpret_cast<const Access*>(q);
      if (kDual) y[a] = *reinterpret_cast<const Access*>(reinterpret_cast<const char*>(q) + dual);
    }
    RVSM_KEEP_ORDER();
    RVSM_UNROLL
    for (uint32_t a = 0; a < kAhead; ++a) {
      if (i + a * distance >= end) continue;
      RVSM_UNROLL
      for (int k = 0; k < kLoad; ++k) {
        const auto v = load(element_of(x[a], k));
        add_to<kSquares>(sums[k], kDual && dual != 0 ? double(v + load(element_of(y[a], k))) : double(v));
      }
    }
  }
}

// Weights of a step that is general: their storage type and their master are known only when it runs.
struct GeneralWeights {};

// Where the elements of a tensor in storage S are read: a pointer, or what stands in the place of a pointer.
template <class S>
struct ElementsOf {
  using Place = const S*;
  RVSM_HD_MEMBER static Place begin(const SumEntry& e) { return static_cast<const S*>(e.x); }
};
template <>
struct ElementsOf<GeneralWeights> {
  struct Place {
    const SumEntry* e;
    int64_t at;
    RVSM_HD_MEMBER Place operator+(int64_t n) const { return {e, at + n}; }
    RVSM_HD_MEMBER void operator+=(int64_t n) { at += n; }
  };
  RVSM_HD_MEMBER static Place begin(const SumEntry& e) { return {&e, 0}; }
};

RVSM_HD float load_as(const void* array, Dtype dtype, int64_t i) {
  if (dtype == Dtype::bf16) return load(static_cast<const BFloat16*>(array)[i]);
  if (dtype == Dtype::f16) return load(static_cast<const Float16*>(array)[i]);
  return static_cast<const float*>(array)[i];
}

template <bool kSquares, bool kDual>
RVSM_HD void add_general(double* sums, const ElementsOf<GeneralWeights>::Place& p) {
  const SumEntry& e = *p.e;
  float x;
  const GeneralArrays& of = e.general;
  if (of.master == Master::low)
    x = join(static_cast<const BFloat16*>(e.x)[p.at], static_cast<const int16_t*>(of.rest)[p.at]);
  else if (of.master == Master::whole)
    x = join(static_cast<const Float16*>(e.x)[p.at], static_cast<const float*>(of.rest)[p.at]);
  else
    x = load_as(e.x, of.x_type, p.at);
  if (kDual && e.dual != nullptr) x += load_as(e.dual, of.dual_type, p.at);
  add_to<kSquares>(sums[0], double(x));
}

template <int kLoad, int kAhead, bool kSquares, bool kDual>
RVSM_HD void add_run(double* sums, ElementsOf<GeneralWeights>::Place p, uint32_t i, uint32_t end, uint32_t distance,
                     int64_t step, int64_t) {
  static_assert(kLoad == 1, "general weights are read one by one");
#if defined(__CUDACC__)
#pragma unroll 4
#endif
  for (; i < end; i += distance, p += step) add_general<kSquares, kDual>(sums, p);
}

// Accesses of a thread that wait for memory together, as far as its registers allow.
template <int kLoad, bool kDual>
constexpr int kSumsAhead = kLoad == 4 || (kDual && kLoad == 8) ? 2
                           : kLoad == 8                        ? 3
                                                               : 4;

RVSM_HD int64_t to_dual(const SumEntry& e) {
  return e.dual == nullptr ? 0 : static_cast<const char*>(e.dual) - static_cast<const char*>(e.x);
}

// Short rows of several groups: lanes across the columns, and each thread its column down several rows.
template <int kLoad, bool kSquares, bool kDual, class S>
RVSM_HD void sum_strip(const SumEntry& e, const Tile& t, const Matrix& m, int thread, double* sums) {
  const int lane = thread % e.lanes, row = thread / e.lanes, column = lane * kLoad;
  if (row >= m.rows) return;
  double acc[kLoad] = {};
  if (column < t.groups * int(e.inner)) {
    const int64_t columns = e.groups * e.inner, step = columns * m.rows, dual = to_dual(e);
    typename ElementsOf<S>::Place p = ElementsOf<S>::begin(e) + (t.begin + row * columns + column);
    add_run<kLoad, kSumsAhead<kLoad, kDual>, kSquares, kDual>(acc, p, uint32_t(row), uint32_t(t.rows), uint32_t(m.rows),
                                                              step, dual);
  }
  RVSM_UNROLL
  for (int k = 0; k < kLoad; ++k) sums[row * m.columns + column + k] = acc[k];
}

// Long rows: several threads to a group.
template <int kLoad, bool kSquares, bool kDual, class S>
RVSM_HD void sum_team(const SumEntry& e, const Tile& t, const Matrix& m, int thread, double* sums) {
  const int lane = thread % e.lanes, place = thread / e.lanes;
  double acc[kLoad] = {};
  if (place < t.groups) {
    const int64_t columns = e.groups * e.inner, dual = to_dual(e);
    typename ElementsOf<S>::Place p = ElementsOf<S>::begin(e) + (t.begin + place * e.inner);
    const int first = lane * kLoad, step = e.lanes * kLoad;
    for (int k = 0; k < t.rows; ++k, p += columns)
      add_run<kLoad, kSumsAhead<kLoad, kDual>, kSquares, kDual>(acc, p + first, uint32_t(first), uint32_t(t.length),
                                                                uint32_t(step), uint32_t(step), dual);
  }
  RVSM_UNROLL
  for (int k = 1; k < kLoad; ++k) acc[0] += acc[k];
  sums[lane * m.columns + place] = acc[0];
}

// ---- phase 2: the rows of the matrix become one ---------------------------------------------------------------------

template <class ForThreads>
RVSM_HD void fold(double* sums, int rows, int columns, const ForThreads& for_threads) {
  while (rows > 1) {
    const int half = (rows + 1) / 2;
    for_threads([&](int thread) {
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
    static_cast<double*>(e.out)[(finish == Finish::part ? int64_t(part) * e.count : 0) + group] = sum;
    return;
  }
  const T norm = T(e.are_norms ? sum : std::sqrt(sum));
  if (finish == Finish::factors && e.out != nullptr) {
    const Prox<T> prox =
        e.reads_cut ? Prox<T>{Penalty::l0, *static_cast<const T*>(e.cut), 0, 0, 0, 0} : narrow<T>(e.prox);
    static_cast<T*>(e.out)[group] = shrink_ratio(norm, prox);
    if (e.keeps_norms) static_cast<T*>(e.out)[e.count + group] = norm;
  }
  if (e.length != nullptr) static_cast<T*>(e.length)[group] = finish == Finish::factors ? length_of(norm) : norm;
}

// ---- a block --------------------------------------------------------------------------------------------------------

// Numbers that `sums` needs room for.
template <class S>
constexpr int kSums = kThreads * kWidth<S>;
template <>
inline constexpr int kSums<GeneralWeights> = kThreads;

// kLoad: elements of an access.
template <int kLoad, class S, bool kSquares, bool kDual, class T, class ForThreads>
RVSM_HD void sum_tile(const SumEntry& e, uint32_t index, double* sums, const ForThreads& for_threads) {
  const Tile t = tile_of<kLoad>(e, index);
  const Matrix m = matrix_of<kLoad>(e);
  for_threads([&](int thread) {
    if (e.strip)
      sum_strip<kLoad, kSquares, kDual, S>(e, t, m, thread, sums);
    else
      sum_team<kLoad, kSquares, kDual, S>(e, t, m, thread, sums);
  });
  fold(sums, m.rows, m.columns, for_threads);
  for_threads([&](int thread) {
    for (int g = thread; g < t.groups; g += kThreads) {
      double sum = 0;
      for (int i = 0; i < m.inner; ++i) sum += sums[g * m.inner + i];
      finish_group<T>(e, t.part, t.group + g, sum);
    }
  });
}

template <class S, bool kSquares, bool kDual, class T, class ForThreads>
RVSM_HD void sum_block(const SumTable& table, uint32_t block, double* sums, const ForThreads& for_threads) {
  const SumEntry& e = table.at[find(table.at, int(table.entries), block)];
  if constexpr (std::is_same_v<S, GeneralWeights>)
    sum_tile<1, S, kSquares, kDual, T>(e, block - e.first, sums, for_threads);
  else if (e.vectors)
    sum_tile<kWidth<S>, S, kSquares, kDual, T>(e, block - e.first, sums, for_threads);
  else
    sum_tile<1, S, kSquares, kDual, T>(e, block - e.first, sums, for_threads);
}

// The penalty's value over one block of a Table: totals[block].
template <class S, class ForThreads>
RVSM_HD void penalty_block(const Table& table, uint32_t block, double* sums, const ForThreads& for_threads) {
  const Place<0> place = place_of<S, 0>(table, block);
  for_threads([&](int thread) { sums[thread] = penalty_thread<S>(table, place, thread); });
  fold(sums, kThreads, 1, for_threads);
  for_threads([&](int thread) {
    if (thread == 0) table.totals[block] = sums[0];
  });
}

// ---- host: how a tensor is divided ----------------------------------------------------------------------------------

// Blocks that fill a device. There are fewer where a block would have less than kFewest elements.
constexpr int64_t kFill = 512;
constexpr int64_t kFewest = 32768;
// A row of a tile is at least so long: the unit of what memory hands out.
constexpr int64_t kSector = 32;
// Where a row of a group has fewer elements than this, rows of several groups are summed together, as a strip.
constexpr int64_t kShortRow = 64;

// The largest power of two up to n, from 1 to kThreads.
inline int power_below(int64_t n) {
  int p = 1;
  while (p < kThreads && 2 * p <= n) p *= 2;
  return p;
}

// An entry with the fields that follow from the shape; the caller sets what is read and what becomes of the sums.
// `aligned`: the tensor begins on a 16-byte boundary. Parts need memory: tiles are made narrow first, and groups have
// parts only where there are still too few tiles.
inline SumEntry divide_sums(const GroupView& v, int64_t element_size, bool aligned) {
  const int64_t whole = 16 / element_size, numel = v.count() * v.size();
  const int64_t wanted = std::clamp<int64_t>(numel / kFewest, 1, kFill);
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
    // Whole groups and whole vectors, about 64 lanes to a row or fewer.
    int64_t unit = v.inner;
    while (unit % width != 0) unit += v.inner;
    int64_t units = std::max<int64_t>(1, std::min<int64_t>(64 * width / unit, ceil_div(row, unit)));
    while (units > 1 && units / 2 * unit * element_size >= kSector && ceil_div(row, units * unit) * v.batch < wanted)
      units /= 2;
    e.lanes = uint16_t(units * unit / width);
    e.tile = uint16_t(units * unit / v.inner);
    e.parts_are_rows = true;
  } else {
    e.lanes = uint16_t(power_below(v.inner / (4 * width)));
    e.tile = uint16_t(kThreads / e.lanes);
    e.parts_are_rows = v.outer > v.inner;
  }
  e.tiles = uint32_t(ceil_div(v.groups, e.tile));
  const int64_t pieces = e.parts_are_rows ? v.outer : v.inner / width;
  const int64_t parts = ceil_div(wanted, e.tiles * v.batch);
  e.parts = uint32_t(std::clamp<int64_t>(parts, 1, std::max<int64_t>(pieces, 1)));
  return e;
}

}  // namespace rvsm::cuda
