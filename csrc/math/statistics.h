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
struct Sums {
  int64_t zeros = 0;        // elements of u that are 0
  int64_t nonfinite = 0;    // elements where w or d is NaN or infinite
  int64_t zero_groups = 0;  // groups whose u is 0; not counted where a group is an element
  double gap = 0;           // |w - u|^2
  double grad = 0;          // |d|^2, of what the split hands to the base
  double value = 0;         // g of every element's or group's u

  void add(const Sums& o) {
    zeros += o.zeros;
    nonfinite += o.nonfinite;
    zero_groups += o.zero_groups;
    gap += o.gap;
    grad += o.grad;
    value += o.value;
  }
};

// `grouped`: the groups are more than elements. `split`: there is a splitting; else u is w. `lam`, `beta`: of it.
RVSM_HD void write_row(double* row, const Sums& s, bool grouped, bool split, double lam, double beta) {
  row[kZeros] = double(s.zeros);
  row[kNonfinite] = double(s.nonfinite);
  row[kGap] = split ? s.gap : 0;
  row[kGrad] = s.grad;
  row[kQuadratic] = split ? beta / 2 * s.gap : 0;
  row[kZeroGroups] = split ? double(grouped ? s.zero_groups : s.zeros) : 0;
  row[kPenaltyValue] = split && lam != 0 ? lam * s.value : 0;
}

// Sums as numbers of one type, for a device, which adds them up; counts are exact up to 2^53.
constexpr int kSumsOfTensor = 6;

RVSM_HD void pack(double* to, const Sums& s) {
  to[0] = double(s.zeros);
  to[1] = double(s.nonfinite);
  to[2] = double(s.zero_groups);
  to[3] = s.gap;
  to[4] = s.grad;
  to[5] = s.value;
}

RVSM_HD Sums unpack(const double* from) {
  Sums s;
  s.zeros = int64_t(from[0]);
  s.nonfinite = int64_t(from[1]);
  s.zero_groups = int64_t(from[2]);
  s.gap = from[3];
  s.grad = from[4];
  s.value = from[5];
  return s;
}

}  // namespace rvsm
