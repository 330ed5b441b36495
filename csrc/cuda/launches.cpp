#include "launches.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace rvsm::cuda {

namespace {

int64_t element_size(Dtype dtype) {
  return with_storage(dtype, [](auto s) { return int64_t(sizeof s); });
}

// The type of the arithmetic on a storage type, and of its factors.
Dtype opmath(Dtype dtype) { return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }

// Every array on a boundary of its own.
int64_t aligned(int64_t bytes) { return ceil_div(bytes, 256) * 256; }

// The name of a kernel in an error.
const char* name_of(Work work) {
  switch (work) {
    case Work::squares:
    case Work::dual_squares:
    case Work::general_squares:
    case Work::factors:
      return "norm";
    case Work::step_resident:
    case Work::prox_resident:
      return "group step";
    case Work::step:
    case Work::general:
      return "step";
    case Work::prox:
      return "prox";
    case Work::count:
      return "count";
    case Work::numbers:
      return "numbers";
    case Work::windows:
      return "window";
    case Work::measure:
    case Work::rows:
      return "statistics";
    case Work::select_pass:
    case Work::select_pick:
      return "selection";
    default:
      return "penalty";
  }
}

}  // namespace

void Launches::divide(int64_t limit) {
  limit_ = limit;
  groups_.assign(tensors.size(), Groups{});
  blocks_ = 0;
  measures_ = action_ == Action::step &&
              std::any_of(tensors.begin(), tensors.end(), [](const TensorArgs& t) { return t.statistics != nullptr; });
  most_measured_[0] = most_measured_[1] = 0;
  bool any_parts = false;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const TensorArgs& args = tensors[i];
    int64_t numbers = args.numel;
    if (args.grouped) {
      Groups& g = groups_[i];
      const GroupView& v = args.view;
      const int64_t stored = element_size(args.dtype);
      g.dtype = args.dtype;
      g.general = action_ == Action::step && args.general();
      g.resident = writes_weights() && is_resident(v, stored) && args.method == Method::rvsm && !args.topk &&
                   args.norms == nullptr && !g.general;
      for (auto& [layout, size] : {std::pair{&g.stored, stored}, std::pair{&g.widened, int64_t(sizeof(float))}}) {
        if (g.resident) layout->tiles = make_tiles(v, size);
        for (const bool misplaced : {false, true}) {
          SumEntry& e = layout->sums[misplaced];
          e = divide_sums(v, size, !misplaced && !args.precision.mixed);
          if (e.parts > 1) g.partials = std::max(g.partials, e.parts * v.count());
        }
      }
      g.lasso = args.lasso;
      any_parts |= !g.resident && g.partials > 0;
      numbers = v.count();
    }
    if (action_ == Action::penalty) blocks_ += ceil_div(numbers, kChunk<double>);  // no type has more chunks
    if (measures_) most_measured_[args.dtype == Dtype::f64] += measuring_blocks(args);
  }
  // At most three launches: sums, resident groups and the step, or sums, factors of sums of parts and the step.
  if (any_parts)
    for (Groups& g : groups_) g.resident = false;
}

// Whether the windows of a tensor are inside the vectors of a thread.
template <class S, class Base, int kStates>
bool in_vectors(const TensorArgs& args) {
  const Windows& v = args.windows;
  bool right = v.inner == 1 && v.m <= kMostInVectors && kWidth<S> % v.m == 0 && args.numel % kWidth<S> == 0 &&
               begins_on_boundary(args.w);
  right = right && (!Base::kReadsGrad || begins_on_boundary(args.g));
  for (int k = 0; k < kStates; ++k) right = right && begins_on_boundary(args.state[size_t(k)]);
  return right;
}

// The most entries of tables in which some may be counted.
int64_t Launches::counted_entries() const {
  int64_t count = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (action_ != Action::step || !(has_corrections(tensors[i].base.kind) || tensors[i].general())) continue;
    if (tensors[i].windows.on())
      for_flat_pieces(tensors[i], [&](int64_t, int64_t) { ++count; });
    else if (!tensors[i].grouped || groups_[i].resident)
      ++count;
    else
      for_pieces(tensors[i].view, limit_, [&](int64_t, const GroupView&, int64_t) { ++count; });
  }
  return count;
}

