// Plain data that every translation unit shares: no functions, no torch, no instruction set.
#pragma once

#include <cstdint>

namespace rvsm {

// The penalties in the order of method/penalties.py; `none` is a step without a splitting.
enum class Penalty : int32_t { none, l1, l0, tl1 };

// How u pulls the weights, in the order of method/methods.py; see docs/method.md.
enum class Method : int32_t { rvsm, delayed, admm };

// The base steps in the order of method/bases.py; `none` is the pull alone.
enum class BaseKind : int32_t { sgd, none, adamw };

enum class Dtype : int32_t { f32, f64, bf16, f16 };

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

// The windows of N:M sparsity in a tensor in memory order: element k of a window is k * inner elements behind its first
// element, and every m * inner elements hold whole windows. The n of largest magnitude survive.
struct Windows {
  int32_t n = 0;  // 0: the tensor has no windows
  int32_t m = 1;
  int64_t inner = 1;

  bool on() const { return n > 0; }
  int64_t whole() const { return m * inner; }
};

}  // namespace rvsm
