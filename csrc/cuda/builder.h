// From tensors to the tables of launches: as few as the kernel parameters allow.
#pragma once

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "counts.h"
#include "general.h"
#include "measure.h"
#include "resident.h"
#include "windows.h"

namespace rvsm::cuda {

// An entry of a table in which some may be counted.
struct Counted {
  float* step;
  const double* numbers;  // of the base
  const DeviceNumbers* device;
  BaseKind base;
};

// A table and the param groups in it, for error messages.
template <class TableType>
struct Launch {
  std::unique_ptr<TableType> table = std::make_unique<TableType>();
  std::vector<int32_t> groups;
  std::vector<Counted> counted;  // one for each entry, where any is counted on the device

  void note(int32_t group) {
    if (groups.empty() || groups.back() != group) groups.push_back(group);
  }
};

// The launches of a step of one kind. Their memory is used again in every step.
template <class TableType>
class LaunchList {
 public:
  void clear() { used_ = 0; }
  bool empty() const { return used_ == 0; }
  Launch<TableType>* begin() { return launches_.data(); }
  Launch<TableType>* end() { return launches_.data() + used_; }

 protected:
  Launch<TableType>& last() { return launches_[used_ - 1]; }
  TableType& table() { return *last().table; }

  // One launch more, with an empty table.
  void begin_table() {
    if (++used_ > launches_.size()) launches_.emplace_back();
    last().groups.clear();
    last().counted.clear();
    table().entries = table().blocks = 0;
  }

 private:
  std::vector<Launch<TableType>> launches_;
  size_t used_ = 0;
};

// The tables of all tensors of one key. A step's are filled anew each time: that costs less than finding out what
// changed, and no pointer or option is ever stale.
class TableBuilder : public LaunchList<Table> {
 public:
  // A tensor of a step or, with `source` in the place of the gradient, of a prox. With windows `args.cut` are their
  // bits.
  template <class S, class Base, int kStates>
  void add(const TensorArgs& args, void* source) {
    Record<Opmath<S>, Base> record = record_of<Opmath<S>, Base>(args);
    record.cut = args.cut;
    record.keep = uint8_t(args.windows.n);
    record.window = uint8_t(args.windows.m);
    push<S, kStates>(args, source, uint16_t(reserve<TableEntry<kStates>>(args, record)));
  }

  // A tensor in groups, whose factors a launch before this one makes.
  template <class S, class Base, int kStates>
  void add(const TensorArgs& args, void* source, const FactorPlace& factors) {
    Record<Opmath<S>, Base> record = record_of<Opmath<S>, Base>(args);
    record.split.prox = {record.split.prox.penalty, 0, 0, 0, 0, 0};
    push<S, kStates>(args, source, add_grouped<kStates>(args, record, factors));
  }

  // A tensor in groups that its blocks sum themselves.
  template <class S, class Base, int kStates>
  void add(const TensorArgs& args, void* source, const Tiles& tiles) {
    TableEntry<kStates>& e =
        push<S, kStates>(args, source, add_grouped<kStates>(args, record_of<Opmath<S>, Base>(args), tiles));
    table().blocks = e.first + uint32_t(ceil_div(tiles.groups, tiles.tile));
    // Vectors only of arrays that all begin on a boundary: then every group does.
    bool vectors = begins_on_boundary(args.w) && begins_on_boundary(source);
    for (int k = 0; k < kStates; ++k) vectors = vectors && begins_on_boundary(args.state[k]);
    e.rest = vectors ? 0 : kScalar;
  }

  // Numbers whose penalty is asked for: weights, or the norms of groups.
  template <class S>
  void add_value(const TensorArgs& args, void* numbers, int64_t count) {
    TensorArgs values;
    values.numel = count;
    values.group = args.group;
    Value<Opmath<S>> value;
    std::memset(static_cast<void*>(&value), 0, sizeof value);
    value.prox = prox_of<Opmath<S>>(args.numbers);
    value.lam = args.lam;
    value.beta = args.beta;
    push<S, 0>(values, numbers, uint16_t(reserve<TableEntry<0>>(values, value)));
  }

