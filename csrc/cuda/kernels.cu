// The kernels: what a thread or a block does is a function of elements.h, resident.h or norms.h. No torch.

#include "start.h"

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

// Blocks of a step. A method's state is one array more to read and to write, so that fewer threads have as many
// bytes in flight. A vector of a half type has twice the elements of one of float32; where states or the gradient are
// written, some compilers spill with more blocks than these.
template <class S, class Base, bool kHasState>
constexpr int step_blocks() {
  constexpr bool kHalf = sizeof(S) == 2, kTwoArrays = Base::kStates > 0 || Base::kWritesGrad;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
  if (Base::kStates > 1) return Base::kStates > 2 && sizeof(S) == 8 && kHasState ? 1 : 2;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  if (Base::kStates > 2 && sizeof(S) == 8 && kHasState) return 1;
#endif
  if (Base::kStates > 1) return sizeof(S) != 4 || kHasState ? 2 : 3;
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ == 900)
  if (kHasState) return sizeof(S) == 8 ? 2 : 3;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
  if (kHasState) return sizeof(S) == 4 && Base::kStates == 0 ? 3 : 2;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  if (kHasState) return sizeof(S) == 4 ? 3 : 2;
#else
  if (kHasState) return sizeof(S) == 4 && Base::kStates == 0 ? 3 : 2;
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  if (sizeof(S) == 8) return Base::kStates > 0 ? 2 : kBlocks<S>;
  if (kHalf && !kTwoArrays) return kBlocks<S> > 4 ? 4 : kBlocks<S>;
#endif
  if (sizeof(S) == 8) return kBlocks<S>;
  if (!kTwoArrays) return kHalf && !Base::kReadsGrad && kBlocks<S> > 5 ? 5 : kBlocks<S>;
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890)
  return 3;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
  return kHalf ? 2 : 3;  // with the windows of N:M in registers
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return kHalf ? 3 : 4;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return kHalf ? (Base::kWritesGrad ? 3 : 5) : kBlocks<S>;
#else
  return kHalf ? 5 : kBlocks<S>;
#endif
}

template <class S, class Base, bool kHasState>
__global__ void __launch_bounds__(kThreads, step_blocks<S, Base, kHasState>())
    step_kernel(const __grid_constant__ Table table) {
  step_thread<S, Base, kHasState>(table, blockIdx.x, int(threadIdx.x));
}

// Eight elements of every array are in registers at a time.
template <class T, class Base, bool kHasState>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    general_kernel(const __grid_constant__ Table table) {
  general_thread<T, Base, kHasState>(table, blockIdx.x, int(threadIdx.x));
}

template <class S>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 2 && kBlocks<S> > 5 ? 5 : kBlocks<S>)
    prox_kernel(const __grid_constant__ Table table) {
  prox_thread<S>(table, blockIdx.x, int(threadIdx.x));
}

// Half types hold more than 40 registers from phase to phase; half of the threads still have 48 KB in flight.
template <class S, class Base>
constexpr int resident_blocks() {
  if (Base::kStates > 1) return sizeof(S) == 4 ? 3 : 2;
  if (sizeof(S) == 4 && Base::kStates > 0 && kMostBlocks > 5) return 4;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 860
  if (sizeof(S) == 4) return 5;
#endif
  return sizeof(S) == 2 ? 4 : kBlocks<S>;
}

template <class S, class Base, bool kStep>
__global__ void __launch_bounds__(kThreads, resident_blocks<S, Base>())
    resident_kernel(const __grid_constant__ Table table) {
  __shared__ ResidentShared<Opmath<S>> shared;
  resident_block<S, Base, kStep>(table, blockIdx.x, shared, ForThreads{});
}

// With a dual there is a second vector to each; those of half types have twice the sums.
template <class S, bool kDual>
constexpr int sum_blocks() {
  if (kDual) return 3;
  constexpr int kMost = sizeof(S) == 2 ? 4 : 5;
  return kBlocks<S> > kMost ? kMost : kBlocks<S>;
}

template <class S, bool kSquares, bool kDual, class T>
__global__ void __launch_bounds__(kThreads, sum_blocks<S, kDual>()) sum_kernel(const __grid_constant__ SumTable table) {
  __shared__ double sums[kSums<S>];
  sum_block<S, kSquares, kDual, T>(table, blockIdx.x, sums, ForThreads{});
}

