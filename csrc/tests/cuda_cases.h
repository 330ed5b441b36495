// Random steps of the CUDA engine held against the CPU engine: by the interpreter in test_cuda.cpp, on a GPU in
// test_cuda_device.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <utility>
#include <vector>

#include "../cpu/engine.h"
#include "../cuda/launches.h"
#include "options.h"

namespace rvsm {

template <class S>
Dtype dtype_of() {
  if (sizeof(S) == 8) return Dtype::f64;
  if (sizeof(S) == 4) return Dtype::f32;
  return std::is_same_v<S, Float16> ? Dtype::f16 : Dtype::bf16;
}

// Where the engine finds its arrays: here, in the very memory of the test. On a device: copies of it.
struct HostMemory {
  std::deque<std::vector<char>> owned;

  char* place(std::vector<char>& bytes) { return bytes.data(); }
  char* scratch(int64_t bytes) { return owned.emplace_back(size_t(bytes) + 64, char(0x7f)).data(); }
  void fetch(std::vector<char>&, const char*) {}
};

// The value of a penalty over tensors.
template <class Memory>
double value_of(cuda::Launches& launches, std::vector<TensorArgs> tensors, Memory& memory) {
  launches.tensors = std::move(tensors);
  launches.divide();
  launches.set_scratch(memory.scratch(launches.scratch_bytes()));
  std::vector<char> total(sizeof(double));
  char* const place = memory.place(total);
  launches.run({}, {}, reinterpret_cast<double*>(place));
  memory.fetch(total, place);
  double value = 0;
  std::memcpy(&value, total.data(), sizeof value);
  return value;
}

// States of the base that has most.
constexpr int kMostOfBase = 3;

// Where the arrays of a tensor are.
struct Places {
  char *w, *g, *base_states[kMostOfBase], *method_state, *rest, *cut, *norms, *counter, *device_values;
  char* row = nullptr;  // of statistics
};

// A tensor of any type, with guard elements around it.
struct Tensor {
  TensorArgs args;
  std::vector<char> w, g, base_states[kMostOfBase], method_state, rest, cut, norms, counter, device_values;
  const double* of_device = nullptr;  // its record for CUDA: without what follows from the count, factors as 1
  DeviceNumbers device;
  int64_t at;
  bool norms_given = false, counted = false;
  std::vector<char> row;  // of statistics, where they are wanted
  double lam_of_device, beta_of_device;

