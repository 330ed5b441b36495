// One parameter of a step: its states found, its tensors checked, its pointers filled in.
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <stdexcept>

#include "../math/statistics.h"
#include "plan.h"

namespace rvsm {

namespace {

// Whether a tensor of a type agrees with a parameter in all else that matters to a kernel. The key set holds the
// layout, whether the tensor has memory, and whether it is lazily negated or zero: one comparison for all of them,
// since this runs for every tensor in every step.
bool is_twin(const at::Tensor& t, const at::Tensor& w, at::ScalarType type) {
  const c10::TensorImpl* x = t.unsafeGetTensorImpl();
  const c10::TensorImpl* y = w.unsafeGetTensorImpl();
  return x->key_set() == y->key_set() && x->device() == y->device() && x->dtype().toScalarType() == type &&
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

// The number that Python gives a dict whenever it changes, none twice; 0 where this Python has none.
uint64_t version_of(PyObject* dict) {
#if PY_VERSION_HEX < 0x030C0000
  return dict == nullptr ? 0 : reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#else
  return 0;
#endif
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
bool Plan::find_states(const GroupOptions& options, const Stored& stored, ParamSlot& slot) {
  const uint64_t version = inputs_.instead == nullptr ? version_of(slot.dict) : 0;
  if (version != 0 && version == slot.dict_version) return true;
  slot.dict_version = 0;
  const size_t states = stored.states.size(), wanted = states + options.has_counter;
  std::array<PyObject*, kMostStates + 1> found = {};
  const auto name_of = [&](size_t k) { return k < states ? stored.states[k].name.ptr() : options.counter.ptr(); };
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
  if (all && (!options.has_counter || slot.counter != nullptr)) slot.dict_version = version;
  return all;
}

// How many steps the states of a parameter have seen, by its counter. A counter on a device is waited for.
int64_t Plan::count_of(const py::list& groups, const ParamSlot& slot) {
  if (slot.counter == nullptr) return 0;
  if (!THPVariable_Check(slot.counter)) refuse(groups, slot);
  const at::Tensor& counter = THPVariable_Unpack(slot.counter);
  if (const float* const count = float_on_cpu(counter, slot.keys)) return int64_t(*count);
  if (counter.numel() != 1 || !counter.is_floating_point()) refuse(groups, slot);
  return int64_t(counter.item<double>());
}

// The counter of a parameter whose device counts: where it is missing 0, where it is of another type or elsewhere (as
// torch.optim.AdamW keeps it by default) its conversion.
float* Plan::counter_of(const py::list& groups, ParamSlot& slot) {
  const at::Tensor& w = tensor(slot);
  at::Tensor counter;
  if (slot.counter != nullptr) {
    if (!THPVariable_Check(slot.counter)) refuse(groups, slot);
    counter = THPVariable_Unpack(slot.counter);
    if (counter.numel() != 1 || !counter.is_floating_point() || !has_values(counter)) refuse(groups, slot);
    if (counter.scalar_type() == at::kFloat && counter.device() == w.device())
      return static_cast<float*>(counter.mutable_data_ptr());
  }
  at::Tensor made = made_before(slot, kMostStates);
  if (!made.defined()) {
    made = at::zeros({}, at::TensorOptions().dtype(at::kFloat).device(w.device()));
    if (counter.defined()) made.copy_(counter.reshape({}));
    new_states_.push_back({size_t(&slot - slots_.data()), kMostStates, made});
  }
  return static_cast<float*>(made.mutable_data_ptr());
}

// What the kernels can work on, perhaps after a copy; everything else is for refuse().
bool Plan::fits(const ParamSlot& slot, const Stored& stored) const {
  const at::Tensor& w = tensor(slot);
  const at::Tensor& g = w.grad();
  const auto fits_beside = [&](const at::Tensor& t) {
    return t.sizes() == at::IntArrayRef(slot.sizes) && t.device() == w.device() && has_values(t);
  };
  if (!has_values(w) || !fits_beside(g) || g.is_complex()) return false;
  if (w.numel() > 0 && is_expanded(slot.sizes, slot.strides)) return false;
  for (size_t k = 0; k < stored.states.size(); ++k) {
    if (slot.states[k] == nullptr) continue;
    if (!THPVariable_Check(slot.states[k])) return false;
    const at::Tensor& t = THPVariable_Unpack(slot.states[k]);
    const bool right_type = stored.states[k].type == at::kShort ? t.scalar_type() == at::kShort : t.is_floating_point();
    if (!fits_beside(t) || !right_type || (t.numel() > 0 && is_expanded(t.sizes(), t.strides()))) return false;
  }
  return true;
}

// Raise the error for a parameter whose groups, gradient or states cannot be stepped. The texts are those of checks.py,
// the same for every engine.
void Plan::refuse(const py::list& groups, const ParamSlot& slot) {
  const py::object group = groups[slot.group], param = py::reinterpret_borrow<py::object>(slot.param);
  py::dict states;
  if (is_supported(slot.type)) {
    const auto& known = options_[slot.group].stored(slot.type).states;
    for (size_t k = 0; k < known.size(); ++k)
      states[known[k].name] =
          slot.states[k] == nullptr ? py::none() : py::reinterpret_borrow<py::object>(slot.states[k]);
  }
  const py::module_ checks = py::module_::import("rvsm_kernels.engines.checks");
  const py::object counter = slot.counter == nullptr ? py::none() : py::reinterpret_borrow<py::object>(slot.counter);
  checks.attr("check_entry")(param, group, slot.group, slot.index, states, counter);
  const py::object name = checks.attr("param_name")(group, slot.group, slot.index);
  checks.attr("check_groups")(param, group, name);
  throw std::runtime_error(name.cast<std::string>() + " cannot be stepped, for a reason that no check names");
}

// The new state that an earlier occurrence of a parameter has in this step; undefined where there is none. Only a base
// that counts its steps goes on from it, as torch.optim.AdamW does: torch.optim.SGD begins a buffer for each
// occurrence. The counter is the same for all.
at::Tensor Plan::made_before(const ParamSlot& slot, size_t state) const {
  if (slot.repeats == 0 || !(options_[slot.group].counts || state == kMostStates)) return at::Tensor();
  for (const NewState& made : new_states_)
    if (slots_[made.slot].param == slot.param && made.state == state) return made.tensor;
  return at::Tensor();
}

// A state as a step needs it: where it is missing zeros; where the parameter was moved to another dtype, or an option
// asks for another one, its conversion.
at::Tensor Plan::state_of(const ParamSlot& slot, size_t k, const at::Tensor& like) {
  const at::ScalarType type = options_[slot.group].stored(slot.type).states[k].type;
  const at::Tensor found = slot.states[k] == nullptr ? at::Tensor() : THPVariable_Unpack(slot.states[k]);
  if (found.defined() && found.scalar_type() == type) return found;
  at::Tensor made = made_before(slot, k);
  if (made.defined()) return made;
  made = at::zeros_like(like, type);
  if (found.defined()) made.copy_(found);
  new_states_.push_back({size_t(&slot - slots_.data()), k, made});
  return made;
}

// What the options and the type of a parameter say of its precision.
void Plan::set_precision(ParamSlot& slot) {
  GroupOptions& options = options_[slot.group];
  const Stored& stored = options.stored(slot.type);
  Precision& precision = slot.args->precision;
  precision = {};
  slot.dict_version = 0;  // other states may be looked for
  const DeviceEngine& engine = engines_[slot.engine];
  slot.device_counts = options.has_counter && engine.counts_on_device;
  for (const at::Tensor& number : options.device_tensors)
    if (number.defined() && !(engine.takes_device_numbers && number.device() == slot.device))
      throw std::runtime_error("an option of param group " + std::to_string(slot.group) + " is a tensor on " +
                               number.device().str() + ", but a parameter of the group is on " + slot.device.str());
  if (!stored.mixed) return;
  precision.rounds = stored.rounds;
  precision.master = stored.master;
  precision.grad = slot.dtype;
  for (size_t k = 0; k < options.states; ++k) precision.states[k] = dtype_of(stored.states[k].type);
  precision.random.seed = options.seed;
  precision.mixed = slot.type != at::kDouble;
}

// The pointers of an unusual parameter: states that are missing, tensors that do not lie in memory as the kernels need
// them.
void Plan::stage(ParamSlot& slot) {
  TensorArgs& args = *slot.args;
  GroupOptions& options = options_[slot.group];
  const Stored& stored = options.stored(slot.type);
  const auto dense_of = [&](Staged staged, bool writes) {
    at::Tensor dense = staged.dense();
    if (staged.is_copy()) copies_.push_back({std::move(staged), writes, slot.turn});
    return dense;
  };
  const at::Tensor& w = tensor(slot);
  const at::Tensor& g = w.grad();
  if (args.precision.mixed) {
    const at::Tensor dense = dense_of(Staged(w, slot.type), true);
    args.dtype = slot.dtype;
    args.w = dense.mutable_data_ptr();
    const bool has_float = is_supported(g.scalar_type()) && g.scalar_type() != at::kDouble;
    const at::ScalarType type = has_float ? g.scalar_type() : at::kFloat;
    args.precision.grad = dtype_of(type);
    args.g = const_cast<void*>(dense_of(Staged(g, dense, type), args.base.writes_grad).const_data_ptr());
    for (size_t k = 0; k < stored.states.size(); ++k)
      args.state[k] = dense_of(Staged(state_of(slot, k, dense), dense, stored.states[k].type), true).mutable_data_ptr();
    return;
  }
  const bool wide = slot.type == at::kDouble;  // also where its states are to be stored in another type
  const at::Tensor dense = dense_of(Staged(w, wide ? slot.type : step_type(slot.type, g.scalar_type())), true);
  args.dtype = dtype_of(dense.scalar_type());
  args.w = dense.mutable_data_ptr();
  args.g = const_cast<void*>(dense_of(Staged(g, dense), args.base.writes_grad).const_data_ptr());
  for (size_t k = 0; k < options.states; ++k)
    args.state[k] = dense_of(Staged(state_of(slot, k, dense), dense), true).mutable_data_ptr();
}

// What stands beside the states: the cut of top-k, norms that were made elsewhere, room for statistics and for squares.
void Plan::find_beside(TensorArgs& args, const ParamSlot& slot, bool staged) const {
  args.cut = args.topk ? found_tensor(inputs_.cuts, slot.param, "cut").const_data_ptr() : nullptr;
  args.norms = nullptr;
  args.statistics = nullptr;
  if (inputs_.statistics != nullptr) {
    const at::Tensor& row = found_tensor(inputs_.statistics, slot.param, "row of statistics");
    TORCH_CHECK(row.scalar_type() == at::kDouble && row.is_contiguous() && row.numel() == kColumnsOfRow &&
                    row.device() == slot.device,
                "a row of statistics is ", int(kColumnsOfRow), " contiguous float64 numbers on the parameter's device");
    args.statistics = row.mutable_data_ptr<double>();
  }
  args.new_squares = nullptr;
  // Of a copy they would be those of weights that were not rounded yet.
  if (!staged && inputs_.new_squares != nullptr && get(inputs_.new_squares, slot.param) != nullptr) {
    const at::Tensor& room = found_tensor(inputs_.new_squares, slot.param, "squares");
    TORCH_CHECK(room.is_cpu() && room.scalar_type() == at::kDouble && room.numel() == 1,
                "the sum of squares of new weights is one float64 number on the CPU");
    args.new_squares = room.mutable_data_ptr<double>();
  }
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
  const Stored& stored = options.stored(slot.type);
  const size_t states = stored.states.size();
  const bool all_there = (states == 0 && !options.has_counter) || find_states(options, stored, slot);
  bool usual = slot.dense && no_groups_.empty() && is_twin(g, w, slot.type) && stored.mixed == args.precision.mixed;
  bool fresh = false;
  for (size_t k = 0; k < states; ++k) {
    PyObject* state = slot.states[k];
    if (state == nullptr)
      fresh |= k < options.base_states;
    else
      usual = usual && THPVariable_Check(state) && is_twin(THPVariable_Unpack(state), w, stored.states[k].type);
  }
  const void* address = nullptr;
  if (usual && args.active) {
    const size_t itemsize = c10::elementSize(slot.type);
    address = args.w = address_in_kernel<true>(w, itemsize);
    args.g = options.writes_grad ? address_in_kernel<true>(g, itemsize) : address_in_kernel<false>(g, itemsize);
    args.dtype = slot.dtype;
    usual = args.w != nullptr && args.g != nullptr;
    args.precision.grad = slot.dtype;
    for (size_t k = 0; k < states && usual && all_there; ++k) {
      const size_t size = stored.mixed ? c10::elementSize(stored.states[k].type) : itemsize;
      args.state[k] = address_in_kernel<true>(THPVariable_Unpack(slot.states[k]), size);
      usual = args.state[k] != nullptr;
    }
  }
  if (!usual) {
    const bool has_groups = no_groups_.count(size_t(&slot - slots_.data())) == 0;
    if (!has_groups || !fits(slot, stored)) refuse(groups, slot);
  }
  if (!args.active) return;
  for (size_t k = 0; k < states; ++k) lacks_ |= slot.states[k] == nullptr && !options.begins_with_zeros(k);
  if (lacks_) return;
  // A parameter that occurs twice has been stepped once more when its second turn comes.
  const bool host_counts = options.has_counter && !slot.device_counts;
  counts_ |= host_counts;
  args.counter = slot.device_counts ? counter_of(groups, slot) : nullptr;
  const int64_t steps = host_counts ? count_of(groups, slot) + slot.repeats : 0;
  const int64_t count = options.counts ? steps : int64_t(!fresh);
  if (options.counts)
    args.numbers = options.numbers(args.grouped ? args.view.size() : 1, count);
  else if (count != slot.count)
    options.apply(args, count);
  slot.count = count;
  args.precision.random.step = uint32_t(steps);
  const bool staged = !usual || !all_there;
  if (staged) {
    address = address_of(w);
    stage(slot);
  }
  if (args.topk || slot.norms_given || args.sums_of_tasks() || inputs_.wants_sums()) find_beside(args, slot, staged);
  addresses_changed_ |= address != std::exchange(slot.address, address);
  args.scale = inverse_scales_[slot.engine];
}

}  // namespace rvsm
