// The kernels: what a thread or a block does is a function of step.h, resident.h or sums.h. No torch.

#include "kernels.h"

namespace rvsm::cuda {

namespace {

// Blocks of a multiprocessor that the registers must allow: as many as the compiler can do without spilling, which
// differs by architecture (`python -m bench static` shows it). Three quarters of the 2,048 threads of sm_80 and sm_90,
// two thirds of the 1,536 of consumer devices. float64 needs more registers.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kMostBlocks = 4;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kMostBlocks = 5;
#else
constexpr int kMostBlocks = 6;
#endif
template <class S>
constexpr int kBlocks = sizeof(S) == 8 ? 3 : kMostBlocks;

// Runs f for this thread; all threads of the block are done when it returns.
struct Each {
  template <class F>
  __device__ __forceinline__ void operator()(const F& f) const {
    f(int(threadIdx.x));
    __syncthreads();
  }
};

template <class S>
__global__ void __launch_bounds__(kThreads, kBlocks<S>) step_kernel(const __grid_constant__ Table table) {
  step_thread<S, false>(table, blockIdx.x, int(threadIdx.x));
}

// One more array to read and to write: fewer threads have as many bytes in flight.
template <class S>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 8 ? 2 : 3) keep_kernel(const __grid_constant__ Table table) {
  step_thread<S, true>(table, blockIdx.x, int(threadIdx.x));
}

template <class S>
__global__ void __launch_bounds__(kThreads, kBlocks<S>) prox_kernel(const __grid_constant__ Table table) {
  prox_thread<S>(table, blockIdx.x, int(threadIdx.x));
}

// Half types hold more than 40 registers from phase to phase; half of the threads still have 48 KB in flight.
template <class S, bool kStep>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 2 ? 4 : kBlocks<S>)
    resident_kernel(const __grid_constant__ Table table) {
  __shared__ ResidentShared<Arithmetic<S>> shared;
  resident_block<S, kStep, Arithmetic<S>>(table, blockIdx.x, shared, Each{});
}

template <class S, bool kSquares, class T>
__global__ void __launch_bounds__(kThreads, kBlocks<S>) sum_kernel(const __grid_constant__ SumTable table) {
  __shared__ double sums[kSums<S>];
  sum_block<S, kSquares, false, T>(table, blockIdx.x, sums, Each{});
}

// With a dual: a second vector is held while a first one is added to it.
template <class S>
__global__ void __launch_bounds__(kThreads, 3) dual_kernel(const __grid_constant__ SumTable table) {
  __shared__ double sums[kSums<S>];
  sum_block<S, true, true, Arithmetic<S>>(table, blockIdx.x, sums, Each{});
}

// Double-precision divisions: half the threads will do.
template <class S>
__global__ void __launch_bounds__(kThreads, 4) penalty_kernel(const __grid_constant__ Table table) {
  __shared__ double sums[kThreads];
  penalty_block<S>(table, blockIdx.x, sums, Each{});
}

// The table goes as the kernel's parameters: no copy to the device stands before the launch.
template <class TableType>
const char* launch(const Queue& queue, void (*kernel)(TableType), const TableType& table) {
  // Ours and torch's copy of the CUDA runtime each keep a current device.
  cudaError_t error = cudaSetDevice(queue.device);
  if (error == cudaSuccess) {
    void* arguments[] = {const_cast<TableType*>(&table)};
    error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(table.blocks), dim3(kThreads), arguments, 0,
                             static_cast<cudaStream_t>(queue.stream));
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* step(const Queue& queue, Dtype dtype, const Table& t) {
  return with_storage(dtype, [&](auto s) { return launch(queue, step_kernel<decltype(s)>, t); });
}

const char* keep(const Queue& queue, Dtype dtype, const Table& t) {
  return with_storage(dtype, [&](auto s) { return launch(queue, keep_kernel<decltype(s)>, t); });
}

const char* prox(const Queue& queue, Dtype dtype, const Table& t) {
  return with_storage(dtype, [&](auto s) { return launch(queue, prox_kernel<decltype(s)>, t); });
}

template <bool kStep>
const char* resident(const Queue& queue, Dtype dtype, const Table& t) {
  return with_storage(dtype, [&](auto s) { return launch(queue, resident_kernel<decltype(s), kStep>, t); });
}

const char* squares(const Queue& queue, Dtype dtype, const SumTable& t) {
  return with_storage(dtype, [&](auto s) {
    using S = decltype(s);
    return launch(queue, sum_kernel<S, true, Arithmetic<S>>, t);
  });
}

const char* dual_squares(const Queue& queue, Dtype dtype, const SumTable& t) {
  return with_storage(dtype, [&](auto s) { return launch(queue, dual_kernel<decltype(s)>, t); });
}

const char* join(const Queue& queue, Dtype dtype, const SumTable& t) {
  if (dtype == Dtype::f64) return launch(queue, sum_kernel<double, false, double>, t);
  return launch(queue, sum_kernel<double, false, float>, t);
}

const char* penalty(const Queue& queue, Dtype dtype, const Table& t) {
  return with_storage(dtype, [&](auto s) { return launch(queue, penalty_kernel<decltype(s)>, t); });
}

}  // namespace

const char* probe(int device) {
  int before = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(step_kernel<float>));
    cudaSetDevice(before);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const Kernels device_kernels = {step,    prox,         keep, resident<true>, resident<false>,
                                squares, dual_squares, join, penalty};
const char* const architectures = RVSM_ARCHITECTURES;

}  // namespace rvsm::cuda
