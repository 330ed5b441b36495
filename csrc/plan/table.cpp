// The table of parameters of a plan: made once, and compared with what each step brings.
#include <torch/csrc/autograd/python_variable.h>

#include <map>
#include <stdexcept>

#include "plan.h"

namespace rvsm {

namespace {

PyObject* const kParams = PyUnicode_InternFromString("params");

PyObject* params_of(PyObject* group) {
  PyObject* params = PyDict_Check(group) ? get(group, kParams) : nullptr;
  if (params == nullptr || !(PyList_Check(params) || PyTuple_Check(params)))
    throw py::type_error("a param group needs a list of params");
  return params;
}

}  // namespace

const at::Tensor& Plan::tensor(const ParamSlot& slot) const { return THPVariable_Unpack(slot.param); }

// A parameter that an engine serves, and its arguments there.
void Plan::add_slot(const py::list& groups, ParamSlot& slot, PyObject* param, const at::Tensor& w) {
  slot.served = true;
  slot.param = param;  // borrowed until the end of this function, which may throw before
  slot.address = address_of(w);
  slot.engine = engines_.of(w.device(), slot.turn);
  slot.device = w.device();
  slot.sizes = at::DimVector(w.sizes());
  slot.strides = at::DimVector(w.strides());
  slot.type = w.scalar_type();
  slot.dense = w.is_non_overlapping_and_dense() && !w.is_neg() && !w._is_zerotensor();
  if (!is_supported(slot.type)) refuse(groups, slot);
  std::vector<TensorArgs>& tensors = engines_[slot.engine].tensors;
  GroupOptions& options = options_.at(slot.group);
  try {
    const at::Tensor dense = slot.dense ? w : at::empty_like(w);
    const Windows windows = options.keep > 0 ? windows_in(dense, options.keep, options.window) : Windows{};
    tensors.push_back(args_of(dense, options.dims, options.block));
    tensors.back().windows = windows;
  } catch (const std::invalid_argument&) {
    no_groups_.insert(slots_.size());  // an error only if the parameter gets a gradient
    tensors.emplace_back();
  }
  TensorArgs& args = tensors.back();
  args.group = int32_t(slot.group);
  slot.norms_given = inputs_.norms != nullptr && get(inputs_.norms, param) != nullptr;
  static const double kElsewhere = 0;  // the engines ask only whether norms come from elsewhere
  if (slot.norms_given) args.norms = &kElsewhere;
  options.apply(args, slot.count);
  slot.dtype = args.dtype;
  slot.args = &args;  // until the table is whole
  set_precision(slot);
  Py_INCREF(param);
}

bool Plan::rebuild(const py::list& groups) {
  clear();
  std::vector<at::Tensor> tensors;
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups.ptr()); ++g) {
    PyObject* params = params_of(PyList_GET_ITEM(groups.ptr(), g));
    for (Py_ssize_t j = 0; j < PySequence_Fast_GET_SIZE(params); ++j) {
      PyObject* p = PySequence_Fast_GET_ITEM(params, j);
      if (!THPVariable_Check(p)) throw py::type_error("optimizer can only optimize Tensors");
      tensors.push_back(THPVariable_Unpack(p));
    }
  }
  const std::vector<size_t> turns = turns_of(tensors);
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups.ptr()); ++g) {
    PyObject* params = params_of(PyList_GET_ITEM(groups.ptr(), g));
    for (Py_ssize_t j = 0; j < PySequence_Fast_GET_SIZE(params); ++j) {
      PyObject* p = PySequence_Fast_GET_ITEM(params, j);
      const at::Tensor& w = tensors[slots_.size()];
      const bool served = has_memory(w) && DeviceEngine::serves(w.device()) && w.layout() == at::kStrided &&
                          (w.grad().defined() || is_supported(w.scalar_type()));
      if (!served && w.grad().defined()) return false;
      ParamSlot slot;
      slot.group = size_t(g);
      slot.index = size_t(j);
      slot.turn = turns[slots_.size()];
      slot.keys = w.key_set();
      if (served)
        add_slot(groups, slot, p, w);
      else
        reset(slot.param, p);
      slots_.push_back(std::move(slot));
    }
  }
  if (engines_.turns() > 1) {
    std::map<PyObject*, int64_t> seen;
    for (ParamSlot& slot : slots_) slot.repeats = seen[slot.param]++;
  }
  std::vector<size_t> next(engines_.size());
  for (ParamSlot& slot : slots_)
    if (slot.served) slot.args = &engines_[slot.engine].tensors[next[slot.engine]++];
  engines_.divide();
  most_work_ = engines_.workload();  // the tensors are active until a step says otherwise
  for (auto& options : options_) options.changed = false;
  built_ = true;
  return true;
}

