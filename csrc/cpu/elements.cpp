// Steps, prox and sums of the CPU engine, element by element. Compiled once per instruction set, with
// RVSM_ISA naming it; the loops are plain, the compiler vectorises them. Floating-point contraction is off, so every
// instruction set gives the same bits.

#include <algorithm>
#include <type_traits>

#include "engine.h"
#include "isa.h"
#include "sums.h"
#include "tiles.h"
#include "windows.h"

namespace rvsm::cpu {

namespace {

// Columns whose factors are held at a time: long pieces of consecutive memory, and still in the cache.
constexpr int64_t kSpan = kColumns;
// Elements behind the factors that may be written (see spread).
constexpr int64_t kSpill = 16;
// Groups with this many consecutive elements need no factor per column.
constexpr int64_t kLong = 256;

template <class S>
constexpr bool kIsHalf = sizeof(S) == 2;

// ---- elements of one contiguous span ---------------------------------------------------------------------------

// The factors of an element's group: u = w * ratio, w_G / ||w_G|| = w / length (a quotient, because 1 / length of a
// subnormal norm is Inf). GroupPull, for short groups, has a factor per column; LongGroupPull has the same for all.
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

// Whether u was made before the loop, not of the v that it has.
template <class Pull>
constexpr bool kInMemory = false;
template <class T>
constexpr bool kInMemory<WindowPull<T>> = true;

// The numbers of a step in the type of the arithmetic.
template <class Base, class T>
struct Numbers {
  Split<T> split;
  typename Base::template Numbers<T> base;
};

// How many states a step has: the base's, then the method's.
template <class Base, Method kMethod>
constexpr int kStatesOf = Base::kStates + method_states(kMethod);

// A length for an array, which C++ does not allow to be 0.
constexpr int at_least_one(int n) { return n > 0 ? n : 1; }

template <class Base, Method kMethod, class T, class Pull, class On>
inline void step_loop(T* __restrict w, T* __restrict g, T* const* states, int64_t n, const Numbers<Base, T> numbers,
                      const Pull pull, const On on) {
  constexpr int kStates = kStatesOf<Base, kMethod>;
  T* state[at_least_one(kStates)];
  for (int k = 0; k < kStates; ++k) state[k] = states[k];
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    T wi = w[i];
    T si[kStates + 1] = {};
    const bool held = is_held(wi, numbers.split);
    for (int k = 0; k < kStates; ++k) si[k] = unless_held(held, state[k][i]);
    T& of_method = si[Base::kStates];
    const T v = thresholded<kMethod>(wi, of_method);
    const T u = kInMemory<Pull> ? unless_held(held, pull.u(v, i)) : pull.u(v, i);
    const T gap = Pull::kPull ? gap_of<kMethod>(wi, v, u, of_method) : T(0);
    T d = Base::kReadsGrad ? unless_held(held, g[i]) * numbers.split.grad : T(0);
    split_step(wi, d, gap, pull.direction(wi, i), numbers.split, KnownSplit<Pull::kPull, Pull::kLasso>{});
    Base::step(wi, si, d, numbers.base, on);
    w[i] = wi;
    if (Base::kWritesGrad) g[i] = d;
    for (int k = 0; k < kStates; ++k) state[k][i] = si[k];
  }
}

template <class T, class Pull>
inline void prox_loop(T* __restrict w, int64_t n, const Pull pull) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) w[i] = pull.u(w[i], i);
}

