// From tensors to the tables of launches: as few as the kernel parameters allow.
#pragma once

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "counts.h"
#include "resident.h"

namespace rvsm::cuda {

// An entry whose base has numbers that follow from a count.
struct Counted {
  float* step;
  const double* numbers;  // of the base
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

// The tables of all tensors of one key. A step's are filled anew each time: that costs less than finding out what
// changed, and no pointer or option is ever stale.
class TableBuilder {
 public:
  void clear() { used_ = 0; }

  // A tensor of a step or, with `source` in the place of the gradient, of a prox.
  template <class S, class Base, int kStates>
  void add(const TensorArgs& args, void* source) {
    Record<Opmath<S>, Base> record = record_of<Opmath<S>, Base>(args);
    record.cut = args.cut;
    push<S, kStates>(args, source, uint16_t(reserve<kStates>(args, record)));
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
    push<S, 0>(values, numbers, uint16_t(reserve<0>(values, value)));
  }

  Launch<Table>* begin() { return launches_.data(); }
  Launch<Table>* end() { return launches_.data() + used_; }

 private:
  static constexpr int kNone = -1;

  Table& table() { return *launches_[used_ - 1].table; }

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
    groups.record = uint32_t(reserve<kStates>(args, record, kSlotsOf<Groups>));
    return uint16_t(put(groups) | kGrouped);
  }

  // Makes room for one more entry, its record and `slots` further slots, in the last table or in a new one. Returns the
  // slot of the record; tensors with equal records share it.
  template <int kStates, class R>
  int reserve(const TensorArgs& args, const R& record, int slots = 0) {
    // A record with a cut is of one tensor.
    int slot = used_ > 0 && args.cut == nullptr ? find_record(record) : kNone;
    const auto room = [&] {
      const int64_t front = int64_t(table().entries + 1) * int64_t(sizeof(TableEntry<kStates>));
      return int64_t(free_ - slots - (slot == kNone ? kSlotsOf<R> : 0)) * kSlotBytes - front;
    };
    if (used_ == 0 || room() < 0) {
      if (++used_ > launches_.size()) launches_.emplace_back();
      Launch<Table>& l = launches_[used_ - 1];
      l.groups.clear();
      l.counted.clear();
      l.table->entries = l.table->blocks = 0;
      free_ = kSlots;
      records_.clear();
      slot = kNone;
    }
    launches_[used_ - 1].note(args.group);
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
    if (has_corrections(args.base.kind) && args.numbers != nullptr)
      launches_[used_ - 1].counted.push_back({args.counter, base_numbers(args.numbers), args.base.kind});
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

  std::vector<Launch<Table>> launches_;  // their memory is used again in every step
  size_t used_ = 0;
  std::vector<int> records_;  // slots of the records in the last table
  int free_ = 0;              // the records begin here
};

// The tables of counters.
class CountBuilder {
 public:
  void clear() { used_ = 0; }

  // `out`: where the corrections of an entry go. Pieces of one tensor stand one behind the other, and are counted once.
  void add(const Counted& c, double* out, int32_t group) {
    if (used_ > 0 && c.step != nullptr && c.step == last_.step) {
      CountTable& t = *launches_[used_ - 1].table;
      ++t.at[t.entries - 1].outs;
      return;
    }
    const bool same = used_ > 0 && c.numbers == last_.numbers;
    if (used_ == 0 || launches_[used_ - 1].table->entries == kEntries || (!same && records_ == kRecords)) {
      if (++used_ > launches_.size()) launches_.emplace_back();
      Launch<CountTable>& l = launches_[used_ - 1];
      l.table->entries = 0;
      l.groups.clear();
      records_ = 0;
    }
    Launch<CountTable>& l = launches_[used_ - 1];
    CountTable& t = *l.table;
    if (!same || records_ == 0) {
      CountRecord& record = t.records[records_++];
      record.base = c.base;
      std::memcpy(record.numbers, c.numbers, sizeof record.numbers);
    }
    t.at[t.entries++] = {c.step, out, 1, uint32_t(records_ - 1)};
    t.blocks = uint32_t(ceil_div(t.entries, kThreads));
    l.note(group);
    last_ = c;
  }

  Launch<CountTable>* begin() { return launches_.data(); }
  Launch<CountTable>* end() { return launches_.data() + used_; }

 private:
  static constexpr uint32_t kEntries = sizeof(CountTable::at) / sizeof(CountEntry);
  static constexpr int kRecords = sizeof(CountTable::records) / sizeof(CountRecord);
  std::vector<Launch<CountTable>> launches_;
  size_t used_ = 0;
  int records_ = 0;
  Counted last_{};
};

// The tables of sums.
class SumBuilder {
 public:
  void clear() { used_ = 0; }

  void add(const SumEntry& entry, int64_t batches, int32_t group) {
    if (used_ == 0 || int(launches_[used_ - 1].table->entries) == kEntries) {
      if (++used_ > launches_.size()) launches_.emplace_back();
      Launch<SumTable>& l = launches_[used_ - 1];
      l.table->entries = l.table->blocks = 0;
      l.groups.clear();
    }
    Launch<SumTable>& l = launches_[used_ - 1];
    SumTable& t = *l.table;
    SumEntry& added = t.at[t.entries++];
    added = entry;
    added.first = t.blocks;
    t.blocks += uint32_t(batches * entry.tiles * entry.parts);
    l.note(group);
  }

  Launch<SumTable>* begin() { return launches_.data(); }
  Launch<SumTable>* end() { return launches_.data() + used_; }

 private:
  static constexpr int kEntries = int(sizeof(SumTable::at) / sizeof(SumEntry));
  std::vector<Launch<SumTable>> launches_;
  size_t used_ = 0;
};

}  // namespace rvsm::cuda
