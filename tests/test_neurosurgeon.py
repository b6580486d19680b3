"""A script written for NeuroSurgeon 0.1.0 runs on csmask after its import line is changed, and gets the right numbers.

The script is a text, and the only part of it that differs between the two libraries is its first line.
"""

from __future__ import annotations

import pytest
import torch
from models import MODELS, PlainModel, randomize_logits
from torch import nn

from csmask import CircuitConfig, CircuitModel

IMPORTS = {
    "neurosurgeon": "from NeuroSurgeon.Models import CircuitConfig, CircuitModel",
    "csmask": "from csmask import CircuitConfig, CircuitModel",
}

SCRIPT = """
import torch


class TemperatureCallback:
    def __init__(self, epochs, last):
        self.factor = last ** (1.0 / epochs)

    def update(self, model):
        model.temperature = model.temperature * self.factor


hparams = {"ablation": "none", "mask_bias": BIAS, "mask_init_value": 0.02}
if UNIT is not None:
    hparams["mask_unit"] = UNIT
config = CircuitConfig(
    mask_method="continuous_sparsification",
    mask_hparams=hparams,
    target_layers=TARGETS,
    freeze_base=True,
    add_l0=True,
    l0_lambda=LAMBDA,
)
circuit = CircuitModel(config, model)
optimizer = torch.optim.AdamW(circuit.parameters(), lr=0.05)
callback = TemperatureCallback(EPOCHS, 100.0)

circuit.train()
history = []
for epoch in range(EPOCHS):
    for batch in batches:
        optimizer.zero_grad()
        loss = circuit(**batch).loss
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    callback.update(circuit)


def evaluate():
    with torch.no_grad():
        return torch.cat([circuit(**batch).logits.flatten() for batch in batches])


circuit.eval()
results = {"circuit": evaluate()}
statistics = circuit.compute_l0_statistics()

circuit.set_ablate_mode("zero_ablate")
results["ablated"] = evaluate()

circuit.set_ablate_mode("random_ablate")
results["random_ablated"] = evaluate()

controls = []
for _ in range(3):
    circuit.set_ablate_mode("complement_sampled", force_resample=True)
    controls.append(evaluate())
circuit.set_ablate_mode("randomly_sampled", True)
results["sampled"] = evaluate()

circuit.set_ablate_mode("none")
circuit.use_masks(False)
results["full"] = evaluate()
circuit.use_masks(True)
results["again"] = evaluate()

circuit.use_masks(False, ["wrapped_model." + name for name in TARGETS[:1]])
results["one_off"] = evaluate()
circuit.use_masks(True)

names = [name for name, _ in circuit.wrapped_model.named_modules()]
kept = statistics["total_l0"] / statistics["max_l0"]
per_layer = {name: statistics["layer2l0"][name] / statistics["layer2maxl0"][name] for name in TARGETS}
"""

TARGETS = {
    "bert": [
        f"bert.encoder.layer.{i}.{n}"
        for i in range(2)
        for n in ("attention.self.query", "attention.output.dense", "intermediate.dense")
    ],
    "gpt2": [f"transformer.h.{i}.{n}" for i in range(2) for n in ("attn.c_attn", "mlp.c_fc")],
    "resnet": [
        "resnet.encoder.stages.0.layers.0.layer.0.convolution",
        "resnet.encoder.stages.1.layers.0.layer.1.convolution",
    ],
}


def run_script(name: str, unit: str | None, bias: bool = False, library: str = "csmask") -> dict:
    tiny = MODELS[name]
    script = IMPORTS[library] + SCRIPT
    values = {
        "model": tiny.build(0.3),
        "batches": [tiny.batch(seed) for seed in range(2)],
        "TARGETS": TARGETS[name],
        "UNIT": unit,
        "BIAS": bias,
        "LAMBDA": 1e-5 if name == "resnet" else 5e-4,
        "EPOCHS": 6,
    }
    exec(compile(script, f"{name} script", "exec"), values)
    return values


