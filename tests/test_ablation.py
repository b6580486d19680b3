"""Ablation modes on every layer type, by the weights that really reach the matrix product or convolution."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_philox import expected_words
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from csmask import CircuitConfig, CircuitModel, ablation, testing
from csmask.config import ABLATION_MODES

# the zoo runs one layer at a time
pytestmark = pytest.mark.filterwarnings("ignore:masked but not called in the first forward")
SAMPLED = ("randomly_sampled", "complement_sampled", "uniform_sampled")
LAYERS = ("linear", "gpt2", "conv1d", "conv2d")
UNITS = ("weight", "neuron")


INPUTS = {"linear": (2, 9), "gpt2": (2, 9), "conv1d": (2, 4, 6), "conv2d": (2, 4, 5, 5)}


class Zoo(nn.Module):
    """One layer of every type; forward gives each its own input and returns all outputs."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.linear = nn.Linear(9, 16)
        self.gpt2 = Conv1D(16, 9)
        self.conv1d = nn.Conv1d(4, 16, 3)
        self.conv2d = nn.Conv2d(4, 16, 3, groups=2, padding=1, padding_mode="circular")
        for seed, param in enumerate(self.parameters()):
            param.data = testing.seeded_normal(tuple(param.shape), seed)
        self.to(dtype)

    def forward(self, names=LAYERS):
        return {
            name: getattr(self, name)(testing.seeded_normal(INPUTS[name], 50, self.linear.weight.dtype))
            for name in names
        }


def build(unit="weight", mask_bias=True, dtype=torch.float32, **config):
    """A zoo in eval mode whose circuits keep about a quarter of each layer, with some logits exactly 0."""
    hparams = {"mask_unit": unit, "mask_bias": mask_bias}
    circuit = CircuitModel(CircuitConfig(mask_hparams=hparams, target_layers=list(LAYERS), **config), Zoo(dtype)).eval()
    for seed, param in enumerate(circuit.mask_parameters()):
        logits = testing.seeded_normal(tuple(param.shape), 100 + seed) - 0.6
        logits.view(-1)[::7] = 0
        param.data.copy_(logits)
    return circuit


class Spy(TorchDispatchMode):
    """Remembers the weight and bias of the last matrix product or convolution."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name == "addmm":
            self.bias, self.weight = args[0], args[2]
        elif name == "convolution":
            self.weight, self.bias = args[1], args[2]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def used(circuit, name):
    """The weight and bias that the layer of this name computes with, in the layer's own layout."""
    with Spy() as spy:
        circuit((name,))
    weight = spy.weight.t() if name == "linear" else spy.weight
    return weight.clone(), spy.bias.clone()


def parts(circuit, name):
    """[(label, base, C in the base's shape, weights per entry, parameter in use)] for weight and masked bias."""
    layer = circuit.masked_layers[name]
    weight, bias = used(circuit, name)
    size = layer.weight.numel() // layer.mask_logits.numel()
    in_circuit = (layer.unit_logits > 0).expand_as(layer.weight)
    found = [("weight", layer.weight.detach(), in_circuit, size, weight)]
    if layer.bias_mask_logits is not None:
        found.append(("bias", layer.bias.detach(), layer.bias_mask_logits > 0, 1, bias))
    return found


@pytest.mark.parametrize("execution", ["auto", "reference"])
@pytest.mark.parametrize("mask_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", LAYERS)
def test_circuit_and_complement_make_up_the_base_weights(name, unit, mask_bias, execution):
    circuit = build(unit, mask_bias, execution=execution)
    circuit.set_ablate_mode("zero_ablate")
    without = parts(circuit, name)
    circuit.set_ablate_mode("none")
    for (label, base, c, _, kept), (_, _, _, _, rest) in zip(parts(circuit, name), without, strict=True):
        assert 0 < c.sum() < c.numel() / 2, label
        assert torch.equal(kept, torch.where(c, base, torch.zeros(()))), label
        assert torch.equal(rest, torch.where(c, torch.zeros(()), base)), label
        assert torch.equal(kept + rest, base), label
    if not mask_bias:
        bias = circuit.masked_layers[name].bias
        for mode in ABLATION_MODES:
            circuit.set_ablate_mode(mode)
            assert torch.equal(used(circuit, name)[1], bias)


