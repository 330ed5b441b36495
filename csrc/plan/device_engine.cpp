#include "device_engine.h"

#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <atomic>

#include "../cpu/engine.h"
#include "../cuda/launches.h"

namespace rvsm {

namespace {

std::atomic<bool> interpret{false};

at::Tensor bytes_on(at::Device device, int64_t bytes) {
  return at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device));
}

// ---- the CPU ------------------------------------------------------------------------------------------------------

// Below this many elements one thread is done before a second one has woken up.
constexpr int64_t kSerial = 32768;

class CpuEngine final : public DeviceEngine {
 public:
  explicit CpuEngine(Action action) : DeviceEngine(tasks_.tensors, at::kCPU, false), action_(action), tasks_(action) {}

  void divide() override {
    tasks_.divide();
    scratch_ = bytes_on(at::kCPU, tasks_.scratch_bytes());
    tasks_.set_scratch(scratch_.numel() > 0 ? scratch_.mutable_data_ptr() : nullptr);
  }

  void run(const Scaling&) override {
    const int64_t threads = workload() >= kSerial ? at::get_num_threads() : 1;
    tasks_.start(threads);
    if (threads == 1) {
      tasks_.work(0, 1);
    } else {
      at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) { tasks_.work(begin, end); });
    }
    if (action_ == Action::step) write_sums();
  }

  at::Tensor total() override { return at::scalar_tensor(tasks_.total(), at::kDouble); }
  std::vector<Sums> sums() const override { return tasks_.totals(); }
  int64_t workload() const override { return tasks_.workload(); }

 private:
  void write_sums() {
    const std::vector<Sums> of_tensors = sums();
    for (size_t i = 0; i < of_tensors.size(); ++i) {
      const TensorArgs& args = tensors[i];
      if (args.active && args.statistics != nullptr)
        write_row(args.statistics, of_tensors[i], args.grouped, args.split, args.lam, args.beta);
      if (args.active && args.new_squares != nullptr) *args.new_squares = of_tensors[i].new_squares;
    }
  }

  Action action_;
  cpu::TaskList tasks_;
  at::Tensor scratch_;
};

// ---- CUDA, or its kernels on the host -----------------------------------------------------------------------------

class CudaEngine final : public DeviceEngine {
 public:
  CudaEngine(Action action, at::Device device, const cuda::Kernels& kernels)
      : DeviceEngine(launches_.tensors, device, true), action_(action), launches_(action, kernels) {}

  void divide() override {
    const c10::DeviceGuard guard(device);
    launches_.divide();
    scratch_ = bytes_on(device, launches_.scratch_bytes());
    launches_.set_scratch(scratch_.numel() > 0 ? scratch_.mutable_data_ptr() : nullptr);
    if (!device.is_cpu()) home_ = stream();
  }

  void run(const Scaling& scaling) override {
    const c10::DeviceGuard guard(device);
    // Only the first step with statistics finds them without scratch.
    if (launches_.lacks_room()) divide();
    cuda::Stream target;
    if (!device.is_cpu()) {
      const c10::Stream current = stream();
      target = {device.index(), current.native_handle()};
      // The allocator must not hand the scratch on before another stream is done with it.
      if (current != home_) scratch_.record_stream(current);
    }
    const at::Tensor scale = here(scaling.grad_scale), inf = here(scaling.found_inf);
    if (action_ == Action::penalty) total_ = at::empty({}, at::TensorOptions().dtype(at::kDouble).device(device));
    launches_.run(target, {number(scale), number(inf)}, total_.defined() ? total_.mutable_data_ptr<double>() : nullptr);
  }

  at::Tensor total() override { return total_; }
  int64_t workload() const override { return 0; }

 private:
  // c10's interface to every kind of device: no header of CUDA is needed, and none of torch's CUDA libraries.
  c10::Stream stream() const { return c10::impl::VirtualGuardImpl(device.type()).getStream(device); }

  at::Tensor here(const at::Tensor& t) const { return t.defined() ? t.to(device, at::kFloat) : t; }
  static const float* number(const at::Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }

  Action action_;
  cuda::Launches launches_;
  at::Tensor scratch_, total_;
  c10::Stream home_{c10::Stream::DEFAULT, at::kCPU};  // the stream that scratch_ was allocated on
};

}  // namespace

// ---- one engine per device -----------------------------------------------------------------------------------------

bool DeviceEngine::serves(at::Device device) {
#if defined(RVSM_CUDA)
  if (device.is_cuda()) return true;
#endif
  return device.is_cpu();
}

std::unique_ptr<DeviceEngine> DeviceEngine::make(at::Device device, Action action) {
#if defined(RVSM_CUDA)
  if (device.is_cuda()) return std::make_unique<CudaEngine>(action, device, cuda::device_kernels());
#endif
  TORCH_CHECK(device.is_cpu(), "this build of rvsm_kernels has no engine for ", device);
  if (interpret) return std::make_unique<CudaEngine>(action, device, cuda::host_kernels());
  return make_for_cpu(action);
}

std::unique_ptr<DeviceEngine> DeviceEngine::make_for_cpu(Action action) { return std::make_unique<CpuEngine>(action); }

size_t DeviceEngines::of(at::Device device, size_t turn) {
  for (size_t i = 0; i < engines_.size(); ++i)
    if (engines_[i]->device == device && turn_of_[i] == turn) return i;
  engines_.push_back(DeviceEngine::make(device, action_));
  turn_of_.push_back(turn);
  return engines_.size() - 1;
}

void DeviceEngines::divide() {
  for (auto& engine : engines_) engine->divide();
}

int64_t DeviceEngines::workload() const {
  int64_t elements = 0;
  for (const auto& engine : engines_) elements += engine->workload();
  return elements;
}

void DeviceEngines::run(const Scaling& scaling, size_t turn) {
  for (size_t i = 0; i < engines_.size(); ++i)
    if (turn_of_[i] == turn) engines_[i]->run(scaling);
}

void interpret_cuda(bool on) { interpret = on; }
bool interprets_cuda() { return interpret; }

}  // namespace rvsm
