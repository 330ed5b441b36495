// What a launch is told about its tensors, and where each block and thread finds its elements. For host and device,
// without the CUDA runtime: the C++ tests walk every index here.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../math/bases.h"
#include "../math/split.h"
#include "../math/storage.h"

namespace rvsm::cuda {

#if defined(__CUDACC__)
#define RVSM_UNROLL _Pragma("unroll")
#define RVSM_NO_UNROLL _Pragma("unroll 1")
#define RVSM_HD_MEMBER __host__ __device__ __forceinline__
// The compiler moves no access to memory across this line, so that fewer numbers are in registers at a time.
#define RVSM_KEEP_ORDER() asm volatile("" ::: "memory")
#else
#define RVSM_UNROLL
#define RVSM_NO_UNROLL
#define RVSM_HD_MEMBER inline
#define RVSM_KEEP_ORDER() static_cast<void>(0)
#endif

constexpr int kThreads = 256;
// Vectors of 16 bytes that a thread takes one after the other from each array of its chunk.
constexpr int kVectors = 4;

template <class S>
constexpr int kWidth = 16 / int(sizeof(S));

// 16 bytes of storage: one access.
template <class S>
struct alignas(16) Vector {
  S at[kWidth<S>];
};

// Elements of a chunk, the share of one block.
template <class S>
constexpr int64_t kChunk = int64_t(kThreads) * kVectors * kWidth<S>;

// ---- the table: kernel parameters, so that no copy to the device stands before a launch -----------------------------

// One tensor. Its chunks belong to the blocks from `first` up to the next entry's. The number of states is known at
// compile time, and the same for all tensors of a launch.
template <int kStates>
struct TableEntry {
  void* w;
  void* g;          // the gradient of a step; what a prox reads
  uint32_t first;   // its first block
  uint16_t rest;    // elements of its last chunk; kScalar is added where vectors of the arrays do not line up
  uint16_t record;  // the slot of its Record, or of its FactorPlace or Tiles (kGrouped is added)
  void* state[kStates];
};
template <>
struct TableEntry<0> {
  void* w;
  void* g;
  uint32_t first;
  uint16_t rest;
  uint16_t record;
};

constexpr uint16_t kScalar = 0x8000;
constexpr uint16_t kGrouped = 0x8000;

template <int kStates>
RVSM_HD void* state_of(const TableEntry<kStates>& e, int k) {
  if constexpr (kStates > 0) return e.state[k];
  return nullptr;
}

// Division of numbers below 2^31 by a divisor that the host knows: a product and a shift (Granlund & Montgomery).
struct Divider {
  uint32_t factor = 1, shift = 0;

  RVSM_HD_MEMBER uint32_t operator()(uint32_t n) const { return (uint32_t(uint64_t(n) * factor >> 32) + n) >> shift; }
};

inline Divider divider(int64_t d) {
  Divider r;
  while ((int64_t(1) << r.shift) < d) ++r.shift;
  r.factor = uint32_t((uint64_t(1) << 32) * ((uint64_t(1) << r.shift) - uint64_t(d)) / uint64_t(d) + 1);
  return r;
}

// Where the factors of a tensor in groups are. The element at offset `at` has those of group
// at / batch_size * groups + at % columns / inner, with columns = groups * inner and batch_size = outer * columns. For
// tensors of fewer than 2^31 elements (see for_pieces).
struct alignas(32) FactorPlace {
  const void* ratio;   // shrink(norm) / norm of each group; for a general step its norm
  const void* length;  // its norm, with group_lasso
  uint32_t columns, groups;
  Divider by_columns, by_inner, by_batch;
  uint32_t record;  // the slot of the Record
  uint32_t inner;

  // The number of the group.
  RVSM_HD_MEMBER uint32_t group(uint32_t at) const {
    return by_batch(at) * groups + by_inner(at - by_columns(at) * columns);
  }

