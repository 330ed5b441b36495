// The weights of a tensor as the CPU's reductions read them: in their storage type, with the rest behind a half type,
// and with the dual of ADMM added. Part of files that are compiled once per instruction set.
#pragma once

#include <type_traits>

#include "../math/precision.h"
#include "../math/tensor_args.h"

namespace rvsm::cpu {

namespace {

// Elements of w. value(i): element i in the type of the arithmetic, at(i): in double precision. S: a type with that
// arithmetic.
template <class Storage>
struct Weights {
  using S = Storage;
  const S* w;
  Opmath<S> value(int64_t i) const { return load(w[i]); }
  double at(int64_t i) const { return double(value(i)); }
  Weights operator+(int64_t n) const { return {w + n}; }
};

// The float32 weights behind a parameter of a half type.
template <class Half, class Rest>
struct Joined {
  using S = float;
  const Half* param;
  const Rest* rest;
  float value(int64_t i) const { return rvsm::join(param[i], rest[i]); }
  double at(int64_t i) const { return double(value(i)); }
  Joined operator+(int64_t n) const { return {param + n, rest + n}; }
};

// w + dual, as the step thresholds them.
template <class Source, class Storage>
struct WithDual {
  using S = typename Source::S;
  Source w;
  const Storage* dual;
  Opmath<S> value(int64_t i) const { return w.value(i) + load(dual[i]); }
  double at(int64_t i) const { return double(value(i)); }
  WithDual operator+(int64_t n) const { return {w + n, dual + n}; }
};

// Asks for the next n elements of everything that is read.
template <class S>
inline void prefetch(const Weights<S> p, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(S);
  for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(p.w + i);
}

template <class Half, class Rest>
inline void prefetch(const Joined<Half, Rest> p, int64_t n) {
  prefetch(Weights<Half>{p.param}, n);
  constexpr int64_t kLine = 64 / sizeof(Rest);
  for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(p.rest + i);
}

template <class Source, class S>
inline void prefetch(const WithDual<Source, S> p, int64_t n) {
  prefetch(p.w, n);
  prefetch(Weights<S>{p.dual}, n);
}

// Calls f(weights), without the dual.
template <class F>
auto with_weights(const TensorArgs& args, const F& f) {
  return with_storage(args.dtype, [&](auto s) {
    using S = decltype(s);
    const S* const w = static_cast<const S*>(args.w);
    if constexpr (std::is_same_v<S, BFloat16>)
      if (args.precision.master == Master::low)
        return f(Joined<S, int16_t>{w, static_cast<const int16_t*>(args.master_state())});
    if constexpr (std::is_same_v<S, Float16>)
      if (args.precision.master == Master::whole)
        return f(Joined<S, float>{w, static_cast<const float*>(args.master_state())});
    return f(Weights<S>{w});
  });
}

// The weights with the dual. It has their type: float32 where they stand behind the parameter.
template <class Source>
auto with_dual(const Source weights, const TensorArgs& args) {
  using S = typename Source::S;
  return WithDual<Source, S>{weights, static_cast<const S*>(args.method_state())};
}

// Calls f(what the step thresholds): the weights, or weights + dual.
template <class F>
auto with_thresholded(const TensorArgs& args, const F& f) {
  return with_weights(
      args, [&](const auto weights) { return args.method == Method::admm ? f(with_dual(weights, args)) : f(weights); });
}

}  // namespace

}  // namespace rvsm::cpu
