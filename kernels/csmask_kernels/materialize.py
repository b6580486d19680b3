"""``materialize``: the masked weight ``W * m``, the sum of the mask and, on request, two counts, in one pass.

``mask_sums`` is the same kernel without a weight: it reads the logits alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ElementwiseConfig, Launch, Target, Tiling, check_supported, get_config, like, target_of, tile
from .mask import UNDECIDED_BOUND, apply_mask, load_temperature, mask_value
from .replay import launch_planned

DEFAULT_CONFIG = ElementwiseConfig(block=4096, num_warps=8)


@triton.jit
def _materialize_kernel(
    w_ptr, s_ptr, out_ptr, t_ptr, l0_ptr, kept_ptr, undecided_ptr, scale, rows, columns,
    stride_outb, stride_outr, stride_outc, stride_wb, stride_wr, stride_wc, stride_sb, stride_sr, stride_sc,
    HAS_WEIGHT: tl.constexpr, HARD: tl.constexpr, SCALED: tl.constexpr, COUNTS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out = W * m``; program ``pid`` makes one tile and writes its sums to slot ``pid`` of the partials.

    Bytes per weight: logits and weight read once, the masked weight written once; 4 to 12 bytes per tile of partials.
    """
    pid = tl.program_id(0)
    tiles_c = tl.cdiv(columns, BLOCK_C)
    tiles_r = tl.cdiv(rows, BLOCK_R)
    offs_r = ((pid // tiles_c) % tiles_r).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    offs_c = (pid % tiles_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    outer = (pid // (tiles_c * tiles_r)).to(tl.int64)
    inside = (offs_r < rows) & (offs_c < columns)

    temperature = load_temperature(t_ptr)
    s = tl.load(s_ptr + outer * stride_sb + offs_r * stride_sr + offs_c * stride_sc, mask=inside, other=0.0)
    mask = mask_value(s, temperature, scale, HARD, SCALED)
    # Where the tile hangs over, the logit 0 has a soft mask of 1/2: it must not count.
    tl.store(l0_ptr + pid, tl.sum(tl.where(inside, mask, 0.0)))
    if COUNTS:
        tl.store(kept_ptr + pid, tl.sum((inside & (s > 0)).to(tl.int32)))
        undecided = inside & (tl.abs(s.to(tl.float32) * temperature) < UNDECIDED_BOUND)
        tl.store(undecided_ptr + pid, tl.sum(undecided.to(tl.int32)))
    if HAS_WEIGHT:
        w = tl.load(w_ptr + outer * stride_wb + offs_r * stride_wr + offs_c * stride_wc, mask=inside, other=0.0)
        wm = apply_mask(w, mask, HARD, SCALED)
        out = out_ptr + outer * stride_outb + offs_r * stride_outr + offs_c * stride_outc
        tl.store(out, wm.to(out_ptr.dtype.element_ty), mask=inside)


def _tile(config: ElementwiseConfig, out: Tensor | None, weight: Tensor | None, mask_logits: Tensor) -> Tiling | None:
    walked = [mask_logits] * 3 if out is None or weight is None else [out, weight, mask_logits]
    return tile(mask_logits.shape, config.block, *walked)


def plan(
    weight: Tensor | None,
    mask_logits: Tensor,
    temperature: Tensor,
    hard: bool,
    scale: float,
    out: Tensor | None,
    counts: bool,
    target: Target,
    config: ElementwiseConfig | None = None,
) -> tuple[Launch, Tensor, Tensor | None]:
    """The launch, the l0 partials ``(programs,)`` fp32 and, where ``counts``, those of counts ``(2, programs)`` int32.

    ``mask_logits`` has been expanded to the weight's shape, and ``out`` is dense; without a weight, the logits are
    walked alone.
    """
    config = config or get_config("materialize", target, mask_logits.numel(), DEFAULT_CONFIG)
    tiling = _tile(config, out, weight, mask_logits)
    if tiling is None:  # layouts that differ in more than two ways: rare, and one copy makes them alike
        layout = mask_logits if out is None else out
        weight, mask_logits = None if weight is None else like(weight, layout), like(mask_logits, layout)
        tiling = _tile(config, out, weight, mask_logits)
        assert tiling is not None, "out is dense"
    l0 = torch.empty(tiling.programs, dtype=torch.float32, device=mask_logits.device)
    counted = torch.empty((2, tiling.programs), dtype=torch.int32, device=mask_logits.device) if counts else None
    arguments: dict[str, Any] = {
        "w_ptr": weight, "s_ptr": mask_logits, "out_ptr": out, "t_ptr": temperature, "l0_ptr": l0,
        "kept_ptr": None if counted is None else counted[0], "undecided_ptr": None if counted is None else counted[1],
        "scale": scale,
        **tiling.arguments("out", "w", "s"),
    }  # fmt: skip
    constants = {
        "HAS_WEIGHT": weight is not None, "HARD": hard, "SCALED": scale != 1.0, "COUNTS": counts,
        "BLOCK_R": tiling.block_r, "BLOCK_C": tiling.block_c,
    }  # fmt: skip
    grid = (tiling.programs,)
    return Launch(_materialize_kernel, grid, arguments, constants, config.num_warps), l0, counted


def _launch(
    weight: Tensor | None,
    mask_logits: Tensor,
    temperature: Tensor,
    hard: bool,
    scale: float,
    out: Tensor | None,
    counts: bool,
    config: ElementwiseConfig | None,
) -> tuple[Tensor, Tensor]:
    """The sum of the mask, 0-d fp32, and int64 ``(kept, undecided)``, empty unless asked for; see ``plan``."""

    def planned() -> tuple[list[Launch], list[Tensor | None]]:
        target = target_of(mask_logits)
        launch, *partials = plan(weight, mask_logits, temperature, hard, scale, out, counts, target, config)
        return [launch], partials

    tensors, options = (weight, mask_logits, temperature, out), (hard, scale, counts, config)
    l0, counted = launch_planned("materialize", mask_logits.device, tensors, options, planned)
    return l0.sum(), l0.new_empty(0, dtype=torch.int64) if counted is None else counted.sum(1)


def materialize(
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor,
    hard: bool,
    scale: float,
    dtype: torch.dtype | None = None,
    counts: bool = False,
    config: ElementwiseConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``csmask.reference.materialize``; also ``counts``: int64 ``(kept, undecided)``, empty unless asked for."""
    check_supported(weight=weight, mask_logits=mask_logits)
    out = torch.empty_like(weight, dtype=dtype or weight.dtype)
    check_supported(masked_weight=out)
    logits = mask_logits if mask_logits.shape == weight.shape else mask_logits.expand(weight.shape)
    return out, *_launch(weight, logits, temperature, hard, scale, out, counts, config)


def mask_sums(
    mask_logits: Tensor,
    temperature: Tensor,
    hard: bool,
    scale: float,
    weights_per_logit: int,
    counts: bool = True,
    config: ElementwiseConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``csmask.reference.mask_sums``: l0 (0-d fp32) and int64 ``(kept, undecided)``, all counted in weights.

    Without ``counts`` the second result is empty.
    """
    check_supported(mask_logits=mask_logits)
    l0, kept_undecided = _launch(None, mask_logits, temperature, hard, scale, None, counts, config)
    return l0 * weights_per_logit, kept_undecided * weights_per_logit
