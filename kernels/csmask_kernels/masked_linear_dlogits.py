"""``masked_linear_dlogits``: ``dS = (dY^T X * W + g) * scale * T * m * (1 - m)`` of a masked linear layer in one kernel.

The gradient ``dWm = dY^T X`` of the masked weight lives in registers only: each program makes a tile of it and turns it
into a tile of ``dS``, which is written, or added to a gradient that is there.

The kernels know a weight of R rows and C columns, in the order in which ``dS`` lies in memory, and two factors with
``dWm = left^T right``: ``left`` (M, R) and ``right`` (M, C) over M tokens. For a weight (N, K) these are ``dout`` and
``x``, for a transposed one (K, N) ``x`` and ``dout``; a ``dS`` that is contiguous along its rows is transposed again.
In a ``GemmConfig``, ``block_m x block_n`` is the tile of ``dS`` (R x C) and ``block_k`` the step along the tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import GemmConfig, Launch, Target, check_supported, get_config, run, target_of
from .mask import load_temperature, soft_mask_derivative

DEFAULT_CONFIG = GemmConfig(block_m=64, block_n=64, block_k=32, num_warps=4, num_stages=3)


@triton.jit
def _tile_of(tile, R, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a tile; GROUP tiles of rows are walked together, for reuse of ``right`` in L2."""
    tiles_r = tl.cdiv(R, BLOCK_R)
    in_group = GROUP * tl.cdiv(C, BLOCK_C)
    first = tile // in_group * GROUP
    size = tl.minimum(tiles_r - first, GROUP)
    return (first + tile % in_group % size) * BLOCK_R, tile % in_group // size * BLOCK_C


@triton.jit
def _halves(tile):
    """The left and the right half of a tile's columns; no element leaves its thread."""
    R: tl.constexpr = tile.shape[0]
    HALF: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (R, 2, HALF)), (0, 2, 1)))


@triton.jit
def _pieces(tile, SUBTILES: tl.constexpr):
    """A tuple of 1, 2 or 4 pieces of a tile, from left to right: W and S of a whole one would spill registers."""
    if SUBTILES == 1:
        pieces = (tile,)
    elif SUBTILES == 2:
        left, right = _halves(tile)
        pieces = (left, right)
    else:
        left, right = _halves(tile)
        first, second = _halves(left)
        third, fourth = _halves(right)
        pieces = (first, second, third, fourth)
    return pieces


@triton.jit
def _logits_gradient(dwm, w, s, temperature, dl0_ptr, scale, HAS_DL0: tl.constexpr, SCALED: tl.constexpr):
    """``(dWm * W + g) * scale * dm/dS`` in fp32."""
    dmask = dwm * w.to(tl.float32)
    if HAS_DL0:
        dmask += tl.load(dl0_ptr).to(tl.float32)
    ds = dmask * soft_mask_derivative(s, temperature)
    if SCALED:
        ds = ds * scale
    return ds


