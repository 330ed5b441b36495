// Cases that are made by hand: numbers that meet a cut exactly, Inf beside terms that are off, and every way in which
// groups are summed.

#include <cmath>
#include <utility>

#include "cases.h"

namespace rvsm::ptx {

namespace {

// Single elements before a boundary, vectors, and single elements behind them; where arrays do not line up, several
// elements to a thread.
constexpr int64_t kHeadBodyTail = 61, kSingle = 700;

// The number after x towards `to` in the storage type.
double next_in(Dtype dtype, double x, double to) {
  return with_storage(dtype, [&](auto s) {
    using S = decltype(s);
    if constexpr (sizeof(S) == 8) {
      return std::nextafter(x, to);
    } else if constexpr (sizeof(S) == 4) {
      return double(std::nextafter(float(x), float(to)));
    } else {
      S value;
      store(value, float(x));
      value.bits = uint16_t(value.bits + (to > x ? 1 : -1));
      return double(load(value));
    }
  });
}

// A penalty whose cut is a short binary number, so that every storage type has it.
struct Cut {
  Penalty penalty;
  double tau, a, cut;
};
// tl1 once where shrink is continuous at the cut, once where it jumps.
constexpr Cut kCuts[] = {
    {Penalty::l1, 0.5, 1, 0.5}, {Penalty::l0, 0.125, 1, 0.5}, {Penalty::tl1, 0.25, 1, 0.5}, {Penalty::tl1, 1, 1, 1.5}};

// Shapes that are summed in different ways: by the blocks of their step, in strips, by teams along a row and down many
// rows, and all of them in parts, which other launches sum.
constexpr GroupView kViews[] = {{1, 1, 13, 16}, {1, 1, 9, 72}, {1, 1, 700, 8}, {1, 7, 5, 3},
                                {2, 30, 6, 16}, {1, 3, 5, 72}, {2, 70, 2, 64}, {1, 9, 1112, 1}};
constexpr GroupView kViewsInParts[] = {{1, 17000, 4, 1}, {1, 1, 1, 66000}, {1, 700, 1, 96}};

// The number at which an element, or the single number of its group, is set: the cut, or the number before or after it.
double near_cut(Dtype dtype, double cut, int64_t i) {
  return i % 3 == 0 ? cut : next_in(dtype, cut, i % 3 == 1 ? 2 * cut : 0);
}

// `array`: w, or what a prox reads in its place.
void meet_cut(TensorCase& t, int array, double cut) {
  const TensorOptions& o = t.options;
  for (int64_t i = 0; i < o.numel(); ++i) {
    double r = near_cut(o.dtype, cut, i);
    if (o.grouped) {
      // One number of each group, so that its norm is exact.
      const GroupView& v = o.view;
      const int64_t group = int64_t(definition::group_of(v, i)), columns = v.groups * v.inner;
      const int64_t place = i / columns % v.outer * v.inner + i % v.inner;
      r = place == group * 7 % v.size() ? near_cut(o.dtype, cut, group) : 0;
    }
    // What is thresholded may be the sum of two numbers.
    const double kept = o.step.method == Method::admm && i % 2 == 0 && r != 0 ? cut / 2 : 0;
    const double sign = i % 4 < 2 ? 1 : -1;
    t.set(array, i, sign * (r - kept));
    if (o.step.method == Method::admm) t.set(2, i, sign * kept);
  }
}

// A tensor of every type at the cut of every penalty, by every method; once with vectors and once without. Ties go to
// zero, in every engine alike.
void add_at_cut(Experiment& x, TensorOptions o) {
  const bool step = x.action() == Action::step;
  o.step.beta = 1;
  o.step.lr = 0.25;
  for (const Cut& c : kCuts)
    for (const Method method : {Method::rvsm, Method::delayed, Method::admm})
      for (const bool topk : {false, true})
        for (const Dtype dtype : {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16})
          for (const int64_t out_of_line : {0, 1}) {
            if ((topk && c.penalty != Penalty::l0) || (!step && (topk || method != Method::rvsm))) continue;
            if (c.penalty == Penalty::none && method != Method::rvsm) continue;
            o.dtype = o.noted = dtype;
            o.step.penalty = c.penalty;
            o.step.lam = c.tau;
            o.step.a = c.a;
            o.step.method = method;
            o.step.topk = topk;
            for (int64_t& m : o.misalign) m = o.grouped ? 0 : 1;
            o.misalign[0] += out_of_line;
            o.single = out_of_line ? kSingle : kHeadBodyTail;
            x.tensors.push_back(make_tensor(o));
            TensorCase& t = *x.tensors.back();
            meet_cut(t, x.with_source ? 3 : 0, c.cut);
            if (!topk) continue;
            with_storage(dtype, [&](auto s) { put<Opmath<decltype(s)>>(t.cut.at, 0, c.cut); });
            t.cut_value = c.cut;
          }
}

// `base`: which it is, its momentum and the place of the pull.
void at_cut(Action action, bool with_source, const definition::Step& base) {
  generator().seed(1);
  Experiment x(action);
  x.with_source = with_source;
  TensorOptions o;
  o.step = base;
  add_at_cut(x, o);
  x.aim();
  machine.mode = {Mode::forward, Mode::exact, Mode::never, 1};
  x.judge(Mode::forward);
}

void groups_at_cut(Action action, const GroupView& view) {
  generator().seed(3);
  Experiment x(action);
  TensorOptions o;
  o.grouped = true;
  o.view = view;
  add_at_cut(x, o);
  x.aim();
  machine.mode = {Mode::shuffled, Mode::exact, Mode::never, 1};
  x.judge(Mode::shuffled);
}

// All ways of summing, with a second norm for group lasso where the method thresholds something else than w.
void sums(Dtype dtype, Method method, const GroupView& view) {
  generator().seed(4);
  Experiment x(Action::step);
  // In parts: two tensors of a type whose parts are summed by one launch.
  const bool parts = view.count() * view.size() > 60000;
  // Else: on a boundary; w and what the method keeps off it; all arrays off it, with single elements before vectors.
  for (const int variant : {0, 1, 2}) {
    if (parts && (variant == 2 || (variant == 1 && dtype != Dtype::f32 && dtype != Dtype::f64))) continue;
    TensorOptions o;
    o.dtype = o.noted = dtype;
    o.grouped = true;
    o.view = view;
    o.step.penalty = Penalty::l1;
    o.step.method = method;
    o.step.beta = 0.5;
    o.step.lam = 0.1 * std::sqrt(double(view.size()));
    o.step.lr = 0.25;
    o.step.group_lasso = 0.25;
    if (!parts && variant > 0) o.misalign[0] = o.misalign[2] = 1;
    if (variant == 2) o.misalign[1] = o.misalign[3] = 1;
    x.tensors.push_back(make_tensor(o));
    // Every second group lies below the cut.
    TensorCase& t = *x.tensors.back();
    for (int64_t i = 0; i < o.numel(); ++i) {
      if (int64_t(definition::group_of(view, i)) % 2 != variant % 2) continue;
      t.set(0, i, t.numbers.w[size_t(i)] / 8);
      t.set(2, i, t.numbers.kept[size_t(i)] / 8);
    }
  }
  x.aim();
  machine.mode = {Mode::interleaved, Mode::any, Mode::some, 1};
  x.judge(parts ? machine.mode.order : Mode::reverse);
}

// Steps without a base: the pull alone, and terms that are left in the gradient.
void pull_alone(Dtype dtype, bool decoupled) {
  generator().seed(6);
  Experiment x(Action::step);
  const GroupView views[] = {{1, 1, 4, 64}, {1, 7, 5, 3}, {}};  // summed by the step's blocks, by a launch before, none
  for (const GroupView& view : views)
    for (const Method method : {Method::rvsm, Method::delayed, Method::admm})
      // The factors of groups hide the penalty from the step; single elements have no group lasso.
      for (const auto& [penalty, lasso] :
           {std::pair{Penalty::l1, 0.0}, {view.size() > 1 ? Penalty::l1 : Penalty::l0, 0.25}, {Penalty::tl1, 0.0}}) {
        TensorOptions o;
        o.dtype = o.noted = dtype;
        o.grouped = view.size() > 1;
        o.view = view;
        o.single = kHeadBodyTail;
        o.step.base = BaseKind::none;
        o.step.penalty = penalty;
        o.step.method = method;
        o.step.decoupled = decoupled;
        o.step.beta = 0.5;
        o.step.lam = 0.1 * std::sqrt(double(view.size()));
        o.step.lr = 1;  // a pull that is seen behind the rounding of a half type
        if (o.grouped) o.step.group_lasso = lasso;
        x.tensors.push_back(make_tensor(o));
      }
  x.grad_scale = 4;
  x.aim();
  machine.mode = {Mode::shuffled, Mode::any, Mode::some, 1};
  x.judge(Mode::reverse);
}

// Every base, in groups that are summed by the step's blocks and by a launch before, and in single elements.
void of_base(Dtype dtype, definition::Step base, bool decoupled) {
  generator().seed(7);
  Experiment x(Action::step);
  const GroupView views[] = {{1, 1, 4, 64}, {1, 1, 3, 37}, {1, 7, 5, 3}, {}};
  for (const GroupView& view : views)
    for (const Method method : {Method::rvsm, Method::admm})
      for (const double lasso : {0.0, 0.25}) {
        TensorOptions o;
        o.dtype = o.noted = dtype;
        o.grouped = view.size() > 1;
        o.view = view;
        o.single = kHeadBodyTail;
        o.step = base;
        o.step.penalty = Penalty::l1;
        o.step.method = method;
        o.step.decoupled = decoupled;
        o.step.beta = 0.5;
        o.step.lam = 0.1 * std::sqrt(double(view.size()));
        o.step.lr = 0.25;
        o.step.weight_decay = 0.125;
        if (o.grouped) o.step.group_lasso = lasso;
        x.tensors.push_back(make_tensor(o));
      }
  x.aim();
  machine.mode = {Mode::shuffled, Mode::any, Mode::some, 1};
  x.judge(Mode::reverse);
}

// Inf and NaN pass through where a term that would make NaN of them is off.
void beside_terms_off(bool grouped, double momentum, double decay) {
  generator().seed(2);
  Experiment x(Action::step);
  for (const Dtype dtype : {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16})
    for (const int64_t out_of_line : {0, 1})
      for (const int array : {0, 1, 3}) {
        TensorOptions o;
        o.dtype = o.noted = dtype;
        o.grouped = grouped;
        o.view = {1, 7, 5, 3};
        o.single = kHeadBodyTail;
        o.step.lr = 0.25;
        o.step.momentum = momentum;
        o.step.weight_decay = decay;
        for (int64_t& m : o.misalign) m = 1;
        o.misalign[0] += out_of_line;
        x.tensors.push_back(make_tensor(o));
        TensorCase& t = *x.tensors.back();
        for (int64_t i = 0; i < t.options.numel(); ++i)
          if (i % 3 == 0) t.set(array, i, i % 2 == 0 ? INFINITY : -INFINITY);
      }
  x.aim();
  machine.mode = {Mode::forward, Mode::exact, Mode::never, 1};
  x.judge_classes();
}

}  // namespace

std::vector<Case> small_cases() {
  std::vector<Case> all;
  const auto add = [&](const std::string& name, std::function<void()> run) { all.push_back({"small " + name, run}); };
  definition::Step base;
  add("cut of a prox", [=] { at_cut(Action::prox, false, base); });
  add("cut of a prox with a source", [=] { at_cut(Action::prox, true, base); });
  for (const bool decoupled : {false, true})
    for (const double momentum : {0.0, 0.5})
      for (const bool nesterov : {false, true}) {
        if (nesterov && momentum == 0) continue;
        base.decoupled = decoupled;
        base.momentum = momentum;
        base.nesterov = nesterov;
        add(text_of("cut, decoupled %d, momentum %g, nesterov %d", decoupled, momentum, nesterov),
            [=] { at_cut(Action::step, false, base); });
      }
  base = {};
  base.base = BaseKind::none;
  for (const bool decoupled : {false, true}) {
    base.decoupled = decoupled;
    add(text_of("cut, the pull alone, decoupled %d", decoupled), [=] { at_cut(Action::step, false, base); });
  }
  const auto of = [](const GroupView& v) {
    return text_of("%lld x %lld x %lld x %lld", (long long)v.batch, (long long)v.outer, (long long)v.groups,
                   (long long)v.inner);
  };
  for (const GroupView& v : kViews)
    for (const Action action : {Action::step, Action::prox})
      add("cut of groups, " + of(v) + (action == Action::step ? "" : ", prox"), [=] { groups_at_cut(action, v); });
  const auto add_sums = [&](const GroupView& v) {
    for (const Dtype dtype : {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16})
      for (const Method method : {Method::rvsm, Method::admm})
        add(text_of("sums of %s, method %d, ", kDtypeNames[int(dtype)], int(method)) + of(v),
            [=] { sums(dtype, method, v); });
  };
  for (const GroupView& v : kViews) add_sums(v);
  for (const GroupView& v : kViewsInParts) add_sums(v);
  for (const Dtype dtype : {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16})
    for (const bool decoupled : {false, true})
      add(text_of("pull alone of %s, decoupled %d", kDtypeNames[int(dtype)], decoupled),
          [=] { pull_alone(dtype, decoupled); });
  definition::Step bases[4];
  bases[1].momentum = 0.5;
  bases[2].base = bases[3].base = BaseKind::adamw;
  bases[3].amsgrad = true;
  for (const Dtype dtype : {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16})
    for (int i = 0; i < 4; ++i)
      for (const bool decoupled : {false, true})
        add(text_of("base %d of %s, decoupled %d", i, kDtypeNames[int(dtype)], decoupled),
            [=] { of_base(dtype, bases[i], decoupled); });
  for (const bool grouped : {false, true})
    for (const double momentum : {0.0, 0.5})
      for (const double decay : {0.0, 0.125})
        add(text_of("Inf, %s, momentum %g, decay %g", grouped ? "groups" : "elements", momentum, decay),
            [=] { beside_terms_off(grouped, momentum, decay); });
  return all;
}

}  // namespace rvsm::ptx
