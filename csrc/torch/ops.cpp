// The dispatcher ops: u, the value of a penalty, the squares of norms and the cuts of top-k, with mutation visible in
// the schema.

#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <array>
#include <cstring>
#include <deque>
#include <limits>
#include <string>

#include "../cpu/selection.h"
#include "../math/penalty.h"
#include "../plan/device_engine.h"
#include "../plan/device_selection.h"
#include "../plan/tensors.h"
#include "checks.h"
#include "register.h"

namespace rvsm {

namespace {

using Names = std::optional<std::string_view>;
using OptionalDims = at::OptionalIntArrayRef;

// A penalty and its strength.
struct PenaltyOptions {
  Penalty penalty = Penalty::none;
  double lam, beta, a;
  bool group_scale;

  PenaltyOptions(const Names& name, double lam, double beta, double a, bool group_scale)
      : lam(lam), beta(beta), a(a), group_scale(group_scale) {
    if (!name) return;
    int32_t number = 1;
    for (const char* known : kPenaltyNames) {
      if (*name == known) penalty = Penalty(number);
      ++number;
    }
    TORCH_CHECK_VALUE(penalty != Penalty::none, "Invalid penalty: ", *name);
  }

  // lam of a tensor with groups of that many elements.
  double strength(int64_t group_size) const { return group_scale ? lam * std::sqrt(double(group_size)) : lam; }
};

// The places of the tensors of each turn; see turns_of.
std::vector<std::vector<size_t>> by_turn(at::TensorList tensors) {
  std::vector<std::vector<size_t>> places;
  const std::vector<size_t> turns = turns_of(tensors.vec());
  for (size_t i = 0; i < turns.size(); ++i) {
    if (turns[i] >= places.size()) places.resize(turns[i] + 1);
    places[turns[i]].push_back(i);
  }
  return places;
}

// The number of groups of a tensor.
int64_t groups_of(const at::Tensor& w, at::IntArrayRef group_dim, int64_t group_block) {
  int64_t count = 1;
  for (const int64_t d : group_dim) count *= w.size(d);
  return count / group_block;
}

// Makes arguments and keeps their records, to which the arguments point.
class ArgsList {
 public:
  ArgsList(const PenaltyOptions& options, const OptionalDims& group_dim, int64_t group_block)
      : options_(options), dims_(group_dim ? Dims(group_dim->vec()) : Dims()), block_(group_block) {
    TORCH_CHECK_VALUE(block_ == 1 || dims_, "Invalid group_block value: ", block_,
                      " needs a group_dim of one dimension");
  }

  TensorArgs of(const at::Tensor& dense) {
    TensorArgs args;
    try {
      args = args_of(dense, dims_, block_);
    } catch (const std::invalid_argument& error) {
      TORCH_CHECK_VALUE(false, "Invalid group_dim value: ", error.what());
    }
    const bool split = options_.penalty != Penalty::none && options_.lam > 0 && options_.beta > 0;
    args.w = args.numel > 0 ? const_cast<void*>(dense.const_data_ptr()) : nullptr;
    args.lam = options_.strength(args.grouped ? args.view.size() : 1);
    args.beta = options_.beta;
    const Prox<double> prox =
        make_prox(split ? options_.penalty : Penalty::none, split ? args.lam / args.beta : 0, options_.a);
    args.numbers = records_
                       .emplace_back(std::array<double, kMostNumbers>{double(prox.penalty), prox.cut, prox.tau, prox.a,
                                                                      prox.rho, prox.edge})
                       .data();
    return args;
  }

