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
  Jobs jobs(Action::prox);
  std::vector<Staged> staged;
  for (const at::Tensor& w : params) {
    check(w);
    staged.emplace_back(w, w.scalar_type());
    const at::Tensor dense = staged.back().dense();
    Row row = row_of(dense, group_dim, options);
    if (w.numel() > 0) row.w = dense.mutable_data_ptr();
    jobs[jobs.of(w.device())].rows.push_back(row);
  }
  jobs.divide();
  for (auto& s : staged) s.load();
  jobs.run();
  for (auto& s : staged) s.store();
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

  Jobs jobs(Action::step);
  std::vector<Staged> written, read;
  for (size_t i = 0; i < params.size(); ++i) {
    check(params[i]);
    TORCH_CHECK(grads[i].device() == params[i].device(), "the gradient of parameter ", i, " is on another device");
    TORCH_CHECK(momentum == 0 || momentum_buffers[i].device() == params[i].device(),
                "the momentum buffer of parameter ", i, " is on another device");
    TORCH_CHECK(grads[i].sizes() == params[i].sizes(), "the gradient of parameter ", i, " has another shape");
    TORCH_CHECK(momentum == 0 || momentum_buffers[i].sizes() == params[i].sizes(), "the momentum buffer of parameter ",
                i, " has another shape");
    written.emplace_back(params[i], row_type(params[i].scalar_type(), grads[i].scalar_type()));
    const at::Tensor dense = written.back().dense();
    Row row = row_of(dense, group_dim, options, first_step);
    if (row.numel == 0) continue;
    row.w = dense.mutable_data_ptr();
    row.g = read.emplace_back(grads[i], dense).dense().const_data_ptr();
    if (momentum != 0) row.m = written.emplace_back(momentum_buffers[i], dense).dense().mutable_data_ptr();
    jobs[jobs.of(dense.device())].rows.push_back(row);
  }
  jobs.divide();
  // A first step ignores what the buffers hold, an Inf or NaN too.
  if (momentum != 0 && first_step)
    for (const at::Tensor& m : momentum_buffers) m.zero_();
  for (auto& s : read) s.load();
  for (auto& s : written) s.load();
  jobs.run();
  for (auto& s : written) s.store();
  for (const at::Tensor& w : params) bump_version(w);
  for (const at::Tensor& m : momentum_buffers) bump_version(m);
}

// What tracing needs to know: shapes and types.
at::Tensor prox_meta(const at::Tensor& w, Names, double, double, OptionalDims) { return at::empty_like(w); }
void prox_meta_(at::TensorList, Names, double, double, double, OptionalDims, bool) {}
at::Tensor penalty_value_meta(at::TensorList params, Names, double, double, double, OptionalDims, bool) {
  return at::empty({}, params.front().options().dtype(at::kDouble));
}
void step_meta_(at::TensorList, at::TensorList, at::TensorList, Names, double, double, double, OptionalDims, bool,
                double, double, double, double, double, bool, bool, bool, bool) {}

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
