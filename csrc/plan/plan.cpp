// One step of a plan: what it is given, what is held meanwhile, the launch.
#include "plan.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <stdexcept>

namespace rvsm {

namespace {

// From this many elements on, other threads of Python may run during a step.
constexpr int64_t kReleaseGil = 1 << 20;

// Keeps dispatch modes out of what the plan does: a mode might hand it tensors that have no memory.
class OutsideModes {
  c10::impl::ExcludeDispatchKeyGuard guard_{
      c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot})};
};

// A dict of the inputs, null where it is empty. Borrowed: the inputs hold it.
PyObject* dict_of(const py::object& inputs, const char* name) {
  const py::object dict = inputs.attr(name);
  if (!PyDict_Check(dict.ptr())) throw py::type_error(std::string("StepInputs.") + name + " must be a dict");
  return PyDict_GET_SIZE(dict.ptr()) > 0 ? dict.ptr() : nullptr;
}

}  // namespace

void Plan::set_options(size_t group, const py::object& step_options) {
  GroupOptions options(step_options);
  if (group >= options_.size()) options_.resize(group + 1);
  // Numbers are refreshed tensor by tensor; another grouping or other states need another table.
  built_ = built_ && options_[group].has_the_tables_of(options);
  options_[group] = std::move(options);
}

void Plan::read_inputs(const py::object& inputs) {
  reset(inputs_object_, inputs.ptr());
  inputs_.scaling = {inputs.attr("grad_scale").cast<std::optional<at::Tensor>>().value_or(at::Tensor()),
                     inputs.attr("found_inf").cast<std::optional<at::Tensor>>().value_or(at::Tensor())};
  const py::object states = inputs.attr("states");
  if (!PyDict_Check(states.ptr())) throw py::type_error("the state of an optimizer must be a dict");
  inputs_.states = states.ptr();
  inputs_.instead = dict_of(inputs, "instead");
  inputs_.cuts = dict_of(inputs, "cuts");
  inputs_.norms = dict_of(inputs, "norms");
  inputs_.statistics = dict_of(inputs, "statistics");
  inputs_.new_squares = dict_of(inputs, "new_squares");
  const py::list options = inputs.attr("options");
  const py::object changed = inputs.attr("changed");
  if (changed.is_none()) {
    if (options_.size() > options.size()) {
      built_ = false;  // the table may have parameters of the groups that are gone
      options_.resize(options.size());
    }
    for (size_t i = 0; i < options.size(); ++i) set_options(i, options[i]);
  } else {
    for (const py::handle& i : changed) set_options(i.cast<size_t>(), options[i.cast<size_t>()]);
  }
}

// Reads grad_scale and found_inf where the host needs them: for engines that do not read them on the device, and a
// grad_scale that has another type than GradScaler's float32, for all engines.
void Plan::read_scaling() {
  Scaling& given = inputs_.scaling;
  inverse_scales_.assign(engines_.size(), 1);
  skip_ = false;
  if (!given.grad_scale.defined() && !given.found_inf.defined()) return;
  bool on_host = false;
  for (const auto& engine : engines_) on_host |= !engine->scales_on_device;
  const bool other_type = given.grad_scale.defined() && given.grad_scale.scalar_type() != at::kFloat;
  if (given.grad_scale.defined() && (on_host || other_type)) {
    const double inverse = 1 / given.grad_scale.item<double>();
    for (size_t i = 0; i < engines_.size(); ++i)
      if (other_type || !engines_[i].scales_on_device) inverse_scales_[i] = inverse;
  }
  if (given.found_inf.defined() && on_host) skip_ = given.found_inf.item<double>() > 0;
}

Ready Plan::prepare_without_holding(const py::list& groups, const py::object& inputs) {
  const at::NoGradGuard no_grad;
  const OutsideModes outside;
  drop();
  try {
    read_inputs(inputs);
    bool ready = built_ || rebuild(groups);
    if (ready) read_scaling();
    if (ready && !refresh(groups)) {
      // The table describes other parameters or layouts: what this walk has found belongs to them.
      copies_.clear();
      new_states_.clear();
      ready = rebuild(groups);
      if (ready) read_scaling();
      if (ready && !refresh(groups)) throw std::runtime_error("the parameters changed while a step was prepared");
    }
    if (!ready || lacks_) {
      const Ready answer = ready ? Ready::lacks : Ready::no;
      drop();
      return answer;
    }
    // A grad_scale of another type is in inverse_scales_ for all engines; none may apply it a second time.
    Scaling& given = inputs_.scaling;
    if (given.grad_scale.defined() && given.grad_scale.scalar_type() != at::kFloat) given.grad_scale = at::Tensor();
    // New states are put into optimizer.state only if the step happens. A first step waits here for found_inf; of the
    // steps after it only those wait that are counted on the host.
    if ((!new_states_.empty() || counts_) && given.found_inf.defined() && !skip_)
      skip_ = given.found_inf.item<double>() > 0;
  } catch (...) {
    drop();
    throw;
  }
  return Ready::yes;
}

Ready Plan::prepare(const py::list& groups, const py::object& inputs) {
  const Ready ready = prepare_without_holding(groups, inputs);
  if (ready == Ready::yes) hold();
  return ready;
}

Ready Plan::step(const py::list& groups, const py::object& inputs) {
  const Ready ready = prepare_without_holding(groups, inputs);
  if (ready == Ready::yes) launch();
  return ready;
}

