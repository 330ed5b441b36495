#include "interpreted_kernels.h"

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>

#include "../../math/storage.h"
#include "../options.h"

namespace rvsm::ptx {

Machine machine;
Module module;
std::vector<Launch> recorded;
std::map<std::string, int64_t> launched;

namespace {

using cuda::CountTable;
using cuda::NumbersTable;
using cuda::RowTable;
using cuda::SumTable;
using cuda::Table;
using cuda::WindowTable;

// ---- names ----------------------------------------------------------------------------------------------------------

const char* mangled(Dtype dtype) {
  static const char* const kStorage[] = {"f", "d", "NS_8BFloat16E", "NS_7Float16E"};
  return kStorage[int(dtype)];
}

std::string mangled(bool value) { return value ? "Lb1E" : "Lb0E"; }

std::string mangled(const BaseKey& base) {
  if (base.kind == BaseKind::none) return "NS_6NoBaseI" + mangled(base.writes_grad) + "EE";
  if (base.kind == BaseKind::adamw) return "NS_5AdamWI" + mangled(base.states > 2) + "EE";
  return "NS_3SgdI" + mangled(base.states > 0) + "EE";
}

// Of a kernel in kernels.cu, by its template arguments.
std::string symbol_of(const cuda::Key& key) {
  using cuda::Work;
  const std::string storage = mangled(key.dtype), opmath = key.dtype == Dtype::f64 ? "d" : "f";
  switch (key.work) {
    case Work::step:
      return "11step_kernelI" + storage + mangled(key.base) + mangled(key.method_state) + "EEv";
    case Work::prox:
      return "11prox_kernelI" + storage + "EEv";
    case Work::step_resident:
      return "15resident_kernelI" + storage + mangled(key.base) + mangled(true) + "EEv";
    case Work::prox_resident:
      return "15resident_kernelI" + storage + mangled(key_of<cuda::ProxBase>()) + mangled(false) + "EEv";
    case Work::squares:
    case Work::dual_squares:
      return "10sum_kernelI" + storage + mangled(true) + mangled(key.work == Work::dual_squares) + opmath + "EEv";
    case Work::count:
      return "12count_kernelE";
    case Work::numbers:
      return "14numbers_kernelE";
    case Work::windows:
      return "13window_kernelE";
    case Work::rows:
      return "10row_kernelE";
    case Work::measure:
      return "14measure_kernelI" + storage + "EEv";
    case Work::general_squares:
      return "18general_sum_kernelE";
    case Work::general:
      return "14general_kernelI" + storage + mangled(key.base) + mangled(key.method_state) + "EEv";
    case Work::factors:
      return "10sum_kernelId" + mangled(false) + mangled(false) + opmath + "EEv";
    default:
      return "14penalty_kernelI" + storage + "EEv";
  }
}

// ---- tables ---------------------------------------------------------------------------------------------------------

int states_of(const cuda::Key& key) { return key.base.states + int(key.method_state); }

// What all entries begin with, whatever the number of states.
using EntryHead = cuda::TableEntry<0>;

size_t entry_bytes(const cuda::Key& key) {
  if (key.work == cuda::Work::general || key.work == cuda::Work::measure) return sizeof(cuda::GeneralEntry);
  return sizeof(EntryHead) + size_t(states_of(key)) * sizeof(void*);
}

const EntryHead& entry_of(const cuda::Key& key, const Table& t, uint32_t i) {
  return *reinterpret_cast<const EntryHead*>(t.slots + entry_bytes(key) * i);
}

// The entry that a block works for.
const EntryHead& entry_of_block(const cuda::Key& key, const Table& t, uint32_t block) {
  uint32_t i = t.entries - 1;
  while (entry_of(key, t, i).first > block) --i;
  return entry_of(key, t, i);
}

uint32_t record_slot(const EntryHead& e) { return e.record & ~cuda::kGrouped; }

// The bytes that mean something: the header, the entries, and all from the lowest slot that an entry names.
std::vector<bool> filled(const cuda::Key& key, const Table& t) {
  std::vector<bool> bytes(sizeof(Table), false);
  const auto fill = [&](size_t from, size_t to) {
    std::fill(bytes.begin() + long(from), bytes.begin() + long(to), true);
  };
  uint32_t lowest = cuda::kSlots;
  for (uint32_t i = 0; i < t.entries; ++i) lowest = std::min(lowest, record_slot(entry_of(key, t, i)));
  const size_t records = size_t(lowest) * cuda::kSlotBytes, entries = entry_bytes(key) * t.entries;
  if (records < entries) machine.findings.add("table", "records overlap the entries");
  constexpr size_t kSlotsBegin = offsetof(Table, slots);
  fill(0, kSlotsBegin + entries);
  fill(kSlotsBegin + records, sizeof(Table));
  return bytes;
}

// The same of a table of sums, whose entries have either a cut or the numbers of a penalty.
std::vector<bool> filled(const cuda::Key&, const SumTable& t) {
  std::vector<bool> bytes(sizeof(SumTable), false);
  const auto fill = [&](size_t from, size_t count, bool value) {
    std::fill_n(bytes.begin() + long(from), count, value);
  };
  fill(0, offsetof(SumTable, entries) + sizeof t.entries, true);
  fill(offsetof(SumTable, blocks), sizeof t.blocks, true);
  for (uint32_t i = 0; i < t.entries; ++i) {
    const size_t entry = offsetof(SumTable, at) + sizeof(cuda::SumEntry) * i;
    fill(entry, sizeof(cuda::SumEntry), true);
    const size_t cut = entry + offsetof(cuda::SumEntry, cut);
    if (t.at[i].reads_cut) fill(cut + sizeof(void*), sizeof(Prox<double>) - sizeof(void*), false);
  }
  return bytes;
}

// The same of a table of counters.
std::vector<bool> filled(const cuda::Key&, const CountTable& t) {
  std::vector<bool> bytes(sizeof(CountTable), false);
  const auto fill = [&](size_t from, size_t count) { std::fill_n(bytes.begin() + long(from), count, true); };
  fill(0, offsetof(CountTable, records));
  for (uint32_t i = 0; i < t.entries; ++i) {
    fill(offsetof(CountTable, at) + sizeof(cuda::CountEntry) * i, sizeof(cuda::CountEntry));
    fill(offsetof(CountTable, records) + sizeof(cuda::CountRecord) * t.at[i].record, sizeof(cuda::CountRecord));
  }
  return bytes;
}

// The same of a table of numbers on the device.
std::vector<bool> filled(const cuda::Key&, const NumbersTable& t) {
  std::vector<bool> bytes(sizeof(NumbersTable), false);
  std::fill_n(bytes.begin(), offsetof(NumbersTable, at) + sizeof(cuda::NumbersEntry) * t.entries, true);
  return bytes;
}

// The same of a table of windows.
std::vector<bool> filled(const cuda::Key&, const WindowTable& t) {
  std::vector<bool> bytes(sizeof(WindowTable), false);
  std::fill_n(bytes.begin(), offsetof(WindowTable, at) + sizeof(cuda::WindowEntry) * t.entries, true);
  return bytes;
}

// The same of a table of rows of statistics.
std::vector<bool> filled(const cuda::Key&, const RowTable& t) {
  std::vector<bool> bytes(sizeof(RowTable), false);
  std::fill_n(bytes.begin(), offsetof(RowTable, at) + sizeof(cuda::RowEntry) * t.entries, true);
  return bytes;
}

// ---- launches -------------------------------------------------------------------------------------------------------

std::vector<uint32_t> in_order(uint32_t blocks) {
  std::vector<uint32_t> order(blocks);
  for (uint32_t i = 0; i < blocks; ++i) order[i] = i;
  const Mode& mode = machine.mode;
  if (mode.order == Mode::reverse) std::reverse(order.begin(), order.end());
  if (mode.order == Mode::shuffled || mode.order == Mode::interleaved) {
    std::mt19937_64 random(mode.seed + blocks);
    std::shuffle(order.begin(), order.end(), random);
  }
  return order;
}

template <class T>
void run(const cuda::Key& key, const T& table, const std::vector<uint32_t>& blocks) {
  Kernel& kernel = kernel_of(key);
  ++launched[kernel.name];
  if (table.blocks == 0) return machine.findings.add("launch " + kernel.name, "a launch without blocks");
  if (sizeof(T) != kernel.parameter_bytes)
    machine.findings.add("launch " + kernel.name, "the kernel's parameters and the table differ in size");
  const auto copy = std::make_unique<T>(table);
  machine.launch(kernel, {copy.get(), sizeof(T), filled(key, table)}, blocks, cuda::kThreads);
}

template <class S>
constexpr Dtype kDtypeOf = sizeof(S) == 8               ? Dtype::f64
                           : sizeof(S) == 4             ? Dtype::f32
                           : std::is_same_v<S, Float16> ? Dtype::f16
                                                        : Dtype::bf16;

// Functions for cuda::all_kernels. Do: what becomes of a launch with a table of that type.
template <class Do>
struct Starter {
  static const char* count(const cuda::Stream&, const void* table) {
    return Do::template launch<CountTable>({cuda::Work::count, Dtype::f32, {}}, table);
  }
  static const char* numbers(const cuda::Stream&, const void* table) {
    return Do::template launch<NumbersTable>({cuda::Work::numbers, Dtype::f32, {}}, table);
  }
  static const char* windows(const cuda::Stream&, const void* table) {
    return Do::template launch<WindowTable>({cuda::Work::windows, Dtype::f32, {}}, table);
  }
  static const char* rows(const cuda::Stream&, const void* table) {
    return Do::template launch<RowTable>({cuda::Work::rows, Dtype::f32, {}}, table);
  }
  template <class T>
  static const char* measure(const cuda::Stream&, const void* table) {
    return Do::template launch<Table>({cuda::Work::measure, kDtypeOf<T>, {}}, table);
  }
  // No case has a selection.
  template <class T>
  static const char* select_pass(const cuda::Stream&, const void*) {
    return "no interpreted kernel";
  }
  template <class T>
  static const char* select_pick(const cuda::Stream&, const void*) {
    return "no interpreted kernel";
  }
  static const char* general_squares(const cuda::Stream&, const void* table) {
    return Do::template launch<SumTable>({cuda::Work::general_squares, Dtype::f32, {}}, table);
  }
  template <class T, class Base, bool kHasState>
  static const char* general(const cuda::Stream&, const void* table) {
    return Do::template launch<Table>({cuda::Work::general, kDtypeOf<T>, key_of<Base>(), kHasState}, table);
  }
  template <class S, class Base, bool kHasState>
  static const char* step(const cuda::Stream&, const void* table) {
    return Do::template launch<Table>({cuda::Work::step, kDtypeOf<S>, key_of<Base>(), kHasState}, table);
  }
  template <class S>
  static const char* prox(const cuda::Stream&, const void* table) {
    return Do::template launch<Table>({cuda::Work::prox, kDtypeOf<S>, {}}, table);
  }
  template <class S, class Base, bool kStep>
  static const char* resident(const cuda::Stream&, const void* table) {
    if (!kStep) return Do::template launch<Table>({cuda::Work::prox_resident, kDtypeOf<S>, {}}, table);
    return Do::template launch<Table>({cuda::Work::step_resident, kDtypeOf<S>, key_of<Base>()}, table);
  }
  template <class S, bool kDual>
  static const char* squares(const cuda::Stream&, const void* table) {
    const cuda::Work work = kDual ? cuda::Work::dual_squares : cuda::Work::squares;
    return Do::template launch<SumTable>({work, kDtypeOf<S>, {}}, table);
  }
  template <class T>
  static const char* factors(const cuda::Stream&, const void* table) {
    return Do::template launch<SumTable>({cuda::Work::factors, kDtypeOf<T>, {}}, table);
  }
  template <class S>
  static const char* penalty(const cuda::Stream&, const void* table) {
    return Do::template launch<Table>({cuda::Work::penalty, kDtypeOf<S>, {}}, table);
  }
};

struct Interpret {
  template <class T>
  static const char* launch(const cuda::Key& key, const void* table) {
    const T& t = *static_cast<const T*>(table);
    run(key, t, in_order(t.blocks));
    return nullptr;
  }
};

struct Record {
  template <class T>
  static const char* launch(const cuda::Key& key, const void* table) {
    const char* const bytes = static_cast<const char*>(table);
    recorded.push_back({key, std::vector<char>(bytes, bytes + sizeof(T))});
    return nullptr;
  }
};

// The table of a launch that was recorded.
template <class T>
std::unique_ptr<T> table_of(const Launch& launch) {
  auto t = std::make_unique<T>();
  std::memcpy(static_cast<void*>(t.get()), launch.table.data(), sizeof(T));
  return t;
}

// Calls f with it, of its type.
template <class F>
auto with_table(const Launch& launch, const F& f) {
  if (launch.counts()) return f(*table_of<CountTable>(launch));
  if (launch.key.work == cuda::Work::numbers) return f(*table_of<NumbersTable>(launch));
  if (launch.key.work == cuda::Work::windows) return f(*table_of<WindowTable>(launch));
  if (launch.key.work == cuda::Work::rows) return f(*table_of<RowTable>(launch));
  return launch.sums() ? f(*table_of<SumTable>(launch)) : f(*table_of<Table>(launch));
}

constexpr auto kForThreads = [](const auto& f) {
  for (int thread = 0; thread < cuda::kThreads; ++thread) f(thread);
};

// One block of a launch by the functions that the device runs.
template <class S>
void host_block(const cuda::Key& key, const Table& t, uint32_t block) {
  using cuda::Work;
  static cuda::ResidentShared<Opmath<S>> shared;
  static double sums[cuda::kMeasuredSums];
  if (key.work == Work::prox) return kForThreads([&](int i) { cuda::prox_thread<S>(t, block, i); });
  if (key.work == Work::prox_resident)
    return cuda::resident_block<S, cuda::ProxBase, false>(t, block, shared, kForThreads);
  if (key.work == Work::penalty) return cuda::penalty_block<S>(t, block, sums, kForThreads);
  if (key.work == Work::measure) {
    if constexpr (sizeof(S) >= 4) cuda::measure_block<S>(t, block, sums, kForThreads);
    return;
  }
  with_base(key.base, [&](auto base) {
    using Base = decltype(base);
    if (key.work == Work::general) {
      if constexpr (sizeof(S) >= 4) {
        if (key.method_state)
          kForThreads([&](int i) { cuda::general_thread<S, Base, true>(t, block, i); });
        else
          kForThreads([&](int i) { cuda::general_thread<S, Base, false>(t, block, i); });
      }
    } else if (key.work == Work::step_resident)
      cuda::resident_block<S, Base, true>(t, block, shared, kForThreads);
    else if (key.method_state)
      kForThreads([&](int i) { cuda::step_thread<S, Base, true>(t, block, i); });
    else
      kForThreads([&](int i) { cuda::step_thread<S, Base, false>(t, block, i); });
  });
}

template <class S>
void host_block(const cuda::Key& key, const SumTable& t, uint32_t block) {
  using T = Opmath<S>;
  static double sums[cuda::kSums<BFloat16>];
  if (key.work == cuda::Work::general_squares)
    return cuda::sum_block<cuda::GeneralWeights, true, true, float>(t, block, sums, kForThreads);
  if (key.work == cuda::Work::squares) return cuda::sum_block<S, true, false, T>(t, block, sums, kForThreads);
  if (key.work == cuda::Work::dual_squares) return cuda::sum_block<S, true, true, T>(t, block, sums, kForThreads);
  cuda::sum_block<double, false, false, T>(t, block, sums, kForThreads);
}

template <class S>
void host_block(const cuda::Key&, const CountTable& t, uint32_t block) {
  kForThreads([&](int i) { cuda::count_thread(t, block, i); });
}

template <class S>
void host_block(const cuda::Key&, const NumbersTable& t, uint32_t block) {
  kForThreads([&](int i) { cuda::numbers_thread(t, block, i); });
}

template <class S>
void host_block(const cuda::Key&, const WindowTable& t, uint32_t block) {
  kForThreads([&](int i) { cuda::window_thread(t, block, i); });
}

template <class S>
void host_block(const cuda::Key&, const RowTable& t, uint32_t block) {
  static double sums[cuda::kRowSums];
  cuda::row_block(t, block, sums, kForThreads);
}

}  // namespace

const cuda::Kernels& interpreted_kernels() {
  static const cuda::Kernels all = cuda::all_kernels<Starter<Interpret>>();
  return all;
}

const cuda::Kernels& recording_kernels() {
  static const cuda::Kernels all = cuda::all_kernels<Starter<Record>>();
  return all;
}

TensorArgs make_args(const definition::Tensor& t, Action action, const Addresses& at, bool with_source) {
  static std::deque<NumberRow> records;  // stay where they are
  const definition::Step& s = t.step;
  Options o;
  o.penalty = s.penalty;
  o.lam = s.lam;
  o.beta = s.beta;
  o.a = s.a;
  o.group_lasso = s.group_lasso;
  o.lr = s.lr;
  o.momentum = s.momentum;
  o.dampening = s.dampening;
  o.weight_decay = s.weight_decay;
  o.group_scale = s.group_scale;
  o.nesterov = s.nesterov;
  o.decoupled = s.decoupled;
  o.maximize = s.maximize;
  o.hold_zeros = s.hold_zeros;
  const bool step = action == Action::step;
  o.method = step ? s.method : Method::rvsm;
  o.base = s.base;
  o.amsgrad = s.amsgrad;
  o.beta1 = s.beta1;
  o.beta2 = s.beta2;
  o.eps = s.eps;
  o.count = s.count;
  TensorArgs args;
  args.numel = t.numel();
  args.dtype = t.dtype;
  args.grouped = t.grouped;
  args.view = t.view;
  apply(o, args, s.first, records);
  if (step && at.counter != nullptr) {
    // What follows from the count is not in the record.
    NumberRow& record = records.back();
    record[kProxNumbers + kSplitNumbers + 4] = record[kProxNumbers + kSplitNumbers + 5] = NAN;
    args.counter = at.counter;
  }
  args.w = at.w;
  args.g = step || (action == Action::prox && with_source) ? at.g : nullptr;
  if (!step) return args;
  args.topk = s.topk;
  void* const of_base[] = {at.m, at.v, at.largest};
  for (int k = 0; k < args.base.states; ++k) args.state[k] = of_base[k];
  if (args.method != Method::rvsm) args.state[args.base.states] = at.kept;
  args.cut = args.topk ? at.cut : nullptr;
  return args;
}

Addresses addresses_of(const TensorArgs& args) {
  const auto of_base = [&](int k) { return args.base.states > k ? args.state[k] : nullptr; };
  return {args.w, of_base(0), args.method_state(), args.g, of_base(1), of_base(2), args.cut, args.counter};
}

std::string name_of(const cuda::Key& key) {
  static const char* const kNames[] = {"squares", "dual_squares",  "general_squares", "factors",
                                       "measure", "step_resident", "prox_resident",   "step",
                                       "prox",    "penalty",       "general",         "count",
                                       "numbers", "windows",       "select_pass",     "select_pick",
                                       "rows"};
  std::string name = kNames[int(key.work)];
  const bool is_step =
      key.work == cuda::Work::step || key.work == cuda::Work::step_resident || key.work == cuda::Work::general;
  if (!is_step) return name;
  name += std::string(" ") + kBases[int(key.base.kind)].name;
  return name + " of " + std::to_string(states_of(key)) + " states";
}

Kernel& kernel_of(const cuda::Key& key) {
  static std::map<cuda::Key, Kernel*> found;
  Kernel*& kernel = found[key];
  if (kernel != nullptr) return *kernel;
  const std::string symbol = symbol_of(key);
  int count = 0;
  for (const auto& [name, k] : module.kernels) {
    if (name.find(symbol) == std::string::npos) continue;
    kernel = k.get();
    ++count;
  }
  if (count == 1) return *kernel;
  std::fprintf(stderr, "%d kernels are named %s\n", count, symbol.c_str());
  std::exit(2);
}

uint32_t Launch::blocks() const {
  return with_table(*this, [](const auto& t) { return t.blocks; });
}

void Launch::interpret(uint32_t block) const {
  with_table(*this, [&](const auto& t) { run(key, t, {block}); });
}

void Launch::run_on_host(uint32_t block) const {
  with_table(*this,
             [&](const auto& t) { with_storage(key.dtype, [&](auto s) { host_block<decltype(s)>(key, t, block); }); });
}

std::vector<uint32_t> Launch::first_blocks() const {
  const auto t = table_of<Table>(*this);
  std::vector<uint32_t> blocks;
  for (uint32_t i = 0; i < t->entries; ++i) blocks.push_back(entry_of(key, *t, i).first);
  return blocks;
}

const char* Launch::near(uint32_t block) const {
  const auto t = table_of<Table>(*this);
  const EntryHead& e = entry_of_block(key, *t, block);
  uint64_t bytes = cuda::kChunk<char>;  // of a chunk
  if (key.work == cuda::Work::step_resident || key.work == cuda::Work::prox_resident) {
    const cuda::Tiles& tiles = cuda::slot_of<cuda::Tiles>(*t, record_slot(e));
    bytes = uint64_t(tiles.tile) * tiles.inner * with_storage(key.dtype, [](auto s) { return sizeof s; });
  }
  return static_cast<const char*>(e.w) + bytes * (block - e.first);
}

}  // namespace rvsm::ptx
