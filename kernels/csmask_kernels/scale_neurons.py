"""``scale_neurons``: ``out = z * m + b`` along one dimension, and its gradients: unit ``"neuron"`` without a masked
weight.

The kernels walk a tensor as ``outer x units x inner`` by its strides: ``inner`` is the row of a linear layer's output
or a pixel, and either it or the unit may be the dimension that is contiguous. A program owns a tile of units, whose
masks it computes once, and takes ``steps`` tiles of entries of these units one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ElementwiseConfig, Launch, Target, check_supported, collapse, get_config, like, target_of
from .mask import apply_mask, load_temperature, mask_value, soft_mask_derivative
from .replay import launch_planned

DEFAULT_CONFIG = ElementwiseConfig(block=4096, num_warps=4)
DEFAULT_GRAD_CONFIG = ElementwiseConfig(block=2048, num_warps=4)
# Longest side of a tile along the contiguous dimension: 512 bytes or more in a row, and little waste at odd sizes.
_LONGEST_SIDE = 256
# Programs per multiprocessor: all resident at once (compiled for sm_90 with Triton 3.9: at most 80 registers a thread).
_PROGRAMS = 6
_PARTIALS_BLOCK_U, _PARTIALS_BLOCK_P = 64, 32


@triton.jit
def _scale_neurons_kernel(
    z_ptr, s_ptr, b_ptr, out_ptr, t_ptr, scale, units, outer, inner, steps,
    stride_zo, stride_zu, stride_zi, stride_outo, stride_outu, stride_outi, stride_s, stride_b,
    HAS_BIAS: tl.constexpr, HARD: tl.constexpr, SCALED: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """``out = z * m[u] + b[u]``: reads z once, writes out once; bytes of logits and bias are per unit and program."""
    tiles_u = tl.cdiv(units, BLOCK_U)
    tiles_i = tl.cdiv(inner, BLOCK_I)
    offs_u = ((tl.program_id(0) % tiles_u).to(tl.int64) * BLOCK_U + tl.arange(0, BLOCK_U))[:, None]
    is_unit = offs_u < units
    mask = mask_value(
        tl.load(s_ptr + offs_u * stride_s, mask=is_unit, other=0.0), load_temperature(t_ptr), scale, HARD, SCALED
    )
    if HAS_BIAS:
        bias = tl.load(b_ptr + offs_u * stride_b, mask=is_unit, other=0.0).to(tl.float32)
    first = tl.program_id(0) // tiles_u * steps
    for tile in range(first, tl.minimum(first + steps, outer * tiles_i)):
        o = (tile // tiles_i).to(tl.int64)
        offs_i = ((tile % tiles_i).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I))[None, :]
        inside = is_unit & (offs_i < inner)
        z = tl.load(z_ptr + o * stride_zo + offs_u * stride_zu + offs_i * stride_zi, mask=inside, other=0.0)
        out = apply_mask(z, mask, HARD)
        if HAS_BIAS:
            out += bias
        at = out_ptr + o * stride_outo + offs_u * stride_outu + offs_i * stride_outi
        tl.store(at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scale_neurons_grad_kernel(
    dout_ptr, z_ptr, s_ptr, dz_ptr, partials_ptr, t_ptr, scale, units, outer, inner, steps,
    stride_douto, stride_doutu, stride_douti, stride_zo, stride_zu, stride_zi, stride_dzo, stride_dzu, stride_dzi,
    stride_s, HARD: tl.constexpr, SCALED: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """``dz = dout * m[u]``, and unless HARD the program's sum of ``dout * z`` per unit, into its row of the partials.

    Reads dout and z once (a hard mask needs no z), writes dz once; 4 bytes of partials per unit and program.
    """
    tiles_u = tl.cdiv(units, BLOCK_U)
    tiles_i = tl.cdiv(inner, BLOCK_I)
    offs_u = ((tl.program_id(0) % tiles_u).to(tl.int64) * BLOCK_U + tl.arange(0, BLOCK_U))[:, None]
    is_unit = offs_u < units
    mask = mask_value(
        tl.load(s_ptr + offs_u * stride_s, mask=is_unit, other=0.0), load_temperature(t_ptr), scale, HARD, SCALED
    )
    share = tl.program_id(0) // tiles_u
    first = share * steps
    sums = tl.zeros((BLOCK_U, BLOCK_I), dtype=tl.float32)
    for tile in range(first, tl.minimum(first + steps, outer * tiles_i)):
        o = (tile // tiles_i).to(tl.int64)
        offs_i = ((tile % tiles_i).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I))[None, :]
        inside = is_unit & (offs_i < inner)
        at = dout_ptr + o * stride_douto + offs_u * stride_doutu + offs_i * stride_douti
        dout = tl.load(at, mask=inside, other=0.0)
        if not HARD:
            z = tl.load(z_ptr + o * stride_zo + offs_u * stride_zu + offs_i * stride_zi, mask=inside, other=0.0)
            sums += dout.to(tl.float32) * z.to(tl.float32)
        dz = dz_ptr + o * stride_dzo + offs_u * stride_dzu + offs_i * stride_dzi
        tl.store(dz, apply_mask(dout, mask, HARD).to(dz_ptr.dtype.element_ty), mask=inside)
    if not HARD:
        row = partials_ptr + share.to(tl.int64) * units
        tl.store(row + offs_u, tl.sum(sums, axis=1, keep_dims=True), mask=is_unit)


@triton.jit
def _scale_neurons_dlogits_kernel(
    partials_ptr, s_ptr, out_ptr, t_ptr, dl0_ptr, scale, weights_per_logit, units, shares, stride_s, stride_out,
    HAS_DL0: tl.constexpr, SCALED: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """``dS = (sum of the partials + g * weights_per_logit) * scale * T * m * (1 - m)``, BLOCK_U units per program.

    Reads the partials once, in a fixed order.
    """
    offs_u = tl.program_id(0).to(tl.int64) * BLOCK_U + tl.arange(0, BLOCK_U)
    is_unit = offs_u < units
    sums = tl.zeros((BLOCK_P, BLOCK_U), dtype=tl.float32)
    for start in range(0, shares, BLOCK_P):
        share = start + tl.arange(0, BLOCK_P).to(tl.int64)
        inside = (share < shares)[:, None] & is_unit[None, :]
        sums += tl.load(partials_ptr + share[:, None] * units + offs_u[None, :], mask=inside, other=0.0)
    dmask = tl.sum(sums, axis=0)
    if HAS_DL0:
        dmask += tl.load(dl0_ptr).to(tl.float32) * weights_per_logit
    s = tl.load(s_ptr + offs_u * stride_s, mask=is_unit, other=0.0)
    ds = dmask * soft_mask_derivative(s, load_temperature(t_ptr))
    if SCALED:
        ds = ds * scale
    tl.store(out_ptr + offs_u * stride_out, ds.to(out_ptr.dtype.element_ty), mask=is_unit)


@dataclass(frozen=True)
class _Walk:
    """How the programs share tensors of one shape; ``strides`` are (outer, unit, inner), one triple per tensor."""

    units: int
    outer: int
    inner: int
    strides: list[tuple[int, int, int]]
    block_u: int
    block_i: int
    steps: int

    @property
    def shares(self) -> int:
        """Programs that a unit's entries are spread over: rows of the partials."""
        return triton.cdiv(self.outer * triton.cdiv(self.inner, self.block_i), self.steps)

    @property
    def programs(self) -> int:
        return triton.cdiv(self.units, self.block_u) * self.shares

    def arguments(self, *names: str) -> dict[str, int]:
        """Sizes, and strides of each tensor by its name in the kernel."""
        found = {"units": self.units, "outer": self.outer, "inner": self.inner, "steps": self.steps}
        for name, strides in zip(names, self.strides, strict=True):
            found.update({f"stride_{name}{axis}": s for axis, s in zip("oui", strides, strict=True)})
        return found


