// What the interpreter is tried on: tensors with random shapes, places in memory and options, and jobs of many of them.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../check.h"
#include "interpreted_kernels.h"

namespace rvsm::ptx {

// ---- a pass ---------------------------------------------------------------------------------------------------------

// One case: it draws everything from its own seed, so that it can be repeated alone.
struct Case {
  std::string name;
  std::function<void()> run;
};

// Which tensors a random case is about.
enum class Profile { any, groups, elements, tl1, groups_that_keep, elements_that_keep };

void random_case(int index, uint64_t seed);
void special_case(int index, uint64_t seed);  // NaN, Inf, signed zeros, subnormal and huge numbers
std::vector<Case> far_cases();                // tensors of more than 2^31 elements
std::vector<Case> small_cases();              // shapes and numbers that random cases meet too seldom
void engine_case(int count, Action action, int index, uint64_t seed);  // what test_cuda_device.cpp runs
void general_case(int index, uint64_t seed);                           // every kernel of general.h

// Of all comparisons of a pass.
struct Statistics {
  int64_t compared = 0, unlike_host = 0, near_cut = 0;
  double worst[6][4] = {};  // error over its bound, by array, in the order of kArrayNames, and type
  double worst_from_host = 0;
  uint64_t digest = 0;  // of the bits of all results
  std::map<std::string, int64_t> tensors;
};
extern Statistics statistics;

constexpr const char* kDtypeNames[] = {"f32", "f64", "bf16", "f16"};
constexpr const char* kArrayNames[] = {"w", "m", "kept", "g", "v", "largest"};
constexpr int kArrays = 6;

// Whether cases run again in another order of threads. Mutants do without it.
extern bool run_in_second_order;

// Notes that a result is wrong.
void wrong(const std::string& kind, const std::string& text);

// Like printf, into a string.
__attribute__((format(printf, 1, 2))) std::string text_of(const char* format, ...);

// ---- tensors --------------------------------------------------------------------------------------------------------

// The bytes of one array in a larger block of memory, so that what lies around it belongs to nobody.
struct Array {
  std::unique_ptr<char[]> owned;
  char* at = nullptr;
  size_t bytes = 0;
  std::vector<char> before;

  // `misalign`: bytes behind a boundary of 256.
  void make(size_t count, size_t misalign) {
    owned.reset(new char[count + 1024]);
    at = reinterpret_cast<char*>((uintptr_t(owned.get()) + 511) / 256 * 256) + misalign;
    bytes = count;
  }
  void keep() { before.assign(at, at + bytes); }
  void restore() {
    if (bytes > 0) std::memcpy(at, before.data(), bytes);
  }
  std::vector<char> now() const { return std::vector<char>(at, at + bytes); }
};

template <class S>
void put(char* to, size_t i, double value) {
  S s;
  store(s, Opmath<S>(value));
  std::memcpy(to + i * sizeof s, &s, sizeof s);
}

template <class S>
double get(const char* from, size_t i) {
  S s;
  std::memcpy(&s, from + i * sizeof s, sizeof s);
  return double(load(s));
}

// What is drawn for a tensor, or chosen by a case.
struct TensorOptions : definition::Tensor {
  bool wide = false;               // a half parameter whose gradient is float32: it is stepped as float32
  Dtype noted = Dtype::f32;        // the type of the parameter
  int64_t misalign[kArrays] = {};  // elements behind a boundary, in the order of kArrayNames
  double zeros = 0;                // share of the elements that are 0
  bool zero_groups = false;        // every fifth group is 0
  bool counted = false;            // its steps are counted on the device
  bool tie = false;                // top-k: the cut is the magnitude of an element
};

struct TensorCase {
  TensorOptions options;
  bool active = true;
  int32_t group = 0;
  Array w, g, m, kept, v, largest, cut;
  Array counter;               // where counted
  definition::Arrays numbers;  // what the arrays hold
  double cut_value = 0;
  std::string text;
  TensorArgs args;  // from Experiment::aim

  Array* arrays[kArrays] = {&w, &m, &kept, &g, &v, &largest};  // in the order of kArrayNames

  // Puts a number into an element of one of these.
  void set(int array, int64_t element, double value);
};

TensorOptions random_tensor(Action action, bool big, Profile profile);
std::unique_ptr<TensorCase> make_tensor(const TensorOptions& options);

// An element of a list, at random.
template <class T>
T pick(std::initializer_list<T> list) {
  return list.begin()[integer(0, int64_t(list.size()) - 1)];
}

// ---- jobs -----------------------------------------------------------------------------------------------------------

// A job over tensors, run by one implementation of the kernels after another from the same numbers.
class Experiment {
 public:
  explicit Experiment(Action action) : action_(action) {}

  enum class FoundInf { absent, zero, positive };

  std::vector<std::unique_ptr<TensorCase>> tensors;
  bool with_source = false;       // a prox reads g and writes w
  int64_t limit = cuda::kNarrow;  // of Launches::divide
  double grad_scale = 0;          // 0: there is none
  FoundInf found_inf = FoundInf::absent;

  Action action() const { return action_; }

  // After all tensors are made: aims the arguments at the arrays.
  void aim();

  // All arrays after a run, kArrays for each tensor in the order of kArrayNames, and the penalty's value.
  using Bytes = std::vector<std::vector<char>>;
  Bytes interpret() { return run(interpreted_kernels(), true); }
  Bytes on_host() { return run(cuda::host_kernels(), false); }

  // Runs the interpreter twice in different orders, then the host, and judges all numbers. `second`: the other order.
  void judge(Mode::Order second);

  // The same of tensors with Inf and NaN: all results are of the same class as the host's, which is NaN, the same Inf,
  // or finite.
  void judge_classes();

 private:
  Bytes run(const cuda::Kernels& kernels, bool interpreted);
  void register_memory();
  void judge_value(const Bytes& got, const Bytes& host);
  void judge_tensor(size_t i, const Bytes& got, const Bytes& host);

  const Action action_;
  Array grad_scale_, found_inf_, total_, scratch_;
};

}  // namespace rvsm::ptx
