"""examples/trainer.py: runs as a script would, its circuit is one by its numbers, and a stopped run goes on."""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from csmask import CircuitModel, TemperatureCallback

pytest.importorskip("sklearn", reason="the example needs scikit-learn")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
from transformers import ViTForImageClassification

CHANCE = 0.1  # ten digits
EPOCHS = 6
STEPS = EPOCHS * 21  # 1,297 pictures in batches of 64


class Watched(TemperatureCallback):
    """Notes which steps are taken; Ctrl-C after the checkpoint of the third epoch, once."""

    steps: ClassVar[list[int]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        super().on_step_begin(args, state, control, **kwargs)
        self.steps.append(state.global_step)

    def on_save(self, args, state, control, **kwargs):
        if self.steps == list(range(STEPS // 2)):
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[1] / "examples" / "trainer.py"
    spec = importlib.util.spec_from_file_location("trainer_example", path)
    sys.modules["trainer_example"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.TrainingArguments = functools.partial(module.TrainingArguments, use_cpu=True)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)
    del sys.modules["trainer_example"]


@pytest.fixture(scope="module")
def runs(example, tmp_path_factory):
    """One run that is stopped and goes on, and one over the same model that is not stopped: folders and results."""
    stopped, whole = tmp_path_factory.mktemp("stopped"), tmp_path_factory.mktemp("whole")
    small = ["--model-epochs", "8", "--mask-epochs", str(EPOCHS), "--output"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "TemperatureCallback", Watched)
        with pytest.raises(KeyboardInterrupt):
            example.main([*small, str(stopped)])
        shutil.copytree(stopped / "base", whole / "base")
        resumed = example.main([*small, str(stopped), "--resume"])
        assert Watched.steps == list(range(STEPS))
    return stopped, resumed, whole, example.main([*small, str(whole), "--resume"])


def test_the_circuit_reads_digits_and_the_model_without_it_guesses(runs):
    result = runs[1]
    assert result.full.mean > 0.7
    assert result.circuit.mean > result.full.mean - 0.15
    assert 0.02 < result.circuit.kept < 0.4
    assert result.ablated.mean < 2 * CHANCE
    # A random circuit of equal size takes less of it away.
    assert result.random.mean > result.ablated.mean + 0.2
    assert len(result.random.scores) == 3


def test_a_resumed_run_is_the_run_that_was_not_stopped(runs):
    stopped, resumed, whole, uninterrupted = runs
    assert resumed == uninterrupted
    histories = [
        json.loads((folder / "circuit" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
        for folder in (stopped, whole)
    ]
    # What is logged first after a stop is the mean of fewer steps: those since the checkpoint.
    losses, others = (
        [(e["step"], e["loss"], e["temperature"]) for e in history if "loss" in e and e["step"] > STEPS // 2 + 20]
        for history in histories
    )
    assert losses == others
    assert [step for step, *_ in losses] == [100, 120]


def test_the_saved_masks_give_the_printed_numbers(runs, example):
    folder, result = runs[:2]
    model = ViTForImageClassification.from_pretrained(folder / "base")
    circuit = CircuitModel.from_pretrained(model, folder / "masks")
    assert circuit.density() == result.circuit.kept
    assert circuit.temperature == 200.0
    example.set_seed(0)
    test = example.random_split(example.Digits(), [1297, 500])[1]
    batch = {name: torch.stack([row[name] for row in test]) for name in ("pixel_values", "labels")}
    for mode, expected in (("none", result.circuit.mean), ("zero_ablate", result.ablated.mean)):
        circuit.set_ablate_mode(mode)
        with torch.no_grad():
            right = circuit(**batch).logits.argmax(-1) == batch["labels"]
        assert right.double().mean().item() == pytest.approx(expected, abs=1e-3)
