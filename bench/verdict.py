"""The targets of a CPU, from a run's rows: which are met, and by what ratio."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from cases import Shape

Rows = list[dict[str, Any]]
# per_step over dense, forward + backward; its full step over dense's forward + backward and the step kernel's bytes at
# 1 / 1.25 of the copy's bandwidth; and over compile's full step, by tokens, on weights whose traffic counts
PER_STEP_OVER_DENSE, STEP_BYTES_OVER_COPY = 1.02, 1.25
PER_STEP_OVER_COMPILE = ((128, 0.75), (512, 0.95))
# mask_adamw_: reads and writes S and two states in fp32; reads W and its gradient, writes the masked weight
STEP_BYTES_FP32, STEP_BYTES_PER_ITEMSIZE = 24, 3
# per_forward over compile: on weights whose traffic counts, and on small ones
OVER_COMPILE_LARGE, OVER_COMPILE_SMALL = 0.85, 1.0
LARGE_WEIGHT = 4096 * 4096
# in_kernel over per_forward, for so few tokens
IN_KERNEL_TOKENS, IN_KERNEL_OVER = 128, 1.0
BANDWIDTH_KERNELS, BANDWIDTH_PERCENT = ("materialize", "logits_grad", "logits_grad_"), 80.0
# One layer's scratch, whatever the number of layers; what is more than this is activations and rounding up.
SCRATCH_GROWTH, ACTIVATIONS = 1.1, 0.25
CSMASK = ("per_forward", "in_kernel")


@dataclass(frozen=True)
class Verdict:
    """One target at one shape: the number reached, its bound, and whether it is met."""

    what: str
    x: str
    reached: float
    bound: float
    met: bool
    unit: str = ""
    mode: str = ""
    provider: str = ""

    def __str__(self) -> str:
        sign = ">=" if self.unit == "%" else "<="
        verdict = "met   " if self.met else "MISSED"
        return f"{verdict} {self.what}, {self.x}: {self.reached:.2f}{self.unit} ({sign} {self.bound:.2f}{self.unit})"


def verdicts(rows: Iterable[dict[str, Any]]) -> list[Verdict]:
    """Every target that these rows can tell of."""
    rows = list(rows)
    return _per_step(rows) + _over_compile(rows) + _in_kernel(rows) + _bandwidth(rows) + _memory(rows)


def values(rows: Rows, mode: str, metric: str, kernel: str = "masked_linear") -> dict[str, dict[str, float]]:
    """``x -> provider -> value``, the last of equal rows."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if (row["mode"], row["metric"], row["kernel"]) == (mode, metric, kernel):
            found.setdefault(row["x"], {})[row["provider"]] = row["value"]
    return found


def _ratios(
    rows: Rows, provider: str, other: str, bound: Callable[[Shape], float | None], mode: str = "fwd_bwd"
) -> list[Verdict]:
    found = []
    for x, times in values(rows, mode, "time").items():
        limit = bound(Shape.parse(x))
        if limit is None or provider not in times or other not in times:
            continue
        ratio = times[provider] / times[other]
        what = f"{provider} / {other}, {'forward + backward' if mode == 'fwd_bwd' else mode}"
        found.append(Verdict(what, x, ratio, limit, ratio <= limit, "x", mode, provider))
    return found


def _per_step(rows: Rows) -> list[Verdict]:
    def over_compile(shape: Shape) -> float:
        if shape.weights < LARGE_WEIGHT:
            return 1.0
        return next((limit for tokens, limit in PER_STEP_OVER_COMPILE if shape.m <= tokens), 1.0)

    found = _ratios(rows, "per_step", "dense", lambda _: PER_STEP_OVER_DENSE)
    found += _ratios(rows, "per_step", "compile", over_compile, "step")
    passes, steps = values(rows, "fwd_bwd", "time"), values(rows, "step", "time")
    copies = {x.split()[0]: by["torch"] for x, by in values(rows, "bandwidth", "rate", "copy").items()}
    for x, times in steps.items():
        shape, dense = Shape.parse(x), passes.get(x, {}).get("dense")
        if dense is None or "per_step" not in times or shape.dtype not in copies:
            continue
        size = shape.weights * (STEP_BYTES_FP32 + STEP_BYTES_PER_ITEMSIZE * shape.torch_dtype.itemsize)
        allowed = dense + STEP_BYTES_OVER_COPY * size / copies[shape.dtype] / 1e6  # ms
        reached, what = times["per_step"], "per_step, step in ms"
        found.append(Verdict(what, x, reached, allowed, reached <= allowed, " ms", "step", "per_step"))
    return found


def _over_compile(rows: Rows) -> list[Verdict]:
    def bound(shape: Shape) -> float:
        return OVER_COMPILE_LARGE if shape.weights >= LARGE_WEIGHT else OVER_COMPILE_SMALL

    return _ratios(rows, "per_forward", "compile", bound)


def _in_kernel(rows: Rows) -> list[Verdict]:
    return _ratios(
        rows, "in_kernel", "per_forward", lambda shape: IN_KERNEL_OVER if shape.m <= IN_KERNEL_TOKENS else None
    )


def _bandwidth(rows: Rows) -> list[Verdict]:
    return [
        Verdict(
            f"{kernel}, bandwidth of a copy", x, found["csmask"], BANDWIDTH_PERCENT,
            found["csmask"] >= BANDWIDTH_PERCENT, "%", "bandwidth", kernel,
        )
        for kernel in BANDWIDTH_KERNELS
        for x, found in values(rows, "bandwidth", "of copy", kernel).items()
    ]  # fmt: skip


def _memory(rows: Rows) -> list[Verdict]:
    """Kept: a masked weight in ``per_forward``, nothing in ``in_kernel``. Scratch: that of one layer, of many too."""
    kept, scratch = values(rows, "memory", "kept"), values(rows, "memory", "scratch")
    found = []
    for x, by_provider in kept.items():
        shape_name, _, count = x.partition(", ")
        itemsize = Shape.parse(shape_name).torch_dtype.itemsize
        for provider in CSMASK:
            if provider not in by_provider:
                continue
            bound = (itemsize if provider == "per_forward" else 0) + 0.01  # l0 and the like
            value = by_provider[provider]
            what = f"{provider}, bytes/weight kept beyond W, S, S.grad"
            found.append(Verdict(what, x, value, bound, value <= bound, "", "memory", provider))
            one = scratch.get(f"{shape_name}, 1 layer", {}).get(provider)
            if count != "1 layer" and one is not None:
                value, bound = scratch[x][provider], one * SCRATCH_GROWTH + ACTIVATIONS
                what = f"{provider}, bytes of scratch per weight of one layer"
                found.append(Verdict(what, x, value, bound, value <= bound, "", "memory", provider))
    return found