  // `parts`: some groups are so few and long that they are summed in parts. `methods`: some have a u or a dual, some a
  // cut of their own, some norms that were made elsewhere. `general`: the number of a kernel in general.h that steps
  // it, or negative where any does.
  Tensor(int64_t most, bool parts, bool methods, int general, std::deque<NumberRow>& records)
      : at(integer(0, 1) * integer(1, 7)) {
    static const GroupView views[] = {{1, 1, 7, 5},    {1, 11, 5, 1},   {1, 4, 6, 9},    {3, 2, 4, 3}, {1, 1, 1, 37},
                                      {1, 700, 3, 2},  {1, 3, 2, 64},   {1, 30, 64, 9},  {1, 1, 9, 8}, {5, 1, 70, 16},
                                      {1, 1, 3, 4096}, {1, 1, 600, 24}, {1, 1, 2, 9000}, {1, 1, 1, 2}};
    args.dtype = Dtype(integer(0, 3));
    args.grouped = integer(0, 2) == 0;
    args.numel = integer(0, 9) == 0 ? integer(1, most) : integer(0, 40);
    if (args.grouped) {
      args.view = views[integer(0, 13)];
      if (parts && integer(0, 19) == 0) args.view = {1, 40000, 2, 1};  // in parts
      args.numel = args.view.count() * args.view.size();
    }
    if (methods && !args.grouped && integer(0, 3) == 0) draw_windows();
    Options o = random_options(args.grouped);
    if (methods) o.method = Method(integer(0, 2));
    if (general >= 0) choose(general, o);
    const bool wide = general >= 0 && args.dtype == Dtype::f64;
    const Options factors = methods && (wide || integer(0, 2) == 0) ? draw_device_numbers(o) : o;
    const bool fresh = integer(0, 1);
    apply(o, args, fresh, records);
    if (methods && args.dtype != Dtype::f64 && (general >= 0 || integer(0, 1))) draw_precision();
    counted = methods && (args.precision.rounds || (has_corrections(args.base.kind) && integer(0, 1)));
    NumberRow record = record_of(factors, group_size(), fresh);
    if (counted) {
      const float steps = fresh ? 0 : float(o.count);
      counter.resize(sizeof steps);
      std::memcpy(counter.data(), &steps, sizeof steps);
      args.precision.random = {uint64_t(integer(0, 1 << 30)) << 20, uint32_t(steps)};
      if (has_corrections(args.base.kind)) record[kCount] = record[kCount + 1] = NAN;
    }
    if (counted || !device_values.empty()) of_device = records.emplace_back(record).data();
    if (!o.is_split()) args.windows = {};
    args.topk = methods && !args.windows.on() && o.is_split() && o.penalty == Penalty::l0 && integer(0, 1);
    args.split = o.is_split();
    lam_of_device = factors.strength(group_size());
    beta_of_device = factors.beta;
    if (methods && args.topk) args.lam = lam_of_device = 0;
    args.active = integer(0, 9) != 0 && args.numel > 0;
    norms_given = methods && args.grouped && integer(0, 3) == 0;
    norms.resize(size_t(args.norm_rows() * args.view.count()) * sizeof(double));
    for (size_t i = 0; i < norms.size() / sizeof(double); ++i)
      reinterpret_cast<double*>(norms.data())[i] = integer(0, 9) == 0 ? 0 : uniform(0, 2);
    with_storage(args.dtype, [&](auto s) {
      using S = decltype(s);
      const Opmath<S> number = Opmath<S>(uniform(0, args.grouped ? 2 : 1));
      cut.resize(16);
      std::memcpy(cut.data(), &number, sizeof number);
    });
    for (auto* v : {&w, &g, &method_state, &base_states[0], &base_states[1], &base_states[2]})
      with_storage(type_of(v), [&](auto s) {
        using S = decltype(s);
        v->resize(size_t(args.numel + 16) * sizeof(S));
        for (int64_t i = 0; i < args.numel + 16; ++i)
          store(reinterpret_cast<S*>(v->data())[i], Opmath<S>(uniform(squares(v) ? 0.1 : -1, 1)));
      });
    // Whatever the rest of the weights is, it is taken as far as the parameter rounds to it.
    if (args.precision.master != Master::none) {
      rest.resize(size_t(args.numel + 16) * rest_size());
      for (char& c : rest) c = char(integer(0, 63));
    }
  }

  // Windows of N:M sparsity, some of them inside the vectors of a thread; whole ones.
  void draw_windows() {
    const int32_t m = int32_t(integer(0, 1) ? int64_t(2) << integer(0, 3) : integer(2, kMostOfWindow));
    args.windows = {int32_t(integer(1, m - 1)), m, integer(0, 1) ? 1 : integer(1, 9)};
    args.numel = (args.numel + args.windows.whole() - 1) / args.windows.whole() * args.windows.whole();
  }

  // What one of the kKernels kernels is for: a base, a method with or without a state, a type of the arithmetic.
  static constexpr int kKernels = 24;
  void choose(int kernel, Options& o) {
    const int base = kernel % 6;
    args.dtype = kernel / 12 ? Dtype::f64 : any_of({Dtype::f32, Dtype::bf16, Dtype::f16});
    o.base = BaseKind(base / 2);
    o.momentum = base == 1 ? 0.9 : 0;
    o.nesterov = false;
    o.decoupled = base != 3;
    if (base == 2) o.group_lasso = 0;
    o.amsgrad = base == 5;
    o.penalty = Penalty(integer(1, 3));
    o.method = kernel / 6 % 2 ? Method(integer(1, 2)) : Method::rvsm;
  }

  // Arrays of other types than the parameter.
  void draw_precision() {
    const bool half = args.dtype != Dtype::f32;
    Precision& p = args.precision;
    p.mixed = true;
    const int64_t kind = integer(0, 2);
    if (half && kind == 0) p.master = args.dtype == Dtype::bf16 ? Master::low : Master::whole;
    p.rounds = half && kind == 1;
    p.grad = any_of({Dtype::f32, Dtype::bf16, Dtype::f16});
    const Dtype usual = p.master == Master::none ? args.dtype : Dtype::f32;
    const Dtype of_base = any_of({usual, Dtype::f32, Dtype::bf16});
    for (int k = 0; k < args.states(); ++k) p.states[size_t(k)] = k < args.base.states ? of_base : usual;
  }

