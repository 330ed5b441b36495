// The CPU engine: one list of tasks over all tensors of a step, dealt to the threads. Without torch.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "../math/statistics.h"
#include "../math/tensor_args.h"

namespace rvsm::cpu {

// Columns of a block with several rows: a factor per column is computed once and used for every row.
constexpr int64_t kColumns = 16384;

// A rectangle of a tensor in its view: one batch, rows [o0, o1) of the outer dimension, columns [c0, c1) of groups x
// inner. A tensor without groups is one outer row of numel columns.
struct Block {
  int64_t batch, o0, o1, c0, c1;
};

// The inner loops over elements, compiled once per instruction set (elements.cpp).
struct ElementKernels {
  const char* isa;
  // One step of the elements of a block (reads factor_norms where grouped). Adds what it finds to the sums, unless
  // null.
  void (*step)(const TensorArgs&, const Block&, Sums*);
  // w <- u.
  void (*prox)(const TensorArgs&, const Block&);
  // Adds a block (all groups where grouped, but with counts_zeros) to the sums; nothing is written.
  void (*measure)(const TensorArgs&, const Block&, Sums&);
};

// The norms of groups, compiled once per instruction set (norms.cpp).
struct NormKernels {
  // Writes the norms of the groups in a block, or their sums of squares where those are wanted. Where the tensor has
  // parts: the sums of squares of one part, which join() adds up.
  void (*squares)(const TensorArgs&, const Block&, int64_t part);
  // Adds the parts of every group up, in their order.
  void (*join)(const TensorArgs&);
  // The sum of squares of the weights in a block, row by row.
  double (*sum)(const TensorArgs&, const Block&);
};

struct MagnitudeKernels;  // see selection.h
struct WholeKernels;      // see whole.h

struct Kernels {
  const ElementKernels& elements;
  const NormKernels& norms;
  const MagnitudeKernels& magnitudes;
  const WholeKernels& whole;
};

// The kernels for this processor; RVSM_ISA=base|avx2|avx512 in the environment asks for less than it has.
const Kernels& kernels();

// The tasks of a set of tensors, for repeated runs.
//
// A tensor without groups is applied block by block. Groups that are short and consecutive in memory are reduced and
// applied by one task each, while they are in the cache. For other groups the tasks stand in the order reduce, apply,
// and a thread that takes an apply task waits until every reduce task of the tensor is done.
//
// Each thread has a lane of tasks, the same in every run, so that it finds its elements in its own cache; when its lane
// is empty it takes from the others. A thread that waits takes tasks that stand before its own, so the wait ends
// however few threads there are. What a task computes does not depend on who runs it: results are the same for every
// number of threads.
class TaskList {
 public:
  explicit TaskList(Action action) : action_(action) {}

  std::vector<TensorArgs> tensors;

  // Take note of the tensors; again whenever a shape, dtype or grouping changes.
  void divide();

  // Bytes of scratch that the tensors need (one number per group, and the parts of long groups), and where it is.
  int64_t scratch_bytes() const;
  void set_scratch(void* memory);

  // Elements of the active tensors: what decides whether threads are worth waking.
  int64_t workload() const;

  // Call start(n) once, then work(begin, end) for parts [begin, end) that cover [0, n), one thread each, all at the
  // same time (or one after the other in one thread, in this order). work() returns when no task is left to take.
  void start(int64_t threads);
  void work(int64_t begin, int64_t end);

  // Action::penalty: lam P(u) + beta/2 |w - u|^2 of all tensors.
  double total() const;

  // The sums of each tensor that has any, task by task in their order; null without any: Action::penalty and zeros, and
  // steps with statistics or new squares.
  std::vector<Sums> totals() const;

 private:
  enum class Kind : int32_t { reduce, apply, both };

  struct Task {
    int32_t tensor;
    Kind kind;
    int64_t part;
    Block block;
  };

  struct alignas(64) Lane {
    std::vector<int64_t> tasks;
    std::atomic<int64_t> next{0};
  };

  void divide_for(int64_t threads);
  void deal(int64_t threads);
  void drain(Lane& lane);
  void run(int64_t index);
  bool help(int64_t index);
  void divide_reduction(int32_t index, int64_t threads);
  void divide_application(int32_t index, int64_t threads);
  void add(int32_t tensor, Kind kind, const Block& block, int64_t part = 0);

  Action action_;
  std::vector<Task> tasks_;
  std::vector<int32_t> reductions_;  // reduce tasks per tensor
  std::unique_ptr<std::atomic<int32_t>[]> pending_;
  std::vector<std::unique_ptr<Lane>> lanes_;
  bool measures_ = false;   // whether tasks have sums
  std::vector<Sums> sums_;  // of each task
};

}  // namespace rvsm::cpu
