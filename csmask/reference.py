"""Every csmask operation in plain torch: the specification, the test oracle and a benchmark row.

Tensors: ``weight`` is the frozen weight of any shape; ``mask_logits`` has the weight's shape (unit ``"weight"``) or 1
in every dimension but one (unit ``"neuron"``: one logit per output unit, broadcast over that unit's weights);
``temperature`` *multiplies* the logits and is a float or a 0-d tensor. Arithmetic runs in fp32, or in fp64 where the
weight or the logits are fp64, and is rounded once to the result's dtype.

Method: continuous sparsification, Savarese et al. 2020, https://arxiv.org/abs/1912.04427.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
# |T * S| under which a soft mask still counts as undecided: it lies between 0.018 and 0.982.
UNDECIDED_BOUND = 4.0
WORD_BITS = 32


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that mask arithmetic on these tensors runs in: fp32, or fp64 where one of them is fp64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def weights_per_logit(weight: Tensor, mask_logits: Tensor) -> int:
    """How many weights one mask logit decides about: 1 for unit ``"weight"``, K for unit ``"neuron"``."""
    return weight.numel() // mask_logits.numel() if mask_logits.numel() else 0


class _SoftMask(torch.autograd.Function):
    """``sigmoid(T * S)`` with a derivative that keeps its digits.

    Autograd's own ``m * (1 - m)`` is exactly 0 in fp32 from ``T * S = 17``; ``T * e / (1 + e)**2`` with
    ``e = exp(-|T * S|)`` is right until it underflows. Nothing of the mask's size is saved but ``S`` itself.
    """

    @staticmethod
    def forward(ctx: Any, mask_logits: Tensor, temperature: Tensor) -> Tensor:
        ctx.save_for_backward(mask_logits, temperature)
        return torch.sigmoid(temperature * mask_logits)

    @staticmethod
    def backward(ctx: Any, dmask: Tensor) -> tuple[Tensor, None]:
        mask_logits, temperature = ctx.saved_tensors
        return dmask * _sigmoid_derivative(mask_logits, temperature), None


def _as_temperature(temperature: Tensor | float, like: Tensor) -> Tensor:
    """``temperature`` as a 0-d tensor of ``like``'s dtype and device."""
    if isinstance(temperature, Tensor):
        return temperature.to(device=like.device, dtype=like.dtype)
    return torch.tensor(temperature, dtype=like.dtype, device=like.device)


def soft_mask(mask_logits: Tensor, temperature: Tensor | float, scale: float = 1.0) -> Tensor:
    """``m = scale * sigmoid(T * S)``, in (0, scale): the mask of training.

    Args:
        mask_logits: any shape, fp32 or fp64.
        temperature: multiplies the logits; > 0.
        scale: 1, or ``1 / sigmoid(mask_init_value)`` where the mask is rescaled.

    Returns:
        The mask, shape and dtype of ``mask_logits``.
    """
    mask = _SoftMask.apply(mask_logits, _as_temperature(temperature, mask_logits))
    return mask if scale == 1.0 else mask * scale


def soft_mask_derivative(mask_logits: Tensor, temperature: Tensor | float, scale: float = 1.0) -> Tensor:
    """``dm/dS = scale * T * m * (1 - m)`` as ``scale * T * e / (1 + e)**2`` with ``e = exp(-|T * S|)``."""
    derivative = _sigmoid_derivative(mask_logits, _as_temperature(temperature, mask_logits))
    return derivative if scale == 1.0 else derivative * scale


def _sigmoid_derivative(mask_logits: Tensor, temperature: Tensor) -> Tensor:
    e = torch.exp(-(temperature * mask_logits).abs())
    return temperature * e / (1 + e) ** 2


def hard_mask(mask_logits: Tensor, scale: float = 1.0) -> Tensor:
    """``m = scale if S > 0 else 0`` (a logit of exactly 0 is pruned): the mask of evaluation. Dtype of the logits."""
    return (mask_logits > 0).to(mask_logits.dtype) * scale


