// From the rows of a step to the tables of its launches: as few as the kernel parameters allow.
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "../cpu/engine.h"
#include "../update.h"
#include "table.h"

namespace rvsm::cuda {

// The tables of all rows of one storage type.
template <class S>
class Builder {
 public:
  using T = Arithmetic<S>;

  // A row with elements. `ratio` and `length` are its groups' factors on the device, null for a row without groups.
  void add(const cpu::Row& row, const void* ratio = nullptr, const void* length = nullptr) {
    const Chunks chunks = chunks_of<S>(row.numel, row.w, row.g, row.m);
    Record<T> record{};
    record.step = narrow<T>(row.step);
    record.momentum = uint8_t(row.momentum);
    record.decay = row.step.decay != 0;
    record.lasso = row.grouped && row.step.lasso != 0;
    record.grouped = row.grouped;
    int slot = tables_.empty() || row.grouped ? kNone : known(record);
    const int needed = slot != kNone ? 1 : 1 + kSlotsOf<Record<T>> + (row.grouped ? kSlotsOf<Columns> : 0);
    if (tables_.empty() || free_ - int(table().entries) < needed) {
      tables_.push_back(std::make_unique<Table>());
      free_ = kSlots;
      records_.clear();
      slot = kNone;
    }
    if (slot == kNone) slot = place(record, row, ratio, length);
    Table& t = table();
    t.slots[t.entries++] = {row.w, row.g, row.m, t.blocks, chunks.rest, uint16_t(slot)};
    t.blocks += chunks.count;
  }

  const std::vector<std::unique_ptr<Table>>& tables() const { return tables_; }

 private:
  static constexpr int kNone = -1;

  Table& table() { return *tables_.back(); }

  // The slot of an equal record without groups.
  int known(const Record<T>& record) const {
    for (const int slot : records_)
      if (std::memcmp(&tables_.back()->slots[slot], &record, sizeof record) == 0) return slot;
    return kNone;
  }

  int place(const Record<T>& record, const cpu::Row& row, const void* ratio, const void* length) {
    free_ -= kSlotsOf<Record<T>> + (row.grouped ? kSlotsOf<Columns> : 0);
    std::memcpy(static_cast<void*>(&table().slots[free_]), &record, sizeof record);
    if (row.grouped) {
      const GroupView& v = row.view;
      const int64_t columns = v.groups * v.inner, batch = v.outer * columns;
      const Columns c{ratio, length,           columns,          v.inner,       v.groups,
                      batch, divider(columns), divider(v.inner), divider(batch)};
      std::memcpy(static_cast<void*>(&table().slots[free_ + kSlotsOf<Record<T>>]), &c, sizeof c);
    } else {
      records_.push_back(free_);
    }
    return free_;
  }

  std::vector<std::unique_ptr<Table>> tables_;
  std::vector<int> records_;  // slots of the records without groups in the last table
  int free_ = 0;              // its records begin here
};

}  // namespace rvsm::cuda
