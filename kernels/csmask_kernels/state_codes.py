"""AdamW's states in 8 bits, as ``csmask/state_codes.py`` defines them: its formulas and reasons are there.

A program's block is whole blocks of ``STATE_BLOCK`` weights. What is of each weight comes and goes in one dimension.
"""

from __future__ import annotations

import triton
import triton.language as tl

STATE_BLOCK = tl.constexpr(256)
UNITS = tl.constexpr(384.0)
INFINITE = tl.constexpr(0x7F800000)  # from here on, the bits of what is no number
# Added and taken away again, it rounds to the nearest integer, ties to even.
_ROUNDING = tl.constexpr(12582912.0)


@triton.jit
def decode_squares(codes, logits, scales):
    """fp32 ``(BLOCK,)`` from uint8 codes and the fp32 logits that hold their quarters; scales: ``(BLOCK //
    STATE_BLOCK,)``."""
    held = logits.to(tl.int32, bitcast=True) & 3
    return _of_quarters(tl.where(codes > 0, codes.to(tl.int32) * 4 + (held ^ 2) - 2, 0), scales)


@triton.jit
def _of_quarters(quarters, scales):
    bits = tl.where(quarters >= 256, (quarters + 7168) << 17, (quarters + 1600) << 19)
    values = tl.reshape(bits.to(tl.float32, bitcast=True), (scales.shape[0], STATE_BLOCK)) * scales[:, None]
    return tl.where(quarters > 0, tl.reshape(values, quarters.shape), 0.0)


@triton.jit
def encode_squares(squares, offs, step):
    """Of squares ``(BLOCK,)``, 0 where there are none: uint8 codes, what the logits hold of them, the squares as these
    have them; and scales ``(BLOCK // STATE_BLOCK,)``."""
    word = offs.to(tl.uint32) * 0x9E3779B1
    word = (word ^ (word >> 15)) * 0x85EBCA77 + step.to(tl.uint32) * 0x9E3779B9
    shape: tl.constexpr = (squares.shape[0] // STATE_BLOCK, STATE_BLOCK)
    dither = tl.reshape((word >> 16).to(tl.int32), shape)
    bits = tl.reshape(squares, shape).to(tl.int32, bitcast=True)
    is_finite = (bits >= 0) & (bits < INFINITE)
    exponents = (tl.max(tl.where(is_finite, bits, 0), axis=1) + ((1 << 19) - 1)) >> 23
    exponents = tl.minimum(tl.maximum(exponents, 28), 254)
    exponent = exponents[:, None]
    fine = ((bits + (dither << 1)) >> 17) - 64 * exponent + 960
    coarse = tl.maximum(((bits + (dither << 3)) >> 19) - 16 * exponent + 432, 2)
    quarters = tl.where(bits == 0, 0, tl.where(bits >= ((exponent - 11) << 23), fine, coarse))
    quarters = tl.reshape(tl.where(is_finite, tl.minimum(quarters, 1021), 1021), squares.shape)
    scales = (exponents << 23).to(tl.float32, bitcast=True)
    return ((quarters + 2) >> 2).to(tl.uint8), quarters & 3, _of_quarters(quarters, scales), scales


@triton.jit
def decode_averages(codes, logits, squares, unit):
    """fp32 ``(BLOCK,)`` from int8 codes, logits and the decoded squares; unit: ``average_unit`` of the step before."""
    held = (logits.to(tl.int32, bitcast=True) >> 2) & 3
    quarters = codes.to(tl.int32) * 4 + (held ^ 2) - 2
    return quarters.to(tl.float32) * (unit / UNITS) * tl.sqrt(squares)


@triton.jit
def encode_averages(averages, squares, unit):
    """int8 codes, what the logits hold of them, and what rounding took from the averages; squares: as their codes and
    logits have them."""
    roots = tl.sqrt(squares)
    quarters = tl.where(roots > 0.0, averages * ((UNITS / unit) / roots), 0.0)
    quarters = tl.where(quarters == quarters, quarters, 0.0)  # NaN
    quarters = (tl.minimum(tl.maximum(quarters, -510.0), 509.0) + _ROUNDING) - _ROUNDING
    words = quarters.to(tl.int32)
    return ((words + 2) >> 2).to(tl.int8), (words & 3) << 2, averages - quarters * (unit / UNITS) * roots


@triton.jit
def put_quarters(logits, held):
    """fp32 logits that hold the last bits of the codes' quarters; 0 and what is not finite stays as it is."""
    bits = (logits.to(tl.int32, bitcast=True) & ~15) | held
    has_some = (logits != 0.0) & (tl.abs(logits) < float("inf"))
    return tl.where(has_some, bits.to(tl.float32, bitcast=True), logits)
