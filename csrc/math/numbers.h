// The numbers of a step: made once in Python, in double precision (method/step_options.py), narrowed here to the type
// of the arithmetic. One record is a row of doubles: those of the penalty, those of the split, those of the base.
#pragma once

#include <limits>

#include "types.h"

namespace rvsm {

#if defined(__CUDACC__)
// static, so that the member functions of a base belong to its type and need no object.
#define RVSM_HD static __host__ __device__ __forceinline__
#else
// Internal linkage and always inlined: the CPU kernels compile these lines once per instruction set, and the linker
// must never hand one set's copy to another.
#define RVSM_HD [[maybe_unused]] static inline __attribute__((always_inline))
#endif

constexpr int kProxNumbers = 6;
constexpr int kSplitNumbers = 5;
// Room for the numbers of any base.
constexpr int kMostBaseNumbers = 10;
constexpr int kMostNumbers = kProxNumbers + kSplitNumbers + kMostBaseNumbers;

// What thresholding a tensor needs.
template <class T>
struct Prox {
  Penalty penalty;
  T cut;   // the largest r that goes to zero
  T tau;   // lam / beta, times sqrt(group size) with group_scale
  T a;     // the shape of tl1
  T rho;   // tl1: (27/4 tau a (a + 1))^(1/3), the a + r of the critical point
  T edge;  // tl1: rho - a, formed in double so that r - edge keeps its digits
};

// What the split needs. Options that are switches are numbers here: an arithmetic with zeros and ones vectorises, a
// selection by a flag does not.
template <class T>
struct Split {
  Prox<T> prox;
  T grad;      // factor of the gradient: -1 under maximize, else 1; divided by grad_scale where the host knows it
  T pull;      // the pull on the weights: lr * beta if decoupled, else 0
  T coupling;  // the pull in the gradient: 0 if decoupled, else beta
  T lasso;     // group_lasso
  T held;      // what a weight is that stays: 0 with hold_zeros, else NaN, which equals nothing
};

// N: double, or T where the record was narrowed before.
template <class T, class N>
RVSM_HD Prox<T> prox_of(const N* record) {
  return {Penalty(int32_t(record[0])), T(record[1]), T(record[2]), T(record[3]), T(record[4]), T(record[5])};
}

// `scale`: TensorArgs::scale.
template <class T, class N>
RVSM_HD Split<T> split_of(const N* record, double scale) {
  const N* s = record + kProxNumbers;
  return {prox_of<T>(record),
          T(s[0] * scale),
          T(s[1]),
          T(s[2]),
          T(s[3]),
          s[4] != 0 ? T(0) : std::numeric_limits<T>::quiet_NaN()};
}

// Room for the numbers of a base that follow from the count of steps.
constexpr int kMostCorrections = 2;

// x^n for n = 0, 1, 2, ... by squarings.
RVSM_HD double power(double x, float n) {
  double result = 1;
  for (uint32_t rest = uint32_t(n); rest > 0; rest >>= 1) {
    if (rest & 1) result *= x;
    x *= x;
  }
  return result;
}

template <class N>
RVSM_HD N* base_numbers(N* record) {
  return record + kProxNumbers + kSplitNumbers;
}

}  // namespace rvsm
