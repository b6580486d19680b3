"""The persistent form of ``masked_linear``: tensor descriptors and one program per multiprocessor (NVIDIA sm_90 on).

The bulk copies of the TMA unit bring whole tiles to shared memory without an address per thread, and the copies for a
program's next tile start before it has stored the last one. ``masked_linear.plan`` takes this form where it can.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import GemmConfig, Launch, Target
from .mask import apply_mask, load_temperature, mask_value


@triton.jit
def tile_of(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """``(pid_m, pid_n)`` of a program: GROUP_M tiles of M share each tile of the weight while it is in L2."""
    group = pid // (GROUP_M * tiles_n)
    first = group * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return first + within % rows, within // rows


@triton.jit
def _masked_linear_persistent_kernel(
    x_desc, w_desc, s_desc, bias_ptr, out_desc, l0_ptr, t_ptr, scale, M, N, K,
    K_FIRST: tl.constexpr, HARD: tl.constexpr, SCALED: tl.constexpr, COUNT: tl.constexpr, HAS_BIAS: tl.constexpr,
    SWAP: tl.constexpr, PRECISION: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out[M, N] = x[M, K] (W * m)[N, K]^T + bias[N]``; W and the logits lie as ``(K, N)`` where K_FIRST.

    A program makes every ``num_programs``-th tile of out. Where COUNT, the tiles of the first row, which see every
    weight once, write the sum of their masks to slot ``pid_n`` of the partials. SWAP computes the transposed tile.
    Bytes: x once per tile of N, W and the logits once per tile of M, out once.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    temperature = 1.0
    if not HARD:
        temperature = load_temperature(t_ptr)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        pid_m, pid_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        start_m, start_n = pid_m * BLOCK_M, pid_n * BLOCK_N
        offs_n = start_n + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=tl.float32)
        l0 = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for k0 in range(0, K, BLOCK_K):
            x = x_desc.load([start_m, k0])
            if K_FIRST:
                w = tl.trans(w_desc.load([k0, start_n]))
                s = tl.trans(s_desc.load([k0, start_n]))
            else:
                w = w_desc.load([start_n, k0])
                s = s_desc.load([start_n, k0])
            mask = mask_value(s, temperature, scale, HARD, SCALED)
            if COUNT and pid_m == 0:
                # The copies fill up with logits of 0, which a soft mask takes for 1/2: they must not count.
                inside = (offs_n < N)[:, None] & (k0 + tl.arange(0, BLOCK_K) < K)[None, :]
                l0 += tl.sum(tl.where(inside, mask, 0.0), axis=1)
            wm = apply_mask(w, mask, HARD, SCALED).to(x.dtype)
            if SWAP:
                acc = tl.dot(wm, tl.trans(x), acc, input_precision=PRECISION)
            else:
                acc = tl.dot(x, tl.trans(wm), acc, input_precision=PRECISION)
        if COUNT and pid_m == 0:
            tl.store(l0_ptr + pid_n, tl.sum(l0))
        if SWAP:
            acc = tl.trans(acc)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        out_desc.store([start_m, start_n], acc.to(out_desc.dtype))


def can_persist(target: Target, x: Tensor, weight: Tensor, logits: Tensor | None) -> bool:
    """Whether the target has the persistent form and descriptors can hold the tensors and ``out (M, N)``."""
    if logits is None or not (target.has_descriptors or target.backend == "interpreter"):
        return False
    m, n = x.shape[0], weight.shape[0]
    out_fits = m * n > 0 and n * x.element_size() % 16 == 0
    return out_fits and _can_describe(x) and _is_k_first(weight, logits) is not None


def _can_describe(tensor: Tensor) -> bool:
    """Whether a tensor descriptor can hold the 2-d tensor: rows of whole 16 bytes from an aligned base."""
    row, column = tensor.stride()
    size = tensor.element_size()
    return tensor.numel() > 0 and column == 1 and row > 0 and row * size % 16 == 0 and tensor.data_ptr() % 16 == 0


def _is_k_first(weight: Tensor, logits: Tensor) -> bool | None:
    """Whether W and the logits, views of ``(N, K)``, lie as ``(K, N)``; None where no descriptor can hold them."""
    if _can_describe(weight) and _can_describe(logits):
        return False
    if _can_describe(weight.t()) and _can_describe(logits.t()):
        return True
    return None


def plan_persistent(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    out: Tensor,
    arguments: dict[str, Any],
    constants: dict[str, Any],
    target: Target,
    config: GemmConfig,
) -> Launch:
    """The launch on tensors that ``can_persist`` accepts, with the pointer form's other arguments and constants."""
    k_first = bool(_is_k_first(weight, logits))
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    if k_first:
        weight, logits = weight.t(), logits.t()
    block_w = [block_k, block_n] if k_first else [block_n, block_k]
    arguments = {
        "x_desc": TensorDescriptor.from_tensor(x, [block_m, block_k]),
        "w_desc": TensorDescriptor.from_tensor(weight, block_w),
        "s_desc": TensorDescriptor.from_tensor(logits, block_w),
        "out_desc": TensorDescriptor.from_tensor(out, [block_m, block_n]),
        **{name: arguments[name] for name in ("bias_ptr", "l0_ptr", "t_ptr", "scale", "M", "N", "K")},
    }
    constants = {"K_FIRST": k_first, **{k: v for k, v in constants.items() if k not in ("MASK", "SPLIT_K")}}
    tiles = triton.cdiv(out.shape[0], block_m) * triton.cdiv(out.shape[1], block_n)
    grid = (min(target.multiprocessors, tiles),)
    return Launch(_masked_linear_persistent_kernel, grid, arguments, constants, config.num_warps, config.num_stages)
