// The CUDA engine without a GPU: its index arithmetic walked element by element, and the very functions that its
// threads run, run over memory of the host and held against the CPU engine.

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cuda/launches.h"
#include "check.h"
#include "cuda_cases.h"

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
        S* const g = reinterpret_cast<S*>(base) + ga;
        const void* const others[] = {g, nullptr};
        const Chunks chunks = chunks_of<S>(n, w, others, 2);
        const TableEntry<0> e{w, g, 0, chunks.rest, 0};
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
      const void* const others[] = {w, w};
      const Chunks chunks = chunks_of<S>(n, w, others, 2);
      const TableEntry<1> e{w, w, 0, chunks.rest, 0, {w}};
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

// The pieces of large tensors hold every element once, each with the number of its group.
void check_pieces() {
  const GroupView views[] = {{1, 1, 7, 5}, {3, 2, 4, 3},  {1, 1, 1, 37}, {7, 1, 3, 4},  {1, 9, 5, 1}, {2, 3, 2, 9},
                             {3, 2, 9, 1}, {2, 3, 3, 15}, {1, 2, 2, 16}, {2, 1, 3, 17}, {1, 5, 4, 2}};
  for (const GroupView& v : views) {
    for (int64_t limit = 2; limit < 60; ++limit) {
      const int64_t n = v.count() * v.size(), columns = v.groups * v.inner;
      int64_t next = 0;
      for_pieces(v, limit, [&](int64_t offset, const GroupView& piece, int64_t group) {
        CHECK(offset == next && piece.count() * piece.size() < limit, "a piece at %lld",
              static_cast<long long>(offset));
        const FactorPlace c = factor_place(piece, nullptr, nullptr);
        for (int64_t i = 0; i < piece.count() * piece.size(); ++i, ++next) {
          const int64_t want = next / (v.outer * columns) * v.groups + next % columns / v.inner;
          CHECK(group + c.group(uint32_t(i)) == want, "element %lld", static_cast<long long>(next));
          const int64_t most = std::min<int64_t>(kMostFollowing, piece.groups * piece.inner);
          for (int64_t from = std::max<int64_t>(0, i - most + 1); from <= i; ++from)
            CHECK(group + c.following(uint32_t(from))(uint32_t(i - from)) == want, "element %lld from %lld",
                  static_cast<long long>(next), static_cast<long long>(from));
        }
      });
      CHECK(next == n, "%lld elements of %lld", static_cast<long long>(next), static_cast<long long>(n));
      ++checked;
    }
  }
  int pieces = 0;
  int64_t elements = 0;
  for_pieces({1, 3, 1 << 20, 5000}, kNarrow, [&](int64_t, const GroupView& piece, int64_t) {
    ++pieces;
    elements += piece.count() * piece.size();
  });
  CHECK(pieces == 9 && elements == int64_t(3) * (1 << 20) * 5000, "%d pieces", pieces);
}

// The tiles of tensors that are larger than any memory here, by arithmetic alone: they hold every element once, in
// order where a tile is one piece of memory.
template <int kLoad>
void check_far_tiles(const GroupView& v, bool aligned) {
  const SumEntry e = divide_sums(v, 16 / 4, aligned);
  if (int(e.vectors) != (kLoad > 1)) return;
  int64_t elements = 0, next = 0;
  for (uint32_t block = 0; block < uint32_t(v.batch) * e.tiles * e.parts; ++block) {
    const Tile t = tile_of<kLoad>(e, block);
    if (v.outer == 1 && e.tile == 1) CHECK(t.begin == next, "a tile at %lld", static_cast<long long>(t.begin));
    next = t.begin + t.length;
    elements += int64_t(t.rows) * t.groups * t.length;
    CHECK(t.rows >= 0 && t.groups > 0 && t.length > 0 && t.group + t.groups <= v.count(), "an odd tile");
  }
  CHECK(elements == v.count() * v.size(), "%lld elements in tiles", static_cast<long long>(elements));
  ++checked;
}

