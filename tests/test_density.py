"""``l0_target``: the controller's arithmetic, what it counts, who drives it, and that the target is met."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from models import randomize_logits
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from csmask import CircuitConfig, CircuitModel, MaskAdamW, TemperatureSchedule
from csmask.density import DensityControl

CPU = torch.device("cpu")
EXECUTIONS = ("per_step", "lean", "per_forward", "in_kernel", "reference")


# The controller


def lambdas(target, start, looks):
    """The oracle: the docstring's formula in Python's floats."""
    goal, log_lambda, log_odds, progress, found = math.log(target / (1 - target)), math.log(start), None, 1.0, []
    for kept, undecided, p in looks:
        x = min(math.log(max(kept, 1e-6) / (1 - min(kept, 1 - 1e-6))), max(math.log(9.0), goal))
        begins = p <= progress
        before = 0.0 if begins else progress
        change = 0.0 if begins else x - log_odds
        change = 20 * (change + 4 * (x - goal) * (p - before) / max(0.4, min(1 - before, undecided)))
        log_lambda += min(max(change, -60 * (p - before)), 60 * (p - before))
        log_lambda = min(max(log_lambda, math.log(start / 1e6)), math.log(start * 1e6))
        log_odds, progress = x, p
        found.append(math.exp(log_lambda))
    return found


FALLING = [(0.75 * 0.93**i, 1.0, (i + 1) / 60) for i in range(60)]
LOOKS = {
    "falling": FALLING,
    "more and more decided": [(kept, 0.9**i, p) for i, (kept, _, p) in enumerate(FALLING)],
    "above the highest that is seen": [(1, 1, 0.01), (0.98, 1, 0.02), (0.95, 1, 0.03), (0.88, 1, 0.04), (0.5, 1, 0.05)],
    "all gone": [(0.2, 1, 0.1), (1e-4, 1, 0.2), (0.0, 0.5, 0.3), (0.0, 0.1, 0.6), (0.1, 0.1, 1.0)],
    "not faster than that": [(0.6, 1, 0.01), (0.5, 1, 0.02), (0.001, 1, 0.03), (0.2, 1, 0.04), (0.03, 1, 0.3)],
    "at both bounds": [(0.9, 1, 0.3), (0.9, 1, 0.9), (0.9, 1, 0.95), (1e-3, 1, 0.05), (1e-3, 1, 0.5), (0.5, 0, 1.0)],
    "a second annealing": [*FALLING[:50], *[(0.3 * 0.98**i, 0.7, (i + 1) / 40) for i in range(40)]],
}


@pytest.mark.parametrize("looks", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize(("target", "start"), [(0.05, 1.0), (0.5, 1 / 5_308_416), (0.97, 3.0)])
def test_the_arithmetic_is_the_documented_one(target, start, looks):
    control = DensityControl(target, start, CPU)
    memory = control.l0_lambda
    assert float(memory) == pytest.approx(start)
    found = []
    for *fractions, progress in looks:
        control.update(torch.tensor(fractions), progress)
        found.append(float(control.l0_lambda))
    assert found == pytest.approx(lambdas(target, start, looks), rel=1e-3)  # fp32, times exp(10 x)
    assert control.l0_lambda is memory
    assert all((b.dim(), b.dtype) == (0, torch.float32) for b in control.buffers())


def test_on_its_course_lambda_stays():
    """The course of the docstring is one on which nothing is to be done."""
    control, goal, first = DensityControl(0.02, 1.0, CPU), math.log(0.02 / 0.98), 1.1
    seen = []
    for i in range(1, 600):
        kept = 1 / (1 + math.exp(-goal - (first - goal) * (1 - i / 1000) ** 4))
        control.update(torch.tensor([kept, 1.0]), i / 1000)
        seen.append(math.log(control.l0_lambda))
    # The log odds alone move it by 100, and so does the pull.
    assert max(seen[1:]) - min(seen[1:]) < 0.5


def test_an_update_reads_nothing_from_the_device():
    with FakeTensorMode() as mode:
        control = DensityControl(0.05, 1.0, CPU)
        fractions = torch.empty(2)
        control.update(fractions, 0.1)
        with pytest.raises(DataDependentOutputException):  # the control: a read is seen
            float(fractions[0])
    assert mode is not None


# A circuit


class Net(nn.Module):
    """Learns which of two inputs is larger, with a loss as transformers' models return it."""

    def __init__(self, width=32):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, width), nn.Linear(width, 2)

    def forward(self, x, labels=None):
        logits = self.second(torch.relu(self.first(x)))
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


