"""``mask_step``: an optimizer's step on the mask logits of many layers at once, from the gradients of their masked
weights to their next masked weights.

    dS = (grad + (dWm * W + dl0) * scale * T * m * (1 - m)) * factor
    S, states = update(S, states, dS);  Wm = round(W * scale * sigmoid(T * S));  l0 = sum of that mask

Layers differ in size and in where they lie, so a launch reads a table: one row for each layer with its addresses, its
size and the first of its programs. A program looks its layer up once, and then walks a few pieces of it. Numbers that
change from step to step (temperature, learning rate, step, factor) are read from the device: a step waits for nothing,
and a CUDA graph can hold it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, StepConfig, Target, run, target_of
from .mask import UNDECIDED_BOUND, load_temperature, reciprocal, soft_mask, soft_mask_derivative
from .mask_step_table import Group, plan_groups
from .state_codes import STATE_BLOCK, decode_averages, decode_squares, encode_averages, encode_squares, put_quarters

Tensors = Sequence[Tensor]
Optionals = Sequence[Tensor | None]
REDUCE_BLOCK = 1024

# Columns of ``mask_step_table.COLUMNS``.
START, SIZE, INDEX, SCALE, TEMPERATURE, DL0, STEP = (tl.constexpr(i) for i in range(7))
LOGITS, WEIGHT, DMASKED_WEIGHT, GRAD, MASKED_WEIGHT, FIRST, SECOND, SCALES = (tl.constexpr(i) for i in range(7, 15))


@triton.jit
def _address(table_ptr, row, COLUMN: tl.constexpr, ROWS: tl.constexpr, TYPE: tl.constexpr):
    """A pointer out of the table."""
    return tl.load(table_ptr + COLUMN * ROWS + row).to(tl.pointer_type(TYPE))


@triton.jit
def _place(table_ptr, ROWS: tl.constexpr, ALIGNED: tl.constexpr, ENTRIES: tl.constexpr):
    """This program's row of the table, its first entry of that layer, and how many the layer has.

    Without programs a layer begins where the next one does: of rows that begin alike, the last is meant.
    """
    pid = tl.program_id(0).to(tl.int64)
    starts = tl.load(table_ptr + tl.arange(0, ROWS))
    row = tl.sum((starts <= pid).to(tl.int32)) - 1
    size = tl.load(table_ptr + SIZE * ROWS + row)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    return row, (pid - tl.load(table_ptr + row)) * ENTRIES, size


@triton.jit
def _pointers(address, offs, ALIGNED: tl.constexpr):
    pointers = address + offs
    if ALIGNED:  # said of the sum: Triton 3.6 forgets what is said of the address
        pointers = tl.multiple_of(pointers, 16)
    return pointers


@triton.jit
def _read(address, offs, inside, ALIGNED: tl.constexpr):
    return tl.load(_pointers(address, offs, ALIGNED), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _write(address, offs, inside, values, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    tl.store(_pointers(address, offs, ALIGNED), values.to(TYPE), mask=inside)


@triton.jit
def _optional_address(table_ptr, row, COLUMN: tl.constexpr, ROWS: tl.constexpr, TYPE: tl.constexpr):
    """A pointer out of the table; 0, which is not read, where there is no type."""
    address = 0
    if TYPE is not None:
        address = _address(table_ptr, row, COLUMN, ROWS, TYPE)
    return address


@triton.jit
def _mask_of(
    table_ptr, row, ROWS: tl.constexpr, S_TYPE: tl.constexpr, W_TYPE: tl.constexpr, DWM_TYPE: tl.constexpr,
    HAS_GRAD: tl.constexpr, HAS_DL0: tl.constexpr,
):  # fmt: skip
    """What the gradient is made of: addresses of the logits, weight, ``dWm`` and ``grad``; ``dl0``, ``T``, the scale.

    Read once for all pieces of a program.
    """
    logits = _address(table_ptr, row, LOGITS, ROWS, S_TYPE)
    weight = _optional_address(table_ptr, row, WEIGHT, ROWS, W_TYPE)
    dwm = _optional_address(table_ptr, row, DMASKED_WEIGHT, ROWS, DWM_TYPE)
    grad = _address(table_ptr, row, GRAD, ROWS, S_TYPE)
    dl0 = 0.0
    if HAS_DL0:
        dl0 = tl.load(_address(table_ptr, row, DL0, ROWS, tl.float32))
    temperature = load_temperature(_address(table_ptr, row, TEMPERATURE, ROWS, tl.float32))
    scale = tl.load(table_ptr + SCALE * ROWS + row).to(tl.int32).to(tl.float32, bitcast=True)
    return logits, weight, dwm, grad, dl0, temperature, scale


@triton.jit
def _gradient(
    dwm_address, grad_address, dl0, offs, inside, s, w, temperature, scale, ALIGNED: tl.constexpr,
    DWM_TYPE: tl.constexpr, HAS_GRAD: tl.constexpr, HAS_DL0: tl.constexpr,
):  # fmt: skip
    """``grad + (dWm * W + dl0) * scale * T * m * (1 - m)``; what is None is 0. Without ``dWm``, ``w`` is not read."""
    dmask = tl.zeros_like(s)
    if DWM_TYPE is not None:
        dmask = _read(dwm_address, offs, inside, ALIGNED) * w
    if HAS_DL0:
        dmask += dl0
    if DWM_TYPE is not None or HAS_DL0:
        dmask = dmask * soft_mask_derivative(s, temperature) * scale
    if HAS_GRAD:
        dmask += _read(grad_address, offs, inside, ALIGNED)
    return dmask


@triton.jit
def _finish(
    logits_address, masked_address, offs, inside, s, w, temperature, scale, l0, counts, ALIGNED: tl.constexpr,
    S_TYPE: tl.constexpr, WM_TYPE: tl.constexpr,
):  # fmt: skip
    """Write the new logits and their masked weight, and add to the sums: l0, and kept + 2**16 undecided."""
    _write(logits_address, offs, inside, s, S_TYPE, ALIGNED)
    s = s.to(S_TYPE).to(tl.float32)  # as the next one to read them will see them
    mask = soft_mask(s, temperature) * scale
    _write(masked_address, offs, inside, w * mask, WM_TYPE, ALIGNED)
    undecided = tl.abs(s * temperature) < UNDECIDED_BOUND
    l0 += tl.where(inside, mask, 0.0)
    counts += tl.where(inside, (s > 0).to(tl.int32) + undecided.to(tl.int32) * 65536, 0)
    return l0, counts


@triton.jit
def _store_sums(l0_ptr, kept_ptr, undecided_ptr, l0, counts):
    """This program's sums, to its slots of the partials."""
    pid, counted = tl.program_id(0), tl.sum(counts)
    tl.store(l0_ptr + pid, tl.sum(l0))
    tl.store(kept_ptr + pid, counted & 65535)
    tl.store(undecided_ptr + pid, counted >> 16)


