// Which (batch, outer, groups, inner) view of a dense tensor puts the kept dimensions into groups. Without torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "types.h"

namespace rvsm {

// The view of a dense tensor with the given sizes and strides whose dimensions `kept` (in [0, n)) index the groups.
//
// In memory order the dimensions collapse into runs of kept and of reduced ones; the view holds kept, reduced, kept,
// reduced at most. Two kept runs are taken only where the kept dimensions are neighbours in the tensor's own order,
// as (0, 1) of a channels-last weight. Throws std::invalid_argument where they do not collapse.
inline GroupView group_view(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                            std::vector<int64_t> kept) {
  const auto is_kept = [&](size_t d) { return std::find(kept.begin(), kept.end(), int64_t(d)) != kept.end(); };
  std::vector<size_t> order;  // the dimensions that matter, the slowest first
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1) order.push_back(d);
  std::stable_sort(order.begin(), order.end(), [&](size_t x, size_t y) { return strides[x] > strides[y]; });

  std::vector<std::pair<bool, int64_t>> runs;  // (kept?, number of elements)
  for (const size_t d : order) {
    if (runs.empty() || runs.back().first != is_kept(d)) runs.emplace_back(is_kept(d), 1);
    runs.back().second *= sizes[d];
  }
  const auto kept_runs = std::count_if(runs.begin(), runs.end(), [](const auto& r) { return r.first; });

  GroupView v;
  if (kept_runs == 0) {
    for (const auto& r : runs) v.inner *= r.second;
    return v;
  }
  std::sort(kept.begin(), kept.end());
  const bool neighbours = kept.back() - kept.front() + 1 == int64_t(kept.size());
  const bool two = kept_runs == 2 && runs.front().first && neighbours;
  if (kept_runs > 1 && !two) {
    std::string dims;
    for (const auto d : kept) dims += (dims.empty() ? "" : ", ") + std::to_string(d);
    throw std::invalid_argument("the dimensions (" + dims +
                                ") of group_dim do not collapse in memory into one index; permute the parameter so "
                                "that they are neighbours (or make it contiguous), or use engine=\"reference\"");
  }
  size_t i = 0;
  if (two) v.batch = runs[i++].second;
  if (!runs[i].first) v.outer = runs[i++].second;
  v.groups = runs[i++].second;
  if (i < runs.size()) v.inner = runs[i].second;
  return v;
}

}  // namespace rvsm
