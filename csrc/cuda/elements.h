// What one thread of the step's, the prox's and the penalty's kernels does: load, arithmetic, store. For host and
// device: host_kernels.cpp runs these very lines over memory of the host.
#pragma once

#include <type_traits>

#include "../math/windows.h"
#include "table.h"

namespace rvsm::cuda {

// ---- u of one element -----------------------------------------------------------------------------------------------

// A pull gives u and unit = w_G / ||w_G|| of an element. pull.from(at) is the pull of the elements from offset `at` on
// (a vector, or a single element); its call (v, w, k, u, unit) writes u and unit of element at + k, where v is what the
// method thresholds.

// Without groups. The penalty is known at compile time, so that a block looks at it once, not for each element.
template <Penalty kPenalty, class T>
struct ElementPull {
  static constexpr bool kMayLasso = false;
  const Prox<T>& prox;
  RVSM_HD_MEMBER bool pulls(const Prox<T>&) const { return kPenalty != Penalty::none; }
  RVSM_HD_MEMBER ElementPull from(uint32_t) const { return *this; }
  RVSM_HD_MEMBER void operator()(T v, T, uint32_t, T& u, T& unit) const {
    u = std::copysign(shrink<kPenalty>(std::fabs(v), prox), v);
    unit = T(0);
  }
};

// Groups: u = w * ratio, w_G / ||w_G|| = w / length, by factors that a launch before this one has made.
template <bool kLasso, class T>
struct GroupPull {
  static constexpr bool kMayLasso = kLasso;
  // In float32, without a lasso, there is a penalty: see with_pull.
  RVSM_HD_MEMBER bool pulls(const Prox<T>& prox) const {
    return (!kLasso && sizeof(T) == 4) || prox.penalty != Penalty::none;
  }
  const FactorPlace& factors;

  struct Element {
    T ratio, length;
    RVSM_HD_MEMBER void operator()(T v, T w, uint32_t, T& u, T& unit) const {
      u = v * ratio;
      unit = kLasso ? w / length : T(0);
    }
  };
  RVSM_HD_MEMBER Element element(uint32_t group) const {
    return {static_cast<const T*>(factors.ratio)[group], kLasso ? static_cast<const T*>(factors.length)[group] : T(1)};
  }
  struct FromPlace {
    const GroupPull& pull;
    uint32_t at;
    RVSM_HD_MEMBER void operator()(T v, T w, uint32_t k, T& u, T& unit) const {
      pull.element(pull.factors.group(at + k))(v, w, k, u, unit);
    }
  };
  RVSM_HD_MEMBER FromPlace from(uint32_t at) const { return {*this, at}; }

