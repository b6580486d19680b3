"""How far the demo's circuit with AdamW's states in 8 bits is from the one with states in 32 bits.

    python bench/state_bits.py --steps 200

Trains the demo's masks twice over MiniLM (``csmask demo``'s model, items, seed and schedule over that many steps), and
prints on how many weights the hard masks agree and how far the logits are apart: the norm of their difference by that
of the logits. Needs what ``make demo`` installs.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from csmask import CircuitConfig, CircuitModel, MaskAdamW
from csmask.demo import noun_verb, train


def trained_logits(task: noun_verb.Task, settings: train.Settings, state_bits: int) -> Tensor:
    """All logits after a training of the demo, one dimension."""
    config = CircuitConfig(
        mask_hparams={"mask_init_value": settings.mask_init_value}, target_layers="all-linear",
        l0_lambda=settings.l0_lambda, l0_reduction="mean",
    )  # fmt: skip
    circuit = CircuitModel(config, task.model)
    try:
        with tempfile.TemporaryDirectory() as folder:
            training = train.MaskTraining(circuit, task.head, task.train, settings, Path(folder) / "state")
            optimizer = MaskAdamW(circuit.mask_parameters(), lr=settings.learning_rate, state_bits=state_bits)
            training.optimizer = optimizer
            while training.done < settings.steps:
                training.step()
        return torch.cat([param.detach().flatten() for param in circuit.mask_parameters()]).cpu()
    finally:
        circuit.unload()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    task = noun_verb.prepare(options.device)
    logits = functools.partial(trained_logits, task, train.Settings(seed=options.seed, steps=options.steps))
    want, got = logits(32), logits(8)
    agreement = ((got > 0) == (want > 0)).double().mean().item()
    print(f"{options.steps} steps, mask seed {options.seed}: the hard masks agree on {agreement:.3%} of the weights")
    print(f"kept: {(want > 0).double().mean():.3%} with 32 bits, {(got > 0).double().mean():.3%} with 8")
    print(f"logits: {(got - want).norm() / want.norm():.2%} apart")


if __name__ == "__main__":
    main()
