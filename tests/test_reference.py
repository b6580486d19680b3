"""The specification itself: against autograd's finite differences, torch.nn, and exact decimal arithmetic."""

from __future__ import annotations

import decimal
import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from transformers.pytorch_utils import Conv1D

from csmask import reference, testing

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
UNITS = ["weight", "neuron"]

# kind of convolution: shape of x, of the weight, arguments
CONVS = {
    "conv1d": ((2, 3, 9), (4, 3, 3), {}),
    "conv1d-same-even": ((2, 2, 7), (3, 2, 4), {"padding": "same"}),
    "conv1d-circular": ((2, 2, 7), (3, 2, 3), {"padding": 2, "padding_mode": "circular"}),
    "conv1d-unbatched": ((2, 7), (3, 2, 3), {"padding": 1}),
    "conv2d": ((2, 3, 6, 5), (4, 3, 3, 2), {}),
    "conv2d-1x1": ((2, 3, 4, 4), (5, 3, 1, 1), {}),
    "conv2d-stride-padding": ((2, 2, 7, 6), (3, 2, 3, 3), {"stride": (2, 1), "padding": (1, 2)}),
    "conv2d-same": ((2, 2, 6, 6), (3, 2, 3, 3), {"padding": "same"}),
    "conv2d-same-even-dilated": ((1, 2, 7, 8), (3, 2, 2, 4), {"padding": "same", "dilation": (1, 3)}),
    "conv2d-valid": ((2, 2, 5, 5), (3, 2, 3, 3), {"padding": "valid"}),
    "conv2d-reflect": ((2, 2, 6, 6), (3, 2, 3, 3), {"padding": (1, 2), "padding_mode": "reflect"}),
    "conv2d-replicate-same-even": ((2, 2, 6, 6), (3, 2, 2, 4), {"padding": "same", "padding_mode": "replicate"}),
    "conv2d-circular-stride": ((2, 2, 6, 6), (3, 2, 3, 3), {"padding": 1, "padding_mode": "circular", "stride": 2}),
    "conv2d-dilation": ((1, 2, 9, 9), (3, 2, 3, 3), {"dilation": 2, "padding": 2}),
    "conv2d-groups": ((2, 4, 5, 5), (6, 2, 3, 3), {"groups": 2, "padding": 1}),
    "conv2d-depthwise": ((2, 4, 5, 5), (8, 1, 3, 3), {"groups": 4, "padding": 1}),
    "conv2d-unbatched": ((2, 6, 5), (3, 2, 3, 3), {"padding": 1, "padding_mode": "reflect"}),
}


def as_module(weight_shape, options):
    """The torch.nn convolution with this weight shape and these options."""
    cls = nn.Conv1d if len(weight_shape) == 3 else nn.Conv2d
    groups = options.get("groups", 1)
    return cls(weight_shape[1] * groups, weight_shape[0], weight_shape[2:], **options).double()


def gradcheck_twice(op, inputs, options):
    """gradcheck and gradgradcheck in x, weight, logits and bias at once."""
    names = [n for n, t in inputs.items() if t is not None]
    leaves = [inputs[n].requires_grad_() for n in names]
    # away from |T * S| = 15 and more, where finite differences see nothing
    temperature = torch.tensor(1.7, dtype=torch.float64)

    def fn(*tensors):
        arguments = {"bias": None, **dict(zip(names, tensors, strict=True))}
        _, l0 = reference.materialize(
            arguments["weight"], arguments["mask_logits"], temperature, scale=options.get("scale", 1.0)
        )
        return getattr(reference, op)(temperature=temperature, **arguments, **options), l0

    assert gradcheck(fn, leaves)
    assert gradgradcheck(fn, leaves)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "gpt2"])
@pytest.mark.parametrize("scale", [1.0, 1.9])
def test_linear_gradients(unit, transposed, scale):
    inputs = testing.linear_inputs((2, 3), 5, 4, torch.float64, mask_unit=unit, transposed=transposed)
    gradcheck_twice("masked_linear", testing.to_fp64(inputs), {"transposed": transposed, "scale": scale})


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", CONVS)
def test_conv_gradients(name, unit):
    x_shape, weight_shape, options = CONVS[name]
    x_shape = tuple(min(n, 2) if i < len(x_shape) - len(weight_shape) + 1 else n for i, n in enumerate(x_shape))
    inputs = testing.to_fp64(testing.conv_inputs(x_shape, weight_shape, torch.float64, mask_unit=unit))
    names = ("weight", "mask_logits")  # x and bias take torch's own path: the numbers below cover them
    leaves = [inputs[n].requires_grad_() for n in names]

    def fn(weight, mask_logits):
        return reference.masked_conv(inputs["x"], weight, mask_logits, 1.7, inputs["bias"], scale=1.3, **options)

    assert gradcheck(fn, leaves, fast_mode=True)
    assert gradgradcheck(fn, leaves, fast_mode=True)


