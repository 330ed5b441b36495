// What the plan is told of one param group: method/step_options.py as the kernels need it.
#pragma once

#include <array>
#include <map>
#include <utility>
#include <vector>

#include "python.h"
#include "tensors.h"

namespace rvsm {

class GroupOptions {
 public:
  GroupOptions() = default;
  explicit GroupOptions(const py::object& step_options);

  // Whether the tables that were made for these options fit the others: only numbers differ.
  bool has_the_tables_of(const GroupOptions& other) const;

  // The record of a tensor with groups of `group_size` elements; the pointer is valid as long as these options are.
  // `fresh`: the base's states hold zeros, this is the first step. Asks Python the first time.
  const double* numbers(int64_t group_size, bool fresh);

  // The arguments that follow from the options alone. `fresh` as above.
  void apply(TensorArgs& args, bool fresh);

  // Whether a state that is missing can begin with zeros; else only the optimizer can make it.
  bool begins_with_zeros(size_t k) const { return k < base_states || !starts_from_u; }

  int traverse(visitproc visit, void* arg) const;

  py::object source;  // the StepOptions
  BaseKind base = BaseKind::sgd;
  Method method = Method::rvsm;
  bool split = false, topk = false, lasso = false, scaled = false, writes_grad = false;
  bool starts_from_u = false;   // the method's state begins with u, else with zeros
  Dims dims;                    // group_dim; nullopt for elements, and where norms do not matter
  std::vector<py::str> states;  // names, the base's first
  size_t base_states = 0;
  bool changed = true;  // not in the arguments of the tensors yet

 private:
  std::map<std::pair<int64_t, bool>, std::array<double, kMostNumbers>> records_;
};

}  // namespace rvsm
