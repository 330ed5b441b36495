#include "selection.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

namespace rvsm::cpu {

namespace {

// Up to so many magnitudes are put in order as they are.
constexpr int64_t kFew = 2048;
// Of more: one of so many is taken for the sample, at most kSample of them.
constexpr int64_t kSampled = 16;
constexpr int64_t kSample = 16384;
// Half the width of a sample's bracket in standard deviations of a rank, so that it fails once in ten thousand times.
constexpr double kDeviations = 4;
// Of the sample: more than one of so many are many that tie.
constexpr int64_t kTies = 256;
// A read collects at most one of so many elements, and a few.
constexpr int64_t kShare = 8;
constexpr int64_t kSpare = 4096;
// The bracket around the last cut is made so wide that it holds one of so many elements; of those that move fast, four
// times their last move, but at most one of kMovingShare.
constexpr int64_t kLastShare = 4096;
constexpr int64_t kMovingShare = 32;
// Tasks of each thread, and elements of a task: long stretches of memory are read faster, but a thread that is done
// must find something to take from the others.
constexpr int64_t kTasks = 8;
constexpr int64_t kShortTask = 32768;
constexpr int64_t kLongTask = 4194304;
// Below this many elements one thread is done before a second one has woken up.
constexpr int64_t kSerial = 65536;

// Calls work(thread, at, n) for pieces that cover [0, numel). Each thread begins with its stretch of memory, the same
// in every run, and takes from the others' when it is done.
template <class Work>
void for_pieces(int64_t numel, const Parallel& parallel, const Work& work) {
  const int64_t threads = parallel.threads;
  const int64_t size = std::clamp(ceil_div(numel, kTasks * threads), kShortTask, kLongTask);
  const int64_t tasks = ceil_div(numel, size);
  const std::unique_ptr<std::atomic<int64_t>[]> next(new std::atomic<int64_t>[size_t(threads)]);
  for (int64_t t = 0; t < threads; ++t) next[t] = tasks * t / threads;
  const auto drain = [&](int64_t thread, int64_t lane) {
    for (int64_t end = tasks * (lane + 1) / threads;;) {
      const int64_t task = next[lane].fetch_add(1, std::memory_order_relaxed);
      if (task >= end) return;
      work(thread, task * size, std::min(size, numel - task * size));
    }
  };
  const auto part = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) drain(begin, t);
    for (int64_t t = end; t < begin + threads; ++t) drain(begin, t % threads);
  };
  threads == 1 ? part(0, 1) : parallel.run(threads, part);
}

// The magnitude of a rank among an array's; M is their type.
template <class M>
class Selector {
 public:
  Selector(const Population& population, int64_t larger, LastCut& last, const Parallel& parallel)
      : kernels_(kernels().magnitudes),
        population_(population),
        numel_(population.numel()),
        larger_(larger),
        last_(last),
        parallel_(parallel) {
    if (numel_ < kSerial) parallel_.threads = 1;
  }

  int64_t select() {
    if (numel_ <= kFew) return of_few();
    const bool warm = last_.magnitude >= 0 && last_.reach >= 0;
    const int64_t room = 2 * numel_ / kShare / (parallel_.threads + 1) + kSpare;
    if (warm) look_in(around_last(), room);
    if (!is_found_) look_in_sampled(room);
    while (!is_found_) narrow();
    remember(warm);
    return cut_;
  }

  // After select(): the magnitude before it in descending order, -1 where the reads have not met it.
  int64_t before() const { return before_; }

 private:
  int64_t of_few() {
    M all[kFew];
    load(0, numel_, all);
    std::nth_element(all, all + larger_, all + numel_, std::greater<M>());
    if (larger_ > 0) before_ = *std::min_element(all, all + larger_);
    return all[larger_];
  }

  void load(int64_t from, int64_t count, M* to) const {
    population_.for_pieces(from, count, [&](const TensorArgs& tensor, int64_t at, int64_t n) {
      kernels_.load(tensor, at, n, to);
      to += n;
      return true;
    });
  }

