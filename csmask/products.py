"""Matrix products into memory that there is: the weight gradients of micro-batches, added up in fp32.

On a CPU memory that is new is cleared by the system page by page, which for a weight of 4096 x 4096 takes as long as a
product with a few tokens does.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of a product, which is added to the sum while it is in the cache.
_BLOCK_BYTES = 1 << 20


def multiplies_into_fp32(tensor: Tensor) -> bool:
    """Whether the device has one kernel that multiplies 16-bit operands into a sum in fp32."""
    return tensor.is_cuda and torch.version.hip is None


def product(a: Tensor, b: Tensor, dtype: torch.dtype, memory: Tensor | None = None) -> Tensor:
    """``a b`` in ``dtype``, that of the operands or fp32: in ``memory`` if it fits, else in new memory.

    Args:
        a, b: ``(N, M)`` and ``(M, K)``; fp32 from 16 bits is rounded to these on a CPU.
        memory: nothing is read from it; not used where the device multiplies into fp32 by itself.
    """
    shape = (a.shape[0], b.shape[1])
    if dtype != a.dtype and multiplies_into_fp32(a):
        return torch.mm(a, b, out_dtype=dtype)
    if memory is None or (memory.dtype, memory.shape, memory.device) != (dtype, shape, a.device):
        memory = torch.empty(shape, dtype=dtype, device=a.device)
    if dtype == a.dtype:
        return torch.mm(a, b, out=memory)  # where the output is given, autocast changes no dtype
    return _in_blocks(a, b, memory, adds=False)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``total += a b``, in the dtype of the operands or of 16-bit operands in fp32.

    Args:
        total: ``(N, K)``, changed.
        a, b: as in ``product``.
    """
    if total.dtype == a.dtype:
        return total.addmm_(a, b)
    if multiplies_into_fp32(a):
        return torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    return _in_blocks(a, b, total, adds=True)


def _in_blocks(a: Tensor, b: Tensor, total: Tensor, adds: bool) -> Tensor:
    """Block by block of rows, each rounded to the operands' dtype; none of the others' size is ever in memory."""
    size = len(a) if a.is_cuda else max(1, _BLOCK_BYTES // max(1, b.shape[1] * b.element_size()))
    block = torch.empty(min(size, len(a)), b.shape[1], dtype=a.dtype, device=a.device)
    for rows, sums in zip(a.split(size), total.split(size), strict=True):
        found = torch.mm(rows, b, out=block[: len(rows)])
        if adds:
            sums.add_(found)
        else:
            sums.copy_(found)
    return total
