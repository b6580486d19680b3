"""Masked operations with gradients: checks and autograd around the operators of ``_ops``.

Each function has the signature and meaning of its namesake in ``reference``. What differs is the cost: the masked
weight is made by one kernel, is not saved for backward but rebuilt there, and the gradient of the logits is one more
kernel. These functions have first derivatives; for higher ones use ``reference``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _ops, reference

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_temperature(temperature: float) -> float:
    """The temperature as a float, if it is a positive finite number."""
    value = float(temperature)
    fp32 = torch.finfo(torch.float32)
    if not fp32.tiny <= value <= fp32.max:
        raise ValueError(
            f"temperature must be a positive finite number (it multiplies the logits) in fp32's range, got {value}"
        )
    return value


def check_masked_weight(weight: Tensor, mask_logits: Tensor, name: str = "mask_logits") -> None:
    """Raise unless ``mask_logits`` can mask ``weight``: dtypes, device, and a shape of unit weight or neuron."""
    if weight.dtype not in _FLOATS:
        raise TypeError(f"weight must have dtype float16, bfloat16, float32 or float64, got {weight.dtype}")
    if mask_logits.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must have dtype float32 or float64 (lower ones lose updates), got {mask_logits.dtype}")
    if mask_logits.device != weight.device:
        raise ValueError(f"{name} must be on {weight.device} like weight, got {mask_logits.device}")
    if mask_logits.shape == weight.shape:
        return
    is_unit = mask_logits.dim() == weight.dim() and all(
        m in (1, w) for m, w in zip(mask_logits.shape, weight.shape, strict=True)
    )
    if not is_unit or sum(m != 1 for m in mask_logits.shape) > 1:
        raise ValueError(
            f"{name} must have shape {tuple(weight.shape)} to match weight, or 1 in every dimension but one "
            f"(one logit per neuron), got {tuple(mask_logits.shape)}"
        )


def _prepare_input(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``x`` and ``bias`` in the dtype that the operation runs in, the autocast dtype where autocast is on."""
    if x.device != weight.device:
        raise ValueError(f"x must be on {weight.device} like weight, got {x.device}")
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocast and x.is_floating_point() and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return x.to(dtype), None if bias is None else bias.to(dtype)
    if x.dtype != weight.dtype:
        raise TypeError(
            f"x must have dtype {weight.dtype} to match weight, got {x.dtype}; cast it or run under torch.autocast"
        )
    return x, bias


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, features: int, units: int, dim: int) -> None:
    """Raise unless ``x`` has ``features`` in dimension ``dim`` and ``bias`` fits the output's ``units``."""
    if x.dim() < -dim or x.shape[dim] != features:
        raise ValueError(
            f"x must have {features} features in dimension {dim} to match weight {tuple(weight.shape)}, "
            f"got shape {tuple(x.shape)}"
        )
    if bias is not None and (tuple(bias.shape) != (units,) or bias.device != weight.device):
        raise ValueError(
            f"bias must have shape ({units},) and be on {weight.device} to match weight {tuple(weight.shape)}, "
            f"got {tuple(bias.shape)} on {bias.device}"
        )


def _temperature_tensor(temperature: Tensor | float, mask_logits: Tensor) -> Tensor:
    if isinstance(temperature, Tensor):
        if temperature.dim() != 0:
            raise ValueError(f"temperature must be a number or a 0-d tensor, got shape {tuple(temperature.shape)}")
        return temperature.to(mask_logits.device)
    # fp64, so that a Python float reaches the arithmetic unrounded; kernels round it to the logits' dtype.
    return torch.tensor(check_temperature(temperature), dtype=torch.float64, device=mask_logits.device)


