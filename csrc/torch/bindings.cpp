// The Python module rvsm_kernels._C: the plan, and what python -m rvsm_kernels prints.

#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cctype>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>

#include "../cpu/engine.h"
#include "../cuda/kernels.h"
#include "../math/group_view.h"
#include "../plan/plan.h"
#include "register.h"

namespace py = pybind11;

namespace {

using rvsm::Plan;

// native.py looks for these words in the file of a module that does not load.
const char built_for[] = "built for torch " TORCH_VERSION;

// torch keeps its C++ interface within a minor version only; beside another one a function may be missing, or read what
// is elsewhere by now. So this comes before anything of torch is called. RVSM_OTHER_TORCH=1 loads it.
void check_torch() {
  const std::string here = py::str(py::module_::import("torch").attr("__version__"));
  const std::string minor = std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR);
  const bool same = here.compare(0, minor.size(), minor) == 0 && !std::isdigit(here.c_str()[minor.size()]);
  const char* const wanted = std::getenv("RVSM_OTHER_TORCH");
  if (!same && (wanted == nullptr || std::string(wanted) != "1"))
    throw py::import_error("another minor version; RVSM_OTHER_TORCH=1 loads it all the same");
}

py::dict build_info() {
  py::dict info;
  info["built for"] = built_for + sizeof("built for ") - 1;
  info["compiler"] = __VERSION__;
  info["vectors"] = rvsm::cpu::kernels().elements.isa;
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

// Lengths of the parts of a record, for native.py to compare with Python's.
py::dict lengths_of_records() {
  py::dict lengths;
  lengths["prox"] = rvsm::kProxNumbers;
  lengths["split"] = rvsm::kSplitNumbers;
  for (const auto& base : rvsm::kBases) lengths[base.name] = base.numbers;
  return lengths;
}

py::tuple penalty_names() {
  py::list names;
  for (const char* name : rvsm::kPenaltyNames) names.append(name);
  return py::tuple(names);
}

// Asks for pages of 2 MB in the place of 4 KB, before memory is first written: making a page costs as much as filling
// it.
void advise_huge_pages([[maybe_unused]] const at::Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  const uintptr_t at = reinterpret_cast<uintptr_t>(t.data_ptr()), first = (at + kPage - 1) / kPage * kPage;
  const uintptr_t last = (at + t.nbytes()) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: it may be refused
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  check_torch();
  rvsm::register_ops();
  rvsm::register_whole_ops();
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
  m.def("interprets_cuda", &rvsm::interprets_cuda, "Whether it does.");
  m.def(
      "group_view",
      [](const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, const std::vector<int64_t>& group_dims,
         int64_t group_block) {
        const rvsm::GroupView v = rvsm::group_view(sizes, strides, group_dims, group_block);
        return py::make_tuple(v.batch, v.outer, v.groups, v.inner);
      },
      py::arg("sizes"), py::arg("strides"), py::arg("group_dims"), py::arg("group_block") = 1,
      "The (batch, outer, groups, inner) view of a dense tensor; ValueError where the group dimensions do not "
      "collapse.");
  m.def(
      "check",
      [](const std::vector<at::Tensor>& params, const std::vector<int64_t>& group_dim, int64_t group_block) {
        for (const at::Tensor& p : params)
          rvsm::args_of(p.is_non_overlapping_and_dense() ? p : at::empty_like(p), group_dim, group_block);
      },
      py::arg("params"), py::arg("group_dim"), py::arg("group_block") = 1,
      "ValueError unless the group_dim of every tensor collapses in memory, and is a multiple of group_block.");
  m.def("advise_huge_pages", &advise_huge_pages, "Ask for large pages for the memory of a new CPU tensor.");
  py::class_<Plan>(m, "Plan", py::custom_type_setup([](PyHeapTypeObject* heap_type) {
                     auto* type = &heap_type->ht_type;
                     type->tp_flags |= Py_TPFLAGS_HAVE_GC;
                     type->tp_traverse = traverse;
                     type->tp_clear = clear;
                   }))
      .def(py::init<>())
      .def("set_options", &Plan::set_options)
      .def("prepare", [](Plan& plan, const py::list& groups,
                         const py::object& inputs) { return int(plan.prepare(groups, inputs)); })
      .def("step",
           [](Plan& plan, const py::list& groups, const py::object& inputs) { return int(plan.step(groups, inputs)); })
      .def("launch", &Plan::launch)
      .def("drop", &Plan::drop);
  m.attr("numbers") = lengths_of_records();
  m.attr("penalties") = penalty_names();
}
