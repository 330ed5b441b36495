// A job by the interpreter, by the host and by the definition, number by number.

#include <algorithm>
#include <cmath>
#include <string_view>

#include "cases.h"

namespace rvsm::ptx {

Statistics statistics;
bool run_in_second_order = true;

// ---- runs -----------------------------------------------------------------------------------------------------------

void Experiment::aim() {
  for (auto& t : tensors) {
    for (Array* a : t->arrays) a->keep();
    t->counter.keep();
    t->args = make_args(t->options, action_,
                        {t->w.at, t->m.at, t->kept.at, t->g.at, t->v.at, t->largest.at, t->cut.at,
                         reinterpret_cast<float*>(t->counter.at)},
                        with_source);
    t->args.active = t->active;
    t->args.group = t->group;
  }
  grad_scale_.make(sizeof(float), 0);
  found_inf_.make(sizeof(float), sizeof(float));
  total_.make(sizeof(double), 0);
  put<float>(grad_scale_.at, 0, grad_scale);
  put<float>(found_inf_.at, 0, found_inf == FoundInf::positive ? 1 : 0);
}

// Only what an active tensor has may be touched.
void Experiment::register_memory() {
  Memory& memory = machine.memory;
  memory.clear();
  int number = 0;
  for (const auto& t : tensors) {
    const std::string name = "/" + std::to_string(number++) + " " + kDtypeNames[int(t->options.dtype)];
    if (!t->active) continue;
    const bool only_written = action_ == Action::prox && with_source;
    const Memory::Access of_w = action_ == Action::penalty ? Memory::read_only
                                : only_written             ? Memory::not_yet_written
                                                           : Memory::read_write;
    const Addresses at = addresses_of(t->args);
    memory.add(at.w, t->w.bytes, "w" + name, of_w);
    const bool writes_grad = action_ == Action::step && t->options.step.writes_grad();
    const Memory::Access of_g = writes_grad ? Memory::read_write : Memory::read_only;
    if (at.g != nullptr) memory.add(at.g, t->g.bytes, "g" + name, of_g);
    if (at.m != nullptr) memory.add(at.m, t->m.bytes, "m" + name, Memory::read_write);
    if (at.v != nullptr) memory.add(at.v, t->v.bytes, "v" + name, Memory::read_write);
    if (at.largest != nullptr) memory.add(at.largest, t->largest.bytes, "largest" + name, Memory::read_write);
    if (at.kept != nullptr) memory.add(at.kept, t->kept.bytes, "kept" + name, Memory::read_write);
    if (at.counter != nullptr) memory.add(at.counter, t->counter.bytes, "counter" + name, Memory::read_write);
    if (at.cut != nullptr) memory.add(at.cut, t->cut.bytes, "cut" + name, Memory::read_only);
  }
  memory.add(grad_scale_.at, grad_scale_.bytes, "grad_scale", Memory::read_only);
  memory.add(found_inf_.at, found_inf_.bytes, "found_inf", Memory::read_only);
  memory.add(total_.at, total_.bytes, "total", Memory::not_yet_written);
  memory.add(scratch_.at, scratch_.bytes, "scratch", Memory::not_yet_written);
}

Experiment::Bytes Experiment::run(const cuda::Kernels& kernels, bool interpreted) {
  for (auto& t : tensors) {
    for (Array* a : t->arrays) a->restore();
    t->counter.restore();
  }
  std::memset(total_.at, 0x7f, total_.bytes);
  cuda::Launches job(action_, kernels);
  for (const auto& t : tensors) {
    job.tensors.push_back(t->args);
    if (t->options.wide) job.tensors.back().dtype = t->options.noted;
  }
  job.divide(limit);
  for (size_t i = 0; i < tensors.size(); ++i) job.tensors[i].dtype = tensors[i]->options.dtype;
  scratch_.make(size_t(job.scratch_bytes()), 0);
  std::memset(scratch_.at, 0x7f, scratch_.bytes);
  if (interpreted) register_memory();
  job.set_scratch(scratch_.at);
  const auto number = [](const Array& a, bool given) { return given ? reinterpret_cast<float*>(a.at) : nullptr; };
  job.run({}, {number(grad_scale_, grad_scale != 0), number(found_inf_, found_inf != FoundInf::absent)},
          action_ == Action::penalty ? reinterpret_cast<double*>(total_.at) : nullptr);
  for (const auto& t : tensors) {
    if (t->args.counter == nullptr) continue;
    const bool counts = t->active && t->options.numel() > 0 && found_inf != FoundInf::positive;
    const double before = get<float>(t->counter.before.data(), 0), now = get<float>(t->counter.at, 0);
    if (now != before + counts) wrong("count", text_of("%g steps after %g: ", now, before) + t->text);
  }
  Bytes all;
  for (const auto& t : tensors)
    for (const Array* a : t->arrays) all.push_back(a->now());
  all.push_back(total_.now());
  for (size_t i = 0; interpreted && i < all.size(); ++i)
    statistics.digest = mix(statistics.digest ^ std::hash<std::string_view>()({all[i].data(), all[i].size()}));
  return all;
}

// ---- judgement ------------------------------------------------------------------------------------------------------

namespace {

// Half a unit of the last place where numbers are stored in fewer digits than they are computed in.
template <class S>
double storage_rounding(double x) {
  if (sizeof(S) > 2) return 0;
  const bool f16 = std::is_same_v<S, Float16>;
  int exponent;
  std::frexp(x, &exponent);
  return std::ldexp(0.5, std::max(exponent - (f16 ? 11 : 8), f16 ? -24 : -133));
}

// What the arithmetic may be off by: relative to the largest term, absolute, and of a number that meets a cut. The
// first is less than what is promised to users (1e-6 and 1e-14), about one and a half times the largest that was met.
template <class S>
constexpr double kRelative = sizeof(S) == 8 ? 1e-15 : 6e-7;
template <class S>
constexpr double kAbsolute = sizeof(S) == 8 ? 1e-300 : 1e-37;
constexpr double error_at_cut(Dtype dtype) { return dtype == Dtype::f64 ? 4 * 0x1p-52 : 4 * 0x1p-23; }

// An element of one array by the definition.
struct Expected {
  double low, high, scale;
};

// `exact`: of a prox whose u is 0 or the number itself, to the last bit.
Expected expected(const definition::Result& r, int array, bool prox, bool exact, double read) {
  const auto of = [&](const definition::Element& e) {
    const definition::Real all[] = {e.w, e.m, e.kept, e.g, e.v, e.largest};
    return double(all[array]);
  };
  if (!prox) return {of(r.low), of(r.high), of(r.scale)};
  return {double(std::min(r.u.low, r.u.high)), double(std::max(r.u.low, r.u.high)), exact ? 0 : std::fabs(read)};
}

}  // namespace

void Experiment::judge(Mode::Order second) {
  const Bytes got = interpret();
  if (run_in_second_order && second != machine.mode.order) {
    machine.mode.order = second;
    if (interpret() != got) wrong("order", "another order of threads gives other bits");
  }
  const Bytes host = on_host();
  for (size_t i = 0; i < tensors.size(); ++i) judge_tensor(i, got, host);
  if (action_ == Action::penalty) judge_value(got, host);
}

void Experiment::judge_classes() {
  const Bytes got = interpret(), host = on_host();
  for (size_t i = 0; i < kArrays * tensors.size(); ++i) {
    const TensorCase& t = *tensors[i / kArrays];
    with_storage(t.options.dtype, [&](auto s) {
      using S = decltype(s);
      // Beside the largest finite number one rounding decides whether a result overflows.
      const double large = sizeof(S) == 8 ? INFINITY : sizeof(S) == 4 ? 3.4e38 : 6e4;
      for (size_t e = 0; e < size_t(t.options.numel()); ++e) {
        const double x = get<S>(got[i].data(), e), y = get<S>(host[i].data(), e);
        ++statistics.compared;
        const bool same = std::isnan(x) ? std::isnan(y) : std::isinf(x) || std::isinf(y) ? x == y : !std::isnan(y);
        if (same || (std::fabs(x) > large && std::fabs(y) > large)) continue;
        const definition::Arrays& n = t.numbers;
        wrong(std::string("special ") + kDtypeNames[int(t.options.dtype)],
              text_of("%s[%zu] is %.9g, host %.9g; w %.9g g %.9g m %.9g kept %.9g; ", kArrayNames[i % kArrays], e, x, y,
                      n.w[e], n.g[e], n.m[e], n.kept[e]) +
                  t.text);
      }
    });
  }
}

void Experiment::judge_value(const Bytes& got, const Bytes& host) {
  definition::Real want = 0, slack = 0;
  bool any = false;
  for (const auto& t : tensors) {
    if (!t->active || t->options.numel() == 0) continue;
    want += definition::value(t->options, t->numbers.w, t->options.dtype == Dtype::f64 ? 1e-14 : 6e-7, slack);
    any = true;
  }
  if (!any) return;
  const double value = get<double>(got.back().data(), 0), on_host = get<double>(host.back().data(), 0);
  const double off = std::fabs(value - double(want)), allowed = double(slack) + 1e-12 * std::fabs(double(want));
  if (!(off <= allowed))
    wrong("penalty", text_of("a penalty of %.17g, by definition %.17g (allowed %.3g), host %.17g", value, double(want),
                             allowed, on_host));
  if (!(std::fabs(value - on_host) <= 1e-6 * (1 + std::fabs(on_host))))
    wrong("penalty of the host", text_of("a penalty of %.17g, host %.17g", value, on_host));
}

void Experiment::judge_tensor(size_t i, const Bytes& got, const Bytes& host) {
  const TensorCase& t = *tensors[i];
  const TensorOptions& o = t.options;
  const Addresses array = addresses_of(t.args);
  const bool prox = action_ == Action::prox;
  const bool idle = !t.active || o.numel() == 0 || found_inf == FoundInf::positive || action_ == Action::penalty;
  const bool written[] = {!idle,
                          !idle && array.m != nullptr,
                          !idle && array.kept != nullptr,
                          !idle && !prox && o.step.writes_grad(),
                          !idle && array.v != nullptr,
                          !idle && array.largest != nullptr};
  for (size_t k = 0; k < kArrays; ++k)
    if (!written[k] && got[kArrays * i + k] != t.arrays[k]->before)
      wrong("untouched", std::string(kArrayNames[k]) + " was changed: " + t.text);
  if (idle) return;
  const std::string type = std::string(o.grouped ? "grouped " : "elements ") + kDtypeNames[int(o.dtype)];
  ++statistics.tensors[type];
  const bool exact = prox && (o.penalty() == Penalty::l0 || o.penalty() == Penalty::none);
  definition::Arrays numbers = t.numbers;
  if (prox && with_source) numbers.w = numbers.g;
  const auto want = definition::run(o, numbers, t.cut_value, grad_scale, error_at_cut(o.dtype));
  with_storage(o.dtype, [&](auto s) {
    using S = decltype(s);
    for (int k = 0; k < kArrays; ++k) {
      if (!written[k]) continue;
      const char *const at = got[kArrays * i + size_t(k)].data(), *const host_at = host[kArrays * i + size_t(k)].data();
      for (size_t e = 0; e < size_t(o.numel()); ++e) {
        const double x = get<S>(at, e), y = get<S>(host_at, e);
        const Expected d = expected(want[e], k, prox, exact, numbers.w[e]);
        const auto described = [&] {
          return text_of("%s[%zu] is %.9g, host %.9g, by definition in [%.9g, %.9g]; w %.9g g %.9g m %.9g kept %.9g; ",
                         kArrayNames[k], e, x, y, d.low, d.high, numbers.w[e], numbers.g[e], numbers.m[e],
                         numbers.kept[e]) +
                 t.text;
        };
        const double off = x < d.low ? d.low - x : x > d.high ? x - d.high : std::isnan(x) ? x : 0;
        const double rounding = exact ? 0 : storage_rounding<S>(std::max(std::fabs(x), std::fabs(d.high)));
        const double bound = kRelative<S> * d.scale + kAbsolute<S>;
        if (!(off <= bound + rounding)) wrong("definition " + type + " " + kArrayNames[k], described());
        double& worst = statistics.worst[k][int(o.dtype)];
        worst = std::max(worst, (off - rounding) / bound);
        // Beside the cut the host may decide otherwise, within the range.
        const bool at_cut = std::fabs(double(want[e].u.high - want[e].u.low)) > 1e-3 * std::fabs(numbers.w[e]);
        const double apart = std::fabs(x - y);
        if (!at_cut) {
          if (!(apart <= 2 * (bound + rounding)) && !(off <= bound + rounding && d.high - d.low >= apart))
            wrong("host " + type, described());
          if (prox && (x == 0) != (y == 0) && !(d.low <= 0 && d.high >= 0)) wrong("support " + type, described());
          statistics.worst_from_host = std::max(statistics.worst_from_host, (apart - 2 * rounding) / bound);
        }
        ++statistics.compared;
        statistics.near_cut += at_cut;
        statistics.unlike_host += x != y;
      }
    }
  });
}

}  // namespace rvsm::ptx
