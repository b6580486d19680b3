"""Modes ``fwd_bwd`` and ``step`` of ``run``: the time of training one linear layer, every way beside every other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from cases import Shape
from gpu_results import Context
from gpu_timing import Failure, Timing
from linear_providers import L0_LAMBDA, Layers
from providers import Provider, oracle, wrong_results
from torch import Tensor

MICRO_BATCHES = 8
# Larger weights are checked in fp32: their fp64 copies would take longer than all that is timed.
MAX_FP64_WEIGHTS = 1 << 22


def training(context: Context, shapes: Iterable[Shape], modes: Iterable[str], seconds: float) -> None:
    """Time forward + backward, and full steps of 1 and of 8 micro-batches, of every provider that passes its check.

    Args:
        shapes: to measure.
        modes: "fwd_bwd", "step" or both.
        seconds: for each of the measurements.
    """
    for shape in shapes:
        torch.compiler.reset()
        layers = Layers(shape, context.device, quick=context.toy)
        built = checked_providers(context, layers)
        for mode, arguments in _steps(modes):
            time_providers(context, layers, built, mode, seconds, **arguments)
        del layers, built


def _steps(modes: Iterable[str]) -> list[tuple[str, dict[str, Any]]]:
    """What rows call the measurements, and the arguments of ``Provider.step``."""
    found: list[tuple[str, dict[str, Any]]] = []
    if "fwd_bwd" in modes:
        found.append(("fwd_bwd", {"micro_batches": 1, "optimizer": False}))
    if "step" in modes:
        found += [("step", {"micro_batches": 1}), (f"step of {MICRO_BATCHES}", {"micro_batches": MICRO_BATCHES})]
    return found


def batch(layers: Layers) -> tuple[Tensor, Tensor]:
    """Random input and output gradient of a shape."""
    shape, device = layers.shape, layers.device
    return tuple(torch.randn(shape.m, width, device=device).to(shape.torch_dtype) for width in (shape.k, shape.n))  # type: ignore[return-value]


def checked_providers(context: Context, layers: Layers, names: Iterable[str] | None = None) -> dict[str, Provider]:
    """The providers whose numbers are right; of the others the failure is recorded, and they are not timed."""
    shape, (inputs, dout) = layers.shape, batch(layers)
    precise = torch.float64 if shape.weights <= MAX_FP64_WEIGHTS else torch.float32
    arguments: dict[str, Any] = {"inputs": inputs, "dout": dout, "dl0": 1.0, "l0_factor": L0_LAMBDA, "dtype": precise}
    expected = {
        True: oracle(layers.weights[0], None, layers.temperature, **arguments),
        False: oracle(layers.logits[0], layers.weights[0], layers.temperature, **arguments),
    }
    passed = {}
    for name, make in layers.providers().items():
        if names is not None and name not in names:
            continue
        try:
            provider = make()
            wrong = wrong_results(provider, expected[name == "dense"], inputs, dout, shape.torch_dtype)
            if wrong:
                raise AssertionError(f"wrong numbers, not timed: {', '.join(wrong)}")
        except Exception as error:  # noqa: BLE001, recorded
            context.fail(f"{name} {shape.name}", Failure.of(error))
            continue
        passed[name] = provider
    return passed


def time_providers(
    context: Context, layers: Layers, built: dict[str, Provider], mode: str, seconds: float, **arguments: Any
) -> dict[str, Timing]:
    """Time steps of the providers in turns; a row for each, and one with its ratio to dense in this measurement."""
    inputs, dout = batch(layers)
    calls: dict[str, Callable[[], None]] = {
        name: (lambda p=provider: p.step(inputs, dout, **arguments)) for name, provider in built.items()
    }
    notes = {name: provider.note for name, provider in built.items()}
    x = layers.shape.name
    # No graphs on a GPU: a layer keeps no masked weight while one is captured, and this is what users run.
    times = context.measure("masked_linear", mode, x, calls, seconds, graph=False, config=notes)
    dense = times.get("dense")
    for name, timing in times.items():
        if dense is not None:
            ratio = timing.p50 / dense.p50
            context.results.add("masked_linear", name, mode, "over dense", "x", x, ratio, None, notes[name])
    for provider in built.values():
        provider.zero_grad()
    context.results.save()
    return times
