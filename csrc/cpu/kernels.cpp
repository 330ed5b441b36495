// The inner loops of the CPU engine. Compiled once per instruction set, with RVSM_ISA naming it; the loops are plain,
// the compiler vectorises them. Floating-point contraction is off, so every instruction set gives the same bits.

#include <algorithm>
#include <type_traits>

#include "../half.h"
#include "../update.h"
#include "engine.h"

namespace rvsm::cpu {

#define RVSM_JOIN2(a, b) a##b
#define RVSM_JOIN(a, b) RVSM_JOIN2(a, b)
#define RVSM_KERNELS RVSM_JOIN(kernels_, RVSM_ISA)
#define RVSM_STRING2(a) #a
#define RVSM_STRING(a) RVSM_STRING2(a)

namespace {

// Storage types are converted in tiles that stay in the first-level cache.
constexpr int64_t kTile = 512;
// Columns whose factors are kept at a time: long pieces of consecutive memory, and still in the cache.
constexpr int64_t kSpan = kColumns;
// Elements behind the factors that may be written (see spread).
constexpr int64_t kSpill = 16;
// Groups with this many consecutive elements need no factor per column.
constexpr int64_t kLong = 256;
// Sums per column that a strided reduction keeps at a time.
constexpr int64_t kSums = kStrip;
// Independent sums that an instruction or two can take together.
constexpr int kLanes = 16;
// Rows that a strided sum takes together, and asks for in advance.
constexpr int kAhead = 8;
// Columns of those rows between two rounds of asking: the memory takes so many requests at a time.
constexpr int64_t kPiece = 64;

template <class S>
constexpr bool kIsHalf = sizeof(S) == 2;

// Without momentum there is no buffer, and no pointer arithmetic on it.
template <class S>
S* offset(S* p, int64_t n) {
  return p == nullptr ? nullptr : p + n;
}

// ---- elements of one contiguous span ---------------------------------------------------------------------------

// What an element needs to know of its group: u = w * ratio, w_G / ||w_G|| = w / length (a quotient: 1 / length of a
// subnormal norm is Inf). Short groups have a factor per column, long ones the same factor for all.
template <bool kHasLasso, class T>
struct GroupPull {
  static constexpr bool kPull = true, kLasso = kHasLasso;
  const T* ratio;
  const T* length;
  T u(T w, int64_t i) const { return w * ratio[i]; }
  T direction(T w, int64_t i) const { return kHasLasso ? w / length[i] : T(0); }
  GroupPull at(int64_t i) const { return {ratio + i, length + i}; }
};

template <bool kHasLasso, class T>
struct LongGroupPull {
  static constexpr bool kPull = true, kLasso = kHasLasso;
  T ratio;
  T length;
  T u(T w, int64_t) const { return w * ratio; }
  T direction(T w, int64_t) const { return kHasLasso ? w / length : T(0); }
  LongGroupPull at(int64_t) const { return *this; }
};

template <Penalty kPenalty, class T>
struct ElementPull {
  static constexpr bool kPull = kPenalty != Penalty::none, kLasso = false;
  Prox<T> prox;
  T u(T w, int64_t) const { return kPull ? std::copysign(shrink<kPenalty>(std::fabs(w), prox), w) : w; }
  T direction(T, int64_t) const { return T(0); }
  ElementPull at(int64_t) const { return *this; }
};

// The step of a method that keeps something: fewer of its switches are known to the compiler, for there are many.
template <Momentum kMomentum, bool kLasso>
struct KeepKind {
  static constexpr Momentum momentum = kMomentum;
  static constexpr bool pull = true, lasso = kLasso;
  bool decay;
};

template <Method kMethod, class Kind, class T, class Pull>
inline void step_loop(T* __restrict w, const T* __restrict g, T* __restrict m, T* __restrict x, int64_t n,
                      const Step<T> s, const Pull pull, const Kind kind) {
  constexpr bool kMomentum = Kind::momentum != Momentum::none, kKeeps = kMethod != Method::rvsm;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    T wi = w[i];
    T mi = kMomentum ? m[i] : T(0);
    T xi = kKeeps ? x[i] : T(0);
    const T v = argument<kMethod>(wi, xi);
    const T gap = Kind::pull ? gap_of<kMethod>(wi, v, pull.u(v, i), xi) : T(0);
    sgd_step(wi, mi, g[i], gap, pull.direction(wi, i), s, kind);
    w[i] = wi;
    if (kMomentum) m[i] = mi;
    if (kKeeps) x[i] = xi;
  }
}

template <class T, class Pull>
inline void prox_loop(T* __restrict w, int64_t n, const Pull pull) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) w[i] = pull.u(w[i], i);
}

