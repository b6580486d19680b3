"""The launch configs of ``masked_linear`` and its ``dx``: the default, how a config is fitted, what is worth timing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from .launch import GemmConfig, Target, get_config
from .masked_linear_persistent import can_persist

if TYPE_CHECKING:
    from .masked_linear import Mask

# Compiled without spills for sm_80 to sm_120, gfx942 and gfx950. split_k = 0 is resolved by ``fill``.
DEFAULT_CONFIG = GemmConfig(block_m=64, block_n=64, block_k=32, split_k=0)
FP32_CONFIG = replace(DEFAULT_CONFIG, block_n=32)

_Form = dict[str, Any]
_Tile = tuple[int, int, int, int, int, _Form]
_FEW: _Form = {"swap": True, "split_k": 0}
_MANY: _Form = {"split_k": 0}
_PERSISTENT: _Form = {"persistent": True}
# (block_m, block_n, block_k, num_warps, num_stages, form): shared memory of 227, of 99 to 163, of 64 kB or more on AMD.
_LARGE: tuple[_Tile, ...] = (
    (16, 64, 64, 4, 4, _FEW), (16, 128, 64, 8, 3, _FEW), (16, 128, 64, 8, 4, _FEW),
    (64, 64, 64, 4, 3, _FEW), (64, 128, 64, 8, 3, _FEW), (64, 128, 64, 8, 3, _MANY),
    (128, 128, 32, 8, 4, _MANY), (128, 128, 64, 8, 3, _MANY), (128, 128, 64, 8, 3, _PERSISTENT),
    (256, 128, 32, 8, 3, _PERSISTENT), (256, 128, 64, 8, 2, _PERSISTENT), (256, 128, 64, 8, 2, {}),
)  # fmt: skip
# A mask of bits is next to no bytes: longer steps, so that as much is on its way.
_BITS: tuple[_Tile, ...] = (
    (16, 32, 128, 4, 4, _FEW), (16, 32, 256, 4, 3, _FEW), (16, 64, 64, 4, 6, _FEW), (16, 64, 128, 4, 3, _FEW),
    (16, 64, 128, 4, 4, _FEW), (16, 64, 128, 2, 4, _FEW), (16, 128, 64, 8, 4, _FEW), (16, 128, 128, 8, 3, _FEW),
    (64, 64, 64, 4, 3, _FEW), (64, 64, 128, 4, 3, _FEW), (64, 128, 64, 8, 3, _FEW), (64, 128, 64, 8, 4, _MANY),
)  # fmt: skip
_SMALL: tuple[_Tile, ...] = (
    (16, 64, 32, 4, 4, _FEW), (16, 64, 64, 4, 3, _FEW), (16, 128, 32, 4, 3, _FEW), (16, 128, 64, 8, 2, _FEW),
    (64, 64, 32, 4, 4, _FEW), (64, 64, 32, 4, 4, _MANY), (64, 64, 64, 4, 2, _MANY), (64, 128, 32, 8, 3, _MANY),
    (128, 64, 32, 4, 3, _MANY), (128, 128, 32, 8, 3, _MANY), (256, 64, 32, 8, 3, {}), (128, 128, 32, 8, 2, {}),
)  # fmt: skip
_AMD: tuple[_Tile, ...] = (
    (16, 64, 64, 4, 2, _FEW), (16, 64, 128, 4, 2, _FEW), (16, 128, 64, 4, 2, _FEW), (32, 64, 64, 4, 2, _FEW),
    (64, 64, 64, 4, 2, _FEW), (64, 64, 64, 4, 2, _MANY), (64, 128, 64, 8, 2, _MANY),
    (128, 64, 64, 4, 2, _MANY), (128, 128, 32, 8, 2, _MANY), (128, 128, 64, 8, 2, _MANY), (256, 128, 32, 8, 2, {}),
)  # fmt: skip


def candidate_configs(op: str, target: Target, m: int, n: int, k: int) -> list[GemmConfig]:
    """What ``bench/tune.py`` times for ``out (m, n)`` summed over k, tables' configs for 2-byte operands: at most 12.

    Both ops have the same tiles, but for few tokens and bits. Tiles of M that are mostly padding are left out, and
    those that would compute every mask more than 16 times where a larger tile is to be had.
    """
    nvidia = _LARGE if target.family in ("sm_90", "sm_100", "sm_103") else _SMALL
    tiles = _AMD if target.backend == "hip" else nvidia
    if op == "bitmask_linear" and tiles is _LARGE and m <= 64:
        tiles = _BITS
    least, most = min(m / 16, 128), max(2 * m, 16)
    found = [
        GemmConfig(block_m, block_n, block_k, num_warps=warps, num_stages=stages, **form)
        for block_m, block_n, block_k, warps, stages, form in tiles
        if least <= block_m <= most
    ]
    splits = {fill(config, target, m, n, k).split_k for config in found if config.split_k == 0}
    if max(splits, default=1) > 1:
        # The number of splits that fill the device once is derived; half and twice as many are worth a measurement.
        best = next(config for config in found if config.split_k == 0)
        filled = fill(best, target, m, n, k).split_k
        found += [replace(best, split_k=s) for s in (filled // 2, filled * 2) if s > 0]
    return found[:12]


def choose_config(op: str, target: Target, x: Tensor, weight: Tensor, mask: Mask) -> GemmConfig:
    """The config for ``x (M, K)`` and ``weight (N, K)``: the target's, made to fit their dtypes, sizes and layouts."""
    m, n = x.shape[0], weight.shape[0]
    default = DEFAULT_CONFIG
    if op.startswith("bitmask_"):
        default = get_config(op.replace("bitmask_", "masked_"), target, m, default)
    config: GemmConfig = fit_dtypes(get_config(op, target, m, default), x, weight)
    if config.persistent:
        if _tiles(config, m, n) >= target.multiprocessors and can_persist(target, x, weight, mask.logits):
            return config
        # With less than a tile for each multiprocessor there is nothing to overlap a tile's end with, but K to split.
        config = replace(config, persistent=False, split_k=0)
    operands = (
        (x, x.shape, x.stride()),
        (weight, weight.shape, weight.stride()),
        (mask.source, weight.shape, mask.strides),
    )
    if not all(_is_loaded_whole(*operand) for operand in operands):
        # Rows that are loaded element by element take an address each: larger tiles spill registers.
        return fit_dtypes(DEFAULT_CONFIG, x, weight)
    if x.dtype == torch.float32 and (config.block_m <= 64 or weight.stride(1) != 1):
        # As compiled: two fp32 operands, of which one is transposed on the way, spill on larger tiles.
        return fit_dtypes(FP32_CONFIG, x, weight)
    if n % 16:  # so do the rows of out, once
        config = _at_most_128(config)
    return config


