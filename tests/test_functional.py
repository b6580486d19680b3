"""The operations with kernels and hand-written gradients, against the reference by the tolerance rule."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from csmask import functional, reference, testing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCK = 2048  # the C++ kernel's unit of work

# name: rows, in, out, options
LINEARS = {
    "one": ((1,), 1, 1, {}),
    "prime": ((7,), 13, 11, {}),
    "3-d": ((2, 3), 8, 5, {"scale": 1.75}),
    "1-d": ((), 6, 5, {}),
    "empty-batch": ((0,), 6, 5, {}),
    "empty-3-d": ((2, 0), 6, 5, {}),
    "no-features": ((3,), 0, 4, {}),
    "block-1": ((3,), BLOCK - 1, 1, {}),
    "block+1": ((3,), BLOCK + 1, 2, {}),
    "hard": ((5,), 13, 11, {"hard": True, "scale": 1.75}),
}
# name: shape of x, of the weight, options
CONVS = {
    "conv1d-prime": ((2, 3, 13), (5, 3, 3), {}),
    "conv1d-unbatched": ((3, 7), (2, 3, 3), {"padding": 1}),
    "conv1d-same-even": ((2, 3, 8), (2, 3, 4), {"padding": "same"}),
    "conv2d-one": ((1, 1, 1, 1), (1, 1, 1, 1), {}),
    "conv2d-odd": ((2, 3, 7, 5), (4, 3, 3, 2), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    "conv2d-empty-batch": ((0, 3, 7, 5), (4, 3, 3, 3), {}),
    "conv2d-unbatched": ((4, 7, 5), (6, 2, 3, 3), {"groups": 2, "padding": 1}),
    "conv2d-depthwise": ((2, 4, 6, 6), (8, 1, 3, 3), {"groups": 4}),
    "conv2d-same-even": ((1, 2, 6, 7), (3, 2, 2, 4), {"padding": "same"}),
    "conv2d-reflect": ((2, 2, 6, 6), (3, 2, 3, 3), {"padding": 2, "padding_mode": "reflect", "scale": 1.75}),
    "conv2d-circular": ((2, 2, 6, 6), (3, 2, 3, 3), {"padding": 2, "padding_mode": "circular"}),
    "conv2d-hard": ((2, 2, 6, 6), (3, 2, 3, 3), {"padding": "valid", "hard": True}),
}


def check(op, inputs, temperature, **options):
    """The rule: every result of `functional`, against fp64 and with the reference's error as budget."""
    got = testing.run(functional, op, inputs, temperature, **options)
    oracle, plain = testing.oracle_and_budget(op, inputs, temperature, **options)
    testing.assert_close(got, oracle, plain)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 200.0])
@pytest.mark.parametrize("unit", ["weight", "neuron"])
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "gpt2"])
@pytest.mark.parametrize("name", LINEARS)
def test_linear_is_the_reference(name, transposed, unit, temperature, dtype):
    rows, in_features, out_features, options = LINEARS[name]
    inputs = testing.linear_inputs(rows, in_features, out_features, dtype, mask_unit=unit, transposed=transposed)
    got = check("masked_linear", inputs, temperature, transposed=transposed, **options)
    assert set(got) == {"out", "l0", "dx", "dweight", "dbias"} | (set() if options.get("hard") else {"dlogits"})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 200.0])
@pytest.mark.parametrize("unit", ["weight", "neuron"])
@pytest.mark.parametrize("name", CONVS)
def test_conv_is_the_reference(name, unit, temperature, dtype):
    x_shape, weight_shape, options = CONVS[name]
    check("masked_conv", testing.conv_inputs(x_shape, weight_shape, dtype, mask_unit=unit), temperature, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "gpt2"])
