// Launches, blocks, threads and barriers, and the accesses to memory. What an instruction computes is in results.cpp.

#include "machine.h"

#include <algorithm>
#include <cstring>

namespace rvsm::ptx {

namespace {

std::string text_of(const char* format, auto... arguments) {
  char buffer[240];
  std::snprintf(buffer, sizeof buffer, format, arguments...);
  return buffer;
}

size_t bytes_of(const Instruction& x) { return size_t(x.bits / 8) * x.elements; }

}  // namespace

void Machine::report(const char* kind, int index, int thread, const std::string& what) {
  const int line = kernel_->code[size_t(index)].line;
  findings.add(text_of("%s %s:%d", kind, kernel_->name.c_str(), line),
               what + text_of(" (block %u, thread %d, line %d: ", block_, thread, line) +
                   kernel_->lines[size_t(index)].text + ")");
}

// ---- launches and blocks --------------------------------------------------------------------------------------------

void Machine::launch(Kernel& kernel, const Parameters& parameters, const std::vector<uint32_t>& blocks, int threads) {
  memory.sort();
  ++launch_;
  ++launch_of_case_;
  for (Instruction& x : kernel.code) x.last = nullptr;
  kernel_ = &kernel;
  parameters_ = &parameters;
  threads_ = threads;
  given_up_at_ = instructions + most_instructions;
  const size_t registers = kernel.registers.size();
  stride_ = registers + kernel.constants.size();
  values_.assign(stride_ * size_t(threads), 0);
  known_.assign(stride_ * size_t(threads), 1);
  for (size_t t = 0; t < size_t(threads); ++t)
    std::copy(kernel.constants.begin(), kernel.constants.end(),
              values_.begin() + std::ptrdiff_t(stride_ * t + registers));
  shared_.assign(kernel.shared_bytes, 0xcd);
  shared_touches_.resize(std::max<size_t>(shared_touches_.size(), kernel.shared_bytes / 4 + 1));
  random_.seed(mode.seed * 1000003 + launch_of_case_);
  for (const uint32_t block : blocks) run_block(block);
}

// Runs the threads from barrier to barrier, each time in the order that the mode asks for.
void Machine::run_block(uint32_t block) {
  block_ = block;
  interval_ = 0;
  shared_written_.assign(kernel_->shared_bytes, 0);
  for (size_t t = 0; t < size_t(threads_); ++t)
    std::fill_n(known_.begin() + std::ptrdiff_t(stride_ * t), kernel_->registers.size(), uint8_t(0));
  next_.assign(size_t(threads_), 0);
  ++blocks_;
  std::vector<int> alive(static_cast<size_t>(threads_));
  for (int t = 0; t < threads_; ++t) alive[size_t(t)] = t;
  while (!alive.empty()) {
    if (mode.order == Mode::reverse) std::reverse(alive.begin(), alive.end());
    if (mode.order == Mode::shuffled) std::shuffle(alive.begin(), alive.end(), random_);
    alive = mode.order == Mode::interleaved ? run_interleaved(alive) : run_in_turn(alive);
    std::sort(alive.begin(), alive.end());
    for (const int t : alive) {
      const int here = next_[size_t(t)] - 1;
      if (alive.size() != size_t(threads_)) {
        report("barrier", here, t, "threads of the block are gone while others wait at a barrier");
        break;
      }
      if (next_[size_t(t)] == next_[size_t(alive[0])]) continue;
      report("barrier", here, t, "threads of the block wait at different barriers");
      break;
    }
    if (++interval_ == 0xffff) return report("barrier", 0, 0, "more barriers than the shadows of memory can count");
  }
}

// Runs each thread to the next barrier. Returns those that wait there.
std::vector<int> Machine::run_in_turn(const std::vector<int>& threads) {
  std::vector<int> at_barrier;
  for (const int t : threads)
    if (run(t, ~0ull) == State::waiting) at_barrier.push_back(t);
  return at_barrier;
}

// The same, but a thread at random runs for a few instructions, often for one.
std::vector<int> Machine::run_interleaved(std::vector<int> threads) {
  std::vector<int> at_barrier;
  while (!threads.empty()) {
    const size_t i = random_() % threads.size();
    const State state = run(threads[i], random_() % 4 != 0 ? 1 + random_() % 40 : 1);
    if (state == State::running) continue;
    if (state == State::waiting) at_barrier.push_back(threads[i]);
    threads[i] = threads.back();
    threads.pop_back();
  }
  return at_barrier;
}

// Runs a thread to the next barrier or its end, but no more than `budget` instructions.
Machine::State Machine::run(int thread, uint64_t budget) {
  Kernel& k = *kernel_;
  uint64_t* const registers = &values_[stride_ * size_t(thread)];
  uint8_t* const known = &known_[stride_ * size_t(thread)];
  int next = next_[size_t(thread)];
  const auto stop = [&](State state) {
    next_[size_t(thread)] = next;
    return state;
  };
  for (uint64_t step = 0;; ++step) {
    if (step == budget) return stop(State::running);
    if (next >= int(k.code.size())) {
      report("control", int(k.code.size()) - 1, thread, "a thread runs past the end of the kernel");
      return stop(State::done);
    }
    if (++instructions > given_up_at_) {
      report("control", next, thread, "the launch does not end");
      return stop(State::done);
    }
    const int here = next++;
    Instruction& x = k.code[size_t(here)];
    ++k.executed[size_t(here)];
    if (x.predicate >= 0) {
      if (!known[x.predicate]) report("register", here, thread, "a predicate that was never set");
      if ((registers[x.predicate] != 0) == x.unless) continue;
    }
    for (int i = 0; i < x.operands; ++i)
      if (!known[x.operand[i]])
        report("register", here, thread, "a register that was never set: " + k.registers[size_t(x.operand[i])]);
    switch (x.op) {
      case Op::branch:
        next = x.target;
        continue;
      case Op::barrier:
        return stop(State::waiting);
      case Op::leave:
        return stop(State::done);
      case Op::load_param:
      case Op::load_global:
      case Op::load_shared:
        load(x, registers, known, here, thread);
        continue;
      case Op::store_global:
      case Op::store_shared:
        if (!known[x.address]) report("register", here, thread, "an address that was never set");
        store(x, registers, here, thread);
        continue;
      case Op::unpack: {
        const uint64_t a = registers[x.operand[0]];
        for (const int i : {0, 1}) {
          registers[x.result[i]] = low_bits(a >> i * x.bits / 2, x.bits / 2);
          known[x.result[i]] = 1;
        }
        continue;
      }
      default:
        registers[x.result[0]] = result_of(x, registers, here, thread);
        known[x.result[0]] = 1;
    }
  }
}

// ---- memory ---------------------------------------------------------------------------------------------------------

void Machine::load(Instruction& x, uint64_t* registers, uint8_t* known, int index, int thread) {
  if (!known[x.address]) report("register", index, thread, "an address that was never set");
  const uint64_t address = registers[x.address] + uint64_t(x.offset);
  const uint8_t* const from = x.op == Op::load_param    ? parameter(x, address, index, thread)
                              : x.op == Op::load_global ? global(x, address, false, index, thread)
                                                        : shared(x, address, false, index, thread);
  const size_t bytes = x.bits / 8;
  for (size_t i = 0; i < x.elements; ++i) {
    uint64_t value = 0;
    if (from != nullptr) std::memcpy(&value, from + i * bytes, bytes);
    registers[x.result[i]] = value;
    known[x.result[i]] = 1;
  }
}

void Machine::store(Instruction& x, const uint64_t* registers, int index, int thread) {
  const uint64_t address = registers[x.address] + uint64_t(x.offset);
  uint8_t* const to =
      x.op == Op::store_global ? global(x, address, true, index, thread) : shared(x, address, true, index, thread);
  if (to == nullptr) return;
  const size_t bytes = x.bits / 8;
  for (size_t i = 0; i < x.elements; ++i) std::memcpy(to + i * bytes, &registers[x.operand[i]], bytes);
}

const uint8_t* Machine::parameter(const Instruction& x, uint64_t address, int index, int thread) {
  const size_t bytes = bytes_of(x), size = std::min(kernel_->parameter_bytes, parameters_->bytes);
  const uint64_t at = address - kParameterBase;
  if (at > size || at + bytes > size) {
    report("bounds", index, thread, text_of("byte %lld of %zu of the parameters is read", (long long)(at), size));
    return nullptr;
  }
  if (at % bytes != 0) report("alignment", index, thread, "a misaligned read of parameters");
  for (uint64_t i = 0; i < bytes; ++i) {
    if ((x.used_bytes >> i & 1) == 0 || parameters_->filled[at + i]) continue;
    report("uninitialised", index, thread,
           text_of("byte %llu of the parameters, which no entry and no record fills, is read",
                   (unsigned long long)(at + i)));
    break;
  }
  return static_cast<const uint8_t*>(parameters_->at) + at;
}

uint8_t* Machine::global(Instruction& x, uint64_t address, bool write, int index, int thread) {
  const size_t bytes = bytes_of(x);
  Allocation* a = x.last;
  if (a == nullptr || address < a->base || address + bytes > a->base + a->size) a = x.last = memory.before(address);
  const uint64_t at = a == nullptr ? address : address - a->base;
  if (a == nullptr || at > a->size || at + bytes > a->size) {
    x.last = nullptr;
    report("bounds", index, thread,
           text_of("%zu bytes outside of every array are %s: at %llu of %s, which has %llu bytes", bytes,
                   write ? "written" : "read", (unsigned long long)at, a == nullptr ? "nothing" : a->name.c_str(),
                   a == nullptr ? 0ull : (unsigned long long)a->size));
    return nullptr;
  }
  if (address % bytes != 0) report("alignment", index, thread, "a misaligned access to " + a->name);
  if (write && a->readonly) report("readonly", index, thread, a->name + " is written");
  if (!a->written.empty()) {
    uint8_t* const written = &a->written[at];
    for (size_t i = 0; i < bytes; ++i) {
      if (write) {
        written[i] = 1;
      } else if ((x.used_bytes >> i & 1) != 0 && written[i] == 0) {
        report("uninitialised", index, thread, "bytes that nobody wrote are read, in " + a->name);
        break;
      }
    }
  }
  if (!a->touches.empty()) {
    for (uint64_t i = at; i < at + bytes; ++i)
      if (const char* what = race(a->touches[i], {launch_, block_, uint16_t(thread), interval_}, write)) {
        report("race", index, thread, a->name + " is " + what);
        break;
      }
  }
  return reinterpret_cast<uint8_t*>(address);
}

uint8_t* Machine::shared(const Instruction& x, uint64_t address, bool write, int index, int thread) {
  const size_t bytes = bytes_of(x), size = kernel_->shared_bytes;
  const uint64_t at = address - kSharedBase;
  if (at > size || at + bytes > size) {
    report("bounds", index, thread, text_of("byte %lld of %zu of shared memory is accessed", (long long)at, size));
    return nullptr;
  }
  if (address % bytes != 0) report("alignment", index, thread, "a misaligned access to shared memory");
  for (size_t i = 0; i < bytes; ++i) {
    if (write) {
      shared_written_[at + i] = 1;
    } else if ((x.used_bytes >> i & 1) != 0 && shared_written_[at + i] == 0) {
      report("uninitialised", index, thread, "bytes of shared memory that nobody wrote are read");
      break;
    }
  }
  for (uint64_t i = at / 4; i <= (at + bytes - 1) / 4; ++i)
    if (const char* what = race(shared_touches_[i], {blocks_, 0, uint16_t(thread), interval_}, write)) {
      report("race", index, thread, std::string("shared memory is ") + what);
      break;
    }
  return shared_.data() + at;
}

}  // namespace rvsm::ptx
