"""The l0 of masks that a forward has just used: its gradient comes once, whatever order things are done in."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.compiled_autograd
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from csmask import CircuitConfig, CircuitModel, mask_sum, testing

EXECUTIONS = ["per_forward", "in_kernel"]
LAMBDA = 0.03


class Tower(nn.Module):
    """Two layers; runs them under a checkpoint where ``reentrant`` is not None."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)
        self.reentrant = None

    def forward(self, x):
        if self.reentrant is None:
            return self.second(torch.tanh(self.first(x)))
        return checkpoint(lambda y: self.second(torch.tanh(self.first(y))), x, use_reentrant=self.reentrant)


def build(execution, unit="weight", bias=False):
    torch.manual_seed(3)
    hparams = {"mask_unit": unit, "mask_bias": bias}
    config = CircuitConfig(target_layers="all", mask_hparams=hparams, execution=execution, add_l0=False)
    circuit = CircuitModel(config, Tower())
    with torch.no_grad():
        for index, p in enumerate(circuit.mask_parameters()):
            p.copy_(testing.seeded_logits(tuple(p.shape), index))
    circuit.temperature = 1.5
    return circuit, testing.seeded_normal((4, 6), 9)


def gradients(circuit):
    return {name: None if p.grad is None else p.grad.clone() for name, p in circuit.named_mask_parameters()}


def check(use, execution, **options):
    """``use(circuit, x)`` leaves the gradients that it leaves on the reference, whose l0 is plain torch."""
    circuit, x = build(execution, **options)
    other, _ = build("reference", **options)
    found, expected = use(circuit, x), use(other, x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(circuit), gradients(other), rtol=1e-5, atol=1e-6)
    return circuit


class Passes(TorchDispatchMode):
    """Counts the passes over logits that only the l0 has."""

    def __init__(self):
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == "csmask::mask_sums":
            self.forward += 1
        if func.name() == "csmask::logits_grad" and 0 in args[0].stride():  # no gradient of the masked weight
            self.backward += 1
        return func(*args, **(kwargs or {}))


USES = []


def listed(use):
    USES.append(use)
    return use


@listed
def in_one(circuit, x):
    loss = circuit(x).square().sum() + LAMBDA * circuit.l0()
    loss.backward()
    return loss.detach()


@listed
def l0_before_the_loss(circuit, x):
    out = circuit(x)
    l0 = circuit.l0()
    (out.square().sum() + LAMBDA * l0).backward()


@listed
def twice_in_one_loss(circuit, x):
    out = circuit(x)
    (out.square().sum() + LAMBDA * circuit.l0() + 2 * LAMBDA * circuit.l0("mean") + circuit.l0() ** 2 / 500).backward()


@listed
def l0_by_itself_first(circuit, x):
    loss, l0 = circuit(x).square().sum(), circuit.l0()
    (LAMBDA * l0).backward()
    loss.backward()


@listed
def l0_by_itself_last(circuit, x):
    loss, l0 = circuit(x).square().sum(), circuit.l0()
    loss.backward()
    (LAMBDA * l0).backward()


@listed
def l0_taken_after_backward(circuit, x):
    circuit(x).square().sum().backward()
    (LAMBDA * circuit.l0()).backward()


@listed
def l0_alone(circuit, x):
    out = circuit(x)
    (LAMBDA * circuit.l0()).backward()
    return out.detach()


@listed
def l0_of_a_dropped_forward(circuit, x):
    circuit(x)
    l0 = circuit.l0()
    gc.collect()
    l0.backward()


@listed
def backward_again_through_a_kept_graph(circuit, x):
    loss, l0 = circuit(x).square().sum(), circuit.l0()
    loss.backward(retain_graph=True)
    (loss + LAMBDA * l0).backward(retain_graph=True)
    (loss + LAMBDA * l0).backward()


@listed
def two_forwards_then_backward(circuit, x):
    first = circuit(x).square().sum()
    second = circuit(2 * x).square().sum()
    (first + second + LAMBDA * circuit.l0()).backward()


@listed
def l0_of_the_first_forward_after_the_second(circuit, x):
    first, l0 = circuit(x).square().sum(), circuit.l0()
    second = circuit(2 * x).square().sum()
    (second + LAMBDA * l0).backward()
    first.backward()


