// The CUDA engine's cuts against a sort, with its kernels run on the host: sizes around a chunk, adversarial arrays,
// wrong last cuts, and which launches find a cut.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "../cuda/selecting.h"
#include "check.h"

using namespace rvsm;

namespace {

int64_t checked = 0;
bool found_before_histograms = false;  // by all cuts of the last selection

// As the host's kernels, and it is noted what the histograms find already done.
const char* watched_pick(const cuda::Stream& stream, const void* table) {
  const auto& t = *static_cast<const cuda::CutTable*>(table);
  const char* const error = cuda::host_kernels().at({cuda::Work::select_pick, Dtype::f32, {}, false})(stream, table);
  if (t.pick == cuda::Pick::collected)
    found_before_histograms =
        std::all_of(t.at, t.at + t.entries, [](const cuda::CutEntry& e) { return e.state->found; });
  return error;
}

const cuda::Kernels& kernels() {
  static const cuda::Kernels watched = [] {
    cuda::Kernels all = cuda::host_kernels();
    all[{cuda::Work::select_pick, Dtype::f32, {}, false}] = watched_pick;
    return all;
  }();
  return watched;
}

template <class T>
using Tensors = std::vector<std::vector<T>>;

template <class T>
T wanted(const Tensors<T>& tensors, size_t survivors, bool between) {
  std::vector<Key<T>> all;
  for (const auto& tensor : tensors)
    for (const T x : tensor) all.push_back(key_of(x));
  if (survivors >= all.size()) return T(-1);
  std::sort(all.begin(), all.end(), std::greater<Key<T>>());
  const T low = cuda::number_of<T>(all[survivors]);
  if (!between || survivors == 0) return low;
  const T high = cuda::number_of<T>(all[survivors - 1]), middle = low + (high - low) / 2;
  return std::isfinite(high) && middle < high ? middle : low;
}

template <class T>
void check_cut(Tensors<T>& tensors, int64_t survivors, bool between, int64_t* last) {
  const Dtype dtype = sizeof(T) == 8 ? Dtype::f64 : Dtype::f32;
  std::vector<TensorArgs> args;
  for (auto& tensor : tensors) {
    args.emplace_back();
    args.back().numel = int64_t(tensor.size());
    args.back().dtype = dtype;
    args.back().w = tensor.data();
  }
  T cut = 7;
  cuda::Selecting selecting(dtype, kernels());
  selecting.add(&cut, last, survivors, args);
  std::vector<char> scratch(size_t(selecting.scratch_bytes()), char(0xab));  // nothing in it is zero by itself
  selecting.run({}, scratch.data(), between);
  const T want = wanted(tensors, size_t(survivors), between);
  CHECK(std::memcmp(&cut, &want, sizeof cut) == 0, "%d bytes, %d tensors, %d survivors: %g, not %g", int(sizeof(T)),
        int(tensors.size()), int(survivors), double(cut), double(want));
  ++checked;
}

template <class T>
T drawn(int kind, int64_t i, std::mt19937_64& random) {
  const double x = std::normal_distribution<double>()(random);
  switch (kind) {
    case 0:
      return T(x);
    case 1:
      return T(0.25);
    case 2:
      return T(int(random() % 7) - 3);
    case 3:
      return T(std::max(x, 1.) - 1);
    case 4:
      return T(x * std::pow(2., sizeof(T) == 8 ? -1060 : -135));
    case 5:
      return T(std::exp(20 * x));
    case 6:
      return T(i);
    default:
      return T(i % 3 == 0 ? NAN : i % 5 == 1 ? -INFINITY : x);
  }
}

template <class T>
void check_all() {
  std::mt19937_64 random(1);
  constexpr int64_t kFar = int64_t(1) << 62;
  for (const int64_t numel : {int64_t(0), int64_t(1), int64_t(2), int64_t(100), cuda::kFewElements,
                              cuda::kFewElements + 1, 2 * cuda::kPassChunk + 7})
    for (int kind = 0; kind < 8; ++kind)
      for (const int count : {1, 3}) {
        Tensors<T> tensors(static_cast<size_t>(count));
        int64_t in_all = 0;
        for (auto& tensor : tensors) {
          for (int64_t i = 0; i < numel / (&tensor - tensors.data() + 1); ++i)
            tensor.push_back(drawn<T>(kind, i, random));
          in_all += int64_t(tensor.size());
        }
        const bool between = kind % 2 == 0;
        for (const int64_t survivors : {int64_t(0), in_all / 10, in_all / 2, in_all - in_all / 1000}) {
          int64_t last[2] = {-1, -1};
          check_cut(tensors, survivors, between, last);
          for (const double factor : {1., 1.0001, -3.}) {
            for (auto& tensor : tensors)
              for (T& x : tensor) x = T(x * factor);
            check_cut(tensors, survivors, !between, last);
          }
          for (const auto& wrong : {std::pair{kFar, int64_t(5)}, std::pair{int64_t(-7), int64_t(-7)},
                                    std::pair{int64_t(1) << 29, kFar}, std::pair{int64_t(0), int64_t(0)}}) {
            last[0] = wrong.first;
            last[1] = wrong.second;
            check_cut(tensors, survivors, between, last);
          }
        }
      }
}

// The common step is one read.
void check_launches() {
  std::mt19937_64 random(2);
  Tensors<float> tensors(1);
  for (int64_t i = 0; i < 200000; ++i) tensors[0].push_back(drawn<float>(0, i, random));
  int64_t last[2] = {-1, -1};
  check_cut(tensors, 20000, false, last);
  CHECK(!found_before_histograms, "a cut without a last one came from %s", "a bracket");
  for (int step = 0; step < 5; ++step) {
    for (float& x : tensors[0]) x += 1e-4f * drawn<float>(0, 0, random);
    check_cut(tensors, 20000, step % 2 == 0, last);
    CHECK(found_before_histograms, "step %d: the bracket around the last cut does not hold it", step);
  }
  Tensors<float> few(1, std::vector<float>(1000, 1.f));
  last[0] = last[1] = -1;
  check_cut(few, 10, false, last);
  CHECK(found_before_histograms, "%d elements are not collected as a whole", int(few[0].size()));
}

}  // namespace

int main() {
  check_all<float>();
  check_all<double>();
  check_launches();
  return finish("cuda_selection", checked);
}