 private:
  PenaltyOptions options_;
  Dims dims_;
  int64_t block_;
  std::deque<std::array<double, kMostNumbers>> records_;
};

void prox_(at::TensorList params, Names penalty, double lam, double beta, double a, OptionalDims group_dim,
           bool group_scale, int64_t group_block) {
  ArgsList list({penalty, lam, beta, a, group_scale}, group_dim, group_block);
  for (const at::Tensor& w : params) check(w);
  std::vector<Staged> staged;
  std::vector<TensorArgs> all;
  for (const at::Tensor& w : params) {
    staged.emplace_back(w, w.scalar_type());
    const at::Tensor dense = staged.back().dense();
    all.push_back(list.of(dense));
    if (w.numel() > 0) all.back().w = dense.mutable_data_ptr();
  }
  for (const auto& places : by_turn(params)) {
    DeviceEngines engines(Action::prox);
    for (const size_t i : places) engines[engines.of(params[i].device())].tensors.push_back(all[i]);
    engines.divide();
    for (const size_t i : places) staged[i].load();
    engines.run();
    for (const size_t i : places) staged[i].store();
  }
  for (const at::Tensor& w : params) bump_version(w);
}

at::Tensor prox(const at::Tensor& w, Names penalty, double tau, double a, OptionalDims group_dim, int64_t group_block) {
  check(w);
  ArgsList list({penalty, tau, 1, a, false}, group_dim, group_block);
  at::Tensor u = at::empty_like(w);
  DeviceEngines engines(Action::prox);
  DeviceEngine& engine = engines[engines.of(w.device())];
  TensorArgs args = list.of(u);
  if (w.numel() == 0) return u;
  args.w = u.mutable_data_ptr();
  const bool same = engine.takes_source && !Staged(w, u).is_copy();
  if (same)
    args.g = const_cast<void*>(w.const_data_ptr());
  else
    u.copy_(w);
  engine.tensors.push_back(args);
  engine.divide();
  engine.run();
  return u;
}

at::Tensor penalty_value(at::TensorList params, Names penalty, double lam, double beta, double a,
                         OptionalDims group_dim, bool group_scale, int64_t group_block) {
  ArgsList list({penalty, lam, beta, a, group_scale}, group_dim, group_block);
  DeviceEngines engines(Action::penalty);
  std::vector<Staged> staged;
  for (const at::Tensor& w : params) {
    check(w);
    staged.emplace_back(w, w.scalar_type());
    staged.back().load();
    engines[engines.of(w.device())].tensors.push_back(list.of(staged.back().dense()));
  }
  TORCH_CHECK_VALUE(!params.empty(), "penalty_value needs a tensor");
  engines.divide();
  engines.run();
  at::Tensor total;
  for (const auto& engine : engines)
    total = total.defined() ? total + engine->total().to(total.device()) : engine->total();
  return total;
}

std::vector<at::Tensor> squares(at::TensorList tensors, at::IntArrayRef group_dim, int64_t group_block) {
  ArgsList list({std::nullopt, 0, 1, 1, false}, group_dim, group_block);
  DeviceEngines engines(Action::squares);
  std::vector<Staged> staged;
  std::vector<at::Tensor> sums;
  for (const at::Tensor& w : tensors) {
    check(w);
    staged.emplace_back(w, w.scalar_type());
    staged.back().load();
    TensorArgs args = list.of(staged.back().dense());
    const int64_t count = args.numel > 0 ? args.view.count() : groups_of(w, group_dim, group_block);
    sums.push_back(at::zeros({count}, w.options().dtype(at::kDouble)));
    if (args.numel == 0) continue;
    args.sums = sums.back().mutable_data_ptr<double>();
    engines[engines.of(w.device())].tensors.push_back(args);
  }
  engines.divide();
  engines.run();
  return sums;
}

// Sums over u of each tensor: its zeros, its zero groups (its zeros where a group is an element), |w - u|^2 and P(u).
// `cuts`: of top-k, in the place of the penalty. Without `zeros`, zeros are not counted in groups, and their norms say
// all.
at::Tensor sums_of_u(at::TensorList tensors, Names penalty, double lam, double beta, double a, OptionalDims group_dim,
                     bool group_scale, int64_t group_block, const c10::List<std::optional<at::Tensor>>& cuts,
                     bool zeros) {
  ArgsList list({penalty, lam, beta, a, group_scale}, group_dim, group_block);
  const auto engine = DeviceEngine::make_for_cpu(zeros ? Action::zeros : Action::penalty);
  std::vector<Staged> staged;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& w = tensors[i];
    check(w);
    TORCH_CHECK(w.is_cpu(), "sums_of_u is for tensors on the CPU");
    staged.emplace_back(w, w.scalar_type());
    staged.back().load();
    TensorArgs args = list.of(staged.back().dense());
    args.counts_zeros = zeros;
    if (i < cuts.size() && cuts.get(i)) {
      const at::Tensor cut = *cuts.get(i);
      TORCH_CHECK_TYPE(cut.is_cpu() && cut.numel() == 1 && cut.scalar_type() == at::toOpMathType(w.scalar_type()),
                       "a cut is one number in the type of the arithmetic");
      args.topk = true;
      args.cut = cut.const_data_ptr();
    }
    args.active = args.numel > 0;
    engine->tensors.push_back(args);
  }
  engine->divide();
  engine->run();
  const std::vector<Sums> sums = engine->sums();
  const at::Tensor found = at::zeros({int64_t(tensors.size()), 4}, at::kDouble);
  for (size_t i = 0; i < sums.size(); ++i) {
    double* const row = found.mutable_data_ptr<double>() + 4 * i;
    row[0] = double(sums[i].zeros);
    row[1] = double(engine->tensors[i].grouped ? sums[i].zero_groups : sums[i].zeros);
    row[2] = sums[i].gap;
    row[3] = sums[i].value;
  }
  return found;
}

// What stands beside a tensor of weights, dense and in the order of its elements.
class Beside {
 public:
  Beside(const std::optional<at::Tensor>& tensor, const at::Tensor& weights, at::ScalarType type) {
    if (!tensor || !tensor->defined()) return;
    TORCH_CHECK(has_memory(*tensor) && tensor->device() == weights.device() && is_allocated(*tensor) &&
                    tensor->sizes() == weights.sizes(),
                "a state does not fit its tensor of shape ", weights.sizes());
    staged_.emplace(*tensor, weights, type);
    staged_->load();
  }

