"""The gradient of ``masked_conv``'s logits: the filter gradient's matrix product, whose epilogue applies the mask's
derivative, so that no gradient of the masked weight reaches memory.

``GemmConfig`` here: ``block_m`` output channels x ``block_n`` input channels of one tap (or entries of ``(c, kh, kw)``
flattened, where there are fewer than 16 channels or x is channels-first), summed ``block_k`` pixels at a time;
``split_k`` is the most programs that share a tile's pixels, used where tiles alone do not fill the device: small
weights over large images. ``group_m``, ``swap``, ``persistent`` and ``subtiles`` are not used.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv_tiles import (
    Pair,
    block_for,
    geometry,
    image_strides,
    is_wide,
    sum_block_for,
    weight_strides,
)
from .conv_tiles import candidate_configs as candidate_configs  # bench/tune.py asks the op's module
from .launch import GemmConfig, Launch, Target, check_supported, fp32_products, get_config, run, target_of
from .mask import load_temperature, soft_mask_derivative

DEFAULT_CONFIG = GemmConfig(block_m=64, block_n=64, block_k=32, split_k=128, num_warps=4, num_stages=3)

# Rows of a tile that one program of the reduction adds up: few, so that a few tiles still make many programs.
REDUCED_ROWS = 8
# Pixels of one split, at most: their numbers are 32-bit.
MAX_SPLIT_ROWS = 1 << 30


@triton.jit
def _columns(pid_n, channels, KERNEL_W: tl.constexpr, TAPS: tl.constexpr, FLAT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Channel, tap's row and column of a tile's columns, and which exist: one tap per tile, or ``(c, kh, kw)`` flat."""
    if FLAT:
        n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        c, tap, is_column = n // TAPS, n % TAPS, n < channels * TAPS
    else:
        tiles_c = tl.cdiv(channels, BLOCK_N)
        c = (pid_n % tiles_c) * BLOCK_N + tl.arange(0, BLOCK_N)
        tap, is_column = pid_n // tiles_c, c < channels
    return c, tap // KERNEL_W, tap % KERNEL_W, is_column


@triton.jit
def _offsets(o, c, kh, kw, stride_o, stride_c, stride_h, stride_w, OFFSET: tl.constexpr):
    """Where a tile of a weight-shaped tensor lies, (rows, columns)."""
    columns = c.to(OFFSET) * stride_c + kh.to(OFFSET) * stride_h + kw.to(OFFSET) * stride_w
    return o.to(OFFSET)[:, None] * stride_o + columns[None, :]


