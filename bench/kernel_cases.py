"""Launches of every kernel at shapes that stand for its use, planned on the meta device: what is compiled offline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from csmask_kernels import (
    bitmask,
    logits_grad,
    mask_step,
    mask_step_table,
    masked_conv,
    masked_conv_dlogits,
    masked_linear,
    masked_linear_config,
    masked_linear_dlogits,
    materialize,
    philox,
    scale_neurons,
)
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
            launches, _ = scale_neurons.plan_grad(z, *arguments)
            yield f"scale_neurons_grad {what}", launches[0]
            if len(launches) > 1:
                yield f"scale_neurons_grad {what} dlogits", launches[1]
    z, dout = shapes["channels-last"], shapes["images"]
    arguments = (z, empty(256, dtype=torch.float32), TEMPERATURE, None, False, 1.0, 1, 1, torch.empty_like(z))
    launches, _ = scale_neurons.plan_grad(dout, *arguments, empty(256, dtype=torch.float32), target)
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
                for layout in ("", " (K, N)"):
                    if layout:  # a GPT-2 layer's weight lies the other way round
                        weight = weight.t().contiguous().t() if weight.stride(1) == 1 else weight.contiguous()
                        lying = mask.source.t().contiguous().t() if mask.strides[1] == 1 else mask.source.contiguous()
                        mask = masked_linear.logits_mask(weight, lying, TEMPERATURE, False, 1.0)
                    config = masked_linear_config.choose_config(op, target, x, weight, mask)
                    launches, _ = masked_linear.plan(x, weight, mask, bias, x, bias is not None, target, config)
                    yield f"{op} m={row['m']} {dtype}{layout}", launches[0]
    for row in config_table(target).get("bitmask_linear", []):
        x, weight, bits = empty(row["m"], 4096), empty(4096, 4096), empty(4096 * 128, dtype=torch.int32)
        mask = masked_linear.bits_mask(weight, bits, 1.0)
        config = masked_linear_config.choose_config("bitmask_linear", target, x, weight, mask)
        yield f"bitmask_linear m={row['m']}", masked_linear.plan(x, weight, mask, None, x, False, target, config)[0][0]
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
    # Sizes of 1 become constants of the kernel: plain numbers without the methods of Triton's.
    one, row = empty(1, 4096), empty(1, 4096)
    single = masked_linear.logits_mask(row, row.float(), TEMPERATURE, False, 1.0)
    for launch in masked_linear.plan(one, row, single, None, empty(1, 1), True, target, split)[0]:
        yield f"masked_linear one {launch.kernel.fn.__name__}", launch


def masked_linear_dlogits_cases(target: Target) -> Iterator[Case]:
    """Every shipped config for each dtype, written and added; the default; a small weight; strides of each kind."""
    scalar = empty(dtype=torch.float32)

    def plan(m: int, n: int, k: int, x_dtype: torch.dtype, w_dtype: torch.dtype, add: bool, **options: Any) -> Launch:
        logits = empty(n, k, dtype=torch.float32)
        dout, x, w = empty(m, n, dtype=x_dtype), empty(m, k, dtype=x_dtype), empty(n, k, dtype=w_dtype)
        inputs = (dout, x, w, logits, TEMPERATURE)
        dl0, scale = (scalar, 1.0) if add else (None, 1.5)
        return masked_linear_dlogits.plan(*inputs, dl0, scale, False, logits, add, target, **options)

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for x_dtype, w_dtype in ((bf16, bf16), (fp16, fp16), (bf16, fp32), (fp32, fp32)):
        for add in (False, True):
            kind = f"{'add' if add else 'write'} {x_dtype} {w_dtype}"
            for m in (row["m"] for row in config_table(target).get("masked_linear_dlogits", [])):
                yield f"masked_linear_dlogits m={m} {kind}", plan(m, 4096, 4096, x_dtype, w_dtype, add)
            default = masked_linear_dlogits.DEFAULT_CONFIG
            yield f"masked_linear_dlogits default {kind}", plan(128, 4096, 4096, x_dtype, w_dtype, add, config=default)
    for m in (16, 8192):
        yield f"masked_linear_dlogits small m={m}", plan(m, 768, 768, bf16, bf16, True)
        yield f"masked_linear_dlogits odd m={m}", plan(m, 4095, 4097, bf16, bf16, True)
    w, logits = empty(4096, 4096), empty(4096, 4096, dtype=fp32)
    rest = (w.t(), logits.t(), TEMPERATURE, scalar, 1.0)
    launch = masked_linear_dlogits.plan(w, w, *rest, True, logits.t(), True, target)
    yield "masked_linear_dlogits columns", launch
    launch = masked_linear_dlogits.plan(w.t(), w.t(), *rest, False, logits, True, target)
    yield "masked_linear_dlogits strided", launch


def image(*shape: int, dtype: torch.dtype = torch.bfloat16, channels_last: bool = True) -> torch.Tensor:
    """A 4-d tensor of the meta device in one of the two memory formats."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)


