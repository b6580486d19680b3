"""``CircuitModel``: its numbers against dense models computed by hand, for eight transformers models and one plain."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import typing

import pytest
import torch
import torch._dynamo.testing
from models import FAMILIES, MODELS, PlainModel, TinyModel, every_family, every_model, randomize_logits
from torch import Tensor, nn
from transformers import BertForQuestionAnswering
from transformers.pytorch_utils import Conv1D

from csmask import CircuitConfig, CircuitModel, functional
from csmask._ops import ops
from csmask.layers import MaskedLayer


def make_circuit(tiny: TinyModel, *, randomize: bool = True, model: nn.Module | None = None, **config) -> CircuitModel:
    config.setdefault("target_layers", list(tiny.targets))
    circuit = CircuitModel(CircuitConfig(**config), model or tiny.build())
    if randomize:
        randomize_logits(circuit)
    return circuit


def main_output(output) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def a_loss(output) -> Tensor:
    return output.square().mean() if isinstance(output, Tensor) else output.loss


def unit_shape(layer: nn.Module, logits: Tensor) -> Tensor:
    """The logits of a layer in the shape that broadcasts over its weight; written again here, not taken from csmask."""
    if logits.shape == layer.weight.shape:
        return logits
    if isinstance(layer, Conv1D):
        return logits[None, :]
    return logits.reshape(-1, *[1] * (layer.weight.dim() - 1))


def dense_by_hand(tiny: TinyModel, circuit: CircuitModel, mask) -> nn.Module:
    """A fresh base model, never touched by csmask, whose weights are multiplied by ``mask(logits)``."""
    dense = tiny.build()
    with torch.no_grad():
        for name, layer in circuit.masked_layers.items():
            plain = dense.get_submodule(name)
            assert not isinstance(plain, MaskedLayer)
            # A copy: tied weights must not be masked in their other use.
            plain.weight = nn.Parameter(plain.weight * mask(unit_shape(plain, layer.mask_logits)))
            if layer.bias_mask_logits is not None:
                plain.bias = nn.Parameter(plain.bias * mask(layer.bias_mask_logits))
    return dense


def hard(logits: Tensor) -> Tensor:
    return (logits > 0).float()


def soft_at(temperature: float):
    return lambda logits: torch.sigmoid(temperature * logits)


# Every family, against the base model with its weights multiplied by hand


@pytest.mark.parametrize(
    "hparams", [{}, {"mask_unit": "neuron"}, {"mask_bias": True}], ids=["weight", "neuron", "bias"]
)
@every_model
@pytest.mark.filterwarnings("ignore:mask_bias")
def test_hard_evaluation_is_the_dense_model_with_pruned_weights_to_the_bit(tiny, hparams):
    circuit = make_circuit(tiny, mask_hparams=hparams).eval()
    dense = dense_by_hand(tiny, circuit, hard)
    batch = tiny.batch(0)
    assert torch.equal(main_output(circuit(**batch)), main_output(dense(**batch)))
    assert not torch.equal(main_output(circuit(**batch)), main_output(tiny.build()(**batch)))


@pytest.mark.parametrize("temperature", [1.0, 200.0])
@every_model
def test_the_soft_forward_is_the_dense_model_with_sigmoid_weights(tiny, temperature):
    circuit = make_circuit(tiny, add_l0=False)
    circuit.temperature = temperature
    dense = dense_by_hand(tiny, circuit, soft_at(temperature))
    batch = tiny.batch(0)
    out, expected = main_output(circuit(**batch)), main_output(dense(**batch))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@every_model
def test_masks_kept_whole_are_the_base_model_to_the_bit(tiny):
    circuit = make_circuit(tiny, randomize=False, mask_hparams={"mask_init_value": 1.0}).eval()
    batch = tiny.batch(0)
    expected = main_output(tiny.build()(**batch))
    assert torch.equal(main_output(circuit(**batch)), expected)
    with torch.no_grad():
        for param in circuit.mask_parameters():
            param.fill_(-1.0)
    assert not torch.equal(main_output(circuit(**batch)), expected)
    circuit.use_masks(False)
    assert torch.equal(main_output(circuit(**batch)), expected)
    circuit.train()
    assert torch.equal(main_output(circuit(**batch)), expected)


@every_model
def test_training_lowers_the_loss_and_moves_only_the_masks(tiny):
    circuit = make_circuit(tiny, randomize=False, l0_lambda=1e-6)
    optimizer = torch.optim.Adam(circuit.mask_parameters(), lr=0.1)
    batch = tiny.batch(0)
    losses = []
    for _ in range(8):
        loss = a_loss(circuit(**batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02 * abs(losses[0])
    assert losses == sorted(losses, reverse=True) or min(losses[4:]) < min(losses[:4])
    circuit.eval()
    assert math.isfinite(a_loss(circuit(**batch)).item())


@pytest.mark.parametrize("hparams", [{}, {"mask_unit": "neuron", "mask_bias": True}], ids=["weight", "neuron+bias"])
@every_model
@pytest.mark.filterwarnings("ignore:mask_bias")
def test_execution_reference_equals_per_forward_in_loss_and_every_gradient(tiny, hparams):
    batch = tiny.batch(0)
    results = {}
    for execution in ("reference", "per_forward", "auto"):
        circuit = make_circuit(
            tiny, execution=execution, l0_lambda=1e-3, mask_hparams=hparams, freeze_base=False
        ).eval()
        for layer in circuit.masked_layers.values():  # soft masks, while batch norm stays deterministic
            layer.training = True
        circuit.training = True
        circuit.temperature = 3.0
        loss = a_loss(circuit(**batch)) + 1e-3 * circuit.l0()
        loss.backward()
        results[execution] = [loss.detach()] + [p.grad for p in circuit.parameters()]
    # Some gradients are zero but for rounding (a key's bias under softmax): the largest one sets the scale for all.
    tolerance = 1e-6 * max(g.abs().max().item() for g in results["reference"][1:] if g is not None)
    for execution in ("per_forward", "auto"):
        for value, expected in zip(results[execution], results["reference"], strict=True):
            assert (value is None) == (expected is None)
            if value is not None:
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=tolerance)


@every_model
def test_export_is_a_plain_model_with_the_numbers_of_the_circuit(tiny):
    circuit = make_circuit(tiny)
    exported = circuit.export()
    assert type(exported) is type(tiny.build())
    assert not any(isinstance(m, MaskedLayer) for m in exported.modules())
    assert list(exported.state_dict()) == list(tiny.build().state_dict())
    batch = tiny.batch(0)
    circuit.eval()
    assert torch.equal(main_output(exported(**batch)), main_output(circuit(**batch)))
    assert torch.equal(main_output(exported(**batch)), main_output(dense_by_hand(tiny, circuit, hard)(**batch)))
    assert torch.equal(main_output(circuit.unload()(**batch)), main_output(tiny.build()(**batch)))


# Gradients against formulas written independently


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("mask_unit", ["weight", "neuron"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet", "plain"])
@pytest.mark.filterwarnings("ignore:mask_bias")
def test_weights_and_masks_trained_together_have_the_gradients_of_autograd(name, mask_unit, rescale):
    """``freeze_base=False`` in fp64, against plain autograd through ``W * sigmoid(T * S)`` in a functional call."""
    tiny, temperature, l0_lambda = MODELS[name], 2.5, 1e-2
    circuit = make_circuit(
        tiny,
        model=tiny.build().double(),
        mask_hparams={"mask_unit": mask_unit, "mask_bias": True, "rescale": rescale, "mask_init_value": -0.3},
        freeze_base=False,
        l0_lambda=l0_lambda,
    )
    circuit.temperature = temperature
    batch = {k: v.double() if v.is_floating_point() else v for k, v in tiny.batch(0).items()}
    a_loss(circuit(**batch)).backward()
    if name == "plain":
        (l0_lambda * circuit.l0()).backward()

    base = tiny.build().double().train(circuit.wrapped_model.training)
    scale = 1 / torch.sigmoid(torch.tensor(-0.3, dtype=torch.float64)) if rescale else 1.0
    leaves = {n: p.detach().clone().requires_grad_() for n, p in base.named_parameters()}
    logits = {n: p.detach().double().requires_grad_() for n, p in circuit.named_mask_parameters()}
    parameters, l0 = dict(leaves), 0.0
    for layer_name in circuit.masked_layers:
        plain = base.get_submodule(layer_name)
        mask = scale * torch.sigmoid(temperature * logits[f"{layer_name}.mask_logits"])
        mask = unit_shape(plain, mask).expand(plain.weight.shape)
        parameters[f"{layer_name}.weight"] = leaves[f"{layer_name}.weight"] * mask
        l0 = l0 + mask.sum()
        if plain.bias is not None:
            mask = scale * torch.sigmoid(temperature * logits[f"{layer_name}.bias_mask_logits"])
            parameters[f"{layer_name}.bias"] = leaves[f"{layer_name}.bias"] * mask
            l0 = l0 + mask.sum()
    (a_loss(torch.func.functional_call(base, parameters, kwargs=batch)) + l0_lambda * l0).backward()

    for leaf_name, leaf in leaves.items():
        gradient = circuit.wrapped_model.get_parameter(leaf_name).grad
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-6, atol=1e-9, msg=lambda m, n=leaf_name: f"{n}: {m}")
    for mask_name, leaf in logits.items():
        gradient = circuit.wrapped_model.get_parameter(mask_name).grad
        assert gradient.dtype == torch.float32
        tolerance = 1e-6 * leaf.grad.abs().max().item()
        torch.testing.assert_close(gradient.double(), leaf.grad, rtol=1e-5, atol=tolerance)


def test_the_gradient_of_the_contract():
    """``dS = (dWm * W + g) * T * m * (1 - m)``, with every factor computed by hand for one linear layer."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    circuit = CircuitModel(CircuitConfig(target_layers="all"), model)
    randomize_logits(circuit)
    circuit.temperature = 1.7
    x, dout, g = torch.randn(5, 4), torch.randn(5, 3), 0.25
    ((circuit(x) * dout).sum() + g * circuit.l0()).backward()
    m = torch.sigmoid(1.7 * model.mask_logits.detach().double())
    expected = ((dout.t() @ x).double() * model.weight.detach().double() + g) * 1.7 * m * (1 - m)
    torch.testing.assert_close(model.mask_logits.grad.double(), expected, rtol=1e-5, atol=1e-7)


