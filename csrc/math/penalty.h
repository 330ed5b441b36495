// The penalties: g, cut and shrink of section 1 of docs/method.md. Without torch, for host and device.
//
//   shrink(r) = argmin_{s >= 0} (s - r)^2 / 2 + tau * g(s)
//
// To add a penalty, see docs/architecture.md; no kernel is touched.
#pragma once

#include <cmath>
#include <cstring>

#include "numbers.h"

namespace rvsm {

// 1 / x and x / y, nearly always rounded correctly. The kernels of a GPU are compiled with a division that may be off
// by 2 ulp; an fma gives its residual exactly, and the residual corrects it. Where x == y the quotient is 1.
template <class T>
RVSM_HD T reciprocal(T x) {
  const T r = T(1) / x;
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4) return std::fma(r, std::fma(-x, r, T(1)), r);
#endif
  return r;
}

template <class T>
RVSM_HD T quotient(T x, T y) {
  const T q = x / y;
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4) return q + std::fma(-q, y, x) / y;
#endif
  return q;
}

// ---- transformed l1 --------------------------------------------------------------------------------------------
//
// With R = a + r and q = 27 tau a (a + 1) / (4 R^3), Zhang & Xin's root is s = r - R h(q) with
// h(q) = 4/3 sin^2(asin(sqrt q) / 3): no cancellation, h is a product of well-conditioned factors. As a function of
// p = sqrt(1 - q), h(q) / q is smooth on [0, 1] (its nearest pole is p = -1), so a short polynomial in p - 1/2 replaces
// the trigonometry and vectorises. Relative error of the fit: 1.1e-8 (float), 7.2e-18 (double); fit_tl1.py makes it.

template <class T>
struct Tl1Fit;

template <>
struct Tl1Fit<float> {
  static constexpr int kTerms = 11;
  RVSM_HD float at(int k) {
    constexpr float c[kTerms] = {
        0.2079604951f,  -0.1625577292f,  0.1156808752f, -0.08003700405f, 0.05468788162f,  -0.03720012487f,
        0.02512946538f, -0.01612910811f, 0.0108922152f, -0.01054071553f, 0.007001707109f,
    };
    return c[k];
  }
};

template <>
struct Tl1Fit<double> {
  static constexpr int kTerms = 23;
  RVSM_HD double at(int k) {
    constexpr double c[kTerms] = {
        0.20796049500535285768,     -0.16255768012237946203,    0.11568086761813641223,     -0.080040925579582148957,
        0.054689696103204979263,    -0.037113296632759406843,   0.025080422334835032386,    -0.016901839426389717233,
        0.011368050653526537475,    -0.0076351400734247469777,  0.005122436472741899082,    -0.003433699151695030433,
        0.0023001861496686058199,   -0.0015405676144852858883,  0.0010309267834270926332,   -0.00068585963252645795657,
        0.00045888175056419396721,  -0.00032375005902092934507, 0.00021575995651860313924,  -0.00009657338650801297071,
        0.000065599213612447818802, -0.00012002373408239626801, 0.000079389272848332946149,
    };
    return c[k];
  }
};

// 1 / x, sqrt(x) and x (1 + y + z), or 0 where that is negative, as tl1 needs them. On a device without the scaling of
// subnormal operands and results, which costs nine instructions: above the cut a + r is none, and a root so small is 0
// beside 1/2.
template <class T>
RVSM_HD T tl1_reciprocal(T x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
  }
#endif
  return T(1) / x;
}

template <class T>
RVSM_HD T tl1_root(T x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4) {
    float r;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
  }
#endif
  return std::sqrt(x);
}

template <class T>
RVSM_HD T tl1_rest(T x, T y, T z) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4) {
    float r;  // also at most 1, which x (1 + y + z) is
    asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(r) : "f"(x), "f"(z), "f"(std::fma(x, y, x)));
    return r;
  }
#endif
  const T r = x * (T(1) + y + z);
  return r < T(0) ? T(0) : r;
}

template <class T>
RVSM_HD T tl1_shrink(T r, const Prox<T>& f) {
  const T inv = tl1_reciprocal(f.a + r);
  const T x = f.rho * inv, x2 = x * x;  // q = x^3
  // 1 - q = (1 - x)(1 + x + x^2), and 1 - x = (r - edge) / R without a difference of nearly equal numbers.
  const T p = tl1_root(tl1_rest((r - f.edge) * inv, x, x2)) - T(0.5);
  T h = Tl1Fit<T>::at(Tl1Fit<T>::kTerms - 1);
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 32
#endif
  for (int k = Tl1Fit<T>::kTerms - 2; k >= 0; --k) h = h * p + Tl1Fit<T>::at(k);
  // The gap is R h(q). The slope of shrink is at least 1, so that r - cut bounds it from below: rounding cannot reach 0
  // above the cut. Of an infinite r the gap is no number, and the cut stands in for it.
#if defined(__CUDA_ARCH__)
  // R x = rho.
  return r - std::fmin(f.rho * x2 * h, f.cut);
#else
  const T s = r - (f.a + r) * (x2 * x) * h, least = r - f.cut;
  return s >= least ? s : least;
#endif
}

