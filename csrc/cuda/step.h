// What one thread of the step's, the prox's and the penalty's kernels does: load, arithmetic, store. For host and
// device: interpret.cpp runs these very lines over memory of the host.
#pragma once

#include <type_traits>

#include "../update.h"
#include "table.h"

namespace rvsm::cuda {

// 16 bytes of storage: one access.
template <class S>
struct alignas(16) Vector {
  S at[kWidth<S>];
};

// StepKind of a step that is known when it runs; every thread of a block has the same.
struct RunKind {
  Momentum momentum;
  bool decay, pull, lasso;
};

// ---- u of one element -----------------------------------------------------------------------------------------------

// pull.from(at) knows the elements from a place on: those of a vector, or one. Called with v, which is thresholded, and
// w it gives u and w_G / ||w_G||.

// Without groups: the penalty is known to the compiler, so that a block decides once.
template <Penalty kPenalty, class T>
struct ElementPull {
  const Prox<T>& prox;
  RVSM_HD_MEMBER ElementPull from(uint32_t) const { return *this; }
  RVSM_HD_MEMBER void operator()(T v, T, uint32_t, T& u, T& unit) const {
    u = std::copysign(shrink<kPenalty>(std::fabs(v), prox), v);
    unit = T(0);
  }
};

// Groups: u = w * ratio, w_G / ||w_G|| = w / length, by factors that a launch before this one has made.
template <class T>
struct GroupPull {
  const Columns& c;
  bool lasso;
  uint32_t at;
  RVSM_HD_MEMBER GroupPull from(uint32_t place) const { return {c, lasso, place}; }
  RVSM_HD_MEMBER void operator()(T v, T w, uint32_t k, T& u, T& unit) const {
    const uint32_t group = c.group(at + k);
    u = v * static_cast<const T*>(c.ratio)[group];
    unit = lasso ? w / static_cast<const T*>(c.length)[group] : T(0);
  }
};

// Calls f(record, pull) with what a slot of an entry asks for; a block decides once. `cut`: in the place of the
// record's, or null.
template <class T, class F>
RVSM_HD void with_pull(const Table& t, uint16_t slot, const void* cut, const F& f) {
  if (slot & kGrouped) {
    const Columns& columns = slot_of<Columns>(t, slot & ~kGrouped);
    const Record<T>& record = slot_of<Record<T>>(t, columns.record);
    return f(record, GroupPull<T>{columns, record.lasso, 0});
  }
  const Record<T>& record = slot_of<Record<T>>(t, slot);
  if (cut != nullptr) {
    Prox<T> prox = record.step.prox;
    prox.cut = *static_cast<const T*>(cut);
    return f(record, ElementPull<Penalty::l0, T>{prox});
  }
  with_penalty(record.step.prox.penalty,
               [&](auto tag) { f(record, ElementPull<decltype(tag)::value, T>{record.step.prox}); });
}

// ---- the step -------------------------------------------------------------------------------------------------------

// Where a block works.
struct Place {
  const Entry& entry;
  Span span;
};

template <class S>
RVSM_HD Place place_of(const Table& t, uint32_t block) {
  const int index = find(t.slots, int(t.entries), block);
  const Entry& e = t.slots[index];
  const uint32_t end = index + 1 < int(t.entries) ? t.slots[index + 1].first : t.blocks;
  return {e, span_of<S>(e, block - e.first, end - e.first)};
}

template <class T>
RVSM_HD T scale_of(const Table& t) {
  return t.grad_scale != nullptr ? reciprocal(T(*t.grad_scale)) : T(1);
}

// The gap of an element, by the method of the entry; every thread of a block has the same.
template <class T>
RVSM_HD T run_gap(Method method, T w, T v, T u, T& x) {
  if (method == Method::delayed) return gap_of<Method::delayed>(w, v, u, x);
  if (method == Method::admm) return gap_of<Method::admm>(w, v, u, x);
  return w - u;
}

// The thread's elements of a span. `pull` knows them by their distance from the span's begin, plus `first`. `kept`: of
// an entry of a step that keeps, or null, which the compiler knows.
template <class S, class T, class Pull>
RVSM_HD void step_elements(const Entry& e, const Record<T>& record, const Span& span, int thread, T scale,
                           uint32_t first, const Pull& pull, const Kept* kept = nullptr) {
  const bool split = record.step.prox.penalty != Penalty::none;
  const RunKind kind{Momentum(record.momentum), record.decay, split, record.lasso};
  const bool momentum = kind.momentum != Momentum::none;
  S* const w = static_cast<S*>(e.w) + span.begin;
  const S* const g = static_cast<const S*>(e.g) + span.begin;
  S* const m = momentum ? static_cast<S*>(e.m) + span.begin : nullptr;
  const Method method = kept != nullptr ? Method(kept->method) : Method::rvsm;
  const bool keeps = method != Method::rvsm;
  S* const x = keeps ? static_cast<S*>(kept->at) + span.begin : nullptr;
  const auto element = [&](T& wi, T gi, T& mi, T& xi, const auto& at, uint32_t k) {
    T u, unit;
    const T v = method == Method::admm ? argument<Method::admm>(wi, xi) : wi;
    at(v, wi, k, u, unit);
    sgd_step(wi, mi, gi * scale, run_gap(method, wi, v, u, xi), unit, record.step, kind);
  };
  for_elements<S>(
      span, thread,
      [&](uint32_t i) {
        Vector<S> wv = *reinterpret_cast<const Vector<S>*>(w + i);
        const Vector<S> gv = *reinterpret_cast<const Vector<S>*>(g + i);
        Vector<S> mv{}, xv{};
        if (momentum) mv = *reinterpret_cast<const Vector<S>*>(m + i);
        if (keeps) xv = *reinterpret_cast<const Vector<S>*>(x + i);
        const auto at = pull.from(first + i);
        RVSM_UNROLL
        for (int k = 0; k < kWidth<S>; k += 2) {
          T wk[2] = {load(wv.at[k]), load(wv.at[k + 1])}, mk[2] = {load(mv.at[k]), load(mv.at[k + 1])};
          T xk[2] = {load(xv.at[k]), load(xv.at[k + 1])};
          element(wk[0], load(gv.at[k]), mk[0], xk[0], at, k);
          element(wk[1], load(gv.at[k + 1]), mk[1], xk[1], at, k + 1);
          store_pair(&wv.at[k], wk[0], wk[1]);
          store_pair(&mv.at[k], mk[0], mk[1]);
          store_pair(&xv.at[k], xk[0], xk[1]);
        }
        *reinterpret_cast<Vector<S>*>(w + i) = wv;
        if (momentum) *reinterpret_cast<Vector<S>*>(m + i) = mv;
        if (keeps) *reinterpret_cast<Vector<S>*>(x + i) = xv;
      },
      [&](uint32_t i) {
        T wi = load(w[i]), mi = momentum ? T(load(m[i])) : T(0), xi = keeps ? T(load(x[i])) : T(0);
        element(wi, load(g[i]), mi, xi, pull.from(first + i), 0);
        store(w[i], wi);
        if (momentum) store(m[i], mi);
        if (keeps) store(x[i], xi);
      });
}

// One thread of one block. kKeeps: of a step whose entries have a Kept.
template <class S, bool kKeeps>
RVSM_HD void step_thread(const Table& t, uint32_t block, int thread) {
  using T = Arithmetic<S>;
  if (t.found_inf != nullptr && *t.found_inf > 0) return;
  const Place place = place_of<S>(t, block);
  const T scale = scale_of<T>(t);
  const Kept* const kept = kKeeps ? &slot_of<Kept>(t, place.entry.record) : nullptr;
  const uint16_t slot = kKeeps ? kept->record : place.entry.record;
  with_pull<T>(t, slot, kKeeps ? kept->cut : nullptr, [&](const Record<T>& record, const auto& pull) {
    // A tensor in groups has fewer than 2^31 elements.
    const uint32_t first = uint32_t(place.span.begin);
    step_elements<S>(place.entry, record, place.span, thread, scale, first, pull, kKeeps ? kept : nullptr);
  });
}

// ---- u --------------------------------------------------------------------------------------------------------------

// entry.w <- u of entry.g, which may be the same.
template <class S, class Pull>
RVSM_HD void prox_elements(const Entry& e, const Span& span, int thread, uint32_t first, const Pull& pull) {
  using T = Arithmetic<S>;
  S* const u = static_cast<S*>(e.w) + span.begin;
  const S* const w = static_cast<const S*>(e.g) + span.begin;
  const auto element = [&](S& us, S ws, const auto& at, uint32_t k) {
    T ui, unit;
    at(T(load(ws)), T(load(ws)), k, ui, unit);
    store(us, ui);
  };
  for_elements<S>(
      span, thread,
      [&](uint32_t i) {
        Vector<S> v = *reinterpret_cast<const Vector<S>*>(w + i);
        const auto at = pull.from(first + i);
        RVSM_UNROLL
        for (int k = 0; k < kWidth<S>; ++k) element(v.at[k], v.at[k], at, k);
        *reinterpret_cast<Vector<S>*>(u + i) = v;
      },
      [&](uint32_t i) { element(u[i], w[i], pull.from(first + i), 0); });
}

template <class S>
RVSM_HD void prox_thread(const Table& t, uint32_t block, int thread) {
  const Place place = place_of<S>(t, block);
  with_pull<Arithmetic<S>>(t, place.entry.record, nullptr, [&](const auto&, const auto& pull) {
    prox_elements<S>(place.entry, place.span, thread, uint32_t(place.span.begin), pull);
  });
}

// ---- the penalty's value --------------------------------------------------------------------------------------------

// lam P(u) + beta/2 |w - u|^2 over the thread's elements, which are weights or norms of groups.
template <class S>
RVSM_HD double penalty_thread(const Table& t, const Place& place, int thread) {
  using T = Arithmetic<S>;
  const Value<T>& value = slot_of<Value<T>>(t, place.entry.record);
  const S* const w = static_cast<const S*>(place.entry.g) + place.span.begin;
  double sum = 0;
  with_penalty(value.prox.penalty, [&](auto tag) {
    const auto add = [&](S r) {
      sum += penalty_term<decltype(tag)::value>(std::fabs(T(load(r))), value.prox, value.lam, value.beta);
    };
    for_elements<S>(
        place.span, thread,
        [&](uint32_t i) {
          const Vector<S> v = *reinterpret_cast<const Vector<S>*>(w + i);
          RVSM_UNROLL
          for (int k = 0; k < kWidth<S>; ++k) add(v.at[k]);
        },
        [&](uint32_t i) { add(w[i]); });
  });
  return sum;
}

}  // namespace rvsm::cuda
