// From the lines of a kernel to instructions. An opcode, a modifier or an operand that is not known here is refused.

#include <algorithm>
#include <unordered_map>

#include "code.h"

namespace rvsm::ptx {

namespace {

using Words = std::vector<std::string>;

// Operands: what commas divide, outside of brackets and braces, without blanks.
Words operands_of(const std::string& s) {
  Words parts;
  std::string part;
  int depth = 0;
  for (const char c : s) {
    depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (c == ',' && depth == 0) {
      parts.push_back(part);
      part.clear();
    } else if (c != ' ' && c != '\t') {
      part += c;
    }
  }
  if (!part.empty()) parts.push_back(part);
  return parts;
}

Words split_at_dots(const std::string& s) {
  Words parts(1);
  for (const char c : s) {
    if (c == '.')
      parts.emplace_back();
    else
      parts.back() += c;
  }
  return parts;
}

// Instructions whose operation follows from their name and type alone.
struct Form {
  Op is_signed, is_unsigned, f32, f64;
  int operands;
};

const std::unordered_map<std::string, Form>& forms() {
  static const std::unordered_map<std::string, Form> known = {
      {"add", {Op::add, Op::add, Op::add_f32, Op::add_f64, 2}},
      {"sub", {Op::subtract, Op::subtract, Op::subtract_f32, Op::subtract_f64, 2}},
      {"mul", {Op::none, Op::none, Op::multiply_f32, Op::multiply_f64, 2}},
      {"mul.lo", {Op::multiply_low, Op::multiply_low, Op::none, Op::none, 2}},
      {"mul.wide", {Op::multiply_wide_signed, Op::multiply_wide_unsigned, Op::none, Op::none, 2}},
      {"mul.hi", {Op::multiply_high_signed, Op::multiply_high_unsigned, Op::none, Op::none, 2}},
      {"mad.lo", {Op::multiply_add_low, Op::multiply_add_low, Op::none, Op::none, 3}},
      {"fma.rn", {Op::none, Op::none, Op::multiply_add_f32, Op::multiply_add_f64, 3}},
      {"fma.rn.sat", {Op::none, Op::none, Op::multiply_add_saturated_f32, Op::none, 3}},
      {"div", {Op::divide_signed, Op::divide_unsigned, Op::none, Op::none, 2}},
      {"div.full", {Op::none, Op::none, Op::divide_approx_f32, Op::none, 2}},
      {"div.rn", {Op::none, Op::none, Op::divide_f32, Op::divide_f64, 2}},
      {"rem", {Op::remainder_signed, Op::remainder_unsigned, Op::none, Op::none, 2}},
      {"rcp.approx", {Op::none, Op::none, Op::reciprocal_approx_f32, Op::none, 1}},
      {"rcp.approx.ftz", {Op::none, Op::none, Op::reciprocal_approx_flushed_f32, Op::none, 1}},
      {"rcp.rn", {Op::none, Op::none, Op::reciprocal_f32, Op::reciprocal_f64, 1}},
      {"sqrt.approx", {Op::none, Op::none, Op::root_approx_f32, Op::none, 1}},
      {"sqrt.approx.ftz", {Op::none, Op::none, Op::root_approx_flushed_f32, Op::none, 1}},
      {"sqrt.rn", {Op::none, Op::none, Op::root_f32, Op::root_f64, 1}},
      {"abs", {Op::absolute, Op::none, Op::absolute_f32, Op::absolute_f64, 1}},
      {"neg", {Op::negate, Op::none, Op::negate_f32, Op::negate_f64, 1}},
      {"copysign", {Op::none, Op::none, Op::copy_sign_f32, Op::copy_sign_f64, 2}},
      {"min", {Op::minimum_signed, Op::minimum_unsigned, Op::minimum_f32, Op::minimum_f64, 2}},
      {"max", {Op::maximum_signed, Op::maximum_unsigned, Op::maximum_f32, Op::maximum_f64, 2}},
      {"and", {Op::none, Op::bits_and, Op::none, Op::none, 2}},
      {"or", {Op::none, Op::bits_or, Op::none, Op::none, 2}},
      {"xor", {Op::none, Op::bits_xor, Op::none, Op::none, 2}},
      {"not", {Op::none, Op::bits_not, Op::none, Op::none, 1}},
      {"shl", {Op::none, Op::shift_left, Op::none, Op::none, 2}},
      {"shr", {Op::shift_right_signed, Op::shift_right_unsigned, Op::none, Op::none, 2}},
      {"bfe", {Op::none, Op::bit_field, Op::none, Op::none, 3}},
      {"bfi", {Op::none, Op::insert_bits, Op::none, Op::none, 4}},
      {"prmt", {Op::none, Op::permute_bytes, Op::none, Op::none, 3}},
      {"selp", {Op::select, Op::select, Op::select, Op::select, 3}},
  };
  return known;
}

const std::unordered_map<std::string, Comparison>& comparisons() {
  using C = Comparison;
  static const std::unordered_map<std::string, Comparison> known = {
      {"eq", C::equal},
      {"ne", C::not_equal},
      {"lt", C::less},
      {"le", C::less_equal},
      {"gt", C::greater},
      {"ge", C::greater_equal},
      {"lo", C::less},
      {"ls", C::less_equal},
      {"hi", C::greater},
      {"hs", C::greater_equal},
      {"equ", C::equal_or_nan},
      {"neu", C::not_equal_or_nan},
      {"ltu", C::less_or_nan},
      {"leu", C::less_equal_or_nan},
      {"gtu", C::greater_or_nan},
      {"geu", C::greater_equal_or_nan},
      {"nan", C::any_nan},
  };
  return known;
}

// By the words between "cvt" and the end; integers are told by their types instead.
const std::unordered_map<std::string, Op>& conversions() {
  static const std::unordered_map<std::string, Op> known = {
      {"f32.f16", Op::f16_to_f32},           {"f64.f32", Op::f32_to_f64},     {"rn.f32.f64", Op::f64_to_f32},
      {"rn.bf16.f32", Op::f32_to_bf16},      {"rn.f16.f32", Op::f32_to_f16},  {"rn.bf16x2.f32", Op::f32_pair_to_bf16},
      {"rn.f16x2.f32", Op::f32_pair_to_f16}, {"rzi.u32.f32", Op::f32_to_u32}, {"rzi.s32.f32", Op::f32_to_s32},
      {"rzi.s32.f64", Op::f64_to_s32},       {"rn.f32.s32", Op::s32_to_f32},  {"rn.f64.s32", Op::s32_to_f64},
  };
  return known;
}

int bits_of_type(const std::string& type) { return type == "pred" ? 1 : std::atoi(type.c_str() + 1); }

class Decoder {
 public:
  explicit Decoder(Kernel& kernel) : kernel_(kernel) {
    kernel_.code.clear();
    kernel_.registers.clear();
    kernel_.constants.clear();
  }

