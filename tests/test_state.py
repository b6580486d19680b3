"""``circuit.state_dict()``: what is trained, and over what; loaded strictly, alone or inside another module."""

from __future__ import annotations

import pytest
import torch
from models import MODELS, every_model, randomize_logits
from torch import nn

from csmask import CircuitConfig, CircuitModel


def circuit_of(tiny=MODELS["bert"], seed: int = 0, **config) -> CircuitModel:
    circuit = CircuitModel(CircuitConfig(target_layers=list(tiny.targets), **config), tiny.build(seed=seed))
    randomize_logits(circuit)
    circuit.temperature = 3.5
    return circuit


def masks(circuit: CircuitModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in circuit.mask_parameters()])


@every_model
def test_the_state_is_masks_temperature_and_a_description(tiny):
    circuit = circuit_of(tiny)
    layers = list(circuit.masked_layers)
    names = [f"wrapped_model.{name}.{what}" for name in layers for what in ("mask_logits", "temperature")]
    assert sorted(circuit.state_dict()) == sorted([*names, "_extra_state"])
    other = CircuitModel(circuit.circuit_config, tiny.build())
    assert str(other.load_state_dict(circuit.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(masks(other), masks(circuit))
    assert other.temperature == 3.5


def test_a_missing_mask_is_missed_and_a_foreign_key_is_unexpected():
    circuit = circuit_of()
    state = circuit.state_dict()
    name = next(name for name in state if name.endswith("mask_logits"))
    with pytest.raises(RuntimeError, match=rf"Missing key.*{name}"):
        circuit.load_state_dict({n: t for n, t in state.items() if n != name})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*nobody\.weight"):
        circuit.load_state_dict({**state, "nobody.weight": torch.zeros(2)})


def test_a_circuit_inside_another_module():
    """As in a training framework's own module."""

    class Task(nn.Module):
        def __init__(self, circuit):
            super().__init__()
            self.circuit, self.head = circuit, nn.Linear(3, 2)

    task, other = Task(circuit_of()), Task(CircuitModel(circuit_of().circuit_config, MODELS["bert"].build()))
    state = task.state_dict()
    assert {name.split(".")[0] for name in state} == {"circuit", "head"}
    assert not [name for name in state if name.endswith("embeddings.weight")]
    other.load_state_dict(state)
    assert torch.equal(masks(other.circuit), masks(task.circuit))
    assert torch.equal(other.head.weight, task.head.weight)
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.bias"):
        other.load_state_dict({n: t for n, t in state.items() if n != "head.bias"})


def test_what_is_trained_beside_the_masks_is_in_the_state():
    """And what is not is checked all the same."""
    circuit, other = circuit_of(), circuit_of()
    for c in (circuit, other):
        c.wrapped_model.classifier.requires_grad_(True)
    with torch.no_grad():
        other.wrapped_model.classifier.weight.add_(1)
    state = circuit.state_dict()
    assert {name for name in state if "classifier" in name} == {
        "wrapped_model.classifier.weight", "wrapped_model.classifier.bias"
    }  # fmt: skip
    other.load_state_dict(state)
    assert torch.equal(other.wrapped_model.classifier.weight, circuit.wrapped_model.classifier.weight)
    for wrong in (circuit_of(seed=1), circuit_of(seed=1)):
        with pytest.raises(ValueError, match=r"wrong base model.*bert\.encoder"):
            wrong.load_state_dict(state, strict=False)
        wrong.wrapped_model.classifier.requires_grad_(True)
    with torch.no_grad():
        other.wrapped_model.bert.embeddings.word_embeddings.weight.add_(1)
    with pytest.raises(ValueError, match=r"wrong base model.*another layer than the masked ones"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("hparams", "message"),
    [({"rescale": True}, "rescale=True.*rescale=False"), ({"mask_unit": "neuron"}, "mask_unit='neuron'.*'weight'"),
     ({"mask_bias": True}, "mask_bias=True.*mask_bias=False")],
)  # fmt: skip
def test_a_state_of_other_masks_is_refused(hparams, message):
    circuit = circuit_of()
    before = masks(circuit).clone()
    with pytest.raises(ValueError, match=message):
        circuit.load_state_dict(circuit_of(mask_hparams=hparams).state_dict(), strict=False)
    assert torch.equal(masks(circuit), before)


def test_a_base_that_was_written_to_unseen_is_told_apart():
    circuit = circuit_of()
    state = circuit.state_dict()
    next(iter(circuit.masked_layers.values())).weight.data.mul_(3)
    with pytest.raises(ValueError, match="wrong base model"):
        circuit.load_state_dict(state)


def test_a_base_that_is_trained_is_in_the_state():
    circuit, other = circuit_of(MODELS["gpt2"], freeze_base=False), circuit_of(MODELS["gpt2"], 1, freeze_base=False)
    other.load_state_dict(circuit.state_dict())
    expected = dict(circuit.named_parameters())
    assert all(torch.equal(param, expected[name]) for name, param in other.named_parameters())


def test_the_fingerprint_follows_the_base():
    """It is computed once, and again when the base has changed."""
    circuit, state = circuit_of(), circuit_of().state_dict()
    circuit.load_state_dict(state)
    with torch.no_grad():
        circuit.wrapped_model.classifier.weight[0, 0] += 1
    before = masks(circuit).clone()
    randomize_logits(circuit, seed=3)
    changed = masks(circuit).clone()
    assert not torch.equal(before, changed)
    with pytest.raises(ValueError, match=r"wrong base model.*another layer than the masked ones"):
        circuit.load_state_dict(state)
    assert torch.equal(masks(circuit), changed)
    state.pop("_extra_state")
    circuit.load_state_dict(state)
    assert torch.equal(masks(circuit), before)


def test_a_state_over_other_layers_is_refused():
    tiny = MODELS["bert"]
    other = CircuitModel(CircuitConfig(target_layers="all-linear"), tiny.build())
    with pytest.raises(ValueError, match="belongs to a circuit over other layers"):
        other.load_state_dict(circuit_of().state_dict())


def test_a_state_that_holds_the_base_loads_too():
    """As a tool collects it that knows nothing of circuits."""
    circuit, other = circuit_of(), circuit_of(seed=1)
    whole = {f"wrapped_model.{name}": tensor for name, tensor in circuit.wrapped_model.state_dict().items()}
    other.load_state_dict(whole)
    batch = MODELS["bert"].batch(0)
    assert torch.equal(other.eval()(**batch).logits, circuit.eval()(**batch).logits)
