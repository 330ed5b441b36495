// The dispatcher ops: u, the value of a penalty and the squares of norms, with mutation visible in the schema.

#include <torch/library.h>

#include <array>
#include <cstring>
#include <deque>
#include <string>

#include "../math/penalty.h"
#include "../plan/device_engine.h"
#include "../plan/tensors.h"

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

void check(const at::Tensor& w) {
  TORCH_CHECK_TYPE(is_supported(w.scalar_type()) && w.layout() == at::kStrided,
                   "rvsm_kernels does not support tensors of dtype ", w.dtype());
  TORCH_CHECK_TYPE(has_memory(w), "rvsm_kernels does not support tensors without memory of their own beside others");
  TORCH_CHECK(is_allocated(w), "the memory of a tensor of shape ", w.sizes(), " has been freed");
}

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
int64_t groups_of(const at::Tensor& w, at::IntArrayRef group_dim) {
  int64_t count = 1;
  for (const int64_t d : group_dim) count *= w.size(d);
  return count;
}

// Makes arguments and keeps their records, to which the arguments point.
class ArgsList {
 public:
  ArgsList(const PenaltyOptions& options, const OptionalDims& group_dim)
      : options_(options), dims_(group_dim ? Dims(group_dim->vec()) : Dims()) {}

  TensorArgs of(const at::Tensor& dense) {
    TensorArgs args;
    try {
      args = args_of(dense, dims_);
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
  std::deque<std::array<double, kMostNumbers>> records_;
};

void prox_(at::TensorList params, Names penalty, double lam, double beta, double a, OptionalDims group_dim,
           bool group_scale) {
  ArgsList list({penalty, lam, beta, a, group_scale}, group_dim);
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

at::Tensor prox(const at::Tensor& w, Names penalty, double tau, double a, OptionalDims group_dim) {
  check(w);
  ArgsList list({penalty, tau, 1, a, false}, group_dim);
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
                         OptionalDims group_dim, bool group_scale) {
  ArgsList list({penalty, lam, beta, a, group_scale}, group_dim);
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

std::vector<at::Tensor> squares(at::TensorList tensors, at::IntArrayRef group_dim) {
  ArgsList list({std::nullopt, 0, 1, 1, false}, group_dim);
  DeviceEngines engines(Action::squares);
  std::vector<Staged> staged;
  std::vector<at::Tensor> sums;
  for (const at::Tensor& w : tensors) {
    check(w);
    staged.emplace_back(w, w.scalar_type());
    staged.back().load();
    TensorArgs args = list.of(staged.back().dense());
    const int64_t count = args.numel > 0 ? args.view.count() : groups_of(w, group_dim);
    sums.push_back(at::zeros({count}, w.options().dtype(at::kDouble)));
    if (args.numel == 0) continue;
    args.sums = sums.back().mutable_data_ptr<double>();
    engines[engines.of(w.device())].tensors.push_back(args);
  }
  engines.divide();
  engines.run();
  return sums;
}

// Tracing needs shapes and types only. torch also comes here with a list that mixes meta tensors with others, and
// nothing would be done with the others: that is an error.
void check_meta(at::TensorList tensors) {
  for (const at::Tensor& t : tensors)
    TORCH_CHECK_TYPE(t.is_meta(), "rvsm_kernels does not support meta tensors beside tensors on ", t.device());
}
at::Tensor prox_meta(const at::Tensor& w, Names, double, double, OptionalDims) { return at::empty_like(w); }
void prox_meta_(at::TensorList w, Names, double, double, double, OptionalDims, bool) { check_meta(w); }
at::Tensor penalty_value_meta(at::TensorList params, Names, double, double, double, OptionalDims, bool) {
  check_meta(params);
  TORCH_CHECK_VALUE(!params.empty(), "penalty_value needs a tensor");
  return at::empty({}, params.front().options().dtype(at::kDouble));
}
std::vector<at::Tensor> squares_meta(at::TensorList tensors, at::IntArrayRef group_dim) {
  check_meta(tensors);
  std::vector<at::Tensor> sums;
  for (const at::Tensor& w : tensors)
    sums.push_back(at::empty({groups_of(w, group_dim)}, w.options().dtype(at::kDouble)));
  return sums;
}
}  // namespace

TORCH_LIBRARY(rvsm_kernels, m) {
  m.def("prox(Tensor w, str? penalty, float tau, float a=1.0, int[]? group_dim=None) -> Tensor");
  m.def(
      "prox_(Tensor(a!)[] w, str? penalty, float lam, float beta, float a=1.0, int[]? group_dim=None, "
      "bool group_scale=False) -> ()");
  m.def(
      "penalty_value(Tensor[] w, str? penalty, float lam, float beta, float a=1.0, int[]? group_dim=None, "
      "bool group_scale=False) -> Tensor");
  m.def("squares(Tensor[] w, int[] group_dim) -> Tensor[]");
}

// The same functions for every device: they ask each tensor for its own.
static void implement(torch::Library& m) {
  m.impl("prox", prox);
  m.impl("prox_", prox_);
  m.impl("penalty_value", penalty_value);
  m.impl("squares", squares);
}

TORCH_LIBRARY_IMPL(rvsm_kernels, CPU, m) { implement(m); }
#if defined(RVSM_CUDA)
TORCH_LIBRARY_IMPL(rvsm_kernels, CUDA, m) { implement(m); }
#endif

TORCH_LIBRARY_IMPL(rvsm_kernels, Meta, m) {
  m.impl("prox", prox_meta);
  m.impl("prox_", prox_meta_);
  m.impl("penalty_value", penalty_value_meta);
  m.impl("squares", squares_meta);
}

}  // namespace rvsm
