"""``MaskAdamW`` and ``MaskSGD``: trajectories equal to plain torch's, and what else may happen between two steps."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from models import randomize_logits
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.pytorch_utils import Conv1D

from csmask import CircuitConfig, CircuitModel, MaskAdamW, MaskSGD
from csmask.masked_leaf import grad_so_far, leaf_of

STEPS = 100


class Net(nn.Module):
    """A convolution, a grouped one, GPT-2's linear layer, one layer used twice, one that is left out at times."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
        self.grouped = nn.Conv2d(4, 4, 3, groups=2, stride=2)
        self.flat = nn.Linear(36, 16, bias=False)
        self.gpt = Conv1D(16, 16)
        self.twice = nn.Linear(16, 16)
        self.sometimes = nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x, labels, skip=False):
        x = torch.tanh(self.grouped(torch.tanh(self.conv(x)))).flatten(1)
        x = self.gpt(torch.tanh(self.flat(x)))
        x = self.twice(torch.tanh(self.twice(torch.tanh(x))))
        if not skip:
            x = x + self.sometimes(torch.tanh(x))
        logits = self.head(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def circuit_of(execution="auto", dtype=torch.float32, seed=0, freeze_base=True, targets="all", **config):
    torch.manual_seed(seed)
    net = Net().to(dtype)
    hparams = {key: config.pop(key) for key in ("mask_unit", "mask_bias", "rescale") if key in config}
    config = {"l0_lambda": 1e-3, **config}
    circuit = CircuitModel(
        CircuitConfig(mask_hparams=hparams, target_layers=targets, execution=execution, freeze_base=freeze_base,
                      **config), net,
    )  # fmt: skip
    with torch.no_grad():
        for param in circuit.mask_parameters():
            param.normal_(std=0.5)
    return circuit


def batches(step, micro_batches, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    for _ in range(micro_batches):
        x = torch.randn(6, 3, 7, 7, generator=generator).to(dtype)
        yield x, torch.randint(5, (6,), generator=generator)


def train(circuit, optimizer, steps=STEPS, micro_batches=1, anneal=False, skip=lambda step: False, others=(),
          clip=None, dtype=torch.float32):  # fmt: skip
    losses = []
    for step in range(steps):
        if anneal:
            circuit.temperature = 20 ** (step / (steps - 1))
        optimizer.zero_grad()
        for x, y in batches(step, micro_batches, dtype):
            loss = circuit(x, y, skip=skip(step))["loss"] / micro_batches
            loss.backward()
            losses.append(float(loss.detach()))
        if clip is not None:
            nn.utils.clip_grad_norm_(circuit.mask_parameters(), clip)
        optimizer.step()
        for other in others:
            other.step()
            other.zero_grad()
    return losses


def assert_same_training(got, want, losses, expected_losses, tolerance=1e-5):
    assert losses == pytest.approx(expected_losses, rel=tolerance)
    for (name, a), (_, b) in zip(got.named_mask_parameters(), want.named_mask_parameters(), strict=True):
        assert not torch.equal(b, torch.zeros_like(b))
        error = float((a.detach() - b.detach()).norm() / b.detach().norm())
        assert error <= tolerance, f"{name}: {error:.2g}"
        # AdamW divides by the gradient's size: where that is next to nothing, so is what it shares with the other.
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=100 * tolerance, msg=lambda m, n=name: n + m)
        assert torch.equal(a > 0, b > 0), name
    assert got.compute_l0_statistics() == want.compute_l0_statistics()


def pair(make, torch_make, execution="auto", **config):
    """A circuit with csmask's optimizer, and the reference with torch's."""
    got, want = circuit_of(execution, **config), circuit_of("reference", **config)
    return (got, make(got.mask_parameters())), (want, torch_make(want.mask_parameters()))


ADAMW = (lambda p: MaskAdamW(p, lr=0.02), lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.0))


@pytest.mark.parametrize("config", [
    {}, {"mask_bias": True}, {"rescale": True}, {"l0_reduction": "mean", "l0_lambda": 1.0}, {"add_l0": False},
    {"mask_unit": "neuron"}, {"mask_unit": "neuron", "mask_bias": True},
], ids=str)  # fmt: skip
def test_adamw_follows_the_trajectory_of_plain_torch(config):
    (got, mine), (want, theirs) = pair(*ADAMW, **config)
    losses = train(got, mine)
    assert_same_training(got, want, losses, train(want, theirs))
    if config.get("mask_unit") != "neuron":
        assert all(layer.waits for layer in got.masked_layers.values())


