"""Masks over quantised bases: against a plain layer that has the dequantised weight, and what stays in memory."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
from pathlib import Path

import pytest
import torch
from models import MODELS, assert_same_snapshot, randomize_logits, snapshot
from torch import nn

from csmask import CircuitConfig, CircuitModel, MaskAdamW, TemperatureSchedule
from csmask.config import ABLATION_MODES
from csmask.quantised import format_of, weight_of
from csmask.testing import assert_close, seeded_normal

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")
import bitsandbytes as bnb
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from memory_meter import measure

# Several blocks of each kind's scales.
IN, OUT = 64, 48
TORCHAO = {
    "torchao-int8": Int8WeightOnlyConfig(),
    "torchao-int4": IntxWeightOnlyConfig(weight_dtype=torch.int4),
    "torchao-float8": Float8WeightOnlyConfig(),
}
KINDS = ("nf4", "fp4", "nf4-nested", "int8", *TORCHAO, "torchao-nf4")
every_kind = pytest.mark.parametrize("kind", KINDS)
some_kinds = pytest.mark.parametrize("kind", ["nf4-nested", "int8", "torchao-int8"])


def quantise(linear: nn.Linear, kind: str) -> nn.Linear:
    """A layer of this kind with the weights of a plain one."""
    dtype, has_bias = linear.weight.dtype, linear.bias is not None
    if kind.startswith("torchao"):
        if kind == "torchao-nf4":
            linear.weight = nn.Parameter(to_nf4(linear.weight.detach(), 32, 32), requires_grad=False)
        else:
            quantize_(linear, TORCHAO[kind])
        return linear
    shape = (linear.in_features, linear.out_features, has_bias)
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(linear.weight.detach(), requires_grad=False)
    else:
        layer = bnb.nn.Linear4bit(*shape, compute_dtype=dtype)
        nested = kind.endswith("nested")
        layer.weight = bnb.nn.Params4bit(
            linear.weight.detach(), quant_type=kind[:3], compress_statistics=nested, module=layer
        )
    layer.bias = linear.bias
    return layer.to("cpu")


class Two(nn.Module):
    """A quantised layer of interest, and an embedding, a norm and a plain layer around it."""

    def __init__(self, kind: str | None, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.norm = nn.LayerNorm(IN, dtype=dtype)
            linear, self.head = nn.Linear(IN, OUT, dtype=dtype), nn.Linear(OUT, 3, dtype=dtype)
        self.linear = linear if kind is None else quantise(linear, kind)

    def forward(self, x):
        return self.head(torch.tanh(self.linear(self.norm(x))))


def pair(kind: str, dtype: torch.dtype = torch.float32, execution: str = "per_forward", **hparams):
    """A circuit over a quantised layer, and one over a plain layer that has the dequantised weight."""
    base, plain = Two(kind, dtype), Two(None, dtype)
    plain.linear.weight.data = weight_of(base.linear, dtype).dense()
    config = {"target_layers": ["linear"], "mask_hparams": {"mask_init_value": 0.2, **hparams}}
    circuits = [CircuitModel(CircuitConfig(execution=execution, **config), model) for model in (base, plain)]
    for circuit in circuits:
        randomize_logits(circuit)
        circuit.temperature = 3.0
    return circuits


def results(layer: nn.Module, x: torch.Tensor, reference: bool = False) -> dict[str, torch.Tensor]:
    """Output, l0 and gradients of one masked layer."""
    x = x.clone().requires_grad_()
    out, l0 = layer(x), layer.l0()
    logits = {"dlogits": layer.mask_logits, "dbias_logits": layer.bias_mask_logits}
    wanted = {"dx": x, **{n: p for n, p in logits.items() if p is not None and layer.training}}
    outputs = [(out, seeded_normal(tuple(out.shape), 9, out.dtype))]
    outputs += [(l0, torch.tensor(0.25, dtype=l0.dtype))] if l0.requires_grad else []
    grads = torch.autograd.grad([o for o, _ in outputs], list(wanted.values()), [g for _, g in outputs])
    return {"out": out.detach(), "l0": l0.detach(), **dict(zip(wanted, grads, strict=True))}


def in_fp64(layer: nn.Module) -> nn.Module:
    """The masked layer in plain fp64 arithmetic: the oracle."""
    oracle = copy.deepcopy(layer)
    oracle.execution = "reference"
    for name in ("weight", "bias", "mask_logits", "bias_mask_logits"):
        parameter = getattr(oracle, name)
        if parameter is not None:
            wide = nn.Parameter(parameter.detach().double(), parameter.requires_grad)
            oracle._parameters[name] = wide
    return oracle


@pytest.mark.parametrize("execution", ["auto", "per_forward", "in_kernel", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@every_kind
def test_numbers_are_those_of_the_dequantised_weight(kind, dtype, execution):
    x = seeded_normal((5, IN), 3, dtype)
    for hparams in ({}, {"mask_unit": "neuron", "rescale": True}, {"mask_bias": True}):
        quantised, plain = pair(kind, dtype, execution, **hparams)
        layer, other = quantised.masked_layers["linear"], plain.masked_layers["linear"]
        for train in (True, False):
            quantised.train(train), plain.train(train)
            got, want = results(layer, x), results(other, x)
            for name in want:  # the same operations on the same numbers
                assert torch.equal(got[name], want[name]), (name, hparams, train)
            reference = copy.deepcopy(other)
            reference.execution = "reference"
            scaled = hparams.get("mask_unit") == "neuron" and dtype == torch.bfloat16
            budget = results(other if scaled else reference, x)  # a scaled output is rounded elsewhere
            assert_close(got, results(in_fp64(other), x.double()), budget)


@every_kind
def test_the_dequantised_weight_is_what_the_library_multiplies_with(kind):
    layer = Two(kind).linear.train()  # int8 layers quantise their input in eval mode
    weight = weight_of(layer, torch.float32).dense()
    want = layer(torch.eye(IN)) - layer.bias
    assert (want.t() - weight).abs().max() <= 1e-6
    original = Two(None).linear.weight
    assert weight.shape == (OUT, IN)
    step = {"4": 0.17, "8": 0.04}["4" if "4" in kind else "8"]  # of the largest weight
    assert 0 < (weight - original).abs().max() <= step * original.abs().max()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_layer_that_computes_in_another_dtype_than_its_input(kind):
    """bitsandbytes casts input and bias to what it computes in, and its output back."""
    layer = quantise(nn.Linear(IN, OUT, dtype=torch.bfloat16), kind)
    if kind == "int8":
        layer.bias.data = layer.bias.data.float()
    weight = weight_of(layer, torch.bfloat16).dense()
    circuit = CircuitModel(CircuitConfig(target_layers=["0"]), nn.Sequential(layer))
    randomize_logits(circuit)
    logits = layer.mask_logits.detach().clone().requires_grad_()
    x = seeded_normal((5, IN), 3, torch.bfloat16 if kind == "int8" else torch.float32)
    for train in (True, False):
        circuit.train(train)
        mask = torch.sigmoid(logits) if train else (logits > 0).float()
        masked = (weight.float() * mask).bfloat16()
        want = nn.functional.linear(x.bfloat16(), masked, layer.bias.bfloat16()).to(x.dtype)
        got = circuit(x)
        assert got.dtype == x.dtype
        assert (got - want).abs().max() <= 0.01 * want.abs().max()
        assert torch.equal(got, got.bfloat16().to(x.dtype))
        if train:
            got.sum().backward()
            want.sum().backward()
            error = (layer.mask_logits.grad - logits.grad).abs().max()
            assert error <= 0.01 * logits.grad.abs().max()
    circuit.set_ablate_mode("zero_ablate")
    ablated = torch.where(logits > 0, torch.zeros_like(weight), weight)
    want = nn.functional.linear(x.bfloat16(), ablated, layer.bias.bfloat16()).to(x.dtype)
    assert torch.equal(circuit(x), want)


@pytest.mark.parametrize("mode", sorted(ABLATION_MODES))
@every_kind
def test_ablations_are_those_of_the_dequantised_weight(kind, mode):
    x = seeded_normal((5, IN), 3)
    quantised, plain = pair(kind, mask_bias=True)
    for circuit in (quantised, plain):
        with torch.no_grad():
            circuit.masked_layers["linear"].mask_logits.sub_(0.5)  # less than half is kept
        circuit.eval()
        circuit.set_ablate_mode(mode, seed=5)
    assert torch.equal(quantised(x), plain(x))
    assert not quantised.masked_layers["linear"]._ablation_cache
    for circuit in (quantised, plain):
        circuit.set_ablate_mode("none")
    assert torch.equal(quantised(x), plain(x))
    assert quantised.compute_l0_statistics() == plain.compute_l0_statistics()


@pytest.fixture
def live_dense():
    """What says which tensors of a weight's size, but for some, have come into memory since the test began."""

    def look(*but: torch.Tensor | None) -> list[tuple]:
        gc.collect()
        known = {id(t) for t in but}
        tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and id(t) not in known]
        large = [t for t in tensors if t.is_floating_point() and t.numel() >= IN * OUT]
        return [(tuple(t.shape), t.dtype) for t in large if t.element_size() > 1]  # not what float8 is stored in

    gc.freeze()  # out of sight, and of the time that looking takes
    yield look
    gc.unfreeze()


