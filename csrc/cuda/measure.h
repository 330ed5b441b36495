// The statistics of a step (math/statistics.h), for the tensors that have a row for them. A launch before the step
// finds w, u and d of every element as the step will, and each of its blocks adds its share up; a last launch adds up
// the blocks of a tensor in their order and writes the row. So the kernels of a step know nothing of statistics, and no
// bit of a step depends on them; the arrays are read once more. For host and device, in phases like norms.h.
#pragma once

#include <limits>

#include "../math/statistics.h"
#include "general.h"

namespace rvsm::cuda {

// Elements of a block: more than a general step's, since a block ends with a sum over its threads.
constexpr int64_t kMeasuredChunk = 2 * kGeneralChunk;

// Sums of a thread, whose elements are few; those of a block and of a tensor are numbers of one type, exact up to 2^53.
using ThreadSums = SumsOf<int32_t>;
constexpr int kSumsOfTensor = 6;

RVSM_HD void pack(double* to, const ThreadSums& s) {
  to[0] = s.zeros;
  to[1] = s.nonfinite;
  to[2] = s.zero_groups;
  to[3] = s.gap;
  to[4] = s.grad;
  to[5] = s.value;
}

RVSM_HD SumsOf<double> unpack(const double* from) { return {from[0], from[1], from[2], from[3], from[4], from[5]}; }

// The numbers of a base are not needed.
template <class T>
using MeasuredNumbers = GeneralNumbers<T, NoBase<false>>;

// The penalty whose g is summed element by element; that of groups is summed over their norms.
template <class Pull>
constexpr Penalty kSummed = Penalty::none;
template <Penalty kPenalty, class T>
constexpr Penalty kSummed<ElementPull<kPenalty, T>> = kPenalty;

// Adds n elements from element i on as their step will find them. Every term is added in double: a square of a small
// float is no float.
template <int n, class T, class Pull>
RVSM_HD void measure_run(ThreadSums& sums, const GeneralEntry& e, const MeasuredNumbers<T>& numbers, int64_t i,
                         T factor, SplitSwitches on, const Pull& pull) {
  constexpr T kMost = std::numeric_limits<T>::max();
  const bool has_state = numbers.method != Method::rvsm;
  T w[n], g[n], states[n] = {};
  load_weights<n>(w, e.w, has_state ? e.state[1] : e.state[0], e.weight_type, e.master, i);
  load_array<n>(g, e.g, e.grad_type, i);
  if (has_state) load_array<n>(states, e.state[0], e.state_type[0], i);
  const auto at = pull.from(uint32_t(i));
  RVSM_UNROLL
  for (int k = 0; k < n; ++k) {
    T moved = w[k], state = states[k], u, unit;
    const T v = run_thresholded<true>(numbers.method, w[k], state);
    at(v, w[k], uint32_t(k), u, unit);
    if (!on.pull) u = w[k];
    T d = g[k] * factor;
    split_step(moved, d, run_gap<true>(numbers.method, w[k], v, u, state), unit, numbers.split, on);
    const double gap = double(w[k] - u);
    sums.gap += gap * gap;
    sums.grad += double(d) * double(d);
    sums.zeros += u == T(0);
    sums.nonfinite += !((std::fabs(w[k]) <= kMost) & (std::fabs(d) <= kMost));
    if constexpr (kSummed<Pull> != Penalty::none)
      sums.value += double(value<kSummed<Pull>>(std::fabs(u), numbers.split.prox.a));
  }
}

// Adds the thread's groups, from their norms.
template <class T>
RVSM_HD void measure_norms(ThreadSums& sums, const T* norms, int64_t begin, int64_t end, int thread,
                           const Prox<T>& prox) {
  with_penalty(prox.penalty, [&](auto tag) {
    constexpr Penalty kPenalty = decltype(tag)::value;
    RVSM_NO_UNROLL
    for (int64_t i = begin + thread; i < end; i += kThreads) {
      const T s = shrink<kPenalty>(norms[i], prox);
      sums.zero_groups += double(s) < kZeroNorm;
      sums.value += double(value<kPenalty>(s, prox.a));
    }
  });
}

// The share of one thread of one block. The entries are those of a general step, whose only states are the method's and
// the rest of the weights; one without a gradient has the norms of groups in the place of w.
template <class T>
RVSM_HD ThreadSums measure_thread(const Table& t, uint32_t block, int thread) {
  const GeneralEntry* const entries = general_entries(t);
  const int index = find(entries, int(t.entries), block);
  const GeneralEntry& e = entries[index];
  const int64_t begin = int64_t(block - e.first) * kMeasuredChunk;
  const int64_t end = begin + kMeasuredChunk < e.numel ? begin + kMeasuredChunk : e.numel;
  const bool grouped = (e.record & kGrouped) != 0;
  const uint32_t slot = grouped ? slot_of<FactorPlace>(t, e.record & ~kGrouped).record : e.record;
  const GeneralRecord<T>& record = slot_of<GeneralRecord<T>>(t, slot);
  const MeasuredNumbers<T> numbers = general_numbers<NoBase<false>>(t, index, record);
  const Prox<T>& prox = numbers.split.prox;
  ThreadSums sums;
  const auto measure = [&](const auto& pull) {
    const T factor = scale_of<T>(t) * numbers.split.grad;
    const SplitSwitches on{pull.pulls(prox), numbers.lasso && pull.kMayLasso};
    const int64_t whole = e.vectors ? begin + (end - begin) / kRun * kRun : begin;
    RVSM_NO_UNROLL
    for (int64_t i = begin + int64_t(thread) * kRun; i < whole; i += kThreads * kRun)
      measure_run<kRun>(sums, e, numbers, i, factor, on, pull);
    RVSM_NO_UNROLL
    for (int64_t i = whole + thread; i < end; i += kThreads) measure_run<1>(sums, e, numbers, i, factor, on, pull);
  };
  if (e.g == nullptr)
    measure_norms(sums, static_cast<const T*>(e.w), begin, end, thread, prox);
  else if (grouped)
    measure(NormPull<T>{slot_of<FactorPlace>(t, e.record & ~kGrouped), prox, 0});
  else if (record.keep != 0)
    measure(KeptPull<T>{static_cast<const uint8_t*>(record.cut), prox.penalty != Penalty::none, 0});
  else
    with_penalty(prox.penalty, [&](auto tag) { measure(ElementPull<decltype(tag)::value, T>{prox}); });
  return sums;
}

// Numbers that `sums` of measure_block needs room for.
constexpr int kMeasuredSums = kThreads * kSumsOfTensor;

// table.totals[block]: the sums of a block. The last blocks come first: what they leave in the caches is what the step,
// whose first blocks come first, reads again at once.
template <class T, class ForThreads>
RVSM_HD void measure_block(const Table& table, uint32_t block, double* sums, const ForThreads& for_threads) {
  if (table.found_inf != nullptr && *table.found_inf > 0) return;
  const uint32_t of = table.blocks - 1 - block;
  for_threads([&](int thread) { pack(sums + thread * kSumsOfTensor, measure_thread<T>(table, of, thread)); });
  fold(sums, kThreads, kSumsOfTensor, for_threads);
  for_threads([&](int thread) {
    if (thread < kSumsOfTensor) table.totals[int64_t(of) * kSumsOfTensor + thread] = sums[thread];
  });
}

// ---- the rows -------------------------------------------------------------------------------------------------------

// One tensor, and one block of the launch.
struct RowEntry {
  double* row;
  const double* sums;  // kSumsOfTensor for each of `blocks`
  int64_t blocks;
  double lam, beta;  // 1 where `device` has the number
  DeviceNumbers device;
  bool grouped, split;
};

struct RowTable {
  uint32_t entries = 0;
  uint32_t blocks = 0;
  const float* found_inf = nullptr;  // on the device; above 0 the rows stay as they are
  RowEntry at[341];
};
static_assert(sizeof(RowTable) <= 32764);

// Numbers that `sums` of row_block needs room for: as many sums of all kinds as there are threads for.
constexpr int kRowSums = kThreads / kSumsOfTensor * kSumsOfTensor;

template <class ForThreads>
RVSM_HD void row_block(const RowTable& table, uint32_t block, double* sums, const ForThreads& for_threads) {
  if (table.found_inf != nullptr && *table.found_inf > 0) return;
  const RowEntry& e = table.at[block];
  for_threads([&](int thread) {
    if (thread >= kRowSums) return;
    const int64_t count = e.blocks * kSumsOfTensor;
    double sum = 0;
#if defined(__CUDACC__)
#pragma unroll 4
#endif
    for (int64_t i = thread; i < count; i += kRowSums) sum += e.sums[i];
    sums[thread] = sum;
  });
  fold(sums, kRowSums / kSumsOfTensor, kSumsOfTensor, for_threads);
  for_threads([&](int thread) {
    if (thread == 0)
      write_row(e.row, unpack(sums), e.grouped, e.split, e.lam * read_number(e.device, kLam),
                e.beta * read_number(e.device, kBeta));
  });
}

}  // namespace rvsm::cuda
