#include "engine.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>
#include <thread>

#include "selection.h"
#include "strided.h"
#include "whole.h"

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
static_assert(kMostOfWindow <= kFewRows);
// So are short groups side by side, where the tensor is large: the rows are divided among few parts then, so that
// threads share them and each still reads long stretches. The sums of a part need memory of their own.
constexpr int64_t kFewParts = 4;
constexpr int64_t kPartOfRows = 524288;
// Value of a tensor's counter (pending_) when its norms are there.
constexpr int32_t kDone = -1;

int64_t opmath_size(Dtype dtype) { return dtype == Dtype::f64 ? 8 : 4; }

// Norms start on a cache line of their own, also next to another tensor's.
int64_t aligned(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

int64_t norm_bytes(const TensorArgs& args) {
  return args.grouped ? args.norm_rows() * args.view.count() * opmath_size(args.dtype) : 0;
}
int64_t partial_bytes(const TensorArgs& args) {
  return args.grouped && args.parts > 1 ? args.norm_rows() * args.parts * args.view.count() * int64_t(sizeof(double))
                                        : 0;
}

// In how many parts the groups of a tensor are summed: the same for every number of threads.
int64_t parts_of(const GroupView& v) {
  if (v.size() >= 2 * kPart) return std::min(ceil_div(v.size(), kPart), std::max(v.outer, v.inner));
  const int64_t columns = v.groups * v.inner, most = std::min(kFewParts, ceil_div(kFewParts * kMostColumns, columns));
  return v.outer < v.inner ? 1 : std::clamp<int64_t>(v.outer * columns / kPartOfRows, 1, most);
}

// The first row of a part: a whole number of kRows of them, where there are so many.
int64_t first_row(const TensorArgs& args, int64_t part) {
  const int64_t rows = args.view.outer;
  if (part == args.parts || rows < kRows * args.parts) return rows * part / args.parts;
  return rows / kRows * part / args.parts * kRows;
}

}  // namespace

void TaskList::add(int32_t tensor, Kind kind, const Block& block, int64_t part) {
  tasks_.push_back({tensor, kind, part, block});
  if (kind == Kind::reduce) ++reductions_[tensor];
}

// Every group is summed by one task, along its rows in order, so that no float is added in arrival order; only groups
// too long for that are divided into parts, which join() adds up in order.
void TaskList::divide_reduction(int32_t index, int64_t threads) {
  const TensorArgs& args = tensors[index];
  const GroupView& v = args.view;
  const int64_t columns = v.groups * v.inner;
  const bool by_rows = v.outer >= v.inner;
  // Groups that are consecutive in memory and summed by one task: the same task then applies their factors.
  const bool applies = action_ != Action::penalty && action_ != Action::squares;
  const Kind kind = v.outer == 1 && args.parts == 1 && applies ? Kind::both : Kind::reduce;
  // Several rows: a width that gives each thread work, but no less than 1 KB of consecutive memory per row.
  int64_t width = v.outer == 1 ? kTask : std::clamp<int64_t>(columns * args.parts / (2 * threads), 256, kMostColumns);
  width = args.parts > 1 && !by_rows ? v.inner : std::max<int64_t>(1, width / v.inner) * v.inner;
  for (int64_t b = 0; b < v.batch; ++b) {
    for (int64_t c = 0; c < columns; c += width) {
      const int64_t end = std::min(columns, c + width);
      for (int64_t p = 0; p < args.parts; ++p) {
        if (by_rows)
          add(index, kind, {b, first_row(args, p), first_row(args, p + 1), c, end}, p);
        else  // a part of one long group, or a whole block where there are no parts
          add(index, kind, {b, 0, v.outer, c + (end - c) * p / args.parts, c + (end - c) * (p + 1) / args.parts}, p);
      }
    }
  }
}

