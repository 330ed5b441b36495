// Which (batch, outer, groups, inner) view of a dense tensor makes groups of the dimensions that index them. Without
// torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "types.h"

namespace rvsm {

// The view of a dense tensor with the given sizes and strides whose dimensions `group_dims` (in [0, n)) index the
// groups.
//
// In memory order the dimensions collapse into runs of group and of reduced ones; the view holds group, reduced, group,
// reduced at most: (0, 1) of a channels-last weight has two group runs, and so has (0, 2) of a contiguous one.
//
// `group_block` consecutive indices of the one group dimension make one group; they are neighbours in memory.
//
// Throws std::invalid_argument where the dimensions do not collapse, and where a block does not divide its dimension.
inline GroupView group_view(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                            std::vector<int64_t> group_dims, int64_t group_block = 1) {
  if (group_block != 1) {
    if (group_block < 1 || group_dims.size() != 1)
      throw std::invalid_argument("group_block " + std::to_string(group_block) + " needs a group_dim of one dimension");
    const int64_t size = sizes[size_t(group_dims[0])];
    if (size % group_block != 0)
      throw std::invalid_argument("group_block " + std::to_string(group_block) + " does not divide dimension " +
                                  std::to_string(group_dims[0]) + ", which has " + std::to_string(size) + " indices");
  }
  const auto is_group_dim = [&](size_t d) {
    return std::find(group_dims.begin(), group_dims.end(), int64_t(d)) != group_dims.end();
  };
  std::vector<size_t> order;  // the dimensions that matter, the slowest first
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1) order.push_back(d);
  std::stable_sort(order.begin(), order.end(), [&](size_t x, size_t y) { return strides[x] > strides[y]; });

  std::vector<std::pair<bool, int64_t>> runs;  // (group dimensions?, number of elements)
  for (const size_t d : order) {
    if (runs.empty() || runs.back().first != is_group_dim(d)) runs.emplace_back(is_group_dim(d), 1);
    runs.back().second *= sizes[d];
  }
  const auto group_runs = std::count_if(runs.begin(), runs.end(), [](const auto& r) { return r.first; });

  GroupView v;
  if (group_runs == 0) {
    for (const auto& r : runs) v.inner *= r.second;
    return v;
  }
  std::sort(group_dims.begin(), group_dims.end());
  const bool two = group_runs == 2 && runs.front().first;
  if (group_runs > 1 && !two) {
    std::string dims;
    for (const auto d : group_dims) dims += (dims.empty() ? "" : ", ") + std::to_string(d);
    throw std::invalid_argument("the dimensions (" + dims +
                                ") of group_dim do not collapse in memory into one index; permute the parameter so "
                                "that they are neighbours (or make it contiguous), or use engine=\"reference\"");
  }
  size_t i = 0;
  if (two) v.batch = runs[i++].second;
  if (!runs[i].first) v.outer = runs[i++].second;
  v.groups = runs[i++].second / group_block;
  v.inner = group_block * (i < runs.size() ? runs[i].second : 1);
  return v;
}

}  // namespace rvsm
