"""How long masking a large model takes, on the meta device: ``python bench/surgery.py [MODEL]``, a name or a config.

Masking touches no weight, so what is timed here is all that it costs beside the memory of the logits.
"""

from __future__ import annotations

import sys
import time

import torch

from csmask import CircuitConfig, CircuitModel
from csmask.plan import BUILT_IN, build, load_config


def main(source: str) -> None:
    """Print the time of masking all linear layers of a model, and of taking the masks off."""
    model = build(load_config(source), torch.bfloat16)
    start = time.perf_counter()
    circuit = CircuitModel(CircuitConfig(target_layers="all-linear"), model)
    masked = time.perf_counter()
    layers, maskable = len(circuit.masked_layers), sum(layer.maskable for layer in circuit.masked_layers.values())
    circuit.unload()
    end = time.perf_counter()
    print(f"{source}: {layers} layers, {maskable:,} weights; masked in {masked - start:.3f} s, ", end="")
    print(f"unloaded in {end - masked:.3f} s")


if __name__ == "__main__":
    for name in sys.argv[1:] or BUILT_IN:
        main(name)