// ---- every penalty ---------------------------------------------------------------------------------------------

// shrink of a penalty that is known at compile time. Ties go to zero; NaN is not <= cut and so stays visible.
template <Penalty kPenalty, class T>
RVSM_HD T shrink(T r, const Prox<T>& f) {
  if (kPenalty == Penalty::none) return r;
  T s = r;
  if (kPenalty == Penalty::l1) s = r - f.tau;
  if (kPenalty == Penalty::tl1) s = tl1_shrink(r, f);
  return r <= f.cut ? T(0) : s;
}

// g of a penalty that is known at compile time.
template <Penalty kPenalty, class T>
RVSM_HD T value(T s, T a) {
  if (kPenalty == Penalty::l1) return s;
  if (kPenalty == Penalty::l0) return s != T(0) ? T(1) : T(0);
  if (kPenalty == Penalty::tl1) return (a + T(1)) * s / (a + s);
  return T(0);
}

// shrink(r) / r, the factor of a group of norm r; 0 for the zero group.
template <Penalty kPenalty, class T>
RVSM_HD T shrink_ratio(T r, const Prox<T>& f) {
  const T s = shrink<kPenalty>(r, f);
  return r == T(0) ? T(0) : quotient(s, r);
}

// What divides the elements of a group of that norm; those of the zero group are 0 and stay 0.
template <class T>
RVSM_HD T length_of(T norm) {
  return norm == T(0) ? T(1) : norm;
}

// The contribution of one r (an element's magnitude or a group's norm) to lam P(u) + beta/2 ||w - u||^2, in double.
// A group's w and u are collinear, so ||w_G - u_G|| = r - shrink(r).
template <Penalty kPenalty, class T>
RVSM_HD double penalty_term(T r, const Prox<T>& f, double lam, double beta) {
  const T s = shrink<kPenalty>(r, f);
  const double gap = double(r) - double(s);
  return lam * value<kPenalty>(double(s), double(f.a)) + beta / 2 * gap * gap;
}

// ---- numbers in double precision, for the records of the host and for those that a device finishes ------------

RVSM_HD double cut(Penalty penalty, double tau, double a) {
  switch (penalty) {
    case Penalty::l1:
      return tau;
    case Penalty::l0:
      return std::sqrt(2 * tau);
    case Penalty::tl1:
      return tau <= a * a / (2 * (a + 1)) ? tau * (a + 1) / a : std::sqrt(2 * tau * (a + 1)) - a / 2;
    default:
      return -1;
  }
}

// The cube root of x >= 0 within an ulp or two, by few instructions: what a device has is long. The bits of a double
// are nearly a logarithm, so a third of them is near the root; each of Newton's rounds doubles the digits.
RVSM_HD double cube_root(double x) {
  if (!(x > 0) || x > 1.7976931348623157e308) return x;
  const bool tiny = x < 2.2250738585072014e-308;
  const double scaled = tiny ? x * 18014398509481984.0 : x;  // 2^54
  uint64_t bits;
  std::memcpy(&bits, &scaled, sizeof bits);
  bits = uint64_t(uint32_t(bits >> 32) / 3 + 715094163u) << 32;
  double root;
  std::memcpy(&root, &bits, sizeof root);
  for (int round = 0; round < 5; ++round) root = root + (scaled / (root * root) - root) / 3;
  return tiny ? root / 262144 : root;
}

RVSM_HD Prox<double> make_prox(Penalty penalty, double tau, double a) {
#if defined(__CUDA_ARCH__)
  const double rho = cube_root(6.75 * tau * a * (a + 1));
#else
  const double rho = std::cbrt(6.75 * tau * a * (a + 1));
#endif
  return {penalty, cut(penalty, tau, a), tau, a, rho, rho - a};
}

// The same numbers in the type of the arithmetic.
template <class T>
RVSM_HD Prox<T> narrow(const Prox<double>& f) {
  return {f.penalty, T(f.cut), T(f.tau), T(f.a), T(f.rho), T(f.edge)};
}

// The names of the penalties in a param group, in the order of Penalty behind `none`.
constexpr const char* kPenaltyNames[] = {"l1", "l0", "tl1"};

// Calls f(PenaltyTag<...>{}): the run-time penalty becomes a compile-time one.
template <Penalty kPenalty>
struct PenaltyTag {
  static constexpr Penalty value = kPenalty;
};

template <class F>
RVSM_HD auto with_penalty(Penalty penalty, F&& f) {
  switch (penalty) {
    case Penalty::l1:
      return f(PenaltyTag<Penalty::l1>{});
    case Penalty::l0:
      return f(PenaltyTag<Penalty::l0>{});
    case Penalty::tl1:
      return f(PenaltyTag<Penalty::tl1>{});
    default:
      return f(PenaltyTag<Penalty::none>{});
  }
}

// The factor of a group whose penalty is known only at run time.
template <class T>
RVSM_HD T shrink_ratio(T norm, const Prox<T>& f) {
  return with_penalty(f.penalty, [&](auto tag) { return shrink_ratio<decltype(tag)::value>(norm, f); });
}

}  // namespace rvsm
