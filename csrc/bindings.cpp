// The Python module rvsm_kernels._C: the plan, and what python -m rvsm_kernels prints.

#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "cpu/engine.h"
#include "cuda/kernels.h"
#include "group_view.h"
#include "plan.h"
#include "prox.h"

namespace py = pybind11;

namespace {

using rvsm::GroupOptions;
using rvsm::Plan;

GroupOptions group_options(const py::dict& d) {
  GroupOptions g;
  rvsm::Options& o = g.options;
  if (!d["penalty"].is_none() && !rvsm::penalty_from_name(d["penalty"].cast<std::string>().c_str(), o.penalty))
    throw py::value_error("Invalid penalty: " + d["penalty"].cast<std::string>());
  o.lam = d["lam"].cast<double>();
  o.beta = d["beta"].cast<double>();
  o.a = d["a"].cast<double>();
  o.group_lasso = d["group_lasso"].cast<double>();
  o.lr = d["lr"].cast<double>();
  o.momentum = d["momentum"].cast<double>();
  o.dampening = d["dampening"].cast<double>();
  o.weight_decay = d["weight_decay"].cast<double>();
  o.group_scale = d["group_scale"].cast<bool>();
  o.nesterov = d["nesterov"].cast<bool>();
  o.decoupled = d["decoupled"].cast<bool>();
  o.maximize = d["maximize"].cast<bool>();
  o.topk = d["topk"].cast<bool>();
  o.method = static_cast<rvsm::Method>(d["method"].cast<int>());
  if (!d["group_dim"].is_none()) g.group_dim = d["group_dim"].cast<std::vector<int64_t>>();
  return g;
}

py::dict build_info() {
  // native.py looks for these words in the file of a module that does not load.
  static const char built_for[] = "built for torch " TORCH_VERSION;
  py::dict info;
  info["built for"] = built_for + sizeof("built for ") - 1;
  info["compiler"] = __VERSION__;
  info["vectors"] = rvsm::cpu::kernels().name;
#if defined(RVSM_CUDA)
  info["architectures"] = rvsm::cuda::architectures;
#else
  info["architectures"] = "none";
  info["without CUDA"] = RVSM_NO_CUDA;
#endif
  return info;
}

// Python's collector follows the references that the plan holds.
int traverse(PyObject* self, visitproc visit, void* arg) {
#if PY_VERSION_HEX >= 0x03090000
  Py_VISIT(Py_TYPE(self));
#endif
  if (py::detail::is_holder_constructed(self)) {
    return py::cast<Plan&>(py::handle(self)).traverse(visit, arg);
  }
  return 0;
}

int clear(PyObject* self) {
  if (py::detail::is_holder_constructed(self)) {
    Plan& plan = py::cast<Plan&>(py::handle(self));
    plan.drop();
    plan.clear();
  }
  return 0;
}

// A method of the plan as Python calls it: what a GradScaler brings may be None.
auto with_scaling(bool (Plan::*method)(const py::list&, const py::dict&, const rvsm::Scaling&, const py::dict&,
                                       const py::dict&)) {
  return
      [method](Plan& plan, const py::list& groups, const py::dict& state, const std::optional<at::Tensor>& grad_scale,
               const std::optional<at::Tensor>& found_inf, const py::dict& kept, const py::dict& cuts) {
        const rvsm::Scaling scaling{grad_scale.value_or(at::Tensor()), found_inf.value_or(at::Tensor())};
        return (plan.*method)(groups, state, scaling, kept, cuts);
      };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled engine of rvsm_kernels.";
  m.def("build_info", &build_info);
#if defined(RVSM_CUDA)
  m.attr("has_cuda") = true;
  m.def("probe_cuda", [](int device) -> std::optional<std::string> {
    const char* error = rvsm::cuda::probe(device);
    return error == nullptr ? std::nullopt : std::optional<std::string>(error);
  });
#else
  m.attr("has_cuda") = false;
#endif
  m.def("interpret_cuda", &rvsm::interpret_cuda,
        "Run CPU tensors through the CUDA engine's lines, interpreted on the host: for tests.");
  m.def(
      "group_view",
      [](const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, const std::vector<int64_t>& kept) {
        const rvsm::GroupView v = rvsm::group_view(sizes, strides, kept);
        return py::make_tuple(v.batch, v.outer, v.groups, v.inner);
      },
      "The (batch, outer, groups, inner) view of a dense tensor; ValueError where the kept dimensions do not "
      "collapse.");
  m.def(
      "check",
      [](const std::vector<at::Tensor>& params, const std::vector<int64_t>& group_dim) {
        for (const at::Tensor& p : params)
          rvsm::make_row(p.is_non_overlapping_and_dense() ? p : at::empty_like(p), group_dim);
      },
      "ValueError unless the group_dim of every tensor collapses in memory.");
  py::class_<Plan>(m, "Plan", py::custom_type_setup([](PyHeapTypeObject* heap_type) {
                     auto* type = &heap_type->ht_type;
                     type->tp_flags |= Py_TPFLAGS_HAVE_GC;
                     type->tp_traverse = traverse;
                     type->tp_clear = clear;
                   }))
      .def(py::init<>())
      .def("set_options",
           [](Plan& plan, size_t group, const py::dict& d) { plan.set_options(group, group_options(d)); })
      .def("prepare", with_scaling(&Plan::prepare))
      .def("step", with_scaling(&Plan::step))
      .def("launch", &Plan::launch)
      .def("drop", &Plan::drop);
}
