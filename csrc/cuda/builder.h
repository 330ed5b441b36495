// From rows to the tables of launches: as few as the kernel parameters allow.
#pragma once

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../row.h"
#include "resident.h"
#include "step.h"
#include "sums.h"

namespace rvsm::cuda {

// The tables of all rows of one storage type. A step's are filled anew each time: that costs less than finding out what
// changed, and no pointer or option is ever stale.
template <class S>
class Builder {
 public:
  using T = Arithmetic<S>;

  struct Launch {
    std::unique_ptr<Table> table = std::make_unique<Table>();
    std::vector<int32_t> groups;  // the param groups in it, for error messages
  };

  void clear() { used_ = 0; }

  // A row of a step or, with `source` in the place of the gradient, of a prox.
  void add(const Row& row, const void* source) {
    Record<T> record = record_of(row);
    const int slot = begin(row, 1 + keeps(row), record);
    push(row, source, uint16_t(slot));
  }

  // A row in groups, whose factors a launch before this one makes.
  void add(const Row& row, const void* source, const Columns& columns) {
    Record<T> record = record_of(row);
    record.step.prox = {record.step.prox.penalty, 0, 0, 0, 0, 0};
    add_grouped(row, source, record, columns);
  }

  // A row in groups that its blocks sum themselves.
  void add(const Row& row, const void* source, const Tiles& tiles) {
    add_grouped(row, source, record_of(row), tiles);
    Table& t = table();
    Entry& e = t.slots[t.entries - 1];
    t.blocks = e.first + uint32_t(ceil_div(tiles.groups, tiles.tile));
    // Vectors only of arrays that all begin on a boundary: then every group does.
    const bool vectors = begins_on_boundary(row.w) && begins_on_boundary(source) && begins_on_boundary(row.m);
    e.rest = vectors ? 0 : kScalar;
  }

  // Numbers whose penalty is asked for: weights, or the norms of groups.
  void add_value(const Row& row, const void* numbers, int64_t count) {
    Row values;
    values.numel = count;
    values.group = row.group;
    Value<T> value;
    std::memset(static_cast<void*>(&value), 0, sizeof value);
    value.prox = narrow<T>(row.step.prox);
    value.lam = row.lam;
    value.beta = row.beta;
    const int slot = begin(values, 1, value);
    push(values, numbers, uint16_t(slot));
  }

  Launch* begin() { return launches_.data(); }
  Launch* end() { return launches_.data() + used_; }

 private:
  static constexpr int kNone = -1;

  Table& table() { return *launches_[used_ - 1].table; }

  // The same padding each time, so that records can be compared as bytes.
  static Record<T> record_of(const Row& row) {
    Record<T> record;
    std::memset(static_cast<void*>(&record), 0, sizeof record);
    record.step = narrow<T>(row.step);
    record.momentum = uint8_t(row.momentum);
    record.decay = row.step.decay != 0;
    return record;
  }

  // `groups`: what a kernel must know of the tensor's groups, beside the slot of the record.
  template <class Own>
  void add_grouped(const Row& row, const void* source, const Record<T>& plain, const Own& groups) {
    Record<T> record = plain;
    record.lasso = row.step.lasso != 0;
    Own own = groups;
    own.record = uint32_t(begin(row, 1 + kSlotsOf<Own> + keeps(row), record));
    free_ -= kSlotsOf<Own>;
    put(free_, own);
    push(row, source, uint16_t(free_ | kGrouped));
  }

  // Room for an entry in the last table or a new one, and the slot of its record.
  template <class R>
  int begin(const Row& row, int slots, const R& record) {
    int slot = used_ > 0 ? known(record) : kNone;
    const bool fits = used_ > 0 && free_ - int(table().entries) >= slots + (slot == kNone ? kSlotsOf<R> : 0);
    if (!fits) {
      if (++used_ > launches_.size()) launches_.emplace_back();
      Launch& l = launches_[used_ - 1];
      l.groups.clear();
      l.table->entries = l.table->blocks = 0;
      free_ = kSlots;
      records_.clear();
      slot = kNone;
    }
    Launch& l = launches_[used_ - 1];
    if (l.groups.empty() || l.groups.back() != row.group) l.groups.push_back(row.group);
    if (slot != kNone) return slot;
    free_ -= kSlotsOf<R>;
    put(free_, record);
    records_.push_back(free_);
    return free_;
  }

  // Slots of what stands beside a row.
  static int keeps(const Row& row) { return row.kept != nullptr || row.cut != nullptr ? kSlotsOf<Kept> : 0; }

  void push(const Row& row, const void* source, uint16_t slot) {
    const Chunks chunks = chunks_of<S>(row.numel, row.w, source, row.m, row.kept);
    Table& t = table();
    if (keeps(row) > 0) {
      free_ -= kSlotsOf<Kept>;
      put(free_, Kept{row.kept, row.cut, slot, uint8_t(row.method)});
      slot = uint16_t(free_);
    }
    t.slots[t.entries++] = {row.w, source, row.m, t.blocks, chunks.rest, slot};
    t.blocks += chunks.count;
  }

  template <class R>
  void put(int slot, const R& record) {
    std::memcpy(static_cast<void*>(&table().slots[slot]), &record, sizeof record);
  }

  // The slot of an equal record.
  template <class R>
  int known(const R& record) {
    for (const int slot : records_)
      if (std::memcmp(&table().slots[slot], &record, sizeof record) == 0) return slot;
    return kNone;
  }

  std::vector<Launch> launches_;  // kept from step to step
  size_t used_ = 0;
  std::vector<int> records_;  // slots of the records in the last table
  int free_ = 0;              // the records begin here
};

// The tables of sums.
class SumBuilder {
 public:
  struct Launch {
    std::unique_ptr<SumTable> table = std::make_unique<SumTable>();
    std::vector<int32_t> groups;
  };

  void clear() { used_ = 0; }

  void add(const SumEntry& entry, int64_t batches, int32_t group) {
    if (used_ == 0 || int(launches_[used_ - 1].table->entries) == kEntries) {
      if (++used_ > launches_.size()) launches_.emplace_back();
      Launch& l = launches_[used_ - 1];
      l.table->entries = l.table->blocks = 0;
      l.groups.clear();
    }
    Launch& l = launches_[used_ - 1];
    SumTable& t = *l.table;
    SumEntry& own = t.at[t.entries++];
    own = entry;
    own.first = t.blocks;
    t.blocks += uint32_t(batches * entry.tiles * entry.parts);
    if (l.groups.empty() || l.groups.back() != group) l.groups.push_back(group);
  }

  Launch* begin() { return launches_.data(); }
  Launch* end() { return launches_.data() + used_; }

 private:
  static constexpr int kEntries = int(sizeof(SumTable::at) / sizeof(SumEntry));
  std::vector<Launch> launches_;
  size_t used_ = 0;
};

}  // namespace rvsm::cuda