// The most records that are finished on the device.
int64_t Launches::finished_records() const {
  return std::count_if(tensors.begin(), tensors.end(), [](const TensorArgs& t) { return t.device_numbers != nullptr; });
}

// Whether there are numbers of each group beside the first one, which is the factor or, for a general step, the norm of
// what is thresholded: the norm of w, for a group lasso.
bool Launches::has_lengths(const TensorArgs& args, const Groups& groups) const {
  if (groups.general) return args.norm_rows() > 1;
  if (groups.resident) return false;
  return writes_weights() && groups.lasso;
}

int64_t Launches::scratch_bytes() const {
  int64_t bytes = aligned(blocks_ * int64_t(sizeof(double)));
  bytes += aligned(counted_entries() * kMostCorrections * int64_t(sizeof(double)));
  bytes += aligned(finished_records() * NumbersBuilder::kFinishedBytes);
  bytes += aligned((most_measured_[0] + most_measured_[1]) * kSumsOfTensor * int64_t(sizeof(double)));
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].windows.on()) bytes += aligned(ceil_div(tensors[i].numel, kOfByte));
    if (!tensors[i].grouped || (groups_[i].resident && !measures_)) continue;
    const int64_t factors = tensors[i].view.count() * element_size(opmath(tensors[i].dtype));
    bytes += aligned(factors * (keeps_norms(groups_[i]) ? 2 : 1));
    if (has_lengths(tensors[i], groups_[i])) bytes += aligned(factors);
    bytes += aligned(tensors[i].norm_rows() * groups_[i].partials * int64_t(sizeof(double)));
  }
  return bytes;
}

void Launches::set_scratch(void* memory) {
  char* next = static_cast<char*>(memory);
  const auto take = [&](int64_t bytes) { return std::exchange(next, next + aligned(bytes)); };
  totals_ = reinterpret_cast<double*>(take(blocks_ * int64_t(sizeof(double))));
  corrections_ = reinterpret_cast<double*>(take(counted_entries() * kMostCorrections * int64_t(sizeof(double))));
  finished_ = take(finished_records() * NumbersBuilder::kFinishedBytes);
  find_measuring_room(reinterpret_cast<double*>(
      take((most_measured_[0] + most_measured_[1]) * kSumsOfTensor * int64_t(sizeof(double)))));
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].windows.on())
      groups_[i].bits = reinterpret_cast<uint8_t*>(take(ceil_div(tensors[i].numel, kOfByte)));
    if (!tensors[i].grouped || (groups_[i].resident && !measures_)) continue;
    Groups& g = groups_[i];
    const GroupView& v = tensors[i].view;
    const int64_t factors = v.count() * element_size(opmath(tensors[i].dtype));
    const bool value = action_ == Action::penalty;
    g.ratio = writes_weights() ? take(factors * (keeps_norms(g) ? 2 : 1)) : nullptr;
    g.length = value || has_lengths(tensors[i], g) ? take(factors) : nullptr;
    if (g.general && g.length == nullptr) g.length = g.ratio;
    g.norms = keeps_norms(g) ? g.ratio + factors : g.ratio;
    g.parts = reinterpret_cast<double*>(take(tensors[i].norm_rows() * g.partials * int64_t(sizeof(double))));
    g.pieces.clear();
    const int64_t size = element_size(opmath(tensors[i].dtype));
    for_pieces(v, limit_, [&](int64_t offset, const GroupView& piece, int64_t group) {
      const int64_t from = group * size;
      const bool lengths = g.length != nullptr && (g.lasso || g.general);
      g.pieces.push_back({offset, piece.count() * piece.size(),
                          factor_place(piece, g.ratio + from, lengths ? g.length + from : nullptr),
                          factor_place(piece, g.norms + from, (lengths ? g.length : g.norms) + from)});
    });
    Finish finish = value || g.general || g.resident ? Finish::norms : Finish::factors;
    if (action_ == Action::squares) finish = Finish::total;
    for (Layout* layout : {&g.stored, &g.widened}) {
      for (SumEntry& e : layout->sums) {
        e.finish = uint16_t(e.parts == 1 ? finish : Finish::part);
        e.out = e.parts == 1 ? g.ratio : reinterpret_cast<char*>(g.parts);
        e.length = g.length;
      }
    }
    // What factors are made of is a matrix of parts x groups: sums of parts, or norms from elsewhere (one part).
    // add_norm_row() sets the number of parts, `outer`; 2 stands for it here, so that the rows are summed as a strip.
    g.factors = divide_sums({1, 2, v.count(), 1}, sizeof(double), true);
    g.factors.parts = 1;
    g.factors.finish = uint16_t(finish);
    g.factors.x = g.parts;
    g.factors.out = g.ratio;
    g.factors.length = g.length;
  }
}

