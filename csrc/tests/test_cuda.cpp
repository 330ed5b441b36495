// The CUDA engine without a GPU: its index arithmetic walked element by element, and the very functions that its
// threads run, run over memory of the host.

#include <cmath>
#include <cstring>
#include <vector>

#include "../cuda/builder.h"
#include "../cuda/step.h"
#include "check.h"

using namespace rvsm;
using namespace rvsm::cuda;

namespace {

int64_t checked = 0;

void check_dividers() {
  for (int i = 0; i < 20000; ++i) {
    const int64_t d = i < 300 ? i + 1 : int64_t(log_uniform(1, 2147483647.0));
    const Divider by = divider(d);
    const int64_t near = integer(0, (int64_t(1) << 31) / d) * d;
    for (const int64_t n : {int64_t(0), d - 1, d, near - 1, near, near + 1, int64_t(2147483647)}) {
      if (n < 0 || n > 2147483647) continue;
      CHECK(by(uint32_t(n)) == n / d, "%lld / %lld", static_cast<long long>(n), static_cast<long long>(d));
      ++checked;
    }
  }
}

// Sizes from nothing to three vectors and one element, and around one chunk and two.
template <class S>
std::vector<int64_t> sizes() {
  std::vector<int64_t> all;
  for (int64_t n = 1; n <= 3 * kWidth<S> + 1; ++n) all.push_back(n);
  for (const int64_t n : {kChunk<S>, 2 * kChunk<S>})
    for (int64_t k = -kWidth<S> - 1; k <= kWidth<S> + 1; ++k) all.push_back(n + k);
  return all;
}

// Every element once, vectors on 16-byte boundaries of all three arrays.
template <class S>
void walk() {
  alignas(16) static char base[64];
  for (const int64_t n : sizes<S>()) {
    for (int64_t wa = 0; wa < kWidth<S>; ++wa) {
      for (int64_t ga = 0; ga < kWidth<S>; ++ga) {
        S* const w = reinterpret_cast<S*>(base) + wa;
        const S* const g = reinterpret_cast<const S*>(base) + ga;
        const Chunks chunks = chunks_of<S>(n, w, g, nullptr);
        const Entry e{w, g, nullptr, 0, chunks.rest, 0};
        std::vector<int> seen(size_t(n), 0);
        for (uint32_t chunk = 0; chunk < chunks.count; ++chunk) {
          const Span span = span_of<S>(e, chunk, chunks.count);
          CHECK(!span.vectors || wa == ga, "vectors of arrays that do not line up");
          for (int thread = 0; thread < kThreads; ++thread)
            for_elements<S>(
                span, thread,
                [&](uint32_t i) {
                  CHECK((wa + span.begin + i) % kWidth<S> == 0, "a vector off its boundary");
                  for (int k = 0; k < kWidth<S>; ++k) ++seen.at(size_t(span.begin + i + k));
                },
                [&](uint32_t i) { ++seen.at(size_t(span.begin + i)); });
        }
        for (const int times : seen)
          CHECK(times == 1, "an element %d times, of %lld", times, static_cast<long long>(n));
        ++checked;
      }
    }
  }
}

// Tensors larger than any memory here: by arithmetic alone.
template <class S>
void walk_far() {
  for (const int64_t n : {int64_t(1) << 31, (int64_t(1) << 31) + 5, (int64_t(1) << 33) + 1, int64_t(5000000017)}) {
    for (int64_t shift = 0; shift < kWidth<S>; ++shift) {
      S* const w = reinterpret_cast<S*>(uintptr_t(4096)) + shift;
      const Chunks chunks = chunks_of<S>(n, w, w, w);
      const Entry e{w, w, w, 0, chunks.rest, 0};
      int64_t next = 0;
      for (uint32_t c : {0u, 1u, chunks.count / 2, chunks.count - 2, chunks.count - 1}) {
        const Span s = span_of<S>(e, c, chunks.count);
        const int64_t head = (kWidth<S> - shift) % kWidth<S>;
        CHECK(s.begin == (c == 0 ? 0 : head + int64_t(c) * kChunk<S>), "the place of a chunk");
        next = s.begin + s.head + s.count;
      }
      CHECK(next == n, "the last chunk ends at %lld of %lld", static_cast<long long>(next), static_cast<long long>(n));
      ++checked;
    }
  }
}

Options random_options(bool grouped) {
  Options o;
  o.penalty = Penalty(integer(0, 3));
  o.lam = log_uniform(1e-3, 0.1);
  o.beta = 0.5;
  o.a = log_uniform(0.1, 10);
  o.lr = 0.1;
  o.momentum = double(integer(0, 1)) * 0.9;
  o.nesterov = o.momentum != 0 && integer(0, 1);
  o.weight_decay = double(integer(0, 1)) * 0.01;
  o.decoupled = integer(0, 1);
  o.group_lasso = grouped ? double(integer(0, 1)) * 0.1 : 0;
  return o;
}

template <class S>
struct Tensor {
  std::vector<S> w, g, m;
  std::vector<Arithmetic<S>> ratio, length;
  cpu::Row row;
  int64_t at = 0;

