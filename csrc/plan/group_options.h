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

  // The record of a tensor with groups of `group_size` elements; the pointer is valid as long as these options are, of
  // those with a counter until forget_counts(). `count`: how many steps the base's states have seen; without a counter
  // 0 for none, 1 for any number. Asks Python the first time.
  const double* numbers(int64_t group_size, int64_t count);

  // The arguments that follow from the options alone. `count` as above.
  void apply(TensorArgs& args, int64_t count);

  // Forget the records of earlier counts; those of the tensors must be asked for again.
  void forget_counts();

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
  py::object counter;   // the name of the tensor that counts the steps of a parameter, or None
  bool counts = false;  // whether there is one
  bool changed = true;  // not in the arguments of the tensors yet

 private:
  using Record = std::array<double, kMostNumbers>;
  std::map<std::pair<int64_t, int64_t>, Record> records_;
  // The last one that was asked for: most tensors of a group share it.
  std::pair<int64_t, int64_t> last_key_;
  const double* last_ = nullptr;
};

}  // namespace rvsm
