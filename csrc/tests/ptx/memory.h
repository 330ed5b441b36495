// The device's global memory as the interpreter sees it: arrays of the host that are registered with exactly their
// bytes. Beside each lie shadows: which bytes somebody wrote, and who touched them in this launch.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace rvsm::ptx {

// The last accesses to two bytes of memory. An access is told by its block, its thread and the number of barriers that
// the block had passed.
struct Touch {
  uint32_t launch;  // what is noted here belongs to this launch
  uint32_t writer;  // block + 1; 0: nobody
  uint32_t reader;  // block + 1; 0: nobody, kSeveral: several blocks
  uint16_t writing_thread, writing_interval;
  uint16_t reading_thread, reading_interval;  // kSeveralThreads: several threads of that interval

  static constexpr uint32_t kSeveral = ~uint32_t(0);
  static constexpr uint16_t kSeveralThreads = 0xffff;
};

// Who accesses memory now.
struct Visitor {
  uint32_t launch, block;
  uint16_t thread, interval;
};

// Notes an access. Returns null, or what is wrong with it: two accesses, one of them a write, that no barrier orders.
// Blocks of a launch are never ordered.
inline const char* race(Touch& touch, const Visitor& v, bool write) {
  if (touch.launch != v.launch) touch = {v.launch, 0, 0, 0, 0, 0, 0};
  const uint32_t block = v.block + 1;
  const char* found = nullptr;
  const bool wrote_before =
      touch.writer == block && (touch.writing_thread == v.thread || touch.writing_interval != v.interval);
  if (touch.writer != 0 && !wrote_before) found = write ? "written twice" : "read while another thread writes";
  if (write) {
    const bool same_interval = touch.reader == block && touch.reading_interval == v.interval;
    if (touch.reader != 0 && (touch.reader != block || (same_interval && touch.reading_thread != v.thread)))
      found = "written while another thread reads";
    touch.writer = block;
    touch.writing_thread = v.thread;
    touch.writing_interval = v.interval;
  } else if (touch.reader == 0 || (touch.reader == block && touch.reading_interval != v.interval)) {
    touch.reader = block;
    touch.reading_thread = v.thread;
    touch.reading_interval = v.interval;
  } else if (touch.reader != block) {
    touch.reader = Touch::kSeveral;
  } else if (touch.reading_thread != v.thread) {
    touch.reading_thread = Touch::kSeveralThreads;
  }
  return found;
}

// Zeros that the system provides page by page where they are touched, so that an array may be larger than the memory.
template <class T>
class Pages {
 public:
  Pages() = default;
  explicit Pages(size_t count) : count_(count) {
    if (count == 0) return;
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* p = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, kFlags, -1, 0);
    if (p == MAP_FAILED) {
      std::perror("mmap");
      std::exit(2);
    }
    at_ = static_cast<T*>(p);
  }
  Pages(Pages&& other) noexcept { *this = std::move(other); }
  Pages& operator=(Pages&& other) noexcept {
    std::swap(at_, other.at_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~Pages() {
    if (at_ != nullptr) munmap(at_, count_ * sizeof(T));
  }

  T* data() const { return at_; }
  bool empty() const { return count_ == 0; }
  T& operator[](size_t i) const { return at_[i]; }

 private:
  T* at_ = nullptr;
  size_t count_ = 0;
};

struct Allocation {
  uint64_t base = 0, size = 0;
  std::string name;
  bool readonly = false;
  Pages<uint8_t> written;  // by byte; empty where all bytes were written before
  Pages<Touch> touches;    // by byte; empty where races are not looked for
};

class Memory {
 public:
  enum Access { read_only, read_write, not_yet_written };

  void clear() { allocations_.clear(); }

  // Kernels may access these bytes. Without `races` the array may be huge: no shadow is kept of it.
  void add(const void* p, uint64_t size, const std::string& name, Access access, bool races = true) {
    if (size == 0) return;
    auto a = std::make_unique<Allocation>();
    a->base = uint64_t(p);
    a->size = size;
    a->name = name;
    a->readonly = access == read_only;
    if (access == not_yet_written) a->written = Pages<uint8_t>(size);
    if (races) a->touches = Pages<Touch>(size);
    allocations_.push_back(std::move(a));
    sorted_ = false;
  }

  // To be called between add and find.
  void sort() {
    if (sorted_) return;
    std::sort(allocations_.begin(), allocations_.end(), [](const auto& x, const auto& y) { return x->base < y->base; });
    for (size_t i = 0; i + 1 < allocations_.size(); ++i) {
      if (allocations_[i]->base + allocations_[i]->size <= allocations_[i + 1]->base) continue;
      std::fprintf(stderr, "%s and %s overlap\n", allocations_[i]->name.c_str(), allocations_[i + 1]->name.c_str());
      std::exit(2);
    }
    sorted_ = true;
  }

  // The array that begins at or before an address, or null.
  Allocation* before(uint64_t address) const {
    const auto after = std::upper_bound(allocations_.begin(), allocations_.end(), address,
                                        [](uint64_t p, const auto& a) { return p < a->base; });
    return after == allocations_.begin() ? nullptr : std::prev(after)->get();
  }

 private:
  std::vector<std::unique_ptr<Allocation>> allocations_;
  bool sorted_ = true;
};

}  // namespace rvsm::ptx