  void run() {
    for (const Line& line : kernel_.lines) {
      line_ = &line;
      x_ = {};
      x_.line = line.number;
      x_.used_bytes = line.used_bytes;
      instruction(predicate(line.text));
      kernel_.code.push_back(x_);
    }
    kernel_.executed.assign(kernel_.code.size(), 0);
    place_constants();
    find_contractions();
  }

 private:
  [[noreturn]] void refuse() const { cannot_decode(kernel_.file, line_->number, line_->text); }
  void require(bool known) const {
    if (!known) refuse();
  }

  // ---- operands ----

  // Constants are numbered -2, -3, ... until all registers are known.
  int32_t constant(uint64_t value) {
    const auto [at, is_new] = constants_.try_emplace(value, -2 - int32_t(kernel_.constants.size()));
    if (is_new) kernel_.constants.push_back(value);
    return at->second;
  }

  int32_t reg(const std::string& name) {
    const auto [at, is_new] = registers_.try_emplace(name, int32_t(kernel_.registers.size()));
    if (is_new) kernel_.registers.push_back(name);
    return at->second;
  }

  // A register, the address of a variable, or a number: 0f and 0d are the bits of a float and a double.
  int32_t operand(const std::string& s) {
    require(!s.empty());
    if (s[0] == '%' || s == "tmp") {
      require(s.find('.') == std::string::npos);  // a special register
      return reg(s);
    }
    if (s == kernel_.parameter) return constant(kParameterBase);
    if (const auto at = kernel_.shared.find(s); at != kernel_.shared.end()) return constant(kSharedBase + at->second);
    const bool bits = s.size() > 2 && s[0] == '0' && (s[1] == 'f' || s[1] == 'd');
    if (bits) return constant(std::stoull(s.substr(2), nullptr, 16));
    require(std::isdigit(s[0]) || (s[0] == '-' && s.size() > 1));
    size_t used = 0;
    const uint64_t value = s[0] == '-' ? uint64_t(std::stoll(s, &used, 0)) : std::stoull(s, &used, 0);
    require(used == s.size());
    return constant(value);
  }

