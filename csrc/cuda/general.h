// Steps whose arrays have several storage types, or whose numbers stand on the device: half-type weights with a master,
// stochastic rounding, states of another type, options that a scheduler fills in place. All of that is known only when
// a step runs: one kernel for each type of the arithmetic and base, in the place of one for each combination. For host
// and device, like elements.h.
#pragma once

#include "norms.h"

namespace rvsm::cuda {

// ---- the numbers of a record ----------------------------------------------------------------------------------------

// A record that is finished on the device.
template <class T>
struct FinishedRecord {
  T numbers[kMostNumbers];
  uint32_t at_rest;  // lr is 0
};

// One record: the host's numbers, those of the device, and where the finished record goes.
struct NumbersEntry {
  void* out;  // a FinishedRecord<double> where `wide`, else of float
  DeviceNumbers device;
  BaseKind base;
  bool wide;
  double numbers[kMostNumbers];
};

struct NumbersTable {
  uint32_t entries = 0;
  uint32_t blocks = 0;
  NumbersEntry at[141];
};
static_assert(sizeof(NumbersTable) <= 32764);

template <class T>
RVSM_HD void write_record(void* out, const double* numbers, bool at_rest) {
  FinishedRecord<T>* const record = static_cast<FinishedRecord<T>*>(out);
  RVSM_UNROLL
  for (int i = 0; i < kMostNumbers; ++i) record->numbers[i] = T(numbers[i]);
  record->at_rest = at_rest;
}

// One thread for each record.
RVSM_HD void numbers_thread(const NumbersTable& t, uint32_t block, int thread) {
  const uint32_t i = block * kThreads + uint32_t(thread);
  if (i >= t.entries) return;
  const NumbersEntry& e = t.at[i];
  double numbers[kMostNumbers];
  RVSM_UNROLL
  for (int k = 0; k < kMostNumbers; ++k) numbers[k] = e.numbers[k];
  const bool at_rest = fill_in(numbers, e.base, e.device);
  if (e.wide)
    write_record<double>(e.out, numbers, at_rest);
  else
    write_record<float>(e.out, numbers, at_rest);
}

// ---- the table ------------------------------------------------------------------------------------------------------

// One tensor, or a piece of a tensor in groups. What all entries begin with comes first, as in TableEntry.
struct alignas(32) GeneralEntry {
  void* w;
  void* g;
  uint32_t first;    // its first block
  uint16_t vectors;  // whether all arrays begin on a 16-byte boundary
  uint16_t record;   // the slot of its GeneralRecord, or of its FactorPlace (kGrouped is added)
  void* state[kMostStates];
  int64_t numel;
  int64_t offset;        // of its first element in the tensor: random bits belong to elements of the tensor
  const float* counter;  // holds the number of this step, where it is rounded stochastically
  uint64_t seed;
  uint8_t weight_type, grad_type, state_type[kMostStates];  // Dtype
  uint8_t rounds, master;                                   // stochastically; Master
};
static_assert(sizeof(GeneralEntry) == 128);

// The numbers of a step, shared like a Record. Of groups the factor is made where it is needed, from the norm.
template <class T>
struct alignas(32) GeneralRecord {
  const FinishedRecord<T>* finished;  // on the device; null: `numbers` are whole
  const void* cut;                    // of top-k, in the type of the arithmetic, or null; as in Record
  uint8_t method;                     // Method
  bool lasso;
  uint8_t keep;  // as in Record
  T numbers[kMostNumbers];
};

RVSM_HD const GeneralEntry* general_entries(const Table& t) { return reinterpret_cast<const GeneralEntry*>(t.slots); }

// ---- arrays ---------------------------------------------------------------------------------------------------------

// Elements of a vector: 16 bytes of a half type, and what one call of Philox has random bits for.
constexpr int kRun = 8;
static_assert(kRun == kElementsOfCall);
// Elements of a block.
constexpr int64_t kGeneralChunk = int64_t(kThreads) * kRun * 2;

// n elements from element i on; n is 1, or kRun elements of an array that begins on a boundary.
template <int n, class S>
struct alignas(n == 1 ? sizeof(S) : 16) Run {
  S at[n];
};

template <int n, class S>
RVSM_HD Run<n, S> read_run(const void* array, int64_t i) {
  return *reinterpret_cast<const Run<n, S>*>(static_cast<const S*>(array) + i);
}

template <int n, class S>
RVSM_HD void write_run(void* array, int64_t i, const Run<n, S>& run) {
  *reinterpret_cast<Run<n, S>*>(static_cast<S*>(array) + i) = run;
}

template <int n, class S, class T>
RVSM_HD void load_run(T* to, const void* array, int64_t i) {
  const Run<n, S> run = read_run<n, S>(array, i);
  RVSM_UNROLL
  for (int k = 0; k < n; ++k) to[k] = load(run.at[k]);
}

template <int n, class S, class T>
RVSM_HD void store_run(void* array, int64_t i, const T* from) {
  Run<n, S> run;
  RVSM_UNROLL
  for (int k = 0; k < n; ++k) store(run.at[k], from[k]);
  write_run(array, i, run);
}

// All arrays of double-precision arithmetic are double.
template <int n>
RVSM_HD void load_array(double* to, const void* array, int, int64_t i) {
  load_run<n, double>(to, array, i);
}
template <int n>
RVSM_HD void store_array(void* array, int, int64_t i, const double* from) {
  store_run<n, double>(array, i, from);
}

template <int n>
RVSM_HD void load_array(float* to, const void* array, int dtype, int64_t i) {
  if (dtype == int(Dtype::bf16))
    load_run<n, BFloat16>(to, array, i);
  else if (dtype == int(Dtype::f16))
    load_run<n, Float16>(to, array, i);
  else
    load_run<n, float>(to, array, i);
}
template <int n>
RVSM_HD void store_array(void* array, int dtype, int64_t i, const float* from) {
  if (dtype == int(Dtype::bf16))
    store_run<n, BFloat16>(array, i, from);
  else if (dtype == int(Dtype::f16))
    store_run<n, Float16>(array, i, from);
  else
    store_run<n, float>(array, i, from);
}

// ---- weights --------------------------------------------------------------------------------------------------------

template <int n, class Half, class Rest>
RVSM_HD void join_run(float* to, const void* param, const void* rest, int64_t i) {
  const Run<n, Half> upper = read_run<n, Half>(param, i);
  const Run<n, Rest> lower = read_run<n, Rest>(rest, i);
  RVSM_UNROLL
  for (int k = 0; k < n; ++k) to[k] = join(upper.at[k], lower.at[k]);
}

template <int n, class Half, class Rest>
RVSM_HD void split_run(void* param, void* rest, int64_t i, const float* from) {
  Run<n, Half> upper;
  Run<n, Rest> lower;
  RVSM_UNROLL
  for (int k = 0; k < n; ++k) split(upper.at[k], lower.at[k], from[k]);
  write_run(param, i, upper);
  write_run(rest, i, lower);
}

// `rest`: the state of the master.
template <int n>
RVSM_HD void load_weights(float* to, const void* w, const void* rest, int dtype, int master, int64_t i) {
  if (master == int(Master::low))
    join_run<n, BFloat16, int16_t>(to, w, rest, i);
  else if (master == int(Master::whole))
    join_run<n, Float16, float>(to, w, rest, i);
  else
    load_array<n>(to, w, dtype, i);
}
template <int n>
RVSM_HD void load_weights(double* to, const void* w, const void*, int dtype, int, int64_t i) {
  load_array<n>(to, w, dtype, i);
}

// 16 random bits for each of the eight elements of a call, in four words.
RVSM_HD void random_words(uint32_t* x, uint64_t call, uint64_t seed, uint32_t step) {
  x[0] = uint32_t(call);
  x[1] = uint32_t(call >> 32);
  x[2] = step;
  x[3] = 0;
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  RVSM_UNROLL
  for (int r = 0; r < kPhiloxRounds; ++r) {
    philox_round(x[0], x[1], x[2], x[3], key0, key1);
    key0 += kPhiloxKey0;
    key1 += kPhiloxKey1;
  }
}

template <int n, class Half>
RVSM_HD void round_run(void* array, int64_t i, const float* from, const uint32_t* words, uint32_t skip) {
  Run<n, Half> run;
  RVSM_UNROLL
  for (int k = 0; k < n; ++k) {
    // Shifted to, not indexed: so the words stay in registers where the place is known only when the step runs.
    const uint32_t place = n == 1 ? skip : uint32_t(k);
    const uint64_t lower = uint64_t(words[1]) << 32 | words[0], upper = uint64_t(words[3]) << 32 | words[2];
    const uint64_t four = place < 4 ? lower : upper;
    store_rounded(run.at[k], from[k], uint32_t(four >> (place % 4 * 16)) & 0xffffu);
  }
  write_run(array, i, run);
}

template <int n>
RVSM_HD void store_weights(const GeneralEntry& e, const void* rest, int64_t i, const float* from) {
  if (e.master == uint8_t(Master::low)) {
    split_run<n, BFloat16, int16_t>(e.w, const_cast<void*>(rest), i, from);
  } else if (e.master == uint8_t(Master::whole)) {
    split_run<n, Float16, float>(e.w, const_cast<void*>(rest), i, from);
  } else if (e.rounds) {
    const uint64_t element = uint64_t(e.offset + i);
    uint32_t words[4];
    // The counter has counted this step; the key is the number of steps before it.
    random_words(words, element / kElementsOfCall, e.seed, uint32_t(*e.counter) - 1);
    const uint32_t skip = uint32_t(element % kElementsOfCall);
    if (e.weight_type == uint8_t(Dtype::bf16))
      round_run<n, BFloat16>(e.w, i, from, words, skip);
    else
      round_run<n, Float16>(e.w, i, from, words, skip);
  } else {
    store_array<n>(e.w, e.weight_type, i, from);
  }
}
template <int n>
RVSM_HD void store_weights(const GeneralEntry& e, const void*, int64_t i, const double* from) {
  store_array<n>(e.w, e.weight_type, i, from);
}

// ---- the step -------------------------------------------------------------------------------------------------------

// Elements. The penalty is looked at for each of them: a kernel for each penalty would be four times as long.
template <class T>
struct AnyPull {
  static constexpr bool kMayLasso = false;
  const Prox<T>& prox;
  RVSM_HD_MEMBER bool pulls(const Prox<T>& of) const { return of.penalty != Penalty::none; }
  RVSM_HD_MEMBER AnyPull from(uint32_t) const { return *this; }
  RVSM_HD_MEMBER void operator()(T v, T, uint32_t, T& u, T& unit) const {
    const T r = std::fabs(v);
    u = std::copysign(with_penalty(prox.penalty, [&](auto tag) { return shrink<decltype(tag)::value>(r, prox); }), v);
    unit = T(0);
  }
};

// Groups: u and w_G / ||w_G|| from the norms that a launch before this one has made. `ratio` of a FactorPlace holds the
// norms of what is thresholded, `length` those of w.
template <class T>
struct NormPull {
  static constexpr bool kMayLasso = true;
  const FactorPlace& factors;
  const Prox<T>& prox;
  uint32_t at;
  RVSM_HD_MEMBER bool pulls(const Prox<T>& of) const { return of.penalty != Penalty::none; }
  RVSM_HD_MEMBER NormPull from(uint32_t place) const { return {factors, prox, place}; }
  RVSM_HD_MEMBER void operator()(T v, T w, uint32_t k, T& u, T& unit) const {
    const uint32_t group = factors.group(at + k);
    u = v * shrink_ratio(static_cast<const T*>(factors.ratio)[group], prox);
    unit = w / length_of(static_cast<const T*>(factors.length)[group]);
  }
};

// What the step of an entry needs of its record, in registers.
template <class T, class Base>
struct GeneralNumbers {
  Split<T> split;
  typename Base::template Numbers<T> base;
  typename Base::Switches switches;
  Method method;
  bool lasso, at_rest;
};

template <class Base, class T>
RVSM_HD GeneralNumbers<T, Base> general_numbers(const Table& t, int index, const GeneralRecord<T>& record) {
  T n[kMostNumbers];
  bool at_rest = false;
  if (record.finished != nullptr) {
    RVSM_UNROLL
    for (int i = 0; i < kMostNumbers; ++i) n[i] = record.finished->numbers[i];
    at_rest = record.finished->at_rest != 0;
    RVSM_KEEP_ORDER();  // else both branches become one that reads through an address of either kind of memory
  } else {
    RVSM_UNROLL
    for (int i = 0; i < kMostNumbers; ++i) n[i] = record.numbers[i];
  }
  GeneralNumbers<T, Base> r{split_of<T>(n, 1),
                            Base::template numbers<T>(base_numbers(n)),
                            Base::switches(base_numbers(n)),
                            Method(record.method),
                            record.lasso,
                            at_rest};
  if constexpr (Base::kCorrections > 0) {
    if (t.corrections != nullptr) r.base = Base::corrected(r.base, t.corrections + index * kMostCorrections);
  }
  if (record.cut != nullptr && record.keep == 0) r.split.prox.cut = *static_cast<const T*>(record.cut);
  return r;
}

// The step of n elements from element i on.
template <int n, class Base, bool kHasState, class T, class Pull>
RVSM_HD void general_run(const GeneralEntry& e, const GeneralNumbers<T, Base>& numbers, int64_t i, T factor,
                         SplitSwitches on, const Pull& pull) {
  constexpr int kStates = Base::kStates + int(kHasState);
  const void* const rest = e.state[kStates];  // of the weights
  T w[n], g[n] = {}, states[kStates + 1][n] = {};
  load_weights<n>(w, e.w, rest, e.weight_type, e.master, i);
  if (Base::kReadsGrad) load_array<n>(g, e.g, e.grad_type, i);
  RVSM_UNROLL
  for (int s = 0; s < kStates; ++s) load_array<n>(states[s], e.state[s], e.state_type[s], i);
  const auto at = pull.from(uint32_t(i));
  RVSM_UNROLL
  for (int k = 0; k < n; ++k) {
    T of_element[kStates + 1];
    RVSM_UNROLL
    for (int s = 0; s <= kStates; ++s) of_element[s] = states[s][k];
    step_element<Base, kHasState>(w[k], g[k], of_element, at, uint32_t(k), factor, numbers.method, numbers.split, on,
                                  numbers.base, numbers.switches);
    RVSM_UNROLL
    for (int s = 0; s <= kStates; ++s) states[s][k] = of_element[s];
  }
  store_weights<n>(e, rest, i, w);
  if (Base::kWritesGrad) store_array<n>(e.g, e.grad_type, i, g);
  RVSM_UNROLL
  for (int s = 0; s < kStates; ++s)
    if (s < Base::kStates || !numbers.at_rest) store_array<n>(e.state[s], e.state_type[s], i, states[s]);
}

// One thread of one block.
template <class T, class Base, bool kHasState>
RVSM_HD void general_thread(const Table& t, uint32_t block, int thread) {
  if (t.found_inf != nullptr && *t.found_inf > 0) return;
  const GeneralEntry* const entries = general_entries(t);
  const int index = find(entries, int(t.entries), block);
  const GeneralEntry& e = entries[index];
  const int64_t begin = int64_t(block - e.first) * kGeneralChunk;
  const int64_t end = begin + kGeneralChunk < e.numel ? begin + kGeneralChunk : e.numel;
  // `with_pull`: calls a function with the pull that a prox gives.
  const auto steps = [&](const GeneralRecord<T>& record, const auto& with_pull) {
    const GeneralNumbers<T, Base> numbers = general_numbers<Base>(t, index, record);
    const T factor = scale_of<T>(t) * numbers.split.grad;
    with_pull(numbers.split.prox, [&](const auto& pull) {
      const SplitSwitches on{pull.pulls(numbers.split.prox), numbers.lasso && pull.kMayLasso};
      const int64_t whole = e.vectors ? begin + (end - begin) / kRun * kRun : begin;
      RVSM_NO_UNROLL
      for (int64_t i = begin + int64_t(thread) * kRun; i < whole; i += kThreads * kRun)
        general_run<kRun, Base, kHasState>(e, numbers, i, factor, on, pull);
      RVSM_NO_UNROLL
      for (int64_t i = whole + thread; i < end; i += kThreads)
        general_run<1, Base, kHasState>(e, numbers, i, factor, on, pull);
    });
  };
  if (e.record & kGrouped) {
    const FactorPlace& factors = slot_of<FactorPlace>(t, e.record & ~kGrouped);
    steps(slot_of<GeneralRecord<T>>(t, factors.record),
          [&](const Prox<T>& prox, const auto& f) { f(NormPull<T>{factors, prox, 0}); });
  } else if (slot_of<GeneralRecord<T>>(t, e.record).keep != 0) {
    const GeneralRecord<T>& record = slot_of<GeneralRecord<T>>(t, e.record);
    steps(record, [&](const Prox<T>& prox, const auto& f) {
      f(KeptPull<T>{static_cast<const uint8_t*>(record.cut), prox.penalty != Penalty::none, 0});
    });
  } else {
    steps(slot_of<GeneralRecord<T>>(t, e.record), [](const Prox<T>& prox, const auto& f) { f(AnyPull<T>{prox}); });
  }
}

}  // namespace rvsm::cuda
