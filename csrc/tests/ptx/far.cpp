// Tensors of more than 2^31 elements, in memory that exists where it is touched. Of each launch some blocks are run:
// at its ends and where a number of elements or bytes passes 2^31, 2^32 or 2^33. Held against the same blocks by the
// host's functions.

#include <algorithm>
#include <cmath>
#include <set>

#include "cases.h"

namespace rvsm::ptx {

namespace {

struct FarOptions {
  const char* text;
  Action action;
  Dtype dtype;
  int64_t numel;   // without groups
  GroupView view;  // numel == 0
  definition::Step step;
  int64_t misalign;  // elements behind a boundary
};

// The bytes from `from` to `to` of an array.
struct Window {
  size_t from, to;
};

// Bytes that a block may write, before and after.
struct Copy {
  char* at;
  bool scratch;
  std::vector<char> before, interpreted;
};

class Far {
 public:
  explicit Far(const FarOptions& o) : o_(o), job_(o.action, recording_kernels()) {
    tensor_.dtype = o.dtype;
    tensor_.grouped = o.numel == 0;
    tensor_.view = o.view;
    tensor_.single = o.numel;
    tensor_.step = o.step;
    size_ = with_storage(o.dtype, [](auto s) { return sizeof s; });
    bytes_ = size_t(tensor_.numel()) * size_;
  }

  void run() {
    place_arrays();
    choose_windows();
    fill_windows();
    recorded.clear();
    job_.run({}, {}, o_.action == Action::penalty ? &total_ : nullptr);
    const std::vector<Launch> launches = recorded;
    for (const Launch& launch : launches) {
      // The sum of a penalty's totals is no longer than that of a small tensor.
      if (o_.action == Action::penalty && launch.key.work == cuda::Work::factors) continue;
      for (const uint32_t block : blocks_of(launch)) compare_block(launch, block);
    }
    if (numbers_ == 0) wrong("far", "no number was written");
  }

 private:
  void place_arrays() {
    for (Pages<char>& p : arrays_) p = Pages<char>(bytes_ + 4096);
    const auto at = [&](int i) { return arrays_[i].data() + size_t(o_.misalign) * size_; };
    const TensorArgs args =
        make_args(tensor_, o_.action, {at(0), at(1), at(2), at(3), nullptr, nullptr, nullptr}, false);
    at_ = addresses_of(args);
    job_.tensors.push_back(args);
    job_.divide();
    scratch_bytes_ = size_t(job_.scratch_bytes());
    scratch_ = Pages<char>(scratch_bytes_ + 8);
    job_.set_scratch(scratch_.data());
    Memory& memory = machine.memory;
    memory.clear();
    memory.add(at_.w, bytes_, "w", o_.action == Action::penalty ? Memory::read_only : Memory::read_write, false);
    if (at_.g != nullptr) memory.add(at_.g, bytes_, "g", Memory::read_only, false);
    if (at_.m != nullptr) memory.add(at_.m, bytes_, "m", Memory::read_write, false);
    if (at_.kept != nullptr) memory.add(at_.kept, bytes_, "kept", Memory::read_write, false);
    memory.add(scratch_.data(), scratch_bytes_, "scratch", Memory::read_write, false);
    memory.add(&total_, sizeof total_, "total", Memory::read_write, false);
  }

  // Where numbers lie that are not 0.
  void choose_windows() {
    const size_t around = 70000 * size_, k31 = size_t(1) << 31, k32 = 2 * k31;
    std::set<size_t> middles = {0, k31, k32, 2 * k32, k31 * size_, k32 * size_, bytes_};
    for (const size_t middle : middles) {
      const size_t from = middle > around ? std::min(bytes_, middle - around) : 0;
      const size_t to = std::min(bytes_, middle + around);
      if (from >= to) continue;
      if (!windows_.empty() && windows_.back().to >= from)
        windows_.back().to = std::max(windows_.back().to, to / size_ * size_);
      else
        windows_.push_back({from / size_ * size_, to / size_ * size_});
    }
  }

