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
  char *w, *g, *base_states[kMostOfBase], *method_state, *cut, *norms, *counter;
};

// A tensor of any type, with guard elements around it.
struct Tensor {
  TensorArgs args;
  std::vector<char> w, g, base_states[kMostOfBase], method_state, cut, norms, counter;
  const double* without_count = nullptr;  // its record, without what follows from the count; null: the host counts
  int64_t at;
  bool norms_given = false;

  // `parts`: some groups are so few and long that they are summed in parts. `methods`: some have a u or a dual, some a
  // cut of their own, some norms that were made elsewhere.
  Tensor(int64_t most, bool parts, bool methods, std::deque<NumberRow>& records) : at(integer(0, 1) * integer(1, 7)) {
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
    Options o = random_options(args.grouped);
    if (methods) o.method = Method(integer(0, 2));
    apply(o, args, integer(0, 1), records);
    if (methods && has_corrections(args.base.kind) && integer(0, 1)) {
      const bool fresh = args.numbers[kProxNumbers + kSplitNumbers + 4] == record_of(o, group_size(), true)[kCount];
      float steps = fresh ? 0 : float(o.count);
      counter.resize(sizeof steps);
      std::memcpy(counter.data(), &steps, sizeof steps);
      NumberRow& record = records.emplace_back(record_of(o, group_size(), fresh));
      record[kCount] = record[kCount + 1] = NAN;
      without_count = record.data();
    }
    args.topk = methods && o.is_split() && o.penalty == Penalty::l0 && integer(0, 1);
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
      for (auto* v : {&w, &g, &method_state, &base_states[0], &base_states[1], &base_states[2]}) {
        v->resize(size_t(args.numel + 16) * sizeof(S));
        for (int64_t i = 0; i < args.numel + 16; ++i)
          store(reinterpret_cast<S*>(v->data())[i], Opmath<S>(uniform(squares(v) ? 0.1 : -1, 1)));
      }
    });
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
            cut.data(),
            norms.data(),
            counter.data()};
  }

  // Where the engine finds the arrays; the gradient is sometimes out of line.
  void aim(const Places& p) {
    with_storage(args.dtype, [&](auto s) {
      using S = decltype(s);
      args.w = reinterpret_cast<S*>(p.w) + at;
      args.g = reinterpret_cast<S*>(p.g) + (args.numel % 4 == 0 ? 1 : at);
      for (int k = 0; k < args.base.states; ++k) args.state[k] = reinterpret_cast<S*>(p.base_states[k]) + at;
      if (args.method != Method::rvsm)
        args.state[args.base.states] = reinterpret_cast<S*>(p.method_state) + (args.numel % 7 == 0 ? 0 : at);
      args.cut = args.topk ? p.cut : nullptr;
      args.norms = norms_given ? reinterpret_cast<const double*>(p.norms) : nullptr;
    });
  }
};

// The same within a bound, that of the arithmetic or, in groups, of a sum in another order.
template <class S>
void compare(const Tensor& got, const Tensor& want, const char* what, double loose) {
  const double bound = sizeof(S) == 8 ? 1e-14 : sizeof(S) == 4 ? 1e-6 : 0.02;
  // A power by squarings is within an ulp or two of the host's.
  const bool summed = got.args.grouped || got.without_count != nullptr;
  const double allowed = summed ? bound + loose * bound : loose * bound;
  const std::pair<const std::vector<char>*, const std::vector<char>*> pairs[] = {
      {&got.w, &want.w},
      {&got.g, &want.g},
      {&got.base_states[0], &want.base_states[0]},
      {&got.base_states[1], &want.base_states[1]},
      {&got.base_states[2], &want.base_states[2]},
      {&got.method_state, &want.method_state}};
  for (const auto& [x, y] : pairs) {
    for (int64_t i = 0; i < got.args.numel + 16; ++i) {
      const double a = double(load(reinterpret_cast<const S*>(x->data())[i]));
      const double b = double(load(reinterpret_cast<const S*>(y->data())[i]));
      CHECK(std::fabs(a - b) <= allowed * std::max(1.0, std::fabs(b)), "%s: element %lld of %lld is %.9g, not %.9g",
            what, static_cast<long long>(i), static_cast<long long>(got.args.numel), a, b);
    }
  }
}

// Many tensors of all kinds and types in as many tables as they need; where the number is even, some groups are summed
// in parts, else short ones by the blocks of their step. `loose`: 0 where both engines round alike.
// Returns how many tensors were compared.
template <class Memory>
int64_t engines(int count, Action action, const cuda::Kernels& kernels, double loose) {
  Memory memory;
  std::deque<NumberRow> records;
  std::vector<Tensor> got;
  for (int i = 0; i < count; ++i)
    got.emplace_back(3 * cuda::kChunk<float>, count % 2 == 0, action == Action::step, records);
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
                      memory.place(x.cut),
                      memory.place(x.norms),
                      memory.place(x.counter)});
    x.aim(places.back());
    if (x.without_count != nullptr) {
      x.args.counter = reinterpret_cast<float*>(places.back().counter);
      x.args.numbers = x.without_count;
    }
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
  launches.divide(action == Action::prox ? 50 : cuda::kNarrow);  // in pieces, as tensors of 2^31 elements are
  launches.set_scratch(memory.scratch(launches.scratch_bytes()));
  const auto fetch = [&] {
    for (int i = 0; i < count; ++i) {
      Tensor& x = got[size_t(i)];
      const Places& p = places[size_t(i)];
      memory.fetch(x.w, p.w);
      memory.fetch(x.g, p.g);
      for (int k = 0; k < kMostOfBase; ++k) memory.fetch(x.base_states[k], p.base_states[k]);
      memory.fetch(x.method_state, p.method_state);
      memory.fetch(x.counter, p.counter);
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
                got[i].method_state == before[i].method_state &&
                std::equal(got[i].base_states, got[i].base_states + kMostOfBase, before[i].base_states),
            "a step in spite of Inf");
    launches.run({}, {placed, placed + 2});
  } else {
    launches.run({}, {});
  }
  fetch();
  const char* const what = action == Action::step ? "step" : "prox";
  for (size_t i = 0; i < got.size(); ++i) {
    with_storage(got[i].args.dtype, [&](auto s) { compare<decltype(s)>(got[i], want[i], what, loose); });
    if (got[i].without_count == nullptr) continue;
    const auto count = [](const Tensor& t) { return *reinterpret_cast<const float*>(t.counter.data()); };
    CHECK(count(got[i]) == count(before[i]) + float(got[i].args.active), "a tensor that was counted %g, then %g",
          count(before[i]), count(got[i]));
  }
  return count;
}

}  // namespace rvsm