ONES, ZEROS = (1, 1), (0, 0)
STEM = ((2, 2), (3, 3), ONES)  # stride, padding, dilation of a 7 x 7 filter


def conv_buckets(target: Target) -> list[tuple[int, torch.dtype]]:
    """Rows, as images of 16 x 16 pixels, and dtypes: all that the configs are for in bf16, the middle in fp32."""
    table = config_table(target)
    listed = {row["m"] for op in ("masked_conv", "masked_conv_dx", "masked_conv_dlogits") for row in table.get(op, [])}
    return [(rows, torch.bfloat16) for rows in sorted(listed | {256, 4096, 65536})] + [(4096, torch.float32)]


def masked_conv_cases(target: Target) -> Iterator[Case]:
    """Every bucket in both formats; dtypes, hard and scaled masks, neurons, bias, strides, a stem, 64-bit offsets."""

    def both(
        name: str, x: torch.Tensor, weight: torch.Tensor, logits: torch.Tensor, geometry: tuple = (ONES, ONES, ONES),
        hard: bool = False, scale: float = 1.0, bias: torch.Tensor | None = None,
    ) -> Iterator[Case]:  # fmt: skip
        size = masked_conv.output_size(x, weight, *geometry)
        out = image(x.shape[0], weight.shape[0], *size, dtype=x.dtype, channels_last=x.stride(1) == 1)
        mask = (weight, logits.expand(weight.shape), TEMPERATURE)
        plan, plan_dx = masked_conv.plan, masked_conv.plan_dx
        yield f"masked_conv {name}", plan(x, *mask, bias, hard, scale, *geometry, out, target)[0]
        yield f"masked_conv_dx {name}", plan_dx(out, *mask, hard, scale, *geometry, x, target)

    for channels_last in (True, False):
        layout = "channels-last" if channels_last else "channels-first"
        logits = image(256, 256, 3, 3, dtype=torch.float32, channels_last=channels_last)
        for rows, dtype in conv_buckets(target):
            x = image(rows // 256, 256, 16, 16, dtype=dtype, channels_last=channels_last)
            weight = image(256, 256, 3, 3, dtype=dtype, channels_last=channels_last)
            yield from both(f"{layout} {rows} {dtype}", x, weight, logits)
        x, weight = image(16, 256, 16, 16, channels_last=channels_last), logits.bfloat16()
        yield from both(f"{layout} hard scaled strided", x, weight, logits, ((2, 2), ONES, ONES), True, 1.5, empty(256))
        stem, filters = (
            image(32, 3, 224, 224, channels_last=channels_last),
            image(64, 3, 7, 7, channels_last=channels_last),
        )
        yield from both(f"{layout} stem", stem, filters, filters.float(), STEM)
    x, weight, logits = image(16, 256, 16, 16, dtype=torch.float16), image(256, 256, 3, 3), empty(256, 1, 1, 1).float()
    yield from both("neuron dilated, weight of another dtype", x, weight, logits, (ONES, (2, 2), (2, 2)))
    wide, weight = image(4096, 64, 128, 128), image(64, 64, 3, 3)
    yield from both("64-bit offsets", wide, weight, weight.float())


def masked_conv_dlogits_cases(target: Target) -> Iterator[Case]:
    """Every bucket in both memory formats, whole and split; dtypes, a stem, formats that differ, 64-bit offsets."""
    dl0 = empty(dtype=torch.float32)

    def planned(
        name: str, dout: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, add: bool = False,
        geometry: tuple = (ONES, ONES, ONES),
    ) -> Iterator[Case]:  # fmt: skip
        logits = weight.float()
        mask = (weight, logits, TEMPERATURE, None if add else dl0, 1.5 if add else 1.0)
        launches = masked_conv_dlogits.plan(dout, x, *mask, *geometry, logits, add, target)
        for launch, step in zip(launches, ("", " reduced"), strict=False):
            yield f"masked_conv_dlogits {name}{step}", launch

    for channels_last in (True, False):
        layout = "channels-last" if channels_last else "channels-first"
        for rows, dtype in conv_buckets(target):
            x = image(rows // 256, 256, 16, 16, dtype=dtype, channels_last=channels_last)
            weight = image(256, 256, 3, 3, dtype=dtype, channels_last=channels_last)
            yield from planned(f"{layout} {rows} {dtype}", x, x, weight)
        for dtype in (torch.bfloat16, torch.float32):  # a weight whose tiles fill the device by themselves
            x = image(256, 2048, 16, 16, dtype=dtype, channels_last=channels_last)
            weight = image(2048, 2048, 3, 3, dtype=dtype, channels_last=channels_last)
            yield from planned(f"{layout} whole {dtype}", x, x, weight, True)
        x, dout = (image(32, *shape, channels_last=channels_last) for shape in ((3, 224, 224), (64, 112, 112)))
        yield from planned(f"{layout} stem", dout, x, image(64, 3, 7, 7, channels_last=channels_last), True, STEM)
    wide, weight = image(4096, 64, 128, 128), image(64, 64, 3, 3, dtype=torch.float16)
    yield from planned("64-bit offsets, float16", wide.half(), wide.half(), weight)
    yield from planned("formats that differ", image(16, 256, 16, 16, channels_last=False), image(16, 256, 16, 16),
                       image(256, 256, 3, 3))  # fmt: skip


def mask_step_cases(target: Target) -> Iterator[Case]:
    """Both optimizers and the norms for each dtype; all of a gradient and parts of it; odd sizes, many layers."""
    fp32 = torch.float32
    bf16, scalar = torch.bfloat16, empty(dtype=fp32)
    adamw = {"taken1": 0.1, "log_beta1": -0.1, "beta2": 0.999, "taken2": 1e-3, "log_beta2": -1e-3, "eps": 1e-8,
             "weight_decay": 0.01}  # fmt: skip
    sgd = {"momentum": 0.9, "taken": 1.0, "weight_decay": 0.01}

    def layers(
        w: torch.dtype = bf16, wm: torch.dtype | None = None, dwm: torch.dtype | None = None, grad: bool = False,
        dl0: bool = True, size: tuple[int, int] = (4096, 4096), count: int = 1,
    ) -> dict[str, list[Any]]:  # fmt: skip
        states = ("logits", "first", "second")
        columns: dict[str, Any] = {
            **{name: empty(*size, dtype=fp32) for name in states}, "weight": empty(*size, dtype=w),
            "masked_weight": empty(*size, dtype=wm or w), "dmasked_weight": empty(*size, dtype=dwm or w),
            "grad": empty(*size, dtype=fp32) if grad else None, "dl0": scalar if dl0 else None,
            "temperature": TEMPERATURE, "step": scalar, "scale": 1.0,
        }  # fmt: skip
        return {name: [value] * count for name, value in columns.items()}

    def step(name: str, columns: dict[str, list[Any]], momentum: bool = True, lr: Any = scalar) -> Iterator[Case]:
        factor = None if momentum else scalar
        plan = mask_step.plan_step
        bits = {"STATE_BITS": 8 if "state_scales" in columns else 32}
        yield (
            f"mask_adamw_ {name}",
            plan(mask_step._adamw_kernel, columns, factor, lr, False, adamw, bits, target)[0][0],
        )
        del columns["second"]
        if not momentum:
            del columns["first"]
        constants = {"HAS_MOMENTUM": momentum, "NESTEROV": momentum}
        if "state_scales" in columns:
            return
        launches = plan(mask_step._sgd_kernel, columns, factor, lr, False, sgd, constants, target)[0]
        yield f"mask_sgd_ {name}", launches[0]

    def norms(name: str, columns: dict[str, list[Any]]) -> Iterator[Case]:
        for unread in ("first", "second", "masked_weight", "step"):
            del columns[unread]
        step, reduction = mask_step.plan_norms(columns, target)[0]
        yield f"mask_grad_norms {name}", step
        if "odd" in name:  # their partials begin anywhere
            yield f"mask_grad_norms {name} reduced", reduction

    for dtype in (bf16, torch.float16, fp32):
        yield from step(f"{dtype}", layers(dtype))
        yield from norms(f"{dtype}", layers(dtype))
    blocks = empty(4096 * 4096 // mask_step_table.STATE_BLOCK, dtype=fp32)
    codes = {"first": [empty(4096, 4096, dtype=torch.int8)], "second": [empty(4096, 4096, dtype=torch.uint8)]}
    yield from step("8-bit states", {**layers(), **codes, "state_scales": [blocks]})
    yield from step("accumulated", layers(dwm=fp32, grad=True), lr=0.01)
    yield from step("without momentum, clipped", layers(), momentum=False)
    yield from step("fp32 under autocast", layers(fp32, bf16, bf16, dl0=False))
    yield from step("odd", layers(size=(4095, 4097)))
    yield from step("many layers", layers(size=(1024, 1024), count=mask_step_table.MAX_LAYERS))
    odd = layers(size=(999, 1001), count=5)
    launches = mask_step.plan_step(mask_step._adamw_kernel, odd, None, 0.01, False, adamw, {"STATE_BITS": 32}, target)[
        0
    ]
    yield "mask_adamw_ odd reduced", launches[1]
    yield from norms("odd", odd)


FAMILIES = (
    materialize_cases, logits_grad_cases, masked_linear_cases, masked_linear_dlogits_cases, scale_neurons_cases,
    bitmask_cases, philox_cases, masked_conv_cases, masked_conv_dlogits_cases, mask_step_cases)  # fmt: skip


def cases(target: Target) -> Iterator[Case]:
    """Every case of every family for one target."""
    for family in FAMILIES:
        yield from family(target)
