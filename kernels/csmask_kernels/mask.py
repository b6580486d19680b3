"""The mask itself, as device functions that every kernel shares. Arithmetic is fp32; ``T`` multiplies the logits."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import current_target

# |T * S| under which a soft mask still counts as undecided; ``csmask.reference`` has the same number.
UNDECIDED_BOUND = tl.constexpr(4.0)


@triton.constexpr_function
def _has_short_forms():
    """Whether this is compiled for sm_90, where they were measured; on sm_100, Triton 3.6 spills with them."""
    target = None if triton.knobs.runtime.interpret else current_target()
    return target is not None and (target.backend, target.arch) == ("cuda", 90)


@triton.jit
def exp_of_negative(x):
    """``exp(x)`` for ``x <= 0``, fp32. On sm_90 in two instructions, not six: what is subnormal is 0."""
    if _has_short_forms():
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        power = tl.exp(x)
    return power


@triton.jit
def reciprocal(x):
    """``1 / x`` to the last bit or one beside it, fp32; on sm_90 one instruction: what is subnormal is 0."""
    if _has_short_forms():
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        inverse = 1.0 / x
    return inverse


@triton.jit
def load_temperature(t_ptr):
    """``T`` as an fp32 scalar. It comes as a 0-d tensor of any float dtype, so that annealing compiles nothing anew."""
    return tl.load(t_ptr).to(tl.float32)


@triton.jit
def soft_mask(logits, temperature):
    """``sigmoid(T * S)`` in fp32, from ``e = exp(-|T * S|)``, which cannot overflow; NaN stays NaN."""
    z = logits.to(tl.float32) * temperature
    e = exp_of_negative(-tl.abs(z))
    kept = reciprocal(1.0 + e)
    return tl.where(z >= 0, kept, e * kept)


@triton.jit
def soft_mask_derivative(logits, temperature):
    """``dm/dS = T * e / (1 + e)**2`` in fp32 with ``e = exp(-|T * S|)``; ``m * (1 - m)`` is 0 from ``T * S = 17``."""
    e = exp_of_negative(-tl.abs(logits.to(tl.float32) * temperature))
    kept = reciprocal(1.0 + e)
    return temperature * e * kept * kept


@triton.jit
def mask_value(logits, temperature, scale, HARD: tl.constexpr, SCALED: tl.constexpr):
    """The mask in fp32: soft, or 1 where ``S > 0`` (0 and NaN are pruned); times ``scale`` where SCALED."""
    if HARD:
        mask = tl.where(logits > 0, 1.0, 0.0)
    else:
        mask = soft_mask(logits, temperature)
    if SCALED:
        mask = mask * scale
    return mask


@triton.jit
def apply_mask(weight, mask, HARD: tl.constexpr, SCALED: tl.constexpr = True):
    """``W * m`` in fp32. A hard mask selects, so that a pruned weight is +0 even where it is inf or NaN; one that is
    not SCALED leaves the weight in its dtype.
    """
    if HARD and not SCALED:
        masked = tl.where(mask == 0.0, 0.0, weight).to(weight.dtype)
    elif HARD:
        # A mask that is 0 prunes; any other is the scale.
        masked = tl.where(mask == 0.0, 0.0, weight.to(tl.float32) * mask)
    else:
        masked = weight.to(tl.float32) * mask
    return masked
