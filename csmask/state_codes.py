"""AdamW's states in 8 bits, as ``MaskAdamW(state_bits=8)`` keeps them: two codes per weight, one scale per 256 weights.

A code's steps are parted in four. The last four bits of a logit say which quarter of them is meant: bits 0 and 1 for
``exp_avg_sq``, 2 and 3 for ``exp_avg``, as two's complement, -2 to 1 quarters to be added to the code. The logit keeps
20 bits of its 24, and its sign; it has no quarters where it is 0 or not finite. Whoever changes logits between two
steps changes quarters, too, and with them the states by less than a code's step; where that is done in every step,
``exp_avg_sq`` stands still.

``exp_avg_sq`` has a small floating-point number ``c > 0`` times the block's scale, 0 where its code is 0:

    c >= 64    (1 + c % 16 / 16) * 2**(c // 16 - 15)    12 octaves in quarters of a 16th to a 32nd
    c < 64     (1 + c % 4 / 4) * 2**(c // 4 - 27)       16 octaves in quarters of a 4th to an 8th

Where a gradient stays below a ten-thousandth of the largest in its block, its square has no code so small, and its
logit moves too slowly.

A scale is a power of two: what has not changed keeps its value, whatever its neighbours do. A step changes
``exp_avg_sq`` by a thousandth, so rounded to the nearest it would stand still. It is rounded up where the share of the
way to the upper neighbour exceeds a number that fills [0, 1) evenly from step to step, the golden ratio's multiples
from a hash of the weight on: errors of successive steps cancel, where those of random numbers would add up. What is not
0 never becomes 0, since the step divides by it.

``exp_avg`` is kept as what the step makes of it, ``exp_avg / (1 - beta1**t) / sqrt(exp_avg_sq / (1 - beta2**t))`` with
the coded ``exp_avg_sq``, in quarters of a 96th, within +-127 of these; it is about 1 where all gradients are alike.
What rounding takes from it goes to the logits at once: the step adds

    (exp_avg - coded exp_avg) * beta1 / (1 - beta1) / (1 - beta1**t * beta1 / (1 + beta1))

to ``exp_avg / (1 - beta1**t)``: what it would have moved them by in the steps to come, the geometric series of
``beta1`` with its bias corrections to second order.

The kernels of ``mask_step`` have the same formulas.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
UNITS = 384.0  # quarters of codes of exp_avg between 0 and 1
QUARTERS = 15  # the bits of a logit that hold some
_INFINITE = (
    0x7F800000  # from here on, the bits of what is no number; its code is the largest, its scale its neighbours'
)
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def blocks_of(numel: int) -> int:
    """How many scales a state of so many weights has."""
    return (numel + BLOCK - 1) // BLOCK


def zeros(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of both states and the scales before the first step of these logits."""
    first, second = (
        torch.zeros_like(like, dtype=dtype, memory_format=torch.preserve_format) for dtype in (torch.int8, torch.uint8)
    )
    return first, second, torch.zeros(blocks_of(like.numel()), device=like.device)


def _one_minus_power(beta: float, step: Tensor) -> Tensor:
    exact = step if step.device.type == "mps" else step.double()
    return -torch.expm1(exact * (math.log(beta) if beta > 0 else -math.inf))


def average_unit(betas: tuple[float, float], step: Tensor) -> Tensor:
    """What ``exp_avg`` is, over the root of ``exp_avg_sq``, where all gradients were alike; 0 before the first."""
    unit = _one_minus_power(betas[0], step) / _one_minus_power(betas[1], step).sqrt()
    return torch.where(step > 0, unit, 0.0).float()


def residue_factor(beta1: float, step: Tensor) -> Tensor:
    """What of the first state's residue the logits take at once, over the step that they make of that state."""
    one_minus_power = _one_minus_power(beta1, step)
    return (beta1 / (1 - beta1) / (1 - (1 - one_minus_power) * beta1 / (1 + beta1)) * one_minus_power).float()


