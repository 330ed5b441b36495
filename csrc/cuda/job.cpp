#include "job.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace rvsm::cuda {

namespace {

constexpr Dtype kDtypes[] = {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16};

int64_t element_size(Dtype dtype) {
  return with_storage(dtype, [](auto s) { return int64_t(sizeof s); });
}

// The type that a storage type is computed in, and its factors are.
Dtype arithmetic(Dtype dtype) { return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }

// Every array on a boundary of its own.
int64_t aligned(int64_t bytes) { return ceil_div(bytes, 256) * 256; }

}  // namespace

void Job::divide(int64_t limit) {
  limit_ = limit;
  groups_.assign(rows.size(), Groups{});
  blocks_ = 0;
  bool any_parts = false;
  for (size_t i = 0; i < rows.size(); ++i) {
    const Row& row = rows[i];
    int64_t numbers = row.numel;
    if (row.grouped) {
      Groups& g = groups_[i];
      const GroupView& v = row.view;
      const int64_t own = element_size(row.dtype);
      g.dtype = row.dtype;
      g.resident = action_ != Action::penalty && is_resident(v, own) && row.method == Method::rvsm && !row.topk;
      for (auto& [layout, size] : {std::pair{&g.own, own}, std::pair{&g.wide, int64_t(sizeof(float))}}) {
        if (g.resident) layout->tiles = make_tiles(v, size);
        for (const bool misplaced : {false, true}) {
          SumEntry& e = layout->sums[misplaced];
          e = divide_sums(v, size, !misplaced);
          if (e.parts > 1) g.partials = std::max(g.partials, e.parts * v.count());
        }
      }
      g.lasso = row.step.lasso != 0;
      any_parts |= !g.resident && g.partials > 0;
      numbers = v.count();
    }
    if (action_ == Action::penalty) blocks_ += ceil_div(numbers, kChunk<double>);  // no type has more chunks
  }
  // Three launches are enough: sums, their parts and the step; or sums, resident groups and the step.
  if (any_parts)
    for (Groups& g : groups_) g.resident = false;
}

int64_t Job::scratch_bytes() const {
  int64_t bytes = aligned(blocks_ * int64_t(sizeof(double)));
  for (size_t i = 0; i < rows.size(); ++i) {
    if (!rows[i].grouped || groups_[i].resident) continue;
    const int64_t factors = aligned(rows[i].view.count() * element_size(arithmetic(rows[i].dtype)));
    bytes += factors * (action_ != Action::penalty && groups_[i].lasso ? 2 : 1);
    bytes += aligned(rows[i].planes() * groups_[i].partials * int64_t(sizeof(double)));
  }
  return bytes;
}

void Job::set_scratch(void* memory) {
  char* next = static_cast<char*>(memory);
  const auto take = [&](int64_t bytes) { return std::exchange(next, next + aligned(bytes)); };
  totals_ = reinterpret_cast<double*>(take(blocks_ * int64_t(sizeof(double))));
  for (size_t i = 0; i < rows.size(); ++i) {
    if (!rows[i].grouped || groups_[i].resident) continue;
    Groups& g = groups_[i];
    const GroupView& v = rows[i].view;
    const int64_t factors = v.count() * element_size(arithmetic(rows[i].dtype));
    const bool value = action_ == Action::penalty;
    g.ratio = value ? nullptr : take(factors);
    g.length = value || g.lasso ? take(factors) : nullptr;
    g.parts = reinterpret_cast<double*>(take(rows[i].planes() * g.partials * int64_t(sizeof(double))));
    g.pieces.clear();
    const int64_t size = element_size(arithmetic(rows[i].dtype));
    for_pieces(v, limit_, [&](int64_t offset, const GroupView& piece, int64_t group) {
      const int64_t from = group * size;
      g.pieces.push_back({offset, piece.count() * piece.size(),
                          make_columns(piece, g.ratio + from, g.lasso ? g.length + from : nullptr)});
    });
    const Finish finish = value ? Finish::norms : Finish::factors;
    for (Layout* layout : {&g.own, &g.wide}) {
      for (SumEntry& e : layout->sums) {
        e.finish = uint16_t(e.parts == 1 ? finish : Finish::part);
        e.out = e.parts == 1 ? g.ratio : reinterpret_cast<char*>(g.parts);
        e.length = g.length;
      }
    }
    if (g.partials == 0) continue;
    // The sums of the parts are a matrix of parts x groups; how many parts is known when the tensor is.
    g.join = divide_sums({1, 2, v.count(), 1}, sizeof(double), true);
    g.join.parts = 1;
    g.join.finish = uint16_t(finish);
    g.join.x = g.parts;
    g.join.out = g.ratio;
    g.join.length = g.length;
  }
}

// Where the numbers of a row come from that its groups are made of, and a prox reads.
const void* Job::source(const Row& row) const { return action_ == Action::prox && row.g != nullptr ? row.g : row.w; }

// One sum for each group and, where what is thresholded is not w, another for group lasso.
void Job::add_sums(const Row& row, const Groups& groups) {
  for (int plane = 0; plane < row.planes(); ++plane) add_plane(row, groups, plane);
}

