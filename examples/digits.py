"""Which weights of a small ViT and a small ResNet read digits?

Both models are built from their transformers configs and trained, in seconds, on scikit-learn's 1,797 handwritten
digits of 8 x 8 pixels. Then their weights are frozen, and a binary mask over them is trained: over the linear layers of
the ViT, and over the 3 x 3 convolutions of the ResNet. For each, a table says what share of the test digits is read by

* full:    the model as it was trained;
* circuit: the weights that the mask keeps, the others set to zero;
* ablated: the opposite, the circuit set to zero (guessing would be right once in ten);
* random:  the model without as many weights from elsewhere, five times. That the model hardly minds losing these, and
  cannot do without the circuit, is what makes the circuit one.

Run ``python examples/digits.py``; it takes about a minute on a CPU and needs scikit-learn and matplotlib besides
csmask. What it leaves in ``digits-circuit`` can be loaded with::

    model = ViTForImageClassification.from_pretrained("digits-circuit/vit/model")
    circuit = CircuitModel.from_pretrained(model, "digits-circuit/vit/masks")
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from csmask import CircuitConfig, CircuitEvaluation, CircuitModel, TemperatureSchedule, evaluate_circuit

BATCH_SIZE = 64
TEST_PICTURES = 500
# Of masks: a learning rate for logits that start at 0.05 and need to move by a few tenths, and the price of keeping all
# weights, in units of the cross-entropy. Both models keep 3 to 20 % of their weights for prices of 1 to 8.
MASK_LEARNING_RATE = 0.1
L0_LAMBDA = 3.0


@dataclass(frozen=True)
class Digits:
    """Pictures ``(n, 1, 8, 8)`` in [-1, 1] and their digits ``(n,)``, for training and for test."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load() -> Digits:
    """scikit-learn's digits (they come with it), shuffled once, always alike."""
    data = load_digits()
    pixels = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:TEST_PICTURES], order[TEST_PICTURES:]
    return Digits((pixels[train], labels[train]), (pixels[test], labels[test]))


def vit() -> PreTrainedModel:
    """Three blocks of width 64 over 16 patches of 2 x 2 pixels."""
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            num_labels=10,
        )
    )


def resnet() -> PreTrainedModel:
    """Two basic blocks of 32 and 64 channels behind the usual 7 x 7 stem."""
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            embedding_size=32,
            hidden_sizes=[32, 64],
            depths=[1, 1],
            layer_type="basic",
            num_labels=10,
        )
    )


# name: how to build the model, learning rate, which layers are masked
MODELS = {
    "vit": (vit, 2e-3, "all-linear"),
    "resnet": (resnet, 3e-3, "resnet.encoder.*.layer.*.convolution"),
}


def batches(pictures: tuple[Tensor, Tensor], bar: Iterable[int]) -> Iterator[dict[str, Tensor]]:
    """One random batch per step of the progress bar, as a transformers image classifier takes it."""
    pixels, labels = pictures
    for _ in bar:
        chosen = torch.randint(len(labels), (BATCH_SIZE,))
        yield {"pixel_values": pixels[chosen], "labels": labels[chosen]}


def train_model(model: PreTrainedModel, digits: Digits, learning_rate: float, steps: int, name: str) -> None:
    """The ordinary training that makes the base model."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    bar = tqdm(range(steps), desc=f"{name}: training the model")
    for batch in batches(digits.train, bar):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def train_masks(circuit: CircuitModel, digits: Digits, steps: int, name: str) -> None:
    """The mask training: soft masks become hard ones as the temperature rises, and the l0 term makes them sparse."""
    optimizer = torch.optim.Adam(circuit.mask_parameters(), lr=MASK_LEARNING_RATE)
    schedule = TemperatureSchedule(circuit, total=steps)
    bar = tqdm(range(steps), desc=f"{name}: training the masks")
    for batch in batches(digits.train, bar):
        loss = circuit(**batch).loss  # cross-entropy plus the l0 term
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", T=f"{circuit.temperature:.0f}", kept=f"{circuit.density():.1%}")


def find_circuit(
    name: str, digits: Digits, seed: int, model_steps: int, mask_steps: int, output: Path
) -> CircuitEvaluation:
    """Train a model and masks over it, save both, and evaluate the circuit on the test pictures."""
    build, learning_rate, target_layers = MODELS[name]
    torch.manual_seed(seed)
    model = build()
    train_model(model, digits, learning_rate, model_steps, name)
    model.save_pretrained(output / name / "model")

    config = CircuitConfig(
        mask_hparams={"mask_init_value": 0.05},
        target_layers=target_layers,
        l0_lambda=L0_LAMBDA,
        l0_reduction="mean",
    )
    circuit = CircuitModel(config, model)
    train_masks(circuit, digits, mask_steps, name)
    circuit.save_pretrained(output / name / "masks")

    pixels, labels = digits.test

    def accuracy(circuit: CircuitModel) -> float:
        predicted = circuit(pixel_values=pixels).logits.argmax(-1)
        return (predicted == labels).float().mean().item()

    return evaluate_circuit(circuit, accuracy, seeds=range(seed, seed + 5))


def draw(evaluations: dict[str, CircuitEvaluation], path: Path) -> None:
    """The four accuracies of each model, with the spread of the random controls."""
    figure = Figure(figsize=(4.2 * len(evaluations), 3.6), layout="constrained")
    panels = figure.subplots(1, len(evaluations), sharey=True, squeeze=False)[0]
    for axes, (name, evaluation) in zip(panels, evaluations.items(), strict=True):
        for x, row in enumerate(evaluation.rows):
            axes.bar(x, row.mean, yerr=row.spread or None, capsize=4, color=f"C{x}")
            axes.text(x, row.mean + row.spread + 0.02, f"{row.mean:.3f}", ha="center")
        axes.set_xticks(range(4), [f"{row.name}\n{row.kept:.0%} kept" for row in evaluation.rows])
        axes.axhline(0.1, color="black", linestyle=":", linewidth=1)
        axes.set(title=f"{name}: selectivity {evaluation.selectivity:.2f}", ylim=(0, 1.12))
    panels[0].set_ylabel("accuracy on test digits (dotted: guessing)")
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> dict[str, CircuitEvaluation]:
    """Run the example; returns the evaluation of each model's circuit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of models, batches, masks and controls")
    parser.add_argument(
        "--output", type=Path, default=Path("digits-circuit"), help="folder for figure, models and masks"
    )
    parser.add_argument("--model-steps", type=int, default=400, help="steps of training each model")
    parser.add_argument("--mask-steps", type=int, default=300, help="steps of training its masks")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # faster for layers this small: threads would wait for each other most of the time

    digits, evaluations = load(), {}
    for name in MODELS:
        evaluations[name] = find_circuit(
            name, digits, options.seed, options.model_steps, options.mask_steps, options.output
        )
        print(f"\n{name}, {len(digits.test[1])} test digits\n{evaluations[name]}\n")
    draw(evaluations, options.output / "accuracy.png")
    (options.output / "results.json").write_text(
        json.dumps({name: evaluation.to_dict() for name, evaluation in evaluations.items()}, indent=2)
    )
    print(f"figure, numbers, models and masks are in {options.output.resolve()}")
    return evaluations


if __name__ == "__main__":
    main()
