#include "engine.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>
#include <thread>

namespace rvsm::cpu {

namespace {

// Elements of a task: large enough that taking it from the queue costs nothing, small enough that threads finish
// together and that what the reduction has read is still in the cache when the step comes.
constexpr int64_t kTask = 32768;
// Rows of a block that share their columns' factors: enough that computing those costs little, at most so many that
// threads finish together.
constexpr int64_t kFewRows = 16;
constexpr int64_t kManyRows = 64;
// A group with more elements than this is summed in parts.
constexpr int64_t kPart = 131072;
// Value of a row's counter when its norms are there.
constexpr int32_t kDone = -1;

int64_t arithmetic_size(Dtype dtype) { return dtype == Dtype::f64 ? 8 : 4; }

// Norms start on a cache line of their own, also next to another row's.
int64_t aligned(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

int64_t norm_bytes(const Row& row) {
  return row.grouped ? row.planes() * row.view.count() * arithmetic_size(row.dtype) : 0;
}
int64_t partial_bytes(const Row& row) {
  return row.grouped && row.parts > 1 ? row.planes() * row.parts * row.view.count() * int64_t(sizeof(double)) : 0;
}

}  // namespace

void Job::add(int32_t row, Kind kind, const Block& block, int64_t part) {
  tasks_.push_back({row, kind, part, block});
  if (kind == Kind::reduce) ++reductions_[row];
}

// Every group is summed by one task, along its rows in order, so that no float is added in arrival order; only groups
// too long for that are cut into parts, which join() adds up in order.
void Job::divide_reduction(int32_t index, int64_t threads) {
  const Row& row = rows[index];
  const GroupView& v = row.view;
  const int64_t columns = v.groups * v.inner;
  const bool by_rows = v.outer >= v.inner;
  // Consecutive groups whose reduction is all that their application waits for.
  const Kind kind = v.outer == 1 && row.parts == 1 && action_ != Action::penalty ? Kind::both : Kind::reduce;
  // Several rows: a width that gives each thread work, but no less than 1 KB of consecutive memory per row.
  int64_t width = v.outer == 1 ? kTask : std::clamp<int64_t>(columns / (2 * threads), 256, kStrip);
  width = row.parts > 1 && !by_rows ? v.inner : std::max<int64_t>(1, width / v.inner) * v.inner;
  for (int64_t b = 0; b < v.batch; ++b) {
    for (int64_t c = 0; c < columns; c += width) {
      const int64_t end = std::min(columns, c + width);
      for (int64_t p = 0; p < row.parts; ++p) {
        if (by_rows)
          add(index, kind, {b, v.outer * p / row.parts, v.outer * (p + 1) / row.parts, c, end}, p);
        else  // one long group, or all of what is not cut
          add(index, kind, {b, 0, v.outer, c + (end - c) * p / row.parts, c + (end - c) * (p + 1) / row.parts}, p);
      }
    }
  }
}

void Job::divide_application(int32_t index, int64_t threads) {
  const GroupView& v = rows[index].view;
  const int64_t columns = v.groups * v.inner;
  const int64_t width = v.outer == 1 ? kTask : std::min(columns, kColumns);
  const int64_t height = std::max(kTask / width, std::clamp(v.outer / (8 * threads), kFewRows, kManyRows));
  for (int64_t b = 0; b < v.batch; ++b)
    for (int64_t o = 0; o < v.outer; o += height)
      for (int64_t c = 0; c < columns; c += width)
        add(index, Kind::apply, {b, o, std::min(v.outer, o + height), c, std::min(columns, c + width)});
}

void Job::divide() {
  lanes_.clear();
  for (Row& row : rows) {
    if (!row.grouped) row.view = {1, 1, row.numel, 1};
    const GroupView& v = row.view;
    const bool cut = row.grouped && v.size() >= 2 * kPart;
    row.parts = cut ? std::min(ceil_div(v.size(), kPart), std::max(v.outer, v.inner)) : 1;
  }
}

void Job::divide_for(int64_t threads) {
  tasks_.clear();
  reductions_.assign(rows.size(), 0);
  for (int32_t i = 0; i < int32_t(rows.size()); ++i) {
    const Row& row = rows[i];
    if (row.grouped) divide_reduction(i, threads);
    if (row.grouped && action_ == Action::penalty)
      add(i, Kind::apply, {0, 0, 1, 0, row.view.groups * row.view.inner});  // a function of the norms alone
    else if (!row.grouped || reductions_[i] > 0)
      divide_application(i, threads);
  }
  pending_ = std::make_unique<std::atomic<int32_t>[]>(rows.size());
  sums_.resize(action_ == Action::penalty ? tasks_.size() : 0);
}

int64_t Job::scratch_bytes() const {
  int64_t bytes = 0;
  for (const Row& row : rows) bytes += aligned(norm_bytes(row)) + aligned(partial_bytes(row));
  return bytes;
}

void Job::set_scratch(void* memory) {
  char* next = static_cast<char*>(memory);
  for (Row& row : rows) {
    row.norms = next;
    next += aligned(norm_bytes(row));
    row.partials = reinterpret_cast<double*>(next);
    next += aligned(partial_bytes(row));
  }
}

int64_t Job::workload() const {
  int64_t elements = 0;
  for (const Row& row : rows) elements += row.active ? row.numel : 0;
  return elements;
}

// Tasks that wait for nobody go by the elements before them: each thread gets one stretch of memory. The tasks of a row
// that is reduced first are dealt phase by phase, or one thread would wait while the other reduces.
void Job::deal(int64_t threads) {
  lanes_.clear();
  for (int64_t t = 0; t < threads; ++t) lanes_.push_back(std::make_unique<Lane>());
  const auto elements = [](const Block& b) { return (b.o1 - b.o0) * (b.c1 - b.c0); };
  int64_t total = 0;
  for (const Task& t : tasks_) total += reductions_[t.row] == 0 ? elements(t.block) : 0;
  int64_t before = 0;
  for (int64_t i = 0; i < int64_t(tasks_.size());) {
    const Task& task = tasks_[i];
    if (reductions_[task.row] == 0) {
      lanes_[before * threads / std::max<int64_t>(total, 1)]->tasks.push_back(i++);
      before += elements(task.block);
      continue;
    }
    int64_t end = i;
    while (end < int64_t(tasks_.size()) && tasks_[end].row == task.row && tasks_[end].kind == task.kind) ++end;
    for (int64_t k = i; k < end; ++k) lanes_[(k - i) * threads / (end - i)]->tasks.push_back(k);
    i = end;
  }
}

void Job::start(int64_t threads) {
  if (threads != int64_t(lanes_.size())) {
    divide_for(threads);
    deal(threads);
  }
  for (auto& lane : lanes_) lane->next.store(0, std::memory_order_relaxed);
  for (size_t i = 0; i < rows.size(); ++i) pending_[i].store(reductions_[i], std::memory_order_relaxed);
  std::fill(sums_.begin(), sums_.end(), 0.0);
}

void Job::work(int64_t begin, int64_t end) {
  const int64_t threads = int64_t(lanes_.size());
  for (int64_t t = begin; t < end; ++t) drain(*lanes_[t]);
  for (int64_t t = end; t < begin + threads; ++t) drain(*lanes_[t % threads]);
}

void Job::drain(Lane& lane) {
  const int64_t count = int64_t(lane.tasks.size());
  for (;;) {
    // Alone, without a locked instruction: it costs as much as a tiny task.
    const int64_t i = lanes_.size() == 1 ? lane.next.load(std::memory_order_relaxed)
                                         : lane.next.fetch_add(1, std::memory_order_relaxed);
    if (lanes_.size() == 1) lane.next.store(i + 1, std::memory_order_relaxed);
    if (i >= count) return;
    run(lane.tasks[i]);
  }
}

// Take one task that stands before `index`, from the front of any lane; false if all of those are taken.
bool Job::help(int64_t index) {
  for (auto& lane : lanes_) {
    int64_t i = lane->next.load(std::memory_order_relaxed);
    if (i < int64_t(lane->tasks.size()) && lane->tasks[i] < index &&
        lane->next.compare_exchange_strong(i, i + 1, std::memory_order_relaxed)) {
      run(lane->tasks[i]);
      return true;
    }
  }
  return false;
}

void Job::run(int64_t index) {
  const Kernels& k = kernels();
  const Task& task = tasks_[index];
  const Row& row = rows[task.row];
  if (!row.active) return;
  if (task.kind != Kind::apply) k.squares(row, task.block, task.part);
  if (task.kind == Kind::reduce) {
    // acq_rel: the last one sees the parts of all others, and whoever sees kDone sees the norms.
    if (pending_[task.row].fetch_sub(1, std::memory_order_acq_rel) == 1) {
      if (row.parts > 1) k.join(row);
      pending_[task.row].store(kDone, std::memory_order_release);
    }
    return;
  }
  if (row.grouped && task.kind == Kind::apply)
    while (pending_[task.row].load(std::memory_order_acquire) != kDone)
      if (!help(index)) std::this_thread::yield();
  switch (action_) {
    case Action::step:
      k.step(row, task.block);
      break;
    case Action::prox:
      k.prox(row, task.block);
      break;
    case Action::penalty:
      sums_[index] = k.penalty(row, task.block);
      break;
  }
}

double Job::total() const {
  double sum = 0;
  for (const double s : sums_) sum += s;
  return sum;
}

extern const Kernels kernels_base;
#if defined(RVSM_X86)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#if defined(RVSM_X86)
    // A value that names none of the three limits nothing; native.py warns of it.
    const char* value = std::getenv("RVSM_ISA");
    const std::string_view limit = value == nullptr ? "" : value;
    const bool base_only = limit == "base", no_avx512 = base_only || limit == "avx2";
    __builtin_cpu_init();
    if (!no_avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return kernels_avx512;
    if (!base_only && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kernels_avx2;
#endif
    return kernels_base;
  }();
  return chosen;
}

}  // namespace rvsm::cpu