  // The elements of a vector, whose groups need less arithmetic together.
  struct OfVector {
    const GroupPull& pull;
    FactorPlace::Following groups;
    RVSM_HD_MEMBER void operator()(T v, T w, uint32_t k, T& u, T& unit) const {
      pull.element(groups(k))(v, w, k, u, unit);
    }
  };
  template <int kN>
  RVSM_HD_MEMBER OfVector of_vector(uint32_t at) const {
    static_assert(kN <= kMostFollowing);
    return {*this, factors.following(at)};
  }
};

// N:M sparsity: the bits of the elements that survive, which a launch before this one has made.
template <class T>
struct KeptPull {
  static constexpr bool kMayLasso = false;
  const uint8_t* bits;
  bool on;  // else u = v
  uint32_t at;
  RVSM_HD_MEMBER bool pulls(const Prox<T>& prox) const { return prox.penalty != Penalty::none; }
  RVSM_HD_MEMBER KeptPull from(uint32_t place) const { return {bits, on, place}; }
  RVSM_HD_MEMBER void operator()(T v, T, uint32_t k, T& u, T& unit) const {
    const uint32_t place = at + k;
    u = !on || (bits[place / 8] >> (place % 8) & 1) != 0 ? v : T(0);
    unit = T(0);
  }
};

// Elements of the longest window that a thread looks for in its registers.
constexpr int kMostInVectors = 4;

// N:M sparsity where each window is inside a vector: `window` is 2 or 4, and the tensor has no single elements.
template <class T>
struct VectorPull {
  static constexpr bool kMayLasso = false;
  int keep, window;
  uint32_t kept;  // bits
  RVSM_HD_MEMBER bool pulls(const Prox<T>&) const { return true; }
  RVSM_HD_MEMBER VectorPull from(uint32_t) const { return *this; }
  RVSM_HD_MEMBER void operator()(T v, T, uint32_t k, T& u, T& unit) const {
    u = (kept >> k & 1) != 0 ? v : T(0);
    unit = T(0);
  }
  // The pull of a vector of kN elements, of which v(k) is what the method thresholds.
  template <int kN, class V>
  RVSM_HD_MEMBER VectorPull over(const V& v) const {
    constexpr int kPart = kN < kMostInVectors ? kN : kMostInVectors;
    uint32_t survive = 0;
    RVSM_UNROLL
    for (int first = 0; first < kN; first += kPart) {
      Key<T> keys[kPart];
      RVSM_UNROLL
      for (int k = 0; k < kPart; ++k) keys[k] = key_of(v(first + k));
      RVSM_UNROLL
      for (int k = 0; k < kPart; ++k) {
        int before = 0;
        RVSM_UNROLL
        for (int j = 0; j < kPart; ++j)  // of the same window where the numbers differ in their low bits alone
          if (j != k) before += int((j ^ k) < window) & int(stands_before(keys[j], keys[k], j < k));
        survive |= uint32_t(before < keep || keys[k] > kInfinityKey<T>) << (first + k);
      }
      RVSM_KEEP_ORDER();
    }
    return {keep, window, survive};
  }
};

template <class Pull>
constexpr bool kOverVectors = false;
template <class T>
constexpr bool kOverVectors<VectorPull<T>> = true;

// With a lasso the division of each element is what costs, and the registers of both are too many; so they are in
// double precision, whose vectors have two elements.
template <class Pull>
constexpr bool kInGroups = false;
template <>
inline constexpr bool kInGroups<GroupPull<false, float>> = true;

// The pull of a vector at a place; see VectorPull::over.
template <int kN, class Pull, class V>
RVSM_HD auto pull_of_vector(const Pull& pull, uint32_t at, const V& v) {
  if constexpr (kOverVectors<Pull>)
    return pull.template over<kN>(v);
  else if constexpr (kInGroups<Pull>)
    return pull.template of_vector<kN>(at);
  else
    return pull.from(at);
}

// The span as that pull takes it: in single elements where a vector may hold more than a row of groups.
template <int kN, class Pull>
RVSM_HD Span span_of_pull(Span span, const Pull& pull) {
  if constexpr (kInGroups<Pull>) span.vectors = span.vectors && pull.factors.columns >= uint32_t(kN);
  return span;
}

// Calls f(record, pull) with the record and the pull that belong to an entry's slot. kCut: a record may have a cut.
template <class T, class Base, bool kCut, class F>
RVSM_HD void with_pull(const Table& t, uint16_t slot, const F& f) {
  if (slot & kGrouped) {
    const FactorPlace& factors = slot_of<FactorPlace>(t, slot & ~kGrouped);
    const Record<T, Base>& record = slot_of<Record<T, Base>>(t, factors.record);
    if (record.lasso) return f(record, GroupPull<true, T>{factors});
    if (sizeof(T) == 8 || record.split.prox.penalty != Penalty::none) return f(record, GroupPull<false, T>{factors});
    return f(record, ElementPull<Penalty::none, T>{record.split.prox});
  }
  const Record<T, Base>& record = slot_of<Record<T, Base>>(t, slot);
  if (kCut && record.keep != 0) {
    if (record.cut == nullptr) return f(record, VectorPull<T>{record.keep, record.window, 0});
    return f(record, KeptPull<T>{static_cast<const uint8_t*>(record.cut), true, 0});
  }
  if (kCut && record.cut != nullptr) {
    Prox<T> prox = record.split.prox;
    prox.cut = *static_cast<const T*>(record.cut);
    return f(record, ElementPull<Penalty::l0, T>{prox});
  }
  with_penalty(record.split.prox.penalty,
               [&](auto tag) { f(record, ElementPull<decltype(tag)::value, T>{record.split.prox}); });
}

// ---- the step -------------------------------------------------------------------------------------------------------

// Where a block works.
template <int kStates>
struct Place {
  const TableEntry<kStates>& entry;
  Span span;
  int index;  // of the entry
};

template <class S, int kStates>
RVSM_HD Place<kStates> place_of(const Table& t, uint32_t block) {
  const TableEntry<kStates>* const entries = entries_of<kStates>(t);
  const int index = find(entries, int(t.entries), block);
  const TableEntry<kStates>& e = entries[index];
  const uint32_t end = index + 1 < int(t.entries) ? entries[index + 1].first : t.blocks;
  return {e, span_of<S>(e, block - e.first, end - e.first), index};
}

template <class T>
RVSM_HD T scale_of(const Table& t) {
  return t.grad_scale != nullptr ? reciprocal(T(*t.grad_scale)) : T(1);
}

// thresholded() and gap_of() for a method that is known only at run time, the same for all threads of a block.
// kHasState: the method has a state; without one it can only be rvsm, and the branches are compiled away.
template <bool kHasState, class T>
RVSM_HD T run_thresholded(Method method, T w, T state) {
  return kHasState && method == Method::admm ? thresholded<Method::admm>(w, state) : w;
}

template <bool kHasState, class T>
RVSM_HD T run_gap(Method method, T w, T v, T u, T& state) {
  if (kHasState && method == Method::delayed) return gap_of<Method::delayed>(w, v, u, state);
  if (kHasState && method == Method::admm) return gap_of<Method::admm>(w, v, u, state);
  return w - u;
}

// Calls f with the numbers of the base for an entry: those of its record, or with corrections from the device.
template <class T, class Base, class F>
RVSM_HD void with_base_numbers(const Table& t, int index, const Record<T, Base>& record, const F& f) {
  if constexpr (Base::kCorrections > 0) {
    typename Base::template Numbers<T> numbers = record.base;
    if (t.corrections != nullptr) numbers = Base::corrected(numbers, t.corrections + index * kMostCorrections);
    f(numbers);
  } else {
    f(record.base);
  }
}

// The step of one element. `states`: those of the base, then room for one of the method, also where it has none; `at`:
// a pull from that element on, or `k` elements before it; `factor`: of the gradient.
template <class Base, bool kHasState, class T, class Numbers, class At>
RVSM_HD void step_element(T& w, T& g, T* states, const At& at, uint32_t k, T factor, Method method,
                          const Split<T>& split, SplitSwitches on, const Numbers& numbers,
                          typename Base::Switches base_on) {
  T u, unit;
  const bool held = is_held(w, split);
  RVSM_UNROLL
  for (int s = 0; s < Base::kStates + int(kHasState); ++s) states[s] = unless_held(held, states[s]);
  T& of_method = states[Base::kStates];
  const T v = run_thresholded<kHasState>(method, w, of_method);
  at(v, w, k, u, unit);
  T d = unless_held(held, g) * factor;
  split_step(w, d, run_gap<kHasState>(method, w, v, u, of_method), unit, split, on);
  Base::step(w, states, d, numbers, base_on);
  if (Base::kWritesGrad) g = d;
}

// One step of the thread's elements of a span. `numbers`: of the base; `first`: the offset of the span's begin, as
// `pull` counts.
template <class S, class Base, bool kHasState, class T, class Entry, class Pull>
RVSM_HD void step_elements(const Entry& e, const Record<T, Base>& record,
                           const typename Base::template Numbers<T>& numbers, const Span& span, int thread, T scale,
                           uint32_t first, const Pull& pull) {
  constexpr int kStates = Base::kStates + int(kHasState);
  const SplitSwitches on{pull.pulls(record.split.prox), record.lasso && Pull::kMayLasso};
  const typename Base::Switches base_on = record.switches;
  // One of the two is 1 or -1, so that the product is exact.
  const T factor = scale * record.split.grad;
  const Method method = kHasState ? Method(record.method) : Method::rvsm;
  S* const w = static_cast<S*>(e.w) + span.begin;
  S* const g = Base::kReadsGrad ? static_cast<S*>(e.g) + span.begin : nullptr;
  S* state[kStates + 1];
  RVSM_UNROLL
  for (int s = 0; s < kStates; ++s) state[s] = static_cast<S*>(state_of(e, s)) + span.begin;
  const auto element = [&](T& wi, T& gi, T* si, const auto& at, uint32_t k) {
    step_element<Base, kHasState>(wi, gi, si, at, k, factor, method, record.split, on, numbers, base_on);
  };
  for_elements<S>(
      span_of_pull<kWidth<S>>(span, pull), thread,
      [&](uint32_t i) {
        Vector<S> wv = *reinterpret_cast<const Vector<S>*>(w + i), gv{}, sv[kStates + 1];
        if (Base::kReadsGrad) gv = *reinterpret_cast<const Vector<S>*>(g + i);
        RVSM_UNROLL
        for (int s = 0; s < kStates; ++s) sv[s] = *reinterpret_cast<const Vector<S>*>(state[s] + i);
        const auto at = pull_of_vector<kWidth<S>>(pull, first + i, [&](int k) {
          const T state = kHasState ? T(load(sv[Base::kStates].at[k])) : T(0);
          return run_thresholded<kHasState>(method, T(load(wv.at[k])), state);
        });
        RVSM_UNROLL
        for (int k = 0; k < kWidth<S>; k += 2) {
          T wk[2] = {load(wv.at[k]), load(wv.at[k + 1])}, gk[2] = {load(gv.at[k]), load(gv.at[k + 1])};
          T sk[2][kStates + 1] = {};
          RVSM_UNROLL
          for (int s = 0; s < kStates; ++s) {
            sk[0][s] = load(sv[s].at[k]);
            sk[1][s] = load(sv[s].at[k + 1]);
          }
          element(wk[0], gk[0], sk[0], at, k);
          element(wk[1], gk[1], sk[1], at, k + 1);
          if (Pull::kMayLasso) RVSM_KEEP_ORDER();
          store_pair(&wv.at[k], wk[0], wk[1]);
          if (Base::kWritesGrad) store_pair(&gv.at[k], gk[0], gk[1]);
          RVSM_UNROLL
          for (int s = 0; s < kStates; ++s) store_pair(&sv[s].at[k], sk[0][s], sk[1][s]);
        }
        *reinterpret_cast<Vector<S>*>(w + i) = wv;
        if (Base::kWritesGrad) *reinterpret_cast<Vector<S>*>(g + i) = gv;
        RVSM_UNROLL
        for (int s = 0; s < kStates; ++s) *reinterpret_cast<Vector<S>*>(state[s] + i) = sv[s];
      },
      [&](uint32_t i) {
        T wi = load(w[i]), gi = Base::kReadsGrad ? T(load(g[i])) : T(0), si[kStates + 1] = {};
        RVSM_UNROLL
        for (int s = 0; s < kStates; ++s) si[s] = load(state[s][i]);
        element(wi, gi, si, pull.from(first + i), 0);
        store(w[i], wi);
        if (Base::kWritesGrad) store(g[i], gi);
        RVSM_UNROLL
        for (int s = 0; s < kStates; ++s) store(state[s][i], si[s]);
      });
}

// One thread of one block. kHasState: the method has a state.
template <class S, class Base, bool kHasState>
RVSM_HD void step_thread(const Table& t, uint32_t block, int thread) {
  using T = Opmath<S>;
  if (t.found_inf != nullptr && *t.found_inf > 0) return;
  const auto place = place_of<S, Base::kStates + int(kHasState)>(t, block);
  const T scale = scale_of<T>(t);
  with_pull<T, Base, true>(t, place.entry.record, [&](const Record<T, Base>& record, const auto& pull) {
    // A tensor in groups has fewer than 2^31 elements.
    const uint32_t first = uint32_t(place.span.begin);
    with_base_numbers(t, place.index, record, [&](const auto& numbers) {
      step_elements<S, Base, kHasState>(place.entry, record, numbers, place.span, thread, scale, first, pull);
    });
  });
}

// ---- u --------------------------------------------------------------------------------------------------------------

// The records of a prox: those of a step without numbers of a base.
using ProxBase = NoBase<false>;

// entry.w <- u of entry.g, which may be the same.
template <class S, class Entry, class Pull>
RVSM_HD void prox_elements(const Entry& e, const Span& span, int thread, uint32_t first, const Pull& pull) {
  using T = Opmath<S>;
  S* const u = static_cast<S*>(e.w) + span.begin;
  const S* const w = static_cast<const S*>(e.g) + span.begin;
  for_elements<S>(
      span_of_pull<kWidth<S>>(span, pull), thread,
      [&](uint32_t i) {
        Vector<S> v = *reinterpret_cast<const Vector<S>*>(w + i);
        const auto at = pull_of_vector<kWidth<S>>(pull, first + i, [&](int k) { return T(load(v.at[k])); });
        RVSM_UNROLL
        for (int k = 0; k < kWidth<S>; k += 2) {
          T u[2], unit;
          RVSM_UNROLL
          for (int j = 0; j < 2; ++j) {
            const T x = load(v.at[k + j]);
            at(x, x, uint32_t(k + j), u[j], unit);
          }
          store_pair(&v.at[k], u[0], u[1]);
        }
        *reinterpret_cast<Vector<S>*>(u + i) = v;
      },
      [&](uint32_t i) {
        T ui, unit;
        const T x = load(w[i]);
        pull.from(first + i)(x, x, 0, ui, unit);
        store(u[i], ui);
      });
}

template <class S>
RVSM_HD void prox_thread(const Table& t, uint32_t block, int thread) {
  const auto place = place_of<S, 0>(t, block);
  with_pull<Opmath<S>, ProxBase, false>(t, place.entry.record, [&](const auto&, const auto& pull) {
    prox_elements<S>(place.entry, place.span, thread, uint32_t(place.span.begin), pull);
  });
}

// ---- the penalty's value --------------------------------------------------------------------------------------------

// The terms of lam P(u) + beta/2 ||w - u||^2, added in T: within what is promised for the few of them that a vector
// has. A conversion of each to double would cost more than an element of a half type takes from memory.
template <Penalty kPenalty, class T>
struct PenaltyTerms {
  T value = 0, squares = 0;

