// The CUDA engine: all tensors of a step in as few launches as there are kinds of work. Without torch.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "../row.h"
#include "builder.h"
#include "kernels.h"

namespace rvsm::cuda {

// A set of rows on one device, for repeated runs. Elementwise: one launch per storage type. Groups that are short and
// consecutive in memory: another. Other groups need one before the step, or two where long groups are summed in parts.
class Job {
 public:
  Job(Action action, const Kernels& kernels) : action_(action), kernels_(kernels) {}

  // A prox writes u of row.g, where there is one, else of row.w, to row.w.
  std::vector<Row> rows;

  // Take note of the rows; again whenever a row's shape, type or grouping changes, or group_lasso is switched on.
  // `limit`: most elements of a piece, for tests.
  void divide(int64_t limit = kNarrow);

  // Bytes of scratch on the device (the factors of the groups, and sums of parts), and where it is.
  int64_t scratch_bytes() const;
  void set_scratch(void* memory);

  // Numbers on the device that GradScaler brings; null where there are none.
  struct Scaling {
    const float* grad_scale = nullptr;
    const float* found_inf = nullptr;
  };

  // Start all launches; nothing is waited for. Action::penalty: `total` is a double on the device.
  // Throws std::runtime_error with the name of the kernel and of the param groups.
  void run(const Queue& queue, const Scaling& scaling, double* total = nullptr);

 private:
  // How one tensor in groups is summed, where its elements are of one type.
  struct Layout {
    Tiles tiles;       // of a resident one
    SumEntry sums[2];  // of a tensor that begins on a 16-byte boundary, and of another
  };
  struct Groups {
    Dtype dtype;
    Layout own, wide;       // of that type, and of float32, in which a step with a wider gradient is done
    bool resident = false;  // its blocks sum its groups themselves
    SumEntry join;
    // Pieces of fewer than 2^31 elements; nearly always one.
    struct Piece {
      int64_t offset, numel;
      Columns columns;
    };
    std::vector<Piece> pieces;
    int64_t partials = 0;  // numbers that the parts of a plane of norms need at most
    bool lasso = false;
    char *ratio = nullptr, *length = nullptr;
    double* parts = nullptr;

    const Layout& layout(Dtype type) const { return type == dtype ? own : wide; }
  };

  template <class S>
  void add(const Row& row, const Groups& groups);
  const void* source(const Row& row) const;
  void add_sums(const Row& row, const Groups& groups);
  void add_plane(const Row& row, const Groups& groups, int plane);
  static void check(const char* kernel, const char* error, const std::vector<int32_t>& groups);
  template <class S>
  void launch(const Queue& queue, const Scaling& scaling, Dtype dtype, int64_t& blocks);

  Action action_;
  const Kernels& kernels_;
  std::vector<Groups> groups_;  // one per row
  double* totals_ = nullptr;    // of a penalty's value: one number per block
  int64_t limit_ = kNarrow;
  int64_t blocks_ = 0;  // how many of these there are at most
  SumBuilder squares_[4], dual_squares_[4], joins_[2], total_;
  using Builders = std::tuple<Builder<float>, Builder<double>, Builder<BFloat16>, Builder<Float16>>;
  Builders builders_, kept_, resident_;
};

}  // namespace rvsm::cuda
