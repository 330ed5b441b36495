// The dispatcher ops: the same kernels on lists of tensors, with mutation visible in the schema.

#include <torch/library.h>

#include <string>

#include "device_job.h"
#include "prox.h"
#include "rows.h"

namespace rvsm {

namespace {

using Names = std::optional<std::string_view>;
using OptionalDims = at::OptionalIntArrayRef;

Options penalty_options(const Names& penalty, double lam, double beta, double a, bool group_scale) {
  Options o;
  TORCH_CHECK_VALUE(!penalty || penalty_from_name(std::string(*penalty).c_str(), o.penalty),
                    "Invalid penalty: ", penalty.value_or(""));
  o.lam = lam;
  o.beta = beta;
  o.a = a;
  o.group_scale = group_scale;
  return o;
}

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

Row row_of(const at::Tensor& dense, const OptionalDims& group_dim, const Options& options, bool first = false) {
  Row row;
  try {
    row = make_row(dense, group_dim ? Dims(group_dim->vec()) : Dims());
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, "Invalid group_dim value: ", error.what());
  }
  row.w = row.numel > 0 ? const_cast<void*>(dense.const_data_ptr()) : nullptr;
  set_options(row, options, first);
  return row;
}

void prox_list(at::TensorList params, const Options& options, const OptionalDims& group_dim) {
  for (const at::Tensor& w : params) check(w);
  std::vector<Staged> staged;
  std::vector<Row> rows;
  for (const at::Tensor& w : params) {
    staged.emplace_back(w, w.scalar_type());
    const at::Tensor dense = staged.back().dense();
    rows.push_back(row_of(dense, group_dim, options));
    if (w.numel() > 0) rows.back().w = dense.mutable_data_ptr();
  }
  for (const auto& places : by_turn(params)) {
    Jobs jobs(Action::prox);
    for (const size_t i : places) jobs[jobs.of(params[i].device())].rows.push_back(rows[i]);
    jobs.divide();
    for (const size_t i : places) staged[i].load();
    jobs.run();
    for (const size_t i : places) staged[i].store();
  }
  for (const at::Tensor& w : params) bump_version(w);
}

void prox_(at::TensorList w, Names penalty, double lam, double beta, double a, OptionalDims group_dim,
           bool group_scale) {
  prox_list(w, penalty_options(penalty, lam, beta, a, group_scale), group_dim);
}

at::Tensor prox(const at::Tensor& w, Names penalty, double tau, double a, OptionalDims group_dim) {
  check(w);
  const Options options = penalty_options(penalty, tau, 1, a, false);
  at::Tensor u = at::empty_like(w);
  Jobs jobs(Action::prox);
  DeviceJob& job = jobs[jobs.of(w.device())];
  Row row = row_of(u, group_dim, options);
  if (w.numel() == 0) return u;
  row.w = u.mutable_data_ptr();
  const bool same = job.takes_source && !Staged(w, u).is_copy();
  if (same)
    row.g = w.const_data_ptr();
  else
    u.copy_(w);
  job.rows.push_back(row);
  job.divide();
  job.run();
  return u;
}

at::Tensor penalty_value(at::TensorList params, Names penalty, double lam, double beta, double a,
                         OptionalDims group_dim, bool group_scale) {
  const Options options = penalty_options(penalty, lam, beta, a, group_scale);
  Jobs jobs(Action::penalty);
  std::vector<Staged> staged;
  for (const at::Tensor& w : params) {
    check(w);
    staged.emplace_back(w, w.scalar_type());
    staged.back().load();
    jobs[jobs.of(w.device())].rows.push_back(row_of(staged.back().dense(), group_dim, options));
  }
  TORCH_CHECK_VALUE(!params.empty(), "penalty_value needs a tensor");
  jobs.divide();
  jobs.run();
  at::Tensor total;
  for (const auto& job : jobs) total = total.defined() ? total + job->total().to(total.device()) : job->total();
  return total;
}

void step_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers, Names penalty, double lam,
           double beta, double a, OptionalDims group_dim, bool group_scale, double group_lasso, double lr,
           double momentum, double dampening, double weight_decay, bool nesterov, bool decoupled, bool maximize,
           bool first_step) {
  TORCH_CHECK(params.size() == grads.size(), "step_ needs a gradient for each parameter");
  TORCH_CHECK(momentum == 0 || params.size() == momentum_buffers.size(),
              "step_ needs a momentum buffer for each parameter");
  TORCH_CHECK_VALUE(group_lasso == 0 || group_dim, "group_lasso needs a group_dim");
  Options options = penalty_options(penalty, lam, beta, a, group_scale);
  options.group_lasso = group_lasso;
  options.lr = lr;
  options.momentum = momentum;
  options.dampening = dampening;
  options.weight_decay = weight_decay;
  options.nesterov = nesterov;
  options.decoupled = decoupled;
  options.maximize = maximize;

  for (size_t i = 0; i < params.size(); ++i) {
    check(params[i]);
    check(grads[i]);
    if (momentum != 0) check(momentum_buffers[i]);
    TORCH_CHECK(grads[i].device() == params[i].device(), "the gradient of parameter ", i, " is on another device");
    TORCH_CHECK(momentum == 0 || momentum_buffers[i].device() == params[i].device(),
                "the momentum buffer of parameter ", i, " is on another device");
    TORCH_CHECK(grads[i].sizes() == params[i].sizes(), "the gradient of parameter ", i, " has another shape");
    TORCH_CHECK(momentum == 0 || momentum_buffers[i].sizes() == params[i].sizes(), "the momentum buffer of parameter ",
                i, " has another shape");
  }
  // Everything is checked, and every copy made, before the first turn writes.
  struct Place {
    Row row;
    std::vector<Staged> written, read;
  };
  std::vector<Place> all(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    auto& [row, written, read] = all[i];
    written.emplace_back(params[i], row_type(params[i].scalar_type(), grads[i].scalar_type()));
    const at::Tensor dense = written.back().dense();
    row = row_of(dense, group_dim, options, first_step);
    if (row.numel == 0) continue;
    row.w = dense.mutable_data_ptr();
    row.g = read.emplace_back(grads[i], dense).dense().const_data_ptr();
    if (momentum != 0) row.m = written.emplace_back(momentum_buffers[i], dense).dense().mutable_data_ptr();
  }
  // A first step ignores what the buffers hold, an Inf or NaN too.
  if (momentum != 0 && first_step)
    for (const at::Tensor& m : momentum_buffers) m.zero_();
  for (const auto& places : by_turn(params)) {
    Jobs jobs(Action::step);
    for (const size_t i : places)
      if (all[i].row.numel > 0) jobs[jobs.of(params[i].device())].rows.push_back(all[i].row);
    jobs.divide();
    for (const size_t i : places) {
      for (auto& s : all[i].read) s.load();
      for (auto& s : all[i].written) s.load();
    }
    jobs.run();
    for (const size_t i : places)
      for (auto& s : all[i].written) s.store();
  }
  for (const at::Tensor& w : params) bump_version(w);
  for (const at::Tensor& m : momentum_buffers) bump_version(m);
}

