#include "group_options.h"

#include <pybind11/stl.h>

#include <stdexcept>

namespace rvsm {

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
  base_states = o.attr("base_states").cast<size_t>();
  for (const py::handle& name : o.attr("states")) {
    PyObject* interned = name.ptr();
    Py_INCREF(interned);
    PyUnicode_InternInPlace(&interned);
    states.push_back(py::reinterpret_steal<py::str>(interned));
  }
  if (states.size() > kMostStates) throw std::runtime_error("a tensor with more states than a kernel takes");
}

bool GroupOptions::has_the_tables_of(const GroupOptions& o) const {
  const auto same_names = [&] {
    for (size_t k = 0; k < states.size(); ++k)
      if (states[k].ptr() != o.states[k].ptr()) return false;
    return true;
  };
  return base == o.base && method == o.method && split == o.split && topk == o.topk && lasso == o.lasso &&
         writes_grad == o.writes_grad && dims == o.dims && base_states == o.base_states &&
         states.size() == o.states.size() && same_names();
}

const double* GroupOptions::numbers(int64_t group_size, bool fresh) {
  const auto [place, is_new] = records_.try_emplace({scaled ? group_size : 1, fresh});
  if (!is_new) return place->second.data();
  try {
    const py::tuple made = source.attr("numbers")(scaled ? group_size : 1, fresh);
    const size_t most = place->second.size();
    if (made.size() > most) throw std::runtime_error("a record with more numbers than a kernel takes");
    for (size_t i = 0; i < made.size(); ++i) place->second[i] = made[i].cast<double>();
  } catch (...) {
    records_.erase(place);
    throw;
  }
  return place->second.data();
}

void GroupOptions::apply(TensorArgs& args, bool fresh) {
  args.numbers = numbers(args.grouped ? args.view.size() : 1, fresh);
  args.base = {base, uint8_t(base_states), writes_grad};
  args.method = method;
  args.topk = topk;
  args.lasso = lasso;
}

int GroupOptions::traverse(visitproc visit, void* arg) const {
  Py_VISIT(source.ptr());
  return 0;
}

}  // namespace rvsm
