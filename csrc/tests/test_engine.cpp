// The CPU engine on plain memory: every element exactly once, all sizes around the vector width, all alignments, every
// instruction set and every number of threads with the same bits, groups against plain loops.

#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#include "../cpu/engine.h"
#include "../half.h"
#include "../update.h"
#include "check.h"

using namespace rvsm;
using cpu::Job;

namespace rvsm::cpu {
extern const Kernels kernels_base;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif
}  // namespace rvsm::cpu

namespace {

std::vector<const cpu::Kernels*> instruction_sets() {
  std::vector<const cpu::Kernels*> all = {&cpu::kernels_base};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) all.push_back(&cpu::kernels_avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    all.push_back(&cpu::kernels_avx512);
#endif
  return all;
}

Options random_options() {
  Options o;
  o.penalty = Penalty(integer(1, 3));
  o.lam = log_uniform(1e-3, 0.1);
  o.beta = 0.5;
  o.a = log_uniform(0.1, 10);
  o.lr = 0.1;
  o.momentum = integer(0, 1) * 0.9;
  o.nesterov = o.momentum != 0 && integer(0, 1);
  o.weight_decay = integer(0, 1) * 0.01;
  o.decoupled = integer(0, 1);
  return o;
}

template <class S>
std::vector<S> random_values(int64_t n) {
  std::vector<S> v(size_t(n) + 16);
  for (auto& x : v) store(x, Arithmetic<S>(uniform(-1, 1)));
  return v;
}

// One tensor of a step, with guard elements around what may be written.
template <class S>
struct Tensor {
  std::vector<S> w, g, m;
  int64_t at;

  Tensor(int64_t n, int64_t shift)
      : w(random_values<S>(n)), g(random_values<S>(n)), m(random_values<S>(n)), at(shift) {}