// Elements [at, at + n) of a tensor.
template <class Base, Method kMethod, class Pull, class On>
void mixed_span(const TensorArgs& args, int64_t at, int64_t n, const Numbers<Base, float>& numbers, const Pull& pull,
                const On& on) {
  constexpr int kStates = kStatesOf<Base, kMethod>;
  const Precision& p = args.precision;
  float wt[kTile], gt[kTile], st[at_least_one(kStates)][kTile];
  for (int64_t i = 0; i < n; i += kTile) {
    const int64_t m = std::min(kTile, n - i), from = at + i;
    float* const w = tile_of(args.w, args.dtype, from, wt);
    float* const g = Base::kReadsGrad ? tile_of(args.g, p.grad, from, gt) : gt;
    float* states[at_least_one(kStates)];
    for (int k = 0; k < kStates; ++k) {
      states[k] = tile_of(args.state[k], p.states[k], from, st[k]);
      if (states[k] == st[k]) load_plane(st[k], args.state[k], p.states[k], from, m);
    }
    if (w == wt) load_weights(wt, args, from, m);
    if (Base::kReadsGrad && g == gt) load_plane(gt, args.g, p.grad, from, m);
    step_loop<Base, kMethod>(w, g, states, m, numbers, pull.at(i), on);
    if (w == wt) store_weights(args, wt, from, m);
    if (Base::kWritesGrad && g == gt) store_plane(args.g, gt, p.grad, from, m);
    for (int k = 0; k < kStates; ++k)
      if (states[k] == st[k]) store_plane(args.state[k], st[k], p.states[k], from, m);
  }
}

template <class S, class Base, Method kMethod, class Pull, class On>
void plain_span(const TensorArgs& args, int64_t at, int64_t n, const Numbers<Base, Opmath<S>>& numbers,
                const Pull& pull, const On& on) {
  using T = Opmath<S>;
  constexpr int kStates = kStatesOf<Base, kMethod>;
  S* const w = static_cast<S*>(args.w) + at;
  S* const g = Base::kReadsGrad ? static_cast<S*>(args.g) + at : nullptr;
  S* states[at_least_one(kStates)];
  for (int k = 0; k < kStates; ++k) states[k] = static_cast<S*>(args.state[k]) + at;
  if constexpr (kIsHalf<S>) {
    T wt[kTile], gt[kTile], st[at_least_one(kStates)][kTile];
    T* tiles[at_least_one(kStates)];
    for (int k = 0; k < kStates; ++k) tiles[k] = st[k];
    for (int64_t i = 0; i < n; i += kTile) {
      const int64_t m = std::min(kTile, n - i);
      load_tile(wt, w + i, m);
      if (Base::kReadsGrad) load_tile(gt, g + i, m);
      for (int k = 0; k < kStates; ++k) load_tile(st[k], states[k] + i, m);
      step_loop<Base, kMethod>(wt, gt, tiles, m, numbers, pull.at(i), on);
      store_tile(w + i, wt, m);
      if (Base::kWritesGrad) store_tile(g + i, gt, m);
      for (int k = 0; k < kStates; ++k) store_tile(states[k] + i, st[k], m);
    }
  } else {
    step_loop<Base, kMethod>(w, g, states, n, numbers, pull, on);
  }
}

// ---- statistics ------------------------------------------------------------------------------------------------

// The penalty whose g is summed element by element; that of groups is summed over their norms.
template <class Pull>
constexpr Penalty kSummed = Penalty::none;
template <Penalty kPenalty, class T>
constexpr Penalty kSummed<ElementPull<kPenalty, T>> = kPenalty;

// Adds a tile as the step will find it.
template <Method kMethod, class T, class Pull>
inline void measure_tile(Sums& sums, const T* __restrict w, const T* __restrict g, const T* __restrict state, int64_t n,
                         const Split<T> split, const Pull pull) {
  add_elements<kSummed<Pull>, true>(sums, n, split.prox.a, [&](int64_t i, T& wi, T& ui, T& di) {
    wi = w[i];
    T moved = wi, of_method = kMethod == Method::rvsm ? T(0) : state[i];
    const T v = thresholded<kMethod>(wi, of_method);
    ui = Pull::kPull ? pull.u(v, i) : wi;
    const T gap = Pull::kPull ? gap_of<kMethod>(wi, v, ui, of_method) : T(0);
    di = g[i] * split.grad;
    split_step(moved, di, gap, pull.direction(wi, i), split, KnownSplit<Pull::kPull, Pull::kLasso>{});
  });
}

