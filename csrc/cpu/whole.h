// What is done to a whole tensor before or after its step: a division by its norm, and the support of what top-k keeps,
// before and after. Without torch.
#pragma once

#include <cstdint>

#include "engine.h"

namespace rvsm::cpu {

// Elements whose support is packed together: a bit each, the first one the lowest.
constexpr int64_t kSupportTile = 512;

// Compiled once per instruction set (whole.cpp). They work on elements [at, at + n).
struct WholeKernels {
  // w <- w / norm, in the type of the arithmetic, rounded to nearest.
  void (*divide)(const TensorArgs&, double norm, int64_t at, int64_t n);
  // Writes which elements are not at most TensorArgs::cut in magnitude, a NaN among them, and counts these. `at` is a
  // multiple of kSupportTile, and bit 0 of bits[at / 8] is its element; what is left of the last byte is 0.
  int64_t (*support)(const TensorArgs&, uint8_t* bits, int64_t at, int64_t n);
  // Whether that is what the bits are already.
  bool (*has_support)(const TensorArgs&, const uint8_t* bits, int64_t at, int64_t n);
  // Zeros the elements that are not in the support.
  void (*threshold)(const TensorArgs&, int64_t at, int64_t n);
};

}  // namespace rvsm::cpu
