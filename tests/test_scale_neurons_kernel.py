"""The kernels of ``scale_neurons``, forward and backward, against the reference."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from csmask_kernels import scale_neurons as kernel
from csmask_kernels.launch import INTERPRETER, ElementwiseConfig

from csmask import reference, testing

SMALL = ElementwiseConfig(block=64, num_warps=1)


def images(*shape):
    return testing.seeded_normal(shape, 0).to(memory_format=torch.channels_last)


# name: z in fp32 and the dimension of its units
LAYOUTS = {
    "one": (testing.seeded_normal((1, 1), 0), 1),
    "one-row": (testing.seeded_normal((1, 19), 0), 1),
    "one-unit": (testing.seeded_normal((131, 1), 0), 1),
    "vector": (testing.seeded_normal((19,), 0), 0),
    "linear-several-steps": (testing.seeded_normal((131, 19), 0), 1),
    "linear-block-1": (testing.seeded_normal((3, 63), 0), 1),
    "linear-block": (testing.seeded_normal((3, 64), 0), 1),
    "linear-block+1": (testing.seeded_normal((3, 65), 0), 1),
    "sequences": (testing.seeded_normal((2, 5, 19), 0), 2),
    "units-first": (testing.seeded_normal((7, 4, 6), 0), 0),
    "conv1d": (testing.seeded_normal((3, 5, 71), 0), 1),
    "channels-first": (testing.seeded_normal((3, 5, 4, 7), 0), 1),
    "channels-last": (images(3, 5, 4, 7), 1),
    "one-pixel": (testing.seeded_normal((9, 5, 1, 1), 0), 1),
    "transposed": (testing.seeded_normal((19, 37), 0).t(), 1),
    "every-other-unit": (testing.seeded_normal((11, 14), 0)[:, ::2], 1),
    "cropped-copied": (testing.seeded_normal((3, 5, 6, 7), 0)[:, :, 1:4, 2:5], 1),
    "no-rows": (torch.empty(0, 5), 1),
    "no-units": (torch.empty(5, 0), 1),
}
# name: hard, scale, bias
MASKS = {
    "soft": (False, 1.0, False),
    "soft-scaled-bias": (False, 1.7, True),
    "hard": (True, 1.0, False),
    "hard-scaled-bias": (True, 1.7, True),
}


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory holds NaN, so that a slot that nobody writes shows."""
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, _new=allocate, **kwargs: _new(*args, **kwargs).fill_(math.nan))


def inputs_of(z, dim, bias, dtype=torch.float32):
    units = z.shape[dim]
    return {
        "z": torch.empty_like(z, dtype=dtype).copy_(z) if z.is_contiguous() else z.to(dtype),
        "mask_logits": testing.seeded_logits((units,), 1),
        "bias": testing.seeded_normal((units,), 2, dtype) if bias else None,
    }


def expected(inputs, dout, temperature, hard, scale, dim, dl0, weights_per_logit):
    """``out``, ``dz`` and ``dlogits`` by autograd through the reference, in the dtype of the inputs."""
    z, logits = inputs["z"].detach().requires_grad_(), inputs["mask_logits"].detach().requires_grad_()
    out = reference.scale_neurons(z, logits, temperature, inputs["bias"], hard, scale, dim)
    l0 = reference.l0(logits, temperature, hard, scale, weights_per_logit)
    pairs = [(out, dout)] if hard else [(out, dout), (l0, dl0.to(l0.dtype))]
    outputs, grads = zip(*pairs, strict=True)
    dz, dlogits = torch.autograd.grad(outputs, (z, logits), grads, allow_unused=True)
    return {"out": out.detach(), "dz": dz, "dlogits": torch.zeros_like(logits) if dlogits is None else dlogits}


def got(inputs, dout, temperature, hard, scale, dim, dl0, weights_per_logit, config=SMALL):
    z, logits = inputs["z"], inputs["mask_logits"]
    temperature = torch.tensor(temperature)
    out = kernel.scale_neurons(z, logits, temperature, inputs["bias"], hard, scale, dim, config)
    grads = kernel.scale_neurons_grad(dout, z, logits, temperature, dl0, hard, scale, dim, weights_per_logit, config)
    return {"out": out, "dz": grads[0], "dlogits": grads[1]}