void TaskList::divide_application(int32_t index, int64_t threads) {
  const GroupView& v = tensors[index].view;
  const int64_t columns = v.groups * v.inner;
  const int64_t unit = v.outer == 1 ? tensors[index].windows.whole() : 1;  // no task cuts a window
  const int64_t width = v.outer == 1 ? kTask / unit * unit : std::min(columns, kColumns);
  // Sums of tasks are added up: that they are the same for every number of threads, so must be the tasks.
  const int64_t rows = measures_ ? kFewRows : std::clamp(v.outer / (8 * threads), kFewRows, kManyRows);
  const int64_t height = std::max(kTask / width, rows);
  for (int64_t b = 0; b < v.batch; ++b)
    for (int64_t o = 0; o < v.outer; o += height)
      for (int64_t c = 0; c < columns; c += width)
        add(index, Kind::apply, {b, o, std::min(v.outer, o + height), c, std::min(columns, c + width)});
}

void TaskList::divide() {
  lanes_.clear();
  for (TensorArgs& args : tensors) {
    if (!args.grouped) args.view = {1, 1, args.numel, 1};
    // Long windows: a task has the m rows of some columns. m is at most kFewRows, so no task has fewer rows.
    if (const Windows& w = args.windows; w.whole() > kTask) args.view = {args.numel / w.whole(), w.m, w.inner, 1};
    const GroupView& v = args.view;
    args.parts = args.grouped ? parts_of(v) : 1;
  }
}

void TaskList::divide_for(int64_t threads) {
  tasks_.clear();
  reductions_.assign(tensors.size(), 0);
  for (int32_t i = 0; i < int32_t(tensors.size()); ++i) {
    const TensorArgs& args = tensors[i];
    if (args.grouped) divide_reduction(i, threads);
    if (action_ == Action::squares) continue;
    if (args.grouped && action_ == Action::penalty)
      add(i, Kind::apply, {0, 0, 1, 0, args.view.groups * args.view.inner});  // a function of the norms alone
    else if (!args.grouped || reductions_[i] > 0)
      divide_application(i, threads);
  }
  pending_ = std::make_unique<std::atomic<int32_t>[]>(tensors.size());
  sums_.resize(measures_ ? tasks_.size() : 0);
}

int64_t TaskList::scratch_bytes() const {
  int64_t bytes = 0;
  for (const TensorArgs& args : tensors) bytes += aligned(norm_bytes(args)) + aligned(partial_bytes(args));
  return bytes;
}

void TaskList::set_scratch(void* memory) {
  char* next = static_cast<char*>(memory);
  for (TensorArgs& args : tensors) {
    args.factor_norms = next;
    next += aligned(norm_bytes(args));
    args.partials = reinterpret_cast<double*>(next);
    next += aligned(partial_bytes(args));
  }
}

int64_t TaskList::workload() const {
  int64_t elements = 0;
  for (const TensorArgs& args : tensors) elements += args.active ? args.numel : 0;
  return elements;
}

// The tasks of tensors without a reduction are dealt by the number of elements before them, so that each thread gets
// one stretch of memory. Of a tensor that is reduced first, the reduce tasks are dealt to all threads and then the
// apply tasks: else one thread would wait while another reduces.
void TaskList::deal(int64_t threads) {
  lanes_.clear();
  for (int64_t t = 0; t < threads; ++t) lanes_.push_back(std::make_unique<Lane>());
  const auto elements = [](const Block& b) { return (b.o1 - b.o0) * (b.c1 - b.c0); };
  int64_t total = 0;
  for (const Task& t : tasks_) total += reductions_[t.tensor] == 0 ? elements(t.block) : 0;
  int64_t before = 0;
  for (int64_t i = 0; i < int64_t(tasks_.size());) {
    const Task& task = tasks_[i];
    if (reductions_[task.tensor] == 0) {
      lanes_[before * threads / std::max<int64_t>(total, 1)]->tasks.push_back(i++);
      before += elements(task.block);
      continue;
    }
    int64_t end = i;
    while (end < int64_t(tasks_.size()) && tasks_[end].tensor == task.tensor && tasks_[end].kind == task.kind) ++end;
    for (int64_t k = i; k < end; ++k) lanes_[(k - i) * threads / (end - i)]->tasks.push_back(k);
    i = end;
  }
}