def test_conv_gradients_in_every_entry():
    x_shape, weight_shape, options = (1, 2, 4, 4), (2, 1, 3, 3), {"groups": 2, "padding": 1, "stride": 2}
    gradcheck_twice("masked_conv", testing.to_fp64(testing.conv_inputs(x_shape, weight_shape, torch.float64)), options)


def mask_by_hand(logits, temperature, hard, scale):
    """The mask from its definition, in Python floats."""
    values = []
    for s in logits.double().flatten().tolist():
        if hard:
            values.append(scale * (s > 0))
        else:
            z = temperature * s
            values.append(scale * (1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))))
    return torch.tensor(values, dtype=torch.float64).view(logits.shape)


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "gpt2"])
def test_linear_is_the_layer_with_masked_weights(transposed, unit, hard):
    inputs = testing.to_fp64(testing.linear_inputs((2, 3), 7, 5, torch.float64, mask_unit=unit, transposed=transposed))
    mask = mask_by_hand(inputs["mask_logits"], 3.0, hard, 1.25)
    layer = Conv1D(5, 7).double() if transposed else nn.Linear(7, 5).double()
    with torch.no_grad():
        layer.weight.copy_(inputs["weight"] * mask)
        layer.bias.copy_(inputs["bias"])
    out = reference.masked_linear(temperature=3.0, hard=hard, scale=1.25, transposed=transposed, **inputs)
    torch.testing.assert_close(out, layer(inputs["x"]), rtol=1e-14, atol=1e-14)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", CONVS)
def test_conv_is_the_layer_with_masked_weights(name, unit, hard):
    x_shape, weight_shape, options = CONVS[name]
    inputs = testing.to_fp64(testing.conv_inputs(x_shape, weight_shape, torch.float64, mask_unit=unit))
    layer = as_module(weight_shape, options)
    with torch.no_grad():
        layer.weight.copy_(inputs["weight"] * mask_by_hand(inputs["mask_logits"], 3.0, hard, 1.0))
        layer.bias.copy_(inputs["bias"])
    out = reference.masked_conv(temperature=3.0, hard=hard, **inputs, **options)
    torch.testing.assert_close(out, layer(inputs["x"]), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_kept_mask_is_the_layer_bit_for_bit(dtype):
    x, logits = testing.seeded_normal((3, 4, 7, 7), 0, dtype), torch.ones(6, 2, 2, 2)
    layer = nn.Conv2d(4, 6, 2, padding="same", groups=2, dtype=dtype)
    out = reference.masked_conv(x, layer.weight, logits, 9.0, layer.bias, padding="same", groups=2, hard=True)
    assert torch.equal(out, layer(x))
    linear = nn.Linear(7, 5, dtype=dtype)
    assert torch.equal(
        reference.masked_linear(x, linear.weight, torch.ones(5, 1), 9.0, linear.bias, hard=True), linear(x)
    )


def decimal_sigmoid(z: float) -> tuple[decimal.Decimal, decimal.Decimal]:
    """sigmoid(z) and its derivative to 60 digits."""
    with decimal.localcontext(decimal.Context(prec=60)):
        e = (-decimal.Decimal(z)).exp()
        return 1 / (1 + e), e / (1 + e) ** 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 8.0, 200.0])
def test_soft_mask_and_derivative_keep_their_digits(temperature, dtype):
    products = [0.0, 1e-6, 0.1, 1.0, 4.0, 16.0, 17.0, 18.0, 25.0, 40.0, 60.0, 80.0]
    logits = torch.tensor([sign * p / temperature for p in products for sign in (1, -1)], dtype=dtype).requires_grad_()
    mask = reference.soft_mask(logits, temperature, scale=1.5)
    (slope,) = torch.autograd.grad(mask.sum(), logits)
    eps = torch.finfo(dtype).eps
    for i, s in enumerate(logits.tolist()):  # the exact value of the fp32 number
        value, derivative = decimal_sigmoid(temperature * s)
        # one rounding of z = T * S is worth eps / 2 * |z| in exp(z)
        rtol = (4 + temperature * abs(s)) * eps
        assert mask[i].item() == pytest.approx(1.5 * float(value), rel=rtol, abs=0)
        assert slope[i].item() == pytest.approx(1.5 * temperature * float(derivative), rel=rtol, abs=0)
        assert slope[i] > 0
    assert torch.equal(slope, reference.soft_mask_derivative(logits.detach(), temperature, scale=1.5))


