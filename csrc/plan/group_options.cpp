#include "group_options.h"

#include <pybind11/stl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <stdexcept>
#include <tuple>

namespace rvsm {

namespace {

// The one object that Python has for a name, so that names are compared by address.
py::str interned(const py::handle& name) {
  PyObject* object = name.ptr();
  Py_INCREF(object);
  PyUnicode_InternInPlace(&object);
  return py::reinterpret_steal<py::str>(object);
}

}  // namespace

GroupOptions::GroupOptions(const py::object& o) : source(o) {
  base = static_cast<BaseKind>(o.attr("base").attr("number").cast<int>());
  method = static_cast<Method>(o.attr("method").attr("number").cast<int>());
  starts_from_u = o.attr("method").attr("starts_from_u").cast<bool>();
  writes_grad = o.attr("writes_gradient").cast<bool>();
  split = o.attr("split").cast<bool>();
  topk = o.attr("topk").cast<bool>();
  lasso = o.attr("lasso").cast<bool>();
  scaled = o.attr("scaled").cast<bool>();
  dims = o.attr("dims").cast<Dims>();
  block = o.attr("block").cast<int64_t>();
  if (const py::object pattern = o.attr("pattern"); !pattern.is_none())
    std::tie(keep, window) = pattern.cast<std::pair<int32_t, int32_t>>();
  base_states = o.attr("base_states").cast<size_t>();
  states = py::len(o.attr("states"));
  counter = o.attr("counter");
  has_counter = !counter.is_none();
  if (has_counter) counter = interned(counter);
  counts = o.attr("counts").cast<bool>();
  precision = o.attr("precision");
  has_master = o.attr("master").cast<bool>();
  seed = o.attr("seed").cast<uint64_t>();
  for (const py::handle& number : o.attr("on_device"))
    device_tensors.push_back(number.is_none() ? at::Tensor() : number.cast<at::Tensor>());
  if (on_device() && device_tensors.size() != kDeviceNumbers)
    throw std::runtime_error("other numbers on the device than a kernel reads");
  find_device_numbers();
  if (split) {
    const py::object values = o.attr("values");
    const auto known = [&](const char* name, DeviceNumber number) {
      return on_device() && device_tensors[number].defined() ? 1 : values[name].cast<double>();
    };
    lam = topk ? 0 : known("lam", kLam);
    beta = known("beta", kBeta);
  }
}

void GroupOptions::find_device_numbers() {
  for (size_t k = 0; k < device_tensors.size(); ++k) {
    if (!device_tensors[k].defined()) continue;
    device_numbers.at[k] = device_tensors[k].const_data_ptr();
    device_numbers.dtype[k] = dtype_of(device_tensors[k].scalar_type());
  }
}

const Stored& GroupOptions::stored(at::ScalarType type) {
  std::optional<Stored>& known = stored_[size_t(dtype_of(type))];
  if (known) return *known;
  Stored made;
  const auto dtype = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(torch::getTHPDtype(type)));
  const py::dict types = source.attr("states_of")(dtype);
  for (const auto& [name, state_type] : types) {
    made.states.push_back({interned(name), reinterpret_cast<THPDtype*>(state_type.ptr())->scalar_type});
    made.mixed |= made.states.back().type != type;
  }
  if (made.states.size() > kMostStates) throw std::runtime_error("a tensor with more states than a kernel takes");
  if (made.states.size() > states) made.master = type == at::kHalf ? Master::whole : Master::low;
  made.rounds = source.attr("rounds")(dtype).cast<bool>();
  made.mixed |= made.rounds;
  known = std::move(made);
  return *known;
}

bool GroupOptions::has_the_tables_of(const GroupOptions& o) const {
  if (!precision || !o.precision) return false;  // options of a group that is new
  return base == o.base && method == o.method && split == o.split && topk == o.topk && lasso == o.lasso &&
         writes_grad == o.writes_grad && dims == o.dims && block == o.block && keep == o.keep && window == o.window &&
         base_states == o.base_states && states == o.states && has_counter == o.has_counter &&
         precision.equal(o.precision) && on_device() == o.on_device();
}

const double* GroupOptions::numbers(int64_t group_size, int64_t count) {
  const std::pair<int64_t, int64_t> key{scaled ? group_size : 1, count};
  if (last_ != nullptr && last_key_ == key) return last_;
  const auto [place, is_new] = records_.try_emplace(key);
  last_key_ = key;
  last_ = place->second.data();
  if (!is_new) return last_;
  try {
    const py::tuple made = source.attr("numbers")(key.first, count);
    const size_t most = place->second.size();
    if (made.size() > most) throw std::runtime_error("a record with more numbers than a kernel takes");
    for (size_t i = 0; i < made.size(); ++i) place->second[i] = made[i].cast<double>();
  } catch (...) {
    records_.erase(place);
    last_ = nullptr;
    throw;
  }
  return last_;
}

void GroupOptions::forget_counts() {
  records_.clear();
  last_ = nullptr;
}

void GroupOptions::apply(TensorArgs& args, int64_t count) {
  args.numbers = numbers(args.grouped ? args.view.size() : 1, count);
  args.base = {base, uint8_t(base_states), writes_grad};
  args.method = method;
  args.topk = topk;
  args.lasso = lasso;
  args.split = split;
  args.lam = scaled ? lam * std::sqrt(double(args.grouped ? args.view.size() : 1)) : lam;
  args.beta = beta;
  args.device_numbers = on_device() ? &device_numbers : nullptr;
}

int GroupOptions::traverse(visitproc visit, void* arg) const {
  Py_VISIT(source.ptr());
  return 0;
}

}  // namespace rvsm
