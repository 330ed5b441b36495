#include "plan.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/python_variable.h>

#include <sstream>
#include <stdexcept>

#include "update.h"

namespace rvsm {

namespace py = pybind11;

namespace {

// Threads of Python may run while this many elements are updated.
constexpr int64_t kReleaseGil = 1 << 20;

PyObject* const kParams = PyUnicode_InternFromString("params");
PyObject* const kParamNames = PyUnicode_InternFromString("param_names");
PyObject* const kBuffer = PyUnicode_InternFromString("momentum_buffer");

// What the plan does is no business of a dispatch mode, which might hand it tensors that have no memory.
class OutsideModes {
  c10::impl::ExcludeDispatchKeyGuard guard_{
      c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot})};
};

// Borrowed; null where the key is missing.
PyObject* get(PyObject* dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// Replace an owned reference.
void reset(PyObject*& held, PyObject* value) {
  Py_XINCREF(value);
  PyObject* old = std::exchange(held, value);
  Py_XDECREF(old);
}

PyObject* params_of(PyObject* group) {
  PyObject* params = PyDict_Check(group) ? get(group, kParams) : nullptr;
  if (params == nullptr || !(PyList_Check(params) || PyTuple_Check(params)))
    throw py::type_error("a param group needs a list of params");
  return params;
}

// Numbers of a shape: so few that a call of memcmp costs more than the comparison.
bool equal(at::IntArrayRef a, at::IntArrayRef b) {
  if (a.size() != b.size()) return false;
  for (size_t d = 0; d < a.size(); ++d)
    if (a[d] != b[d]) return false;
  return true;
}

// Whether two tensors agree in all that a kernel asks of them. The key set says layout and whether the values are
// there (no lazy negation), so that one comparison stands for four questions; a thousand parameters ask them each
// step.
bool is_twin(const at::Tensor& t, const at::Tensor& w) {
  const c10::TensorImpl* x = t.unsafeGetTensorImpl();
  const c10::TensorImpl* y = w.unsafeGetTensorImpl();
  return x->key_set() == y->key_set() && x->device() == y->device() && x->dtype() == y->dtype() &&
         equal(x->sizes(), y->sizes()) && equal(x->strides(), y->strides());
}

// Whether the memory at a tensor's address is there at all, asked of every tensor in every step; is_allocated() looks
// closer.
bool is_there(const at::Tensor& t, const void* address) {
  return address != nullptr && (t.storage_offset() == 0 || t.storage().data() != nullptr);
}

// The address of a tensor's first element, also where it has no memory.
const void* address_of(const at::Tensor& t) {
  const c10::TensorImpl* impl = t.unsafeGetTensorImpl();
  if (!impl->has_storage()) return nullptr;
  return static_cast<const char*>(impl->unsafe_storage().data()) + impl->storage_offset() * int64_t(impl->itemsize());
}

// Python raises what a tensor without memory deserves, so that every engine says it in the same words.
void refuse_without_memory(const at::Tensor& t, const std::string& name) {
  if (!has_memory(t) || !is_allocated(t)) py::module_::import("rvsm_kernels.memory").attr("refuse")(t, name);
}

std::string text(at::IntArrayRef sizes) {
  std::string s = "[";
  for (size_t d = 0; d < sizes.size(); ++d) s += (d ? ", " : "") + std::to_string(sizes[d]);
  return s + "]";
}

template <class T>
std::string text_of(const T& value) {
  std::ostringstream s;
  s << value;
  return s.str();
}

}  // namespace

const at::Tensor& Plan::tensor(const Entry& e) const { return THPVariable_Unpack(e.param); }

std::string Plan::name(const py::list& groups, const Entry& e) const {
  PyObject* names = get(PyList_GET_ITEM(groups.ptr(), Py_ssize_t(e.group)), kParamNames);
  if (names != nullptr && PyList_Check(names) && PyList_GET_SIZE(names) > Py_ssize_t(e.index))
    return py::str(PyList_GET_ITEM(names, Py_ssize_t(e.index)));
  return "parameter " + std::to_string(e.index) + " of group " + std::to_string(e.group);
}

