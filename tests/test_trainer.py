"""Circuits under transformers' Trainer, with no arguments that are csmask's own: against loops written by hand."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import MODELS
from torch import nn

from csmask import CircuitConfig, CircuitModel, MaskAdamW, TemperatureCallback
from csmask.schedule import temperature_at

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
from transformers import Trainer, TrainingArguments

TESTS = Path(__file__).parent
L0_LAMBDA = 2e-4  # the term is about as large as the loss
FAMILIES = ("bert", "gpt2", "llama", "vit", "resnet", "bart")
LANGUAGE = ("gpt2", "llama")
every_family = pytest.mark.parametrize("family", FAMILIES)


def rows(family: str, count: int = 16) -> list[dict]:
    """A dataset, with a column that no model takes; language models have rows with few labels."""
    found = []
    for seed in range(math.ceil(count / 3)):
        batch = MODELS[family].batch(seed)
        for i in range(3):
            row = {name: value[i] for name, value in batch.items()}
            if family in LANGUAGE:
                row["labels"] = row["labels"].clone()
                row["labels"][: (seed + i) % 5] = -100
            found.append({**row, "note": "not for the model"})
    return found[:count]


def build(family: str, **config) -> CircuitModel:
    tiny = MODELS[family]
    settings = {"l0_lambda": L0_LAMBDA, "mask_hparams": {"mask_init_value": 0.1}, **config}
    return CircuitModel(CircuitConfig(target_layers=list(tiny.targets), **settings), tiny.build(dropout=0.1))


def arguments(folder: Path, size: int = 8, accumulate: int = 1, **more) -> TrainingArguments:
    settings = {
        "num_train_epochs": 3, "learning_rate": 0.05, "lr_scheduler_type": "constant", "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "max_grad_norm": 0,
        "train_sampling_strategy": "sequential", **more,
    }  # fmt: skip
    return TrainingArguments(
        str(folder), per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, **settings
    )


def sgd(circuit: CircuitModel, lr: float = 0.05) -> tuple:
    return torch.optim.SGD(circuit.mask_parameters(), lr=lr), None


def train(circuit: CircuitModel, args: TrainingArguments, family: str, resume=None, **more) -> Trainer:
    more.setdefault("callbacks", [TemperatureCallback(max_temperature=20.0)])
    trainer = Trainer(model=circuit, args=args, train_dataset=rows(family), **more)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logits(circuit: CircuitModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in circuit.mask_parameters()])


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_hand(family: str, criterion=None, steps: int = 6, lr: float = 0.05) -> tuple[torch.Tensor, list[float]]:
    """The same training on plain torch: batches of 8, the l0 term added once to each."""
    circuit = build(family, execution="reference", add_l0=False)
    optimizer, data, found = sgd(circuit, lr)[0], rows(family), []
    for t in range(steps):
        circuit.temperature = temperature_at(t, steps, 20.0)
        chosen = data[8 * (t % 2) : 8 * (t % 2) + 8]
        batch = {name: torch.stack([row[name] for row in chosen]) for name in chosen[0] if name != "note"}
        loss = circuit(**batch).loss if criterion is None else criterion(circuit, batch)
        masks = [torch.sigmoid(layer.temperature * layer.mask_logits) for layer in circuit.masked_layers.values()]
        loss = loss + L0_LAMBDA * sum(mask.sum() for mask in masks)
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        found.append(loss.item())
    return logits(circuit), found


def assert_close(got: torch.Tensor, want: torch.Tensor, start: float = 0.1, bound: float = 1e-5) -> None:
    """What training moved, within a bound of the largest move."""
    error, moved = (got - want).abs().max(), (want - start).abs().max()
    assert moved > 1e-3
    assert error <= bound * moved + 1e-7, f"{error:.3g} of {moved:.3g}"


@pytest.mark.dropin
@pytest.mark.parametrize("accumulate", [1, 4], ids=["1x8", "4x2"])
@every_family
def test_accumulated_steps_are_those_of_the_large_batch(family, accumulate, tmp_path):
    circuit = build(family)
    args = arguments(tmp_path, 8 // accumulate, accumulate)
    trainer = train(circuit, args, family, optimizers=sgd(circuit))
    want, want_losses = by_hand(family)
    assert_close(logits(circuit), want)
    assert losses(trainer) == pytest.approx(want_losses, rel=1e-5)


@pytest.mark.dropin
def test_a_last_step_of_fewer_micro_batches(tmp_path):
    """Ten rows in micro-batches of 2, four to a step: the second step has one."""
    circuit = build("gpt2")
    data = rows("gpt2", 10)
    Trainer(
        model=circuit, args=arguments(tmp_path, 2, 4, num_train_epochs=1), train_dataset=data,
        callbacks=[TemperatureCallback(20.0)], optimizers=sgd(circuit),
    ).train()  # fmt: skip
    want = build("gpt2", execution="reference", add_l0=False)
    optimizer = sgd(want)[0]
    for t, chosen in enumerate((data[:8], data[8:])):
        want.temperature = temperature_at(t, 2, 20.0)
        batch = {name: torch.stack([row[name] for row in chosen]) for name in ("input_ids", "labels")}
        (want(**batch).loss + L0_LAMBDA * want.l0()).backward()
        optimizer.step(), optimizer.zero_grad()
    assert_close(logits(circuit), logits(want))


@pytest.mark.dropin
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_two_processes_train_as_one(family, tmp_path):
    """2 x 4 rows, each process with its half: the same logits and logged losses as by hand."""
    # torchrun finds a port and keeps it: one that is found free here may be taken a moment later.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, family, str(tmp_path)], env=variables, capture_output=True, text=True, timeout=300, cwd=TESTS
    )
    assert run.returncode == 0, run.stderr
    want, want_losses = by_hand(family)
    got = torch.load(tmp_path / "result.pt", weights_only=True)
    assert_close(got["logits"], want)
    assert got["losses"] == pytest.approx(want_losses, rel=1e-5)


def one_of_two(family: str, folder: str) -> None:
    """What each of two processes runs."""
    torch.set_num_threads(1)
    circuit = build(family)
    args = arguments(Path(folder), 4, ddp_backend="gloo", ddp_find_unused_parameters=False)
    trainer = Trainer(
        model=circuit, args=args, train_dataset=rows(family), callbacks=[TemperatureCallback(20.0)],
        optimizers=sgd(circuit), data_collator=None,
    )  # fmt: skip
    trainer.train()
    if args.process_index == 0:
        torch.save({"logits": logits(circuit), "losses": losses(trainer)}, Path(folder) / "result.pt")
    torch.distributed.barrier()
    os._exit(0)  # a process group of gloo that is taken down by Python now and then waits for itself, or aborts


@pytest.mark.dropin
@pytest.mark.parametrize("how", ["optimizers", "optimizer_cls_and_kwargs"])
@pytest.mark.parametrize("max_grad_norm", [0, 1e-3], ids=["unclipped", "clipped"])
def test_mask_adamw_trains_as_adamw(how, max_grad_norm, tmp_path):
    got, want = build("bert"), build("bert", execution="reference")
    args = arguments(tmp_path, 2, 4, max_grad_norm=max_grad_norm, adam_epsilon=1e-4)
    adamw = {"lr": 0.05, "eps": 1e-4}
    if how == "optimizers":
        train(got, args, "bert", optimizers=(MaskAdamW(got.mask_parameters(), **adamw), None))
    else:
        train(got, args, "bert", optimizer_cls_and_kwargs=(MaskAdamW, adamw))
    train(want, args, "bert", optimizers=(torch.optim.AdamW(want.mask_parameters(), weight_decay=0, **adamw), None))
    assert {layer.execution for layer in got.masked_layers.values()} == {"per_step"}
    assert_close(logits(got), logits(want), bound=1e-4)


def smoothed(circuit: CircuitModel, batch: dict) -> torch.Tensor:
    """Label smoothing of 0.2 from its definition."""
    labels, inputs = batch["labels"], {name: value for name, value in batch.items() if name != "labels"}
    out = circuit(**inputs).logits
    if out.dim() == 3:
        out, labels = out[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    out, labels = out[labels != -100], labels[labels != -100]
    return nn.functional.cross_entropy(out, labels, label_smoothing=0.2)


@pytest.mark.dropin
@pytest.mark.parametrize("accumulate", [1, 4], ids=["1x8", "4x2"])
@pytest.mark.parametrize("family", ["gpt2", "vit"])
def test_label_smoothing_keeps_the_l0_term(family, accumulate, tmp_path):
    if family == "gpt2" and accumulate > 1:
        pytest.skip("transformers' smoother takes the mean of each micro-batch, which have different numbers of labels")
    circuit = build(family)
    args = arguments(tmp_path, 8 // accumulate, accumulate, label_smoothing_factor=0.2)
    train(circuit, args, family, optimizers=sgd(circuit))
    assert_close(logits(circuit), by_hand(family, smoothed)[0])


@pytest.mark.dropin
@pytest.mark.parametrize("takes_l0", [False, True], ids=["csmask adds l0", "the function adds l0"])
@pytest.mark.parametrize("accumulate", [1, 4], ids=["1x8", "4x2"])
def test_a_loss_function_of_the_user(takes_l0, accumulate, tmp_path):
    """The l0 term enters once per step, whether or not the function adds it itself."""
    circuit = build("vit")

    def function(outputs, labels, num_items_in_batch=None):
        loss = nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch
        return loss + circuit.l0_lambda * circuit.l0() / accumulate if takes_l0 else loss

    args = arguments(tmp_path, 8 // accumulate, accumulate)
    train(circuit, args, "vit", optimizers=sgd(circuit), compute_loss_func=function)
    assert_close(logits(circuit), by_hand("vit")[0])
    assert circuit.l0_rider is None


class Own(Trainer):
    """Its loss is computed from the outputs, though forward has computed one: a weighted or focal loss, say."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class Distilling(Trainer):
    """Two forwards for each step, of which the first has no gradient."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        model(**inputs).logits.detach()
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


class Adding(Own):
    """Adds the loss of forward, with its l0 term, to one of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        own = nn.functional.cross_entropy(outputs.logits, inputs["labels"])
        loss = 0.5 * own + 0.5 * (outputs.loss - outputs.loss.detach()) + outputs.loss.detach() * 0.5
        return (loss, outputs) if return_outputs else loss


