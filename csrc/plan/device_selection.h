// The cuts of top-k by the CUDA engine's kernels: on a device, or interpreted on the host.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "../math/tensor_args.h"

namespace rvsm {

// A cut that is wanted among the elements of tensors of one device.
struct WantedCut {
  at::Tensor cut;   // one number in the type of the arithmetic
  at::Tensor last;  // two int64: see Room in method/selection.py
  int64_t survivors;
  std::vector<TensorArgs> tensors;
};

// Whether the cuts of tensors on a device are made there. The CPU makes its own, unless it interprets CUDA.
bool selects_on_device(at::Device device);

// Puts the selection on the current stream of the device, on which the memory of all tensors stays until it is done.
void select_on_device(at::Device device, const std::vector<WantedCut>& cuts, bool between);

}  // namespace rvsm
