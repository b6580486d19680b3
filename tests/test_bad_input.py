"""What is no good to train on, or no model to mask: an error that names it, or a behaviour that is written down."""

from __future__ import annotations

import copy
import math
import traceback
import warnings
from types import SimpleNamespace

import pytest
import torch
from models import MODELS, assert_same_snapshot, snapshot
from torch import nn
from transformers import TrainerControl

from csmask import (
    CircuitConfig,
    CircuitModel,
    MaskAdamW,
    MaskSGD,
    TemperatureCallback,
    TemperatureSchedule,
    evaluate_circuit,
)

EXECUTIONS = ("reference", "per_forward", "in_kernel", "per_step", "lean", "8 bits")
every_execution = pytest.mark.parametrize("execution", EXECUTIONS)
NAMES = ("conv", "hidden", "head")
SOME = slice(1, 2)  # rows of a batch


class Net(nn.Module):
    """A convolution and two linear layers; the loss is None without labels, as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.hidden = nn.Linear(30, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x, labels=None):
        out = self.head(torch.tanh(self.hidden(torch.relu(self.conv(x)).flatten(1))))
        return {"loss": None if labels is None else nn.functional.cross_entropy(out, labels), "logits": out}


def circuit_of(execution="auto", **config):
    torch.manual_seed(0)
    execution = "auto" if execution in ("per_step", "lean", "8 bits") else execution
    circuit = CircuitModel(CircuitConfig(target_layers="all", execution=execution, l0_lambda=1e-3, **config), Net())
    with torch.no_grad():
        for param in circuit.mask_parameters():
            param.normal_(mean=-0.4, std=0.5)
    return circuit


def optimizer_of(circuit, execution, lr=0.02):
    if execution in ("per_step", "lean", "8 bits"):
        bits = 8 if execution == "8 bits" else 32
        return MaskAdamW(circuit.mask_parameters(), lr=lr, lean=execution == "lean", state_bits=bits)
    return torch.optim.AdamW(circuit.mask_parameters(), lr=lr, weight_decay=0.0)


def batch_of(seed=0, rows=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, 5, generator=generator)
    return x, torch.randint(3, (rows,), generator=generator)


def step(circuit, optimizer, x, labels):
    loss = circuit(x, labels)["loss"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


# NaN and infinity


def reports(circuit, optimizer, folder):
    """All that says something of a circuit, or keeps it."""
    schedule = TemperatureSchedule(circuit, 20)

    def finished(t):
        schedule.t = t
        return schedule.finished(max_undecided=0.5)

    found = {
        "telemetry": circuit.telemetry,
        "statistics": circuit.compute_l0_statistics,
        "density": circuit.density,
        "undecided": circuit.undecided_fraction,
        "the schedule, on its way": lambda: finished(10),
        "the schedule, at its end": lambda: finished(20),
        "evaluate_circuit": lambda: evaluate_circuit(circuit, lambda c: c(batch_of()[0])["logits"].sum(), [0]),
        "save_pretrained": lambda: circuit.save_pretrained(folder / "saved"),
        "export": circuit.export,
    }
    return {**found, "optimizer": optimizer.telemetry} if hasattr(optimizer, "telemetry") else found


@every_execution
def test_a_nan_in_a_batch_is_reported_by_layer(execution, tmp_path):
    circuit = circuit_of(execution)
    optimizer = optimizer_of(circuit, execution)
    for t in range(3):
        step(circuit, optimizer, *batch_of(t))
    for report in reports(circuit, optimizer, tmp_path).values():
        report()
    before = copy.deepcopy(circuit.state_dict()), copy.deepcopy(optimizer.state_dict())
    x, labels = batch_of(3)
    x[SOME, 0, 0] = math.nan
    assert torch.isnan(step(circuit, optimizer, x, labels))
    assert all(torch.isnan(p).any() for p in circuit.mask_parameters())
    for report in reports(circuit, optimizer, tmp_path / "none").values():
        with pytest.raises(ValueError, match=r"^conv\.mask_logits holds NaN.*go back to a checkpoint"):
            report()
    assert not (tmp_path / "none").exists()

    # As it says: the checkpoint, and all is as if the batch had not been.
    circuit.load_state_dict(before[0])
    optimizer.load_state_dict(before[1])
    want = circuit_of(execution)
    other = optimizer_of(want, execution)
    for t in range(3):
        step(want, other, *batch_of(t))
    losses = [[float(step(c, o, *batch_of(9 + t))) for t in range(3)] for c, o in ((circuit, optimizer), (want, other))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for a, b in zip(circuit.mask_parameters(), want.mask_parameters(), strict=True):
        torch.testing.assert_close(a, b)
    circuit.telemetry()


@pytest.mark.usefixtures("triton_on_cpu")
@pytest.mark.parametrize("execution", ["per_step", "lean", "8 bits"])
def test_the_steps_sums_show_it_on_the_gpu_kernels_too(execution):
    circuit = circuit_of(execution)
    optimizer = optimizer_of(circuit, execution)
    x, labels = batch_of()
    x[SOME, 0, 0] = math.nan
    step(circuit, optimizer, x, labels)
    for report in (circuit.telemetry, optimizer.telemetry):
        with pytest.raises(ValueError, match=r"^conv\.mask_logits holds NaN"):
            report()


@pytest.mark.parametrize("name", NAMES)
@every_execution
def test_nan_logits_of_one_layer_are_named(name, execution, tmp_path):
    """Also after a step, whose sums the report reads; a masked bias by its own name."""
    circuit = circuit_of(execution)
    optimizer = optimizer_of(circuit, execution)
    with torch.no_grad():
        circuit.masked_layers[name].mask_logits.view(-1)[-1] = math.nan
    for report in reports(circuit, optimizer, tmp_path).values():
        with pytest.raises(ValueError, match=rf"^{name}\.mask_logits holds NaN"):
            report()


def test_a_masked_bias_is_named():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        circuit = circuit_of(mask_hparams={"mask_bias": True})
    with torch.no_grad():
        circuit.masked_layers["head"].bias_mask_logits[1] = math.nan
    for report in (circuit.telemetry, circuit.check_logits, circuit.undecided_fraction):
        with pytest.raises(ValueError, match=r"^head\.bias_mask_logits holds NaN"):
            report()


def test_no_step_reads_from_the_device(monkeypatch):
    """What a step on a GPU would wait for: the value of a tensor on the host."""
    circuit = circuit_of()
    optimizer = MaskAdamW(circuit.mask_parameters(), max_grad_norm=1.0)
    schedule = TemperatureSchedule(circuit, 20)
    step(circuit, optimizer, *batch_of())  # the first makes the states
    reads = []

    def noting(original):
        def read(tensor):
            frames = traceback.extract_stack()
            if not any("_cpp" in frame.filename for frame in frames):  # on a CPU, C++ takes scalars by value
                reads.append(frames[-2])
            return original(tensor)

        return read

    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, noting(getattr(torch.Tensor, name)))
    circuit(*batch_of(1))["loss"].backward()
    optimizer.step(), optimizer.zero_grad(), schedule.step()
    assert reads == []
    circuit.telemetry()
    assert reads != []


@pytest.mark.parametrize("when", ["should_log", "should_evaluate", "should_save", "should_training_stop"])
def test_the_callback_looks_before_anything_is_kept(when):
    circuit = circuit_of()
    callback = TemperatureCallback()
    state = SimpleNamespace(max_steps=5, global_step=0)
    callback.on_train_begin(None, state, None, model=circuit)
    with torch.no_grad():
        circuit.masked_layers["hidden"].mask_logits[0, 0] = math.nan
    callback.on_step_end(None, state, TrainerControl())  # the device is not waited for
    for event in (callback.on_step_end, callback.on_epoch_end):
        with pytest.raises(ValueError, match=r"hidden\.mask_logits holds NaN"):
            event(None, state, TrainerControl(**{when: True}))


@every_execution
def test_infinite_logits_are_masks_that_are_decided_for_good(execution, tmp_path):
    got, want = circuit_of(execution), circuit_of("reference")
    for circuit in (got, want):
        with torch.no_grad():
            for param in circuit.mask_parameters():
                param.view(-1)[0], param.view(-1)[1] = math.inf, -math.inf
    optimizers = optimizer_of(got, execution), optimizer_of(want, "reference")
    for circuit, optimizer in zip((got, want), optimizers, strict=True):
        for t in range(3):
            assert math.isfinite(step(circuit, optimizer, *batch_of(t)))
        for param in circuit.mask_parameters():
            assert param.detach().view(-1)[:2].tolist() == [math.inf, -math.inf]
            assert param.detach().view(-1)[2:].isfinite().all()
    tolerance = 1e-2 if execution == "8 bits" else 1e-5
    for a, b in zip(got.mask_parameters(), want.mask_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert got.telemetry()["l0"] == pytest.approx(want.telemetry()["l0"], rel=1e-3)
    got.save_pretrained(tmp_path)
    loaded = CircuitModel.from_pretrained(circuit_of().unload(), tmp_path)
    assert torch.equal(loaded.mask_parameters()[0], got.mask_parameters()[0])


# Batches and losses


@every_execution
def test_an_empty_batch_has_the_gradient_of_l0_alone(execution):
    got, want = circuit_of(execution), circuit_of("reference")
    x, labels = batch_of(rows=0)
    optimizers = optimizer_of(got, execution), optimizer_of(want, "reference")
    out = got(x)["logits"]
    assert out.shape == (0, 3)
    (out.sum() + 1e-3 * got.l0()).backward()
    (1e-3 * want.l0()).backward()
    if execution != "lean":
        for a, b in zip(got.mask_parameters(), want.mask_parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    for optimizer in optimizers:
        optimizer.step(), optimizer.zero_grad()
    if execution != "8 bits":
        for a, b in zip(got.mask_parameters(), want.mask_parameters(), strict=True):
            torch.testing.assert_close(a, b)
    assert got.eval()(x)["logits"].shape == (0, 3)
    # The mean of no losses is NaN, as in torch; its gradients are none.
    assert torch.isnan(step(got.train(), optimizers[0], x, labels))
    got.check_logits()


@pytest.mark.parametrize("execution", ["auto", "reference"])
@pytest.mark.parametrize("freeze_base", [True, False])
def test_without_a_loss_the_output_is_the_models_own(execution, freeze_base):
    """No labels, a plain tensor, or a loss that is None: nothing is added, and l0 is there for a loss of one's own."""
    circuit = circuit_of(execution, freeze_base=freeze_base)
    x, labels = batch_of()
    out = circuit(x)
    assert out["loss"] is None
    assert list(out) == ["loss", "logits"]
    loss = nn.functional.cross_entropy(out["logits"], labels) + circuit.l0_lambda * circuit.l0()
    assert float(loss.detach()) == pytest.approx(float(circuit(x, labels)["loss"].detach()), rel=1e-6)

    plain = CircuitModel(CircuitConfig(target_layers="all", l0_lambda=1.0), nn.Sequential(nn.Linear(4, 3)))
    x = torch.randn(2, 4)
    expected = nn.functional.linear(x, plain.wrapped_model[0].weight * 0.5, plain.wrapped_model[0].bias)
    torch.testing.assert_close(plain(x), expected)


