"""Executions of masked layers: the same numbers, the masked weight kept rightly, and what each costs in kernels."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import MODELS, PlainModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from csmask import CircuitConfig, CircuitModel, _cpp, _cpp_linear, autograd, cost, functional, reference, testing
from csmask._ops import ops
from csmask.masked_weight import MaskedWeight

EXECUTIONS = ["per_forward", "in_kernel", "auto", "reference"]
LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (3, 7)),
    "linear-no-bias": (lambda: nn.Linear(7, 5, bias=False), (2, 3, 7)),
    "gpt2": (lambda: Conv1D(5, 7), (2, 3, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2)), (2, 3, 6, 7)),
    "conv2d-grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 5)),
    "conv2d-reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (1, 2, 5, 5)),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)


def build(kind, *, execution="auto", unit="weight", bias=False, seed=0, **config):
    """A circuit over one layer, with seeded weights and logits, and an input."""
    torch.manual_seed(seed)
    make, shape = LAYERS[kind]
    hparams = {"mask_unit": unit, "mask_bias": bias and kind != "linear-no-bias"}
    config = CircuitConfig(target_layers="all", mask_hparams=hparams, execution=execution, l0_lambda=1e-2, **config)
    circuit = CircuitModel(config, make())
    with torch.no_grad():
        for index, p in enumerate(circuit.mask_parameters()):
            p.copy_(testing.seeded_logits(tuple(p.shape), seed + index))
    circuit.temperature = 2.0
    return circuit, testing.seeded_normal(shape, seed + 9)


def step(circuit, x, l0_weight=0.25):
    """One forward + backward with an l0 term; the output and every gradient."""
    x = x.clone().requires_grad_()
    circuit._record_l0(True)
    out = circuit.wrapped_model(x)
    (out.square().sum() + l0_weight * circuit.l0()).backward()
    circuit._record_l0(False)
    return {"out": out.detach(), "dx": x.grad, **{n: p.grad.clone() for n, p in circuit.named_mask_parameters()}}


def check(kind, execution, **options):
    circuit, x = build(kind, execution=execution, **options)
    got = step(circuit, x)
    plain, _ = build(kind, execution="reference", **options)
    exact = copy.deepcopy(plain).double()
    for p in exact.mask_parameters():
        p.data = p.data.double()
    results = {name: step(c, v) for name, c, v in (("plain", plain, x), ("oracle", exact, x.double()))}
    testing.assert_close(got, results["oracle"], results["plain"])


@pytest.mark.parametrize("bias", [False, True], ids=["", "masked-bias"])
@pytest.mark.parametrize("unit", ["weight", "neuron"])
@pytest.mark.parametrize("execution", EXECUTIONS)
@every_layer
def test_all_executions_give_the_same_numbers(kind, execution, unit, bias):
    check(kind, execution, unit=unit, bias=bias)


@pytest.mark.usefixtures("triton_on_cpu")
@pytest.mark.parametrize("bias", [False, True], ids=["", "masked-bias"])
@pytest.mark.parametrize("unit", ["weight", "neuron"])
@pytest.mark.parametrize("execution", ["per_forward", "in_kernel"])
@every_layer
def test_all_executions_give_the_same_numbers_on_the_gpu_kernels(kind, execution, unit, bias):
    check(kind, execution, unit=unit, bias=bias)


@pytest.mark.parametrize("fixture", [None, "triton_on_cpu"], ids=["cpu", "gpu-kernels"])
@pytest.mark.parametrize("execution", ["per_forward", "in_kernel", "auto"])
@every_layer
def test_evaluation_is_the_hard_masked_dense_layer(kind, execution, fixture, request):
    if fixture:
        request.getfixturevalue(fixture)
    for keep in ("training", "always", "never"):
        circuit, x = build(kind, execution=execution)
        circuit.eval().keep_masked_weights(keep)
        want = circuit.export()(x)
        x = x.requires_grad_()
        for _ in range(2):
            got = circuit(x)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            (dx,) = torch.autograd.grad(got.sum(), x)
        (want_dx,) = torch.autograd.grad(circuit.export()(x).sum(), x)
        torch.testing.assert_close(dx, want_dx, rtol=1e-5, atol=1e-5)


# What each execution runs


class Calls:
    """Counts the calls of an operator by its name."""

    def __init__(self, monkeypatch):
        self.counts = {}
        monkeypatch.setattr(ops, "materialize_", self.counting("materialize", ops.materialize_))
        for name in ("materialize", "mask_sums", "logits_grad", "logits_grad_", "masked_linear", "masked_linear_dx",
                     "masked_linear_dlogits", "masked_linear_dlogits_", "masked_linear_backward",
                     "masked_linear_backward_", "pack_mask", "bitmask_linear", "masked_conv",
                     "scale_neurons", "scale_neurons_grad"):  # fmt: skip
            monkeypatch.setattr(ops, name, self.counting(name, getattr(ops, name)))

    def counting(self, name, original):
        def call(*args, **kwargs):
            self.counts[name] = self.counts.get(name, 0) + 1
            return original(*args, **kwargs)

        return call

    def take(self):
        counts, self.counts = self.counts, {}
        return counts


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.usefixtures("triton_on_cpu")
def test_per_forward_is_two_passes_over_the_weight_and_l0_takes_none_of_its_own(kind, monkeypatch):
    circuit, x = build(kind, execution="per_forward")
    calls = Calls(monkeypatch)
    step(circuit, x)
    assert calls.take() == {"materialize": 1, "logits_grad": 1}
    circuit.keep_masked_weights("never")
    step(circuit, x)
    assert calls.take() == {"materialize": 2, "logits_grad": 1}


@pytest.mark.skipif(_cpp.kernels is None, reason="the C++ back end is not built")
def test_per_forward_on_a_cpu_never_makes_the_gradient_of_the_masked_weight(monkeypatch):
    circuit, x = build("linear", execution="per_forward")
    calls = Calls(monkeypatch)
    step(circuit, x)
    assert calls.take() == {"materialize": 1, "masked_linear_dlogits": 1}
    circuit, x = build("conv2d", execution="per_forward")
    step(circuit, x)
    assert calls.take() == {"materialize": 1, "logits_grad": 1}


@pytest.mark.skipif(_cpp.kernels is None, reason="the C++ back end is not built")
def test_in_kernel_on_a_cpu_is_one_visit_forward_and_one_backward(monkeypatch):
    for kind in ("linear", "gpt2"):
        circuit, x = build(kind, execution="in_kernel")
        with monkeypatch.context() as patch:
            calls = Calls(patch)
            step(circuit, x)
            assert calls.take() == {"masked_linear": 1, "masked_linear_backward": 1}
            step(circuit, x)
            assert sorted(calls.take()) == ["masked_linear", "masked_linear_backward"]


@pytest.mark.usefixtures("triton_on_cpu")
def test_in_kernel_never_makes_the_masked_weight_or_its_gradient(monkeypatch):
    for kind in ("linear", "gpt2"):
        circuit, x = build(kind, execution="in_kernel")
        with monkeypatch.context() as patch:
            calls = Calls(patch)
            step(circuit, x)
            counts = calls.take()
            assert counts.pop("masked_linear_backward") == 1
            assert counts == {"masked_linear": 1, "masked_linear_dx": 1, "masked_linear_dlogits": 1}
            circuit.eval()(x)
            assert calls.take() == {"masked_linear": 1}
            circuit.keep_masked_weights("always")
            circuit(x), circuit(x)
            assert calls.take() == {"pack_mask": 1, "bitmask_linear": 2}


@pytest.mark.parametrize("execution", ["per_forward", "in_kernel", "auto"])
@pytest.mark.parametrize("kind", ["linear", "gpt2", "conv1d", "conv2d"])
def test_a_neuron_mask_scales_the_output_and_has_no_weight_gradient(kind, execution, monkeypatch):
    circuit, x = build(kind, execution=execution, unit="neuron")
    calls = Calls(monkeypatch)
    step(circuit, x)
    assert calls.take() == {"scale_neurons": 1, "mask_sums": 1, "scale_neurons_grad": 1}


def test_grouped_convolutions_are_per_forward(monkeypatch):
    circuit, x = build("conv2d-grouped", execution="in_kernel")
    calls = Calls(monkeypatch)
    step(circuit, x)
    assert calls.take() == {"materialize": 1, "logits_grad": 1}


# The masked weight that is kept


def test_gradient_accumulation_pays_for_the_mask_once(monkeypatch):
    circuit, x = build("linear", execution="per_forward")
    optimizer = torch.optim.Adam(circuit.mask_parameters(), lr=0.1)
    calls = Calls(monkeypatch)
    for made in (4, 1, 1):  # before its first step, nobody knows that an optimizer does the stepping
        for _ in range(4):
            step(circuit, x)
        assert calls.take() == {"materialize": made, "masked_linear_dlogits": 4}
        optimizer.step()
        optimizer.zero_grad()


def test_on_a_cpu_the_next_masked_weight_takes_the_memory_of_the_last(monkeypatch):
    made = []
    for name in ("materialize", "materialize_"):
        original = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, original=original, n=name: (made.append(n), original(*a))[1])
    circuit, x = build("linear", execution="per_forward")
    plain, _ = build("linear", execution="reference")
    for c in (circuit, plain):
        optimizer = torch.optim.SGD(c.mask_parameters(), lr=0.5)
        results = []
        for _ in range(3):
            results.append(step(c, x))
            optimizer.step()
            optimizer.zero_grad()
        c.masked_results = results
    for got, want in zip(circuit.masked_results, plain.masked_results, strict=True):
        for name in got:
            torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)
    assert made == ["materialize", "materialize_", "materialize_"]
    with torch.autocast("cpu", torch.bfloat16):  # another dtype does not fit
        step(circuit, x)
    assert made[3:] == ["materialize"]
    circuit.wrapped_model.masked_weight.drop()
    step(circuit, x)
    assert made[4:] == ["materialize"]


def test_temperature_and_logits_that_change_between_micro_batches_are_seen():
    circuit, x = build("linear", execution="per_forward")
    plain, _ = build("linear", execution="reference")
    for change in (
        lambda c: setattr(c, "temperature", 5.0),
        lambda c: c.mask_parameters()[0].detach().mul_(-1),
        lambda c: c.load_state_dict({k: v + 0.5 for k, v in c.state_dict().items()}),
        lambda c: setattr(c.mask_parameters()[0], "data", c.mask_parameters()[0].data * 2),
        lambda c: c.wrapped_model.weight.detach().add_(1.0),
        lambda c: (c.wrapped_model.mask_logits.data.neg_(), c.zero_grad()),
    ):
        for c in (circuit, plain):
            step(c, x)
            change(c)
        got, want = step(circuit, x), step(plain, x)
        torch.testing.assert_close(got["out"], want["out"])


def _sgd(params):
    with torch.no_grad():
        for p in params:
            p -= 0.5 * p.grad
            p.grad = None


def _sgd_by_data(params):
    for p in params:
        p.data -= 0.5 * p.grad
        p.grad = None


def _sgd_by_data_zeroing(params):
    for p in params:
        p.data.add_(p.grad, alpha=-0.5)
        p.grad.zero_()


class _LegacySGD(torch.optim.Optimizer):
    """An optimizer of the old kind: it writes to ``.data``, and its gradients stay tensors of zeros."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad.data, alpha=-0.5)
                p.grad.data.zero_()