def test_logits_keep_a_gradient_where_m_times_one_minus_m_is_zero_in_fp32():
    circuit = CircuitModel(CircuitConfig(target_layers="all", mask_hparams={"mask_init_value": 0.1}), nn.Linear(4, 3))
    circuit.temperature = 200.0  # T * S = 20
    circuit.l0().backward()
    expected = 200 * math.exp(-20) / (1 + math.exp(-20)) ** 2
    torch.testing.assert_close(circuit.mask_parameters()[0].grad, torch.full((3, 4), expected), rtol=1e-5, atol=0)


# The loss


@pytest.mark.parametrize("name", [n for n in FAMILIES])  # noqa: C416 (a list for the ids)
def test_the_loss_gains_exactly_the_l0_term_in_train_mode_and_nothing_in_eval(name):
    tiny, l0_lambda = MODELS[name], 1e-3
    batch = tiny.batch(0)
    circuit, without = make_circuit(tiny, l0_lambda=l0_lambda), make_circuit(tiny, l0_lambda=l0_lambda, add_l0=False)
    by_hand = sum(torch.sigmoid(p.detach()).sum() for p in circuit.mask_parameters())
    torch.testing.assert_close(circuit.l0(), by_hand, rtol=1e-6, atol=0)
    assert circuit(**batch).loss == without(**batch).loss + l0_lambda * circuit.l0()
    assert circuit(**batch)["loss"] == circuit(**batch).loss == circuit(**batch)[0]
    assert circuit(**batch).loss > without(**batch).loss
    circuit.eval(), without.eval()
    assert circuit(**batch).loss == without(**batch).loss
    hard_count = sum(int((p > 0).sum()) for p in circuit.mask_parameters())
    assert circuit.l0() == hard_count


