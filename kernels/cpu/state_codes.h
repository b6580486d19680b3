// AdamW's states in 8 bits, as csmask/state_codes.py defines them: formulas and reasons are there.
//
// Everything here is `static` and free of the C++ standard library: see kernels.h on why.
#pragma once

#include <stdint.h>

#include "kernels.h"
#include "mask.h"

namespace csmask {
namespace CSMASK_ISA {

constexpr float kAverageUnits = 96.0f;
constexpr float kLargestAverageCode = 127.0f;
constexpr uint32_t kInfinite = 0x7f800000u;  // from here on, the bits of what is no number

static inline float decode_square(uint32_t code, float scale) {
  const uint32_t fine = (code + 1792u) << 19;
  const uint32_t coarse = (code + 400u) << 21;
  const float value = float_from_bits(code >= 64u ? fine : coarse) * scale;
  return code == 0u ? 0.0f : value;
}

// In [0, 2^16).
static inline uint32_t dither(uint32_t element, uint32_t step) {
  uint32_t word = element * 0x9e3779b1u;
  word = (word ^ (word >> 15)) * 0x85ebca77u;
  return (word + step * 0x9e3779b9u) >> 16;
}

// Codes of a state block whose first element is `element`; returns its scale.
static inline float encode_squares(const float* __restrict squares, uint32_t element, uint32_t step, int64_t n,
                                   uint8_t* __restrict codes) {
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
    const int32_t fine = static_cast<int32_t>((bits + (noise << 3)) >> 19) - 16 * exponent + 240;
    const int32_t coarse = static_cast<int32_t>((bits + (noise << 5)) >> 21) - 4 * exponent + 108;
    const int32_t code = bits >= fine_from ? fine : coarse < 1 ? 1 : coarse;
    const int32_t bounded = bits < kInfinite && code < 255 ? code : 255;
    codes[i] = static_cast<uint8_t>(bits == 0u ? 0 : bounded);
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

// Both states of `count` elements from `begin`, out of their codes.
static inline void decode_states(const StateCodes& states, int64_t begin, int64_t count, float* averages,
                                 float* squares) {
  for_state_blocks(begin, count, [&](int64_t done, int64_t block, int64_t n) {
    const int8_t* first = states.averages + begin + done;
    const uint8_t* second = states.squares + begin + done;
    const float scale = states.scales[block];
    const float unit = states.unit_before / kAverageUnits;
    for (int64_t i = 0; i < n; ++i) {
      const float square = decode_square(second[i], scale);
      squares[done + i] = square;
      averages[done + i] = static_cast<float>(first[i]) * unit * __builtin_sqrtf(square);
    }
  });
}

// Writes the codes, and to `averages` adds what their rounding takes from them, times states.residue.
static inline void encode_states(const StateCodes& states, int64_t begin, int64_t count, float* averages,
                                 const float* squares) {
  for_state_blocks(begin, count, [&](int64_t done, int64_t block, int64_t n) {
    int8_t* first = states.averages + begin + done;
    uint8_t* second = states.squares + begin + done;
    float* average = averages + done;
    const float scale = encode_squares(squares + done, static_cast<uint32_t>(begin + done), states.step, n, second);
    states.scales[block] = scale;
    const float unit = states.unit / kAverageUnits;
    const float inverse_unit = kAverageUnits / states.unit;
    for (int64_t i = 0; i < n; ++i) {
      const float root = __builtin_sqrtf(decode_square(second[i], scale));
      const float units = root > 0.0f ? average[i] * (inverse_unit / root) : 0.0f;
      const float at_most = units > kLargestAverageCode ? kLargestAverageCode : units;
      const float bounded = at_most >= -kLargestAverageCode  ? at_most
                            : at_most < -kLargestAverageCode ? -kLargestAverageCode
                                                             : 0.0f;  // NaN
      const float code = (bounded + 0x1.8p+23f) - 0x1.8p+23f;         // to the nearest integer, ties to even
      first[i] = static_cast<int8_t>(static_cast<int32_t>(code));
      average[i] += states.residue * (average[i] - code * unit * root);
    }
  });
}

}  // namespace CSMASK_ISA
}  // namespace csmask