def _sgd_by_data_new_zeros(params):
    for p in params:
        p.data.add_(p.grad, alpha=-0.5)
        p.grad = torch.zeros_like(p)


def _stepper(name, params):
    if name in ("Adam", "SGD"):
        optimizer = getattr(torch.optim, name)(params, lr=0.5)
        return lambda: (optimizer.step(), optimizer.zero_grad(set_to_none=name == "SGD"))
    if name == "legacy":
        return _LegacySGD(params).step
    return lambda: {"manual": _sgd, "data": _sgd_by_data, "data-zeroing": _sgd_by_data_zeroing,
                    "data-new-zeros": _sgd_by_data_new_zeros}[name](params)  # fmt: skip


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("name", ["Adam", "SGD", "legacy", "manual", "data", "data-zeroing", "data-new-zeros"])
@pytest.mark.parametrize("saliency", [False, True], ids=["", "autograd.grad-between"])
@pytest.mark.parametrize(("execution", "freeze_base"), [("per_forward", True), ("in_kernel", False)])
def test_no_way_of_stepping_trains_on_a_stale_mask(name, micro_batches, saliency, execution, freeze_base):
    """All end where plain torch ends: some write to ``.data``, which moves no version counter."""
    ends = {}
    for how in (execution, "reference"):
        circuit, x = build("linear", execution=how, freeze_base=freeze_base)
        params = circuit.mask_parameters()
        update = _stepper(name, params)
        for _ in range(4):
            for _ in range(micro_batches):
                last = step(circuit, x)
                if saliency:
                    leaf = x.clone().requires_grad_()
                    torch.autograd.grad(circuit.wrapped_model(leaf).sum(), leaf)
            update()
        ends[how] = {"logits": params[0].detach(), "out": last["out"], "dx": last["dx"]}
    torch.testing.assert_close(ends[execution], ends["reference"], rtol=1e-4, atol=1e-5)