  bool is_there() const { return staged_.has_value(); }
  void* data() const { return const_cast<void*>(staged_->dense().const_data_ptr()); }

 private:
  std::optional<Staged> staged_;
};

const cpu::Parallel& parallel() {
  static thread_local cpu::Parallel torchs{
      1, [](int64_t threads, const auto& work) { at::parallel_for(0, threads, 1, work); }};
  torchs.threads = at::get_num_threads();
  return torchs;
}

// Writes the low bytes of `bits`, as many as the number has.
void write_bits(const at::Tensor& number, int64_t bits) {
  std::memcpy(number.mutable_data_ptr(), &bits, number.itemsize());
}

// A tensor that is selected from: its weights, what stands beside them, and the memory of dense copies of both.
class Selected {
 public:
  Selected(const at::Tensor& tensor, const std::optional<at::Tensor>& master, const std::optional<at::Tensor>& dual)
      : weights_(tensor, tensor.scalar_type()) {
    weights_.load();
    const at::Tensor& dense = weights_.dense();
    const bool low = dense.scalar_type() == at::kBFloat16;
    master_.emplace(master, dense, low ? at::kShort : at::kFloat);
    dual_.emplace(dual, dense, master_->is_there() ? at::kFloat : dense.scalar_type());
  }

  TensorArgs args() const {
    const at::Tensor& dense = weights_.dense();
    TensorArgs args;
    args.numel = dense.numel();
    args.dtype = dtype_of(dense.scalar_type());
    if (args.numel == 0) return args;
    args.w = const_cast<void*>(dense.const_data_ptr());
    if (dual_->is_there()) {
      args.method = Method::admm;
      args.state[0] = dual_->data();
    }
    if (master_->is_there()) {
      args.precision.master = dense.scalar_type() == at::kBFloat16 ? Master::low : Master::whole;
      args.state[size_t(args.states())] = master_->data();
    }
    return args;
  }

