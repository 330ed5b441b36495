// A module of PTX: the lines of each kernel, and the instructions that the decoder makes of them.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "memory.h"

namespace rvsm::ptx {

enum class Op : uint8_t {
  none,
  // memory and registers
  load_param,
  load_shared,
  load_global,
  store_shared,
  store_global,
  move,
  thread_index,
  block_index,
  pack,
  unpack,
  select,
  // integers
  add,
  subtract,
  multiply_low,
  multiply_wide_signed,
  multiply_wide_unsigned,
  multiply_high_signed,
  multiply_high_unsigned,
  multiply_add_low,
  divide_signed,
  divide_unsigned,
  remainder_signed,
  remainder_unsigned,
  negate,
  absolute,
  minimum_signed,
  minimum_unsigned,
  maximum_signed,
  maximum_unsigned,
  bits_and,
  bits_or,
  bits_xor,
  bits_not,
  shift_left,
  shift_right_signed,
  shift_right_unsigned,
  bit_field,
  insert_bits,
  permute_bytes,
  // float32
  add_f32,
  subtract_f32,
  multiply_f32,
  multiply_add_f32,
  multiply_add_saturated_f32,
  divide_approx_f32,
  divide_f32,
  reciprocal_approx_f32,
  reciprocal_approx_flushed_f32,
  reciprocal_f32,
  root_approx_f32,
  root_approx_flushed_f32,
  root_f32,
  absolute_f32,
  negate_f32,
  copy_sign_f32,
  minimum_f32,
  maximum_f32,
  // float64
  add_f64,
  subtract_f64,
  multiply_f64,
  multiply_add_f64,
  divide_f64,
  reciprocal_f64,
  root_f64,
  absolute_f64,
  negate_f64,
  copy_sign_f64,
  minimum_f64,
  maximum_f64,
  // comparisons and conversions
  compare_integers,
  compare_f32,
  compare_f64,
  integer_to_integer,
  f16_to_f32,
  f32_to_u32,
  f32_to_s32,
  f64_to_s32,
  s32_to_f32,
  s32_to_f64,
  f32_to_f64,
  f64_to_f32,
  f32_to_bf16,
  f32_pair_to_bf16,
  f32_to_f16,
  f32_pair_to_f16,
  // control
  branch,
  barrier,
  leave,
};

// The last seven are true where an operand is NaN.
enum class Comparison : uint8_t {
  equal,
  not_equal,
  less,
  less_equal,
  greater,
  greater_equal,
  equal_or_nan,
  not_equal_or_nan,
  less_or_nan,
  less_equal_or_nan,
  greater_or_nan,
  greater_equal_or_nan,
  any_nan,
};

// Registers are numbers into those of a thread; constants stand behind the registers.
struct Instruction {
  Op op = Op::none;
  Comparison comparison = Comparison::equal;
  uint8_t bits = 32;         // width of the operation, or of an element of an access
  uint8_t source_bits = 32;  // of a conversion
  bool is_signed = false;
  bool rounds = false;   // a rounding modifier forbids contraction
  bool unless = false;   // the predicate is negated
  uint8_t elements = 1;  // of an access
  uint8_t results = 0, operands = 0;
  int8_t product = -1;  // of a sum: the operand that is a product and may be contracted
  int32_t predicate = -1;
  int32_t result[4] = {-1, -1, -1, -1}, operand[4] = {-1, -1, -1, -1};
  int32_t address = -1;                // register of an access
  int32_t factor[2] = {-1, -1};        // of that product
  int64_t offset = 0;                  // of an access
  uint64_t used_bytes = ~uint64_t(0);  // of a load, as nvcc's pragma says
  int32_t target = -1;                 // of a branch
  int32_t line = 0;                    // in the file
  Allocation* last = nullptr;          // the array that this instruction accessed last
};

// One instruction in the text.
struct Line {
  std::string text;
  int number;  // in the file
  uint64_t used_bytes;
};

struct Kernel {
  std::string file, name;
  uint64_t parameter_bytes = 0, shared_bytes = 0;
  std::string parameter;
  std::map<std::string, uint64_t> shared;  // variables by offset
  std::vector<Line> lines;
  std::map<std::string, int> labels;  // index of the line that follows

  // What decode() makes of these.
  std::vector<Instruction> code;
  std::vector<std::string> registers;
  std::vector<uint64_t> constants;
  std::vector<uint64_t> executed;  // times, by instruction
};

// Where the address spaces begin, as far as a kernel can tell.
constexpr uint64_t kParameterBase = 0x02000000, kSharedBase = 0x01000000;

// Leaves the program with status 2 at a line that is not understood.
void decode(Kernel& kernel);

struct Module {
  std::map<std::string, std::unique_ptr<Kernel>> kernels;  // by mangled name

  // Adds the kernels of a file that nvcc -ptx wrote. Leaves the program with status 2 where a line is not understood.
  void load(const std::string& path);
};

[[noreturn]] void cannot_decode(const std::string& file, int line, const std::string& text);

}  // namespace rvsm::ptx
