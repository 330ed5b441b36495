// What a step counts and adds up of a tensor, and the row of numbers that comes of it. Without torch.
#pragma once

#include "penalty.h"

namespace rvsm {

// A group counts as zero when the norm of its u is below this, as in the papers.
constexpr double kZeroNorm = 1e-15;

// The columns of a row, in the order of method/statistics.py.
enum Column { kZeros, kNonfinite, kGap, kGrad, kQuadratic, kZeroGroups, kPenaltyValue, kColumnsOfRow };

// Sums over some elements of a tensor, and over some of its groups.
struct Sums {
  int64_t zeros = 0;        // elements of u that are 0
  int64_t nonfinite = 0;    // elements where w or d is NaN or infinite
  int64_t zero_groups = 0;  // groups whose u is 0; not counted where a group is an element
  double gap = 0;           // |w - u|^2
  double grad = 0;          // |d|^2, of what the split hands to the base
  double value = 0;         // g of every element's or group's u
  double new_squares = 0;   // |w|^2 after the step; in no row

  void add(const Sums& o) {
    zeros += o.zeros;
    nonfinite += o.nonfinite;
    zero_groups += o.zero_groups;
    gap += o.gap;
    grad += o.grad;
    value += o.value;
    new_squares += o.new_squares;
  }

  // `grouped`: the groups are more than elements. `split`: there is a splitting; else u is w. `lam`, `beta`: of it.
  void write(double* row, bool grouped, bool split, double lam, double beta) const {
    row[kZeros] = double(zeros);
    row[kNonfinite] = double(nonfinite);
    row[kGap] = split ? gap : 0;
    row[kGrad] = grad;
    row[kQuadratic] = split ? beta / 2 * gap : 0;
    row[kZeroGroups] = split ? double(grouped ? zero_groups : zeros) : 0;
    row[kPenaltyValue] = split && lam != 0 ? lam * value : 0;
  }
};

}  // namespace rvsm
