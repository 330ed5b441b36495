// The kernels on the host, block by block and thread by thread: for tests of the engine where there is no GPU.

#include <memory>
#include <vector>

#include "kernels.h"

namespace rvsm::cuda {

namespace {

// Runs f for every thread of a block; all are done when it returns.
constexpr auto kEach = [](const auto& f) {
  for (int thread = 0; thread < kThreads; ++thread) f(thread);
};

template <bool kKeeps>
const char* step(const Queue&, Dtype dtype, const Table& t) {
  with_storage(dtype, [&](auto s) {
    for (uint32_t block = 0; block < t.blocks; ++block)
      kEach([&](int thread) { step_thread<decltype(s), kKeeps>(t, block, thread); });
  });
  return nullptr;
}

const char* prox(const Queue&, Dtype dtype, const Table& t) {
  with_storage(dtype, [&](auto s) {
    for (uint32_t block = 0; block < t.blocks; ++block)
      kEach([&](int thread) { prox_thread<decltype(s)>(t, block, thread); });
  });
  return nullptr;
}

template <bool kStep>
const char* resident(const Queue&, Dtype dtype, const Table& t) {
  with_storage(dtype, [&](auto s) {
    using T = Arithmetic<decltype(s)>;
    const auto shared = std::make_unique<ResidentShared<T>>();
    for (uint32_t block = 0; block < t.blocks; ++block) resident_block<decltype(s), kStep, T>(t, block, *shared, kEach);
  });
  return nullptr;
}

template <bool kDual>
const char* squares(const Queue&, Dtype dtype, const SumTable& t) {
  with_storage(dtype, [&](auto s) {
    using S = decltype(s);
    std::vector<double> sums(kSums<S>);
    for (uint32_t block = 0; block < t.blocks; ++block)
      sum_block<S, true, kDual, Arithmetic<S>>(t, block, sums.data(), kEach);
  });
  return nullptr;
}

const char* join(const Queue&, Dtype dtype, const SumTable& t) {
  with_storage(dtype, [&](auto s) {
    std::vector<double> sums(kSums<double>);
    for (uint32_t block = 0; block < t.blocks; ++block)
      sum_block<double, false, false, Arithmetic<decltype(s)>>(t, block, sums.data(), kEach);
  });
  return nullptr;
}

const char* penalty(const Queue&, Dtype dtype, const Table& t) {
  with_storage(dtype, [&](auto s) {
    std::vector<double> sums(kThreads);
    for (uint32_t block = 0; block < t.blocks; ++block) penalty_block<decltype(s)>(t, block, sums.data(), kEach);
  });
  return nullptr;
}

}  // namespace

const Kernels host_kernels = {step<false>,    prox,          step<true>, resident<true>, resident<false>,
                              squares<false>, squares<true>, join,       penalty};

}  // namespace rvsm::cuda