  Tensor(int64_t n, const GroupView* view) : at(integer(0, kWidth<S> - 1)) {
    for (auto* v : {&w, &g, &m}) {
      v->resize(size_t(n + 2 * kWidth<S>));
      for (auto& x : *v) store(x, Arithmetic<S>(uniform(-1, 1)));
    }
    const Options o = random_options(view != nullptr);
    row.numel = n;
    row.grouped = view != nullptr;
    if (view != nullptr) row.view = *view;
    row.step = make_step(o, view != nullptr ? view->size() : 1, integer(0, 1));
    row.momentum = momentum_of(o);
    if (view != nullptr) {
      for (int64_t k = 0; k < view->count(); ++k) {
        ratio.push_back(Arithmetic<S>(uniform(0, 1)));
        length.push_back(Arithmetic<S>(uniform(0.5, 2)));
      }
    }
    aim();
  }
  // Vectors move with the object.
  void aim() {
    row.w = w.data() + at;
    row.g = g.data() + (integer(0, 3) == 0 ? 1 : at);  // sometimes out of line
    row.m = row.momentum == Momentum::none ? nullptr : m.data() + at;
  }
};

// One element by update.h.
template <class S>
void plain_step(const Tensor<S>& x, int64_t i, S& w, S& m) {
  using T = Arithmetic<S>;
  const Step<T> s = narrow<T>(x.row.step);
  T wi = load(w), mi = load(m), u = wi, unit = 0;
  if (x.row.grouped) {
    const GroupView& v = x.row.view;
    const int64_t columns = v.groups * v.inner, batch = v.outer * columns;
    const size_t g = size_t(i / batch * v.groups + i % columns / v.inner);
    u = wi * x.ratio[g];
    if (s.lasso != 0) unit = wi / x.length[g];
  } else {
    u = with_penalty(s.prox.penalty,
                     [&](auto tag) { return std::copysign(shrink<decltype(tag)::value>(std::fabs(wi), s.prox), wi); });
  }
  const RunKind kind{x.row.momentum, s.decay != 0, s.prox.penalty != Penalty::none, x.row.grouped && s.lasso != 0};
  sgd_step(wi, mi, T(load(static_cast<const S*>(x.row.g)[i])), wi - u, unit, s, kind);
  store(w, wi);
  if (kind.momentum != Momentum::none) store(m, mi);
}

// Many tensors of all kinds in as many tables as they need, every thread of every block.
template <class S>
void steps(int count) {
  const GroupView views[] = {{1, 1, 7, 5}, {1, 11, 5, 1}, {1, 4, 6, 9}, {3, 2, 4, 3}, {1, 1, 1, 37}, {1, 700, 3, 2}};
  std::vector<Tensor<S>> tensors;
  tensors.reserve(size_t(count));
  Builder<S> builder;
  for (int i = 0; i < count; ++i) {
    const GroupView* view = integer(0, 2) == 0 ? &views[integer(0, 5)] : nullptr;
    const int64_t n = view != nullptr      ? view->count() * view->size()
                      : integer(0, 9) == 0 ? integer(1, 2 * kChunk<S> + 99)
                                           : integer(1, 5 * kWidth<S>);
    tensors.emplace_back(n, view);
    Tensor<S>& x = tensors.back();
    builder.add(x.row, view != nullptr ? x.ratio.data() : nullptr, view != nullptr ? x.length.data() : nullptr);
  }
  const std::vector<Tensor<S>> before = tensors;
  float grad_scale = 1, found_inf = 1;
  for (const auto& table : builder.tables()) {  // an Inf was found: nothing happens
    table->found_inf = &found_inf;
    for (uint32_t block = 0; block < table->blocks; ++block) step_thread<S, Grouping::narrow>(*table, block, 0);
  }
  found_inf = 0;
  for (size_t k = 0; k < builder.tables().size(); ++k) {
    Table& table = *builder.tables()[k];
    table.grad_scale = &grad_scale;
    for (uint32_t block = 0; block < table.blocks; ++block)
      for (int thread = 0; thread < kThreads; ++thread)
        k % 2 == 0 ? step_thread<S, Grouping::narrow>(table, block, thread)
                   : step_thread<S, Grouping::wide>(table, block, thread);
  }
  for (int i = 0; i < count; ++i) {
    Tensor<S> want = before[size_t(i)];
    for (int64_t k = 0; k < want.row.numel; ++k)
      plain_step(tensors[size_t(i)], k, want.w[size_t(want.at + k)], want.m[size_t(want.at + k)]);
    const bool same = std::memcmp(want.w.data(), tensors[size_t(i)].w.data(), want.w.size() * sizeof(S)) == 0 &&
                      std::memcmp(want.m.data(), tensors[size_t(i)].m.data(), want.m.size() * sizeof(S)) == 0;
    CHECK(same, "tensor %d with %lld elements", i, static_cast<long long>(want.row.numel));
    ++checked;
  }
}

// A thousand small tensors with the same options are one launch.
void one_launch() {
  std::vector<float> memory(4000);
  Builder<float> builder;
  Options o;
  o.penalty = Penalty::l0;
  o.lam = o.beta = o.lr = 0.1;
  for (int i = 0; i < 1000; ++i) {
    cpu::Row row;
    row.numel = 1 + i % 3;
    row.w = memory.data() + i;
    row.g = memory.data() + i;
    row.step = make_step(o, 1, false);
    builder.add(row);
  }
  CHECK(builder.tables().size() == 1, "%zu launches", builder.tables().size());
}

template <class S>
void all() {
  walk<S>();
  walk_far<S>();
  for (const int count : {1, 2, 40, 700, 2500}) steps<S>(count);
}

}  // namespace

int main() {
  check_dividers();
  one_launch();
  all<float>();
  all<double>();
  all<BFloat16>();
  all<Float16>();
  return finish("cuda", checked);
}
