"""The known traps of mask training, one named test each; the number is the trap's own.

Each test fails on the behaviour that its docstring describes.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
from models import MODELS, PlainModel, randomize_logits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from csmask import CircuitConfig, CircuitModel, ablation
from csmask.layers import MaskedLayer

MODES = ("zero_ablate", "random_ablate", "randomly_sampled", "complement_sampled", "uniform_sampled")
# Name -> (layer, input): every kind of layer that csmask masks.
LAYERS = {
    "linear": (lambda: nn.Linear(24, 20), (3, 24)),
    "Conv1D": (lambda: Conv1D(20, 24), (3, 24)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1, stride=2), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2), (2, 6, 5, 5)),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)


def mask_one(kind: str, *, sparse: bool = True, **hparams) -> tuple[CircuitModel, torch.Tensor]:
    """One masked layer with random logits, about a sixth of them above zero, and an input for it."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make()
    with torch.no_grad():
        layer.bias.normal_()
    circuit = CircuitModel(CircuitConfig(target_layers="all", mask_hparams=hparams), layer)
    randomize_logits(circuit)
    if sparse:
        with torch.no_grad():
            for param in circuit.mask_parameters():
                param.sub_(1.0)
    return circuit, torch.randn(shape)


def ablated(circuit: CircuitModel, which: str) -> torch.Tensor:
    """Which entries of the weight (or bias) the present ablation changed."""
    layer = next(iter(circuit.masked_layers.values()))
    weight, bias = layer.ablated_parameters()
    return weight != layer.weight if which == "weight" else bias != layer.bias


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_01_gradient_checkpointing_recomputes_while_the_frozen_base_is_in_eval():
    """transformers checkpoints only modules in train mode: a frozen base, in eval, silently kept every activation.

    More in test_frozen_base.py: seven families, both kinds of checkpointing, gradients to the bit.
    """
    for name in ("bert", "gpt2", "opt", "bart"):
        tiny = MODELS[name]
        blocks = {"bert": "bert.encoder.layer.*", "gpt2": "transformer.h.*"}.get(name, "model.*layers.*")
        circuit = CircuitModel(CircuitConfig(target_layers=blocks), tiny.build(0.5))
        circuit.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        calls = []
        for layer in circuit.masked_layers.values():
            layer.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(module))
        losses = [circuit(**tiny.batch(0)).loss, circuit(**tiny.batch(0)).loss]
        assert torch.equal(*losses), "dropout is on"
        before = len(calls)
        losses[0].backward()
        assert before == 2 * len(circuit.masked_layers), name
        assert len(calls) == 3 * len(circuit.masked_layers), name


@every_layer
@pytest.mark.parametrize("mode", MODES)
def test_02_going_back_to_none_or_to_training_after_an_ablation(kind, mode):
    """After ``randomly_sampled``, going back to ``none`` or to training raised TypeError."""
    circuit, x = mask_one(kind, mask_bias=True)
    soft = circuit(x)
    hard = circuit.eval()(x)
    circuit.set_ablate_mode(mode)
    assert not torch.equal(circuit(x), hard)
    circuit.set_ablate_mode("none")
    assert torch.equal(circuit(x), hard)
    assert torch.equal(circuit.train()(x), soft)
    circuit(x).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in circuit.mask_parameters())


def test_03_random_masks_do_not_survive_a_change_of_mode_seed_or_circuit():
    """Cached random masks were used again after a change of mode and of the circuit; resampling skipped the bias."""
    circuit, x = mask_one("linear", mask_bias=True)
    layer = circuit.wrapped_model
    circuit.eval()
    circuit.set_ablate_mode("randomly_sampled", seed=1)
    first = ablated(circuit, "weight"), ablated(circuit, "bias")
    out = circuit(x)
    assert torch.equal(circuit(x), out)
    # Another mode draws its own.
    circuit.set_ablate_mode("uniform_sampled", seed=1)
    assert not torch.equal(ablated(circuit, "weight"), first[0])
    circuit.set_ablate_mode("randomly_sampled", seed=1)
    assert torch.equal(circuit(x), out)
    # Another seed draws again, weight and bias.
    biases = set()
    for seed in range(2, 12):
        circuit.set_ablate_mode("randomly_sampled", seed=seed)
        assert not torch.equal(ablated(circuit, "weight"), first[0])
        biases.add(tuple(ablated(circuit, "bias").tolist()))
    assert len(biases) > 1
    # Another circuit draws again, however the logits were changed: the draw never touches the circuit's own entries.
    circuit.set_ablate_mode("randomly_sampled", seed=1)
    changes = (
        lambda: layer.mask_logits.neg_().sub_(1.0),
        lambda: layer.mask_logits.data.copy_(torch.roll(layer.mask_logits, 3)),
        lambda: layer.load_state_dict({**layer.state_dict(), "mask_logits": torch.roll(layer.mask_logits, 5)}),
    )
    for change in changes:
        with torch.no_grad():
            change()
        drawn = ablated(circuit, "weight")
        assert drawn.sum() == (layer.mask_logits > 0).sum() > 0
        assert not (drawn & (layer.mask_logits > 0)).any()