def _in_memory_order(tensor: Tensor) -> Tensor:
    """All entries of a tensor without gaps, as a view of one dimension in the order in which they lie."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _like(flat: Tensor, layout: Tensor) -> Tensor:
    """The tensor of that layout whose entries lie in this order."""
    out = torch.empty_like(layout, dtype=flat.dtype)
    _in_memory_order(out).copy_(flat)
    return out


def _per_weight(scales: Tensor, numel: int) -> Tensor:
    return scales.repeat_interleave(BLOCK)[:numel]


def _bits(values: Tensor) -> Tensor:
    return values.view(torch.int32).to(torch.int64)


def _float(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def _dither(numel: int, step: Tensor, device: torch.device) -> Tensor:
    """A number in ``[0, 2**16)`` for each weight: ``hash + step * golden ratio``."""
    word = torch.arange(numel, device=device) * 0x9E3779B1 & 0xFFFFFFFF
    word = (word ^ word >> 15) * 0x85EBCA77 + step.to(torch.int64) * 0x9E3779B9
    return (word & 0xFFFFFFFF) >> 16


def _words(logits: Tensor) -> Tensor:
    return logits.view(_INTEGERS[logits.dtype.itemsize])


def _code(quarters: Tensor) -> Tensor:
    return quarters + 2 >> 2


def _quarters(codes: Tensor, held: Tensor) -> Tensor:
    """Of codes and the last two bits of their quarters, which logits hold."""
    return 4 * codes.to(torch.int64) + (held & 3 ^ 2) - 2


def put_quarters(logits: Tensor, quarters: Tensor) -> None:
    """Write what ``encode`` leaves for the logits into their last bits, but of those that are 0 or not finite."""
    words = _words(logits)
    words.copy_(torch.where((logits != 0) & logits.isfinite(), words & ~QUARTERS | quarters, words))


def _encode_squares(squares: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Quarters of codes, int64 of the squares' size, and scales; squares: fp32, one dimension."""
    blocks = torch.zeros(blocks_of(squares.numel()) * BLOCK, device=squares.device)
    blocks[: squares.numel()] = squares
    largest = _bits(blocks).view(-1, BLOCK)
    largest = torch.where((largest >= 0) & (largest < _INFINITE), largest, 0)
    # Rounded up to a code, the largest stays below twice the scale.
    exponents = (largest.amax(1) if largest.numel() else largest.sum(1)) + (1 << 19) - 1 >> 23
    exponents = exponents.clamp(28, 254)
    exponent = _per_weight(exponents, squares.numel())
    bits, dither = _bits(squares), _dither(squares.numel(), step, squares.device)
    fine = (bits + (dither << 1) >> 17) - 64 * exponent + 960
    coarse = ((bits + (dither << 3) >> 19) - 16 * exponent + 432).clamp(min=2)
    quarters = torch.where(bits >= exponent - 11 << 23, fine, coarse) * (bits != 0)
    is_finite = (bits >= 0) & (bits < _INFINITE)
    return torch.where(is_finite, quarters, 1021).clamp(max=1021), _float(exponents << 23)


def _decode_squares(quarters: Tensor, scales: Tensor) -> Tensor:
    values = _float(torch.where(quarters >= 256, quarters + 7168 << 17, quarters + 1600 << 19))
    return torch.where(quarters > 0, values * _per_weight(scales, quarters.numel()), 0.0)


def _decode_averages(quarters: Tensor, squares: Tensor, unit: Tensor) -> Tensor:
    return quarters * (unit / UNITS) * squares.sqrt()


class Encoded(NamedTuple):
    """What ``encode`` makes of two states; all but the scales of their shape and layout."""

    exp_avg: Tensor  # int8
    exp_avg_sq: Tensor  # uint8
    scales: Tensor  # fp32 (blocks,)
    quarters: Tensor  # int64, what put_quarters takes
    residue: Tensor  # fp32, what rounding took from exp_avg

    @property
    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is kept beside the logits."""
        return self.exp_avg, self.exp_avg_sq, self.scales


def encode(exp_avg: Tensor, exp_avg_sq: Tensor, unit: Tensor, step: Tensor) -> Encoded:
    """Code both states, of one shape and layout without gaps, which the codes have, too; computed with in fp32.

    Args:
        unit: ``average_unit`` of the step that made them.
        step: its number, which decides how they are rounded.
    """
    average = _in_memory_order(exp_avg).float()
    second, scales = _encode_squares(_in_memory_order(exp_avg_sq).float(), step)
    squares = _decode_squares(second, scales)
    roots = squares.sqrt()
    inverse = torch.where(roots > 0, (UNITS / unit) / roots, 0.0)
    first = (average * inverse).round().nan_to_num(0.0).clamp(-510, 509).long()
    residue = average - _decode_averages(first, squares, unit)
    held = (first & 3) << 2 | second & 3
    codes = _like(_code(first).to(torch.int8), exp_avg), _like(_code(second).to(torch.uint8), exp_avg_sq)
    return Encoded(*codes, scales, _like(held, exp_avg), _like(residue, exp_avg))


def decode(
    exp_avg_codes: Tensor, exp_avg_sq_codes: Tensor, scales: Tensor, logits: Tensor, unit: Tensor
) -> tuple[Tensor, Tensor]:
    """Both states in fp32, laid out as their codes are; logits: those of the step that made them."""
    held = _in_memory_order(torch.empty_like(exp_avg_codes, dtype=torch.int64).copy_(_words(logits) & QUARTERS))
    codes = _in_memory_order(exp_avg_sq_codes)
    squares = _decode_squares(torch.where(codes > 0, _quarters(codes, held), 0), scales)
    averages = _decode_averages(_quarters(_in_memory_order(exp_avg_codes), held >> 2), squares, unit)
    return _like(averages, exp_avg_codes), _like(squares, exp_avg_sq_codes)


def change_unit(exp_avg_codes: Tensor, logits: Tensor, before: Tensor, after: Tensor) -> None:
    """Write the averages' codes, and what the logits hold of them, in another unit: ``average_unit`` of other betas.

    Units of 0 leave them.
    """
    ratio = torch.where(after > 0, before / after, 1.0).to(exp_avg_codes.device)
    held = _words(logits) & QUARTERS
    quarters = (_quarters(exp_avg_codes, held >> 2) * ratio).round().clamp(-510, 509).long()
    exp_avg_codes.copy_(_code(quarters))
    put_quarters(logits, (quarters & 3) << 2 | held & 3)
