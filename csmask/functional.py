"""Masked operations with gradients: checks around the functions of ``autograd``.

Each function has the meaning of its namesake in ``reference``. What differs is the cost, by ``execution``:

``"per_forward"``
    One kernel makes the masked weight, the dense operation runs on it, and in backward one more kernel turns the
    weight's gradient into that of the logits. The masked weight is not saved but rebuilt in backward.
``"in_kernel"``
    The mask is computed inside the matrix product or convolution, on the tile at hand; neither the masked weight nor
    its gradient is ever in memory. Where there is no such kernel (convolutions on a CPU, fp64, other devices) the
    masked weight is made in forward and again in backward.

With one logit per output unit, both scale the dense operation's output instead, and there is no weight gradient at all.
These functions have first derivatives; for higher ones use ``reference``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import autograd, reference
from ._ops import ops
from .lean import LeanLeaf
from .mask_sum import MaskSum
from .masked_weight import MaskedWeight

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


def check_weight_dtype(dtype: torch.dtype) -> None:
    """Raise unless weights of this dtype can be masked."""
    if dtype not in _FLOATS:
        raise TypeError(f"weight must have dtype float16, bfloat16, float32 or float64, got {dtype}")


def check_masked_weight(weight: Tensor, mask_logits: Tensor, name: str = "mask_logits") -> None:
    """Raise unless ``mask_logits`` can mask ``weight``: dtypes, device, and a shape of unit weight or neuron."""
    check_weight_dtype(weight.dtype)
    if mask_logits.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} must have dtype float32 or float64 (lower ones lose updates), got {mask_logits.dtype}; under FSDP "
            "give no MixedPrecisionPolicy(param_dtype=...), and load the base in that dtype instead"
        )
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
    if bias is not None and bias.dtype != x.dtype:
        raise TypeError(f"bias must have dtype {x.dtype} like x and weight, got {bias.dtype}")


def _temperature_tensor(temperature: Tensor | float, mask_logits: Tensor) -> Tensor:
    if isinstance(temperature, Tensor):
        if temperature.dim() != 0:
            raise ValueError(f"temperature must be a number or a 0-d tensor, got shape {tuple(temperature.shape)}")
        return temperature.to(mask_logits.device)
    # fp64, so that a Python float reaches the arithmetic unrounded; kernels round it to the logits' dtype.
    return torch.tensor(check_temperature(temperature), dtype=torch.float64, device=mask_logits.device)


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
    return autograd.Materialize.apply(weight, mask_logits, temperature, hard, scale, dtype)


def l0(
    mask_logits: Tensor,
    temperature: Tensor | float,
    hard: bool = False,
    scale: float = 1.0,
    weights_per_logit: int = 1,
) -> Tensor:
    """The sum of the mask, counted in weights; see ``reference.l0``."""
    temperature = _temperature_tensor(temperature, mask_logits)
    return MaskSum.apply(mask_logits, temperature, hard, scale, weights_per_logit)


def mask_sums(
    mask_logits: Tensor,
    temperature: Tensor | float,
    hard: bool = False,
    scale: float = 1.0,
    weights_per_logit: int = 1,
) -> tuple[Tensor, Tensor]:
    """The sum of the mask and the counts of kept and undecided weights; see ``reference.mask_sums``. No gradients."""
    temperature = _temperature_tensor(temperature, mask_logits)
    return ops.mask_sums(mask_logits.detach(), temperature, hard, scale, weights_per_logit)


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
    execution: str = "per_forward",
    kept: MaskedWeight | None = None,
    accumulate: bool = False,
    return_l0: bool = False,
    lean: LeanLeaf | None = None,
) -> Any:
    """``y = x (W * m)^T + b``; see ``reference.masked_linear``.

    Saves ``x``, ``weight`` and ``mask_logits`` for backward, nothing else; with one logit per output unit, the
    unscaled output in place of ``x``.

    Args:
        execution: ``"per_forward"`` or ``"in_kernel"``: see this module's docstring.
        kept: where the masked weight of this layer is kept from one use to the next (``"per_forward"``).
        accumulate: add the logits' gradient to ``mask_logits.grad`` in the kernel itself, where there is one; autograd
            then sees no gradient: for plain ``backward()`` calls without hooks on the logits.
        return_l0: return ``(y, l0)``, the second the differentiable sum of the mask, at no pass of its own.
        lean: what steps the logits inside backward, so that they get no gradient; it knows its own l0.

    Raises:
        TypeError: a dtype that is not a float, or ``x`` of another dtype than ``weight`` outside autocast.
        ValueError: shapes or devices that do not match, a temperature that is not positive and finite.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight must be 2-d, got shape {tuple(weight.shape)}")
    check_masked_weight(weight, mask_logits)
    _check_execution(execution)
    x, bias = _prepare_input(x, weight, bias)
    in_dim, out_dim = (0, 1) if transposed else (1, 0)
    _check_shapes(x, weight, bias, weight.shape[in_dim], weight.shape[out_dim], dim=-1)
    temperature = _temperature_tensor(temperature, mask_logits)
    mask = (x, weight, mask_logits, temperature, bias)
    if lean is not None:
        result = lean.apply(x, lean.anchor, bias, lean, transposed), None
    elif is_neuron_mask(weight, mask_logits, out_dim) and not hard:
        result = autograd.NeuronOp.apply(*mask, scale, transposed)
    else:
        in_kernel = _runs_in_kernel(execution, weight, mask_logits, hard)
        kept = None if in_kernel else kept
        result = autograd.MaskedOp.apply(*mask, hard, scale, transposed, in_kernel, kept, accumulate)
    return result if return_l0 else result[0]


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
    execution: str = "per_forward",
    kept: MaskedWeight | None = None,
    accumulate: bool = False,
    return_l0: bool = False,
    lean: LeanLeaf | None = None,
) -> Any:
    """The convolution of ``x`` with ``W * m``, 1-d or 2-d by the rank of ``weight``; see ``reference.masked_conv``.

    Saves ``x``, ``weight`` and ``mask_logits`` for backward, nothing else, and with one logit per filter the unscaled
    output. Grouped and depthwise convolutions have
    small weights and little arithmetic per weight: they run ``"per_forward"`` whatever ``execution`` says.

    Args:
        execution, kept, accumulate, return_l0, lean: as in ``masked_linear``.

    Raises:
        TypeError, ValueError: as ``masked_linear``; also a weight that is not 3-d or 4-d.
    """
    if weight.dim() not in (3, 4):
        raise ValueError(f"weight must be 3-d (conv1d) or 4-d (conv2d), got shape {tuple(weight.shape)}")
    check_masked_weight(weight, mask_logits)
    _check_execution(execution)
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
    in_kernel = _runs_in_kernel(execution, weight, mask_logits, hard) and groups == 1
    kept = None if in_kernel else kept
    is_1d = in_kernel and dims == 1
    if is_1d:  # the kernels are 2-d: a height of 1
        x, weight, mask_logits = x.unsqueeze(2), weight.unsqueeze(2), mask_logits.unsqueeze(2)
        stride, pad, dilation = (1, *stride), (0, *pad), (1, *dilation)
    geometry = (stride, pad, dilation, False, (0,) * len(stride), groups)
    mask = (x, weight, mask_logits, temperature, bias)
    if lean is not None:
        out, l0 = lean.apply(x, lean.anchor, bias, lean, geometry), None
    elif is_neuron_mask(weight, mask_logits, 0) and not hard:
        out, l0 = autograd.NeuronOp.apply(*mask, scale, geometry)
    else:
        out, l0 = autograd.MaskedOp.apply(*mask, hard, scale, geometry, in_kernel, kept, accumulate)
    out = out.squeeze(2) if is_1d else out
    out = out if batched else out.squeeze(0)
    return (out, l0) if return_l0 else out


