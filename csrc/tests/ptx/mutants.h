// Does a pass see faults? One executed instruction is changed at a time, and the cases that execute it run until the
// first finding.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cases.h"

namespace rvsm::ptx {

// Runs all cases once to learn what each executes, then `count` mutants of instructions that are drawn by `seed`,
// each in a process of its own. Prints a line for each: the kind of the first finding, UNSEEN where all results have
// the same bits as before, or BOUNDED where they differ within their bounds. Returns how many had no finding; -1 where
// a case fails as it is.
int run_mutants(const std::vector<Case>& cases, int count, uint64_t seed);

// Runs a case from the beginning.
void run_case(const Case& c);

}  // namespace rvsm::ptx
