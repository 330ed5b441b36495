// Between torch and the kernels: which tensors have memory, and dense copies of those that lie otherwise.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>
#include <vector>

#include "../math/tensor_args.h"

namespace rvsm {

using Dims = std::optional<std::vector<int64_t>>;  // group_dim; nullopt is elementwise

// Whether kernels exist for the type.
bool is_supported(at::ScalarType type);

// The type in which a parameter is stepped whose gradient has another type. The arithmetic on a half type is float32,
// so a gradient of another type is used unrounded where the weights are copied to float32.
at::ScalarType step_type(at::ScalarType param, at::ScalarType grad);

// Whether a tensor holds its values in memory that a kernel may read: not a DTensor, a FakeTensor or another subclass
// with __torch_dispatch__, no meta tensor, and none that torch.func or functionalization has wrapped.
bool has_memory(const at::Tensor& tensor);

// Whether that memory is as large as the tensor says; a storage can be resized or freed under a tensor.
bool is_allocated(const at::Tensor& tensor);

// The address of a tensor's first element, also where it has no memory.
const void* address_of(const at::Tensor& tensor);

// Whether two shapes are equal: so few numbers that a call of memcmp costs more than the comparison.
inline bool equal(at::IntArrayRef a, at::IntArrayRef b) {
  if (a.size() != b.size()) return false;
  for (size_t d = 0; d < a.size(); ++d)
    if (a[d] != b[d]) return false;
  return true;
}

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
  Staged(const at::Tensor& tensor, const at::Tensor& like) : Staged(tensor, like, like.scalar_type()) {}
  // The same in another type.
  Staged(const at::Tensor& tensor, const at::Tensor& like, at::ScalarType type);
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

// The arguments of a dense tensor: shape, type and grouping; pointers are left empty. Throws std::invalid_argument
// where a dimension does not exist, where they do not collapse, and where a block does not divide its dimension.
TensorArgs args_of(const at::Tensor& dense, const Dims& group_dim, int64_t group_block);

// The windows of a dense tensor, none where it has no elements; throws as windows_of.
Windows windows_in(const at::Tensor& dense, int32_t n, int32_t m);

// The number in a 1-element float32 tensor of the CPU, null for any other tensor. A thousand parameters ask in each
// step. `keys`: those of a tensor that holds its values in memory of its own.
inline float* float_on_cpu(const at::Tensor& tensor, c10::DispatchKeySet keys) {
  const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  if (impl->key_set() != keys || !impl->is_cpu() || impl->dtype() != caffe2::TypeMeta::Make<float>()) return nullptr;
  const c10::Storage& storage = impl->unsafe_storage();
  const int64_t at = impl->storage_offset();
  if (impl->numel() != 1 || !storage || storage.nbytes() < size_t(at + 1) * sizeof(float)) return nullptr;
  return static_cast<float*>(storage.mutable_data()) + at;
}

// Mark a tensor as written, for autograd's check of saved tensors.
void bump_version(const at::Tensor& tensor);

}  // namespace rvsm
