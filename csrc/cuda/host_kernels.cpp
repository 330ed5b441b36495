// The kernels on the host, block by block and thread by thread: for tests of the engine where there is no GPU.

#include <memory>
#include <vector>

#include "kernels.h"

namespace rvsm::cuda {

namespace {

// Runs f for every thread of a block; all are done when it returns.
constexpr auto kForThreads = [](const auto& f) {
  for (int thread = 0; thread < kThreads; ++thread) f(thread);
};

template <class TableType, class F>
const char* for_blocks(const void* table, const F& f) {
  const TableType& t = *static_cast<const TableType*>(table);
  for (uint32_t block = 0; block < t.blocks; ++block) f(t, block);
  return nullptr;
}

struct HostStarter {
  static const char* count(const Stream&, const void* table) {
    return for_blocks<CountTable>(table, [](const CountTable& t, uint32_t block) {
      kForThreads([&](int thread) { count_thread(t, block, thread); });
    });
  }

  static const char* numbers(const Stream&, const void* table) {
    return for_blocks<NumbersTable>(table, [](const NumbersTable& t, uint32_t block) {
      kForThreads([&](int thread) { numbers_thread(t, block, thread); });
    });
  }

  static const char* windows(const Stream&, const void* table) {
    return for_blocks<WindowTable>(table, [](const WindowTable& t, uint32_t block) {
      kForThreads([&](int thread) { window_thread(t, block, thread); });
    });
  }

  template <class T>
  static const char* select_pass(const Stream&, const void* table) {
    const auto shared = std::make_unique<PassShared<T>>();
    return for_blocks<PassTable>(
        table, [&](const PassTable& t, uint32_t block) { pass_block<T>(t, block, *shared, kForThreads); });
  }

  template <class T>
  static const char* select_pick(const Stream&, const void* table) {
    const auto shared = std::make_unique<PickShared>();
    return for_blocks<CutTable>(
        table, [&](const CutTable& t, uint32_t block) { pick_block<T>(t, block, *shared, kForThreads); });
  }

  static const char* general_squares(const Stream&, const void* table) {
    std::vector<double> sums(kSums<GeneralWeights>);
    return for_blocks<SumTable>(table, [&](const SumTable& t, uint32_t block) {
      sum_block<GeneralWeights, true, true, float>(t, block, sums.data(), kForThreads);
    });
  }

  static const char* rows(const Stream&, const void* table) {
    std::vector<double> sums(kRowSums);
    return for_blocks<RowTable>(
        table, [&](const RowTable& t, uint32_t block) { row_block(t, block, sums.data(), kForThreads); });
  }

  template <class T>
  static const char* measure(const Stream&, const void* table) {
    std::vector<double> sums(kMeasuredSums);
    return for_blocks<Table>(
        table, [&](const Table& t, uint32_t block) { measure_block<T>(t, block, sums.data(), kForThreads); });
  }

  template <class T, class Base, bool kHasState>
  static const char* general(const Stream&, const void* table) {
    return for_blocks<Table>(table, [](const Table& t, uint32_t block) {
      kForThreads([&](int thread) { general_thread<T, Base, kHasState>(t, block, thread); });
    });
  }

  template <class S, class Base, bool kHasState>
  static const char* step(const Stream&, const void* table) {
    return for_blocks<Table>(table, [](const Table& t, uint32_t block) {
      kForThreads([&](int thread) { step_thread<S, Base, kHasState>(t, block, thread); });
    });
  }

  template <class S>
  static const char* prox(const Stream&, const void* table) {
    return for_blocks<Table>(table, [](const Table& t, uint32_t block) {
      kForThreads([&](int thread) { prox_thread<S>(t, block, thread); });
    });
  }

  template <class S, class Base, bool kStep>
  static const char* resident(const Stream&, const void* table) {
    const auto shared = std::make_unique<ResidentShared<Opmath<S>>>();
    return for_blocks<Table>(
        table, [&](const Table& t, uint32_t block) { resident_block<S, Base, kStep>(t, block, *shared, kForThreads); });
  }

  template <class S, bool kDual>
  static const char* squares(const Stream&, const void* table) {
    std::vector<double> sums(kSums<S>);
    return for_blocks<SumTable>(table, [&](const SumTable& t, uint32_t block) {
      sum_block<S, true, kDual, Opmath<S>>(t, block, sums.data(), kForThreads);
    });
  }

  template <class T>
  static const char* factors(const Stream&, const void* table) {
    std::vector<double> sums(kSums<double>);
    return for_blocks<SumTable>(table, [&](const SumTable& t, uint32_t block) {
      sum_block<double, false, false, T>(t, block, sums.data(), kForThreads);
    });
  }

  template <class S>
  static const char* penalty(const Stream&, const void* table) {
    std::vector<double> sums(kThreads);
    return for_blocks<Table>(
        table, [&](const Table& t, uint32_t block) { penalty_block<S>(t, block, sums.data(), kForThreads); });
  }
};

}  // namespace

const Kernels& host_kernels() {
  static const Kernels all = all_kernels<HostStarter>();
  return all;
}

}  // namespace rvsm::cuda