@pytest.mark.parametrize("mode", SAMPLED)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", LAYERS)
def test_sampled_modes_zero_exactly_n_entries(name, unit, mode):
    circuit = build(unit)
    hit_circuit = False
    for seed in range(5):
        circuit.set_ablate_mode(mode, seed=seed)
        for label, base, c, size, weight in parts(circuit, name):
            zeroed = weight == 0
            assert torch.equal(weight[~zeroed], base[~zeroed]), label
            assert int(zeroed.sum()) == int(c.sum()) > 0, label
            per_entry = zeroed.transpose(0, 1) if name == "gpt2" and label == "weight" else zeroed
            if size > 1:  # whole neurons
                assert set(per_entry.reshape(16, -1).sum(1).tolist()) == {0, size}, label
            if mode != "uniform_sampled":
                assert not (zeroed & c).any(), label
            hit_circuit |= bool((zeroed & c).any())
    assert hit_circuit == (mode == "uniform_sampled")


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", LAYERS)
def test_complement_sampled_is_randomly_sampled(name, unit):
    circuit = build(unit)
    for seed in (0, 1, 2**64 - 1):
        circuit.set_ablate_mode("randomly_sampled", seed=seed)
        first = used(circuit, name)
        circuit.set_ablate_mode("complement_sampled", seed=seed)
        second = used(circuit, name)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", LAYERS)
def test_random_ablate_redraws_the_circuit_only(name, unit, dtype):
    circuit = build(unit, dtype=dtype)
    fan_in = {"linear": 9, "conv1d": 12, "conv2d": 18}.get(name)
    drawn = []
    for seed in (0, 1):
        circuit.set_ablate_mode("random_ablate", seed=seed)
        for label, base, c, _, weight in parts(circuit, name):
            assert weight.dtype == dtype
            assert torch.equal(weight[~c], base[~c]), label
            if fan_in is None and label == "bias":
                assert (weight[c] == 0).all()  # as a fresh transformers Conv1D
                continue
            assert (weight[c] != base[c]).all(), label
            # uniform on +-1 / sqrt(fan_in); normal of 0.02, whose draws end at 6.9 standard deviations
            bound = 7 * 0.02 if fan_in is None else 1 / math.sqrt(fan_in) * (1 + torch.finfo(dtype).eps)
            assert weight[c].abs().max() < bound, label
            assert weight[c].unique().numel() > 0.9 * int(c.sum()) - 8 * (dtype == torch.bfloat16), label
            drawn.append((label, weight[c]))
    half = len(drawn) // 2
    for (_, first), (_, second) in zip(drawn[:half], drawn[half:], strict=True):
        assert (first != second).float().mean() > 0.9 - 0.2 * (dtype == torch.bfloat16)  # bf16: some are rounded alike


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [
        (lambda: nn.Linear(300, 400), 300),
        (lambda: nn.Conv1d(40, 300, 5), 200),
        (lambda: nn.Conv2d(64, 200, 3, groups=4), 144),
        (lambda: Conv1D(300, 400), None),
    ],
    ids=LAYERS,
)
def test_random_values_are_distributed_as_a_fresh_layer(layer, fan_in):
    torch.manual_seed(0)  # else what is drawn depends on which tests were collected before
    layer = layer()
    values = ablation.random_values(layer.weight.detach(), fan_in, 3, 0).double()
    fresh = layer.weight.detach().double()
    n = values.numel()
    assert values.shape == fresh.shape
    assert abs(values.mean().item()) < 5 * values.std().item() / math.sqrt(n)
    assert values.std().item() == pytest.approx(fresh.std().item(), rel=6 / math.sqrt(n))
    quantiles = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    sample = torch.quantile(values.flatten()[:60_000], quantiles), torch.quantile(fresh.flatten()[:60_000], quantiles)
    assert (sample[0] - sample[1]).abs().max() < 0.05 * fresh.std()
    if fan_in is not None:
        assert values.abs().max() <= fresh.abs().max() * 1.01
    bias = ablation.random_values(layer.bias.detach(), fan_in, 3, 1)
    if fan_in is None:
        assert (bias == 0).all()
        assert (layer.bias == 0).all()
    else:
        assert 0.8 / math.sqrt(fan_in) < bias.abs().max() < 1 / math.sqrt(fan_in)


