"""A circuit with transformers' Trainer: the script that trains a model, and the two lines that train masks instead.

A small ViT learns scikit-learn's 1,797 handwritten digits with a ``Trainer``. Then the same ``Trainer``, given a
``CircuitModel`` and a ``TemperatureCallback``, finds the weights that it reads them with. Everything else is the
Trainer's own: columns, evaluation (of the hard mask), logs, checkpoints (masks only), ``resume_from_checkpoint``.

Run ``python examples/trainer.py``; it takes half a minute on a CPU and needs accelerate and scikit-learn. Stop it
and run it with ``--resume``: the trained model is read back, and its masks go on from their last checkpoint.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset, random_split
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed
from transformers.trainer_utils import get_last_checkpoint

from csmask import CircuitConfig, CircuitEvaluation, CircuitModel, MaskAdamW, TemperatureCallback, evaluate_circuit


class Digits(Dataset):
    """Pictures of 8 x 8 pixels in [-1, 1]."""

    def __init__(self) -> None:
        data = load_digits()
        self.pixels = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
        self.labels = torch.tensor(data.target)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[i], "labels": self.labels[i]}


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of the pictures that are read right."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(arguments: Sequence[str] | None = None) -> CircuitEvaluation:
    """Train the model, then its circuit; returns the accuracies that it prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-epochs", type=int, default=30)
    parser.add_argument("--mask-epochs", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("runs/trainer"))
    parser.add_argument("--resume", action="store_true", help="go on with what an earlier run has left")
    options = parser.parse_args(arguments)

    set_seed(0)
    torch.set_num_threads(1)  # operations this small run slower on more
    train, test = random_split(Digits(), [1297, 500])
    shape = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    width = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    model = ViTForImageClassification(ViTConfig(**shape, **width))

    def settings(folder: str, epochs: int, lr: float) -> TrainingArguments:
        return TrainingArguments(
            str(options.output / folder), num_train_epochs=epochs, learning_rate=lr, per_device_train_batch_size=64,
            per_device_eval_batch_size=500, eval_strategy="epoch", save_strategy="epoch", save_total_limit=1,
            logging_steps=20, report_to="none",
        )  # fmt: skip

    data = {"train_dataset": train, "eval_dataset": test, "compute_metrics": accuracy}
    base, masks = options.output / "base", options.output / "circuit"
    if options.resume and base.is_dir():
        model = ViTForImageClassification.from_pretrained(base)
    else:
        dense = Trainer(model=model, args=settings("model", options.model_epochs, 2e-3), **data)
        dense.train()
        dense.save_model(str(base))
    if not options.resume:
        shutil.rmtree(masks, ignore_errors=True)  # checkpoints of masks over another model
    checkpoint = get_last_checkpoint(str(masks)) if masks.is_dir() else None

    # The two lines: a circuit for a model, and the callback that anneals it.
    config = CircuitConfig(target_layers="all-linear", mask_hparams={"mask_init_value": 0.05}, l0_lambda=2e-5)
    circuit = CircuitModel(config, model)
    trainer = Trainer(
        model=circuit, args=settings("circuit", options.mask_epochs, 0.1), **data,
        callbacks=[TemperatureCallback(max_temperature=200)],
        optimizer_cls_and_kwargs=(MaskAdamW, {"lr": 0.1}),  # or leave it out: AdamW works, too
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(options.output / "masks"))  # CircuitModel.from_pretrained(model, that folder)

    # A circuit is judged by what the model loses without it, beside what it loses without as many other weights.
    result = evaluate_circuit(circuit, lambda _: trainer.evaluate()["eval_accuracy"], seeds=range(3))
    print(result)
    return result


if __name__ == "__main__":
    main()