TableBuilder& Launches::tables(const Key& key) {
  if (last_ == nullptr || !(last_->first == key)) last_ = &*tables_.try_emplace(key).first;
  return last_->second;
}

// The elements that are thresholded and whose norms are taken: a prox may read them elsewhere than it writes u.
void* Launches::source(const TensorArgs& args) const {
  return action_ == Action::prox && args.g != nullptr ? args.g : args.w;
}

// One sum for each group and, where what is thresholded is not w, another for group lasso.
void Launches::add_norms(const TensorArgs& args, const Groups& groups) {
  for (int row = 0; row < args.norm_rows(); ++row) add_norm_row(args, groups, row);
}

void Launches::add_norm_row(const TensorArgs& args, const Groups& groups, int norm_row) {
  const bool dual = args.method == Method::admm && norm_row == 0;
  const bool on_boundary = begins_on_boundary(source(args)) && (!dual || begins_on_boundary(args.method_state()));
  const bool lengths = norm_row == args.norm_rows() - 1;
  SumEntry sums = groups.layout(args.dtype).sums[on_boundary ? 0 : 1], factors = groups.factors;
  sums.x = source(args);
  sums.dual = dual ? args.method_state() : nullptr;
  for (SumEntry* s : {&sums, &factors}) {
    s->reads_cut = args.cut != nullptr && !groups.general;
    if (s->reads_cut)
      s->cut = args.cut;
    else
      s->prox = prox_of<double>(args.numbers);
    if (norm_row > 0) s->out = nullptr;
    if (!lengths) s->length = nullptr;
    if (groups.general) s->length = norm_row == 0 ? groups.ratio : groups.length;
    if (groups.resident) s->length = groups.norms;
    s->keeps_norms = keeps_norms(groups) && norm_row == 0;
    if (action_ == Action::squares) s->out = args.sums;
  }
  const bool mixed = args.precision.mixed && action_ == Action::step;
  if (mixed)
    sums.general = {args.master_state(), args.dtype, args.precision.states[args.base.states], args.precision.master};
  const bool made_elsewhere = args.norms != nullptr;
  if (!made_elsewhere) {
    double* const parts = groups.parts + norm_row * groups.partials;
    if (sums.parts > 1) sums.out = parts;
    Key key{args.method == Method::admm ? Work::dual_squares : Work::squares, args.dtype, {}};
    if (mixed) key = {Work::general_squares, Dtype::f32, {}};
    sums_[key].add(sums, args.view.batch, args.group);
    if (sums.parts == 1) return;
    factors.x = parts;
    factors.outer = sums.parts;
  } else {
    factors.x = args.norms + norm_row * args.view.count();
    factors.outer = 1;
    factors.are_norms = true;
  }
  sums_[{Work::factors, opmath(args.dtype), {}}].add(factors, 1, args.group);
}