@pytest.mark.dropin
@pytest.mark.parametrize("kind", [Own, Distilling])
def test_a_trainer_with_a_loss_of_its_own_keeps_the_l0_term(kind, tmp_path):
    circuit = build("vit")
    kind(
        model=circuit, args=arguments(tmp_path), train_dataset=rows("vit"), optimizers=sgd(circuit),
        callbacks=[TemperatureCallback(20.0)],
    ).train()  # fmt: skip
    assert_close(logits(circuit), by_hand("vit")[0])


@pytest.mark.dropin
def test_a_term_that_is_in_the_loss_does_not_ride_too(tmp_path):
    """Half of forward's loss, and half of one of its own: half of the term, not more."""
    circuit = build("vit")
    Adding(
        model=circuit, args=arguments(tmp_path), train_dataset=rows("vit"), optimizers=sgd(circuit),
        callbacks=[TemperatureCallback(20.0)],
    ).train()  # fmt: skip
    want = build("vit", execution="reference", add_l0=False)
    optimizer, data = sgd(want)[0], rows("vit")
    for t in range(6):
        want.temperature = temperature_at(t, 6, 20.0)
        chosen = data[8 * (t % 2) : 8 * (t % 2) + 8]
        batch = {name: torch.stack([row[name] for row in chosen]) for name in ("pixel_values", "labels")}
        (want(**batch).loss + 0.5 * L0_LAMBDA * want.l0()).backward()
        optimizer.step(), optimizer.zero_grad()
    assert_close(logits(circuit), logits(want))