@functools.cache
def trained(width):
    """A network that knows the task: the masks have something to find."""
    net = Net(width)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for seed in range(1000, 1100):
        net(**batch(seed=seed))["loss"].backward()
        optimizer.step(), optimizer.zero_grad()
    return net


def batch(size=64, seed=1):
    x = torch.randn(size, 16, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "labels": (x[:, 0] > x[:, 1]).long()}


def build(target=0.1, execution="auto", total=120, *, width=32, lr=0.02, **settings):
    """A circuit, its optimizer, and the schedule that drives it."""
    hparams = {"mask_init_value": 0.05, **settings.pop("mask_hparams", {})}
    how = "auto" if execution == "lean" else execution
    config = CircuitConfig(target_layers="all", l0_target=target, execution=how, mask_hparams=hparams, **settings)
    circuit = CircuitModel(config, copy.deepcopy(trained(width)))
    if execution == "lean":
        optimizer = MaskAdamW(circuit.mask_parameters(), lr=lr, lean=True)
    else:
        kind = MaskAdamW if execution in ("auto", "per_step") else torch.optim.AdamW
        optimizer = kind(circuit.mask_parameters(), lr=lr, weight_decay=0.0)
    return circuit, optimizer, TemperatureSchedule(circuit, total)


def train(circuit, optimizer, schedule, steps=None, parts=1):
    """Steps until the schedule ends, or some; returns lambda after each."""
    seen = []
    while not schedule.finished() and (steps is None or len(seen) < steps):
        whole = batch(seed=schedule.t)
        for x, labels in zip(whole["x"].chunk(parts), whole["labels"].chunk(parts), strict=True):
            before = float(circuit.l0_lambda)
            (circuit(x=x, labels=labels)["loss"] / parts).backward()
            assert float(circuit.l0_lambda) == before
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seen.append(float(circuit.l0_lambda))
    return seen


def step(circuit, optimizer):
    """One of the optimizer, and none of the schedule."""
    circuit(**batch())["loss"].backward()
    optimizer.step()


