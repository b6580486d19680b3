"""Gradients around the operators of ``_ops``: one autograd function per way of computing a masked operation.

Arguments were checked by ``functional``. First derivatives only; for higher ones there is ``reference``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import mask_sum, reference
from ._ops import ops
from .first_derivative import first_derivative_only
from .quantised import QuantisedWeight, dense

# Devices whose kernels take a weight in blocks that stay in the cache.
_IN_BLOCKS = ("cpu",)


class Materialize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        mask_logits: Tensor,
        temperature: Tensor,
        hard: bool,
        scale: float,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight, mask_logits, temperature)
        ctx.hard, ctx.scale, ctx.mask_inputs, ctx.accumulate = hard, scale, (0, 1), False
        ctx.set_materialize_grads(False)
        return ops.materialize(weight, mask_logits, temperature, hard, scale, dtype)[:2]

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dmasked_weight: Tensor | None, dl0: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, mask_logits, temperature = ctx.saved_tensors
        dweight, dlogits = _weight_and_logits_grads(ctx, dmasked_weight, weight, mask_logits, temperature, dl0)
        return dweight, dlogits, None, None, None, None


class KeptMaskedWeight(torch.autograd.Function):
    """``Materialize`` of a masked weight and an l0 that are there already."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, mask_logits: Tensor, temperature: Tensor, scale: float, value: Tensor, l0: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight, mask_logits, temperature)
        ctx.hard, ctx.scale, ctx.mask_inputs, ctx.accumulate = False, scale, (0, 1), False
        ctx.set_materialize_grads(False)
        return value.detach(), l0.clone()

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dmasked_weight: Tensor | None, dl0: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, mask_logits, temperature = ctx.saved_tensors
        _, dlogits = _weight_and_logits_grads(ctx, dmasked_weight, weight, mask_logits, temperature, dl0)
        return None, dlogits, None, None, None, None


