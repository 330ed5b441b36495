#include "interpreted_kernels.h"

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "../../half.h"
#include "../../update.h"

namespace rvsm::ptx {

Machine machine;
Module module;
std::vector<Launch> recorded;
std::map<std::string, int64_t> launched;

namespace {

using cuda::SumTable;
using cuda::Table;

constexpr size_t kSlotBytes = sizeof(cuda::Entry);

// ---- names ----------------------------------------------------------------------------------------------------------

// Of a kernel in kernels.cu, by its template arguments.
std::string symbol_of(Kind kind, Dtype dtype) {
  static const char* const kStorage[] = {"f", "d", "NS_8BFloat16E", "NS_7Float16E"};
  const std::string storage = kStorage[int(dtype)], arithmetic = dtype == Dtype::f64 ? "d" : "f";
  switch (kind) {
    case Kind::step:
      return "11step_kernelI" + storage + "EEv";
    case Kind::prox:
      return "11prox_kernelI" + storage + "EEv";
    case Kind::keep_step:
      return "11keep_kernelI" + storage + "EEv";
    case Kind::resident_step:
      return "15resident_kernelI" + storage + "Lb1EEEv";
    case Kind::resident_prox:
      return "15resident_kernelI" + storage + "Lb0EEEv";
    case Kind::squares:
      return "10sum_kernelI" + storage + "Lb1E" + arithmetic + "EEv";
    case Kind::dual_squares:
      return "11dual_kernelI" + storage + "EEv";
    case Kind::join:
      return "10sum_kernelIdLb0E" + arithmetic + "EEv";
    default:
      return "14penalty_kernelI" + storage + "EEv";
  }
}

// ---- tables ---------------------------------------------------------------------------------------------------------

uint32_t record_slot(const cuda::Entry& e) { return e.record & ~cuda::kGrouped; }

// The bytes that mean something: the header, the entries, and all from the lowest slot that an entry names.
std::vector<bool> filled(const Table& t) {
  std::vector<bool> bytes(sizeof(Table), false);
  const auto fill = [&](size_t from, size_t to) {
    std::fill(bytes.begin() + long(from), bytes.begin() + long(to), true);
  };
  uint32_t lowest = cuda::kSlots;
  for (uint32_t i = 0; i < t.entries; ++i) lowest = std::min(lowest, record_slot(t.slots[i]));
  if (lowest < t.entries) machine.findings.add("table", "records overlap the entries");
  constexpr size_t kSlotsBegin = offsetof(Table, slots);
  fill(0, kSlotsBegin);
  fill(kSlotsBegin, kSlotsBegin + kSlotBytes * t.entries);
  fill(kSlotsBegin + kSlotBytes * lowest, sizeof(Table));
  return bytes;
}

// The same of a table of sums, whose entries have either a cut or the numbers of a penalty.
std::vector<bool> filled(const SumTable& t) {
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
    if (t.at[i].by_data) fill(cut + sizeof(void*), sizeof(Prox<double>) - sizeof(void*), false);
  }
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
void run(Kind kind, Dtype dtype, const T& table, const std::vector<uint32_t>& blocks) {
  Kernel& kernel = kernel_of(kind, dtype);
  ++launched[kernel.name];
  if (table.blocks == 0) return machine.findings.add("launch " + kernel.name, "a launch without blocks");
  if (sizeof(T) != kernel.parameter_bytes)
    machine.findings.add("launch " + kernel.name, "the kernel's parameters and the table differ in size");
  const auto copy = std::make_unique<T>(table);
  machine.launch(kernel, {copy.get(), sizeof(T), filled(table)}, blocks, cuda::kThreads);
}

template <Kind kKind, class T>
const char* interpret(const cuda::Queue&, Dtype dtype, const T& table) {
  run(kKind, dtype, table, in_order(table.blocks));
  return nullptr;
}

template <Kind kKind, class T>
const char* record(const cuda::Queue&, Dtype dtype, const T& table) {
  const char* const bytes = reinterpret_cast<const char*>(&table);
  recorded.push_back({kKind, dtype, std::vector<char>(bytes, bytes + sizeof table)});
  return nullptr;
}

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
  return launch.sums() ? f(*table_of<SumTable>(launch)) : f(*table_of<Table>(launch));
}

constexpr auto kEach = [](const auto& f) {
  for (int thread = 0; thread < cuda::kThreads; ++thread) f(thread);
};

// One block of a launch by the functions that the device runs.
template <class S>
void host_block(Kind kind, const Table& t, uint32_t block) {
  using T = Arithmetic<S>;
  static cuda::ResidentShared<T> shared;
  static double sums[cuda::kThreads];
  switch (kind) {
    case Kind::step:
      return kEach([&](int i) { cuda::step_thread<S, false>(t, block, i); });
    case Kind::keep_step:
      return kEach([&](int i) { cuda::step_thread<S, true>(t, block, i); });
    case Kind::prox:
      return kEach([&](int i) { cuda::prox_thread<S>(t, block, i); });
    case Kind::resident_step:
      return cuda::resident_block<S, true, T>(t, block, shared, kEach);
    case Kind::resident_prox:
      return cuda::resident_block<S, false, T>(t, block, shared, kEach);
    default:
      return cuda::penalty_block<S>(t, block, sums, kEach);
  }
}

template <class S>
void host_block(Kind kind, const SumTable& t, uint32_t block) {
  using T = Arithmetic<S>;
  static double sums[cuda::kSums<BFloat16>];
  if (kind == Kind::squares) return cuda::sum_block<S, true, false, T>(t, block, sums, kEach);
  if (kind == Kind::dual_squares) return cuda::sum_block<S, true, true, T>(t, block, sums, kEach);
  cuda::sum_block<double, false, false, T>(t, block, sums, kEach);
}

}  // namespace