@pytest.mark.parametrize("options", [
    {"micro_batches": 4}, {"anneal": True}, {"anneal": True, "micro_batches": 3},
    {"skip": lambda step: step % 3 == 0}, {"skip": lambda _: True}, {"clip": 0.01},
], ids=["accumulation", "annealing", "both", "layer unused at times", "layer unused", "clip_grad_norm_"])  # fmt: skip
def test_so_does_every_way_of_running_it(options):
    (got, mine), (want, theirs) = pair(*ADAMW)
    losses = train(got, mine, **options)
    assert_same_training(got, want, losses, train(want, theirs, **options))


@pytest.mark.parametrize("add_l0", [True, False])
def test_a_layer_without_gradient_is_not_stepped(add_l0):
    (got, mine), (want, theirs) = pair(*ADAMW, add_l0=add_l0)
    before = got.masked_layers["sometimes"].mask_logits.detach().clone()
    losses = train(got, mine, 5, skip=lambda _: True)
    assert_same_training(got, want, losses, train(want, theirs, 5, skip=lambda _: True))
    assert torch.equal(got.masked_layers["sometimes"].mask_logits, before) is not add_l0


SETTINGS = [
    ("AdamW", {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.02, "maximize": True}),
    ("SGD", {"lr": 0.5}),
    ("SGD", {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.5, "momentum": 0.9, "nesterov": True}),
    ("SGD", {"lr": 0.5, "momentum": 0.8, "dampening": 0.3, "maximize": True}),
]


@pytest.mark.parametrize(("kind", "settings"), SETTINGS, ids=str)
@pytest.mark.parametrize("unit", ["weight", "neuron"])
def test_settings_mean_what_they_mean_in_torch(kind, settings, unit):
    mine, theirs = {"AdamW": (MaskAdamW, torch.optim.AdamW), "SGD": (MaskSGD, torch.optim.SGD)}[kind]
    plain = {"weight_decay": 0.0, **settings}
    (got, a), (want, b) = pair(lambda p: mine(p, **settings), lambda p: theirs(p, **plain), mask_unit=unit)
    losses = train(got, a, 30)
    assert_same_training(got, want, losses, train(want, b, 30))


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_max_grad_norm_clips_as_torch_does(kind):
    mine, theirs = {"AdamW": (MaskAdamW, torch.optim.AdamW), "SGD": (MaskSGD, torch.optim.SGD)}[kind]
    (got, a), (want, b) = pair(
        lambda p: mine(p, lr=0.02, max_grad_norm=0.01), lambda p: theirs(p, lr=0.02, weight_decay=0.0), mask_bias=True
    )
    norms = []

    class Clipped:
        zero_grad = b.zero_grad

        @staticmethod
        def step():
            norms.append(float(nn.utils.clip_grad_norm_(want.mask_parameters(), 0.01)))
            b.step()

    expected = train(want, Clipped, 30)
    losses = train(got, a, 30)
    assert_same_training(got, want, losses, expected)
    assert max(norms) > 0.01  # it has clipped
    assert float(a.grad_norm) == pytest.approx(norms[-1], rel=1e-4)


def test_a_base_that_is_trained_too():
    """Its weights need their own gradient: masks then run as without csmask's optimizer."""
    (got, mine), (want, theirs) = pair(*ADAMW, freeze_base=False)
    bases = []
    for circuit in (got, want):
        masks = {id(p) for p in circuit.mask_parameters()}
        bases.append(torch.optim.SGD([p for p in circuit.parameters() if id(p) not in masks], lr=0.01))
    losses = train(got, mine, 30, others=bases[:1])
    assert_same_training(got, want, losses, train(want, theirs, 30, others=bases[1:]))


def test_16_bit_gradients_of_micro_batches_add_up_in_fp32():
    circuit = circuit_of(dtype=torch.bfloat16, add_l0=False)
    MaskAdamWs = MaskAdamW(circuit.mask_parameters(), lr=0.02)
    layer = circuit.masked_layers["flat"]
    expected = torch.zeros(layer.weight.shape)
    for x, y in batches(0, 6, torch.bfloat16):
        circuit(x, y)["loss"].backward()
        single = circuit_of(dtype=torch.bfloat16, add_l0=False)
        optimizer = MaskAdamW(single.mask_parameters(), lr=0.02)
        single(x, y)["loss"].backward()
        expected += optimizer.leaves[2].dmasked_weight.float()
    assert layer.leaf.dmasked_weight.dtype == torch.float32
    assert torch.equal(layer.leaf.dmasked_weight, expected)
    assert MaskAdamWs.leaves[2] is layer.leaf