class _Materialize(torch.autograd.Function):
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
        ctx.hard, ctx.scale, ctx.mask_inputs = hard, scale, (0, 1)
        ctx.set_materialize_grads(False)
        return _ops.materialize(weight, mask_logits, temperature, hard, scale, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmasked_weight: Tensor | None, dl0: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, mask_logits, temperature = ctx.saved_tensors
        if dmasked_weight is None:
            dmasked_weight = torch.zeros_like(weight)
        dweight, dlogits = _weight_and_logits_grads(ctx, dmasked_weight, weight, mask_logits, temperature, dl0)
        return dweight, dlogits, None, None, None, None


def _weight_and_logits_grads(
    ctx: Any,
    dmasked_weight: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor,
    dl0: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Chain rule from the masked weight to its two factors, which are inputs ``ctx.mask_inputs`` of the node."""
    weight_input, logits_input = ctx.mask_inputs
    dweight = dlogits = None
    if ctx.needs_input_grad[weight_input]:
        # d(W * m)/dW = m: the gradient is masked as the weight was.
        dweight, _ = _ops.materialize(dmasked_weight, mask_logits, temperature, ctx.hard, ctx.scale, weight.dtype)
    if ctx.needs_input_grad[logits_input] and not ctx.hard:
        dlogits = _ops.logits_grad(dmasked_weight, weight, mask_logits, temperature, dl0, ctx.scale)
    return dweight, dlogits


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        mask_logits: Tensor,
        temperature: Tensor,
        bias: Tensor | None,
        hard: bool,
        scale: float,
        transposed: bool,
    ) -> Tensor:
        needs_dweight = ctx.needs_input_grad[1] or (ctx.needs_input_grad[2] and not hard)
        ctx.save_for_backward(x if needs_dweight else None, weight, mask_logits, temperature)
        ctx.hard, ctx.scale, ctx.transposed, ctx.mask_inputs = hard, scale, transposed, (1, 2)
        ctx.dtype = x.dtype
        masked_weight, _ = _ops.materialize(weight, mask_logits, temperature, hard, scale, x.dtype)
        return reference.apply_linear(x, masked_weight, bias, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask_logits, temperature = ctx.saved_tensors
        dx = dweight = dlogits = dbias = None
        rows = reference.as_rows(dout)  # (M, N)
        if ctx.needs_input_grad[0]:
            masked_weight, _ = _ops.materialize(weight, mask_logits, temperature, ctx.hard, ctx.scale, ctx.dtype)
            dx = rows @ (masked_weight.t() if ctx.transposed else masked_weight)
            dx = dx.view(*dout.shape[:-1], dx.shape[-1])
        if x is not None:
            x = reference.as_rows(x)  # (M, K)
            dmasked_weight = x.t() @ rows if ctx.transposed else rows.t() @ x
            dweight, dlogits = _weight_and_logits_grads(ctx, dmasked_weight, weight, mask_logits, temperature)
        if ctx.needs_input_grad[4]:
            dbias = rows.sum(0)
        return dx, dweight, dlogits, None, dbias, None, None, None


class _MaskedConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        mask_logits: Tensor,
        temperature: Tensor,
        bias: Tensor | None,
        hard: bool,
        scale: float,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mask_logits, temperature)
        ctx.hard, ctx.scale, ctx.mask_inputs = hard, scale, (1, 2)
        ctx.needs_dweight = ctx.needs_input_grad[1] or (ctx.needs_input_grad[2] and not hard)
        ctx.geometry = (stride, padding, dilation, False, (0,) * len(stride), groups)
        masked_weight, _ = _ops.materialize(weight, mask_logits, temperature, hard, scale, x.dtype)
        return torch.convolution(x, masked_weight, bias, *ctx.geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask_logits, temperature = ctx.saved_tensors
        wants = [ctx.needs_input_grad[0], ctx.needs_dweight, ctx.needs_input_grad[4]]
        masked_weight, _ = _ops.materialize(weight, mask_logits, temperature, ctx.hard, ctx.scale, x.dtype)
        bias_sizes = [weight.shape[0]] if wants[2] else None
        dx, dmasked_weight, dbias = torch.ops.aten.convolution_backward(
            dout, x, masked_weight, bias_sizes, *ctx.geometry, wants
        )
        dweight = dlogits = None
        if ctx.needs_dweight:
            dweight, dlogits = _weight_and_logits_grads(ctx, dmasked_weight, weight, mask_logits, temperature)
        return dx, dweight, dlogits, None, dbias, None, None, None, None, None, None


def materialize(
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor | float,
    hard: bool = False,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The masked weight ``W * m`` and the l0 sum of its mask; see ``reference.materialize``.

    Both results are differentiable in ``weight`` and ``mask_logits``; one kernel serves both gradients.

    Raises:
        TypeError: a dtype that is not a float, or logits below fp32.
        ValueError: shapes or devices that do not match, a temperature that is not positive and finite.
    """
    check_masked_weight(weight, mask_logits)
    if dtype is not None and dtype not in _FLOATS:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    temperature = _temperature_tensor(temperature, mask_logits)
    return _Materialize.apply(weight, mask_logits, temperature, hard, scale, dtype)


def l0(
    mask_logits: Tensor,
    temperature: Tensor | float,
    hard: bool = False,
    scale: float = 1.0,
    weights_per_logit: int = 1,
) -> Tensor:
    """The sum of the mask, counted in weights; see ``reference.l0``."""
    return reference.l0(mask_logits, _temperature_tensor(temperature, mask_logits), hard, scale, weights_per_logit)


def masked_linear(
    x: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor | float,
    bias: Tensor | None = None,
    *,
    hard: bool = False,
    scale: float = 1.0,
    transposed: bool = False,
) -> Tensor:
    """``y = x (W * m)^T + b``; see ``reference.masked_linear``.

    Saves ``x``, ``weight`` and ``mask_logits`` for backward, nothing else.

    Raises:
        TypeError: a dtype that is not a float, or ``x`` of another dtype than ``weight`` outside autocast.
        ValueError: shapes or devices that do not match, a temperature that is not positive and finite.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight must be 2-d, got shape {tuple(weight.shape)}")
    check_masked_weight(weight, mask_logits)
    x, bias = _prepare_input(x, weight, bias)
    in_dim, out_dim = (0, 1) if transposed else (1, 0)
    _check_shapes(x, weight, bias, weight.shape[in_dim], weight.shape[out_dim], dim=-1)
    temperature = _temperature_tensor(temperature, mask_logits)
    return _MaskedLinear.apply(x, weight, mask_logits, temperature, bias, hard, scale, transposed)


def masked_conv(
    x: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor | float,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    hard: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """The convolution of ``x`` with ``W * m``, 1-d or 2-d by the rank of ``weight``; see ``reference.masked_conv``.

    Saves ``x``, ``weight`` and ``mask_logits`` for backward, nothing else.

    Raises:
        TypeError, ValueError: as ``masked_linear``; also a weight that is not 3-d or 4-d.
    """
    if weight.dim() not in (3, 4):
        raise ValueError(f"weight must be 3-d (conv1d) or 4-d (conv2d), got shape {tuple(weight.shape)}")
    check_masked_weight(weight, mask_logits)
    x, bias = _prepare_input(x, weight, bias)
    dims = weight.dim() - 2
    if x.dim() not in (dims + 1, dims + 2):
        raise ValueError(f"x must have {dims + 2} dimensions, or {dims + 1} unbatched, got shape {tuple(x.shape)}")
    _check_shapes(x, weight, bias, weight.shape[1] * groups, weight.shape[0], dim=-dims - 1)
    temperature = _temperature_tensor(temperature, mask_logits)
    batched = x.dim() == dims + 2
    stride, dilation = reference.as_tuple(stride, dims), reference.as_tuple(dilation, dims)
    x = x if batched else x.unsqueeze(0)
    x, pad = reference.pad_input(x, weight.shape[2:], stride, padding, dilation, padding_mode)
    out = _MaskedConv.apply(x, weight, mask_logits, temperature, bias, hard, scale, stride, pad, dilation, groups)
    return out if batched else out.squeeze(0)
