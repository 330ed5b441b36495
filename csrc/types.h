// Plain data that every translation unit shares: no functions, no torch, no instruction set.
#pragma once

#include <cstdint>

namespace rvsm {

// The penalties in the order of penalties.py; `none` is a step without a splitting.
enum class Penalty : int32_t { none, l1, l0, tl1 };

// How u pulls the weights; see docs/method.md.
enum class Method : int32_t { rvsm, delayed, admm };

enum class Dtype : int32_t { f32, f64, bf16, f16 };

// The options of one param group, as the optimizer was given them.
struct Options {
  Penalty penalty = Penalty::none;
  double lam = 0;
  double beta = 0;
  double a = 1;
  double group_lasso = 0;
  double lr = 0;
  double momentum = 0;
  double dampening = 0;
  double weight_decay = 0;
  bool group_scale = false;
  bool nesterov = false;
  bool decoupled = true;
  bool maximize = false;
  Method method = Method::rvsm;
  bool topk = false;  // l0 with a cut that comes with each step
};

// The numbers that thresholding one tensor needs, filled once on the host in double precision (make_prox).
template <class T>
struct Prox {
  Penalty penalty;
  T cut;   // the largest r that goes to zero
  T tau;   // lam / beta, times sqrt(group size) with group_scale
  T a;     // the shape of tl1
  T rho;   // tl1: (27/4 tau a (a + 1))^(1/3), the a + r of the critical point
  T edge;  // tl1: rho - a, formed in double so that r - edge keeps its digits
};

// The numbers that one step of one tensor needs, filled once on the host in double precision (make_step). Options that
// are switches are numbers here: an arithmetic with zeros and ones vectorises, a selection by a flag does not.
template <class T>
struct Step {
  Prox<T> prox;
  T grad;      // what the gradient is multiplied with: 1 / grad_scale, negative under maximize
  T pull;      // the pull on the weights: lr * beta if decoupled, else 0
  T coupling;  // the pull in the gradient: 0 if decoupled, else beta
  T decay;     // weight decay
  T lasso;     // group_lasso
  T keep;      // what stays of the momentum buffer: momentum, 0 at the first step
  T add;       // what the direction adds to it: 1 - dampening, 1 at the first step
  T look;      // Nesterov's look ahead: momentum
  T lr;
};

// How the direction passes through momentum.
enum class Momentum : int32_t { none, plain, nesterov };

// A tensor in memory order as batch x outer x groups x inner elements. Elements that share (batch, group) form one
// group; its number is batch * groups + group.
struct GroupView {
  int64_t batch = 1;
  int64_t outer = 1;
  int64_t groups = 1;
  int64_t inner = 1;

  int64_t count() const { return batch * groups; }
  int64_t size() const { return outer * inner; }
};

}  // namespace rvsm