# Frozen masks


@every_execution
def test_frozen_masks_are_hard_and_stay_while_others_train(execution):
    """Frozen after the optimizer was made, and thawed later: as the same in plain torch."""
    got, want = circuit_of(execution), circuit_of("reference")
    optimizers = optimizer_of(got, execution), optimizer_of(want, "reference")
    for circuit, optimizer in zip((got, want), optimizers, strict=True):
        step(circuit, optimizer, *batch_of())
        frozen = circuit.masked_layers["hidden"].mask_logits
        frozen.requires_grad_(False)
        before = frozen.detach().clone()
        for t in range(1, 4):
            step(circuit, optimizer, *batch_of(t))
        assert torch.equal(frozen, before)
        assert circuit.masked_layers["hidden"].hard
        frozen.requires_grad_(True)
        for t in range(4, 6):
            step(circuit, optimizer, *batch_of(t))
        assert not torch.equal(frozen, before)
    tolerance = 3e-2 if execution == "8 bits" else 1e-5
    for a, b in zip(got.mask_parameters(), want.mask_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@every_execution
def test_with_all_masks_frozen_nothing_is_trained(execution):
    """As of any model without a parameter that requires a gradient: backward says so, and a step is none."""
    circuit = circuit_of(execution)
    optimizer = optimizer_of(circuit, execution)
    for param in circuit.mask_parameters():
        param.requires_grad_(False)
    before = [p.clone() for p in circuit.mask_parameters()]
    loss = circuit(*batch_of())["loss"]
    with torch.no_grad():
        plain = circuit.export()(*batch_of())["loss"]
    assert float(loss) == pytest.approx(float(plain) + 1e-3 * circuit.compute_l0_statistics()["total_l0"], rel=1e-6)
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(circuit.mask_parameters(), before, strict=True))


