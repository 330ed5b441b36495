// What a kernel is told of one tensor: pointers and numbers, no torch.
#pragma once

#include <array>

#include "bases.h"
#include "device_numbers.h"
#include "precision.h"
#include "split.h"
#include "windows.h"

namespace rvsm {

// zeros: what penalty adds up, and the zeros of u in groups.
enum class Action { step, prox, penalty, zeros, squares };

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Room for the states of a tensor: the base's come first, then the method's, then those of its precision.
constexpr int kMostStates = 6;

// The types that the arrays of a tensor are stored in where they differ from that of the weights, and how the weights
// are written. The arithmetic is in float32 then.
struct Precision {
  bool mixed = false;   // false: all arrays have the type of the weights, and nothing else of this struct is read
  bool rounds = false;  // stochastically
  Master master = Master::none;
  Dtype grad = Dtype::f32;
  std::array<Dtype, kMostStates> states{};  // the base's and the method's
  RandomKey random;
};

// First the shape of the tensor, then what changes from run to run.
struct TensorArgs {
  int64_t numel = 0;
  Dtype dtype = Dtype::f32;
  bool grouped = false;
  Windows windows;    // of N:M sparsity: u is l0's, of the elements that these keep
  GroupView view;     // batch * outer * groups * inner == numel where grouped
  int32_t group = 0;  // its param group, for error messages

  bool active = true;  // false: nothing is done for it
  bool topk = false;   // the penalty is l0, with a cut that is read
  bool lasso = false;  // group_lasso is on
  BaseKey base;
  Method method = Method::rvsm;
  void* w = nullptr;
  // Of a step: the gradient, which some bases write to. Of a prox: what is read in the place of w, or null.
  void* g = nullptr;
  std::array<void*, kMostStates> state{};
  const void* cut = nullptr;        // top-k: in the type of the arithmetic, read when the step runs
  const double* norms = nullptr;    // norms made elsewhere, norm_rows x one per group; null: made here
  const double* numbers = nullptr;  // the record of its group, see numbers.h
  // Null, or where numbers of the record stand on the device: of a step of an engine with takes_device_numbers.
  const DeviceNumbers* device_numbers = nullptr;
  Precision precision;
  float* counter = nullptr;  // counts the steps where a device does; null: the numbers are those of this step
  double scale = 1;          // 1 / grad_scale where the host knows it, else 1
  double lam = 0;            // for P's value: already times sqrt(group size) with group_scale; 0 for top-k
  double beta = 0;
  double* sums = nullptr;  // Action::squares: where the sum of squares of each group goes

  int states() const { return base.states + method_states(method); }
  // The rest of the weights, where there is a master.
  void* master_state() const { return state[states()]; }
  // The state of the method, null without one.
  void* method_state() const { return method == Method::rvsm ? nullptr : state[base.states]; }
  // Whether the types of its arrays, or its numbers, are known only when its step runs.
  bool general() const { return precision.mixed || device_numbers != nullptr; }
  // Whether the tasks of its step add something up.
  bool sums_of_tasks() const { return statistics != nullptr || new_squares != nullptr; }
  // How many norms each group needs: that of what is thresholded and, where that is not w, that of w for group lasso.
  int norm_rows() const { return method == Method::admm && lasso ? 2 : 1; }

  double* statistics = nullptr;  // of a step: where its row of statistics goes (statistics.h), or null
  bool counts_zeros = false;     // Action::zeros
  bool split = false;            // of a step: there is a splitting

  // Of a step on the CPU: where the sum of squares of its new weights goes, or null.
  double* new_squares = nullptr;
  // Scratch of the CPU engine.
  void* factor_norms = nullptr;  // norm_rows x one per group, in the type of the arithmetic
  double* partials = nullptr;    // norm_rows x parts x groups sums of squares, where long groups have parts
  int64_t parts = 1;
};

}  // namespace rvsm
