// The plan of an optimizer: its table of parameters, which stays from step to step as long as it describes them.
#pragma once

#include <array>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "device_engine.h"
#include "group_options.h"

namespace rvsm {

// What one step is given: StepInputs of engines/interface.py, borrowed while the plan holds the object.
struct StepInputs {
  Scaling scaling;
  PyObject* states = nullptr;       // optimizer.state
  PyObject* instead = nullptr;      // {parameter: {name: tensor}} in the place of those
  PyObject* cuts = nullptr;         // {parameter: cut of top-k}
  PyObject* norms = nullptr;        // {parameter: norms that were made elsewhere}
  PyObject* statistics = nullptr;   // {parameter: where its row goes}
  PyObject* new_squares = nullptr;  // {parameter: where the sum of squares of its new weights goes}, of some

  // Whether the step is to add something up.
  bool wants_sums() const { return statistics != nullptr || new_squares != nullptr; }
};

// What Plan::prepare answers: Ready of engines/interface.py.
enum class Ready : int { no, yes, lacks };

// A parameter and its place in the plan. Python objects are held, not tensors: so Python's collector sees every
// reference.
struct ParamSlot {
  PyObject* param = nullptr;                       // owned
  PyObject* dict = nullptr;                        // owned: the dict states[param], or null
  std::array<PyObject*, kMostStates> states = {};  // owned: what was found in it, null where it is missing
  PyObject* counter = nullptr;                     // owned: the tensor that counts its steps, null where it is missing
  int64_t count = 1;                               // as GroupOptions::numbers() takes it
  size_t group = 0;
  size_t index = 0;
  size_t turn = 0;                // when it is stepped: after those that share its memory and stand before it
  int64_t repeats = 0;            // how many slots before it have the same parameter
  size_t engine = 0;              // of its device and turn
  TensorArgs* args = nullptr;     // in that engine; null where `served` is false
  const void* address = nullptr;  // of its memory, as last seen
  c10::DispatchKeySet keys;
  at::Device device = at::kCPU;
  at::DimVector sizes, strides;
  at::ScalarType type = at::kFloat;
  Dtype dtype = Dtype::f32;  // the same, as the kernels name it
  bool served = false;       // false: a parameter without a gradient that no engine of this build could step
  bool dense = true;
  bool device_counts = false;  // a kernel counts its steps, not the host
  bool norms_given = false;    // its norms were made elsewhere when the table was made
  uint64_t dict_version = 0;   // of `dict`, when all states were found in it; 0: look again
};

class Plan {
 public:
  Plan() : engines_(Action::step) {}
  ~Plan() {
    drop();
    clear();
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // The options of a group, again whenever one of them was edited.
  void set_options(size_t group, const py::object& step_options);

  // Look at every parameter, gradient and state; throws before anything is changed. Ready::no: this build has no engine
  // for a parameter that has a gradient. Ready::lacks: a state is missing that does not begin with zeros. Where
  // found_inf is above 0, launch() will leave everything as it is.
  //
  // All memory that the step will touch is held until launch() or drop(), for in between other threads of Python may
  // take gradients and states away.
  Ready prepare(const py::list& groups, const py::object& inputs);

  // Do the step that was prepared: one pass over all parameters of a device.
  void launch();

  // Both at once: no other thread of Python runs in between, so that nothing needs to be held.
  Ready step(const py::list& groups, const py::object& inputs);

  // Forget what was prepared.
  void drop();

  // For Python's garbage collector: a hook of a parameter may refer to the optimizer.
  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  // plan.cpp: one step.
  void read_inputs(const py::object& inputs);
  void read_scaling();
  Ready prepare_without_holding(const py::list& groups, const py::object& inputs);
  void hold();
  void load_copies(size_t turn);
  void store_copies(size_t turn);
  void run_engines(size_t turn);
  void put_new_states();
  void count_step(ParamSlot& slot);
  PyObject* state_dict_of(ParamSlot& slot);

  // table.cpp: the table of parameters.
  bool rebuild(const py::list& groups);
  void add_slot(const py::list& groups, ParamSlot& slot, PyObject* param, const at::Tensor& w);
  bool refresh(const py::list& groups);
  bool describes(const ParamSlot& slot, const at::Tensor& w) const;
  bool turns_hold() const;
  void find_dicts();
  const at::Tensor& tensor(const ParamSlot& slot) const;

  // slot.cpp: one parameter of a step.
  void prepare_slot(const py::list& groups, ParamSlot& slot);
  bool find_states(const GroupOptions& options, const Stored& stored, ParamSlot& slot);
  int64_t count_of(const py::list& groups, const ParamSlot& slot);
  float* counter_of(const py::list& groups, ParamSlot& slot);
  void find_beside(TensorArgs& args, const ParamSlot& slot, bool staged) const;
  bool fits(const ParamSlot& slot, const Stored& stored) const;
  void refuse(const py::list& groups, const ParamSlot& slot);
  at::Tensor made_before(const ParamSlot& slot, size_t state) const;
  void stage(ParamSlot& slot);
  at::Tensor state_of(const ParamSlot& slot, size_t k, const at::Tensor& like);
  void set_precision(ParamSlot& slot);

  std::vector<GroupOptions> options_;
  std::vector<ParamSlot> slots_;
  std::set<size_t> no_groups_;  // slots whose groups do not collapse in memory
  DeviceEngines engines_;
  bool built_ = false;
  bool addresses_changed_ = false;                      // a parameter lies elsewhere than at the last step
  std::vector<std::pair<PyObject*, PyObject*>> dicts_;  // optimizer.state as last seen, in its order
  bool dicts_seen_ = false;                             // false: dicts_ tells nothing

  // What prepare() leaves for launch(); empty in between, so that no gradient stays alive.
  struct Copy {
    Staged staged;
    bool writes;
    size_t turn;
  };
  struct NewState {
    size_t slot, state;  // state: kMostStates for the counter
    at::Tensor tensor;
  };
  std::vector<Copy> copies_;
  std::vector<NewState> new_states_;
  std::vector<c10::Storage> held_;
  PyObject* inputs_object_ = nullptr;  // owned
  StepInputs inputs_;
  int64_t most_work_ = 0;  // elements that the calling thread works on where every parameter has a gradient
  std::vector<double> inverse_scales_;  // TensorArgs::scale of each engine
  bool skip_ = false;
  bool lacks_ = false;
  bool counts_ = false;  // whether the host counts the steps of any parameter
};

}  // namespace rvsm
