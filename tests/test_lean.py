"""Lean mode: trajectories equal to plain torch's and ``per_step``'s, the guards, and what is in memory, counted."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import test_optim
import torch
import torch.utils.checkpoint
from models import randomize_logits
from test_optim import X, assert_close, assert_same_training, batches, circuit_of, drop_base, loss_of, small, train
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from csmask import CircuitConfig, CircuitModel, MaskAdamW, MaskSGD, _cpp
from csmask.lean import LeanLeaf
from csmask.masked_leaf import grad_so_far, leaf_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from memory_meter import measure

STEPS = 60


def lean(p, **settings):
    return MaskAdamW(p, lr=0.02, lean=True, **settings)


def torchs(p):
    return torch.optim.AdamW(p, lr=0.02, weight_decay=0.0)


def pair(execution="auto", **config):
    """A circuit in lean mode, and the reference with torch's AdamW."""
    got, want = circuit_of(execution, **config), circuit_of("reference", **config)
    return (got, lean(got.mask_parameters())), (want, torchs(want.mask_parameters()))


# Trajectories


@pytest.mark.parametrize("config", [
    {}, {"mask_bias": True}, {"rescale": True}, {"l0_reduction": "mean", "l0_lambda": 1.0}, {"add_l0": False},
    {"mask_unit": "neuron"},
], ids=str)  # fmt: skip
def test_adamw_follows_the_trajectory_of_plain_torch_and_of_per_step(config):
    (got, mine), (want, theirs) = pair(**config)
    losses = train(got, mine, STEPS)
    assert_same_training(got, want, losses, train(want, theirs, STEPS))
    per_step = circuit_of(**config)
    expected = train(per_step, MaskAdamW(per_step.mask_parameters(), lr=0.02), STEPS)
    assert_same_training(got, per_step, losses, expected)
    if config.get("mask_unit") != "neuron":
        assert all(layer.waits and isinstance(layer.leaf, LeanLeaf) for layer in got.masked_layers.values())
        assert all(grad_so_far(layer.mask_logits) is None for layer in got.masked_layers.values())


@pytest.mark.parametrize("options", [
    {"anneal": True}, {"skip": lambda step: step % 3 == 0}, {"skip": lambda _: True},
], ids=["annealing", "layer unused at times", "layer unused"])  # fmt: skip
@pytest.mark.parametrize("add_l0", [True, False])
def test_so_does_every_way_of_running_it(options, add_l0):
    (got, mine), (want, theirs) = pair(add_l0=add_l0)
    before = got.masked_layers["sometimes"].mask_logits.detach().clone()
    losses = train(got, mine, STEPS, **options)
    assert_same_training(got, want, losses, train(want, theirs, STEPS, **options))
    never = options.get("skip", lambda _: False)(1)
    assert torch.equal(got.masked_layers["sometimes"].mask_logits, before) is (never and not add_l0)


@pytest.mark.parametrize(("kind", "settings"), test_optim.SETTINGS, ids=str)
def test_settings_mean_what_they_mean_in_torch(kind, settings):
    mine, theirs = {"AdamW": (MaskAdamW, torch.optim.AdamW), "SGD": (MaskSGD, torch.optim.SGD)}[kind]
    got, want = circuit_of(), circuit_of("reference")
    losses = train(got, mine(got.mask_parameters(), **settings, lean=True), 20)
    plain = {"weight_decay": 0.0, **settings}
    assert_same_training(got, want, losses, train(want, theirs(want.mask_parameters(), **plain), 20))


