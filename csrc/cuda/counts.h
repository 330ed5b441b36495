// The counters of the parameters of a step on the device: one thread for each tensor counts its step, and makes the
// numbers of its base that follow from the count, if any. So no host waits for a count, and none is in a captured
// graph. For host and device.
#pragma once

#include "../math/device_numbers.h"
#include "table.h"

namespace rvsm::cuda {

// One tensor that is counted, or stands in a table with one.
struct CountEntry {
  float* step;      // its counter; null: the host has counted
  double* out;      // kCorrections numbers for each of `outs` entries of a step's table
  uint32_t outs;    // more than 1 only for pieces of a large tensor
  uint32_t record;  // of the numbers
};

// The numbers of the base of a param group.
struct CountRecord {
  BaseKind base;
  DeviceNumbers device;
  double numbers[kMostBaseNumbers];
};

struct CountTable {
  uint32_t entries = 0;
  uint32_t blocks = 0;
  const float* found_inf = nullptr;  // on the device; above 0 nothing is counted
  CountRecord records[32];
  CountEntry at[1180];
};
static_assert(sizeof(CountTable) <= 32764);

RVSM_HD void count_thread(CountTable const& t, uint32_t block, int thread) {
  const uint32_t i = block * kThreads + uint32_t(thread);
  if (i >= t.entries) return;
  const CountEntry& e = t.at[i];
  const CountRecord& record = t.records[e.record];
  double numbers[kMostBaseNumbers], made[kMostCorrections] = {};
  RVSM_UNROLL
  for (int k = 0; k < kMostBaseNumbers; ++k) numbers[k] = record.numbers[k];
  fill_in_base(record.base, numbers, read_number(record.device, kLr), 1);
  if (e.step != nullptr) {
    const float count = *e.step + 1;
    if (t.found_inf == nullptr || !(*t.found_inf > 0)) *e.step = count;
    corrections_of(record.base, numbers, count, made);
  } else {
    corrections_on_host(record.base, numbers, made);
  }
  for (uint32_t o = 0; o < e.outs; ++o) {
    RVSM_UNROLL
    for (int k = 0; k < kMostCorrections; ++k) e.out[o * kMostCorrections + k] = made[k];
  }
}

}  // namespace rvsm::cuda
