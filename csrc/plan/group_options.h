// What the plan is told of one param group: method/step_options.py as the kernels need it.
#pragma once

#include <array>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "python.h"
#include "tensors.h"

namespace rvsm {

// What is stored of a parameter of one type beside its gradient.
struct Stored {
  struct State {
    py::str name;
    at::ScalarType type;
  };
  std::vector<State> states;  // the base's, the method's, that of a master
  Master master = Master::none;
  bool rounds = false;  // the parameter is rounded stochastically
  bool mixed = false;   // the arrays have several types, or something else than the rounding to nearest is needed
};

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

  // Whether some numbers are on the device.
  bool on_device() const { return !device_tensors.empty(); }

  // Where these numbers are now: a tensor may be given other memory.
  void find_device_numbers();

  // The arguments that follow from the options alone. `count` as above.
  void apply(TensorArgs& args, int64_t count);

  // Forget the records of earlier counts; those of the tensors must be asked for again.
  void forget_counts();

  // Whether a state that is missing can begin with zeros; else only the optimizer can make it.
  bool begins_with_zeros(size_t k) const { return k != base_states || !starts_from_u; }

  // Of a parameter of a supported type; asks Python the first time.
  const Stored& stored(at::ScalarType type);

  int traverse(visitproc visit, void* arg) const;

  py::object source;  // the StepOptions
  BaseKind base = BaseKind::sgd;
  Method method = Method::rvsm;
  double lam = 0, beta = 0;  // of the splitting; 1 where they stand on a device
  bool split = false, topk = false, lasso = false, scaled = false, writes_grad = false;
  bool starts_from_u = false;          // the method's state begins with u, else with zeros
  Dims dims;                           // group_dim; nullopt for elements, and where norms do not matter
  int64_t block = 1;                   // group_block
  int32_t keep = 0, window = 1;        // pattern: how many of how many survive, 0 for other penalties
  size_t base_states = 0, states = 0;  // how many states the base has, and the base and the method together
  py::object counter;                  // the name of the tensor that counts the steps of a parameter, or None
  bool has_counter = false;
  bool has_master = false;                 // parameters of a half type have one
  bool counts = false;                     // whether the numbers follow from the count
  bool changed = true;                     // not in the arguments of the tensors yet
  py::object precision;                    // what decides about stored()
  std::vector<at::Tensor> device_tensors;  // in the order of DeviceNumber, undefined where the host knows the number
  DeviceNumbers device_numbers;            // where they are
  uint64_t seed = 0;                       // of stochastic rounding

 private:
  using Record = std::array<double, kMostNumbers>;
  std::map<std::pair<int64_t, int64_t>, Record> records_;
  // The last one that was asked for: most tensors of a group share it.
  std::pair<int64_t, int64_t> last_key_;
  const double* last_ = nullptr;
  std::array<std::optional<Stored>, 4> stored_;  // by Dtype
};

}  // namespace rvsm