def digests(seed=5):
    """name, mode -> digest of weights in use; the base, masks and seeds are fixed, everything else is the process's."""
    found = {}
    for unit in UNITS:
        circuit = build(unit)
        for mode in ABLATION_MODES:
            circuit.set_ablate_mode(mode, seed=seed)
            for name in LAYERS:
                data = b"".join(t.contiguous().numpy().tobytes() for t in used(circuit, name))
                found[f"{unit} {mode} {name}"] = hashlib.sha256(data).hexdigest()
    return found


def test_equal_seeds_draw_equal_masks_in_another_process():
    torch.manual_seed(123)
    code = "import random, torch; random.seed(7); torch.manual_seed(99); torch.randn(5); import test_ablation, json; "
    code += "print(json.dumps(test_ablation.digests()))"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "77"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    child = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    here = digests()
    assert here == json.loads(child.stdout.splitlines()[-1])
    other = digests(seed=6)
    assert {k.split()[1] for k in here if here[k] != other[k]} == {*SAMPLED, "random_ablate"}
    assert all(here[k] != other[k] for k in here if k.startswith("weight") and k.split()[1] in SAMPLED)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_none_afterwards_is_bit_identical_to_before(unit, dtype):
    circuit = build(unit, dtype=dtype)
    with torch.no_grad():
        hard = circuit()
        soft = circuit.train()()
    circuit.eval()
    for mode in ABLATION_MODES:
        for seed in (0, 1):
            circuit.set_ablate_mode(mode, seed=seed)
            with torch.no_grad():
                ablated = circuit()
            assert all(torch.isfinite(t).all() for t in ablated.values())
            if mode != "none":
                assert not any(torch.equal(ablated[name], hard[name]) for name in LAYERS)
        circuit.set_ablate_mode("none")
        assert circuit.ablate_mode == "none"
        with torch.no_grad():
            again, soft_again = circuit(), circuit.train()()
        assert all(torch.equal(again[name], hard[name]) for name in LAYERS)
        assert all(torch.equal(soft_again[name], soft[name]) for name in LAYERS)
        assert all(not torch.equal(soft[name], hard[name]) for name in LAYERS)
        circuit.eval()
    circuit.train()
    sum(out.float().sum() for out in circuit().values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in circuit.mask_parameters())


def test_nothing_is_drawn_from_the_generator_of_torch():
    circuit = build()
    state = torch.random.get_rng_state()
    for mode in ABLATION_MODES:
        circuit.set_ablate_mode(mode)
        circuit()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_soft_masks_and_an_ablation_are_an_error_that_says_what_to_do():
    circuit = build()
    circuit.set_ablate_mode("zero_ablate")
    circuit.train()
    with pytest.raises(ValueError, match=r"'zero_ablate' needs hard masks.*call \.eval\(\) first"):
        circuit()
    with pytest.raises(ValueError, match=r"'random_ablate' needs hard masks.*call \.eval\(\) first"):
        circuit.set_ablate_mode("random_ablate")
    assert circuit.ablate_mode == "zero_ablate"
    circuit.set_ablate_mode("none")
    circuit()
    for param in circuit.mask_parameters():  # masks that are not trained are hard, also in train mode
        param.requires_grad_(False)
    circuit.set_ablate_mode("zero_ablate")
    circuit()


