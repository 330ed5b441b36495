// The kernels of a selection: what a block does is a function of selection.h. A file of its own, because the
// interpreter of PTX knows no atomic operations.

#include "start.h"

namespace rvsm::cuda {

namespace {

// Eight magnitudes of double precision are in registers at a time.
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 3 : 4)
    select_pass_kernel(const __grid_constant__ PassTable table) {
  __shared__ PassShared<T> shared;
  pass_block<T>(table, blockIdx.x, shared, ForThreads{});
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) select_pick_kernel(const __grid_constant__ CutTable table) {
  __shared__ PickShared shared;
  pick_block<T>(table, blockIdx.x, shared, ForThreads{});
}

}  // namespace

template <class T>
const char* start_select_pass(const Stream& stream, const void* table) {
  return launch(stream, select_pass_kernel<T>, table);
}
template <class T>
const char* start_select_pick(const Stream& stream, const void* table) {
  return launch(stream, select_pick_kernel<T>, table);
}

template const char* start_select_pass<float>(const Stream&, const void*);
template const char* start_select_pass<double>(const Stream&, const void*);
template const char* start_select_pick<float>(const Stream&, const void*);
template const char* start_select_pick<double>(const Stream&, const void*);

}  // namespace rvsm::cuda