def test_hand_written_logits_are_seen_in_evaluation():
    circuit, x = build("linear", execution="per_forward")
    circuit.eval()
    before = circuit(x)
    circuit.mask_parameters()[0].data.fill_(1.0)
    assert not torch.equal(circuit(x), before)
    assert torch.equal(circuit(x), nn.functional.linear(x, circuit.wrapped_model.weight, circuit.wrapped_model.bias))


def test_one_masked_weight_is_kept_and_freed_when_asked():
    circuit, x = build("linear", execution="per_forward")
    layer = circuit.wrapped_model

    def alive():
        gc.collect()
        same = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.shape == layer.weight.shape]
        return len({t.data_ptr() for t in same})

    start = alive()
    circuit.wrapped_model(x).sum().backward()
    assert alive() == start + 1
    circuit.keep_masked_weights("training")
    assert alive() == start
    circuit.keep_masked_weights("never")
    circuit.wrapped_model(x).sum().backward()
    assert alive() == start
    with pytest.raises(ValueError, match="when must be one of 'training', 'always', 'never', got 'sometimes'"):
        circuit.keep_masked_weights("sometimes")


def test_copies_and_pickles_keep_nothing():
    circuit, x = build("linear", execution="per_forward")
    want = step(circuit, x)["out"]
    assert circuit.wrapped_model.masked_weight._kept is not None
    for other in (copy.deepcopy(circuit), pickle.loads(pickle.dumps(circuit))):
        assert other.wrapped_model.masked_weight is not circuit.wrapped_model.masked_weight
        assert other.wrapped_model.masked_weight._kept is None
        assert torch.equal(step(other, x)["out"], want)
    circuit.to(torch.float64)
    assert circuit.wrapped_model.masked_weight._kept is None


