"""Cases of ``gpu_checks`` for the optimizers' step: several layers at once, of sizes and parts that differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from csmask_kernels.launch import StepConfig
from gpu_cases import Draw
from gpu_checks import Check
from gpu_results import Context
from torch import Tensor

from csmask import reference, state_codes
from csmask._ops import triton_kernel

BETAS, EPS, DECAY, RATE, MOMENTUM, DAMPENING, SCALE = (0.9, 0.99), 1e-3, 0.1, 0.01, 0.9, 0.3, 1.25
Values = dict[str, Any]
NAMES = ("logits", "first", "second", "weight", "dwm", "grad", "temperature", "dl0")


def _shapes(context: Context) -> tuple[tuple[int, ...], ...]:
    """Odd, whole blocks, one entry, four dimensions."""
    if context.toy:
        return ((7, 37), (8, 64), (1, 1), (5, 3, 2, 3))
    return ((257, 1031), (512, 2048), (1, 1), (67, 35, 3, 3))


def _inputs(draw: Draw, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, parts: tuple[str, ...]) -> Values:
    """The tensors of all layers by name and index, and the numbers that they share."""
    found: Values = {"step": draw.scalar(3.0), "lr": draw.scalar(RATE), "factor": draw.scalar(0.5)}
    for i, shape in enumerate(shapes):
        logits = draw.logits(*shape)
        # Not next to 0 where nothing else is: AdamW divides by it, and a bound by the largest result would measure one
        # quotient's last bits.
        layer = {
            "logits": logits, "first": draw.normal(*shape), "second": draw.normal(*shape).square() + 0.01,
            "weight": draw.weight(shape, dtype, logits, False), "dwm": draw.normal(*shape, dtype=dtype),
            "grad": draw.normal(*shape), "temperature": draw.scalar(1.5), "dl0": draw.scalar(0.25),
        }  # fmt: skip
        absent = {name for name in ("dwm", "grad", "dl0") if name not in parts}
        found.update({f"{name}{i}": None if name in absent else tensor for name, tensor in layer.items()})
    return found


def _columns(values: Values, count: int) -> dict[str, list[Any]]:
    return {name: [values[f"{name}{i}"] for i in range(count)] for name in NAMES}


def _gradient(layer: Values) -> Tensor:
    logits, weight = layer["logits"], layer["weight"]
    dwm = torch.zeros_like(weight) if layer["dwm"] is None else layer["dwm"]
    grad = reference.logits_grad(dwm, weight, logits, layer["temperature"], layer["dl0"], SCALE)
    return grad if layer["grad"] is None else grad + layer["grad"]


def _step(op: str, layer: Values, values: Values) -> tuple[Tensor, Tensor, Tensor]:
    """New logits and states."""
    s, first, second, lr = layer["logits"], layer["first"], layer["second"], values["lr"]
    g = -_gradient(layer) * values["factor"]
    if op == "mask_sgd_":
        first = MOMENTUM * first + (1 - DAMPENING) * (g + DECAY * s)
        return s - lr * first, first, second
    first, second = BETAS[0] * first + (1 - BETAS[0]) * g, BETAS[1] * second + (1 - BETAS[1]) * g * g
    correction1, correction2 = (1 - beta ** values["step"] for beta in BETAS)
    denominator = (second / correction2).sqrt() + EPS
    return s * (1 - lr * DECAY) - lr / correction1 * first / denominator, first, second


def step_cases(op: str, dtype: torch.dtype, context: Context) -> Iterator[Check]:
    """Gradients of all parts and of some; both configs."""
    launch, shapes = triton_kernel(op), _shapes(context)
    count = len(shapes)

    def kernel(config: StepConfig | None, values: Values) -> dict[str, Tensor]:
        columns = _columns(values, count)
        waiting = [columns[name] for name in ("dwm", "weight", "grad", "temperature", "dl0")] + [[SCALE] * count]
        if op == "mask_grad_norms":
            return {"norms": launch(columns["logits"], *waiting, config=config)}
        logits, first, second = ([t.clone() for t in columns[name]] for name in ("logits", "first", "second"))
        masked = [torch.empty_like(w) for w in columns["weight"]]
        rest = (masked, *waiting, [values["step"]] * count, values["factor"], values["lr"])
        if op == "mask_sgd_":
            settings: tuple[Any, ...] = (MOMENTUM, DAMPENING, DECAY, False, True)
            l0s, _ = launch(logits, first, *rest, *settings, config=config)
        else:
            l0s, _ = launch(logits, first, second, [], *rest, *BETAS, EPS, DECAY, True, config=config)
        return _results(zip(logits, first, second, masked, strict=True), l0s)

    def expected(values: Values) -> dict[str, Tensor]:
        layers = [dict(zip(NAMES, row, strict=True)) for row in zip(*_columns(values, count).values(), strict=True)]
        if op == "mask_grad_norms":
            return {"norms": torch.stack([torch.linalg.vector_norm(_gradient(layer)) for layer in layers])}
        rows, l0s = [], []
        for layer in layers:
            new = _step(op, layer, values)
            masked, l0 = reference.materialize(layer["weight"], new[0], layer["temperature"], False, SCALE)
            rows.append((*new, masked))
            l0s.append(l0)
        return _results(rows, torch.stack(l0s))

    if op == "mask_adamw_":
        yield _codes(op, context, dtype)
    variants = {"all": ("dwm", "grad", "dl0"), "dwm": ("dwm",), "without dwm": ("grad", "dl0")}
    for name, parts in variants.items():
        for label, config in (("", None), (" other config", StepConfig(64 if context.toy else 1024, 4, 3))):
            yield Check(
                op,
                name + label,
                _inputs(Draw(context), shapes, dtype, parts),
                lambda config=config, **values: kernel(config, values),
                lambda **values: expected(values),
            )


def _codes(op: str, context: Context, dtype: torch.dtype) -> Check:
    """The second state's codes, their quarters in the logits and scales behind a first step, which betas of a half and
    plain gradients make exact."""
    launch, shapes = triton_kernel(op), _shapes(context)
    count, betas = len(shapes), (0.5, 0.5)

    def kernel(**values: Any) -> dict[str, Tensor]:
        columns = _columns(values, count)
        waiting = [columns[name] for name in ("dwm", "weight", "grad", "temperature", "dl0")] + [[SCALE] * count]
        logits = [s.clone() for s in columns["logits"]]
        codes = [list(column) for column in zip(*(state_codes.zeros(s) for s in logits), strict=True)]
        masked = [torch.empty_like(w) for w in columns["weight"]]
        rest = ([values["one"]] * count, None, values["lr"])
        launch(logits, *codes, masked, *waiting, *rest, *betas, EPS, 0.0, False)
        return named([(c, s.view(torch.int32) & 3, k) for c, s, k in zip(codes[1], logits, codes[2], strict=True)])

    def expected(**values: Any) -> dict[str, Tensor]:
        unit = state_codes.average_unit(betas, values["one"])
        grads = _columns(values, count)["grad"]
        found = [state_codes.encode(0.5 * g, 0.5 * g.square(), unit, values["one"]) for g in grads]
        return named([(new.exp_avg_sq, new.quarters.int() & 3, new.scales) for new in found])

    def named(rows: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
        names = ("codes", "quarters", "scales")
        return {f"{name}{i}": t for i, row in enumerate(rows) for name, t in zip(names, row, strict=True)}

    draw = Draw(context)
    inputs = {**_inputs(draw, shapes, dtype, ("grad",)), "one": draw.scalar(1.0)}
    return Check(op, "8 bits", inputs, kernel, expected, exact=tuple(expected(**inputs)))


def _results(rows: Any, l0s: Tensor) -> dict[str, Tensor]:
    names = ("logits", "first", "second", "masked_weight")
    found = {f"{name}{i}": t for i, row in enumerate(rows) for name, t in zip(names, row, strict=True)}
    return {**found, "l0s": l0s}
