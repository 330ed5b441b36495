// How the norms of short groups side by side are summed: over rows, a sum for each column.
#pragma once

#include <cstdint>

namespace rvsm::cpu {

// Most columns whose sums are held at a time. Whole rows, where they are not longer: a processor reads them as one
// stretch of memory, and the sums stay in the second-level cache.
constexpr int64_t kMostColumns = 16384;
// Rows that are taken together.
constexpr int64_t kRows = 8;

}  // namespace rvsm::cpu
