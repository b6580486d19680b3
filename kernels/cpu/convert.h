// Runs of elements in and out of fp32: dtype conversions, strided gathers and scatters, stores past the caches.
//
// Everything here is `static` and free of the C++ standard library: see kernels.h on why.
#pragma once

#include <stdint.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "kernels.h"
#include "mask.h"

namespace csmask {
namespace CSMASK_ISA {

static inline float bf16_to_float(uint16_t bits) { return float_from_bits(static_cast<uint32_t>(bits) << 16); }

// Rounds to nearest, ties to even; NaN stays NaN (quiet).
static inline uint16_t float_to_bf16(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  const uint32_t is_nan = (bits & 0x7fffffffu) > 0x7f800000u ? 0xffffffffu : 0u;
  return static_cast<uint16_t>((quiet & is_nan) | (rounded & ~is_nan));
}

// Normal: the exponent is moved from bias 15 to 127. Subnormal: 2^-14 + value is a normal number, whose low bits are
// the mantissa. Like the processor's own instructions but for the payloads of NaNs.
static inline float fp16_to_float(uint16_t half) {
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  const uint32_t infinite = exponent == 0x0f800000u ? (128u - 16u) << 23 : 0u;
  const uint32_t normal = magnitude + ((127u - 15u) << 23) + infinite;
  const float subnormal = float_from_bits(magnitude + (113u << 23)) - 0x1p-14f;
  const uint32_t bits = exponent == 0u ? float_bits(subnormal) : normal;
  return float_from_bits(bits | static_cast<uint32_t>(half & 0x8000u) << 16);
}

// Rounds to nearest, ties to even. Below 2^-14 the result is subnormal: adding 0.5, whose last bit is worth 2^-24,
// rounds it. From 65520 infinite; NaN stays NaN (quiet).
static inline uint16_t float_to_fp16(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t subnormal = float_bits(float_from_bits(magnitude) + 0.5f) - float_bits(0.5f);
  const uint32_t normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? (0x7e00u | ((magnitude >> 13) & 0x3ffu)) : half;
  return static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
}

struct Float32 {
  using Storage = float;
  static float load(float x) { return x; }
  static float store(float x) { return x; }
};

struct BFloat16 {
  using Storage = uint16_t;
  static float load(uint16_t bits) { return bf16_to_float(bits); }
  static uint16_t store(float x) { return float_to_bf16(x); }
};

struct Float16 {
  using Storage = uint16_t;
  static float load(uint16_t bits) { return fp16_to_float(bits); }
  static uint16_t store(float x) { return float_to_fp16(x); }
};

static inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

static inline const void* at(const void* data, Dtype dtype, int64_t offset) {
  return static_cast<const char*>(data) + offset * size_of(dtype);
}

static inline void* at(void* data, Dtype dtype, int64_t offset) {
  return static_cast<char*>(data) + offset * size_of(dtype);
}

template <typename Type>
static void load_as(const void* data, int64_t stride, int64_t count, float* __restrict values) {
  const auto* source = static_cast<const typename Type::Storage*>(data);
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) values[i] = Type::load(source[i]);
  } else if (stride == 0) {
    const float value = Type::load(source[0]);
    for (int64_t i = 0; i < count; ++i) values[i] = value;
  } else {
    for (int64_t i = 0; i < count; ++i) values[i] = Type::load(source[i * stride]);
  }
}

#if defined(__F16C__)
static inline __m256 load_fp16_vector(const uint16_t* source) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
}

static inline void store_fp16_vector(__m256 values, uint16_t* target) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}
#endif

// fp16 by the processor's own instruction, as far as whole vectors lie in a row.
static inline void load_fp16(const void* data, int64_t stride, int64_t count, float* __restrict values) {
  const auto* source = static_cast<const uint16_t*>(data);
  int64_t done = 0;
#if defined(__F16C__)
  for (; stride == 1 && done + 8 <= count; done += 8) {
    _mm256_storeu_ps(values + done, load_fp16_vector(source + done));
  }
#endif
  load_as<Float16>(source + done * stride, stride, count - done, values + done);
}

// `count` elements as fp32, in `buffer` or, where they lie as needed already, where they are.
static inline const float* load(const void* data, Dtype dtype, int64_t stride, int64_t count, float* buffer) {
  switch (dtype) {
    case Dtype::float32:
      if (stride == 1) return static_cast<const float*>(data);
      load_as<Float32>(data, stride, count, buffer);
      break;
    case Dtype::bfloat16: load_as<BFloat16>(data, stride, count, buffer); break;
    case Dtype::float16: load_fp16(data, stride, count, buffer); break;
  }
  return buffer;
}

// Copies past the caches where the processor can: what is written is not read first, and what is cached stays.
static inline void stream_bytes(void* to, const void* from, int64_t bytes) {
  auto* target = static_cast<char*>(to);
  const auto* source = static_cast<const char*>(from);
#if defined(__SSE2__)
  int64_t head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(target) & 63u);
  if (head > bytes) head = bytes;
  __builtin_memcpy(target, source, static_cast<size_t>(head));
  int64_t i = head;
  for (; i + 64 <= bytes; i += 64) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + i), _mm512_loadu_si512(source + i));
#elif defined(__AVX__)
    for (int j = 0; j < 64; j += 32) {
      const __m256i part = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i + j));
      _mm256_stream_si256(reinterpret_cast<__m256i*>(target + i + j), part);
    }
#else
    for (int j = 0; j < 64; j += 16) {
      const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i + j));
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + i + j), part);
    }
#endif
  }
  __builtin_memcpy(target + i, source + i, static_cast<size_t>(bytes - i));
#else
  __builtin_memcpy(target, source, static_cast<size_t>(bytes));
#endif
}

// To be called by each thread that has streamed, before others read: such stores are not ordered with later ones.
static inline void end_streaming(bool streamed) {
#if defined(__SSE2__)
  if (streamed) _mm_sfence();
#else
  (void)streamed;
#endif
}

template <typename Type>
static void store_as(const float* __restrict values, int64_t count, void* data, int64_t stride) {
  auto* __restrict target = static_cast<typename Type::Storage*>(data);
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) target[i] = Type::store(values[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) target[i * stride] = Type::store(values[i]);
  }
}

static inline void store_fp16(const float* __restrict values, int64_t count, void* data, int64_t stride) {
  auto* __restrict target = static_cast<uint16_t*>(data);
  int64_t done = 0;
#if defined(__F16C__)
  for (; stride == 1 && done + 8 <= count; done += 8) {
    store_fp16_vector(_mm256_loadu_ps(values + done), target + done);
  }
#endif
  store_as<Float16>(values + done, count - done, target + done * stride, stride);
}

// Rounds fp32 values once and writes them; `stream` is for contiguous fp32, where it pays.
static inline void store(const float* values, int64_t count, void* data, Dtype dtype, int64_t stride, bool stream) {
  switch (dtype) {
    case Dtype::float32:
      if (stride == 1 && stream) {
        stream_bytes(data, values, count * 4);
      } else {
        store_as<Float32>(values, count, data, stride);
      }
      break;
    case Dtype::bfloat16: store_as<BFloat16>(values, count, data, stride); break;
    case Dtype::float16: store_fp16(values, count, data, stride); break;
  }
}

}  // namespace CSMASK_ISA
}  // namespace csmask