def test_what_is_kept_under_inference_mode_serves_training():
    circuit, x = build("linear", execution="per_forward")
    circuit.eval().keep_masked_weights("always")
    with torch.inference_mode():
        want = circuit(x)
    x = x.requires_grad_()
    out = circuit(x)
    assert torch.equal(out, want)
    out.sum().backward()
    assert x.grad is not None


def test_kept_weights_of_fakes_and_subclasses_are_not_kept():
    class Other(torch.Tensor):
        pass

    kept = MaskedWeight("always")
    weight, logits = torch.ones(2, 3), torch.ones(2, 3)
    kept.get(weight.as_subclass(Other), logits, torch.tensor(1.0), False, 1.0, torch.float32)
    assert kept._kept is None


def test_logits_that_are_replaced_are_seen_even_where_they_lay():
    circuit, x = build("linear", execution="per_forward")
    circuit.eval().keep_masked_weights("always")
    layer = circuit.wrapped_model
    values = [testing.seeded_normal(tuple(layer.mask_logits.shape), seed) for seed in range(30)]
    for replace in ("parameter", "data"):
        for value in values:
            if replace == "parameter":
                layer.mask_logits = None
                layer.mask_logits = nn.Parameter(value.clone())
            else:
                layer.mask_logits.data = torch.empty(0)
                layer.mask_logits.data = value.clone()
            want = nn.functional.linear(x, layer.weight * (value > 0), layer.bias)
            torch.testing.assert_close(circuit(x), want)