@pytest.mark.parametrize("mode", ["randomly_sampled", "complement_sampled"])
def test_a_circuit_larger_than_its_complement(mode):
    circuit = build()
    circuit.set_ablate_mode("uniform_sampled", seed=3)
    before = used(circuit, "conv1d")
    layer = circuit.masked_layers["conv1d"]
    layer.mask_logits.data.view(-1)[:97] = 1
    layer.mask_logits.data.view(-1)[97:] = 0
    with pytest.raises(
        ValueError, match=r"cannot draw 97 entries from a complement of 95 in conv1d: .*uniform_sampled"
    ):
        circuit.set_ablate_mode(mode, seed=8)
    assert {(m.ablation, m.ablation_seed) for m in circuit.masked_layers.values()} == {("uniform_sampled", 3)}
    assert not torch.equal(used(circuit, "conv1d")[0], before[0])  # the new circuit, in the old mode
    layer.mask_logits.data.view(-1)[96] = 0
    circuit.set_ablate_mode(mode)  # exactly half can be drawn: all of the complement
    weight, _ = used(circuit, "conv1d")
    assert torch.equal(weight == 0, layer.mask_logits <= 0)
    layer.bias_mask_logits.data.fill_(1)
    with pytest.raises(ValueError, match=r"cannot draw 16 entries from a complement of 0 in conv1d\.bias"):
        circuit.set_ablate_mode(mode)
    with pytest.raises(ValueError, match="cannot draw 16 entries from a complement of 0"):
        circuit()  # set before the circuit grew
    layer.mask_logits.data.fill_(1)
    circuit.set_ablate_mode("uniform_sampled")  # n of all: everything goes
    weight, bias = used(circuit, "conv1d")
    assert (weight == 0).all()
    assert (bias == 0).all()


@pytest.mark.parametrize("unit", UNITS)
def test_a_fresh_mask_keeps_nothing_and_ablates_nothing(unit):
    circuit = CircuitModel(
        CircuitConfig(mask_hparams={"mask_unit": unit, "mask_bias": True}, target_layers=list(LAYERS)), Zoo()
    ).eval()
    for mode in ABLATION_MODES:  # S == 0 everywhere is in the complement
        circuit.set_ablate_mode(mode)
        for name in LAYERS:
            for _, base, _, _, weight in parts(circuit, name):
                assert torch.equal(weight, torch.zeros_like(base) if mode == "none" else base)


def drawn(circuit, name="linear"):
    """Which weights and biases are zero, and a digest of all values."""
    return tuple(t.numpy().tobytes() for t in used(circuit, name))


def test_a_draw_is_kept_until_mode_seed_or_circuit_changes(monkeypatch):
    circuit = build()
    calls = []
    kept_entries = ablation.kept_entries
    monkeypatch.setattr(ablation, "kept_entries", lambda mode, *rest: calls.append(mode) or kept_entries(mode, *rest))
    circuit.set_ablate_mode("randomly_sampled", seed=1)
    first = drawn(circuit)
    assert drawn(circuit) == first
    assert len(calls) == 2  # weight and bias, once

    circuit.set_ablate_mode("randomly_sampled", seed=2)
    second = drawn(circuit)
    assert second[0] != first[0]
    assert second[1] != first[1]
    circuit.set_ablate_mode("randomly_sampled", seed=1)
    assert drawn(circuit) == first
    circuit.set_ablate_mode("uniform_sampled", seed=1)
    other = drawn(circuit)
    assert other[0] != first[0]
    circuit.set_ablate_mode("none")
    circuit.set_ablate_mode("randomly_sampled")  # the seed is kept
    assert drawn(circuit) == first
    layer = circuit.masked_layers["linear"]  # also where a script sets a layer's mode and seed itself
    layer.ablation = "uniform_sampled"
    assert drawn(circuit) == other
    layer.ablation, layer.ablation_seed = "randomly_sampled", 2
    assert drawn(circuit) == second


def _by_data(param):
    param.data[..., :2] = -param.data[..., :2]


def _by_copy(param):
    with torch.no_grad():
        param.copy_(param.flip(-1))


