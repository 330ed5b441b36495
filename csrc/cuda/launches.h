// The CUDA engine: all tensors of a step in as few launches as there are kinds of work. Without torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

#include "builder.h"
#include "kernels.h"

namespace rvsm::cuda {

// A set of tensors on one device, for repeated runs. Tensors without groups take one launch per storage type, base and
// count of states, and groups that are short and consecutive in memory another. For other groups one launch before the
// step makes the factors, or two where long groups are summed in parts. For windows that are not inside a vector a
// launch before the step finds out what survives. Steps with several storage types, and steps with numbers on the
// device, are a launch of their own (general.h). Statistics take two launches more, one before the step and one after
// it (measure.h).
class Launches {
 public:
  Launches(Action action, const Kernels& kernels) : action_(action), kernels_(kernels) {}

  // A prox writes to args.w: u of args.g where that is set, else u of args.w.
  std::vector<TensorArgs> tensors;

  // Take note of the tensors; again whenever a shape, type or grouping changes, group_lasso is switched on, or norms
  // come from elsewhere or no longer do. `limit`: most elements of a piece, for tests.
  void divide(int64_t limit = kNarrow);

  // Bytes of scratch on the device (the factors of the groups, and sums of parts), and where it is.
  int64_t scratch_bytes() const;
  void set_scratch(void* memory);

  // Whether statistics are wanted that the scratch has no room for: divide() first.
  bool lacks_room() const;

  // Numbers on the device that GradScaler brings; null where there are none.
  struct Scaling {
    const float* grad_scale = nullptr;
    const float* found_inf = nullptr;
  };

  // Start all launches; nothing is waited for. Action::penalty: `total` is a double on the device.
  // Throws std::runtime_error with the name of the kernel and of the param groups.
  void run(const Stream& stream, const Scaling& scaling, double* total = nullptr);

 private:
  // How a tensor in groups is summed, for elements of a certain size.
  struct Layout {
    Tiles tiles;       // where it is resident
    SumEntry sums[2];  // where it begins on a 16-byte boundary, and where it does not
  };
  struct Groups {
    Dtype dtype;
    Layout stored, widened;  // for that type, and for float32, in which a step with a wider gradient is done
    bool resident = false;   // its blocks sum its groups themselves
    bool general = false;    // its step is; launches before it make norms, not factors
    SumEntry factors;        // makes factors of sums of parts, or of norms from elsewhere
    // Pieces of fewer than 2^31 elements; nearly always one.
    struct Piece {
      int64_t offset, numel;
      FactorPlace factors;
      FactorPlace norms;  // what statistics read in the place of the factors: the norms
    };
    std::vector<Piece> pieces;
    int64_t partials = 0;  // sums of parts for one row of norms, at most
    bool lasso = false;
    char *ratio = nullptr, *length = nullptr;
    char* norms = nullptr;    // for statistics: of what is thresholded
    uint8_t* bits = nullptr;  // of a tensor with windows: of the elements that survive
    double* parts = nullptr;

    const Layout& layout(Dtype type) const { return type == dtype ? stored : widened; }
  };

  // Whether the factors of groups are wanted, and not what they are made of alone.
  bool writes_weights() const { return action_ == Action::step || action_ == Action::prox; }
  TableBuilder& tables(const Key& key);
  template <class S>
  void add(const TensorArgs& args, const Groups& groups);
  template <class S, class Base, int kStates>
  void add_step(const TensorArgs& args, const Groups& groups, Key key);
  template <class S, class Base, int kStates>
  void add_pieces(const TensorArgs& args, const Groups& groups, TableBuilder& builder, void* source);
  void* source(const TensorArgs& args) const;
  void add_general(const TensorArgs& args, const Groups& groups);
  // Calls f(offset, numel) for the pieces of a tensor with windows: places in it are in 32 bits, and its bits in bytes.
  template <class F>
  void for_flat_pieces(const TensorArgs& args, const F& f) const {
    const int64_t most = std::max<int64_t>((limit_ - 1) / kOfByte, 1) * kOfByte;
    for (int64_t at = 0; at < args.numel; at += most) f(at, std::min(most, args.numel - at));
  }
  int64_t counted_entries() const;
  int64_t finished_records() const;
  bool has_lengths(const TensorArgs& args, const Groups& groups) const;
  void add_counts();
  void add_norms(const TensorArgs& args, const Groups& groups);
  void add_norm_row(const TensorArgs& args, const Groups& groups, int norm_row);
  // measuring.cpp: statistics.
  bool is_measured(const TensorArgs& args) const { return measures_ && args.statistics != nullptr; }
  // Whether norms of groups are wanted that no step needs: they stand behind the ratios.
  bool keeps_norms(const Groups& groups) const { return measures_ && !groups.general && !groups.resident; }
  int64_t measuring_blocks(const TensorArgs& args) const;
  void find_measuring_room(double* memory);
  void add_statistics(const TensorArgs& args, const Groups& groups);
  void start(const Stream& stream, const Key& key, const void* table, const std::vector<int32_t>& groups);

  Action action_;
  const Kernels& kernels_;
  std::vector<Groups> groups_;  // one per tensor
  double* totals_ = nullptr;    // of a penalty's value: one number per block
  int64_t limit_ = kNarrow;
  int64_t blocks_ = 0;  // how many of these there are at most
  // By what they do; the order of keys is that of the launches.
  std::map<Key, SumBuilder> sums_;
  std::map<Key, TableBuilder> tables_;
  std::pair<const Key, TableBuilder>* last_ = nullptr;  // the builder used last: the next tensor mostly needs it too
  SumBuilder total_;
  CountBuilder counts_;
  double* corrections_ = nullptr;  // of the entries of all steps
  NumbersBuilder numbers_;
  WindowBuilder windows_;
  char* finished_ = nullptr;  // records
  bool measures_ = false;     // the scratch has room for statistics
  // Of statistics in float32 and in float64: the most blocks, those of this step so far, and where their sums go.
  int64_t most_measured_[2] = {}, measured_[2] = {};
  double* sums_of_blocks_[2] = {};
  RowBuilder rows_;
};

}  // namespace rvsm::cuda
