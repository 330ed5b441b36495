// The launches of the CUDA engine, done by the interpreter: a third implementation of cuda::Kernels beside the device's
// and the host's. What this folder knows of the engine's tables, of the names of its kernels and of what it is told of
// a tensor is in interpreted_kernels.cpp alone.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "../../cuda/job.h"
#include "definition.h"
#include "machine.h"

namespace rvsm::ptx {

// ---- tensors --------------------------------------------------------------------------------------------------------

// Where the arrays of a tensor are.
struct Addresses {
  void *w, *m, *kept, *g;
  const void* cut;
};

// What the engine is told of a tensor, with the arrays that the action needs; a prox reads g `with_source`. The others
// are null.
Row make_row(const definition::Tensor& t, Action action, const Addresses& at, bool with_source);

// The arrays of a row, null where it has none.
Addresses addresses_of(const Row& row);

// ---- launches -------------------------------------------------------------------------------------------------------

// One of each: the members of cuda::Kernels are functions that carry no state.
extern Machine machine;
extern Module module;

// Runs a launch's PTX, over all blocks.
extern const cuda::Kernels interpreted_kernels;

// Notes the launch in `recorded` and does nothing.
extern const cuda::Kernels recording_kernels;

// In the order of the members of cuda::Kernels.
enum class Kind { step, prox, keep_step, resident_step, resident_prox, squares, dual_squares, join, penalty };

const char* name_of(Kind kind);

// The kernel that does such a launch. Leaves the program with status 2 unless exactly one is loaded.
Kernel& kernel_of(Kind kind, Dtype dtype);

struct Launch {
  Kind kind;
  Dtype dtype;
  std::vector<char> table;

  uint32_t blocks() const;
  bool sums() const { return kind == Kind::squares || kind == Kind::dual_squares || kind == Kind::join; }

  // One block, by the interpreter and by the host's functions.
  void interpret(uint32_t block) const;
  void run_on_host(uint32_t block) const;

  // Of a table of entries: the first block of each.
  std::vector<uint32_t> first_blocks() const;

  // Of a table of entries: the address in w near which a block works.
  const char* near(uint32_t block) const;
};

extern std::vector<Launch> recorded;

// How often each kernel was launched, by mangled name.
extern std::map<std::string, int64_t> launched;

}  // namespace rvsm::ptx
