// The counters of the parameters of a step on the device: one thread for each tensor counts its step, and makes the
// numbers of its base that follow from the count. So no host waits for a count, and none is in a captured graph. For
// host and device.
#pragma once

#include "table.h"

namespace rvsm::cuda {

// One tensor whose base has numbers that follow from a count.
struct CountEntry {
  float* step;      // its counter; null: the host has counted
  double* out;      // kCorrections numbers for each of `outs` entries of a step's table
  uint32_t outs;    // more than 1 only for pieces of a large tensor
  uint32_t record;  // of the numbers
};

// The numbers of the base of a param group.
struct CountRecord {
  BaseKind base;
  double numbers[kMostBaseNumbers];
};

struct CountTable {
  uint32_t entries = 0;
  uint32_t blocks = 0;
  const float* found_inf = nullptr;  // on the device; above 0 nothing is counted
  CountRecord records[32];
  CountEntry at[1240];
};
static_assert(sizeof(CountTable) <= 32764);

RVSM_HD void count_thread(CountTable const& t, uint32_t block, int thread) {
  const uint32_t i = block * kThreads + uint32_t(thread);
  if (i >= t.entries) return;
  const CountEntry& e = t.at[i];
  const CountRecord& record = t.records[e.record];
  double made[kMostCorrections];
  if (e.step != nullptr) {
    const float count = *e.step + 1;
    if (t.found_inf == nullptr || !(*t.found_inf > 0)) *e.step = count;
    corrections_of(record.base, record.numbers, count, made);
  } else {
    corrections_on_host(record.base, record.numbers, made);
  }
  for (uint32_t o = 0; o < e.outs; ++o) {
    RVSM_UNROLL
    for (int k = 0; k < kMostCorrections; ++k) e.out[o * kMostCorrections + k] = made[k];
  }
}

}  // namespace rvsm::cuda
