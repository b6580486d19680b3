// materialize: out = round(W * m) and l0 = sum(m), with m = scale * sigmoid(T * S) per element or per unit.
//
// Bytes moved per weight in bf16 with a logit each: 2 (W) + 4 (S) + 2 (out).
#include "materialize.h"

#include "mask.h"

namespace csmask {
namespace CSMASK_ISA {
namespace {

// Sums run in this many interleaved fp32 lanes, a multiple of every vector length, so that all instruction sets add in
// the same order.
constexpr int kLanes = 16;
// After so many elements the lanes are added up in double: 16 fp32 additions in a row, an error of 16 half ulp at most.
constexpr int64_t kLaneSumLength = 16 * kLanes;

void soft_masks(const float* __restrict logits, int64_t count, float temperature, float scale,
                float* __restrict masks) {
  for (int64_t i = 0; i < count; ++i) masks[i] = scale * sigmoid(temperature * logits[i]);
}

void hard_masks(const float* __restrict logits, int64_t count, float scale, float* __restrict masks) {
  for (int64_t i = 0; i < count; ++i) masks[i] = logits[i] > 0.0f ? scale : 0.0f;
}

double sum(const float* values, int64_t count) {
  double total = 0.0;
  for (int64_t begin = 0; begin < count; begin += kLaneSumLength) {
    const int64_t end = count - begin < kLaneSumLength ? count : begin + kLaneSumLength;
    float lanes[kLanes] = {};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += values[i + lane];
    }
    for (int lane = 0; i + lane < end; ++lane) lanes[lane] += values[i + lane];
    for (int lane = 0; lane < kLanes; ++lane) total += static_cast<double>(lanes[lane]);
  }
  return total;
}

// values[j] = table[((begin + j) / inner) % units], j < count
void expand(const float* __restrict table, int64_t units, int64_t inner, int64_t begin, int64_t count,
            float* __restrict values) {
  int64_t unit = (begin / inner) % units;
  int64_t done = 0;
  if (inner == 1) {
    while (done < count) {
      const int64_t run = units - unit < count - done ? units - unit : count - done;
      for (int64_t j = 0; j < run; ++j) values[done + j] = table[unit + j];
      done += run;
      unit = 0;
    }
    return;
  }
  int64_t left_in_unit = inner - begin % inner;
  while (done < count) {
    const int64_t run = left_in_unit < count - done ? left_in_unit : count - done;
    for (int64_t j = 0; j < run; ++j) values[done + j] = table[unit];
    done += run;
    unit = unit + 1 == units ? 0 : unit + 1;
    left_in_unit = inner;
  }
}

struct Float32 {
  using Storage = uint32_t;
  static float load(uint32_t bits) { return float_from_bits(bits); }
  static uint32_t store(float x) { return float_bits(x); }
};

struct BFloat16 {
  using Storage = uint16_t;
  static float load(uint16_t bits) { return bf16_to_float(bits); }
  static uint16_t store(float x) { return float_to_bf16(x); }
};

template <typename In, typename Out>
void multiply(const void* weight, const float* __restrict masks, int64_t count, void* out) {
  const auto* __restrict w = static_cast<const typename In::Storage*>(weight);
  auto* __restrict o = static_cast<typename Out::Storage*>(out);
  for (int64_t i = 0; i < count; ++i) o[i] = Out::store(In::load(w[i]) * masks[i]);
}

// A select and not a product, so that an infinite or NaN weight outside the circuit gives +0.
template <typename In, typename Out>
void select_scaled(const void* weight, const float* __restrict logits, float scale, int64_t count, void* out) {
  const auto* __restrict w = static_cast<const typename In::Storage*>(weight);
  auto* __restrict o = static_cast<typename Out::Storage*>(out);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t kept = logits[i] > 0.0f ? 0xffffffffu : 0u;
    o[i] = static_cast<typename Out::Storage>(Out::store(In::load(w[i]) * scale) & kept);
  }
}

// The same for scale 1: no arithmetic at all where the dtype stays, so that the weight keeps its bits.
template <typename In, typename Out>
void select_bits(const void* weight, const float* __restrict logits, int64_t count, void* out) {
  const auto* __restrict w = static_cast<const typename In::Storage*>(weight);
  auto* __restrict o = static_cast<typename Out::Storage*>(out);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t kept = logits[i] > 0.0f ? 0xffffffffu : 0u;
    o[i] = static_cast<typename Out::Storage>(Out::store(In::load(w[i])) & kept);
  }
}

template <>
void select_bits<BFloat16, BFloat16>(const void* weight, const float* __restrict logits, int64_t count, void* out) {
  const auto* __restrict w = static_cast<const uint16_t*>(weight);
  auto* __restrict o = static_cast<uint16_t*>(out);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t kept = logits[i] > 0.0f ? 0xffffffffu : 0u;
    o[i] = static_cast<uint16_t>(w[i] & kept);
  }
}

template <typename In, typename Out>
void blocks_typed(const MaterializeArgs& args, int64_t first, int64_t last, double* partials) {
  alignas(64) float logits_buffer[kMaterializeBlock];
  alignas(64) float masks[kMaterializeBlock];
  const bool own_logit = args.units == args.numel;  // then inner == 1, and logits lie as the weights do
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * kMaterializeBlock;
    const int64_t count = args.numel - begin < kMaterializeBlock ? args.numel - begin : kMaterializeBlock;
    const auto* weight = static_cast<const typename In::Storage*>(args.weight) + begin;
    auto* out = static_cast<typename Out::Storage*>(args.out) + begin;
    if (args.hard) {
      const float* logits = args.logits + begin;
      if (!own_logit) {
        expand(args.logits, args.units, args.inner, begin, count, logits_buffer);
        logits = logits_buffer;
      }
      hard_masks(logits, count, args.scale, masks);
      if (args.scale == 1.0f) {
        select_bits<In, Out>(weight, logits, count, out);
      } else {
        select_scaled<In, Out>(weight, logits, args.scale, count, out);
      }
    } else {
      if (own_logit) {
        soft_masks(args.logits + begin, count, args.temperature, args.scale, masks);
      } else {
        expand(args.unit_masks, args.units, args.inner, begin, count, masks);
      }
      multiply<In, Out>(weight, masks, count, out);
    }
    partials[block] = sum(masks, count);
  }
}

void blocks(const MaterializeArgs& args, int64_t first, int64_t last, double* partials) {
  const bool from_bf16 = args.weight_dtype == Dtype::bfloat16;
  const bool to_bf16 = args.out_dtype == Dtype::bfloat16;
  if (from_bf16 && to_bf16) {
    blocks_typed<BFloat16, BFloat16>(args, first, last, partials);
  } else if (from_bf16) {
    blocks_typed<BFloat16, Float32>(args, first, last, partials);
  } else if (to_bf16) {
    blocks_typed<Float32, BFloat16>(args, first, last, partials);
  } else {
    blocks_typed<Float32, Float32>(args, first, last, partials);
  }
}

}  // namespace

extern const MaterializeKernels materialize_kernels;
const MaterializeKernels materialize_kernels = {soft_masks, blocks};

}  // namespace CSMASK_ISA
}  // namespace csmask