template <class S, class T>
inline void load_tile(T* __restrict to, const S* __restrict from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = load(from[i]);
}

template <class S, class T>
inline void store_tile(S* __restrict to, const T* __restrict from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(to[i], from[i]);
}

template <Method kMethod, class Kind, class S, class T, class Pull>
void step_span(S* w, const S* g, S* m, S* x, int64_t n, const Step<T>& s, const Pull& pull, const Kind& kind) {
  constexpr bool kMomentum = Kind::momentum != Momentum::none, kKeeps = kMethod != Method::rvsm;
  if constexpr (kIsHalf<S>) {
    T wt[kTile], gt[kTile], mt[kTile], xt[kKeeps ? kTile : 1];
    for (int64_t i = 0; i < n; i += kTile) {
      const int64_t k = std::min(kTile, n - i);
      load_tile(wt, w + i, k);
      load_tile(gt, g + i, k);
      if (kMomentum) load_tile(mt, m + i, k);
      if (kKeeps) load_tile(xt, x + i, k);
      step_loop<kMethod>(wt, gt, mt, xt, k, s, pull.at(i), kind);
      store_tile(w + i, wt, k);
      if (kMomentum) store_tile(m + i, mt, k);
      if (kKeeps) store_tile(x + i, xt, k);
    }
  } else {
    step_loop<kMethod>(w, g, m, x, n, s, pull, kind);
  }
}

// Calls f(kind) with what the row's step does.
template <Method kMethod, class Pull, class F>
void with_kind(const Row& row, const F& f) {
  const auto with_decay = [&](auto momentum) {
    constexpr Momentum kMomentum = decltype(momentum)::value;
    if constexpr (kMethod != Method::rvsm)
      f(KeepKind<kMomentum, Pull::kLasso>{row.step.decay != 0});
    else if (row.step.decay != 0)
      f(StepKind<kMomentum, true, Pull::kPull, Pull::kLasso>{});
    else
      f(StepKind<kMomentum, false, Pull::kPull, Pull::kLasso>{});
  };
  switch (row.momentum) {
    case Momentum::plain:
      return with_decay(std::integral_constant<Momentum, Momentum::plain>{});
    case Momentum::nesterov:
      return with_decay(std::integral_constant<Momentum, Momentum::nesterov>{});
    default:
      return with_decay(std::integral_constant<Momentum, Momentum::none>{});
  }
}

template <class S, class Pull>
void prox_span(S* w, int64_t n, const Pull& pull) {
  if constexpr (kIsHalf<S>) {
    Arithmetic<S> wt[kTile];
    for (int64_t i = 0; i < n; i += kTile) {
      const int64_t k = std::min(kTile, n - i);
      load_tile(wt, w + i, k);
      prox_loop(wt, k, pull.at(i));
      store_tile(w + i, wt, k);
    }
  } else {
    prox_loop(w, n, pull);
  }
}

// ---- groups ----------------------------------------------------------------------------------------------------

template <class T>
struct Factors {
  T ratio[kSpan + kSpill];
  T length[kSpan + kSpill];
};

// n copies of a factor, n >= 1; up to kSpill elements behind them are overwritten as well. The groups of a 3x3 kernel
// are so short that a store of fixed length beats a loop of the right one.
template <class T>
inline void spread(T* to, int64_t n, T factor) {
  for (int64_t i = 0; i < n; i += kSpill)
    for (int64_t k = 0; k < kSpill; ++k) to[i + k] = factor;
}

// The factors of columns [c0, c1), at most kSpan of them, of groups with `inner` columns each.
// `lengths`: the norms for group lasso, or null.
template <Penalty kPenalty, class T>
void fill_factors(Factors<T>& f, const T* norms, const T* lengths, int64_t inner, int64_t c0, int64_t c1,
                  const Prox<T> prox) {
  const bool lasso = lengths != nullptr;
  if (inner == 1) {
    for (int64_t i = 0; i < c1 - c0; ++i) f.ratio[i] = shrink_ratio<kPenalty>(norms[c0 + i], prox);
    for (int64_t i = 0; i < c1 - c0 && lasso; ++i) f.length[i] = length_of(lengths[c0 + i]);
    return;
  }
  for (int64_t g = c0 / inner; g * inner < c1; ++g) {
    const int64_t from = std::max(c0, g * inner) - c0, to = std::min(c1, (g + 1) * inner) - c0;
    spread(f.ratio + from, to - from, shrink_ratio<kPenalty>(norms[g], prox));
    if (lasso) spread(f.length + from, to - from, length_of(lengths[g]));
  }
}