@pytest.mark.parametrize("unit", ["weight", "neuron"])
@pytest.mark.parametrize("execution", ["auto", "per_forward", "in_kernel"])
@some_kinds
def test_nothing_dense_of_a_weights_size_stays(kind, execution, unit, live_dense):
    config = CircuitConfig(target_layers=["linear"], mask_hparams={"mask_unit": unit}, execution=execution)
    circuit = CircuitModel(config, Two(kind))
    logits = circuit.masked_layers["linear"].mask_logits
    optimizer = torch.optim.SGD([logits], lr=0.1)
    x, saved = seeded_normal((5, IN), 3).requires_grad_(), []

    def pack(tensor):
        saved.append((tensor.numel(), tensor.data_ptr()))
        return tensor

    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = circuit(x).square().sum() + circuit.l0()
        assert not [size for size, place in saved if size >= IN * OUT and place != logits.data_ptr()]
        assert live_dense(logits) == []
        loss.backward()
        assert live_dense(logits, logits.grad) == []
        optimizer.step(), optimizer.zero_grad()
    circuit.eval()
    circuit(x)
    circuit.set_ablate_mode("random_ablate")
    with torch.no_grad():
        circuit(x)
    assert live_dense(logits) == []


@pytest.mark.parametrize("bits", [8, 32])
@every_kind
def test_lean_steps_are_those_over_the_dequantised_weight(kind, bits, live_dense):
    for dtype in (torch.float32, torch.bfloat16):
        found, circuits = [], pair(kind, dtype, "auto", mask_bias=True)
        known = [p for circuit in circuits for p in circuit.parameters()]
        for circuit in circuits:
            optimizer = MaskAdamW(circuit.mask_parameters(), lr=0.1, lean=True, state_bits=bits)
            layer = circuit.masked_layers["linear"]
            for t in range(3):
                circuit.temperature = 1.0 + t
                x = seeded_normal((5, IN), t, dtype).requires_grad_()
                out = circuit(x)
                (out.square().sum() + 1e-3 * circuit.l0()).backward()
                if not found:
                    assert layer.waits
                    states = [s for s in optimizer.state[layer.mask_logits].values() if isinstance(s, torch.Tensor)]
                    assert live_dense(*known, *states) == []
                optimizer.step(), optimizer.zero_grad()
            found.append((out.detach(), x.grad, layer.mask_logits.detach(), layer.bias_mask_logits.detach()))
        for got, want in zip(*found, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(("kind", "stored"), [("nf4-nested", 0.52), ("int8", 1.02), ("torchao-int8", 1.02)])
def test_bytes_per_weight_of_lean_training(kind, stored):
    """What is there between two steps: the base in its bits, logits, states in 8 bits; and one layer's transients."""
    size, count = 256, 8
    layers = [quantise(nn.Linear(size, size, bias=False, dtype=torch.bfloat16), kind) for _ in range(count)]
    circuit = CircuitModel(CircuitConfig(target_layers="all-linear", add_l0=False), nn.Sequential(*layers))
    optimizer = MaskAdamW(circuit.mask_parameters(), lr=0.01, lean=True, state_bits=8)
    x = seeded_normal((2, size), 3, torch.bfloat16)

    def steps():
        for _ in range(2):
            (circuit(x).float().square().mean() + 1e-9 * circuit.l0()).backward()
            optimizer.step(), optimizer.zero_grad()

    usage, weights = measure(torch.device("cpu"), steps), count * size**2
    tensors = [t for layer in layers for t in format_of(layer).stored(layer).values()]
    tables = count * 2 * 1100 if kind == "nf4-nested" else 0  # of values, which do not grow with the weight
    base = (sum(t.nbytes for t in tensors) - tables) / weights
    assert base <= stored
    assert usage.resident / weights <= 2.1
    assert (usage.peak - usage.resident) / size**2 <= 15  # of one layer: dequantised in fp32, W, Wm, dWm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@every_kind
def test_autocast_computes_as_over_the_dequantised_weight(kind, dtype):
    if kind == "int8" and dtype == torch.bfloat16:
        pytest.skip("has no dtype of its own: the weight is dequantised in that of the input")
    found = []
    for circuit in pair(kind, dtype):
        layer = circuit.masked_layers["linear"]
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(seeded_normal((5, IN), 3))
        out.float().square().sum().backward()
        found.append((out.float(), layer.mask_logits.grad))
    assert all(torch.equal(got, want) for got, want in zip(*found, strict=True))


@every_kind
def test_a_model_can_be_moved_to_another_dtype(kind):
    quantised, plain = pair(kind)
    x, found = seeded_normal((5, IN), 3, torch.bfloat16), []
    for circuit in (quantised, plain):
        circuit.to(torch.bfloat16)
        layer, train = circuit.masked_layers["linear"], circuit(x)
        train.float().square().sum().backward()
        assert layer.mask_logits.dtype == torch.float32
        found.append((train.float(), layer.mask_logits.grad, circuit.eval()(x).float()))
        assert {p.dtype for p in circuit.export().parameters()} == {torch.bfloat16}
        assert torch.equal(circuit.export()(x), circuit(x)) or kind[:3] in ("nf4", "fp4")  # which compute in fp32
    for got, want in zip(*found, strict=True):
        assert (got - want).abs().max() <= 0.02 * want.abs().max()  # scales are rounded, or the product is not


@some_kinds
def test_compiled_models_run_quantised_layers_between_their_graphs(kind):
    quantised, _ = pair(kind)
    x, found = seeded_normal((5, IN), 3), []
    for run in (quantised, torch.compile(quantised, backend="aot_eager")):
        out = run(x)
        out.square().sum().backward()
        found.append((out.detach(), quantised.masked_layers["linear"].mask_logits.grad))
        quantised.zero_grad()
    for got, want in zip(*found, strict=True):
        assert (got - want).abs().max() <= 1e-6 * want.abs().max()


def test_a_plain_weight_is_seen_to_stay(live_dense):
    """The control of the test above."""
    circuit = CircuitModel(CircuitConfig(target_layers=["linear"]), Two(None))
    logits = circuit.masked_layers["linear"].mask_logits
    assert live_dense(logits) == [((OUT, IN), torch.float32)]


@some_kinds
def test_the_base_is_stored_in_its_bits(kind):
    circuit = CircuitModel(CircuitConfig(target_layers=["linear"]), Two(kind))
    stored = format_of(circuit.masked_layers["linear"]).stored(circuit.masked_layers["linear"])
    size = sum(t.numel() * t.element_size() for t in stored.values()) / (IN * OUT)
    assert size < (1.0 if "4" in kind else 1.3)  # with tables of values, which do not grow with the weight
    assert not any(t.requires_grad for t in stored.values())


def stored_bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that quantised layers are stored in."""
    found = {}
    for name, module in model.named_modules():
        kind = format_of(module)
        for part, tensor in ({} if kind is None else kind.stored(module)).items():
            found[f"{name}.{part}"] = tensor.clone()
    return found


@every_kind
def test_unload_gives_the_layer_back_to_the_bit(kind):
    model = Two(kind)
    x = seeded_normal((5, IN), 3)
    if kind != "int8":
        state = snapshot(model) if not kind.startswith("torchao") else {}
    bits, parts = stored_bits(model), {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    attributes, types = {n: sorted(vars(m)) for n, m in model.named_modules()}, [type(m) for m in model.modules()]
    want = model(x)
    if kind == "int8":  # its scales move at the first forward
        attributes, bits = {n: sorted(vars(m)) for n, m in model.named_modules()}, stored_bits(model)
    repacks = getattr(model.linear, "support_avx512bf16_for_cpu", None)
    if repacks is not None:
        model.linear.support_avx512bf16_for_cpu = True  # as on a CPU that has such instructions
    circuit = CircuitModel(CircuitConfig(target_layers="all"), model)
    optimizer = torch.optim.AdamW(circuit.mask_parameters(), lr=0.1)
    circuit(x).square().sum().backward()
    optimizer.step()
    circuit.eval()
    with torch.no_grad():
        circuit(x)
        circuit.set_ablate_mode("zero_ablate")
        circuit(x)
        circuit.use_masks(False)
        if kind != "int8":  # of which the layer quantises the input
            assert (circuit(x) - want).abs().max() <= 1e-5
    assert circuit.unload() is model
    if repacks is not None:
        assert model.linear.support_avx512bf16_for_cpu is True
        model.linear.support_avx512bf16_for_cpu = repacks
    after = stored_bits(model)
    assert list(after) == list(bits)
    assert all(torch.equal(after[name], bits[name]) for name in bits)
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == parts
    assert {n: sorted(vars(m)) for n, m in model.named_modules()} == attributes
    assert [type(m) for m in model.modules()] == types
    if kind != "int8" and state:
        assert_same_snapshot(state, snapshot(model))
    assert torch.equal(model(x), want)


def test_4_bit_layers_beside_the_masked_ones_are_not_repacked():
    model = nn.Sequential(Two("nf4").linear, nn.Linear(OUT, 3)).eval()
    model[0].support_avx512bf16_for_cpu = True
    circuit = CircuitModel(CircuitConfig(target_layers=["1"]), model)
    before = model[0].weight.data.clone()
    with torch.no_grad():
        circuit(seeded_normal((5, IN), 3))
    assert torch.equal(model[0].weight.data, before)
    circuit.unload()
    assert model[0].support_avx512bf16_for_cpu is True


# Refusals


def refusal(model: nn.Module, error: type[Exception] = NotImplementedError) -> str:
    before = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(error) as caught:
        CircuitModel(CircuitConfig(target_layers=["linear"]), model)
    assert {n: type(m) for n, m in model.named_modules()} == before
    return str(caught.value)


def test_what_cannot_be_masked_is_refused():
    model = Two(None)
    quantize_(model.linear, Int8DynamicActivationInt8WeightConfig())
    assert "quantises the layer's input as well" in refusal(model)
    with pytest.warns(UserWarning, match="linear .*quantises the layer's input"):
        CircuitModel(CircuitConfig(target_layers="all-linear"), model).unload()
    model = Two(None)
    model.linear = bnb.nn.Linear4bit(IN, OUT)
    assert "has not been quantised yet: move the model to its device" in refusal(model)
    model.linear = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
    assert "has not been quantised yet" in refusal(model)
    model.linear = bnb.nn.Linear8bitLt(IN, OUT).to("cpu")
    assert "has_fp16_weights=False" in refusal(model)
    model.linear = quantise(nn.Linear(OUT, IN), "nf4")
    model.linear.in_features, model.linear.out_features = IN, OUT
    assert "quantised as (out, in) = (48, 64), got (64, 48)" in refusal(model)


def test_a_repacked_layer_is_refused():
    model = Two(None)
    model.linear = quantise(nn.Linear(IN, 2 * OUT), "nf4")
    weight = model.linear.weight
    weight.data, weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    assert "an evaluation on this CPU has repacked its weight" in refusal(model)


def test_torchao_weights_that_cannot_be_dequantised_are_refused():
    from torchao.quantization.quantize_.workflows.int4.int4_plain_int32_tensor import Int4PlainInt32Tensor

    model = Two(None)
    qdata, scale = torch.zeros(OUT, IN // 8, dtype=torch.int32), torch.ones(2, OUT)
    weight = Int4PlainInt32Tensor(qdata, scale, torch.zeros(2, OUT, dtype=torch.int8), [1, 32], [OUT, IN])
    model.linear.weight = nn.Parameter(weight, requires_grad=False)
    assert "Int4PlainInt32Tensor cannot be dequantised" in refusal(model)


# Copies, files, export


@every_kind
def test_saved_circuits_load_on_the_same_quantised_base_only(kind, tmp_path):
    quantised, _ = pair(kind)
    x = seeded_normal((5, IN), 3)
    want = quantised.eval()(x)
    quantised.save_pretrained(tmp_path)
    assert torch.equal(CircuitModel.from_pretrained(Two(kind), tmp_path)(x), want)
    with pytest.raises(ValueError, match="the weights of linear are not those"):
        CircuitModel.from_pretrained(Two(kind, seed=1), tmp_path)
    with pytest.raises(
        ValueError,
        match=r"wrong base dtype: linear\.weight is float32, the masks were saved over (torchao|bitsandbytes) ",
    ):
        CircuitModel.from_pretrained(Two(None), tmp_path)
    plain = CircuitModel.from_pretrained(Two(None), tmp_path, check_base=False)
    logits = [c.masked_layers["linear"].mask_logits for c in (plain, quantised)]
    assert torch.equal(*logits)


def test_scales_belong_to_the_fingerprint(tmp_path):
    quantised, _ = pair("nf4")
    quantised.save_pretrained(tmp_path)
    other = Two("nf4")
    other.linear.weight.quant_state.absmax[3] *= 1.5
    with pytest.raises(ValueError, match="the weights of linear are not those"):
        CircuitModel.from_pretrained(other, tmp_path)


@every_kind
def test_states_hold_masks_only_and_load(kind):
    quantised, _ = pair(kind)
    state = quantised.state_dict()
    names = {f"wrapped_model.linear.{name}" for name in ("mask_logits", "temperature")}
    assert set(state) == names | {"_extra_state"}
    circuit = CircuitModel(CircuitConfig(target_layers=["linear"]), Two(kind))
    circuit.load_state_dict(state)
    assert torch.equal(circuit.masked_layers["linear"].mask_logits, quantised.masked_layers["linear"].mask_logits)
    other = CircuitModel(CircuitConfig(target_layers=["linear"]), Two(kind, seed=1))
    with pytest.raises(ValueError, match="wrong base model"):
        other.load_state_dict(state)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "torchao-nf4"])  # its copies are quantised anew
def test_circuits_can_be_copied_and_pickled(kind):
    quantised, _ = pair(kind)
    vars(quantised.wrapped_model.linear).pop("extra_repr", None)  # torchao's cannot be pickled
    x = seeded_normal((5, IN), 3)
    want, bits = quantised(x), stored_bits(quantised)
    pickled = [] if kind == "torchao-float8" else [pickle.loads(pickle.dumps(quantised))]  # torch cannot read float8
    for copied in (copy.deepcopy(quantised), *pickled):
        assert torch.equal(copied(x), want)
        assert all(torch.equal(stored_bits(copied)[name], bits[name]) for name in bits)
        plain = copied.unload()
        assert type(plain.linear) is type(Two(kind).linear)
    assert torch.equal(quantised(x), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@every_kind
def test_export_gives_a_plain_dense_model(kind, dtype):
    quantised, plain = pair(kind, dtype, mask_bias=True)
    x = seeded_normal((5, IN), 3, dtype)
    bits = stored_bits(quantised.wrapped_model)
    want = quantised.eval()(x)
    exported = quantised.export()
    assert torch.equal(exported(x), want)
    assert torch.equal(exported.linear.weight, plain.export().linear.weight)
    assert [type(m) for m in exported.modules()] == [type(m) for m in Two(None).modules()]
    assert sorted(vars(exported.linear)) == sorted(vars(nn.Linear(1, 1)))
    assert {type(p) for p in exported.parameters()} == {nn.Parameter}
    assert all(p.requires_grad and p.dtype == dtype for p in exported.parameters())
    assert all(torch.equal(stored_bits(quantised.wrapped_model)[name], bits[name]) for name in bits)
    assert torch.equal(quantised(x), want)


# Models of transformers


CONFIGS = {
    "bitsandbytes-nf4": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    ),
    "bitsandbytes-int8": BitsAndBytesConfig(load_in_8bit=True),
    "torchao-int8": TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao-int4": TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4)),
}
every_config = pytest.mark.parametrize("name", list(CONFIGS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama and a tiny GPT-2, saved."""
    path = tmp_path_factory.mktemp("models")
    for family in ("llama", "gpt2"):
        MODELS[family].build().save_pretrained(path / family)
    return path


def load(folder, name: str, family: str = "llama") -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / family, quantization_config=copy.deepcopy(CONFIGS[name]))


