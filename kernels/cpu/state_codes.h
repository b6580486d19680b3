// AdamW's states in 8 bits, as csmask/state_codes.py defines them: formulas and reasons are there.
//
// Everything here is `static` and free of the C++ standard library: see kernels.h on why.
#pragma once

#include <stdint.h>

#include "kernels.h"
#include "mask.h"

namespace csmask {
namespace CSMASK_ISA {

constexpr float kAverageUnits = 384.0f;
constexpr float kLeastAverage = -510.0f;
constexpr float kLargestAverage = 509.0f;
constexpr uint32_t kQuarters = 15u;          // the bits of a logit that hold some
constexpr uint32_t kInfinite = 0x7f800000u;  // from here on, the bits of what is no number

// A code and what the logit holds of its quarters, and back.
static inline int32_t code_of(int32_t quarters) { return (quarters + 2) >> 2; }
static inline int32_t quarters_of(int32_t code, uint32_t held) {
  return 4 * code + static_cast<int32_t>((held & 3u) ^ 2u) - 2;
}

static inline float decode_square(int32_t quarters, float scale) {
  const uint32_t fine = static_cast<uint32_t>(quarters + 7168) << 17;
  const uint32_t coarse = static_cast<uint32_t>(quarters + 1600) << 19;
  const float value = float_from_bits(quarters >= 256 ? fine : coarse) * scale;
  return quarters == 0 ? 0.0f : value;
}

// In [0, 2^16).
static inline uint32_t dither(uint32_t element, uint32_t step) {
  uint32_t word = element * 0x9e3779b1u;
  word = (word ^ (word >> 15)) * 0x85ebca77u;
  return (word + step * 0x9e3779b9u) >> 16;
}

// Quarters of the codes of a state block whose first element is `element`; returns its scale.
static inline float encode_squares(const float* __restrict squares, uint32_t element, uint32_t step, int64_t n,
                                   int32_t* __restrict quarters) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = float_bits(squares[i]);
    const uint32_t finite = bits < kInfinite ? bits : 0u;
    largest = finite > largest ? finite : largest;
  }
  const auto rounded = static_cast<int32_t>((largest + (1u << 19) - 1u) >> 23);
  const int32_t exponent = rounded < 28 ? 28 : rounded > 254 ? 254 : rounded;
  const uint32_t fine_from = static_cast<uint32_t>(exponent - 11) << 23;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = float_bits(squares[i]);
    const uint32_t noise = dither(element + static_cast<uint32_t>(i), step);
    const int32_t fine = static_cast<int32_t>((bits + (noise << 1)) >> 17) - 64 * exponent + 960;
    const int32_t coarse = static_cast<int32_t>((bits + (noise << 3)) >> 19) - 16 * exponent + 432;
    const int32_t found = bits >= fine_from ? fine : coarse < 2 ? 2 : coarse;
    const int32_t bounded = bits < kInfinite && found < 1021 ? found : 1021;
    quarters[i] = bits == 0u ? 0 : bounded;
  }
  return float_from_bits(static_cast<uint32_t>(exponent) << 23);
}

// Calls body(done, block, n) for each state block of `count` elements from element `begin`, which begins one.
template <typename Body>
static void for_state_blocks(int64_t begin, int64_t count, const Body& body) {
  for (int64_t done = 0; done < count; done += kStateBlock) {
    body(done, (begin + done) / kStateBlock, count - done < kStateBlock ? count - done : kStateBlock);
  }
}

// Both states of `count` elements from `begin`, out of their codes and logits.
static inline void decode_states(const StateCodes& states, int64_t begin, int64_t count, const float* logits,
                                 float* averages, float* squares) {
  for_state_blocks(begin, count, [&](int64_t done, int64_t block, int64_t n) {
    const int8_t* first = states.averages + begin + done;
    const uint8_t* second = states.squares + begin + done;
    const float scale = states.scales[block];
    const float unit = states.unit_before / kAverageUnits;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t held = float_bits(logits[done + i]);
      const int32_t quarters = second[i] == 0 ? 0 : quarters_of(second[i], held);
      const float square = decode_square(quarters, scale);
      squares[done + i] = square;
      averages[done + i] = static_cast<float>(quarters_of(first[i], held >> 2)) * unit * __builtin_sqrtf(square);
    }
  });
}

// Writes the codes and what the logits are to hold of them, and to `averages` adds what rounding takes from them, times
// states.residue.
static inline void encode_states(const StateCodes& states, int64_t begin, int64_t count, float* averages,
                                 const float* squares, uint32_t* held) {
  for_state_blocks(begin, count, [&](int64_t done, int64_t block, int64_t n) {
    int8_t* first = states.averages + begin + done;
    uint8_t* second = states.squares + begin + done;
    float* average = averages + done;
    int32_t quarters[kStateBlock];
    const float scale = encode_squares(squares + done, static_cast<uint32_t>(begin + done), states.step, n, quarters);
    states.scales[block] = scale;
    const float unit = states.unit / kAverageUnits;
    const float inverse_unit = kAverageUnits / states.unit;
    for (int64_t i = 0; i < n; ++i) {
      const float root = __builtin_sqrtf(decode_square(quarters[i], scale));
      const float units = root > 0.0f ? average[i] * (inverse_unit / root) : 0.0f;
      const float at_most = units > kLargestAverage ? kLargestAverage : units;
      const float bounded = at_most >= kLeastAverage ? at_most : at_most < kLeastAverage ? kLeastAverage : 0.0f;  // NaN
      const float rounded = (bounded + 0x1.8p+23f) - 0x1.8p+23f;  // to the nearest integer, ties to even
      const auto whole = static_cast<int32_t>(rounded);
      first[i] = static_cast<int8_t>(code_of(whole));
      second[i] = static_cast<uint8_t>(code_of(quarters[i]));
      held[done + i] = (static_cast<uint32_t>(whole) & 3u) << 2 | (static_cast<uint32_t>(quarters[i]) & 3u);
      average[i] += states.residue * (average[i] - rounded * unit * root);
    }
  });
}

// Logits of 0 and without bound hold nothing.
static inline void put_quarters(const uint32_t* __restrict held, int64_t n, float* __restrict logits) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = float_bits(logits[i]);
    const uint32_t size = bits & 0x7fffffffu;
    logits[i] = float_from_bits(size != 0u && size < kInfinite ? (bits & ~kQuarters) | held[i] : bits);
  }
}

}  // namespace CSMASK_ISA
}  // namespace csmask