  void fill_windows() {
    std::mt19937_64 random(7);
    const auto number = [&] { return double(random() >> 11) * 0x1p-53; };
    with_storage(o_.dtype, [&](auto s) {
      using S = decltype(s);
      for (const Pages<char>& a : arrays_)
        for (const Window& q : windows_)
          for (size_t i = q.from; i < q.to; i += sizeof(S))
            put<S>(a.data() + size_t(o_.misalign) * size_ + i, 0, 2 * number() - 1);
    });
    // Factors of groups, since not all blocks of the launch before are run.
    const size_t most = std::min<size_t>(scratch_bytes_ / sizeof(float), 6 << 20);
    for (size_t i = 0; i < most; ++i) put<float>(scratch_.data(), i, number() + 0.1);
  }

  std::set<uint32_t> blocks_of(const Launch& launch) const {
    const uint32_t count = launch.blocks();
    std::set<uint32_t> blocks = {0, 1, count / 2, count - 1, count - 2};
    if (!launch.sums()) {
      for (const Window& q : windows_)
        for (const size_t p : {q.from, (q.from + q.to) / 2, q.to - 1})
          blocks.insert(uint32_t(double(p) / double(bytes_) * count));
      for (const uint32_t first : launch.first_blocks()) {
        blocks.insert(first);
        blocks.insert(first - 1);
      }
    }
    blocks.erase(blocks.lower_bound(count), blocks.end());
    return blocks;
  }

  std::vector<Copy> copies_of(const Launch& launch, uint32_t block) {
    constexpr size_t kMargin = 65536, kMostScratch = size_t(64) << 20;
    std::vector<Copy> copies;
    const auto add = [&](char* from, char* to, bool scratch) {
      if (from < to) copies.push_back({from, scratch, std::vector<char>(from, to), {}});
    };
    if (!launch.sums() && launch.key.work != cuda::Work::penalty) {  // those write to the scratch alone
      const size_t here = size_t(launch.near(block) - static_cast<const char*>(at_.w));
      const size_t from = here > kMargin ? here - kMargin : 0, to = std::min(bytes_, here + 3 * kMargin);
      for (void* a : {at_.w, at_.m, at_.kept})
        if (a != nullptr) add(static_cast<char*>(a) + from, static_cast<char*>(a) + to, false);
    }
    add(scratch_.data(), scratch_.data() + std::min(scratch_bytes_, kMostScratch), true);
    return copies;
  }

  void compare_block(const Launch& launch, uint32_t block) {
    std::vector<Copy> copies = copies_of(launch, block);
    launch.interpret(block);
    for (Copy& c : copies) {
      c.interpreted.assign(c.at, c.at + c.before.size());
      std::memcpy(c.at, c.before.data(), c.before.size());
    }
    launch.run_on_host(block);
    // Sums of parts and a penalty's totals are doubles, factors are of the arithmetic type, which is float32 here
    // (of groups no float64 is run).
    const bool doubles =
        launch.key.work != cuda::Work::factors && (launch.sums() || launch.key.work == cuda::Work::penalty);
    for (const Copy& c : copies) {
      if (!c.scratch)
        with_storage(o_.dtype, [&](auto s) { compare<decltype(s)>(c, launch, block); });
      else if (doubles)
        compare<double>(c, launch, block);
      else
        compare<float>(c, launch, block);
      std::memcpy(c.at, c.before.data(), c.before.size());
    }
  }

  template <class S>
  void compare(const Copy& c, const Launch& launch, uint32_t block) {
    constexpr double kBound = sizeof(S) == 8 ? 1e-13 : sizeof(S) == 4 ? 2e-6 : 0.02;
    for (size_t i = 0; i < c.before.size() / sizeof(S); ++i) {
      const size_t at = i * sizeof(S);
      numbers_ += std::memcmp(c.at + at, c.before.data() + at, sizeof(S)) != 0;
      if (std::memcmp(c.interpreted.data() + at, c.at + at, sizeof(S)) == 0) continue;
      const double got = get<S>(c.interpreted.data(), i), want = get<S>(c.at, i);
      if (std::fabs(got - want) <= kBound * (1 + std::fabs(want)) || (std::isnan(got) && std::isnan(want))) continue;
      wrong(std::string("far ") + name_of(launch.key),
            text_of("block %u of %u: %.9g, host %.9g", block, launch.blocks(), got, want));
      return;
    }
  }