def dequantised(model: nn.Module, family: str = "llama") -> nn.Module:
    """A plain model with the dequantised weights of a quantised one."""
    plain = MODELS[family].build()
    for name, module in model.named_modules():
        if format_of(module) is not None:
            weight = weight_of(module, torch.float32).dense()
            target = plain.get_submodule(name).weight
            target.data = weight.clone() if target.shape == weight.shape else weight.t().contiguous()
    return plain


def masks_over(model: nn.Module, **config) -> CircuitModel:
    config = {"mask_hparams": {"mask_init_value": 0.1}, "l0_lambda": 1e-5, **config}
    return CircuitModel(CircuitConfig(target_layers="all-linear", **config), model)


def steps(circuit: CircuitModel, optimizer, family: str = "llama", count: int = 4) -> list[float]:
    schedule, losses = TemperatureSchedule(circuit, total=count), []
    for t in range(count):
        loss = circuit(**MODELS[family].batch(t)).loss
        loss.backward()
        optimizer.step(), optimizer.zero_grad(), schedule.step()
        losses.append(loss.item())
    return losses


def logits_of(circuit: CircuitModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in circuit.mask_parameters()])


@every_config
def test_a_plain_loop_trains_as_over_the_dequantised_model(folder, name):
    model = load(folder, name)
    plain = dequantised(model)
    found = []
    for base, optimizer in ((model, torch.optim.AdamW), (plain, torch.optim.AdamW), (model, MaskAdamW)):
        circuit = masks_over(base)
        assert len(circuit.masked_layers) == 14
        settings = {"lr": 0.05, "weight_decay": 0.0}
        losses = steps(circuit, optimizer(circuit.mask_parameters(), **settings))
        found.append((losses, logits_of(circuit), circuit.eval()(**MODELS["llama"].batch(9)).logits))
        circuit.unload()
    (losses, masks, outputs), *others = found
    assert (masks - 0.1).abs().max() > 0.1
    for other_losses, other_masks, other_outputs in others:
        assert losses == pytest.approx(other_losses, rel=1e-5)
        assert (masks - other_masks).abs().max() <= 1e-3 * (masks - 0.1).abs().max()
        assert (outputs - other_outputs).abs().max() <= 1e-4 * outputs.abs().max()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@every_config