def test_soft_mask_far_out_is_finite():
    logits = torch.tensor([1e4, -1e4, 3e38, -3e38, math.inf, -math.inf], requires_grad=True)
    mask = reference.soft_mask(logits, 200.0)
    assert mask.tolist() == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    (slope,) = torch.autograd.grad(mask.sum(), logits)
    assert slope.tolist() == [0.0] * 6


@pytest.mark.parametrize("dtype", FLOATS)
def test_hard_mask_selects(dtype):
    nan, inf = math.nan, math.inf
    weight = torch.tensor([nan, inf, -inf, nan, inf, -2.0, -0.0, 3.0, 3.0, 3.0], dtype=dtype)
    logits = torch.tensor([1.0, 1.0, 1.0, 0.0, -1.0, -0.0, -1.0, 1e-40, nan, inf])
    out, l0 = reference.materialize(weight, logits, 5.0, hard=True)
    want = torch.tensor([nan, inf, -inf, 0, 0, 0, 0, 3, 0, 3], dtype=dtype)
    assert out.dtype == dtype
    assert torch.equal(out.nan_to_num(77.0), want.nan_to_num(77.0))
    assert not out[3:7].signbit().any()
    assert l0 == 5  # S == 0 and NaN are pruned, a denormal is kept
    dweight = torch.autograd.grad(
        reference.materialize(weight.requires_grad_(), logits, 5.0, hard=True)[0].sum(), weight
    )[0]
    assert dweight.tolist() == [1, 1, 1, 0, 0, 0, 0, 1, 0, 1]


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_float_dtype_is_rounded_once(dtype):
    weight = testing.seeded_normal((33, 17), 0, dtype)
    logits = testing.seeded_logits((33, 17), 1)
    out, l0 = reference.materialize(weight, logits, 2.0)
    exact = weight.double() * mask_by_hand(logits, 2.0, False, 1.0)
    eps = torch.finfo(dtype).eps
    assert out.dtype == dtype
    assert l0.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # half an ulp of the result (subnormals of fp16: of its smallest number), and two fp32 roundings before it
    tolerance = (0.5 * eps + 4 * torch.finfo(torch.float32).eps) * exact.abs() + 2.0**-25
    if dtype == torch.float64:
        tolerance = 1e-6 * exact.abs()  # fp32 logits keep their value: see the next assertion
        wide, _ = reference.materialize(weight, logits.double(), 2.0)
        assert torch.equal(out, wide)
    assert ((out.double() - exact).abs() <= tolerance).all()
    cast, _ = reference.materialize(weight, logits, 2.0, dtype=torch.float32)
    assert cast.dtype == torch.float32
    assert torch.equal(cast.to(dtype), out.to(torch.float32).to(dtype))


@pytest.mark.parametrize("unit", UNITS)
def test_l0_counts_weights(unit):
    logits = testing.seeded_logits(testing.unit_shape((6, 11), unit), 0)
    weight = torch.zeros(6, 11)
    per_logit = {"weight": 1, "neuron": 11}[unit]
    assert reference.weights_per_logit(weight, logits) == per_logit
    for hard in (False, True):
        want = mask_by_hand(logits, 3.0, hard, 1.5).sum().item() * per_logit
        assert reference.l0(logits, 3.0, hard, 1.5, per_logit).item() == pytest.approx(want, rel=1e-6)
        assert reference.materialize(weight, logits, 3.0, hard, 1.5)[1].item() == pytest.approx(want, rel=1e-6)
    assert reference.l0(torch.ones(1000), 1.0, hard=True) == 1000