// Own the memory of all that the step touches: Python may drop a gradient or give a parameter other data meanwhile.
void Plan::hold() {
  held_.clear();
  const auto own = [&](const at::Tensor& t) {
    if (t.defined() && t.has_storage()) held_.push_back(t.storage());
  };
  for (const ParamSlot& slot : slots_) {
    if (!slot.served || !slot.args->active) continue;
    own(tensor(slot));
    own(tensor(slot).grad());
    for (PyObject* state : slot.states)
      if (state != nullptr) own(THPVariable_Unpack(state));
    if (slot.device_counts && slot.counter != nullptr) own(THPVariable_Unpack(slot.counter));
  }
  for (const GroupOptions& options : options_)
    for (const at::Tensor& number : options.device_tensors) own(number);
}

void Plan::load_copies(size_t turn) {
  for (auto& copy : copies_)
    if (copy.turn == turn) copy.staged.load();
}

void Plan::store_copies(size_t turn) {
  for (auto& copy : copies_)
    if (copy.turn == turn && copy.writes) copy.staged.store();
}

void Plan::run_engines(size_t turn) {
  if (most_work_ < kReleaseGil || engines_.workload() < kReleaseGil) return engines_.run(inputs_.scaling, turn);
  if (held_.empty()) hold();
  const py::gil_scoped_release release;
  engines_.run(inputs_.scaling, turn);
}

// The dict of a parameter in optimizer.state, which is made where it is missing: a defaultdict makes it when asked.
PyObject* Plan::state_dict_of(ParamSlot& slot) {
  const auto dict = py::reinterpret_steal<py::object>(PyObject_GetItem(inputs_.states, slot.param));
  if (!dict) throw py::error_already_set();
  reset(slot.dict, dict.ptr());
  dicts_seen_ = false;  // the new dict may be gone again before the next step
  return slot.dict;
}

void Plan::put_new_states() {
  for (NewState& made : new_states_) {
    ParamSlot& slot = slots_[made.slot];
    const auto wrapped = py::reinterpret_steal<py::object>(THPVariable_Wrap(made.tensor));
    GroupOptions& options = options_[slot.group];
    const bool counter = made.state == kMostStates;
    PyObject* name = counter ? options.counter.ptr() : options.stored(slot.type).states[made.state].name.ptr();
    if (PyDict_SetItem(state_dict_of(slot), name, wrapped.ptr()) != 0) throw py::error_already_set();
    reset(counter ? slot.counter : slot.states[made.state], wrapped.ptr());
  }
}

// Count one step more of a parameter that was stepped.
void Plan::count_step(ParamSlot& slot) {
  if (slot.counter == nullptr) {
    PyObject* const name = options_[slot.group].counter.ptr();
    PyObject* const dict = state_dict_of(slot);
    // Another occurrence of the parameter may have made it.
    if (PyObject* const found = get(dict, name); found != nullptr && found != Py_None) {
      reset(slot.counter, found);
    } else {
      // In the type and place that torch gives it.
      const auto made = py::reinterpret_steal<py::object>(THPVariable_Wrap(at::zeros({}, at::kFloat)));
      if (PyDict_SetItem(dict, name, made.ptr()) != 0) throw py::error_already_set();
      reset(slot.counter, made.ptr());
    }
  }
  const at::Tensor& counter = THPVariable_Unpack(slot.counter);
  if (float* const count = float_on_cpu(counter, slot.keys)) {
    ++*count;
    bump_version(counter);
  } else {
    counter.add_(1);
  }
}

void Plan::launch() {
  const at::NoGradGuard no_grad;
  const OutsideModes outside;
  struct Drop {
    Plan& plan;
    ~Drop() { plan.drop(); }
  } const drop_at_the_end{*this};
  if (skip_) return;
  put_new_states();
  for (size_t turn = 0; turn < engines_.turns(); ++turn) {
    load_copies(turn);
    run_engines(turn);
    store_copies(turn);
  }
  // The last ones first: what was looked at last is still near.
  for (auto it = slots_.rbegin(); it != slots_.rend(); ++it) {
    ParamSlot& slot = *it;
    if (!slot.served || !slot.args->active) continue;
    bump_version(tensor(slot));
    if (slot.args->base.writes_grad) bump_version(tensor(slot).grad());
    if (slot.device_counts && slot.counter != nullptr)  // null: a second occurrence of a parameter, in its first step
      bump_version(THPVariable_Unpack(slot.counter));
    else if (!slot.device_counts && options_[slot.group].has_counter)
      count_step(slot);
    for (size_t k = 0; k < kMostStates; ++k)
      if (slot.states[k] != nullptr) bump_version(THPVariable_Unpack(slot.states[k]));
  }
}

void Plan::drop() {
  copies_.clear();
  new_states_.clear();
  held_.clear();
  lacks_ = false;
  if (inputs_.instead != nullptr)  // the slots hold copies that only this step needed
    for (ParamSlot& slot : slots_)
      for (PyObject*& state : slot.states) {
        reset(state, nullptr);
        slot.dict_version = 0;
      }
  inputs_ = {};
  reset(inputs_object_, nullptr);
}

int Plan::traverse(visitproc visit, void* arg) const {
  for (const ParamSlot& slot : slots_) {
    Py_VISIT(slot.param);
    Py_VISIT(slot.dict);
    Py_VISIT(slot.counter);
    for (PyObject* state : slot.states) Py_VISIT(state);
  }
  for (const GroupOptions& options : options_)
    if (const int stop = options.traverse(visit, arg)) return stop;
  Py_VISIT(inputs_object_);
  return 0;
}

void Plan::clear() {
  std::vector<ParamSlot> old = std::move(slots_);
  slots_.clear();
  engines_.clear();
  dicts_.clear();
  dicts_seen_ = false;
  no_groups_.clear();
  built_ = false;
  for (ParamSlot& slot : old) {
    reset(slot.param, nullptr);
    reset(slot.dict, nullptr);
    reset(slot.counter, nullptr);
    for (PyObject*& state : slot.states) reset(state, nullptr);
  }
}

}  // namespace rvsm