def check(inputs, dout, *mask, config=SMALL):
    oracle = expected(testing.to_fp64(inputs), dout.double(), *mask)
    plain = expected(inputs, dout, *mask)
    found = got(inputs, dout, *mask, config=config)
    testing.assert_close(found, oracle, plain)
    return found


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_mask(layout, mask, dtype):
    (z, dim), (hard, scale, bias) = LAYOUTS[layout], MASKS[mask]
    inputs = inputs_of(z, dim, bias, dtype)
    dout = testing.seeded_normal(tuple(z.shape), 3, dtype)
    found = check(inputs, dout, 3.0, hard, scale, dim, torch.tensor(0.25), 7)
    want = torch.empty_like(inputs["z"]).stride()
    assert found["out"].stride() == want
    assert found["dz"].stride() == want


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
def test_gradients_in_another_layout_than_the_output(layout):
    z, dim = LAYOUTS[layout]
    dout = testing.seeded_normal(tuple(z.shape), 3)
    if layout == "channels-first":
        dout = dout.to(memory_format=torch.channels_last)
    assert dout.stride() != z.stride()
    check(inputs_of(z, dim, False), dout, 3.0, False, 1.0, dim, torch.tensor(0.25), 1)
    # the sum's gradient: one number for all entries
    check(inputs_of(z, dim, False), torch.ones(()).expand(z.shape), 3.0, False, 1.0, dim, torch.tensor(0.25), 1)


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_saturated_logits_keep_the_digits_of_their_gradient(temperature):
    """Each unit by itself: beside the largest gradient, the rule would not see the small ones."""
    products = torch.tensor([0.0, 1.0, -1.0, 17.0, -17.0, 25.0, -60.0, 80.0])
    inputs = {"z": testing.seeded_normal((5, 8), 0), "mask_logits": products / temperature, "bias": None}
    dout = testing.seeded_normal((5, 8), 3)
    mask = (temperature, False, 1.0, 1, torch.tensor(0.0), 1)
    oracle = expected(testing.to_fp64(inputs), dout.double(), *mask)["dlogits"]
    found = got(inputs, dout, *mask)["dlogits"]
    assert (found != 0).all()
    torch.testing.assert_close(found.double(), oracle, rtol=3e-5, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")  # inf * 0, which is not selected
def test_a_hard_mask_selects():
    nan, inf = math.nan, math.inf
    z = torch.tensor([[nan, inf, -inf, -2.0, -0.0, nan, 3.0, -3.0], [nan, -inf, inf, -5.0, 1.0, 1.0, inf, -7.0]])
    logits = torch.tensor([-1.0, 0.0, nan, -0.0, -5.0, -1e-40, 1e-40, inf])
    for scale in (1.0, 1.5):
        out = kernel.scale_neurons(z, logits, torch.tensor(5.0), None, True, scale, 1, SMALL)
        assert out[:, :6].tolist() == [[0.0] * 6] * 2
        assert not out[:, :6].signbit().any()
        assert out[:, 6:].tolist() == [[3 * scale, -3 * scale], [inf, -7 * scale]]
        bias = torch.arange(1.0, 9.0)
        out = kernel.scale_neurons(z, logits, torch.tensor(5.0), bias, True, scale, 1, SMALL)
        assert out[0].tolist() == [1, 2, 3, 4, 5, 6, 7 + 3 * scale, 8 - 3 * scale]
        dz, dlogits = kernel.scale_neurons_grad(
            z, z, logits, torch.tensor(5.0), torch.tensor(2.0), True, scale, 1, 3, SMALL
        )
        assert torch.equal(dz, kernel.scale_neurons(z, logits, torch.tensor(5.0), None, True, scale, 1, SMALL))
        assert dlogits.tolist() == [0.0] * 8


def test_the_sum_with_the_bias_is_rounded_once():
    """``0.75 * (1 + 2**-10)`` lies between two fp16 numbers; less 0.75, it is one."""
    z, bias = torch.tensor([[1 + 2.0**-10]], dtype=torch.float16), torch.tensor([-0.75], dtype=torch.float16)
    out = kernel.scale_neurons(z, torch.zeros(1), torch.tensor(1.0), bias, False, 1.5, 1, SMALL)
    assert out.item() == 0.75 * 2.0**-10


@pytest.mark.parametrize("dl0", [None, torch.tensor(-0.5)])
def test_the_gradient_of_l0_counts_weights(dl0):
    z, logits = torch.empty(0, 5), testing.seeded_logits((5,), 1)
    _, dlogits = kernel.scale_neurons_grad(z, z, logits, torch.tensor(2.0), dl0, False, 1.5, 1, 11, SMALL)
    want = reference.soft_mask_derivative(logits, 2.0, 1.5) * (0.0 if dl0 is None else -0.5 * 11)
    torch.testing.assert_close(dlogits, want, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("poisoned")
def test_partials_of_more_programs_than_one_step_of_the_last_sum(monkeypatch):
    target = dataclasses.replace(INTERPRETER, multiprocessors=64)
    monkeypatch.setattr(kernel, "target_of", lambda _: target)
    z = testing.seeded_normal((131, 19), 0)
    inputs, dout = inputs_of(z, 1, False), testing.seeded_normal((131, 19), 3)
    temperature, logits = torch.tensor(3.0), inputs["mask_logits"]
    launches, _ = kernel.plan_grad(dout, z, logits, temperature, None, False, 1.0, 1, 1, z, logits, target, SMALL)
    shares, step = launches[1].arguments["shares"], launches[1].constants["BLOCK_P"]
    assert shares > step
    assert shares % step
    check(inputs, dout, 3.0, False, 1.0, 1, torch.tensor(0.25), 1)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(5, 257), (2, 3, 20, 21)])
