"""``masked_linear``: ``out = x (W * m)^T + bias`` with the mask computed inside the matrix product, and its ``dx``.

The masked weight never exists in memory: each program loads a tile of the weight and of its mask (logits, or the
words of a bit-packed mask), multiplies them in fp32, rounds the product to x's dtype and feeds it to the tensor cores.
One kernel serves all four launchers: they differ in which dimension of the weight is summed over, that is in strides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import GemmConfig, Launch, Target, check_supported, fp32_products, target_of
from .mask import apply_mask, load_temperature, mask_value
from .masked_linear_config import candidate_configs, choose_config, fill
from .masked_linear_persistent import can_persist, plan_persistent, tile_of
from .replay import launch_planned

__all__ = ["bitmask_linear", "bitmask_linear_dx", "candidate_configs", "masked_linear", "masked_linear_dx"]

REDUCE_BLOCK = 1024


@triton.jit
def _load_mask(
    s_ptr, n0, k0, N, K, stride_sn, stride_sk, temperature, scale,
    MASK: tl.constexpr, HARD: tl.constexpr, SCALED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The fp32 mask ``(BLOCK_N, BLOCK_K)`` of the weights from ``(n0, k0)`` on; arbitrary where the tile hangs over.

    MASK says what ``s_ptr`` holds: "logits" with their strides, or bits, for which the strides give a weight's flat
    index. "bits" loads a word per weight; "words_k" and "words_n" load each word once, 32 weights along that dimension.
    """
    offs_n = (n0 + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    offs_k = (k0 + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
    if MASK == "logits":
        s = tl.load(s_ptr + offs_n * stride_sn + offs_k * stride_sk, mask=(offs_n < N) & (offs_k < K), other=0.0)
    elif MASK == "bits":
        index = offs_n * stride_sn + offs_k * stride_sk
        words = tl.load(s_ptr + (index >> 5), mask=(offs_n < N) & (offs_k < K), other=0)
        s = (words >> (index & 31).to(tl.int32)) & 1
    elif MASK == "words_k":
        word = (k0 // 32 + tl.arange(0, BLOCK_K // 32)).to(tl.int64)[None, :]
        words = tl.load(s_ptr + offs_n * (stride_sn // 32) + word, mask=(offs_n < N) & (word < K // 32), other=0)
        s = tl.reshape((words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1, (BLOCK_N, BLOCK_K))
    else:
        word = (n0 // 32 + tl.arange(0, BLOCK_N // 32)).to(tl.int64)[:, None]
        words = tl.load(s_ptr + word + offs_k * (stride_sk // 32), mask=(word < N // 32) & (offs_k < K), other=0)
        s = tl.reshape((words[:, None, :] >> tl.arange(0, 32)[None, :, None]) & 1, (BLOCK_N, BLOCK_K))
    return mask_value(s, temperature, scale, HARD, SCALED)


@triton.jit
def _masked_linear_fwd_kernel(
    x_ptr, w_ptr, s_ptr, bias_ptr, out_ptr, l0_ptr, t_ptr, scale, M, N, K,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_sn, stride_sk,
    MASK: tl.constexpr, HARD: tl.constexpr, SCALED: tl.constexpr, COUNT: tl.constexpr, HAS_BIAS: tl.constexpr,
    SWAP: tl.constexpr, PRECISION: tl.constexpr, SPLIT_K: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out[M, N] = x[M, K] (W * m)[N, K]^T + bias[N]``; out is contiguous, W and the mask have any strides.

    Program ``(pid, split)`` makes one tile over one of SPLIT_K ranges of K: the tile of out itself, or for SPLIT_K > 1
    fp32 partial sums in slot ``split`` of out ``(SPLIT_K, M, N)``, without bias. Where COUNT, the programs of the first
    row of tiles, which see every weight once, write the sum of their masks to slot ``(pid_n, split)`` of the partials.
    SWAP computes the transposed tile ``(W * m) x^T``: the masked weight, which is in registers anyway, becomes the left
    operand, and BLOCK_M can be 16. Bytes: x once per tile of N, W and the mask once per tile of M, out once.
    """
    tiles_m = tl.maximum(tl.cdiv(M, BLOCK_M), 1)
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    split = tl.program_id(1)
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K)
    begin = split * steps * BLOCK_K
    end = tl.minimum(begin + steps * BLOCK_K, K)

    temperature = 1.0
    if not HARD:
        temperature = load_temperature(t_ptr)
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    l0 = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for k0 in range(begin, end, BLOCK_K):
        offs_k = (k0 + tl.arange(0, BLOCK_K)).to(tl.int64)
        x_inside = (offs_m < M)[:, None] & (offs_k < K)[None, :]
        w_inside = (offs_n < N)[:, None] & (offs_k < K)[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk, mask=x_inside, other=0.0)
        w = tl.load(w_ptr + offs_n[:, None] * stride_wn + offs_k[None, :] * stride_wk, mask=w_inside, other=0.0)
        mask = _load_mask(
            s_ptr, pid_n * BLOCK_N, k0, N, K, stride_sn, stride_sk, temperature, scale,
            MASK, HARD, SCALED, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if COUNT and pid_m == 0:
            # A logit that is not there was loaded as 0, which a soft mask takes for 1/2: it must not count.
            l0 += tl.sum(tl.where(w_inside, mask, 0.0), axis=1)
        wm = apply_mask(w, mask, HARD, SCALED).to(x.dtype)
        if SWAP:
            acc = tl.dot(wm, tl.trans(x), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, tl.trans(wm), acc, input_precision=PRECISION)

    if COUNT and pid_m == 0:
        tl.store(l0_ptr + pid_n * SPLIT_K + split, tl.sum(l0))
    if SWAP:
        acc = tl.trans(acc)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + (split * M + offs_m)[:, None] * N + offs_n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


@triton.jit
def _masked_linear_reduce_kernel(
    partial_ptr, bias_ptr, out_ptr, numel, N, HAS_BIAS: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr
):
    """``out = sum over splits of the partials + bias``, in the order of the splits; a program makes BLOCK elements.

    Bytes per element of out: 4 * SPLIT_K read, out written once.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < numel
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in tl.static_range(SPLIT_K):
        total += tl.load(partial_ptr + split * tl.cast(numel, tl.int64) + offs, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + offs % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Mask:
    """What the weight is multiplied with, as a kernel sees it.

    Args:
        source: logits, in the weight's orientation and shape (broadcast dimensions have stride 0), or int32 words.
        strides: of the logits, or of the flat index of a weight's bit, in the order of the weight's dimensions.
        is_bits: whether ``source`` is words.
        temperature: 0-d; none for bits.
        hard, scale: as in ``csmask.reference.materialize``.
    """

    source: Tensor
    strides: tuple[int, int]
    is_bits: bool
    temperature: Tensor | None
    hard: bool
    scale: float

    @property
    def logits(self) -> Tensor | None:
        """The logits, or none for bits."""
        return None if self.is_bits else self.source

    def transposed(self) -> Mask:
        """The mask of the transposed weight."""
        source = self.source if self.is_bits else self.source.t()
        return replace(self, source=source, strides=self.strides[::-1])

    def kind(self, n: int, k: int, config: GemmConfig) -> str:
        """The kernel's MASK: words are loaded whole where every row of bits begins with a word and tiles hold them."""
        if not self.is_bits:
            return "logits"
        if self.strides[1] == 1 and k % 32 == 0 and config.block_k % 32 == 0:
            return "words_k"
        if self.strides[0] == 1 and n % 32 == 0 and config.block_n % 32 == 0:
            return "words_n"
        return "bits"


def logits_mask(weight: Tensor, logits: Tensor, temperature: Tensor, hard: bool, scale: float) -> Mask:
    logits = logits.expand(weight.shape)
    return Mask(logits, (logits.stride(0), logits.stride(1)), False, temperature, hard, scale)


def bits_mask(weight: Tensor, bits: Tensor, scale: float) -> Mask:
    return Mask(bits, (weight.shape[1], 1), True, None, True, scale)


def plan(
    x: Tensor,
    weight: Tensor,
    mask: Mask,
    bias: Tensor | None,
    out: Tensor,
    count: bool,
    target: Target,
    config: GemmConfig,
) -> tuple[list[Launch], tuple[Tensor | None, Tensor | None]]:
    """The launches of ``out[M, N] = x[M, K] (weight * mask)[N, K]^T + bias``, and their scratch.

    That is the l0 partials where ``count``, and the partial sums where K is split.

    The persistent form (which does not split K) is taken where the config asks for it and target and tensors have it.
    """
    (m, k), n = x.shape, weight.shape[0]
    config = fill(config, target, m, n, k)
    splits = 1 if config.persistent else config.split_k
    tiles_m, tiles_n = triton.cdiv(m, config.block_m), triton.cdiv(n, config.block_n)
    # Without a token there is no tile, but the mask is still counted.
    tiles_m = max(tiles_m, 1) if count else tiles_m
    l0 = torch.empty((tiles_n, splits), dtype=torch.float32, device=x.device) if count else None
    partial = torch.empty((splits, m, n), dtype=torch.float32, device=x.device) if splits > 1 else None
    arguments: dict[str, Any] = {
        "x_ptr": x, "w_ptr": weight, "s_ptr": mask.source, "bias_ptr": None if splits > 1 else bias,
        "out_ptr": out if partial is None else partial, "l0_ptr": l0, "t_ptr": mask.temperature, "scale": mask.scale,
        "M": m, "N": n, "K": k, "stride_xm": x.stride(0), "stride_xk": x.stride(1),
        "stride_wn": weight.stride(0), "stride_wk": weight.stride(1),
        "stride_sn": mask.strides[0], "stride_sk": mask.strides[1],
    }  # fmt: skip
    constants = {
        "MASK": mask.kind(n, k, config), "HARD": mask.hard, "SCALED": mask.scale != 1.0, "COUNT": count,
        "HAS_BIAS": bias is not None and splits == 1, "SWAP": config.swap, "PRECISION": fp32_products(target),
        "SPLIT_K": splits, "GROUP_M": config.group_m,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
    }  # fmt: skip
    if mask.logits is not None and config.persistent and can_persist(target, x, weight, mask.logits):
        return [plan_persistent(x, weight, mask.logits, out, arguments, constants, target, config)], (l0, None)
    grid = (tiles_m * tiles_n, splits)
    launches = [Launch(_masked_linear_fwd_kernel, grid, arguments, constants, config.num_warps, config.num_stages)]
    if partial is not None:
        launches.append(plan_reduce(partial, bias, out))
    return launches, (l0, partial)


def plan_reduce(partial: Tensor, bias: Tensor | None, out: Tensor) -> Launch:
    """The launch that adds the partial sums ``(splits, M, N)`` and the bias into ``out``."""
    arguments = {"partial_ptr": partial, "bias_ptr": bias, "out_ptr": out, "numel": out.numel(), "N": out.shape[1]}
    constants = {"HAS_BIAS": bias is not None, "SPLIT_K": partial.shape[0], "BLOCK": REDUCE_BLOCK}
    return Launch(_masked_linear_reduce_kernel, (triton.cdiv(out.numel(), REDUCE_BLOCK),), arguments, constants)


def _multiply(
    op: str,
    x: Tensor,
    weight: Tensor,
    mask: Mask,
    bias: Tensor | None,
    count: bool,
    config: GemmConfig | None,
) -> tuple[Tensor, Tensor | None]:
    """``x[M, K] (weight * mask)[N, K]^T + bias`` in x's dtype, and the mask's sum where ``count``."""
    check_supported(x=x, weight=weight, mask_logits=mask.logits, bias=bias)
    target = target_of(x)
    bias = None if bias is None else bias.contiguous()  # the kernels know no stride of it
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    l0, _ = launch_planned(
        op,
        x.device,
        (x, weight, mask.source, mask.temperature, bias, out),
        (mask.strides, mask.is_bits, mask.hard, mask.scale, count, config, fp32_products(target)),
        lambda: plan(x, weight, mask, bias, out, count, target, config or choose_config(op, target, x, weight, mask)),
    )
    return out, None if l0 is None else l0.sum()


def masked_linear(
    x: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    hard: bool,
    scale: float,
    transposed: bool,
    config: GemmConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``csmask.reference.masked_linear``, with ``x (M, K)``; also the sum of the mask: 0-d fp32, in weights."""
    mask = logits_mask(weight, mask_logits, temperature, hard, scale)
    if transposed:
        weight, mask = weight.t(), mask.transposed()
    out, l0 = _multiply("masked_linear", x, weight, mask, bias, True, config)
    assert l0 is not None
    return out, l0


def masked_linear_dx(
    dout: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor,
    hard: bool,
    scale: float,
    transposed: bool,
    config: GemmConfig | None = None,
) -> Tensor:
    """``dx = dout (W * m)``, ``(M, K)`` of dout's dtype: the gradient of ``masked_linear``'s input."""
    mask = logits_mask(weight, mask_logits, temperature, hard, scale)
    if not transposed:
        weight, mask = weight.t(), mask.transposed()
    return _multiply("masked_linear_dx", dout, weight, mask, None, False, config)[0]


def bitmask_linear(
    x: Tensor,
    weight: Tensor,
    bits: Tensor,
    bias: Tensor | None,
    scale: float,
    transposed: bool,
    config: GemmConfig | None = None,
) -> Tensor:
    """``masked_linear`` with a hard mask of 1 bit per weight, as ``pack_mask`` makes it from the logits."""
    mask = bits_mask(weight, bits, scale)
    if transposed:
        weight, mask = weight.t(), mask.transposed()
    return _multiply("bitmask_linear", x, weight, mask, bias, False, config)[0]


def bitmask_linear_dx(
    dout: Tensor,
    weight: Tensor,
    bits: Tensor,
    scale: float,
    transposed: bool,
    config: GemmConfig | None = None,
) -> Tensor:
    """``masked_linear_dx`` with a hard mask of 1 bit per weight."""
    mask = bits_mask(weight, bits, scale)
    if not transposed:
        weight, mask = weight.t(), mask.transposed()
    return _multiply("bitmask_linear_dx", dout, weight, mask, None, False, config)[0]
