// The plan of an optimizer: its table of parameters, kept between steps and rebuilt only where it changed.
#pragma once

#include <pybind11/pybind11.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "device_job.h"
#include "rows.h"

namespace rvsm {

// What one param group asks of its parameters.
struct GroupOptions {
  Options options;
  Dims group_dim;
  bool changed = true;  // not in the rows yet
};

class Plan {
 public:
  Plan() : jobs_(Action::step) {}
  ~Plan() {
    drop();
    clear();
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // The options of a group, again whenever one of them was edited.
  void set_options(size_t group, GroupOptions options);

  // Look at every parameter, gradient and momentum buffer; throws before anything is changed. Returns false if a
  // parameter that has a gradient is none that this build has an engine for. Where found_inf is above 0, launch() will
  // leave everything as it is. `kept` and `cuts`: tensors by parameter, for those whose method keeps something and
  // those with top-k.
  //
  // All memory that the step will touch is held until launch() or drop(), for in between other threads of Python may
  // take gradients and state away.
  bool prepare(const pybind11::list& groups, const pybind11::dict& state, const Scaling& scaling,
               const pybind11::dict& kept, const pybind11::dict& cuts);

  // Do the step that was prepared: one pass over all parameters of a device.
  void launch();

  // Both at once: no other thread of Python runs in between, so that nothing needs to be held.
  bool step(const pybind11::list& groups, const pybind11::dict& state, const Scaling& scaling,
            const pybind11::dict& kept, const pybind11::dict& cuts);

  // Forget what was prepared.
  void drop();

  // For Python's garbage collector: a hook of a parameter may refer to the optimizer.
  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  // A parameter. Python objects are held, not tensors: so Python's collector sees every reference.
  struct Entry {
    PyObject* param = nullptr;   // owned
    PyObject* state = nullptr;   // owned: the dict state[param], or null
    PyObject* buffer = nullptr;  // owned: the momentum buffer in it, or null
    PyObject* kept = nullptr;  // borrowed from kept_, from prepare() to launch(), anew each time: what its method keeps
    size_t group = 0;
    size_t index = 0;
    size_t turn = 0;                // when it is stepped: after those that share its memory and stand before it
    size_t job = 0;                 // of its device and turn
    Row* row = nullptr;             // in that job; null where `served` is false
    const void* address = nullptr;  // of its memory, as last seen
    c10::DispatchKeySet keys;
    at::Device device = at::kCPU;
    at::DimVector sizes, strides;
    at::ScalarType type = at::kFloat;
    Dtype dtype = Dtype::f32;  // the same, as the kernels name it
    bool served = false;       // false: a parameter without a gradient that no engine of this build could step
    bool dense = true;
    bool first = false;
  };

  bool prepare_unheld(const pybind11::list& groups, const pybind11::dict& state, const Scaling& scaling,
                      const pybind11::dict& kept, const pybind11::dict& cuts);
  const at::Tensor& tensor(const Entry& e) const;
  std::string name(const pybind11::list& groups, const Entry& e) const;
  bool look(const pybind11::list& groups, const pybind11::dict& state);
  bool rebuild(const pybind11::list& groups);
  void find_states(const pybind11::dict& state);
  void find_buffer(const pybind11::list& groups, Entry& e);
  void check_entry(const pybind11::list& groups, const Entry& e, bool momentum) const;
  void stage_entry(Entry& e, Row& row, bool momentum);
  void prepare_entry(const pybind11::list& groups, Entry& e, Row& row, double grad_factor);
  void find_beside(Entry& e, Row& row) const;
  void read_scaling(const Scaling& given);
  bool turns_hold() const;
  void hold();
  void run_jobs(size_t turn);

  std::vector<GroupOptions> options_;
  std::vector<Entry> entries_;
  std::map<size_t, std::string> errors_;  // why an entry has no row
  Jobs jobs_;
  bool built_ = false;
  bool moved_ = false;  // a parameter that this look found lies elsewhere than at the last one
  std::vector<std::pair<PyObject*, PyObject*>> states_;  // optimizer.state as last seen, in its order
  bool states_seen_ = false;                             // false: states_ tells nothing

  // What prepare() leaves for launch(); empty in between, so that no gradient is kept alive.
  struct Staging {
    Staged staged;
    bool writes;
    size_t turn;
  };
  std::vector<Staging> staging_;
  std::vector<std::pair<size_t, at::Tensor>> new_buffers_;
  std::vector<c10::Storage> held_;
  PyObject *state_ = nullptr, *kept_ = nullptr, *cuts_ = nullptr;  // owned, from prepare() to launch()
  Scaling scaling_;
  std::vector<double> factors_;  // of each job: 1 / grad_scale where its rows carry it, else 1
  bool skip_ = false;
};

}  // namespace rvsm
