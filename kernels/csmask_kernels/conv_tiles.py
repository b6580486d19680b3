"""What the convolution kernels share: a tile of pixels, a tile of the masked weight, arguments from tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import GemmConfig, Target
from .mask import apply_mask, mask_value

Pair = tuple[int, int]


@triton.jit
def output_pixels(pid_m, height, width, BLOCK_M: tl.constexpr):
    """Image (int64), row and column of a tile of pixels; behind the last image, the image's number is too large."""
    start = pid_m.to(tl.int64) * BLOCK_M
    image = start // (height * width)
    offs = (start - image * (height * width)).to(tl.int32) + tl.arange(0, BLOCK_M)
    pixel = offs % (height * width)
    return image + offs // (height * width), pixel // width, pixel % width


@triton.jit
def masked_tile(
    w_ptrs, s_ptrs, inside, temperature, scale, dtype: tl.constexpr, HARD: tl.constexpr, SCALED: tl.constexpr
):
    """``W * m`` rounded to the other operand's dtype, and the mask in fp32; outside, 0 and any number."""
    w = tl.load(w_ptrs, mask=inside, other=0.0)
    mask = mask_value(tl.load(s_ptrs, mask=inside, other=0.0), temperature, scale, HARD, SCALED)
    return apply_mask(w, mask, HARD).to(dtype), mask


def block_for(block: int, size: int) -> int:
    """``block``, or the power of two (at least the matrix unit's 16) that covers a smaller size."""
    return min(block, max(16, triton.next_power_of_2(size)))


def sum_block_for(config: GemmConfig, size: int, dtype: torch.dtype) -> int:
    """``block_k`` for a sum over ``size``: configs are made for 2-byte operands, 4-byte ones take half the step."""
    return block_for(max(config.block_k * 2 // dtype.itemsize, 16), size)


def is_wide(*tensors: Tensor) -> bool:
    """Whether offsets within these tensors need 64 bits; in 32 they take half the registers."""
    extents = (sum((n - 1) * abs(s) for n, s in zip(t.shape, t.stride(), strict=True)) for t in tensors if t.numel())
    return max(extents, default=0) >= 2**31


def image_strides(**images: Tensor) -> dict[str, int]:
    """``stride_xb, stride_xc, stride_xh, stride_xw`` for ``x=...``."""
    return {f"stride_{n}{axis}": s for n, t in images.items() for axis, s in zip("bchw", t.stride(), strict=True)}


def weight_strides(**weights: Tensor) -> dict[str, int]:
    """``stride_wo, stride_wc, stride_wh, stride_ww`` for ``w=...``."""
    return {f"stride_{n}{axis}": s for n, t in weights.items() for axis, s in zip("ochw", t.stride(), strict=True)}


def geometry(weight: Tensor, stride: Pair, dilation: Pair) -> dict[str, int]:
    """The kernels' constants that describe the convolution."""
    return {
        "KERNEL_H": weight.shape[2], "KERNEL_W": weight.shape[3], "STRIDE_H": stride[0], "STRIDE_W": stride[1],
        "DILATION_H": dilation[0], "DILATION_W": dilation[1],
    }  # fmt: skip


def empty_in_format_of(image: Tensor, shape: Sequence[int]) -> Tensor:
    """An image of the dtype and memory format of another; channels-last only where that one is nothing else."""
    channels_last = image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=image.dtype, device=image.device, memory_format=memory_format)


def candidate_configs(op: str, target: Target, rows: int, out_channels: int, channels: int) -> list[GemmConfig]:
    """What ``bench/tune.py`` times for one of the convolution's ops: at most 8 configs, for 2-byte operands.

    Args:
        op: "masked_conv", "masked_conv_dx" or "masked_conv_dlogits".
        target: what the kernel runs on.
        rows: pixels: of the result; for the gradient of the logits those that are summed.
        out_channels, channels: of the weight.
    """
    tiles: tuple[tuple[int, int, int], ...]  # block_m, block_n, warps
    stages = 2 if target.backend == "hip" else 3
    narrow = target.family in ("sm_120", "gfx942")  # shared memory for half the step
    if op == "masked_conv_dlogits":
        tall, wide, splits = out_channels, channels, 2 * target.multiprocessors
        tiles = ((32, 32, 4), (64, 32, 4), (64, 64, 4), (128, 64, 8))
        steps = (32,) if narrow else (32, 64)
    else:
        tall, wide, splits = rows, channels if op == "masked_conv_dx" else out_channels, 1
        # Every row of tiles computes the mask anew: tall tiles, wherever there are pixels to fill them.
        tiles = ((32, 64, 4), (64, 32, 4), (64, 64, 4), (128, 32, 4), (128, 64, 8), (128, 128, 8), (256, 64, 8))
        steps = (32,) if narrow else (64,)
    return [
        GemmConfig(m, n, min(step, 32) if m * n > 128 * 64 else step, split_k=splits, num_warps=w, num_stages=stages)
        for m, n, w in tiles
        for step in steps
        if m <= max(tall, 64) and n <= max(wide, 32)
    ]
