// lr, lam, beta and weight_decay as numbers on a device (method/device_numbers.py): the record that the host makes has
// the factor 1 in their places, and a kernel finishes it. For host and device.
#pragma once

#include "bases.h"
#include "penalty.h"
#include "storage.h"

namespace rvsm {

// In the order of NAMES in method/device_numbers.py.
enum DeviceNumber { kLr, kLam, kBeta, kWeightDecay, kDeviceNumbers };

// Where they are; null for a number that the host knows.
struct DeviceNumbers {
  const void* at[kDeviceNumbers] = {};
  Dtype dtype[kDeviceNumbers] = {};
};

// What one of them holds, 1 where the host knows the number.
RVSM_HD double read_number(const DeviceNumbers& numbers, int which) {
  const void* const at = numbers.at[which];
  if (at == nullptr) return 1;
  switch (numbers.dtype[which]) {
    case Dtype::f64:
      return *static_cast<const double*>(at);
    case Dtype::bf16:
      return double(load(*static_cast<const BFloat16*>(at)));
    case Dtype::f16:
      return double(load(*static_cast<const Float16*>(at)));
    default:
      return double(*static_cast<const float*>(at));
  }
}

// Finishes a record, and tells whether lr is 0: neither the weights nor the state of the method move then.
RVSM_HD bool fill_in(double* record, BaseKind base, const DeviceNumbers& numbers) {
  const double lr = read_number(numbers, kLr), lam = read_number(numbers, kLam), beta = read_number(numbers, kBeta);
  const Penalty penalty = Penalty(int32_t(record[0]));
  const bool on = penalty != Penalty::none && lam > 0 && beta > 0;
  const Prox<double> prox = make_prox(on ? penalty : Penalty::none, on ? record[2] * lam / beta : 0, record[3]);
  record[0] = double(prox.penalty);
  record[1] = prox.cut;
  record[2] = prox.tau;
  record[4] = prox.rho;
  record[5] = prox.edge;
  double* const split = record + kProxNumbers;
  split[1] *= lr * beta;
  split[2] *= beta;
  fill_in_base(base, base_numbers(record), lr, read_number(numbers, kWeightDecay));
  return lr == 0;
}

}  // namespace rvsm
