// The CPU engine on plain memory: every element exactly once, all sizes around the vector width, all alignments, every
// instruction set and every number of threads with the same bits, groups against plain loops.

#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "../cpu/engine.h"
#include "../math/storage.h"
#include "options.h"

using namespace rvsm;
using cpu::TaskList;

namespace rvsm::cpu {
extern const ElementKernels element_kernels_base;
#if defined(__x86_64__)
extern const ElementKernels element_kernels_avx2;
extern const ElementKernels element_kernels_avx512;
#endif
}  // namespace rvsm::cpu

namespace {

std::vector<const cpu::ElementKernels*> instruction_sets() {
  std::vector<const cpu::ElementKernels*> all = {&cpu::element_kernels_base};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) all.push_back(&cpu::element_kernels_avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    all.push_back(&cpu::element_kernels_avx512);
#endif
  return all;
}

Options split_options() {
  Options o = random_options(false);
  o.penalty = Penalty(integer(1, 3));
  o.method = Method(integer(0, 2));
  return o;
}

template <class S>
std::vector<S> random_values(int64_t n) {
  std::vector<S> v(size_t(n) + 16);
  for (auto& x : v) store(x, Opmath<S>(uniform(-1, 1)));
  return v;
}

// One tensor of a step, with guard elements around what may be written.
template <class S>
struct Tensor {
  std::vector<S> w, g, m, x, v, largest;  // m, v, largest: the states of the base; x: that of the method
  int64_t at;
  std::shared_ptr<std::deque<NumberRow>> records = std::make_shared<std::deque<NumberRow>>();

  Tensor(int64_t n, int64_t shift)
      : w(random_values<S>(n)), g(random_values<S>(n)), m(random_values<S>(n)), x(random_values<S>(n)), at(shift) {
    v = largest = random_values<S>(n);
    for (auto* squares : {&v, &largest})
      for (auto& y : *squares) store(y, std::fabs(load(y)) + Opmath<S>(0.1));
  }

  TensorArgs args(int64_t n, const Options& o, const GroupView* view = nullptr) {
    TensorArgs r;
    r.numel = n;
    r.dtype = sizeof(S) == 8               ? Dtype::f64
              : sizeof(S) == 4             ? Dtype::f32
              : std::is_same_v<S, Float16> ? Dtype::f16
                                           : Dtype::bf16;
    r.grouped = view != nullptr;
    if (view != nullptr) r.view = *view;
    r.w = w.data() + at;
    r.g = g.data() + at;
    apply(o, r, false, *records);
    S* const of_base[] = {m.data() + at, v.data() + at, largest.data() + at};
    for (int k = 0; k < r.base.states; ++k) r.state[k] = of_base[k];
    if (r.method != Method::rvsm) r.state[r.base.states] = x.data() + at;
    return r;
  }
  bool same(const Tensor& other) const {
    const auto equal = [](const std::vector<S>& a, const std::vector<S>& b) {
      return std::memcmp(a.data(), b.data(), a.size() * sizeof(S)) == 0;
    };
    return equal(w, other.w) && equal(g, other.g) && equal(m, other.m) && equal(x, other.x) && equal(v, other.v) &&
           equal(largest, other.largest);
  }