// Calls span(offset, length, pull) for the contiguous pieces of a block.
template <class T, class Span>
void for_spans(const Row& row, const Block& block, const Prox<T>& prox, bool lasso, const Span& span) {
  const GroupView& v = row.view;
  const int64_t columns = v.groups * v.inner;
  const T* norms = static_cast<const T*>(row.norms) + block.batch * v.groups;
  const T* lengths = lasso ? norms + (row.planes() - 1) * v.count() : nullptr;
  const auto start = [&](int64_t o, int64_t c) { return (block.batch * v.outer + o) * columns + c; };
  if (v.inner >= kLong) {
    for (int64_t o = block.o0; o < block.o1; ++o) {
      for (int64_t c = block.c0; c < block.c1;) {
        const T norm = norms[c / v.inner];
        const int64_t end = std::min(block.c1, (c / v.inner + 1) * v.inner);
        const T ratio =
            with_penalty(prox.penalty, [&](auto tag) { return shrink_ratio<decltype(tag)::value>(norm, prox); });
        if (lasso)
          span(start(o, c), end - c, LongGroupPull<true, T>{ratio, length_of(lengths[c / v.inner])});
        else
          span(start(o, c), end - c, LongGroupPull<false, T>{ratio, T(1)});
        c = end;
      }
    }
    return;
  }
  Factors<T> f;
  for (int64_t c = block.c0; c < block.c1; c += kSpan) {
    const int64_t end = std::min(block.c1, c + kSpan);
    with_penalty(prox.penalty,
                 [&](auto tag) { fill_factors<decltype(tag)::value>(f, norms, lengths, v.inner, c, end, prox); });
    for (int64_t o = block.o0; o < block.o1; ++o) {
      if (lasso)
        span(start(o, c), end - c, GroupPull<true, T>{f.ratio, f.length});
      else
        span(start(o, c), end - c, GroupPull<false, T>{f.ratio, f.length});
    }
  }
}

// ---- sums of squares -------------------------------------------------------------------------------------------

// What is summed: elements of w, or of w + dual as the step thresholds them. At an index in double precision.
template <class Storage>
struct Weights {
  using S = Storage;
  const S* w;
  double at(int64_t i) const { return double(load(w[i])); }
  Weights operator+(int64_t n) const { return {w + n}; }
};

template <class Storage>
struct WithDual {
  using S = Storage;
  const S *w, *dual;
  double at(int64_t i) const { return double(load(w[i]) + load(dual[i])); }
  WithDual operator+(int64_t n) const { return {w + n, dual + n}; }
};

// sum + x^2 in double: squares of float are exact, and the rounding of a long sum stays far below the ulp of a float
// norm. Because they are exact, a fused multiply-add gives the same bits where there is one.
template <class S>
inline double add_square(double sum, double x) {
#ifdef __FMA__
  if constexpr (!std::is_same_v<S, double>) return __builtin_fma(x, x, sum);
#endif
  return sum + x * x;
}

// Adds the squares of the next kLanes elements.
template <class Source>
inline void add_lanes(double* __restrict lane, const Source w) {
  for (int k = 0; k < kLanes; ++k) lane[k] = add_square<typename Source::S>(lane[k], w.at(k));
}

template <class Source>
double square_sum(const Source w, int64_t n) {
  // Named one by one, so that the compiler keeps them in registers.
  double a[kLanes] = {}, b[kLanes] = {}, c[kLanes] = {}, d[kLanes] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    add_lanes(a, w + i);
    add_lanes(b, w + i + kLanes);
    add_lanes(c, w + i + 2 * kLanes);
    add_lanes(d, w + i + 3 * kLanes);
  }
  for (; i + kLanes <= n; i += kLanes) add_lanes(a, w + i);
  for (int k = 0; i < n; ++i, ++k) a[k] = add_square<typename Source::S>(a[k], w.at(i));
  double sum = 0;
  for (int k = 0; k < kLanes; ++k) sum += (a[k] + b[k]) + (c[k] + d[k]);
  return sum;
}

