// Executes a launch: all threads of its blocks, one instruction at a time.
#pragma once

#include <random>
#include <string>
#include <vector>

#include "code.h"
#include "findings.h"
#include "memory.h"
#include "numbers.h"

namespace rvsm::ptx {

class Machine {
 public:
  Memory memory;
  Findings findings;
  Mode mode;
  uint64_t instructions = 0;  // executed
  // A launch that passes this number is given up, with a finding. The longest of a pass has a tenth of it.
  uint64_t most_instructions = 2'000'000'000;

  // What a kernel is given. `filled`: the bytes of the parameters that mean something.
  struct Parameters {
    const void* at;
    size_t bytes;
    std::vector<bool> filled;
  };

  // A case begins: what is drawn at random no longer depends on the launches before it.
  void begin_case() { launch_of_case_ = 0; }

  // `blocks`: those to run, in this order.
  void launch(Kernel& kernel, const Parameters& parameters, const std::vector<uint32_t>& blocks, int threads);

 private:
  enum class State { running, waiting, done };

  void run_block(uint32_t block);
  std::vector<int> run_in_turn(const std::vector<int>& threads);
  std::vector<int> run_interleaved(std::vector<int> threads);
  State run(int thread, uint64_t budget);
  uint64_t result_of(const Instruction& x, const uint64_t* registers, int index, int thread);
  uint64_t quotient(const Instruction& x, uint64_t a, uint64_t b, int index, int thread);
  template <class T>
  T sum(const Instruction& x, T a, T b, T p, T q) const;
  void load(Instruction& x, uint64_t* registers, uint8_t* known, int index, int thread);
  void store(Instruction& x, const uint64_t* registers, int index, int thread);
  const uint8_t* parameter(const Instruction& x, uint64_t address, int index, int thread);
  uint8_t* global(Instruction& x, uint64_t address, bool write, int index, int thread);
  uint8_t* shared(const Instruction& x, uint64_t address, bool write, int index, int thread);
  void report(const char* kind, int index, int thread, const std::string& what);

  Kernel* kernel_ = nullptr;
  const Parameters* parameters_ = nullptr;
  int threads_ = 0;
  uint64_t given_up_at_ = 0;
  size_t stride_ = 0;             // registers and constants of a thread
  std::vector<uint64_t> values_;  // by thread and register
  std::vector<uint8_t> known_;    // whether the register was written
  std::vector<int> next_;         // instruction, by thread
  std::vector<uint8_t> shared_, shared_written_;
  std::vector<Touch> shared_touches_;  // by four bytes
  std::mt19937_64 random_;
  uint32_t launch_ = 0, blocks_ = 0;  // of all cases: they tell the accesses of one from those of another
  uint64_t launch_of_case_ = 0;
  uint32_t block_ = 0;
  uint16_t interval_ = 0;  // barriers that the block has passed
};

}  // namespace rvsm::ptx