def test_default_configs(shape):
    inputs, dout = inputs_of(testing.seeded_normal(shape, 0), 1, True), testing.seeded_normal(shape, 3)
    check(inputs, dout, 3.0, False, 1.3, 1, torch.tensor(0.25), 2, config=None)


def test_results_repeat_bit_for_bit():
    z, dim = LAYOUTS["linear-several-steps"]
    inputs, dout = inputs_of(z, dim, True), testing.seeded_normal(tuple(z.shape), 3)
    first, second = (got(inputs, dout, 3.0, False, 1.0, dim, torch.tensor(0.25), 7) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_temperature_and_dl0_of_any_float_dtype(dtype):
    z, logits = testing.seeded_normal((7, 5), 0), testing.seeded_logits((5,), 1)
    # numbers that every one of these dtypes holds
    one, other = (
        kernel.scale_neurons_grad(z, z, logits, t, dl0, False, 1.0, 1, 3, SMALL)
        for t, dl0 in (
            (torch.tensor(2.5), torch.tensor(0.25)),
            (torch.tensor(2.5, dtype=dtype), torch.tensor(0.25, dtype=dtype)),
        )
    )
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


def test_logits_and_bias_may_be_strided():
    z = testing.seeded_normal((7, 5), 0)
    logits, bias = testing.seeded_logits((5, 2), 1)[:, 1], testing.seeded_normal((5, 3), 2)[:, 2]
    temperature, dl0 = torch.tensor(3.0), torch.tensor(0.5)
    for s, b in ((logits, bias), (logits[:1].expand(5), bias[:1].expand(5))):
        out = kernel.scale_neurons(z, s, temperature, b, False, 1.0, 1, SMALL)
        dense = s.contiguous(), b.contiguous()
        assert torch.equal(out, kernel.scale_neurons(z, dense[0], temperature, dense[1], False, 1.0, 1, SMALL))
        _, dlogits = kernel.scale_neurons_grad(z, z, s, temperature, dl0, False, 1.0, 1, 1, SMALL)
        _, want = kernel.scale_neurons_grad(z, z, dense[0], temperature, dl0, False, 1.0, 1, 1, SMALL)
        assert torch.equal(dlogits, want)


def test_other_dtypes_are_refused():
    z, logits = torch.ones(3, 5, dtype=torch.float64), torch.zeros(5)
    with pytest.raises(NotImplementedError, match=r"take z in float32, float16 or bfloat16, got torch\.float64"):
        kernel.scale_neurons(z, logits, torch.tensor(1.0), None, False, 1.0, 1)
    with pytest.raises(NotImplementedError, match="take dout in float32"):
        kernel.scale_neurons_grad(z, z.float(), logits, torch.tensor(1.0), None, False, 1.0, 1, 1)