def _weight_and_logits_grads(
    ctx: Any,
    dmasked_weight: Tensor | None,
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor,
    dl0: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Chain rule from the masked weight to its two factors, which are inputs ``ctx.mask_inputs`` of the node."""
    weight_input, logits_input = ctx.mask_inputs
    dweight = dlogits = None
    if dmasked_weight is None:  # only the l0 sum was used: a zero that takes no memory
        dmasked_weight = weight.new_zeros(()).expand(weight.shape)
    if ctx.needs_input_grad[weight_input]:
        # d(W * m)/dW = m: the gradient is masked as the weight was.
        dweight, _, _ = ops.materialize(dmasked_weight, mask_logits, temperature, ctx.hard, ctx.scale, weight.dtype)
    if ctx.needs_input_grad[logits_input] and not ctx.hard:
        arguments = (dmasked_weight, weight, mask_logits, temperature, dl0, ctx.scale)
        dlogits = _logits_grad(ctx, mask_logits, "logits_grad", arguments)
    return dweight, dlogits


def _logits_grad(ctx: Any, mask_logits: Tensor, op: str, arguments: tuple[Any, ...]) -> Tensor | None:
    """What ``op`` gives as the gradient of the logits; None where it was added to ``mask_logits.grad`` itself."""
    if ctx.accumulate and _can_add_to_grad(mask_logits):
        getattr(ops, f"{op}_")(mask_logits.grad, *arguments)
        return None
    return getattr(ops, op)(*arguments)


def _can_add_to_grad(leaf: Tensor) -> bool:
    """Whether a kernel may add to ``leaf.grad``: it is there, dense fp32, and autograd would do just that and no more.

    Hooks want to see the gradient, and ``torch.autograd.grad`` and ``backward(inputs=...)`` accumulate nothing here.
    """
    grad = leaf.grad if leaf.is_leaf else None
    if grad is None or grad.dtype != torch.float32 or grad.layout != torch.strided or grad.is_inference():
        return False
    if leaf._backward_hooks or leaf._post_accumulate_grad_hooks or grad.stride() != leaf.stride():
        return False
    try:
        return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(leaf).node)
    except RuntimeError:  # torch.autograd.grad of the leaf itself
        return False


def _save_weight(ctx: Any, weight: Tensor | QuantisedWeight) -> Tensor | None:
    """What to save of a weight for backward: nothing of a quantised one, which is dequantised there again."""
    ctx.quantised = weight if isinstance(weight, QuantisedWeight) else None
    return weight if isinstance(weight, Tensor) else None


class MaskedOp(torch.autograd.Function):
    """A linear operation or a convolution with ``W * m``, and the l0 sum of the mask.

    ``geometry`` is ``transposed`` (a bool) for a linear operation, else what ``torch.convolution`` takes after its
    bias. Saved for backward are ``x``, ``weight`` and ``mask_logits``; the masked weight is rebuilt there, or ``kept``
    has it. A quantised weight is not saved but dequantised, in forward and in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | QuantisedWeight,
        mask_logits: Tensor,
        temperature: Tensor,
        bias: Tensor | None,
        hard: bool,
        scale: float,
        geometry: Any,
        in_kernel: bool,
        kept: Any,
        accumulate: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.needs_dweight = ctx.needs_input_grad[1] or (ctx.needs_input_grad[2] and not hard)
        is_linear = isinstance(geometry, bool)
        # A convolution's input gradient asks for the input's shape.
        saved_x = x if ctx.needs_dweight or not is_linear else None
        ctx.save_for_backward(saved_x, _save_weight(ctx, weight), mask_logits, temperature)
        ctx.hard, ctx.scale, ctx.geometry, ctx.mask_inputs = hard, scale, geometry, (1, 2)
        ctx.dtype, ctx.in_kernel, ctx.kept, ctx.accumulate = x.dtype, in_kernel, kept, accumulate
        ctx.set_materialize_grads(False)
        mask_sum.expect(ctx)
        mask = (dense(weight), mask_logits, temperature)
        if in_kernel:
            out, l0 = _in_kernel_forward(x, *mask, bias, hard, scale, geometry)
        else:
            masked_weight, l0 = _masked_weight(kept, *mask, hard, scale, x.dtype)
            out = _dense_forward(x, masked_weight, bias, geometry)
        if hard or not ctx.needs_input_grad[2]:
            ctx.mark_non_differentiable(l0)
        return out, l0

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dout: Tensor | None, dl0: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, mask_logits, temperature = ctx.saved_tensors
        dl0 = mask_sum.take(ctx, dl0)
        weight = weight if ctx.quantised is None else ctx.quantised.dense()
        mask = (weight, mask_logits, temperature)
        dx = dweight = dlogits = dbias = None
        if dout is None:
            if ctx.needs_dweight:
                dweight, dlogits = _weight_and_logits_grads(ctx, None, *mask, dl0)
        elif ctx.in_kernel and not ctx.needs_input_grad[1]:
            dx, dlogits, dbias = _in_kernel_backward(ctx, dout, x, *mask, dl0)
        else:
            in_blocks = _takes_logits_grad_in_blocks(ctx, mask_logits, weight)
            wants = [ctx.needs_input_grad[0], ctx.needs_dweight and not in_blocks, ctx.needs_input_grad[4]]
            masked_weight = weight  # not used where only the weight's gradient is wanted
            if wants[0]:
                masked_weight, _ = _masked_weight(ctx.kept, *mask, ctx.hard, ctx.scale, ctx.dtype)
            dx, dmasked_weight, dbias = _dense_backward(dout, x, masked_weight, ctx.geometry, wants)
            if in_blocks:
                assert x is not None
                arguments = (reference.as_rows(dout), reference.as_rows(x), *mask, dl0, ctx.scale, ctx.geometry)
                dlogits = _logits_grad(ctx, mask_logits, "masked_linear_dlogits", arguments)
            elif ctx.needs_dweight:
                dweight, dlogits = _weight_and_logits_grads(ctx, dmasked_weight, *mask, dl0)
        return dx, dweight, dlogits, None, dbias, None, None, None, None, None, None


def _takes_logits_grad_in_blocks(ctx: Any, mask_logits: Tensor, weight: Tensor) -> bool:
    """Whether a kernel makes the logits' gradient without the masked weight's, though the masked weight is in memory.

    On a CPU that saves two passes over the weight at no cost; on a GPU a library's product and one pass are faster.
    """
    is_linear, own_logits = isinstance(ctx.geometry, bool), mask_logits.shape == weight.shape
    wants_only_logits = ctx.needs_dweight and not ctx.needs_input_grad[1]
    return weight.device.type in _IN_BLOCKS and is_linear and own_logits and wants_only_logits


def _masked_weight(
    kept: Any, weight: Tensor, mask_logits: Tensor, temperature: Tensor, hard: bool, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if kept is not None:
        return kept.get(weight, mask_logits, temperature, hard, scale, dtype)
    return ops.materialize(weight, mask_logits, temperature, hard, scale, dtype)[:2]


def _dense_forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any) -> Tensor:
    if isinstance(geometry, bool):
        return reference.apply_linear(x, weight, bias, geometry)
    return torch.convolution(x, weight, bias, *geometry)


def _dense_backward(
    dout: Tensor, x: Tensor | None, weight: Tensor, geometry: Any, wants: list[bool], memory: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias, those that are wanted; the weight may be a stand-in where ``x``'s is not.

    That of a linear layer's weight is written to ``memory``, if there is any.
    """
    if not isinstance(geometry, bool):
        assert x is not None
        weight = weight if weight.dtype == x.dtype else weight.to(x.dtype)
        bias_sizes = [weight.shape[0]] if wants[2] else None
        return torch.ops.aten.convolution_backward(dout, x, weight, bias_sizes, *geometry, wants)
    dx = dweight = None
    rows = reference.as_rows(dout)  # (M, N)
    if wants[0]:
        dx = rows @ (weight.t() if geometry else weight)
        dx = dx.view(*dout.shape[:-1], dx.shape[-1])
    if wants[1]:
        assert x is not None
        x_rows = reference.as_rows(x)  # (M, K)
        dweight = torch.mm(*((x_rows.t(), rows) if geometry else (rows.t(), x_rows)), out=memory)
    return dx, dweight, rows.sum(0) if wants[2] else None


def _in_kernel_forward(
    x: Tensor, weight: Tensor, mask_logits: Tensor, temperature: Tensor, bias: Tensor | None, hard: bool, scale: float,
    geometry: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    mask = (weight, mask_logits, temperature, bias, hard, scale)
    if not isinstance(geometry, bool):
        return ops.masked_conv(x, *mask, *geometry[:3])
    out, l0 = ops.masked_linear(reference.as_rows(x), *mask, geometry)
    return out.view(*x.shape[:-1], out.shape[-1]), l0


def _in_kernel_backward(
    ctx: Any, dout: Tensor, x: Tensor | None, weight: Tensor, mask_logits: Tensor, temperature: Tensor,
    dl0: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of input, logits and bias: neither the masked weight nor its gradient is ever in memory."""
    dx = dlogits = dbias = None
    mask, geometry = (weight, mask_logits, temperature), ctx.geometry
    if isinstance(geometry, bool):
        rows = reference.as_rows(dout)
        arguments = (rows, None if x is None else reference.as_rows(x), *mask, dl0, ctx.scale, geometry)
        if ctx.needs_input_grad[0] and ctx.needs_dweight:
            if ctx.accumulate and _can_add_to_grad(mask_logits):
                dx = ops.masked_linear_backward_(mask_logits.grad, *arguments)
            else:
                dx, dlogits = ops.masked_linear_backward(*arguments)
        elif ctx.needs_input_grad[0]:
            dx = ops.masked_linear_dx(rows, *mask, ctx.hard, ctx.scale, geometry)
        elif ctx.needs_dweight:
            dlogits = _logits_grad(ctx, mask_logits, "masked_linear_dlogits", arguments)
        dx = dx if dx is None else dx.view(*dout.shape[:-1], dx.shape[-1])
    else:
        assert x is not None
        if ctx.needs_input_grad[0]:
            dx = ops.masked_conv_dx(dout, *mask, list(x.shape), ctx.hard, ctx.scale, *geometry[:3])
        if ctx.needs_dweight:
            arguments = (dout, x, *mask, dl0, ctx.scale, *geometry[:3])
            dlogits = _logits_grad(ctx, mask_logits, "masked_conv_dlogits", arguments)
    if ctx.needs_input_grad[4]:
        dbias = _bias_grad(dout, geometry)
    return dx, dlogits, dbias


def _unit_dim(geometry: Any, out: Tensor) -> int:
    """The dimension of a result that counts output units."""
    return out.dim() - 1 if isinstance(geometry, bool) else 1


def _bias_grad(dout: Tensor, geometry: Any) -> Tensor:
    if isinstance(geometry, bool):
        return reference.as_rows(dout).sum(0)
    return dout.sum([d for d in range(dout.dim()) if d != 1])


class NeuronOp(torch.autograd.Function):
    """An operation with one logit per output unit, as the dense operation and a scaled output: ``y = m * (x W^T) + b``.

    Two matrix products in forward and backward instead of three: the logits' gradient is a sum over the output. Saved
    are the unscaled output, ``weight`` and ``mask_logits``, and ``x`` where the weight is trained too; a convolution
    saves it always, since its input gradient asks for it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | QuantisedWeight,
        mask_logits: Tensor,
        temperature: Tensor,
        bias: Tensor | None,
        scale: float,
        geometry: Any,
    ) -> tuple[Tensor, Tensor]:
        unscaled = _dense_forward(x, dense(weight).to(x.dtype), None, geometry)
        keeps_x = ctx.needs_input_grad[1] or not isinstance(geometry, bool)
        ctx.save_for_backward(x if keeps_x else None, unscaled, _save_weight(ctx, weight), mask_logits, temperature)
        ctx.scale, ctx.geometry = scale, geometry
        ctx.set_materialize_grads(False)
        mask_sum.expect(ctx)
        logits = mask_logits.flatten()
        out = ops.scale_neurons(unscaled, logits, temperature, bias, False, scale, _unit_dim(geometry, unscaled))
        per_logit = reference.weights_per_logit(weight, mask_logits)  # type: ignore[arg-type] # sizes alone
        l0 = ops.mask_sums(logits, temperature, False, scale, per_logit, False)[0]
        if not ctx.needs_input_grad[2]:
            ctx.mark_non_differentiable(l0)
        return out, l0

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dout: Tensor | None, dl0: Tensor | None) -> tuple[Tensor | None, ...]:
        x, unscaled, weight, mask_logits, temperature = ctx.saved_tensors
        dl0 = mask_sum.take(ctx, dl0)
        weight = weight if ctx.quantised is None else ctx.quantised
        dx = dweight = dbias = None
        unit_dim = _unit_dim(ctx.geometry, unscaled)
        per_logit = reference.weights_per_logit(weight, mask_logits)
        full = dout if dout is not None else torch.zeros_like(unscaled)
        dunscaled, dlogits = ops.scale_neurons_grad(
            full, unscaled, mask_logits.flatten(), temperature, dl0, False, ctx.scale, unit_dim, per_logit
        )
        if dout is not None:
            wants = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
            dx, dweight, _ = _dense_backward(dunscaled, x, dense(weight).to(dunscaled.dtype), ctx.geometry, wants)
            if ctx.needs_input_grad[4]:
                dbias = _bias_grad(dout, ctx.geometry)
        dweight = None if dweight is None else dweight.to(weight.dtype)
        return dx, dweight, dlogits.view(mask_logits.shape), None, dbias, None, None


class BitmaskLinear(torch.autograd.Function):
    """A linear operation under a packed hard mask; its gradient is the input's and the bias's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, scale: float, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(weight, bits)
        ctx.scale, ctx.transposed = scale, transposed
        out = ops.bitmask_linear(reference.as_rows(x), weight, bits, bias, scale, transposed)
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        weight, bits = ctx.saved_tensors
        dx = dbias = None
        rows = reference.as_rows(dout)
        if ctx.needs_input_grad[0]:
            dx = ops.bitmask_linear_dx(rows, weight, bits, ctx.scale, ctx.transposed)
            dx = dx.view(*dout.shape[:-1], dx.shape[-1])
        if ctx.needs_input_grad[3]:
            dbias = rows.sum(0)
        return dx, None, None, dbias, None, None
