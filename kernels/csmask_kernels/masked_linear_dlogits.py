"""``masked_linear_dlogits``: ``dS = (dY^T X * W + g) * scale * T * m * (1 - m)`` of a masked linear layer, in one.

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

from .launch import GemmConfig, Launch, Target, check_supported, fp32_products, get_config, target_of
from .mask import load_temperature, soft_mask_derivative
from .replay import launch_planned

DEFAULT_CONFIG = GemmConfig(block_m=64, block_n=64, block_k=32, num_warps=4, num_stages=3)
# Where no access is wider than an element, each has a pointer of its own: smaller pieces make room for them.
UNALIGNED_CONFIG = dataclasses.replace(DEFAULT_CONFIG, subtiles=4)


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
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _pieces(tile, SUBTILES: tl.constexpr):
    """A tuple of 1, 2 or 4 pieces of a tile, from left to right: W and S of a whole one would spill registers."""
    tl.static_assert(SUBTILES == 1 or SUBTILES == 2 or SUBTILES == 4)
    left, right = _halves(tile)
    return (tile,) if SUBTILES == 1 else (left, right) if SUBTILES == 2 else _halves(left) + _halves(right)


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


@triton.jit
def _masked_linear_dlogits_persistent_kernel(
    left_desc, right_desc, w_desc, s_desc, out_desc, t_ptr, dl0_ptr, scale, M, R, C,
    HAS_DL0: tl.constexpr, SCALED: tl.constexpr, ADD: tl.constexpr, REDUCE: tl.constexpr, PRECISION: tl.constexpr,
    SUBTILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """As ``_masked_linear_dlogits_kernel``, with bulk copies; each program makes every so many-th tile.

    Where ADD, a bulk copy adds the tile to dS in L2 (REDUCE), so that dS is never read into registers. Each element has
    one owner and one sum, so the result is the same at every run. The interpreter cannot do that: it loads and stores.
    """
    WIDTH: tl.constexpr = BLOCK_C // SUBTILES
    temperature = load_temperature(t_ptr)
    tiles = tl.cdiv(R, BLOCK_R) * tl.cdiv(C, BLOCK_C)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row, column = _tile_of(tile, R, C, BLOCK_R, BLOCK_C, GROUP)
        acc = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
        for start in range(0, M, BLOCK_M):
            a = left_desc.load([start, row])
            b = right_desc.load([start, column])
            acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
        pieces = _pieces(acc, SUBTILES)
        for i in tl.static_range(SUBTILES):
            w = w_desc.load([row, column + i * WIDTH])
            s = s_desc.load([row, column + i * WIDTH])
            ds = _logits_gradient(pieces[i], w, s, temperature, dl0_ptr, scale, HAS_DL0, SCALED)
            if ADD and REDUCE:
                out_desc.atomic_add([row, column + i * WIDTH], ds)
            else:
                if ADD:
                    ds += out_desc.load([row, column + i * WIDTH])
                out_desc.store([row, column + i * WIDTH], ds)


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
    tensors = (left, right, weight, mask_logits, out)
    wide = all(_is_aligned(t) or _is_aligned(t.t()) for t in tensors)
    safe = DEFAULT_CONFIG if wide else UNALIGNED_CONFIG
    config = config or (_config(target, tokens, rows, columns) if wide else safe)
    config = _for_dtype(config, x.dtype)
    arguments: dict[str, Any] = {"t_ptr": temperature, "dl0_ptr": dl0, "scale": scale}
    arguments.update(M=tokens, R=rows, C=columns)
    constants: dict[str, Any] = {
        "HAS_DL0": dl0 is not None, "SCALED": scale != 1.0, "ADD": add, "PRECISION": fp32_products(target),
    }  # fmt: skip
    if config.persistent:
        if _can_describe(target, *tensors):
            return _plan_persistent(left, right, weight, mask_logits, out, arguments, constants, target, config)
        config = _for_dtype(safe, x.dtype)
    arguments.update(
        left_ptr=left, right_ptr=right, w_ptr=weight, s_ptr=mask_logits, out_ptr=out,
        stride_lm=left.stride(0), stride_lr=left.stride(1), stride_rm=right.stride(0), stride_rc=right.stride(1),
        stride_wr=weight.stride(0), stride_wc=weight.stride(1), stride_sr=mask_logits.stride(0),
        stride_sc=mask_logits.stride(1), stride_outr=out.stride(0), stride_outc=out.stride(1),
    )  # fmt: skip
    constants.update(_blocks(config))
    grid = (_tiles(config, rows, columns),)
    return Launch(_masked_linear_dlogits_kernel, grid, arguments, constants, config.num_warps, config.num_stages)


def _plan_persistent(
    left: Tensor,
    right: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    out: Tensor,
    arguments: dict[str, Any],
    constants: dict[str, Any],
    target: Target,
    config: GemmConfig,
) -> Launch:
    """The persistent form's launch: tensor descriptors, and as many programs as run at once."""
    piece = [config.block_m, config.block_n // config.subtiles]
    arguments.update(
        left_desc=TensorDescriptor.from_tensor(left, [config.block_k, config.block_m]),
        right_desc=TensorDescriptor.from_tensor(right, [config.block_k, config.block_n]),
        w_desc=TensorDescriptor.from_tensor(weight, piece),
        s_desc=TensorDescriptor.from_tensor(mask_logits, piece),
        out_desc=TensorDescriptor.from_tensor(out, piece),
    )
    constants.update(_blocks(config), REDUCE=target.has_descriptors)
    # Two programs of 4 warps fit a multiprocessor: the one's epilogue runs beside the other's products.
    at_once = target.multiprocessors * max(1, 8 // config.num_warps)
    grid = (min(at_once, _tiles(config, *out.shape)),)
    kernel = _masked_linear_dlogits_persistent_kernel
    return Launch(kernel, grid, arguments, constants, config.num_warps, config.num_stages)


def _is_aligned(tensor: Tensor) -> bool:
    """Whether the rows are contiguous, none is another's (as in an expanded gradient), and each begins at 16 bytes."""
    whole = tensor.stride(0) > 0 and tensor.stride(0) * tensor.element_size() % 16 == 0
    return tensor.stride(1) == 1 and whole and (tensor.is_meta or tensor.data_ptr() % 16 == 0)


def _can_describe(target: Target, *tensors: Tensor) -> bool:
    """Whether the target has host tensor descriptors, each tensor can have one, and the last, dS, is fp32."""
    if not target.has_descriptors and target.backend != "interpreter":
        return False
    return tensors[-1].dtype == torch.float32 and all(t.numel() > 0 and _is_aligned(t) for t in tensors)


def _blocks(config: GemmConfig) -> dict[str, int]:
    return {
        "SUBTILES": config.subtiles, "BLOCK_M": config.block_k, "BLOCK_R": config.block_m, "BLOCK_C": config.block_n,
        "GROUP": config.group_m,
    }  # fmt: skip


def _tiles(config: GemmConfig, rows: int, columns: int) -> int:
    return triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n)


def _config(target: Target, tokens: int, rows: int, columns: int) -> GemmConfig:
    """The config for so many tokens, its tile halved while a small weight leaves multiprocessors without one."""
    config = get_config("masked_linear_dlogits", target, tokens, DEFAULT_CONFIG)
    while _tiles(config, rows, columns) < target.multiprocessors and max(config.block_m, config.block_n) > 64:
        wide = config.block_n >= config.block_m
        half = {"block_n": config.block_n // 2} if wide else {"block_m": config.block_m // 2}
        config = dataclasses.replace(config, **half)
    return config


def _for_dtype(config: GemmConfig, dtype: torch.dtype) -> GemmConfig:
    """The config for operands of this dtype: fp32 ones take twice the memory, and registers for their TF32 parts."""
    if dtype != torch.float32:
        return config
    large = config.block_m * config.block_n > 64 * 64
    return dataclasses.replace(
        config,
        block_m=min(config.block_m, 128),
        block_n=min(config.block_n, 128),
        block_k=min(config.block_k, 32),
        subtiles=4 if large else config.subtiles,
        num_warps=8 if large else config.num_warps,
        persistent=False,
    )


def candidate_configs(target: Target, m: int, n: int, k: int) -> list[GemmConfig]:
    """Configs worth measuring for m tokens and a weight of n x k: at most ten, none of which spills registers."""
    stages = 2 if target.backend == "hip" else 3
    step = min(64, max(16, triton.next_power_of_2(m)))
    # Each: block_m, block_n, subtiles, warps.
    small = ((64, 64, 1, 4), (64, 128, 2, 4), (64, 128, 4, 4), (32, 128, 1, 4), (128, 64, 2, 4))
    found = [GemmConfig(r, c, step, subtiles=s, num_warps=w, num_stages=stages) for r, c, s, w in small]
    if m > 64:
        found += [GemmConfig(128, 128, d, subtiles=4, num_warps=8, num_stages=stages) for d in (32, 64)]
        if target.has_descriptors and target.family != "sm_120":  # whose 99 KB hold no stages beside the pieces
            large = ((128, 128, 4, 4, 2), (128, 128, 4, 8, 2), (128, 256, 4, 8, 3))
            found += [GemmConfig(r, c, 64, 8, 1, False, True, s, w, stages) for r, c, s, w, stages in large]
    return [c for c in found if c.block_m <= max(64, n) and c.block_n <= max(64, k)]


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
    """``csmask.reference.logits_grad`` of ``dWm = dout^T x`` (``x^T dout`` when ``transposed``), never written.

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
    mask = (weight, mask_logits, temperature, dl0)
    launch_planned(
        "masked_linear_dlogits",
        weight.device,
        (dout, x, *mask, out),
        (scale, transposed, add, config, fp32_products(target)),
        lambda: ([plan(dout, x, *mask, scale, transposed, out, add, target, config)], ()),
    )