void far_tiles() {
  const int64_t big = int64_t(1) << 31;
  const GroupView views[] = {{1, 1, 1, 4 * big},       {1, 1, 3, big + 4},     {1, 3 * big, 2, 1},
                             {1, 1 << 20, 5000, 1},    {2, 1 << 16, 70000, 1}, {1, 5, big / 512, 516},
                             {1, 3, 4, big + 1},       {3, 40000, 1000, 64},   {1, big + 5, 1, 100},
                             {1, 1 << 16, 1 << 14, 9}, {1, 1, 1, 4 * big + 3}};
  for (const GroupView& v : views) {
    for (const bool aligned : {false, true}) {
      check_far_tiles<1>(v, aligned);
      check_far_tiles<4>(v, aligned);
    }
  }
}

// Every element of a tensor in exactly one thread's sum, for every view, and each group's sum right: the numbers are
// powers of two, whose squares add up exactly in any order.
template <class S>
void sums() {
  const GroupView views[] = {{1, 1, 7, 5},      {1, 11, 5, 1},    {1, 4, 6, 9},     {3, 2, 4, 3},    {1, 1, 1, 37},
                             {1, 700, 3, 2},    {1, 1, 3, 70000}, {1, 3000, 64, 1}, {1, 37, 3, 100}, {2, 5, 3, 128},
                             {1, 500, 600, 1},  {1, 300, 40, 9},  {1, 1, 1, 99999}, {300, 9, 8, 1},  {1, 900, 1, 300},
                             {1, 20000, 1, 1},  {1, 2, 1, 66000}, {5, 1, 9, 9},     {1, 1, 5000, 8}, {1, 90000, 3, 1},
                             {1, 2000, 1, 100}, {2, 3000, 5, 9}};
  for (const GroupView& v : views) {
    const int64_t n = v.count() * v.size(), count = v.count();
    for (int64_t at = 0; at < kWidth<S>; ++at) {
      std::vector<S> x(size_t(n + 2 * kWidth<S>));
      const int64_t first = elements_before_boundary<S>(x.data()) + at;
      for (S& value : x) store(value, Opmath<S>(1 << 10));  // an element too many would show
      std::vector<double> want(size_t(count), 0.0);
      for (int64_t i = 0; i < n; ++i) {
        const double value = std::ldexp(1.0, int(integer(-3, 3)));
        store(x[size_t(first + i)], Opmath<S>(value));
        want[size_t(i / (v.outer * v.groups * v.inner) * v.groups + i / v.inner % v.groups)] += value * value;
      }
      Launches launches(Action::penalty, host_kernels());  // of l1, lam 1 and tau 0: the sum of the norms
      TensorArgs args;
      args.numel = n;
      args.dtype = dtype_of<S>();
      args.grouped = true;
      args.view = v;
      args.w = x.data() + first;
      const NumberRow record{double(Penalty::l1), 0, 0, 1, 0, -1};
      args.numbers = record.data();
      args.lam = 1;
      double sum = 0;
      for (const double w : want) sum += double(Opmath<S>(std::sqrt(w)));
      HostMemory memory;
      const double got = value_of(launches, {args}, memory);
      CHECK(std::fabs(got - sum) <= 1e-12 * sum, "the norms of %lld %lld %lld %lld at %lld: %.17g, not %.17g",
            static_cast<long long>(v.batch), static_cast<long long>(v.outer), static_cast<long long>(v.groups),
            static_cast<long long>(v.inner), static_cast<long long>(at), got, sum);
      ++checked;
    }
  }
}

// A thousand small tensors with the same options are one launch; 250 in groups two, or one where groups are
// consecutive.
int started = 0;

