// The rows of one device and the engine that runs them: what the plan and the ops drive.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "row.h"

namespace rvsm {

// What GradScaler brings to a step; undefined tensors where there is none.
struct Scaling {
  at::Tensor grad_scale, found_inf;
};

class DeviceJob {
 public:
  // Whether this build has an engine for the device.
  static bool serves(at::Device device);
  // Throws where it does not.
  static std::unique_ptr<DeviceJob> make(at::Device device, Action action);

  virtual ~DeviceJob() = default;
  DeviceJob(const DeviceJob&) = delete;
  DeviceJob& operator=(const DeviceJob&) = delete;

  // Take note of the rows and find scratch for them; again whenever a shape, type or grouping changes.
  virtual void divide() = 0;

  // Do the work, or put it on the current stream of the device. Of `scaling` only an engine that reads it on the
  // device takes notice; for another it is in the rows.
  virtual void run(const Scaling& scaling = {}) = 0;

  // Action::penalty, after run(): a 0-dim float64 tensor on the device.
  virtual at::Tensor total() = 0;

  // Elements that the calling thread will work on: 0 where a device does.
  virtual int64_t workload() const = 0;

  std::vector<Row>& rows;
  const at::Device device;
  const bool scales_on_device;  // grad_scale and found_inf are read by the kernels
  const bool takes_source;      // a prox may read from row.g

 protected:
  DeviceJob(std::vector<Row>& rows, at::Device device, bool on_device)
      : rows(rows), device(device), scales_on_device(on_device), takes_source(on_device) {}
};

// One job per device and turn. Tensors that share memory have different turns, and a turn begins when the one before it
// is done (see turns_of).
class Jobs {
 public:
  explicit Jobs(Action action) : action_(action) {}

  // The number of a device's job, which is made where there is none.
  size_t of(at::Device device, size_t turn = 0);
  DeviceJob& operator[](size_t i) const { return *jobs_[i]; }
  auto begin() const { return jobs_.begin(); }
  auto end() const { return jobs_.end(); }
  size_t size() const { return jobs_.size(); }
  void clear() {
    jobs_.clear();
    turn_of_.clear();
  }
  size_t turns() const { return turn_of_.empty() ? 0 : *std::max_element(turn_of_.begin(), turn_of_.end()) + 1; }

  void divide();
  void run(const Scaling& scaling = {}, size_t turn = 0);

 private:
  Action action_;
  std::vector<std::unique_ptr<DeviceJob>> jobs_;
  std::vector<size_t> turn_of_;
};

// Run CPU tensors through the CUDA engine's lines, interpreted on the host; for tests. Jobs that exist go on as before.
void interpret_cuda(bool on);

}  // namespace rvsm