def test_without_bias_and_not_contiguous(transposed, dtype):
    inputs = testing.linear_inputs((6, 4), 10, 12, dtype, transposed=transposed, bias=False)
    inputs["x"] = testing.seeded_normal((4, 10, 6), 5, dtype).permute(2, 0, 1)
    inputs["weight"] = testing.seeded_normal((*inputs["weight"].shape[::-1],), 6, dtype).t()
    inputs["mask_logits"] = testing.seeded_logits((*inputs["weight"].shape[::-1],), 7).t()
    assert not any(t.is_contiguous() for t in inputs.values() if t is not None)
    check("masked_linear", inputs, 3.0, transposed=transposed)
    inputs["x"] = testing.seeded_normal((10,), 8, dtype).expand(5, 10)
    check("masked_linear", inputs, 3.0, transposed=transposed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_conv_channels_last(dtype):
    inputs = testing.conv_inputs((2, 4, 6, 6), (6, 4, 3, 3), dtype, bias=False)
    for name in ("x", "weight", "mask_logits"):
        inputs[name] = inputs[name].to(memory_format=torch.channels_last)
        assert not inputs[name].is_contiguous()
    check("masked_conv", inputs, 3.0, padding=1)


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_every_dtype_of_weight_and_logits(dtype, logits_dtype):
    inputs = testing.linear_inputs((3,), 7, 5, dtype)
    inputs["mask_logits"] = inputs["mask_logits"].to(logits_dtype)
    got = check("masked_linear", inputs, 2.0)
    assert got["out"].dtype == got["dx"].dtype == got["dweight"].dtype == dtype
    assert got["dlogits"].dtype == logits_dtype
    assert got["l0"].dtype == (torch.float64 if torch.float64 in (dtype, logits_dtype) else torch.float32)


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("out_dtype", [None, *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_materialize_into_another_dtype(dtype, out_dtype, hard):
    def results(ops, weight, logits, dout, result_dtype):
        weight, logits = weight.detach().requires_grad_(), logits.detach().requires_grad_()
        out, l0 = ops.materialize(weight, logits, 3.0, hard, 1.5, result_dtype)
        total = [out, l0][: 1 if hard else 2]
        wanted = [weight, logits][: len(total)]
        grads = torch.autograd.grad(
            total, wanted, [dout.to(out.dtype), torch.tensor(0.5, dtype=l0.dtype)][: len(total)]
        )
        return {"out": out.detach(), "l0": l0.detach(), **dict(zip(("dweight", "dlogits"), grads, strict=False))}

    weight, logits = testing.seeded_normal((37, 61), 0, dtype), testing.seeded_logits((37, 1), 1)
    dout = testing.seeded_normal((37, 61), 2, out_dtype or dtype)
    got = results(functional, weight, logits, dout, out_dtype)
    assert got["out"].dtype == (out_dtype or dtype)
    plain = results(reference, weight, logits, dout, out_dtype)
    testing.assert_close(got, results(reference, weight.double(), logits.double(), dout.double(), None), plain)


def test_each_gradient_alone():
    names = {"x": "dx", "weight": "dweight", "mask_logits": "dlogits", "bias": "dbias"}
    for op, inputs in (
        ("masked_linear", testing.linear_inputs((4,), 6, 5, torch.float64)),
        ("masked_conv", testing.conv_inputs((2, 3, 5, 5), (4, 3, 3, 3), torch.float64)),
    ):
        inputs["mask_logits"] = inputs["mask_logits"].double()

        def grad(ops, name, op=op, inputs=inputs):
            leaf = inputs[name].clone().requires_grad_()
            out = getattr(ops, op)(temperature=2.0, **{**inputs, name: leaf})
            return torch.autograd.grad((out * out).sum(), leaf)[0]

        for name, label in names.items():
            got, want = grad(functional, name), grad(reference, name)
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=lambda m, label=label: f"{label}: {m}")


def test_l0_and_weight_of_materialize_each_alone():
    logits = testing.seeded_logits((5, 3), 0).requires_grad_()
    weight = testing.seeded_normal((5, 3), 1)
    for index in (0, 1):
        got = torch.autograd.grad(functional.materialize(weight, logits, 2.0)[index].sum(), logits)[0]
        want = torch.autograd.grad(reference.materialize(weight, logits, 2.0)[index].sum(), logits)[0]
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_l0(hard):
    logits = testing.seeded_logits((5, 1), 0).requires_grad_()
    got = functional.l0(logits, 2.0, hard, 1.5, weights_per_logit=3)
    assert torch.equal(got, reference.l0(logits, 2.0, hard, 1.5, 3))
    assert got.requires_grad == (not hard)
    assert got.item() == pytest.approx(
        functional.materialize(torch.ones(5, 3), logits, 2.0, hard, 1.5)[1].item(), rel=1e-6
    )


GRADCHECKS = {
    "linear": ("masked_linear", testing.linear_inputs((2, 3), 4, 3, torch.float64), {"scale": 1.3}),
    "linear-neuron": ("masked_linear", testing.linear_inputs((3,), 4, 3, torch.float64, mask_unit="neuron"), {}),
    "gpt2": (
        "masked_linear",
        testing.linear_inputs((3,), 4, 3, torch.float64, mask_unit="neuron", transposed=True),
        {"transposed": True},
    ),
    "conv1d": ("masked_conv", testing.conv_inputs((2, 2, 5), (3, 2, 2), torch.float64), {"padding": "same"}),
    "conv2d": (
        "masked_conv",
        testing.conv_inputs((1, 2, 4, 4), (4, 1, 3, 3), torch.float64, mask_unit="neuron"),
        {"groups": 2, "stride": 2, "padding": 1, "padding_mode": "reflect", "scale": 1.3},
    ),
}


@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck(name):
    op, inputs, options = GRADCHECKS[name]
    leaves = [t.double().requires_grad_() for t in inputs.values()]

    def fn(x, weight, mask_logits, bias):
        return getattr(functional, op)(x, weight, mask_logits, 1.7, bias, **options)

    assert gradcheck(fn, leaves)
    assert gradcheck(lambda w, s: functional.materialize(w, s, 1.7, scale=1.3), leaves[1:3])


def test_second_derivatives_are_refused_not_wrong():
    inputs = testing.linear_inputs((3,), 4, 3, torch.float64)
    logits = inputs["mask_logits"].double().requires_grad_()
    out = functional.masked_linear(inputs["x"], inputs["weight"], logits, 2.0)
    (grad,) = torch.autograd.grad((out**2).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"first derivatives only.*set_execution\('reference'\)"):
        grad.sum().backward()


def test_derivative_does_not_die_where_sigmoid_saturates():
    # m * (1 - m) in fp32 is exactly 0 from T * S = 17
    weight = torch.ones(1, 8)
    logits = torch.tensor([[0.085, 0.09, 0.1, 0.2, 0.3, 0.4, -0.4, -0.1]], requires_grad=True)
    functional.masked_linear(torch.ones(1, 8), weight, logits, 200.0).sum().backward()
    z = 200.0 * logits.detach().double()
    want = 200 * torch.exp(-z.abs()) / (1 + torch.exp(-z.abs())) ** 2
    assert (logits.grad > 0).all()
    # a rounding of z = T * S is worth eps * |z| / 2 in exp(z)
    assert ((logits.grad / want - 1).abs() <= 80 * torch.finfo(torch.float32).eps).all()


def test_bitwise_repeatable():
    for op, inputs in (
        ("masked_linear", testing.linear_inputs((33,), 129, 65, torch.bfloat16)),
        ("masked_conv", testing.conv_inputs((3, 5, 17, 17), (7, 5, 3, 3), torch.float32)),
    ):
        first = testing.run(functional, op, inputs, 7.0)
        for _ in range(3):
            again = testing.run(functional, op, inputs, 7.0)
            assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


def test_hard_mask_is_bitwise_the_dense_operation():
    x, weight = testing.seeded_normal((5, 64), 0), testing.seeded_normal((32, 64), 1)
    logits = testing.seeded_logits((32, 64), 2)
    pruned = torch.where(logits > 0, weight, torch.zeros(()))
    assert torch.equal(
        functional.masked_linear(x, weight, logits, 9.0, hard=True), torch.nn.functional.linear(x, pruned)
    )
    poisoned = torch.where(logits > 0, weight, torch.full((), math.nan)).requires_grad_()
    out = functional.masked_linear(x, poisoned, logits, 9.0, hard=True)
    assert torch.equal(out, torch.nn.functional.linear(x, pruned))
    (dweight,) = torch.autograd.grad(out.sum(), poisoned)
    assert torch.equal(dweight == 0, logits <= 0)


def saved_tensors(fn):
    """Everything that autograd keeps for the backward of fn()."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = fn()
    return out, saved


@pytest.mark.parametrize("op", ["masked_linear", "masked_conv"])
def test_saves_its_inputs_and_nothing_else(op):
    if op == "masked_linear":
        inputs = testing.linear_inputs((4,), 16, 8, torch.float32)
    else:
        inputs = testing.conv_inputs((2, 4, 6, 6), (8, 4, 3, 3), torch.float32)
    inputs["mask_logits"].requires_grad_()
    temperature = torch.tensor(2.0)
    own = {t.data_ptr() for t in inputs.values()} | {temperature.data_ptr()}
    _, saved = saved_tensors(lambda: getattr(functional, op)(temperature=temperature, **inputs))
    assert {t.data_ptr() for t in saved} <= own
    assert len(saved) <= 4  # x, weight, mask_logits, temperature: no mask, no masked weight


def test_frozen_linear_does_not_save_its_input():
    inputs = testing.linear_inputs((4,), 16, 8, torch.float32)
    inputs["mask_logits"].requires_grad_()
    inputs["x"].requires_grad_()
    _, saved = saved_tensors(lambda: functional.masked_linear(temperature=2.0, hard=True, **inputs))
    assert inputs["x"].data_ptr() not in {t.data_ptr() for t in saved}
    with torch.no_grad():
        _, saved = saved_tensors(lambda: functional.masked_linear(temperature=2.0, **inputs))
    assert saved == []


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["masked_linear", "masked_conv"])
def test_autocast(op, autocast_dtype):
    if op == "masked_linear":
        inputs = testing.linear_inputs((9,), 17, 11, torch.float32)
    else:
        inputs = testing.conv_inputs((2, 4, 6, 6), (8, 4, 3, 3), torch.float32)
    with torch.autocast("cpu", autocast_dtype):
        got = testing.run(functional, op, inputs, 3.0)
        plain = testing.run(reference, op, inputs, 3.0)
    testing.assert_close(got, testing.run(reference, op, testing.to_fp64(inputs), 3.0), plain)
    assert got["out"].dtype == autocast_dtype
    assert all(got[name].dtype == torch.float32 for name in ("dx", "dweight", "dlogits", "dbias", "l0"))


def test_autocast_leaves_fp64_alone():
    inputs = testing.to_fp64(testing.linear_inputs((3,), 5, 4, torch.float64))
    want = functional.masked_linear(temperature=3.0, **inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(functional.masked_linear(temperature=3.0, **inputs), want)


LINEAR = {"x": torch.ones(2, 4), "weight": torch.ones(3, 4), "mask_logits": torch.ones(3, 4), "temperature": 1.0}
CONV = {
    "x": torch.ones(2, 4, 5, 5),
    "weight": torch.ones(6, 2, 3, 3),
    "mask_logits": torch.ones(6, 2, 3, 3),
    "temperature": 1.0,
    "groups": 2,
}
NOT_2D = "weight must be 2-d"
BAD_LINEAR = {
    "logits-transposed": ({"mask_logits": torch.ones(4, 3)}, ValueError, r"shape \(3, 4\).*got \(4, 3\)"),
    "logits-flat": ({"mask_logits": torch.ones(12)}, ValueError, r"shape \(3, 4\).*got \(12,\)"),
    "logits-per-unit-flat": ({"mask_logits": torch.ones(3)}, ValueError, r"one logit per neuron.*got \(3,\)"),
    "logits-two-neurons": ({"mask_logits": torch.ones(2, 1)}, ValueError, r"got \(2, 1\)"),
    "logits-bf16": ({"mask_logits": torch.ones(3, 4).bfloat16()}, TypeError, "mask_logits must have dtype float32 or"),
    "logits-int": ({"mask_logits": torch.ones(3, 4).int()}, TypeError, "mask_logits must have dtype.*got torch.int32"),
    "logits-meta": (
        {"mask_logits": torch.ones(3, 4, device="meta")},
        ValueError,
        "mask_logits must be on cpu.*got meta",
    ),
    "weight-int": ({"weight": torch.ones(3, 4).long()}, TypeError, "weight must have dtype.*got torch.int64"),
    "weight-complex": ({"weight": torch.ones(3, 4) * 1j}, TypeError, "weight must have dtype.*got torch.complex64"),
    "weight-1d": ({"weight": torch.ones(4), "mask_logits": torch.ones(4)}, ValueError, NOT_2D),
    "weight-3d": ({"weight": torch.ones(3, 4, 1), "mask_logits": torch.ones(3, 4, 1)}, ValueError, NOT_2D),
    "x-features": ({"x": torch.ones(2, 3)}, ValueError, r"x must have 4 features in dimension -1.*got shape \(2, 3\)"),
    "x-gpt2-features": (
        {"transposed": True},
        ValueError,
        r"x must have 3 features in dimension -1.*got shape \(2, 4\)",
    ),
    "x-0d": ({"x": torch.tensor(1.0)}, ValueError, "x must have 4 features"),
    "x-dtype": ({"x": torch.ones(2, 4).bfloat16()}, TypeError, "x must have dtype torch.float32.*autocast"),
    "x-int": ({"x": torch.ones(2, 4).int()}, TypeError, "x must have dtype torch.float32.*got torch.int32"),
    "x-meta": ({"x": torch.ones(2, 4, device="meta")}, ValueError, "x must be on cpu like weight, got meta"),
    "bias-shape": ({"bias": torch.ones(4)}, ValueError, r"bias must have shape \(3,\).*got \(4,\)"),
    "bias-scalar": ({"bias": torch.ones(1)}, ValueError, r"bias must have shape \(3,\)"),
    "bias-meta": ({"bias": torch.ones(3, device="meta")}, ValueError, "bias must.*on cpu.*on meta"),
    "bias-dtype": (
        {"bias": torch.ones(3).double()},
        TypeError,
        "bias must have dtype.*got torch.float64",
    ),
    "temperature-zero": ({"temperature": 0.0}, ValueError, "temperature must be a positive finite number.*got 0"),
    "temperature-negative": ({"temperature": -1}, ValueError, "temperature must be a positive finite.*got -1"),
    "temperature-nan": ({"temperature": math.nan}, ValueError, "temperature must be a positive finite.*got nan"),
    "temperature-inf": ({"temperature": math.inf}, ValueError, "temperature must be a positive finite.*got inf"),
    "temperature-vector": ({"temperature": torch.ones(3)}, ValueError, r"0-d tensor, got shape \(3,\)"),
    "temperature-in-a-list": ({"temperature": torch.ones(1)}, ValueError, r"0-d tensor, got shape \(1,\)"),
}
BAD_CONV = {
    "weight-2d": ({"weight": torch.ones(6, 2), "mask_logits": torch.ones(6, 2)}, ValueError, "weight must be 3-d"),
    "weight-5d": ({"weight": torch.ones(6, 2, 1, 1, 1)}, ValueError, r"conv2d\), got shape"),
    "logits-old-neuron": ({"mask_logits": torch.ones(6, 1, 3, 3)}, ValueError, r"got \(6, 1, 3, 3\)"),
    "x-channels": ({"x": torch.ones(2, 2, 5, 5)}, ValueError, "x must have 4 features in dimension -3"),
    "x-dimensions": ({"x": torch.ones(4, 5)}, ValueError, "x must have 4 dimensions, or 3 unbatched"),
    "x-5d": ({"x": torch.ones(1, 2, 4, 5, 5)}, ValueError, "x must have 4 dimensions, or 3 unbatched"),
    "x-dtype": ({"x": torch.ones(2, 4, 5, 5).half()}, TypeError, "x must have dtype torch.float32"),
    "bias-shape": ({"bias": torch.ones(2)}, ValueError, r"bias must have shape \(6,\)"),
    "padding-word": ({"padding": "full"}, ValueError, "padding must be numbers, 'same' or 'valid', got 'full'"),
    "padding-negative": ({"padding": (0, -1)}, ValueError, "padding must not be negative"),
    "padding-three": ({"padding": (1, 1, 1)}, ValueError, "one number or 2 of them"),
    "padding-mode": ({"padding_mode": "mirror"}, ValueError, "padding_mode must be one of 'zeros'.*got 'mirror'"),
    "same-stride": ({"padding": "same", "stride": 2}, ValueError, "'same' is not supported for strided"),
    "stride-three": ({"stride": (1, 1, 1)}, ValueError, "one number or 2 of them"),
    "temperature": ({"temperature": math.nan}, ValueError, "temperature must be a positive finite"),
}


@pytest.mark.parametrize(
    ("op", "arguments", "error", "message"),
    [
        pytest.param(op, {**good, **change}, error, message, id=f"{op}-{name}")
        for op, good, cases in (("masked_linear", LINEAR, BAD_LINEAR), ("masked_conv", CONV, BAD_CONV))
        for name, (change, error, message) in cases.items()
    ],
)
def test_bad_input(op, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(functional, op)(**arguments)


def test_bad_input_of_materialize():
    ones = torch.ones(3, 4)
    for dtype in (torch.int32, torch.complex64, torch.bool):
        with pytest.raises(TypeError, match="dtype must be float16, bfloat16, float32 or float64"):
            functional.materialize(ones, ones, 1.0, dtype=dtype)
    with pytest.raises(ValueError, match="temperature must be"):
        functional.materialize(ones, ones, -1.0)
    with pytest.raises(ValueError, match=r"must have shape \(3, 4\)"):
        functional.materialize(ones, torch.ones(3, 3), 1.0)
    with pytest.raises(ValueError, match="temperature must be"):
        functional.l0(ones, 0.0)


def test_int_input_is_refused_under_autocast_too():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="x must have dtype"):
        functional.masked_linear(**{**LINEAR, "x": torch.ones(2, 4).int()})


def test_shapes_on_the_meta_device():
    inputs = {n: t.to("meta") for n, t in testing.linear_inputs((2, 3), 5, 4, torch.bfloat16).items()}
    out = functional.masked_linear(temperature=2.0, **inputs)
    assert (out.shape, out.dtype, out.device.type) == ((2, 3, 4), torch.bfloat16, "meta")
    inputs = {n: t.to("meta") for n, t in testing.conv_inputs((2, 4, 6, 6), (8, 2, 3, 3), torch.float32).items()}
    out = functional.masked_conv(temperature=2.0, padding=1, groups=2, stride=2, **inputs)
    assert (out.shape, out.dtype, out.device.type) == ((2, 8, 3, 3), torch.float32, "meta")


class Compiled(torch.nn.Module):
    """One of each operation, with the temperature in a buffer as a masked layer has it."""

    def __init__(self, dtype):
        super().__init__()
        linear = testing.linear_inputs((1,), 6, 4, dtype, mask_unit="neuron")
        conv = testing.conv_inputs((1, 4, 6), (4, 4, 3), dtype)
        for name, inputs in (("linear", linear), ("conv", conv)):
            for key in ("weight", "mask_logits", "bias"):
                self.register_parameter(f"{name}_{key}", torch.nn.Parameter(inputs[key]))
        self.register_buffer("temperature", torch.ones(()))

    def arguments(self, name):
        return {k: getattr(self, f"{name}_{k}") for k in ("weight", "mask_logits", "bias")}

    def forward(self, x):
        h = functional.masked_linear(x, temperature=self.temperature, scale=1.5, **self.arguments("linear"))
        h = functional.masked_conv(
            h.transpose(-1, -2), temperature=self.temperature, padding="same", **self.arguments("conv")
        )
        l0 = functional.materialize(self.conv_weight, self.conv_mask_logits, self.temperature)[1]
        return h.float().square().mean() + 0.1 * l0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_to_one_graph_without_recompilation(dtype):
    torch.compiler.reset()
    model = Compiled(dtype)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)

    def step(call, x):
        model.zero_grad()
        loss = call(x)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    eps = torch.finfo(dtype).eps
    step(compiled, testing.seeded_normal((3, 6, 6), 0, dtype))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, temperature in ((3, 1.0), (5, 20.0), (8, 200.0)):
            model.temperature.fill_(temperature)
            x = testing.seeded_normal((batch, 6, 6), batch, dtype)
            for got, want in zip(step(compiled, x), step(model, x), strict=True):
                torch.testing.assert_close(got, want, rtol=4 * eps, atol=4 * eps * want.abs().max().item())


def test_the_rule_itself():
    inputs = testing.linear_inputs((4,), 6, 5, torch.float32)
    oracle, plain = testing.oracle_and_budget("masked_linear", inputs, 2.0)
    testing.assert_close(plain, oracle, plain)
    for name in oracle:
        bad = {**plain, name: plain[name] * (1 + 1e-4)}
        with pytest.raises(AssertionError, match=f"^{name}: error"):
            testing.assert_close(bad, oracle, plain)
        with pytest.raises(AssertionError, match=f"^{name}: error nan"):
            testing.assert_close({**plain, name: plain[name] * math.nan}, oracle, plain)
    with pytest.raises(ValueError, match="out: expected shape"):
        testing.assert_close({**plain, "out": plain["out"][:3]}, oracle, plain)
    with pytest.raises(ValueError, match="out: expected dtype"):
        testing.assert_close({**plain, "out": plain["out"].double()}, oracle, plain)
    with pytest.raises(ValueError, match="expected the tensors"):
        testing.assert_close({"out": plain["out"]}, oracle, plain)
    with pytest.raises(ValueError, match="oracle is not finite"):
        testing.assert_close(plain, {**oracle, "dx": oracle["dx"] / 0}, plain)
    assert torch.equal(testing.seeded_logits((9, 3), 4), testing.seeded_logits((9, 3), 4))
    assert (testing.seeded_logits((9, 3), 4) == 0).any()