def test_a_soft_masked_weight_does_not_outlive_training():
    circuit, x = build("linear", execution="per_forward")
    step(circuit, x)
    assert not any(t.requires_grad for t in circuit.wrapped_model.masked_weight._kept[2])
    circuit.eval()
    assert circuit.wrapped_model.masked_weight._kept is None


@pytest.mark.parametrize("keep", ["training", "always"])
def test_threads_may_share_a_layer(keep):
    circuit, x = build("linear", execution="per_forward")
    circuit.keep_masked_weights(keep)
    dtypes = [torch.float32, torch.bfloat16] * 2
    want = {}
    for dtype in set(dtypes):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            want[dtype] = circuit(x).detach()

    def work(dtype):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return all(torch.equal(circuit(x), want[dtype]) for _ in range(200))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(work, dtypes)) == [True] * 4
    finally:
        sys.setswitchinterval(interval)


def test_replicas_of_data_parallel_keep_their_own():
    layer = build("linear")[0].wrapped_model
    assert layer._replicate_for_data_parallel().masked_weight is not layer.masked_weight


# Accumulation in the kernel


def test_accumulating_leaves_other_ways_of_autograd_alone():
    circuit, x = build("linear", execution="per_forward")
    circuit.accumulate_in_kernel(True)
    (logits,) = circuit.mask_parameters()
    step(circuit, x)
    before = logits.grad.clone()
    leaf = x.clone().requires_grad_()
    torch.autograd.grad(circuit.wrapped_model(leaf).sum(), leaf)
    circuit.wrapped_model(leaf).sum().backward(inputs=[leaf])
    (grad,) = torch.autograd.grad(circuit.wrapped_model(x).sum(), logits)
    assert grad.abs().sum() > 0
    assert torch.equal(logits.grad, before)
    seen = []
    logits.register_hook(lambda g: seen.append(g) or g * 0)
    step(circuit, x)
    assert len(seen) == 1
    assert torch.equal(logits.grad, before)


