"""A circuit in a plain Accelerate loop: one script for one process and for many.

A small network learns scikit-learn's 1,797 handwritten digits; then the masks over its frozen weights are trained. The
loop is Accelerate's own, ``prepare``, ``accumulate`` and ``backward``; what is csmask's are the circuit, which takes
the place of the model, its optimizer, which any other could replace, and the schedule of the temperature.

Run it as ``python examples/accelerate_loop.py``, or in several processes::

    accelerate launch --num_processes 2 examples/accelerate_loop.py --cpu

It takes half a minute on a CPU and needs accelerate and scikit-learn.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from csmask import CircuitConfig, CircuitModel, MaskAdamW, TemperatureSchedule


def network() -> nn.Module:
    """64 pixels to 10 digits."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


@torch.no_grad()
def accuracy(accelerator: Accelerator, model: nn.Module, loader: DataLoader) -> float:
    """Share of the digits, over all processes, that are read right; of a circuit, with its hard masks."""
    model.eval()
    right = [accelerator.gather_for_metrics(model(x).argmax(-1) == y) for x, y in loader]
    return torch.cat(right).float().mean().item()


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train the network, then its circuit; returns accuracies and the kept fraction."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-epochs", type=int, default=30)
    parser.add_argument("--mask-epochs", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("runs/accelerate"))
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    options = parser.parse_args(arguments)

    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=options.cpu)
    set_seed(0)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    train_set, test_set = random_split(data, [1297, 500])
    size = 64 // accelerator.num_processes // accelerator.gradient_accumulation_steps
    # drop_last: accelerator.backward divides by the micro-batches of a full step, also where an epoch ends with fewer.
    train = DataLoader(train_set, batch_size=size, shuffle=True, drop_last=True)
    test = DataLoader(test_set, batch_size=250)
    train, test = accelerator.prepare(train, test)

    # The network itself, as anyone would train it.
    network_ = network()
    model, optimizer = accelerator.prepare(network_, torch.optim.AdamW(network_.parameters(), lr=2e-3))
    for _ in range(options.model_epochs):
        model.train()
        for x, y in train:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
    result = {"full": accuracy(accelerator, model, test)}

    # Its circuit. The network returns no loss that a term could be added to: the loop adds it.
    config = CircuitConfig(target_layers="all", mask_hparams={"mask_init_value": 0.05}, l0_lambda=1e-5)
    circuit = CircuitModel(config, accelerator.unwrap_model(model))
    model, optimizer = accelerator.prepare(circuit, MaskAdamW(circuit.mask_parameters(), lr=0.05))
    steps = options.mask_epochs * -(-len(train) // accelerator.gradient_accumulation_steps)
    schedule = TemperatureSchedule(circuit, total=steps)
    for _ in range(options.mask_epochs):
        model.train()
        for x, y in train:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(x), y) + circuit.l0_lambda * circuit.l0()
                accelerator.backward(loss)  # divides by the number of micro-batches: the term counts once
                optimizer.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    schedule.step()

    result |= {"circuit": accuracy(accelerator, model, test), "kept": circuit.density()}
    circuit.set_ablate_mode("zero_ablate")
    result["ablated"] = accuracy(accelerator, model, test)
    if accelerator.is_main_process:
        circuit.save_pretrained(options.output)
    accelerator.print(", ".join(f"{name} {value:.3f}" for name, value in result.items()))
    accelerator.end_training()
    return result


if __name__ == "__main__":
    main()
