#include "device_selection.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "../cuda/selecting.h"
#include "device_engine.h"
#include "tensors.h"

namespace rvsm {

namespace {

const cuda::Kernels& kernels_of(at::Device device) {
#if defined(RVSM_CUDA)
  if (device.is_cuda()) return cuda::device_kernels();
#endif
  TORCH_CHECK(device.is_cpu(), "this build of rvsm_kernels has no selection for ", device);
  return cuda::host_kernels();
}

}  // namespace

bool selects_on_device(at::Device device) { return !device.is_cpu() || interprets_cuda(); }

void select_on_device(at::Device device, const std::vector<WantedCut>& cuts, bool between) {
  const c10::DeviceGuard guard(device);
  cuda::Stream stream;
  if (!device.is_cpu())
    stream = {device.index(), c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle()};
  for (const Dtype dtype : {Dtype::f32, Dtype::f64}) {
    cuda::Selecting selecting(dtype, kernels_of(device));
    for (const WantedCut& wanted : cuts)
      if (dtype_of(wanted.cut.scalar_type()) == dtype)
        selecting.add(wanted.cut.mutable_data_ptr(), wanted.last.mutable_data_ptr<int64_t>(), wanted.survivors,
                      wanted.tensors);
    if (selecting.empty()) continue;
    // From the stream's own memory: it is handed on only to what comes later on the stream.
    const at::Tensor scratch =
        at::empty({selecting.scratch_bytes()}, at::TensorOptions().dtype(at::kByte).device(device));
    selecting.run(stream, scratch.mutable_data_ptr(), between);
  }
}

}  // namespace rvsm
