"""``logits_grad``: ``dS = (dWm * W + g) * T * m * (1 - m)``, written or added to a gradient that is there."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ElementwiseConfig, Launch, Target, check_supported, collapse, get_config, run, target_of, tile
from .mask import load_temperature, soft_mask_derivative

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
    dwm_ptr, w_ptr, s_ptr, out_ptr, t_ptr, dl0_ptr, scale, weights_per_logit, units, outer, inner,
    stride_dwmu, stride_dwmo, stride_dwmi, stride_wu, stride_wo, stride_wi, stride_s, stride_out,
    HAS_DL0: tl.constexpr, SCALED: tl.constexpr, ADD: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One logit per unit: a program owns BLOCK_U units and sums ``dWm * W`` over their weights, in a fixed order.

    The weights of a unit are ``outer x inner`` entries with a stride for each; reads dWm and W once.
    """
    offs_u = tl.program_id(0).to(tl.int64) * BLOCK_U + tl.arange(0, BLOCK_U)
    is_unit = offs_u < units
    total = outer * inner
    sums = tl.zeros((BLOCK_U, BLOCK_R), dtype=tl.float32)
    for start in range(0, total, BLOCK_R):
        offs = start + tl.arange(0, BLOCK_R).to(tl.int64)
        inside = is_unit[:, None] & (offs < total)[None, :]
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
        arguments.update(dwm_ptr=_like(dmasked_weight, out), w_ptr=_like(weight, out), s_ptr=_like(mask_logits, out))
        tiling = tile(weight.shape, config.block, out, *(arguments[n] for n in ("dwm_ptr", "w_ptr", "s_ptr")))
        assert tiling is not None
    arguments.update(tiling.arguments("out", "dwm", "w", "s"))
    constants.update(BLOCK_R=tiling.block_r, BLOCK_C=tiling.block_c)
    return Launch(_logits_grad_kernel, (tiling.programs,), arguments, constants, config.num_warps)


def _like(tensor: Tensor, layout: Tensor) -> Tensor:
    return torch.empty_like(layout, dtype=tensor.dtype).copy_(tensor)


def _plan_units(arguments: dict[str, Any], constants: dict[str, Any], config: ElementwiseConfig) -> Launch:
    dwm, w, s, out = (arguments[name] for name in ("dwm_ptr", "w_ptr", "s_ptr", "out_ptr"))
    unit_dim = max(range(w.dim()), key=lambda d: s.shape[d])
    rest = [d for d in range(w.dim()) if d != unit_dim]
    sizes, (dwm_strides, w_strides) = collapse(
        [w.shape[d] for d in rest], [dwm.stride(d) for d in rest], [w.stride(d) for d in rest]
    )
    if len(sizes) > 2:
        arguments["dwm_ptr"] = dwm = dwm.contiguous()
        arguments["w_ptr"] = w = w.contiguous()
        sizes, (dwm_strides, w_strides) = collapse(
            [w.shape[d] for d in rest], [dwm.stride(d) for d in rest], [w.stride(d) for d in rest]
        )
    if len(sizes) == 1:
        sizes, dwm_strides, w_strides = [1, *sizes], [0, *dwm_strides], [0, *w_strides]
    units = w.shape[unit_dim]
    # Whole rows per program where a unit's weights lie together, a square of units and weights where they do not.
    block_u = 1 if w_strides[1] == 1 else 32
    block_r = min(max(16, config.block // 4 // block_u), triton.next_power_of_2(max(sizes[0] * sizes[1], 1)))
    arguments.update(
        weights_per_logit=w.numel() // max(units, 1), units=units, outer=sizes[0], inner=sizes[1],
        stride_dwmu=dwm.stride(unit_dim), stride_dwmo=dwm_strides[0], stride_dwmi=dwm_strides[1],
        stride_wu=w.stride(unit_dim), stride_wo=w_strides[0], stride_wi=w_strides[1],
        stride_s=s.stride(unit_dim), stride_out=out.stride(unit_dim),
    )  # fmt: skip
    constants.update(BLOCK_U=block_u, BLOCK_R=block_r)
    return Launch(_logits_grad_unit_kernel, (triton.cdiv(units, block_u),), arguments, constants, 4)


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
    out = torch.empty_like(mask_logits)
    _into(out, False, dmasked_weight, weight, mask_logits, temperature, dl0, scale, config)
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
    _into(dlogits, True, dmasked_weight, weight, mask_logits, temperature, dl0, scale, config)


def _into(
    out: Tensor,
    add: bool,
    dmasked_weight: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor,
    dl0: Tensor | None,
    scale: float,
    config: ElementwiseConfig | None,
) -> None:
    check_supported(dmasked_weight=dmasked_weight, weight=weight, mask_logits=mask_logits)
    target = target_of(weight)
    run(
        weight.device,
        plan(dmasked_weight, weight, mask_logits, temperature, dl0, scale, out, add, target, config),
    )