# Models


DTYPES = (torch.float8_e4m3fn, torch.int8, torch.complex64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("execution", ["auto", "reference"])
def test_a_weight_of_an_unknown_dtype(dtype, execution):
    model = Net()
    model.hidden.weight = nn.Parameter(torch.zeros(8, 30).to(dtype), requires_grad=False)
    before = snapshot(model)
    config = {"execution": execution}
    with pytest.raises(TypeError, match=rf"'hidden' cannot be masked: its weight has dtype {dtype}, not float16"):
        CircuitModel(CircuitConfig(target_layers=["conv", "h*"], **config), model)
    assert_same_snapshot(before, snapshot(model))
    with pytest.warns(UserWarning, match=rf"not masked: hidden \(its weight has dtype {dtype}"):
        circuit = CircuitModel(CircuitConfig(target_layers="all", **config), model)
    assert list(circuit.masked_layers) == ["conv", "head"]
    circuit.unload()
    assert_same_snapshot(before, snapshot(model))


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.complex64, torch.int8], ids=str)
@every_execution
def test_a_circuit_does_not_go_where_it_cannot_compute(dtype, execution):
    circuit = circuit_of(execution)
    optimizer = optimizer_of(circuit, execution)
    before = snapshot(circuit)
    loss = circuit(*batch_of())["loss"].detach()
    with pytest.raises(TypeError, match=rf"weight must have dtype float16.*got {dtype}"):
        circuit.to(dtype)
    assert_same_snapshot(before, snapshot(circuit))
    assert torch.equal(circuit(*batch_of())["loss"].detach(), loss)
    circuit.to(torch.float64, non_blocking=True).to("cpu").to(torch.zeros(1, dtype=torch.float32))
    step(circuit, optimizer, *batch_of())


