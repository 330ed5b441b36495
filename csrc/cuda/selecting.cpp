#include "selecting.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

namespace rvsm::cuda {

namespace {

// Every array on a boundary of its own.
constexpr int64_t kBoundary = 256;
int64_t aligned(int64_t bytes) { return ceil_div(bytes, kBoundary) * kBoundary; }

// A launch has no more blocks.
constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1;

}  // namespace

void Selecting::add(void* cut, int64_t* last, int64_t survivors, const std::vector<TensorArgs>& tensors) {
  CutEntry entry{nullptr, cut, last, nullptr, 0, survivors};
  for (const TensorArgs& args : tensors) {
    if (args.numel == 0) continue;
    PassEntry member{};
    member.w = args.w;
    member.weight_type = uint8_t(args.dtype);
    member.master = uint8_t(args.precision.master);
    member.rest = args.precision.master != Master::none ? args.master_state() : nullptr;
    member.dual = args.method == Method::admm ? args.method_state() : nullptr;
    // A dual has the type of the weights: float32 where they stand behind the parameter.
    member.dual_type = uint8_t(args.precision.master != Master::none ? Dtype::f32 : args.dtype);
    member.numel = args.numel;
    const auto lines_up = [](const void* p) { return p == nullptr || begins_on_boundary(p); };
    member.vectors = lines_up(member.w) && lines_up(member.rest) && lines_up(member.dual);
    members_.push_back(member);
    cut_of_.push_back(cuts_.size());
    entry.numel += args.numel;
  }
  cuts_.push_back(entry);
}

int64_t Selecting::room_bytes(const CutEntry& cut) const {
  return aligned(room_of(cut.numel) * (dtype_ == Dtype::f64 ? 8 : 4));
}

int64_t Selecting::scratch_bytes() const {
  int64_t bytes = kBoundary;
  for (const CutEntry& cut : cuts_) bytes += aligned(sizeof(SelectState)) + room_bytes(cut);
  return bytes;
}

void Selecting::place(char* scratch) {
  scratch += (kBoundary - int64_t(reinterpret_cast<uintptr_t>(scratch) % kBoundary)) % kBoundary;
  for (CutEntry& cut : cuts_) {
    cut.state = reinterpret_cast<SelectState*>(scratch);
    cut.inside = scratch + aligned(sizeof(SelectState));
    scratch += aligned(sizeof(SelectState)) + room_bytes(cut);
  }
  for (size_t i = 0; i < members_.size(); ++i) members_[i].state = cuts_[cut_of_[i]].state;
}

void Selecting::start(const Stream& stream, Work work, const void* table) const {
  const char* const error = kernels_.at({work, dtype_, {}, false})(stream, table);
  if (error != nullptr) throw std::runtime_error(std::string("the selection kernel did not start: ") + error);
}

void Selecting::pass(const Stream& stream, Pass pass) const {
  const auto table = std::make_unique<PassTable>();
  table->pass = pass;
  const auto flush = [&] {
    if (table->entries > 0) start(stream, Work::select_pass, table.get());
    table->entries = table->blocks = 0;
  };
  for (const PassEntry& member : members_) {
    const int64_t blocks = ceil_div(member.numel, kPassChunk);
    if (table->entries == std::size(table->at) || table->blocks + blocks > kMostBlocks) flush();
    PassEntry& entry = table->at[table->entries++];
    entry = member;
    entry.first = table->blocks;
    table->blocks += uint32_t(blocks);
  }
  flush();
}

void Selecting::pick(const Stream& stream, Pick pick, bool between, bool writes) const {
  const auto table = std::make_unique<CutTable>();
  table->pick = pick;
  table->between = between;
  table->writes = writes;
  for (size_t from = 0; from < cuts_.size(); from += std::size(table->at)) {
    const size_t count = std::min(cuts_.size() - from, std::size(table->at));
    std::copy_n(cuts_.begin() + int64_t(from), count, table->at);
    table->entries = table->blocks = uint32_t(count);
    start(stream, Work::select_pick, table.get());
  }
}

void Selecting::run(const Stream& stream, void* scratch, bool between) {
  if (empty()) return;
  place(static_cast<char*>(scratch));
  // What is small is collected as a whole.
  const bool large =
      std::any_of(cuts_.begin(), cuts_.end(), [](const CutEntry& cut) { return cut.numel > kFewElements; });
  pick(stream, Pick::begin, between, false);
  pass(stream, Pass::scan);
  pick(stream, Pick::collected, between, !large);
  if (!large) return;
  const int rounds = dtype_ == Dtype::f64 ? kHistograms<double> : kHistograms<float>;
  for (int round = 0; round < rounds; ++round) {
    pass(stream, Pass::histogram);
    pick(stream, Pick::bin, between, !between && round + 1 == rounds);
  }
  if (!between) return;
  pass(stream, Pass::next);
  pick(stream, Pick::end, between, true);
}

}  // namespace rvsm::cuda
