// The CUDA engine on a GPU, without torch: random steps held against the CPU engine. Small enough for
// compute-sanitizer. Leaves with status 0 and a line where there is no GPU.

#include <cuda_runtime_api.h>

#include <cstdlib>

#include "check.h"
#include "cuda_cases.h"

using namespace rvsm;

namespace {

void must(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("%s\n", cudaGetErrorString(error));
  std::exit(1);
}

// Copies on the device, each with the alignment of its original.
struct DeviceMemory {
  std::vector<void*> owned;

  ~DeviceMemory() {
    for (void* p : owned) cudaFree(p);
  }
  char* place(std::vector<char>& bytes) {
    char* const p = scratch(int64_t(bytes.size()));
    must(cudaMemcpy(p, bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
    return p;
  }
  char* scratch(int64_t bytes) {
    must(cudaMalloc(&owned.emplace_back(), size_t(bytes) + 1));
    return static_cast<char*>(owned.back());
  }
  void fetch(std::vector<char>& bytes, const char* p) {
    must(cudaDeviceSynchronize());
    must(cudaMemcpy(bytes.data(), p, bytes.size(), cudaMemcpyDeviceToHost));
  }
};

}  // namespace

int main(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("cuda_device: no GPU here, nothing was run\n");
    return argc > 1 ? 1 : 0;
  }
  const int most = argc > 1 ? std::atoi(argv[1]) : 40;
  int64_t checked = 0;
  for (int count = 1; count <= most; count = 3 * count + 1)
    for (const Action action : {Action::step, Action::prox, Action::penalty})
      checked += engines<DeviceMemory>(count, action, cuda::device_kernels(), 4);
  return finish("cuda_device", checked);
}
