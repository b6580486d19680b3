"""``masked_conv``: 2-d convolution with ``W * m`` as an implicit matrix product, the mask computed on operand tiles.

Forward and input gradient; the gradient of the logits is in ``masked_conv_dlogits``. Nothing of the weight's size is
written. A 1-d convolution comes as one of height 1.

Only ``groups == 1``. With groups an output reads ``C / groups`` channels: a depthwise 3 x 3 filter has 9 products per
output where a matrix unit wants hundreds, and its weight is small: ``9 * C`` numbers, 6 bytes each with bf16 weights
and fp32 logits, are 55 KB for C = 1024, beside activations of megabytes. There ``materialize`` (8 to 12 bytes per
weight, 0.1 MB) and the vendor's grouped convolution do it.

Any strides are read in place, and the layout decides how:

* Channels-last x (``x.stride(1) == 1``): the sum runs over the taps, then over tiles of channels, so that a step lies
  in one tap: 16-byte loads of x, and of W and S where they are channels-last too (else a lane reads every tap-th one).
* Channels-first x: the transposed tile is computed, with pixels along the lanes: a warp reads neighbouring pixels, one
  per lane, since a filter's shift leaves no alignment to rely on. The sum of the forward runs over ``(c, kh, kw)``
  flattened where W and S lie in memory like that: 16-byte loads of both.
* Fewer than 16 channels, the matrix unit's step: flattened too. By taps, 3 channels would be padded to 16, five times
  the products; flattened, a 7 x 7 x 3 filter is 147 of 160. What cannot be viewed flat is copied, being small.

``GemmConfig`` here: ``block_m`` pixels x ``block_n`` channels of the result, ``block_k`` along the sum (input channels
in the forward, output channels in the gradient). Programs of one row of tiles are neighbours, for they read the same
pixels. The mask of a tile of weights is computed anew for every row of tiles: a soft mask's exponential and reciprocal,
``block_n * block_k`` of each, weigh on ``block_m * block_n * block_k`` products, and ask for tall tiles. ``group_m``,
``split_k``, ``swap``, ``persistent`` and ``subtiles`` are not used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv_tiles import (
    Pair,
    block_for,
    empty_in_format_of,
    geometry,
    image_strides,
    is_wide,
    masked_tile,
    output_pixels,
    sum_block_for,
    weight_strides,
)
from .conv_tiles import candidate_configs as candidate_configs  # bench/tune.py asks the op's module
from .launch import GemmConfig, Launch, Target, check_supported, fp32_products, get_config, run, target_of
from .mask import load_temperature

DEFAULT_CONFIG = GemmConfig(block_m=64, block_n=64, block_k=32, num_warps=4, num_stages=3)
STRIDED_CONFIG = GemmConfig(block_m=64, block_n=32, block_k=32, num_warps=4, num_stages=3)


@triton.jit
def _masked_conv_fwd_kernel(
    x_ptr, w_ptr, s_ptr, bias_ptr, out_ptr, t_ptr, l0_ptr, scale,
    batch, channels, height, width, out_channels, out_height, out_width, pad_h, pad_w,
    stride_xb, stride_xc, stride_xh, stride_xw, stride_outb, stride_outc, stride_outh, stride_outw,
    stride_wo, stride_wc, stride_wh, stride_ww, stride_so, stride_sc, stride_sh, stride_sw, stride_bias,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, FLAT: tl.constexpr, PIXELS_INNER: tl.constexpr,
    WIDE: tl.constexpr,
    HARD: tl.constexpr, SCALED: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out[b, o, p, q] = sum of x[b, c, p * stride - pad + kh * dilation, ...] * (W * m)[o, c, kh, kw]``.

    Program ``(pid_m, pid_n)`` makes BLOCK_M pixels x BLOCK_N output channels; those with ``pid_m == 0`` see the whole
    weight once and write the l0 partials, one slot per ``pid_n``. Reads W and S once per row of tiles, x about
    ``kernel / stride`` times per column of tiles, mostly from L1 and L2; writes out once.
    FLAT: the sum's index is ``(c, kh, kw)`` and ``stride_wc``, ``stride_sc`` are strides of that index.
    PIXELS_INNER: tiles of x are (BLOCK_K, BLOCK_M), the accumulator (BLOCK_N, BLOCK_M).
    """
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    PIXEL_AXIS: tl.constexpr = 0 if PIXELS_INNER else 1  # the axis that a vector of pixels is broadcast along
    SUM_AXIS: tl.constexpr = 1 - PIXEL_AXIS
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    tiles_n = tl.cdiv(out_channels, BLOCK_N)
    pid_m = tl.program_id(0) // tiles_n
    pid_n = tl.program_id(0) % tiles_n

    image, p, q = output_pixels(pid_m, out_height, out_width, BLOCK_M)
    image = tl.expand_dims(image.to(OFFSET), PIXEL_AXIS)
    p, q = tl.expand_dims(p, PIXEL_AXIS), tl.expand_dims(q, PIXEL_AXIS)
    is_pixel = image < batch
    h0 = p * STRIDE_H - pad_h
    w0 = q * STRIDE_W - pad_w
    x_pixels = image * stride_xb + h0.to(OFFSET) * stride_xh + w0.to(OFFSET) * stride_xw
    offs_o = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    is_o = offs_o < out_channels
    w_rows = offs_o.to(OFFSET)[:, None] * stride_wo
    s_rows = offs_o.to(OFFSET)[:, None] * stride_so

    temperature = load_temperature(t_ptr)
    if PIXELS_INNER:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    l0 = tl.sum(tl.zeros((BLOCK_N,), dtype=tl.float32))
    tiles_c = tl.cdiv(channels, BLOCK_K)
    for step in range(tl.cdiv(channels * TAPS, BLOCK_K) if FLAT else tiles_c * TAPS):
        if FLAT:
            k = step * BLOCK_K + tl.arange(0, BLOCK_K)
            is_k = k < channels * TAPS
            c, tap = k // TAPS, k % TAPS
            w_offs, s_offs = k.to(OFFSET) * stride_wc, k.to(OFFSET) * stride_sc
            kh, kw = tl.expand_dims(tap // KERNEL_W, SUM_AXIS), tl.expand_dims(tap % KERNEL_W, SUM_AXIS)
        else:
            c = (step % tiles_c) * BLOCK_K + tl.arange(0, BLOCK_K)
            is_k = c < channels
            kh, kw = (step // tiles_c) // KERNEL_W, (step // tiles_c) % KERNEL_W
            w_offs = c.to(OFFSET) * stride_wc + kh.to(OFFSET) * stride_wh + kw.to(OFFSET) * stride_ww
            s_offs = c.to(OFFSET) * stride_sc + kh.to(OFFSET) * stride_sh + kw.to(OFFSET) * stride_sw
        h = h0 + kh * DILATION_H
        w = w0 + kw * DILATION_W
        inside = is_pixel & (h >= 0) & (h < height) & (w >= 0) & (w < width) & tl.expand_dims(is_k, SUM_AXIS)
        x_offs = tl.expand_dims(c.to(OFFSET) * stride_xc, SUM_AXIS)
        x_offs += (kh * DILATION_H).to(OFFSET) * stride_xh + (kw * DILATION_W).to(OFFSET) * stride_xw
        x = tl.load(x_ptr + (x_pixels + x_offs), mask=inside, other=0.0)

        is_weight = is_o[:, None] & is_k[None, :]
        wm, mask = masked_tile(
            w_ptr + (w_rows + w_offs[None, :]), s_ptr + (s_rows + s_offs[None, :]), is_weight,
            temperature, scale, x.dtype, HARD, SCALED,
        )  # fmt: skip
        if pid_m == 0:
            # Where the tile hangs over, the logit 0 has a soft mask of 1/2: it must not count.
            l0 += tl.sum(tl.where(is_weight, mask, 0.0))
        if PIXELS_INNER:
            acc = tl.dot(wm, x, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, tl.trans(wm), acc, input_precision=PRECISION)

    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_o * stride_bias, mask=is_o, other=0.0).to(tl.float32)
        acc += tl.expand_dims(bias, SUM_AXIS)
    out = image * stride_outb + p.to(OFFSET) * stride_outh + q.to(OFFSET) * stride_outw
    out += tl.expand_dims(offs_o.to(OFFSET) * stride_outc, SUM_AXIS)
    tl.store(out_ptr + out, acc.to(out_ptr.dtype.element_ty), mask=is_pixel & tl.expand_dims(is_o, SUM_AXIS))
    if pid_m == 0:
        tl.store(l0_ptr + pid_n, l0)


@triton.jit
def _first_tap(offset, KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, PERIOD: tl.constexpr):
    """The smallest tap for which STRIDE divides ``offset - tap * DILATION``; KERNEL where there is none."""
    first = offset * 0 + KERNEL
    for i in tl.static_range(PERIOD):
        tap = PERIOD - 1 - i
        first = tl.where((offset - tap * DILATION) % STRIDE == 0, tl.minimum(first, tap), first)
    return first


@triton.jit
def _masked_conv_dx_kernel(
    dout_ptr, w_ptr, s_ptr, dx_ptr, t_ptr, scale,
    batch, channels, height, width, out_channels, out_height, out_width, pad_h, pad_w,
    stride_doutb, stride_doutc, stride_douth, stride_doutw, stride_dxb, stride_dxc, stride_dxh, stride_dxw,
    stride_wo, stride_wc, stride_wh, stride_ww, stride_so, stride_sc, stride_sh, stride_sw,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PERIOD_H: tl.constexpr, PERIOD_W: tl.constexpr,
    PIXELS_INNER: tl.constexpr, WIDE: tl.constexpr,
    HARD: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``dx[b, c, h, w] = sum of dout[b, o, (h + pad - kh * dilation) / stride, ...] * (W * m)[o, c, kh, kw]``.

    A gather: each pixel of dx is summed by one program and written once. A tap counts where the stride divides, which
    depends on ``h % stride`` alone: a program's pixels share these remainders (its phase), so that it walks its own
    taps, every PERIOD-th one, and a strided gradient costs no more products than the forward did.
    Program ``((pid_m, phase), pid_n)`` makes BLOCK_M pixels of a phase x BLOCK_N input channels, the sum runs over the
    taps and tiles of BLOCK_K output channels. Reads W and S once per row of tiles, writes dx once.
    """
    PIXEL_AXIS: tl.constexpr = 0 if PIXELS_INNER else 1
    SUM_AXIS: tl.constexpr = 1 - PIXEL_AXIS
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    # From one tap of a phase to its next, the pixel of dout moves by this; the division has no remainder.
    STEP_H: tl.constexpr = PERIOD_H * DILATION_H // STRIDE_H
    STEP_W: tl.constexpr = PERIOD_W * DILATION_W // STRIDE_W
    tiles_n = tl.cdiv(channels, BLOCK_N)
    pid_n = tl.program_id(0) % tiles_n
    phase = (tl.program_id(0) // tiles_n) % (STRIDE_H * STRIDE_W)
    pid_m = tl.program_id(0) // tiles_n // (STRIDE_H * STRIDE_W)
    phase_h, phase_w = phase // STRIDE_W, phase % STRIDE_W

    image, h, w = output_pixels(pid_m, tl.cdiv(height, STRIDE_H), tl.cdiv(width, STRIDE_W), BLOCK_M)
    image = tl.expand_dims(image.to(OFFSET), PIXEL_AXIS)
    h = tl.expand_dims(h * STRIDE_H + phase_h, PIXEL_AXIS)
    w = tl.expand_dims(w * STRIDE_W + phase_w, PIXEL_AXIS)
    is_pixel = (image < batch) & (h < height) & (w < width)
    first_h = _first_tap(phase_h + pad_h, KERNEL_H, STRIDE_H, DILATION_H, PERIOD_H)
    first_w = _first_tap(phase_w + pad_w, KERNEL_W, STRIDE_W, DILATION_W, PERIOD_W)
    taps_h, taps_w = tl.cdiv(KERNEL_H - first_h, PERIOD_H), tl.cdiv(KERNEL_W - first_w, PERIOD_W)
    p0 = (h + pad_h - first_h * DILATION_H) // STRIDE_H
    q0 = (w + pad_w - first_w * DILATION_W) // STRIDE_W
    dout_pixels = image * stride_doutb + p0.to(OFFSET) * stride_douth + q0.to(OFFSET) * stride_doutw
    offs_c = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    is_c = offs_c < channels
    w_columns = offs_c.to(OFFSET)[None, :] * stride_wc
    s_columns = offs_c.to(OFFSET)[None, :] * stride_sc

    temperature = load_temperature(t_ptr)
    if PIXELS_INNER:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    tiles_o = tl.cdiv(out_channels, BLOCK_K)
    for step in range(taps_h * taps_w * tiles_o):
        o = (step % tiles_o) * BLOCK_K + tl.arange(0, BLOCK_K)
        is_o = o < out_channels
        # A phase without taps has no step; the pipeline may still compute the first one's addresses.
        tap_h, tap_w = (step // tiles_o) // tl.maximum(taps_w, 1), (step // tiles_o) % tl.maximum(taps_w, 1)
        p = p0 - tap_h * STEP_H
        q = q0 - tap_w * STEP_W
        inside = is_pixel & (p >= 0) & (p < out_height) & (q >= 0) & (q < out_width) & tl.expand_dims(is_o, SUM_AXIS)
        offs = tl.expand_dims(o.to(OFFSET) * stride_doutc, SUM_AXIS)
        offs -= (tap_h * STEP_H).to(OFFSET) * stride_douth + (tap_w * STEP_W).to(OFFSET) * stride_doutw
        dout = tl.load(dout_ptr + (dout_pixels + offs), mask=inside, other=0.0)

        kh, kw = (first_h + tap_h * PERIOD_H).to(OFFSET), (first_w + tap_w * PERIOD_W).to(OFFSET)
        w_offs = o.to(OFFSET) * stride_wo + kh * stride_wh + kw * stride_ww
        s_offs = o.to(OFFSET) * stride_so + kh * stride_sh + kw * stride_sw
        wm, _ = masked_tile(
            w_ptr + (w_columns + w_offs[:, None]), s_ptr + (s_columns + s_offs[:, None]), is_o[:, None] & is_c[None, :],
            temperature, scale, dout.dtype, HARD, SCALED,
        )  # fmt: skip
        if PIXELS_INNER:
            acc = tl.dot(tl.trans(wm), dout, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(dout, wm, acc, input_precision=PRECISION)

    dx = image * stride_dxb + h.to(OFFSET) * stride_dxh + w.to(OFFSET) * stride_dxw
    dx += tl.expand_dims(offs_c.to(OFFSET) * stride_dxc, SUM_AXIS)
    tl.store(dx_ptr + dx, acc.to(dx_ptr.dtype.element_ty), mask=is_pixel & tl.expand_dims(is_c, SUM_AXIS))


def plan(
    x: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    hard: bool,
    scale: float,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    out: Tensor,
    target: Target,
    config: GemmConfig | None = None,
) -> tuple[Launch, Tensor]:
    """The launch that writes ``out``, and the l0 partials; ``mask_logits`` has been expanded to the weight's shape."""
    batch, channels, height, width = x.shape
    out_channels, out_height, out_width = out.shape[1:]
    rows = batch * out_height * out_width
    if config is None:
        # Strided pixels take an address each: larger tiles spill registers, as compiled with Triton 3.6 and 3.9.
        is_strided = max(stride) > 1 and channels >= 16
        config = STRIDED_CONFIG if is_strided else get_config("masked_conv", target, rows, DEFAULT_CONFIG)
    pixels_inner = x.stride(1) != 1
    flat = channels < 16 or (pixels_inner and _is_flat(weight) and _is_flat(mask_logits))
    constants: dict[str, Any] = {
        **geometry(weight, stride, dilation), "FLAT": flat, "PIXELS_INNER": pixels_inner,
        "WIDE": is_wide(x, weight, mask_logits, out), "HARD": hard, "SCALED": scale != 1.0,
        "HAS_BIAS": bias is not None, "PRECISION": fp32_products(target, convolution=True),
        "BLOCK_M": config.block_m, "BLOCK_N": block_for(config.block_n, out_channels),
        "BLOCK_K": sum_block_for(config, weight[:1].numel() if flat else channels, x.dtype),
    }  # fmt: skip
    if flat:
        weight, mask_logits = weight.flatten(1)[:, :, None, None], mask_logits.flatten(1)[:, :, None, None]
    tiles_n = triton.cdiv(out_channels, constants["BLOCK_N"])
    # Without pixels (an empty batch) one row of tiles still sums the mask.
    tiles_m = max(triton.cdiv(rows, config.block_m), 1)
    l0 = torch.empty(tiles_n, dtype=torch.float32, device=x.device)
    arguments: dict[str, Any] = {
        "x_ptr": x, "w_ptr": weight, "s_ptr": mask_logits, "bias_ptr": bias, "out_ptr": out, "t_ptr": temperature,
        "l0_ptr": l0, "scale": scale,
        "batch": batch, "channels": channels, "height": height, "width": width,
        "out_channels": out_channels, "out_height": out_height, "out_width": out_width,
        "pad_h": padding[0], "pad_w": padding[1],
        **image_strides(x=x, out=out), **weight_strides(w=weight, s=mask_logits),
        "stride_bias": 0 if bias is None else bias.stride(0),
    }  # fmt: skip
    grid = (tiles_m * tiles_n,)
    return Launch(_masked_conv_fwd_kernel, grid, arguments, constants, config.num_warps, config.num_stages), l0


def plan_dx(
    dout: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor,
    hard: bool,
    scale: float,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    dx: Tensor,
    target: Target,
    config: GemmConfig | None = None,
) -> Launch:
    """The launch that writes ``dx``; ``mask_logits`` has been expanded to the weight's shape."""
    batch, channels, height, width = dx.shape
    out_channels, out_height, out_width = dout.shape[1:]
    config = config or get_config("masked_conv_dx", target, batch * height * width, DEFAULT_CONFIG)
    arguments: dict[str, Any] = {
        "dout_ptr": dout, "w_ptr": weight, "s_ptr": mask_logits, "dx_ptr": dx, "t_ptr": temperature, "scale": scale,
        "batch": batch, "channels": channels, "height": height, "width": width,
        "out_channels": out_channels, "out_height": out_height, "out_width": out_width,
        "pad_h": padding[0], "pad_w": padding[1],
        **image_strides(dout=dout, dx=dx), **weight_strides(w=weight, s=mask_logits),
    }  # fmt: skip
    constants: dict[str, Any] = {
        **geometry(weight, stride, dilation),
        "PERIOD_H": stride[0] // math.gcd(stride[0], dilation[0]),
        "PERIOD_W": stride[1] // math.gcd(stride[1], dilation[1]),
        "PIXELS_INNER": dout.stride(1) != 1, "WIDE": is_wide(dout, weight, mask_logits, dx),
        "HARD": hard, "SCALED": scale != 1.0, "PRECISION": fp32_products(target, convolution=True),
        "BLOCK_M": config.block_m, "BLOCK_N": block_for(config.block_n, channels),
        "BLOCK_K": sum_block_for(config, out_channels, dout.dtype),
    }  # fmt: skip
    rows_of_phase = batch * triton.cdiv(height, stride[0]) * triton.cdiv(width, stride[1])
    tiles = triton.cdiv(rows_of_phase, config.block_m) * triton.cdiv(channels, constants["BLOCK_N"])
    grid = (tiles * stride[0] * stride[1],)
    return Launch(_masked_conv_dx_kernel, grid, arguments, constants, config.num_warps, config.num_stages)


def _is_flat(weight: Tensor) -> bool:
    """Whether ``(c, kh, kw)`` lie in memory as one dimension, in this order."""
    dims = [d for d in (1, 2, 3) if weight.shape[d] != 1]
    return all(weight.stride(a) == weight.shape[b] * weight.stride(b) for a, b in pairwise(dims))


def output_size(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> list[int]:
    """Height and width of the result, as ``torch.nn.Conv2d`` has them."""
    walked = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in walked]


def masked_conv(
    x: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    hard: bool,
    scale: float,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    config: GemmConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``csmask.reference.masked_conv`` (2-d, one group, batched): the result, in x's memory format, and l0."""
    check_supported(x=x, weight=weight, mask_logits=mask_logits, bias=bias)
    out = empty_in_format_of(x, (x.shape[0], weight.shape[0], *output_size(x, weight, stride, padding, dilation)))
    launch, l0 = plan(
        x, weight, mask_logits.expand(weight.shape), temperature, bias, hard, scale, stride, padding, dilation, out,
        target_of(x), config,
    )  # fmt: skip
    run(x.device, launch)
    return out, l0.sum()


def masked_conv_dx(
    dout: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor,
    input_size: Sequence[int],
    hard: bool,
    scale: float,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    config: GemmConfig | None = None,
) -> Tensor:
    """The gradient of ``masked_conv``'s input, of shape ``input_size``, in dout's dtype and memory format."""
    check_supported(dout=dout, weight=weight, mask_logits=mask_logits)
    dx = empty_in_format_of(dout, input_size)
    launch = plan_dx(
        dout, weight, mask_logits.expand(weight.shape), temperature, hard, scale, stride, padding, dilation, dx,
        target_of(dout), config,
    )  # fmt: skip
    run(dout.device, launch)
    return dx
