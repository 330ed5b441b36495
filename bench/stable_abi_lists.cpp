// For bench/stable_abi.py: an op of torch's stable C interface that is handed lists of tensors and looks at each of
// them as a step must, but does nothing with them.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <vector>

namespace {

void ok(AOTITorchError error) {
  if (error != 0) throw std::runtime_error("a call of the stable interface failed");
}

struct Facts {
  int32_t dtype = 0, device = 0;
  int64_t dim = 0;
  int64_t *sizes = nullptr, *strides = nullptr;
  void* address = nullptr;
};

Facts facts_of(AtenTensorHandle t) {
  Facts f;
  ok(aoti_torch_get_dtype(t, &f.dtype));
  ok(aoti_torch_get_device_type(t, &f.device));
  ok(aoti_torch_get_dim(t, &f.dim));
  ok(aoti_torch_get_sizes(t, &f.sizes));
  ok(aoti_torch_get_strides(t, &f.strides));
  ok(aoti_torch_get_data_ptr(t, &f.address));
  return f;
}

bool agree(const Facts& x, const Facts& w) {
  if (x.dtype != w.dtype || x.device != w.device || x.dim != w.dim) return false;
  for (int64_t d = 0; d < w.dim; ++d)
    if (x.sizes[d] != w.sizes[d] || x.strides[d] != w.strides[d]) return false;
  return x.address != nullptr;
}

AtenTensorHandle item(StableListHandle list, size_t i) {
  StableIValue value;
  ok(torch_list_get_item(list, i, &value));  // a new handle: it is to be deleted
  return torch::stable::detail::to<AtenTensorHandle>(value);
}

std::vector<void*> table;  // the addresses of the last call, which keep the compiler from leaving the work out

// (Tensor(a!)[] w, Tensor[] g, Tensor(b!)[] state1, Tensor(c!)[] state2, Tensor(d!)[] state3) -> (), without the
// containers of TORCH_BOX, which cost more.
void look(StableIValue* stack, uint64_t arguments, uint64_t) {
  table.clear();
  std::vector<StableListHandle> lists;
  for (uint64_t k = 0; k < arguments; ++k) lists.push_back(torch::stable::detail::to<StableListHandle>(stack[k]));
  size_t count = 0;
  ok(torch_list_size(lists[0], &count));
  for (size_t i = 0; i < count; ++i) {
    const AtenTensorHandle w = item(lists[0], i);
    const Facts of_w = facts_of(w);
    table.push_back(of_w.address);
    for (size_t k = 1; k < lists.size(); ++k) {
      const AtenTensorHandle t = item(lists[k], i);
      const Facts of_t = facts_of(t);
      if (!agree(of_t, of_w)) throw std::runtime_error("tensors of one parameter do not agree");
      table.push_back(of_t.address);
      ok(aoti_torch_delete_tensor_object(t));
    }
    ok(aoti_torch_delete_tensor_object(w));
  }
  for (const StableListHandle list : lists) ok(torch_delete_list(list));
}

}  // namespace

STABLE_TORCH_LIBRARY(rvsm_stable_abi, m) {
  m.def("look(Tensor(a!)[] w, Tensor[] g, Tensor(b!)[] state1, Tensor(c!)[] state2, Tensor(d!)[] state3) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rvsm_stable_abi, CPU, m) { m.impl("look", &look); }
