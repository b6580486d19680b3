"""What the tests of the C++ kernels share: tensors in layouts of every kind with guards around them, a small cache."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from csmask import _cpp

BLOCK = 2048  # elements per block of a kernel: its unit of work and of its partial sums
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
STORAGE = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
# Layouts for any shape; the last two do nothing where the shape has no use for them.
VIEWS = [
    "contiguous",
    "unaligned",
    "stepped",
    "stepped-rows",
    "cropped",
    "reversed-dims",
    "transposed",
    "channels-last",
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def logits_of(*shape: int, seed: int = 1) -> Tensor:
    """Normal values, some of them exactly 0."""
    logits = normal(*shape, seed=seed)
    logits.view(-1)[::5] = 0.0
    return logits


def lay(values: Tensor, view: str, fill: float = math.nan) -> tuple[Tensor, Tensor]:
    """The same numbers in another layout, and the 1-d memory they lie in; around and between them there is ``fill``.

    Memory starts on 64 bytes. "unaligned" starts one element after; the others leave a margin of an element or more.
    """
    shape = list(values.shape)
    dims = len(shape)
    order = list(range(dims))
    padded, step, start = list(shape), [1] * dims, [0] * dims
    if view == "stepped" and dims:
        padded[-1], step[-1], start[-1] = 2 * shape[-1] + 1, 2, 1
    elif view == "stepped-rows" and dims:
        padded[0], step[0], start[0] = 3 * shape[0] + 2, 3, 2
    elif view == "cropped":
        padded, start = [n + 3 for n in shape], [1] * dims
    elif view == "reversed-dims":
        order.reverse()
    elif view == "transposed" and dims > 1:
        order[-1], order[-2] = order[-2], order[-1]
    elif view == "channels-last" and dims > 2:
        order = [0, *range(2, dims), 1]
    strides, reached = [0] * dims, 1
    for dim in reversed(order):
        strides[dim], reached = reached, reached * max(padded[dim], 1)
    margin = 0 if view == "contiguous" else 1
    memory = torch.full((reached + 2 * margin,), fill, dtype=values.dtype)
    offset = margin + sum(a * s for a, s in zip(start, strides, strict=True))
    laid = memory.as_strided(shape, [a * s for a, s in zip(step, strides, strict=True)], offset)
    return laid.copy_(values), memory


def assert_only_wrote(memory: Tensor, before: Tensor, out: Tensor) -> None:
    """All of ``memory`` but the elements of its view ``out`` is, bit for bit, what it was."""
    expected = before.clone()
    expected.as_strided(out.shape, out.stride(), out.storage_offset()).copy_(out)
    storage = STORAGE[memory.dtype]
    assert torch.equal(memory.view(storage), expected.view(storage)), "the kernel wrote beside its result"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every bit (NaNs and zeros of either sign included), whatever the strides."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    storage = STORAGE.get(a.dtype, a.dtype)
    return torch.equal(a.contiguous().view(storage), b.contiguous().view(storage))


class SmallCache:
    """The C++ back end of a machine whose largest cache has so many bytes: small weights take several blocks."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __getattr__(self, name: str) -> Any:
        return getattr(_cpp._load()[0], name)

    def last_level_cache(self) -> int:
        return self.size
