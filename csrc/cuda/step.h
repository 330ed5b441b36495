// What one thread of the step's and the prox's kernels does: load, arithmetic, store. For host and device: the C++
// tests run these very lines over memory of the host.
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

// Without groups: the penalty is known to the compiler, so that a block decides once.
template <Penalty kPenalty, class T>
struct ElementPull {
  const Prox<T>& prox;
  RVSM_HD_MEMBER void operator()(T w, int64_t, T& u, T& unit) const {
    u = std::copysign(shrink<kPenalty>(std::fabs(w), prox), w);
    unit = T(0);
  }
};

// Groups: u = w * ratio, w_G / ||w_G|| = w / length, by factors that a launch before this one has made.
template <class Index, class T>
struct GroupPull {
  const Columns& c;
  bool lasso;
  RVSM_HD_MEMBER void operator()(T w, int64_t at, T& u, T& unit) const {
    const auto group = c.group(Index(at));
    u = w * static_cast<const T*>(c.ratio)[group];
    unit = lasso ? w / static_cast<const T*>(c.length)[group] : T(0);
  }
};

// What the entries of a launch have in common: no groups; groups of tensors with fewer than 2^31 elements, whose
// divisions cost a quarter; other groups.
enum class Grouping { none, narrow, wide };

// Calls f(pull) with what the record asks for; a block decides once.
template <Grouping kGrouping, class T, class F>
RVSM_HD void with_pull(const Record<T>& record, const Columns& columns, const F& f) {
  if constexpr (kGrouping != Grouping::none) {
    using Index = std::conditional_t<kGrouping == Grouping::narrow, uint32_t, uint64_t>;
    if (record.grouped) return f(GroupPull<Index, T>{columns, record.lasso});
  }
  with_penalty(record.step.prox.penalty, [&](auto tag) { f(ElementPull<decltype(tag)::value, T>{record.step.prox}); });
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

// One thread of one block.
template <class S, Grouping kGrouping>
RVSM_HD void step_thread(const Table& t, uint32_t block, int thread) {
  using T = Arithmetic<S>;
  if (t.found_inf != nullptr && *t.found_inf > 0) return;
  const Place place = place_of<S>(t, block);
  const Entry& e = place.entry;
  const Record<T>& record = record_of<T>(t, e);
  const T scale = t.grad_scale != nullptr ? T(1) / T(*t.grad_scale) : T(1);
  const RunKind kind{Momentum(record.momentum), record.decay, record.step.prox.penalty != Penalty::none, record.lasso};
  const bool momentum = kind.momentum != Momentum::none;
  const int64_t begin = place.span.begin;
  S* const w = static_cast<S*>(e.w) + begin;
  const S* const g = static_cast<const S*>(e.g) + begin;
  S* const m = momentum ? static_cast<S*>(e.m) + begin : nullptr;
  with_pull<kGrouping>(record, columns_of<T>(t, e), [&](const auto& pull) {
    const auto element = [&](S& ws, S gs, S& ms, int64_t at) {
      T wi = load(ws), mi = momentum ? T(load(ms)) : T(0), u, unit;
      pull(wi, at, u, unit);
      sgd_step(wi, mi, T(load(gs)) * scale, wi - u, unit, record.step, kind);
      store(ws, wi);
      if (momentum) store(ms, mi);
    };
    for_elements<S>(
        place.span, thread,
        [&](uint32_t i) {
          Vector<S> wv = *reinterpret_cast<const Vector<S>*>(w + i);
          const Vector<S> gv = *reinterpret_cast<const Vector<S>*>(g + i);
          Vector<S> mv{};
          if (momentum) mv = *reinterpret_cast<const Vector<S>*>(m + i);
          RVSM_UNROLL
          for (int k = 0; k < kWidth<S>; ++k) element(wv.at[k], gv.at[k], mv.at[k], begin + i + k);
          *reinterpret_cast<Vector<S>*>(w + i) = wv;
          if (momentum) *reinterpret_cast<Vector<S>*>(m + i) = mv;
        },
        [&](uint32_t i) {
          S ms{};
          if (momentum) ms = m[i];
          element(w[i], g[i], ms, begin + i);
          if (momentum) m[i] = ms;
        });
  });
}

// ---- w <- u ---------------------------------------------------------------------------------------------------------

template <class S, Grouping kGrouping>
RVSM_HD void prox_thread(const Table& t, uint32_t block, int thread) {
  using T = Arithmetic<S>;
  const Place place = place_of<S>(t, block);
  const Entry& e = place.entry;
  const Record<T>& record = record_of<T>(t, e);
  const int64_t begin = place.span.begin;
  S* const w = static_cast<S*>(e.w) + begin;
  with_pull<kGrouping>(record, columns_of<T>(t, e), [&](const auto& pull) {
    const auto element = [&](S& ws, int64_t at) {
      T u, unit;
      pull(T(load(ws)), at, u, unit);
      store(ws, u);
    };
    for_elements<S>(
        place.span, thread,
        [&](uint32_t i) {
          Vector<S> wv = *reinterpret_cast<const Vector<S>*>(w + i);
          RVSM_UNROLL
          for (int k = 0; k < kWidth<S>; ++k) element(wv.at[k], begin + i + k);
          *reinterpret_cast<Vector<S>*>(w + i) = wv;
        },
        [&](uint32_t i) { element(w[i], begin + i); });
  });
}

}  // namespace rvsm::cuda
