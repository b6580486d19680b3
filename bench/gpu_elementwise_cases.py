"""Cases of ``gpu_checks`` for the elementwise ops, and the table of all cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from csmask_kernels.launch import ElementwiseConfig
from gpu_cases import LINEAR_SIZES, Draw, conv_cases, linear_cases, shipped_rows
from gpu_checks import Check
from gpu_results import Context
from gpu_step_cases import step_cases
from torch import Tensor

from csmask import functional, philox, reference
from csmask._ops import triton_kernel

Results = dict[str, Tensor]


def _shapes(context: Context) -> dict[str, tuple[int, ...]]:
    """A tile that overhangs in both dimensions, whole tiles, one element, four dimensions, nothing."""
    if context.toy:
        return {"odd": (7, 37), "even": (8, 64), "one": (1, 1), "conv": (5, 3, 2, 3), "empty": (0, 4)}
    return {"odd": (257, 1031), "even": (512, 2048), "one": (1, 1), "conv": (67, 35, 3, 3), "empty": (0, 4)}


def _configs(context: Context) -> Iterator[tuple[str, ElementwiseConfig | None]]:
    yield "", None
    yield " other config", ElementwiseConfig(64 if context.toy else 1024, 4)


def _masked(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype, layout: str, hard: bool) -> dict[str, Tensor]:
    """A weight and logits: each weight with its own, or (``layout`` "neuron") one logit per output unit."""
    unit = (shape[0],) + (1,) * (len(shape) - 1)
    logits = draw.logits(*(unit if layout == "neuron" else shape))
    weight = draw.weight(shape, dtype, logits, hard)
    if layout == "transposed":  # the weight's strides differ from the logits'
        weight = weight.transpose(0, -1).contiguous().transpose(0, -1)
    return {"weight": weight, "logits": logits, "temperature": draw.scalar(1.5)}


def materialize_cases(op: str, dtype: torch.dtype, context: Context) -> Iterator[Check]:
    """Soft, hard, scaled and into another dtype; with counts; in every layout."""
    launch = triton_kernel(op)

    def check(
        variant: str, shape: tuple[int, ...], layout: str = "", hard: bool = False, scale: float = 1.0,
        out_dtype: torch.dtype | None = None, config: ElementwiseConfig | None = None,
    ) -> Check:  # fmt: skip
        def kernel(weight: Tensor, logits: Tensor, temperature: Tensor) -> Results:
            found = launch(weight, logits, temperature, hard, scale, out_dtype, True, config=config)
            return dict(zip(("out", "l0", "counts"), found, strict=True))

        def expected(weight: Tensor, logits: Tensor, temperature: Tensor) -> Results:
            dtype = out_dtype if out_dtype and weight.dtype != torch.float64 else None
            out, l0 = reference.materialize(weight, logits, temperature, hard, scale, dtype)
            per_logit = reference.weights_per_logit(weight, logits)
            return {"out": out, "l0": l0, "counts": reference.mask_sums(logits, temperature, hard, scale, per_logit)[1]}

        return Check(op, variant, _masked(Draw(context), shape, dtype, layout, hard), kernel, expected, ("counts",))

    for name, shape in _shapes(context).items():
        for label, config in _configs(context):
            yield check(name + label, shape, config=config)
    shapes = _shapes(context)
    yield check("hard", shapes["odd"], hard=True)
    yield check("hard scaled", shapes["conv"], hard=True, scale=1.25)
    yield check("scaled transposed", shapes["odd"], "transposed", scale=1.25)
    yield check("even transposed", shapes["even"], "transposed")
    yield check("neuron", shapes["odd"], "neuron")
    yield check("neuron conv", shapes["conv"], "neuron", hard=True)
    yield check("into fp32", shapes["even"], out_dtype=torch.float32)


def mask_sums_cases(op: str, dtype: torch.dtype, context: Context) -> Iterator[Check]:
    """l0 and the counts of logits, which are fp32 whatever the weight is."""
    if dtype != torch.float32:
        return
    launch = triton_kernel(op)

    def check(variant: str, shape: tuple[int, ...], hard: bool, config: ElementwiseConfig | None) -> Check:
        def kernel(logits: Tensor, temperature: Tensor) -> Results:
            return dict(zip(("l0", "counts"), launch(logits, temperature, hard, 1.25, 3, config=config), strict=True))

        def expected(logits: Tensor, temperature: Tensor) -> Results:
            return dict(zip(("l0", "counts"), reference.mask_sums(logits, temperature, hard, 1.25, 3), strict=True))

        draw = Draw(context)
        inputs = {"logits": draw.logits(*shape), "temperature": draw.scalar(1.5)}
        return Check(op, variant, inputs, kernel, expected, ("counts",))

    for name, shape in _shapes(context).items():
        for label, config in _configs(context):
            yield check(name + label, shape, False, config)
    yield check("hard", _shapes(context)["odd"], True, None)


def logits_grad_cases(op: str, dtype: torch.dtype, context: Context) -> Iterator[Check]:
    """Written and added; one logit per weight in several layouts, one per unit in both orientations."""
    launch, adds = triton_kernel(op), op.endswith("_")

    def check(
        variant: str, shape: tuple[int, ...], layout: str = "", scale: float = 1.0, with_dl0: bool = True,
        flip: bool = False, config: ElementwiseConfig | None = None,
    ) -> Check:  # fmt: skip
        draw = Draw(context)
        inputs: dict[str, Any] = _masked(draw, shape, dtype, layout, False)
        inputs["dweight"] = draw.normal(*shape, dtype=dtype)
        if flip:
            inputs.update({k: inputs[k].t() for k in ("weight", "logits", "dweight")})
        inputs["dl0"] = draw.scalar(0.25) if with_dl0 else None
        if adds:
            inputs["start"] = draw.normal(*inputs["logits"].shape)

        def kernel(dweight: Tensor, start: Tensor | None = None, dl0: Tensor | None = None, **mask: Tensor) -> Results:
            arguments = (dweight, mask["weight"], mask["logits"], mask["temperature"], dl0, scale)
            if start is None:
                return {"dlogits": launch(*arguments, config=config)}
            total = start.clone()
            launch(total, *arguments, config=config)
            return {"dlogits": total}

        def expected(
            dweight: Tensor, start: Tensor | None = None, dl0: Tensor | None = None, **mask: Tensor
        ) -> Results:
            found = reference.logits_grad(dweight, mask["weight"], mask["logits"], mask["temperature"], dl0, scale)
            return {"dlogits": found if start is None else found + start}

        return Check(op, variant, inputs, kernel, expected)

    shapes = _shapes(context)
    for name, shape in shapes.items():
        for label, config in _configs(context):
            yield check(name + label, shape, config=config)
    yield check("scaled without dl0", shapes["odd"], scale=1.25, with_dl0=False)
    yield check("transposed", shapes["odd"], "transposed")
    yield check("neuron", shapes["odd"], "neuron")
    yield check("neuron flipped", shapes["odd"], "neuron", flip=True)
    yield check("neuron conv", shapes["conv"], "neuron")


def scale_neurons_cases(op: str, dtype: torch.dtype, context: Context) -> Iterator[Check]:
    """Units in the last dimension and in the first but one; soft and hard; with and without bias."""
    launch, is_grad = triton_kernel(op), op.endswith("grad")

    def check(variant: str, shape: tuple[int, ...], dim: int, hard: bool, scale: float, with_bias: bool) -> Check:
        draw, units = Draw(context), shape[dim]
        logits = draw.logits(units)
        along = [-1 if d == dim else 1 for d in range(len(shape))]
        inputs: dict[str, Any] = {"logits": logits, "temperature": draw.scalar(1.5)}
        inputs["z"] = draw.normal(*shape, dtype=dtype)
        if is_grad:
            inputs.update(dout=draw.normal(*shape, dtype=dtype), dl0=draw.scalar(0.25))
        else:
            inputs["bias"] = draw.normal(units, dtype=dtype) if with_bias else None

        def kernel(z: Tensor, logits: Tensor, temperature: Tensor, **rest: Any) -> Results:
            if not is_grad:
                return {"out": launch(z, logits, temperature, rest["bias"], hard, scale, dim)}
            found = launch(rest["dout"], z, logits, temperature, rest["dl0"], hard, scale, dim, 7)
            return dict(zip(("dz", "dlogits"), found, strict=True))

        def expected(z: Tensor, logits: Tensor, temperature: Tensor, **rest: Any) -> Results:
            if not is_grad:
                return {"out": reference.scale_neurons(z, logits, temperature, rest["bias"], hard, scale, dim)}
            dz = reference.scale_neurons(rest["dout"], logits, temperature, None, hard, scale, dim)
            compute = reference.compute_dtype(z, logits)
            # logits_grad with z for the weight: dmask = sum of dout * z over all but the units.
            grad = reference.logits_grad(
                rest["dout"].to(compute), z.to(compute), logits.view(along), temperature, None, scale
            ).view(units)
            grad = grad + rest["dl0"] * 7 * reference.soft_mask_derivative(logits, temperature, scale)
            return {"dz": dz, "dlogits": torch.zeros_like(logits) if hard else grad}

        return Check(op, variant, inputs, kernel, expected)

    shapes = _shapes(context)
    yield check("odd", shapes["odd"], 1, False, 1.0, True)
    yield check("even", shapes["even"], 1, False, 1.0, False)
    yield check("even first", shapes["even"], 0, False, 1.25, True)
    yield check("conv", shapes["conv"], 1, False, 1.25, True)
    yield check("hard", shapes["conv"], 1, True, 1.25, True)
    yield check("one", shapes["one"], 1, False, 1.0, True)
    if dtype != torch.float16:
        for rows in shipped_rows(op, context):
            yield check(f"shipped {rows}", (max(rows // 512, 1), 512), 1, False, 1.0, True)


def bitmask_cases(op: str, dtype: torch.dtype, context: Context) -> Iterator[Check]:
    """Exact, all of them, but a scaled weight; the words of sizes that fill the last one and that do not."""
    if op != "apply_bitmask" and dtype != torch.float32:
        return
    launch = triton_kernel(op)

    def check(variant: str, shape: tuple[int, ...], scale: float = 1.0, transposed: bool = False) -> Check:
        draw = Draw(context)
        logits = draw.logits(*shape)
        logits = logits.t().contiguous().t() if transposed else logits
        bits = reference.pack_mask(logits)
        if op == "pack_mask":
            functions = (lambda s: {"bits": launch(s)}, lambda s: {"bits": reference.pack_mask(s)})
            return Check(op, variant, {"s": logits}, *functions, ("bits",))
        if op in ("unpack_mask", "popcount"):
            size = (list(shape),) if op == "unpack_mask" else ()
            plain = getattr(reference, op)
            functions = (lambda s: {"found": launch(s, *size)}, lambda s: {"found": plain(s, *size)})
            return Check(op, variant, {"s": bits}, *functions, ("found",))
        weight = draw.weight(shape, dtype, logits, True)
        weight = weight.t().contiguous().t() if transposed else weight
        return Check(
            op,
            variant,
            {"w": weight, "s": bits},
            lambda w, s: {"out": launch(w, s, scale)},
            lambda w, s: {"out": reference.apply_bitmask(w, s, scale)},
            ("out",) if scale == 1.0 else (),
        )

    for name, shape in _shapes(context).items():
        yield check(name, shape)
    yield check("transposed", _shapes(context)["odd"], transposed=True)
    if op == "apply_bitmask":
        yield check("scaled", _shapes(context)["odd"], scale=1.25)


def philox_cases(op: str, dtype: torch.dtype, context: Context) -> Iterator[Check]:
    """Bit for bit the numbers of ``csmask.philox``, at counts that end within a block of four words."""
    launch, (low, high) = triton_kernel(op), (context.seed & 0xFFFFFFFF, 0x9ABCDEF0)
    draws: dict[str, Callable[..., Tensor]] = {"uniform": philox.random_uniform, "normal": philox.random_normal}
    if dtype == torch.float32:
        draws["words"] = philox.random_words
    for kind, draw in draws.items():
        scale = 1.0 if kind == "words" else 0.37
        for count in (0, 1, 37, 128) if context.toy else (0, 1, 4099, 1 << 20):

            def kernel(start: Tensor, kind: str = kind, scale: float = scale, count: int = count) -> Results:
                out = start.new_zeros(count, dtype=torch.int64 if kind == "words" else dtype).fill_(7)
                launch(out, kind, low, high, 5, 3, scale)
                return {"out": out}

            def expected(
                start: Tensor, kind: str = kind, draw: Any = draw, scale: float = scale, count: int = count
            ) -> Results:
                values = draw(count, high << 32 | low, 5, 3, start.device)
                return {"out": values if kind == "words" else (values * scale).to(dtype)}

            start = torch.zeros(1, device=context.device)
            yield Check(op, f"{kind} {count}", {"start": start}, kernel, expected, ("out",))


def functional_cases(op: str, dtype: torch.dtype, context: Context) -> Iterator[Check]:
    """Layers' own way to the kernels: through the operators that the device dispatches, forward and backward."""

    def check(variant: str, transposed: bool, **options: Any) -> Check:
        (m, n, k), draw = LINEAR_SIZES["toy" if context.toy else "full"][1], Draw(context)
        shape = (k, n) if transposed else (n, k)
        logits = draw.logits(*shape)
        inputs = {
            "x": draw.normal(m, k, dtype=dtype), "bias": draw.normal(n, dtype=dtype),
            "weight": draw.weight(shape, dtype, logits, False), "logits": logits, "temperature": draw.scalar(1.5),
            "dout": draw.normal(m, n, dtype=dtype), "dl0": draw.scalar(0.25),
        }  # fmt: skip

        def with_grads(function: Callable[..., Any], dout: Tensor, dl0: Tensor, **tensors: Tensor) -> Results:
            leaves = {name: tensors[name].detach().requires_grad_() for name in ("x", "logits", "bias")}
            given = {**tensors, **leaves}
            names = ("x", "weight", "logits", "temperature", "bias")
            out, l0 = function(*(given[name] for name in names))
            grads = torch.autograd.grad([out, l0], list(leaves.values()), [dout, dl0])
            return {"out": out.detach(), "l0": l0.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}

        def kernel(**tensors: Tensor) -> Results:
            return with_grads(
                lambda *args: functional.masked_linear(*args, transposed=transposed, return_l0=True, **options),
                **tensors,
            )

        def plain(
            x: Tensor, weight: Tensor, logits: Tensor, temperature: Tensor, bias: Tensor
        ) -> tuple[Tensor, Tensor]:
            out = reference.masked_linear(x, weight, logits, temperature, bias, transposed=transposed)
            return out, reference.l0(logits, temperature)

        return Check(op, variant, inputs, kernel, lambda **tensors: with_grads(plain, **tensors))

    for execution in ("per_forward", "in_kernel"):
        yield check(execution, False, execution=execution)
        yield check(f"{execution} transposed", True, execution=execution)


CASES: dict[str, Callable[..., Iterator[Check]]] = {
    "materialize": materialize_cases,
    "mask_sums": mask_sums_cases,
    "logits_grad": logits_grad_cases,
    "logits_grad_": logits_grad_cases,
    "masked_linear": linear_cases,
    "masked_linear_dx": linear_cases,
    "masked_linear_dlogits": linear_cases,
    "masked_linear_dlogits_": linear_cases,
    "scale_neurons": scale_neurons_cases,
    "scale_neurons_grad": scale_neurons_cases,
    "pack_mask": bitmask_cases,
    "unpack_mask": bitmask_cases,
    "popcount": bitmask_cases,
    "apply_bitmask": bitmask_cases,
    "bitmask_linear": linear_cases,
    "bitmask_linear_dx": linear_cases,
    "masked_conv": conv_cases,
    "masked_conv_dx": conv_cases,
    "masked_conv_dlogits": conv_cases,
    "masked_conv_dlogits_": conv_cases,
    "philox_": philox_cases,
    "mask_adamw_": step_cases,
    "mask_sgd_": step_cases,
    "mask_grad_norms": step_cases,
    "functional.masked_linear": functional_cases,
}