def test_parameter_groups_have_their_own_settings_also_after_loading():
    got, want = circuit_of(mask_bias=True), circuit_of("reference", mask_bias=True)
    groups = []
    for circuit in (got, want):
        params = circuit.mask_parameters()
        groups.append([{"params": params[:5], "lr": 0.05}, {"params": params[5:], "lr": 0.01}])
    mine, theirs = MaskAdamW(groups[0], lean=True), torch.optim.AdamW(groups[1], weight_decay=0.0)
    losses, expected = train(got, mine, 10), train(want, theirs, 10)
    mine.load_state_dict(copy.deepcopy(mine.state_dict()))
    assert_same_training(got, want, losses + train(got, mine, 10), expected + train(want, theirs, 10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_of_the_base_makes_no_difference_to_per_step(dtype):
    got, want = circuit_of(dtype=dtype), circuit_of(dtype=dtype)
    losses = train(got, lean(got.mask_parameters()), 20, dtype=dtype)
    expected = train(want, MaskAdamW(want.mask_parameters(), lr=0.02), 20, dtype=dtype)
    assert_same_training(got, want, losses, expected, 1e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.dropin
def test_autocast_makes_the_masked_weight_in_its_dtype():
    got, want = circuit_of(), circuit_of()
    optimizers = lean(got.mask_parameters()), MaskAdamW(want.mask_parameters(), lr=0.02)
    losses = []
    for circuit, optimizer in zip((got, want), optimizers, strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(train(circuit, optimizer, 10))
    assert_same_training(got, want, *losses, 1e-3)


def test_learning_rate_schedules_run_as_ever():
    (got, mine), (want, theirs) = pair()
    losses = [[], []]
    for (circuit, optimizer), into in zip(((got, mine), (want, theirs)), losses, strict=True):
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=15)
        for _ in range(20):
            into += train(circuit, optimizer, 1)
            scheduler.step()
    assert_same_training(got, want, *losses)


def test_the_learning_rate_is_that_of_backward():
    circuit = small()
    optimizer = MaskSGD(circuit.mask_parameters(), lr=0.1, lean=True)
    loss_of(circuit).backward()
    after = [p.detach().clone() for p in circuit.mask_parameters()]
    optimizer.param_groups[0]["lr"] = 1e3
    optimizer.step()
    assert all(torch.equal(p, a) for p, a in zip(circuit.mask_parameters(), after, strict=True))


def test_clipping_is_by_the_norm_of_the_step_before():
    (got, _), (want, theirs) = pair(mask_bias=True)
    mine = lean(got.mask_parameters(), max_grad_norm=0.01)
    norms = []

    class Clipped:
        zero_grad = theirs.zero_grad

        @staticmethod
        def step():
            params = want.mask_parameters()
            last = norms[-1] if norms else 0.0
            norms.append(float(nn.utils.get_total_norm([p.grad for p in params])))
            for p in params:
                p.grad *= min(1.0, 0.01 / (last + 1e-6))
            theirs.step()

    expected = train(want, Clipped, 30)
    losses = train(got, mine, 30)
    assert_same_training(got, want, losses, expected)
    assert max(norms) > 0.01  # it has clipped
    assert float(mine.grad_norm) == pytest.approx(norms[-1], rel=1e-4)
    # Without it the states differ, by which a wrong factor would have been seen.
    (free, unclipped), _ = pair(mask_bias=True)
    train(free, unclipped, 30)
    pairs = zip(mine.state.values(), unclipped.state.values(), strict=True)
    assert all(not torch.allclose(a["exp_avg"], b["exp_avg"]) for a, b in pairs)


def test_a_base_that_is_trained_too_is_trained_as_without():
    (got, mine), (want, theirs) = pair(freeze_base=False)
    bases = []
    for circuit in (got, want):
        masks = {id(p) for p in circuit.mask_parameters()}
        bases.append(torch.optim.SGD([p for p in circuit.parameters() if id(p) not in masks], lr=0.01))
    losses = train(got, mine, 10, others=bases[:1])
    assert_same_training(got, want, losses, train(want, theirs, 10, others=bases[1:]))


@pytest.mark.dropin
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_checkpointed_layers_are_stepped_once(use_reentrant):
    """A transformer whose blocks run again in backward."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    got, want = LlamaForCausalLM(config), LlamaForCausalLM(config)
    want.load_state_dict(got.state_dict())
    got = CircuitModel(CircuitConfig(target_layers="all-linear", l0_lambda=1e-3), got)
    want = CircuitModel(CircuitConfig(target_layers="all-linear", l0_lambda=1e-3, execution="reference"), want)
    got.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    optimizers = lean(got.mask_parameters()), torchs(want.mask_parameters())
    held, receive = [], LeanLeaf.receive

    def counted(leaf, *arguments):
        receive(leaf, *arguments)
        held.append(leaf.dmasked_weight is not None)

    LeanLeaf.receive = counted
    try:
        losses = [[], []]
        for circuit, optimizer, into in zip((got, want), optimizers, losses, strict=True):
            generator = torch.Generator().manual_seed(0)
            for _ in range(10):
                ids = torch.randint(50, (2, 8), generator=generator)
                loss = circuit(input_ids=ids, labels=ids).loss
                loss.backward()
                into.append(float(loss.detach()))
                optimizer.step()
                optimizer.zero_grad()
    finally:
        LeanLeaf.receive = receive
    assert_same_training(got, want, *losses)
    assert len(held) == 10 * len(got.masked_layers)
    assert not any(held)  # each gradient was used at once


@pytest.mark.dropin
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_a_checkpointed_layer_that_is_used_twice_is_right_or_refused(use_reentrant):
    (got, mine), (want, theirs) = pair()
    for circuit in (got, want):
        inner = circuit.wrapped_model.twice

        def repeated(x, inner=inner):
            return torch.utils.checkpoint.checkpoint(inner.forward_once, x, use_reentrant=use_reentrant)

        inner.forward_once = inner.forward
        inner.forward = repeated
    if use_reentrant:
        with pytest.raises(RuntimeError, match=r"checkpoint layers that are used twice with use_reentrant=False"):
            train(got, mine, 1)
        return
    assert_same_training(got, want, train(got, mine, 10), train(want, theirs, 10))


@pytest.mark.dropin
def test_a_compiled_circuit_trains_alike():
    torch.compiler.reset()
    (got, mine), (want, theirs) = pair()
    compiled = torch.compile(got, backend="aot_eager")
    losses, expected = [], []
    for circuit, call, optimizer, into in ((got, compiled, mine, losses), (want, want, theirs, expected)):
        for step in range(6):
            circuit.temperature = 20 ** (step / 5)
            optimizer.zero_grad()
            ((x, y),) = batches(step, 1)
            loss = call(x, y)["loss"]
            loss.backward()
            into.append(float(loss.detach()))
            optimizer.step()
    assert_same_training(got, want, losses, expected)


# l0's gradient


@pytest.mark.parametrize("how", ["in the loss", "before forward, by itself", "by itself, first"])
def test_l0_has_its_part_in_the_step(how):
    got, want = small(), small("reference")
    mine, theirs = MaskSGD(got.mask_parameters(), lr=0.1, lean=True), torch.optim.SGD(want.mask_parameters(), lr=0.1)
    for circuit, optimizer in ((got, mine), (want, theirs)):
        for _ in range(3):
            if how == "in the loss":
                loss_of(circuit).backward()
            elif how == "before forward, by itself":
                (0.1 * circuit.l0()).backward()
                circuit(X).square().sum().backward()
            else:
                loss, l0 = circuit(X).square().sum(), circuit.l0()
                (0.1 * l0).backward()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_close(got.mask_parameters(), want.mask_parameters())


def test_l0_alone_is_a_gradient_and_steps_when_step_is_called():
    got, want = small(), small("reference")
    mine, theirs = lean(got.mask_parameters()), torchs(want.mask_parameters())
    before = [p.detach().clone() for p in got.mask_parameters()]
    for circuit in (got, want):
        (0.1 * circuit.l0()).backward()
    assert all(torch.equal(p, b) for p, b in zip(got.mask_parameters(), before, strict=True))
    mine.step()
    theirs.step()
    assert_close(got.mask_parameters(), want.mask_parameters())
    assert not torch.equal(got.mask_parameters()[0], before[0])


@pytest.mark.parametrize("when", ["before forward", "a backward later"])
def test_a_gradient_of_l0_that_comes_too_late_is_refused(when):
    circuit = small()
    optimizer = lean(circuit.mask_parameters())
    with pytest.raises(RuntimeError, match=r"take circuit.l0\(\) after the forward whose loss it is added to"):
        if when == "before forward":
            l0 = circuit.l0()
            (circuit(X).square().sum() + 0.1 * l0).backward()
        else:
            loss, l0 = circuit(X).square().sum(), circuit.l0()
            loss.backward()
            l0.backward()
    optimizer.step()
    loss_of(circuit).backward()
    optimizer.step()


# Guards


def unscale(optimizer):
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)


ACTS = {
    "accumulation": (lambda c, o: loss_of(c).backward(), r"second gradient.*lean=False keeps.*4 more bytes"),
    "without l0": (lambda c, o: loss_of(c, l0=False).backward(), r"a second gradient"),
    "l0 alone": (lambda c, o: c.l0().backward(), r"a second gradient"),
    "zero_grad": (lambda c, o: o.zero_grad(), r"used up inside backward.*optimizer.step\(\) ends the step"),
    "circuit.zero_grad": (lambda c, o: c.zero_grad(), r"used up inside backward"),
    "grad": (lambda c, o: c.mask_parameters()[0].grad, r"used up inside backward"),
    "grad = None": (lambda c, o: setattr(c.mask_parameters()[0], "grad", None), r"used up inside backward"),
    "clip_grad_norm_": (
        lambda c, o: nn.utils.clip_grad_norm_(c.mask_parameters(), 1.0), r"to clip give the optimizer max_grad_norm="),
    "GradScaler": (
        lambda c, o: unscale(o), r"use bf16 instead of a GradScaler"),
    "torch.optim": (
        lambda c, o: torch.optim.AdamW(c.mask_parameters()).step(),
        r"belong to another optimizer, MaskAdamW, whose lean mode.*set_execution\('auto'\)"),
}  # fmt: skip


@pytest.mark.parametrize(("act", "message"), ACTS.values(), ids=ACTS)
def test_what_would_need_gradients_after_backward_is_refused(act, message):
    circuit = small()
    optimizer = lean(circuit.mask_parameters())
    for _ in range(2):
        loss_of(circuit).backward()
        after = [p.detach().clone() for p in circuit.mask_parameters()]
        with pytest.raises(RuntimeError, match=message):
            act(circuit, optimizer)
        assert all(torch.equal(p, a) for p, a in zip(circuit.mask_parameters(), after, strict=True))
        optimizer.step()  # as it says: then all is well again
        assert all(p.grad is None for p in circuit.mask_parameters())
        optimizer.zero_grad()


@pytest.mark.parametrize("only_l0", [False, True])
def test_with_a_norm_to_clip_to_others_find_no_gradients(only_l0):
    """As transformers' Trainer looks for a norm to log, whatever its settings."""
    (got, _), (want, theirs) = pair(add_l0=False)
    mine = lean(got.mask_parameters(), max_grad_norm=float("inf"))
    for circuit, optimizer in ((got, mine), (want, theirs)):
        for step in range(3):
            ((x, y),) = batches(step, 1)
            loss = circuit.l0() if only_l0 else circuit(x, y)["loss"]
            loss.backward()
            if circuit is got:
                assert float(nn.utils.clip_grad_norm_(got.mask_parameters(), 1e-3)) == 0.0
            optimizer.step()
            circuit.zero_grad()
    for a, b in zip(got.mask_parameters(), want.mask_parameters(), strict=True):
        torch.testing.assert_close(a, b)
    loss_of_first = got(*next(batches(3, 1)))["loss"]
    loss_of_first.backward()
    with pytest.raises(RuntimeError, match="used up inside backward"):
        mine.zero_grad()


@pytest.mark.parametrize("max_grad_norm", [None, 1.0, float("inf")])
@pytest.mark.parametrize("unscaled", [False, True], ids=["", "unscale_ first"])
def test_a_grad_scaler_is_refused(max_grad_norm, unscaled):
    circuit = small()
    optimizer = lean(circuit.mask_parameters(), max_grad_norm=max_grad_norm)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(circuit)).backward()
    if unscaled and max_grad_norm is not None:
        scaler.unscale_(optimizer)
    after = [p.detach().clone() for p in circuit.mask_parameters()]
    with pytest.raises(RuntimeError, match=r"GradScaler can neither unscale.*begin again with bf16.*lean=False"):
        scaler.step(optimizer)
    assert all(torch.equal(p, a) for p, a in zip(circuit.mask_parameters(), after, strict=True))


def test_a_grad_scaler_that_is_off_or_has_ordinary_gradients_works():
    for unit, enabled in (("weight", False), ("neuron", True)):
        got, want = circuit_of(mask_unit=unit), circuit_of("reference", mask_unit=unit)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled)
        mine, theirs = lean(got.mask_parameters()), torchs(want.mask_parameters())
        ((x, y),) = batches(0, 1)
        scaler.scale(got(x, y)["loss"]).backward()
        scaler.step(mine)
        scaler.update()
        want(x, y)["loss"].backward()
        theirs.step()
        for a, b in zip(got.mask_parameters(), want.mask_parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_second_backward_through_one_graph_is_refused():
    circuit = small()
    optimizer = lean(circuit.mask_parameters())
    loss = loss_of(circuit, l0=False)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second gradient came"):
        loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="has been replaced since"):
        loss.backward()


def test_forwards_before_one_backward_add_up():
    got, want = small(), small("reference")
    mine, theirs = lean(got.mask_parameters()), torchs(want.mask_parameters())
    for circuit, optimizer in ((got, mine), (want, theirs)):
        for _ in range(3):
            losses = [loss_of(circuit) for _ in range(2)]
            sum(losses).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses = [loss_of(circuit, l0=False) for _ in range(2)]
            for loss in losses:
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_close(got.mask_parameters(), want.mask_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_wait_in_memory_of_their_own_while_other_layers_have_their_turn(dtype):
    """Layers of one size, some used twice: of what they share, nothing of one is there when another is done."""
    torch.manual_seed(0)
    net, x = Row(3, 16, dtype), torch.randn(4, 16).to(dtype)
    found = []
    for execution in ("auto", "per_forward"):
        circuit = CircuitModel(CircuitConfig(target_layers="all", execution=execution), copy.deepcopy(net))
        randomize_logits(circuit)
        optimizer = (lean if execution == "auto" else torchs)(circuit.mask_parameters())
        first, second, third = circuit.masked_layers.values()
        for _ in range(3):
            first(second(first(third(second(x))))).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(circuit.mask_parameters())
    limit = 1e-5 if dtype == torch.float32 else 0.02
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() <= limit * want.norm()


def test_a_turn_that_is_interrupted_leaves_a_gradient_that_nobody_writes_to(monkeypatch):
    """The same steps as those of one who was not interrupted: what waited is stepped by the next ``step()``."""
    x, found = torch.randn(4, 16, generator=torch.Generator().manual_seed(1)), []
    for interrupt in (True, False):
        torch.manual_seed(0)
        circuit = CircuitModel(CircuitConfig(target_layers="all"), Row(2, 16, torch.float32))
        randomize_logits(circuit)
        optimizer = MaskSGD(circuit.mask_parameters(), lr=10.0, lean=True)
        first, second = circuit.masked_layers.values()
        if interrupt:
            with monkeypatch.context() as patch:
                patch.setattr(type(optimizer), "_mask_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
                with pytest.raises(KeyboardInterrupt):
                    first(x).square().mean().backward()
            assert first.leaf.has_gradient
        else:
            first(x).square().mean().backward()
        second(x).square().mean().backward()
        optimizer.step()
        found.append(circuit.mask_parameters())
    assert_close(*found)


@pytest.mark.skipif(_cpp.kernels is None, reason="plain torch has temporaries of its own")
def test_layers_of_several_parameter_groups_share_their_memory():
    size, count, x = 512, 6, torch.randn(2, 512)
    circuit = CircuitModel(CircuitConfig(target_layers="all"), Row(count, size, torch.float32))
    groups = [{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(circuit.mask_parameters())]
    optimizer = MaskSGD(groups, lr=0.01, lean=True)

    def backward():
        circuit(x.clone().requires_grad_())["loss"].backward()

    scratch = 2 * 4 * size * size
    usage = measure(torch.device("cpu"), backward)
    assert usage.peak == pytest.approx(scratch, abs=150_000)
    optimizer.step()
    usage = measure(torch.device("cpu"), lambda: (backward(), optimizer.step())[1])
    assert usage.resident <= 150_000


def test_the_memory_of_other_threads_is_freed_too():
    circuit = CircuitModel(CircuitConfig(target_layers="all"), Row(2, 16, torch.float32))
    optimizer = lean(circuit.mask_parameters())
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: circuit(torch.randn(2, 16))["loss"].backward()).result()
        assert optimizer.transients._memory
        optimizer.step()
        assert not optimizer.transients._memory


def test_a_weight_that_lies_in_another_tensor_trains():
    circuit = CircuitModel(CircuitConfig(target_layers="all"), nn.Sequential(nn.Linear(8, 6)))
    optimizer = lean(circuit.mask_parameters())
    layer = circuit.masked_layers["0"]
    layer.weight.data = torch.randn(6, 11)[:, :8]
    before = layer.mask_logits.detach().clone()
    circuit(torch.randn(3, 8)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer.mask_logits, before)


@pytest.mark.parametrize("keep", [True, False])
def test_a_forward_without_backward_changes_nothing(keep):
    """While its graph is alive the gradient waits for ``step``; after that its backward is refused."""
    got, want = small(), small("reference")
    mine, theirs = lean(got.mask_parameters()), torchs(want.mask_parameters())
    kept = []
    for circuit, optimizer in ((got, mine), (want, theirs)):
        for _ in range(3):
            out = loss_of(circuit, l0=False)
            kept += [out] if keep else []
            del out
            loss_of(circuit).backward()
            assert circuit is want or (leaf_of(got.mask_parameters()[0]).dmasked_weight is not None) is keep
            optimizer.step()
            optimizer.zero_grad()
        loss_of(circuit).backward()
        assert circuit is want or leaf_of(got.mask_parameters()[0]).dmasked_weight is None  # they are of other steps
        optimizer.step()
    assert_close(got.mask_parameters(), want.mask_parameters())
    if keep:
        with pytest.raises(RuntimeError, match="has been replaced since"):
            kept[0].backward()


def test_gradients_of_the_input_alone_step_nothing():
    circuit, want = small(), small("reference")
    optimizer = lean(circuit.mask_parameters())
    before = [p.detach().clone() for p in circuit.mask_parameters()]
    grads = []
    for c in (circuit, want):
        x = X.clone().requires_grad_()
        grads += torch.autograd.grad(c(x).square().sum(), x)
    assert_close(grads[:1], grads[1:])
    assert all(torch.equal(p, b) for p, b in zip(circuit.mask_parameters(), before, strict=True))
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(loss_of(circuit, l0=False), circuit.mask_parameters()[0])
    assert all(torch.equal(p, b) for p, b in zip(circuit.mask_parameters(), before, strict=True))
    loss_of(circuit).backward()
    optimizer.step()


def change_logits(circuit, optimizer):
    with torch.no_grad():
        for p in circuit.mask_parameters():
            p.mul_(-1)


def write_data(circuit, optimizer):
    for p in circuit.mask_parameters():
        p.data.mul_(-1)


def load_state(circuit, optimizer):
    circuit.load_state_dict(drop_base(small(seed=3).state_dict()))


CHANGES = [
    change_logits, write_data, load_state, lambda c, o: setattr(c, "temperature", 2.5), lambda c, o: c.double().float(),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_masks_that_change_between_forward_and_backward_are_refused(change):
    circuit = small()
    optimizer = lean(circuit.mask_parameters())
    loss = loss_of(circuit, l0=False)
    change(circuit, optimizer)
    before = [p.detach().clone() for p in circuit.mask_parameters()]
    with pytest.raises(RuntimeError, match="has been replaced since: run backward before"):
        loss.backward()
    assert all(torch.equal(p, b) for p, b in zip(circuit.mask_parameters(), before, strict=True))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("spent", [False, True])
def test_masks_that_change_before_forward_or_after_backward_are_used(change, spent):
    got, want = small(), small("reference")
    mine, theirs = lean(got.mask_parameters()), torchs(want.mask_parameters())
    for circuit, optimizer in ((got, mine), (want, theirs)):
        for _ in range(2):
            loss_of(circuit).backward()
            if spent and circuit is got:
                change(circuit, optimizer)
            optimizer.step()
            if not (spent and circuit is got):
                change(circuit, optimizer)
            optimizer.zero_grad()
    assert_close(got.mask_parameters(), want.mask_parameters())
    torch.testing.assert_close(got.l0(), want.l0())


def test_a_temperature_that_changes_takes_along_what_waits():
    got, want = small(), small("reference")
    mine, theirs = lean(got.mask_parameters()), torchs(want.mask_parameters())
    for circuit, optimizer in ((got, mine), (want, theirs)):
        circuit.l0().backward()
        circuit.temperature = 7.0
        optimizer.step()
    assert_close(got.mask_parameters(), want.mask_parameters())


def test_evaluation_ablation_and_other_executions_between_steps_change_nothing():
    (got, mine), (want, theirs) = pair()
    losses, expected = train(got, mine, 5), train(want, theirs, 5)
    ((x, y),) = batches(9, 1)
    outputs = []
    for circuit in (got, want):
        circuit.eval()
        for mode in ("none", "zero_ablate", "random_ablate"):
            circuit.set_ablate_mode(mode)
            outputs.append(circuit(x, y)["logits"])
        circuit.set_ablate_mode("none")
        circuit.train()
        with torch.no_grad():
            outputs.append(circuit(x, y)["logits"])
    for a, b in zip(outputs[:4], outputs[4:], strict=True):
        torch.testing.assert_close(a, b)
    for execution in ("per_step", "per_forward", "per_step", "in_kernel", "reference", "per_step"):
        got.set_execution(execution)
        losses += train(got, mine, 3)
        expected += train(want, theirs, 3)
    assert_same_training(got, want, losses, expected)
    assert all(layer.waits and isinstance(layer.leaf, LeanLeaf) for layer in got.masked_layers.values())


def test_an_execution_that_is_changed_after_backward_has_had_its_step():
    got, want = small(), small("reference")
    mine, theirs = lean(got.mask_parameters()), torchs(want.mask_parameters())
    for circuit, optimizer in ((got, mine), (want, theirs)):
        for execution in ("per_forward", "per_step"):
            loss_of(circuit).backward()
            if circuit is got:
                circuit.set_execution(execution)
            optimizer.step()
            optimizer.zero_grad()
    assert_close(got.mask_parameters(), want.mask_parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["copy", "pickle"])
def test_copies_are_circuits_of_their_own(copied):
    circuit = circuit_of()
    optimizer = lean(circuit.mask_parameters())
    train(circuit, optimizer, 2)
    circuit(*next(batches(0, 1)))["loss"].backward()
    other = copied(circuit)
    assert all(type(p) is nn.Parameter and leaf_of(p) is None for p in other.mask_parameters())
    want = circuit_of("reference")
    want.load_state_dict(circuit.state_dict())
    mine, theirs = lean(other.mask_parameters()), torchs(want.mask_parameters())
    assert_same_training(other, want, train(other, mine, 3), train(want, theirs, 3))
    _, both = copy.deepcopy((circuit, optimizer))
    assert both.lean


def test_states_load_and_go_on(tmp_path):
    whole, first = circuit_of(), circuit_of()
    a, b = lean(whole.mask_parameters()), lean(first.mask_parameters())
    expected, losses = train(whole, a, 10), train(first, b, 10)
    torch.save({"circuit": first.state_dict(), "optimizer": b.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second = circuit_of()
    randomize_logits(second)
    c = lean(second.mask_parameters())
    second.load_state_dict(saved["circuit"])
    c.load_state_dict(saved["optimizer"])
    assert losses + train(second, c, 10) == expected + train(whole, a, 10)


@pytest.mark.parametrize("first_is_lean", [True, False])
def test_the_newest_of_two_optimizers_takes_over(first_is_lean):
    got, want = small(), small("reference")
    old = MaskSGD(got.mask_parameters(), lr=0.1, lean=first_is_lean)
    loss_of(got).backward()
    old.step()
    new = MaskSGD(got.mask_parameters(), lr=0.1, lean=not first_is_lean)
    with pytest.raises(RuntimeError, match="another optimizer has taken over"):
        old.step()
    loss_of(got).backward()
    new.step()
    theirs = torch.optim.SGD(want.mask_parameters(), lr=0.1)
    for _ in range(2):
        theirs.zero_grad()
        loss_of(want).backward()
        theirs.step()
    assert_close(got.mask_parameters(), want.mask_parameters())


def test_without_its_optimizer_a_layer_trains_like_any_other():
    circuit, want = small(), small("reference")
    optimizer = lean(circuit.mask_parameters())
    loss = loss_of(circuit, l0=False)
    del optimizer
    gc.collect()
    loss.backward()
    loss_of(want, l0=False).backward()
    assert_close(test_optim.gradients(circuit), test_optim.gradients(want))


def test_hooks_on_logits_see_their_gradient():
    (got, mine), (want, theirs) = pair()
    calls = []
    for circuit in (got, want):
        first, second, *_ = circuit.mask_parameters()
        first.register_hook(lambda g: torch.zeros_like(g))
        second.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.norm()))
    assert_same_training(got, want, train(got, mine, 3), train(want, theirs, 3))
    assert len(calls) == 6


def test_a_gradient_by_another_way_than_the_masked_weight_is_stepped_along_or_refused():
    got, want = small(), small("reference")
    mine, theirs = lean(got.mask_parameters()), torchs(want.mask_parameters())
    for circuit, optimizer in ((got, mine), (want, theirs)):
        sum(p.square().sum() for p in circuit.mask_parameters()).backward()
        loss_of(circuit).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_close(got.mask_parameters(), want.mask_parameters())
    loss_of(got).backward()
    got.mask_parameters()[0].sum().backward()
    with pytest.raises(RuntimeError, match="a second gradient came"):
        mine.step()


PENALTIES = {
    "a square": lambda p: p.square().sum(),  # its backward needs the logits as they were
    "a sum": lambda p: p.sum(),
    "the mask's entropy": lambda p: torch.special.entr(torch.sigmoid(p)).sum(),
}


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
@pytest.mark.parametrize("when", ["before forward", "after forward", "of one layer"])
def test_a_penalty_on_the_logits_in_the_same_backward_has_its_part(penalty, when):
    got, want = small(), small("reference")
    optimizers = lean(got.mask_parameters(), max_grad_norm=float("inf")), torchs(want.mask_parameters())
    for circuit, optimizer in zip((got, want), optimizers, strict=True):
        for _ in range(4):
            params = circuit.mask_parameters()[: 1 if when == "of one layer" else None]
            loss = loss_of(circuit) if when == "after forward" else 0.0
            loss = 0.5 * sum(penalty(p) for p in params) + loss
            if when != "after forward":
                loss = loss + loss_of(circuit)
            loss.backward()
            if when == "of one layer" and circuit is got:  # the other is as lean as ever
                assert [layer.leaf.spent for layer in got.masked_layers.values()] == [False, True]
            optimizer.step()
            optimizer.zero_grad()
    assert_close(got.mask_parameters(), want.mask_parameters())


def test_telemetry_is_that_of_the_masks_as_they_are():
    circuit = small()
    optimizer = lean(circuit.mask_parameters())
    for temperature in (1.0, 3.0):
        circuit.temperature = temperature
        loss_of(circuit).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer._groups[0].counts is not None  # without a pass of its own
        telemetry = optimizer.telemetry()
        logits = torch.cat([p.detach().flatten() for p in circuit.mask_parameters()])
        wanted = torch.sigmoid(temperature * logits.double()).sum().item()
        assert telemetry["l0"] == pytest.approx(wanted, rel=1e-6)
        assert telemetry["kept_fraction"] == pytest.approx(circuit.density())
        assert telemetry["undecided_fraction"] == pytest.approx(circuit.undecided_fraction())
        assert float(circuit.l0().detach()) == pytest.approx(telemetry["l0"], rel=1e-6)
    circuit.temperature = 50.0
    assert optimizer.telemetry()["undecided_fraction"] == pytest.approx(circuit.undecided_fraction())


def test_what_lean_cannot_be_is_refused_and_nothing_changes(monkeypatch):
    circuit = small()
    with pytest.raises(TypeError, match="lean must be True or False, got 1"):
        MaskAdamW(circuit.mask_parameters(), lean=1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match=r"gradients of several processes.*lean=False"):
        MaskSGD(circuit.mask_parameters(), lean=True)
    assert all(layer.leaf is None for layer in circuit.masked_layers.values())
    MaskSGD(circuit.mask_parameters())


# Memory


class Row(nn.Sequential):
    """Linear layers in a row, whose output holds a loss."""

    def __init__(self, count, size, dtype):
        super().__init__(*(nn.Linear(size, size, bias=False, dtype=dtype) for _ in range(count)))

    def forward(self, x):
        return {"loss": super().forward(x).float().square().mean()}


@pytest.mark.skipif(_cpp.kernels is None, reason="plain torch has temporaries of its own")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 8])
def test_what_is_in_memory_is_the_states_and_one_layers_scratch(dtype, count):
    """By counting allocations, beyond W and S: 8 bytes per weight stay, and one layer's Wm and dWm come and go."""
    size, x = 768, torch.randn(2, 768).to(dtype)
    circuit = CircuitModel(CircuitConfig(target_layers="all"), Row(count, size, dtype))
    optimizer = MaskAdamW(circuit.mask_parameters(), lean=True)

    def step():
        circuit(x.clone().requires_grad_())["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    layer, small_things = size * size, 150_000  # activations, numbers of layers, what a product works in
    usage = measure(torch.device("cpu"), step)
    assert usage.resident == pytest.approx(8 * layer * count, abs=small_things)
    scratch = 2 * dtype.itemsize * layer
    for _ in range(2):
        usage = measure(torch.device("cpu"), step)
        assert usage.resident <= small_things
        assert usage.peak == pytest.approx(scratch, abs=small_things)
