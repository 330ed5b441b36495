// What a pass finds wrong: one line for each kind and place, printed when it is met for the first time.
#pragma once

#include <cstdint>
#include <cstdio>
#include <map>
#include <string>

namespace rvsm::ptx {

struct Findings {
  std::map<std::string, int64_t> times;  // by kind and place
  int64_t total = 0;
  std::string context;                                   // the case that runs now
  void (*at_first)(const std::string& place) = nullptr;  // called in the place of printing

  // `place`: a word for the kind, then where: "race KERNEL:LINE".
  void add(const std::string& place, const std::string& text) {
    ++total;
    if (++times[place] > 1) return;
    if (at_first != nullptr) return at_first(place);
    std::printf("FINDING [%s] %s\n   in %s\n", place.c_str(), text.c_str(), context.c_str());
    std::fflush(stdout);
  }
};

}  // namespace rvsm::ptx
