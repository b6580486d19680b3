"""Counter-based random numbers that every back end draws alike: Philox4x32-10.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, https://doi.org/10.1145/2063384.2063405.
A draw is a pure function of (seed, stream, purpose, element): integers only, so it is the same on every device,
whatever the order in which elements are visited.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# Counters worked on at a time: bounds the scratch memory, at most about 256 bytes each, whatever the layer's size.
_CHUNK = 1 << 20


def philox4x32(counters: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten Philox rounds on int64 tensors that hold 32-bit words; returns the four output words likewise."""
    c0, c1, c2, c3 = counters
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product of two 32-bit words wraps in int64, but bits 32 to 63 of it are right all the same.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _WORD, (k1 + _KEY_INCREMENTS[1]) & _WORD
    return c0, c1, c2, c3


def check_seed(seed: int) -> int:
    """The seed, if it is an integer in [0, 2**64)."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    return seed


def _blocks(count: int, seed: int, stream: int, purpose: int, device: torch.device | str) -> list[Tensor]:
    """Blocks 0 .. count-1 of the stream, as a list of ``(n, 4)`` int64 chunks of 32-bit words."""
    check_seed(seed)
    chunks = []
    for start in range(0, count, _CHUNK):
        index = torch.arange(start, min(start + _CHUNK, count), dtype=torch.int64, device=device)
        counters = (index & _WORD, index >> 32, torch.full_like(index, stream), torch.full_like(index, purpose))
        chunks.append(torch.stack(philox4x32(counters, (seed & _WORD, seed >> 32)), dim=1))
    return chunks


def random_words(count: int, seed: int, stream: int, purpose: int, device: torch.device | str = "cpu") -> Tensor:
    """``count`` uniform 32-bit words as int64: element ``i`` is word ``i % 4`` of block ``i // 4``."""
    blocks = _blocks((count + 3) // 4, seed, stream, purpose, device)
    if not blocks:
        return torch.empty(0, dtype=torch.int64, device=device)
    return torch.cat([b.flatten() for b in blocks])[:count]


def random_uniform(count: int, seed: int, stream: int, purpose: int, device: torch.device | str = "cpu") -> Tensor:
    """``count`` fp32 values on the open interval (-1, 1), each an exact odd multiple of 2**-24."""
    bits = random_words(count, seed, stream, purpose, device) >> 8
    return (2 * bits + 1 - (1 << 24)).to(torch.float32) * 2.0**-24


def random_normal(count: int, seed: int, stream: int, purpose: int, device: torch.device | str = "cpu") -> Tensor:
    """``count`` fp32 values of mean 0 and variance 1: the standardised sum of the 16 bytes of block ``i``.

    A sum of 16 uniform bytes (Irwin-Hall) is normal but for an excess kurtosis of -0.075 and tails that end at 6.9
    standard deviations; unlike Box-Muller it needs no logarithm or cosine, which no two back ends round alike.
    """
    mean, inverse_std = 16 * 255 / 2, (16 * (256**2 - 1) / 12) ** -0.5
    shifts = torch.tensor([0, 8, 16, 24], device=device)
    sums = [
        ((words.unsqueeze(-1) >> shifts) & 0xFF).sum(dim=(1, 2))
        for words in _blocks(count, seed, stream, purpose, device)
    ]
    if not sums:
        return torch.empty(0, dtype=torch.float32, device=device)
    return (torch.cat(sums) - int(mean)).to(torch.float32) * inverse_std