void TaskList::start(int64_t threads) {
  bool measures = action_ == Action::penalty || action_ == Action::zeros;
  for (const TensorArgs& args : tensors) measures |= args.active && args.sums_of_tasks();
  if (threads != int64_t(lanes_.size()) || measures != measures_) {
    measures_ = measures;
    divide_for(threads);
    deal(threads);
  }
  for (auto& lane : lanes_) lane->next.store(0, std::memory_order_relaxed);
  for (size_t i = 0; i < tensors.size(); ++i) pending_[i].store(reductions_[i], std::memory_order_relaxed);
  std::fill(sums_.begin(), sums_.end(), Sums());
}

void TaskList::work(int64_t begin, int64_t end) {
  const int64_t threads = int64_t(lanes_.size());
  for (int64_t t = begin; t < end; ++t) drain(*lanes_[t]);
  for (int64_t t = end; t < begin + threads; ++t) drain(*lanes_[t % threads]);
}

void TaskList::drain(Lane& lane) {
  const int64_t count = int64_t(lane.tasks.size());
  for (;;) {
    // A single thread needs no locked instruction, which costs as much as a tiny task.
    const int64_t i = lanes_.size() == 1 ? lane.next.load(std::memory_order_relaxed)
                                         : lane.next.fetch_add(1, std::memory_order_relaxed);
    if (lanes_.size() == 1) lane.next.store(i + 1, std::memory_order_relaxed);
    if (i >= count) return;
    run(lane.tasks[i]);
  }
}

// Run one task that stands before `index`, from the front of any lane; false if all of those are taken.
bool TaskList::help(int64_t index) {
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

void TaskList::run(int64_t index) {
  const Kernels& k = kernels();
  const Task& task = tasks_[index];
  const TensorArgs& args = tensors[task.tensor];
  if (!args.active) return;
  if (task.kind != Kind::apply) k.norms.squares(args, task.block, task.part);
  if (task.kind == Kind::reduce) {
    // acq_rel: the last one sees the parts of all others, and whoever sees kDone sees the norms.
    if (pending_[task.tensor].fetch_sub(1, std::memory_order_acq_rel) == 1) {
      if (args.parts > 1) k.norms.join(args);
      pending_[task.tensor].store(kDone, std::memory_order_release);
    }
    return;
  }
  if (args.grouped && task.kind == Kind::apply)
    while (pending_[task.tensor].load(std::memory_order_acquire) != kDone)
      if (!help(index)) std::this_thread::yield();
  switch (action_) {
    case Action::step:
      k.elements.step(args, task.block, measures_ && args.statistics != nullptr ? &sums_[size_t(index)] : nullptr);
      // The new weights are still in the cache.
      if (args.new_squares != nullptr) sums_[size_t(index)].new_squares = k.norms.sum(args, task.block);
      break;
    case Action::prox:
      k.elements.prox(args, task.block);
      break;
    case Action::penalty:
    case Action::zeros:
      k.elements.measure(args, task.block, sums_[size_t(index)]);
      break;
    case Action::squares:  // all of its tasks reduce
      break;
  }
}

double TaskList::total() const {
  double total = 0;
  const std::vector<Sums> sums = totals();
  for (size_t i = 0; i < sums.size(); ++i) total += tensors[i].lam * sums[i].value + tensors[i].beta / 2 * sums[i].gap;
  return total;
}

std::vector<Sums> TaskList::totals() const {
  std::vector<Sums> of_tensors(measures_ ? tensors.size() : 0);
  for (size_t i = 0; i < sums_.size(); ++i) of_tensors[size_t(tasks_[i].tensor)].add(sums_[i]);
  return of_tensors;
}

#define RVSM_DECLARE(isa)                                                                                \
  extern const ElementKernels element_kernels_##isa;                                                     \
  extern const NormKernels norm_kernels_##isa;                                                           \
  extern const MagnitudeKernels magnitude_kernels_##isa;                                                 \
  extern const WholeKernels whole_kernels_##isa;                                                         \
  static const Kernels kernels_##isa{element_kernels_##isa, norm_kernels_##isa, magnitude_kernels_##isa, \
                                     whole_kernels_##isa};
RVSM_DECLARE(base)
#if defined(RVSM_X86)
RVSM_DECLARE(avx2)
RVSM_DECLARE(avx512)
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