__global__ void __launch_bounds__(kThreads, 3) general_sum_kernel(const __grid_constant__ SumTable table) {
  __shared__ double sums[kSums<GeneralWeights>];
  sum_block<GeneralWeights, true, true, float>(table, blockIdx.x, sums, ForThreads{});
}

// Double-precision divisions: half the threads will do.
template <class S>
__global__ void __launch_bounds__(kThreads, 4) penalty_kernel(const __grid_constant__ Table table) {
  __shared__ double sums[kThreads];
  penalty_block<S>(table, blockIdx.x, sums, ForThreads{});
}

// Half of the threads of sm_90; fewer where the compiler spills.
template <class T>
constexpr int measure_blocks() {
  if (sizeof(T) == 8) return 1;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return 2;
#else
  return 4;
#endif
}

template <class T>
__global__ void __launch_bounds__(kThreads, measure_blocks<T>()) measure_kernel(const __grid_constant__ Table table) {
  __shared__ double sums[kMeasuredSums];
  measure_block<T>(table, blockIdx.x, sums, ForThreads{});
}

__global__ void __launch_bounds__(kThreads) row_kernel(const __grid_constant__ RowTable table) {
  __shared__ double sums[kRowSums];
  row_block(table, blockIdx.x, sums, ForThreads{});
}

__global__ void __launch_bounds__(kThreads) count_kernel(const __grid_constant__ CountTable table) {
  count_thread(table, blockIdx.x, int(threadIdx.x));
}

__global__ void __launch_bounds__(kThreads) numbers_kernel(const __grid_constant__ NumbersTable table) {
  numbers_thread(table, blockIdx.x, int(threadIdx.x));
}

__global__ void __launch_bounds__(kThreads) window_kernel(const __grid_constant__ WindowTable table) {
  window_thread(table, blockIdx.x, int(threadIdx.x));
}

struct DeviceStarter {
  static const char* count(const Stream& stream, const void* table) { return launch(stream, count_kernel, table); }
  static const char* numbers(const Stream& stream, const void* table) { return launch(stream, numbers_kernel, table); }
  static const char* windows(const Stream& stream, const void* table) { return launch(stream, window_kernel, table); }
  static const char* general_squares(const Stream& stream, const void* table) {
    return launch(stream, general_sum_kernel, table);
  }
  static const char* rows(const Stream& stream, const void* table) { return launch(stream, row_kernel, table); }
  template <class T>
  static const char* measure(const Stream& stream, const void* table) {
    return launch(stream, measure_kernel<T>, table);
  }
  template <class T, class Base, bool kHasState>
  static const char* general(const Stream& stream, const void* table) {
    return launch(stream, general_kernel<T, Base, kHasState>, table);
  }
  template <class S, class Base, bool kHasState>
  static const char* step(const Stream& stream, const void* table) {
    return launch(stream, step_kernel<S, Base, kHasState>, table);
  }
  template <class S>
  static const char* prox(const Stream& stream, const void* table) {
    return launch(stream, prox_kernel<S>, table);
  }
  template <class S, class Base, bool kStep>
  static const char* resident(const Stream& stream, const void* table) {
    return launch(stream, resident_kernel<S, Base, kStep>, table);
  }
  template <class S, bool kDual>
  static const char* squares(const Stream& stream, const void* table) {
    return launch(stream, sum_kernel<S, true, kDual, Opmath<S>>, table);
  }
  template <class T>
  static const char* factors(const Stream& stream, const void* table) {
    return launch(stream, sum_kernel<double, false, false, T>, table);
  }
  template <class T>
  static const char* select_pass(const Stream& stream, const void* table) {
    return start_select_pass<T>(stream, table);
  }
  template <class T>
  static const char* select_pick(const Stream& stream, const void* table) {
    return start_select_pick<T>(stream, table);
  }
  template <class S>
  static const char* penalty(const Stream& stream, const void* table) {
    return launch(stream, penalty_kernel<S>, table);
  }
};

}  // namespace

const char* probe(int device) {
  int before = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(prox_kernel<float>));
    cudaSetDevice(before);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const Kernels& device_kernels() {
  static const Kernels all = all_kernels<DeviceStarter>();
  return all;
}

const char* const architectures = RVSM_ARCHITECTURES;

}  // namespace rvsm::cuda