@listed
def part_of_the_graph(circuit, x):
    out = circuit(x)
    hidden = circuit.wrapped_model.first(x)
    (hidden.square().sum() + LAMBDA * circuit.l0()).backward()
    return out.detach()


@listed
def by_autograd_grad(circuit, x):
    out = circuit(x)
    loss = out.square().sum() + LAMBDA * circuit.l0()
    return torch.autograd.grad(loss, circuit.mask_parameters())


@listed
def by_autograd_grad_of_the_l0_alone(circuit, x):
    out = circuit(x)
    found = torch.autograd.grad(circuit.l0(), circuit.mask_parameters())
    return out.detach(), *found


@listed
def by_autograd_grad_of_some_inputs(circuit, x):
    x = x.clone().requires_grad_()
    loss = circuit(x).square().sum() + LAMBDA * circuit.l0()
    wanted = [x, circuit.mask_parameters()[0]]
    return torch.autograd.grad(loss, wanted)


@listed
def by_backward_to_some_inputs(circuit, x):
    loss = circuit(x).square().sum() + LAMBDA * circuit.l0()
    loss.backward(inputs=[circuit.mask_parameters()[0]])


@listed
def several_micro_batches(circuit, x):
    for scale in (1.0, 0.5, 2.0):
        ((circuit(scale * x).square().sum() + LAMBDA * circuit.l0()) / 3).backward()


@listed
def with_one_layer_frozen(circuit, x):
    circuit.mask_parameters()[0].requires_grad_(False)
    in_one(circuit, x)


@listed
def with_masks_of_one_layer_off(circuit, x):
    circuit.use_masks(False, names=["first"])
    return in_one(circuit, x)


@listed
def with_logits_written_before_l0(circuit, x):
    out = circuit(x)  # stays, and its graph with it
    with torch.no_grad():
        circuit.mask_parameters()[0].mul_(0.5)
    l0 = circuit.l0()
    l0.backward()
    return out.detach(), l0.detach()


@listed
def with_another_temperature_before_l0(circuit, x):
    out = circuit(x)
    circuit.temperature = 4.0
    l0 = circuit.l0()
    l0.backward()
    return out.detach(), l0.detach()


@listed
def with_logits_written_unseen_after_backward(circuit, x):
    loss = circuit(x).square().sum() + LAMBDA * circuit.l0()
    loss.backward()
    for p in circuit.mask_parameters():
        p.data -= 0.5 * p.grad
    return circuit.l0().detach()


@listed
def in_evaluation_after_training(circuit, x):
    loss = circuit(x).square().sum()
    hard = circuit.eval().l0()
    assert not hard.requires_grad
    circuit.train()
    (loss + LAMBDA * circuit.l0()).backward()
    return hard


@listed
def under_a_checkpoint(circuit, x):
    circuit.wrapped_model.reentrant = False
    in_one(circuit, x)


@listed
def under_a_reentrant_checkpoint(circuit, x):
    circuit.wrapped_model.reentrant = True
    in_one(circuit, x.clone().requires_grad_())


@listed
def added_in_the_kernel(circuit, x):
    circuit.accumulate_in_kernel = True
    several_micro_batches(circuit, x)


@listed
def without_gradients(circuit, x):
    with torch.no_grad():
        circuit(x)
    (LAMBDA * circuit.l0()).backward()


@listed
def with_other_parameters_for_the_forward(circuit, x):
    others = {name: p.detach().clone().requires_grad_() for name, p in circuit.named_parameters()}
    out = torch.func.functional_call(circuit, others, (x,))
    (out.square().sum() + LAMBDA * circuit.l0()).backward()
    return [p.grad for name, p in others.items() if name.endswith("mask_logits")]


@listed
def with_aliases_for_the_forward(circuit, x):
    others = {name: p.detach().requires_grad_() for name, p in circuit.named_parameters()}
    out = torch.func.functional_call(circuit, others, (x,))
    (out.square().sum() + LAMBDA * circuit.l0()).backward()
    return [p.grad for name, p in others.items() if name.endswith("mask_logits")]


@listed
def with_another_parameter_of_the_same_memory(circuit, x):
    out = circuit(x)
    layer = circuit.get_submodule("first")
    layer.mask_logits = nn.Parameter(layer.mask_logits.detach())
    (out.square().sum() + LAMBDA * circuit.l0()).backward()