  // One operand or {several}; how many.
  uint8_t list(const std::string& s, int32_t* to) {
    const Words parts = s[0] == '{' ? operands_of(s.substr(1, s.size() - 2)) : Words{s};
    require(parts.size() <= 4);
    for (size_t i = 0; i < parts.size(); ++i) to[i] = operand(parts[i]);
    return uint8_t(parts.size());
  }

  void address(const std::string& s) {
    require(s.size() > 2 && s[0] == '[');
    const std::string inside = s.substr(1, s.size() - 2);
    const size_t plus = inside.find('+');
    const std::string base = inside.substr(0, plus);
    require(base[0] == '%' || base == kernel_.parameter || kernel_.shared.count(base) != 0);
    x_.address = operand(base);
    x_.offset = plus == std::string::npos ? 0 : std::stoll(inside.substr(plus + 1));
  }

  // One result and `count` operands.
  void simple(Op op, int count, const Words& arguments) {
    require(op != Op::none && int(arguments.size()) == count + 1);
    x_.op = op;
    x_.results = 1;
    x_.result[0] = operand(arguments[0]);
    x_.operands = uint8_t(count);
    for (int i = 0; i < count; ++i) x_.operand[i] = operand(arguments[size_t(i) + 1]);
  }

  // ---- instructions ----

  // What follows the predicate.
  std::string predicate(const std::string& text) {
    if (text[0] != '@') return text;
    const size_t blank = text.find_first_of(" \t"), from = text[1] == '!' ? 2 : 1;
    x_.unless = from == 2;
    x_.predicate = reg(text.substr(from, blank - from));
    return text.substr(text.find_first_not_of(" \t", blank));
  }

  void instruction(const std::string& s) {
    const size_t blank = s.find_first_of(" \t");
    const std::string opcode = s.substr(0, blank);
    const Words arguments = blank == std::string::npos ? Words{} : operands_of(s.substr(blank + 1));
    const Words words = split_at_dots(opcode);
    const std::string& name = words[0];
    x_.bits = uint8_t(bits_of_type(words.back()));
    x_.is_signed = words.back()[0] == 's';
    if (name == "ld" || name == "st") return access(words, arguments);
    if (name == "mov") return move(words, arguments);
    if (name == "setp") return comparison(words, arguments);
    if (name == "cvt") return conversion(opcode, words, arguments);
    if (opcode == "cvta.to.global.u64") return simple(Op::move, 1, arguments);
    if (opcode == "bra" || opcode == "bra.uni") return branch(arguments);
    if (opcode == "bar.sync") {
      require(arguments == Words{"0"});
      x_.op = Op::barrier;
    } else if (opcode == "ret") {
      x_.op = Op::leave;
    } else {
      arithmetic(opcode, words, arguments);
    }
  }

  void arithmetic(const std::string& opcode, const Words& words, const Words& arguments) {
    require(words.size() >= 2);
    const std::string& type = words.back();
    // The name with its modifiers, or without a rounding to nearest, which says that nothing is contracted.
    std::string name = opcode.substr(0, opcode.size() - type.size() - 1);
    if (name == "add.rn" || name == "sub.rn" || name == "mul.rn") {
      x_.rounds = true;
      name.resize(3);
    }
    const auto form = forms().find(name);
    require(form != forms().end());
    const Form& f = form->second;
    if (type == "f32") return simple(f.f32, f.operands, arguments);
    if (type == "f64") return simple(f.f64, f.operands, arguments);
    require(type[0] == 's' || type[0] == 'u' || type[0] == 'b' || type == "pred");
    simple(type[0] == 's' ? f.is_signed : f.is_unsigned, f.operands, arguments);
  }

  void access(const Words& words, const Words& arguments) {
    require(words.size() >= 3 && arguments.size() == 2);
    const bool load = words[0] == "ld";
    for (size_t i = 2; i + 1 < words.size(); ++i) require(words[i] == "v2" || words[i] == "v4" || words[i] == "nc");
    const std::string& space = words[1];
    if (space == "param" && load) x_.op = Op::load_param;
    if (space == "shared") x_.op = load ? Op::load_shared : Op::store_shared;
    if (space == "global") x_.op = load ? Op::load_global : Op::store_global;
    require(x_.op != Op::none);
    require(x_.bits >= 16 || space != "shared");  // races there are looked for in larger pieces
    address(arguments[load ? 1 : 0]);
    if (load) {
      x_.results = x_.elements = list(arguments[0], x_.result);
    } else {
      x_.operands = x_.elements = list(arguments[1], x_.operand);
    }
  }

