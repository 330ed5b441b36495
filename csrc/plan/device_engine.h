// The tensors of one device and the engine that works on them: what the plan and the ops drive.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "../math/statistics.h"
#include "../math/tensor_args.h"

namespace rvsm {

// What GradScaler brings to a step; undefined tensors where there is none.
struct Scaling {
  at::Tensor grad_scale, found_inf;
};

class DeviceEngine {
 public:
  // Whether this build has an engine for the device.
  static bool serves(at::Device device);
  // Throws where it does not.
  static std::unique_ptr<DeviceEngine> make(at::Device device, Action action);
  // The CPU's, also where the CUDA engine's lines are interpreted.
  static std::unique_ptr<DeviceEngine> make_for_cpu(Action action);

  virtual ~DeviceEngine() = default;
  DeviceEngine(const DeviceEngine&) = delete;
  DeviceEngine& operator=(const DeviceEngine&) = delete;

  // Take note of the tensors and find scratch for them; again whenever a shape, type or grouping changes.
  virtual void divide() = 0;

  // Do the work, or put it on the current stream of the device. `scaling` is for engines with scales_on_device; the
  // others read TensorArgs::scale.
  virtual void run(const Scaling& scaling = {}) = 0;

  // Action::penalty, after run(): a 0-dim float64 tensor on the device.
  virtual at::Tensor total() = 0;

  // Action::penalty and Action::zeros on the CPU, after run(): the sums of each tensor.
  virtual std::vector<Sums> sums() const { return {}; }

  // Elements that the calling thread will work on: 0 where a device does.
  virtual int64_t workload() const = 0;

  std::vector<TensorArgs>& tensors;
  const at::Device device;
  const bool scales_on_device;      // grad_scale and found_inf are read by the kernels
  const bool takes_source;          // a prox may read from TensorArgs::g
  const bool counts_on_device;      // TensorArgs::counter is read and written
  const bool takes_device_numbers;  // TensorArgs::device_numbers is read

 protected:
  DeviceEngine(std::vector<TensorArgs>& tensors, at::Device device, bool on_device)
      : tensors(tensors),
        device(device),
        scales_on_device(on_device),
        takes_source(on_device),
        counts_on_device(on_device),
        takes_device_numbers(on_device) {}
};

// One engine per device and turn. Tensors that share memory have different turns, and a turn begins when the one before
// it is done (see turns_of).
class DeviceEngines {
 public:
  explicit DeviceEngines(Action action) : action_(action) {}

  // The index of the engine of a device and turn; makes the engine where there is none.
  size_t of(at::Device device, size_t turn = 0);
  DeviceEngine& operator[](size_t i) const { return *engines_[i]; }
  auto begin() const { return engines_.begin(); }
  auto end() const { return engines_.end(); }
  size_t size() const { return engines_.size(); }
  void clear() {
    engines_.clear();
    turn_of_.clear();
  }
  size_t turns() const { return turn_of_.empty() ? 0 : *std::max_element(turn_of_.begin(), turn_of_.end()) + 1; }

  void divide();
  int64_t workload() const;
  void run(const Scaling& scaling = {}, size_t turn = 0);

 private:
  Action action_;
  std::vector<std::unique_ptr<DeviceEngine>> engines_;
  std::vector<size_t> turn_of_;
};

// Run CPU tensors through the CUDA engine's lines, interpreted on the host; for tests. Engines that exist go on as
// before.
void interpret_cuda(bool on);
bool interprets_cuda();

}  // namespace rvsm