  Row row(int64_t n, const Options& o, const GroupView* view = nullptr) {
    Row r;
    r.numel = n;
    r.dtype = sizeof(S) == 8               ? Dtype::f64
              : sizeof(S) == 4             ? Dtype::f32
              : std::is_same_v<S, Float16> ? Dtype::f16
                                           : Dtype::bf16;
    r.grouped = view != nullptr;
    if (view != nullptr) r.view = *view;
    r.w = w.data() + at;
    r.g = g.data() + at;
    r.m = o.momentum != 0 ? m.data() + at : nullptr;
    r.step = make_step(o, view != nullptr ? view->size() : 1, false);
    r.momentum = momentum_of(o);
    return r;
  }
  bool same(const Tensor& other) const {
    return std::memcmp(w.data(), other.w.data(), w.size() * sizeof(S)) == 0 &&
           std::memcmp(m.data(), other.m.data(), m.size() * sizeof(S)) == 0;
  }
};

// Runs a job on its own scratch, dealt for so many threads and done by as many workers, or by fewer.
void run(Job& job, int threads, int workers) {
  job.divide();
  std::vector<char> scratch(size_t(job.scratch_bytes()) + 64);
  job.set_scratch(scratch.data());
  job.start(threads);
  std::vector<std::thread> pool;
  for (int t = 1; t < workers; ++t)
    pool.emplace_back([&, t] { job.work(threads * t / workers, threads * (t + 1) / workers); });
  job.work(0, threads / workers);
  for (auto& t : pool) t.join();
}

void run(Job& job, int threads) { run(job, threads, threads); }

// The step of one element in plain code, straight from update.h.
template <class S>
void plain_step(S& w, const S& g, S& m, const Row& row, Arithmetic<S> ratio_or_nan, Arithmetic<S> unit) {
  using T = Arithmetic<S>;
  const Step<T> s = narrow<T>(row.step);
  T wi = load(w), mi = load(m);
  const T u = std::isnan(ratio_or_nan)
                  ? with_penalty(s.prox.penalty,
                                 [&](auto tag) {
                                   return std::copysign(shrink<decltype(tag)::value>(std::fabs(wi), s.prox), wi);
                                 })
                  : wi * ratio_or_nan;
  const auto step = [&](auto kind) { sgd_step(wi, mi, T(load(g)), wi - u, unit, s, kind); };
  const bool decay = s.decay != T(0);
  if (row.momentum == Momentum::none)
    decay ? step(StepKind<Momentum::none, true, true, true>{}) : step(StepKind<Momentum::none, false, true, true>{});
  else if (row.momentum == Momentum::plain)
    decay ? step(StepKind<Momentum::plain, true, true, true>{}) : step(StepKind<Momentum::plain, false, true, true>{});
  else
    decay ? step(StepKind<Momentum::nesterov, true, true, true>{})
          : step(StepKind<Momentum::nesterov, false, true, true>{});
  store(w, wi);
  if (row.momentum != Momentum::none) store(m, mi);
}

template <class S>
int64_t elementwise() {
  int64_t cases = 0;
  const int64_t lanes = 64 / int64_t(sizeof(S));
  std::vector<int64_t> sizes;
  for (int64_t n = 0; n <= 3 * lanes + 1; ++n) sizes.push_back(n);
  for (const int64_t n : {511, 512, 513, 32767, 32768, 32769, 70000}) sizes.push_back(n);
  for (const int64_t n : sizes) {
    for (int64_t shift = 0; shift < (n < 200 ? 4 : 2); ++shift) {
      const Options o = random_options();
      const Tensor<S> start(n, shift);
      Tensor<S> want = start;
      for (int64_t i = 0; i < n; ++i) {
        const Row row = want.row(n, o);
        plain_step(want.w[size_t(i + shift)], want.g[size_t(i + shift)], want.m[size_t(i + shift)], row,
                   Arithmetic<S>(NAN), Arithmetic<S>(0));
      }
      for (const cpu::Kernels* k : instruction_sets()) {
        Tensor<S> got = start;
        Row row = got.row(n, o);
        row.view = {1, 1, n, 1};
        if (n > 0) k->step(row, {0, 0, 1, 0, n});
        CHECK(got.same(want), "%s: %lld elements at %lld, storage of %zu bytes", k->name, static_cast<long long>(n),
              static_cast<long long>(shift), sizeof(S));
        ++cases;
      }
      for (const int threads : {1, 3}) {
        Tensor<S> got = start;
        Job job(Action::step);
        job.rows.push_back(got.row(n, o));
        run(job, threads);
        CHECK(got.same(want), "%d threads: %lld elements at %lld", threads, static_cast<long long>(n),
              static_cast<long long>(shift));
        ++cases;
      }
    }
  }
  return cases;
}

template <class S>
int64_t grouped() {
  using T = Arithmetic<S>;
  int64_t cases = 0;
  std::vector<GroupView> views = {
      {1, 1, 1, 1},     {1, 1, 5, 9},    {1, 7, 5, 9},      {1, 64, 3, 49},    {1, 1, 300, 700},  {1, 300, 700, 1},
      {1, 40, 33, 9},   {4, 9, 16, 1},   {3, 1, 1, 70000},  {1, 1, 1, 300000}, {1, 300001, 1, 1}, {1, 2, 2, 140000},
      {1, 17, 2100, 1}, {1, 3, 2, 2049}, {1, 150000, 3, 1}, {2, 5, 7, 33},     {1, 1, 4000, 9}};
  for (const GroupView& v : views) {
    Options o = random_options();
    o.group_lasso = integer(0, 1) * 0.01;
    const int64_t n = v.batch * v.outer * v.groups * v.inner;
    o.lam *= std::sqrt(double(v.size())) * 0.3;  // around the norm of random weights
    const Tensor<S> start(n, 1);
    Tensor<S> want = start;
    const Row row = want.row(n, o, &v);
    std::vector<T> ratio(size_t(v.count())), unit(size_t(v.count()));
    std::vector<double> sums(size_t(v.count()));
    const auto group = [&](int64_t i) {
      return size_t(i / (v.outer * v.groups * v.inner) * v.groups + i / v.inner % v.groups);
    };
    for (int64_t i = 0; i < n; ++i) sums[group(i)] += std::pow(double(load(start.w[size_t(i + 1)])), 2);
    const Step<T> s = narrow<T>(row.step);
    for (size_t g = 0; g < sums.size(); ++g) {
      const T r = T(std::sqrt(sums[g]));
      ratio[g] = with_penalty(s.prox.penalty, [&](auto tag) { return shrink_ratio<decltype(tag)::value>(r, s.prox); });
      unit[g] = s.lasso != 0 ? 1 / r : T(0);
    }
    for (int64_t i = 0; i < n; ++i) {
      auto& w = want.w[size_t(i + 1)];
      const T direction = load(w) * unit[group(i)];
      plain_step(w, want.g[size_t(i + 1)], want.m[size_t(i + 1)], row, ratio[group(i)], direction);
    }
    Tensor<S> first = start;
    for (const auto& [threads, workers] : {std::pair{1, 1}, {2, 2}, {4, 4}, {3, 1}, {4, 2}, {7, 3}}) {
      Tensor<S> got = start;
      Job job(Action::step);
      job.rows.push_back(got.row(n, o, &v));
      run(job, threads, workers);
      // The order of a sum is the engine's own: an ulp of a norm.
      const double bound = sizeof(S) == 8 ? 1e-14 : sizeof(S) == 4 ? 1e-6 : 0.01;
      for (size_t i = 0; i < got.w.size(); ++i) {
        const double error = std::fabs(double(load(got.w[i])) - double(load(want.w[i])));
        CHECK(error <= bound, "view %lld %lld %lld %lld element %zu is off by %g", static_cast<long long>(v.batch),
              static_cast<long long>(v.outer), static_cast<long long>(v.groups), static_cast<long long>(v.inner), i,
              error);
      }
      if (threads == 1)
        first = got;
      else
        CHECK(got.same(first), "%d threads give other bits", threads);
      ++cases;
    }

    // The penalty's value of the same weights, and u itself.
    Job value(Action::penalty), prox(Action::prox);
    Tensor<S> a = start, b = start;
    Row r = a.row(n, o, &v);
    r.lam = strength(o, v.size());
    r.beta = o.beta;
    value.rows.push_back(r);
    prox.rows.push_back(b.row(n, o, &v));
    run(value, 2);
    run(prox, 2);
    double want_value = 0;
    for (size_t g = 0; g < sums.size(); ++g)
      want_value += with_penalty(s.prox.penalty, [&](auto tag) {
        return penalty_term<decltype(tag)::value>(T(std::sqrt(sums[g])), s.prox, r.lam, r.beta);
      });
    CHECK(std::fabs(value.total() - want_value) <= 1e-6 * (1 + want_value), "penalty %g, want %g", value.total(),
          want_value);
    for (int64_t i = 0; i < n; ++i) {
      const double u = double(load(b.w[size_t(i + 1)]));
      const double want_u = double(load(start.w[size_t(i + 1)])) * double(ratio[group(i)]);
      CHECK((u == 0) == (want_u == 0) && std::fabs(u - want_u) <= 0.01 * std::fabs(want_u) + 1e-6, "u %g, want %g", u,
            want_u);
    }
    cases += 2;
  }
  return cases;
}

// Many small rows beside inactive and empty ones: a row that has no gradient stays as it is.
int64_t mixed() {
  std::vector<Tensor<float>> tensors;
  Job job(Action::step);
  for (int i = 0; i < 300; ++i) tensors.emplace_back(integer(0, 40), i % 4);
  const std::vector<Tensor<float>> start = tensors;
  for (size_t i = 0; i < tensors.size(); ++i) {
    Row row = tensors[i].row(int64_t(tensors[i].w.size()) - 16, random_options());
    row.active = i % 3 != 0 && row.numel > 0;
    job.rows.push_back(row);
  }
  run(job, 4);
  for (size_t i = 0; i < tensors.size(); ++i) CHECK(tensors[i].same(start[i]) == !job.rows[i].active, "row %zu", i);
  return 300;
}

}  // namespace

int main() {
  int64_t cases = elementwise<float>() + elementwise<double>() + elementwise<BFloat16>() + elementwise<Float16>();
  cases += grouped<float>() + grouped<double>() + grouped<BFloat16>() + grouped<Float16>();
  cases += mixed();
  return finish("engine", cases);
}