void Plan::set_options(size_t group, GroupOptions options) {
  if (group >= options_.size()) options_.resize(group + 1);
  GroupOptions& own = options_[group];
  // Numbers are refreshed row by row; another grouping needs another table.
  const Options &old = own.options, &next = options.options;
  built_ = built_ && own.group_dim == options.group_dim && needs_norms(old) == needs_norms(next) &&
           is_split(old) == is_split(next) && (old.group_lasso != 0) == (next.group_lasso != 0) &&
           old.method == next.method && old.topk == next.topk;
  own = std::move(options);
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
      const at::Tensor& w = tensors[entries_.size()];
      Entry e;
      e.group = size_t(g);
      e.index = size_t(j);
      e.keys = w.key_set();
      const bool served = has_memory(w) && DeviceJob::serves(w.device()) && w.layout() == at::kStrided;
      if (!served || (!w.grad().defined() && !is_supported(w.scalar_type()))) {
        if (w.grad().defined()) return false;
        reset(e.param, p);
        entries_.push_back(std::move(e));
        continue;
      }
      e.served = true;
      e.turn = turns[entries_.size()];
      e.address = address_of(w);
      e.job = jobs_.of(w.device(), e.turn);
      e.device = w.device();
      std::vector<Row>& rows = jobs_[e.job].rows;
      e.sizes = at::DimVector(w.sizes());
      e.strides = at::DimVector(w.strides());
      e.type = w.scalar_type();
      e.dense = w.is_non_overlapping_and_dense() && !w.is_neg() && !w._is_zerotensor();
      const GroupOptions& o = options_.at(e.group);
      if (!is_supported(e.type))
        throw py::type_error("RVSM does not support parameters of dtype " + text_of(w.dtype()) + " (" +
                             name(groups, e) + ")");
      const Dims dims = needs_norms(o.options) ? o.group_dim : Dims{};
      try {
        rows.push_back(make_row(e.dense ? w : at::empty_like(w), dims));
      } catch (const std::invalid_argument& error) {
        errors_[entries_.size()] = error.what();  // of no weight until the parameter has a gradient
        rows.emplace_back();
      }
      rows.back().group = int32_t(g);
      rvsm::set_options(rows.back(), o.options, false);
      e.dtype = rows.back().dtype;
      reset(e.param, p);
      entries_.push_back(std::move(e));
    }
  }
  for (auto& o : options_) o.changed = true;
  std::vector<size_t> next(jobs_.size());
  for (Entry& e : entries_)
    if (e.served) e.row = &jobs_[e.job].rows[next[e.job]++];
  jobs_.divide();
  built_ = true;
  return true;
}

// One walk over optimizer.state tells whether any of its dicts was replaced; only then they are looked up.
void Plan::find_states(const py::dict& state) {
  Py_ssize_t at = 0;
  size_t i = 0;
  PyObject *key, *value;
  bool same = states_seen_ && states_.size() == size_t(PyDict_GET_SIZE(state.ptr()));
  while (same && PyDict_Next(state.ptr(), &at, &key, &value)) {
    same = states_[i].first == key && states_[i].second == value;
    ++i;
  }
  if (same) return;
  for (Entry& e : entries_) {
    PyObject* found = get(state.ptr(), e.param);
    if (found != nullptr && !PyDict_Check(found)) throw py::type_error("the state of a parameter must be a dict");
    reset(e.state, found);
  }
  states_.clear();
  at = 0;
  while (PyDict_Next(state.ptr(), &at, &key, &value)) states_.emplace_back(key, value);
  states_seen_ = true;
}

void Plan::find_buffer(const py::list& groups, Entry& e) {
  PyObject *found = nullptr, *key = nullptr;
  Py_ssize_t at = 0;
  // It is mostly the first of the dict: looking there saves a lookup.
  if (e.state != nullptr && !(PyDict_Next(e.state, &at, &key, &found) && key == kBuffer)) found = get(e.state, kBuffer);
  if (found == Py_None) found = nullptr;
  if (found == e.buffer) return;
  if (found != nullptr && !THPVariable_Check(found))
    throw py::type_error("the momentum_buffer of " + name(groups, e) + " is not a tensor");
  reset(e.buffer, found);
}