@triton.jit
def _masked_linear_dlogits_kernel(
    left_ptr, right_ptr, w_ptr, s_ptr, out_ptr, t_ptr, dl0_ptr, scale, M, R, C,
    stride_lm, stride_lr, stride_rm, stride_rc, stride_wr, stride_wc, stride_sr, stride_sc, stride_outr, stride_outc,
    HAS_DL0: tl.constexpr, SCALED: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr, SUBTILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``dS = (left^T right * W + g) * scale * T * m * (1 - m)``; a program owns one tile (BLOCK_R, BLOCK_C) of dS.

    Bytes per weight: W and S read once, dS written once (read too where ADD); the factors are read once per tile of
    the other's dimension, mostly from L2.
    """
    row, column = _tile_of(tl.program_id(0), R, C, BLOCK_R, BLOCK_C, GROUP)
    offs_r = row.to(tl.int64) + tl.arange(0, BLOCK_R)
    offs_c = column.to(tl.int64) + tl.arange(0, BLOCK_C)
    offs_m = tl.arange(0, BLOCK_M)
    left = left_ptr + offs_m.to(tl.int64)[:, None] * stride_lm + offs_r[None, :] * stride_lr
    right = right_ptr + offs_m.to(tl.int64)[:, None] * stride_rm + offs_c[None, :] * stride_rc
    is_row, is_column = offs_r < R, offs_c < C

    acc = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for start in range(0, M, BLOCK_M):
        is_token = (offs_m < M - start)[:, None]
        a = tl.load(left, mask=is_token & is_row[None, :], other=0.0)
        b = tl.load(right, mask=is_token & is_column[None, :], other=0.0)
        acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
        left += BLOCK_M * tl.cast(stride_lm, tl.int64)
        right += BLOCK_M * tl.cast(stride_rm, tl.int64)

    temperature = load_temperature(t_ptr)
    pieces = _pieces(acc, SUBTILES)
    WIDTH: tl.constexpr = BLOCK_C // SUBTILES
    for i in tl.static_range(SUBTILES):
        offs_p = column.to(tl.int64) + i * WIDTH + tl.arange(0, WIDTH)
        inside = is_row[:, None] & (offs_p < C)[None, :]
        w = tl.load(w_ptr + offs_r[:, None] * stride_wr + offs_p[None, :] * stride_wc, mask=inside, other=0.0)
        s = tl.load(s_ptr + offs_r[:, None] * stride_sr + offs_p[None, :] * stride_sc, mask=inside, other=0.0)
        ds = _logits_gradient(pieces[i], w, s, temperature, dl0_ptr, scale, HAS_DL0, SCALED)
        out = out_ptr + offs_r[:, None] * stride_outr + offs_p[None, :] * stride_outc
        if ADD:
            ds += tl.load(out, mask=inside, other=0.0)
        tl.store(out, ds, mask=inside)


def plan(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor,
    dl0: Tensor | None,
    scale: float,
    transposed: bool,
    out: Tensor,
    add: bool,
    target: Target,
    config: GemmConfig | None = None,
) -> Launch:
    """The launch that writes, or adds where ``add``, the gradient of the logits to ``out``, shaped like the weight."""
    left, right = (x, dout) if transposed else (dout, x)
    if out.stride(0) < out.stride(1):
        left, right, weight, mask_logits, out = right, left, weight.t(), mask_logits.t(), out.t()
    tokens, rows, columns = len(left), *out.shape
    config = _fitting(config or get_config("masked_linear_dlogits", target, tokens, DEFAULT_CONFIG), x.dtype, tokens)
    arguments: dict[str, Any] = {
        "left_ptr": left, "right_ptr": right, "w_ptr": weight, "s_ptr": mask_logits, "out_ptr": out,
        "t_ptr": temperature, "dl0_ptr": dl0, "scale": scale, "M": tokens, "R": rows, "C": columns,
    }  # fmt: skip
    for name, tensor in (("l", left), ("r", right)):
        arguments.update({f"stride_{name}m": tensor.stride(0), f"stride_{name}{'rc'[name == 'r']}": tensor.stride(1)})
    for name, tensor in (("w", weight), ("s", mask_logits), ("out", out)):
        arguments.update({f"stride_{name}r": tensor.stride(0), f"stride_{name}c": tensor.stride(1)})
    constants = {
        "HAS_DL0": dl0 is not None, "SCALED": scale != 1.0, "ADD": add, "PRECISION": _precision(target),
        "SUBTILES": config.subtiles, "BLOCK_M": config.block_k, "BLOCK_R": config.block_m, "BLOCK_C": config.block_n,
        "GROUP": config.group_m,
    }  # fmt: skip
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n)
    return Launch(_masked_linear_dlogits_kernel, (tiles,), arguments, constants, config.num_warps, config.num_stages)


def _precision(target: Target) -> str:
    """How fp32 operands are multiplied: on NVIDIA in TF32 if torch may, else in three TF32 products."""
    if target.backend != "cuda":
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def _fitting(config: GemmConfig, dtype: torch.dtype, tokens: int) -> GemmConfig:
    return config


def masked_linear_dlogits(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor,
    dl0: Tensor | None,
    scale: float,
    transposed: bool,
    config: GemmConfig | None = None,
) -> Tensor:
    """``csmask.reference.logits_grad`` of ``dWm = dout^T x`` (``x^T dout`` when ``transposed``), which is never written.

    Args:
        dout: gradient of the output, (M, N), any strides.
        x: input, (M, K), dtype of ``dout``, any strides.
        weight, mask_logits: (N, K), or (K, N) when ``transposed``; the weight's dtype may differ from that of ``x``.
        temperature: multiplies the logits, 0-d.
        dl0: gradient of the l0 sum, 0-d; None for zero.
        scale: factor on the mask.

    Returns:
        The gradient of ``mask_logits``, in its layout.
    """
    out = torch.empty_like(mask_logits)
    _into(out, False, dout, x, weight, mask_logits, temperature, dl0, scale, transposed, config)
    return out


def masked_linear_dlogits_(
    dlogits: Tensor,
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor,
    dl0: Tensor | None,
    scale: float,
    transposed: bool,
    config: GemmConfig | None = None,
) -> None:
    """Adds ``masked_linear_dlogits`` to ``dlogits``, fp32, any strides."""
    _into(dlogits, True, dout, x, weight, mask_logits, temperature, dl0, scale, transposed, config)


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
    transposed: bool,
    config: GemmConfig | None,
) -> None:
    check_supported(dout=dout, x=x, weight=weight, mask_logits=mask_logits)
    target = target_of(weight)
    run(
        weight.device,
        plan(dout, x, weight, mask_logits, temperature, dl0, scale, transposed, out, add, target, config),
    )
