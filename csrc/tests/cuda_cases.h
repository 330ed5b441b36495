// Random steps of the CUDA engine held against the CPU engine: by the interpreter in test_cuda.cpp, on a GPU in
// test_cuda_device.cpp.
#pragma once

#include <cmath>
#include <cstring>
#include <deque>
#include <utility>
#include <vector>

#include "../cpu/engine.h"
#include "../cuda/job.h"
#include "check.h"

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

// The value of a penalty job over rows.
template <class Memory>
double value_of(cuda::Job& job, std::vector<Row> rows, Memory& memory) {
  for (Row& row : rows) row.m = nullptr;
  job.rows = std::move(rows);
  job.divide();
  job.set_scratch(memory.scratch(job.scratch_bytes()));
  std::vector<char> total(sizeof(double));
  char* const place = memory.place(total);
  job.run({}, {}, reinterpret_cast<double*>(place));
  memory.fetch(total, place);
  double value = 0;
  std::memcpy(&value, total.data(), sizeof value);
  return value;
}

inline Options random_options(bool grouped) {
  Options o;
  o.penalty = Penalty(integer(0, 3));
  o.lam = log_uniform(1e-3, 0.1) * (grouped ? 3 : 1);
  o.beta = 0.5;
  o.a = log_uniform(0.1, 10);
  o.lr = 0.1;
  o.momentum = double(integer(0, 1)) * 0.9;
  o.nesterov = o.momentum != 0 && integer(0, 1);
  o.weight_decay = double(integer(0, 1)) * 0.01;
  o.decoupled = integer(0, 1);
  o.maximize = integer(0, 1);
  o.group_lasso = grouped ? double(integer(0, 1)) * 0.1 : 0;
  o.group_scale = grouped && integer(0, 1);
  return o;
}

// A tensor of any type, with guard elements around it.
struct Tensor {
  Row row;
  std::vector<char> w, g, m, x, cut;
  int64_t at;

  // `parts`: some groups are so few and long that they are summed in parts. `methods`: some keep a u or a dual, some
  // have a cut of their own.
  Tensor(int64_t most, bool parts, bool methods) : at(integer(0, 1) * integer(1, 7)) {
    static const GroupView views[] = {{1, 1, 7, 5},    {1, 11, 5, 1},   {1, 4, 6, 9},    {3, 2, 4, 3}, {1, 1, 1, 37},
                                      {1, 700, 3, 2},  {1, 3, 2, 64},   {1, 30, 64, 9},  {1, 1, 9, 8}, {5, 1, 70, 16},
                                      {1, 1, 3, 4096}, {1, 1, 600, 24}, {1, 1, 2, 9000}, {1, 1, 1, 2}};
    row.dtype = Dtype(integer(0, 3));
    row.grouped = integer(0, 2) == 0;
    row.numel = integer(0, 9) == 0 ? integer(1, most) : integer(0, 40);
    if (row.grouped) {
      row.view = views[integer(0, 13)];
      if (parts && integer(0, 19) == 0) row.view = {1, 40000, 2, 1};  // in parts
      row.numel = row.view.count() * row.view.size();
    }
    const Options o = random_options(row.grouped);
    const int64_t size = row.grouped ? row.view.size() : 1;
    row.step = make_step(o, size, integer(0, 1));
    row.momentum = momentum_of(o);
    if (methods && is_split(o)) {
      row.method = Method(integer(0, 2));
      row.topk = o.penalty == Penalty::l0 && integer(0, 1);
    }
    row.lam = strength(o, size);
    row.beta = o.beta;
    row.active = integer(0, 9) != 0 && row.numel > 0;
    with_storage(row.dtype, [&](auto s) {
      using S = decltype(s);
      const Arithmetic<S> number = Arithmetic<S>(uniform(0, row.grouped ? 2 : 1));
      cut.resize(16);
      std::memcpy(cut.data(), &number, sizeof number);
      for (auto* v : {&w, &g, &m, &x}) {
        v->resize(size_t(row.numel + 16) * sizeof(S));
        for (int64_t i = 0; i < row.numel + 16; ++i)
          store(reinterpret_cast<S*>(v->data())[i], Arithmetic<S>(uniform(-1, 1)));
      }
    });
  }

  // Where the engine finds the arrays; the gradient is sometimes out of line.
  void aim(char* w_place, char* g_place, char* m_place, char* x_place, const char* cut_place) {
    with_storage(row.dtype, [&](auto s) {
      using S = decltype(s);
      row.w = reinterpret_cast<S*>(w_place) + at;
      row.g = reinterpret_cast<S*>(g_place) + (row.numel % 4 == 0 ? 1 : at);
      row.m = row.momentum == Momentum::none ? nullptr : reinterpret_cast<S*>(m_place) + at;
      row.kept = row.method == Method::rvsm ? nullptr : reinterpret_cast<S*>(x_place) + (row.numel % 7 == 0 ? 0 : at);
      row.cut = row.topk ? cut_place : nullptr;
    });
  }
};