void launch_counts() {
  std::vector<float> memory(20000);
  Options o;
  o.penalty = Penalty::l0;
  o.lam = o.beta = o.lr = 0.1;
  Kernels counting = host_kernels();
  for (auto& [key, start] : counting)
    start = [](const Stream&, const void*) -> const char* { return ++started, nullptr; };
  // Statistics of 100 tensors are two launches more, and the norms of consecutive groups a third.
  struct Kind {
    int tensors, launches;
    GroupView view;  // of a tensor in groups, empty of another
    bool measured = false;
  };
  double row[kColumnsOfRow];
  for (const Kind& kind : {Kind{1000, 1, {}}, Kind{250, 2, {1, 3, 4, 1}}, Kind{400, 1, {1, 1, 3, 4}},
                           Kind{100, 3, {}, true}, Kind{80, 4, {1, 3, 4, 1}, true}, Kind{80, 4, {1, 1, 3, 4}, true}}) {
    std::deque<NumberRow> records;
    Launches launches(Action::step, counting);
    for (int i = 0; i < kind.tensors; ++i) {
      TensorArgs args;
      args.numel = 12;
      args.grouped = kind.view.count() > 1;
      args.view = kind.view;
      args.w = memory.data() + i;
      args.g = memory.data() + i;
      apply(o, args, false, records);
      if (kind.measured) args.statistics = row;
      launches.tensors.push_back(args);
    }
    launches.divide();
    std::vector<char> scratch(size_t(launches.scratch_bytes()));
    launches.set_scratch(scratch.data());
    started = 0;
    launches.run({}, {});
    CHECK(started == kind.launches, "%d launches", started);
    ++checked;
  }
}

// What a failed launch says.
void errors() {
  Kernels failing = host_kernels();
  for (auto& [key, start] : failing) start = [](const Stream&, const void*) { return "out of order"; };
  Launches launches(Action::step, failing);
  float x = 1;
  std::deque<NumberRow> records;
  for (const int group : {2, 5}) {
    TensorArgs args;
    args.numel = 1;
    args.group = group;
    args.w = &x;
    args.g = &x;
    apply({}, args, false, records);
    launches.tensors.push_back(args);
  }
  launches.divide();
  std::string message;
  try {
    launches.run({}, {});
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  CHECK(message.find("step kernel") != std::string::npos && message.find("2, 5") != std::string::npos &&
            message.find("out of order") != std::string::npos,
        "%s", message.c_str());
  ++checked;
}

// Every kind of tensor finds its kernel, and no two keys are one.
void keys() {
  const Kernels& all = host_kernels();
  int bases = 0;
  for_each_base([&](auto base) {
    ++bases;
    for (const Dtype dtype : {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16}) {
      for (const bool has_state : {false, true})
        CHECK(all.count({Work::step, dtype, key_of<decltype(base)>(), has_state}) == 1, "no kernel of a base");
      CHECK(all.count({Work::step_resident, dtype, key_of<decltype(base)>()}) == 1, "no resident kernel of a base");
    }
    for (const Dtype dtype : {Dtype::f32, Dtype::f64})
      for (const bool has_state : {false, true})
        CHECK(all.count({Work::general, dtype, key_of<decltype(base)>(), has_state}) == 1,
              "no general kernel of a base");
  });
  // Of every type five kernels without a base; factors, statistics and the two of a selection of two types; counts,
  // numbers, windows, rows of statistics and sums of general weights.
  const size_t want = size_t(4 * (3 * bases + 5) + 2 * 2 * bases + 2 * 4 + 5);
  CHECK(all.size() == want, "%zu kernels, not %zu", all.size(), want);
  ++checked;
}

template <class S>
void all() {
  walk<S>();
  walk_far<S>();
  sums<S>();
}

}  // namespace

int main() {
  check_dividers();
  check_pieces();
  far_tiles();
  all<float>();
  all<double>();
  all<BFloat16>();
  all<Float16>();
  for (const int count : {1, 2, 41, 40, 701, 700, 2500})
    for (const Action action : {Action::step, Action::prox, Action::penalty})
      checked += engines<HostMemory>(count, action, host_kernels(), 0);
  for (int i = 0; i < 20; ++i)
    checked += engines<HostMemory>(10 * rvsm::Tensor::kKernels, Action::step, host_kernels(), 0, true);
  launch_counts();
  errors();
  keys();
  return finish("cuda", checked);
}
