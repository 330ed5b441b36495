// What a step counts and adds up of a tensor, and the row of numbers that comes of it. Without torch, for host and
// device.
#pragma once

#include "penalty.h"

namespace rvsm {

// A group counts as zero when the norm of its u is below this, as in the papers.
constexpr double kZeroNorm = 1e-15;

// The columns of a row, in the order of method/statistics.py.
enum Column { kZeros, kNonfinite, kGap, kGrad, kQuadratic, kZeroGroups, kPenaltyValue, kColumnsOfRow };

// Sums over some elements of a tensor, and over some of its groups.
template <class Count>
struct SumsOf {
  Count zeros = 0;        // elements of u that are 0
  Count nonfinite = 0;    // elements where w or d is NaN or infinite
  Count zero_groups = 0;  // groups whose u is 0; not counted where a group is an element
  double gap = 0;         // |w - u|^2
  double grad = 0;        // |d|^2, of what the split hands to the base
  double value = 0;       // g of every element's or group's u

  void add(const SumsOf& o) {
    zeros += o.zeros;
    nonfinite += o.nonfinite;
    zero_groups += o.zero_groups;
    gap += o.gap;
    grad += o.grad;
    value += o.value;
  }
};

// Those of the CPU engine's tasks.
struct Sums : SumsOf<int64_t> {
  double new_squares = 0;  // |w|^2 after the step; in no row

  void add(const Sums& o) {
    SumsOf::add(o);
    new_squares += o.new_squares;
  }
};

// `grouped`: the groups are more than elements. `split`: there is a splitting; else u is w. `lam`, `beta`: of it.
template <class Count>
RVSM_HD void write_row(double* row, const SumsOf<Count>& s, bool grouped, bool split, double lam, double beta) {
  row[kZeros] = double(s.zeros);
  row[kNonfinite] = double(s.nonfinite);
  row[kGap] = split ? s.gap : 0;
  row[kGrad] = s.grad;
  row[kQuadratic] = split ? beta / 2 * s.gap : 0;
  row[kZeroGroups] = split ? double(grouped ? s.zero_groups : s.zeros) : 0;
  row[kPenaltyValue] = split && lam != 0 ? lam * s.value : 0;
}

}  // namespace rvsm
