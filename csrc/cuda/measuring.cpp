// The launches of a step's statistics; see measure.h.
#include <algorithm>

#include "launches.h"

namespace rvsm::cuda {

bool Launches::lacks_room() const {
  const auto wants = [](const TensorArgs& t) { return t.active && t.statistics != nullptr; };
  return action_ == Action::step && !measures_ && std::any_of(tensors.begin(), tensors.end(), wants);
}

// Blocks that measure a tensor, counted as add_statistics() adds them.
int64_t Launches::measuring_blocks(const TensorArgs& args) const {
  int64_t blocks = 0;
  const auto add = [&](int64_t numel) { blocks += ceil_div(numel, kMeasuredChunk); };
  if (args.windows.on()) {
    for_flat_pieces(args, [&](int64_t, int64_t numel) { add(numel); });
  } else if (args.grouped) {
    add(args.view.count());
    for_pieces(args.view, limit_, [&](int64_t, const GroupView& piece, int64_t) { add(piece.count() * piece.size()); });
  } else {
    add(args.numel);
  }
  return blocks;
}

void Launches::find_measuring_room(double* memory) {
  sums_of_blocks_[0] = memory;
  sums_of_blocks_[1] = memory + most_measured_[0] * kSumsOfTensor;
}

// After the tensor's step is added: what that needs on the device is there then.
void Launches::add_statistics(const TensorArgs& args, const Groups& groups) {
  const bool wide = args.dtype == Dtype::f64;
  const Dtype arithmetic = wide ? Dtype::f64 : Dtype::f32;
  TableBuilder& builder = tables({Work::measure, arithmetic, {}});
  const void* const finished = args.device_numbers == nullptr ? nullptr : numbers_.add(args);
  const int64_t before = measured_[wide];
  // Of its states the method's and the rest of the weights alone.
  TensorArgs seen = args;
  seen.base.states = 0;
  seen.counter = nullptr;
  seen.precision.rounds = false;
  if (args.method != Method::rvsm) {
    seen.state[0] = args.method_state();
    seen.precision.states[0] = args.precision.states[args.base.states];
  }
  if (args.precision.master != Master::none) seen.state[size_t(seen.states())] = args.master_state();
  const auto add = [&](const TensorArgs& of, int64_t offset, int64_t numel, const FactorPlace* factors) {
    if (wide)
      builder.add_general<double>(of, offset, numel, factors, finished, kMeasuredChunk);
    else
      builder.add_general<float>(of, offset, numel, factors, finished, kMeasuredChunk);
    measured_[wide] += ceil_div(numel, kMeasuredChunk);
  };
  if (args.windows.on()) {
    windows_.add(args, groups.bits);
    for_flat_pieces(args, [&](int64_t offset, int64_t numel) {
      seen.cut = groups.bits + offset / kOfByte;
      add(seen, offset, numel, nullptr);
    });
  } else if (args.grouped) {
    for (const auto& p : groups.pieces) add(seen, p.offset, p.numel, &p.norms);
    TensorArgs norms;
    norms.dtype = arithmetic;
    norms.group = args.group;
    norms.w = groups.norms;
    norms.cut = args.cut;
    norms.numbers = args.numbers;
    add(norms, 0, args.view.count(), nullptr);
  } else {
    add(seen, 0, args.numel, nullptr);
  }
  rows_.add(args, sums_of_blocks_[wide] + before * kSumsOfTensor, measured_[wide] - before);
}

}  // namespace rvsm::cuda