@pytest.mark.dropin
@pytest.mark.parametrize("look", ["telemetry", "l0 without gradient", "hidden states"])
def test_a_loss_function_that_only_looks_at_l0(look, tmp_path):
    circuit = build("vit")
    if look == "hidden states":
        circuit.wrapped_model.config.output_hidden_states = True

    def function(outputs, labels, num_items_in_batch=None):
        if look == "telemetry":
            circuit.telemetry()
        with torch.no_grad():
            circuit.l0().item()
        return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    train(circuit, arguments(tmp_path, 4, 2), "vit", optimizers=sgd(circuit), compute_loss_func=function)
    assert_close(logits(circuit), by_hand("vit")[0])


def test_a_step_without_the_l0_term_is_warned_of(tmp_path):
    circuit = build("vit")
    function = lambda outputs, labels, num_items_in_batch=None: circuit.mask_parameters()[0].square().sum()  # noqa: E731
    with pytest.warns(UserWarning, match="l0 term had no part in this optimizer step"):
        train(circuit, arguments(tmp_path), "vit", optimizers=sgd(circuit), compute_loss_func=function)
    args = arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.warns(UserWarning, match=r"callbacks=\[TemperatureCallback\(\)\] to the Trainer"):
        train(build("vit"), args, "vit", callbacks=[])