// Raise what a gradient or a momentum buffer that does not fit deserves.
void Plan::check_entry(const py::list& groups, const Entry& e, bool momentum) const {
  const at::Tensor& w = tensor(e);
  const at::Tensor& g = w.grad();
  refuse_without_memory(w, name(groups, e));
  const auto error = errors_.find(size_t(&e - entries_.data()));
  if (error != errors_.end())
    throw py::value_error("Invalid group_dim value for " + name(groups, e) + ": " + error->second);
  for (size_t d = 0; d < e.sizes.size() && w.numel() > 0; ++d)
    if (e.sizes[d] > 1 && e.strides[d] == 0)
      throw std::runtime_error(name(groups, e) + " is expanded: several of its elements are one in memory");
  if (g.layout() != at::kStrided)
    throw std::runtime_error("RVSM does not support sparse gradients (" + name(groups, e) + " has layout " +
                             text_of(g.layout()) + ")");
  if (g.is_complex()) throw std::runtime_error("RVSM does not support complex gradients (" + name(groups, e) + ")");
  if (g.sizes() != at::IntArrayRef(e.sizes))
    throw std::runtime_error("the gradient of " + name(groups, e) + " has shape " + text(g.sizes()) +
                             ", the parameter " + text(e.sizes));
  if (g.device() != w.device())
    throw std::runtime_error("the gradient of " + name(groups, e) + " is on " + text_of(g.device()) +
                             ", the parameter on " + text_of(w.device()));
  refuse_without_memory(g, "the gradient of " + name(groups, e));
  if (e.kept != nullptr) refuse_without_memory(THPVariable_Unpack(e.kept), "what is kept of " + name(groups, e));
  if (!momentum || e.buffer == nullptr) return;
  const at::Tensor& m = THPVariable_Unpack(e.buffer);
  refuse_without_memory(m, "the momentum_buffer of " + name(groups, e));
  if (m.sizes() != at::IntArrayRef(e.sizes) || !m.is_floating_point() || m.device() != w.device() ||
      m.layout() != at::kStrided)
    throw std::runtime_error("the momentum_buffer of " + name(groups, e) + " is " + text_of(m.dtype()) + " " +
                             text(m.sizes()) + " on " + text_of(m.device()) + ", the parameter " + text_of(w.dtype()) +
                             " " + text(e.sizes) + " on " + text_of(w.device()));
}

// The pointers of an unusual entry: a first step, or tensors that do not lie in memory as the kernels need them.
void Plan::stage_entry(Entry& e, Row& row, bool momentum) {
  const auto stage = [&](Staged staged, bool writes) {
    at::Tensor dense = staged.dense();
    if (staged.is_copy()) staging_.push_back({std::move(staged), writes, e.turn});
    return dense;
  };
  const at::Tensor& w = tensor(e);
  const at::Tensor& g = w.grad();
  const at::Tensor dense = stage(Staged(w, row_type(e.type, g.scalar_type())), true);
  row.dtype = dtype_of(dense.scalar_type());
  row.w = dense.mutable_data_ptr();
  row.g = stage(Staged(g, dense), false).const_data_ptr();
  if (!momentum) {
    row.m = nullptr;
  } else if (e.buffer == nullptr || THPVariable_Unpack(e.buffer).scalar_type() != e.type) {
    // The first step, or a parameter that was moved to another dtype: its momentum follows it.
    at::Tensor buffer = at::zeros_like(dense, e.type);
    if (e.buffer != nullptr) buffer.copy_(THPVariable_Unpack(e.buffer));
    new_buffers_.emplace_back(&e - entries_.data(), std::move(buffer));
    row.m = stage(Staged(new_buffers_.back().second, dense), true).mutable_data_ptr();
  } else {
    row.m = stage(Staged(THPVariable_Unpack(e.buffer), dense), true).mutable_data_ptr();
  }
  if (e.kept != nullptr) row.kept = stage(Staged(THPVariable_Unpack(e.kept), dense), true).mutable_data_ptr();
}

// What stands beside w, g and m: the tensor that the method keeps, and the cut of top-k.
void Plan::find_beside(Entry& e, Row& row) const {
  const auto find = [&](PyObject* dict, const char* what) {
    PyObject* found = get(dict, e.param);
    if (found == nullptr || !THPVariable_Check(found))
      throw std::runtime_error(std::string("a step without the ") + what + " of a parameter");
    return found;
  };
  if (row.method != Method::rvsm) {
    e.kept = find(kept_, "u or dual");
    row.kept = const_cast<void*>(address_of(THPVariable_Unpack(e.kept)));
  }
  if (row.topk) row.cut = THPVariable_Unpack(find(cuts_, "cut")).const_data_ptr();
}