@pytest.mark.parametrize("targets", ["all", "all-linear", "hidden", "re:.*head", "conv"])
@pytest.mark.parametrize("what", ["base", "circuit", "holder of the circuit"])
def test_a_model_that_has_a_circuit(targets, what):
    circuit = circuit_of()
    before = snapshot(circuit)
    model = {"base": circuit.wrapped_model, "circuit": circuit}.get(what)
    if model is None:
        model = nn.ModuleDict({"inner": circuit, "conv": nn.Conv1d(4, 6, 3), "hidden": nn.Linear(3, 3),
                               "head": nn.Linear(3, 3)})  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"unload\(\)"):
            CircuitModel(CircuitConfig(target_layers=targets), model)
    assert_same_snapshot(before, snapshot(circuit))
    step(circuit, MaskSGD(circuit.mask_parameters(), lr=0.1), *batch_of())
    again = CircuitModel(CircuitConfig(target_layers="all"), circuit.unload())  # as it says
    assert list(again.masked_layers) == list(NAMES)


@every_execution
def test_rows_of_other_features_or_dtype_leave_nothing_behind(execution):
    circuit, want = circuit_of(execution), circuit_of(execution)
    optimizer, other = optimizer_of(circuit, execution), optimizer_of(want, execution)
    before = snapshot(circuit)
    words = r"must have|must match|expected|should be|cannot"
    for x in (torch.randn(2, 3, 5), torch.randn(2, 4, 6), torch.randn(2, 4, 5).double(), torch.ones(2, 4, 5).int()):
        with pytest.raises((ValueError, TypeError, RuntimeError), match=words):
            circuit(x)
    assert_same_snapshot(before, snapshot(circuit))
    for t in range(2):
        assert torch.equal(step(circuit, optimizer, *batch_of(t)), step(want, other, *batch_of(t)))
    assert all(torch.equal(a, b) for a, b in zip(circuit.mask_parameters(), want.mask_parameters(), strict=True))


def test_families_name_the_layer_by_its_path():
    tiny = MODELS["bert"]
    circuit = CircuitModel(CircuitConfig(target_layers=list(tiny.targets)), tiny.build())
    optimizer = MaskAdamW(circuit.mask_parameters(), lr=0.1)
    batch = tiny.batch(0)
    with torch.no_grad():
        circuit.wrapped_model.bert.encoder.layer[1].output.dense.mask_logits[0, 0] = math.nan
    circuit(**batch).loss.backward()
    optimizer.zero_grad()
    for report in (circuit.telemetry, optimizer.telemetry):
        with pytest.raises(ValueError, match=r"^bert\.encoder\.layer\.1\.output\.dense\.mask_logits holds NaN"):
            report()