@pytest.mark.parametrize("delegates", ["labels and kwargs", "super"])
@pytest.mark.dropin
def test_a_forward_that_delegates_its_loss_counts_labels(delegates, tmp_path):
    # Each in a class of its own: csmask reads the source of a forward.
    base = type(MODELS["gpt2"].build())

    class Passing(base):
        def forward(self, input_ids=None, labels=None, **kwargs):
            return base.forward(self, input_ids, labels=labels, **kwargs)

    class Extending(base):
        def forward(self, input_ids=None, labels=None, **kwargs):
            return super().forward(input_ids=input_ids, labels=labels, **kwargs)

    def run(folder, size, accumulate):
        model = MODELS["gpt2"].build(dropout=0.1)
        model.__class__ = Extending if delegates == "super" else Passing
        circuit = CircuitModel(CircuitConfig(target_layers=list(MODELS["gpt2"].targets), l0_lambda=L0_LAMBDA), model)
        return losses(train(circuit, arguments(folder, size, accumulate), "gpt2", optimizers=sgd(circuit)))

    assert run(tmp_path / "a", 2, 4) == pytest.approx(run(tmp_path / "b", 8, 1), rel=1e-5)


@pytest.mark.dropin
def test_adapters_under_a_circuit_leave_label_smoothing_and_columns_as_they_are(tmp_path):
    """Trainer goes by the class's name and the forward's arguments: those of the model that has adapters."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules=["c_proj"], fan_in_fan_out=True)  # no task_type: PEFT passes kwargs on
    model = get_peft_model(MODELS["gpt2"].build(dropout=0.1), lora)
    circuit = CircuitModel(CircuitConfig(target_layers=["re:.*mlp.c_fc"], l0_lambda=L0_LAMBDA), model)
    with torch.no_grad():
        for param in circuit.mask_parameters():
            param.copy_(torch.randn(param.shape, generator=torch.Generator().manual_seed(2)))
    args = arguments(tmp_path, label_smoothing_factor=0.2)
    trainer = train(circuit, args, "gpt2", eval_dataset=rows("gpt2"))
    batch = {name: torch.stack([row[name] for row in rows("gpt2")]) for name in ("input_ids", "labels")}
    with torch.no_grad():
        expected = smoothed(circuit.eval(), batch)
    args = arguments(tmp_path, label_smoothing_factor=0.2, per_device_eval_batch_size=16)
    evaluated = Trainer(model=circuit, args=args, eval_dataset=rows("gpt2")).evaluate()
    assert evaluated["eval_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert trainer.label_names == ["labels"]


def test_a_circuit_under_adapters_is_warned_of(tmp_path):
    """Trainer would save the adapters and lose the masks."""
    from peft import LoraConfig, get_peft_model

    outer = get_peft_model(build("gpt2"), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    for name, param in outer.named_parameters():
        param.requires_grad_("mask_logits" in name or "lora_" in name)
    with pytest.warns(UserWarning, match="checkpoints hold adapters and no masks"):
        train(outer, arguments(tmp_path, num_train_epochs=1), "gpt2")


def test_losses_that_are_means_are_divided_by_micro_batches():
    """transformers' losses of regression and of several labels ignore the number of labels in the step."""
    model = MODELS["vit"].build()
    assert CircuitModel(CircuitConfig(target_layers="all-linear"), model).accepts_loss_kwargs
    for problem in ("regression", "multi_label_classification"):
        model = MODELS["vit"].build()
        model.config.problem_type = problem
        assert not CircuitModel(CircuitConfig(target_layers="all-linear"), model).accepts_loss_kwargs
    expected = {"bert": False, "bart": False, "resnet": False, "gpt2": True, "llama": True, "modernbert": False}
    found = {name: build(name).accepts_loss_kwargs for name in expected}
    assert found == expected