def test_bf16_follows_the_trajectory_of_the_other_executions():
    (got, mine), _ = pair(*ADAMW, dtype=torch.bfloat16)
    want = circuit_of("per_forward", dtype=torch.bfloat16)
    losses = train(got, mine, 20, dtype=torch.bfloat16)
    expected = train(want, ADAMW[1](want.mask_parameters()), 20, dtype=torch.bfloat16)
    assert_same_training(got, want, losses, expected, 1e-3)


# Between two steps


def small(execution="auto", seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    circuit = CircuitModel(CircuitConfig(target_layers="all", execution=execution, add_l0=False), net)
    with torch.no_grad():
        for param in circuit.mask_parameters():
            param.normal_()
    return circuit


X = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))


def loss_of(circuit, l0=True):
    loss = circuit(X).square().sum()
    return loss + 0.1 * circuit.l0() if l0 else loss


def gradients(circuit):
    return [p.grad.clone() for p in circuit.mask_parameters()]


def assert_close(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.fixture
def expected():
    """The gradients of ``loss_of`` by plain torch."""
    circuit = small("reference")
    loss_of(circuit).backward()
    return gradients(circuit)


def test_no_gradient_is_made_until_it_is_asked_for(expected):
    circuit = small()
    optimizer = MaskAdamW(circuit.mask_parameters())
    loss_of(circuit).backward()
    assert all(grad_so_far(p) is None for p in circuit.mask_parameters())
    assert_close(gradients(circuit), expected)
    assert all(leaf.dmasked_weight is None and leaf.dl0 is None for leaf in optimizer.leaves)
    loss_of(circuit).backward()
    assert_close(gradients(circuit), [2 * g for g in expected])  # those so far, and those that waited


@pytest.mark.parametrize("how", ["optimizer", "circuit", "by hand"])
def test_clearing_gradients_clears_those_that_wait(how, expected):
    circuit = small()
    optimizer = MaskAdamW(circuit.mask_parameters())
    for _ in range(2):
        loss_of(circuit).backward()
        if how == "optimizer":
            optimizer.zero_grad()
        elif how == "circuit":
            circuit.zero_grad()
        else:
            for p in circuit.mask_parameters():
                p.grad = None
    assert all(grad_so_far(p) is None for p in circuit.mask_parameters())
    before = [p.detach().clone() for p in circuit.mask_parameters()]
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(circuit.mask_parameters(), before, strict=True))
    loss_of(circuit).backward()
    assert_close(gradients(circuit), expected)


def test_the_masked_weight_after_a_step_is_that_of_the_new_logits():
    circuit = small()
    optimizer = MaskAdamW(circuit.mask_parameters(), lr=0.1)
    for temperature in (1.0, 3.0):
        circuit.temperature = temperature
        loss_of(circuit).backward()
        optimizer.step()
        for layer in circuit.masked_layers.values():
            mask = torch.sigmoid(temperature * layer.mask_logits.detach().double())
            want = layer.weight.double() * mask
            torch.testing.assert_close(layer.leaf.value.detach().double(), want, rtol=1e-6, atol=0)
        optimizer.zero_grad()
    telemetry = optimizer.telemetry()
    logits = torch.cat([p.detach().flatten() for p in circuit.mask_parameters()])
    assert telemetry["l0"] == pytest.approx(torch.sigmoid(3.0 * logits.double()).sum().item(), rel=1e-6)
    assert telemetry["kept_fraction"] == pytest.approx(circuit.density())
    assert telemetry["undecided_fraction"] == pytest.approx(circuit.undecided_fraction())
    assert float(circuit.l0()) == pytest.approx(telemetry["l0"], rel=1e-6)


def test_a_step_runs_neither_materialize_nor_the_sums_again(monkeypatch):
    """What the step wrote is what the next forward uses."""
    circuit = small()
    optimizer = MaskAdamW(circuit.mask_parameters(), lr=0.1)
    loss_of(circuit).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = [layer.leaf.value for layer in circuit.masked_layers.values()]
    versions = [value._version for value in before]
    loss_of(circuit).backward()
    assert [layer.leaf.value for layer in circuit.masked_layers.values()] == before
    assert [value._version for value in before] == versions


def change_logits(circuit):
    with torch.no_grad():
        circuit.mask_parameters()[0].mul_(-1)


def drop_base(state):
    """The masks of a circuit over another base."""
    del state["_extra_state"]
    return state


def load_state(circuit):
    circuit.load_state_dict(drop_base(small(seed=3).state_dict()))


@pytest.mark.parametrize("change", [change_logits, load_state, lambda c: c.double().float(),
                                    lambda c: setattr(c, "temperature", 2.5)])  # fmt: skip