@every_layer
def test_04_draws_are_made_on_the_device_of_the_layer(kind):
    """``random_ablate`` and random sampling drew on the CPU and failed elsewhere: here on the meta device."""
    circuit, _ = mask_one(kind, mask_bias=True)
    layer = circuit.to("meta").wrapped_model
    devices = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() > 0:
                devices.add(out.device.type)
            return out

    for param in (layer.weight, layer.bias):
        with Watch():
            values = ablation.random_values(param.detach(), layer.fan_in, 0, 0)
            chosen = ablation.sample_entries(torch.zeros_like(param, dtype=torch.bool), 3, 0, 0, 0)
        assert values.device.type == chosen.device.type == "meta"
        assert values.shape == chosen.shape == param.shape
    assert devices == {"meta"}


@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet", "llama"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("when", ["base", "circuit"])
def test_05_bf16_base_trains_and_evaluates(name, training, autocast, when):
    """A bf16 base failed without autocast; a whole model in bf16 trained and then failed in eval."""
    tiny = MODELS[name]
    base = tiny.build().to(torch.bfloat16)
    if when == "base":
        circuit = CircuitModel(CircuitConfig(target_layers=list(tiny.targets)), base)
    else:
        circuit = CircuitModel(CircuitConfig(target_layers=list(tiny.targets)), tiny.build())
        assert circuit.to(torch.bfloat16) is circuit
    randomize_logits(circuit)
    circuit.train(training)
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tiny.batch(0).items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = circuit(**batch)
    # The same with the masked weight, rounded once to bf16, in a plain model.
    dense = tiny.build().to(torch.bfloat16)
    with torch.no_grad():
        for layer_name, layer in circuit.masked_layers.items():
            mask = torch.sigmoid(layer.mask_logits) if training else (layer.mask_logits > 0).float()
            plain = dense.get_submodule(layer_name)
            plain.weight = nn.Parameter((plain.weight.float() * mask).bfloat16())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = dense(**batch)
    assert output.logits.dtype == expected.logits.dtype
    assert torch.equal(output.logits, expected.logits)
    assert {p.dtype for p in circuit.mask_parameters()} == {torch.float32}
    assert {layer.temperature.dtype for layer in circuit.masked_layers.values()} == {torch.float32}
    assert {layer.weight.dtype for layer in circuit.masked_layers.values()} == {torch.bfloat16}
    if training:
        output.loss.backward()
        assert {p.grad.dtype for p in circuit.mask_parameters()} == {torch.float32}
        assert all(p.grad.abs().sum() > 0 for p in circuit.mask_parameters())
    else:
        circuit.set_ablate_mode("zero_ablate")
        assert not torch.equal(circuit.to(torch.bfloat16)(**batch).logits, output.logits)


def test_05_logits_keep_fp32_through_every_change_of_dtype():
    """bf16 logits would lose every update smaller than half an ulp, fp16 ones overflow."""
    circuit, _ = mask_one("linear", mask_bias=True)
    circuit.l0().backward()
    values = [p.detach().clone() for p in circuit.mask_parameters()]
    gradients = [p.grad.clone() for p in circuit.mask_parameters()]
    parameters = circuit.mask_parameters()
    for change in (circuit.half, circuit.bfloat16, lambda: circuit.to(torch.float16), circuit.double, circuit.float):
        change()
        assert all(a is b for a, b in zip(circuit.mask_parameters(), parameters, strict=True))
        for param, value, gradient in zip(parameters, values, gradients, strict=True):
            assert param.dtype == param.grad.dtype == torch.float32
            assert torch.equal(param, value)
            assert torch.equal(param.grad, gradient)