def test_epochs_of_a_dataset_without_a_length_are_refused(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows("vit"))

    circuit = build("vit")
    trainer = Trainer(
        model=circuit, args=arguments(tmp_path, max_steps=4), train_dataset=Stream(),
        callbacks=[TemperatureCallback(per="epoch")],
    )  # fmt: skip
    with pytest.raises(ValueError, match="no length to count epochs by: use per='step'"):
        trainer.train()


def test_generation_settings_given_to_the_circuit_are_the_bases():
    circuit = build("bart")
    from transformers import GenerationConfig

    circuit.generation_config = GenerationConfig(max_new_tokens=3, decoder_start_token_id=2)
    assert circuit.wrapped_model.generation_config.max_new_tokens == 3
    head = nn.Linear(32, 7)
    circuit.lm_head = head
    assert circuit.wrapped_model.lm_head is head
    circuit.note = "mine"
    assert "note" in vars(circuit)
    assert not hasattr(circuit.wrapped_model, "note")


def test_saving_takes_what_transformers_models_take(tmp_path, monkeypatch):
    import huggingface_hub

    circuit, calls = build("vit"), []
    circuit.save_pretrained(tmp_path / "none", is_main_process=False, save_function=torch.save)
    assert not (tmp_path / "none").exists()
    circuit.save_pretrained(tmp_path / "one", is_main_process=True, safe_serialization=True, state_dict={})
    assert (tmp_path / "one" / "circuit.json").is_file()

    class Api:
        def create_repo(self, repo_id, **options):
            calls.append(repo_id)

        def upload_folder(self, repo_id, folder_path, **options):
            calls.append(sorted(path.name.split("-")[0] for path in Path(folder_path).iterdir()))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    circuit.push_to_hub("me/circuit")
    assert calls == ["me/circuit", ["circuit.json", "masks"]]


@every_family
def test_logs_evaluation_and_prediction(family, tmp_path):
    circuit = build(family, execution="per_forward")
    args = arguments(tmp_path, eval_strategy="epoch", include_for_metrics=[])
    trainer = train(circuit, args, family, optimizers=sgd(circuit), eval_dataset=rows(family))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    temperatures = [entry["temperature"] for entry in logged]
    assert temperatures == pytest.approx([temperature_at(t, 6, 20.0) for t in (1, 2, 3, 4, 5, 5)])
    assert circuit.temperature == 20.0
    last, statistics = logged[-1], circuit.compute_l0_statistics()
    assert last["kept_fraction"] == pytest.approx(statistics["total_l0"] / statistics["max_l0"])
    soft = sum(float(torch.sigmoid(20.0 * p.detach()).sum()) for p in circuit.mask_parameters())
    assert last["l0"] == pytest.approx(soft, rel=1e-5)
    near = torch.cat([(20.0 * p.detach()).abs().flatten() < 4 for p in circuit.mask_parameters()])
    assert last["undecided_fraction"] == pytest.approx(float(near.double().mean()))

    # Evaluation is that of the hard mask: of a plain model that holds it.
    plain = circuit.export()
    same = Trainer(model=plain, args=arguments(tmp_path), eval_dataset=rows(family)).evaluate()
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 3
    assert evaluated[-1] == pytest.approx(same["eval_loss"], rel=1e-5)
    prediction = trainer.predict(rows(family))
    assert prediction.metrics["test_loss"] == pytest.approx(same["eval_loss"], rel=1e-5)