// sums[i] += the squares of kRows elements one under the other, in their order.
template <int kRows, class Source>
inline void add_squares(double* __restrict sums, const Source w, int64_t stride, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    double sum = sums[i];
    for (int r = 0; r < kRows; ++r) sum = add_square<typename Source::S>(sum, w.at(r * stride + i));
    sums[i] = sum;
  }
}

// The processor's own prefetcher stops at the end of a row's piece: ask for the next one.
template <class S>
inline void prefetch(const Weights<S> p, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(S);
  for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(p.w + i);
}

template <class S>
inline void prefetch(const WithDual<S> p, int64_t n) {
  prefetch(Weights<S>{p.w}, n);
  prefetch(Weights<S>{p.dual}, n);
}

// Calls emit(group, sum) for every group that the block touches.
template <class Source, class Emit>
void block_squares(const Source all, const Row& row, const Block& block, const Emit& emit) {
  const GroupView& v = row.view;
  const int64_t columns = v.groups * v.inner;
  const Source base = all + block.batch * v.outer * columns;
  if (v.inner >= kLanes && (block.o1 - block.o0 == 1 || v.inner >= kSums / 2)) {
    for (int64_t c = block.c0; c < block.c1;) {
      const int64_t g = c / v.inner, end = std::min(block.c1, (g + 1) * v.inner);
      double sum = 0;
      for (int64_t o = block.o0; o < block.o1; ++o) sum += square_sum(base + (o * columns + c), end - c);
      emit(g, sum);
      c = end;
    }
    return;
  }
  // Short groups side by side: a sum per column, folded into groups at the end.
  const int64_t width = kSums / v.inner * v.inner;
  double sums[kSums];
  for (int64_t c = block.c0; c < block.c1; c += width) {
    const int64_t n = std::min(width, block.c1 - c);
    std::fill(sums, sums + n, 0.0);
    int64_t o = block.o0;
    for (; o + kAhead <= block.o1; o += kAhead) {
      const Source rows = base + (o * columns + c);
      const int64_t ahead = o + 2 * kAhead <= block.o1 ? kAhead : 0;
      for (int64_t i = 0; i < n; i += kPiece) {
        const int64_t m = std::min(kPiece, n - i);
        for (int64_t r = ahead; r < 2 * ahead; ++r) prefetch(rows + r * columns + i, m);
        add_squares<kAhead>(sums + i, rows + i, columns, m);
      }
    }
    for (; o < block.o1; ++o) add_squares<1>(sums, base + (o * columns + c), columns, n);
    for (int64_t i = 0; i < n;) {
      const int64_t g = (c + i) / v.inner, end = std::min(n, (g + 1) * v.inner - c);
      double sum = 0;
      for (; i < end; ++i) sum += sums[i];
      emit(g, sum);
    }
  }
}

// ---- the entries of the table ----------------------------------------------------------------------------------

template <Method kMethod, class S>
void step_block(const Row& row, const Block& block, const Step<Arithmetic<S>>& s) {
  using T = Arithmetic<S>;
  S* const w = static_cast<S*>(row.w);
  const S* const g = static_cast<const S*>(row.g);
  S* const m = static_cast<S*>(row.m);
  S* const x = kMethod == Method::rvsm ? nullptr : static_cast<S*>(row.kept);
  if (row.grouped) {
    for_spans(row, block, s.prox, s.lasso != T(0), [&](int64_t at, int64_t n, const auto& pull) {
      with_kind<kMethod, std::decay_t<decltype(pull)>>(
          row, [&](auto kind) { step_span<kMethod>(w + at, g + at, offset(m, at), offset(x, at), n, s, pull, kind); });
    });
    return;
  }
  with_penalty(s.prox.penalty, [&](auto tag) {
    constexpr Penalty kPenalty = decltype(tag)::value;
    using Pull = ElementPull<kPenalty, T>;
    // A method without a penalty keeps nothing.
    if constexpr (kMethod == Method::rvsm || kPenalty != Penalty::none)
      with_kind<kMethod, Pull>(row, [&](auto kind) {
        const int64_t at = block.c0, n = block.c1 - block.c0;
        step_span<kMethod>(w + at, g + at, offset(m, at), offset(x, at), n, s, Pull{s.prox}, kind);
      });
  });
}

// Apart from the others: a thousand tiny rows notice every instruction.
template <class S>
__attribute__((noinline)) void step_beside(const Row& row, const Block& block, Step<Arithmetic<S>> s) {
  if (row.topk) s.prox.cut = *static_cast<const Arithmetic<S>*>(row.cut);
  with_method(row.method, [&](auto method) { step_block<decltype(method)::value, S>(row, block, s); });
}

