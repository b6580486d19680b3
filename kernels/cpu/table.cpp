#include "ops.h"

namespace csmask {
namespace CSMASK_ISA {

const Kernels kernels = {
    materialize,
    logits_grad,
};

}  // namespace CSMASK_ISA
}  // namespace csmask
