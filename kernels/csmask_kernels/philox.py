"""``philox_``: random words, uniform or normal values by (seed, stream, purpose, element), as ``csmask.philox`` draws.

Bit for bit: everything is integer arithmetic but the last steps, an exact conversion and products by fp32 constants
that are rounded one after the other. There is no sum for the compiler to fuse a product into, and without fast-math,
which Triton does not use, it may not merge two products (compiled for sm_90 and gfx942 with Triton 3.9: two per value).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import ElementwiseConfig, Launch, Target, check_supported, get_config, run, target_of

# Eight values for each thread of AMD's wider waves: 16 bytes of a half type.
DEFAULT_CONFIG = ElementwiseConfig(block=2048, num_warps=4)

_WORD = 1 << 32
_BYTES_MEAN = tl.constexpr(16 * 255 // 2)
_BYTES_INVERSE_STD = tl.constexpr((16 * (256**2 - 1) / 12) ** -0.5)
# Every second byte of a word: two sums of bytes that cannot run into each other.
_EVERY_SECOND_BYTE = tl.constexpr(0x00FF00FF)


@triton.jit
def philox_block(index, seed_lo, seed_hi, stream, purpose):
    """The four uint32 words of Philox4x32-10 block ``index`` (int64, any shape); the rest are scalars of 32 bits."""
    c0, c1 = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    c2 = tl.full(index.shape, 0, tl.uint32) + tl.cast(stream, tl.uint32)
    c3 = tl.full(index.shape, 0, tl.uint32) + tl.cast(purpose, tl.uint32)
    return tl.philox_impl(c0, c1, c2, c3, tl.cast(seed_lo, tl.uint32), tl.cast(seed_hi, tl.uint32))


@triton.jit
def philox_words(index, seed_lo, seed_hi, stream, purpose):
    """The words of consecutive blocks one after the other: four uint32 for each entry of the 1-d ``index``."""
    w0, w1, w2, w3 = philox_block(index, seed_lo, seed_hi, stream, purpose)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def uniform_of(words):
    """Uniform fp32 on (-1, 1) from uint32: odd multiples of 2**-24, all exact."""
    return (2 * (words >> 8).to(tl.int32) + (1 - (1 << 24))).to(tl.float32) * (1.0 / (1 << 24))


@triton.jit
def normal_of(w0, w1, w2, w3):
    """Normal fp32 from a block's words: the standardised sum of its 16 bytes."""
    pairs = (w0 & _EVERY_SECOND_BYTE) + ((w0 >> 8) & _EVERY_SECOND_BYTE)
    pairs += (w1 & _EVERY_SECOND_BYTE) + ((w1 >> 8) & _EVERY_SECOND_BYTE)
    pairs += (w2 & _EVERY_SECOND_BYTE) + ((w2 >> 8) & _EVERY_SECOND_BYTE)
    pairs += (w3 & _EVERY_SECOND_BYTE) + ((w3 >> 8) & _EVERY_SECOND_BYTE)
    total = ((pairs & 0xFFFF) + (pairs >> 16)).to(tl.int32)
    return (total - _BYTES_MEAN).to(tl.float32) * _BYTES_INVERSE_STD


# A new seed compiles nothing anew. Not "stream": a launch takes that name for itself.
@triton.jit(do_not_specialize=["seed_lo", "seed_hi", "draw_stream", "purpose"])
def _philox_kernel(
    out_ptr, seed_lo, seed_hi, draw_stream, purpose, scale, count, KIND: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Program ``pid`` draws elements ``pid * BLOCK`` and on; writes each once, reads nothing.

    A block of Philox gives four words or uniform values, or one normal value.
    """
    pid = tl.program_id(0).to(tl.int64)
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    if KIND == "normal":
        w0, w1, w2, w3 = philox_block(offs, seed_lo, seed_hi, draw_stream, purpose)
        values = normal_of(w0, w1, w2, w3) * scale
    else:
        index = pid * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        values = philox_words(index, seed_lo, seed_hi, draw_stream, purpose)
        if KIND == "uniform":
            values = uniform_of(values) * scale
    tl.store(out_ptr + offs, values.to(out_ptr.dtype.element_ty), mask=offs < count)


def _signed(word: int) -> int:
    """The int32 of the same bits, so that every word is an argument of one type."""
    return word - _WORD if word >= _WORD // 2 else word


def plan(
    out: Tensor,
    kind: str,
    seed_lo: int,
    seed_hi: int,
    stream: int,
    purpose: int,
    scale: float,
    target: Target,
    config: ElementwiseConfig | None = None,
) -> Launch:
    """The launch that fills ``out``, contiguous."""
    config = config or get_config("philox", target, out.numel(), DEFAULT_CONFIG)
    arguments = {
        "out_ptr": out, "seed_lo": _signed(seed_lo), "seed_hi": _signed(seed_hi),
        "draw_stream": _signed(stream), "purpose": _signed(purpose), "scale": scale, "count": out.numel(),
    }  # fmt: skip
    constants = {"KIND": kind, "BLOCK": config.block}
    return Launch(_philox_kernel, (triton.cdiv(out.numel(), config.block),), arguments, constants, config.num_warps)


def philox_(
    out: Tensor,
    kind: str,
    seed_lo: int,
    seed_hi: int,
    stream: int,
    purpose: int,
    scale: float,
    config: ElementwiseConfig | None = None,
) -> None:
    """Fill ``out`` with what ``csmask.philox`` draws.

    Args:
        out: contiguous; int64 for words, a float dtype otherwise.
        kind: ``"words"``, ``"uniform"`` on (-1, 1) or ``"normal"``.
        seed_lo, seed_hi: the halves of the seed, in [0, 2**32).
        stream, purpose: in [0, 2**32).
        scale: factor on uniform and normal values, rounded to fp32 as they are.
    """
    if kind != "words":
        check_supported(out=out)
    run(out.device, plan(out, kind, seed_lo, seed_hi, stream, purpose, scale, target_of(out), config))