@listed
def with_a_loss_of_another_thread(circuit, x):
    """Nodes of a new thread are numbered from 0: the l0's runs after those of the layers, which run first by number."""
    y = torch.ones(1, requires_grad=True)
    for _ in range(50):
        y = y * 1
    out = circuit(x)

    def backward():
        l0 = LAMBDA * circuit.l0()
        (out.square().sum() + l0).backward()

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()


@listed
def with_a_backward_within_the_backward(circuit, x):
    """Through the same graph, after the l0's node has run and before the layers'."""
    out = circuit(x)
    loss = out.square().sum()
    leaf, inner, outer = circuit.mask_parameters()[0], [], [True]

    def backward_again(_):
        if outer:
            outer.clear()  # the inner one comes by here, too
            inner.extend(torch.autograd.grad(loss, leaf, retain_graph=True))

    out.register_hook(backward_again)
    (loss + LAMBDA * circuit.l0()).backward(retain_graph=True)
    return inner


@listed
def with_a_loss_of_a_part_and_a_step_by_hand(circuit, x):
    """The last layer's node never runs, and its logits are trained all the same."""
    hidden = []
    circuit.get_submodule("first").register_forward_hook(lambda _m, _x, out: hidden.append(out))
    found = []
    for _ in range(3):
        out = circuit(x)
        (hidden.pop().square().sum() + LAMBDA * circuit.l0()).backward()
        for p in circuit.mask_parameters():
            p.data -= 5 * p.grad
            p.grad = None
        found.append(circuit.l0().detach())
    return found, out.detach()


@listed
def with_an_optimizer_that_writes_unseen(circuit, x):
    class Unseen(torch.optim.SGD):
        def step(self, closure=None):
            for p in circuit.mask_parameters():
                p.data -= 0.3

    optimizer, loss = Unseen(circuit.mask_parameters(), lr=0.1), circuit(x).square().sum()
    optimizer.step()
    l0 = circuit.l0()
    l0.backward()
    return loss.detach(), l0.detach()


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_gradients_are_those_of_the_reference(use, execution):
    check(use, execution)


@pytest.mark.parametrize("options", [{"unit": "neuron"}, {"bias": True}], ids=str)
@pytest.mark.parametrize(
    "use", [in_one, l0_by_itself_last, l0_by_itself_first, backward_again_through_a_kept_graph, several_micro_batches]
)
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_neurons_and_biases(use, execution, options):
    check(use, execution, **options)


@pytest.mark.parametrize("options", [{}, {"unit": "neuron"}, {"bias": True}], ids=str)
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_loss_of_ones_own_costs_no_pass_over_the_logits(execution, options):
    circuit, x = build(execution, **options)
    for _ in range(2):
        with Passes() as passes:
            out = circuit(x)
        before = passes.forward
        with passes:
            (out.square().sum() + LAMBDA * circuit.l0()).backward()
        # Of biases, which are small, there is one; neuron masks make their sum in forward by one.
        biases = 2 if "bias" in options else 0
        assert passes.forward - before == biases
        assert passes.backward == biases
        circuit.zero_grad()


def test_passes_are_counted():
    """The count above can fail: l0 without a forward before it is a pass for each layer, forward and backward."""
    circuit, _ = build("per_forward")
    with Passes() as passes:
        circuit.l0().backward()
    assert (passes.forward, passes.backward) == (2, 2)


@pytest.mark.parametrize("keeps_l0", [False, True])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_no_graph_is_held(execution, keeps_l0):
    """Neither by the circuit nor by the l0: activations go when the loss goes."""
    circuit, x = build(execution)
    hidden = []
    circuit.get_submodule("first").register_forward_hook(lambda _m, _x, out: hidden.append(weakref.ref(out)))
    loss = circuit(x).square().sum()
    l0 = circuit.l0() if keeps_l0 else None
    node = weakref.ref(circuit.get_submodule("second").l0_record.late.node)
    assert node() is not None
    del loss
    assert node() is None
    assert hidden[0]() is None
    if keeps_l0:
        l0.backward()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["copy", "pickle"])
def test_a_circuit_is_copied_after_a_forward(duplicate):
    circuit, x = build("per_forward")
    loss = circuit(x).square().sum()
    other = duplicate(circuit)
    (other(x).square().sum() + LAMBDA * other.l0()).backward()
    (loss + LAMBDA * circuit.l0()).backward()
    torch.testing.assert_close(gradients(circuit), gradients(other))