 private:
  Staged weights_;
  std::optional<Beside> master_, dual_;
};

void cuts_(at::TensorList cuts, at::TensorList last, at::TensorList tensors,
           const c10::List<std::optional<at::Tensor>>& masters, const c10::List<std::optional<at::Tensor>>& duals,
           at::IntArrayRef survivors, bool between, at::OptionalIntArrayRef sizes) {
  const size_t count = tensors.size(), wanted = sizes ? sizes->size() : count;
  TORCH_CHECK(masters.size() == count && duals.size() == count, "cuts_ needs as many masters and duals as tensors");
  TORCH_CHECK(cuts.size() == wanted && last.size() == wanted && survivors.size() == wanted,
              "cuts_ needs as many cuts, last cuts and survivors as tensors, or as sizes");
  const at::Device device = count > 0 ? tensors[0].device() : at::Device(at::kCPU);
  int64_t in_all = 0;
  for (size_t i = 0; sizes && i < wanted; ++i) {
    TORCH_CHECK_VALUE((*sizes)[i] > 0, "Invalid sizes value: ", (*sizes)[i]);
    in_all += (*sizes)[i];
  }
  TORCH_CHECK_VALUE(!sizes || in_all == int64_t(count), "cuts_ has sizes of ", in_all, " tensors, and ", count,
                    " tensors");
  for (size_t i = 0, first = 0; i < wanted; ++i) {
    const size_t end = first + size_t(sizes ? (*sizes)[i] : 1);
    const at::ScalarType type = at::toOpMathType(tensors[first].scalar_type());
    for (; first < end; ++first) {
      check(tensors[first]);
      for (const at::Tensor* t : {&tensors[first], &cuts[i], &last[i]})
        TORCH_CHECK(t->device() == device, "cuts_ is for tensors on one device, not on ", device, " and ", t->device());
      TORCH_CHECK_TYPE(at::toOpMathType(tensors[first].scalar_type()) == type,
                       "the arithmetic of tensors with one cut has one type");
    }
    TORCH_CHECK_TYPE(cuts[i].scalar_type() == type && cuts[i].numel() == 1, "a cut is one number of type ", type);
    TORCH_CHECK_TYPE(last[i].scalar_type() == at::kLong && last[i].numel() == 2 && last[i].is_contiguous(),
                     "a last cut is two numbers of type ", at::kLong);
    TORCH_CHECK_VALUE(survivors[i] >= 0, "Invalid survivors value: ", survivors[i]);
  }
  const bool on_device = selects_on_device(device);
  std::deque<Selected> members;  // the addresses in what it gives stay
  std::vector<WantedCut> cuts_of_device;
  for (size_t i = 0, first = 0; i < wanted; ++i) {
    const size_t end = first + size_t(sizes ? (*sizes)[i] : 1);
    if (!on_device) members.clear();
    std::vector<TensorArgs> args;
    for (; first < end; ++first) {
      members.emplace_back(tensors[first], masters.get(first), duals.get(first));
      args.push_back(members.back().args());
    }
    if (on_device) {
      cuts_of_device.push_back({cuts[i], last[i], survivors[i], std::move(args)});
      continue;
    }
    int64_t* const kept = last[i].mutable_data_ptr<int64_t>();
    cpu::LastCut where{kept[0], kept[1]};
    write_bits(cuts[i], cpu::cut(cpu::Population(std::move(args)), survivors[i], between, where, parallel()));
    kept[0] = where.magnitude;
    kept[1] = where.reach;
  }
  if (on_device) select_on_device(device, cuts_of_device, between);
  for (size_t i = 0; i < wanted; ++i) {
    bump_version(cuts[i]);
    bump_version(last[i]);
  }
}

// How many magnitudes of all tensors lie in each bin of [low, high], as cpu::Bins divides it.
at::Tensor magnitude_counts(at::TensorList tensors, const c10::List<std::optional<at::Tensor>>& masters,
                            const c10::List<std::optional<at::Tensor>>& duals, int64_t low, int64_t high) {
  TORCH_CHECK(masters.size() == tensors.size() && duals.size() == tensors.size(),
              "magnitude_counts needs as many masters and duals as tensors");
  TORCH_CHECK_VALUE(low >= 0 && high >= low, "Invalid range: ", low, " to ", high);
  std::deque<Selected> members;
  std::vector<TensorArgs> args;
  for (size_t i = 0; i < tensors.size(); ++i) {
    check(tensors[i]);
    TORCH_CHECK(tensors[i].is_cpu(), "magnitude_counts is for tensors on the CPU");
    TORCH_CHECK_TYPE(at::toOpMathType(tensors[i].scalar_type()) == at::toOpMathType(tensors[0].scalar_type()),
                     "the arithmetic of tensors that are counted together has one type");
    members.emplace_back(tensors[i], masters.get(i), duals.get(i));
    args.push_back(members.back().args());
  }
  const cpu::Population population(std::move(args));
  if (population.dtype() != Dtype::f64)
    TORCH_CHECK_VALUE(high <= std::numeric_limits<int32_t>::max(), "Invalid range: ", low, " to ", high);
  const std::vector<int64_t> counts = cpu::histogram(population, cpu::Bins({low, high}), parallel());
  at::Tensor result = at::empty({int64_t(counts.size())}, at::kLong);
  std::copy(counts.begin(), counts.end(), result.mutable_data_ptr<int64_t>());
  return result;
}

at::Tensor prox_meta(const at::Tensor& w, Names, double, double, OptionalDims, int64_t) { return at::empty_like(w); }
void prox_meta_(at::TensorList w, Names, double, double, double, OptionalDims, bool, int64_t) { check_meta(w); }
at::Tensor penalty_value_meta(at::TensorList params, Names, double, double, double, OptionalDims, bool, int64_t) {
  check_meta(params);
  TORCH_CHECK_VALUE(!params.empty(), "penalty_value needs a tensor");
  return at::empty({}, params.front().options().dtype(at::kDouble));
}
std::vector<at::Tensor> squares_meta(at::TensorList tensors, at::IntArrayRef group_dim, int64_t group_block) {
  check_meta(tensors);
  std::vector<at::Tensor> sums;
  for (const at::Tensor& w : tensors)
    sums.push_back(at::empty({groups_of(w, group_dim, group_block)}, w.options().dtype(at::kDouble)));
  return sums;
}
at::Tensor sums_of_u_meta(at::TensorList tensors, Names, double, double, double, OptionalDims, bool, int64_t,
                          const c10::List<std::optional<at::Tensor>>&, bool) {
  check_meta(tensors);
  return at::empty({int64_t(tensors.size()), 4}, at::TensorOptions().dtype(at::kDouble).device(at::kMeta));
}
void cuts_meta(at::TensorList cuts, at::TensorList, at::TensorList tensors, const c10::List<std::optional<at::Tensor>>&,
               const c10::List<std::optional<at::Tensor>>&, at::IntArrayRef, bool, at::OptionalIntArrayRef) {
  check_meta(cuts);
  check_meta(tensors);
}
at::Tensor magnitude_counts_meta(at::TensorList tensors, const c10::List<std::optional<at::Tensor>>&,
                                 const c10::List<std::optional<at::Tensor>>&, int64_t, int64_t) {
  check_meta(tensors);
  return at::empty({cpu::Bins::kCount}, at::TensorOptions(at::kMeta).dtype(at::kLong));
}
}  // namespace

