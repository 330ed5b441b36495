// What a step is asked for in the C++ tests, and its record: the tests' twin of method/step_options.py.
#pragma once

#include <array>
#include <deque>

#include "../math/tensor_args.h"
#include "check.h"

namespace rvsm {

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
  bool hold_zeros = false;
  Method method = Method::rvsm;
  BaseKind base = BaseKind::sgd;
  bool amsgrad = false;
  double beta1 = 0.9, beta2 = 0.99, eps = 1e-8;
  int count = 3;  // steps before this one, where it is not the first

  bool is_split() const { return penalty != Penalty::none && lam > 0 && beta > 0; }
  double strength(int64_t group_size) const { return group_scale ? lam * std::sqrt(double(group_size)) : lam; }
};

using NumberRow = std::array<double, kMostNumbers>;

inline NumberRow record_of(const Options& o, int64_t group_size, bool fresh) {
  const bool split = o.is_split();
  const Prox<double> prox =
      make_prox(split ? o.penalty : Penalty::none, split ? o.strength(group_size) / o.beta : 0, o.a);
  NumberRow r{double(prox.penalty), prox.cut, prox.tau, prox.a, prox.rho, prox.edge};
  double* const s = r.data() + kProxNumbers;
  s[0] = o.maximize ? -1 : 1;
  s[1] = split && o.decoupled ? o.lr * o.beta : 0;
  s[2] = split && !o.decoupled ? o.beta : 0;
  s[3] = o.group_lasso;
  s[4] = o.hold_zeros;
  if (o.base == BaseKind::none) return r;
  double* const b = s + kSplitNumbers;
  if (o.base == BaseKind::adamw) {
    const int step = fresh ? 1 : o.count + 1;
    b[0] = 1 - o.lr * o.weight_decay;
    b[1] = 1 - o.beta1;
    b[2] = o.beta2;
    b[3] = 1 - o.beta2;
    b[4] = o.lr / (1 - std::pow(o.beta1, step));
    b[5] = 1 / std::sqrt(1 - std::pow(o.beta2, step));
    b[6] = o.eps;
    b[7] = o.lr;
    b[8] = o.beta1;
    return r;
  }
  b[0] = o.weight_decay;
  b[1] = fresh ? 0 : o.momentum;
  b[2] = fresh ? 1 : 1 - o.dampening;
  b[3] = o.momentum;
  b[4] = o.nesterov;
  b[5] = o.lr;
  return r;
}

// Fill in what follows from the options; the record stays where `records` has it.
inline void apply(const Options& o, TensorArgs& args, bool fresh, std::deque<NumberRow>& records) {
  const int64_t size = args.grouped ? args.view.size() : 1;
  args.numbers = records.emplace_back(record_of(o, size, fresh)).data();
  const bool none = o.base == BaseKind::none;
  const bool in_gradient = (o.is_split() && !o.decoupled) || o.group_lasso != 0 || o.hold_zeros;
  const bool adamw = o.base == BaseKind::adamw;
  args.base = {o.base, uint8_t(adamw ? 2 + o.amsgrad : !none && o.momentum != 0), none && in_gradient};
  args.method = o.is_split() ? o.method : Method::rvsm;
  args.lasso = o.group_lasso != 0;
  args.lam = o.strength(size);
  args.beta = o.beta;
}

inline Options random_options(bool grouped) {
  Options o;
  o.penalty = Penalty(integer(0, 3));
  o.lam = log_uniform(1e-3, 0.1) * (grouped ? 3 : 1);
  o.beta = 0.5;
  o.a = log_uniform(0.1, 10);
  o.lr = 0.1;
  o.momentum = double(integer(0, 1)) * 0.9;
  o.nesterov = o.momentum != 0 && integer(0, 1);
  o.weight_decay = double(integer(0, 1)) * 0.01;
  o.decoupled = integer(0, 1);
  o.maximize = integer(0, 1);
  o.group_lasso = grouped ? double(integer(0, 1)) * 0.1 : 0;
  o.group_scale = grouped && integer(0, 1);
  o.hold_zeros = integer(0, 3) == 0;
  o.base = BaseKind(integer(0, 2));
  o.amsgrad = integer(0, 1);
  return o;
}

// One element of a step in plain code, straight from split.h and the bases; `u` of v.
template <class T, class U>
void plain_step(T& w, T& g, T* state, T unit, const TensorArgs& args, const U& u) {
  const Split<T> s = split_of<T>(args.numbers, args.scale);
  with_base(args.base, [&](auto base) {
    using Base = decltype(base);
    const auto numbers = Base::template numbers<T>(base_numbers(args.numbers));
    T nothing = 0, d = g * s.grad;
    const int states = Base::kStates + (args.method == Method::rvsm ? 0 : 1);
    if (is_held(w, s)) {
      d = 0;
      for (int k = 0; k < states; ++k) state[k] = 0;
    }
    T& of_method = args.method == Method::rvsm ? nothing : state[Base::kStates];
    T gap = 0;
    with_method(args.method, [&](auto method) {
      constexpr Method kMethod = decltype(method)::value;
      const T v = thresholded<kMethod>(w, of_method);
      gap = gap_of<kMethod>(w, v, u(v), of_method);
    });
    split_step(w, d, gap, unit, s, SplitSwitches{s.prox.penalty != Penalty::none, s.lasso != 0});
    Base::step(w, state, d, numbers, Base::switches(base_numbers(args.numbers)));
    if (Base::kWritesGrad) g = d;
  });
}

}  // namespace rvsm
