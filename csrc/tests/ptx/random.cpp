// Random jobs, random jobs with special numbers, and the jobs of test_cuda_device.cpp.

#include <cmath>
#include <deque>

#include "../cuda_cases.h"
#include "cases.h"

namespace rvsm::ptx {

namespace {

// Every third case is about groups, elements or tl1, every third about a method that keeps something.
Profile profile_of(int index) {
  switch (index % 9) {
    case 1:
    case 8:
      return Profile::groups_that_keep;
    case 2:
      return Profile::elements_that_keep;
    case 3:
      return Profile::groups;
    case 5:
      return Profile::elements;
    case 7:
      return Profile::tl1;
    default:
      return Profile::any;
  }
}

// Many tensors that share their numbers share a record, so that a table has room for many entries.
void share_numbers(std::vector<TensorOptions>& tensors) {
  for (TensorOptions& t : tensors) {
    t.step = tensors[0].step;
    t.counted = t.counted && t.step.base == BaseKind::adamw;
    if (!t.grouped) t.step.group_lasso = 0;
    t.step.group_scale = false;
  }
}

}  // namespace

void random_case(int index, uint64_t seed) {
  generator().seed(mix(seed * 1000003 + uint64_t(index)));
  const Profile profile = profile_of(index);
  const bool keeps = profile == Profile::groups_that_keep || profile == Profile::elements_that_keep;
  Experiment x(keeps ? Action::step : pick({Action::step, Action::step, Action::step, Action::prox, Action::penalty}));
  const bool step = x.action() == Action::step;
  int count = pick({1, 1, 2, 3, 5, 12, 40, 300});
  if (index % 97 == 96) count = 1400;  // of several tables
  std::vector<TensorOptions> options;
  for (int i = 0; i < count; ++i) options.push_back(random_tensor(x.action(), count <= 5, profile));
  if (count > 12 && integer(0, 1)) share_numbers(options);
  for (const TensorOptions& o : options) {
    x.tensors.push_back(make_tensor(o));
    x.tensors.back()->active = integer(0, 19) != 0;
    x.tensors.back()->group = int32_t(integer(0, 3));
  }
  x.with_source = x.action() == Action::prox && integer(0, 1);
  x.limit = integer(0, 1) ? cuda::kNarrow : pick<int64_t>({50, 333, 2000, 20000});
  x.grad_scale = step && integer(0, 1) ? double(float(log_uniform(0.25, 65536))) : 0;
  using FoundInf = Experiment::FoundInf;
  if (step) x.found_inf = pick({FoundInf::absent, FoundInf::zero, FoundInf::zero, FoundInf::positive});
  x.aim();
  machine.mode = {Mode::Order(index % 4), Mode::Approximation(index / 4 % 4), Mode::Contraction(index % 3),
                  mix(seed ^ uint64_t(index) << 8)};
  if (count <= 3)
    for (const auto& t : x.tensors) machine.findings.context += "; " + t->text;
  x.judge(Mode::Order(index % 2 == 0 ? (index + 1 + index / 4 % 3) % 4 : index % 4));
}

// ---- special numbers ------------------------------------------------------------------------------------------------

void special_case(int index, uint64_t seed) {
  generator().seed(mix(seed * 777 + uint64_t(index)));
  Experiment x(pick({Action::step, Action::step, Action::prox}));
  for (int i = 0; i < 6; ++i) {
    x.tensors.push_back(make_tensor(random_tensor(x.action(), false, Profile::any)));
    TensorCase& t = *x.tensors.back();
    machine.findings.context += "; " + t.text;
    for (int k = 0; k < 4; ++k) {
      if (integer(0, 1)) continue;
      for (int64_t e = 0; e < t.options.numel(); ++e)
        if (uniform(0, 1) < (t.options.grouped ? 0.01 : 0.3))
          t.set(k, e,
                pick({NAN, INFINITY, -INFINITY, 0.f, -0.f, 1e-45f, -1e-40f, 3.4e38f, -3.4e38f, 1e38f, 1.2e-38f, 1e-20f,
                      1e20f, 6e-8f, 65504.f, 65536.f, 2e-39f, -9e-41f}));
    }
  }
  x.aim();
  machine.mode = {Mode::Order(index % 4), index % 2 ? Mode::any : Mode::exact, Mode::never, seed + uint64_t(index)};
  x.judge_classes();
}

// ---- the engine's own cases -----------------------------------------------------------------------------------------

namespace {

// The memory of cuda_cases.h: the host's, registered.
struct RegisteredMemory {
  std::deque<std::vector<char>> owned;

  RegisteredMemory() { machine.memory.clear(); }
  char* place(std::vector<char>& bytes) {
    machine.memory.add(bytes.data(), bytes.size(), "an array", Memory::read_write);
    return bytes.data();
  }
  char* scratch(int64_t bytes) {
    char* const p = owned.emplace_back(size_t(bytes) + 64, char(0x7f)).data();
    machine.memory.add(p, size_t(bytes), "scratch", Memory::not_yet_written);
    return p;
  }
  void fetch(std::vector<char>&, const char*) {}
};

}  // namespace

void engine_case(int count, Action action, int index, uint64_t seed) {
  generator().seed(seed * 31 + uint64_t(index));
  machine.mode = {Mode::Order(index % 4), Mode::Approximation(index / 2 % 4), Mode::Contraction(index % 3), seed};
  const int before = failures;
  engines<RegisteredMemory>(count, action, interpreted_kernels(), 4);
  if (failures != before) wrong("engine", "the results differ from the CPU engine's");
}

void general_case(int index, uint64_t seed) {
  generator().seed(seed * 37 + uint64_t(index));
  machine.mode = {Mode::Order(index % 4), Mode::Approximation((index + 1) % 4), Mode::Contraction(index % 3), seed};
  const int before = failures;
  engines<RegisteredMemory>(2 * rvsm::Tensor::kKernels, Action::step, interpreted_kernels(), 4, true);
  if (failures != before) wrong("general", "the results differ from the CPU engine's");
}

}  // namespace rvsm::ptx