@every_layer
@pytest.mark.parametrize("mask_unit", ["weight", "neuron"])
def test_06_new_parameters_are_made_where_the_base_is(kind, mask_unit):
    """Mask parameters appeared on the CPU, whatever device the base was on: here the meta device."""
    with torch.device("meta"):
        layer = LAYERS[kind][0]()
    hparams = {"mask_bias": True, "mask_unit": mask_unit}
    circuit = CircuitModel(CircuitConfig(target_layers="all", mask_hparams=hparams), layer)
    assert {t.device.type for t in (*circuit.parameters(), *circuit.buffers())} == {"meta"}
    assert {t.dtype for t in circuit.mask_parameters()} == {torch.float32}
    assert circuit(torch.empty(LAYERS[kind][1], device="meta")).device.type == "meta"
    cpu = CircuitModel(CircuitConfig(target_layers="all", mask_hparams=hparams), LAYERS[kind][0]()).to("meta")
    assert {t.device.type for t in (*cpu.parameters(), *cpu.buffers())} == {"meta"}


@pytest.mark.parametrize("kind", ["conv1d", "conv2d"])
def test_07_convolutions_keep_one_weight(kind):
    """Conv layers kept a second, random copy of the weight: double memory, an extra state-dict key."""
    plain = LAYERS[kind][0]()
    circuit = CircuitModel(CircuitConfig(target_layers="all"), plain)
    layer = circuit.wrapped_model

    def count(tensors) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    expected = 2 * 4 * layer.weight.numel() + 4 * layer.bias.numel() + 4  # weight, logits; bias; temperature
    assert count(layer.state_dict().values()) == expected
    assert count([*circuit.parameters(), *circuit.buffers()]) == expected
    assert sorted(layer.state_dict()) == ["bias", "mask_logits", "temperature", "weight"]
    # A training checkpoint holds no frozen base.
    assert sorted(circuit.state_dict()) == ["_extra_state", "wrapped_model.mask_logits", "wrapped_model.temperature"]
    held = {id(v) for v in vars(layer).values() if isinstance(v, torch.Tensor)}
    assert held == set()