@pytest.mark.dropin
@pytest.mark.parametrize("optimizer", ["adamw", "mask_adamw"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "resnet"])
def test_a_resumed_run_equals_an_uninterrupted_one(family, optimizer, tmp_path):
    """Shuffled data, a learning rate that falls, stopped in the middle of an epoch; to the bit."""
    more = {"train_sampling_strategy": "random", "lr_scheduler_type": "linear", "save_strategy": "steps",
            "save_steps": 3, "max_grad_norm": 1.0}  # fmt: skip

    def run(folder, resume=None):
        circuit = build(family)
        if optimizer == "mask_adamw":
            return train(circuit, arguments(folder, 4, 1, **more), family, resume,
                         optimizers=(MaskAdamW(circuit.mask_parameters(), lr=0.05), None))  # fmt: skip
        return train(circuit, arguments(folder, 4, 1, **more), family, resume)

    whole = run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "part" / "checkpoint-3")
    resumed = run(tmp_path / "part", str(tmp_path / "part" / "checkpoint-3"))
    assert torch.equal(logits(resumed.model), logits(whole.model))
    assert resumed.model.temperature == whole.model.temperature == 20.0
    assert losses(resumed)[3:] == losses(whole)[3:]
    assert [e["temperature"] for e in resumed.state.log_history if "temperature" in e] == [
        e["temperature"] for e in whole.state.log_history if "temperature" in e
    ]


@every_family
def test_checkpoints_hold_masks_only_and_load_as_circuits(family, tmp_path):
    circuit = build(family)
    trainer = train(circuit, arguments(tmp_path / "run", save_strategy="epoch"), family)
    trainer.save_model(str(tmp_path / "saved"))
    import safetensors.torch

    weights = sum(p.numel() for p in circuit.mask_parameters())
    for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-6"):
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        logits_saved = [t for name, t in tensors.items() if name.endswith("mask_logits")]
        assert sum(t.numel() for t in logits_saved) == weights
        others = {name.rsplit(".", 1)[-1] for name in tensors} - {"mask_logits", "bias_mask_logits"}
        assert others == {"temperature", "_extra_state"}
        loaded = CircuitModel.from_pretrained(MODELS[family].build(dropout=0.1), folder)
        assert torch.equal(logits(loaded), logits(circuit))
        assert loaded.temperature == circuit.temperature
    with pytest.raises(ValueError, match="wrong base model"):
        CircuitModel.from_pretrained(MODELS[family].build(seed=5), tmp_path / "saved")


def test_a_tied_model_that_is_trained_along_is_saved_whole(tmp_path):
    """GPT-2's tied weights: one name in the state stands for both, and training goes on from there."""
    circuit = build("gpt2", freeze_base=False)
    trainer = train(circuit, arguments(tmp_path), "gpt2")
    trainer.save_model(str(tmp_path / "saved"))
    import safetensors.torch

    state = safetensors.torch.load_file(tmp_path / "saved" / "model.safetensors")
    base = dict(circuit.wrapped_model.named_parameters())
    assert all(torch.equal(state[f"wrapped_model.{name}"], param) for name, param in base.items())
    other = build("gpt2", freeze_base=False)
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert torch.equal(other.wrapped_model.lm_head.weight, circuit.wrapped_model.transformer.wte.weight)
    with pytest.raises(ValueError, match="trained with parts of its base"):
        CircuitModel.from_pretrained(MODELS["gpt2"].build(), tmp_path / "saved")


