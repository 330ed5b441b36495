// Dispatcher ops on whole tensors of the CPU before and after their step: the division by a norm, and the support of
// what top-k keeps.

#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>

#include "../cpu/whole.h"
#include "checks.h"
#include "register.h"

namespace rvsm {

namespace {

// Elements of a task: whole tiles of the support.
constexpr int64_t kTask = 64 * cpu::kSupportTile;

// Calls work(at, n) for the tasks of a tensor, those of different threads at the same time. A thread begins with its
// last task: that memory the step has left in the cache.
template <class Work>
void for_tasks(int64_t numel, const Work& work) {
  at::parallel_for(0, ceil_div(numel, kTask), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = end; i-- > begin;) work(i * kTask, std::min(kTask, numel - i * kTask));
  });
}

void check_on_cpu(const at::Tensor& w) {
  check(w);
  TORCH_CHECK(w.is_cpu(), "a tensor is on ", w.device(), ", this op is for the CPU");
}

TensorArgs args_of(const at::Tensor& dense, bool writes) {
  TensorArgs args;
  args.numel = dense.numel();
  args.dtype = dtype_of(dense.scalar_type());
  if (args.numel > 0) args.w = writes ? dense.mutable_data_ptr() : const_cast<void*>(dense.const_data_ptr());
  return args;
}

void divide_(at::TensorList tensors, at::ArrayRef<double> norms) {
  TORCH_CHECK(tensors.size() == norms.size(), "divide_ needs a norm for each tensor");
  for (const at::Tensor& w : tensors) check_on_cpu(w);
  for (size_t i = tensors.size(); i-- > 0;) {
    Staged staged(tensors[i], tensors[i].scalar_type());
    staged.load();
    const TensorArgs args = args_of(staged.dense(), true);
    for_tasks(args.numel, [&](int64_t at, int64_t n) { cpu::kernels().whole.divide(args, norms[i], at, n); });
    staged.store();
    bump_version(tensors[i]);
  }
}

void check_support(const at::Tensor& w, const at::Tensor& cut, const at::Tensor& bits) {
  check_on_cpu(w);
  const at::ScalarType type = at::toOpMathType(w.scalar_type());
  TORCH_CHECK_TYPE(cut.is_cpu() && cut.scalar_type() == type && cut.numel() == 1, "a cut is one number of type ", type);
  TORCH_CHECK_TYPE(bits.is_cpu() && bits.scalar_type() == at::kByte && bits.is_contiguous() &&
                       bits.numel() == ceil_div(w.numel(), 8),
                   "the support of ", w.numel(), " elements is ", ceil_div(w.numel(), 8), " bytes");
}

int64_t support_(const at::Tensor& bits, const at::Tensor& w, const at::Tensor& cut) {
  check_support(w, cut, bits);
  Staged staged(w, w.scalar_type());
  staged.load();
  TensorArgs args = args_of(staged.dense(), false);
  args.cut = cut.const_data_ptr();
  uint8_t* const to = bits.mutable_data_ptr<uint8_t>();
  std::atomic<int64_t> count{0};
  for_tasks(args.numel, [&](int64_t at, int64_t n) { count += cpu::kernels().whole.support(args, to, at, n); });
  bump_version(bits);
  return count;
}

bool threshold_where_changed_(const at::Tensor& w, const at::Tensor& cut, const at::Tensor& bits) {
  check_support(w, cut, bits);
  Staged staged(w, w.scalar_type());
  staged.load();
  TensorArgs args = args_of(staged.dense(), true);
  args.cut = cut.const_data_ptr();
  const uint8_t* const before = bits.const_data_ptr<uint8_t>();
  std::atomic<bool> changed{false};
  for_tasks(args.numel, [&](int64_t at, int64_t n) {
    if (!changed.load(std::memory_order_relaxed) && !cpu::kernels().whole.has_support(args, before, at, n))
      changed = true;
  });
  if (!changed) return false;
  for_tasks(args.numel, [&](int64_t at, int64_t n) { cpu::kernels().whole.threshold(args, at, n); });
  staged.store();
  bump_version(w);
  return true;
}

void divide_meta_(at::TensorList w, at::ArrayRef<double>) { check_meta(w); }

}  // namespace

void register_whole_ops() {
  static torch::Library all(torch::Library::FRAGMENT, "rvsm_kernels", std::nullopt, __FILE__, __LINE__);
  all.def("divide_(Tensor(a!)[] w, float[] norms) -> ()");
  all.def("support_(Tensor(a!) bits, Tensor w, Tensor cut) -> int");
  all.def("threshold_where_changed_(Tensor(a!) w, Tensor cut, Tensor bits) -> bool");

  static torch::Library cpu = MAKE_TORCH_LIBRARY_IMPL(rvsm_kernels, CPU);
  cpu.impl("divide_", divide_);
  cpu.impl("support_", support_);
  cpu.impl("threshold_where_changed_", threshold_where_changed_);

  // The other two answer with what is in the tensors.
  static torch::Library meta = MAKE_TORCH_LIBRARY_IMPL(rvsm_kernels, Meta);
  meta.impl("divide_", divide_meta_);
}

}  // namespace rvsm