  static Dtype any_of(std::initializer_list<Dtype> types) {
    return types.begin()[integer(0, int64_t(types.size()) - 1)];
  }

  // Some numbers stand on the device: rounded to a type there. Returns the options with 1 in their places.
  Options draw_device_numbers(Options& o) {
    Options factors = o;
    device_values.resize(8 * kDeviceNumbers);
    double* const numbers[kDeviceNumbers] = {&o.lr, &o.lam, &o.beta, &o.weight_decay};
    double* const ones[kDeviceNumbers] = {&factors.lr, &factors.lam, &factors.beta, &factors.weight_decay};
    for (int k = 0; k < kDeviceNumbers; ++k) {
      if (k > 0 && integer(0, 1)) continue;  // at least one is there
      device.dtype[k] = Dtype(integer(0, 3));
      with_storage(device.dtype[k], [&](auto s) {
        store(s, Opmath<decltype(s)>(*numbers[k]));
        std::memcpy(device_values.data() + 8 * k, &s, sizeof s);
        *numbers[k] = double(load(s));
      });
      *ones[k] = 1;
      device.at[k] = this;  // aim() knows where
    }
    return factors;
  }

  size_t rest_size() const { return args.precision.master == Master::low ? sizeof(int16_t) : sizeof(float); }

  // The type that an array is stored in.
  Dtype type_of(const std::vector<char>* v) const {
    const Precision& p = args.precision;
    if (!p.mixed || v == &w) return args.dtype;
    if (v == &g) return p.grad;
    for (int k = 0; k < args.base.states; ++k)
      if (v == &base_states[k]) return p.states[size_t(k)];
    return v == &method_state && args.method != Method::rvsm ? p.states[args.base.states] : args.dtype;
  }

  static constexpr size_t kCount = kProxNumbers + kSplitNumbers + 4;  // the first number that follows from the count
  int64_t group_size() const { return args.grouped ? args.view.size() : 1; }

  // Whether an array holds averages of squares.
  bool squares(const std::vector<char>* v) const { return v == &base_states[1] || v == &base_states[2]; }

  Places own() {
    return {w.data(),
            g.data(),
            {base_states[0].data(), base_states[1].data(), base_states[2].data()},
            method_state.data(),
            rest.data(),
            cut.data(),
            norms.data(),
            counter.data(),
            device_values.data(),
            row.data()};
  }

  // Statistics are wanted; where nothing is written, NaN stays.
  void want_statistics() {
    row.resize(kColumnsOfRow * sizeof(double));
    std::fill_n(reinterpret_cast<double*>(row.data()), int(kColumnsOfRow), NAN);
  }
  const double* numbers_of_row() const { return reinterpret_cast<const double*>(row.data()); }

  // Where the engine finds the arrays; the gradient is sometimes out of line.
  void aim(const Places& p) {
    const auto element = [&](char* array, const std::vector<char>* v, int64_t i) {
      return array + i * with_storage(type_of(v), [](auto s) { return int64_t(sizeof s); });
    };
    args.w = element(p.w, &w, at);
    args.g = element(p.g, &g, args.numel % 4 == 0 ? 1 : at);
    for (int k = 0; k < args.base.states; ++k) args.state[size_t(k)] = element(p.base_states[k], &base_states[k], at);
    if (args.method != Method::rvsm)
      args.state[args.base.states] = element(p.method_state, &method_state, args.numel % 7 == 0 ? 0 : at);
    if (args.precision.master != Master::none) args.state[size_t(args.states())] = p.rest + at * int64_t(rest_size());
    args.cut = args.topk ? p.cut : nullptr;
    args.norms = norms_given ? reinterpret_cast<const double*>(p.norms) : nullptr;
    for (int k = 0; k < kDeviceNumbers; ++k)
      if (device.at[k] != nullptr) device.at[k] = p.device_values + 8 * k;
    args.statistics = row.empty() ? nullptr : reinterpret_cast<double*>(p.row);
  }

