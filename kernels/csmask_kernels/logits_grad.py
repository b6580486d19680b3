"""``logits_grad``: ``dS = (dWm * W + g) * T * m * (1 - m)``, written or added to a gradient that is there."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ElementwiseConfig, Launch, Target, check_supported, collapse, get_config, like, target_of, tile
from .mask import load_temperature, soft_mask_derivative
from .replay import launch_planned

DEFAULT_CONFIG = ElementwiseConfig(block=4096, num_warps=8)


@triton.jit
def _logits_grad_kernel(
    dwm_ptr, w_ptr, s_ptr, out_ptr, t_ptr, dl0_ptr, scale, rows, columns,
    stride_outb, stride_outr, stride_outc, stride_dwmb, stride_dwmr, stride_dwmc,
    stride_wb, stride_wr, stride_wc, stride_sb, stride_sr, stride_sc,
    HAS_DL0: tl.constexpr, SCALED: tl.constexpr, ADD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One logit per weight: one tile per program; reads dWm, W and S once, writes dS once (reads it too where ADD)."""
    pid = tl.program_id(0)
    tiles_c = tl.cdiv(columns, BLOCK_C)
    tiles_r = tl.cdiv(rows, BLOCK_R)
    offs_r = ((pid // tiles_c) % tiles_r).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    offs_c = (pid % tiles_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    outer = (pid // (tiles_c * tiles_r)).to(tl.int64)
    inside = (offs_r < rows) & (offs_c < columns)

    temperature = load_temperature(t_ptr)
    dwm = tl.load(dwm_ptr + outer * stride_dwmb + offs_r * stride_dwmr + offs_c * stride_dwmc, mask=inside, other=0.0)
    w = tl.load(w_ptr + outer * stride_wb + offs_r * stride_wr + offs_c * stride_wc, mask=inside, other=0.0)
    s = tl.load(s_ptr + outer * stride_sb + offs_r * stride_sr + offs_c * stride_sc, mask=inside, other=0.0)
    dmask = dwm.to(tl.float32) * w.to(tl.float32)
    if HAS_DL0:
        dmask += tl.load(dl0_ptr).to(tl.float32)
    ds = dmask * soft_mask_derivative(s, temperature)
    if SCALED:
        ds = ds * scale
    out = out_ptr + outer * stride_outb + offs_r * stride_outr + offs_c * stride_outc
    if ADD:
        ds += tl.load(out, mask=inside, other=0.0)
    tl.store(out, ds, mask=inside)


@triton.jit
def _logits_grad_unit_kernel(
    dwm_ptr, w_ptr, s_ptr, out_ptr, t_ptr, dl0_ptr, scale, weights_per_logit, units, inner,
    stride_dwmu, stride_dwmo, stride_dwmi, stride_wu, stride_wo, stride_wi, stride_s, stride_out,
    HAS_DL0: tl.constexpr, SCALED: tl.constexpr, ADD: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One logit per unit: a program owns BLOCK_U units and sums ``dWm * W`` over their weights, in a fixed order.

    The ``weights_per_logit`` weights of a unit are rows of ``inner`` entries, with a stride for each; reads dWm and W
    once.
    """
    offs_u = tl.program_id(0).to(tl.int64) * BLOCK_U + tl.arange(0, BLOCK_U)
    is_unit = offs_u < units
    sums = tl.zeros((BLOCK_U, BLOCK_R), dtype=tl.float32)
    for start in range(0, weights_per_logit, BLOCK_R):
        offs = start + tl.arange(0, BLOCK_R).to(tl.int64)
        inside = is_unit[:, None] & (offs < weights_per_logit)[None, :]
        o, i = offs // inner, offs % inner
        dwm = dwm_ptr + offs_u[:, None] * stride_dwmu + (o * stride_dwmo + i * stride_dwmi)[None, :]
        w = w_ptr + offs_u[:, None] * stride_wu + (o * stride_wo + i * stride_wi)[None, :]
        sums += tl.load(dwm, mask=inside, other=0.0).to(tl.float32) * tl.load(w, mask=inside, other=0.0).to(tl.float32)
    dmask = tl.sum(sums, axis=1)
    if HAS_DL0:
        dmask += tl.load(dl0_ptr).to(tl.float32) * weights_per_logit
    s = tl.load(s_ptr + offs_u * stride_s, mask=is_unit, other=0.0)
    ds = dmask * soft_mask_derivative(s, load_temperature(t_ptr))
    if SCALED:
        ds = ds * scale
    out = out_ptr + offs_u * stride_out
    if ADD:
        ds += tl.load(out, mask=is_unit, other=0.0)
    tl.store(out, ds, mask=is_unit)


def plan(
    dmasked_weight: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor,
    dl0: Tensor | None,
    scale: float,
    out: Tensor,
    add: bool,
    target: Target,
    config: ElementwiseConfig | None = None,
) -> Launch:
    """The launch that writes, or adds where ``add``, the gradient of the logits to ``out``, shaped like them."""
    config = config or get_config("logits_grad", target, weight.numel(), DEFAULT_CONFIG)
    arguments: dict[str, Any] = {
        "dwm_ptr": dmasked_weight, "w_ptr": weight, "s_ptr": mask_logits, "out_ptr": out, "t_ptr": temperature,
        "dl0_ptr": dl0, "scale": scale,
    }  # fmt: skip
    constants: dict[str, Any] = {"HAS_DL0": dl0 is not None, "SCALED": scale != 1.0, "ADD": add}
    if mask_logits.shape != weight.shape:
        return _plan_units(arguments, constants, config)
    tiling = tile(weight.shape, config.block, out, dmasked_weight, weight, mask_logits)
    if tiling is None:  # layouts that differ in more than two ways: rare, and one copy makes them alike
        copies = [like(tensor, out) for tensor in (dmasked_weight, weight, mask_logits)]
        arguments.update(zip(("dwm_ptr", "w_ptr", "s_ptr"), copies, strict=True))
        tiling = tile(weight.shape, config.block, out, *copies)
        assert tiling is not None, "out is dense, or has at most three strides"
    arguments.update(tiling.arguments("out", "dwm", "w", "s"))
    constants.update(BLOCK_R=tiling.block_r, BLOCK_C=tiling.block_c)
    return Launch(_logits_grad_kernel, (tiling.programs,), arguments, constants, config.num_warps)


def _plan_units(arguments: dict[str, Any], constants: dict[str, Any], config: ElementwiseConfig) -> Launch:
    dwm, w, s, out = (arguments[name] for name in ("dwm_ptr", "w_ptr", "s_ptr", "out_ptr"))
    unit_dim = next((d for d in range(w.dim()) if s.shape[d] != 1), None)  # None: one logit for all weights
    rest = [d for d in range(w.dim()) if d != unit_dim]
    shape = [w.shape[d] for d in rest]
    sizes, (dwm_strides, w_strides) = collapse(shape, *([t.stride(d) for d in rest] for t in (dwm, w)))
    if len(sizes) > 2:  # rare: after a copy, at most what is before and what is behind the units is left
        arguments["dwm_ptr"], arguments["w_ptr"] = dwm, w = dwm.contiguous(), w.contiguous()
        sizes, (dwm_strides, w_strides) = collapse(shape, *([t.stride(d) for d in rest] for t in (dwm, w)))
    if len(sizes) == 1:
        sizes, dwm_strides, w_strides = [1, *sizes], [0, *dwm_strides], [0, *w_strides]
    units = s.numel()
    stride_dwmu, stride_wu, stride_s, stride_out = (
        0 if unit_dim is None else t.stride(unit_dim) for t in (dwm, w, s, out)
    )
    # Whole rows per program where a unit's weights lie together, a square of units and weights where they do not.
    block_u = 1 if w_strides[1] == 1 else 32
    block_r = min(max(16, config.block // 2 // block_u), triton.next_power_of_2(max(math.prod(shape), 1)))
    arguments.update(
        weights_per_logit=math.prod(shape), units=units, inner=sizes[1],
        stride_dwmu=stride_dwmu, stride_dwmo=dwm_strides[0], stride_dwmi=dwm_strides[1],
        stride_wu=stride_wu, stride_wo=w_strides[0], stride_wi=w_strides[1], stride_s=stride_s, stride_out=stride_out,
    )  # fmt: skip
    constants.update(BLOCK_U=block_u, BLOCK_R=block_r)
    return Launch(_logits_grad_unit_kernel, (triton.cdiv(units, block_u),), arguments, constants, 4)


def _launch(
    dmasked_weight: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor,
    dl0: Tensor | None,
    scale: float,
    out: Tensor,
    add: bool,
    config: ElementwiseConfig | None,
) -> None:
    """See ``plan``."""
    mask = (dmasked_weight, weight, mask_logits, temperature, dl0)
    launch_planned(
        "logits_grad",
        weight.device,
        (*mask, out),
        (scale, add, config),
        lambda: ([plan(*mask, scale, out, add, target_of(weight), config)], ()),
    )


def logits_grad(
    dmasked_weight: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor,
    dl0: Tensor | None,
    scale: float,
    config: ElementwiseConfig | None = None,
) -> Tensor:
    """See ``csmask.reference.logits_grad``; the layout is that of ``mask_logits``."""
    check_supported(dmasked_weight=dmasked_weight, weight=weight, mask_logits=mask_logits)
    out = torch.empty_like(mask_logits)
    _launch(dmasked_weight, weight, mask_logits, temperature, dl0, scale, out, False, config)
    return out


def logits_grad_(
    dlogits: Tensor,
    dmasked_weight: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor,
    dl0: Tensor | None,
    scale: float,
    config: ElementwiseConfig | None = None,
) -> None:
    """Adds ``logits_grad`` to ``dlogits``, fp32."""
    check_supported(dmasked_weight=dmasked_weight, weight=weight, mask_logits=mask_logits, dlogits=dlogits)
    arguments = (dmasked_weight, weight, mask_logits, temperature, dl0, scale)
    if tile(dlogits.shape, 1, dlogits) is None:  # a view of more than three strides: the kernel cannot walk it
        dlogits.add_(logits_grad(*arguments, config))
        return
    _launch(*arguments, dlogits, True, config)