def test_states_that_cannot_be_read_are_refused(tmp_path):
    import safetensors.torch

    circuit, file = build("vit"), tmp_path / "model.safetensors"

    def load(message, error=ValueError):
        with pytest.raises(error, match=message):
            CircuitModel.from_pretrained(MODELS["vit"].build(dropout=0.1), tmp_path)

    state = circuit.state_dict()
    safetensors.torch.save_file(state, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    load("truncated or damaged")
    file.write_bytes(b"")
    load("truncated or damaged")
    safetensors.torch.save_file({**state, "_extra_state": state["_extra_state"] + 1}, file)
    load("_extra_state is not what state_dict")
    safetensors.torch.save_file({k: v for k, v in state.items() if k != "_extra_state"}, file)
    load("is not the state of one", FileNotFoundError)
    name = next(n for n in state if n.endswith("mask_logits"))
    safetensors.torch.save_file({**state, name: torch.full_like(state[name], float("nan"))}, file)
    load("holds NaN")
    safetensors.torch.save_file({n: t for n, t in state.items() if n != name}, file)
    load("do not fit the saved config")
    with pytest.raises(ValueError, match="_extra_state is not what state_dict"):
        circuit.load_state_dict({**state, "_extra_state": torch.zeros(3)})


def test_the_step_is_shared_by_labels_in_every_form_of_their_number():
    """A tensor of any shape (DataParallel's replicas are given (1, 1)), or a plain number."""
    circuit = build("gpt2")
    batch = {name: torch.stack([row[name] for row in rows("gpt2", 4)]) for name in ("input_ids", "labels")}
    own = int((batch["labels"][:, 1:] != -100).sum())
    term = L0_LAMBDA * float(circuit.l0().detach())
    with torch.no_grad():
        base = float(circuit.wrapped_model(**batch, num_items_in_batch=3 * own).loss)
    for number in (3 * own, torch.tensor(3 * own), torch.full((1, 1), 3 * own)):
        assert float(circuit(**batch, num_items_in_batch=number).loss) == pytest.approx(base + term / 3, rel=1e-5)


@pytest.mark.parametrize("return_dict", [True, False])
def test_a_loss_without_labels_has_the_term(return_dict):
    """ViTMAE reconstructs pixels: no argument of its forward is called a label."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )  # fmt: skip
    model = ViTMAEForPreTraining(config).eval()
    batch = {"pixel_values": torch.randn(2, 3, 8, 8), "noise": torch.rand(2, 4), "return_dict": return_dict}
    circuit = CircuitModel(CircuitConfig(target_layers="all-linear", l0_lambda=0.5, add_l0=False), model)
    plain = circuit(**batch)[0]
    circuit.circuit_config.add_l0 = True
    with torch.no_grad():
        expected = float(plain) + 0.5 * float(circuit.l0())
    assert float(circuit(**batch)[0].detach()) == pytest.approx(expected, rel=1e-5)


def test_question_answering_finds_its_labels(tmp_path):
    """Trainer takes them from the class's name."""
    from transformers import BertConfig, BertForQuestionAnswering

    model = BertForQuestionAnswering(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    circuit = CircuitModel(CircuitConfig(target_layers="all-linear"), model)
    trainer = Trainer(model=circuit, args=arguments(tmp_path))
    assert trainer.label_names == ["start_positions", "end_positions"]
    data = [{"input_ids": torch.arange(6), "start_positions": 1, "end_positions": 3}] * 4
    assert math.isfinite(trainer.evaluate(data)["eval_loss"])


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    """A metric that is best in the middle: masks and temperature are those of that checkpoint."""
    circuit, seen = build("bert"), []

    def metrics(prediction):
        seen.append((logits(circuit).clone(), circuit.temperature))
        return {"score": [0.0, 1.0, 0.5][len(seen) - 1]}

    args = arguments(tmp_path, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
                     metric_for_best_model="score", greater_is_better=True)  # fmt: skip
    train(circuit, args, "bert", eval_dataset=rows("bert"), compute_metrics=metrics,
          optimizers=(MaskAdamW(circuit.mask_parameters(), lr=0.05), None))  # fmt: skip
    assert torch.equal(logits(circuit), seen[1][0])
    assert circuit.temperature == seen[1][1] != 20.0


def test_the_temperature_per_epoch(tmp_path):
    circuit = build("vit")
    callback = TemperatureCallback(max_temperature=20.0, kind="linear", per="epoch")
    trainer = train(circuit, arguments(tmp_path), "vit", callbacks=[callback])
    found = [entry["temperature"] for entry in trainer.state.log_history if "temperature" in entry]
    assert found == [1.0, 1.0, 10.5, 10.5, 20.0, 20.0]


def test_training_stops_when_all_is_decided(tmp_path):
    circuit = build("vit", mask_hparams={"mask_init_value": 3.0})
    args = arguments(tmp_path, 1, num_train_epochs=5)
    trainer = train(circuit, args, "vit", callbacks=[TemperatureCallback(200.0, max_undecided=0.01)])
    assert trainer.state.global_step == 10  # |T * 3| passes 4 at T = 1.33, and every tenth step looks


def test_l0_target_is_reached(tmp_path):
    target = {"l0_lambda": CircuitConfig(target_layers="all").l0_lambda}
    circuit = build("bert", l0_target=0.3, **target)
    args = arguments(tmp_path, 8, num_train_epochs=100, logging_steps=50)
    trainer = train(circuit, args, "bert", callbacks=[TemperatureCallback(200.0)],
                    optimizers=(MaskAdamW(circuit.mask_parameters(), lr=0.02), None))  # fmt: skip
    assert trainer.state.log_history[0]["l0_lambda"] > 0
    assert circuit.density() == pytest.approx(0.3, rel=0.15)
    with pytest.raises(ValueError, match="counts optimizer steps"):
        train(build("bert", l0_target=0.3, **target), args, "bert", callbacks=[TemperatureCallback(per="epoch")])


def test_a_model_without_a_circuit_is_refused(tmp_path):
    trainer = Trainer(
        model=MODELS["bert"].build(), args=arguments(tmp_path), train_dataset=rows("bert"),
        callbacks=[TemperatureCallback()],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"BertForSequenceClassification.*CircuitModel\(config, model\)"):
        trainer.train()


def test_lean_mode_with_a_grad_scaler_is_refused_before_the_first_step():
    """fp16 needs a GPU in Accelerate: what the callback is given there, by hand."""
    circuit = build("vit")
    optimizer = MaskAdamW(circuit.mask_parameters(), lean=True, max_grad_norm=1.0)
    prepared = SimpleNamespace(optimizer=optimizer, scaler=torch.amp.GradScaler("cpu"))
    state = SimpleNamespace(max_steps=5, global_step=0)
    callback = TemperatureCallback()
    with pytest.raises(RuntimeError, match=r"GradScaler can neither.*bf16 instead of a GradScaler"):
        callback.on_train_begin(None, state, None, model=circuit, optimizer=prepared)
    assert callback.schedule is None
    assert circuit.l0_rider is None
    prepared.scaler = None
    callback.on_train_begin(None, state, None, model=circuit, optimizer=prepared)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_temperature": -1.0}, "temperature"),
        ({"max_temperature": float("nan")}, "temperature"),
        ({"kind": "cosine"}, "kind must be one of"),
        ({"per": "batch"}, "per must be one of 'step', 'epoch', got 'batch'"),
        ({"max_undecided": 0}, "max_undecided"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TemperatureCallback(**settings)


def test_trainer_state_names_the_callback(tmp_path):
    """The JSON that Trainer writes beside a checkpoint has the telemetry of its logs."""
    circuit = build("vit")
    train(circuit, arguments(tmp_path, save_strategy="epoch"), "vit")
    history = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert {"loss", "l0", "kept_fraction", "undecided_fraction", "temperature", "l0_lambda"} <= set(history[0])


if __name__ == "__main__":
    one_of_two(*sys.argv[1:])
