#include "device_job.h"

#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <atomic>

#include "cpu/engine.h"
#include "cuda/job.h"

namespace rvsm {

namespace {

std::atomic<bool> interpret{false};

at::Tensor bytes_on(at::Device device, int64_t bytes) {
  return at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device));
}

// ---- the CPU ------------------------------------------------------------------------------------------------------

// Below this many elements one thread is done before a second one has woken up.
constexpr int64_t kSerial = 32768;

class CpuJob final : public DeviceJob {
 public:
  explicit CpuJob(Action action) : DeviceJob(job_.rows, at::kCPU, false), job_(action) {}

  void divide() override {
    job_.divide();
    scratch_ = bytes_on(at::kCPU, job_.scratch_bytes());
    job_.set_scratch(scratch_.numel() > 0 ? scratch_.mutable_data_ptr() : nullptr);
  }

  void run(const Scaling&) override {
    const int64_t threads = workload() >= kSerial ? at::get_num_threads() : 1;
    job_.start(threads);
    if (threads == 1) {
      job_.work(0, 1);
    } else {
      at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) { job_.work(begin, end); });
    }
  }

  at::Tensor total() override { return at::scalar_tensor(job_.total(), at::kDouble); }
  int64_t workload() const override { return job_.workload(); }

 private:
  cpu::Job job_;
  at::Tensor scratch_;
};

// ---- CUDA, or its lines on the host -------------------------------------------------------------------------------

class CudaJob final : public DeviceJob {
 public:
  CudaJob(Action action, at::Device device, const cuda::Kernels& kernels)
      : DeviceJob(job_.rows, device, true), action_(action), job_(action, kernels) {}

  void divide() override {
    const c10::DeviceGuard guard(device);
    job_.divide();
    scratch_ = bytes_on(device, job_.scratch_bytes());
    job_.set_scratch(scratch_.numel() > 0 ? scratch_.mutable_data_ptr() : nullptr);
    if (!device.is_cpu()) home_ = stream();
  }

  void run(const Scaling& scaling) override {
    const c10::DeviceGuard guard(device);
    cuda::Queue queue;
    if (!device.is_cpu()) {
      const c10::Stream current = stream();
      queue = {device.index(), current.native_handle()};
      // The allocator must not hand the scratch on before another stream is done with it.
      if (current != home_) scratch_.record_stream(current);
    }
    const at::Tensor scale = here(scaling.grad_scale), inf = here(scaling.found_inf);
    if (action_ == Action::penalty) total_ = at::empty({}, at::TensorOptions().dtype(at::kDouble).device(device));
    job_.run(queue, {number(scale), number(inf)}, total_.defined() ? total_.mutable_data_ptr<double>() : nullptr);
  }

  at::Tensor total() override { return total_; }
  int64_t workload() const override { return 0; }

 private:
  // c10's interface to every kind of device: no header of CUDA is needed, and none of torch's CUDA libraries.
  c10::Stream stream() const { return c10::impl::VirtualGuardImpl(device.type()).getStream(device); }

  at::Tensor here(const at::Tensor& t) const { return t.defined() ? t.to(device, at::kFloat) : t; }
  static const float* number(const at::Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }

  Action action_;
  cuda::Job job_;
  at::Tensor scratch_, total_;
  c10::Stream home_{c10::Stream::DEFAULT, at::kCPU};
};

}  // namespace

// ---- one job per device -------------------------------------------------------------------------------------------

bool DeviceJob::serves(at::Device device) {
#if defined(RVSM_CUDA)
  if (device.is_cuda()) return true;
#endif
  return device.is_cpu();
}

std::unique_ptr<DeviceJob> DeviceJob::make(at::Device device, Action action) {
#if defined(RVSM_CUDA)
  if (device.is_cuda()) return std::make_unique<CudaJob>(action, device, cuda::device_kernels);
#endif
  TORCH_CHECK(device.is_cpu(), "this build of rvsm_kernels has no engine for ", device);
  if (interpret) return std::make_unique<CudaJob>(action, device, cuda::host_kernels);
  return std::make_unique<CpuJob>(action);
}

size_t Jobs::of(at::Device device, size_t turn) {
  for (size_t i = 0; i < jobs_.size(); ++i)
    if (jobs_[i]->device == device && turn_of_[i] == turn) return i;
  jobs_.push_back(DeviceJob::make(device, action_));
  turn_of_.push_back(turn);
  return jobs_.size() - 1;
}

void Jobs::divide() {
  for (auto& job : jobs_) job->divide();
}

void Jobs::run(const Scaling& scaling, size_t turn) {
  for (size_t i = 0; i < jobs_.size(); ++i)
    if (turn_of_[i] == turn) jobs_[i]->run(scaling);
}

void interpret_cuda(bool on) { interpret = on; }

}  // namespace rvsm