  const FarOptions& o_;
  cuda::Launches job_;
  definition::Tensor tensor_;
  Addresses at_;
  size_t size_, bytes_, scratch_bytes_ = 0;
  Pages<char> arrays_[4], scratch_;
  std::vector<Window> windows_;
  double total_ = 0;
  int64_t numbers_ = 0;  // that the host wrote
};

std::vector<FarOptions> far_options() {
  constexpr int64_t kLimit = int64_t(1) << 31, kMany = int64_t(1) << 20;
  definition::Step plain;
  plain.penalty = Penalty::l0;
  plain.lam = 0.05;
  plain.beta = 0.5;
  plain.lr = 0.1;
  plain.momentum = 0.9;
  plain.weight_decay = 0.01;
  definition::Step delayed = plain, admm = plain, grouped = plain, grouped_admm, l1 = plain;
  delayed.method = Method::delayed;
  admm.method = Method::admm;
  admm.penalty = Penalty::tl1;
  grouped.group_lasso = 0.1;
  grouped.lam = 1;
  grouped_admm = grouped;
  grouped_admm.method = Method::admm;
  l1.penalty = Penalty::l1;
  l1.lam = 0.5;
  constexpr Action kStep = Action::step, kProx = Action::prox, kPenalty = Action::penalty;
  return {
      {"f32 2^31+5 elements", kStep, Dtype::f32, kLimit + 5, {}, plain, 0},
      {"f32 2^31+5 elements off a boundary", kStep, Dtype::f32, kLimit + 5, {}, plain, 3},
      {"bf16 2^32+9 elements off a boundary", kStep, Dtype::bf16, 2 * kLimit + 9, {}, plain, 5},
      {"f64 2^31+5 elements", kStep, Dtype::f64, kLimit + 5, {}, plain, 1},
      {"f32 2^31+5 elements, prox", kProx, Dtype::f32, kLimit + 5, {}, plain, 1},
      {"f32 2^31+5 elements, penalty", kPenalty, Dtype::f32, kLimit + 5, {}, plain, 1},
      {"f32 2^31+5 elements, delayed", kStep, Dtype::f32, kLimit + 5, {}, delayed, 2},
      {"f16 2^32+9 elements, admm", kStep, Dtype::f16, 2 * kLimit + 9, {}, admm, 0},
      {"f32 3 x 2^20 x 700", kStep, Dtype::f32, 0, {1, 3, kMany, 700}, grouped, 0},
      {"f32 groups 3 x 2^30", kStep, Dtype::f32, 0, {1, 1, 3, kLimit / 2}, grouped, 0},
      {"f32 groups 3 x (2^30+1)", kStep, Dtype::f32, 0, {1, 1, 3, kLimit / 2 + 1}, grouped, 0},
      {"f32 (2^21+3) rows of 1024 columns", kStep, Dtype::f32, 0, {1, 2 * kMany + 3, 1024, 1}, grouped, 0},
      {"bf16 (2^21+3) rows of 1026 columns", kStep, Dtype::bf16, 0, {1, 2 * kMany + 3, 1026, 1}, grouped, 1},
      {"f32 (2^20+3) rows of 2200 columns, admm", kStep, Dtype::f32, 0, {1, kMany + 3, 2200, 1}, grouped_admm, 0},
      {"f32 2^25-1 groups of 64", kStep, Dtype::f32, 0, {1, 1, 32 * kMany - 1, 64}, grouped, 0},
      {"bf16 2^25-1 groups of 56, prox", kProx, Dtype::bf16, 0, {1, 1, 32 * kMany - 1, 56}, l1, 0},
  };
}

}  // namespace

std::vector<Case> far_cases() {
  static const std::vector<FarOptions> all = far_options();
  std::vector<Case> cases;
  for (const FarOptions& o : all)
    cases.push_back({std::string("far ") + o.text, [&o] {
                       machine.mode = {Mode::shuffled, Mode::any, Mode::always, 1};
                       Far(o).run();
                     }});
  return cases;
}

}  // namespace rvsm::ptx
