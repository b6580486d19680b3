#include "ops.h"

namespace csmask {
namespace CSMASK_ISA {

const Kernels kernels = {
    materialize,        logits_grad, mask_step,   mask_grad_squares, unit_masks,    scale_neurons, neuron_sums,
    neuron_logits_grad, pack_mask,   unpack_mask, popcount,          apply_bitmask, philox,
};

}  // namespace CSMASK_ISA
}  // namespace csmask