  // What the gaps are multiplied with. No gap is above the cut: so no square is above 1, and none is lost that matters.
  RVSM_HD_MEMBER static T unit(const Prox<T>& f) { return f.cut > T(1e-30) && f.cut < T(1e30) ? T(1) / f.cut : T(1); }
  RVSM_HD_MEMBER void add(T r, const Prox<T>& f, T unit) {
    const T s = shrink<kPenalty>(r, f), gap = (r - s) * unit;
    squares = squares + gap * gap;
    if (kPenalty == Penalty::tl1) {
      // Without its factor a + 1; beyond `most` it is 1. A NaN is in the gap.
      const T most = T(1e30), limited = s < most ? s : most;
      value = value + limited * tl1_reciprocal(f.a + limited);
    } else {
      value = value + rvsm::value<kPenalty>(s, f.a);
    }
  }
};

// Whether the terms of a vector are added in the type of the arithmetic before they become double.
template <Penalty kPenalty, class S>
constexpr bool kAddsInT = sizeof(S) == 2 || (sizeof(S) == 4 && kPenalty == Penalty::tl1);

// lam P(u) + beta/2 |w - u|^2 over the thread's elements, which are weights or norms of groups.
template <class S>
RVSM_HD double penalty_thread(const Table& t, const Place<0>& place, int thread) {
  using T = Opmath<S>;
  const Value<T>& value = slot_of<Value<T>>(t, place.entry.record);
  const S* const w = static_cast<const S*>(place.entry.g) + place.span.begin;
  double sum = 0;
  with_penalty(value.prox.penalty, [&](auto tag) {
    constexpr Penalty kPenalty = decltype(tag)::value;
    using Terms = PenaltyTerms<kPenalty, T>;
    const Prox<T> prox = value.prox;
    const T unit = Terms::unit(prox);
    double values = 0, squares = 0;
    const auto add = [&](S r) { sum += penalty_term<kPenalty>(std::fabs(T(load(r))), prox, value.lam, value.beta); };
    // tl1 is bound by its arithmetic, and its code is long.
    constexpr int kAhead = kPenalty == Penalty::tl1 ? 2 : kVectors;
    for_elements_ahead<kAhead>(
        place.span, thread, w,
        [&](const Vector<S>& v) {
          if constexpr (kAddsInT<kPenalty, S>) {
            Terms terms;
            RVSM_UNROLL
            for (int k = 0; k < kWidth<S>; ++k) terms.add(std::fabs(T(load(v.at[k]))), prox, unit);
            values += double(terms.value);
            squares += double(terms.squares);
          } else {
            RVSM_UNROLL
            for (int k = 0; k < kWidth<S>; ++k) add(v.at[k]);
          }
        },
        [&](uint32_t i) { add(w[i]); });
    if constexpr (kAddsInT<kPenalty, S>) {
      const double lam = kPenalty == Penalty::tl1 ? value.lam * (double(prox.a) + 1) : value.lam;
      sum += lam * values + value.beta / 2 / (double(unit) * double(unit)) * squares;
    }
  });
  return sum;
}

}  // namespace rvsm::cuda
