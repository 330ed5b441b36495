// One parameter of a step: its states found, its tensors checked, its pointers filled in.
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <stdexcept>

#include "plan.h"

namespace rvsm {

namespace {

// Whether two tensors agree in all that matters to a kernel. The key set holds the layout, whether the tensor has
// memory, and whether it is lazily negated or zero: one comparison for all of them, since this runs for every tensor in
// every step.
bool is_twin(const at::Tensor& t, const at::Tensor& w) {
  const c10::TensorImpl* x = t.unsafeGetTensorImpl();
  const c10::TensorImpl* y = w.unsafeGetTensorImpl();
  return x->key_set() == y->key_set() && x->device() == y->device() && x->dtype() == y->dtype() &&
         equal(x->sizes(), y->sizes()) && equal(x->strides(), y->strides());
}

// Where a kernel finds a tensor's first element, or null where there is no memory: torch's data_ptr() without the
// checks that is_twin has made, since this runs for every tensor in every step. A storage that is shared until it is
// written (torch's copy on write) is copied here if the kernel writes. is_allocated() looks closer.
template <bool kWrites>
void* address_in_kernel(const at::Tensor& t, size_t itemsize) {
  const c10::TensorImpl* impl = t.unsafeGetTensorImpl();
  const c10::Storage& storage = impl->unsafe_storage();
  if (!storage) return nullptr;
  void* const begin = kWrites ? storage.mutable_data() : const_cast<void*>(storage.data());
  return begin == nullptr ? nullptr : static_cast<char*>(begin) + impl->storage_offset() * int64_t(itemsize);
}

// Whether a tensor could stand in a step beside a parameter.
bool has_values(const at::Tensor& t) { return t.layout() == at::kStrided && has_memory(t) && is_allocated(t); }

// Whether several elements share a place in memory.
bool is_expanded(at::IntArrayRef sizes, at::IntArrayRef strides) {
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1 && strides[d] == 0) return true;
  return false;
}

const at::Tensor& found_tensor(PyObject* dict, PyObject* param, const char* what) {
  PyObject* found = dict == nullptr ? nullptr : get(dict, param);
  if (found == nullptr || !THPVariable_Check(found))
    throw std::runtime_error(std::string("a step without the ") + what + " of a parameter");
  return THPVariable_Unpack(found);
}

}  // namespace

// The states of a parameter and its counter, by their names; returns false where a state is missing. What is None is
// missing.
bool Plan::find_states(const GroupOptions& options, ParamSlot& slot) {
  const size_t states = options.states.size(), wanted = states + options.counts;
  std::array<PyObject*, kMostStates + 1> found = {};
  const auto name_of = [&](size_t k) { return k < states ? options.states[k].ptr() : options.counter.ptr(); };
  // One walk through the dict, whose names are mostly the same objects, is shorter than a lookup of each name.
  PyObject *key, *value;
  size_t missing = slot.dict == nullptr ? 0 : wanted;
  for (Py_ssize_t at = 0; missing > 0 && PyDict_Next(slot.dict, &at, &key, &value);) {
    for (size_t k = 0; k < wanted; ++k) {
      if (key != name_of(k)) continue;
      found[k] = value;
      --missing;
    }
  }
  PyObject* const instead = inputs_.instead == nullptr ? nullptr : get(inputs_.instead, slot.param);
  bool all = true;
  for (size_t k = 0; k < wanted; ++k) {
    if (instead != nullptr)
      if (PyObject* const replaced = get(instead, name_of(k)); replaced != nullptr) found[k] = replaced;
    if (found[k] == nullptr && slot.dict != nullptr) found[k] = get(slot.dict, name_of(k));
    if (found[k] == Py_None) found[k] = nullptr;
    all = all && (found[k] != nullptr || k == states);
    PyObject*& held = k < states ? slot.states[k] : slot.counter;
    if (found[k] != held) reset(held, found[k]);
  }
  return all;
}