def test_a_second_derivative_says_what_to_do():
    circuit, x = build("per_forward")
    loss = circuit(x).square().sum() + LAMBDA * circuit.l0()
    grads = torch.autograd.grad(loss, circuit.mask_parameters(), create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        sum(g.square().sum() for g in grads).backward()


def test_what_an_interrupted_backward_left_is_dropped():
    circuit, x = build("per_forward")
    interrupts = [True]

    def hook(*_):
        if interrupts:
            interrupts.clear()
            raise KeyboardInterrupt

    circuit.get_submodule("second").register_full_backward_hook(hook)
    loss, l0 = circuit(x).square().sum(), circuit.l0()
    with contextlib.suppress(KeyboardInterrupt):
        (loss + LAMBDA * l0).backward(retain_graph=True)
    assert not interrupts
    circuit.zero_grad()
    loss.backward()
    other, _ = build("reference")
    other(x).square().sum().backward()
    torch.testing.assert_close(gradients(circuit), gradients(other), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("names", [["first"], ["first", "second"]], ids=len)
def test_an_l0_may_be_written_to(names):
    circuit, x = build("per_forward")
    circuit.use_masks(False, names=[name for name in ("first", "second") if name not in names])
    out = circuit(x)
    with torch.no_grad():
        before = circuit.l0().clone()
        circuit.l0().zero_()
        assert circuit.l0() == before
    l0 = circuit.l0()
    l0 *= 0.5
    assert circuit.l0() == before
    (out.sum() + l0).backward()


def test_threads_run_through_one_graph():
    circuit, x = build("per_forward")
    loss = circuit(x).square().sum() + LAMBDA * circuit.l0()
    parameters = circuit.mask_parameters()
    expected = torch.autograd.grad(loss, parameters, retain_graph=True)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(torch.autograd.grad, loss, parameters, retain_graph=True) for _ in range(200)]
        for job in jobs:
            torch.testing.assert_close(job.result(), expected)


def test_threads_run_forward_on_one_circuit():
    circuit, x = build("per_forward")

    def work():
        for _ in range(60):
            (circuit(x).square().sum() + LAMBDA * circuit.l0()).backward()
        return True

    with ThreadPoolExecutor(3) as pool:
        assert all(job.result() for job in [pool.submit(work) for _ in range(3)])


@pytest.mark.parametrize("compiler", [lambda graph: graph, torch.compile(backend="eager")], ids=["traced", "dynamo"])
def test_a_backward_that_is_compiled(compiler):
    circuit, x = build("per_forward")
    loss = circuit(x).square().sum() + LAMBDA * circuit.l0()
    with torch._dynamo.compiled_autograd._enable(compiler):
        loss.backward()
    other, _ = build("reference")
    in_one(other, x)
    torch.testing.assert_close(gradients(circuit), gradients(other), rtol=1e-5, atol=1e-6)


def test_an_l0_that_is_compiled_by_itself():
    circuit, x = build("per_forward")
    out = circuit(x)
    l0 = torch.compile(lambda: circuit.l0(), backend="eager", fullgraph=True)()
    (out.square().sum() + LAMBDA * l0).backward()
    other, _ = build("reference")
    in_one(other, x)
    torch.testing.assert_close(gradients(circuit), gradients(other), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changed", ["stream", "capture"])
def test_a_sum_of_another_queue_of_the_gpu_is_not_taken(changed, monkeypatch):
    """Without a GPU: the masks say that they are on one."""
    state = {"stream": 1, "capture": False}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: state["stream"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capture"])
    mask = SimpleNamespace(is_cuda=True, device=0, data_ptr=lambda: 0, _version=0)
    before = mask_sum._seen(mask, mask)
    assert mask_sum._seen(mask, mask) == before
    state[changed] = 2
    assert mask_sum._seen(mask, mask) != before


def test_each_forward_has_its_own_sum():
    """Also in evaluation, which leaves none."""
    circuit, x = build("per_forward")
    record = circuit.get_submodule("first").l0_record
    kept = [circuit(x)]
    first = record.late
    assert first is not None
    kept.append(circuit(x))
    assert record.late is not first
    circuit.eval()(x)
    assert record.late is None