void Plan::prepare_entry(const py::list& groups, Entry& e, Row& row, double grad_factor) {
  const at::Tensor& w = tensor(e);
  const at::Tensor& g = w.grad();
  row.active = g.defined() && row.numel > 0;
  if (!g.defined()) return;
  const Options& o = options_[e.group].options;
  const bool momentum = o.momentum != 0;
  if (momentum) find_buffer(groups, e);
  e.kept = nullptr;  // what was borrowed for another step
  row.kept = nullptr;
  row.cut = nullptr;
  if (row.active && (row.method != Method::rvsm || row.topk)) find_beside(e, row);
  const bool first = momentum && e.buffer == nullptr;
  const at::Tensor* m = momentum && !first ? &THPVariable_Unpack(e.buffer) : nullptr;
  const at::Tensor* kept = e.kept != nullptr ? &THPVariable_Unpack(e.kept) : nullptr;
  bool usual = e.dense && errors_.empty() && is_twin(g, w) && (m == nullptr || is_twin(*m, w)) &&
               (kept == nullptr || is_twin(*kept, w));
  const void* address = nullptr;
  if (usual && row.active) {
    address = row.w = w.mutable_data_ptr();
    row.g = g.const_data_ptr();
    row.m = m != nullptr ? m->mutable_data_ptr() : nullptr;
    row.dtype = e.dtype;
    usual = is_there(w, row.w) && is_there(g, row.g) && (m == nullptr || is_there(*m, row.m)) &&
            (kept == nullptr || is_there(*kept, row.kept));
  }
  if (!usual) check_entry(groups, e, momentum);
  if (!row.active) return;
  if (!usual || first) {
    address = address_of(w);
    stage_entry(e, row, momentum);
  }
  moved_ |= address != std::exchange(e.address, address);
  if (first != e.first) {
    rvsm::set_options(row, o, first);
    e.first = first;
  }
  row.step.grad = o.maximize ? -grad_factor : grad_factor;
}

// One walk over all parameters. Returns false where the table no longer describes them: other parameters, or other
// layouts.
bool Plan::look(const py::list& groups, const py::dict& state) {
  bool momentum = false, changed = false;
  for (const auto& o : options_) {
    momentum |= o.options.momentum != 0;
    changed |= o.changed;
  }
  if (momentum) find_states(state);
  if (changed) {
    for (const Entry& e : entries_)
      if (e.served && options_[e.group].changed) rvsm::set_options(*e.row, options_[e.group].options, e.first);
    for (auto& o : options_) o.changed = false;
  }
  size_t i = 0;
  moved_ = false;
  const size_t count = entries_.size();
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups.ptr()); ++g) {
    PyObject* params = params_of(PyList_GET_ITEM(groups.ptr(), g));
    const Py_ssize_t n = PySequence_Fast_GET_SIZE(params);
    for (Py_ssize_t j = 0; j < n; ++j, ++i) {
      if (i >= count) return false;
      Entry& e = entries_[i];
      if (e.param != PySequence_Fast_GET_ITEM(params, j) || e.group != size_t(g)) return false;
      const at::Tensor& w = tensor(e);
      if (!e.served) {
        if (w.grad().defined()) return false;
        continue;
      }
      if (w.key_set() != e.keys || !equal(w.sizes(), e.sizes) || !equal(w.strides(), e.strides) ||
          w.scalar_type() != e.type || w.device() != e.device)
        return false;
      prepare_entry(groups, e, *e.row, factors_[e.job]);
    }
  }
  return i == count && (!moved_ || turns_hold());
}

// Whether the parameters that share memory are still those that did when the table was made.
bool Plan::turns_hold() const {
  std::vector<at::Tensor> tensors;
  for (const Entry& e : entries_) tensors.push_back(e.served ? tensor(e) : at::Tensor());
  const std::vector<size_t> turns = turns_of(tensors);
  for (size_t i = 0; i < entries_.size(); ++i)
    if (entries_[i].served && entries_[i].turn != turns[i]) return false;
  return true;
}

// What must be known on the host before a step: by an engine that scales there, or of a grad_scale that is not the
// float32 of GradScaler.
void Plan::read_scaling(const Scaling& given) {
  scaling_ = given;
  factors_.assign(jobs_.size(), 1);
  skip_ = false;
  if (!given.grad_scale.defined() && !given.found_inf.defined()) return;
  bool on_host = false;
  for (const auto& job : jobs_) on_host |= !job->scales_on_device;
  const bool odd = given.grad_scale.defined() && given.grad_scale.scalar_type() != at::kFloat;
  if (given.grad_scale.defined() && (on_host || odd)) {
    const double factor = 1 / given.grad_scale.item<double>();
    for (size_t i = 0; i < jobs_.size(); ++i)
      if (odd || !jobs_[i].scales_on_device) factors_[i] = factor;
  }
  if (odd) scaling_.grad_scale = at::Tensor();
  if (given.found_inf.defined() && on_host) skip_ = given.found_inf.item<double>() > 0;
}