// One walk over optimizer.state tells whether any of its dicts was replaced; only then they are looked up.
void Plan::find_dicts() {
  Py_ssize_t at = 0;
  size_t i = 0;
  PyObject *key, *value;
  bool same = dicts_seen_ && dicts_.size() == size_t(PyDict_GET_SIZE(inputs_.states));
  while (same && PyDict_Next(inputs_.states, &at, &key, &value)) {
    same = dicts_[i].first == key && dicts_[i].second == value;
    ++i;
  }
  if (same) return;
  for (ParamSlot& slot : slots_) {
    PyObject* found = get(inputs_.states, slot.param);
    if (found != nullptr && !PyDict_Check(found)) throw py::type_error("the state of a parameter must be a dict");
    reset(slot.dict, found);
  }
  dicts_.clear();
  at = 0;
  while (PyDict_Next(inputs_.states, &at, &key, &value)) dicts_.emplace_back(key, value);
  dicts_seen_ = true;
}

// Whether a slot still describes its parameter.
bool Plan::describes(const ParamSlot& slot, const at::Tensor& w) const {
  return w.key_set() == slot.keys && equal(w.sizes(), slot.sizes) && equal(w.strides(), slot.strides) &&
         w.scalar_type() == slot.type && w.device() == slot.device;
}

// One walk over all parameters. Returns false where the table no longer describes them: other parameters, or other
// layouts.
bool Plan::refresh(const py::list& groups) {
  bool any_states = false, any_changed = false;
  counts_ = false;
  for (GroupOptions& options : options_) {
    if (options.counts) options.forget_counts();
    options.find_device_numbers();
    any_states |= options.states > 0 || options.has_counter || options.has_master;
    any_changed |= options.changed;
  }
  if (any_changed) {
    for (ParamSlot& slot : slots_)
      if (slot.served && options_.at(slot.group).changed) {
        options_[slot.group].apply(*slot.args, slot.count);
        set_precision(slot);
      }
    for (GroupOptions& options : options_) options.changed = false;
  }
  if (any_states) find_dicts();
  size_t i = 0;
  addresses_changed_ = false;
  const size_t count = slots_.size();
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups.ptr()); ++g) {
    PyObject* params = params_of(PyList_GET_ITEM(groups.ptr(), g));
    const Py_ssize_t n = PySequence_Fast_GET_SIZE(params);
    for (Py_ssize_t j = 0; j < n; ++j, ++i) {
      if (i >= count) return false;
      ParamSlot& slot = slots_[i];
      if (slot.param != PySequence_Fast_GET_ITEM(params, j) || slot.group != size_t(g)) return false;
      const at::Tensor& w = tensor(slot);
      if (!slot.served) {
        if (w.grad().defined()) return false;
        continue;
      }
      if (!describes(slot, w)) return false;
      if (slot.norms_given != (inputs_.norms != nullptr && get(inputs_.norms, slot.param) != nullptr)) return false;
      prepare_slot(groups, slot);
    }
  }
  return i == count && (!addresses_changed_ || turns_hold());
}

// Whether the parameters that share memory are still those that did when the table was made.
bool Plan::turns_hold() const {
  std::vector<at::Tensor> tensors;
  for (const ParamSlot& slot : slots_) tensors.push_back(slot.served ? tensor(slot) : at::Tensor());
  const std::vector<size_t> turns = turns_of(tensors);
  for (size_t i = 0; i < slots_.size(); ++i)
    if (slots_[i].served && slots_[i].turn != turns[i]) return false;
  return true;
}

}  // namespace rvsm
