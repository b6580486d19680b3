"""Launches of every kernel at shapes that stand for its use, planned on the meta device: what is compiled offline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from csmask_kernels import bitmask, logits_grad, masked_linear, masked_linear_config, materialize, philox, scale_neurons
from csmask_kernels.launch import Launch, Target, config_table

Case = tuple[str, Launch]


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor of the meta device."""
    return torch.empty(shape, dtype=dtype, device="meta")


TEMPERATURE = empty(dtype=torch.float32)


def materialize_cases(target: Target) -> Iterator[Case]:
    """Flat and strided; soft, hard and scaled; with and without counts; the sums alone."""
    logits = empty(4096, 4096, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        weight = empty(4096, 4096, dtype=dtype)
        for hard in (False, True):
            name = f"materialize {'hard' if hard else 'soft'} {dtype}"
            yield name, materialize.plan(weight, logits, TEMPERATURE, hard, 1.0, weight, hard, target)[0]
    weight = empty(4096, 4096)
    yield (
        "materialize transposed",
        materialize.plan(weight.t(), logits, TEMPERATURE, False, 1.5, weight.t(), True, target)[0],
    )
    neuron = empty(4096, 1, dtype=torch.float32).expand(4096, 4096)
    yield "materialize neuron", materialize.plan(weight, neuron, TEMPERATURE, False, 1.0, weight, False, target)[0]
    yield "mask_sums", materialize.plan(None, logits, TEMPERATURE, False, 1.0, None, True, target)[0]


def logits_grad_cases(target: Target) -> Iterator[Case]:
    """Written and added; flat, strided, per unit in both orientations."""
    logits, dl0 = empty(4096, 4096, dtype=torch.float32), empty(dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        w = empty(4096, 4096, dtype=dtype)
        for add in (False, True):
            name = f"logits_grad {'add' if add else 'write'} {dtype}"
            yield name, logits_grad.plan(w, w, logits, TEMPERATURE, dl0, 1.0, logits, add, target)
    w = empty(4096, 4096)
    yield (
        "logits_grad transposed",
        logits_grad.plan(w.t(), w.t(), logits, TEMPERATURE, None, 1.5, logits, False, target),
    )
    for shape in ((4096, 1), (1, 4096)):
        unit = empty(*shape, dtype=torch.float32)
        yield f"logits_grad unit {shape}", logits_grad.plan(w, w, unit, TEMPERATURE, dl0, 1.0, unit, False, target)


def scale_neurons_cases(target: Target) -> Iterator[Case]:
    """Units contiguous (a linear layer's output, channels-last), strided (channels-first), and layouts that differ."""
    dl0 = empty(dtype=torch.float32)
    shapes = {"linear": empty(8192, 4096), "odd linear": empty(8192, 769), "images": empty(64, 256, 56, 56)}
    shapes["channels-last"] = shapes["images"].to(memory_format=torch.channels_last)
    zs = {f"{name} {z.dtype}": z for name, z in shapes.items()}
    zs.update({f"linear {dtype}": empty(8192, 4096, dtype=dtype) for dtype in (torch.float16, torch.float32)})
    for name, z in zs.items():
        logits = empty(z.shape[1], dtype=torch.float32)
        for hard in (False, True):
            what = f"{name} {'hard' if hard else 'soft'}"
            bias, scale = (None, 1.0) if hard else (empty(z.shape[1]), 1.5)
            mask = (z, logits, TEMPERATURE, bias, hard, scale, 1)
            yield f"scale_neurons {what}", scale_neurons.plan(*mask, torch.empty_like(z), target)
            arguments = (z, logits, TEMPERATURE, dl0, hard, scale, 1, 9, torch.empty_like(z), logits, target)
            launches = scale_neurons.plan_grad(z, *arguments)
            yield f"scale_neurons_grad {what}", launches[0]
            if len(launches) > 1:
                yield f"scale_neurons_grad {what} dlogits", launches[1]
    z, dout = shapes["channels-last"], shapes["images"]
    arguments = (z, empty(256, dtype=torch.float32), TEMPERATURE, None, False, 1.0, 1, 1, torch.empty_like(z))
    launches = scale_neurons.plan_grad(dout, *arguments, empty(256, dtype=torch.float32), target)
    yield "scale_neurons_grad mixed layouts", launches[0]
    yield "scale_neurons_grad without dl0", launches[1]


def bitmask_cases(target: Target) -> Iterator[Case]:
    """Every op; the masked weight in logical order and strided, scaled, and past 2**31 entries."""
    bits = empty(4096 * 4096 // 32, dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16):
        yield f"pack_mask {dtype}", bitmask.plan_pack(empty(4096, 4096, dtype=dtype), bits, target)
    yield "unpack_mask", bitmask.plan_unpack(bits, empty(4096, 4096, dtype=torch.int8), target)
    yield "popcount", bitmask.plan_popcount(bits, target)[0]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for scale in (1.0, 1.5):
            w = empty(4096, 4096, dtype=dtype)
            yield f"apply_bitmask {dtype} {scale}", bitmask.plan_apply(w, bits, scale, w, target)
    w = empty(4096, 4096).t()
    yield "apply_bitmask transposed", bitmask.plan_apply(w, bits, 1.0, w, target)
    w = empty(512, 512, 3, 3).to(memory_format=torch.channels_last)
    yield "apply_bitmask channels-last", bitmask.plan_apply(w, bits, 1.5, w, target)
    huge = empty(1 << 16, (1 << 16) + 1)
    yield "pack_mask huge", bitmask.plan_pack(huge, bits, target)
    yield "apply_bitmask huge", bitmask.plan_apply(huge, bits, 1.0, huge, target)


def philox_cases(target: Target) -> Iterator[Case]:
    """Every kind and dtype; a count past 2**32 blocks."""
    draw = (2**32 - 1, 2**31, 3, 2)
    yield "philox words", philox.plan(empty(4096, 4096, dtype=torch.int64), "words", *draw, 1.0, target)
    for kind in ("uniform", "normal"):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            yield f"philox {kind} {dtype}", philox.plan(empty(4096, 4096, dtype=dtype), kind, *draw, 0.02, target)
    yield "philox huge", philox.plan(empty(1 << 17, 1 << 18), "uniform", *draw, 0.02, target)


def masked_linear_cases(target: Target) -> Iterator[Case]:
    """Every shipped config for bf16 and fp32, forward and dx; each mask and form with the default config."""
    logits = empty(4096, 4096, dtype=torch.float32)
    for op in ("masked_linear", "masked_linear_dx"):
        for row in config_table(target).get(op, []):
            for dtype in (torch.bfloat16, torch.float32):
                x, weight = empty(row["m"], 4096, dtype=dtype), empty(4096, 4096, dtype=dtype)
                mask, bias = masked_linear.logits_mask(weight, logits, TEMPERATURE, False, 1.0), weight[0]
                if op == "masked_linear_dx":
                    weight, mask, bias = weight.t(), mask.transposed(), None
                config = masked_linear_config.choose_config(op, target, x, weight, mask)
                launches, _ = masked_linear.plan(x, weight, mask, bias, x, bias is not None, target, config)
                yield f"{op} m={row['m']} {dtype}", launches[0]
    default = masked_linear_config.DEFAULT_CONFIG
    split = replace(default, split_k=4)
    x, weight, bits = empty(64, 4096), empty(4096, 4096), empty(4096 * 128, dtype=torch.int32)
    soft = masked_linear.logits_mask(weight, logits, TEMPERATURE, False, 1.0)
    packed = masked_linear.bits_mask(weight, bits, 1.0)
    odd, odd_weight = empty(63, 4097), empty(4095, 4097)
    odd_logits = empty(4095, 4097, dtype=torch.float32)
    cases = {
        "hard scaled": (x, weight, masked_linear.logits_mask(weight, logits, TEMPERATURE, True, 1.5), default),
        "fp16": (x.half(), weight.half(), soft, default),
        "bf16 with an fp32 weight": (x, weight.float(), soft, replace(default, block_k=16)),
        "neuron": (x, weight, masked_linear.logits_mask(weight, logits[:, :1], TEMPERATURE, False, 1.0), default),
        "odd": (odd, odd_weight, masked_linear.logits_mask(odd_weight, odd_logits, TEMPERATURE, False, 1.0), default),
        "words_k": (x, weight, packed, default),
        "words_n": (x, weight.t(), packed.transposed(), default),
        "bits": (odd, odd_weight, masked_linear.bits_mask(odd_weight, bits, 1.5), default),
        "swap": (x, weight, soft, replace(default, swap=True)),
    }
    for name, (rows, w, mask, config) in cases.items():
        out = empty(rows.shape[0], w.shape[0], dtype=rows.dtype)
        launches, _ = masked_linear.plan(rows, w, mask, None, out, not mask.is_bits, target, replace(config, split_k=1))
        yield f"masked_linear {name}", launches[0]
    for launch in masked_linear.plan(x, weight, soft, weight[0], x, True, target, split)[0]:
        yield f"masked_linear split {launch.kernel.fn.__name__}", launch


FAMILIES = (materialize_cases, logits_grad_cases, masked_linear_cases, scale_neurons_cases, bitmask_cases, philox_cases)


def cases(target: Target) -> Iterator[Case]:
    """Every case of every family for one target."""
    for family in FAMILIES:
        yield from family(target)
