// How a kernel is started on a device. For nvcc alone.
#pragma once

#include "kernels.h"

namespace rvsm::cuda {

// Runs f for this thread; all threads of the block are done when it returns.
struct ForThreads {
  template <class F>
  __device__ __forceinline__ void operator()(const F& f) const {
    f(int(threadIdx.x));
    __syncthreads();
  }
};

// The table goes as the kernel's parameters: no copy to the device stands before the launch.
template <class TableType>
const char* launch(const Stream& stream, void (*kernel)(TableType), const void* table) {
  // Ours and torch's copy of the CUDA runtime each keep a current device.
  cudaError_t error = cudaSetDevice(stream.device);
  if (error == cudaSuccess) {
    void* arguments[] = {const_cast<void*>(table)};
    error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<const TableType*>(table)->blocks),
                             dim3(kThreads), arguments, 0, static_cast<cudaStream_t>(stream.handle));
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// The kernels of selection.cu, for float and double.
template <class T>
const char* start_select_pass(const Stream& stream, const void* table);
template <class T>
const char* start_select_pick(const Stream& stream, const void* table);

}  // namespace rvsm::cuda
