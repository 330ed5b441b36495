#include "mutants.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <regex>

namespace rvsm::ptx {

namespace {

// ---- what is changed ------------------------------------------------------------------------------------------------

struct Mutation {
  std::string name, text;
};

std::string replaced(const std::string& s, const std::string& from, const std::string& to) {
  const size_t at = s.find(from);
  return at == std::string::npos ? s : s.substr(0, at) + to + s.substr(at + from.size());
}

// An instruction without effect.
const char* const kNothing = "mov.u32 %nothing, 0";

// The address of an access is off by an element or a vector.
void add_offsets(const std::string& s, std::vector<Mutation>& all) {
  static const std::regex address(R"(\[([^\]+]+)(?:\+(-?\d+))?\])");
  std::smatch m;
  if (!std::regex_search(s, m, address)) return;
  const bool vector = s.find(".v2.") != std::string::npos || s.find(".v4.") != std::string::npos;
  const auto has = [&](const char* bits) {
    return s.substr(0, s.find_first_of(" \t")).find(bits) != std::string::npos;
  };
  const int step = vector ? 16 : has("64") ? 8 : has("32") ? 4 : 2;
  const int64_t offset = m[2].matched ? std::stoll(m[2]) : 0;
  for (const int by : {step, -step})
    all.push_back(
        {text_of("address %+d", by),
         m.prefix().str() + text_of("[%s+%lld]", m[1].str().c_str(), (long long)(offset + by)) + m.suffix().str()});
}

// Operands `i` and `i + 1` are exchanged.
std::string exchanged(const std::string& s, int i) {
  static const std::regex argument(R"([^,\s]+(?=,|$))");
  const size_t blank = s.find_first_of(" \t");
  std::string arguments = s.substr(blank);
  std::vector<std::string> parts;
  for (std::sregex_iterator at(arguments.begin(), arguments.end(), argument), end; at != end; ++at)
    parts.push_back(at->str());
  std::swap(parts[size_t(i)], parts[size_t(i) + 1]);
  std::string out = s.substr(0, blank) + " ";
  for (size_t k = 0; k < parts.size(); ++k) out += (k > 0 ? ", " : "") + parts[k];
  return out;
}

std::vector<Mutation> mutations_of(const std::string& s) {
  std::vector<Mutation> all;
  const auto begins = [&](const char* prefix) { return s.rfind(prefix, 0) == 0; };
  if (begins("bar.sync")) return {{"no barrier", kNothing}};
  if (begins("@")) {
    all.push_back({"never branches", kNothing});
    all.push_back({"always branches", s.substr(s.find("bra"))});
  }
  if (begins("st.")) all.push_back({"no store", kNothing});
  static const std::regex access(R"(^(ld|st)\.(global|shared|param).*)");
  if (std::regex_match(s, access)) add_offsets(s, all);
  static const std::pair<const char*, const char*> comparisons[] = {{"lt", "le"}, {"le", "lt"}, {"gt", "ge"},
                                                                    {"ge", "gt"}, {"eq", "ne"}, {"ne", "eq"}};
  for (const auto& [from, to] : comparisons) {
    const std::string word = std::string("setp.") + from + ".";
    if (begins(word.c_str()))
      all.push_back({word + " becomes " + to, replaced(s, word, std::string("setp.") + to + ".")});
  }
  static const std::regex sum(R"(^(add|sub)\.f(32|64).*)");
  if (std::regex_match(s, sum))
    all.push_back({"the other sign", begins("add") ? replaced(s, "add.", "sub.") : replaced(s, "sub.", "add.")});
  static const std::regex with_constant(R"(^((?:add|sub|shl|shr|and|mul|mad)\.\S*[subw]\S*\s.*, )(-?\d+)$)");
  std::smatch m;
  if (std::regex_match(s, m, with_constant))
    all.push_back({"constant + 1", m[1].str() + std::to_string(std::stoll(m[2]) + 1)});
  if (begins("selp")) all.push_back({"selection exchanged", exchanged(s, 1)});
  if (begins("cvt.rn.bf16x2") || begins("cvt.rn.f16x2")) all.push_back({"pair exchanged", exchanged(s, 1)});
  return all;
}

// ---- what is executed -----------------------------------------------------------------------------------------------

struct Place {
  Kernel* kernel;
  size_t index;  // of the instruction
};

struct Coverage {
  std::vector<Place> places;
  std::vector<std::vector<bool>> executed;  // by case and place
  std::vector<uint64_t> instructions;       // by case
  std::vector<uint64_t> digests;            // of a case's results
};

Coverage cover(const std::vector<Case>& cases) {
  Coverage c;
  for (const auto& [name, kernel] : module.kernels)
    for (size_t i = 0; i < kernel->code.size(); ++i) c.places.push_back({kernel.get(), i});
  for (const Case& one : cases) {
    for (const auto& [name, kernel] : module.kernels) std::fill(kernel->executed.begin(), kernel->executed.end(), 0);
    const uint64_t before = machine.instructions;
    statistics.digest = 0;
    run_case(one);
    c.digests.push_back(statistics.digest);
    c.instructions.push_back(machine.instructions - before);
    std::vector<bool> executed;
    for (const Place& p : c.places) executed.push_back(p.kernel->executed[p.index] > 0);
    c.executed.push_back(std::move(executed));
  }
  return c;
}

// ---- one mutant -----------------------------------------------------------------------------------------------------

int pipe_to_parent = -1;

[[noreturn]] void tell_parent(const std::string& place) {
  const std::string kind = place.substr(0, place.find(' '));
  if (write(pipe_to_parent, kind.data(), kind.size()) < 0) std::abort();
  _exit(1);
}

// What a case does without the mutation.
struct Known {
  const Case* one;
  uint64_t instructions, digest;
};

constexpr const char *kSameBits = "UNSEEN", *kOtherBits = "BOUNDED";

// The kind of the first finding; where no case has one, whether all results have the same bits.
std::string first_finding(const std::vector<Known>& cases, const Place& place, const std::string& text) {
  int ends[2];
  if (pipe(ends) != 0) std::abort();
  std::fflush(stdout);
  const pid_t child = fork();
  if (child < 0) std::abort();
  if (child == 0) {
    pipe_to_parent = ends[1];
    machine.findings.at_first = tell_parent;
    if (std::freopen("/dev/null", "w", stdout) == nullptr) std::abort();
    place.kernel->lines[place.index].text = text;
    decode(*place.kernel);
    bool same = true;
    for (const Known& k : cases) {
      machine.most_instructions = 2 * k.instructions + 100000;
      statistics.digest = 0;
      run_case(*k.one);
      same &= statistics.digest == k.digest;
    }
    _exit(same ? 0 : 2);
  }
  close(ends[1]);
  char buffer[64];
  const ssize_t count = read(ends[0], buffer, sizeof buffer);
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return kSameBits;
  if (WIFEXITED(status) && WEXITSTATUS(status) == 2) return kOtherBits;
  if (count > 0) return std::string(buffer, size_t(count));
  return WIFEXITED(status) ? "engine" : "crash";  // cuda_cases.h gives up after some failures
}

// step_kernel... of a mangled name.
std::string short_name(const std::string& name) {
  static const std::regex kernel(R"(\d\d([a-z]+_kernel.*?)EEv)");
  std::smatch m;
  return std::regex_search(name, m, kernel) ? m[1].str() : name;
}

}  // namespace

void run_case(const Case& c) {
  machine.begin_case();
  machine.findings.context = c.name;
  c.run();
}

int run_mutants(const std::vector<Case>& cases, int count, uint64_t seed) {
  run_in_second_order = false;
  const Coverage coverage = cover(cases);
  if (machine.findings.total > 0) return -1;
  std::vector<size_t> executed;
  for (size_t p = 0; p < coverage.places.size(); ++p)
    if (std::any_of(coverage.executed.begin(), coverage.executed.end(), [&](const auto& e) { return e[p]; }))
      executed.push_back(p);
  std::printf("%zu of %zu instructions are executed\n", executed.size(), coverage.places.size());
  std::vector<size_t> cheapest(cases.size());
  for (size_t i = 0; i < cheapest.size(); ++i) cheapest[i] = i;
  std::sort(cheapest.begin(), cheapest.end(),
            [&](size_t x, size_t y) { return coverage.instructions[x] < coverage.instructions[y]; });
  std::mt19937_64 random(seed);
  std::map<std::string, int> signs;
  for (int i = 0; i < count;) {
    const size_t number = executed[random() % executed.size()];
    const Place& place = coverage.places[number];
    const Line& line = place.kernel->lines[place.index];
    const std::vector<Mutation> mutations = mutations_of(line.text);
    if (mutations.empty()) continue;
    const Mutation& mutation = mutations[random() % mutations.size()];
    std::vector<Known> those;
    for (const size_t c : cheapest)
      if (coverage.executed[c][number]) those.push_back({&cases[c], coverage.instructions[c], coverage.digests[c]});
    const std::string sign = first_finding(those, place, mutation.text);
    std::printf("%3d %-9s %s: %s:%d in %s, executed by %zu cases: %s  ->  %s\n", ++i, sign.c_str(),
                mutation.name.c_str(), place.kernel->file.c_str(), line.number, short_name(place.kernel->name).c_str(),
                those.size(), line.text.c_str(), mutation.text.c_str());
    std::fflush(stdout);
    ++signs[sign];
  }
  const int survivors = signs[kSameBits] + signs[kOtherBits];
  std::printf("%d of %d mutants are seen; by the kind of the first finding:", count - survivors, count);
  for (const auto& [sign, times] : signs) std::printf(" %s %d", sign.c_str(), times);
  std::printf("\n");
  return survivors;
}

}  // namespace rvsm::ptx
