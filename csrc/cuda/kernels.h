// What the host starts: launches of kernels.cu on a device, or of host_kernels.cpp, which runs the same lines on the
// host. A kernel is found by its key.
#pragma once

#include <map>

#include "counts.h"
#include "general.h"
#include "measure.h"
#include "picks.h"
#include "resident.h"
#include "windows.h"

namespace rvsm::cuda {

// Where a launch goes.
struct Stream {
  int device = 0;
  void* handle = nullptr;  // a cudaStream_t
};

// What a launch does, in the order in which the launches of a step follow each other: norms, then factors, then the
// kernels that read them.
enum class Work : uint8_t {
  squares,          // a SumTable: squares of tensors of a type
  dual_squares,     // the same, entries may have a dual
  general_squares,  // the same of weights whose type is known only when it runs
  factors,          // a SumTable: sums of parts or norms from elsewhere; the type is that of the factors
  measure,          // a step's statistics; the type is the arithmetic's
  step_resident,    // a step of groups that its blocks sum themselves
  prox_resident,
  step,
  prox,
  penalty,
  general,  // a step whose arrays have several types, or whose numbers are on the device; the type is the arithmetic's
  count,    // a CountTable; before the steps that read what it makes
  numbers,  // a NumbersTable; the same
  windows,  // a WindowTable; the same
  select_pass,  // a PassTable, of a selection; the type is that of the arithmetic
  select_pick,  // a CutTable; the same
  rows,         // a RowTable; after all that measures
};

struct Key {
  Work work;
  Dtype dtype;
  BaseKey base;               // of a step
  bool method_state = false;  // of a step: the method has a state

  uint32_t code() const {
    return uint32_t(work) << 24 | uint32_t(dtype) << 16 | uint32_t(base.kind) << 8 | uint32_t(base.states) << 4 |
           uint32_t(base.writes_grad) << 1 | uint32_t(method_state);
  }
  friend bool operator<(const Key& a, const Key& b) { return a.code() < b.code(); }
  friend bool operator==(const Key& a, const Key& b) { return a.code() == b.code(); }
};

// Starts one launch with a table of its work, and returns null or what went wrong.
using Start = const char* (*)(const Stream&, const void* table);
using Kernels = std::map<Key, Start>;

const Kernels& host_kernels();
#if defined(RVSM_CUDA)
const Kernels& device_kernels();
// Null, or why these kernels do not run on a device: another architecture, an older driver.
const char* probe(int device);
// The architectures the kernels were compiled for, as the build was told.
extern const char* const architectures;
#endif

// The list of all kernels, for whoever can start them: `Starter` has a function for each kind of work. A base, a
// storage type or a count of states needs nothing else.
template <class Starter>
Kernels all_kernels() {
  Kernels all;
  all[{Work::count, Dtype::f32, {}, false}] = Starter::count;
  all[{Work::numbers, Dtype::f32, {}, false}] = Starter::numbers;
  all[{Work::windows, Dtype::f32, {}, false}] = Starter::windows;
  all[{Work::general_squares, Dtype::f32, {}, false}] = Starter::general_squares;
  all[{Work::rows, Dtype::f32, {}, false}] = Starter::rows;
  const auto add_storage = [&](auto storage, Dtype dtype) {
    using S = decltype(storage);
    const auto add = [&](Work work, Start start) { all[{work, dtype, {}, false}] = start; };
    add(Work::squares, Starter::template squares<S, false>);
    add(Work::dual_squares, Starter::template squares<S, true>);
    add(Work::prox, Starter::template prox<S>);
    add(Work::prox_resident, Starter::template resident<S, ProxBase, false>);
    add(Work::penalty, Starter::template penalty<S>);
    if constexpr (sizeof(S) >= 4) {
      add(Work::factors, Starter::template factors<S>);
      add(Work::measure, Starter::template measure<S>);
      add(Work::select_pass, Starter::template select_pass<S>);
      add(Work::select_pick, Starter::template select_pick<S>);
    }
    for_each_base([&](auto base) {
      using Base = decltype(base);
      all[{Work::step, dtype, key_of<Base>(), false}] = Starter::template step<S, Base, false>;
      all[{Work::step, dtype, key_of<Base>(), true}] = Starter::template step<S, Base, true>;
      all[{Work::step_resident, dtype, key_of<Base>(), false}] = Starter::template resident<S, Base, true>;
      if constexpr (sizeof(S) >= 4) {
        all[{Work::general, dtype, key_of<Base>(), false}] = Starter::template general<S, Base, false>;
        all[{Work::general, dtype, key_of<Base>(), true}] = Starter::template general<S, Base, true>;
      }
    });
  };
  add_storage(float{}, Dtype::f32);
  add_storage(double{}, Dtype::f64);
  add_storage(BFloat16{}, Dtype::bf16);
  add_storage(Float16{}, Dtype::f16);
  return all;
}

}  // namespace rvsm::cuda