  // A tensor of a general step, or a piece of one, in groups (`factors`: where its norms are) or not, that begins
  // `offset` elements into the tensor. `finished`: its numbers on the device, or null. `chunk`: elements of a block.
  template <class T>
  void add_general(const TensorArgs& args, int64_t offset, int64_t numel, const FactorPlace* factors,
                   const void* finished, int64_t chunk = kGeneralChunk) {
    GeneralRecord<T> record;
    std::memset(static_cast<void*>(&record), 0, sizeof record);
    record.finished = static_cast<const FinishedRecord<T>*>(finished);
    record.cut = args.cut;
    record.method = uint8_t(args.method);
    record.lasso = args.lasso;
    record.keep = uint8_t(args.windows.n);
    for (int k = 0; k < kMostNumbers; ++k) record.numbers[k] = T(args.numbers[k]);
    record.numbers[kProxNumbers] = T(args.numbers[kProxNumbers] * args.scale);
    uint16_t slot;
    if (factors == nullptr) {
      slot = uint16_t(reserve<GeneralEntry>(args, record));
    } else {
      FactorPlace place = *factors;
      place.record = uint32_t(reserve<GeneralEntry>(args, record, kSlotsOf<FactorPlace>));
      slot = uint16_t(put(place) | kGrouped);
    }
    Table& t = table();
    count(args);
    GeneralEntry& e = const_cast<GeneralEntry*>(general_entries(t))[t.entries++];
    e = general_entry(args, offset, numel);
    e.first = t.blocks;
    e.record = slot;
    t.blocks += uint32_t(ceil_div(numel, chunk));
  }

 private:
  static constexpr int kNone = -1;

  // The same padding each time, so that records can be compared as bytes.
  template <class T, class Base>
  static Record<T, Base> record_of(const TensorArgs& args) {
    Record<T, Base> record;
    std::memset(static_cast<void*>(&record), 0, sizeof record);
    record.split = split_of<T>(args.numbers, args.scale);
    record.base = Base::template numbers<T>(base_numbers(args.numbers));
    record.method = uint8_t(args.method);
    record.switches = Base::switches(base_numbers(args.numbers));
    return record;
  }

  // `of_tensor`: what a kernel must know of the tensor's groups, beside the slot of the record. Returns its slot.
  template <int kStates, class T, class Base, class Groups>
  uint16_t add_grouped(const TensorArgs& args, const Record<T, Base>& plain, const Groups& of_tensor) {
    Record<T, Base> record = plain;
    Groups groups = of_tensor;
    record.lasso = args.lasso;
    groups.record = uint32_t(reserve<TableEntry<kStates>>(args, record, kSlotsOf<Groups>));
    return uint16_t(put(groups) | kGrouped);
  }

  // Makes room for one more entry, its record and `slots` further slots, in the last table or in a new one. Returns the
  // slot of the record; tensors with equal records share it.
  template <class Entry, class R>
  int reserve(const TensorArgs& args, const R& record, int slots = 0) {
    // A record with a cut is of one tensor.
    int slot = !empty() && args.cut == nullptr ? find_record(record) : kNone;
    const auto room = [&] {
      const int64_t front = int64_t(table().entries + 1) * int64_t(sizeof(Entry));
      return int64_t(free_ - slots - (slot == kNone ? kSlotsOf<R> : 0)) * kSlotBytes - front;
    };
    if (empty() || room() < 0) {
      begin_table();
      free_ = kSlots;
      records_.clear();
      slot = kNone;
    }
    last().note(args.group);
    if (slot != kNone) return slot;
    records_.push_back(put(record));
    return free_;
  }

  template <class S, int kStates>
  TableEntry<kStates>& push(const TensorArgs& args, void* source, uint16_t slot) {
    const void* others[kStates + 1] = {source};
    for (int k = 0; k < kStates; ++k) others[k + 1] = args.state[k];
    const Chunks chunks = chunks_of<S>(args.numel, args.w, others, kStates + 1);
    Table& t = table();
    if (has_corrections(args.base.kind) && args.numbers != nullptr) count(args);
    auto& e = const_cast<TableEntry<kStates>*>(entries_of<kStates>(t))[t.entries++];
    e.w = args.w;
    e.g = source;
    e.first = t.blocks;
    e.rest = chunks.rest;
    e.record = slot;
    if constexpr (kStates > 0)
      for (int k = 0; k < kStates; ++k) e.state[k] = args.state[k];
    t.blocks += chunks.count;
    return e;
  }

