// The launches of the CUDA engine, done by the interpreter: a third implementation of cuda::Kernels beside the device's
// and the host's. What this folder knows of the engine's tables, of the names of its kernels and of what it is told of
// a tensor is in interpreted_kernels.cpp alone.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "../../cuda/launches.h"
#include "definition.h"
#include "machine.h"

namespace rvsm::ptx {

// ---- tensors --------------------------------------------------------------------------------------------------------

// Where the arrays of a tensor are.
struct Addresses {
  void *w, *m, *kept, *g, *v, *largest;
  const void* cut;
  float* counter = nullptr;  // of a tensor that the device counts
};

// What the engine is told of a tensor, with the arrays that the action needs; a prox reads g `with_source`. The others
// are null.
TensorArgs make_args(const definition::Tensor& t, Action action, const Addresses& at, bool with_source);

// The arrays of a tensor, null where it has none.
Addresses addresses_of(const TensorArgs& args);

// ---- launches -------------------------------------------------------------------------------------------------------

// One of each: what cuda::Kernels holds are functions that carry no state.
extern Machine machine;
extern Module module;

// Run a launch's PTX, over all blocks.
const cuda::Kernels& interpreted_kernels();

// Note the launch in `recorded` and do nothing.
const cuda::Kernels& recording_kernels();

std::string name_of(const cuda::Key& key);

// The kernel that does such a launch. Leaves the program with status 2 unless exactly one is loaded.
Kernel& kernel_of(const cuda::Key& key);

struct Launch {
  cuda::Key key;
  std::vector<char> table;

  uint32_t blocks() const;
  // Whether its table is one of sums.
  bool sums() const { return key.work <= cuda::Work::factors; }
  bool counts() const { return key.work == cuda::Work::count; }

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