  // What the array `v` of element i holds; of weights with a master the weight. `v` is this tensor's.
  double value(const std::vector<char>* v, int64_t i) const {
    if (v == &w && args.precision.master == Master::low)
      return double(
          join(reinterpret_cast<const BFloat16*>(w.data())[i], reinterpret_cast<const int16_t*>(rest.data())[i]));
    if (v == &w && args.precision.master == Master::whole)
      return double(
          join(reinterpret_cast<const Float16*>(w.data())[i], reinterpret_cast<const float*>(rest.data())[i]));
    return with_storage(type_of(v),
                        [&](auto s) { return double(load(reinterpret_cast<const decltype(s)*>(v->data())[i])); });
  }
};

// The same within a bound, that of the arithmetic or, in groups, of a sum in another order.
inline void compare(const Tensor& got, const Tensor& want, const char* what, double loose) {
  // A power by squarings is within an ulp or two of the host's, and so is a product of factors.
  const bool summed = got.args.grouped || got.of_device != nullptr;
  const std::pair<const std::vector<char>*, const std::vector<char>*> pairs[] = {
      {&got.w, &want.w},
      {&got.g, &want.g},
      {&got.base_states[0], &want.base_states[0]},
      {&got.base_states[1], &want.base_states[1]},
      {&got.base_states[2], &want.base_states[2]},
      {&got.method_state, &want.method_state}};
  for (const auto& [x, y] : pairs) {
    const int64_t size = x == &got.w && got.args.precision.master != Master::none
                             ? 4
                             : with_storage(got.type_of(x), [](auto s) { return int64_t(sizeof s); });
    const double bound = size == 8 ? 1e-14 : size == 4 ? 1e-6 : 0.02;
    const double allowed = summed ? bound + loose * bound : loose * bound;
    int64_t unlike = 0;
    for (int64_t i = 0; i < got.args.numel + 16; ++i) {
      const double a = got.value(x, i), b = want.value(y, i);
      unlike += a != b;
      CHECK(std::fabs(a - b) <= allowed * std::max(1.0, std::fabs(b)), "%s: element %lld of %lld is %.9g, not %.9g",
            what, static_cast<long long>(i), static_cast<long long>(got.args.numel), a, b);
    }
    // The same random bits: the bound above is wider than what others would change.
    if (x == &got.w && got.args.precision.rounds)
      CHECK(unlike <= 2 + got.args.numel / 10, "%s: %lld of %lld elements are rounded otherwise", what,
            static_cast<long long>(unlike), static_cast<long long>(got.args.numel));
  }
}

// A row of statistics of a tensor against the sums of the CPU engine. Counts are the same; a difference of numbers that
// are rounded alike is off by their rounding, and so is the square of its norm.
inline void compare_row(const Tensor& got, const Tensor& want, const Sums& sums, double loose) {
  const TensorArgs& args = want.args;
  double row[kColumnsOfRow];
  write_row(row, sums, args.grouped, args.split, args.lam, args.beta);
  const double bound = (args.dtype == Dtype::f64 ? 1e-13 : 1e-6) * (1 + loose), n = double(args.numel);
  for (int k = 0; k < kColumnsOfRow; ++k) {
    const double x = got.numbers_of_row()[k], y = row[k];
    if (!args.active) {
      CHECK(std::isnan(x), "statistics %d of a tensor that is not stepped: %.17g", k, x);
      continue;
    }
    // Without a splitting u is w, whatever norms were given.
    if (k == kZeros && !args.split && want.norms_given) continue;
    const bool counts = k == kZeros || k == kNonfinite || k == kZeroGroups;
    const double allowed = counts ? 0 : bound * (std::fabs(y) + std::sqrt(std::fabs(y) * n) + args.lam * n);
    CHECK(std::fabs(x - y) <= allowed, "statistics %d of %lld elements: %.17g, not %.17g", k,
          static_cast<long long>(args.numel), x, y);
  }
}

// Many tensors of all kinds and types in as many tables as they need; where the number is even, some groups are summed
// in parts, else short ones by the blocks of their step. `loose`: 0 where both engines round alike. `general`: the
// kernels of general.h alone, one after the other.
// Returns how many tensors were compared.
template <class Memory>
int64_t engines(int count, Action action, const cuda::Kernels& kernels, double loose, bool general = false) {
  Memory memory;
  std::deque<NumberRow> records;
  std::vector<Tensor> got;
  for (int i = 0; i < count; ++i)
    got.emplace_back(3 * cuda::kChunk<float>, count % 2 == 0, action == Action::step,
                     general ? i % Tensor::kKernels : -1, records);
  // Jobs without any statistics are divided otherwise.
  if (action == Action::step && integer(0, 2) != 0)
    for (Tensor& t : got)
      if (integer(0, 3) != 0) t.want_statistics();
  std::vector<Tensor> want = got;
  const std::vector<Tensor> before = got;
  cuda::Launches launches(action, kernels);
  cpu::TaskList tasks(action);
  std::vector<Places> places;
  for (int i = 0; i < count; ++i) {
    Tensor &x = got[size_t(i)], &y = want[size_t(i)];
    places.push_back({memory.place(x.w),
                      memory.place(x.g),
                      {memory.place(x.base_states[0]), memory.place(x.base_states[1]), memory.place(x.base_states[2])},
                      memory.place(x.method_state),
                      memory.place(x.rest),
                      memory.place(x.cut),
                      memory.place(x.norms),
                      memory.place(x.counter),
                      memory.place(x.device_values),
                      memory.place(x.row)});
    x.aim(places.back());
    if (x.of_device != nullptr) x.args.numbers = x.of_device;
    if (x.counted) x.args.counter = reinterpret_cast<float*>(places.back().counter);
    if (!x.device_values.empty()) x.args.device_numbers = &x.device;
    x.args.lam = x.lam_of_device;
    x.args.beta = x.beta_of_device;
    y.aim(y.own());
    launches.tensors.push_back(x.args);
    tasks.tensors.push_back(y.args);
    if (action == Action::prox) launches.tensors.back().g = nullptr;
  }
  tasks.divide();
  std::vector<char> cpu_scratch(size_t(tasks.scratch_bytes()) + 64);
  tasks.set_scratch(cpu_scratch.data());
  tasks.start(1);
  tasks.work(0, 1);
  if (action == Action::penalty) {
    const double value = value_of(launches, launches.tensors, memory);
    CHECK(std::fabs(value - tasks.total()) <= 1e-6 * (1 + tasks.total()), "a penalty of %.17g, not %.17g", value,
          tasks.total());
    return 1;
  }
  // In pieces, as tensors of 2^31 elements are.
  launches.divide(action == Action::prox || general ? 50 : cuda::kNarrow);
  launches.set_scratch(memory.scratch(launches.scratch_bytes()));
  const auto fetch = [&] {
    for (int i = 0; i < count; ++i) {
      Tensor& x = got[size_t(i)];
      const Places& p = places[size_t(i)];
      memory.fetch(x.w, p.w);
      memory.fetch(x.g, p.g);
      for (int k = 0; k < kMostOfBase; ++k) memory.fetch(x.base_states[k], p.base_states[k]);
      memory.fetch(x.method_state, p.method_state);
      memory.fetch(x.rest, p.rest);
      memory.fetch(x.counter, p.counter);
      memory.fetch(x.row, p.row);
    }
  };
  std::vector<char> numbers(3 * sizeof(float));
  const float values[] = {1, 1, 0};  // a scale, found_inf, and no Inf
  std::memcpy(numbers.data(), values, sizeof values);
  const float* const placed = reinterpret_cast<const float*>(memory.place(numbers));
  if (action == Action::step) {
    launches.run({}, {nullptr, placed + 1});
    fetch();
    for (size_t i = 0; i < got.size(); ++i)
      CHECK(got[i].w == before[i].w && got[i].counter == before[i].counter && got[i].g == before[i].g &&
                got[i].rest == before[i].rest && got[i].method_state == before[i].method_state &&
                got[i].row == before[i].row &&
                std::equal(got[i].base_states, got[i].base_states + kMostOfBase, before[i].base_states),
            "a step in spite of Inf");
    launches.run({}, {placed, placed + 2});
  } else {
    launches.run({}, {});
  }
  fetch();
  const char* const what = action == Action::step ? "step" : "prox";
  const std::vector<Sums> sums = action == Action::step ? tasks.totals() : std::vector<Sums>();
  for (size_t i = 0; i < got.size(); ++i) {
    compare(got[i], want[i], what, loose);
    if (!got[i].row.empty()) compare_row(got[i], want[i], sums[i], loose);
    if (!got[i].counted) continue;
    const auto count = [](const Tensor& t) { return *reinterpret_cast<const float*>(t.counter.data()); };
    CHECK(count(got[i]) == count(before[i]) + float(got[i].args.active), "a tensor that was counted %g, then %g",
          count(before[i]), count(got[i]));
  }
  return count;
}

}  // namespace rvsm