template <class S, class Base, int kStates>
void Launches::add_pieces(const TensorArgs& args, const Groups& groups, TableBuilder& builder, void* source) {
  for (const auto& p : groups.pieces) {
    TensorArgs piece = args;
    piece.numel = p.numel;
    piece.w = static_cast<S*>(args.w) + p.offset;
    for (int k = 0; k < kStates; ++k) piece.state[k] = static_cast<S*>(args.state[k]) + p.offset;
    piece.cut = nullptr;  // it is in the factors
    S* const read = source == nullptr ? nullptr : static_cast<S*>(source) + p.offset;
    builder.add<S, Base, kStates>(piece, read, p.factors);
  }
}

template <class S, class Base, int kStates>
void Launches::add_step(const TensorArgs& args, const Groups& groups, Key key) {
  const bool step = action_ == Action::step;
  void* const read = !step ? source(args) : Base::kReadsGrad ? args.g : nullptr;
  if (args.grouped && groups.resident) {
    if constexpr (kStates == Base::kStates) {
      key.work = step ? Work::step_resident : Work::prox_resident;
      tables(key).add<S, Base, kStates>(args, read, groups.layout(args.dtype).tiles);
    }
  } else if (args.grouped) {
    add_pieces<S, Base, kStates>(args, groups, tables(key), read);
  } else if (args.windows.on() && !in_vectors<S, Base, kStates>(args)) {
    windows_.add(args, groups.bits);
    for_flat_pieces(args, [&](int64_t offset, int64_t numel) {
      TensorArgs piece = args;
      piece.numel = numel;
      piece.w = static_cast<S*>(args.w) + offset;
      for (int k = 0; k < kStates; ++k) piece.state[size_t(k)] = static_cast<S*>(args.state[size_t(k)]) + offset;
      piece.cut = groups.bits + offset / kOfByte;
      S* const g = read == nullptr ? nullptr : static_cast<S*>(read) + offset;
      tables(key).add<S, Base, kStates>(piece, g);
    });
  } else {
    tables(key).add<S, Base, kStates>(args, read);
  }
}

void Launches::add_general(const TensorArgs& args, const Groups& groups) {
  const Dtype arithmetic = opmath(args.dtype);
  TableBuilder& builder = tables({Work::general, arithmetic, args.base, method_states(args.method) > 0});
  const void* const finished = args.device_numbers == nullptr ? nullptr : numbers_.add(args);
  const auto add_piece = [&](const TensorArgs& of, int64_t offset, int64_t numel, const FactorPlace* factors) {
    if (arithmetic == Dtype::f64)
      builder.add_general<double>(of, offset, numel, factors, finished);
    else
      builder.add_general<float>(of, offset, numel, factors, finished);
  };
  const auto add = [&](int64_t offset, int64_t numel, const FactorPlace* factors) {
    add_piece(args, offset, numel, factors);
  };
  if (args.windows.on()) {
    windows_.add(args, groups.bits);
    return for_flat_pieces(args, [&](int64_t offset, int64_t numel) {
      TensorArgs piece = args;
      piece.cut = groups.bits + offset / kOfByte;
      add_piece(piece, offset, numel, nullptr);
    });
  }
  if (!args.grouped) return add(0, args.numel, nullptr);
  for (const auto& p : groups.pieces) add(p.offset, p.numel, &p.factors);
}

template <class S>
void Launches::add(const TensorArgs& args, const Groups& groups) {
  if (action_ == Action::penalty) {
    if (args.grouped)
      tables({Work::penalty, opmath(args.dtype), {}}).add_value<Opmath<S>>(args, groups.length, args.view.count());
    else
      tables({Work::penalty, args.dtype, {}}).add_value<S>(args, args.w, args.numel);
  } else if (action_ == Action::prox) {
    add_step<S, ProxBase, 0>(args, groups, {Work::prox, args.dtype, {}});
  } else {
    const bool has_state = method_states(args.method) > 0;
    const Key key{Work::step, args.dtype, args.base, has_state};
    with_base(args.base, [&](auto base) {
      using Base = decltype(base);
      if (has_state)
        add_step<S, Base, Base::kStates + 1>(args, groups, key);
      else
        add_step<S, Base, Base::kStates>(args, groups, key);
    });
  }
}