// What tracing needs to know: shapes and types. A list that mixes meta tensors with others comes here too, and would be
// left undone without a word.
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
void step_meta_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers, Names, double, double,
                double, OptionalDims, bool, double, double, double, double, double, bool, bool, bool, bool) {
  check_meta(params);
  check_meta(grads);
  check_meta(momentum_buffers);
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
  m.def(
      "step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, str? penalty, float lam, float beta, "
      "float a, int[]? group_dim, bool group_scale, float group_lasso, float lr, float momentum, float dampening, "
      "float weight_decay, bool nesterov, bool decoupled, bool maximize, bool first_step) -> ()");
}

// The same functions for every device: they ask each tensor for its own.
static void implement(torch::Library& m) {
  m.impl("prox", prox);
  m.impl("prox_", prox_);
  m.impl("penalty_value", penalty_value);
  m.impl("step_", step_);
}

TORCH_LIBRARY_IMPL(rvsm_kernels, CPU, m) { implement(m); }
#if defined(RVSM_CUDA)
TORCH_LIBRARY_IMPL(rvsm_kernels, CUDA, m) { implement(m); }
#endif

TORCH_LIBRARY_IMPL(rvsm_kernels, Meta, m) {
  m.impl("prox", prox_meta);
  m.impl("prox_", prox_meta_);
  m.impl("penalty_value", penalty_value_meta);
  m.impl("step_", step_meta_);
}

}  // namespace rvsm