def _by_storage(param):
    param.data = testing.seeded_normal(tuple(param.shape), 1000) - 0.6


def _by_numpy(param):
    param.detach().numpy()[:] *= -1
    param.detach().numpy()[:] -= 0.6


@pytest.mark.parametrize("change", [_by_data, _by_copy, _by_storage, _by_numpy])
@pytest.mark.parametrize("mode", [m for m in ABLATION_MODES if m != "none"])
def test_redrawn_when_the_circuit_changes_however_it_is_changed(mode, change):
    circuit = build()
    circuit.set_ablate_mode(mode, seed=4)
    used(circuit, "linear")
    layer = circuit.masked_layers["linear"]
    for param in (layer.mask_logits, layer.bias_mask_logits):
        change(param)
        param.data -= 0.4  # small enough for a control
    circuit.train().eval()
    changed = parts(circuit, "linear")
    fresh = build()
    for name, param in fresh.named_mask_parameters():
        param.data.copy_(dict(circuit.named_mask_parameters())[name])
    fresh.set_ablate_mode(mode, seed=4)
    for (label, base, c, _, weight), (*_, want) in zip(changed, parts(fresh, "linear"), strict=True):
        assert torch.equal(weight, want), label
        if mode in SAMPLED:
            assert int((weight != base).sum()) == int(c.sum()), label


def test_an_optimizer_step_redraws():
    circuit = build()
    circuit.set_ablate_mode("zero_ablate")
    before = parts(circuit, "linear")
    circuit.set_ablate_mode("none")
    circuit.train()
    optimizer = torch.optim.SGD(circuit.mask_parameters(), lr=1.0)
    (-circuit.l0()).backward()
    optimizer.step()
    circuit.eval()
    circuit.set_ablate_mode("zero_ablate")
    for (label, _, c, _, weight), (*_, old) in zip(parts(circuit, "linear"), before, strict=True):
        assert torch.equal(weight == 0, c), label
        assert (weight == 0).sum() > (old == 0).sum(), label


def test_ablation_follows_a_change_of_dtype():
    circuit = build()
    for mode in ABLATION_MODES:
        circuit.set_ablate_mode(mode, seed=1)
        before = used(circuit, "conv2d")[0]
        circuit.bfloat16()
        weight, _ = used(circuit, "conv2d")
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, before.bfloat16())
        circuit.float()
        circuit.wrapped_model.load_state_dict(Zoo().state_dict(), strict=False)


def test_the_circuit_is_measured_the_same_in_every_mode():
    circuit = build()
    statistics = circuit.compute_l0_statistics()
    for mode in ABLATION_MODES:
        circuit.set_ablate_mode(mode)
        circuit()
        assert circuit.compute_l0_statistics() == statistics


def test_layers_weights_and_biases_draw_differently():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.other = nn.Linear(8, 64), nn.Linear(8, 64)

        def forward(self, names):
            return [getattr(self, name)(torch.ones(1, 8)) for name in names]

    circuit = CircuitModel(CircuitConfig(mask_hparams={"mask_bias": True}, target_layers="all-linear"), Twins()).eval()
    for param in circuit.mask_parameters():
        param.data.fill_(-1)
        param.data.view(param.shape[0], -1)[:, 0][::4] = 1
    for mode in SAMPLED:
        circuit.set_ablate_mode(mode, seed=0)
        draws = []
        for name in ("linear", "other"):
            with torch.no_grad():
                weight, bias = circuit.masked_layers[name].ablated_parameters()
            draws += [(weight == 0)[:, 1], bias == 0]
        for i, first in enumerate(draws):
            for second in draws[i + 1 :]:
                assert not torch.equal(first, second)
    circuit.set_ablate_mode("random_ablate")
    first, second = (circuit.masked_layers[name].ablated_parameters()[0] for name in ("linear", "other"))
    c = circuit.masked_layers["linear"].circuit
    assert (first[c] != second[c]).all()


