// What the bindings and the kernels of materialize share; plain data only (see mask.h on why).
#pragma once

#include <stdint.h>

namespace csmask {

enum class Dtype { float32, bfloat16 };

// Elements per block: the unit of work and of the l0 partials. A fixed number, so that neither the partials nor the
// order of their sum depends on how many threads there are. 2048 floats of scratch stay in the L1 cache.
constexpr int64_t kMaterializeBlock = 2048;

struct MaterializeArgs {
  const void* weight;
  Dtype weight_dtype;
  void* out;
  Dtype out_dtype;
  int64_t numel;
  const float* logits;  // (units,)
  // (units,) the soft mask where one logit serves several weights; null where every weight has its own logit
  const float* unit_masks;
  int64_t units;
  int64_t inner;  // element i uses logit (i / inner) % units
  float temperature;
  float scale;
  bool hard;
};

// The kernels of one instruction set.
struct MaterializeKernels {
  // masks[i] = scale * sigmoid(temperature * logits[i]), i < count
  void (*soft_masks)(const float* logits, int64_t count, float temperature, float scale, float* masks);
  // Blocks first <= b < last of the masked weight, and their sums of the mask in partials[b].
  void (*blocks)(const MaterializeArgs& args, int64_t first, int64_t last, double* partials);
};

}  // namespace csmask