template <class S>
void run_step(const Row& row, const Block& block) {
  const Step<Arithmetic<S>> s = narrow<Arithmetic<S>>(row.step);
  if (row.method != Method::rvsm || row.topk)
    step_beside<S>(row, block, s);
  else
    step_block<Method::rvsm, S>(row, block, s);
}

template <class S>
void run_prox(const Row& row, const Block& block) {
  using T = Arithmetic<S>;
  const Prox<T> prox = narrow<T>(row.step.prox);
  S* const w = static_cast<S*>(row.w);
  if (row.grouped) {
    for_spans(row, block, prox, false, [&](int64_t at, int64_t n, const auto& pull) { prox_span(w + at, n, pull); });
  } else {
    with_penalty(prox.penalty, [&](auto tag) {
      prox_span(w + block.c0, block.c1 - block.c0, ElementPull<decltype(tag)::value, T>{prox});
    });
  }
}

template <class S>
double run_penalty(const Row& row, const Block& block) {
  using T = Arithmetic<S>;
  const Prox<T> prox = narrow<T>(row.step.prox);
  const int64_t from = row.grouped ? 0 : block.c0, to = row.grouped ? row.view.count() : block.c1;
  return with_penalty(prox.penalty, [&](auto tag) {
    constexpr Penalty kPenalty = decltype(tag)::value;
    double lane[kLanes] = {};
    for (int64_t i = from; i < to; i += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, to - i);
      for (int64_t k = 0; k < n; ++k) {
        const T r = row.grouped ? static_cast<const T*>(row.norms)[i + k]
                                : std::fabs(load(static_cast<const S*>(row.w)[i + k]));
        lane[k] += penalty_term<kPenalty>(r, prox, row.lam, row.beta);
      }
    }
    double sum = 0;
    for (const double x : lane) sum += x;
    return sum;
  });
}

void step(const Row& row, const Block& block) {
  with_storage(row.dtype, [&](auto s) { run_step<decltype(s)>(row, block); });
}

void prox(const Row& row, const Block& block) {
  with_storage(row.dtype, [&](auto s) { run_prox<decltype(s)>(row, block); });
}

double penalty(const Row& row, const Block& block) {
  return with_storage(row.dtype, [&](auto s) { return run_penalty<decltype(s)>(row, block); });
}

template <class Source>
void plane_squares(const Source source, const Row& row, const Block& block, int64_t part, int plane) {
  using T = Arithmetic<typename Source::S>;
  const int64_t groups = row.view.count(), first = block.batch * row.view.groups;
  if (row.parts > 1) {
    double* sums = row.partials + (plane * row.parts + part) * groups + first;
    block_squares(source, row, block, [&](int64_t g, double sum) { sums[g] = sum; });
  } else {
    T* norms = static_cast<T*>(row.norms) + plane * groups + first;
    block_squares(source, row, block, [&](int64_t g, double sum) { norms[g] = T(std::sqrt(sum)); });
  }
}

void squares(const Row& row, const Block& block, int64_t part) {
  with_storage(row.dtype, [&](auto s) {
    using S = decltype(s);
    const Weights<S> weights{static_cast<const S*>(row.w)};
    const bool dual = row.method == Method::admm;
    if (dual) plane_squares(WithDual<S>{weights.w, static_cast<const S*>(row.kept)}, row, block, part, 0);
    if (!dual || row.planes() == 2) plane_squares(weights, row, block, part, row.planes() - 1);
  });
}

void join(const Row& row) {
  const int64_t groups = row.view.count();
  with_storage(row.dtype, [&](auto s) {
    using T = Arithmetic<decltype(s)>;
    for (int64_t plane = 0; plane < row.planes(); ++plane) {
      const double* partials = row.partials + plane * row.parts * groups;
      for (int64_t g = 0; g < groups; ++g) {
        double sum = 0;
        for (int64_t p = 0; p < row.parts; ++p) sum += partials[p * groups + g];
        static_cast<T*>(row.norms)[plane * groups + g] = T(std::sqrt(sum));
      }
    }
  });
}

}  // namespace

extern const Kernels RVSM_KERNELS;
const Kernels RVSM_KERNELS = {RVSM_STRING(RVSM_ISA), step, prox, squares, join, penalty};

}  // namespace rvsm::cpu
