// Tensors of random shapes, places and options.

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>

#include "cases.h"

namespace rvsm::ptx {

namespace {

// Shapes on both sides of every border: of a vector, a chunk, a tile, a strip, a resident tensor, parts.
GroupView random_view(int64_t most) {
  while (true) {
    GroupView v;
    v.batch = pick<int64_t>({1, 1, 1, 2, 3, 5});
    v.outer = pick<int64_t>({1, 1, 1, 2, 3, 7, 11, 30, 64, 257, 700, 20000});
    v.groups = pick<int64_t>({1, 2, 3, 4, 5, 7, 8, 16, 33, 64, 70, 100, 257, 300, 600, 1100});
    v.inner =
        pick<int64_t>({1,  1,   1,   2,   3,   4,    5,    8,    9,    16,   24,   25,    32,    40,    48,    64,
                       72, 100, 128, 256, 576, 1000, 1024, 2304, 4096, 4608, 9000, 12288, 12296, 24576, 24584, 30000});
    if (v.count() * v.size() <= most) return v;
  }
}

int64_t random_numel(Dtype dtype, bool big, Profile profile) {
  const int64_t width = dtype == Dtype::f64 ? 2 : dtype == Dtype::f32 ? 4 : 8, chunk = 1024 * width;
  switch (profile == Profile::elements_that_keep && big ? 2 : integer(0, big ? 4 : 1)) {
    case 0:
      return pick<int64_t>({0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 33});
    case 1:
      return integer(0, 300);
    case 2:
      return chunk * integer(1, 3) + integer(-width - 1, width + 1);
    case 3:
      return pick<int64_t>({1023, 1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097, 8191, 8192, 8193});
    default:
      return integer(1, 20000);
  }
}

// The tau whose cut is at `want`.
double tau_of_cut(Penalty penalty, double want, double a) {
  double low = 0, high = 1e12;
  for (int i = 0; i < 200; ++i) {
    const double middle = (low + high) / 2;
    (definition::cut(penalty, middle, a) < want ? low : high) = middle;
  }
  return low;
}

definition::Step random_step(const TensorOptions& t, Action action, Profile profile) {
  definition::Step o;
  const bool keeps = profile == Profile::groups_that_keep || profile == Profile::elements_that_keep;
  o.penalty = profile == Profile::tl1 ? Penalty::tl1 : Penalty(integer(keeps ? 1 : 0, 3));
  o.beta = log_uniform(0.05, 2);
  o.a = log_uniform(0.1, 10);
  if (o.penalty == Penalty::tl1 && integer(0, 2) == 0)
    o.a = integer(0, 1) ? log_uniform(1e3, 1e8) : log_uniform(1e-8, 1e-3);
  // The cut lies amid the values.
  const double norm = t.grouped ? std::sqrt(double(t.view.size()) / 3) : 0.6;
  const double want = norm * (t.grouped ? log_uniform(0.9, 1.1) : uniform(0.05, 1.3));
  double tau = o.penalty == Penalty::none ? 1 : tau_of_cut(o.penalty, want, o.a);
  if (integer(0, 9) == 0) tau = 0;
  o.lam = tau * o.beta;
  o.lr = integer(0, 19) == 0 ? 0 : log_uniform(1e-3, 0.5);
  o.momentum = pick({0, 1, 1}) ? uniform(0.5, 0.99) : 0;
  o.nesterov = o.momentum != 0 && integer(0, 1);
  o.dampening = o.momentum != 0 && !o.nesterov && integer(0, 2) == 0 ? uniform(0, 1) : 0;
  if (action == Action::step) o.base = BaseKind(integer(0, 2));
  o.amsgrad = integer(0, 1);
  o.beta1 = integer(0, 9) == 0 ? 0 : uniform(0.5, 0.99);
  o.beta2 = uniform(0.5, 0.999);
  o.weight_decay = integer(0, 1) ? log_uniform(1e-5, 0.1) : 0;
  o.decoupled = integer(0, 1);
  o.maximize = integer(0, 3) == 0;
  o.hold_zeros = integer(0, 3) == 0;
  o.group_lasso = t.grouped && integer(0, 1) ? log_uniform(1e-3, 1) : 0;
  o.group_scale = t.grouped && integer(0, 1);
  if (o.group_scale) o.lam /= std::sqrt(double(t.view.size()));
  if (o.is_split() && action == Action::step) {
    o.method = keeps ? pick({Method::delayed, Method::admm})
                     : pick({Method::rvsm, Method::rvsm, Method::delayed, Method::admm});
    o.topk = o.penalty == Penalty::l0 && integer(0, 1);
  }
  return o;
}

template <class S>
void fill(Array& a, std::vector<double>& numbers, int64_t count, double scale, double zeros) {
  numbers.resize(size_t(count));
  for (size_t i = 0; i < size_t(count); ++i) {
    const double value = uniform(0, 1) < zeros ? 0 : uniform(-scale, scale) * (uniform(0, 1) < 0.02 ? 1e-4 : 1);
    put<S>(a.at, i, value);
    numbers[i] = get<S>(a.at, i);
  }
}

template <class S>
void fill_arrays(TensorCase& t, const TensorOptions& o) {
  const int64_t numel = o.numel();
  const auto make = [&](Array& a, std::vector<double>& numbers, int64_t misalign, double scale, double zeros) {
    a.make(size_t(numel) * sizeof(S), size_t(misalign) * sizeof(S));
    fill<S>(a, numbers, numel, scale, zeros);
  };
  make(t.w, t.numbers.w, o.misalign[0], 1, o.zeros);
  make(t.g, t.numbers.g, o.misalign[3], 1, 0);
  make(t.m, t.numbers.m, o.misalign[1], o.step.first ? 0 : 1, 0);
  make(t.kept, t.numbers.kept, o.misalign[2], o.step.method == Method::admm ? 0.3 : 1, 0);
  make(t.v, t.numbers.v, o.misalign[4], o.step.first ? 0 : 1, 0);
  make(t.largest, t.numbers.largest, o.misalign[5], o.step.first ? 0 : 1, 0);
  for (const int array : {4, 5})  // averages of squares
    for (int64_t i = 0; i < numel; ++i)
      t.set(array, i, std::fabs(array == 4 ? t.numbers.v[size_t(i)] : t.numbers.largest[size_t(i)]));
  for (int64_t i = 0; o.zero_groups && o.grouped && i < numel; ++i) {
    if (definition::group_of(o.view, i) % 5 != 1) continue;
    t.set(0, i, 0);
    if (o.step.method == Method::admm) t.set(2, i, 0);
  }
  const double norm = o.grouped ? std::sqrt(double(o.view.size()) / 3) * uniform(0.95, 1.05) : uniform(0, 1);
  using A = Opmath<S>;
  t.cut.make(sizeof(A), 0);
  const bool tie = o.tie && !o.grouped && numel > 0;
  put<A>(t.cut.at, 0, tie ? std::fabs(t.numbers.w[size_t(integer(0, numel - 1))]) : norm);
  t.cut_value = get<A>(t.cut.at, 0);
}

}  // namespace

TensorOptions random_tensor(Action action, bool big, Profile profile) {
  TensorOptions t;
  t.dtype = Dtype(integer(0, 3));
  t.grouped = integer(0, 2) == 0;
  if (profile == Profile::groups || profile == Profile::groups_that_keep) t.grouped = true;
  if (profile == Profile::elements || profile == Profile::elements_that_keep) t.grouped = false;
  if (t.grouped)
    t.view = random_view(big ? 160000 : 12000);
  else
    t.single = random_numel(t.dtype, big, profile);
  t.step = random_step(t, action, profile);
  t.step.first = integer(0, 3) == 0;
  const bool half = t.dtype == Dtype::bf16 || t.dtype == Dtype::f16;
  t.wide = action == Action::step && half && integer(0, 3) == 0;
  t.noted = t.dtype;
  if (t.wide) t.dtype = Dtype::f32;
  const int64_t at = integer(0, 2) == 0 ? integer(0, 7) : 0;
  const bool out_of_line = integer(0, 5) == 0;
  for (int64_t& m : t.misalign) m = out_of_line ? integer(0, 7) : at;
  t.zeros = integer(0, 3) == 0 ? 0.3 : 0;
  t.zero_groups = integer(0, 3) == 0;
  t.tie = integer(0, 1);
  t.counted = t.step.base == BaseKind::adamw && integer(0, 1);
  return t;
}

std::unique_ptr<TensorCase> make_tensor(const TensorOptions& o) {
  auto t = std::make_unique<TensorCase>();
  t->options = o;
  with_storage(o.dtype, [&](auto s) { fill_arrays<decltype(s)>(*t, o); });
  const definition::Step& s = o.step;
  if (o.counted) {
    t->counter.make(sizeof(float), 4);
    put<float>(t->counter.at, 0, s.first ? 0 : s.count);
  }
  t->text = text_of("%s%s, %lld elements, at %lld %lld %lld %lld, penalty %d a %.4g tau %.4g, method %d, topk %d, ",
                    kDtypeNames[int(o.dtype)], o.wide ? " (wide)" : "", (long long)o.numel(), (long long)o.misalign[0],
                    (long long)o.misalign[1], (long long)o.misalign[2], (long long)o.misalign[3], int(o.penalty()), s.a,
                    double(o.tau()), int(s.method), s.topk);
  t->text += text_of("base %d, momentum %g, nesterov %d, first %d, lasso %g", int(s.base), s.momentum, s.nesterov,
                     s.first, s.group_lasso);
  if (o.grouped)
    t->text += text_of(", view %lld x %lld x %lld x %lld", (long long)o.view.batch, (long long)o.view.outer,
                       (long long)o.view.groups, (long long)o.view.inner);
  return t;
}

void TensorCase::set(int array, int64_t element, double value) {
  std::vector<double>* const all[] = {&numbers.w, &numbers.m, &numbers.kept, &numbers.g, &numbers.v, &numbers.largest};
  with_storage(options.dtype, [&](auto s) {
    using S = decltype(s);
    put<S>(arrays[array]->at, size_t(element), value);
    (*all[array])[size_t(element)] = get<S>(arrays[array]->at, size_t(element));
  });
}

std::string text_of(const char* format, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

void wrong(const std::string& kind, const std::string& text) { machine.findings.add("result " + kind, text); }

}  // namespace rvsm::ptx
