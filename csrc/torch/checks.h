// What the dispatcher ops ask of the tensors that they are given.
#pragma once

#include "../plan/tensors.h"

namespace rvsm {

inline void check(const at::Tensor& w) {
  TORCH_CHECK_TYPE(is_supported(w.scalar_type()) && w.layout() == at::kStrided,
                   "rvsm_kernels does not support tensors of dtype ", w.dtype());
  TORCH_CHECK_TYPE(has_memory(w), "rvsm_kernels does not support tensors without memory of their own beside others");
  TORCH_CHECK(is_allocated(w), "the memory of a tensor of shape ", w.sizes(), " has been freed");
}

// Tracing needs shapes and types only. torch also comes here with a list that mixes meta tensors with others, and
// nothing would be done with the others: that is an error.
inline void check_meta(at::TensorList tensors) {
  for (const at::Tensor& t : tensors)
    TORCH_CHECK_TYPE(t.is_meta(), "rvsm_kernels does not support meta tensors beside tensors on ", t.device());
}

}  // namespace rvsm