def saved_storages(run) -> dict[int, int]:
    """Bytes by storage of everything that autograd saves for backward while ``run`` runs."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    return saved, out


@pytest.mark.parametrize("mask_unit", ["weight", "neuron"])
@pytest.mark.parametrize("freeze_base", [True, False], ids=["frozen", "trained"])
@every_layer
def test_08_nothing_of_the_weights_size_is_saved_for_backward(kind, freeze_base, mask_unit):
    """12 bytes per weight were saved for backward in fp32, and the mask stayed alive as an attribute."""
    torch.manual_seed(0)
    layer = LAYERS[kind][0]()
    config = CircuitConfig(target_layers="all", freeze_base=freeze_base, mask_hparams={"mask_unit": mask_unit})
    circuit = CircuitModel(config, layer)
    x = torch.randn(LAYERS[kind][1]).requires_grad_()
    saved, out = saved_storages(lambda: (circuit(x), circuit.l0()))
    known = [x, layer.weight, layer.mask_logits, layer.temperature]
    extra = {p: n for p, n in saved.items() if p not in {t.untyped_storage().data_ptr() for t in known}}
    # One logit per neuron: the unscaled output is saved, in place of x where the weight is frozen.
    activations = out[0].nbytes if mask_unit == "neuron" else 0
    assert sum(extra.values()) <= 16 + activations, "more than a scalar or two was saved beyond W, S and x"
    (out[0].sum() + out[1]).backward()
    for value in vars(layer).values():
        assert not isinstance(value, torch.Tensor)
    assert not any(isinstance(v, torch.Tensor) for v in layer._ablation_cache.values())


@every_layer
def test_09_a_neuron_has_one_logit(kind):
    """Neuron masks were expanded to the full weight; a conv "neuron" was ``(out, 1, k, k)``, not one per filter."""
    circuit, x = mask_one(kind, sparse=False, mask_unit="neuron")
    layer = circuit.wrapped_model
    units = {"linear": 20, "Conv1D": 20, "conv1d": 8, "conv2d": 8}[kind]
    assert layer.mask_logits.shape == (units,)
    statistics = circuit.compute_l0_statistics()
    assert statistics["max_l0"] == layer.weight.numel()
    kept = layer.mask_logits > 0
    assert statistics["total_l0"] == int(kept.sum()) * layer.weight.numel() // units
    # A pruned neuron gives its bias and nothing else; a kept one the base's own numbers.
    out = circuit.eval()(x)
    dim = 1 if x.dim() > 2 else -1
    base = circuit.unload()(x)
    assert torch.equal(out.index_select(dim, kept.nonzero()[:, 0]), base.index_select(dim, kept.nonzero()[:, 0]))
    pruned = (~kept).nonzero()[:, 0]
    assert pruned.numel()
    expected = layer.bias[pruned].view([-1 if d == dim % x.dim() else 1 for d in range(x.dim())])
    assert torch.equal(out.index_select(dim, pruned), expected.expand_as(out.index_select(dim, pruned)))


def test_10_calls_take_what_the_base_takes():
    """``__call__`` was keyword-only; plain modules failed on ``return_dict``, and one given by the user collided."""
    plain = CircuitModel(CircuitConfig(target_layers="all"), PlainModel())
    x = MODELS["plain"].batch(0)["x"]
    assert torch.equal(plain(x), plain(x=x))
    tiny = MODELS["bert"]
    circuit = CircuitModel(CircuitConfig(target_layers="all-linear"), tiny.build())
    batch = tiny.batch(0)
    expected = circuit(**batch).logits
    assert torch.equal(circuit(batch["input_ids"], batch["attention_mask"]).logits, expected)
    assert torch.equal(circuit(**batch, return_dict=True).logits, expected)
    assert torch.equal(circuit(**batch, return_dict=False)[1], expected)


def test_11_train_and_eval_return_the_model_and_its_methods_are_there():
    """``train()`` and ``eval()`` returned None; there was no ``generate`` and no attribute forwarding."""
    tiny = MODELS["gpt2"]
    circuit = CircuitModel(CircuitConfig(target_layers="all-linear"), tiny.build())
    assert circuit.eval() is circuit.train() is circuit
    assert circuit.config is circuit.wrapped_model.config
    ids = tiny.batch(0)["input_ids"]
    generated = circuit.eval().generate(ids, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(ids))
    assert generated.shape == (3, 9)
    assert torch.equal(generated[:, 6], circuit(ids).logits[:, -1].argmax(-1))


class Shifted(nn.Linear):
    """A user's linear layer: its own attributes and methods, the forward of ``nn.Linear``."""

    def __init__(self, *args, note: str = "none") -> None:
        super().__init__(*args)
        self.note = note
        self.register_buffer("count", torch.tensor(3))

    def describe(self) -> str:
        return f"{self.note} {self.in_features}"

    @property
    def size(self) -> int:
        return self.weight.numel()

    def extra_repr(self) -> str:
        return f"note={self.note}, {super().extra_repr()}"


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet", "plain", "subclass"])
def test_14_copies_after_a_training_forward_and_an_ablation(name, way):
    """``deepcopy`` after a training forward failed on a non-leaf attribute."""
    if name == "subclass":
        torch.manual_seed(0)
        circuit = CircuitModel(CircuitConfig(target_layers="0"), nn.Sequential(Shifted(4, 3, note="mine")))
        batch = {"input": torch.randn(2, 4)}
    else:
        tiny = MODELS[name]
        circuit = CircuitModel(CircuitConfig(target_layers=list(tiny.targets)), tiny.build())
        batch = tiny.batch(0)
    randomize_logits(circuit)
    circuit.temperature = 3.0

    def numbers(model):
        output = model(**batch)
        return output if isinstance(output, torch.Tensor) else output.logits

    circuit.l0().backward()
    soft = numbers(circuit)
    circuit.eval()
    circuit.set_ablate_mode("zero_ablate", seed=4)
    hard = numbers(circuit)
    if way == "deepcopy":
        copied = copy.deepcopy(circuit)
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(circuit))
    else:
        file = io.BytesIO()
        torch.save(circuit, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert (copied.ablate_mode, copied.training, copied.temperature) == ("zero_ablate", False, 3.0)
    assert copied.circuit_config == circuit.circuit_config
    assert torch.equal(numbers(copied), hard)
    # Independent of the original: no tensor is shared, and its layers are those that its methods work on.
    with torch.no_grad():
        for param in copied.mask_parameters():
            param.fill_(-1.0)
    copied.temperature = 9.0
    assert circuit.temperature == 3.0
    assert copied.compute_l0_statistics()["total_l0"] == 0
    assert torch.equal(numbers(circuit), hard)
    circuit.set_ablate_mode("none")
    assert torch.equal(numbers(circuit.train()), soft)
    assert [type(m).__name__ for m in copied.modules()] == [type(m).__name__ for m in circuit.modules()]
    if name == "subclass":
        assert copied.wrapped_model[0].describe() == "mine 4"
    assert not any(isinstance(m, MaskedLayer) for m in copied.unload().modules())


def test_15_state_dict_and_config_hold_everything():
    """Temperature was lost on save and load; keys depended on the ablation history; a config could not be reloaded."""
    tiny = MODELS["bert"]
    config = CircuitConfig(
        target_layers=list(tiny.targets), mask_hparams={"mask_bias": True, "mask_init_value": 0.2}, l0_lambda=3e-7
    )
    circuit = CircuitModel(config, tiny.build())
    randomize_logits(circuit)
    with torch.no_grad():
        for param in circuit.mask_parameters():
            param.sub_(1.0)
    keys = list(circuit.state_dict())
    circuit(**tiny.batch(0)).loss.backward()
    circuit.eval()
    for mode in (*MODES, "none"):
        circuit.set_ablate_mode(mode)
        circuit(**tiny.batch(0))
        assert list(circuit.state_dict()) == keys, mode
    circuit.temperature = 17.25
    expected = circuit(**tiny.batch(0)).logits
    soft = circuit.train()(**tiny.batch(0)).logits

    file = io.BytesIO()
    torch.save(circuit.state_dict(), file)
    file.seek(0)
    config_again = CircuitConfig.from_json(config.to_json())
    other = CircuitModel(config_again, tiny.build(seed=1))
    before = {name: param.clone() for name, param in other.named_parameters()}
    with pytest.raises(ValueError, match=r"wrong base model.*bert\.encoder"):
        other.load_state_dict(torch.load(file))
    assert all(torch.equal(param, before[name]) for name, param in other.named_parameters())
    file.seek(0)
    again = CircuitModel(config_again, tiny.build())
    assert not torch.equal(again.eval()(**tiny.batch(0)).logits, expected)
    again.load_state_dict(torch.load(file))
    assert again.temperature == 17.25
    assert torch.equal(again(**tiny.batch(0)).logits, expected)
    assert torch.equal(again.train()(**tiny.batch(0)).logits, soft)
    assert again.circuit_config == config
    # A temperature belongs to every state dict, and its absence is an error, not a silent 1.
    missing = {k: v for k, v in circuit.state_dict().items() if not k.endswith("temperature")}
    with pytest.raises(RuntimeError, match=r"Missing key.*temperature"):
        again.load_state_dict(missing)


def test_16_subclasses_of_linear_that_keep_its_forward_are_masked():
    """``nn.Linear`` subclasses were rejected."""
    torch.manual_seed(0)
    layer = Shifted(4, 3, note="mine")
    weight, forward = layer.weight, Shifted.forward
    circuit = CircuitModel(CircuitConfig(target_layers="0"), nn.Sequential(layer))
    randomize_logits(circuit)
    assert isinstance(layer, Shifted)
    assert isinstance(layer, nn.Linear)
    assert layer.weight is weight
    assert (layer.note, layer.describe(), layer.size) == ("mine", "mine 4", 12)
    assert layer.count == 3
    assert "note=mine" in repr(layer)
    assert "in_features=4" in repr(layer)
    assert Shifted.forward is forward is nn.Linear.forward
    x = torch.randn(2, 4)
    kept = torch.where(layer.mask_logits > 0, weight, torch.zeros(()))
    assert torch.equal(circuit.eval()(x), nn.functional.linear(x, kept, layer.bias))
    assert type(circuit.unload()[0]) is Shifted
    assert type(Shifted(4, 3)) is Shifted


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Unlucky(nn.Linear):
    @property
    def weight_norm(self):
        return self.weight.norm()

    def __setattr__(self, name, value):
        if name == "use_masks":
            raise OSError("the disk is full")
        super().__setattr__(name, value)


def test_16_every_failure_is_reported_as_what_it_is():
    """Every inner failure was reported as "not a supported layer type" by a bare except."""
    model = nn.Sequential(nn.Linear(4, 4), Doubled(4, 4))
    with pytest.raises(NotImplementedError, match="layer '1' cannot be masked: Doubled has a forward of its own"):
        CircuitModel(CircuitConfig(target_layers=["0", "1"]), model)
    assert type(model[0]) is nn.Linear
    model = nn.Sequential(nn.Linear(4, 4), Unlucky(4, 4))
    with pytest.raises(OSError, match="the disk is full"):
        CircuitModel(CircuitConfig(target_layers=["0", "1"]), model)
    assert [type(m) for m in model] == [nn.Linear, Unlucky]
    assert all(set(m.state_dict()) == {"weight", "bias"} for m in model)
    assert all(p.requires_grad for p in model.parameters())
    import csmask

    for module in (csmask.layers, csmask.surgery, csmask.circuit, csmask.config):
        assert "except:" not in inspect.getsource(module)


@pytest.mark.parametrize("name", list(MODELS))
def test_17_freeze_base_freezes_parameters_of_every_name(name):
    """freeze_base froze parameters named ``weight`` and ``bias`` only: ``gamma``, class tokens ... were trained."""
    tiny = MODELS[name]
    model = tiny.build()
    model.register_parameter("gamma", nn.Parameter(torch.ones(2)))
    base = {n for n, _ in model.named_parameters()}
    circuit = CircuitModel(CircuitConfig(target_layers=list(tiny.targets)), model)
    trained = {n for n, p in circuit.wrapped_model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in circuit.named_mask_parameters()}
    assert not trained & base
    assert [id(p) for p in circuit.parameters() if p.requires_grad] == [id(p) for p in circuit.mask_parameters()]


def test_18_a_wrong_name_in_use_masks_is_an_error():
    """A wrong name was ignored, and names needed another prefix than ``target_layers``."""
    circuit = CircuitModel(CircuitConfig(target_layers=["conv", "hidden"]), PlainModel())
    for wrong in ("convolution", ["conv", "hiden"], "wrapped_model.convolution"):
        with pytest.raises(ValueError, match="matches no layer; nearest: "):
            circuit.use_masks(False, wrong)
        assert all(layer.use_masks for layer in circuit.masked_layers.values())
    for right in ("conv", "conv.weight", "wrapped_model.conv", ["conv"]):
        circuit.use_masks(False, right)
        assert [n for n, layer in circuit.masked_layers.items() if not layer.use_masks] == ["conv"]
        circuit.use_masks(True)


@pytest.mark.parametrize("mode", ["complement_sampled", "randomly_sampled"])
def test_19_logits_of_zero_belong_to_the_complement(mode):
    """``complement_sampled`` counted ``S < 0``: zeros belonged to neither side, and a fresh mask raised."""
    layer = nn.Linear(10, 10)
    circuit = CircuitModel(CircuitConfig(target_layers="all"), layer).eval()
    circuit.set_ablate_mode(mode)  # a fresh mask: C is empty
    assert not ablated(circuit, "weight").any()
    circuit.set_ablate_mode("none")
    with torch.no_grad():
        layer.mask_logits.view(-1)[:50] = 1.0
    circuit.set_ablate_mode(mode)
    # The complement is the 50 zeros, and all of it is drawn.
    assert torch.equal(ablated(circuit, "weight"), layer.mask_logits == 0)
    circuit.set_ablate_mode("none")
    with torch.no_grad():
        layer.mask_logits.view(-1)[50] = 1.0
    with pytest.raises(ValueError, match="cannot draw 51 entries from a complement of 49"):
        circuit.set_ablate_mode(mode)
    assert circuit.ablate_mode == "none"


@pytest.mark.parametrize(
    ("name", "old", "now"),
    [
        ("modernbert", "bert.encoder.layer.0.attention.self.query", "model.layers.0.attn.Wqkv"),
        ("vit", "vit.encoder.layer.1.attention.attention.query", "vit.layers.1.attention.q_proj"),
        ("vit", "vit.encoder.layer.0.intermediate.dense", "vit.layers.0"),
        ("bert", "encoder.layer.1.attention.self.query", "bert.encoder.layer.1.attention.self.query"),
        ("llama", "model.layers.0.attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("gpt2", "h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_fc"),
        ("resnet", "resnet.encoder.stages.0.layers.0.layer.1.conv", "stages.0.layers.0.layer.1.convolution"),
    ],
)
def test_20_a_name_that_has_moved_is_answered_with_the_near_ones(name, old, now):
    """A config of 2023 did not resolve on today's models, whose layer names moved; nothing said where to."""
    model = MODELS[name].build()
    with pytest.raises(ValueError, match="matches no layer; nearest: ") as caught:
        CircuitModel(CircuitConfig(target_layers=[old]), model)
    message = str(caught.value)
    assert repr(old) in message
    assert now in message
    near = message.split("nearest: ")[1].split(", ")
    assert 1 <= len(near) <= 7  # the layers of a block
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CircuitModel(CircuitConfig(target_layers=near), model)


class _ReadsWeights(torch.nn.Module):
    """Uses the weight of ``inner`` without calling it, as fused attention and scan modules do."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.idle = torch.nn.Sequential(torch.nn.Linear(4, 4))

    def forward(self, x):
        return self.outer(x @ self.inner.weight.t())


def test_a_layer_whose_weight_is_read_without_calling_it_is_named_once():
    model = torch.nn.Sequential(_ReadsWeights())
    circuit = CircuitModel(CircuitConfig(target_layers="all-linear"), model)
    with pytest.warns(UserWarning, match=r"first forward: 0\.inner\. ") as caught:
        circuit(torch.randn(2, 4))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        circuit(torch.randn(2, 4))


def test_a_second_circuit_on_one_base_is_refused_and_the_first_goes_on_training():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    first = CircuitModel(CircuitConfig(target_layers="0"), model)
    with pytest.raises(ValueError, match="belongs to another circuit"):
        CircuitModel(CircuitConfig(target_layers="1"), model)
    assert first.masked_layers["0"].mask_logits.requires_grad
    assert not first.masked_layers["0"].hard


def test_weight_and_bias_logits_are_hard_or_soft_each_by_itself():
    config = CircuitConfig(target_layers="0", mask_hparams={"mask_bias": True, "mask_init_value": -1.0})
    circuit = CircuitModel(config, torch.nn.Sequential(torch.nn.Linear(4, 3)))
    layer = circuit.masked_layers["0"]
    layer.bias_mask_logits.requires_grad_(False)
    torch.testing.assert_close(layer.masked_bias()[0], torch.zeros(3), rtol=0, atol=0)
    soft = torch.sigmoid(torch.tensor(-1.0))
    torch.testing.assert_close(circuit(torch.eye(4)), (layer.weight * soft).t(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(circuit.l0(), 12 * soft)
    layer.bias_mask_logits.requires_grad_(True)
    layer.mask_logits.requires_grad_(False)
    with pytest.raises(ValueError, match="masks are in training"):
        circuit.set_ablate_mode("zero_ablate")
    circuit(torch.eye(4)).sum().backward()
    assert bool((layer.bias_mask_logits.grad != 0).all())


def test_a_draw_made_under_inference_mode_serves_a_forward_with_gradients():
    config = CircuitConfig(target_layers="0", freeze_base=False, mask_hparams={"mask_init_value": -1.0})
    circuit = CircuitModel(config, torch.nn.Sequential(torch.nn.Linear(4, 3))).eval()
    circuit.set_ablate_mode("random_ablate")
    with torch.inference_mode():
        expected = circuit(torch.eye(4)).clone()
    out = circuit(torch.eye(4))
    out.sum().backward()
    assert torch.equal(out.detach(), expected)


def test_a_loss_of_several_numbers_is_an_error():
    class Unreduced(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 1)

        def forward(self, x):
            return {"loss": self.linear(x).squeeze(-1)}

    circuit = CircuitModel(CircuitConfig(target_layers="linear"), Unreduced())
    with pytest.raises(ValueError, match=r"one number .*got shape \(3,\)"):
        circuit(torch.randn(3, 4))