def is_neuron_mask(weight: Tensor, mask_logits: Tensor, out_dim: int) -> bool:
    """Whether there is one logit per output unit, dimension ``out_dim`` of the weight."""
    return mask_logits.shape != weight.shape and mask_logits.shape[out_dim] == weight.shape[out_dim]


def _runs_in_kernel(execution: str, weight: Tensor, mask_logits: Tensor, hard: bool) -> bool:
    """Whether the kernels with the mask inside can run: those of the logits' gradient know one logit per weight."""
    return execution == "in_kernel" and (hard or mask_logits.shape == weight.shape)


def _check_execution(execution: str) -> None:
    if execution not in ("per_forward", "in_kernel"):
        raise ValueError(f"execution must be 'per_forward' or 'in_kernel', got {execution!r}")


def pack_mask(mask_logits: Tensor) -> Tensor:
    """The hard mask ``S > 0`` in one bit per weight: int32 words, see ``reference.pack_mask``."""
    return ops.pack_mask(mask_logits.detach())


def bitmask_linear(
    x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None = None, *, scale: float = 1.0, transposed: bool = False
) -> Tensor:
    """``y = x (W * m)^T + b`` with the hard mask packed by ``pack_mask``: evaluation in 1/8 byte per weight.

    Args:
        x, weight, bias, scale, transposed: as in ``masked_linear``; gradients go to ``x`` and ``bias`` only.
        bits: ``pack_mask`` of logits of the weight's shape.

    Raises:
        TypeError, ValueError: as ``masked_linear``; also bits that do not fit the weight.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight must be 2-d, got shape {tuple(weight.shape)}")
    words = (weight.numel() + 31) // 32
    if bits.dtype != torch.int32 or tuple(bits.shape) != (words,) or bits.device != weight.device:
        raise ValueError(
            f"bits must be int32 of shape ({words},) on {weight.device} to match weight {tuple(weight.shape)}, "
            f"got {bits.dtype} {tuple(bits.shape)} on {bits.device}"
        )
    x, bias = _prepare_input(x, weight, bias)
    in_dim, out_dim = (0, 1) if transposed else (1, 0)
    _check_shapes(x, weight, bias, weight.shape[in_dim], weight.shape[out_dim], dim=-1)
    return autograd.BitmaskLinear.apply(x, weight.detach(), bits, bias, scale, transposed)
