// What the C++ tests need: a check that prints its operands, a seeded generator, and an exit status.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

inline int failures = 0;

#define CHECK(condition, ...)                                            \
  do {                                                                   \
    if (!(condition)) {                                                  \
      std::printf("%s:%d: %s failed: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                          \
      std::printf("\n");                                                 \
      if (++failures > 20) std::exit(1);                                 \
    }                                                                    \
  } while (0)

inline std::mt19937_64& generator() {
  static std::mt19937_64 g(1812);
  return g;
}

inline double uniform(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(generator());
}

inline double log_uniform(double low, double high) { return std::exp(uniform(std::log(low), std::log(high))); }

inline int64_t integer(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator());
}

inline int finish(const char* name, int64_t checked) {
  std::printf("%s: %lld cases, %d failed\n", name, static_cast<long long>(checked), failures);
  return failures == 0 ? 0 : 1;
}