def test_export_of_a_transformers_model_is_saved_and_loaded_as_a_plain_one(folder, name, family, tmp_path):
    if family == "gpt2" and name.startswith("torchao"):
        pytest.skip("torchao leaves GPT-2's layers as they are")
    batch = MODELS[family].batch(0)
    circuit = masks_over(load(folder, name, family))
    randomize_logits(circuit)
    want = circuit.eval()(**batch).logits
    exported = circuit.export()
    assert torch.equal(exported(**batch).logits, want)
    exported.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert circuit.wrapped_model.config.quantization_config is not None
    if family == "llama":  # layers of GPT-2 are Linear, not Conv1D, where they were quantised
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(**batch).logits, want)


@every_config
def test_saved_circuits_of_a_transformers_model(folder, name, tmp_path):
    batch = MODELS["llama"].batch(0)
    config = CircuitConfig(target_layers=["*.mlp.*_proj"])  # the other layers are quantised and not masked
    circuit = CircuitModel(config, load(folder, name))
    randomize_logits(circuit)
    with torch.no_grad():
        want = circuit.eval()(**batch).logits
    circuit.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(CircuitModel.from_pretrained(load(folder, name), tmp_path)(**batch).logits, want)
    other = load(folder, name)
    q_proj = other.model.layers[0].self_attn.q_proj
    next(iter(format_of(q_proj).stored(q_proj).values())).view(-1)[:4].zero_()
    with pytest.raises(ValueError, match="other weights of the model"):
        CircuitModel.from_pretrained(other, tmp_path)