  // The step of one element in plain code; `u` of what is thresholded.
  template <class U>
  void step(int64_t i, const TensorArgs& args, Opmath<S> unit, const U& u) {
    using T = Opmath<S>;
    const size_t k = size_t(i + at);
    T wi = load(w[k]), gi = load(g[k]), state[4] = {};
    std::vector<S>* states[] = {&m, &v, &largest, &x};
    states[args.base.states] = &x;
    for (int s = 0; s < args.states(); ++s) state[s] = load((*states[s])[k]);
    plain_step(wi, gi, state, unit, args, u);
    store(w[k], wi);
    if (args.base.writes_grad) store(g[k], gi);
    for (int s = 0; s < args.states(); ++s) store((*states[s])[k], state[s]);
  }
};

// Runs a job on its own scratch, dealt for so many threads and done by as many workers, or by fewer.
void run(TaskList& job, int threads, int workers) {
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

void run(TaskList& job, int threads) { run(job, threads, threads); }

template <class S>
int64_t elementwise() {
  int64_t cases = 0;
  const int64_t lanes = 64 / int64_t(sizeof(S));
  std::vector<int64_t> sizes;
  for (int64_t n = 0; n <= 3 * lanes + 1; ++n) sizes.push_back(n);
  for (const int64_t n : {511, 512, 513, 32767, 32768, 32769, 70000}) sizes.push_back(n);
  for (const int64_t n : sizes) {
    for (int64_t shift = 0; shift < (n < 200 ? 4 : 2); ++shift) {
      const Options o = split_options();
      const Tensor<S> start(n, shift);
      Tensor<S> want = start;
      const TensorArgs plain = want.args(n, o);
      const auto prox = prox_of<Opmath<S>>(plain.numbers);
      const auto u = [&](Opmath<S> v) {
        return with_penalty(
            prox.penalty, [&](auto tag) { return std::copysign(shrink<decltype(tag)::value>(std::fabs(v), prox), v); });
      };
      for (int64_t i = 0; i < n; ++i) want.step(i, plain, Opmath<S>(0), u);
      for (const cpu::ElementKernels* k : instruction_sets()) {
        Tensor<S> got = start;
        TensorArgs args = got.args(n, o);
        args.view = {1, 1, n, 1};
        if (n > 0) k->step(args, {0, 0, 1, 0, n}, nullptr);
        CHECK(got.same(want), "%s: %lld elements at %lld, storage of %zu bytes", k->isa, static_cast<long long>(n),
              static_cast<long long>(shift), sizeof(S));
        ++cases;
      }
      for (const int threads : {1, 3}) {
        Tensor<S> got = start;
        TaskList job(Action::step);
        job.tensors.push_back(got.args(n, o));
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
  using T = Opmath<S>;
  int64_t cases = 0;
  std::vector<GroupView> views = {
      {1, 1, 1, 1},      {1, 1, 5, 9},      {1, 7, 5, 9},      {1, 64, 3, 49},    {1, 1, 300, 700},
      {1, 300, 700, 1},  {1, 40, 33, 9},    {4, 9, 16, 1},     {3, 1, 1, 70000},  {1, 1, 1, 300000},
      {1, 300001, 1, 1}, {1, 2, 2, 140000}, {1, 17, 2100, 1},  {1, 3, 2, 2049},   {1, 150000, 3, 1},
      {2, 5, 7, 33},     {1, 1, 4000, 9},   {1, 1100, 997, 1}, {1, 1027, 120, 9}, {2, 1050, 530, 1}};  // rows in parts
  for (const GroupView& v : views) {
    Options o = split_options();
    o.method = Method::rvsm;
    o.group_lasso = integer(0, 1) * 0.01;
    const int64_t n = v.batch * v.outer * v.groups * v.inner;
    o.lam *= std::sqrt(double(v.size())) * 0.3;  // around the norm of random weights
    const Tensor<S> start(n, 1);
    Tensor<S> want = start;
    const TensorArgs args = want.args(n, o, &v);
    std::vector<T> ratio(size_t(v.count())), unit(size_t(v.count()));
    std::vector<double> sums(size_t(v.count()));
    const auto group = [&](int64_t i) {
      return size_t(i / (v.outer * v.groups * v.inner) * v.groups + i / v.inner % v.groups);
    };
    for (int64_t i = 0; i < n; ++i) sums[group(i)] += std::pow(double(load(start.w[size_t(i + 1)])), 2);
    const Split<T> s = split_of<T>(args.numbers, 1);
    for (size_t g = 0; g < sums.size(); ++g) {
      const T r = T(std::sqrt(sums[g]));
      ratio[g] = shrink_ratio(r, s.prox);
      unit[g] = s.lasso != 0 ? 1 / r : T(0);
    }
    for (int64_t i = 0; i < n; ++i) {
      const T direction = load(want.w[size_t(i + 1)]) * unit[group(i)];
      want.step(i, args, direction, [&](T w) { return w * ratio[group(i)]; });
    }
    Tensor<S> first = start;
    for (const auto& [threads, workers] : {std::pair{1, 1}, {2, 2}, {4, 4}, {3, 1}, {4, 2}, {7, 3}}) {
      Tensor<S> got = start;
      TaskList job(Action::step);
      job.tensors.push_back(got.args(n, o, &v));
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
    TaskList value(Action::penalty), prox(Action::prox);
    Tensor<S> a = start, b = start;
    const TensorArgs r = a.args(n, o, &v);
    value.tensors.push_back(r);
    prox.tensors.push_back(b.args(n, o, &v));
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

// Many small tensors beside inactive and empty ones: a tensor that has no gradient stays as it is.
int64_t mixed() {
  std::vector<Tensor<float>> tensors;
  TaskList job(Action::step);
  for (int i = 0; i < 300; ++i) tensors.emplace_back(integer(0, 40), i % 4);
  const std::vector<Tensor<float>> start = tensors;
  for (size_t i = 0; i < tensors.size(); ++i) {
    Options o = split_options();
    o.base = BaseKind::sgd;
    TensorArgs args = tensors[i].args(int64_t(tensors[i].w.size()) - 16, o);
    args.active = i % 3 != 0 && args.numel > 0;
    job.tensors.push_back(args);
  }
  run(job, 4);
  for (size_t i = 0; i < tensors.size(); ++i) CHECK(tensors[i].same(start[i]) == !job.tensors[i].active, "row %zu", i);
  return 300;
}

}  // namespace

int main() {
  int64_t cases = elementwise<float>() + elementwise<double>() + elementwise<BFloat16>() + elementwise<Float16>();
  cases += grouped<float>() + grouped<double>() + grouped<BFloat16>() + grouped<Float16>();
  cases += mixed();
  return finish("engine", cases);
}