def _is_loaded_whole(tensor: Tensor, shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether Triton, which tells multiples of 16 elements from others, loads 16 bytes at once along a dimension."""
    if not tensor.is_meta and tensor.data_ptr() % 16:
        return False
    return any(strides[d] == 1 and shape[d] % 16 == 0 and strides[1 - d] % 16 == 0 and strides[1 - d] for d in (0, 1))


def fit_dtypes(config: GemmConfig, x: Tensor, weight: Tensor) -> GemmConfig:
    """Configs are for 2-byte x and W. fp32 ones take twice the shared memory: half the step of K.

    Three tf32 products (``launch.fp32_products``) spill registers on tiles over 128 x 128, as compiled with Triton 3.9.
    """
    if torch.float32 in (x.dtype, weight.dtype):
        config = replace(config, block_k=max(config.block_k // 2, 16))
    if x.dtype == torch.float32:
        config = _at_most_128(config)
    return config


def _at_most_128(config: GemmConfig) -> GemmConfig:
    return replace(config, block_m=min(config.block_m, 128), block_n=min(config.block_n, 128))


def fill(config: GemmConfig, target: Target, m: int, n: int, k: int) -> GemmConfig:
    """``split_k = 0`` made a number: as many splits as fill the multiprocessors, of four steps of K or more."""
    if config.split_k:
        return config
    longest = triton.cdiv(k, 4 * config.block_k)
    splits = min(target.multiprocessors // max(_tiles(config, m, n), 1), longest)
    return replace(config, split_k=max(splits, 1))


def _tiles(config: GemmConfig, m: int, n: int) -> int:
    return triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