@pytest.mark.parametrize("fixture", [None, "triton_on_cpu"], ids=["cpu", "gpu-kernels"])
@pytest.mark.parametrize("execution", ["per_forward", "in_kernel"])
@pytest.mark.parametrize("kind", ["linear", "gpt2", "conv2d"])
def test_accumulating_in_the_kernel_gives_the_gradients_of_autograd(kind, execution, fixture, request, monkeypatch):
    if fixture:
        request.getfixturevalue(fixture)
    results = []
    for flag in (False, True):
        circuit, x = build(kind, execution=execution)
        circuit.accumulate_in_kernel(flag)
        for scale in (1.0, 0.5, 2.0):
            grads = step(circuit, x * scale)
        results.append(grads)
        grad = circuit.mask_parameters()[0].grad
        step(circuit, x)
        assert circuit.mask_parameters()[0].grad is grad
    for name, want in results[0].items():
        torch.testing.assert_close(results[1][name], want, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.usefixtures("triton_on_cpu")
def test_accumulating_in_the_kernel_runs_the_adding_op(monkeypatch):
    circuit, x = build("linear", execution="in_kernel")
    circuit.accumulate_in_kernel(True)
    calls = Calls(monkeypatch)
    step(circuit, x)
    assert "masked_linear_dlogits" in calls.take()
    step(circuit, x)
    counts = calls.take()
    assert counts["masked_linear_dlogits_"] == 1
    assert "masked_linear_dlogits" not in counts
    with pytest.raises(TypeError, match="flag must be True or False, got 'yes'"):
        circuit.accumulate_in_kernel("yes")


# Choosing


def test_execution_of_some_layers():
    circuit = CircuitModel(CircuitConfig(target_layers="all"), PlainModel())
    x = MODELS["plain"].batch(0)["x"]
    want = circuit(x)
    circuit.set_execution("in_kernel", ["hidden"])
    assert {n: layer.execution for n, layer in circuit.masked_layers.items()} == {
        n: "in_kernel" if n == "hidden" else "auto" for n in circuit.masked_layers
    }
    torch.testing.assert_close(circuit(x), want)
    circuit.set_execution("reference")
    assert {layer.execution for layer in circuit.masked_layers.values()} == {"reference"}
    assert circuit.circuit_config.execution == "reference"
    torch.testing.assert_close(circuit(x), want)
    for execution in ("fast", None):
        with pytest.raises(ValueError, match="execution"):
            circuit.set_execution(execution)
    with pytest.raises(ValueError, match="nothing"):
        circuit.set_execution("in_kernel", ["nothing"])
    assert {layer.execution for layer in circuit.masked_layers.values()} == {"reference"}


@pytest.mark.parametrize("fixture", [None, "triton_on_cpu"], ids=["cpu", "gpu-kernels"])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize(
    ("op", "weight", "logits", "x"),
    [
        ("masked_linear", (5, 7), (1, 7), (3, 7)),
        ("masked_linear", (5, 7), (1, 1), (3, 7)),
        ("masked_conv", (4, 3, 2, 2), (1, 3, 1, 1), (2, 3, 5, 5)),
        ("masked_conv", (4, 3, 2), (1, 3, 1), (2, 3, 5)),
        ("masked_conv", (4, 3, 2), (4, 1, 1), (3, 5)),
    ],
)
def test_in_kernel_with_logits_of_other_units(op, weight, logits, x, hard, fixture, request):
    if fixture:
        request.getfixturevalue(fixture)
    """The weight is frozen: only then does backward run in the kernel."""
    weight = testing.seeded_normal(weight, 1)

    def results(ops, **options):
        leaves = [
            testing.seeded_normal(x, 0).requires_grad_(),
            testing.seeded_logits(logits, 2).requires_grad_(not hard),
        ]
        out = getattr(ops, op)(leaves[0], weight, leaves[1], 2.0, hard=hard, **options)
        return [out, *torch.autograd.grad(out.square().sum(), leaves[: 1 if hard else 2])]

    for got, want in zip(results(functional, execution="in_kernel"), results(reference), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_l0_of_frozen_logits_has_no_gradient():
    for unit in ("weight", "neuron"):
        inputs = testing.linear_inputs((3,), 7, 5, torch.float32, mask_unit=unit)
        inputs["x"].requires_grad_()
        out, l0 = functional.masked_linear(temperature=2.0, return_l0=True, **inputs)
        assert out.requires_grad
        assert not l0.requires_grad


def test_masked_bias_beside_frozen_packed_weights():
    circuit, x = build("linear", execution="in_kernel", bias=True)
    circuit.keep_masked_weights("always")
    circuit.wrapped_model.mask_logits.requires_grad_(False)
    circuit._record_l0(True)
    out = circuit.wrapped_model(x)
    l0 = circuit.l0()
    circuit._record_l0(False)
    (out.sum() + l0).backward()
    assert circuit.wrapped_model.bias_mask_logits.grad.abs().sum() > 0


def test_execution_of_functional():
    inputs = testing.linear_inputs((3,), 7, 5, torch.float32)
    with pytest.raises(ValueError, match="execution must be 'per_forward' or 'in_kernel', got 'auto'"):
        functional.masked_linear(temperature=1.0, execution="auto", **inputs)
    out, l0 = functional.masked_linear(temperature=2.0, return_l0=True, **inputs)
    torch.testing.assert_close(l0, reference.l0(inputs["mask_logits"], 2.0))
    assert torch.equal(out, functional.masked_linear(temperature=2.0, **inputs))


@pytest.mark.parametrize("name", cost.CEILINGS)
def test_auto_never_picks_what_its_model_predicts_slower(name):
    ceilings = cost.CEILINGS[name]
    picks = set()
    for rows in (1, 16, 128, 256, 1024, 8192):
        for shape in ((768, 768), (4096, 4096), (14336, 4096), (64, 3, 7, 7)):
            for dtype in (torch.float32, torch.bfloat16):
                weight = torch.empty(shape, dtype=dtype, device="meta")
                pick = cost.choose(rows, weight, ceilings, trains=True)
                sizes = (rows, weight[0].numel(), shape[0], weight.element_size(), ceilings)
                predicted = {e: cost.predict(e, *sizes) for e in ("per_forward", "in_kernel")}
                assert pick == "per_forward" or predicted[pick] == min(predicted.values())
                if len(shape) == 2 or not ceilings.in_blocks:
                    assert predicted[pick] <= 1.1 * min(predicted.values())
                else:  # a convolution has no kernel of its own on a CPU
                    assert pick == "per_forward"
                picks.add(pick)
                assert cost.choose(None, weight, ceilings, trains=True) == "per_forward"
                assert cost.choose(rows, weight, ceilings, trains=False) == "per_forward"
    assert picks == {"per_forward", "in_kernel"}


def test_auto_without_the_cpu_kernels(monkeypatch):
    weight = torch.empty(768, 768)
    monkeypatch.setattr(_cpp, "kernels", None)
    assert cost.choose(8, weight, cost.CEILINGS["cpu"], trains=True) == "per_forward"


@pytest.mark.skipif(_cpp.kernels is None, reason="the C++ back end is not built")
def test_auto_by_hand_on_a_cpu():
    """4096 x 4096 on 16 rows in fp32, in bytes per weight at 42 GB/s; masks and products are faster than that."""
    cpu, n, weight = cost.CEILINGS["cpu"], 4096**2, torch.empty(4096, 4096, device="meta")
    activations, product = 16 * 8192 * 4, 2 * 16 * n / 1.7e11
    assert product > activations / 4.2e10
    per_forward = (12 + 4 + 4 + 12) * n / 4.2e10 + 3 * product
    in_kernel = (8 + 12) * n / 4.2e10 + 3 * product
    assert cost.predict("per_forward", 16, 4096, 4096, 4, cpu) == pytest.approx(per_forward)
    assert cost.predict("per_forward", 16, 4096, 4096, 4, cpu, kept=False) == pytest.approx(
        per_forward + 12 * n / 4.2e10
    )
    assert cost.predict("in_kernel", 16, 4096, 4096, 4, cpu) == pytest.approx(in_kernel)
    assert cost.choose(16, weight, cpu, trains=True) == "in_kernel"
    assert cost.choose(4096, weight, cpu, trains=True) == "per_forward"  # less than 1 % is not worth it


def test_auto_by_hand():
    """4096 x 4096 in bf16 on an H200: 124.8 against 106.1 us at 16 tokens, 139.8 against 142.9 at 128, by hand."""
    weight = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    h200, n = cost.CEILINGS["H200"], 4096**2
    for rows, pick in ((16, "in_kernel"), (64, "in_kernel"), (128, "per_forward"), (8192, "per_forward")):
        assert cost.choose(rows, weight, h200, trains=True) == pick
    product = 2 * 16 * n / 7.9e14
    dense = (2 * n + 16 * 8192 * 2) / 4.3e12 + product + 7e-6  # the weight once, x and y
    per_forward = 3 * dense + (8 + 12) * n / 4.3e12
    assert cost.predict("per_forward", 16, 4096, 4096, 2, h200) == pytest.approx(per_forward)
    operand = max((6 * n + 16 * 8192 * 2) / 4.3e12 / 0.85, n / 1.85e12) + product / 0.4
    epilogue = max((10 * n + 16 * 8192 * 2) / 4.3e12 / 0.85, n / 1.85e12) + product / 0.4
    assert cost.predict("in_kernel", 16, 4096, 4096, 2, h200) == pytest.approx(2 * operand + epilogue)


def test_ceilings_by_device_name():
    assert cost.ceilings_of("cuda", "NVIDIA H200") is cost.CEILINGS["H200"]
    assert cost.ceilings_of("cuda", "NVIDIA A100-SXM4-80GB") is cost.CEILINGS["A100"]
    assert cost.ceilings_of("cuda", "Something new") is cost.CEILINGS["cuda"]
    assert cost.ceilings_of("cpu") is cost.ceilings_of("mps") is cost.CEILINGS["cpu"]
    with pytest.raises(ValueError, match="no cost known for execution 'per_step'"):
        cost.predict("per_step", 1, 1, 1, 2, cost.CEILINGS["cpu"])


def test_auto_counts_rows():
    for kind, rows in (("linear", 3), ("gpt2", 6), ("conv1d", 2 * 9 // 2), ("conv2d", 2 * 6 * 7 // 2)):
        circuit, x = build(kind)
        assert circuit.wrapped_model._rows(x) == rows
    assert circuit.wrapped_model._rows(x[0]) == 6 * 7 // 2
    assert circuit.wrapped_model.resolve_execution(x) == "per_forward"
    circuit, x = build("linear")
    assert circuit.wrapped_model.resolve_execution(x) == ("per_forward" if _cpp.kernels is None else "in_kernel")
    assert circuit.wrapped_model.resolve_execution(x.expand(4096, *x.shape)) == "per_forward"


# torch.compile


@pytest.mark.dropin
@pytest.mark.parametrize(
    ("name", "execution"),
    [*(("plain", execution) for execution in EXECUTIONS), ("bert", "in_kernel"), ("gpt2", "auto")],
)
def test_a_circuit_compiles_to_one_graph_and_annealing_does_not_recompile(name, execution):
    torch.compiler.reset()
    tiny = MODELS[name]
    config = CircuitConfig(target_layers="all", execution=execution, l0_lambda=1e-3)
    circuit = CircuitModel(config, tiny.build())
    with torch.no_grad():
        for index, p in enumerate(circuit.mask_parameters()):
            p.copy_(testing.seeded_logits(tuple(p.shape), index))
    batch = {k: v.clone() for k, v in tiny.batch(0).items()}  # GPT-2's labels are its inputs: one tensor
    circuit(**batch)  # the check for bypassed layers runs once, uncompiled
    compiled = torch.compile(circuit, fullgraph=True, backend="aot_eager", dynamic=True)

    def loss_and_grads(call, batch):
        circuit.zero_grad()
        out = call(**batch)
        loss = out.square().mean() if isinstance(out, torch.Tensor) else out.loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in circuit.mask_parameters())]

    loss_and_grads(compiled, batch)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for temperature in (1.0, 7.0, 50.0):
            circuit.temperature = temperature
            larger = {k: torch.cat([v, v]) for k, v in batch.items()} if temperature == 50.0 else batch
            for got, want in zip(loss_and_grads(compiled, larger), loss_and_grads(circuit, larger), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_memory_that_another_thread_multiplies_with_is_left_to_it(monkeypatch):
    circuit, x = build("linear-no-bias", execution="per_forward")
    expected = circuit(x).detach().clone()
    original, inside, go_on = autograd._dense_forward, threading.Event(), threading.Event()

    def slow(*arguments):
        if threading.current_thread().name == "first" and not inside.is_set():
            inside.set()
            go_on.wait(10)
        return original(*arguments)

    monkeypatch.setattr(autograd, "_dense_forward", slow)
    found = []
    first = threading.Thread(name="first", target=lambda: found.append(circuit(x).detach()))
    first.start()
    inside.wait(10)
    with torch.no_grad():
        circuit.mask_parameters()[0].add_(3.0)
    circuit(x)  # would take the memory
    go_on.set()
    first.join()
    assert torch.equal(found[0], expected)


@pytest.mark.skipif(_cpp.kernels is None, reason="the C++ back end is not built")
def test_blocks_do_not_copy_what_a_product_cannot_take(monkeypatch):
    monkeypatch.setattr(_cpp_linear, "_block_features", lambda rows, features, *_: 64)
    weight, logits = torch.randn(256, 256), torch.randn(256, 256, requires_grad=True)
    strided, expanded = torch.randn(8, 512)[:, ::2], torch.ones(1, 1).expand(8, 256)

    def copies(x, dout):
        x = x.detach().requires_grad_()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            functional.masked_linear(x, weight, logits, 1.0, execution="in_kernel").backward(dout)
        return sum(event.count for event in profile.key_averages() if event.key == "aten::clone")

    plain = copies(torch.randn(8, 256), torch.randn(8, 256))
    assert copies(strided, torch.randn(8, 256)) <= plain + 2  # once forward, once backward
    assert copies(torch.randn(8, 256), expanded) <= plain + 1
