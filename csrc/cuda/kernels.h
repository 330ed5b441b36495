// What the host starts: launches of kernels.cu on a device, or interpret.cpp, which runs the same lines on the host.
#pragma once

#include "../types.h"
#include "resident.h"
#include "step.h"
#include "sums.h"

namespace rvsm::cuda {

// Where a launch goes.
struct Queue {
  int device = 0;
  void* stream = nullptr;  // a cudaStream_t
};

// Each member starts one launch and returns null, or what went wrong.
struct Kernels {
  const char* (*step)(const Queue&, Dtype, const Table&);
  const char* (*prox)(const Queue&, Dtype, const Table&);
  // A step whose entries have a Kept.
  const char* (*keep_step)(const Queue&, Dtype, const Table&);
  // A step and a prox of groups that are summed on the way.
  const char* (*resident_step)(const Queue&, Dtype, const Table&);
  const char* (*resident_prox)(const Queue&, Dtype, const Table&);
  // Squares of tensors of a type; then sums of the parts, for factors in the arithmetic type of `dtype`.
  const char* (*squares)(const Queue&, Dtype, const SumTable&);
  const char* (*dual_squares)(const Queue&, Dtype, const SumTable&);  // entries may have a dual
  const char* (*join)(const Queue&, Dtype, const SumTable&);
  const char* (*penalty)(const Queue&, Dtype, const Table&);
};

extern const Kernels host_kernels;
#if defined(RVSM_CUDA)
extern const Kernels device_kernels;
// Null, or why these kernels do not run on a device: another architecture, an older driver.
const char* probe(int device);
// The architectures the kernels were compiled for, as the build was told.
extern const char* const architectures;
#endif

}  // namespace rvsm::cuda