def _walk(dim: int, block: int, target: Target, *tensors: Tensor) -> _Walk | None:
    """None where the entries of a unit need more than two dimensions in these layouts."""
    shape = tensors[0].shape
    rest = [d for d in range(len(shape)) if d != dim]
    sizes, strides = collapse([shape[d] for d in rest], *([t.stride(d) for d in rest] for t in tensors))
    if len(sizes) > 2:
        return None
    outer, inner = [1, *sizes][-2:]
    triples = [([0, *s][-2], t.stride(dim), s[-1]) for s, t in zip(strides, tensors, strict=True)]
    units = shape[dim]
    if units > 1 and all(u == 1 for _, u, _ in triples):
        block_u = min(triton.next_power_of_2(units), _LONGEST_SIDE, block)
        block_i = min(triton.next_power_of_2(max(inner, 1)), block // block_u)
    else:
        # A square serves layouts that differ, with whole cache lines on both sides.
        side = _LONGEST_SIDE if all(i == 1 for _, _, i in triples) else 1 << (block.bit_length() // 2)
        block_i = min(triton.next_power_of_2(max(inner, 1)), side, block)
        block_u = min(triton.next_power_of_2(max(units, 1)), block // block_i)
    tiles = triton.cdiv(units, block_u) * outer * triton.cdiv(inner, block_i)
    steps = max(1, triton.cdiv(tiles, _PROGRAMS * target.multiprocessors))
    return _Walk(units, outer, inner, triples, block_u, block_i, steps)


def _walk_or_copy(dim: int, block: int, target: Target, *tensors: Tensor) -> tuple[_Walk, list[Tensor]]:
    """The walk, and the tensors it is for: copies in the layout of the first where theirs are too far from it."""
    walk = _walk(dim, block, target, *tensors)
    if walk is None:
        first = tensors[0]
        tensors = (first, *(like(t, first) for t in tensors[1:]))
        walk = _walk(dim, block, target, *tensors)
        assert walk is not None, "the first tensor is dense: the dimensions on either side of the units are one each"
    return walk, list(tensors)


def plan(
    z: Tensor,
    mask_logits: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    hard: bool,
    scale: float,
    dim: int,
    out: Tensor,
    target: Target,
    config: ElementwiseConfig | None = None,
) -> Launch:
    """The launch that writes ``out``, laid out as ``empty_like(z)``."""
    config = config or get_config("scale_neurons", target, z.numel(), DEFAULT_CONFIG)
    walk, (out, z) = _walk_or_copy(dim, config.block, target, out, z)
    arguments: dict[str, Any] = {
        "z_ptr": z, "s_ptr": mask_logits, "b_ptr": bias, "out_ptr": out, "t_ptr": temperature, "scale": scale,
        "stride_s": mask_logits.stride(0), "stride_b": 0 if bias is None else bias.stride(0),
        **walk.arguments("out", "z"),
    }  # fmt: skip
    constants = {
        "HAS_BIAS": bias is not None, "HARD": hard, "SCALED": scale != 1.0, "BLOCK_U": walk.block_u,
        "BLOCK_I": walk.block_i,
    }  # fmt: skip
    return Launch(_scale_neurons_kernel, (walk.programs,), arguments, constants, config.num_warps)


def plan_grad(
    dout: Tensor,
    z: Tensor,
    mask_logits: Tensor,
    temperature: Tensor,
    dl0: Tensor | None,
    hard: bool,
    scale: float,
    dim: int,
    weights_per_logit: int,
    dz: Tensor,
    dlogits: Tensor,
    target: Target,
    config: ElementwiseConfig | None = None,
) -> tuple[list[Launch], Tensor]:
    """The launch that writes ``dz``, laid out as ``empty_like(z)``, for soft masks the one of ``dlogits``; partials."""
    config = config or get_config("scale_neurons_grad", target, z.numel(), DEFAULT_GRAD_CONFIG)
    walk, (dz, dout, z) = _walk_or_copy(dim, config.block, target, dz, dout, z)
    partials = torch.empty((0 if hard else walk.shares, walk.units), dtype=torch.float32, device=z.device)
    shared: dict[str, Any] = {
        "s_ptr": mask_logits, "partials_ptr": partials, "t_ptr": temperature, "scale": scale,
        "stride_s": mask_logits.stride(0),
    }  # fmt: skip
    arguments = {**shared, "dout_ptr": dout, "z_ptr": z, "dz_ptr": dz, **walk.arguments("dz", "dout", "z")}
    scaled = scale != 1.0
    constants = {"HARD": hard, "SCALED": scaled, "BLOCK_U": walk.block_u, "BLOCK_I": walk.block_i}
    launches = [Launch(_scale_neurons_grad_kernel, (walk.programs,), arguments, constants, config.num_warps)]
    if not hard:
        arguments = {
            **shared, "out_ptr": dlogits, "dl0_ptr": dl0, "weights_per_logit": weights_per_logit, "units": walk.units,
            "shares": walk.shares, "stride_out": dlogits.stride(0),
        }  # fmt: skip
        constants = {
            "HAS_DL0": dl0 is not None, "SCALED": scaled, "BLOCK_U": _PARTIALS_BLOCK_U, "BLOCK_P": _PARTIALS_BLOCK_P,
        }  # fmt: skip
        grid = (triton.cdiv(walk.units, _PARTIALS_BLOCK_U),)
        launches.append(Launch(_scale_neurons_dlogits_kernel, grid, arguments, constants))
    return launches, partials


def scale_neurons(
    z: Tensor,
    mask_logits: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    hard: bool,
    scale: float,
    dim: int,
    config: ElementwiseConfig | None = None,
) -> Tensor:
    """See ``csmask.reference.scale_neurons``; the layout is that of ``z``."""
    check_supported(z=z, mask_logits=mask_logits, bias=bias)
    out = torch.empty_like(z)
    launch_planned(
        "scale_neurons",
        z.device,
        (z, mask_logits, temperature, bias, out),
        (hard, scale, dim, config),
        lambda: ([plan(z, mask_logits, temperature, bias, hard, scale, dim, out, target_of(z), config)], ()),
    )
    return out


def scale_neurons_grad(
    dout: Tensor,
    z: Tensor,
    mask_logits: Tensor,
    temperature: Tensor,
    dl0: Tensor | None,
    hard: bool,
    scale: float,
    dim: int,
    weights_per_logit: int,
    config: ElementwiseConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of ``scale_neurons`` and of the l0 sum, whose gradient is ``dl0``, in one pass over ``dout``.

    Returns:
        ``(dz, dlogits)``: ``dout * m`` in the layout of ``z`` and the dtype of ``dout``; ``(U,)``, the sum of
        ``dout * z`` over all but the units plus ``dl0 * weights_per_logit``, times ``dm/dS``; zeros for a hard mask.
    """
    check_supported(dout=dout, z=z, mask_logits=mask_logits)
    dz = torch.empty_like(z, dtype=dout.dtype)
    dlogits = torch.zeros_like(mask_logits) if hard else torch.empty_like(mask_logits)
    mask, options = (mask_logits, temperature, dl0), (hard, scale, dim, weights_per_logit, config)

    def planned() -> tuple[list[Launch], tuple[Tensor]]:
        target = target_of(z)
        launches, partials = plan_grad(dout, z, *mask, hard, scale, dim, weights_per_logit, dz, dlogits, target, config)
        return launches, (partials,)

    launch_planned("scale_neurons_grad", z.device, (dout, z, *mask, dz, dlogits), options, planned)
    return dz, dlogits
