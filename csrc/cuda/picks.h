// The cut of top-k: what the block of a cut does between the passes of selection.h. For host and device.
#pragma once

#include "selection.h"

namespace rvsm::cuda {

// The bin that holds the element with `larger` elements before it in descending order, where `above` lie above all
// bins.
template <class N, class ForThreads>
RVSM_HD void find_bin(const N* bins, Count larger, Count above, PickShared& shared, const ForThreads& for_threads) {
  constexpr int kOfThread = kBins / kThreads, kRow = kThreads / 16;
  for_threads([&](int thread) {
    Count sum = 0;
    RVSM_UNROLL
    for (int k = 0; k < kOfThread; ++k) sum += bins[thread * kOfThread + k];
    shared.of_threads[thread] = sum;
  });
  for_threads([&](int thread) {
    if (thread >= 16) return;
    Count sum = 0;
    for (int k = 0; k < kRow; ++k) sum += shared.of_threads[thread * kRow + k];
    shared.of_rows[thread] = sum;
  });
  for_threads([&](int thread) {
    if (thread != 0) return;
    Count before = above;
    int row = 15;
    while (row > 0 && before + shared.of_rows[row] <= larger) before += shared.of_rows[row--];
    int of = row * kRow + kRow - 1;
    while (of > row * kRow && before + shared.of_threads[of] <= larger) before += shared.of_threads[of--];
    int bin = of * kOfThread + kOfThread - 1;
    while (bin > of * kOfThread && before + bins[bin] <= larger) before += bins[bin--];
    shared.bin = bin;
    shared.before = before;
    shared.in_bin = bins[bin];
  });
}

// What is found of a cut. above: elements that are larger.
struct FoundCut {
  int64_t cut;
  Count above;
};

RVSM_HD void set_found(SelectState& s, const CutEntry& e, const FoundCut& found) {
  s.found = true;
  s.cut = found.cut;
  s.has_next = found.above < Count(e.survivors);  // another one ties with it
  if (s.has_next) s.next = Count(found.cut);
}

// The bracket around the last cut, if any. Nothing is taken from the last cut but where to look.
template <class T, class ForThreads>
RVSM_HD void begin_block(const CutEntry& e, const ForThreads& for_threads) {
  SelectState& s = *e.state;
  for_threads([&](int thread) {
    for (int i = thread; i < kBins; i += kThreads) s.bins[i] = 0;
    if (thread != 0) return;
    constexpr int64_t kMost = int64_t(kMostKey<T>);
    const int64_t last = e.last[0], reach = e.last[1];
    const bool few = e.numel <= kFewElements, warm = last >= 0 && reach >= 0;
    s.none = e.survivors >= e.numel;
    s.found = s.none;
    s.has_next = false;
    s.low = 0;
    s.high = kMost;
    if (!few && warm) {
      const int64_t room = kMost - last > 0 ? kMost - last : 0;
      s.low = last - reach > 0 ? last - reach : 0;
      s.high = last + (reach < room ? reach : room);
      s.high = s.high < kMost ? s.high : kMost;
    }
    s.has_bracket = !s.none && (few || warm) && s.low <= s.high;
    s.above = s.from_high = s.from_low = s.collected = 0;
    s.begin = 0;
    s.shift = kMagnitudeBits<T> - kBinBits;
    s.bins_used = kBins;
    s.above_range = 0;
    s.spread = 0;
    s.cut = 0;
    s.next = kNone;
    s.inside = e.inside;
    s.room = Count(room_of(e.numel));
  });
}

// Looks among those that were collected, if the cut is there.
template <class T, class ForThreads>
RVSM_HD void collected_block(const CutEntry& e, bool between, PickShared& shared, const ForThreads& for_threads) {
  SelectState& s = *e.state;
  const Count larger = Count(e.survivors), from_high = s.from_high, above = s.above, count = s.collected;
  if (s.found || !s.has_bracket || larger < above || larger >= s.from_low) return;
  const uint64_t low = uint64_t(s.low), high = uint64_t(s.high);
  const double spread = double(high - low) / double(count > 0 ? count : 1);
  const bool at_high = larger < from_high, at_low = !at_high && larger >= from_high + count, fits = count <= s.room;
  if (!at_high && !at_low && !fits) return;
  const Key<T>* const inside = static_cast<const Key<T>*>(s.inside);
  FoundCut found{int64_t(at_high ? high : low), at_high ? above : from_high + count};
  if (!at_high && !at_low) {
    uint64_t begin = low + 1, used = high - begin;
    int shift = 0;
    while ((used - 1) >> shift >= uint64_t(kBins)) ++shift;
    used = ((used - 1) >> shift) + 1;
    for (Count before = from_high;;) {
      clear_bins(shared.bins, for_threads);
      for_threads([&](int thread) {
        BinCounter counter{shared.bins};
        for (Count i = Count(thread); i < count; i += kThreads) {
          const uint64_t bin = (uint64_t(inside[i]) - begin) >> shift;
          if (bin < used) counter.add(uint32_t(bin));
        }
        counter.flush();
      });
      find_bin(shared.bins, larger, before, shared, for_threads);
      begin += uint64_t(shared.bin) << shift;
      before = shared.before;
      if (shift == 0) {
        found = {int64_t(begin), before};
        break;
      }
      const int bits = shift < kBinBits ? shift : kBinBits;
      used = uint64_t(1) << bits;
      shift -= bits;
    }
  }
  const bool looks = between && found.above >= larger && !at_high && fits;
  for_threads([&](int thread) {
    if (thread == 0) shared.least = from_high > above ? Count(high) : kNone;
  });
  for_threads([&](int thread) {
    if (!looks) return;
    Count least = kNone;
    for (Count i = Count(thread); i < count; i += kThreads) {
      const Count x = Count(inside[i]);
      least = x > Count(found.cut) && x < least ? x : least;
    }
    if (least != kNone) lower_shared(&shared.least, least);
  });
  for_threads([&](int thread) {
    if (thread != 0) return;
    s.spread = spread;
    set_found(s, e, found);
    if (looks && shared.least != kNone) {
      s.has_next = true;
      s.next = shared.least;
    }
  });
}

// The range becomes that of the bin that holds the cut.
template <class T, class ForThreads>
RVSM_HD void bin_block(const CutEntry& e, PickShared& shared, const ForThreads& for_threads) {
  SelectState& s = *e.state;
  if (s.found) return;
  const int shift = s.shift;
  find_bin(s.bins, Count(e.survivors), s.above_range, shared, for_threads);
  for_threads([&](int thread) {
    for (int i = thread; i < kBins; i += kThreads) s.bins[i] = 0;
    if (thread != 0) return;
    s.begin += int64_t(shared.bin) << shift;
    s.above_range = shared.before;
    if (s.spread == 0 || shared.in_bin >= Count(kLeastHeld))
      s.spread = double(int64_t(1) << shift) / double(shared.in_bin > 0 ? shared.in_bin : 1);
    if (shift == 0) {
      set_found(s, e, {s.begin, shared.before});
    } else {
      const int bits = shift < kBinBits ? shift : kBinBits;
      s.bins_used = 1 << bits;
      s.shift = shift - bits;
    }
  });
}

template <class T>
RVSM_HD T number_of(int64_t magnitude) {
  const Key<T> bits = Key<T>(magnitude);
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Halfway, each operation rounded for itself as torch's are; a contracted one would differ among subnormal numbers.
RVSM_HD float halfway(float low, float high) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(low, __fmul_rn(__fsub_rn(high, low), 0.5f));
#else
  return low + (high - low) / 2;
#endif
}
RVSM_HD double halfway(double low, double high) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(low, __dmul_rn(__dsub_rn(high, low), 0.5));
#else
  return low + (high - low) / 2;
#endif
}