// How many steps the states of a parameter have seen, by its counter. A counter on a device is waited for.
int64_t Plan::count_of(const py::list& groups, const ParamSlot& slot) const {
  if (slot.counter == nullptr) return 0;
  if (!THPVariable_Check(slot.counter)) refuse(groups, slot);
  const at::Tensor& counter = THPVariable_Unpack(slot.counter);
  if (const float* const count = float_on_cpu(counter, slot.keys)) return int64_t(*count);
  if (counter.numel() != 1 || !counter.is_floating_point()) refuse(groups, slot);
  return int64_t(counter.item<double>());
}

// What the kernels can work on, perhaps after a copy; everything else is for refuse().
bool Plan::fits(const ParamSlot& slot, size_t states) const {
  const at::Tensor& w = tensor(slot);
  const at::Tensor& g = w.grad();
  const auto fits_beside = [&](const at::Tensor& t) {
    return t.sizes() == at::IntArrayRef(slot.sizes) && t.device() == w.device() && has_values(t);
  };
  if (!has_values(w) || !fits_beside(g) || g.is_complex()) return false;
  if (w.numel() > 0 && is_expanded(slot.sizes, slot.strides)) return false;
  return std::all_of(slot.states.begin(), slot.states.begin() + states, [&](PyObject* state) {
    if (state == nullptr) return true;
    if (!THPVariable_Check(state)) return false;
    const at::Tensor& t = THPVariable_Unpack(state);
    return fits_beside(t) && t.is_floating_point() && (t.numel() == 0 || !is_expanded(t.sizes(), t.strides()));
  });
}

// Raise the error for a parameter whose groups, gradient or states cannot be stepped. The texts are those of checks.py,
// the same for every engine.
void Plan::refuse(const py::list& groups, const ParamSlot& slot) const {
  const py::object group = groups[slot.group], param = py::reinterpret_borrow<py::object>(slot.param);
  py::dict states;
  const auto& names = options_[slot.group].states;
  for (size_t k = 0; k < names.size(); ++k)
    states[names[k]] = slot.states[k] == nullptr ? py::none() : py::reinterpret_borrow<py::object>(slot.states[k]);
  const py::module_ checks = py::module_::import("rvsm_kernels.engines.checks");
  const py::object counter = slot.counter == nullptr ? py::none() : py::reinterpret_borrow<py::object>(slot.counter);
  checks.attr("check_entry")(param, group, slot.group, slot.index, states, counter);
  const py::object name = checks.attr("param_name")(group, slot.group, slot.index);
  checks.attr("check_groups")(param, group["group_dim"], name);
  throw std::runtime_error(name.cast<std::string>() + " cannot be stepped, for a reason that no check names");
}

// The new state that an earlier occurrence of a parameter has in this step; undefined where there is none. Only a base
// that counts its steps goes on from it, as torch.optim.AdamW does: torch.optim.SGD begins a buffer for each
// occurrence.
at::Tensor Plan::made_before(const ParamSlot& slot, size_t state) const {
  if (slot.repeats == 0 || !options_[slot.group].counts) return at::Tensor();
  for (const NewState& made : new_states_)
    if (slots_[made.slot].param == slot.param && made.state == state) return made.tensor;
  return at::Tensor();
}

// The pointers of an unusual parameter: states that are missing, tensors that do not lie in memory as the kernels need
// them.
void Plan::stage(ParamSlot& slot) {
  TensorArgs& args = *slot.args;
  const auto dense_of = [&](Staged staged, bool writes) {
    at::Tensor dense = staged.dense();
    if (staged.is_copy()) copies_.push_back({std::move(staged), writes, slot.turn});
    return dense;
  };
  const at::Tensor& w = tensor(slot);
  const at::Tensor& g = w.grad();
  const at::Tensor dense = dense_of(Staged(w, step_type(slot.type, g.scalar_type())), true);
  args.dtype = dtype_of(dense.scalar_type());
  args.w = dense.mutable_data_ptr();
  args.g = const_cast<void*>(dense_of(Staged(g, dense), args.base.writes_grad).const_data_ptr());
  for (size_t k = 0; k < options_[slot.group].states.size(); ++k) {
    at::Tensor state = slot.states[k] == nullptr ? at::Tensor() : THPVariable_Unpack(slot.states[k]);
    if (!state.defined() || state.scalar_type() != slot.type) {
      // The first step, or a parameter that was moved to another dtype: its states follow it.
      at::Tensor made = made_before(slot, k);
      if (!made.defined()) {
        made = at::zeros_like(dense, slot.type);
        if (state.defined()) made.copy_(state);
        new_states_.push_back({size_t(&slot - slots_.data()), k, made});
      }
      state = made;
    }
    args.state[k] = dense_of(Staged(state, dense), true).mutable_data_ptr();
  }
}

