// group_view against the meaning of group_dim: walk every element by its index and compare the groups.

#include <map>
#include <numeric>

#include "../math/group_view.h"
#include "../math/windows.h"
#include "check.h"

using namespace rvsm;

namespace {

// Strides of a dense tensor whose dimensions lie in memory in the given order, the slowest first.
std::vector<int64_t> dense_strides(const std::vector<int64_t>& sizes, const std::vector<size_t>& order) {
  std::vector<int64_t> strides(sizes.size());
  int64_t next = 1;
  for (size_t i = order.size(); i-- > 0;) {
    strides[order[i]] = next;
    next *= sizes[order[i]];
  }
  return strides;
}

// Whether the view puts two elements into one group exactly if their indices of the group dimensions agree, or are in
// the same block.
void walk(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
          const std::vector<int64_t>& group_dims, const GroupView& v, int64_t block = 1) {
  const int64_t n = std::accumulate(sizes.begin(), sizes.end(), int64_t(1), std::multiplies<>());
  CHECK(v.batch * v.outer * v.groups * v.inner == n, "the view has %lld elements of %lld",
        static_cast<long long>(v.batch * v.outer * v.groups * v.inner), static_cast<long long>(n));
  std::map<std::vector<int64_t>, int64_t> group_of;
  std::map<int64_t, int64_t> members;
  for (int64_t i = 0; i < n; ++i) {
    int64_t rest = i, offset = 0;
    std::vector<int64_t> key;
    for (size_t d = 0; d < sizes.size(); ++d) {
      const int64_t index = rest % sizes[d];
      rest /= sizes[d];
      offset += index * strides[d];
      if (std::find(group_dims.begin(), group_dims.end(), int64_t(d)) != group_dims.end()) key.push_back(index / block);
    }
    const int64_t group = offset / (v.outer * v.groups * v.inner) * v.groups + offset / v.inner % v.groups;
    ++members[group];
    const auto [it, is_new] = group_of.emplace(key, group);
    CHECK(it->second == group, "two elements of one group are apart");
    (void)is_new;
  }
  CHECK(int64_t(group_of.size()) == v.count() && int64_t(members.size()) == v.count(), "%zu groups, the view has %lld",
        group_of.size(), static_cast<long long>(v.count()));
  for (const auto& [group, count] : members) CHECK(count == v.size(), "group %lld", static_cast<long long>(group));
}

bool refused(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
             const std::vector<int64_t>& group_dims, int64_t block = 1) {
  try {
    group_view(sizes, strides, group_dims, block);
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

// Windows of m along dimension 1: element k of each is where windows_of says.
void walk_windows(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t m) {
  const Windows w = windows_of(sizes, strides, 1, m);
  int64_t numel = 1;
  for (const int64_t n : sizes) numel *= n;
  CHECK(numel % w.whole() == 0, "windows of %d cut the end of a tensor", int(m));
  std::vector<int64_t> at(sizes.size(), 0);
  for (int64_t i = 0; i < numel; ++i) {
    int64_t offset = 0;
    for (size_t d = 0; d < sizes.size(); ++d) offset += at[d] * strides[d];
    CHECK(offset / w.inner % m == at[1] % m, "index %lld of dimension 1 is at another place of its window",
          static_cast<long long>(at[1]));
    CHECK((offset - at[1] % m * w.inner) / w.whole() == offset / w.whole(), "a window lies in two");
    for (size_t d = sizes.size(); d-- > 0 && ++at[d] == sizes[d];) at[d] = 0;
  }
}

}  // namespace

int main() {
  int64_t cases = 0;
  const std::vector<std::vector<int64_t>> all_group_dims = {{}, {0}, {1}, {0, 1}};
  for (int i = 0; i < 400; ++i) {
    std::vector<int64_t> sizes(size_t(integer(2, 5)));
    for (auto& s : sizes) s = integer(1, 5);
    std::vector<size_t> contiguous(sizes.size());
    std::iota(contiguous.begin(), contiguous.end(), size_t(0));
    std::vector<size_t> channels_last = contiguous;  // 0, 2, 3, ..., 1
    std::rotate(channels_last.begin() + 1, channels_last.begin() + 2, channels_last.end());
    for (const auto& order : {contiguous, channels_last}) {
      const auto strides = dense_strides(sizes, order);
      for (const auto& group_dims : all_group_dims) {
        walk(sizes, strides, group_dims, group_view(sizes, strides, group_dims));
        ++cases;
      }
    }
    // Any permutation and any set of group dimensions: either refused or right.
    std::shuffle(contiguous.begin(), contiguous.end(), generator());
    const auto strides = dense_strides(sizes, contiguous);
    std::vector<int64_t> group_dims;
    for (size_t d = 0; d < sizes.size(); ++d)
      if (integer(0, 1)) group_dims.push_back(int64_t(d));
    if (!refused(sizes, strides, group_dims)) walk(sizes, strides, group_dims, group_view(sizes, strides, group_dims));
    ++cases;
    // Blocks of any dimension, in any permutation: one dimension is always one run.
    const int64_t block = integer(1, 4), d = integer(0, int(sizes.size()) - 1);
    std::vector<int64_t> blocked = sizes;
    blocked[size_t(d)] *= block;
    const auto wider = dense_strides(blocked, contiguous);
    walk(blocked, wider, {d}, group_view(blocked, wider, {d}, block), block);
    ++cases;
    std::vector<int64_t> windowed = sizes;
    const int32_t m = int32_t(integer(2, kMostOfWindow));
    windowed[1] *= m;
    walk_windows(windowed, dense_strides(windowed, contiguous), m);
    ++cases;
  }
  for (const int32_t m : {3, 17}) {
    bool raised = false;
    try {
      windows_of({2, 34}, {34, 1}, 1, m);
    } catch (const std::invalid_argument&) {
      raised = true;
    }
    CHECK(raised, "34 elements in windows of %d", int(m));
  }
  CHECK(refused({6, 4}, {4, 1}, {0}, 4), "6 indices are no multiple of 4");
  CHECK(refused({6, 4}, {4, 1}, {0, 1}, 2), "blocks of two dimensions");
  CHECK(refused({6, 4}, {4, 1}, {}, 2), "blocks of no dimension");
  CHECK(refused({6, 4}, {4, 1}, {0}, 0), "blocks of no index");
  CHECK(refused({2, 3, 4, 5}, {60, 20, 5, 1}, {1, 3}), "(1, 3) of a contiguous weight does not collapse");
  CHECK(!refused({2, 3, 4, 5}, {60, 20, 5, 1}, {0, 2}), "(0, 2) of a contiguous weight");
  CHECK(!refused({2, 3, 4, 5}, {60, 1, 15, 3}, {0, 1}), "(0, 1) of a channels-last weight");
  CHECK(!refused({2, 3, 1, 5}, {15, 5, 5, 1}, {0, 1}), "a dimension of size 1 is in nobody's way");
  return finish("group_view", cases);
}