@pytest.mark.parametrize("unit", [None, "weight", "neuron"])
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.filterwarnings("ignore:mask_bias")
def test_the_script_runs_and_its_numbers_are_those_of_dense_models(name, unit):
    values = run_script(name, unit, bias=unit == "weight")
    circuit, results, statistics = values["circuit"], values["results"], values["statistics"]
    tiny = MODELS[name]

    def dense(keep) -> torch.Tensor:
        model = tiny.build()
        with torch.no_grad():
            for layer_name, layer in circuit.masked_layers.items():
                plain = model.get_submodule(layer_name)
                plain.weight.copy_(torch.where(keep(layer.unit_logits), plain.weight, torch.zeros(())))
                if layer.bias_mask_logits is not None:
                    plain.bias.copy_(torch.where(keep(layer.bias_mask_logits), plain.bias, torch.zeros(())))
            return torch.cat([model(**batch).logits.flatten() for batch in values["batches"]])

    assert torch.equal(results["circuit"], dense(lambda logits: logits > 0))
    assert torch.equal(results["ablated"], dense(lambda logits: logits <= 0))
    assert torch.equal(results["full"], dense(lambda logits: logits == logits))
    assert torch.equal(results["again"], results["circuit"])
    for other in ("ablated", "random_ablated", "full", "one_off"):
        assert not torch.equal(results[other], results["circuit"]), other
    # Six epochs of the callback end at the maximum; dropout was off, so the losses of the first step repeat.
    assert circuit.temperature == pytest.approx(100.0, rel=1e-5)
    assert sum(values["history"][-2:]) < sum(values["history"][:2])
    assert values["history"] == run_script(name, unit, bias=unit == "weight")["history"]
    # Statistics count weights, also where a neuron has one logit.
    assert set(statistics["layer2l0"]) == set(TARGETS[name]) <= set(values["names"])
    expected = sum(
        int((layer.unit_logits > 0).expand(layer.weight.shape).sum())
        + (0 if layer.bias_mask_logits is None else int((layer.bias_mask_logits > 0).sum()))
        for layer in circuit.masked_layers.values()
    )
    assert statistics["total_l0"] == expected
    assert 0 < values["kept"] < 0.5
    assert values["kept"] == circuit.density()
    # Every draw is another one, of as many weights as the circuit has.
    first, second, third = values["controls"]
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert not torch.equal(results["sampled"], third)


def test_force_resample_draws_again_and_its_absence_repeats():
    torch.manual_seed(0)
    layer = nn.Linear(20, 20)
    circuit = CircuitModel(CircuitConfig(target_layers="all"), layer).eval()
    randomize_logits(circuit)
    with torch.no_grad():
        layer.mask_logits.sub_(1.0)

    def draw(*args, **kwargs):
        circuit.set_ablate_mode(*args, **kwargs)
        zeroed = layer.ablated_parameters()[0] == 0
        assert zeroed.sum() == (layer.mask_logits > 0).sum()
        return zeroed

    first = draw(ablation="complement_sampled")
    assert torch.equal(draw("complement_sampled"), first)
    assert torch.equal(draw("complement_sampled", force_resample=False), first)
    assert torch.equal(draw("complement_sampled", False), first)
    again = draw("complement_sampled", force_resample=True)
    assert not torch.equal(again, first)
    assert torch.equal(draw("complement_sampled"), again)
    assert not torch.equal(draw("complement_sampled", True), again)
    assert torch.equal(draw("complement_sampled", seed=0), first)
    with pytest.raises(TypeError, match="not both"):
        circuit.set_ablate_mode("none", ablation="none")


def test_the_arguments_have_the_names_and_order_of_neurosurgeon():
    config = CircuitConfig("continuous_sparsification", {"mask_bias": True}, ["hidden"], False, False, 1e-3)
    assert config.target_layers == ["hidden"]
    assert (config.freeze_base, config.add_l0, config.l0_lambda) == (False, False, 1e-3)
    circuit = CircuitModel(config=config, model=PlainModel())
    assert isinstance(circuit.wrapped_model, PlainModel)
    assert circuit.train(train_bool=False).training is False
    assert circuit.train(train_bool=True).training is True
    hidden = circuit.masked_layers["hidden"]
    circuit.use_masks(False, name_list=["hidden"])
    assert hidden.use_masks is False
    circuit.use_masks(value=True, name_list=["wrapped_model.hidden"])
    assert hidden.use_masks is True
    with pytest.raises(ValueError, match="matches no layer"):
        circuit.use_masks(value=False, name_list=["hiden"])
    with pytest.raises(TypeError, match="flag must be True or False, got None"):
        circuit.use_masks()


@pytest.mark.parametrize("unit", ["weight", "neuron"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_l0_counts_what_neurosurgeon_counts(name, unit):
    """Weights, also where a neuron has one logit: an ``l0_lambda`` means the same in both."""
    theirs = pytest.importorskip("NeuroSurgeon.Models", reason="make test installs NeuroSurgeon 0.1.0")
    hparams = {"ablation": "none", "mask_unit": unit, "mask_bias": True, "mask_init_value": 0.3}
    arguments = ("continuous_sparsification", hparams, TARGETS[name], True, True, 1.0)
    circuit = CircuitModel(CircuitConfig(*arguments), MODELS[name].build())
    other = theirs.CircuitModel(theirs.CircuitConfig(*arguments), MODELS[name].build())
    assert circuit.l0().item() == pytest.approx(float(other._compute_l0_loss()), rel=1e-5)
    statistics = other.compute_l0_statistics()
    assert circuit.compute_l0_statistics()["total_l0"] == statistics["total_l0"]
    assert circuit.compute_l0_statistics()["max_l0"] == statistics["max_l0"]
