// The norms of groups on the CPU: sums of squares in double precision along a fixed order. Compiled once per
// instruction set, with RVSM_ISA naming it; contraction is off, so every instruction set gives the same bits.

#include <algorithm>
#include <type_traits>

#include "engine.h"
#include "isa.h"
#include "strided.h"
#include "weights.h"

namespace rvsm::cpu {

namespace {

// Independent sums that an instruction or two can take together.
constexpr int kLanes = 16;
// Groups with this many consecutive elements are summed one by one, others side by side.
constexpr int64_t kLong = 1280;
// Columns of kRows rows between two rounds of prefetching: the memory takes only so many requests at a time.
constexpr int64_t kPiece = 64;
// Elements between what is summed and what is prefetched.
constexpr int64_t kAhead = 512;

// ---- sums of squares -------------------------------------------------------------------------------------------

// sum + x^2 in double: squares of float are exact, and the rounding of a long sum stays far below the ulp of a float
// norm. Because they are exact, a fused multiply-add, where the processor has it, gives the same bits.
template <class S>
inline double add_square(double sum, double x) {
#ifdef __FMA__
  if constexpr (!std::is_same_v<S, double>) return __builtin_fma(x, x, sum);
#endif
  return sum + x * x;
}

// Adds the squares of the next kLanes elements.
template <class Source>
inline void add_lanes(double* __restrict lane, const Source w) {
  for (int k = 0; k < kLanes; ++k) lane[k] = add_square<typename Source::S>(lane[k], w.at(k));
}

template <class Source>
double square_sum(const Source w, int64_t n) {
  // Named one by one, so that the compiler keeps them in registers.
  double a[kLanes] = {}, b[kLanes] = {}, c[kLanes] = {}, d[kLanes] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    prefetch(w + i + kAhead, 4 * kLanes);
    add_lanes(a, w + i);
    add_lanes(b, w + i + kLanes);
    add_lanes(c, w + i + 2 * kLanes);
    add_lanes(d, w + i + 3 * kLanes);
  }
  for (; i + kLanes <= n; i += kLanes) add_lanes(a, w + i);
  for (int k = 0; i < n; ++i, ++k) a[k] = add_square<typename Source::S>(a[k], w.at(i));
  double sum = 0;
  for (int k = 0; k < kLanes; ++k) sum += (a[k] + b[k]) + (c[k] + d[k]);
  return sum;
}

// sums[i] += the squares of kCount elements one under the other, in their order.
template <int kCount, class Source>
inline void add_squares(double* __restrict sums, const Source w, int64_t stride, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    double sum = sums[i];
    for (int r = 0; r < kCount; ++r) sum = add_square<typename Source::S>(sum, w.at(r * stride + i));
    sums[i] = sum;
  }
}

// Calls emit(group, sum) for every group that the block touches. `room`: memory for a sum per column of the tensor,
// which the sums of groups may overwrite, or null: the stack holds them then.
template <class Source, class Emit>
void block_squares(const Source all, const TensorArgs& args, const Block& block, double* room, const Emit& emit) {
  const GroupView& v = args.view;
  const int64_t columns = v.groups * v.inner;
  const Source base = all + block.batch * v.outer * columns;
  if (v.inner >= kLanes && (block.o1 - block.o0 == 1 || v.inner >= kLong)) {
    for (int64_t c = block.c0; c < block.c1;) {
      const int64_t g = c / v.inner, end = std::min(block.c1, (g + 1) * v.inner);
      double sum = 0;
      for (int64_t o = block.o0; o < block.o1; ++o) sum += square_sum(base + (o * columns + c), end - c);
      emit(g, sum);
      c = end;
    }
    return;
  }
  // Short groups side by side: a sum per column, folded into groups at the end.
  const int64_t width = kMostColumns / v.inner * v.inner;
  double on_stack[kMostColumns];
  for (int64_t c = block.c0; c < block.c1; c += width) {
    const int64_t n = std::min(width, block.c1 - c);
    double* const sums = room == nullptr ? on_stack : room + c;
    std::fill(sums, sums + n, 0.0);
    int64_t o = block.o0;
    for (; o + kRows <= block.o1; o += kRows) {
      const Source rows = base + (o * columns + c);
      // Behind the end of these rows come the next ones.
      const int64_t ahead = std::min(kAhead, n), next = o + 2 * kRows <= block.o1 ? kRows * columns - n : -n;
      for (int64_t i = 0; i < n; i += kPiece) {
        const int64_t m = std::min(kPiece, n - i), at = i + ahead;
        for (int64_t r = 0; r < kRows; ++r) prefetch(rows + r * columns + (at < n ? at : at + next), m);
        add_squares<kRows>(sums + i, rows + i, columns, m);
      }
    }
    for (; o < block.o1; ++o) add_squares<1>(sums, base + (o * columns + c), columns, n);
    for (int64_t i = 0; i < n;) {
      const int64_t g = (c + i) / v.inner, end = std::min(n, (g + 1) * v.inner - c);
      double sum = 0;
      for (; i < end; ++i) sum += sums[i];
      emit(g, sum);
    }
  }
}