// A tile of an array of any type: its own memory where that has the type of the arithmetic, else `tile`, filled.
inline const float* read_tile(const void* memory, Dtype dtype, int64_t at, int64_t n, float* tile) {
  if (dtype == Dtype::f32) return static_cast<const float*>(memory) + at;
  load_plane(tile, memory, dtype, at, n);
  return tile;
}
inline const double* read_tile(const void* memory, Dtype, int64_t at, int64_t, double*) {
  return static_cast<const double*>(memory) + at;
}

inline const float* read_weights(const TensorArgs& args, int64_t at, int64_t n, float* tile) {
  if (args.dtype == Dtype::f32) return static_cast<const float*>(args.w) + at;
  load_weights(tile, args, at, n);
  return tile;
}
inline const double* read_weights(const TensorArgs& args, int64_t at, int64_t, double*) {
  return static_cast<const double*>(args.w) + at;
}

// Adds elements [at, at + n) of a tensor as their step will find them.
template <Method kMethod, class T, class Pull>
__attribute__((noinline)) void measure_span(Sums& sums, const TensorArgs& args, int64_t at, int64_t n,
                                            const Split<T>& split, const Pull& pull) {
  const Precision& p = args.precision;
  T wt[kTile], gt[kTile], st[kTile];
  for (int64_t i = 0; i < n; i += kTile) {
    const int64_t m = std::min(kTile, n - i), from = at + i;
    const T* const w = read_weights(args, from, m, wt);
    const T* const g = read_tile(args.g, p.mixed ? p.grad : args.dtype, from, m, gt);
    const T* const state =
        kMethod == Method::rvsm
            ? w
            : read_tile(args.method_state(), p.mixed ? p.states[args.base.states] : args.dtype, from, m, st);
    measure_tile<kMethod>(sums, w, g, state, m, split, pull.at(i));
  }
}

// Adds magnitudes of one kind, weights or norms of groups, as their prox will find them.
template <Penalty kPenalty, class T>
void measure_magnitudes(Sums& sums, const T* r, int64_t n, const Prox<T>& prox) {
  const ElementPull<kPenalty, T> pull{prox};
  add_elements<kPenalty, false>(sums, n, prox.a, [&](int64_t i, T& ri, T& si, T&) {
    ri = r[i];
    si = pull.u(ri, i);
  });
}

// Adds the groups that begin in a block, from their norms.
template <class T>
__attribute__((noinline)) void measure_groups(Sums& sums, const TensorArgs& args, const Block& block,
                                              const Prox<T>& prox) {
  const GroupView& v = args.view;
  if (block.o0 != 0) return;
  const int64_t begin = ceil_div(block.c0, v.inner), end = ceil_div(block.c1, v.inner);
  const T* const norms = static_cast<const T*>(args.factor_norms) + block.batch * v.groups;
  with_penalty(prox.penalty, [&](auto tag) {
    constexpr Penalty kPenalty = decltype(tag)::value;
    Sums of_groups;
    if (!args.topk) measure_magnitudes<kPenalty>(of_groups, norms + begin, end - begin, prox);
    sums.value += of_groups.value;
    int64_t zeros = 0;
    for (int64_t i = begin; i < end; ++i) zeros += double(shrink<kPenalty>(norms[i], prox)) < kZeroNorm;
    sums.zero_groups += zeros;
  });
}

// The step of elements [at, at + n) of a tensor, and their statistics where `sums` is not null: those of a piece are
// made before its step, which finds in the cache what they have read.
template <class S, class Base, Method kMethod, class Pull, class On>
inline void step_span(const TensorArgs& args, int64_t at, int64_t n, const Numbers<Base, Opmath<S>>& numbers,
                      const Pull& pull, const On& on, Sums* sums) {
  for (int64_t i = 0; i < n; i += kPiece) {
    const int64_t m = std::min(kPiece, n - i);
    if (n > 2 * kPiece) prefetch_planes(args, Base::kReadsGrad || sums != nullptr, at + i, m);
    if (sums != nullptr) measure_span<kMethod>(*sums, args, at + i, m, numbers.split, pull.at(i));
    if constexpr (std::is_same_v<S, Mixed>)
      mixed_span<Base, kMethod>(args, at + i, m, numbers, pull.at(i), on);
    else
      plain_span<S, Base, kMethod>(args, at + i, m, numbers, pull.at(i), on);
  }
}

