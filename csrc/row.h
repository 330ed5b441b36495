// One tensor of a step, as the engines see it: pointers and numbers, no torch.
#pragma once

#include "types.h"

namespace rvsm {

enum class Action { step, prox, penalty };

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Its shape, then what changes from run to run.
struct Row {
  int64_t numel = 0;
  Dtype dtype = Dtype::f32;
  bool grouped = false;
  GroupView view;     // batch * outer * groups * inner == numel where grouped
  int32_t group = 0;  // its param group, for error messages

  bool active = true;  // false: nothing is done for it
  bool topk = false;   // the penalty is l0, with a cut that is read
  Momentum momentum = Momentum::none;
  Method method = Method::rvsm;
  void* w = nullptr;
  const void* g = nullptr;
  void* m = nullptr;          // not read without momentum
  void* kept = nullptr;       // what the method keeps of each element
  const void* cut = nullptr;  // top-k: in the arithmetic type, read when the step runs
  Step<double> step{};
  double lam = 0;  // for the penalty's value: already times sqrt(group size) with group_scale
  double beta = 0;

  // Norms that a group needs: of what is thresholded and, where that is not w, of w for group lasso.
  int planes() const { return method == Method::admm && step.lasso != 0 ? 2 : 1; }

  // Scratch of the CPU engine.
  void* norms = nullptr;       // planes x one number of the arithmetic type per group
  double* partials = nullptr;  // planes x parts x groups sums of squares, where long groups are split
  int64_t parts = 1;
};

}  // namespace rvsm