  void move(const Words& words, const Words& arguments) {
    require(words.size() == 2 && arguments.size() == 2);
    const std::string &to = arguments[0], &from = arguments[1];
    if (to[0] == '{' || from[0] == '{') {
      x_.op = to[0] == '{' ? Op::unpack : Op::pack;
      x_.results = list(to, x_.result);
      x_.operands = list(from, x_.operand);
      require((x_.bits == 32 || x_.bits == 64) && x_.results + x_.operands == 3);
    } else if (from == "%tid.x" || from == "%ctaid.x") {
      simple(from == "%tid.x" ? Op::thread_index : Op::block_index, 0, {to});
    } else {
      simple(Op::move, 1, arguments);
    }
  }

  void comparison(const Words& words, const Words& arguments) {
    require(words.size() == 3);
    const auto known = comparisons().find(words[1]);
    require(known != comparisons().end());
    x_.comparison = known->second;
    const std::string& type = words[2];
    simple(type == "f32" ? Op::compare_f32 : type == "f64" ? Op::compare_f64 : Op::compare_integers, 2, arguments);
  }

  void conversion(const std::string& opcode, const Words& words, const Words& arguments) {
    const auto known = conversions().find(opcode.substr(4));
    if (known != conversions().end()) return simple(known->second, int(arguments.size()) - 1, arguments);
    require(words.size() == 3);
    const std::string &to = words[1], &from = words[2];
    require((to[0] == 'u' || to[0] == 's') && (from[0] == 'u' || from[0] == 's'));
    simple(Op::integer_to_integer, 1, arguments);
    x_.bits = uint8_t(bits_of_type(to));
    x_.source_bits = uint8_t(bits_of_type(from));
  }

  void branch(const Words& arguments) {
    require(arguments.size() == 1);
    const auto label = kernel_.labels.find(arguments[0]);
    require(label != kernel_.labels.end());
    x_.op = Op::branch;
    x_.target = label->second;
  }

  // ---- afterwards ----

  void place_constants() {
    const auto place = [&](int32_t& r) {
      if (r <= -2) r = int32_t(kernel_.registers.size()) - 2 - r;
    };
    for (Instruction& x : kernel_.code) {
      for (int32_t& r : x.operand) place(r);
      place(x.address);
    }
  }

  // ptxas may contract a product into a sum where neither has a rounding modifier. Looked for in the straight line
  // before the sum, where the factors still hold what was multiplied.
  void find_contractions() {
    std::vector<bool> begins(kernel_.code.size() + 1, false);  // a basic block
    for (const auto& [name, at] : kernel_.labels) begins[size_t(at)] = true;
    for (size_t i = 0; i < kernel_.code.size(); ++i) {
      const Op op = kernel_.code[i].op;
      if (op == Op::branch || op == Op::barrier || op == Op::leave) begins[i + 1] = true;
    }
    for (size_t i = 0; i < kernel_.code.size(); ++i) {
      Instruction& x = kernel_.code[i];
      const bool f32 = x.op == Op::add_f32 || x.op == Op::subtract_f32;
      if (x.rounds || (!f32 && x.op != Op::add_f64 && x.op != Op::subtract_f64)) continue;
      const Op product = f32 ? Op::multiply_f32 : Op::multiply_f64;
      for (int which = 1; which >= 0 && x.product < 0; --which) {
        const Instruction* const y = defined_before(i, x.operand[which], begins);
        if (y == nullptr || y->op != product || y->rounds) continue;
        x.product = int8_t(which);
        std::copy(y->operand, y->operand + 2, x.factor);
      }
    }
  }

  // The instruction of the same basic block that a register comes from, if its operands are unchanged since.
  const Instruction* defined_before(size_t i, int32_t r, const std::vector<bool>& begins) const {
    const auto defines = [](const Instruction& y, int32_t q) {
      return std::find(y.result, y.result + y.results, q) != y.result + y.results;
    };
    for (size_t j = i; j > 0 && !begins[j]; --j) {
      const Instruction& y = kernel_.code[j - 1];
      if (!defines(y, r)) continue;
      for (size_t q = j; q < i; ++q)
        for (int k = 0; k < y.operands; ++k)
          if (defines(kernel_.code[q], y.operand[k])) return nullptr;
      return &y;
    }
    return nullptr;
  }

  Kernel& kernel_;
  const Line* line_ = nullptr;
  Instruction x_;
  std::unordered_map<std::string, int32_t> registers_;
  std::unordered_map<uint64_t, int32_t> constants_;
};

}  // namespace

void decode(Kernel& kernel) { Decoder(kernel).run(); }

}  // namespace rvsm::ptx