// Calls f(on) with the switches of the base: compile-time constants for the method that most steps have, run-time
// values for the others, so that fewer combinations are compiled.
template <class Base, Method kMethod, class F>
inline __attribute__((always_inline)) void with_switches(const TensorArgs& args, const F& f) {
  const double* const n = base_numbers(args.numbers);
  if constexpr (kMethod == Method::rvsm)
    Base::with_switches(n, f);
  else
    f(Base::switches(n));
}

template <class S, class Pull>
void prox_span(S* w, int64_t n, const Pull& pull) {
  if constexpr (kIsHalf<S>) {
    Opmath<S> wt[kTile];
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
void for_spans(const TensorArgs& args, const Block& block, const Prox<T>& prox, bool lasso, const Span& span) {
  const GroupView& v = args.view;
  const int64_t columns = v.groups * v.inner;
  const T* norms = static_cast<const T*>(args.factor_norms) + block.batch * v.groups;
  const T* lengths = lasso ? norms + (args.norm_rows() - 1) * v.count() : nullptr;
  const auto start = [&](int64_t o, int64_t c) { return (block.batch * v.outer + o) * columns + c; };
  if (v.inner >= kLong) {
    for (int64_t o = block.o0; o < block.o1; ++o) {
      for (int64_t c = block.c0; c < block.c1;) {
        const T norm = norms[c / v.inner];
        const int64_t end = std::min(block.c1, (c / v.inner + 1) * v.inner);
        const T ratio = shrink_ratio(norm, prox);
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

// ---- the functions of ElementKernels ---------------------------------------------------------------------------

template <class S, class Base, Method kMethod>
void step_block(const TensorArgs& args, const Block& block, const Numbers<Base, Opmath<S>>& numbers, Sums* sums) {
  using T = Opmath<S>;
  const Split<T>& split = numbers.split;
  if (sums != nullptr && args.grouped) measure_groups(*sums, args, block, split.prox);
  with_switches<Base, kMethod>(args, [&](auto on) {
    if (args.grouped) {
      for_spans(args, block, split.prox, split.lasso != T(0), [&](int64_t at, int64_t n, const auto& pull) {
        step_span<S, Base, kMethod>(args, at, n, numbers, pull, on, sums);
      });
      return;
    }
    with_penalty(split.prox.penalty, [&](auto tag) {
      constexpr Penalty kPenalty = decltype(tag)::value;
      // Without a penalty the method is rvsm (StepOptions.method in Python).
      if constexpr (kMethod == Method::rvsm || kPenalty != Penalty::none)
        step_span<S, Base, kMethod>(args, block.c0, block.c1 - block.c0, numbers, ElementPull<kPenalty, T>{split.prox},
                                    on, sums);
    });
  });
}

// A function of its own, so that the usual step stays short: with a thousand tiny tensors every instruction counts.
template <class S, class Base>
__attribute__((noinline)) void special_step(const TensorArgs& args, const Block& block,
                                            Numbers<Base, Opmath<S>> numbers, Sums* sums) {
  if (args.topk) numbers.split.prox.cut = *static_cast<const Opmath<S>*>(args.cut);
  with_method(args.method,
              [&](auto method) { step_block<S, Base, decltype(method)::value>(args, block, numbers, sums); });
}

// N:M sparsity, for every method. Switches of the base are run-time values, so that fewer combinations are compiled.
template <class S, class Base>
__attribute__((noinline)) void window_step(const TensorArgs& args, const Block& block,
                                           const Numbers<Base, Opmath<S>>& numbers, Sums* sums) {
  with_method(args.method, [&](auto method) {
    constexpr Method kMethod = decltype(method)::value;
    const auto on = Base::switches(base_numbers(args.numbers));
    for_windows<S, kMethod, Opmath<S>>(args, block, [&](int64_t at, int64_t n, const auto& pull) {
      step_span<S, Base, kMethod>(args, at, n, numbers, pull, on, sums);
    });
  });
}

template <class S>
void run_step(const TensorArgs& args, const Block& block, Sums* sums) {
  using T = Opmath<S>;
  with_base(args.base, [&](auto base) {
    using Base = decltype(base);
    const Numbers<Base, T> numbers{split_of<T>(args.numbers, args.scale),
                                   Base::template numbers<T>(base_numbers(args.numbers))};
    if (args.windows.on())
      window_step<S, Base>(args, block, numbers, sums);
    else if (args.method != Method::rvsm || args.topk)
      special_step<S, Base>(args, block, numbers, sums);
    else
      step_block<S, Base, Method::rvsm>(args, block, numbers, sums);
  });
}

template <class S>
void run_prox(const TensorArgs& args, const Block& block) {
  using T = Opmath<S>;
  const Prox<T> prox = prox_of<T>(args.numbers);
  S* const w = static_cast<S*>(args.w);
  if (args.grouped) {
    for_spans(args, block, prox, false, [&](int64_t at, int64_t n, const auto& pull) { prox_span(w + at, n, pull); });
  } else {
    with_penalty(prox.penalty, [&](auto tag) {
      prox_span(w + block.c0, block.c1 - block.c0, ElementPull<decltype(tag)::value, T>{prox});
    });
  }
}

// Adds the weights of a span as their prox will find them.
template <class S, class Pull>
void measure_weights(Sums& sums, const TensorArgs& args, int64_t at, int64_t n, const Prox<Opmath<S>>& prox,
                     const Pull& pull) {
  using T = Opmath<S>;
  T wt[kPiece];
  for (int64_t i = 0; i < n; i += kPiece) {
    const int64_t m = std::min(kPiece, n - i);
    if (n > 2 * kPiece) prefetch_weights(args, at + i, m);
    const T* const w = read_weights(args, at + i, m, wt);
    const Pull part = pull.at(i);
    add_elements<kSummed<Pull>, false>(sums, m, prox.a, [&](int64_t k, T& wk, T& uk, T&) {
      wk = w[k];
      uk = part.u(wk, k);
    });
  }
}

// Action::penalty: of groups the norms say all. Action::zeros: the elements of groups are counted as well.
template <class S>
void run_measure(const TensorArgs& args, const Block& block, Sums& sums) {
  using T = Opmath<S>;
  Prox<T> prox = prox_of<T>(args.numbers);
  if (args.topk) prox.cut = *static_cast<const T*>(args.cut);
  if (!args.grouped) {
    with_penalty(prox.penalty, [&](auto tag) {
      measure_weights<S>(sums, args, block.c0, block.c1 - block.c0, prox, ElementPull<decltype(tag)::value, T>{prox});
    });
    return;
  }
  if (args.counts_zeros) {
    measure_groups(sums, args, block, prox);
    for_spans(args, block, prox, false,
              [&](int64_t at, int64_t n, const auto& pull) { measure_weights<S>(sums, args, at, n, prox, pull); });
    return;
  }
  const int64_t groups = args.view.count();
  with_penalty(prox.penalty, [&](auto tag) {
    measure_magnitudes<decltype(tag)::value>(sums, static_cast<const T*>(args.factor_norms), groups, prox);
  });
}

void step(const TensorArgs& args, const Block& block, Sums* sums) {
  if (args.precision.mixed) return run_step<Mixed>(args, block, sums);
  with_storage(args.dtype, [&](auto s) { run_step<decltype(s)>(args, block, sums); });
}

void prox(const TensorArgs& args, const Block& block) {
  with_storage(args.dtype, [&](auto s) { run_prox<decltype(s)>(args, block); });
}

void measure(const TensorArgs& args, const Block& block, Sums& sums) {
  with_storage(args.dtype, [&](auto s) { run_measure<decltype(s)>(args, block, sums); });
}

}  // namespace

extern const ElementKernels RVSM_ELEMENT_KERNELS;
const ElementKernels RVSM_ELEMENT_KERNELS = {RVSM_STRING(RVSM_ISA), step, prox, measure};

}  // namespace rvsm::cpu
