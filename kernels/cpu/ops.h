// The kernels as each instruction set has them; table.cpp collects them for the bindings.
#pragma once

#include "kernels.h"

namespace csmask {
namespace CSMASK_ISA {

void materialize(const MaterializeArgs& args, int64_t first, int64_t last, MaskPartial* partials);
void logits_grad(const LogitsGradArgs& args, int64_t first, int64_t last);

extern const Kernels kernels;

}  // namespace CSMASK_ISA
}  // namespace csmask