const cuda::Kernels interpreted_kernels = {
    interpret<Kind::step>,          interpret<Kind::prox>,          interpret<Kind::keep_step>,
    interpret<Kind::resident_step>, interpret<Kind::resident_prox>, interpret<Kind::squares>,
    interpret<Kind::dual_squares>,  interpret<Kind::join>,          interpret<Kind::penalty>,
};

const cuda::Kernels recording_kernels = {
    record<Kind::step>,          record<Kind::prox>,          record<Kind::keep_step>,
    record<Kind::resident_step>, record<Kind::resident_prox>, record<Kind::squares>,
    record<Kind::dual_squares>,  record<Kind::join>,          record<Kind::penalty>,
};

Row make_row(const definition::Tensor& t, Action action, const Addresses& at, bool with_source) {
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
  const int64_t size = t.grouped ? t.view.size() : 1;
  const bool step = action == Action::step;
  Row row;
  row.numel = t.numel();
  row.dtype = t.dtype;
  row.grouped = t.grouped;
  row.view = t.view;
  row.step = make_step(o, size, s.first);
  row.momentum = momentum_of(o);
  row.lam = strength(o, size);
  row.beta = o.beta;
  row.w = at.w;
  row.g = step || (action == Action::prox && with_source) ? at.g : nullptr;
  if (!step) return row;
  row.method = s.method;
  row.topk = s.topk;
  row.m = row.momentum == Momentum::none ? nullptr : at.m;
  row.kept = row.method == Method::rvsm ? nullptr : at.kept;
  row.cut = row.topk ? at.cut : nullptr;
  return row;
}

Addresses addresses_of(const Row& row) { return {row.w, row.m, row.kept, const_cast<void*>(row.g), row.cut}; }

const char* name_of(Kind kind) {
  static const char* const kNames[] = {"step",    "prox",         "keep_step", "resident_step", "resident_prox",
                                       "squares", "dual_squares", "join",      "penalty"};
  return kNames[int(kind)];
}

Kernel& kernel_of(Kind kind, Dtype dtype) {
  static std::map<std::pair<Kind, Dtype>, Kernel*> found;
  Kernel*& kernel = found[{kind, dtype}];
  if (kernel != nullptr) return *kernel;
  const std::string symbol = symbol_of(kind, dtype);
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
  with_table(*this, [&](const auto& t) { run(kind, dtype, t, {block}); });
}

void Launch::run_on_host(uint32_t block) const {
  with_table(*this,
             [&](const auto& t) { with_storage(dtype, [&](auto s) { host_block<decltype(s)>(kind, t, block); }); });
}

std::vector<uint32_t> Launch::first_blocks() const {
  const auto t = table_of<Table>(*this);
  std::vector<uint32_t> blocks;
  for (uint32_t i = 0; i < t->entries; ++i) blocks.push_back(t->slots[i].first);
  return blocks;
}

const char* Launch::near(uint32_t block) const {
  const auto t = table_of<Table>(*this);
  const cuda::Entry& e = t->slots[cuda::find(t->slots, int(t->entries), block)];
  uint64_t bytes = cuda::kChunk<char>;  // of a chunk
  if (kind == Kind::resident_step || kind == Kind::resident_prox) {
    const cuda::Tiles& tiles = cuda::slot_of<cuda::Tiles>(*t, record_slot(e));
    bytes = uint64_t(tiles.tile) * tiles.inner * with_storage(dtype, [](auto s) { return sizeof s; });
  }
  return static_cast<const char*>(e.w) + bytes * (block - e.first);
}

}  // namespace rvsm::ptx