// Start a launch; an error says which kernel failed, and of which param groups.
void Launches::start(const Stream& stream, const Key& key, const void* table, const std::vector<int32_t>& groups) {
  const char* const error = kernels_.at(key)(stream, table);
  if (error == nullptr) return;
  std::string names;
  for (const int32_t g : groups) names += (names.empty() ? "" : ", ") + std::to_string(g);
  throw std::runtime_error(std::string("rvsm_kernels: the ") + name_of(key.work) + " kernel for param group " + names +
                           " was not launched: " + error);
}

// What the tables of the steps ask for of corrections, where a device counts any of their entries.
void Launches::add_counts() {
  counts_.clear();
  double* next = corrections_;
  for (auto& [key, builder] : tables_) {
    for (auto& l : builder) {
      l.table->corrections = nullptr;
      const bool on_device =
          std::any_of(l.counted.begin(), l.counted.end(), [](const Counted& c) { return c.step != nullptr; });
      if (!on_device) continue;
      l.table->corrections = next;
      for (const Counted& c : l.counted) counts_.add(c, std::exchange(next, next + kMostCorrections), l.groups.front());
    }
  }
}

void Launches::run(const Stream& stream, const Scaling& scaling, double* total) {
  for (auto& [key, builder] : sums_) builder.clear();
  for (auto& [key, builder] : tables_) builder.clear();
  numbers_.begin_step(finished_);
  windows_.clear();
  rows_.clear();
  measured_[0] = measured_[1] = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const TensorArgs& args = tensors[i];
    if (!args.active || args.numel == 0) continue;
    if (args.grouped && (!groups_[i].resident || is_measured(args))) add_norms(args, groups_[i]);
    if (action_ == Action::squares) continue;
    if (action_ == Action::step && args.general())
      add_general(args, groups_[i]);
    else
      with_storage(args.dtype, [&](auto s) { add<decltype(s)>(args, groups_[i]); });
    if (is_measured(args)) add_statistics(args, groups_[i]);
  }
  for (auto& [key, builder] : sums_)
    for (auto& l : builder) start(stream, key, l.table.get(), l.groups);
  if (action_ == Action::step) {
    for (auto& l : windows_) start(stream, {Work::windows, Dtype::f32, {}}, l.table.get(), l.groups);
    for (auto& l : numbers_) start(stream, {Work::numbers, Dtype::f32, {}}, l.table.get(), l.groups);
    add_counts();
    for (auto& l : counts_) {
      l.table->found_inf = scaling.found_inf;
      start(stream, {Work::count, Dtype::f32, {}}, l.table.get(), l.groups);
    }
  }
  int64_t blocks = 0;
  double* sums[2] = {sums_of_blocks_[0], sums_of_blocks_[1]};
  for (auto& [key, builder] : tables_) {
    for (auto& l : builder) {
      if (action_ == Action::step) {
        l.table->grad_scale = scaling.grad_scale;
        l.table->found_inf = scaling.found_inf;
      }
      if (key.work == Work::measure) {
        double*& next = sums[key.dtype == Dtype::f64];
        l.table->totals = std::exchange(next, next + l.table->blocks * kSumsOfTensor);
      } else if (key.work == Work::penalty) {
        l.table->totals = totals_ + blocks;
        blocks += l.table->blocks;
      }
      start(stream, key, l.table.get(), l.groups);
    }
  }
  for (auto& l : rows_) {
    l.table->found_inf = scaling.found_inf;
    start(stream, {Work::rows, Dtype::f32, {}}, l.table.get(), l.groups);
  }
  if (total == nullptr) return;
  SumEntry e = divide_sums({1, 1, 1, blocks}, sizeof(double), true);
  e.parts = 1;
  e.finish = uint16_t(Finish::total);
  e.x = totals_;
  e.out = total;
  total_.clear();
  total_.add(e, 1, 0);
  start(stream, {Work::factors, Dtype::f64, {}}, total_.begin()->table.get(), {});
}

}  // namespace rvsm::cuda