@triton.jit
def _number(pointer, number):
    """What lies on the device where there is a pointer; else the number."""
    if pointer is not None:
        number = tl.load(pointer).to(tl.float32)
    return number


@triton.jit
def _quotient(a, b):
    """``a / b``, nearly as if rounded once: one step of Newton's behind the approximate one."""
    q = a / b
    return tl.fma(tl.fma(-q, b, a), 1.0 / b, q)


@triton.jit
def _root(x):
    """The root of ``x``, nearly as if rounded once."""
    root = tl.sqrt(x)
    return tl.fma(tl.fma(-root, root, x), 0.5 / root, root)


@triton.jit
def _one_minus_power(log_beta, step):
    """``1 - beta**step`` to full relative precision: by its series where the power is near 1."""
    x = log_beta * step
    series = 1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * (1.0 + x / 6 * (1.0 + x / 7)))))
    return tl.where(x > -0.3, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _average_unit(log_beta1, log_beta2, step):
    """What an average is, over the root of that of squares, where all gradients are alike; 0 before the first step."""
    t = tl.maximum(step, 1.0)
    unit = _quotient(_one_minus_power(log_beta1, t), _root(_one_minus_power(log_beta2, t)))
    return tl.where(step > 0.0, unit, 0.0)


@triton.jit
def _residue_factor(log_beta1, taken1, step):
    """What an average takes of the rounding of its code, for the logits to move by what the code will not move them."""
    one_minus_power, beta1 = _one_minus_power(log_beta1, step), 1.0 - taken1
    return beta1 / taken1 / (1.0 - (1.0 - one_minus_power) * beta1 / (1.0 + beta1)) * one_minus_power


@triton.jit
def _scale_pointers(scales, begin, size, BLOCK: tl.constexpr):
    """To the scales of a piece's codes, and which of them are there."""
    index = begin // STATE_BLOCK + tl.arange(0, BLOCK // STATE_BLOCK)
    return scales + index, index < tl.cdiv(size, STATE_BLOCK)


@triton.jit
def _read_codes(
    firsts, seconds, scales, begin, size, offs, inside, s, unit, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    pointers, there = _scale_pointers(scales, begin, size, BLOCK)
    codes = tl.load(_pointers(seconds, offs, ALIGNED), mask=inside, other=0)
    second = decode_squares(codes, s, tl.load(pointers, mask=there, other=0.0))
    codes = tl.load(_pointers(firsts, offs, ALIGNED), mask=inside, other=0)
    return decode_averages(codes, s, second, unit), second


@triton.jit
def _write_codes(
    firsts, seconds, scales, begin, size, offs, inside, first, second, unit, step, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Returns what rounding took from the first state, and what the logits are to hold."""
    pointers, there = _scale_pointers(scales, begin, size, BLOCK)
    codes, held, coded, new_scales = encode_squares(tl.where(inside, second, 0.0), offs, step)
    _write(seconds, offs, inside, codes, tl.uint8, ALIGNED)
    tl.store(pointers, new_scales, mask=there)
    codes, held_too, residue = encode_averages(first, coded, unit)
    _write(firsts, offs, inside, codes, tl.int8, ALIGNED)
    return residue, held | held_too


@triton.jit
def _adamw_kernel(
    table_ptr, factor_ptr, lr_ptr, l0_ptr, kept_ptr, undecided_ptr, factor, lr, sign, taken1, log_beta1, beta2, taken2,
    log_beta2, eps, weight_decay,
    ROWS: tl.constexpr, ALIGNED: tl.constexpr, S_TYPE: tl.constexpr, W_TYPE: tl.constexpr, WM_TYPE: tl.constexpr,
    DWM_TYPE: tl.constexpr, HAS_GRAD: tl.constexpr, HAS_DL0: tl.constexpr, BLOCK: tl.constexpr,
    PIECES: tl.constexpr, STATE_BITS: tl.constexpr,
):  # fmt: skip
    """AdamW with ``taken = 1 - beta``; bytes per weight: 24 for the logits and states, 12.03 with states in 8 bits; W,
    dWm and Wm once each."""
    row, begin, size = _place(table_ptr, ROWS, ALIGNED, BLOCK * PIECES)
    logits, weight, dwm, grad, dl0, temperature, scale = _mask_of(
        table_ptr, row, ROWS, S_TYPE, W_TYPE, DWM_TYPE, HAS_GRAD, HAS_DL0
    )
    masked = _address(table_ptr, row, MASKED_WEIGHT, ROWS, WM_TYPE)
    FIRST_TYPE: tl.constexpr = tl.int8 if STATE_BITS == 8 else S_TYPE
    SECOND_TYPE: tl.constexpr = tl.uint8 if STATE_BITS == 8 else S_TYPE
    firsts = _address(table_ptr, row, FIRST, ROWS, FIRST_TYPE)
    seconds = _address(table_ptr, row, SECOND, ROWS, SECOND_TYPE)
    rate, factor = _number(lr_ptr, lr), _number(factor_ptr, factor) * sign
    step = tl.load(_address(table_ptr, row, STEP, ROWS, tl.float32))
    step_size = _quotient(rate, _one_minus_power(log_beta1, step))
    correction = _quotient(1.0, _root(_one_minus_power(log_beta2, step)))

    if STATE_BITS == 8:
        scales = _address(table_ptr, row, SCALES, ROWS, tl.float32)
        unit_before = _average_unit(log_beta1, log_beta2, step - 1.0)
        unit = _average_unit(log_beta1, log_beta2, step)
        residue_factor = _residue_factor(log_beta1, taken1, step)

    l0, counts = tl.zeros((BLOCK,), dtype=tl.float32), tl.zeros((BLOCK,), dtype=tl.int32)
    for _ in range(PIECES):
        offs = begin + tl.arange(0, BLOCK)
        inside = offs < size
        s, w = _read(logits, offs, inside, ALIGNED), _read(weight, offs, inside, ALIGNED)
        if STATE_BITS == 8:
            first, second = _read_codes(
                firsts, seconds, scales, begin, size, offs, inside, s, unit_before, ALIGNED, BLOCK
            )  # fmt: skip
        else:
            first, second = _read(firsts, offs, inside, ALIGNED), _read(seconds, offs, inside, ALIGNED)
        g = _gradient(dwm, grad, dl0, offs, inside, s, w, temperature, scale, ALIGNED, DWM_TYPE, HAS_GRAD, HAS_DL0)
        g = g * factor
        first += taken1 * (g - first)
        second = beta2 * second + taken2 * g * g
        if STATE_BITS == 8:
            residue, held = _write_codes(
                firsts, seconds, scales, begin, size, offs, inside, first, second, unit, step, ALIGNED, BLOCK
            )  # fmt: skip
            first += residue_factor * residue
        else:
            _write(firsts, offs, inside, first, S_TYPE, ALIGNED)
            _write(seconds, offs, inside, second, S_TYPE, ALIGNED)
        s = s * (1.0 - rate * weight_decay) - step_size * first * reciprocal(tl.sqrt(second) * correction + eps)
        if STATE_BITS == 8:
            s = put_quarters(s, held)
        l0, counts = _finish(
            logits, masked, offs, inside, s, w, temperature, scale, l0, counts, ALIGNED, S_TYPE, WM_TYPE
        )
        begin += BLOCK
    _store_sums(l0_ptr, kept_ptr, undecided_ptr, l0, counts)


@triton.jit
def _sgd_kernel(
    table_ptr, factor_ptr, lr_ptr, l0_ptr, kept_ptr, undecided_ptr, factor, lr, sign, momentum, taken, weight_decay,
    HAS_MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    ROWS: tl.constexpr, ALIGNED: tl.constexpr, S_TYPE: tl.constexpr, W_TYPE: tl.constexpr, WM_TYPE: tl.constexpr,
    DWM_TYPE: tl.constexpr, HAS_GRAD: tl.constexpr, HAS_DL0: tl.constexpr, BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """SGD with ``taken = 1 - dampening``; bytes per weight: 8 for the logits, 8 for a momentum, W, dWm and Wm once."""
    row, begin, size = _place(table_ptr, ROWS, ALIGNED, BLOCK * PIECES)
    logits, weight, dwm, grad, dl0, temperature, scale = _mask_of(
        table_ptr, row, ROWS, S_TYPE, W_TYPE, DWM_TYPE, HAS_GRAD, HAS_DL0
    )
    masked = _address(table_ptr, row, MASKED_WEIGHT, ROWS, WM_TYPE)
    firsts = _address(table_ptr, row, FIRST, ROWS, S_TYPE)
    rate, factor = _number(lr_ptr, lr), _number(factor_ptr, factor) * sign
    # The first step takes the gradient itself, undampened.
    is_first = False
    if HAS_MOMENTUM:
        is_first = tl.load(_address(table_ptr, row, STEP, ROWS, tl.float32)) <= 1.0

    l0, counts = tl.zeros((BLOCK,), dtype=tl.float32), tl.zeros((BLOCK,), dtype=tl.int32)
    for _ in range(PIECES):
        offs = begin + tl.arange(0, BLOCK)
        inside = offs < size
        s, w = _read(logits, offs, inside, ALIGNED), _read(weight, offs, inside, ALIGNED)
        g = _gradient(dwm, grad, dl0, offs, inside, s, w, temperature, scale, ALIGNED, DWM_TYPE, HAS_GRAD, HAS_DL0)
        g = g * factor + weight_decay * s
        if HAS_MOMENTUM:
            first = _read(firsts, offs, inside, ALIGNED)
            first = tl.where(is_first, g, momentum * first + taken * g)
            _write(firsts, offs, inside, first, S_TYPE, ALIGNED)
            g = g + momentum * first if NESTEROV else first
        s = s - rate * g
        l0, counts = _finish(
            logits, masked, offs, inside, s, w, temperature, scale, l0, counts, ALIGNED, S_TYPE, WM_TYPE
        )
        begin += BLOCK
    _store_sums(l0_ptr, kept_ptr, undecided_ptr, l0, counts)


@triton.jit
def _squares_kernel(
    table_ptr, sum_ptr,
    ROWS: tl.constexpr, ALIGNED: tl.constexpr, S_TYPE: tl.constexpr, W_TYPE: tl.constexpr, WM_TYPE: tl.constexpr,
    DWM_TYPE: tl.constexpr, HAS_GRAD: tl.constexpr, HAS_DL0: tl.constexpr, BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """The sum of this program's squared gradients; reads the logits, W and dWm once each."""
    row, begin, size = _place(table_ptr, ROWS, ALIGNED, BLOCK * PIECES)
    logits, weight, dwm, grad, dl0, temperature, scale = _mask_of(
        table_ptr, row, ROWS, S_TYPE, W_TYPE, DWM_TYPE, HAS_GRAD, HAS_DL0
    )
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(PIECES):
        offs = begin + tl.arange(0, BLOCK)
        inside = offs < size
        s = _read(logits, offs, inside, ALIGNED)
        w = tl.zeros_like(s)
        if DWM_TYPE is not None:
            w = _read(weight, offs, inside, ALIGNED)
        g = _gradient(dwm, grad, dl0, offs, inside, s, w, temperature, scale, ALIGNED, DWM_TYPE, HAS_GRAD, HAS_DL0)
        total += tl.where(inside, g * g, 0.0)
        begin += BLOCK
    tl.store(sum_ptr + tl.program_id(0), tl.sum(total))


@triton.jit
def _reduce_kernel(
    table_ptr, sum_ptr, kept_ptr, undecided_ptr, sums_ptr, counts_ptr,
    NORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each layer adds up what its programs left, in a fixed order; NORM: the root, and no counts."""
    row = tl.program_id(0)
    first, last = tl.load(table_ptr + row), tl.load(table_ptr + row + 1)
    index = tl.load(table_ptr + INDEX * ROWS + row)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    kept = tl.zeros((BLOCK,), dtype=tl.int64)
    undecided = tl.zeros((BLOCK,), dtype=tl.int64)
    for start in range(first, last, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(sum_ptr + offs, mask=offs < last, other=0.0)
        if not NORM:
            kept += tl.load(kept_ptr + offs, mask=offs < last, other=0)
            undecided += tl.load(undecided_ptr + offs, mask=offs < last, other=0)
    found = tl.sum(total)
    if NORM:
        tl.store(sums_ptr + index, tl.sqrt(found))
    else:
        tl.store(sums_ptr + index, found)
        tl.store(counts_ptr + 2 * index, tl.sum(kept))
        tl.store(counts_ptr + 2 * index + 1, tl.sum(undecided))


# Launchers


def _number_or_tensor(value: Tensor | float | None, device: torch.device) -> tuple[Tensor | None, float]:
    """What lies on the device is read there; a number of the host is passed as such."""
    if isinstance(value, Tensor):
        return (value, 1.0) if value.device == device else (None, float(value.item()))
    return None, 1.0 if value is None else float(value)


def plan_step(
    kernel: Any, columns: dict[str, Sequence[Any]], factor: Tensor | None, lr: Tensor | float, maximize: bool,
    settings: dict[str, float], constants: dict[str, Any], target: Target, config: StepConfig | None = None,
) -> tuple[list[Launch], Tensor, Tensor]:  # fmt: skip
    """The launches of a step, and its results: l0 ``(layers,)`` fp32, kept and undecided ``(layers, 2)`` int64."""
    device, count = columns["logits"][0].device, len(columns["logits"])
    l0s = torch.empty(count, dtype=torch.float32, device=device)
    counts = torch.empty((count, 2), dtype=torch.int64, device=device)
    lr_ptr, lr_number = _number_or_tensor(lr, device)
    factor_ptr, factor_number = _number_or_tensor(factor, device)
    shared = {"factor_ptr": factor_ptr, "lr_ptr": lr_ptr, "factor": factor_number, "lr": lr_number,
              "sign": -1.0 if maximize else 1.0, **settings}  # fmt: skip
    launches = []
    for group in plan_groups(columns, target, config):
        l0 = torch.empty(group.programs, dtype=torch.float32, device=device)
        counted = torch.empty((2, group.programs), dtype=torch.int32, device=device)
        partials = {"kept_ptr": counted[0], "undecided_ptr": counted[1]}
        arguments = {"table_ptr": group.table, "l0_ptr": l0, **partials, **shared}
        launches.append(_launch(group, kernel, arguments, constants, True))
        launches.append(_reduce(group, {"sum_ptr": l0, **partials, "sums_ptr": l0s, "counts_ptr": counts}, False))
    return launches, l0s, counts


def _launch(group: Group, kernel: Any, arguments: dict[str, Any], constants: dict[str, Any], writes: bool) -> Launch:
    constants = {**group.constants, **constants}
    behind = tuple(r + w for r, w in zip(group.read, group.written, strict=True)) if writes else group.read
    return Launch(kernel, (group.programs,), arguments, constants, group.config.num_warps, behind=behind)


def _reduce(group: Group, arguments: dict[str, Any], norm: bool) -> Launch:
    constants = {"NORM": norm, "ROWS": group.constants["ROWS"], "BLOCK": REDUCE_BLOCK}
    return Launch(_reduce_kernel, (group.layers,), {"table_ptr": group.table, **arguments}, constants, 4)


def plan_norms(
    columns: dict[str, Sequence[Any]], target: Target, config: StepConfig | None = None
) -> tuple[list[Launch], Tensor]:
    """The launches, and the norms ``(layers,)`` fp32 that they write."""
    device = columns["logits"][0].device
    norms = torch.empty(len(columns["logits"]), dtype=torch.float32, device=device)
    launches = []
    for group in plan_groups(columns, target, config):
        sums = torch.empty(group.programs, dtype=torch.float32, device=device)
        launches.append(_launch(group, _squares_kernel, {"table_ptr": group.table, "sum_ptr": sums}, {}, False))
        arguments = {"sum_ptr": sums, "kept_ptr": None, "undecided_ptr": None, "sums_ptr": norms, "counts_ptr": None}
        launches.append(_reduce(group, arguments, True))
    return launches, norms


def _waiting(
    mask_logits: Tensors, dmasked_weights: Optionals, weights: Tensors, grads: Optionals, temperatures: Tensors,
    dl0s: Optionals, scales: Sequence[float], **more: Sequence[Any],
) -> dict[str, Sequence[Any]]:  # fmt: skip
    return {"logits": mask_logits, "dmasked_weight": dmasked_weights, "weight": weights, "grad": grads,
            "temperature": temperatures, "dl0": dl0s, "scale": scales, **more}  # fmt: skip


def mask_grad_norms(
    mask_logits: Tensors, dmasked_weights: Optionals, weights: Tensors, grads: Optionals, temperatures: Tensors,
    dl0s: Optionals, scales: Sequence[float], config: StepConfig | None = None,
) -> Tensor:  # fmt: skip
    """The norm of each layer's gradient of the logits: ``(layers,)`` fp32."""
    columns = _waiting(mask_logits, dmasked_weights, weights, grads, temperatures, dl0s, scales)
    launches, norms = plan_norms(columns, target_of(mask_logits[0]), config)
    run(norms.device, *launches)
    return norms


def mask_adamw_(
    mask_logits: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, state_scales: Tensors, masked_weights: Tensors,
    dmasked_weights: Optionals,
    weights: Tensors, grads: Optionals, temperatures: Tensors, dl0s: Optionals, scales: Sequence[float],
    steps: Tensors, factor: Tensor | None, lr: Tensor | float, beta1: float, beta2: float, eps: float,
    weight_decay: float, maximize: bool, config: StepConfig | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """An AdamW step (arXiv 1711.05101) of all layers, in place; see ``plan_step`` for the results.

    ``state_scales``: of states in 8 bits; empty for states in the logits' dtype.
    """
    columns = _waiting(mask_logits, dmasked_weights, weights, grads, temperatures, dl0s, scales,
                       masked_weight=masked_weights, first=exp_avgs, second=exp_avg_sqs, step=steps)  # fmt: skip
    if state_scales:
        columns["state_scales"] = state_scales
    settings = {"taken1": 1 - beta1, "log_beta1": _log(beta1), "beta2": beta2, "taken2": 1 - beta2,
                "log_beta2": _log(beta2), "eps": eps, "weight_decay": weight_decay}  # fmt: skip
    constants = {"STATE_BITS": 8 if state_scales else 32}
    target = target_of(mask_logits[0])
    launches, l0s, counts = plan_step(_adamw_kernel, columns, factor, lr, maximize, settings, constants, target, config)
    run(l0s.device, *launches)
    return l0s, counts


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def mask_sgd_(
    mask_logits: Tensors, momentums: Tensors, masked_weights: Tensors, dmasked_weights: Optionals, weights: Tensors,
    grads: Optionals, temperatures: Tensors, dl0s: Optionals, scales: Sequence[float], steps: Tensors,
    factor: Tensor | None, lr: Tensor | float, momentum: float, dampening: float, weight_decay: float, nesterov: bool,
    maximize: bool, config: StepConfig | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """An SGD step of all layers, in place; see ``plan_step`` for the results."""
    columns = _waiting(mask_logits, dmasked_weights, weights, grads, temperatures, dl0s, scales,
                       masked_weight=masked_weights, step=steps)  # fmt: skip
    if momentum:
        columns["first"] = momentums
    settings = {"momentum": momentum, "taken": 1 - dampening, "weight_decay": weight_decay}
    constants = {"HAS_MOMENTUM": bool(momentum), "NESTEROV": nesterov}
    target = target_of(mask_logits[0])
    launches, l0s, counts = plan_step(_sgd_kernel, columns, factor, lr, maximize, settings, constants, target, config)
    run(l0s.device, *launches)
    return l0s, counts