def sample_in_integers(eligible, n, seed, stream, purpose):
    """The chosen indices by their definition: the n smallest (31-bit key, index) pairs."""
    words = expected_words(len(eligible), seed, stream, purpose)
    return sorted(sorted((w >> 1, i) for i, w in enumerate(words) if eligible[i])[:n], key=lambda pair: pair[1])


def test_sample_is_what_its_definition_says():
    eligible = testing.seeded_normal((5, 11), 0) > -0.5
    for n in range(int(eligible.sum()) + 1):
        got = ablation.sample_entries(eligible, n, 9, 3, 1)
        want = sample_in_integers(eligible.flatten().tolist(), n, 9, 3, 1)
        assert got.flatten().nonzero().flatten().tolist() == [i for _, i in want]
        assert got.shape == eligible.shape


def test_all_31_bits_of_a_key_count():
    # among 2000 keys of fewer than about 20 bits some would be equal, and then go by index
    eligible = torch.ones(2000, dtype=torch.bool)
    for n in range(50, 2000, 150):
        got = ablation.sample_entries(eligible, n, 1, 0, 0)
        assert got.nonzero().flatten().tolist() == [i for _, i in sample_in_integers([True] * 2000, n, 1, 0, 0)]


def test_equal_keys_still_give_exactly_n(monkeypatch):
    monkeypatch.setattr(ablation.philox, "random_words", lambda count, *_: torch.full((count,), 2**32 - 1))
    eligible = torch.tensor([False, True, True, False, True])
    for n in range(4):
        got = ablation.sample_entries(eligible, n, 0, 0, 0)
        assert int(got.sum()) == n
        assert not (got & ~eligible).any()


def test_every_set_is_equally_likely():
    eligible = torch.ones(30, dtype=torch.bool)
    eligible[::3] = False
    draws, n, size = 3000, 6, 20
    chosen = torch.stack([ablation.sample_entries(eligible, n, seed, 0, 0) for seed in range(draws)])
    chosen = chosen[:, eligible].double()
    assert (chosen.sum(1) == n).all()
    # chi-square of the 20 counts, 19 degrees of freedom; each count has variance draws * p * (1 - p)
    p = n / size
    chi2 = ((chosen.sum(0) - draws * p) ** 2).sum().item() / (draws * p * (1 - p)) * (size - 1) / size
    assert 19 - 4 * math.sqrt(38) < chi2 < 19 + 4 * math.sqrt(38)
    # pairs: chosen together with probability n (n - 1) / (size (size - 1))
    together = (chosen.T @ chosen)[~torch.eye(size, dtype=torch.bool)] / draws
    q = n * (n - 1) / (size * (size - 1))
    assert together.mean().item() == pytest.approx(q, rel=1e-9)
    assert (together - q).abs().max().item() < 5 * math.sqrt(q * (1 - q) / draws)


def test_unknown_modes():
    circuit = build()
    for mode in ("zero", "None", "", None, "hard", "zero_ablate "):
        with pytest.raises(ValueError, match=r"ablation mode must be one of 'none', 'zero_ablate', .*got"):
            circuit.set_ablate_mode(mode)
    with pytest.raises(ValueError, match="ablation mode must be one of"):
        ablation.kept_entries("zero", torch.ones(2, dtype=torch.bool), 0, 0)
    with pytest.raises(ValueError, match="cannot draw 2 entries from a complement of 1"):
        ablation.kept_entries("randomly_sampled", torch.tensor([True, True, False]), 0, 0)
    with pytest.raises(TypeError, match="seed must be an int"):
        circuit.set_ablate_mode("randomly_sampled", seed=1.5)
    assert circuit.ablate_mode == "none"


def test_input_is_not_changed():
    circuit = torch.tensor([True, False, False, True, False])
    before = circuit.clone()
    for mode in ABLATION_MODES:
        kept = ablation.kept_entries(mode, circuit, 0, 0)
        assert kept.dtype == torch.bool
        kept.logical_not() if mode == "none" else kept.zero_()
        assert torch.equal(circuit, before)
