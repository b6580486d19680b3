"""Bit-packed hard masks: ``pack_mask``, ``unpack_mask``, ``popcount`` and ``apply_bitmask``, one bit per weight.

Bit ``i % 32`` of word ``i // 32`` belongs to entry ``i`` in logical row-major order, whatever the strides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ElementwiseConfig, Launch, Target, check_supported, get_config, like, run, target_of, tile

DEFAULT_CONFIG = ElementwiseConfig(block=4096, num_warps=4)


@triton.jit
def _pack_mask_kernel(s_ptr, out_ptr, count, BLOCK_W: tl.constexpr):
    """Program ``pid`` packs BLOCK_W words of 32 logits each: reads the logits once, writes 1/8 byte per logit."""
    offs_w = tl.program_id(0).to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W)
    offs_b = tl.arange(0, 32)
    offs = offs_w[:, None] * 32 + offs_b[None, :]
    s = tl.load(s_ptr + offs, mask=offs < count, other=0.0)
    # Each bit stands once, so that their exclusive or is their union.
    words = tl.xor_sum((s > 0).to(tl.int32) << offs_b[None, :], axis=1)
    tl.store(out_ptr + offs_w, words, mask=offs_w * 32 < count)


@triton.jit
def _unpack_mask_kernel(bits_ptr, out_ptr, count, BLOCK_W: tl.constexpr):
    """Program ``pid`` unpacks BLOCK_W words to one byte per entry: reads 1/8 byte, writes 1."""
    offs_w = (tl.program_id(0).to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W))[:, None]
    offs_b = tl.arange(0, 32)[None, :]
    offs = offs_w * 32 + offs_b
    words = tl.load(bits_ptr + offs_w, mask=offs_w * 32 < count, other=0)
    tl.store(out_ptr + offs, ((words >> offs_b) & 1).to(tl.int8), mask=offs < count)


@triton.jit
def _popcount_kernel(bits_ptr, partials_ptr, words, BLOCK_W: tl.constexpr):
    """Program ``pid`` counts the bits of BLOCK_W words into slot ``pid``: reads 1/8 byte per entry."""
    pid = tl.program_id(0)
    offs = pid.to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W)
    x = tl.load(bits_ptr + offs, mask=offs < words, other=0).to(tl.uint32, bitcast=True)
    # Sums of 2, then 4, 8 and all bits side by side in one word (Hacker's Delight, section 5-1).
    x = (x & 0x55555555) + ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x += x >> 8
    x = (x + (x >> 16)) & 0x3F
    tl.store(partials_ptr + pid, tl.sum(x.to(tl.int32)))


@triton.jit
def _selected(weight, words, position, scale, SCALED: tl.constexpr):
    """The weight in fp32 where bit ``position`` of its word is set, times ``scale`` where SCALED, else +0."""
    weight = weight.to(tl.float32)
    if SCALED:
        weight = weight * scale
    return tl.where(((words >> position) & 1) != 0, weight, 0.0)


@triton.jit
def _apply_bitmask_kernel(
    w_ptr, bits_ptr, out_ptr, scale, count, SCALED: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """Weights that lie in logical order: a program takes BLOCK_W words and their weights, and loads each word once.

    Bytes per weight: the weight read once, the masked weight written once, 1/8 for the mask.
    """
    offs_w = (tl.program_id(0).to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W))[:, None]
    offs_b = tl.arange(0, 32)[None, :]
    offs = offs_w * 32 + offs_b
    inside = offs < count
    words = tl.load(bits_ptr + offs_w, mask=offs_w * 32 < count, other=0)
    w = tl.load(w_ptr + offs, mask=inside, other=0.0)
    tl.store(out_ptr + offs, _selected(w, words, offs_b, scale, SCALED).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _apply_bitmask_strided_kernel(
    w_ptr, bits_ptr, out_ptr, scale, rows, columns,
    stride_outb, stride_outr, stride_outc, stride_wb, stride_wr, stride_wc, stride_ib, stride_ir, stride_ic,
    SCALED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Weights of any layout, one tile per program; the strides ``i`` give a weight's logical index, hence its bit."""
    pid = tl.program_id(0)
    tiles_c = tl.cdiv(columns, BLOCK_C)
    tiles_r = tl.cdiv(rows, BLOCK_R)
    offs_r = ((pid // tiles_c) % tiles_r).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    offs_c = (pid % tiles_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    outer = (pid // (tiles_c * tiles_r)).to(tl.int64)
    inside = (offs_r < rows) & (offs_c < columns)
    index = outer * stride_ib + offs_r * stride_ir + offs_c * stride_ic
    words = tl.load(bits_ptr + (index >> 5), mask=inside, other=0)
    w = tl.load(w_ptr + outer * stride_wb + offs_r * stride_wr + offs_c * stride_wc, mask=inside, other=0.0)
    out = out_ptr + outer * stride_outb + offs_r * stride_outr + offs_c * stride_outc
    selected = _selected(w, words, (index & 31).to(tl.int32), scale, SCALED)
    tl.store(out, selected.to(out_ptr.dtype.element_ty), mask=inside)


def _words_of(count: int) -> int:
    return triton.cdiv(count, 32)


def plan_pack(mask_logits: Tensor, out: Tensor, target: Target, config: ElementwiseConfig | None = None) -> Launch:
    """The launch that packs contiguous logits."""
    config = config or get_config("pack_mask", target, mask_logits.numel(), DEFAULT_CONFIG)
    arguments = {"s_ptr": mask_logits, "out_ptr": out, "count": mask_logits.numel()}
    return _by_words(_pack_mask_kernel, arguments, {}, config)


def plan_unpack(bits: Tensor, out: Tensor, target: Target, config: ElementwiseConfig | None = None) -> Launch:
    """The launch that unpacks to bytes, ``out``: int8, contiguous."""
    config = config or get_config("unpack_mask", target, out.numel(), DEFAULT_CONFIG)
    return _by_words(_unpack_mask_kernel, {"bits_ptr": bits, "out_ptr": out, "count": out.numel()}, {}, config)


def _by_words(kernel: Any, arguments: dict[str, Any], constants: dict[str, Any], config: ElementwiseConfig) -> Launch:
    block_w = max(config.block // 32, 1)
    grid = (triton.cdiv(_words_of(arguments["count"]), block_w),)
    return Launch(kernel, grid, arguments, {**constants, "BLOCK_W": block_w}, config.num_warps)


def plan_popcount(bits: Tensor, target: Target, config: ElementwiseConfig | None = None) -> tuple[Launch, Tensor]:
    """The launch and its partials, int32: a program's count cannot overflow."""
    config = config or get_config("popcount", target, bits.numel(), DEFAULT_CONFIG)
    programs = triton.cdiv(bits.numel(), config.block)
    partials = torch.empty(programs, dtype=torch.int32, device=bits.device)
    arguments = {"bits_ptr": bits, "partials_ptr": partials, "words": bits.numel()}
    return Launch(_popcount_kernel, (programs,), arguments, {"BLOCK_W": config.block}, config.num_warps), partials


def plan_apply(
    weight: Tensor, bits: Tensor, scale: float, out: Tensor, target: Target, config: ElementwiseConfig | None = None
) -> Launch:
    """The launch that writes the masked weight to ``out``, laid out as ``empty_like(weight)``."""
    config = config or get_config("apply_bitmask", target, weight.numel(), DEFAULT_CONFIG)
    arguments: dict[str, Any] = {"w_ptr": weight, "bits_ptr": bits, "out_ptr": out, "scale": scale}
    constants: dict[str, Any] = {"SCALED": scale != 1.0}
    if weight.is_contiguous() and out.is_contiguous():
        return _by_words(_apply_bitmask_kernel, {**arguments, "count": weight.numel()}, constants, config)
    logical = torch.empty(weight.shape, device="meta")  # for its strides
    tiling = tile(weight.shape, config.block, out, weight, logical)
    if tiling is None:
        arguments["w_ptr"] = like(weight, out)
        tiling = tile(weight.shape, config.block, out, arguments["w_ptr"], logical)
    if tiling is None:  # a weight of four strided dimensions: no layer has one
        raise NotImplementedError(f"weight strides {weight.stride()} of shape {tuple(weight.shape)}; use .contiguous()")
    arguments.update(tiling.arguments("out", "w", "i"))
    constants.update(BLOCK_R=tiling.block_r, BLOCK_C=tiling.block_c)
    return Launch(_apply_bitmask_strided_kernel, (tiling.programs,), arguments, constants, config.num_warps)


def pack_mask(mask_logits: Tensor, config: ElementwiseConfig | None = None) -> Tensor:
    """See ``csmask.reference.pack_mask``. Logits that are not contiguous are copied once.

    Out of order, the copy moves 8 bytes per logit where the gather would fetch a sector of 32 (derived).
    """
    check_supported(mask_logits=mask_logits)
    out = torch.empty(_words_of(mask_logits.numel()), dtype=torch.int32, device=mask_logits.device)
    run(mask_logits.device, plan_pack(mask_logits.contiguous(), out, target_of(mask_logits), config))
    return out


def unpack_mask(bits: Tensor, size: Sequence[int], config: ElementwiseConfig | None = None) -> Tensor:
    """See ``csmask.reference.unpack_mask``; contiguous."""
    out = torch.empty(math.prod(size), dtype=torch.int8, device=bits.device)
    run(bits.device, plan_unpack(bits.contiguous(), out, target_of(bits), config))
    return out.view(torch.bool).view(list(size))


def popcount(bits: Tensor, config: ElementwiseConfig | None = None) -> Tensor:
    """See ``csmask.reference.popcount``."""
    launch, partials = plan_popcount(bits.contiguous(), target_of(bits), config)
    run(bits.device, launch)
    return partials.sum()


def apply_bitmask(
    weight: Tensor,
    bits: Tensor,
    scale: float,
    dtype: torch.dtype | None = None,
    config: ElementwiseConfig | None = None,
) -> Tensor:
    """See ``csmask.reference.apply_bitmask``; the layout is that of ``weight``."""
    check_supported(weight=weight)
    out = torch.empty_like(weight, dtype=dtype or weight.dtype)
    check_supported(masked_weight=out)
    run(weight.device, plan_apply(weight, bits.contiguous(), scale, out, target_of(weight), config))
    return out
