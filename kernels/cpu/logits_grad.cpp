// logits_grad: dS (+)= (dWm * W + dl0) * scale * T * sigmoid'(T * S).
//
// Where a block of dWm is still in the cache, the next product's masked weight can take its place: of one exp, in one
// visit of W and S.
//
// Bytes moved per weight in bf16 with a logit each: 2 (dWm) + 2 (W) + 4 (S) + 4 (dS), 4 more where it adds.
#include "convert.h"
#include "kernels.h"
#include "mask.h"
#include "mask_loops.h"
#include "ops.h"
#include "runs.h"

namespace csmask {
namespace CSMASK_ISA {
namespace {

struct Buffers {
  alignas(64) float weight[kBlock];
  alignas(64) float dmasked_weight[kBlock];
  alignas(64) float logits[kBlock];
  alignas(64) float values[kBlock];
  alignas(64) float masks[kBlock];
};

void run(const LogitsGradArgs& args, const int64_t* offsets, int64_t n, Buffers& buffers) {
  const int inner = args.layout.dims - 1;
  const auto stride = [&](int operand) { return args.layout.stride[operand][inner]; };
  prefetch_rows_ahead(args.layout, 1, args.logits + offsets[1], 4, n);
  const float* logits = load(args.logits + offsets[1], Dtype::float32, stride(1), n, buffers.logits);
  float* values = buffers.values;
  if (args.masked_weight != nullptr) {
    masks_and_derivatives(logits, n, args.temperature, args.scale, buffers.masks, values);
  } else {
    derivatives(logits, n, args.temperature, args.scale, values);
  }
  if (args.weight != nullptr) {
    const void* weight = at(args.weight, args.weight_dtype, offsets[2]);
    const void* dmasked_weight = at(args.dmasked_weight, args.dmasked_weight_dtype, offsets[3]);
    prefetch_rows_ahead(args.layout, 2, weight, size_of(args.weight_dtype), n);
    const float* w = load(weight, args.weight_dtype, stride(2), n, buffers.weight);
    chain(load(dmasked_weight, args.dmasked_weight_dtype, stride(3), n, buffers.dmasked_weight), w, args.dl0, n,
          values);
    if (args.masked_weight != nullptr) {
      for (int64_t i = 0; i < n; ++i) buffers.masks[i] *= w[i];
      store(buffers.masks, n, at(args.masked_weight, args.dmasked_weight_dtype, offsets[3]), args.dmasked_weight_dtype,
            stride(3), false);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) values[i] *= args.dl0;
  }
  float* dlogits = args.dlogits + offsets[0];
  if (!args.stream) prefetch_rows_ahead(args.layout, 0, dlogits, 4, n);
  if (args.add) {
    const float* before = load(dlogits, Dtype::float32, stride(0), n, buffers.logits);
    for (int64_t i = 0; i < n; ++i) values[i] += before[i];
  }
  store(values, n, dlogits, Dtype::float32, stride(0), args.stream);
}

}  // namespace

void logits_grad(const LogitsGradArgs& args, int64_t first, int64_t last) {
  Buffers buffers;
  const int operands = args.weight != nullptr ? 4 : 2;
  for (int64_t block = first; block < last; ++block) {
    for_runs(args.layout, operands, block * kBlock, block_end(args.layout, block),
             [&](const int64_t* offsets, int64_t, int64_t n) { run(args, offsets, n, buffers); });
  }
  end_streaming(args.stream);
}

}  // namespace CSMASK_ISA
}  // namespace csmask