def test_logits_grad_is_the_chain_rule():
    for unit, scale in (("weight", 1.0), ("neuron", 1.7)):
        weight = testing.seeded_normal((5, 3, 2), 0, torch.float64)
        logits = testing.seeded_logits(testing.unit_shape((5, 3, 2), unit), 1, torch.float64).requires_grad_()
        dmasked_weight = testing.seeded_normal((5, 3, 2), 2, torch.float64)
        masked_weight, l0 = reference.materialize(weight, logits, 2.0, scale=scale)
        dl0 = torch.tensor(0.3, dtype=torch.float64)
        want = torch.autograd.grad([masked_weight, l0], logits, [dmasked_weight, dl0])[0]
        got = reference.logits_grad(dmasked_weight, weight, logits.detach(), 2.0, dl0, scale)
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-15)
        without_l0 = torch.autograd.grad(
            reference.materialize(weight, logits, 2.0, scale=scale)[0], logits, dmasked_weight
        )
        got = reference.logits_grad(dmasked_weight, weight, logits.detach(), 2.0, None, scale)
        torch.testing.assert_close(got, without_l0[0], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    "temperature", [2, 2.0, torch.tensor(2.0), torch.tensor(2.0, dtype=torch.float64), torch.tensor(2)]
)
def test_temperature_may_be_a_number_or_a_0d_tensor(temperature):
    logits = testing.seeded_logits((9,), 0)
    assert torch.equal(reference.soft_mask(logits, temperature), reference.soft_mask(logits, 2.0))


@pytest.mark.parametrize(
    ("padding", "mode"),
    [("full", "zeros"), ((1, 2, 3), "zeros"), (1, "mirror"), (-1, "zeros"), ("same ", "reflect")],
)
def test_padding_that_does_not_exist(padding, mode):
    x, weight = torch.ones(1, 1, 5, 5), torch.ones(1, 1, 3, 3)
    with pytest.raises(ValueError, match="padding"):
        reference.masked_conv(x, weight, weight, 1.0, padding=padding, padding_mode=mode)


def test_same_padding_with_a_stride_is_refused_as_in_torch():
    x, weight = torch.ones(1, 1, 5, 5), torch.ones(1, 1, 3, 3)
    with pytest.raises(ValueError, match="padding='same' is not supported for strided convolutions"):
        reference.masked_conv(x, weight, weight, 1.0, padding="same", stride=(1, 2))


def test_geometry_of_one_number_in_a_tuple_is_repeated_as_in_torch():
    x, layer = testing.seeded_normal((2, 3, 8, 8), 0), nn.Conv2d(3, 4, 3)
    logits = torch.ones(4, 3, 3, 3)
    arguments = {"stride": (2,), "padding": (1,), "dilation": (2,)}
    want = nn.functional.conv2d(x, layer.weight, layer.bias, **arguments)
    assert torch.equal(reference.masked_conv(x, layer.weight, logits, 1.0, layer.bias, hard=True, **arguments), want)


def test_mask_sums_count_weights():
    logits = torch.tensor([2.0, 2.5, -2.0, -1.999, 0.0, -0.0, 1e-40, math.nan, math.inf, -math.inf])
    l0, counts = reference.mask_sums(logits.nan_to_num(0.0), 2.0, scale=1.5, weights_per_logit=7)
    assert l0 == reference.l0(logits.nan_to_num(0.0), 2.0, False, 1.5, 7)
    l0, counts = reference.mask_sums(logits, 2.0, hard=True, weights_per_logit=7)
    assert l0 == 7 * 4
    assert counts.dtype == torch.int64
    # |T * S| of exactly 4 is decided, a NaN is neither kept nor undecided
    assert counts.tolist() == [7 * 4, 7 * 4]
    half, wide = torch.tensor([0.1, -3.0]).half(), torch.tensor([0.1, -3.0], dtype=torch.float64)
    assert reference.mask_sums(half, torch.tensor(1.0, dtype=torch.float64))[0].dtype == torch.float32
    assert reference.mask_sums(wide, 1.0)[0] == reference.l0(wide, 1.0)
    assert reference.mask_sums(torch.empty(0, 5), 1.0)[1].tolist() == [0, 0]


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "gpt2"])
def test_scale_neurons_is_the_linear_layer_with_masked_units(transposed, hard):
    inputs = testing.linear_inputs((2, 3), 7, 5, torch.float64, mask_unit="neuron", transposed=transposed)
    inputs = testing.to_fp64(inputs)
    want = reference.masked_linear(temperature=3.0, hard=hard, scale=1.25, transposed=transposed, **inputs)
    z = reference.apply_linear(inputs["x"], inputs["weight"], None, transposed)
    got = reference.scale_neurons(z, inputs["mask_logits"].flatten(), 3.0, inputs["bias"], hard, 1.25)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


