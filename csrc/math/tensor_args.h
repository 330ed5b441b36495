// What a kernel is told of one tensor: pointers and numbers, no torch.
#pragma once

#include <array>

#include "bases.h"
#include "split.h"

namespace rvsm {

enum class Action { step, prox, penalty };

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Room for the states of a tensor: the base's come first, then the method's, then those of its precision.
constexpr int kMostStates = 6;

// Its shape, then what changes from run to run.
struct TensorArgs {
  int64_t numel = 0;
  Dtype dtype = Dtype::f32;
  bool grouped = false;
  GroupView view;     // batch * outer * groups * inner == numel where grouped
  int32_t group = 0;  // its param group, for error messages

  bool active = true;  // false: nothing is done for it
  bool topk = false;   // the penalty is l0, with a cut that is read
  bool lasso = false;  // group_lasso is on
  BaseKey base;
  Method method = Method::rvsm;
  void* w = nullptr;
  void* g = nullptr;  // the gradient of a step, written to only where the base does; what a prox reads, or null: w
  std::array<void*, kMostStates> state{};
  const void* cut = nullptr;        // top-k: in the type of the arithmetic, read when the step runs
  const double* norms = nullptr;    // of its groups, made elsewhere, `planes` numbers for each; null: made here
  const double* numbers = nullptr;  // the record of its group, see numbers.h
  double scale = 1;                 // what the gradient is multiplied with besides, where the host knows it
  double lam = 0;                   // for the penalty's value: already times sqrt(group size) with group_scale
  double beta = 0;

  int states() const { return base.states + method_states(method); }
  // The state of the method, null without one.
  void* method_state() const { return method == Method::rvsm ? nullptr : state[base.states]; }
  // Norms that a group needs: of what is thresholded and, where that is not w, of w for group lasso.
  int planes() const { return method == Method::admm && lasso ? 2 : 1; }

  // Scratch of the CPU engine.
  void* factor_norms = nullptr;  // planes x one number of the type of the arithmetic per group
  double* partials = nullptr;    // planes x parts x groups sums of squares, where long groups are split
  int64_t parts = 1;
};

}  // namespace rvsm