bool Plan::prepare_unheld(const py::list& groups, const py::dict& state, const Scaling& scaling, const py::dict& kept,
                          const py::dict& cuts) {
  const at::NoGradGuard no_grad;
  const OutsideModes outside;
  drop();
  reset(state_, state.ptr());
  reset(kept_, kept.ptr());
  reset(cuts_, cuts.ptr());
  try {
    bool ready = built_ || rebuild(groups);
    if (ready) read_scaling(scaling);
    if (ready && !look(groups, state)) {
      // What the first look has found is of other parameters, or of other layouts.
      staging_.clear();
      new_buffers_.clear();
      ready = rebuild(groups);
      if (ready) read_scaling(scaling);
      if (ready && !look(groups, state)) throw std::runtime_error("the parameters changed while a step was prepared");
    }
    if (!ready) {
      drop();
      return false;
    }
    // Whether buffers appear is decided here, so that a first step waits for the device; no other does.
    if (!new_buffers_.empty() && scaling_.found_inf.defined() && !skip_) skip_ = scaling_.found_inf.item<double>() > 0;
  } catch (...) {
    drop();
    throw;
  }
  return true;
}

bool Plan::prepare(const py::list& groups, const py::dict& state, const Scaling& scaling, const py::dict& kept,
                   const py::dict& cuts) {
  if (!prepare_unheld(groups, state, scaling, kept, cuts)) return false;
  hold();
  return true;
}

bool Plan::step(const py::list& groups, const py::dict& state, const Scaling& scaling, const py::dict& kept,
                const py::dict& cuts) {
  if (!prepare_unheld(groups, state, scaling, kept, cuts)) return false;
  launch();
  return true;
}

// Own the memory of all that the step touches: Python may drop a gradient or give a parameter other data meanwhile.
void Plan::hold() {
  held_.clear();
  const auto own = [&](const at::Tensor& t) {
    if (t.defined() && t.has_storage()) held_.push_back(t.storage());
  };
  for (const Entry& e : entries_) {
    if (!e.served || !e.row->active) continue;
    own(tensor(e));
    own(tensor(e).grad());
    if (e.buffer != nullptr) own(THPVariable_Unpack(e.buffer));
    if (e.kept != nullptr) own(THPVariable_Unpack(e.kept));
  }
}

void Plan::run_jobs(size_t turn) {
  int64_t workload = 0;
  for (const auto& job : jobs_) workload += job->workload();
  if (workload < kReleaseGil) return jobs_.run(scaling_, turn);
  if (held_.empty()) hold();
  const py::gil_scoped_release release;
  jobs_.run(scaling_, turn);
}

void Plan::launch() {
  const at::NoGradGuard no_grad;
  const OutsideModes outside;
  struct Drop {
    Plan& plan;
    ~Drop() { plan.drop(); }
  } const drop_at_the_end{*this};
  if (skip_) return;
  for (auto& [index, buffer] : new_buffers_) {
    Entry& e = entries_[index];
    const auto wrapped = py::reinterpret_steal<py::object>(THPVariable_Wrap(buffer));
    // state is a defaultdict: asking for the parameter's dict makes it.
    const auto dict = py::reinterpret_steal<py::object>(PyObject_GetItem(state_, e.param));
    if (!dict || PyDict_SetItem(dict.ptr(), kBuffer, wrapped.ptr()) != 0) throw py::error_already_set();
    reset(e.state, dict.ptr());
    reset(e.buffer, wrapped.ptr());
    states_seen_ = false;  // the new dict may be gone again before the next step
  }
  for (size_t turn = 0; turn < jobs_.turns(); ++turn) {
    for (auto& s : staging_)
      if (s.turn == turn) s.staged.load();
    run_jobs(turn);
    for (auto& s : staging_)
      if (s.turn == turn && s.writes) s.staged.store();
  }
  for (const Entry& e : entries_) {
    if (!e.served || !e.row->active) continue;
    bump_version(tensor(e));
    if (e.row->m != nullptr) bump_version(THPVariable_Unpack(e.buffer));
    if (e.kept != nullptr) bump_version(THPVariable_Unpack(e.kept));
  }
}

void Plan::drop() {
  staging_.clear();
  new_buffers_.clear();
  held_.clear();
  scaling_ = {};
  reset(state_, nullptr);
  reset(kept_, nullptr);
  reset(cuts_, nullptr);
}

int Plan::traverse(visitproc visit, void* arg) const {
  for (const Entry& e : entries_) {
    Py_VISIT(e.param);
    Py_VISIT(e.state);
    Py_VISIT(e.buffer);
  }
  Py_VISIT(state_);
  Py_VISIT(kept_);
  Py_VISIT(cuts_);
  return 0;
}

void Plan::clear() {
  std::vector<Entry> old = std::move(entries_);
  entries_.clear();
  jobs_.clear();
  states_.clear();
  states_seen_ = false;
  errors_.clear();
  built_ = false;
  for (Entry& e : old) {
    reset(e.param, nullptr);
    reset(e.state, nullptr);
    reset(e.buffer, nullptr);
  }
}

}  // namespace rvsm
