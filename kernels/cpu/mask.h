// The mask itself, as plain loops that compilers vectorise: m = scale * sigmoid(T * S), or its hard limit.
//
// Everything here is `static` and free of the C++ standard library: see kernels.h on why.
#pragma once

#include <stdint.h>

#ifndef CSMASK_ISA
#error "compile kernels with -DCSMASK_ISA=<instruction set>"
#endif

namespace csmask {
namespace CSMASK_ISA {

static inline uint32_t float_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}

static inline float float_from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

// a * b + c, rounded once where the instruction set can (AVX2, AVX-512, NEON: the same bits), twice where not.
static inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// exp(-a) for a >= 0 or NaN; 0 from a = 87.33, just before the result would leave fp32's normal range (a = 126 ln 2).
//
// Range reduction -a = n ln 2 + r, n an integer in [-126, 0], |r| <= ln(2) / 2 (Cody and Waite): ln 2 is split into a
// part of 14 bits, whose product with n (7 bits) is exact, and the rest. n is rounded by adding 1.5 * 2^23, which
// leaves it in the low bits of the sum. exp(r) = 1 + r + r^2 q(r), q of degree 4, minimax in relative error over
// |r| <= 0.347 (Remez exchange in 200 bits, then rounded to fp32): 2^-27.7 in all. What a core has in flight limits
// this chain of dependent operations, so it is kept short: q is summed in pairs (Estrin). At most 1.03 ulp from the
// true value: measured over every fp32 a in [2^-63, 87.33] against exp in double, with and without fused products.
static inline float exp_negative(float a) {
  const float log2_e = 0x1.715476p+0f;
  const float ln2_high = 0x1.62e4p-1f;
  const float ln2_low = 0x1.7f7d1cp-20f;
  const float round_magic = 0x1.8p+23f;
  const float shifted = multiply_add(a, -log2_e, round_magic);
  const float n = shifted - round_magic;
  const float r = multiply_add(n, -ln2_low, multiply_add(n, -ln2_high, -a));
  const float r2 = r * r;
  const float q_low = multiply_add(r, 0x1.555490p-3f, 0x1.fffffcp-2f);
  const float q_high = multiply_add(r2, 0x1.6a2352p-10f, multiply_add(r, 0x1.123a6cp-7f, 0x1.5558f4p-5f));
  const float q = multiply_add(r2, q_high, q_low);
  const float exp_r = 1.0f + multiply_add(r2, q, r);
  const float power_of_two = float_from_bits((float_bits(shifted) + 127u) << 23);
  const float value = exp_r * power_of_two;
  return a > 87.33f ? 0.0f : value;
}

// 1 / (1 + exp(-x)) from e = exp(-|x|), so that tiny values keep their digits: e / (1 + e) where x < 0. 0 below
// x = -87.33, NaN for NaN. At most 2.41 ulp, measured over both signs of the same range; tests/test_materialize.py
// checks every 991st of them.
static inline float sigmoid_of(float x, float e) {
  const float numerator = x < 0.0f ? e : 1.0f;
  return numerator / (1.0f + e);
}

static inline float sigmoid(float x) { return sigmoid_of(x, exp_negative(__builtin_fabsf(x))); }

// sigmoid'(x) = e / (1 + e)^2 with e = exp(-|x|), which does not vanish where m * (1 - m) rounds to 0.
static inline float sigmoid_derivative_of(float e) {
  const float sum = 1.0f + e;
  return e / (sum * sum);
}

static inline float sigmoid_derivative(float x) { return sigmoid_derivative_of(exp_negative(__builtin_fabsf(x))); }

}  // namespace CSMASK_ISA
}  // namespace csmask