def test_scale_neurons_is_the_convolution_with_masked_filters():
    inputs = testing.to_fp64(testing.conv_inputs((2, 3, 6, 5), (4, 3, 3, 2), torch.float64, mask_unit="neuron"))
    want = reference.masked_conv(temperature=3.0, padding=1, **inputs)
    z = nn.functional.conv2d(inputs["x"], inputs["weight"], padding=1)
    got = reference.scale_neurons(z, inputs["mask_logits"].flatten(), 3.0, inputs["bias"], dim=1)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_scale_neurons_gradients(dim):
    z = testing.seeded_normal((2, 3, 4), 0, torch.float64).requires_grad_()
    units = z.shape[dim]
    logits = testing.seeded_normal((units,), 1, torch.float64).requires_grad_()
    bias = testing.seeded_normal((units,), 2, torch.float64).requires_grad_()

    def fn(z, logits, bias):
        return reference.scale_neurons(z, logits, 1.7, bias, False, 1.3, dim)

    assert gradcheck(fn, (z, logits, bias))
    assert gradgradcheck(fn, (z, logits, bias))


@pytest.mark.parametrize("dtype", FLOATS)
def test_scale_neurons_selects(dtype):
    z = torch.tensor([[math.nan, math.inf, -2.0, -0.0, 3.0], [1.0, -math.inf, math.nan, -5.0, math.inf]], dtype=dtype)
    logits = torch.tensor([-1.0, 0.0, math.nan, -0.0, 1e-40])
    out = reference.scale_neurons(z, logits, 5.0, None, True)
    assert out.dtype == dtype
    assert out.tolist() == [[0, 0, 0, 0, 3], [0, 0, 0, 0, math.inf]]
    assert not out.signbit().any()
    bias = torch.arange(1.0, 6.0).to(dtype)
    assert reference.scale_neurons(z, logits, 5.0, bias, True)[0].tolist() == [1, 2, 3, 4, 8]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scale_neurons_rounds_the_sum_with_the_bias_once(dtype):
    """``0.75 * (1 + eps)`` lies between two numbers of the dtype; less 0.75, it is one."""
    eps = torch.finfo(dtype).eps
    z, bias = torch.tensor([1 + eps], dtype=dtype), torch.tensor([-0.75], dtype=dtype)
    assert reference.scale_neurons(z, torch.zeros(1), 1.0, bias, scale=1.5).item() == 0.75 * eps


BIT_SHAPES = [(), (0,), (3, 0), (1,), (31,), (32,), (33,), (7, 13), (2, 3, 5, 7), (64, 32)]


@pytest.mark.parametrize("shape", BIT_SHAPES)
def test_packed_mask_is_the_bits_in_order(shape):
    logits = testing.seeded_logits(shape, 0)
    bits = reference.pack_mask(logits)
    n = logits.numel()
    assert bits.dtype == torch.int32
    assert bits.shape == ((n + 31) // 32,)
    # as a Python integer, the words one after the other are the mask read from its last entry to its first
    as_integer = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(bits.tolist()))
    assert as_integer == sum(int(s > 0) << i for i, s in enumerate(logits.flatten().tolist()))
    kept = reference.unpack_mask(bits, shape)
    assert kept.dtype == torch.bool
    assert torch.equal(kept, logits > 0)
    count = reference.popcount(bits)
    assert (count.dtype, count.shape) == (torch.int64, ())
    assert count == (logits > 0).sum()


def test_packed_mask_of_edge_values_and_strides():
    assert reference.pack_mask(torch.ones(32)).tolist() == [-1]
    assert reference.popcount(torch.full((3,), -1, dtype=torch.int32)) == 96
    special = torch.tensor([math.nan, 0.0, -0.0, 1e-40, math.inf, -math.inf])
    assert reference.pack_mask(special).tolist() == [0b011000]
    logits = testing.seeded_logits((11, 6), 1)
    assert torch.equal(reference.pack_mask(logits.t()), reference.pack_mask(logits.t().contiguous()))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_apply_bitmask_is_the_hard_mask(scale, dtype):
    weight, logits = testing.seeded_normal((9, 11), 0, dtype), testing.seeded_logits((9, 11), 1)
    weight[logits <= 0] = math.inf
    want, _ = reference.materialize(weight, logits, 1.0, True, scale)
    assert torch.equal(reference.apply_bitmask(weight, reference.pack_mask(logits), scale), want)
    assert torch.equal(
        reference.apply_bitmask(weight.t(), reference.pack_mask(logits.t()), scale, torch.float64),
        reference.materialize(weight.t(), logits.t(), 1.0, True, scale, torch.float64)[0],
    )
