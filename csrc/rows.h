// From tensors to rows: the checks and copies that stand between torch and the kernels.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>
#include <vector>

#include "row.h"

namespace rvsm {

using Dims = std::optional<std::vector<int64_t>>;  // group_dim: nothing is elementwise

// Whether kernels exist for the type.
bool is_supported(at::ScalarType type);

// The type of a row for a parameter and a gradient of these types. A half type is computed in float32, so a gradient of
// another type is used unrounded where the row is float32.
at::ScalarType row_type(at::ScalarType param, at::ScalarType grad);

// Whether a tensor holds its values in memory that a kernel may read: not a DTensor, a FakeTensor or another subclass
// with __torch_dispatch__, no meta tensor, and none that torch.func or functionalization has wrapped.
bool has_memory(const at::Tensor& tensor);

// Whether that memory is as large as the tensor says; a storage can be resized or freed under a tensor.
bool is_allocated(const at::Tensor& tensor);

// When each of some tensors has its turn, so that those that share memory (the same tensor twice, views of each other)
// do not have it at the same time: 0 for the first, 1 for those that share memory with one of them, ... Tensors without
// memory are left out.
std::vector<size_t> turns_of(const std::vector<at::Tensor>& tensors);

// The kernels' name of a supported type.
Dtype dtype_of(at::ScalarType type);

// Whether two tensors of equal sizes put every element at the same offset (strides of dimensions of size 1 are moot).
bool same_layout(const at::Tensor& x, at::IntArrayRef sizes, at::IntArrayRef strides);

// A tensor in a dense layout: itself, or a dense copy.
class Staged {
 public:
  // `like` gives the layout to have; it must be dense.
  Staged(const at::Tensor& tensor, const at::Tensor& like);
  // Dense in its own order, in the given type.
  Staged(const at::Tensor& tensor, at::ScalarType type);

  // Fill the copy, and bring it back.
  void load();
  void store();

  const at::Tensor& dense() const { return dense_; }
  bool is_copy() const { return !dense_.is_same(tensor_); }

 private:
  at::Tensor tensor_, dense_;
};

// The row of a dense tensor: shape, type and grouping; pointers are left empty. Throws std::invalid_argument where a
// dimension does not exist or where they do not collapse.
Row make_row(const at::Tensor& dense, const Dims& group_dim);

// Fill the numbers of a row from the options of its group.
void set_options(Row& row, const Options& options, bool first);

// Mark a tensor as written, for autograd's check of saved tensors.
void bump_version(const at::Tensor& tensor);

}  // namespace rvsm
