// Groups that are short and consecutive in memory ("resident"): one block sums a few of them and then does their step,
// while they are in its caches. So w is read from memory once, and no factor of a group goes to memory. For host and
// device, in phases like norms.h.
#pragma once

#include "norms.h"

namespace rvsm::cuda {

// How a tensor of such groups is divided. Its slot stands in an entry, with kGrouped.
struct alignas(32) Tiles {
  uint32_t inner;   // elements of a group
  uint32_t groups;  // of the tensor
  uint16_t tile;    // groups of a block
  uint16_t lanes;   // threads that sum a group
  Divider by_inner;
  uint32_t record;  // the slot of the Record
};
static_assert(sizeof(Tiles) == 32);

// A block sums the groups of its tile in at most this many rounds.
constexpr int kRounds = 4;

// Numbers of a block that all of its threads share.
template <class T>
struct ResidentShared {
  double sums[kRounds * kThreads];
  T ratio[kRounds * kThreads], length[kRounds * kThreads];
};

// u = w * ratio, w_G / ||w_G|| = w / length, by the factors that the block has just made. No vector holds elements of
// two groups: one look at the factors is enough.
template <bool kLasso, class T>
struct TilePull {
  static constexpr bool kMayLasso = kLasso;
  RVSM_HD_MEMBER bool pulls(const Prox<T>& prox) const { return prox.penalty != Penalty::none; }
  const T* ratio;
  const T* length;
  const Tiles& tiles;

  struct One {
    T ratio, length;
    RVSM_HD_MEMBER void operator()(T v, T w, uint32_t, T& u, T& unit) const {
      u = v * ratio;
      unit = kLasso ? w / length : T(0);
    }
  };
  RVSM_HD_MEMBER One from(uint32_t at) const {
    const uint32_t group = tiles.by_inner(at);
    return {ratio[group], kLasso ? length[group] : T(1)};
  }
};

// Phase 1: one thread's share of the sums of its groups. kAhead: accesses that wait for memory together.
template <int kLoad, int kAhead, class S>
RVSM_HD void sum_groups(const S* w, const Tiles& t, int groups, int thread, double* sums) {
  const int lane = thread % t.lanes, step = kThreads / t.lanes;
  RVSM_NO_UNROLL
  for (int group = thread / t.lanes; group < t.tile; group += step) {
    double acc[kLoad] = {};
    const uint32_t first = uint32_t(lane) * kLoad, distance = uint32_t(t.lanes) * kLoad;
    if (group < groups)
      add_run<kLoad, kAhead, true, false>(acc, w + uint32_t(group) * t.inner + first, first, t.inner, distance,
                                          distance, 0);
    RVSM_UNROLL
    for (int k = 1; k < kLoad; ++k) acc[0] += acc[k];
    sums[lane * t.tile + group] = acc[0];
  }
}

// One block; kStep: a step, else entry.w <- u of entry.g.
template <class S, class Base, bool kStep, class ForThreads>
RVSM_HD void resident_block(const Table& table, uint32_t block, ResidentShared<Opmath<S>>& shared,
                            const ForThreads& for_threads) {
  using T = Opmath<S>;
  if (table.found_inf != nullptr && *table.found_inf > 0) return;
  const auto* const entries = entries_of<Base::kStates>(table);
  const int index = find(entries, int(table.entries), block);
  const auto& e = entries[index];
  const Tiles& t = slot_of<Tiles>(table, e.record & ~kGrouped);
  const Record<T, Base>& record = slot_of<Record<T, Base>>(table, t.record);
  const uint32_t first = (block - e.first) * t.tile;
  const int groups = int(t.groups - first < t.tile ? t.groups - first : t.tile);
  const int64_t begin = int64_t(first) * t.inner;
  const S* const w = static_cast<const S*>(kStep ? e.w : e.g) + begin;
  const bool vectors = (e.rest & kScalar) == 0;
  // Where fewer threads are at work, each has more registers.
  constexpr int kAhead = Base::kStates > 1 && sizeof(S) == 2 ? 8 : Base::kStates > 1 || sizeof(S) != 4 ? 4 : 2;
  for_threads([&](int thread) {
    if (vectors)
      sum_groups<kWidth<S>, kAhead>(w, t, groups, thread, shared.sums);
    else
      sum_groups<1, 1>(w, t, groups, thread, shared.sums);
  });
  fold(shared.sums, t.lanes, t.tile, for_threads);
  for_threads([&](int thread) {
    for (int group = thread; group < groups; group += kThreads) {
      const T norm = T(std::sqrt(shared.sums[group]));
      shared.ratio[group] = shrink_ratio(norm, record.split.prox);
      shared.length[group] = length_of(norm);
    }
  });
  for_threads([&](int thread) {
    const Span span{begin, 0, groups * int(t.inner), vectors};
    const auto apply = [&](const auto& pull) {
      if constexpr (kStep)
        with_base_numbers(table, index, record, [&](const auto& numbers) {
          step_elements<S, Base, false>(e, record, numbers, span, thread, scale_of<T>(table), 0, pull);
        });
      else
        prox_elements<S>(e, span, thread, 0, pull);
    };
    if (kStep && record.lasso)
      apply(TilePull<true, T>{shared.ratio, shared.length, t});
    else
      apply(TilePull<false, T>{shared.ratio, shared.length, t});
  });
}

// ---- host -----------------------------------------------------------------------------------------------------------

// Bytes of a tile that stay in the caches while all multiprocessors work on theirs.
constexpr int64_t kResident = 49152;
// Elements of a block that are worth its start.
constexpr int64_t kWorth = 4096;

// Whether groups are consecutive in memory, short enough, and made of whole vectors.
inline bool is_resident(const GroupView& v, int64_t element_size) {
  const int64_t bytes = v.inner * element_size;
  return v.outer == 1 && bytes % 16 == 0 && bytes <= kResident && v.count() * v.inner < kNarrow;
}

inline Tiles make_tiles(const GroupView& v, int64_t element_size) {
  Tiles t{};
  t.inner = uint32_t(v.inner);
  t.groups = uint32_t(v.count());
  t.lanes = uint16_t(power_below(v.inner * element_size / 64));
  const int64_t at_once = kThreads / t.lanes, rounds = std::clamp<int64_t>(kWorth / (at_once * v.inner), 1, kRounds);
  const int64_t fit = std::max<int64_t>(1, kResident / (v.inner * element_size));
  t.tile = uint16_t(std::min(at_once * rounds, fit));
  t.by_inner = divider(v.inner);
  return t;
}

}  // namespace rvsm::cuda