  // The numbers of the groups of a few elements that follow each other, at most kMostFollowing and `columns`.
  struct Following {
    uint32_t first;        // of the first element
    uint32_t place, step;  // of element k: (place + k * step) >> 16 more
    uint32_t rest, back;   // from element `rest` on, which begins a row, so many less
    RVSM_HD_MEMBER uint32_t operator()(uint32_t k) const {
      return first + ((place + k * step) >> 16) - (k >= rest ? back : 0);
    }
  };
  RVSM_HD_MEMBER Following following(uint32_t at) const;
};

constexpr uint32_t kMostFollowing = 8;

RVSM_HD_MEMBER FactorPlace::Following FactorPlace::following(uint32_t at) const {
  const uint32_t column = at - by_columns(at) * columns, batch = by_batch(at), in_row = by_inner(column);
  const uint32_t rest = columns - column, of_group = inner - (column - in_row * inner);
  // A group that goes on for more elements than follow is as good as a shorter one; below 16 a product with 2^16 / n
  // divides exactly.
  constexpr uint32_t kLong = 2 * kMostFollowing;
  const uint32_t length = inner < kLong ? inner : kLong, left = of_group < length ? of_group : length;
  const uint32_t step = (1u << 16) / length + 1;
  return {batch * groups + in_row, (length - left) * step, step, rest, by_batch(at + rest) == batch ? groups : 0};
}

inline FactorPlace factor_place(const GroupView& v, const void* ratio, const void* length) {
  const int64_t columns = v.groups * v.inner;
  return {ratio,
          length,
          uint32_t(columns),
          uint32_t(v.groups),
          divider(columns),
          divider(v.inner),
          divider(v.outer * columns),
          0,
          uint32_t(v.inner)};
}

// The numbers of a step, shared by all tensors with the same numbers; a tensor with top-k has a record of its own.
// Where a launch before this one makes the factors, only the name of the penalty is set in split.prox.
template <class T, class Base>
struct alignas(32) Record {
  Split<T> split;
  typename Base::template Numbers<T> base;
  const void* cut;  // of top-k, in the type of the arithmetic; null: split.prox has the cut
  uint8_t method;   // Method
  bool lasso;
  // Of N:M sparsity, 0 for other penalties. `cut` are the bits of the elements that survive (windows.h) then; null: all
  // windows are consecutive elements of a vector.
  uint8_t keep, window;
  typename Base::Switches switches;
};

// The numbers of a penalty's value.
template <class T>
struct alignas(32) Value {
  Prox<T> prox;
  double lam, beta;
};

// A kernel takes 32,764 bytes of parameters. Records stand in slots of 32 bytes.
constexpr int kSlotBytes = 32;
constexpr int kSlots = 1022;

// Entries fill the memory from the front, records from the back.
struct alignas(32) Table {
  uint32_t entries = 0;
  uint32_t blocks = 0;
  const float* grad_scale = nullptr;  // on the device; null: 1
  const float* found_inf = nullptr;   // on the device; above 0 nothing is written
  union {
    double* totals = nullptr;   // of a penalty's value: one number per block
    const double* corrections;  // of a step: kMostCorrections per entry, made on the device; null: those of the records
  };
  unsigned char slots[kSlots * kSlotBytes];
};
static_assert(sizeof(TableEntry<1>) == 32 && sizeof(FactorPlace) == 64 && sizeof(Table) <= 32764);

template <class X>
constexpr int kSlotsOf = int(sizeof(X)) / kSlotBytes;

template <class X>
RVSM_HD const X& slot_of(const Table& t, uint32_t slot) {
  return *reinterpret_cast<const X*>(t.slots + slot * kSlotBytes);
}

template <int kStates>
RVSM_HD const TableEntry<kStates>* entries_of(const Table& t) {
  return reinterpret_cast<const TableEntry<kStates>*>(t.slots);
}

// ---- block -> (tensor, chunk) ---------------------------------------------------------------------------------------

// The index of the entry that a block works for. E: any struct with `first`; entries are in rising order of it.
template <class E>
RVSM_HD int find(const E* entries, int count, uint32_t block) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (entries[middle].first <= block)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

RVSM_HD bool begins_on_boundary(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Elements before the first 16-byte boundary.
template <class S>
RVSM_HD int64_t elements_before_boundary(const void* p) {
  return int64_t((16 - reinterpret_cast<uintptr_t>(p) % 16) % 16 / sizeof(S));
}

// The share of one block: `head` elements one by one from `begin`, then `count` elements in vectors, and one by one
// what is left of them.
struct Span {
  int64_t begin;
  int head;
  int count;
  bool vectors;
};

template <class S, class Entry>
RVSM_HD Span span_of(const Entry& e, uint32_t chunk, uint32_t chunks) {
  const bool vectors = (e.rest & kScalar) == 0;
  const int64_t head = vectors ? elements_before_boundary<S>(e.w) : 0;
  const int count = chunk + 1 == chunks ? int(e.rest & ~kScalar) : int(kChunk<S>);
  if (chunk == 0) return {0, int(head), count, vectors};
  return {head + int64_t(chunk) * kChunk<S>, 0, count, vectors};
}

// Calls vector(offset) for the thread's vectors and scalar(offset) for its single elements, counted from `begin`: 32
// bits beside an address that all threads share.
template <class S, class F, class Scalar>
RVSM_HD void for_elements(const Span& s, int thread, const F& vector, const Scalar& scalar) {
  const uint32_t head = uint32_t(s.head), count = uint32_t(s.count), width = kWidth<S>, t = uint32_t(thread);
  if (t < head) scalar(t);
  const uint32_t whole = s.vectors ? count / width * width : 0;
  RVSM_NO_UNROLL
  for (uint32_t i = t * width; i < whole; i += kThreads * width) vector(head + i);
  RVSM_NO_UNROLL
  for (uint32_t i = whole + t; i < count; i += kThreads) scalar(head + i);
}

// The same where the elements of one array are read alone: vector(v) with the thread's vectors, of which kAhead are
// read before the first is looked at.
template <int kAhead, class S, class F, class Scalar>
RVSM_HD void for_elements_ahead(const Span& s, int thread, const S* array, const F& vector, const Scalar& scalar) {
  const uint32_t head = uint32_t(s.head), count = uint32_t(s.count), width = kWidth<S>, t = uint32_t(thread);
  if (t < head) scalar(t);
  const uint32_t whole = s.vectors ? count / width * width : 0;
  RVSM_NO_UNROLL
  for (uint32_t i = t * width; i < whole; i += kAhead * kThreads * width) {
    Vector<S> v[kAhead];
    RVSM_UNROLL
    for (uint32_t k = 0; k < kAhead; ++k)
      if (i + k * kThreads * width < whole)
        v[k] = *reinterpret_cast<const Vector<S>*>(array + head + i + k * kThreads * width);
    RVSM_KEEP_ORDER();
    RVSM_UNROLL
    for (uint32_t k = 0; k < kAhead; ++k)
      if (i + k * kThreads * width < whole) vector(v[k]);
  }
  RVSM_NO_UNROLL
  for (uint32_t i = whole + t; i < count; i += kThreads) scalar(head + i);
}

// ---- host: one tensor becomes an entry ------------------------------------------------------------------------------

// Chunks of a tensor, and `rest` of its entry. Vectors are possible where all arrays are equally far from a boundary
// and there is more than what stands before it.
struct Chunks {
  uint32_t count;
  uint16_t rest;
};

// `others`: the arrays beside w; null ones do not matter.
template <class S>
inline Chunks chunks_of(int64_t numel, const void* w, const void* const* others, int count) {
  const int64_t head = elements_before_boundary<S>(w);
  const auto lines_up = [&](const void* p) { return p == nullptr || elements_before_boundary<S>(p) == head; };
  const bool vectors = head < numel && std::all_of(others, others + count, lines_up);
  const int64_t body = vectors ? numel - head : numel;
  const int64_t chunks = (body + kChunk<S> - 1) / kChunk<S>;
  const int64_t rest = body - (chunks - 1) * kChunk<S>;
  return {uint32_t(chunks), uint16_t(rest | (vectors ? 0 : kScalar))};
}

// A tensor in groups with fewer elements than this is one entry, a larger one several (for_pieces): index arithmetic in
// 32 bits costs a quarter of that in 64 bits.
constexpr int64_t kNarrow = int64_t(1) << 31;

// Calls f(offset, view, group) for the pieces of a tensor in groups, each with fewer than `limit` elements: the view of
// a piece that begins `offset` elements into the tensor and whose first group has that number.
template <class F>
inline void for_pieces(const GroupView& v, int64_t limit, const F& f) {
  const int64_t columns = v.groups * v.inner, size = v.outer * columns;
  if (size < limit) {
    const int64_t most = (limit - 1) / size;
    for (int64_t b = 0; b < v.batch; b += most)
      f(b * size, GroupView{std::min(most, v.batch - b), v.outer, v.groups, v.inner}, b * v.groups);
    return;
  }
  for (int64_t b = 0; b < v.batch; ++b) {
    if (columns < limit) {
      const int64_t most = (limit - 1) / columns;
      for (int64_t o = 0; o < v.outer; o += most)
        f(b * size + o * columns, GroupView{1, std::min(most, v.outer - o), v.groups, v.inner}, b * v.groups);
      continue;
    }
    for (int64_t o = 0; o < v.outer; ++o) {
      const int64_t row = b * size + o * columns, first = b * v.groups;
      if (v.inner < limit) {
        const int64_t most = (limit - 1) / v.inner;
        for (int64_t g = 0; g < v.groups; g += most)
          f(row + g * v.inner, GroupView{1, 1, std::min(most, v.groups - g), v.inner}, first + g);
        continue;
      }
      for (int64_t g = 0; g < v.groups; ++g)
        for (int64_t i = 0; i < v.inner; i += limit - 1)
          f(row + g * v.inner + i, GroupView{1, 1, 1, std::min(limit - 1, v.inner - i)}, first + g);
    }
  }
}

}  // namespace rvsm::cuda