@triton.jit
def _write_dlogits(
    dwm, w_ptrs, s_ptrs, out_ptrs, inside, t_ptr, dl0_ptr, scale,
    HAS_DL0: tl.constexpr, SCALED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """``dS = (dWm * W + g) * T * m * (1 - m)`` of a tile, written, or added where ADD."""
    dmask = dwm * tl.load(w_ptrs, mask=inside, other=0.0).to(tl.float32)
    if HAS_DL0:
        dmask += tl.load(dl0_ptr).to(tl.float32)
    ds = dmask * soft_mask_derivative(tl.load(s_ptrs, mask=inside, other=0.0), load_temperature(t_ptr))
    if SCALED:
        ds = ds * scale
    if ADD:
        ds += tl.load(out_ptrs, mask=inside, other=0.0)
    tl.store(out_ptrs, ds, mask=inside)


@triton.jit
def _masked_conv_dlogits_kernel(
    dout_ptr, x_ptr, w_ptr, s_ptr, out_ptr, partial_ptr, t_ptr, dl0_ptr, scale,
    batch, channels, height, width, out_channels, out_height, out_width, pad_h, pad_w, split_rows,
    stride_doutb, stride_doutc, stride_douth, stride_doutw, stride_xb, stride_xc, stride_xh, stride_xw,
    stride_wo, stride_wc, stride_wh, stride_ww, stride_so, stride_sc, stride_sh, stride_sw,
    stride_outo, stride_outc, stride_outh, stride_outw,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    DOUT_PIXELS_INNER: tl.constexpr, X_PIXELS_INNER: tl.constexpr,
    HAS_DL0: tl.constexpr, SCALED: tl.constexpr, ADD: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``dWm[o, c, kh, kw] = sum over b, p, q of dout[b, o, p, q] * x[b, c, p * stride - pad + kh * dilation, ...]``.

    Program ``(split, tile)`` sums ``split_rows`` pixels of one tile of BLOCK_M output channels x BLOCK_N columns, and
    makes dS of it; where SPLIT it writes its fp32 sum to its slot, whole tiles one after the other, for
    ``_masked_conv_reduce_kernel``. Reads dout once per column of tiles and x once per row of them, W and S once, writes
    dS once (reads it too where ADD).
    """
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    DOUT_PIXEL_AXIS: tl.constexpr = 0 if DOUT_PIXELS_INNER else 1  # the axis that a vector of pixels is broadcast along
    DOUT_CHANNEL_AXIS: tl.constexpr = 1 - DOUT_PIXEL_AXIS
    X_PIXEL_AXIS: tl.constexpr = 0 if X_PIXELS_INNER else 1
    X_CHANNEL_AXIS: tl.constexpr = 1 - X_PIXEL_AXIS
    tiles_m = tl.cdiv(out_channels, BLOCK_M)
    tiles_n = tl.cdiv(channels * TAPS, BLOCK_N) if FLAT else tl.cdiv(channels, BLOCK_N) * TAPS
    tile = tl.program_id(0) % (tiles_m * tiles_n)
    split = tl.program_id(0) // (tiles_m * tiles_n)
    offs_o = (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_o = offs_o < out_channels
    c, kh, kw, is_c = _columns(tile % tiles_n, channels, KERNEL_W, TAPS, FLAT, BLOCK_N)

    # Of the filter's shift, what does not depend on the pixel.
    h0, w0 = kh * DILATION_H - pad_h, kw * DILATION_W - pad_w
    x_columns = c.to(OFFSET) * stride_xc + h0.to(OFFSET) * stride_xh + w0.to(OFFSET) * stride_xw
    x_columns = tl.expand_dims(x_columns, X_CHANNEL_AXIS)
    if FLAT:
        h0, w0 = tl.expand_dims(h0, X_CHANNEL_AXIS), tl.expand_dims(w0, X_CHANNEL_AXIS)
    dout_columns = tl.expand_dims(offs_o.to(OFFSET) * stride_doutc, DOUT_CHANNEL_AXIS)

    pixels = out_height * out_width
    start = split.to(tl.int64) * split_rows
    image0 = start // pixels
    offs0 = (start - image0 * pixels).to(tl.int32)
    rows = tl.minimum((batch - image0) * pixels - offs0, split_rows).to(tl.int32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(tl.cdiv(rows, BLOCK_K)):
        offs = offs0 + step * BLOCK_K + tl.arange(0, BLOCK_K)
        image = (image0 + offs // pixels).to(OFFSET)
        p, q = (offs % pixels) // out_width, (offs % pixels) % out_width
        is_row = image < batch
        dout_rows = image * stride_doutb + p.to(OFFSET) * stride_douth + q.to(OFFSET) * stride_doutw
        inside = tl.expand_dims(is_row, DOUT_PIXEL_AXIS) & tl.expand_dims(is_o, DOUT_CHANNEL_AXIS)
        dout = tl.load(dout_ptr + (dout_columns + tl.expand_dims(dout_rows, DOUT_PIXEL_AXIS)), mask=inside, other=0.0)

        h, w = p * STRIDE_H, q * STRIDE_W
        x_rows = image * stride_xb + h.to(OFFSET) * stride_xh + w.to(OFFSET) * stride_xw
        h, w = tl.expand_dims(h, X_PIXEL_AXIS) + h0, tl.expand_dims(w, X_PIXEL_AXIS) + w0
        inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)
        inside &= tl.expand_dims(is_row, X_PIXEL_AXIS) & tl.expand_dims(is_c, X_CHANNEL_AXIS)
        x = tl.load(x_ptr + (x_columns + tl.expand_dims(x_rows, X_PIXEL_AXIS)), mask=inside, other=0.0)
        if not DOUT_PIXELS_INNER:
            dout = tl.trans(dout)
        if X_PIXELS_INNER:
            x = tl.trans(x)
        acc = tl.dot(dout, x, acc, input_precision=PRECISION)

    if SPLIT:
        slot = partial_ptr + tl.program_id(0).to(tl.int64) * (BLOCK_M * BLOCK_N)
        tl.store(slot + tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], acc)
    else:
        _write_dlogits(
            acc, w_ptr + _offsets(offs_o, c, kh, kw, stride_wo, stride_wc, stride_wh, stride_ww, OFFSET),
            s_ptr + _offsets(offs_o, c, kh, kw, stride_so, stride_sc, stride_sh, stride_sw, OFFSET),
            out_ptr + _offsets(offs_o, c, kh, kw, stride_outo, stride_outc, stride_outh, stride_outw, OFFSET),
            is_o[:, None] & is_c[None, :], t_ptr, dl0_ptr, scale, HAS_DL0, SCALED, ADD,
        )  # fmt: skip


@triton.jit
def _masked_conv_reduce_kernel(
    partial_ptr, w_ptr, s_ptr, out_ptr, t_ptr, dl0_ptr, scale, channels, out_channels, splits,
    stride_wo, stride_wc, stride_wh, stride_ww, stride_so, stride_sc, stride_sh, stride_sw,
    stride_outo, stride_outc, stride_outh, stride_outw,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    HAS_DL0: tl.constexpr, SCALED: tl.constexpr, ADD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dS from the partial sums of the splits, added in their order; a program makes ROWS rows of a tile.

    Reads 4 bytes per split and weight, W and S once, writes dS once (reads it too where ADD).
    """
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    tiles_m = tl.cdiv(out_channels, BLOCK_M)
    tiles_n = tl.cdiv(channels * TAPS, BLOCK_N) if FLAT else tl.cdiv(channels, BLOCK_N) * TAPS
    tile = tl.program_id(0) // (BLOCK_M // ROWS)
    rows = tl.program_id(0) % (BLOCK_M // ROWS) * ROWS + tl.arange(0, ROWS)
    offs_o = (tile // tiles_n) * BLOCK_M + rows
    is_o = offs_o < out_channels
    c, kh, kw, is_c = _columns(tile % tiles_n, channels, KERNEL_W, TAPS, FLAT, BLOCK_N)

    slot = partial_ptr + tile.to(tl.int64) * (BLOCK_M * BLOCK_N)
    slot += rows[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    dwm = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    for _split in range(splits):
        dwm += tl.load(slot)
        slot += tl.cast(tiles_m * tiles_n, tl.int64) * (BLOCK_M * BLOCK_N)
    _write_dlogits(
        dwm, w_ptr + _offsets(offs_o, c, kh, kw, stride_wo, stride_wc, stride_wh, stride_ww, OFFSET),
        s_ptr + _offsets(offs_o, c, kh, kw, stride_so, stride_sc, stride_sh, stride_sw, OFFSET),
        out_ptr + _offsets(offs_o, c, kh, kw, stride_outo, stride_outc, stride_outh, stride_outw, OFFSET),
        is_o[:, None] & is_c[None, :], t_ptr, dl0_ptr, scale, HAS_DL0, SCALED, ADD,
    )  # fmt: skip


def plan(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor,
    dl0: Tensor | None,
    scale: float,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    out: Tensor,
    add: bool,
    target: Target,
    config: GemmConfig | None = None,
) -> list[Launch]:
    """The launches that write, or add where ``add``, the gradient of the logits to ``out``: one, or two if split."""
    batch, channels, height, width = x.shape
    out_channels, out_height, out_width = dout.shape[1:]
    pixels = batch * out_height * out_width
    config = config or get_config("masked_conv_dlogits", target, pixels, DEFAULT_CONFIG)
    flat = channels < 16 or x.stride(1) != 1
    block_m = block_for(config.block_m, out_channels)
    block_n = block_for(config.block_n, weight[:1].numel() if flat else channels)
    taps = weight.shape[2] * weight.shape[3]
    tiles_n = triton.cdiv(channels * taps, block_n) if flat else triton.cdiv(channels, block_n) * taps
    tiles = triton.cdiv(out_channels, block_m) * tiles_n
    block_k = sum_block_for(config, pixels, x.dtype)
    split_rows = _split_rows(pixels, tiles, block_k, config.split_k, target)
    splits = max(triton.cdiv(pixels, split_rows), 1)
    partial = torch.empty(splits * tiles * block_m * block_n if splits > 1 else 0, dtype=torch.float32, device=x.device)

    shared: dict[str, Any] = {
        "w_ptr": weight, "s_ptr": mask_logits, "out_ptr": out, "partial_ptr": partial, "t_ptr": temperature,
        "dl0_ptr": dl0, "scale": scale, "channels": channels, "out_channels": out_channels,
        **weight_strides(w=weight, s=mask_logits, out=out),
    }  # fmt: skip
    epilogue: dict[str, Any] = {"HAS_DL0": dl0 is not None, "SCALED": scale != 1.0, "ADD": add, "FLAT": flat}
    epilogue["WIDE"] = is_wide(dout, x, weight, mask_logits, out)
    product = Launch(
        _masked_conv_dlogits_kernel,
        (splits * tiles,),
        {
            **shared, "dout_ptr": dout, "x_ptr": x, "batch": batch, "height": height, "width": width,
            "out_height": out_height, "out_width": out_width, "pad_h": padding[0], "pad_w": padding[1],
            "split_rows": split_rows, **image_strides(dout=dout, x=x),
        },
        {
            **epilogue, **geometry(weight, stride, dilation), "DOUT_PIXELS_INNER": dout.stride(1) != 1,
            "X_PIXELS_INNER": x.stride(1) != 1, "SPLIT": splits > 1,
            "PRECISION": fp32_products(target, convolution=True),
            "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k,
        },
        config.num_warps,
        config.num_stages,
    )  # fmt: skip
    if splits == 1:
        return [product]
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "ROWS": REDUCED_ROWS}
    kernel_size = {"KERNEL_H": weight.shape[2], "KERNEL_W": weight.shape[3]}
    grid = (tiles * (block_m // REDUCED_ROWS),)
    constants = {**epilogue, **kernel_size, **blocks}
    # 128 threads, so that each has 16 bytes of partial sums to load; AMD's warps have 64.
    warps = 2 if target.backend == "hip" else 4
    return [product, Launch(_masked_conv_reduce_kernel, grid, {**shared, "splits": splits}, constants, warps)]


def _split_rows(pixels: int, tiles: int, block_k: int, most: int, target: Target) -> int:
    """Pixels per split: as many splits as give every multiprocessor two programs, of four steps or more each."""
    splits = min(most, triton.cdiv(2 * target.multiprocessors, max(tiles, 1)))
    splits = max(1, min(splits, pixels // (4 * block_k)))
    rows = min(triton.cdiv(max(pixels, 1), splits), MAX_SPLIT_ROWS)
    return triton.cdiv(rows, block_k) * block_k


def masked_conv_dlogits(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor,
    dl0: Tensor | None,
    scale: float,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    config: GemmConfig | None = None,
) -> Tensor:
    """The gradient of ``masked_conv``'s logits (soft mask, unit "weight"): fp32, in the layout of ``mask_logits``."""
    out = torch.empty_like(mask_logits, dtype=torch.float32)
    _into(out, False, dout, x, weight, mask_logits, temperature, dl0, scale, stride, padding, dilation, config)
    return out


def masked_conv_dlogits_(
    dlogits: Tensor,
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor,
    dl0: Tensor | None,
    scale: float,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    config: GemmConfig | None = None,
) -> None:
    """Adds ``masked_conv_dlogits`` to ``dlogits``, fp32."""
    _into(dlogits, True, dout, x, weight, mask_logits, temperature, dl0, scale, stride, padding, dilation, config)


def _into(
    out: Tensor,
    add: bool,
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor,
    dl0: Tensor | None,
    scale: float,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    config: GemmConfig | None,
) -> None:
    check_supported(dout=dout, x=x, weight=weight, mask_logits=mask_logits)
    launches = plan(
        dout, x, weight, mask_logits, temperature, dl0, scale, stride, padding, dilation, out, add, target_of(x), config
    )
    run(x.device, *launches)