// The same within a bound, that of the arithmetic or, in groups, of a sum in another order.
template <class S>
void compare(const Tensor& got, const Tensor& want, const char* what, double loose) {
  const double bound = sizeof(S) == 8 ? 1e-14 : sizeof(S) == 4 ? 1e-6 : 0.02;
  const double allowed = got.row.grouped ? bound + loose * bound : loose * bound;
  const std::pair<const std::vector<char>*, const std::vector<char>*> pairs[] = {
      {&got.w, &want.w}, {&got.m, &want.m}, {&got.x, &want.x}};
  for (const auto& [x, y] : pairs) {
    for (int64_t i = 0; i < got.row.numel + 16; ++i) {
      const double a = double(load(reinterpret_cast<const S*>(x->data())[i]));
      const double b = double(load(reinterpret_cast<const S*>(y->data())[i]));
      CHECK(std::fabs(a - b) <= allowed, "%s: element %lld of %lld is %.9g, not %.9g", what, static_cast<long long>(i),
            static_cast<long long>(got.row.numel), a, b);
    }
  }
}

// Many tensors of all kinds and types in as many tables as they need; where the number is even, some groups are summed
// in parts, else short ones by the blocks of their step. `loose`: 0 where both engines round alike.
// Returns how many tensors were compared.
template <class Memory>
int64_t engines(int count, Action action, const cuda::Kernels& kernels, double loose) {
  Memory memory;
  std::vector<Tensor> got;
  for (int i = 0; i < count; ++i) got.emplace_back(3 * cuda::kChunk<float>, count % 2 == 0, action == Action::step);
  std::vector<Tensor> want = got;
  const std::vector<Tensor> before = got;
  cuda::Job job(action, kernels);
  cpu::Job cpu_job(action);
  struct Places {
    char *w, *m, *x;
  };
  std::vector<Places> places;
  for (int i = 0; i < count; ++i) {
    Tensor &x = got[size_t(i)], &y = want[size_t(i)];
    const Places p = places.emplace_back(Places{memory.place(x.w), memory.place(x.m), memory.place(x.x)});
    x.aim(p.w, memory.place(x.g), p.m, p.x, memory.place(x.cut));
    y.aim(y.w.data(), y.g.data(), y.m.data(), y.x.data(), y.cut.data());
    job.rows.push_back(x.row);
    cpu_job.rows.push_back(y.row);
    if (action == Action::prox) job.rows.back().g = nullptr;
  }
  cpu_job.divide();
  std::vector<char> cpu_scratch(size_t(cpu_job.scratch_bytes()) + 64);
  cpu_job.set_scratch(cpu_scratch.data());
  cpu_job.start(1);
  cpu_job.work(0, 1);
  if (action == Action::penalty) {
    const double value = value_of(job, job.rows, memory);
    CHECK(std::fabs(value - cpu_job.total()) <= 1e-6 * (1 + cpu_job.total()), "a penalty of %.17g, not %.17g", value,
          cpu_job.total());
    return 1;
  }
  job.divide(action == Action::prox ? 50 : cuda::kNarrow);  // in pieces, as tensors of 2^31 elements are
  job.set_scratch(memory.scratch(job.scratch_bytes()));
  const auto fetch = [&] {
    for (int i = 0; i < count; ++i) {
      memory.fetch(got[size_t(i)].w, places[size_t(i)].w);
      memory.fetch(got[size_t(i)].m, places[size_t(i)].m);
      memory.fetch(got[size_t(i)].x, places[size_t(i)].x);
    }
  };
  std::vector<char> numbers(3 * sizeof(float));
  const float values[] = {1, 1, 0};  // a scale, found_inf, and no Inf
  std::memcpy(numbers.data(), values, sizeof values);
  const float* const placed = reinterpret_cast<const float*>(memory.place(numbers));
  if (action == Action::step) {
    job.run({}, {nullptr, placed + 1});
    fetch();
    for (size_t i = 0; i < got.size(); ++i)
      CHECK(got[i].w == before[i].w && got[i].m == before[i].m && got[i].x == before[i].x, "a step in spite of Inf");
    job.run({}, {placed, placed + 2});
  } else {
    job.run({}, {});
  }
  fetch();
  const char* const what = action == Action::step ? "step" : "prox";
  for (size_t i = 0; i < got.size(); ++i)
    with_storage(got[i].row.dtype, [&](auto s) { compare<decltype(s)>(got[i], want[i], what, loose); });
  return count;
}

}  // namespace rvsm
