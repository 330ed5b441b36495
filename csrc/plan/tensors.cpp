#include "tensors.h"

#include <ATen/EmptyTensor.h>

#include <algorithm>

#include "../math/group_view.h"

namespace rvsm {

bool is_supported(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

at::ScalarType step_type(at::ScalarType param, at::ScalarType grad) {
  return at::isReducedFloatingType(param) && grad != param ? at::kFloat : param;
}

Dtype dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return Dtype::f64;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::f16;
    default:
      return Dtype::f32;
  }
}

bool has_memory(const at::Tensor& tensor) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet wrapped({DispatchKey::Python, DispatchKey::Functionalize, DispatchKey::FuncTorchBatched,
                                         DispatchKey::FuncTorchGradWrapper, DispatchKey::Batched});
  return !tensor.key_set().has_any(wrapped) && !tensor.is_meta();
}

bool is_allocated(const at::Tensor& tensor) {
  if (tensor._is_zerotensor() || tensor.numel() == 0) return true;
  const size_t bytes =
      at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.itemsize(), tensor.storage_offset());
  return tensor.has_storage() && bytes <= tensor.storage().nbytes();
}

const void* address_of(const at::Tensor& tensor) {
  const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  if (!impl->has_storage()) return nullptr;
  return static_cast<const char*>(impl->unsafe_storage().data()) + impl->storage_offset() * int64_t(impl->itemsize());
}

std::vector<size_t> turns_of(const std::vector<at::Tensor>& tensors) {
  struct Range {
    uintptr_t begin, end;
    size_t index;
  };
  std::vector<Range> ranges;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& t = tensors[i];
    if (!t.defined() || !has_memory(t) || t._is_zerotensor() || !t.has_storage() || t.numel() == 0) continue;
    const auto base = reinterpret_cast<uintptr_t>(t.storage().data());
    const size_t bytes = at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.itemsize(), 0);
    const uintptr_t begin = base + size_t(t.storage_offset()) * t.itemsize();
    if (base != 0) ranges.push_back({begin, begin + bytes, i});
  }
  std::vector<size_t> turns(tensors.size(), 0);
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  // Mostly nothing overlaps; within a run of ranges that do, the tensors go in their order.
  for (size_t first = 0; first < ranges.size();) {
    size_t last = first + 1;
    uintptr_t end = ranges[first].end;
    for (; last < ranges.size() && ranges[last].begin < end; ++last) end = std::max(end, ranges[last].end);
    std::sort(ranges.begin() + first, ranges.begin() + last,
              [](const Range& a, const Range& b) { return a.index < b.index; });
    for (size_t i = first; i < last; ++i)
      for (size_t j = first; j < i; ++j)
        if (ranges[j].begin < ranges[i].end && ranges[i].begin < ranges[j].end)
          turns[ranges[i].index] = std::max(turns[ranges[i].index], turns[ranges[j].index] + 1);
    first = last;
  }
  return turns;
}

bool same_layout(const at::Tensor& x, at::IntArrayRef sizes, at::IntArrayRef strides) {
  if (x.sizes() != sizes) return false;
  const auto own = x.strides();
  if (own == strides) return true;
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1 && own[d] != strides[d]) return false;
  return true;
}

// A lazily conjugated, negated or zero tensor does not hold its values.
static bool is_plain(const at::Tensor& t) { return !t.is_neg() && !t._is_zerotensor(); }

Staged::Staged(const at::Tensor& tensor, const at::Tensor& like, at::ScalarType type)
    : tensor_(tensor), dense_(tensor) {
  const bool fits =
      tensor.scalar_type() == type && is_plain(tensor) && same_layout(tensor, like.sizes(), like.strides());
  if (!fits) dense_ = at::empty_strided(like.sizes(), like.strides(), like.options().dtype(type));
}

Staged::Staged(const at::Tensor& tensor, at::ScalarType type) : tensor_(tensor), dense_(tensor) {
  const bool fits = tensor.scalar_type() == type && is_plain(tensor) && tensor.is_non_overlapping_and_dense();
  if (!fits) dense_ = at::empty_like(tensor, type);
}

void Staged::load() {
  if (is_copy()) dense_.copy_(tensor_);
}

void Staged::store() {
  if (is_copy()) tensor_.copy_(dense_);
}

TensorArgs args_of(const at::Tensor& dense, const Dims& group_dim, int64_t group_block) {
  TensorArgs args;
  args.numel = dense.numel();
  args.dtype = dtype_of(dense.scalar_type());
  args.grouped = group_dim.has_value() && args.numel > 0;
  if (args.grouped) {
    std::vector<int64_t> dims;
    for (const int64_t d : *group_dim) {
      if (d < -dense.dim() || d >= dense.dim())
        throw std::invalid_argument("dimension " + std::to_string(d) + " of a tensor with " +
                                    std::to_string(dense.dim()));
      dims.push_back(d < 0 ? d + dense.dim() : d);
    }
    args.view = group_view(dense.sizes().vec(), dense.strides().vec(), dims, group_block);
  }
  return args;
}

Windows windows_in(const at::Tensor& dense, int32_t n, int32_t m) {
  if (dense.numel() == 0) return {};
  return windows_of(dense.sizes().vec(), dense.strides().vec(), n, m);
}

void bump_version(const at::Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

}  // namespace rvsm
