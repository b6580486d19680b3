"""What the host does for each masked layer of a training step on a GPU, measured without one.

    python bench/host_time.py [--layers 73] [--repeats 40] [--profile PROVIDER]

Small models are as fast as the host launches their kernels. A model of many tiny linear layers is trained on tensors of
the CPU, for which csmask's kernels are planned, compiled and "launched" as for an H200, by a driver that does nothing
(``stub_gpu``). PyTorch's own operations run; they are tiny, but what they compute is in the times: read the differences
to dense, and ratios of two runs. A GPU's launches take a few microseconds each on top, dense training's too.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import pstats
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from compile_launch import TARGETS
from csmask_kernels.launch import is_interpreted
from gpu_transformers import EagerMaskedLinear
from stub_gpu import stub_gpu
from torch import Tensor, nn

from csmask import CircuitConfig, CircuitModel, MaskAdamW

WIDTH, ROWS = 16, 4
PROVIDERS = ("dense", "eager", "per_step", "per_forward", "in_kernel", "neuron")
Phases = tuple[float, float, float]


class Tower(nn.Module):
    """Linear layers in a row; returns a loss, as models of transformers do."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(layers)])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.layers(x).square().mean()}


def training_step(provider: str, layers: int, own_loss: bool) -> Callable[[], Phases]:
    """A call that trains for one step and gives the seconds of forward, backward and step.

    Args:
        own_loss: the l0 term is added by the script (``circuit.l0()``), not by the circuit's forward.
    """
    model: Any = Tower(layers)
    parameters = list(model.parameters())
    eager: list[EagerMaskedLinear] = []
    if provider == "eager":
        eager = [EagerMaskedLinear(linear, compiled=False) for linear in model.layers]
        model.layers = nn.Sequential(*eager)
        parameters = [layer.mask_logits for layer in eager]
    elif provider != "dense":
        execution = "auto" if provider in ("per_step", "neuron") else provider
        unit = {"mask_unit": "neuron"} if provider == "neuron" else {}
        config = CircuitConfig(
            target_layers="all-linear", execution=execution, mask_hparams=unit, l0_lambda=1e-6, add_l0=not own_loss
        )
        model = CircuitModel(config, model)
        parameters = model.mask_parameters()
    kind = MaskAdamW if provider == "per_step" else torch.optim.AdamW
    optimizer = kind(parameters, lr=1e-3)
    x = torch.randn(ROWS, WIDTH)

    def step() -> Phases:
        start = time.perf_counter()
        loss = model(x)["loss"]
        if eager:
            loss = loss + 1e-6 * torch.stack([layer.l0() for layer in eager]).sum()
        elif own_loss and provider != "dense":
            loss = loss + 1e-6 * model.l0()
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        return forward - start, backward - forward, time.perf_counter() - backward

    return step


def measure(steps: dict[str, Callable[[], Phases]], layers: int, repeats: int) -> dict[str, Phases]:
    """Medians in microseconds per layer; the steps take turns, so that all meet the same machine."""
    for step in steps.values():
        for _ in range(3):
            step()
    found: dict[str, list[Phases]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            found[name].append(step())
    return {
        name: tuple(statistics.median(phase) * 1e6 / layers for phase in zip(*rows, strict=True))  # type: ignore[misc]
        for name, rows in found.items()
    }


def profile(step: Callable[[], Phases], repeats: int) -> None:
    """Print where the host's time goes."""
    for _ in range(3):
        step()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(repeats):
        step()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=73, help="of the model (%(default)s: BERT-base's)")
    parser.add_argument("--repeats", type=int, default=40, help="steps of each provider (%(default)s)")
    parser.add_argument("--profile", choices=PROVIDERS, help="print where one provider's time goes instead")
    options = parser.parse_args()
    if is_interpreted():
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    if options.layers < 1 or options.repeats < 1:
        parser.error("--layers and --repeats must be 1 or more")
    with stub_gpu(dataclasses.replace(TARGETS["sm_90"], name="NVIDIA H200")):
        if options.profile:
            profile(training_step(options.profile, options.layers, own_loss=False), options.repeats)
            return
        for own_loss in (False, True):
            steps = {name: training_step(name, options.layers, own_loss) for name in PROVIDERS}
            print(f"\nl0 added by {'the script' if own_loss else 'the circuit'}; microseconds per layer")
            print(f"{'':12} {'forward':>8} {'backward':>8} {'step':>8} {'sum':>8} {'over dense':>10}")
            found = measure(steps, options.layers, options.repeats)
            dense = sum(found["dense"])
            for name, phases in found.items():
                cells = " ".join(f"{value:8.1f}" for value in (*phases, sum(phases)))
                print(f"{name:12} {cells} {sum(phases) - dense:10.1f}")


if __name__ == "__main__":
    main()
