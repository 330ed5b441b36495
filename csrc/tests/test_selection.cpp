// Cuts against a sort: every size around the tiles, adversarial arrays, every type, what stands beside the weights,
// wrong last cuts, every instruction set, several numbers of threads.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "../cpu/selection.h"
#include "../math/storage.h"
#include "check.h"

using namespace rvsm;
using cpu::LastCut;

namespace rvsm::cpu {
extern const MagnitudeKernels magnitude_kernels_base;
#if defined(__x86_64__)
extern const MagnitudeKernels magnitude_kernels_avx2;
extern const MagnitudeKernels magnitude_kernels_avx512;
#endif
}  // namespace rvsm::cpu

namespace {

int64_t checked = 0;

template <class T>
int64_t magnitude_of(T x) {
  if constexpr (sizeof(T) == 8) {
    int64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & std::numeric_limits<int64_t>::max();
  } else {
    return int64_t(bits_of(x) & 0x7fffffffu);
  }
}

const cpu::Parallel& threads(int64_t count) {
  static cpu::Parallel parallel;
  parallel.threads = count;
  parallel.run = [](int64_t n, const std::function<void(int64_t, int64_t)>& work) {
    std::vector<std::thread> all;
    for (int64_t t = 0; t < n; ++t) all.emplace_back([&work, t] { work(t, t + 1); });
    for (auto& thread : all) thread.join();
  };
  return parallel;
}

// The bits of the number halfway between two magnitudes, of the lower one where there is none between.
int64_t halfway(Dtype dtype, int64_t low_bits, int64_t high_bits) {
  return with_storage(dtype, [&](auto s) {
    using T = Opmath<decltype(s)>;
    T low, high;
    std::memcpy(&low, &low_bits, sizeof low);
    std::memcpy(&high, &high_bits, sizeof high);
    const T middle = low + (high - low) / 2;
    return magnitude_of(std::isfinite(high) && middle < high ? middle : low);
  });
}

// All ranks of small arrays, some of large ones: cold, warm, and with last cuts that are wrong on both sides.
void check_population(const char* name, const cpu::Population& args, std::vector<int64_t> magnitudes) {
  std::sort(magnitudes.begin(), magnitudes.end(), std::greater<int64_t>());
  const int64_t n = args.numel();
  std::vector<int64_t> ranks;
  if (n <= 4)
    for (int64_t k = 0; k < n; ++k) ranks.push_back(k);
  else
    ranks = {0, 1, n / 10, n / 2, n - 1 - n / 20, n - 2, n - 1};
  const int64_t most = magnitudes.front(), least = magnitudes.back();
  for (const int64_t k : ranks) {
    const int64_t want = magnitudes[size_t(k)];
    LastCut fresh;
    const LastCut lasts[] = {{},
                             {want, 0},
                             {want, 1000},
                             {most, 3},
                             {least, 3},
                             {0, 0},
                             {std::numeric_limits<int64_t>::max(), 7},
                             {std::numeric_limits<int64_t>::min(), 7},
                             {want, std::numeric_limits<int32_t>::max()},
                             {most / 2, most}};
    for (const LastCut& last : lasts) {
      for (const int64_t count : {1, 3}) {
        LastCut used = last;
        const int64_t got = cpu::select(args, k, used, threads(count));
        CHECK(got == want, "%s: rank %lld of %lld is %llx, want %llx (last %llx, reach %lld, %lld threads)", name,
              (long long)k, (long long)n, (long long)got, (long long)want, (long long)last.magnitude,
              (long long)last.reach, (long long)count);
        const int64_t again = cpu::select(args, k, used, threads(count));
        CHECK(again == want, "%s: rank %lld of %lld again", name, (long long)k, (long long)n);
        checked += 2;
      }
    }
    if (k > 0) {
      fresh = {};
      const int64_t low = cpu::cut(args, k, false, fresh, threads(1));
      CHECK(low == want, "%s: cut that %lld survive", name, (long long)k);
      LastCut cold, warm = fresh;
      for (LastCut* last : {&cold, &warm}) {
        const int64_t middle = cpu::cut(args, k, true, *last, threads(1));
        CHECK(middle == halfway(args.dtype(), want, magnitudes[size_t(k - 1)]), "%s: halfway, %lld survive", name,
              (long long)k);
      }
      checked += 3;
    }
  }
  LastCut none;
  const int64_t all = cpu::cut(args, n, false, none, threads(1));
  with_storage(args.dtype(), [&](auto s) {
    Opmath<decltype(s)> number;
    std::memcpy(&number, &all, sizeof number);
    CHECK(number == -1, "%s: all survive, but the cut is %g", name, double(number));
  });
}

void check_array(const char* name, const TensorArgs& args, std::vector<int64_t> magnitudes) {
  check_population(name, cpu::Population({args}), std::move(magnitudes));
}

template <class S>
Dtype dtype_of() {
  return std::is_same_v<S, double>     ? Dtype::f64
         : std::is_same_v<S, BFloat16> ? Dtype::bf16
         : std::is_same_v<S, Float16>  ? Dtype::f16
                                       : Dtype::f32;
}

template <class S>
void check_values(const char* name, const std::vector<double>& values) {
  if (values.empty()) return;
  std::vector<S> w(values.size());
  std::vector<int64_t> magnitudes;
  for (size_t i = 0; i < w.size(); ++i) {
    store(w[i], Opmath<S>(values[i]));
    magnitudes.push_back(magnitude_of(load(w[i])));
  }
  TensorArgs args;
  args.numel = int64_t(w.size());
  args.dtype = dtype_of<S>();
  args.w = w.data();
  check_array(name, args, magnitudes);
  // The same elements as those of several tensors, an empty one among them.
  std::vector<TensorArgs> pieces;
  const int64_t n = args.numel, ends[] = {n / 7, n / 7, n - n / 3, n};
  int64_t at = 0;
  for (const int64_t end : ends) {
    args.numel = end - at;
    args.w = w.data() + at;
    pieces.push_back(args);
    at = end;
  }
  check_population(name, cpu::Population(pieces), std::move(magnitudes));
}

double normal() {
  static std::normal_distribution<double> of;
  return of(generator());
}

// Tensors of three types with the same arithmetic.
void several_types(int64_t n) {
  std::vector<float> a(static_cast<size_t>(n));
  std::vector<BFloat16> b(static_cast<size_t>(n / 2));
  std::vector<Float16> c(static_cast<size_t>(n / 3 + 1));
  std::vector<int64_t> magnitudes;
  std::vector<TensorArgs> tensors;
  const auto add = [&](auto& w, Dtype dtype) {
    for (auto& x : w) {
      store(x, float(normal()));
      magnitudes.push_back(magnitude_of(load(x)));
    }
    TensorArgs args;
    args.numel = int64_t(w.size());
    args.dtype = dtype;
    args.w = w.data();
    tensors.push_back(args);
  };
  add(b, Dtype::bf16);
  add(a, Dtype::f32);
  add(c, Dtype::f16);
  check_population("several types", cpu::Population(tensors), std::move(magnitudes));
}

template <class F>
std::vector<double> filled(int64_t n, const F& value) {
  std::vector<double> all(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) all[size_t(i)] = value(i);
  return all;
}

template <class S>
void all_arrays(int64_t n) {
  const double infinity = std::numeric_limits<double>::infinity(), nan = std::nan("");
  check_values<S>("normal", filled(n, [](int64_t) { return normal(); }));
  check_values<S>("all equal", filled(n, [](int64_t i) { return i % 2 ? 0.25 : -0.25; }));
  check_values<S>("zeros", filled(n, [](int64_t i) { return i % 2 ? 0.0 : -0.0; }));
  check_values<S>("two values", filled(n, [](int64_t) { return integer(0, 1) ? 1.5 : -2.5; }));
  check_values<S>("few values", filled(n, [](int64_t) { return double(integer(-9, 9)); }));
  check_values<S>("tiny", filled(n, [](int64_t) { return double(integer(0, 1000)) * 0x1p-149; }));
  check_values<S>("wide", filled(n, [](int64_t) { return log_uniform(1e-30, 1e30); }));
  check_values<S>("sorted", filled(n, [](int64_t i) { return double(i); }));
  check_values<S>("reversed", filled(n, [n](int64_t i) { return double(n - i) / double(n); }));
  check_values<S>("an outlier", filled(n, [n](int64_t i) { return i == n / 3 ? 1e30 : normal(); }));
  check_values<S>("mostly zero", filled(n, [](int64_t) { return integer(0, 9) ? 0.0 : normal(); }));
  check_values<S>("a dense half", filled(n, [n](int64_t i) { return i < n / 2 ? 1 + 1e-6 * normal() : normal(); }));
  check_values<S>("periodic", filled(n, [](int64_t i) { return i % 16 ? 1e-3 * normal() : 1 + normal(); }));
  check_values<S>("NaN and Inf", filled(n, [=](int64_t) {
                    const int64_t kind = integer(0, 3);
                    return kind == 0 ? nan : kind == 1 ? -infinity : normal();
                  }));
  check_values<S>("a NaN", filled(n, [=](int64_t i) { return i == n / 2 ? nan : normal(); }));
}

// A sample that misleads: the brackets fail, and the range becomes narrow step by step.
template <class S>
void misleading(int64_t n) {
  const auto sampled_as = [n](double value, std::vector<double> all) {
    for (const int64_t i : cpu::sample_places(n)) all[size_t(i)] = value;
    return all;
  };
  check_values<S>("sampled zeros", sampled_as(0, filled(n, [](int64_t) { return normal(); })));
  check_values<S>("sampled Inf", sampled_as(INFINITY, filled(n, [](int64_t) { return normal(); })));
  check_values<S>("sampled NaN", sampled_as(NAN, filled(n, [](int64_t) { return normal(); })));
  check_values<S>("sampled zeros, few values", sampled_as(0, filled(n, [](int64_t) { return integer(1, 3); })));
  check_values<S>("sampled zeros, neighbours",
                  sampled_as(0, filled(n, [](int64_t i) { return 1 + double(i % 5) * 0x1p-23; })));
  check_values<S>("sampled ends, all between", sampled_as(9, filled(n, [](int64_t i) { return i % 3; })));
}

// A last cut of a bracket that everything lies in, which leaves no room.
void crowded() {
  const int64_t n = 200000;
  std::vector<float> w(static_cast<size_t>(n));
  for (auto& x : w) x = float(1 + 1e-3 * normal());
  std::vector<float> sorted = w;
  std::sort(sorted.begin(), sorted.end(), std::greater<float>());
  TensorArgs args;
  args.numel = n;
  args.w = w.data();
  for (const int64_t k : {int64_t(10), n / 2, n - 10}) {
    LastCut last{magnitude_of(1.0f), 1 << 22};
    const int64_t got = cpu::select(cpu::Population({args}), k, last, threads(2));
    CHECK(got == magnitude_of(sorted[size_t(k)]), "crowded, rank %lld", (long long)k);
    ++checked;
  }
}

template <class Half, class Rest>
void beside(int64_t n, Master master) {
  std::vector<Half> param(static_cast<size_t>(n));
  std::vector<Rest> rest(param.size());
  std::vector<float> dual(param.size());
  std::vector<int64_t> magnitudes, with_dual;
  for (size_t i = 0; i < param.size(); ++i) {
    split(param[i], rest[i], float(normal()));
    dual[i] = float(0.3 * normal());
    const float w = join(param[i], rest[i]);
    magnitudes.push_back(magnitude_of(w));
    with_dual.push_back(magnitude_of(w + dual[i]));
  }
  TensorArgs args;
  args.numel = n;
  args.dtype = dtype_of<Half>();
  args.w = param.data();
  args.precision.master = master;
  args.state[0] = rest.data();
  check_array("master", args, magnitudes);
  args.method = Method::admm;
  args.state[0] = dual.data();
  args.state[1] = rest.data();
  check_array("master and dual", args, with_dual);
}

// Halfway between two magnitudes, and where there is nothing between.
void halves() {
  const auto cut_of = [](std::vector<float> w, int64_t survivors) {
    TensorArgs args;
    args.numel = int64_t(w.size());
    args.w = w.data();
    LastCut last;
    const int64_t bits = cpu::cut(cpu::Population({args}), survivors, true, last, threads(1));
    float cut;
    std::memcpy(&cut, &bits, sizeof cut);
    ++checked;
    return cut;
  };
  const float inf = std::numeric_limits<float>::infinity();
  CHECK(cut_of({1, 3}, 1) == 2, "between");
  CHECK(cut_of({1, 2, 2, 4}, 2) == 2, "ties");
  CHECK(cut_of({1, std::nextafter(1.0f, 2.0f)}, 1) == 1, "neighbours");
  CHECK(cut_of({1, inf}, 1) == 1, "beside Inf");
  CHECK(cut_of({1, std::nanf("")}, 1) == 1, "beside NaN");
  CHECK(cut_of({1, 2}, 2) == -1, "all survive");
}

// What a read finds, in every instruction set.
template <class S>
void instruction_sets(int64_t n) {
  std::vector<const cpu::MagnitudeKernels*> all = {&cpu::magnitude_kernels_base};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) all.push_back(&cpu::magnitude_kernels_avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    all.push_back(&cpu::magnitude_kernels_avx512);
#endif
  std::vector<S> w(static_cast<size_t>(n));
  for (auto& x : w) store(x, Opmath<S>(integer(0, 5) ? normal() : std::nan("")));
  TensorArgs args;
  args.numel = n;
  args.dtype = dtype_of<S>();
  args.w = w.data();
  const auto at = [](double x) { return magnitude_of(Opmath<S>(x)); };
  for (const cpu::Bracket& bracket : {cpu::Bracket{at(0.5), at(0.7)}, {0, at(1e30)}, {at(0.7), at(0.7)}}) {
    std::vector<int64_t> first;
    for (const cpu::MagnitudeKernels* kernels : all) {
      std::vector<int64_t> inside(static_cast<size_t>(n + 5000));
      cpu::Found found, counted;
      found.collected = inside.data();
      found.room = n + 5000;
      CHECK(kernels->scan(args, 1, n - 1, bracket, found), "room");
      CHECK(kernels->scan(args, 1, n - 1, bracket, counted), "nothing to collect");
      CHECK(counted.above == found.above && counted.inside == found.inside, "the same counts");
      std::vector<int64_t> got = {found.above, found.inside};
      for (int64_t i = 0; i < found.inside; ++i)
        got.push_back(sizeof(Opmath<S>) == 8 ? inside[size_t(i)] : reinterpret_cast<int32_t*>(inside.data())[i]);
      std::vector<int32_t> counts(static_cast<size_t>(cpu::Bins::kCounts));
      kernels->histogram(args, 1, n - 1, cpu::Bins(bracket), counts.data());
      got.insert(got.end(), counts.begin(), counts.end());
      if (first.empty()) first = got;
      CHECK(got == first, "instruction sets differ at %lld elements", (long long)n);
      ++checked;
    }
  }
}

}  // namespace

int main() {
  for (const int64_t n : {1, 2, 3, 17, 511, 513, 2048, 2049, 4097, 9999}) {
    all_arrays<float>(n);
    all_arrays<double>(n);
    all_arrays<BFloat16>(n);
    all_arrays<Float16>(n);
  }
  all_arrays<float>(200001);
  all_arrays<double>(100001);
  all_arrays<BFloat16>(100001);
  for (const int64_t n : {3000, 100000}) {
    misleading<float>(n);
    misleading<double>(n);
    misleading<BFloat16>(n);
  }
  crowded();
  for (const int64_t n : {1, 700, 5000, 70000}) {
    beside<BFloat16, int16_t>(n, Master::low);
    beside<Float16, float>(n, Master::whole);
  }
  halves();
  for (const int64_t n : {1, 700, 5000, 90000}) several_types(n);
  for (int64_t n = 2; n < 70; ++n) instruction_sets<float>(n);
  for (const int64_t n : {511, 512, 513, 5000}) {
    instruction_sets<float>(n);
    instruction_sets<double>(n);
    instruction_sets<BFloat16>(n);
    instruction_sets<Float16>(n);
  }
  return finish("selection", checked);
}