// Writes the cut, and where to look the next time: around it, so far that the bracket would hold a given share of the
// elements if they lay as densely as where it was found; halfway from the last reach, as on the CPU
// (cpu/selection.cpp).
template <class T>
RVSM_HD void write_cut(const CutEntry& e, bool between) {
  const SelectState& s = *e.state;
  T* const to = static_cast<T*>(e.cut);
  if (s.none) {
    *to = T(-1);
    return;
  }
  const T low = number_of<T>(s.cut);
  *to = low;
  if (between && e.survivors > 0 && s.next != kNone && s.next < Count(kInfinityKey<T>)) {
    // The middle of two neighbouring floats may be rounded up to the upper one.
    const T high = number_of<T>(int64_t(s.next)), middle = halfway(low, high);
    if (middle < high) *to = middle;
  }
  if (e.numel <= kFewElements) return;
  const double width = s.spread / 2, numel = double(e.numel);
  const double least = width * (numel / kLastShare > kLeastHeld ? numel / kLastShare : kLeastHeld);
  double far = least;
  if (e.last[0] >= 0 && e.last[1] >= 0) {
    far = std::sqrt(least * double(e.last[1] > 1 ? e.last[1] : 1));
    const double most = width * (numel / kMovingShare), moved = 4 * std::fabs(double(s.cut) - double(e.last[0]));
    const double limited = moved < most ? moved : most;
    far = limited > far ? limited : far;
  }
  constexpr double kMost = double(kMostKey<T> / 4);
  e.last[0] = s.cut;
  e.last[1] = int64_t(far < kMost ? far : kMost) + 1;
}

// The block of a cut.
template <class T, class ForThreads>
RVSM_HD void pick_block(const CutTable& t, uint32_t block, PickShared& shared, const ForThreads& for_threads) {
  const CutEntry& e = t.at[block];
  if (t.pick == Pick::begin)
    begin_block<T>(e, for_threads);
  else if (t.pick == Pick::collected)
    collected_block<T>(e, t.between, shared, for_threads);
  else if (t.pick == Pick::bin)
    bin_block<T>(e, shared, for_threads);
  if (!t.writes) return;
  for_threads([&](int thread) {
    if (thread == 0) write_cut<T>(e, t.between);
  });
}

}  // namespace rvsm::cuda
