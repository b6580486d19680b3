"""A script written for NeuroSurgeon 0.1.0 runs on csmask after its import line is changed, and gets the right numbers.

The script is a text, and the only part of it that differs between the two libraries is its first line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from models import MODELS, PlainModel, assert_same_snapshot, randomize_logits, snapshot
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2Model,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

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


# The models that it documents: BERT, GPT-2, ResNet and ViT, bare and with a head, and the layers that it names there


@dataclasses.dataclass(frozen=True)
class Family:
    """A tiny model of a class that NeuroSurgeon masks.

    Attributes:
        build: the model, with as many blocks as the names need.
        batch: its input; with labels where it has a head.
        names: by the name that a script of 2023 has for a layer, today's.
    """

    build: Callable[[], nn.Module]
    batch: dict[str, Tensor]
    names: dict[str, str]


SAME_BERT = (
    "encoder.layer.0.attention.self.query",
    "encoder.layer.1.attention.output.dense",
    "encoder.layer.1.output.dense",
    "pooler.dense",
)
SAME_GPT2 = ("h.0.attn.c_proj", "h.0.mlp.c_fc", "h.1.mlp.c_proj")
SAME_RESNET = ("encoder.stages.0.layers.0.layer.0.convolution", "encoder.stages.3.layers.0.shortcut.convolution")
MOVED_VIT = {
    "encoder.layer.0.attention.attention.query": "layers.0.attention.q_proj",
    "encoder.layer.11.attention.attention.value": "layers.11.attention.v_proj",
    "encoder.layer.3.attention.output.dense": "layers.3.attention.o_proj",
    "encoder.layer.3.intermediate.dense": "layers.3.mlp.fc1",
    "encoder.layer.9.output.dense": "layers.9.mlp.fc2",
}
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
BERT = BertConfig(vocab_size=20, num_hidden_layers=2, max_position_embeddings=8, **SIZES)
GPT2 = GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=8, pad_token_id=0)
RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 12], depths=[2, 2, 2, 2], layer_type="basic")
VIT = ViTConfig(num_hidden_layers=12, image_size=8, patch_size=4, **SIZES)

_generator = torch.Generator().manual_seed(0)
_LABELS = {"labels": torch.tensor([0, 1, 1])}
_TEXT = {"input_ids": torch.randint(1, 20, (3, 6), generator=_generator)}
_IMAGES = {"pixel_values": torch.randn(3, 3, 32, 32, generator=_generator)}
_SMALL = {"pixel_values": _IMAGES["pixel_values"][..., :8, :8]}


def prefixed(prefix: str, names) -> dict[str, str]:
    pairs = names.items() if isinstance(names, dict) else zip(names, names, strict=True)
    return {prefix + old: prefix + new for old, new in pairs}


DOCUMENTED = {
    "BertModel": Family(lambda: BertModel(BERT), _TEXT, prefixed("", SAME_BERT)),
    "BertForSequenceClassification": Family(
        lambda: BertForSequenceClassification(BERT), _TEXT | _LABELS, prefixed("bert.", SAME_BERT)
    ),
    "GPT2Model": Family(lambda: GPT2Model(GPT2), _TEXT, prefixed("", SAME_GPT2)),
    "GPT2ForSequenceClassification": Family(
        lambda: GPT2ForSequenceClassification(GPT2), _TEXT | _LABELS, prefixed("transformer.", SAME_GPT2)
    ),
    "ResNetModel": Family(lambda: ResNetModel(RESNET), _IMAGES, prefixed("", SAME_RESNET)),
    "ResNetForImageClassification": Family(
        lambda: ResNetForImageClassification(RESNET), _IMAGES | _LABELS, prefixed("resnet.", SAME_RESNET)
    ),
    "ViTModel": Family(lambda: ViTModel(VIT), _SMALL, prefixed("", MOVED_VIT)),
    "ViTForImageClassification": Family(
        lambda: ViTForImageClassification(VIT), _SMALL | _LABELS, prefixed("vit.", MOVED_VIT)
    ),
}
every_documented = pytest.mark.parametrize("family", list(DOCUMENTED.values()), ids=list(DOCUMENTED))


def built(family: Family) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = family.build()
        with torch.no_grad():
            for param in model.parameters():
                if param.dim() > 1:
                    param.normal_(std=param[0].numel() ** -0.5)
    return model.eval()


def main_output(output) -> Tensor:
    return next(value for key, value in output.items() if key != "loss")


def a_number(output) -> Tensor:
    """All tensors of an output, in a sum whose gradient no normalisation takes away."""
    tensors = [value for value in output.values() if isinstance(value, Tensor)]
    return sum((t * torch.randn(t.shape, generator=torch.Generator().manual_seed(1))).mean() for t in tensors)


@every_documented
def test_names_of_2023_work_or_lead_to_todays(family):
    model = built(family)
    before = snapshot(model)
    for old, new in family.names.items():
        config = CircuitConfig("continuous_sparsification", {"mask_init_value": 0.02}, [old])
        if old == new:
            assert list(CircuitModel(config, built(family)).masked_layers) == [new]
            continue
        with pytest.raises(ValueError, match=rf"target layer '{old}' matches no layer; nearest: ") as error:
            CircuitModel(config, model)
        # Layers of the same block, today's name of this one among them.
        near = str(error.value).rpartition("nearest: ")[2].split(", ")
        (number,) = (part for part in new.split(".") if part.isdigit())
        assert new in near
        assert len(near) <= 7
        assert all(number in name.split(".") for name in near)
    assert_same_snapshot(before, snapshot(model))


@pytest.mark.parametrize("old", ["encoder.layer.6.output.dropout", "encoder.layer.6.layernorm_after", "some_layer"])
def test_what_it_does_not_mask_is_an_error_here_too(old):
    with pytest.raises(ValueError, match=r"matches no layer; nearest: .*layers"):
        CircuitModel(CircuitConfig(target_layers=[old]), built(DOCUMENTED["ViTModel"]))
    with pytest.raises(TypeError, match=r"'layers\.6\.layernorm_after' cannot be masked: LayerNorm is not a Linear"):
        CircuitModel(CircuitConfig(target_layers=["layers.6.layernorm_after"]), built(DOCUMENTED["ViTModel"]))


@pytest.mark.filterwarnings("ignore:mask_bias")
@every_documented
def test_losses_gradients_and_numbers_of_evaluation_are_those_of_neurosurgeon(family):
    """The library itself is the oracle, where it is installed."""
    theirs_library = pytest.importorskip("NeuroSurgeon.Models")
    targets = list(family.names.values())
    hparams = {"ablation": "none", "mask_unit": "weight", "mask_bias": True, "mask_init_value": 0.1}
    arguments = {
        "mask_method": "continuous_sparsification", "mask_hparams": hparams, "target_layers": targets,
        "freeze_base": True, "add_l0": True, "l0_lambda": 1e-3,
    }  # fmt: skip
    theirs = theirs_library.CircuitModel(theirs_library.CircuitConfig(**arguments), built(family))
    mine = CircuitModel(CircuitConfig(**arguments), built(family))
    layers = []
    for index, name in enumerate(targets):
        layer, other = mine.masked_layers[name], theirs.wrapped_model.get_submodule(name)
        pairs = [(layer.mask_logits, other.weight_mask_params)]
        if layer.bias_mask_logits is not None:
            pairs.append((layer.bias_mask_logits, other.bias_mask_params))
        layers.extend(pairs)
        for logits, params in pairs:
            assert torch.equal(logits, params)
            values = torch.randn(logits.shape, generator=torch.Generator().manual_seed(index)) * 0.5
            with torch.no_grad():
                logits.copy_(values), params.copy_(values)
    for circuit in (mine, theirs):
        circuit.train()
        circuit.temperature = 3.0
    got, want = mine(**family.batch), theirs(**family.batch)
    torch.testing.assert_close(main_output(got), main_output(want))
    if "labels" in family.batch:
        torch.testing.assert_close(got.loss, want.loss)
        got, want = got.loss, want.loss
    else:
        got, want = a_number(got), a_number(want)
    got.backward()
    want.backward()
    for logits, params in layers:
        torch.testing.assert_close(logits.grad, params.grad.reshape(logits.shape), rtol=1e-4, atol=1e-6)
    mine.eval()
    theirs.eval()
    statistics, wanted = mine.compute_l0_statistics(), theirs.compute_l0_statistics()
    assert statistics.keys() == wanted.keys()
    assert statistics["total_l0"] == float(wanted["total_l0"])
    assert statistics["max_l0"] == float(wanted["max_l0"])
    for each in ("layer2l0", "layer2maxl0"):
        assert statistics[each] == {name: float(value) for name, value in wanted[each].items()}
    with torch.no_grad():
        for mode in ("none", "zero_ablate"):
            for circuit in (mine, theirs):
                circuit.set_ablate_mode(mode)
            torch.testing.assert_close(main_output(mine(**family.batch)), main_output(theirs(**family.batch)))
        for circuit in (mine, theirs):
            circuit.set_ablate_mode("none")
            circuit.use_masks(False, ["wrapped_model." + targets[0]])
        torch.testing.assert_close(main_output(mine(**family.batch)), main_output(theirs(**family.batch)))