def test_changes_by_hand_are_seen_by_the_next_forward(change):
    circuit, want = small(), small("reference")
    optimizer = MaskAdamW(circuit.mask_parameters())
    loss_of(circuit).backward()
    optimizer.zero_grad()
    for c in (circuit, want):
        change(c)
        loss_of(c).backward()
    assert_close(gradients(circuit), gradients(want))


@pytest.mark.parametrize("change", [change_logits, load_state])
@pytest.mark.parametrize("then", ["step", "forward", "grad"])
def test_changes_while_a_gradient_waits_are_refused(change, then):
    circuit = small()
    optimizer = MaskAdamW(circuit.mask_parameters())
    loss_of(circuit).backward()
    change(circuit)
    logits = [p.detach().clone() for p in circuit.mask_parameters()]
    acts = {"step": optimizer.step, "forward": lambda: circuit(X), "grad": lambda: gradients(circuit)}
    with pytest.raises(RuntimeError, match=r"changed after a backward.*optimizer.step\(\) or optimizer.zero_grad\(\)"):
        acts[then]()
    assert all(torch.equal(p, b) for p, b in zip(circuit.mask_parameters(), logits, strict=True))
    optimizer.zero_grad()
    loss_of(circuit).backward()
    optimizer.step()


def test_temperature_may_change_between_micro_batches():
    """Each gradient is that at its own temperature, as in plain torch."""
    circuit, want = small(), small("reference")
    optimizer = MaskAdamW(circuit.mask_parameters())
    for c in (circuit, want):
        for temperature in (1.0, 4.0):
            c.temperature = temperature
            loss_of(c).backward()
    assert_close(gradients(circuit), gradients(want))
    assert optimizer.leaves[0].dmasked_weight is None


def test_another_optimizer_on_these_layers_is_refused():
    circuit = small()
    mine, theirs = MaskAdamW(circuit.mask_parameters()), torch.optim.AdamW(circuit.mask_parameters())
    loss_of(circuit).backward()
    with pytest.raises(RuntimeError, match=r"another optimizer, MaskAdamW.*set_execution\('auto'\)"):
        theirs.step()
    circuit.set_execution("auto")  # as it says
    theirs.step()
    circuit.set_execution("per_step")
    loss_of(circuit).backward()
    mine.step()


def test_the_newest_of_two_takes_over(expected):
    circuit = small()
    old = MaskAdamW(circuit.mask_parameters(), lr=0.1)
    loss_of(circuit).backward()
    new = MaskSGD(circuit.mask_parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match=r"another optimizer, MaskSGD|another optimizer has taken over"):
        old.step()
    before = [p.detach().clone() for p in circuit.mask_parameters()]
    new.step()
    assert_close(circuit.mask_parameters(), [b - 0.1 * g for b, g in zip(before, expected, strict=True)])


def test_without_its_optimizer_a_layer_trains_like_any_other(expected):
    circuit = small()
    optimizer = MaskAdamW(circuit.mask_parameters(), lr=0.1)
    loss_of(circuit).backward()
    del optimizer
    gc.collect()
    assert_close(gradients(circuit), expected)
    other = torch.optim.SGD(circuit.mask_parameters(), lr=0.1)
    before = [p.detach().clone() for p in circuit.mask_parameters()]
    circuit.zero_grad()
    loss_of(circuit).backward()
    other.step()
    assert_close(circuit.mask_parameters(), [b - 0.1 * g for b, g in zip(before, expected, strict=True)])


def test_execution_changes_of_a_live_circuit_keep_the_optimizers_state():
    got, want = circuit_of(), circuit_of("reference")
    mine, theirs = ADAMW[0](got.mask_parameters()), ADAMW[1](want.mask_parameters())
    losses, expected = [], []
    for execution in ("per_step", "per_forward", "per_step", "in_kernel", "reference", "per_step"):
        got.set_execution(execution)
        losses += train(got, mine, 5)
        expected += train(want, theirs, 5)
    assert_same_training(got, want, losses, expected)


