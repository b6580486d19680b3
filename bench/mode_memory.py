"""Mode ``memory`` of ``run``: bytes per masked weight of every provider, for one layer and for several in a row.

``kept`` is what a step leaves behind beyond W, S and S.grad: a masked weight that is kept for the next micro-batch.
``scratch`` is what comes and goes on top of that, in bytes per weight of *one* layer: where it grows with the number of
layers, each of them holds some of it from forward to backward. In it are the blocks that csmask's C++ kernels work in,
which a thread keeps for all layers; ``scratch of a thread`` gives them alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from cases import Shape
from gpu_results import Context
from gpu_timing import Failure
from linear_providers import Layers
from linear_training import batch, checked_providers
from memory_meter import measure
from providers import Provider, saved_bytes

from csmask import _cpp_linear

LAYERS = 4
# Few tokens, so that activations are next to nothing beside weights.
TOKENS = 16
SIZES = {"cpu": (4096, ("fp32", "bf16")), "cuda": (4096, ("bf16",))}
# In the second of two micro-batches gradients, new gradients and kept weights meet.
MICRO_BATCHES = 2


def tasks(context: Context, options: argparse.Namespace) -> list[tuple[str, Callable[[], None]]]:
    size, dtypes = SIZES[options.device]
    if options.quick:
        size = 64
    found = [Shape(dtype, TOKENS, size, size) for dtype in dtypes]
    return [
        (f"memory {shape.name} of {count}", lambda s=shape, c=count: memory(context, s, c))
        for shape in found
        for count in (1, LAYERS)
    ]


def memory(context: Context, shape: Shape, count: int) -> None:
    """Measure every provider on ``count`` layers in a row; those whose numbers are wrong are left out."""
    torch.compiler.reset()
    single = Layers(shape, context.device, quick=context.toy)
    right = set(checked_providers(context, single))
    layers = Layers(shape, context.device, count, quick=context.toy)
    for name, make in layers.providers().items():
        if name not in right:
            continue
        try:
            _measure(context, layers, name, make)
        except Exception as error:  # noqa: BLE001, recorded
            context.fail(f"{name} memory {shape.name} of {count}", Failure.of(error))


def _measure(context: Context, layers: Layers, name: str, make: Callable[[], Provider]) -> None:
    shape, count = layers.shape, len(layers.weights)
    x = layers_name(shape, count)
    inputs, dout = batch(layers)

    def steps(provider: Provider, optimizer: bool) -> Provider:
        for _ in range(2):
            provider.step(inputs, dout, MICRO_BATCHES, optimizer)
        return provider

    steps(make(), True)  # compiled code and libraries' workspaces are made, and do not count
    provider = make()
    _cpp_linear.drop_scratch()  # so that it is asked for, and seen, where it is needed
    usage = measure(context.device, lambda: steps(provider, False))
    grads = sum(p.nbytes for p in provider.parameters)
    of_thread = _cpp_linear.drop_scratch()
    kept, scratch = usage.resident - grads - of_thread + _made_before(provider), usage.peak - usage.resident + of_thread

    def add(metric: str, size: int, weights: int) -> None:
        context.results.add("masked_linear", name, "memory", metric, "bytes/weight", x, size / weights)

    weights = shape.weights * count
    add("kept", kept, weights)
    add("scratch", scratch, shape.weights)
    add("scratch of a thread", of_thread, shape.weights)
    add("saved for backward", saved_bytes(make(), inputs, layers.weights), weights)
    provider = make()  # one that keeps nothing yet
    _cpp_linear.drop_scratch()
    # Everything: W, the parameter, its gradient, AdamW's states, and the peak of a step. dense has no other weight.
    held = sum(p.nbytes for p in provider.parameters) + _made_before(provider)
    held += 0 if name == "dense" else sum(w.nbytes for w in layers.weights)
    usage = measure(context.device, lambda: steps(provider, True))
    add("peak with AdamW", held + usage.peak, weights)


def _made_before(provider: Provider) -> int:
    """Bytes of masked weights that an optimizer makes as soon as it is made."""
    leaves = getattr(provider.optimizer, "leaves", ())
    return sum(leaf.value.nbytes for leaf in leaves if leaf.value is not None)


def layers_name(shape: Shape, count: int) -> str:
    """What rows call ``count`` layers of a shape in a row."""
    return f"{shape.name}, {count} layer{'s' if count > 1 else ''}"
