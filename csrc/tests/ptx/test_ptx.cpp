// The CUDA kernels without a GPU: runs the PTX that nvcc makes of them, case by case. See README.md.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cases.h"
#include "mutants.h"

using namespace rvsm;
using namespace rvsm::ptx;

namespace {

constexpr const char* kUsage =
    "test_ptx FILE.ptx ... [--cases N] [--seed S] [--parts random,special,small,engine,far] [--only CASE]\n"
    "         [--mutants N] [--mutant-seed S] [--unreached]\n"
    "  --cases      random cases, and a quarter as many with special numbers (100)\n"
    "  --only       the case with this name, as a finding gives it\n"
    "  --mutants    changes so many instructions, one at a time, and counts the changes that no case sees\n"
    "  --unreached  prints every instruction that no case executes\n";

constexpr const char* kAllParts = "random,special,small,engine,far";

struct Arguments {
  std::vector<std::string> files;
  int cases = 100, mutants = 0;
  uint64_t seed = 1, mutant_seed = 1;
  std::string parts = kAllParts, only;
  bool unreached = false;
};

[[noreturn]] void usage() {
  std::fputs(kUsage, stderr);
  std::exit(2);
}

Arguments parse(int argc, char** argv) {
  Arguments a;
  for (int i = 1; i < argc; ++i) {
    const std::string s = argv[i];
    const auto value = [&]() -> std::string {
      if (i + 1 >= argc) usage();
      return argv[++i];
    };
    if (s == "--cases")
      a.cases = std::atoi(value().c_str());
    else if (s == "--seed")
      a.seed = std::strtoull(value().c_str(), nullptr, 0);
    else if (s == "--parts")
      a.parts = value();
    else if (s == "--only")
      a.only = value();
    else if (s == "--mutants")
      a.mutants = std::atoi(value().c_str());
    else if (s == "--mutant-seed")
      a.mutant_seed = std::strtoull(value().c_str(), nullptr, 0);
    else if (s == "--unreached")
      a.unreached = true;
    else if (s[0] == '-')
      usage();
    else
      a.files.push_back(s);
  }
  if (a.files.empty()) usage();
  return a;
}

std::vector<Case> cases_of(const Arguments& a) {
  std::vector<Case> all;
  const auto wanted = [&](const char* part) {
    return ("," + a.parts + ",").find(std::string(",") + part + ",") != std::string::npos;
  };
  const auto name = [](const char* part, int i) { return std::string(part) + " " + std::to_string(i); };
  const auto append = [&](std::vector<Case> more) { all.insert(all.end(), more.begin(), more.end()); };
  if (wanted("small")) append(small_cases());
  for (int i = 0; wanted("random") && i < a.cases; ++i)
    all.push_back({name("random", i), [i, &a] { random_case(i, a.seed); }});
  for (int i = 0; wanted("special") && i < a.cases / 4; ++i)
    all.push_back({name("special", i), [i, &a] { special_case(i, a.seed); }});
  int n = 0;
  for (const int count : {1, 4, 13, 40, 121})
    for (const Action action : {Action::step, Action::prox, Action::penalty})
      if (++n; wanted("engine")) all.push_back({name("engine", n), [=, &a] { engine_case(count, action, n, a.seed); }});
  for (int i = 0; wanted("engine") && i < 12; ++i)
    all.push_back({name("general", i), [=, &a] { general_case(i, a.seed); }});
  if (wanted("far")) append(far_cases());
  if (!a.only.empty())
    all.erase(std::remove_if(all.begin(), all.end(), [&](const Case& c) { return c.name != a.only; }), all.end());
  if (all.empty()) {
    std::fprintf(stderr, "no case is named %s\n", a.only.c_str());
    usage();
  }
  return all;
}

void print_kernels(bool unreached) {
  size_t never = 0, all = 0;
  for (const auto& [name, kernel] : ptx::module.kernels) {
    const int64_t here = std::count(kernel->executed.begin(), kernel->executed.end(), uint64_t(0));
    std::printf("%7lld launches, %5zu instructions, %4lld never executed: %s\n", (long long)launched[name],
                kernel->code.size(), (long long)here, name.c_str());
    for (size_t i = 0; unreached && i < kernel->code.size(); ++i)
      if (kernel->executed[i] == 0) std::printf("    %d: %s\n", kernel->lines[i].number, kernel->lines[i].text.c_str());
    never += size_t(here);
    all += kernel->code.size();
  }
  std::printf("%llu instructions executed; %zu of %zu in the code never\n", (unsigned long long)machine.instructions,
              never, all);
}

void print_statistics() {
  const Statistics& s = statistics;
  for (const auto& [type, count] : s.tensors) std::printf("  %lld tensors: %s\n", (long long)count, type.c_str());
  std::printf("%lld numbers compared; %lld unlike the host's in some bit, %lld beside a cut\n", (long long)s.compared,
              (long long)s.unlike_host, (long long)s.near_cut);
  for (int d = 0; d < 4; ++d)
    std::printf("  largest error over its bound, %s: w %.3f, m %.3f, kept %.3f\n", kDtypeNames[d], s.worst[0][d],
                s.worst[1][d], s.worst[2][d]);
  std::printf("  largest difference from the host over its bound: %.3f\n", s.worst_from_host);
}

}  // namespace

int main(int argc, char** argv) {
  const Arguments a = parse(argc, argv);
  for (const std::string& file : a.files) ptx::module.load(file);
  const std::vector<Case> cases = cases_of(a);
  if (a.mutants > 0) {
    // About a tenth of all mutants change nothing, see README.md.
    const int unseen = run_mutants(cases, a.mutants, a.mutant_seed);
    return unseen < 0 || 5 * unseen > a.mutants ? 1 : 0;
  }
  for (const Case& c : cases) run_case(c);
  if (a.only.empty() && a.parts == kAllParts)
    for (const auto& [name, kernel] : ptx::module.kernels)
      if (launched[name] == 0) machine.findings.add("coverage " + name, "no case launches the kernel");
  print_kernels(a.unreached);
  print_statistics();
  const Findings& f = machine.findings;
  for (const auto& [place, times] : f.times) std::printf("  %lld x %s\n", (long long)times, place.c_str());
  std::printf("test_ptx: %zu cases, %lld findings of %zu kinds\n", cases.size(), (long long)f.total, f.times.size());
  return f.total == 0 ? 0 : 1;
}
