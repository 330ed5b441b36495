// Cases that are made by hand: numbers that meet a cut exactly, and Inf beside terms that are off.

#include <cmath>

#include "cases.h"

namespace rvsm::ptx {

namespace {

// Single elements before a boundary, vectors, and single elements behind them.
constexpr int64_t kHeadBodyTail = 61;

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

// w, or w + kept of admm, is the cut or the number before or after it.
void meet_cut(TensorCase& t, double cut) {
  for (int64_t i = 0; i < t.options.numel(); ++i) {
    const double r = i % 3 == 0 ? cut : next_in(t.options.dtype, cut, i % 3 == 1 ? 2 * cut : 0);
    const double kept = t.options.step.method == Method::admm && i % 2 == 0 ? cut / 2 : 0;
    const double sign = i % 4 < 2 ? 1 : -1;
    t.set(0, i, sign * (r - kept));
    if (t.options.step.method == Method::admm) t.set(2, i, sign * kept);
  }
}

// Every penalty, type and method at its cut. Ties go to zero, in every engine alike.
void at_cut(Action action, bool decoupled, double momentum, bool nesterov) {
  generator().seed(1);
  Experiment x(action);
  for (const Dtype dtype : {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16})
    for (const Cut& c : kCuts)
      for (const Method method : {Method::rvsm, Method::delayed, Method::admm})
        for (const bool topk : {false, true})
          for (const int64_t out_of_line : {0, 1}) {
            if (topk && c.penalty != Penalty::l0) continue;
            if (action != Action::step && (method != Method::rvsm || topk)) continue;
            TensorOptions o;
            o.dtype = dtype;
            o.single = kHeadBodyTail;
            o.step.penalty = c.penalty;
            o.step.lam = c.tau;
            o.step.beta = 1;
            o.step.a = c.a;
            o.step.lr = 0.25;
            o.step.momentum = momentum;
            o.step.nesterov = nesterov;
            o.step.decoupled = decoupled;
            o.step.method = method;
            o.step.topk = topk;
            for (int64_t& m : o.misalign) m = 1;
            o.misalign[0] += out_of_line;
            x.tensors.push_back(make_tensor(o));
            TensorCase& t = *x.tensors.back();
            if (topk) {
              with_storage(dtype, [&](auto s) { put<Arithmetic<decltype(s)>>(t.cut.at, 0, c.cut); });
              t.cut_value = c.cut;
            }
            meet_cut(t, c.cut);
          }
  x.aim();
  machine.mode = {Mode::forward, Mode::exact, Mode::never, 1};
  x.judge(Mode::forward);
}

// Inf and NaN pass through where a term that would make NaN of them is off.
void beside_terms_off(bool grouped, double momentum, double decay) {
  generator().seed(2);
  Experiment x(Action::step);
  for (const Dtype dtype : {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16})
    for (const int64_t out_of_line : {0, 1})
      for (const int array : {0, 1, 3}) {
        TensorOptions o;
        o.dtype = dtype;
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
          if (i % 2 == 0) t.set(array, i, i % 4 == 0 ? INFINITY : -INFINITY);
      }
  x.aim();
  machine.mode = {Mode::forward, Mode::exact, Mode::never, 1};
  x.judge_classes();
}

}  // namespace

std::vector<Case> small_cases() {
  std::vector<Case> all;
  const auto add = [&](const std::string& name, std::function<void()> run) { all.push_back({"small " + name, run}); };
  add("cut of a prox", [] { at_cut(Action::prox, true, 0, false); });
  for (const bool decoupled : {false, true}) {
    const std::string name = decoupled ? "cut, decoupled" : "cut, coupled";
    add(name, [=] { at_cut(Action::step, decoupled, 0, false); });
    add(name + ", momentum", [=] { at_cut(Action::step, decoupled, 0.5, false); });
    add(name + ", nesterov", [=] { at_cut(Action::step, decoupled, 0.5, true); });
  }
  for (const bool grouped : {false, true})
    for (const double momentum : {0.0, 0.5})
      for (const double decay : {0.0, 0.125})
        add(text_of("Inf, %s, momentum %g, decay %g", grouped ? "groups" : "elements", momentum, decay),
            [=] { beside_terms_off(grouped, momentum, decay); });
  return all;
}

}  // namespace rvsm::ptx
