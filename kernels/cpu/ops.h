// The kernels as each instruction set has them; table.cpp collects them for the bindings.
#pragma once

#include "kernels.h"

namespace csmask {
namespace CSMASK_ISA {

void materialize(const MaterializeArgs& args, int64_t first, int64_t last, MaskPartial* partials);
void logits_grad(const LogitsGradArgs& args, int64_t first, int64_t last);
void mask_step(const MaskStepArgs& args, int64_t first, int64_t last, MaskPartial* partials);
void mask_grad_squares(const MaskStepArgs& args, int64_t first, int64_t last, double* partials);
void unit_masks(const float* logits, int64_t stride, int64_t count, float temperature, float scale, float* masks);
void scale_neurons(const ScaleNeuronsArgs& args, int64_t first, int64_t last);
void neuron_sums(const NeuronSumsArgs& args, int64_t first, int64_t last);
void neuron_logits_grad(const NeuronLogitsGradArgs& args, int64_t first, int64_t last);
void pack_mask(const PackMaskArgs& args, int64_t first, int64_t last);
void unpack_mask(const UnpackMaskArgs& args, int64_t first, int64_t last);
int64_t popcount(const BitWords& bits, int64_t first, int64_t last);
void apply_bitmask(const ApplyBitmaskArgs& args, int64_t first, int64_t last);
void philox(const PhiloxArgs& args, int64_t first, int64_t last);

extern const Kernels kernels;

}  // namespace CSMASK_ISA
}  // namespace csmask
