"""C++ kernels on a CPU for neuron masks, packed hard masks and random draws, each with the signature of its operator.

An operator falls back to ``_plain`` where there is no kernel for it, as in ``_cpp``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _cpp, _plain

_WORD_BITS = 32


def scale_neurons(
    z: Tensor, mask_logits: Tensor, temperature: Tensor, bias: Tensor | None, hard: bool, scale: float, dim: int
) -> Tensor:
    dtypes = [z.dtype] if bias is None else [z.dtype, bias.dtype]
    if _cpp.kernels is None or not _cpp.has_kernel(mask_logits, *dtypes):
        return _plain.OPS["scale_neurons"](z, mask_logits, temperature, bias, hard, scale, dim)
    out = _cpp.empty_like(z)
    added = None if bias is None else bias.detach()
    mask = (mask_logits.detach(), temperature.item(), added, hard, scale, dim % z.dim())
    _cpp.kernels.scale_neurons(z.detach(), *mask, out, torch.get_num_threads())
    return out


def scale_neurons_grad(
    dout: Tensor, z: Tensor, mask_logits: Tensor, temperature: Tensor, dl0: Tensor | None, hard: bool, scale: float,
    dim: int, weights_per_logit: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if _cpp.kernels is None or not _cpp.has_kernel(mask_logits, z.dtype, dout.dtype):
        arguments = (dout, z, mask_logits, temperature, dl0, hard, scale, dim, weights_per_logit)
        return _plain.OPS["scale_neurons_grad"](*arguments)
    dz, threads, dim = _cpp.empty_like(z), torch.get_num_threads(), dim % z.dim()
    given, logits = dout.detach(), mask_logits.detach()
    if hard:
        _cpp.kernels.scale_neurons(given, logits, temperature.item(), None, True, scale, dim, dz, threads)
        return dz, torch.zeros_like(mask_logits)
    dlogits = torch.empty_like(mask_logits)
    dl0_of_unit = _cpp.as_number(dl0) * weights_per_logit
    mask = (logits, temperature.item(), dl0_of_unit, scale, dim)
    _cpp.kernels.scale_neurons_grad(given, z.detach(), *mask, dz, dlogits, threads)
    return dz, dlogits


def pack_mask(mask_logits: Tensor) -> Tensor:
    if _cpp.kernels is None or mask_logits.dtype not in _cpp.DTYPES:
        return _plain.OPS["pack_mask"](mask_logits)
    bits = mask_logits.new_empty(-(-mask_logits.numel() // _WORD_BITS), dtype=torch.int32)
    _cpp.kernels.pack_mask(mask_logits.detach(), bits, torch.get_num_threads())
    return bits


def unpack_mask(bits: Tensor, size: Sequence[int]) -> Tensor:
    words = -(-math.prod(size) // _WORD_BITS)
    if _cpp.kernels is None or bits.numel() < words:
        return _plain.OPS["unpack_mask"](bits, size)
    out = bits.new_empty(list(size), dtype=torch.bool)
    _cpp.kernels.unpack_mask(bits[:words], out, torch.get_num_threads())
    return out


def popcount(bits: Tensor) -> Tensor:
    if _cpp.kernels is None:
        return _plain.OPS["popcount"](bits)
    return torch.tensor(_cpp.kernels.popcount(bits, torch.get_num_threads()), dtype=torch.int64)


def apply_bitmask(weight: Tensor, bits: Tensor, scale: float, dtype: torch.dtype | None = None) -> Tensor:
    dtype = dtype or weight.dtype
    if _cpp.kernels is None or weight.dtype not in _cpp.DTYPES or dtype not in _cpp.DTYPES:
        return _plain.OPS["apply_bitmask"](weight, bits, scale, dtype)
    out = _cpp.empty_like(weight, dtype)
    row_length = weight.shape[-1] if weight.dim() else 1
    _cpp.kernels.apply_bitmask(weight.detach(), bits, 0, row_length, 1, scale, out, torch.get_num_threads())
    return out


def philox_(out: Tensor, kind: str, seed_lo: int, seed_hi: int, stream: int, purpose: int, scale: float) -> None:
    dtypes = (torch.int64,) if kind == "words" else _cpp.DTYPES
    if _cpp.kernels is None or out.dtype not in dtypes:
        _plain.OPS["philox_"](out, kind, seed_lo, seed_hi, stream, purpose, scale)
        return
    _cpp.kernels.philox_(out.detach(), kind, seed_lo, seed_hi, stream, purpose, scale, torch.get_num_threads())


OPS: dict[str, Callable[..., Any]] = {
    "scale_neurons": scale_neurons,
    "scale_neurons_grad": scale_neurons_grad,
    "pack_mask": pack_mask,
    "unpack_mask": unpack_mask,
    "popcount": popcount,
    "apply_bitmask": apply_bitmask,
    "philox_": philox_,
}