void Job::add_plane(const Row& row, const Groups& groups, int plane) {
  const bool dual = row.method == Method::admm && plane == 0;
  const bool aligned = begins_on_boundary(source(row)) && (!dual || begins_on_boundary(row.kept));
  const bool lengths = plane == row.planes() - 1;
  SumEntry e = groups.layout(row.dtype).sums[aligned ? 0 : 1], join = groups.join;
  e.x = source(row);
  e.dual = dual ? row.kept : nullptr;
  for (SumEntry* s : {&e, &join}) {
    s->by_data = row.cut != nullptr;
    if (s->by_data)
      s->cut = row.cut;
    else
      s->prox = row.step.prox;
    if (plane > 0) s->out = nullptr;
    if (!lengths) s->length = nullptr;
  }
  double* const parts = groups.parts + plane * groups.partials;
  if (e.parts > 1) e.out = parts;
  auto& squares = row.method == Method::admm ? dual_squares_ : squares_;
  squares[int(row.dtype)].add(e, row.view.batch, row.group);
  if (e.parts == 1) return;
  join.x = parts;
  join.outer = e.parts;
  joins_[arithmetic(row.dtype) == Dtype::f64].add(join, 1, row.group);
}

template <class S>
void Job::add(const Row& row, const Groups& groups) {
  if (action_ == Action::penalty) {
    if (row.grouped)
      std::get<Builder<Arithmetic<S>>>(builders_).add_value(row, groups.length, row.view.count());
    else
      std::get<Builder<S>>(builders_).add_value(row, row.w, row.numel);
    return;
  }
  const bool keeps = row.kept != nullptr || (row.cut != nullptr && !row.grouped);
  auto& builder = std::get<Builder<S>>(keeps ? kept_ : builders_);
  const S* read = static_cast<const S*>(action_ == Action::step ? row.g : source(row));
  if (!row.grouped) return builder.add(row, read);
  if (groups.resident) return std::get<Builder<S>>(resident_).add(row, read, groups.layout(row.dtype).tiles);
  for (const auto& p : groups.pieces) {
    Row piece = row;
    piece.numel = p.numel;
    piece.w = static_cast<S*>(row.w) + p.offset;
    piece.m = row.m == nullptr ? nullptr : static_cast<S*>(row.m) + p.offset;
    piece.kept = row.kept == nullptr ? nullptr : static_cast<S*>(row.kept) + p.offset;
    piece.cut = nullptr;  // it is in the factors
    builder.add(piece, read + p.offset, p.columns);
  }
}

// Says which kernel failed, and of which param groups.
void Job::check(const char* kernel, const char* error, const std::vector<int32_t>& groups) {
  if (error == nullptr) return;
  std::string names;
  for (const int32_t g : groups) names += (names.empty() ? "" : ", ") + std::to_string(g);
  throw std::runtime_error(std::string("rvsm_kernels: the ") + kernel + " kernel for param group " + names +
                           " was not launched: " + error);
}

// `blocks`: how many numbers of totals_ are taken.
template <class S>
void Job::launch(const Queue& queue, const Scaling& scaling, Dtype dtype, int64_t& blocks) {
  for (auto& l : std::get<Builder<S>>(resident_)) {
    l.table->grad_scale = scaling.grad_scale;
    l.table->found_inf = scaling.found_inf;
    const auto start = action_ == Action::step ? kernels_.resident_step : kernels_.resident_prox;
    check("group step", start(queue, dtype, *l.table), l.groups);
  }
  for (auto& l : std::get<Builder<S>>(kept_)) {
    l.table->grad_scale = scaling.grad_scale;
    l.table->found_inf = scaling.found_inf;
    check("step", kernels_.keep_step(queue, dtype, *l.table), l.groups);
  }
  for (auto& l : std::get<Builder<S>>(builders_)) {
    l.table->grad_scale = scaling.grad_scale;
    l.table->found_inf = scaling.found_inf;
    if (action_ == Action::step) {
      check("step", kernels_.step(queue, dtype, *l.table), l.groups);
    } else if (action_ == Action::prox) {
      check("prox", kernels_.prox(queue, dtype, *l.table), l.groups);
    } else {
      l.table->totals = totals_ + blocks;
      blocks += l.table->blocks;
      check("penalty", kernels_.penalty(queue, dtype, *l.table), l.groups);
    }
  }
}

void Job::run(const Queue& queue, const Scaling& scaling, double* total) {
  for (auto* builders : {&squares_, &dual_squares_})
    for (auto& b : *builders) b.clear();
  for (auto& b : joins_) b.clear();
  for (auto* builders : {&builders_, &kept_, &resident_}) std::apply([](auto&... b) { (b.clear(), ...); }, *builders);
  for (size_t i = 0; i < rows.size(); ++i) {
    const Row& row = rows[i];
    if (!row.active || row.numel == 0) continue;
    if (row.grouped && !groups_[i].resident) add_sums(row, groups_[i]);
    with_storage(row.dtype, [&](auto s) { add<decltype(s)>(row, groups_[i]); });
  }
  for (const Dtype dtype : kDtypes) {
    for (auto& l : squares_[int(dtype)]) check("norm", kernels_.squares(queue, dtype, *l.table), l.groups);
    for (auto& l : dual_squares_[int(dtype)]) check("norm", kernels_.dual_squares(queue, dtype, *l.table), l.groups);
  }
  for (const Dtype dtype : {Dtype::f32, Dtype::f64})
    for (auto& l : joins_[dtype == Dtype::f64]) check("norm", kernels_.join(queue, dtype, *l.table), l.groups);
  int64_t blocks = 0;
  for (const Dtype dtype : kDtypes)
    with_storage(dtype, [&](auto s) { launch<decltype(s)>(queue, scaling, dtype, blocks); });
  if (total == nullptr) return;
  SumEntry e = divide_sums({1, 1, 1, blocks}, sizeof(double), true);
  e.parts = 1;
  e.finish = uint16_t(Finish::total);
  e.x = totals_;
  e.out = total;
  total_.clear();
  total_.add(e, 1, 0);
  check("total", kernels_.join(queue, Dtype::f64, *total_.begin()->table), {});
}

}  // namespace rvsm::cuda