  Bracket around_last() const {
    const int64_t up = std::min(last_.reach, std::max<int64_t>(kMost - last_.magnitude, 0));
    return {last_.magnitude - last_.reach, last_.magnitude + up};
  }

  // One read. Either the cut is found, or the range becomes narrower; it stays where too many magnitudes lie inside.
  void look_in(Bracket bracket, int64_t room) {
    bracket = {std::max(bracket.low, range_.low), std::min(bracket.high, range_.high)};
    if (bracket.low > bracket.high) return;
    const bool collects = bracket.low < bracket.high;
    // Zeros are what is neither above nor inside.
    const bool leaves_zeros = collects && bracket.low == 0;
    const Bracket read = {leaves_zeros ? 1 : bracket.low, bracket.high};
    const int64_t threads = parallel_.threads;
    const std::unique_ptr<M[]> memory(collects ? new M[size_t(threads * room)]
                                               : nullptr);  // untouched pages cost nothing
    std::vector<Part> parts(static_cast<size_t>(threads));
    for (int64_t t = 0; collects && t < threads; ++t) {
      parts[t].found.collected = memory.get() + t * room;
      parts[t].found.room = room;
    }
    std::atomic<bool> full{false};
    for_pieces(numel_, parallel_, [&](int64_t thread, int64_t from, int64_t count) {
      const bool has_room = full.load(std::memory_order_relaxed) ||
                            population_.for_pieces(from, count, [&](const TensorArgs& tensor, int64_t at, int64_t n) {
                              return kernels_.scan(tensor, at, n, read, parts[thread].found);
                            });
      if (!has_room) full.store(true, std::memory_order_relaxed);
    });
    if (full.load()) return;
    int64_t above = 0, inside = 0;
    for (const Part& part : parts) {
      const M* const collected = static_cast<const M*>(part.found.collected);
      if (collects && collected != memory.get() + inside)
        std::memmove(memory.get() + inside, collected, size_t(part.found.inside) * sizeof(M));
      inside += part.found.inside;
      above += part.found.above;
    }
    const int64_t before_low = leaves_zeros ? numel_ : above + inside;
    if (larger_ < above) {
      range_.low = bracket.high + 1;
    } else if (larger_ >= before_low) {
      range_.high = bracket.low - 1;
      above_range_ = before_low;
    } else {
      is_found_ = true;
      cut_ = collects && larger_ < above + inside ? among(memory.get(), inside, larger_ - above) : bracket.low;
      if (larger_ > above) before_ = collects ? before_among(memory.get(), inside, larger_ - above) : cut_;
      // Beyond an open end there may be nothing for long.
      const Bracket closed = {bracket.low == 0 ? cut_ : bracket.low, bracket.high == kMost ? cut_ : bracket.high};
      const int64_t above_cut = closed.high == cut_ ? 0 : larger_ - above;
      const int64_t below_cut = closed.low == cut_ ? 0 : before_low - larger_;
      spread_ = double(closed.high - closed.low) / double(std::max<int64_t>(above_cut + below_cut, 1));
    }
  }

  // A bracket from a sample. If many of the sample tie at an end, this end is counted by a read, and not collected.
  void look_in_sampled(int64_t room) {
    const Bracket bracket = sampled();
    const bool leaves = bracket.low + 1 < bracket.high;
    ties_low_ = ties_low_ && bracket.low > 0;  // zeros are not collected anyway
    look_in({bracket.low + (leaves && ties_low_), bracket.high - (leaves && ties_high_)}, room);
    if (!is_found_ && leaves && range_.low == bracket.high) look_in({bracket.high, bracket.high}, 0);
    if (!is_found_ && leaves && range_.high == bracket.low) look_in({bracket.low, bracket.low}, 0);
  }