  void count(const TensorArgs& args) {
    last().counted.push_back({args.counter, base_numbers(args.numbers), args.device_numbers, args.base.kind});
  }

  static GeneralEntry general_entry(const TensorArgs& args, int64_t offset, int64_t numel) {
    GeneralEntry e;
    std::memset(static_cast<void*>(&e), 0, sizeof e);
    const Precision& p = args.precision;
    bool vectors = offset % kRun == 0;
    // Where the entry's part of an array begins, and the number of its type. Without a mixture all arrays have the type
    // of the weights.
    const auto place = [&](void* array, int64_t size) -> void* {
      if (array == nullptr) return nullptr;
      void* const begin = static_cast<char*>(array) + offset * size;
      vectors = vectors && begins_on_boundary(begin);
      return begin;
    };
    const auto place_typed = [&](void* array, Dtype dtype, void*& to, uint8_t& type) {
      type = uint8_t(dtype);
      to = place(array, with_storage(dtype, [](auto s) { return int64_t(sizeof s); }));
    };
    place_typed(args.w, args.dtype, e.w, e.weight_type);
    place_typed(args.g, p.mixed ? p.grad : args.dtype, e.g, e.grad_type);
    for (int k = 0; k < args.states(); ++k)
      place_typed(args.state[size_t(k)], p.mixed ? p.states[size_t(k)] : args.dtype, e.state[k], e.state_type[k]);
    if (p.mixed && p.master != Master::none)
      e.state[args.states()] = place(args.master_state(), p.master == Master::low ? sizeof(int16_t) : sizeof(float));
    e.vectors = vectors;
    e.numel = numel;
    e.offset = offset;
    if (p.mixed) {
      e.master = uint8_t(p.master);
      e.rounds = p.rounds;
      e.seed = p.random.seed;
      e.counter = args.counter;
    }
    return e;
  }

  template <class X>
  int put(const X& x) {
    free_ -= kSlotsOf<X>;
    std::memcpy(table().slots + free_ * kSlotBytes, &x, sizeof x);
    return free_;
  }

  // The slot of an equal record.
  template <class R>
  int find_record(const R& record) {
    for (const int slot : records_)
      if (std::memcmp(table().slots + slot * kSlotBytes, &record, sizeof record) == 0) return slot;
    return kNone;
  }

  std::vector<int> records_;  // slots of the records in the last table
  int free_ = 0;              // the records begin here
};

// The tables of counters.
class CountBuilder : public LaunchList<CountTable> {
 public:
  // `out`: where the corrections of an entry go. Pieces of one tensor stand one behind the other, and are counted once.
  void add(const Counted& c, double* out, int32_t group) {
    if (!empty() && c.step != nullptr && c.step == before_.step) {
      ++table().at[table().entries - 1].outs;
      return;
    }
    const bool same = !empty() && c.numbers == before_.numbers && c.device == before_.device;
    if (empty() || table().entries == kEntries || (!same && records_ == kRecords)) {
      begin_table();
      records_ = 0;
    }
    CountTable& t = table();
    if (!same || records_ == 0) {
      CountRecord& record = t.records[records_++];
      record.base = c.base;
      record.device = c.device == nullptr ? DeviceNumbers{} : *c.device;
      std::memcpy(record.numbers, c.numbers, sizeof record.numbers);
    }
    t.at[t.entries++] = {c.step, out, 1, uint32_t(records_ - 1)};
    t.blocks = uint32_t(ceil_div(t.entries, kThreads));
    last().note(group);
    before_ = c;
  }

 private:
  static constexpr uint32_t kEntries = sizeof(CountTable::at) / sizeof(CountEntry);
  static constexpr int kRecords = sizeof(CountTable::records) / sizeof(CountRecord);
  int records_ = 0;
  Counted before_{};  // what was added last
};

// The tables of numbers that are finished on the device.
class NumbersBuilder : public LaunchList<NumbersTable> {
 public:
  // `out`: where the finished records go; each takes kFinishedBytes.
  void begin_step(char* out) {
    clear();
    next_ = out;
  }

