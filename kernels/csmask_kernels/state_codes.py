"""AdamW's states in 8 bits, as ``csmask/state_codes.py`` defines them: its formulas and reasons are there.

A program's block is whole blocks of ``STATE_BLOCK`` weights. What is of each weight comes and goes in one dimension.
"""

from __future__ import annotations

import triton
import triton.language as tl

STATE_BLOCK = tl.constexpr(256)
UNITS = tl.constexpr(96.0)
INFINITE = tl.constexpr(0x7F800000)  # from here on, the bits of what is no number
# Added and taken away again, it rounds to the nearest integer, ties to even.
_ROUNDING = tl.constexpr(12582912.0)


@triton.jit
def decode_squares(codes, scales):
    """fp32 from uint8 codes ``(BLOCK,)``; scales: ``(BLOCK // STATE_BLOCK,)``."""
    words = tl.reshape(codes, (scales.shape[0], STATE_BLOCK)).to(tl.int32)
    bits = tl.where(words >= 64, (words + 1792) << 19, (words + 400) << 21)
    values = tl.where(words > 0, bits.to(tl.float32, bitcast=True) * scales[:, None], 0.0)
    return tl.reshape(values, codes.shape)


@triton.jit
def encode_squares(squares, offs, step):
    """uint8 codes ``(BLOCK,)`` of squares, 0 where there are none, and scales ``(BLOCK // STATE_BLOCK,)``."""
    word = offs.to(tl.uint32) * 0x9E3779B1
    word = (word ^ (word >> 15)) * 0x85EBCA77 + step.to(tl.uint32) * 0x9E3779B9
    shape: tl.constexpr = (squares.shape[0] // STATE_BLOCK, STATE_BLOCK)
    dither = tl.reshape((word >> 16).to(tl.int32), shape)
    bits = tl.reshape(squares, shape).to(tl.int32, bitcast=True)
    is_finite = (bits >= 0) & (bits < INFINITE)
    exponents = (tl.max(tl.where(is_finite, bits, 0), axis=1) + ((1 << 19) - 1)) >> 23
    exponents = tl.minimum(tl.maximum(exponents, 28), 254)
    exponent = exponents[:, None]
    fine = ((bits + (dither << 3)) >> 19) - 16 * exponent + 240
    coarse = tl.maximum(((bits + (dither << 5)) >> 21) - 4 * exponent + 108, 1)
    codes = tl.where(bits == 0, 0, tl.where(bits >= ((exponent - 11) << 23), fine, coarse))
    codes = tl.where(is_finite, tl.minimum(codes, 255), 255)
    return tl.reshape(codes.to(tl.uint8), squares.shape), (exponents << 23).to(tl.float32, bitcast=True)


@triton.jit
def decode_averages(codes, squares, unit):
    """fp32 from int8 codes ``(BLOCK,)`` and the decoded squares; unit: ``average_unit`` of the step that made them."""
    return codes.to(tl.float32) * (unit / UNITS) * tl.sqrt(squares)


@triton.jit
def encode_averages(averages, squares, unit):
    """int8 codes ``(BLOCK,)`` and what rounding took from the averages; squares: as their codes have them."""
    roots = tl.sqrt(squares)
    codes = tl.where(roots > 0.0, averages * ((UNITS / unit) / roots), 0.0)
    codes = tl.where(codes == codes, codes, 0.0)  # NaN
    codes = (tl.minimum(tl.maximum(codes, -127.0), 127.0) + _ROUNDING) - _ROUNDING
    return codes.to(tl.int8), averages - codes * (unit / UNITS) * roots