  // The magnitude before the cut in descending order, where it is among those that were collected, as `larger` are.
  int64_t before_among(const M* magnitudes, int64_t count, int64_t larger) const {
    const M cut = M(cut_);
    M above_cut = 0, next = M(kMost);
    for (int64_t i = 0; i < count; ++i) {
      const M x = magnitudes[i];
      above_cut += x > cut;
      next = x > cut && x < next ? x : next;
    }
    return above_cut < larger ? cut_ : next;  // fewer above than before it: another one ties with the cut
  }

  // The same question about those that were collected: they are the bits of numbers without a sign.
  int64_t among(const M* magnitudes, int64_t count, int64_t rank) {
    TensorArgs args;
    args.numel = count;
    args.dtype = sizeof(M) == 8 ? Dtype::f64 : Dtype::f32;
    args.w = const_cast<M*>(magnitudes);
    LastCut none;
    return Selector(Population({args}), rank, none, Parallel()).select();
  }

  // A bracket that holds the cut of most tensors: around its rank in a sample.
  Bracket sampled() {
    const std::vector<int64_t> places = sample_places(numel_);
    const int64_t count = int64_t(places.size());
    std::vector<M> sample(places.size());
    for (int64_t i = 0; i < count; ++i) load(places[i], 1, &sample[i]);
    const double share = (double(larger_) + 0.5) / double(numel_);
    const double rank = share * double(count);
    const double reach = kDeviations * std::sqrt(rank * (1 - share)) + 2;
    const int64_t first = int64_t(std::floor(rank - reach)), last = int64_t(std::ceil(rank + reach));
    Bracket bracket = range_;
    const auto ties = [&](int64_t end) { return std::count(sample.begin(), sample.end(), M(end)) > count / kTies; };
    if (first >= 0) {
      std::nth_element(sample.begin(), sample.begin() + first, sample.end(), std::greater<M>());
      bracket.high = sample[first];
      ties_high_ = ties(bracket.high);
    }
    if (last < count) {
      std::nth_element(sample.begin() + std::max<int64_t>(first, 0), sample.begin() + last, sample.end(),
                       std::greater<M>());
      bracket.low = sample[last];
      ties_low_ = ties(bracket.low);
    }
    return bracket;
  }

  // One read for a histogram of the range, and one more where few enough are left in a bin to be collected.
  void narrow() {
    const Bins bins(range_);
    const std::vector<int64_t> total = histogram(population_, bins, parallel_);
    // What lies above the range is known from the read that narrowed it, or there is nothing.
    int64_t bin = Bins::kCount - 1, before = above_range_;
    while (bin > 0 && before + total[bin] <= larger_) before += total[bin--];
    range_.low += bin << bins.shift;
    range_.high = range_.low + std::min(range_.high - range_.low, (int64_t(1) << bins.shift) - 1);
    above_range_ = before;
    if (range_.low >= range_.high) {  // above it only if somebody writes meanwhile
      is_found_ = true;
      cut_ = range_.low;
    } else if (total[bin] <= numel_ / kShare) {
      look_in(range_, total[bin] + kSpare);
    }
  }

  // Where to look the next time: around this cut, so far that the bracket would hold a given share of the elements if
  // they lay as densely as in the bracket where it was found. They do not: a pull thins them out around the cut.
  // Halfway (of the logarithms) from the last reach it settles; the whole way it would be too near and too far in
  // turns.
  void remember(bool warm) {
    const auto reach = [&](int64_t share) { return spread_ / 2 * double(std::max<int64_t>(numel_ / share, 64)); };
    double far = reach(kLastShare);
    if (warm) {
      far = std::sqrt(far * std::max(double(last_.reach), 1.0));
      far = std::max(far, std::min(4 * std::fabs(double(cut_ - last_.magnitude)), reach(kMovingShare)));
    }
    last_ = {cut_, int64_t(std::min(far, double(kMost / 4))) + (spread_ > 0)};
  }

  struct alignas(64) Part {
    Found found;
  };