@pytest.mark.parametrize("target", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_the_target_is_met_within_a_tenth(execution, target):
    circuit, optimizer, schedule = build(target, execution, width=256)
    train(circuit, optimizer, schedule)
    assert circuit.temperature == 200.0
    kept = sum(int((p > 0).sum()) for p in circuit.mask_parameters()) / sum(
        p.numel() for p in circuit.mask_parameters()
    )
    assert abs(kept / target - 1) < 0.1


def test_executions_are_driven_alike():
    seen = {}
    for execution in EXECUTIONS:
        circuit, optimizer, schedule = build(0.1, execution, width=64)
        seen[execution] = train(circuit, optimizer, schedule, 40)
    for execution in EXECUTIONS[:-1]:
        assert seen[execution] == pytest.approx(seen["reference"], rel=1e-3), execution


def test_lambda_changes_once_for_all_micro_batches_of_a_step():
    whole, parts = build(), build()
    assert train(*parts, 30, parts=4) == pytest.approx(train(*whole, 30), rel=1e-3)


def test_a_mean_has_the_same_course():
    """Lambda is larger by the number of weights, and the training the same."""
    circuit, optimizer, schedule = build(0.1, "reference")
    total = train(circuit, optimizer, schedule, 40)
    count = circuit.compute_l0_statistics()["max_l0"]
    mean = train(*build(0.1, "reference", l0_reduction="mean"), 40)
    assert mean == pytest.approx([count * value for value in total], rel=1e-3)
    assert mean[0] / total[0] == pytest.approx(count, rel=1e-5)


def test_neurons_and_biases_count_as_in_density():
    """A neuron's logit counts its weights, and masked biases count: all are in the fraction."""
    torch.manual_seed(3)
    for hparams in ({"mask_unit": "neuron"}, {"mask_bias": True}):
        for execution in ("auto", "reference"):
            circuit, *_ = build(execution=execution, mask_hparams=hparams)
            randomize_logits(circuit)
            for p in circuit.mask_parameters():
                p.data[:2] = -1.0
            kept, undecided = circuit._count().tolist()
            assert kept == circuit.compute_l0_statistics()["total_l0"] > 0
            assert undecided == round(circuit.undecided_fraction() * circuit.compute_l0_statistics()["max_l0"]) > 0
    circuit, optimizer, schedule = build(0.3, mask_hparams={"mask_unit": "neuron"}, width=256)
    train(circuit, optimizer, schedule)
    assert circuit.density() == pytest.approx(0.3, rel=0.1)


def test_counts_of_a_step_and_of_biases_add_up():
    circuit, optimizer, _schedule = build(mask_hparams={"mask_bias": True})
    step(circuit, optimizer)
    kept, undecided = circuit._count().tolist()
    assert undecided == 16 * 32 + 32 + 32 * 2 + 2
    assert kept == sum(int((p > 0).sum()) for p in circuit.mask_parameters())


class Calls(TorchDispatchMode):
    """The operators that run in the block."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("execution", "passes"), [("per_step", 0), ("lean", 0), ("per_forward", 2), ("in_kernel", 2)])
def test_counting_costs_no_pass_after_a_step_of_per_step(execution, passes):
    circuit, optimizer, schedule = build(execution=execution)
    train(circuit, optimizer, schedule, 3)
    step(circuit, optimizer)
    with Calls() as calls:
        circuit.steer_l0(0.5)
    assert calls.names.count("csmask::mask_sums") == passes
    assert not {"aten::_local_scalar_dense", "aten::nonzero"} & set(calls.names) or passes
    assert "aten::exp" in calls.names  # the control: something was seen


def test_counts_of_a_step_are_not_used_after_a_change_by_hand():
    circuit, optimizer, _schedule = build()
    step(circuit, optimizer)
    with torch.no_grad():
        for p in circuit.mask_parameters():
            p.fill_(-1.0)
            p.view(-1)[:5] = 1.0
    assert circuit._count().tolist() == [10, 576]


def test_evaluation_knows_nothing_of_it():
    circuit, *_ = build(execution="reference")
    plain = CircuitModel(
        CircuitConfig(target_layers="all", mask_hparams={"mask_init_value": 0.05}), copy.deepcopy(trained(32))
    )
    for model in (circuit, plain):
        randomize_logits(model)
        model.eval()
    got, want = circuit(**batch()), plain(**batch())
    assert torch.equal(got["logits"], want["logits"])
    assert torch.equal(got["loss"], want["loss"])


def test_the_loss_has_lambda_times_l0():
    circuit, *_ = build(execution="reference")
    circuit.l0_control.l0_lambda.fill_(0.125)
    loss = circuit(**batch())["loss"]
    circuit.circuit_config.add_l0 = False
    assert loss.item() == pytest.approx(circuit(**batch())["loss"].item() + 0.125 * circuit.l0().item(), rel=1e-5)
    assert circuit.l0_lambda is circuit.l0_control.l0_lambda


# Saving and going on


def copied(value):
    return copy.deepcopy(value)


@pytest.mark.parametrize("execution", ["per_step", "per_forward"])
@pytest.mark.parametrize("stop", [1, 17, 31])
def test_an_interrupted_training_equals_an_uninterrupted_one(execution, stop):
    whole = build(total=40, execution=execution)
    seen = train(*whole)
    first = build(total=40, execution=execution)
    begun = train(*first, stop)
    states = [copied(part.state_dict()) for part in first]
    assert {name for name in states[0] if name.startswith("l0_control.")} == {
        "l0_control.l0_lambda", "l0_control.log_odds", "l0_control.progress",
    }  # fmt: skip
    second = build(total=40, execution=execution)
    for part, state in zip(second, states, strict=True):
        part.load_state_dict(state)
    assert begun + train(*second) == seen
    for a, b in zip(whole[0].mask_parameters(), second[0].mask_parameters(), strict=True):
        assert torch.equal(a, b)


def test_saved_masks_bring_lambda_along(tmp_path):
    circuit, optimizer, schedule = build(total=40)
    train(circuit, optimizer, schedule, 25)
    circuit.save_pretrained(tmp_path)
    again = CircuitModel.from_pretrained(copy.deepcopy(trained(32)), tmp_path).train()
    for name, buffer in circuit.l0_control.named_buffers():
        assert torch.equal(buffer, again.l0_control.get_buffer(name)), name
    assert float(again.l0_control.l0_lambda) != pytest.approx(again.l0_control.start)
    other = MaskAdamW(again.mask_parameters(), lr=0.02)
    other.load_state_dict(copied(optimizer.state_dict()))
    going_on = TemperatureSchedule(again, 40)
    going_on.load_state_dict(schedule.state_dict())
    assert train(again, other, going_on) == train(circuit, optimizer, schedule)


def test_a_circuit_without_a_target_has_nothing_of_it():
    circuit = CircuitModel(CircuitConfig(target_layers="all", l0_lambda=0.5), Net())
    assert not [name for name in circuit.state_dict() if "l0" in name]
    assert circuit.l0_control is None
    assert circuit.l0_lambda == 0.5
    circuit.steer_l0(0.5)
    assert circuit.l0_lambda == 0.5


@pytest.mark.parametrize("move", [lambda c: c.to(torch.bfloat16), lambda c: c.double()], ids=["bfloat16", "double"])
def test_lambda_stays_in_fp32(move):
    circuit, *_ = build()
    circuit.l0_control.l0_lambda.fill_(1.2345678)
    move(circuit)
    assert circuit.l0_control.l0_lambda.dtype == torch.float32
    assert float(circuit.l0_control.l0_lambda) == pytest.approx(1.2345678, rel=1e-7)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["copy", "pickle"])
def test_copies_have_a_lambda_of_their_own(duplicate):
    circuit, *_ = build(execution="reference")
    other = duplicate(circuit)
    other.l0_control.l0_lambda.fill_(7.0)
    assert float(circuit.l0_lambda) != 7.0
    assert float(other.l0_lambda) == 7.0


@pytest.mark.dropin
@pytest.mark.parametrize("execution", ["per_step", "reference"])
def test_a_compiled_circuit_sees_lambda_change_and_compiles_once(execution):
    torch._dynamo.reset()
    circuit, optimizer, schedule = build(total=40, execution=execution)
    counter = CompileCounter()
    compiled = torch.compile(circuit, backend=counter)
    seen = []
    for _ in range(6):
        loss = compiled(**batch())["loss"]
        assert loss.item() == pytest.approx(circuit(**batch())["loss"].item(), rel=1e-5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seen.append(float(circuit.l0_lambda))
    assert len(set(seen)) > 2
    frames = counter.frame_count
    compiled(**batch())
    assert counter.frame_count == frames <= 2


# Who drives it


def test_without_a_schedule_the_loss_is_an_error():
    circuit = CircuitModel(CircuitConfig(target_layers="all", l0_target=0.1), Net())
    with pytest.raises(RuntimeError, match=r"l0_target is 0.1, but nothing drives lambda.*make a TemperatureSchedule"):
        circuit(**batch())
    assert circuit.eval()(**batch())["loss"].isfinite()
    TemperatureSchedule(circuit.train(), 40)
    assert circuit(**batch())["loss"].isfinite()


def test_a_loop_may_drive_it_itself():
    circuit = CircuitModel(CircuitConfig(target_layers="all", l0_target=0.1), Net())
    for progress in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"progress must be in \[0, 1\], got"):
            circuit.steer_l0(progress)
    with pytest.raises(RuntimeError, match="nothing drives lambda"):
        _ = circuit.l0_lambda
    circuit.steer_l0(0.0)
    start = float(circuit.l0_lambda)
    assert start == pytest.approx(0.01 / circuit.compute_l0_statistics()["max_l0"])
    circuit.steer_l0(0.1)
    assert float(circuit.l0_lambda) == pytest.approx(lambdas(0.1, start, [(circuit.density(), 1, 0.1)])[0], rel=1e-3)


class Recorder:
    """In a circuit's place: what a schedule does to it, in order."""

    def __init__(self, target):
        self.__dict__["circuit_config"] = SimpleNamespace(l0_target=target)
        self.__dict__["done"] = []

    def __setattr__(self, name, value):
        assert name == "temperature"
        self.done.append(("temperature", value))

    def steer_l0(self, progress):
        self.done.append(("steer", progress))


@pytest.mark.parametrize(("total", "every"), [(20, 1), (99, 1), (100, 2), (150, 3), (1000, 20)])
def test_a_schedule_steers_before_it_heats(total, every):
    circuit = Recorder(0.05)
    schedule = TemperatureSchedule(circuit, total)
    assert circuit.done == [("temperature", 1.0), ("steer", 0.0)]
    for t in range(1, total + 3):
        circuit.done.clear()
        schedule.step()
        steers = [("steer", t / (total - 1))] if t % every == 0 and t < total else []
        assert circuit.done == [*steers, ("temperature", schedule.temperature)]


def test_a_schedule_of_epochs_is_refused():
    with pytest.raises(ValueError, match=r"at least 20 optimizer steps.*got total 19; count steps and not epochs"):
        TemperatureSchedule(Recorder(0.05), 19)
    TemperatureSchedule(Recorder(None), 19)
    schedule = TemperatureSchedule(Recorder(0.05), 50)
    before = schedule.state_dict()
    with pytest.raises(ValueError, match="at least 20 optimizer steps"):
        schedule.load_state_dict({**before, "total": 5})
    assert schedule.state_dict() == before


# When to stop


class Undecided:
    """In a circuit's place: its undecided fraction by step."""

    temperature = 1.0

    def __init__(self, fractions):
        self.fractions, self.looks = fractions, []

    def check_logits(self):
        pass

    def undecided_fraction(self):
        self.looks.append(self.schedule.t)
        return self.fractions(self.schedule.t)


@pytest.mark.parametrize(
    ("every", "stops", "looks"), [(10, 80, list(range(10, 90, 10))), (7, 77, list(range(7, 78, 7)))]
)
def test_training_stops_when_hardly_a_weight_is_undecided(every, stops, looks):
    circuit = Undecided(lambda t: 0.001 if t <= 75 else 0.0009)
    schedule = circuit.schedule = TemperatureSchedule(circuit, 100)
    while not schedule.finished(max_undecided=0.001, every=every):
        schedule.step()
    assert schedule.t == stops
    assert circuit.looks == list(range(every, stops + 1, every))  # and at no other step


def test_without_a_bound_it_takes_all_steps_and_looks_at_nothing():
    circuit = Undecided(lambda t: 0.0)
    schedule = circuit.schedule = TemperatureSchedule(circuit, 30)
    while not schedule.finished():
        schedule.step()
    assert (schedule.t, circuit.looks) == (30, [])


def test_a_trained_circuit_stops_early_with_the_target_met():
    circuit, optimizer, schedule = build(0.1, total=200, width=256)
    while not schedule.finished(max_undecided=0.005):
        train(circuit, optimizer, schedule, 1)
    assert 100 < schedule.t < 200
    logits = torch.cat([p.detach().flatten() for p in circuit.mask_parameters()])
    assert ((circuit.temperature * logits).abs() < 4).float().mean() < 0.005
    assert circuit.density() == pytest.approx(0.1, rel=0.1)


def test_a_diverged_training_does_not_look_finished():
    circuit, _optimizer, schedule = build()
    schedule.t = 10
    circuit.mask_parameters()[0].data[0, 0] = math.nan
    with pytest.raises(ValueError, match="holds NaN: the training diverged"):
        schedule.finished(max_undecided=0.001)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_undecided": 0.0}, r"max_undecided must be in \(0, 1\].*got 0.0"),
        ({"max_undecided": 1.5}, r"max_undecided must be in \(0, 1\].*got 1.5"),
        ({"max_undecided": math.nan}, r"max_undecided must be in \(0, 1\].*got nan"),
        ({"max_undecided": 0.1, "every": 0}, "every must be at least 1, got 0"),
    ],
)
def test_bad_bounds(arguments, message):
    schedule = TemperatureSchedule(Undecided(lambda t: 1.0), 30)
    with pytest.raises(ValueError, match=message):
        schedule.finished(**arguments)


@pytest.mark.parametrize("change", ["missing", "renamed", "text", "NaN"])
def test_a_saved_controller_that_is_none_is_refused(change, tmp_path):
    """Even where the file's digest is right; the base is as it was."""
    circuit, *_ = build()
    circuit.save_pretrained(tmp_path)
    file = tmp_path / "circuit.json"
    content = json.loads(file.read_text())
    del content["sha256"]
    control = content["l0_control"]
    if change == "missing":
        del content["l0_control"]
    elif change == "renamed":
        control["lambda"] = control.pop("l0_lambda")
    else:
        control["progress"] = "1.0" if change == "text" else 1e999
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps({**content, "sha256": digest}))
    base = copy.deepcopy(trained(32))
    with pytest.raises(ValueError, match=r"l0_control must hold finite numbers|not a JSON number"):
        CircuitModel.from_pretrained(base, tmp_path)
    assert type(base.first) is nn.Linear
