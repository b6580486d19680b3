"""Where the time of a missed target goes: torch's profiler over the provider or kernel at that shape."""

from __future__ import annotations

import torch
from cases import DTYPES, Shape
from gpu_inputs import elementwise_calls
from linear_providers import Layers
from linear_training import batch
from torch.profiler import ProfilerActivity, profile
from verdict import Verdict

from csmask._ops import ops

CALLS = 5
SHOWN = 15


def profile_of(missed: Verdict, device: torch.device, quick: bool = False) -> str:
    """The table of what ``CALLS`` calls of the missed target's provider spend their time on; "" for memory."""
    if missed.mode in ("fwd_bwd", "step"):
        layers = Layers(Shape.parse(missed.x), device, quick=quick)
        provider, (inputs, dout) = layers.providers()[missed.provider](), batch(layers)

        def call() -> None:
            provider.step(inputs, dout, 1, optimizer=missed.mode == "step")

    elif missed.mode == "bandwidth":
        dtype, _, size = missed.x.partition(" ")
        n = int(size.split(" x ")[0])
        call = elementwise_calls(n, n, DTYPES[dtype], device, lambda op: getattr(ops, op))[missed.provider][0]()
    else:
        return ""
    call()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiled:
        for _ in range(CALLS):
            call()
    table = profiled.key_averages().table(
        sort_by=f"self_{device.type}_time_total", row_limit=SHOWN, max_name_column_width=50
    )
    return f"{missed}, {CALLS} calls:\n{table}"
