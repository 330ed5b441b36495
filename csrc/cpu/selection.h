// The cut of top-k on the CPU without a sort: the magnitude of a given rank among the elements of one tensor or of
// several, exactly. Without torch.
//
// A magnitude is the bits of a number in the type of the arithmetic without its sign, as an integer: such integers are
// in the order of the magnitudes, a NaN above all numbers, so that counting is exact.
//
// One read of the weights counts what lies above a bracket, and collects what lies inside. If the rank lies inside, the
// magnitude is found among the collected ones. A bracket of one magnitude collects nothing: ties are counted. The
// bracket lies around the last cut, or comes from a sample. Nothing is taken from either but where to look, so that the
// result is exact whatever the weights have become, and it does not depend on the number of threads or the instruction
// set. Where two brackets fail, histograms narrow the range.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "engine.h"

namespace rvsm::cpu {

// Both ends belong to it.
struct Bracket {
  int64_t low = 0, high = 0;
  bool holds(int64_t magnitude) const { return low <= magnitude && magnitude <= high; }
};

// What a read has found.
struct Found {
  int64_t above = 0;   // > high
  int64_t inside = 0;  // those of the bracket
  void* collected =
      nullptr;  // room for them, of int32_t, or int64_t where the arithmetic is double; null: only counted
  int64_t room = 0;
};

// Bins of 2^shift magnitudes, the first of which begins at the low end of a bracket.
struct Bins {
  static constexpr int64_t kCount = 2048;
  // Copies of the counts: neighbours that tie do not wait for each other's count.
  static constexpr int64_t kCopies = 4;
  // The last is for what lies outside.
  static constexpr int64_t kCounts = kCopies * (kCount + 1);

  explicit Bins(const Bracket& range) : range(range) {
    while (((range.high - range.low) >> shift) >= kCount) ++shift;
  }

  Bracket range;
  int shift = 0;
};

// The inner loops, compiled once per instruction set (magnitudes.cpp). They read w, the rest behind it and, where the
// method is ADMM, the dual.
struct MagnitudeKernels {
  // The magnitudes of elements [at, at + n), as the type that they are collected in.
  void (*load)(const TensorArgs&, int64_t at, int64_t n, void* magnitudes);
  // Counts elements [at, at + n), and collects those inside; false where there is no room, and `found` is of no use
  // then.
  bool (*scan)(const TensorArgs&, int64_t at, int64_t n, const Bracket&, Found& found);
  // Adds to counts[copy][bin].
  void (*histogram)(const TensorArgs&, int64_t at, int64_t n, const Bins&, int32_t* counts);
};

// Tensors that are selected from as if their elements stood one behind the other. Their arithmetic has one type.
class Population {
 public:
  explicit Population(std::vector<TensorArgs> tensors);

  int64_t numel() const { return numel_; }
  Dtype dtype() const { return tensors_.empty() ? Dtype::f32 : tensors_.front().dtype; }

  // Calls f(tensor, at, n) for the pieces of the tensors that elements [from, from + count) of all of them are, in
  // their order, until it returns false.
  template <class F>
  bool for_pieces(int64_t from, int64_t count, const F& f) const {
    for (size_t i = member(from); count > 0; ++i) {
      const int64_t at = from - (i > 0 ? ends_[i - 1] : 0), n = std::min(count, ends_[i] - from);
      if (n > 0 && !f(tensors_[i], at, n)) return false;
      from += n;
      count -= n;
    }
    return true;
  }

 private:
  // The tensor that an element belongs to.
  size_t member(int64_t element) const {
    return size_t(std::upper_bound(ends_.begin(), ends_.end(), element) - ends_.begin());
  }

  std::vector<TensorArgs> tensors_;
  std::vector<int64_t> ends_;  // elements of the tensors up to each one
  int64_t numel_ = 0;
};

// Calls work(begin, end) for parts [begin, end) that cover [0, threads), possibly at the same time.
struct Parallel {
  int64_t threads = 1;
  std::function<void(int64_t threads, const std::function<void(int64_t begin, int64_t end)>& work)> run;
};

// Where to look for a cut first, and where to look the next time.
struct LastCut {
  int64_t magnitude = 0;
  int64_t reach = -1;  // how far the bracket goes to both sides; -1 without a last cut
};

// The elements of the sample that a first bracket comes from: fixed, and where no regular pattern in the tensor meets
// them all.
std::vector<int64_t> sample_places(int64_t numel);

// How many magnitudes lie in each of the bins.
std::vector<int64_t> histogram(const Population& population, const Bins& bins, const Parallel& parallel);

// The magnitude with `larger` elements before it in descending order, 0 <= larger < numel: NaN first, ties in any
// order.
int64_t select(const Population& population, int64_t larger, LastCut& last, const Parallel& parallel);

// The cut that so many elements survive, 0 <= survivors <= numel, as bits of a number in the type of the arithmetic:
// the largest magnitude that goes to zero, -1 where none does. `between`: halfway to the smallest survivor.
int64_t cut(const Population& population, int64_t survivors, bool between, LastCut& last, const Parallel& parallel);

}  // namespace rvsm::cpu