template <class Source>
void norm_row_squares(const Source source, const TensorArgs& args, const Block& block, int64_t part, int norm_row) {
  using T = Opmath<typename Source::S>;
  const int64_t groups = args.view.count(), first = block.batch * args.view.groups;
  if (args.parts > 1) {
    double* sums = args.partials + (norm_row * args.parts + part) * groups + first;
    // Where every column is a group its sum is made where it stays: the partial sums are in memory once.
    double* const room = args.view.inner == 1 ? sums : nullptr;
    block_squares(source, args, block, room, [&](int64_t g, double sum) { sums[g] = sum; });
  } else if (args.sums != nullptr) {
    block_squares(source, args, block, nullptr, [&](int64_t g, double sum) { args.sums[first + g] = sum; });
  } else {
    T* norms = static_cast<T*>(args.factor_norms) + norm_row * groups + first;
    block_squares(source, args, block, nullptr, [&](int64_t g, double sum) { norms[g] = T(std::sqrt(sum)); });
  }
}

// Groups [from, to) have norms that were made elsewhere.
template <class T>
void take_norms(const TensorArgs& args, int64_t from, int64_t to) {
  const int64_t groups = args.view.count();
  for (int64_t norm_row = 0; norm_row < args.norm_rows(); ++norm_row)
    for (int64_t g = norm_row * groups + from; g < norm_row * groups + to; ++g)
      static_cast<T*>(args.factor_norms)[g] = T(args.norms[g]);
}

void squares(const TensorArgs& args, const Block& block, int64_t part) {
  if (args.norms != nullptr) {
    const int64_t first = block.batch * args.view.groups;
    if (args.parts == 1)
      with_storage(args.dtype, [&](auto s) {
        take_norms<Opmath<decltype(s)>>(args, first + block.c0 / args.view.inner,
                                        first + ceil_div(block.c1, args.view.inner));
      });
    return;  // in parts: join() takes them
  }
  with_weights(args, [&](const auto weights) {
    const bool dual = args.method == Method::admm;
    if (dual) norm_row_squares(with_dual(weights, args), args, block, part, 0);
    if (!dual || args.norm_rows() == 2) norm_row_squares(weights, args, block, part, args.norm_rows() - 1);
  });
}

void join(const TensorArgs& args) {
  const int64_t groups = args.view.count();
  with_storage(args.dtype, [&](auto s) {
    using T = Opmath<decltype(s)>;
    if (args.norms != nullptr) return take_norms<T>(args, 0, groups);
    for (int64_t norm_row = 0; norm_row < args.norm_rows(); ++norm_row) {
      const double* partials = args.partials + norm_row * args.parts * groups;
      T* const norms = static_cast<T*>(args.factor_norms) + norm_row * groups;
      for (int64_t from = 0; from < groups; from += kPiece) {
        const int64_t n = std::min(kPiece, groups - from);
        double sums[kPiece] = {};
        for (int64_t p = 0; p < args.parts; ++p)
          for (int64_t g = 0; g < n; ++g) sums[g] += partials[p * groups + from + g];
        for (int64_t g = 0; g < n; ++g) {
          if (args.sums != nullptr)
            args.sums[from + g] = sums[g];
          else
            norms[from + g] = T(std::sqrt(sums[g]));
        }
      }
    }
  });
}

double sum(const TensorArgs& args, const Block& block) {
  return with_weights(args, [&](const auto weights) {
    const int64_t columns = args.view.groups * args.view.inner;
    double total = 0;
    for (int64_t o = block.o0; o < block.o1; ++o)
      total += square_sum(weights + ((block.batch * args.view.outer + o) * columns + block.c0), block.c1 - block.c0);
    return total;
  });
}

}  // namespace

extern const NormKernels RVSM_NORM_KERNELS;
const NormKernels RVSM_NORM_KERNELS = {squares, join, sum};

}  // namespace rvsm::cpu
