"""A training step of masks over a billion weights, on a CPU, in 16 GiB of memory.

A Llama-shaped model with random weights in bf16 gets a mask over every linear layer of its blocks: by default 17 blocks
of Llama-3.2-1B's shape, 1.03 billion masked weights. ``MaskAdamW(..., lean=True, state_bits=8)`` steps each layer
inside backward, so that what stays in memory are the weights (2 bytes each), the mask logits (4) and the optimizer's
states (2, or 8 with ``--state-bits 32``). What a run is for is its last line: the most memory that the process has had,
as the system counts it.

Run ``python examples/billion.py``; it takes some minutes and needs transformers besides csmask. ``--blocks 2`` is a
first try for small machines.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Iterator

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

from csmask import CircuitConfig, CircuitModel, MaskAdamW

GIB = 2**30


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=17, help="of the model (17)")
    parser.add_argument("--hidden", type=int, default=2048, help="features; the MLP has 4 times as many (2048)")
    parser.add_argument("--tokens", type=int, default=32, help="of the one sequence in a batch (32)")
    parser.add_argument("--steps", type=int, default=1, help="of training (1)")
    parser.add_argument("--state-bits", type=int, choices=(8, 32), default=8, help="of the optimizer's states (8)")
    parser.add_argument("--limit", type=float, default=16.0, help="GiB that the process may take at most (16)")
    return parser.parse_args(arguments)


def build(blocks: int, hidden: int) -> nn.Module:
    """The model, whose weights are made in bf16: never a copy in another dtype beside them."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=blocks,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 256), tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def shown(circuit: CircuitModel, steps: int) -> Iterator[int]:
    """The numbers of the steps, with a bar that moves with each layer's forward and each layer's backward."""
    layers = circuit.masked_layers.values()
    with tqdm(total=2 * steps * len(layers), unit="layer", file=sys.stderr) as bar:

        def watch(_layer: nn.Module, _inputs: tuple, output: torch.Tensor) -> None:
            bar.update()
            output.register_hook(lambda _: bar.update() and None)

        handles = [layer.register_forward_hook(watch) for layer in layers]
        yield from range(steps)
        for handle in handles:
            handle.remove()


def peak() -> float:
    """GiB of memory that the process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB


def main(arguments: list[str]) -> int:
    """Train and report; the exit status is 1 where the peak is over the limit."""
    options = parse(arguments)
    torch.manual_seed(0)
    started = peak()
    print(f"{started:.2f} GiB before the model; building it")
    config = CircuitConfig(target_layers="all-linear", mask_hparams={"mask_init_value": 0.05}, l0_lambda=1e-9)
    circuit = CircuitModel(config, build(options.blocks, options.hidden))
    optimizer = MaskAdamW(circuit.mask_parameters(), lr=0.01, lean=True, state_bits=options.state_bits)
    masked = sum(param.numel() for param in circuit.mask_parameters())
    print(f"{masked:,} masked weights in {len(circuit.masked_layers)} layers; {peak():.2f} GiB")
    begun = time.perf_counter()
    for step in shown(circuit, options.steps):
        circuit.temperature = 200 ** (step / max(1, options.steps - 1))
        tokens = torch.randint(circuit.config.vocab_size, (1, options.tokens))
        loss = circuit(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tqdm.write(f"step {step}: loss {loss.item():.4f}", file=sys.stdout)
    seconds = (time.perf_counter() - begun) / options.steps
    telemetry = optimizer.telemetry()
    print(f"{seconds:.1f} s per step; kept {telemetry['kept_fraction']:.2%}, l0 {telemetry['l0']:.4g}")
    per_weight = (peak() - started) * GIB / masked
    fits = peak() <= options.limit
    print(
        f"peak memory: {peak():.2f} GiB, {per_weight:.2f} bytes per masked weight beyond the first {started:.2f} GiB; "
        f"{'within' if fits else 'over'} {options.limit:g} GiB"
    )
    return int(not fits)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
