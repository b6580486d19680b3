"""Mode ``auto`` of ``run``: the execution that the cost model picks for each shape, beside the best one measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from cases import Shape
from gpu_results import Context
from linear_providers import Layers
from linear_training import checked_providers, time_providers

MEASURED = ("per_forward", "in_kernel")


def tasks(context: Context, options: argparse.Namespace) -> list[tuple[str, Callable[[], None]]]:
    return [(f"auto {s.name}", lambda s=s: auto(context, s, options.seconds)) for s in options.shapes]


def auto(context: Context, shape: Shape, seconds: float) -> None:
    """A row with the time of the pick over the best, from this run's ``fwd_bwd`` times, or from new ones.

    The row's ``config`` says what the best one is; both are 1.00 apart from noise where the pick is right.
    """
    torch.manual_seed(0)
    layers = Layers(shape, context.device, quick=context.toy)
    times = _measured(context, shape)
    if set(times) != set(MEASURED):
        built = checked_providers(context, layers, MEASURED)
        timings = time_providers(context, layers, built, "auto", seconds, micro_batches=1, optimizer=False)
        times = {name: timing.p50 for name, timing in timings.items()}
    pick = layers.pick()
    if pick not in times:
        return  # it failed its check, which is recorded
    best = min(times, key=times.__getitem__)
    context.results.add(
        "masked_linear", pick, "auto", "over best", "x", shape.name, times[pick] / times[best], None, f"best is {best}"
    )


def _measured(context: Context, shape: Shape) -> dict[str, float]:
    """Milliseconds of forward + backward that this run has measured."""
    rows = context.results.find(kernel="masked_linear", mode="fwd_bwd", metric="time", x=shape.name)
    return {row["provider"]: row["value"] for row in rows if row["provider"] in MEASURED}