@pytest.mark.parametrize("kind", [MaskAdamW, MaskSGD])
def test_states_load_and_go_on(kind, tmp_path):
    options = {"momentum": 0.9} if kind is MaskSGD else {}
    whole, first = circuit_of(), circuit_of()
    a, b = (kind(c.mask_parameters(), lr=0.05, **options) for c in (whole, first))
    expected = train(whole, a, 10)
    losses = train(first, b, 10)
    torch.save({"circuit": first.state_dict(), "optimizer": b.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second = circuit_of()
    randomize_logits(second)
    c = kind(second.mask_parameters(), lr=0.05, **options)
    second.load_state_dict(saved["circuit"])
    c.load_state_dict(saved["optimizer"])
    expected += train(whole, a, 10)
    losses += train(second, c, 10)
    assert losses == expected


def test_states_are_those_of_torchs_adamw():
    got, want = circuit_of(), circuit_of("reference")
    mine = MaskAdamW(got.mask_parameters(), lr=0.02)
    losses = train(got, mine, 5)
    theirs = torch.optim.AdamW(want.mask_parameters(), lr=0.02, weight_decay=0.0)
    want.load_state_dict(got.state_dict())
    theirs.load_state_dict(copy.deepcopy(mine.state_dict()))
    assert_same_training(got, want, losses + train(got, mine, 5), losses + train(want, theirs, 5))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["copy", "pickle"])
def test_copies_are_circuits_of_their_own(copied):
    circuit = circuit_of()
    optimizer = MaskAdamW(circuit.mask_parameters(), lr=0.02)
    train(circuit, optimizer, 2)
    train(circuit, optimizer, 0)
    for x, y in batches(0, 1):
        circuit(x, y)["loss"].backward()
    other = copied(circuit)
    assert all(type(p) is nn.Parameter for p in other.mask_parameters())
    assert all(p.grad is None and leaf_of(p) is None for p in other.mask_parameters())
    want = circuit_of("reference")
    want.load_state_dict(circuit.state_dict())
    mine, theirs = ADAMW[0](other.mask_parameters()), ADAMW[1](want.mask_parameters())
    assert_same_training(other, want, train(other, mine, 3), train(want, theirs, 3))


def test_evaluation_and_ablation_between_steps_change_nothing():
    got, want = circuit_of(), circuit_of("reference")
    mine, theirs = ADAMW[0](got.mask_parameters()), ADAMW[1](want.mask_parameters())
    losses, expected = train(got, mine, 5), train(want, theirs, 5)
    ((x, y),) = batches(9, 1)
    outputs = []
    for circuit in (got, want):
        circuit.eval()
        for mode in ("none", "zero_ablate", "random_ablate"):
            circuit.set_ablate_mode(mode)
            outputs.append(circuit(x, y)["logits"])
        circuit.set_ablate_mode("none")
        circuit.use_masks(False)
        circuit(x, y)
        circuit.use_masks(True)
        circuit.train()
    for a, b in zip(outputs[:3], outputs[3:], strict=True):
        torch.testing.assert_close(a, b)
    losses += train(got, mine, 5)
    expected += train(want, theirs, 5)
    assert_same_training(got, want, losses, expected)


def test_schedulers_and_closures_work():
    circuit = small()
    optimizer = MaskAdamW(circuit.mask_parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(circuit)
        loss.backward()
        return loss

    losses = []
    for _ in range(5):
        losses.append(float(optimizer.step(closure)))
        scheduler.step()
    assert losses == sorted(losses, reverse=True)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


@pytest.mark.parametrize(("make", "message"), [
    (lambda p: MaskAdamW(p, lr=-1.0), "lr must be >= 0, got -1"),
    (lambda p: MaskAdamW(p, lr=math.nan), "lr must be >= 0, got nan"),
    (lambda p: MaskAdamW(p, betas=(0.9, 1.0)), r"betas\[1\] must be in \[0, 1\), got 1.0"),
    (lambda p: MaskAdamW(p, eps=-1e-8), "eps must be >= 0"),
    (lambda p: MaskAdamW(p, weight_decay=-0.1), "weight_decay must be >= 0"),
    (lambda p: MaskAdamW(p, max_grad_norm=0.0), "max_grad_norm must be positive, or None"),
    (lambda p: MaskSGD(p, momentum=-0.1), "momentum must be >= 0"),
    (lambda p: MaskSGD(p, nesterov=True), "nesterov needs momentum > 0"),
    (lambda _: MaskAdamW([]), "empty parameter list"),
])  # fmt: skip
def test_settings_out_of_range_are_refused_and_nothing_changes(make, message):
    circuit = small()
    with pytest.raises(ValueError, match=message):
        make(circuit.mask_parameters())
    assert all(layer.execution == "auto" and layer.leaf is None for layer in circuit.masked_layers.values())
    assert all(type(p) is nn.Parameter for p in circuit.mask_parameters())


def test_an_execution_that_was_chosen_is_left():
    circuit = circuit_of("per_forward")
    train(circuit, MaskAdamW(circuit.mask_parameters(), lr=0.02), 2)
    assert all(layer.execution == "per_forward" for layer in circuit.masked_layers.values())


def test_per_step_without_its_optimizer_is_auto(expected):
    circuit = small("per_step")
    loss_of(circuit).backward()
    assert_close(gradients(circuit), expected)


# torch.compile, autocast, checkpointing


@pytest.mark.dropin
def test_a_compiled_circuit_is_one_graph_and_is_not_compiled_again_by_annealing():
    torch.compiler.reset()
    (got, mine), (want, theirs) = pair(*ADAMW)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(got, backend=counter, fullgraph=True)
    losses, expected = [], []
    for circuit, call, optimizer, into in ((got, compiled, mine, losses), (want, want, theirs, expected)):
        for step in range(12):
            circuit.temperature = 20 ** (step / 11)
            optimizer.zero_grad()
            for x, y in batches(step, 2):
                loss = call(x, y)["loss"] / 2
                loss.backward()
                into.append(float(loss.detach()))
            optimizer.step()
    assert_same_training(got, want, losses, expected)
    assert counter.frame_count == 1


@pytest.mark.dropin
def test_autocast_makes_the_masked_weight_in_its_dtype():
    got, want = circuit_of(), circuit_of("per_forward")
    optimizers = ADAMW[0](got.mask_parameters()), ADAMW[1](want.mask_parameters())
    losses = []
    for circuit, optimizer in zip((got, want), optimizers, strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(train(circuit, optimizer, 10))
    assert got.masked_layers["flat"].leaf.value.dtype == torch.bfloat16
    assert_same_training(got, want, *losses, 1e-3)
    # And back: what waits in one dtype is not lost when the next forward has another.
    ((x, y),) = batches(0, 1)
    for circuit, optimizer in zip((got, want), optimizers, strict=True):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            circuit(x, y)["loss"].backward()
        circuit(x, y)["loss"].backward()
    for a, b in zip(got.mask_parameters(), want.mask_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-2, atol=1e-4)


@pytest.mark.dropin
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_a_forward_that_is_repeated_in_backward_finds_the_same_masked_weight(use_reentrant):
    (got, mine), (want, theirs) = pair(*ADAMW)
    for circuit in (got, want):
        inner = circuit.wrapped_model.twice

        def repeated(x, inner=inner):
            return torch.utils.checkpoint.checkpoint(inner.forward_once, x, use_reentrant=use_reentrant)

        inner.forward_once = inner.forward
        inner.forward = repeated
    assert_same_training(got, want, train(got, mine, 10), train(want, theirs, 10))


# Between a forward and its backward


def autocast_forward(circuit, _optimizer):
    with torch.autocast("cpu", torch.bfloat16):
        return circuit(X)


@pytest.mark.parametrize("between", [
    lambda c, o: o.step(), lambda c, o: setattr(c, "temperature", 3.0), lambda c, o: c.set_execution("per_forward"),
    lambda c, o: c.double(), lambda c, o: MaskSGD(c.mask_parameters()), autocast_forward,
], ids=["step", "temperature", "execution", "dtype", "optimizer", "autocast"])  # fmt: skip
@pytest.mark.parametrize("what", ["masked weight", "l0"])
def test_a_masked_weight_is_not_replaced_between_forward_and_backward_unseen(between, what):
    """The first layer's input needs no gradient: PyTorch itself does not notice there."""
    torch.manual_seed(0)
    circuit = CircuitModel(CircuitConfig(target_layers="all", add_l0=False), nn.Sequential(nn.Linear(6, 5)))
    optimizer = MaskAdamW(circuit.mask_parameters(), lr=0.1)
    loss_of(circuit).backward()
    loss = circuit(X).square().sum() if what == "masked weight" else circuit.l0()
    other = between(circuit, optimizer)  # noqa: F841, an optimizer lives on
    optimizer.zero_grad()
    if what == "l0" and between is autocast_forward:
        loss.backward()  # l0 is the same for any dtype of the masked weight
        return
    with pytest.raises(RuntimeError, match=r"has been replaced since: run backward before"):
        loss.backward()


def test_another_group_of_parameters_leaves_what_waits():
    circuit, want = small(), small("reference")
    optimizer = MaskAdamW(circuit.mask_parameters())
    loss_of(circuit).backward()
    loss = loss_of(circuit)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    loss.backward()
    for _ in range(2):
        loss_of(want).backward()
    assert_close(gradients(circuit), gradients(want))


def test_an_optimizer_that_is_given_layers_later_takes_them():
    circuit = circuit_of(mask_bias=True)
    biases = [layer.bias_mask_logits for layer in circuit.masked_layers.values() if layer.bias_mask_logits is not None]
    optimizer = MaskAdamW(biases, lr=0.02)
    optimizer.add_param_group({"params": [layer.mask_logits for layer in circuit.masked_layers.values()]})
    assert all(layer.waits for layer in circuit.masked_layers.values())
    want = circuit_of("reference", mask_bias=True)
    theirs = torch.optim.AdamW(want.mask_parameters(), lr=0.02, weight_decay=0.0)
    assert_same_training(circuit, want, train(circuit, optimizer, 5), train(want, theirs, 5))


def test_what_is_written_through_data_is_seen():
    (got, mine), (want, theirs) = pair(*ADAMW)
    for circuit, optimizer in ((got, mine), (want, theirs)):
        train(circuit, optimizer, 3)
        for p in circuit.mask_parameters():
            p.data.clamp_(-0.3, 0.3)
        p.data = p.data.clone() * 0.5
        p.data = p.data.clone() * 0.5
    assert_same_training(got, want, train(got, mine, 3), train(want, theirs, 3))


def test_hooks_on_logits_see_their_gradient():
    (got, mine), (want, theirs) = pair(*ADAMW)
    calls = []
    for circuit in (got, want):
        first, second, *_ = circuit.mask_parameters()
        first.register_hook(lambda g: torch.zeros_like(g))
        second.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.norm()))
    assert_same_training(got, want, train(got, mine, 3), train(want, theirs, 3))
    assert len(calls) == 6
    assert not got.masked_layers["conv"].waits
    assert got.masked_layers["flat"].waits


def test_a_weight_that_is_replaced_is_used():
    circuit, want = small(), small("reference")
    optimizer = MaskAdamW(circuit.mask_parameters())
    loss_of(circuit).backward()
    optimizer.zero_grad()
    for c in (circuit, want):
        first = next(iter(c.masked_layers.values()))
        first.weight = nn.Parameter(torch.ones_like(first.weight), requires_grad=False)
        first.temperature = torch.tensor(2.0)
        loss_of(c).backward()
    assert_close(gradients(circuit), gradients(want))


def test_layers_of_two_optimizers_count_once_in_l0():
    circuit, want = small(), small("reference")
    first, second = (MaskAdamW(circuit.mask_parameters()[n:], lr=0.1) for n in (0, 1))
    torch.testing.assert_close(circuit.l0(), want.l0())
    loss_of(circuit).backward()
    loss_of(want).backward()
    assert_close(gradients(circuit), gradients(want))
    assert len(first.leaves) + len(second.leaves) == 3


def test_a_steps_gradient_is_used_up():
    circuit = small()
    optimizer = MaskSGD(circuit.mask_parameters(), lr=0.1)
    for look in (False, True):
        loss_of(circuit).backward()
        if look:
            nn.utils.clip_grad_norm_(circuit.mask_parameters(), 1e9)
        optimizer.step()
        assert all(p.grad is None for p in circuit.mask_parameters())


def test_momentum_may_begin_later_and_states_of_torch_load():
    got, want = circuit_of(), circuit_of("reference")
    theirs = torch.optim.SGD(want.mask_parameters(), lr=0.3)
    mine = MaskSGD(got.mask_parameters(), lr=0.3)
    losses, expected = train(got, mine, 3), train(want, theirs, 3)
    for optimizer in (mine, theirs):
        optimizer.param_groups[0]["momentum"] = 0.9
    losses += train(got, mine, 3)
    expected += train(want, theirs, 3)
    assert_same_training(got, want, losses, expected)
    mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert_same_training(got, want, losses + train(got, mine, 3), expected + train(want, theirs, 3))


def test_amsgrad_is_refused():
    circuit = small()
    theirs = torch.optim.AdamW(circuit.mask_parameters(), amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad=True, which MaskAdamW does not know"):
        MaskAdamW(circuit.mask_parameters()).load_state_dict(theirs.state_dict())


def test_clearing_all_gradients_of_a_circuit_helps_after_a_change():
    circuit = small()
    MaskAdamW(circuit.mask_parameters())
    optimizer = MaskAdamW(circuit.mask_parameters())
    loss_of(circuit).backward()
    change_logits(circuit)
    circuit.zero_grad()
    loss_of(circuit).backward()
    optimizer.step()


def test_telemetry_in_inference_mode_disturbs_nothing():
    circuit = circuit_of(add_l0=False)
    optimizer = MaskAdamW(circuit.mask_parameters(), lr=0.02)
    train(circuit, optimizer, 1)
    circuit.temperature = 2.0
    with torch.inference_mode():
        before = optimizer.telemetry()
    train(circuit, optimizer, 1, skip=lambda _: True)  # a layer without a gradient
    assert optimizer.telemetry()["l0"] != before["l0"]
    logits = torch.cat([p.detach().flatten() for p in circuit.mask_parameters()])
    assert optimizer.telemetry()["kept_fraction"] == pytest.approx(float((logits > 0).float().mean()))


def test_after_a_change_of_execution_masked_weights_are_kept_as_ever():
    circuit = circuit_of()
    optimizer = MaskAdamW(circuit.mask_parameters(), lr=0.02)
    train(circuit, optimizer, 1)
    circuit.set_execution("per_forward")
    assert all(type(p) is nn.Parameter for p in circuit.mask_parameters())
    train(circuit, optimizer, 2)
    assert circuit.masked_layers["flat"].masked_weight._kept is not None


def test_a_compiled_circuit_sees_masks_that_are_loaded():
    torch.compiler.reset()
    got, want = small(), small("reference")
    MaskAdamWs = MaskAdamW(got.mask_parameters())
    compiled = torch.compile(got, backend="eager")
    compiled(X)
    for circuit in (got, want):
        load_state(circuit)
    torch.testing.assert_close(compiled(X), want(X))
    assert len(MaskAdamWs.leaves) == 2


def test_layers_that_cannot_wait_train_all_the_same():
    """Weights that lie otherwise than their logits."""
    torch.manual_seed(0)
    circuits = []
    for execution in ("auto", "reference"):
        torch.manual_seed(0)
        net = Net().to(memory_format=torch.channels_last)
        circuits.append(CircuitModel(CircuitConfig(target_layers="all", execution=execution, l0_lambda=1e-3), net))
        with torch.no_grad():
            for param in circuits[-1].mask_parameters():
                param.normal_(std=0.5)
    got, want = circuits
    mine, theirs = ADAMW[0](got.mask_parameters()), ADAMW[1](want.mask_parameters())
    assert [name for name, layer in got.masked_layers.items() if not layer.waits] == ["conv", "grouped"]
    assert_same_training(got, want, train(got, mine, 5), train(want, theirs, 5))


@pytest.mark.parametrize("settings", [{}, {"lean": True}, {"state_bits": 8}], ids=str)
def test_a_circuit_that_is_dropped_is_freed(settings):
    """A masked weight's hook must not keep the layer whose masked weight it is."""
    circuit = circuit_of()
    optimizer = MaskAdamW(circuit.mask_parameters(), **settings)
    train(circuit, optimizer, steps=2)
    alive = [weakref.ref(p) for p in circuit.parameters()] + [weakref.ref(circuit), weakref.ref(optimizer)]
    del circuit, optimizer
    gc.collect()
    assert [ref() for ref in alive if ref() is not None] == []


def test_infinity_does_not_clip_and_a_bad_norm_spoils_nothing_else():
    """One layer's gradient is infinite; the other's step is what it is without a bound."""
    found = {}
    for bound in (None, math.inf):
        circuit = circuit_of(targets=["flat", "head"])
        optimizer = MaskAdamW(circuit.mask_parameters(), lr=0.1, max_grad_norm=bound)
        ((x, y),) = batches(0, 1)
        loss = circuit(x, y)["loss"]
        flat = circuit.masked_layers["flat"]
        (loss + 3e38 * 1e38 * flat.leaf.current(torch.float32).sum() * 1e10).backward()
        optimizer.step()
        found[bound] = [p.detach().clone() for p in circuit.mask_parameters()]
    for ours, theirs in zip(found[math.inf], found[None], strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert any(p.isfinite().all() for p in found[math.inf])


def test_an_l0_whose_optimizer_is_gone_is_refused():
    circuit = circuit_of()
    params = circuit.mask_parameters()
    optimizer = MaskAdamW(params)
    l0 = circuit.l0()
    optimizer = MaskAdamW(params)
    gc.collect()
    with pytest.raises(RuntimeError, match="replaced since"):
        l0.backward()
    optimizer.zero_grad()


def test_an_optimizer_that_is_copied_before_its_circuit_finds_its_layers():
    circuit = circuit_of()
    optimizer = MaskAdamW(circuit.mask_parameters(), lr=0.05)
    train(circuit, optimizer, steps=2)
    optimizer, circuit = copy.deepcopy((optimizer, circuit))
    train(circuit, optimizer, steps=1)
    assert {id(leaf.mask_logits) for leaf in optimizer.leaves} == {id(p) for p in circuit.mask_parameters()}