  static constexpr int64_t kMost = std::numeric_limits<M>::max();

  const MagnitudeKernels& kernels_;
  const Population& population_;
  const int64_t numel_;
  const int64_t larger_;
  LastCut& last_;
  Parallel parallel_;
  Bracket range_{0, kMost};  // holds the cut
  int64_t above_range_ = 0;  // elements above it
  bool is_found_ = false;
  int64_t cut_ = 0;
  int64_t before_ = -1;
  double spread_ = 0;                          // mean distance of neighbours around it
  bool ties_low_ = false, ties_high_ = false;  // many magnitudes of the sample equal the end of its bracket
};

template <class T>
int64_t bits_of_number(T x) {
  std::conditional_t<sizeof(T) == 8, int64_t, int32_t> bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

template <class T>
T number_of(int64_t bits) {
  const std::conditional_t<sizeof(T) == 8, int64_t, int32_t> narrow(bits);
  T x;
  std::memcpy(&x, &narrow, sizeof x);
  return x;
}

}  // namespace

std::vector<int64_t> sample_places(int64_t numel) {
  const int64_t count = std::min(kSample, numel / kSampled);
  std::vector<int64_t> places(static_cast<size_t>(count));
  uint32_t random = 1;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t from = numel * i / count, to = numel * (i + 1) / count;
    random = random * 1664525u + 1013904223u;  // the generator of Numerical Recipes, whose upper bits are the good ones
    places[i] = from + int64_t(uint64_t(random >> 8) * uint64_t(to - from) >> 24);
  }
  return places;
}

Population::Population(std::vector<TensorArgs> tensors) : tensors_(std::move(tensors)) {
  for (const TensorArgs& tensor : tensors_) ends_.push_back(numel_ += tensor.numel);
}

std::vector<int64_t> histogram(const Population& population, const Bins& bins, const Parallel& parallel) {
  Parallel used = parallel;
  if (population.numel() < kSerial) used.threads = 1;
  std::vector<int32_t> counts(static_cast<size_t>(used.threads * Bins::kCounts));
  for_pieces(population.numel(), used, [&](int64_t thread, int64_t from, int64_t count) {
    population.for_pieces(from, count, [&](const TensorArgs& tensor, int64_t at, int64_t n) {
      kernels().magnitudes.histogram(tensor, at, n, bins, counts.data() + thread * Bins::kCounts);
      return true;
    });
  });
  std::vector<int64_t> total(static_cast<size_t>(Bins::kCount));
  for (size_t i = 0; i < counts.size(); ++i) {
    const size_t bin = i % (Bins::kCount + 1);
    if (bin < size_t(Bins::kCount)) total[bin] += counts[i];
  }
  return total;
}

int64_t select(const Population& population, int64_t larger, LastCut& last, const Parallel& parallel) {
  if (population.dtype() == Dtype::f64) return Selector<int64_t>(population, larger, last, parallel).select();
  return Selector<int32_t>(population, larger, last, parallel).select();
}

int64_t cut(const Population& population, int64_t survivors, bool between, LastCut& last, const Parallel& parallel) {
  return with_storage(population.dtype(), [&](auto s) -> int64_t {
    using T = Opmath<decltype(s)>;
    using M = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
    if (survivors >= population.numel()) return bits_of_number(T(-1));
    Selector<M> selector(population, survivors, last, parallel);
    const int64_t low_bits = selector.select();
    if (!between || survivors == 0) return low_bits;
    int64_t high_bits = selector.before();
    if (high_bits < 0) {
      LastCut nearby = last;
      high_bits = select(population, survivors - 1, nearby, parallel);
    }
    const T low = number_of<T>(low_bits), high = number_of<T>(high_bits), middle = low + (high - low) / 2;
    // The middle of two neighbouring floats may be rounded up to high.
    return bits_of_number(std::isfinite(high) && middle < high ? middle : low);
  });
}

}  // namespace rvsm::cpu