@every_config
def test_export_makes_layers_without_masks_dense_too(folder, name):
    batch = MODELS["llama"].batch(0)
    circuit = CircuitModel(CircuitConfig(target_layers=["*.mlp.*_proj"]), load(folder, name))
    randomize_logits(circuit)
    want = circuit.eval()(**batch).logits
    exported = circuit.export()
    assert not [n for n, module in exported.named_modules() if format_of(module) is not None]
    assert not hasattr(exported, "hf_quantizer")
    assert [n for n, module in circuit.wrapped_model.named_modules() if format_of(module) is not None]
    bound = 0.05 if name == "bitsandbytes-int8" else 1e-5  # whose layers without masks quantise their input
    assert (exported(**batch).logits - want).abs().max() <= bound * want.abs().max()


def test_checkpointed_layers_give_the_same_gradients(folder):
    found = []
    for checkpoint in (False, True):
        circuit = masks_over(load(folder, "bitsandbytes-nf4"))
        if checkpoint:
            circuit.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        circuit(**MODELS["llama"].batch(0)).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in circuit.mask_parameters()]))
    assert torch.equal(*found)


@pytest.mark.dropin
@every_config
def test_trainer_trains_as_over_the_dequantised_model(folder, name, tmp_path):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from transformers import Trainer, TrainingArguments

    from csmask import TemperatureCallback

    args = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=3, learning_rate=0.05, logging_steps=1, use_cpu=True,
        lr_scheduler_type="constant", report_to="none", disable_tqdm=True, save_steps=3, max_grad_norm=0,
    )  # fmt: skip
    batches = [MODELS["llama"].batch(seed) for seed in range(3)]
    data = [{"input_ids": row, "labels": row} for batch in batches for row in batch["input_ids"]]
    model = load(folder, name)
    plain, found = dequantised(model), []
    for base in (model, plain):
        circuit = masks_over(base)
        trainer = Trainer(model=circuit, args=args, train_dataset=data, callbacks=[TemperatureCallback(20.0)])
        trainer.train()
        found.append((logits_of(circuit), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
        if base is model:
            loaded = CircuitModel.from_pretrained(load(folder, name), tmp_path / "checkpoint-3")
            assert torch.equal(logits_of(loaded), found[0][0])
    (masks, losses), (other_masks, other_losses) = found
    assert len(losses) == 3
    assert losses == pytest.approx(other_losses, rel=1e-4)
    assert (masks - other_masks).abs().max() <= 1e-3 * (masks - 0.1).abs().max()