// What stands beside the states: the cut of top-k, and norms that were made elsewhere.
void Plan::find_beside(TensorArgs& args, const ParamSlot& slot) const {
  args.cut = args.topk ? found_tensor(inputs_.cuts, slot.param, "cut").const_data_ptr() : nullptr;
  args.norms = nullptr;
  if (!slot.norms_given || !args.grouped) return;
  const at::Tensor& norms = found_tensor(inputs_.norms, slot.param, "norms");
  const bool right = norms.scalar_type() == at::kDouble && norms.is_contiguous() && norms.device() == slot.device &&
                     norms.numel() == args.norm_rows() * args.view.count();
  if (!right)
    py::module_::import("rvsm_kernels.engines.checks")
        .attr("check_norms")(norms, py::handle(slot.param), options_[slot.group].source);
  args.norms = norms.const_data_ptr<double>();
}

void Plan::prepare_slot(const py::list& groups, ParamSlot& slot) {
  TensorArgs& args = *slot.args;
  const at::Tensor& w = tensor(slot);
  const at::Tensor& g = w.grad();
  args.active = g.defined() && args.numel > 0;
  if (!g.defined()) return;
  GroupOptions& options = options_[slot.group];
  const size_t states = options.states.size();
  const bool all_there = states == 0 || find_states(options, slot);
  bool usual = slot.dense && no_groups_.empty() && is_twin(g, w);
  bool fresh = false;
  for (size_t k = 0; k < states; ++k) {
    PyObject* state = slot.states[k];
    if (state == nullptr)
      fresh |= k < options.base_states;
    else
      usual = usual && THPVariable_Check(state) && is_twin(THPVariable_Unpack(state), w);
  }
  const void* address = nullptr;
  if (usual && args.active) {
    const size_t itemsize = c10::elementSize(slot.type);
    address = args.w = address_in_kernel<true>(w, itemsize);
    args.g = options.writes_grad ? address_in_kernel<true>(g, itemsize) : address_in_kernel<false>(g, itemsize);
    args.dtype = slot.dtype;
    usual = args.w != nullptr && args.g != nullptr;
    for (size_t k = 0; k < states && usual && all_there; ++k) {
      args.state[k] = address_in_kernel<true>(THPVariable_Unpack(slot.states[k]), itemsize);
      usual = args.state[k] != nullptr;
    }
  }
  if (!usual) {
    const bool has_groups = no_groups_.count(size_t(&slot - slots_.data())) == 0;
    if (!has_groups || !fits(slot, states)) refuse(groups, slot);
  }
  if (!args.active) return;
  for (size_t k = 0; k < states; ++k) lacks_ |= slot.states[k] == nullptr && !options.begins_with_zeros(k);
  if (lacks_) return;
  // A parameter that occurs twice has been stepped once more when its second turn comes.
  const int64_t count = options.counts ? count_of(groups, slot) + slot.repeats : int64_t(!fresh);
  if (options.counts)
    args.numbers = options.numbers(args.grouped ? args.view.size() : 1, count);
  else if (count != slot.count)
    options.apply(args, count);
  slot.count = count;
  if (!usual || !all_there) {
    address = address_of(w);
    stage(slot);
  }
  if (args.topk || slot.norms_given) find_beside(args, slot);
  addresses_changed_ |= address != std::exchange(slot.address, address);
  args.scale = inverse_scales_[slot.engine];
}

}  // namespace rvsm
