"""``leaf_linear``: a dense linear operation on a masked weight whose gradient waits for an optimizer.

Autograd would make the weight's gradient of every micro-batch in memory of its own and in 16 bits, for others to add
up. Here the product itself adds to the sum in fp32: a read and a write of the sum, and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import reference
from .masked_leaf import MaskedLeaf


class _LeafLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, bias: Tensor | None, leaf: MaskedLeaf, transposed: bool) -> Tensor:
        ctx.save_for_backward(x)
        # Not saved: hooks that move what is saved elsewhere have no business with the weight, which stays.
        ctx.value, ctx.leaf, ctx.transposed = value, leaf, transposed
        return reference.apply_linear(x, value.detach(), bias, transposed)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (x,), value = ctx.saved_tensors, ctx.value
        ctx.leaf.check_value(value)
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            # With create_graph=True the value has a part in the gradient's graph.
            dx = reference.apply_linear(dout, value, None, not ctx.transposed)
        rows = dout.reshape(-1, dout.shape[-1])
        inputs = x.reshape(-1, x.shape[-1])
        # Of the inputs' nodes, the value's: asking for it anew would make a view of the value.
        if value.requires_grad and torch._C._will_engine_execute_node(ctx.next_functions[1][0]):
            ctx.leaf.receive_product(*((inputs.t(), rows) if ctx.transposed else (rows.t(), inputs)))
        if ctx.needs_input_grad[2]:
            dbias = rows.sum(0)
        return dx, None, dbias, None, None


def leaf_linear(x: Tensor, value: Tensor, bias: Tensor | None, leaf: MaskedLeaf, transposed: bool) -> Tensor:
    """``y = x value^T + b``, whose gradient of ``value`` goes to the leaf.

    Args:
        x: ``(..., in)`` of the value's dtype.
        value: the leaf's masked weight, ``(out, in)``, or ``(in, out)`` where ``transposed``.
        bias: ``(out,)`` or None.
    """
    return _LeafLinear.apply(x, value, bias, leaf, transposed)
