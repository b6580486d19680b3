// Loops over runs of fp32 that several kernels are made of: masks, their sums and counts, and the chain rule.
#pragma once

#include "kernels.h"
#include "mask.h"

namespace csmask {
namespace CSMASK_ISA {

// Sums run in this many interleaved fp32 lanes, a multiple of every vector length, so that all instruction sets add in
// the same order.
constexpr int kLanes = 16;
// After so many elements the lanes go on in double: 16 fp32 additions in a row, an error of 16 half ulp at most.
constexpr int64_t kLaneSumLength = 16 * kLanes;
constexpr float kUndecidedBound = 4.0f;

static inline void masks_of(const float* __restrict logits, int64_t count, const Mask& mask, float* __restrict masks) {
  const float temperature = mask.temperature;
  const float scale = mask.scale;
  if (mask.hard) {
    for (int64_t i = 0; i < count; ++i) masks[i] = logits[i] > 0.0f ? scale : 0.0f;
  } else {
    for (int64_t i = 0; i < count; ++i) masks[i] = scale * sigmoid(temperature * logits[i]);
  }
}

static inline double sum(const float* values, int64_t count) {
  double totals[kLanes] = {};
  for (int64_t begin = 0; begin < count; begin += kLaneSumLength) {
    const int64_t end = count - begin < kLaneSumLength ? count : begin + kLaneSumLength;
    float lanes[kLanes] = {};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += values[i + lane];
    }
    for (int lane = 0; i + lane < end; ++lane) lanes[lane] += values[i + lane];
    for (int lane = 0; lane < kLanes; ++lane) totals[lane] += static_cast<double>(lanes[lane]);
  }
  double total = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) total += totals[lane];
  return total;
}

static inline void count(const float* __restrict logits, int64_t n, float temperature, MaskPartial* partial) {
  int32_t kept = 0;
  int32_t undecided = 0;
  for (int64_t i = 0; i < n; ++i) {
    kept += logits[i] > 0.0f ? 1 : 0;
    undecided += __builtin_fabsf(temperature * logits[i]) < kUndecidedBound ? 1 : 0;
  }
  partial->kept += kept;
  partial->undecided += undecided;
}

static inline void derivatives(const float* __restrict logits, int64_t n, float temperature, float scale,
                               float* __restrict values) {
  for (int64_t i = 0; i < n; ++i) {
    values[i] = temperature * sigmoid_derivative(temperature * logits[i]) * scale;
  }
}

// Both at once, of one exp; each to the bit what the functions above give.
static inline void masks_and_derivatives(const float* __restrict logits, int64_t n, float temperature, float scale,
                                         float* __restrict masks, float* __restrict values) {
  for (int64_t i = 0; i < n; ++i) {
    const float x = temperature * logits[i];
    const float e = exp_negative(__builtin_fabsf(x));
    masks[i] = scale * sigmoid_of(x, e);
    values[i] = temperature * sigmoid_derivative_of(e) * scale;
  }
}

static inline void chain(const float* __restrict dmasked_weight, const float* __restrict weight, float dl0, int64_t n,
                         float* __restrict values) {
  for (int64_t i = 0; i < n; ++i) values[i] *= dmasked_weight[i] * weight[i] + dl0;
}

}  // namespace CSMASK_ISA
}  // namespace csmask
