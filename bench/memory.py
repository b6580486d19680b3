"""Bytes per masked weight of every way to train masks, counted in the allocator, in one table.

    python bench/memory.py [--device cpu] [--weights 1e8] [--size 2048] [--dtype bf16]

A training step is forward, backward and AdamW on one micro-batch of few tokens, through linear layers in a row. ``after
a step`` is what is there between two steps, ``at the peak`` the most that was there during one: weights, logits,
gradients, states, masked weights, and all else that was allocated; activations are next to nothing beside them. Two
steps are counted, so that states are there in the second one. Rows are appended to ``OUTPUT/<device>_memory.csv``, and
``bench/report.py`` writes the README's table from them.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

# Before torch is loaded: its profiler writes to stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from cases import DTYPES, Shape, device_name
from gpu_results import version
from linear_providers import Layers
from linear_training import batch
from memory_meter import measure
from providers import Provider
from readme_table import MEMORY_METRICS, memory_table
from run import DEFAULT_OUTPUT
from table import Table
from tqdm import tqdm

from csmask import _cpp_linear

MODE = "training"
# Few tokens, so that activations are next to nothing beside weights.
TOKENS = 16
WAYS = ("eager", "eager (plain)", "compile", "per_forward", "per_step", "lean", "lean, 8-bit states")
STEPS = 2


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--weights", type=float, default=1e8, help="masked weights, at least (1e8)")
    parser.add_argument("--size", type=int, default=2048, help="of the square layers that they are in (2048)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="of the weights (bf16)")
    parser.add_argument("--quick", action="store_true", help="compile for nobody's speed, but at once")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIR", help="(bench/results)")
    options = parser.parse_args(arguments)
    if options.size < 1 or options.weights < 1:
        parser.error(f"--size and --weights must be positive, got {options.size} and {options.weights:g}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use, and there is none; use --device cpu")
    return options


def main(arguments: list[str]) -> int:
    """Measure and print; see the module's docstring. 130 after Ctrl-C, 1 if something failed, else 0."""
    options = parse(arguments)
    torch.manual_seed(0)
    device = torch.device(options.device)
    shape = Shape(options.dtype, TOKENS, options.size, options.size)
    count = -(-int(options.weights) // shape.weights)
    layers = Layers(shape, device, count, quick=options.quick)
    results = Table(options.output / f"{options.device}_memory.csv", device_name(device))
    print(f"{results.gpu}; {version()}")
    x = f"{options.dtype}, {count} layers of {options.size} x {options.size}"
    found = {**layers.providers(), **layers.lean_providers()}
    made = {name: found[name] for name in WAYS if name in found}
    failed = False
    try:
        for name, make in (progress := tqdm(made.items(), unit="way", file=sys.stderr, disable=None)):
            progress.set_description(name)
            try:
                figures = bytes_of(make, layers)
            except Exception as error:  # noqa: BLE001, said, and the next one is measured
                failed = True
                tqdm.write(f"FAILED {name}: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            for metric, size in zip(MEMORY_METRICS, figures, strict=True):
                results.add("masked_linear", name, MODE, metric, "bytes/weight", x, size / (shape.weights * count))
    except KeyboardInterrupt:
        return 130
    finally:
        results.save()
    print(memory_table(results.rows))
    print(f"{len(results.rows)} rows are in {results.path}")
    return int(failed)


def bytes_of(make: Callable[[], Provider], layers: Layers) -> tuple[int, int]:
    """All bytes after a step and at the peak of a step, weights included."""
    inputs, dout = batch(layers)

    def steps(provider: Provider) -> None:
        for _ in range(STEPS):
            provider.step(inputs, dout, 1)
        provider.zero_grad()

    steps(make())  # compiled code and libraries' workspaces are made, and do not count
    gc.collect()
    built: list[Provider] = []
    made = measure(layers.device, lambda: built.append(make())).resident
    held = made + sum(weight.nbytes for weight in layers.weights)
    _cpp_linear.drop_scratch()  # so that it is asked for, and seen, where it is needed
    usage = measure(layers.device, lambda: steps(built[0]))
    return held + usage.resident, held + usage.peak


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