def test_l0_reduction_mean_does_not_depend_on_the_size_of_the_model():
    tiny = MODELS["bert"]
    batch = tiny.batch(0)
    circuit = make_circuit(tiny, l0_lambda=0.5, l0_reduction="mean")
    plain = make_circuit(tiny, add_l0=False)
    count = sum(p.numel() for p in circuit.mask_parameters())
    mean = circuit.l0("sum") / count
    torch.testing.assert_close(circuit.l0(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(circuit.l0("mean"), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(circuit(**batch).loss - plain(**batch).loss, 0.5 * mean, rtol=1e-4, atol=1e-6)
    for width in (4, 64):
        wide = CircuitModel(CircuitConfig(target_layers="all", l0_reduction="mean"), nn.Linear(width, width))
        assert wide.l0() == 0.5
    with pytest.raises(ValueError, match="reduction must be one of 'sum', 'mean', got 'max'"):
        circuit.l0("max")


def test_switched_off_layers_do_not_count_in_the_loss():
    circuit = make_circuit(MODELS["plain"])
    circuit.use_masks(False, "hidden")
    others = [p for n, p in circuit.named_mask_parameters() if not n.startswith("hidden")]
    torch.testing.assert_close(circuit.l0(), sum(torch.sigmoid(p).sum() for p in others), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_positional_and_keyword_arguments_and_every_return_dict(name):
    tiny = MODELS[name]
    batch = tiny.batch(0)
    circuit = make_circuit(tiny, l0_lambda=1e-3)
    expected = circuit(**batch)
    first, *_ = batch
    rest = {k: v for k, v in batch.items() if k != first}
    assert torch.equal(circuit(batch[first], **rest).loss, expected.loss)
    assert torch.equal(circuit(**batch, return_dict=True).loss, expected.loss)
    as_tuple = circuit(**batch, return_dict=False)
    assert type(as_tuple) is tuple
    assert torch.equal(as_tuple[0], expected.loss)
    assert torch.equal(as_tuple[1], expected.logits)
    # Without labels there is no loss, and the first element of the tuple is not to be touched.
    del rest["labels"]
    assert torch.equal(circuit(batch[first], **rest, return_dict=False)[0], expected.logits)
    assert circuit(batch[first], **rest).loss is None
    if name in ("bert", "resnet"):  # the other families fail at this setting without csmask
        circuit.config.return_dict = False
        assert type(circuit(**batch)) is tuple
        assert torch.equal(circuit(**batch)[0], expected.loss)
        circuit.eval()
        hard_loss = circuit(**batch, return_dict=True).loss
        assert torch.equal(circuit(**batch)[0], hard_loss)


def test_labels_given_by_position():
    tiny = MODELS["resnet"]
    batch = tiny.batch(0)
    circuit = make_circuit(tiny, l0_lambda=1e-3)
    expected = circuit(**batch).loss
    assert torch.equal(circuit(batch["pixel_values"], batch["labels"]).loss, expected)
    assert torch.equal(circuit(batch["pixel_values"], batch["labels"], return_dict=False)[0], expected)


def test_losses_whose_labels_have_other_names():
    """Question answering takes start and end positions: its loss gains l0 in a tuple as in a dict."""
    config = MODELS["bert"].build().config
    config.num_labels = 2
    model = BertForQuestionAnswering(config).eval()
    circuit = CircuitModel(CircuitConfig(target_layers="*.query", l0_lambda=1e-3), model)
    batch = {k: v for k, v in MODELS["bert"].batch(0).items() if k != "labels"}
    batch.update(start_positions=torch.tensor([0, 1, 2]), end_positions=torch.tensor([1, 2, 3]))
    loss = circuit(**batch).loss
    circuit.circuit_config.add_l0 = False
    assert loss == circuit(**batch).loss + 1e-3 * circuit.l0()
    circuit.circuit_config.add_l0 = True
    assert torch.equal(circuit(**batch, return_dict=False)[0], loss)


class _Named(typing.NamedTuple):
    loss: Tensor
    logits: Tensor


@dataclasses.dataclass
class _Record:
    loss: Tensor | None
    logits: Tensor


class Loss(nn.Module):
    """A plain module that returns a loss in one of the ways in which modules do."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.kind = kind

    def forward(self, x, labels=None):
        logits = self.fc(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        kinds = {"dict": lambda: {"loss": loss, "logits": logits}, "record": lambda: _Record(loss, logits)}
        kinds["named"] = lambda: _Named(loss, logits)
        kinds["tuple"] = lambda: (loss, logits)
        kinds["none"] = lambda: None
        kinds["number"] = lambda: 3
        return kinds[self.kind]()


@pytest.mark.parametrize("kind", ["dict", "record", "named", "tuple", "none", "number"])
def test_plain_modules_return_what_they_return(kind):
    torch.manual_seed(0)
    x, labels = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    circuit = CircuitModel(CircuitConfig(target_layers="fc", l0_lambda=0.5), Loss(kind))
    base = CircuitModel(CircuitConfig(target_layers="fc", add_l0=False), copy.deepcopy(circuit).unload())
    for arguments in ({"labels": labels}, {}):
        output, plain = circuit(x, **arguments), base(x, **arguments)
        assert type(output) is type(plain)
        if kind in ("none", "number"):
            assert output == plain
            continue
        get = (lambda o: o["loss"]) if kind == "dict" else (lambda o: o[0] if kind == "tuple" else o.loss)
        if not arguments:
            assert get(output) is None
        else:
            assert get(output) == get(plain) + 0.5 * circuit.l0()


def test_a_model_without_a_loss_is_trained_with_l0_of_ones_own():
    circuit = make_circuit(MODELS["plain"])
    out = circuit(MODELS["plain"].batch(0)["x"])
    assert torch.equal(out, circuit(x=MODELS["plain"].batch(0)["x"]))
    (out.sum() + circuit.l0()).backward()
    assert all(p.grad is not None for p in circuit.mask_parameters())
    with pytest.raises(TypeError, match="return_dict"):
        circuit(MODELS["plain"].batch(0)["x"], return_dict=True)


# Statistics


@pytest.mark.parametrize(
    ("hparams", "kept", "maskable"),
    [
        ({}, {"conv": 2, "hidden": 3, "head": 1}, {"conv": 72, "hidden": 240, "head": 24}),
        ({"mask_bias": True}, {"conv": 2 + 1, "hidden": 3 + 1, "head": 1}, {"conv": 78, "hidden": 248, "head": 24}),
        (
            {"mask_unit": "neuron"},
            {"conv": 2 * 12, "hidden": 3 * 30, "head": 8},
            {"conv": 72, "hidden": 240, "head": 24},
        ),
    ],
    ids=["weight", "bias", "neuron"],
)
@pytest.mark.filterwarnings("ignore:mask_bias")
def test_l0_statistics_count_the_hard_mask_in_every_mode(hparams, kept, maskable):
    circuit = make_circuit(MODELS["plain"], target_layers="all", mask_hparams=hparams, randomize=False)
    with torch.no_grad():
        for name, param in circuit.named_mask_parameters():
            param.fill_(-1.0)
            param.view(-1)[-1] = 0.0  # pruned
            ones = 1 if "bias" in name else {"conv": 2, "hidden": 3, "head": 1}[name.split(".")[0]]
            param.view(-1)[:ones] = 1.0
    expected = {
        "total_l0": sum(kept.values()),
        "max_l0": sum(maskable.values()),
        "layer2l0": kept,
        "layer2maxl0": maskable,
    }

    def check():
        statistics = circuit.compute_l0_statistics()
        assert statistics == expected
        numbers = [statistics["total_l0"], statistics["max_l0"], *statistics["layer2l0"].values()]
        assert all(type(n) is int for n in [*numbers, *statistics["layer2maxl0"].values()])
        assert json.loads(json.dumps(statistics)) == statistics

    check()
    training = circuit.training
    circuit.temperature = 200.0
    check()
    assert circuit.training is training
    circuit.eval()
    check()
    for mode in ("zero_ablate", "random_ablate", "randomly_sampled", "complement_sampled", "uniform_sampled", "none"):
        circuit.set_ablate_mode(mode)
        check()
    circuit.use_masks(False)
    check()
    assert circuit.density() == expected["total_l0"] / expected["max_l0"]
    assert circuit.eval().l0() == 0.0
    circuit.use_masks(True)
    assert circuit.l0() == expected["total_l0"]


def test_undecided_fraction_is_the_share_of_weights_with_small_logits():
    circuit = CircuitModel(CircuitConfig(target_layers="all", mask_hparams={"mask_unit": "neuron"}), nn.Linear(10, 4))
    with torch.no_grad():
        circuit.mask_parameters()[0].copy_(torch.tensor([0.0, 3.9, -3.9, 4.0]))
    assert circuit.undecided_fraction() == 0.75
    circuit.temperature = 2.0
    assert circuit.undecided_fraction() == 0.25


def test_logits_with_nan_are_named():
    circuit = make_circuit(MODELS["plain"])
    with torch.no_grad():
        circuit.masked_layers["hidden"].mask_logits[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"hidden\.mask_logits holds NaN"):
        circuit.compute_l0_statistics()


# Masked biases, rescaling


def test_masked_biases_are_multiplied_and_unmasked_ones_are_not():
    torch.manual_seed(0)
    for mask_bias in (True, False):
        layer = nn.Linear(3, 4)
        circuit = CircuitModel(CircuitConfig(target_layers="all", mask_hparams={"mask_bias": mask_bias}), layer)
        if mask_bias:
            with torch.no_grad():
                layer.bias_mask_logits.copy_(torch.tensor([2.0, -2.0, 0.0, 1e-9]))
            m = torch.sigmoid(layer.bias_mask_logits.detach())
            kept = torch.tensor([1.0, 0.0, 0.0, 1.0])
        else:
            assert layer.bias_mask_logits is None
            m = kept = torch.ones(4)
        nothing = torch.zeros(1, 3)
        torch.testing.assert_close(circuit(nothing)[0], layer.bias * m, rtol=1e-6, atol=0)
        assert torch.equal(circuit.eval()(nothing)[0], layer.bias * kept)


@pytest.mark.parametrize("init", [-3.0, 0.0, 2.0])
def test_rescale_divides_soft_and_hard_masks_by_the_first_sigmoid(init):
    torch.manual_seed(0)
    layer = nn.Linear(3, 4, bias=False)
    config = CircuitConfig(target_layers="all", mask_hparams={"mask_init_value": init, "rescale": True})
    circuit = CircuitModel(config, layer)
    x = torch.randn(2, 3)
    # At the start every weight is the base's own, which is what rescaling is for.
    torch.testing.assert_close(circuit(x), nn.functional.linear(x, layer.weight), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(circuit.l0(), torch.tensor(12.0), rtol=1e-6, atol=0)
    randomize_logits(circuit)
    divisor = 1 / (1 + math.exp(-init))
    circuit.temperature = 5.0
    soft = torch.sigmoid(5 * layer.mask_logits.detach()) / divisor
    torch.testing.assert_close(circuit(x), nn.functional.linear(x, layer.weight * soft), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(circuit.l0(), soft.sum(), rtol=1e-5, atol=0)
    circuit.eval()
    kept = hard(layer.mask_logits) / divisor
    torch.testing.assert_close(circuit(x), nn.functional.linear(x, layer.weight * kept), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(circuit.export()(x), circuit(x), rtol=0, atol=0)
    assert circuit.compute_l0_statistics()["total_l0"] == int((layer.mask_logits > 0).sum())


# Modes, temperature


def test_train_and_eval_return_the_circuit_and_switch_the_masks():
    circuit = make_circuit(MODELS["bert"])
    assert circuit.training
    assert circuit.eval() is circuit
    assert not circuit.training
    assert circuit.train() is circuit
    assert circuit.train(False) is circuit
    assert not circuit.training
    assert all(layer.hard for layer in circuit.masked_layers.values())
    assert circuit.train(True).training
    assert not any(layer.hard for layer in circuit.masked_layers.values())
    with pytest.raises(ValueError, match="training mode must be True or False"):
        circuit.train(1)


def test_logits_that_are_not_trained_are_hard_in_train_mode():
    tiny = MODELS["bert"]
    circuit = make_circuit(tiny, add_l0=False)
    expected = main_output(dense_by_hand(tiny, circuit, hard)(**tiny.batch(0)))
    for param in circuit.mask_parameters():
        param.requires_grad_(False)
    circuit.train()
    assert torch.equal(circuit(**tiny.batch(0)).logits, expected)
    assert circuit.l0() == circuit.compute_l0_statistics()["total_l0"]
    circuit.set_ablate_mode("zero_ablate")  # allowed, as the masks are hard
    for param in circuit.mask_parameters():
        param.requires_grad_(True)
    with pytest.raises(ValueError, match=r"call \.eval\(\) first"):
        circuit(**tiny.batch(0))


def test_evaluation_builds_no_graph_over_a_frozen_base():
    """Hard masks have no gradient: evaluating outside ``no_grad`` keeps no activations."""
    tiny = MODELS["bert"]
    circuit = make_circuit(tiny).eval()
    assert not circuit(**tiny.batch(0)).logits.requires_grad
    assert not circuit.l0().requires_grad


def test_temperature_is_one_value_for_all_layers_and_is_checked():
    circuit = make_circuit(MODELS["plain"])
    assert circuit.temperature == 1.0
    circuit.temperature = 3.5
    assert circuit.temperature == 3.5
    assert type(circuit.temperature) is float
    assert {layer.temperature.item() for layer in circuit.masked_layers.values()} == {3.5}
    circuit.temperature = torch.tensor(2.0)
    assert circuit.temperature == 2.0
    for bad in (0, -1.0, math.nan, math.inf, 0.0):
        with pytest.raises(ValueError, match="temperature must be a positive finite number"):
            circuit.temperature = bad
    assert circuit.temperature == 2.0


def test_temperature_is_set_in_place_and_changes_the_forward():
    tiny = MODELS["plain"]
    circuit = make_circuit(tiny)
    buffers = [layer.temperature for layer in circuit.masked_layers.values()]
    before = circuit(**tiny.batch(0))
    circuit.temperature = 50.0
    assert [layer.temperature for layer in circuit.masked_layers.values()] == buffers
    assert all(a is b.temperature for a, b in zip(buffers, circuit.masked_layers.values(), strict=True))
    after = circuit(**tiny.batch(0))
    assert not torch.equal(before, after)
    torch.testing.assert_close(
        after, dense_by_hand(tiny, circuit, soft_at(50.0))(**tiny.batch(0)), rtol=1e-4, atol=1e-5
    )


# Attribute forwarding


def test_attributes_and_methods_are_the_base_models():
    tiny = MODELS["bert"]
    circuit = make_circuit(tiny)
    base = circuit.wrapped_model
    assert circuit.config is base.config
    assert circuit.device == torch.device("cpu")
    assert circuit.dtype == torch.float32
    assert circuit.bert is base.bert
    assert circuit.get_input_embeddings() is base.bert.embeddings.word_embeddings
    assert circuit.num_labels == 3
    assert isinstance(circuit.circuit_config, CircuitConfig)
    for missing in ("no_such_attribute", "__no_such_dunder__"):
        assert not hasattr(circuit, missing)
    with pytest.raises(AttributeError, match="no_such_attribute"):
        _ = circuit.no_such_attribute


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generate_uses_the_masks(name):
    tiny = MODELS[name]
    circuit = make_circuit(tiny).eval()
    dense = dense_by_hand(tiny, circuit, hard)
    ids = tiny.batch(0)["input_ids"][:, :3]
    arguments = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = dense.generate(ids, **arguments)
    assert expected.shape == (3, 9)
    assert torch.equal(circuit.generate(ids, **arguments), expected)
    assert not torch.equal(tiny.build().generate(ids, **arguments), expected)


# Compilation


@pytest.mark.dropin
@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet"])
def test_compiles_into_one_graph_that_no_temperature_change_recompiles(name):
    tiny = MODELS[name]
    batch = tiny.batch(0)
    circuit = make_circuit(tiny, l0_lambda=1e-3)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(circuit, backend=counter, fullgraph=True)
    for temperature in (1.0, 2.0, 3.7, 200.0):
        circuit.temperature = temperature
        circuit.zero_grad()
        expected = circuit(**batch).loss
        expected.backward()
        gradients = [p.grad.clone() for p in circuit.mask_parameters()]
        circuit.zero_grad()
        loss = compiled(**batch).loss
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        for param, gradient in zip(circuit.mask_parameters(), gradients, strict=True):
            tolerance = 1e-5 * gradient.abs().max().item()
            torch.testing.assert_close(param.grad, gradient, rtol=1e-4, atol=tolerance)
    assert counter.frame_count == 1
    torch._dynamo.reset()


OPCHECK = {
    "linear": ((3, 4), (3, 4)),
    "neuron": ((3, 4), (3, 1)),
    "gpt2 neuron": ((4, 3), (1, 3)),
    "conv": ((2, 3, 3, 3), (2, 1, 1, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", OPCHECK)
def test_operators_pass_opcheck(case, dtype):
    weight_shape, logits_shape = OPCHECK[case]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(weight_shape, generator=generator).to(dtype)
    logits = torch.randn(logits_shape, generator=generator)
    temperature = torch.tensor(2.0)
    for hard_flag, out_dtype in ((False, None), (True, torch.float32), (False, torch.bfloat16)):
        arguments = (weight, logits, temperature, hard_flag, 1.0, out_dtype)
        torch.library.opcheck(torch.ops.csmask.materialize.default, arguments)
    gradient = torch.randn(weight_shape, generator=generator).to(dtype)
    for dl0 in (None, torch.tensor(0.5)):
        arguments = (gradient, weight, logits, temperature, dl0, 1.0)
        torch.library.opcheck(torch.ops.csmask.logits_grad.default, arguments)


def test_the_operators_are_what_a_masked_layer_calls(monkeypatch):
    """The tests of numbers would pass on plain torch; the default execution must run the operators."""
    calls = []
    for name, weight in (("materialize", 0), ("masked_linear", 1)):  # the second is what a CPU with C++ kernels picks
        original = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, o=original, w=weight: calls.append(a[w].shape) or o(*a))
    circuit = make_circuit(MODELS["plain"], target_layers="hidden", randomize=False)
    circuit(**MODELS["plain"].batch(0))
    assert calls == [(8, 30)]
    assert circuit.masked_layers["hidden"].ops is functional


# Mixed precision


@pytest.mark.dropin
@pytest.mark.parametrize("execution", ["auto", "reference"])
@every_family
def test_autocast_gives_the_numbers_of_the_masked_dense_model_under_autocast(tiny, execution):
    circuit = make_circuit(tiny, execution=execution).eval()
    dense = dense_by_hand(tiny, circuit, hard)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(main_output(circuit(**tiny.batch(0))), main_output(dense(**tiny.batch(0))))


# Ablations of a whole model; the modes themselves are tested in test_ablation.py


@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet", "plain"])
def test_ablations_are_dense_models_too(name):
    tiny = MODELS[name]
    batch = tiny.batch(0)
    circuit = make_circuit(tiny).eval()
    with torch.no_grad():
        for param in circuit.mask_parameters():
            param.sub_(1.0)  # below half, so that controls of its size exist
    before = main_output(circuit(**batch))
    circuit.set_ablate_mode("zero_ablate")
    complement = dense_by_hand(tiny, circuit, lambda logits: (logits <= 0).float())
    assert torch.equal(main_output(circuit(**batch)), main_output(complement(**batch)))
    outputs = []
    for seed in (0, 1, 0):
        circuit.set_ablate_mode("randomly_sampled", seed=seed)
        outputs.append(main_output(circuit(**batch)))
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])
    circuit.set_ablate_mode("none")
    assert torch.equal(main_output(circuit(**batch)), before)


def test_ablation_from_the_config_waits_for_evaluation():
    tiny = MODELS["bert"]
    circuit = make_circuit(tiny, mask_hparams={"ablation": "zero_ablate"})
    assert circuit.ablate_mode == "zero_ablate"
    with pytest.raises(ValueError, match=r"ablation 'zero_ablate' needs hard masks.*call \.eval\(\) first"):
        circuit(**tiny.batch(0))
    complement = dense_by_hand(tiny, circuit, lambda logits: (logits <= 0).float())
    assert torch.equal(circuit.eval()(**tiny.batch(0)).logits, complement(**tiny.batch(0)).logits)


def test_set_ablate_mode_in_training_is_refused_and_changes_nothing():
    circuit = make_circuit(MODELS["plain"])
    for mode in ("zero_ablate", "random_ablate", "randomly_sampled", "complement_sampled", "uniform_sampled"):
        with pytest.raises(ValueError, match=r"masks are in training: call \.eval\(\) first"):
            circuit.set_ablate_mode(mode)
        assert circuit.ablate_mode == "none"
    circuit.set_ablate_mode("none")
    for bad in ("zero", None, 3):
        with pytest.raises(ValueError, match="ablation mode must be one of"):
            circuit.eval().set_ablate_mode(bad)
    assert circuit.ablate_mode == "none"


def test_plain_model_of_the_tests_is_not_trivial():
    """The control of all of the above: every masked layer of every tiny model matters to the output."""
    for tiny in MODELS.values():
        circuit = make_circuit(tiny, randomize=False, mask_hparams={"mask_init_value": 1.0}).eval()
        expected = main_output(circuit(**tiny.batch(0)))
        for name, layer in circuit.masked_layers.items():
            with torch.no_grad():
                layer.mask_logits.view(-1)[: layer.mask_logits.numel() // 2] = -1.0
            assert not torch.equal(main_output(circuit(**tiny.batch(0))), expected), (tiny.name, name)
            with torch.no_grad():
                layer.mask_logits.fill_(1.0)
    assert isinstance(MODELS["plain"].build(), PlainModel)
