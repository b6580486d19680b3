// Blocks of a layout's elements in and out of fp32 buffers, whatever their strides.
#pragma once

#include "convert.h"
#include "runs.h"

namespace csmask {
namespace CSMASK_ISA {

// As `load`, but always into the buffer.
static inline void load_into(const void* data, Dtype dtype, int64_t stride, int64_t count, float* buffer) {
  switch (dtype) {
    case Dtype::float32: load_as<Float32>(data, stride, count, buffer); break;
    case Dtype::bfloat16: load_as<BFloat16>(data, stride, count, buffer); break;
    case Dtype::float16: load_fp16(data, stride, count, buffer); break;
  }
}

// Elements begin <= i < end of one operand as fp32: in `buffer` or, where they lie as needed already, where they are.
static inline const float* gather(const Layout& layout, int operand, const void* data, Dtype dtype, int64_t begin,
                                  int64_t end, float* buffer) {
  const int64_t stride = layout.stride[operand][layout.dims - 1];
  const float* values = buffer;
  for_runs(layout, operand + 1, begin, end, [&](const int64_t* offsets, int64_t done, int64_t n) {
    const void* run = at(data, dtype, offsets[operand]);
    if (n == end - begin) {
      values = load(run, dtype, stride, n, buffer);
    } else {
      load_into(run, dtype, stride, n, buffer + done);
    }
  });
  return values;
}

// Rounds values once and writes them as elements begin <= i < end of operand 0.
static inline void scatter(const Layout& layout, void* data, Dtype dtype, int64_t begin, int64_t end,
                           const float* values, bool stream) {
  const int64_t stride = layout.stride[0][layout.dims - 1];
  for_runs(layout, 1, begin, end, [&](const int64_t* offsets, int64_t done, int64_t n) {
    store(values + done, n, at(data, dtype, offsets[0]), dtype, stride, stream);
  });
}

}  // namespace CSMASK_ISA
}  // namespace csmask
