// The cut of top-k without a sort: what a thread and a block do. For host and device, like elements.h; the counterpart
// of csrc/cpu/selection.h, whose words it shares.
//
// Launches follow each other in a fixed order, and what a cut no longer needs returns at once: the host waits for
// nothing, and a graph can hold them all. One read counts what lies above a bracket around the last cut, and collects
// what lies inside; the cut is looked for among these. Where the bracket does not hold it, histograms find it, a read
// for each eleven bits. Threads add to shared counts and collect in any order: only integers are added, and the cut
// does not depend on the order of what was collected.
#pragma once

#include "general.h"

namespace rvsm::cuda {

using Count = unsigned long long;  // a type that CUDA's atomic operations know
constexpr Count kNone = ~Count(0);

// Bins of a histogram, and the bits of a magnitude that they tell apart.
constexpr int kBinBits = 11;
constexpr int kBins = 1 << kBinBits;

template <class T>
constexpr int kMagnitudeBits = int(8 * sizeof(T)) - 1;
template <class T>
constexpr Key<T> kMostKey = Key<T>((uint64_t(1) << kMagnitudeBits<T>)-1);
// Histograms that tell all magnitudes apart.
template <class T>
constexpr int kHistograms = (kMagnitudeBits<T> + kBinBits - 1) / kBinBits;

// Populations up to this size are collected as a whole.
constexpr int64_t kFewElements = 8192;
// The bracket around the last cut is made so wide that it holds one of kLastShare elements; of those that move fast,
// four times their last move, but at most one of kMovingShare. Room is for twice that.
constexpr int64_t kLastShare = 1024;
constexpr int64_t kMovingShare = 32;
constexpr int64_t kLeastHeld = 64;

// How many magnitudes a cut has room to collect.
RVSM_HD int64_t room_of(int64_t numel) {
  return numel <= kFewElements ? numel : numel / (kMovingShare / 2) + kFewElements / 8;
}

// What is known of a cut from launch to launch.
struct SelectState {
  int64_t low, high;              // the bracket; both ends belong to it
  bool has_bracket, found, none;  // none: all survive
  bool has_next;
  int32_t shift;  // bins of a histogram hold 2^shift magnitudes
  int32_t bins_used;
  // Of the scan, as in cpu::Found.
  Count above, from_high, from_low, collected;
  // Of the histograms: the range begins at `begin`, and so many elements lie above it.
  int64_t begin;
  Count above_range;
  double spread;  // mean distance of neighbours around the cut
  int64_t cut;
  Count next;  // the magnitude before the cut in descending order, kNone where it is not known
  void* inside;
  Count room;
  Count bins[kBins];
};

// One tensor that a pass reads.
struct PassEntry {
  const void* w;
  const void* rest;  // of the weights, where they have a master
  const void* dual;  // what is added to the weights, or null
  SelectState* state;
  int64_t numel;
  uint32_t first;                  // its first block
  uint8_t weight_type, dual_type;  // Dtype
  uint8_t master;                  // Master
  bool vectors;                    // all arrays begin on a 16-byte boundary
};

enum class Pass : uint32_t {
  scan,       // counts and collects
  histogram,  // of those whose cut is not found
  next,       // the smallest magnitude above the cut
};

struct PassTable {
  uint32_t entries = 0;
  uint32_t blocks = 0;
  Pass pass = Pass::scan;
  PassEntry at[680];
};
static_assert(sizeof(PassEntry) == 48 && sizeof(PassTable) <= 32764);

// One cut: a block.
struct CutEntry {
  SelectState* state;
  void* cut;      // a number in the type of the arithmetic
  int64_t* last;  // its magnitude in the step before, and how far the bracket goes to both sides
  void* inside;   // room for what is collected
  int64_t numel;
  int64_t survivors;
};

enum class Pick : uint32_t {
  begin,      // the bracket
  collected,  // among those
  bin,        // of the histogram
  end,        // nothing: only for `writes`
};

struct CutTable {
  uint32_t entries = 0;
  uint32_t blocks = 0;  // the same
  Pick pick = Pick::begin;
  bool between = false;  // as in cpu::cut
  bool writes = false;   // the cut is known then
  CutEntry at[680];
};
static_assert(sizeof(CutEntry) == 48 && sizeof(CutTable) <= 32764);

// Elements of a block: so many that few blocks empty their bins into those of the cut.
constexpr int64_t kPassChunk = int64_t(kThreads) * kRun * 8;

// ---- what threads share ---------------------------------------------------------------------------------------------

// Adds to a count that other threads add to; what it was.
template <class N>
RVSM_HD N add_to_shared(N* count, N n) {
#if defined(__CUDA_ARCH__)
  return atomicAdd(count, n);
#else
  const N before = *count;
  *count += n;
  return before;
#endif
}

// Lowers a number that other threads lower.
RVSM_HD void lower_shared(Count* least, Count x) {
#if defined(__CUDA_ARCH__)
  atomicMin(least, x);
#else
  *least = x < *least ? x : *least;
#endif
}

template <class T>
struct PassShared {
  static constexpr uint32_t kInside = kBins * sizeof(uint32_t) / sizeof(Key<T>);
  union {
    uint32_t bins[kBins];
    Key<T> inside[kInside];
  };
  uint32_t above, from_high, from_low, collected;
  Count place;  // of `inside` in the room of the cut
  Count least;
};

struct PickShared {
  uint32_t bins[kBins];
  Count of_threads[kThreads], of_rows[16];
  Count before, in_bin, least;
  int bin;
};

// ---- a pass over the elements ---------------------------------------------------------------------------------------

// Calls f with the magnitudes of n elements.
template <int n, class T, class F>
RVSM_HD void magnitudes_at(const PassEntry& e, int64_t i, const F& f) {
  T v[n];
  load_weights<n>(v, e.w, e.rest, e.weight_type, e.master, i);
  if (e.dual != nullptr) {
    T dual[n];
    load_array<n>(dual, e.dual, e.dual_type, i);
    RVSM_UNROLL
    for (int k = 0; k < n; ++k) v[k] = thresholded<Method::admm>(v[k], dual[k]);
  }
  RVSM_UNROLL
  for (int k = 0; k < n; ++k) f(key_of(v[k]));
}

// Calls f with the magnitudes of the thread's elements of a chunk.
template <class T, class F>
RVSM_HD void for_magnitudes(const PassEntry& e, uint32_t chunk, int thread, const F& f) {
  const int64_t begin = int64_t(chunk) * kPassChunk;
  const int64_t end = begin + kPassChunk < e.numel ? begin + kPassChunk : e.numel;
  const int64_t whole = e.vectors ? begin + (end - begin) / kRun * kRun : begin;
  RVSM_NO_UNROLL
  for (int64_t i = begin + int64_t(thread) * kRun; i < whole; i += int64_t(kThreads) * kRun)
    magnitudes_at<kRun, T>(e, i, f);
  RVSM_NO_UNROLL
  for (int64_t i = whole + thread; i < end; i += kThreads) magnitudes_at<1, T>(e, i, f);
}

template <class T, class ForThreads>
RVSM_HD void scan_block(const PassEntry& e, uint32_t chunk, PassShared<T>& shared, const ForThreads& for_threads) {
  SelectState& s = *e.state;
  if (!s.has_bracket) return;
  const Key<T> low = Key<T>(s.low), high = Key<T>(s.high);
  Key<T>* const inside = static_cast<Key<T>*>(s.inside);
  const Count room = s.room;
  for_threads([&](int thread) {
    if (thread == 0) shared.above = shared.from_high = shared.from_low = shared.collected = 0;
  });
  for_threads([&](int thread) {
    uint32_t above = 0, from_high = 0, from_low = 0;
    for_magnitudes<T>(e, chunk, thread, [&](Key<T> x) {
      above += uint32_t(x > high);
      from_high += uint32_t(x >= high);
      from_low += uint32_t(x >= low);
      if (x > low && x < high) {
        const uint32_t slot = add_to_shared(&shared.collected, 1u);
        if (slot < PassShared<T>::kInside) {
          shared.inside[slot] = x;
        } else {
          const Count place = add_to_shared(&s.collected, Count(1));
          if (place < room) inside[place] = x;
        }
      }
    });
    if (above != 0) add_to_shared(&shared.above, above);
    if (from_high != 0) add_to_shared(&shared.from_high, from_high);
    if (from_low != 0) add_to_shared(&shared.from_low, from_low);
  });
  for_threads([&](int thread) {
    if (thread != 0) return;
    if (shared.collected > PassShared<T>::kInside) shared.collected = PassShared<T>::kInside;
    shared.place = shared.collected != 0 ? add_to_shared(&s.collected, Count(shared.collected)) : 0;
    if (shared.above != 0) add_to_shared(&s.above, Count(shared.above));
    if (shared.from_high != 0) add_to_shared(&s.from_high, Count(shared.from_high));
    if (shared.from_low != 0) add_to_shared(&s.from_low, Count(shared.from_low));
  });
  for_threads([&](int thread) {
    for (uint32_t i = uint32_t(thread); i < shared.collected; i += kThreads)
      if (shared.place + i < room) inside[shared.place + i] = shared.inside[i];
  });
}

template <class ForThreads>
RVSM_HD void clear_bins(uint32_t* bins, const ForThreads& for_threads) {
  for_threads([&](int thread) {
    for (int i = thread; i < kBins; i += kThreads) bins[i] = 0;
  });
}

// Counts in bins; neighbours of a thread that tie are added as one.
struct BinCounter {
  uint32_t* bins;
  uint32_t held = 0, count = 0;
  RVSM_HD_MEMBER void add(uint32_t bin) {
    if (bin != held) {
      flush();
      held = bin;
    }
    ++count;
  }
  RVSM_HD_MEMBER void flush() {
    if (count != 0) add_to_shared(&bins[held], count);
    count = 0;
  }
};

template <class T, class ForThreads>
RVSM_HD void histogram_block(const PassEntry& e, uint32_t chunk, PassShared<T>& shared, const ForThreads& for_threads) {
  SelectState& s = *e.state;
  if (s.found) return;
  const uint64_t begin = uint64_t(s.begin), used = uint64_t(s.bins_used);
  const int shift = s.shift;
  clear_bins(shared.bins, for_threads);
  for_threads([&](int thread) {
    BinCounter counter{shared.bins};
    for_magnitudes<T>(e, chunk, thread, [&](Key<T> x) {
      const uint64_t bin = (uint64_t(x) - begin) >> shift;  // of what lies below: beyond all bins
      if (bin < used) counter.add(uint32_t(bin));
    });
    counter.flush();
  });
  for_threads([&](int thread) {
    for (int i = thread; i < kBins; i += kThreads)
      if (shared.bins[i] != 0) add_to_shared(&s.bins[i], Count(shared.bins[i]));
  });
}

template <class T, class ForThreads>
RVSM_HD void next_block(const PassEntry& e, uint32_t chunk, PassShared<T>& shared, const ForThreads& for_threads) {
  SelectState& s = *e.state;
  if (s.has_next || s.none) return;
  const Key<T> cut = Key<T>(s.cut);
  for_threads([&](int thread) {
    if (thread == 0) shared.least = kNone;
  });
  for_threads([&](int thread) {
    Count least = kNone;
    for_magnitudes<T>(e, chunk, thread, [&](Key<T> x) { least = x > cut && Count(x) < least ? Count(x) : least; });
    if (least != kNone) lower_shared(&shared.least, least);
  });
  for_threads([&](int thread) {
    if (thread == 0 && shared.least != kNone) lower_shared(&s.next, shared.least);
  });
}

// One block of a pass.
template <class T, class ForThreads>
RVSM_HD void pass_block(const PassTable& t, uint32_t block, PassShared<T>& shared, const ForThreads& for_threads) {
  const PassEntry& e = t.at[find(t.at, int(t.entries), block)];
  const uint32_t chunk = block - e.first;
  if (t.pass == Pass::scan)
    scan_block<T>(e, chunk, shared, for_threads);
  else if (t.pass == Pass::histogram)
    histogram_block<T>(e, chunk, shared, for_threads);
  else
    next_block<T>(e, chunk, shared, for_threads);
}

}  // namespace rvsm::cuda
