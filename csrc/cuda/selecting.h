// The CUDA engine's selection: the cuts of a call in as few launches as there are rounds. Without torch.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace rvsm::cuda {

// Cuts on one device whose arithmetic has one type. Nothing is waited for.
class Selecting {
 public:
  // `dtype`: of the arithmetic.
  Selecting(Dtype dtype, const Kernels& kernels) : dtype_(dtype), kernels_(kernels) {}

  // One cut more, among the elements of all the tensors; `cut` and `last` are on the device. Of the tensors the
  // weights, the master and, where the method is ADMM, the dual are read.
  void add(void* cut, int64_t* last, int64_t survivors, const std::vector<TensorArgs>& tensors);

  bool empty() const { return cuts_.empty(); }
  // Bytes of scratch on the device: what is known of each cut, and room for the magnitudes that a read collects.
  int64_t scratch_bytes() const;

  // Starts all launches. `scratch` begins on a 16-byte boundary. `between`: as in cpu::cut.
  // Throws std::runtime_error.
  void run(const Stream& stream, void* scratch, bool between);

 private:
  int64_t room_bytes(const CutEntry& cut) const;
  void place(char* scratch);
  void pass(const Stream& stream, Pass pass) const;
  void pick(const Stream& stream, Pick pick, bool between, bool writes) const;
  void start(const Stream& stream, Work work, const void* table) const;

  Dtype dtype_;
  const Kernels& kernels_;
  std::vector<CutEntry> cuts_;
  std::vector<PassEntry> members_;
  std::vector<size_t> cut_of_;  // for each member
};

}  // namespace rvsm::cuda
