// materialize: out = round(W * m) and l0 = sum(m), with m = scale * sigmoid(T * S), or its hard limit.
//
// Bytes moved per weight in bf16 with a logit each: 2 (W) + 4 (S) + 2 (out).
#include "convert.h"
#include "kernels.h"
#include "mask.h"
#include "mask_loops.h"
#include "ops.h"
#include "runs.h"

namespace csmask {
namespace CSMASK_ISA {
namespace {

// The bits of floats. Named within a type, since a template's argument loses its attributes.
struct Bits32 {
  typedef uint32_t __attribute__((may_alias)) Storage;
};
struct Bits16 {
  typedef uint16_t __attribute__((may_alias)) Storage;
};

void multiply(const float* __restrict weight, const float* __restrict masks, int64_t n, float* __restrict values) {
  for (int64_t i = 0; i < n; ++i) values[i] = weight[i] * masks[i];
}

// The same from and to contiguous memory of any dtype, in one pass.
template <typename In, typename Out>
void multiply_as(const void* weight, const float* __restrict masks, int64_t n, void* out) {
  const auto* __restrict w = static_cast<const typename In::Storage*>(weight);
  auto* __restrict o = static_cast<typename Out::Storage*>(out);
  for (int64_t i = 0; i < n; ++i) o[i] = Out::store(In::load(w[i]) * masks[i]);
}

// fp16 by the processor's own instruction, as far as whole vectors go.
#if defined(__F16C__)
template <>
void multiply_as<Float16, Float16>(const void* weight, const float* __restrict masks, int64_t n, void* out) {
  const auto* __restrict w = static_cast<const uint16_t*>(weight);
  auto* __restrict o = static_cast<uint16_t*>(out);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    store_fp16_vector(_mm256_mul_ps(load_fp16_vector(w + i), _mm256_loadu_ps(masks + i)), o + i);
  for (; i < n; ++i) o[i] = Float16::store(Float16::load(w[i]) * masks[i]);
}
#endif

template <typename In>
void multiply_to(const void* weight, const float* masks, int64_t n, void* out, Dtype out_dtype) {
  switch (out_dtype) {
    case Dtype::float32: multiply_as<In, Float32>(weight, masks, n, out); break;
    case Dtype::bfloat16: multiply_as<In, BFloat16>(weight, masks, n, out); break;
    case Dtype::float16: multiply_as<In, Float16>(weight, masks, n, out); break;
  }
}

void multiply_contiguous(const void* weight, Dtype weight_dtype, const float* masks, int64_t n, void* out,
                         Dtype out_dtype) {
  switch (weight_dtype) {
    case Dtype::float32: multiply_to<Float32>(weight, masks, n, out, out_dtype); break;
    case Dtype::bfloat16: multiply_to<BFloat16>(weight, masks, n, out, out_dtype); break;
    case Dtype::float16: multiply_to<Float16>(weight, masks, n, out, out_dtype); break;
  }
}

// A select and not a product, so that an infinite or NaN weight outside the circuit gives +0.
void select(const float* __restrict weight, const float* __restrict logits, float scale, int64_t n,
            float* __restrict values) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t kept = logits[i] > 0.0f ? 0xffffffffu : 0u;
    values[i] = float_from_bits(float_bits(weight[i] * scale) & kept);
  }
}

// The same for scale 1 where the dtype stays: no arithmetic at all, so that the weight keeps its bits.
template <typename Bits>
void select_bits(const void* weight, int64_t weight_stride, const float* __restrict logits, int64_t n, void* out,
                 int64_t out_stride) {
  using Storage = typename Bits::Storage;
  // Not `auto`: it would lose the attribute, too.
  const Storage* __restrict w = static_cast<const Storage*>(weight);
  Storage* __restrict o = static_cast<Storage*>(out);
  if (weight_stride == 1 && out_stride == 1) {
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t kept = logits[i] > 0.0f ? 0xffffffffu : 0u;
      o[i] = static_cast<Storage>(w[i] & kept);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      o[i * out_stride] = logits[i] > 0.0f ? w[i * weight_stride] : static_cast<Storage>(0);
    }
  }
}

struct Buffers {
  alignas(64) float weight[kBlock];
  alignas(64) float logits[kBlock];
  alignas(64) float values[kBlock];
};

void write_run(const MaterializeArgs& args, const int64_t* offsets, const float* logits, const float* masks, int64_t n,
               Buffers& buffers) {
  const int inner = args.layout.dims - 1;
  const int64_t out_stride = args.layout.stride[0][inner];
  const int64_t weight_stride = args.layout.stride[1][inner];
  void* out = at(args.out, args.out_dtype, offsets[0]);
  const void* weight = at(args.weight, args.weight_dtype, offsets[1]);
  prefetch_rows_ahead(args.layout, 1, weight, size_of(args.weight_dtype), n);
  if (args.mask.hard && args.mask.scale == 1.0f && args.weight_dtype == args.out_dtype) {
    if (args.out_dtype == Dtype::float32) {
      select_bits<Bits32>(weight, weight_stride, logits, n, out, out_stride);
    } else {
      select_bits<Bits16>(weight, weight_stride, logits, n, out, out_stride);
    }
    return;
  }
  if (!args.mask.hard && !args.stream && weight_stride == 1 && out_stride == 1) {
    multiply_contiguous(weight, args.weight_dtype, masks, n, out, args.out_dtype);
    return;
  }
  const float* w = load(weight, args.weight_dtype, weight_stride, n, buffers.weight);
  if (args.mask.hard) {
    select(w, logits, args.mask.scale, n, buffers.values);
  } else {
    multiply(w, masks, n, buffers.values);
  }
  store(buffers.values, n, out, args.out_dtype, out_stride, args.stream);
}

}  // namespace

void materialize(const MaterializeArgs& args, int64_t first, int64_t last, MaskPartial* partials) {
  Buffers buffers;
  alignas(64) float masks[kBlock];
  const bool writes = args.out != nullptr;
  const int logits_operand = writes ? 2 : 0;
  const int64_t logits_stride = args.layout.stride[logits_operand][args.layout.dims - 1];
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * kBlock;
    const int64_t end = block_end(args.layout, block);
    MaskPartial partial = {0.0, 0, 0};
    for_runs(args.layout, logits_operand + 1, begin, end, [&](const int64_t* offsets, int64_t done, int64_t n) {
      const float* source = args.logits + offsets[logits_operand];
      prefetch_rows_ahead(args.layout, logits_operand, source, 4, n);
      const float* logits = load(source, Dtype::float32, logits_stride, n, buffers.logits);
      masks_of(logits, n, args.mask, masks + done);
      if (args.counts) count(logits, n, args.mask.temperature, &partial);
      if (writes) write_run(args, offsets, logits, masks + done, n, buffers);
    });
    partial.sum = sum(masks, end - begin);
    partials[block] = partial;
  }
  end_streaming(args.stream);
}

}  // namespace CSMASK_ISA
}  // namespace csmask