def materialize(
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor | float,
    hard: bool = False,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The masked weight ``W * m`` and the sum of its mask.

    A hard mask selects instead of multiplying, so that a kept weight keeps its bits and a pruned one is +0 even where
    the weight is inf or NaN.

    Args:
        weight: any shape, any float dtype.
        mask_logits: broadcastable to ``weight`` as the module docstring says.
        temperature: multiplies the logits; not used by a hard mask.
        hard: hard mask in place of the soft one.
        scale: factor on the mask.
        dtype: of the masked weight; the weight's own by default.

    Returns:
        ``(masked_weight, l0)``: shape of ``weight``; 0-d, fp32 (fp64 for fp64 inputs), counted in weights.
    """
    compute = compute_dtype(weight, mask_logits)
    logits = mask_logits.to(compute)
    mask = hard_mask(logits, scale) if hard else soft_mask(logits, temperature, scale)
    if hard:
        kept = weight if scale == 1.0 else weight.to(compute) * scale
        masked_weight = torch.where(mask_logits > 0, kept, torch.zeros_like(kept))
    else:
        masked_weight = weight.to(compute) * mask
    return masked_weight.to(dtype or weight.dtype), mask.sum() * weights_per_logit(weight, mask_logits)


def logits_grad(
    dmasked_weight: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor | float,
    dl0: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """``dS = (dWm * W + g) * scale * T * m * (1 - m)``, summed over the mask unit.

    Args:
        dmasked_weight: gradient of the masked weight, shape of ``weight``, any float dtype.
        weight, mask_logits, temperature, scale: as ``materialize`` took them.
        dl0: ``g``, the gradient of the l0 sum, 0-d; none for zero.

    Returns:
        The gradient of ``mask_logits``, in its shape and dtype.
    """
    compute = compute_dtype(weight, mask_logits)
    dmask = (dmasked_weight.to(compute) * weight.to(compute)).sum_to_size(mask_logits.shape)
    if dl0 is not None:
        dmask = dmask + dl0.to(compute) * weights_per_logit(weight, mask_logits)
    return (dmask * soft_mask_derivative(mask_logits.to(compute), temperature, scale)).to(mask_logits.dtype)


def l0(
    mask_logits: Tensor,
    temperature: Tensor | float,
    hard: bool = False,
    scale: float = 1.0,
    weights_per_logit: int = 1,
) -> Tensor:
    """The sum of the mask, counted in weights: 0-d, differentiable in the logits when soft."""
    mask = hard_mask(mask_logits, scale) if hard else soft_mask(mask_logits, temperature, scale)
    return mask.sum() * weights_per_logit


def mask_sums(
    mask_logits: Tensor,
    temperature: Tensor | float,
    hard: bool = False,
    scale: float = 1.0,
    weights_per_logit: int = 1,
) -> tuple[Tensor, Tensor]:
    """``l0`` and two counts: how many weights a hard mask keeps, and how many the soft one has not decided about.

    Returns:
        ``(l0, counts)``: as ``l0`` gives it, in fp32 (fp64 for fp64 logits); int64 ``(kept, undecided)`` with
        ``S > 0`` and ``|T * S| < 4``, in weights.
    """
    logits = mask_logits.to(compute_dtype(mask_logits))
    undecided = (_as_temperature(temperature, logits) * logits).abs() < UNDECIDED_BOUND
    counts = torch.stack([(logits > 0).sum(), undecided.sum()]) * weights_per_logit
    return l0(logits, temperature, hard, scale, weights_per_logit), counts


def scale_neurons(
    z: Tensor,
    mask_logits: Tensor,
    temperature: Tensor | float,
    bias: Tensor | None = None,
    hard: bool = False,
    scale: float = 1.0,
    dim: int = -1,
) -> Tensor:
    """``out = z * m + b`` along one dimension: what a layer with unit ``"neuron"`` gives, without a masked weight.

    Args:
        z: the unmasked layer's output before its bias, any shape, any float dtype.
        mask_logits: ``(U,)``, U the size of ``z`` in dimension ``dim``.
        temperature, hard, scale: as in ``materialize``; a hard mask selects.
        bias: ``(U,)``, added after the mask.
        dim: the dimension of the units: -1 for linear layers, 1 for batched convolutions.

    Returns:
        Shape and dtype of ``z``; the sum is rounded once.
    """
    along = [-1 if d == dim % z.dim() else 1 for d in range(z.dim())]
    compute = compute_dtype(z, mask_logits)
    out, _ = materialize(z, mask_logits.view(along), temperature, hard, scale, compute)
    if bias is not None:
        out = out + bias.to(compute).view(along)
    return out.to(z.dtype)


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
    """``y = x (W * m)^T + b``; ``y = x (W * m) + b`` for ``transposed`` weights (GPT-2's ``Conv1D``).

    Args:
        x: ``(..., K)``, the weight's dtype or the autocast dtype.
        weight: ``(N, K)``, or ``(K, N)`` when ``transposed``.
        mask_logits: ``(N, K)`` or ``(N, 1)``; ``(K, N)`` or ``(1, N)`` when ``transposed``.
        temperature, hard, scale: as in ``materialize``.
        bias: ``(N,)``, used as it is.

    Returns:
        ``(..., N)``.
    """
    masked_weight, _ = materialize(weight, mask_logits, temperature, hard, scale, x.dtype)
    return apply_linear(x, masked_weight, bias, transposed)


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
    """The convolution of ``x`` with ``W * m``, 1-d or 2-d by the rank of ``weight``, batched or not.

    Args:
        x: ``(B, C, *size)`` or ``(C, *size)``.
        weight: ``(out, C / groups, *kernel)``.
        mask_logits: the weight's shape, or ``(out, 1, ...)``: one logit per filter.
        bias: ``(out,)``, used as it is.
        stride, padding, dilation, groups, padding_mode: as in ``torch.nn.Conv2d``.
        temperature, hard, scale: as in ``materialize``.
    """
    masked_weight, _ = materialize(weight, mask_logits, temperature, hard, scale, x.dtype)
    x, pad = pad_input(x, weight.shape[2:], stride, padding, dilation, padding_mode)
    conv = F.conv1d if weight.dim() == 3 else F.conv2d
    return conv(x, masked_weight, bias, stride, pad, dilation, groups)


def apply_linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """The unmasked linear operation, by the call that the unmasked layer makes: the numbers are that layer's own."""
    if not transposed:
        return F.linear(x, weight, bias)
    rows = as_rows(x)
    out = torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)
    return out.view(*x.shape[:-1], weight.shape[1])


def as_rows(x: Tensor) -> Tensor:
    """``(..., K)`` as ``(M, K)``; M is written out because ``reshape(-1, 0)`` is ambiguous."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def pad_input(
    x: Tensor,
    kernel: Sequence[int],
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    padding_mode: str,
) -> tuple[Tensor, tuple[int, ...]]:
    """Resolve ``padding`` (numbers, ``"same"``, ``"valid"``) and ``padding_mode`` as ``torch.nn.Conv2d`` does.

    Returns:
        ``(x, pad)``: the input, padded here as far as a convolution's symmetric zero padding cannot, and the rest.

    Raises:
        ValueError: a padding or padding mode that does not exist, or ``"same"`` with a stride.
    """
    dims = len(kernel)
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode must be one of {', '.join(map(repr, PADDING_MODES))}, got {padding_mode!r}")
    if isinstance(padding, str) and padding not in ("same", "valid"):
        raise ValueError(f"padding must be numbers, 'same' or 'valid', got {padding!r}")
    if padding == "same":
        if any(s != 1 for s in as_tuple(stride, dims)):
            raise ValueError(f"padding='same' is not supported for strided convolutions, got stride {stride}")
        total = [d * (k - 1) for d, k in zip(as_tuple(dilation, dims), kernel, strict=True)]
        before = tuple(t // 2 for t in total)
        extra = tuple(t % 2 for t in total)
    else:
        before = (0,) * dims if padding == "valid" else as_tuple(padding, dims)  # type: ignore[arg-type]
        extra = (0,) * dims
    if min(before) < 0:
        raise ValueError(f"padding must not be negative, got {padding}")
    if padding_mode == "zeros":
        return (F.pad(x, _pad_pairs((0,) * dims, extra)) if any(extra) else x), before
    after = tuple(b + e for b, e in zip(before, extra, strict=True))
    return F.pad(x, _pad_pairs(before, after), mode=padding_mode), (0,) * dims


def _pad_pairs(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """The order of ``F.pad``: (before, after) of the last dimension first."""
    return [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair]


def as_tuple(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """One number per spatial dimension; a single one, in a tuple or not, counts for all of them."""
    values = (value,) if isinstance(value, int) else tuple(value)
    if len(values) not in (1, dims):
        raise ValueError(f"stride, padding and dilation must be one number or {dims} of them, got {value}")
    return values * dims if len(values) == 1 else values


# Bit-packed hard masks


def pack_mask(mask_logits: Tensor) -> Tensor:
    """The hard mask in one bit per logit: bit ``i % 32`` of word ``i // 32`` is ``S.flatten()[i] > 0``.

    Args:
        mask_logits: any shape and strides; the order is the logical one, row by row.

    Returns:
        int32, ``(ceil(n / 32),)``; bits past the last logit are 0.
    """
    kept = (mask_logits > 0).flatten()
    bits = F.pad(kept, (0, -kept.numel() % WORD_BITS)).view(-1, WORD_BITS).int()
    # Each bit stands once, so that the sum is their union; bit 31 makes the word negative.
    return (bits << _bit_positions(bits)).sum(1, dtype=torch.int32)


def unpack_mask(bits: Tensor, size: Sequence[int]) -> Tensor:
    """The boolean mask of shape ``size`` that ``pack_mask`` packed."""
    kept = (bits.unsqueeze(1) >> _bit_positions(bits) & 1).bool()
    return kept.flatten()[: math.prod(size)].view(list(size))


def popcount(bits: Tensor) -> Tensor:
    """How many bits are set, that is how many logits are kept: int64, 0-d."""
    return unpack_mask(bits, (WORD_BITS * bits.numel(),)).sum()


def apply_bitmask(weight: Tensor, bits: Tensor, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    """The masked weight of ``materialize`` with the hard mask whose bits these are: it selects."""
    kept = unpack_mask(bits, weight.shape).to(weight.dtype)
    return materialize(weight, kept, 1.0, True, scale, dtype)[0]


def _bit_positions(like: Tensor) -> Tensor:
    return torch.arange(WORD_BITS, dtype=torch.int32, device=like.device)