// The same functions for every device: they ask each tensor for its own.
static void implement(torch::Library& m) {
  m.impl("cuts_", cuts_);
  m.impl("prox", prox);
  m.impl("prox_", prox_);
  m.impl("penalty_value", penalty_value);
  m.impl("squares", squares);
}

// Not by TORCH_LIBRARY, whose work is done when the library is loaded: bindings.cpp looks at torch's version first.
void register_ops() {
  static torch::Library all = MAKE_TORCH_LIBRARY(rvsm_kernels);
  all.def("prox(Tensor w, str? penalty, float tau, float a=1.0, int[]? group_dim=None, int group_block=1) -> Tensor");
  all.def(
      "prox_(Tensor(a!)[] w, str? penalty, float lam, float beta, float a=1.0, int[]? group_dim=None, "
      "bool group_scale=False, int group_block=1) -> ()");
  all.def(
      "penalty_value(Tensor[] w, str? penalty, float lam, float beta, float a=1.0, int[]? group_dim=None, "
      "bool group_scale=False, int group_block=1) -> Tensor");
  all.def(
      "sums_of_u(Tensor[] w, str? penalty, float lam, float beta, float a, int[]? group_dim, bool group_scale, "
      "int group_block, Tensor?[] cuts, bool zeros) -> Tensor");
  all.def("squares(Tensor[] w, int[] group_dim, int group_block=1) -> Tensor[]");
  all.def(
      "cuts_(Tensor(a!)[] cuts, Tensor(b!)[] last, Tensor[] w, Tensor?[] masters, Tensor?[] duals, int[] survivors, "
      "bool between=False, int[]? sizes=None) -> ()");
  all.def("magnitude_counts(Tensor[] w, Tensor?[] masters, Tensor?[] duals, int low, int high) -> Tensor");

  static torch::Library cpu = MAKE_TORCH_LIBRARY_IMPL(rvsm_kernels, CPU);
  implement(cpu);
  cpu.impl("magnitude_counts", magnitude_counts);
  cpu.impl("sums_of_u", sums_of_u);
#if defined(RVSM_CUDA)
  static torch::Library cuda = MAKE_TORCH_LIBRARY_IMPL(rvsm_kernels, CUDA);
  implement(cuda);
#endif

  static torch::Library meta = MAKE_TORCH_LIBRARY_IMPL(rvsm_kernels, Meta);
  meta.impl("prox", prox_meta);
  meta.impl("prox_", prox_meta_);
  meta.impl("penalty_value", penalty_value_meta);
  meta.impl("squares", squares_meta);
  meta.impl("cuts_", cuts_meta);
  meta.impl("magnitude_counts", magnitude_counts_meta);
  meta.impl("sums_of_u", sums_of_u_meta);
}

}  // namespace rvsm