  // The finished record of a tensor; tensors with the same numbers, one behind the other, share it.
  void* add(const TensorArgs& args) {
    const bool wide = args.dtype == Dtype::f64;
    if (!empty() && before_.numbers == args.numbers && before_.device_numbers == args.device_numbers &&
        before_.scale == args.scale && (before_.dtype == Dtype::f64) == wide)
      return next_ - kFinishedBytes;
    if (empty() || table().entries == kEntries) begin_table();
    NumbersTable& t = table();
    NumbersEntry& e = t.at[t.entries++];
    std::memset(static_cast<void*>(&e), 0, sizeof e);
    e.out = next_;
    e.device = *args.device_numbers;
    e.base = args.base.kind;
    e.wide = wide;
    std::memcpy(e.numbers, args.numbers, sizeof e.numbers);
    e.numbers[kProxNumbers] *= args.scale;
    t.blocks = uint32_t(ceil_div(t.entries, kThreads));
    last().note(args.group);
    before_ = args;
    next_ += kFinishedBytes;
    return e.out;
  }

  static constexpr int64_t kFinishedBytes = ceil_div(sizeof(FinishedRecord<double>), 32) * 32;

 private:
  static constexpr uint32_t kEntries = sizeof(NumbersTable::at) / sizeof(NumbersEntry);
  char* next_ = nullptr;
  TensorArgs before_;  // what was added last
};

// The tables of windows.
class WindowBuilder : public LaunchList<WindowTable> {
 public:
  // `bits`: of the elements that survive; a tensor's step and its statistics may both ask for them.
  void add(const TensorArgs& args, uint8_t* bits) {
    if (!empty() && table().at[table().entries - 1].bits == bits) return;
    if (empty() || table().entries == kEntries) begin_table();
    WindowTable& t = table();
    WindowEntry& e = t.at[t.entries++];
    const Precision& p = args.precision;
    const bool dual = args.method == Method::admm;
    std::memset(static_cast<void*>(&e), 0, sizeof e);
    e.w = args.w;
    e.rest = p.mixed && p.master != Master::none ? args.master_state() : nullptr;
    e.dual = dual ? args.method_state() : nullptr;
    e.bits = bits;
    e.numel = args.numel;
    e.inner = args.windows.inner;
    e.first = t.blocks;
    e.keep = uint8_t(args.windows.n);
    e.window = uint8_t(args.windows.m);
    e.weight_type = uint8_t(args.dtype);
    e.dual_type = uint8_t(p.mixed && dual ? p.states[size_t(args.base.states)] : args.dtype);
    e.master = uint8_t(p.mixed ? p.master : Master::none);
    t.blocks += uint32_t(ceil_div(args.numel, kWindowChunk));
    last().note(args.group);
  }

 private:
  static constexpr uint32_t kEntries = sizeof(WindowTable::at) / sizeof(WindowEntry);
};

// The tables of rows of statistics.
class RowBuilder : public LaunchList<RowTable> {
 public:
  // `sums`: of the blocks that have measured the tensor.
  void add(const TensorArgs& args, const double* sums, int64_t blocks) {
    if (empty() || table().entries == kEntries) begin_table();
    RowTable& t = table();
    const DeviceNumbers device = args.device_numbers == nullptr ? DeviceNumbers{} : *args.device_numbers;
    t.at[t.entries++] = {args.statistics, sums, blocks, args.lam, args.beta, device, args.grouped, args.split};
    t.blocks = t.entries;
    last().note(args.group);
  }

 private:
  static constexpr uint32_t kEntries = sizeof(RowTable::at) / sizeof(RowEntry);
};

// The tables of sums.
class SumBuilder : public LaunchList<SumTable> {
 public:
  void add(const SumEntry& entry, int64_t batches, int32_t group) {
    if (empty() || int(table().entries) == kEntries) begin_table();
    SumTable& t = table();
    SumEntry& added = t.at[t.entries++];
    added = entry;
    added.first = t.blocks;
    t.blocks += uint32_t(batches * entry.tiles * entry.parts);
    last().note(group);
  }

 private:
  static constexpr int kEntries = int(sizeof(SumTable::at) / sizeof(SumEntry));
};

}  // namespace rvsm::cuda
