"""The kernels of ``materialize``, ``mask_sums`` and ``logits_grad`` against the reference: every layout and branch."""

from __future__ import annotations

import math

import pytest
import torch
from csmask_kernels import logits_grad as grad_kernel
from csmask_kernels import materialize as kernel
from csmask_kernels.launch import ElementwiseConfig

from csmask import reference, testing

BLOCK = 64  # small, so that tiny tensors have several programs
SMALL = ElementwiseConfig(block=BLOCK, num_warps=1)
GUARD = 5  # elements before and behind every tensor; odd, so that none is aligned


def normal(*shape):
    return testing.seeded_normal(shape, 0)


def channels_last(*shape):
    return normal(*shape).contiguous(memory_format=torch.channels_last)


def every_other(*shape):
    """A view of as many strides as dimensions: no two of them merge."""
    return normal(*(2 * n for n in shape))[tuple(slice(None, None, 2) for _ in shape)]


# name: a tensor in the layout of the weight (and of the logits, where no other follows)
LAYOUTS = {
    "one": (normal(1),),
    "prime": (normal(131),),
    "block-1": (normal(BLOCK - 1),),
    "block": (normal(BLOCK),),
    "block+1": (normal(BLOCK + 1),),
    "matrix": (normal(13, 29),),
    "columns-beyond-a-block": (normal(2, 2 * BLOCK + 1)[:, :-1], normal(2, 2 * BLOCK)),
    "rows-beyond-a-block": (normal(2 * BLOCK + 1, 3)[:, :2], normal(2 * BLOCK + 1, 2)),
    "gpt2-weight-transposed": (normal(29, 13).t(), normal(13, 29)),
    "logits-transposed": (normal(13, 29), normal(29, 13).t()),
    "both-transposed": (normal(29, 13).t(), normal(29, 13).t()),
    "strided-rows": (normal(13, 40)[:, :29], normal(13, 29)),
    "strided-columns": (normal(13, 29), normal(13, 58)[:, ::2]),
    "strided-vector": (normal(262)[::2], normal(131)),
    "unaligned-slice": (normal(132)[1:], normal(134)[3:]),
    "conv1d": (normal(7, 5, 3), normal(7, 5, 3)),
    "channels-last": (channels_last(5, 4, 3, 2), normal(5, 4, 3, 2)),
    "both-channels-last": (channels_last(5, 4, 3, 2), channels_last(5, 4, 3, 2)),
    "three-strides": (every_other(3, 5, 7), normal(3, 5, 7)),
    "copied": (every_other(2, 3, 4, 5), normal(5, 2, 4, 3).permute(1, 3, 2, 0)),
    "copied-logits": (normal(2, 3, 4, 5), every_other(2, 3, 4, 5)),
    "empty": (torch.empty(0),),
    "no-rows": (torch.empty(0, 5),),
    "no-columns": (torch.empty(5, 0),),
}
# name: the weight's layout, and the shape of its logits: one per unit
UNITS = {
    "linear": (normal(13, 29), (13, 1)),
    "linear-transposed-weight": (normal(29, 13).t(), (13, 1)),
    "gpt2": (normal(29, 13), (1, 13)),
    "gpt2-transposed-weight": (normal(13, 29).t(), (1, 13)),
    "units-beyond-a-block": (normal(3, BLOCK + 1), (1, BLOCK + 1)),
    "sums-beyond-a-block": (normal(3, 2 * BLOCK + 1), (3, 1)),
    "middle": (normal(3, 5, 7), (1, 5, 1)),
    "middle-behind-one": (normal(1, 5, 7), (1, 5, 1)),
    "last-of-three": (normal(3, 5, 7), (1, 1, 7)),
    "filters": (normal(5, 4, 3, 2), (5, 1, 1, 1)),
    "filters-channels-last": (channels_last(5, 4, 3, 2), (5, 1, 1, 1)),
    "middle-copied": (every_other(2, 3, 4, 5), (1, 3, 1, 1)),
    "one-unit": (normal(1, 29), (1, 1)),
    "one-unit-gpt2": (normal(29, 1), (1, 1)),
    "one-input": (normal(29, 1, 1), (29, 1, 1)),
    "one-logit-for-all": (normal(13, 29), (1, 1)),
    "no-units": (torch.empty(0, 5), (0, 1)),
    "no-weights": (torch.empty(5, 0), (5, 1)),
}
# name: hard, scale
MASKS = {"soft": (False, 1.0), "soft-scaled": (False, 1.7), "hard": (True, 1.0), "hard-scaled": (True, 1.7)}


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    """Fresh memory holds garbage, so that what nobody writes shows; around it lies more, which nobody may write."""
    allocated = []
    empty = torch.empty

    def fresh(like):
        spans = [(n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True)]
        garbage = math.nan if like.is_floating_point() else -(2**20) - 3
        buffer = empty(sum(spans) + 1 + 2 * GUARD if like.numel() else 2 * GUARD, dtype=like.dtype).fill_(garbage)
        allocated.append(buffer)
        return buffer.as_strided(like.shape, like.stride(), GUARD)

    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, _new=allocate, **kwargs: fresh(_new(*args, **kwargs)))
    yield
    monkeypatch.undo()
    for buffer in allocated:
        around = torch.cat([buffer[:GUARD], buffer[-GUARD:]])
        assert torch.equal(around.isnan() | (around == -(2**20) - 3), torch.ones(2 * GUARD, dtype=torch.bool))


def laid_out(values, layout):
    """The values in the layout of a tensor of their shape, gaps and all."""
    spans = [(n - 1) * s for n, s in zip(layout.shape, layout.stride(), strict=True)]
    offset = layout.storage_offset()
    buffer = torch.zeros(offset + sum(spans) + 1 if layout.numel() else offset, dtype=values.dtype)
    return buffer.as_strided(layout.shape, layout.stride(), offset).copy_(values)


def inputs_of(weight, logits, dtype=torch.float32):
    """Seeded ``dmasked_weight``, ``weight`` and ``mask_logits`` in given layouts; logits as a shape: contiguous."""
    shape = tuple(weight.shape)
    logits_shape = logits if isinstance(logits, tuple) else tuple(logits.shape)
    values = testing.seeded_logits(logits_shape, 2)
    return {
        "dmasked_weight": laid_out(testing.seeded_normal(shape, 3, dtype), weight),
        "weight": laid_out(testing.seeded_normal(shape, 1, dtype), weight),
        "mask_logits": values if isinstance(logits, tuple) else laid_out(values, logits),
    }


CASES = {**{n: (pair[0], pair[-1]) for n, pair in LAYOUTS.items()}, **{f"unit-{n}": pair for n, pair in UNITS.items()}}
layouts = pytest.mark.parametrize(("weight", "logits"), CASES.values(), ids=CASES)
masks = pytest.mark.parametrize(("hard", "scale"), MASKS.values(), ids=MASKS)
temperatures = pytest.mark.parametrize("temperature", [1.0, 200.0])


def check_materialize(inputs, temperature, hard, scale, dtype=None):
    weight, logits = inputs["weight"], inputs["mask_logits"]
    t = torch.tensor(temperature)
    out, l0, counts = kernel.materialize(weight, logits, t, hard, scale, dtype, counts=True, config=SMALL)
    mask = (temperature, hard, scale)
    oracle = reference.materialize(weight.double(), logits.double(), *mask)
    plain = reference.materialize(weight, logits, *mask, dtype)
    names = ("out", "l0")
    testing.assert_close(*(dict(zip(names, pair, strict=True)) for pair in ((out, l0), oracle, plain)))
    assert out.stride() == torch.empty_like(weight).stride()
    per_logit = reference.weights_per_logit(weight, logits)
    assert torch.equal(counts, reference.mask_sums(logits, temperature, hard, scale, per_logit)[1])
    out_alone, l0_alone, none = kernel.materialize(weight, logits, t, hard, scale, dtype, config=SMALL)
    assert torch.equal(out_alone, out)
    assert torch.equal(l0_alone, l0)
    assert (none.dtype, none.numel()) == (torch.int64, 0)


@temperatures
@masks
@layouts
def test_materialize(weight, logits, hard, scale, temperature):
    check_materialize(inputs_of(weight, logits), temperature, hard, scale)


@masks
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32])
def test_materialize_dtypes(weight_dtype, dtype, hard, scale):
    inputs = inputs_of(normal(29, 13).t(), normal(13, 29), weight_dtype)
    check_materialize(inputs, 1.0, hard, scale, dtype)


@temperatures
@masks
@pytest.mark.parametrize("name", ["one", "prime", "matrix", "strided-columns", "both-transposed", "copied", "no-rows"])
def test_mask_sums(name, hard, scale, temperature):
    logits = inputs_of(*(LAYOUTS[name][-1],) * 2)["mask_logits"]
    arguments = (logits, torch.tensor(temperature), hard, scale, 3)
    l0, counts = kernel.mask_sums(*arguments, config=SMALL)
    expected = [reference.mask_sums(s, temperature, hard, scale, 3) for s in (logits.double(), logits)]
    testing.assert_close({"l0": l0}, *({"l0": pair[0]} for pair in expected))
    assert torch.equal(counts, expected[1][1])
    l0_alone, none = kernel.mask_sums(*arguments, counts=False, config=SMALL)
    assert torch.equal(l0_alone, l0)
    assert none.numel() == 0


def test_mask_sums_of_expanded_logits():
    logits = testing.seeded_logits((13, 1), 2).expand(13, 29)
    l0, counts = kernel.mask_sums(logits, torch.tensor(1.0), True, 1.0, 1, config=SMALL)
    assert float(l0) == int(counts[0]) == int((logits > 0).sum())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy, at inf * 0
@pytest.mark.parametrize("scale", [1.0, 1.7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_hard_mask_selects(dtype, scale):
    """Pruned: +0 whatever the weight; kept: the weight, the sign of -0 included. 0, -0, -inf and NaN are pruned."""
    weight = torch.tensor([math.inf, -math.inf, math.nan, -3.0, -0.0, 2.0**-24, 1.25], dtype=dtype)
    logits = torch.tensor([0.0, -0.0, -1.0, -math.inf, math.nan, 1e-30, math.inf])
    w, s = weight.repeat_interleave(len(logits)), logits.repeat(len(weight))
    out, l0, counts = kernel.materialize(w, s, torch.tensor(200.0), True, scale, counts=True, config=SMALL)
    kept = s > 0
    expected = torch.where(kept, w if scale == 1.0 else (w.float() * scale).to(dtype), torch.zeros_like(w))
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(out.signbit() & ~out.isnan(), expected.signbit() & ~expected.isnan())
    assert float(l0) == pytest.approx(scale * int(kept.sum()), rel=1e-6)
    # undecided: 0, -0 and 1e-30
    assert counts.tolist() == [int(kept.sum()), 3 * len(weight)]


def test_nan_logits_stay_nan_in_a_soft_mask():
    logits = torch.tensor([math.nan, 1.0])
    out, l0, counts = kernel.materialize(torch.ones(2), logits, torch.tensor(1.0), False, 1.0, counts=True)
    assert out.isnan().tolist() == [True, False]
    assert l0.isnan()
    assert counts.tolist() == [1, 1]
    grad = grad_kernel.logits_grad(torch.ones(2), torch.ones(2), logits, torch.tensor(1.0), None, 1.0)
    assert grad.isnan().tolist() == [True, False]


@pytest.mark.parametrize("shape", [(BLOCK - 1,), (BLOCK + 1,), (3, 5), (2, BLOCK + 1)])
def test_what_hangs_over_does_not_count(shape):
    """A logit of 0 has a mask of exactly 1/2 and is undecided: sums of entries that are not there would show."""
    weight, logits = torch.ones(shape), torch.zeros(shape)
    out, l0, counts = kernel.materialize(weight, logits, torch.tensor(200.0), False, 1.0, counts=True, config=SMALL)
    assert torch.equal(out, torch.full(shape, 0.5))
    assert float(l0) == weight.numel() / 2
    assert counts.tolist() == [0, weight.numel()]


def check_logits_grad(inputs, temperature, scale, dl0, config=SMALL):
    """Writes, adds to a gradient in the logits' layout and in others; against the reference."""
    t, logits = torch.tensor(temperature), inputs["mask_logits"]
    got = grad_kernel.logits_grad(**inputs, temperature=t, dl0=dl0, scale=scale, config=config)
    oracle = reference.logits_grad(*(i.double() for i in inputs.values()), temperature, dl0, scale)
    plain = reference.logits_grad(*inputs.values(), temperature, dl0, scale)
    testing.assert_close({"dlogits": got}, {"dlogits": oracle}, {"dlogits": plain})
    assert got.stride() == torch.empty_like(logits).stride()
    before = testing.seeded_normal(tuple(logits.shape), 4)
    axes = tuple(range(before.dim()))[::-1]
    gradients = {
        "like the logits": laid_out(before, logits),
        "reversed": before.permute(axes).clone(memory_format=torch.contiguous_format).permute(axes),
        "strided": every_other(*before.shape).copy_(before),
    }
    for name, dlogits in gradients.items():
        grad_kernel.logits_grad_(dlogits, **inputs, temperature=t, dl0=dl0, scale=scale, config=config)
        testing.assert_close({name: dlogits}, {name: before.double() + oracle}, {name: before + plain})


@pytest.mark.parametrize("dl0", [None, torch.tensor(0.75)], ids=["", "dl0"])
@pytest.mark.parametrize("scale", [1.0, 1.7])
@temperatures
@layouts
def test_logits_grad(weight, logits, temperature, scale, dl0):
    check_logits_grad(inputs_of(weight, logits), temperature, scale, dl0)


@pytest.mark.parametrize("name", ["prime", "gpt2-weight-transposed", "unit-linear", "unit-gpt2"])
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float16), (torch.float16, torch.float32)])
def test_logits_grad_dtypes(name, dtypes):
    inputs = inputs_of(*CASES[name])
    inputs["dmasked_weight"], inputs["weight"] = inputs["dmasked_weight"].to(dtypes[0]), inputs["weight"].to(dtypes[1])
    check_logits_grad(inputs, 1.0, 1.0, torch.tensor(0.75, dtype=torch.float16))


def test_logits_grad_of_layouts_that_all_differ():
    inputs = inputs_of(normal(13, 29), normal(13, 29))
    inputs["weight"] = laid_out(inputs["weight"], normal(29, 13).t())
    inputs["dmasked_weight"] = laid_out(inputs["dmasked_weight"], normal(13, 58)[:, ::2])
    check_logits_grad(inputs, 1.0, 1.0, None)
    inputs = inputs_of(normal(2, 3, 4, 5), normal(2, 3, 4, 5))
    inputs["weight"] = laid_out(inputs["weight"], normal(5, 4, 3, 2).permute(3, 2, 1, 0))
    inputs["dmasked_weight"] = laid_out(inputs["dmasked_weight"], channels_last(2, 3, 4, 5))
    check_logits_grad(inputs, 1.0, 1.0, torch.tensor(0.75))


@pytest.mark.parametrize("unit", [False, True], ids=["weight", "neuron"])
def test_derivative_lives_where_the_sigmoid_saturates(unit):
    """``m * (1 - m)`` in fp32 is exactly 0 from ``T * S = 17``; the kernel keeps full relative precision to 80."""
    logits = torch.tensor([17.0, -17.0, 30.0, -30.0, 80.0, -80.0]).view(-1, 1) / 10
    weight = torch.ones(6, 3 if unit else 1)
    got = grad_kernel.logits_grad(weight, weight, logits, torch.tensor(10.0), None, 1.0)
    expected = reference.logits_grad(weight.double(), weight.double(), logits.double(), 10.0)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_temperature_is_read_as_fp32(dtype):
    """The results are bitwise those of the temperature rounded to fp32, whatever its own dtype."""
    temperature = torch.tensor(100.0 / 3.0, dtype=dtype)
    inputs = inputs_of(normal(131), normal(131))
    weight, logits = inputs["weight"], inputs["mask_logits"] / 100
    for ours, theirs in zip(
        kernel.materialize(weight, logits, temperature, False, 1.0, counts=True, config=SMALL),
        kernel.materialize(weight, logits, temperature.float(), False, 1.0, counts=True, config=SMALL),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    ours, theirs = (
        grad_kernel.logits_grad(weight, weight, logits, t, None, 1.0, config=SMALL)
        for t in (temperature, temperature.float())
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["prime", "gpt2-weight-transposed", "unit-linear", "unit-gpt2"])
def test_repeats_bitwise(name):
    inputs = inputs_of(*CASES[name])
    t, dl0 = torch.tensor(1.0), torch.tensor(0.75)

    def run():
        made = kernel.materialize(inputs["weight"], inputs["mask_logits"], t, False, 1.7, counts=True, config=SMALL)
        sums = kernel.mask_sums(inputs["mask_logits"], t, False, 1.7, 1, config=SMALL)
        return *made, *sums, grad_kernel.logits_grad(**inputs, temperature=t, dl0=dl0, scale=1.7, config=SMALL)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_default_configs_run():
    inputs = inputs_of(normal(70, 67).t(), normal(67, 70))
    check_logits_grad(inputs, 1.0, 1.0, None, config=None)
    out, _, _ = kernel.materialize(inputs["weight"], inputs["mask_logits"], torch.tensor(1.0), True, 1.0)
    assert torch.equal(out, inputs["weight"] * (inputs["mask_logits"] > 0))


def test_inputs_are_left_alone():
    inputs = inputs_of(*CASES["copied"])
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    kernel.materialize(inputs["weight"], inputs["mask_logits"], torch.tensor(1.0), False, 1.0, config=SMALL)
    grad_kernel.logits_grad(**inputs, temperature=torch.tensor(1.0), dl0=None, scale=1.0, config=SMALL)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


def test_unsupported_dtypes_are_refused():
    w, s, t = torch.ones(3), torch.zeros(3), torch.tensor(1.0)
    calls = {
        "weight": lambda: kernel.materialize(w.double(), s, t, False, 1.0),
        "mask_logits": lambda: kernel.materialize(w, s.double(), t, False, 1.0),
        "masked_weight": lambda: kernel.materialize(w, s, t, False, 1.0, torch.float64),
        "mask_logits ": lambda: kernel.mask_sums(s.double(), t, False, 1.0, 1),
        "dmasked_weight": lambda: grad_kernel.logits_grad(w.double(), w, s, t, None, 1.0),
        "dlogits": lambda: grad_kernel.logits_grad_(s.double(), w, w, s, t, None, 1.0),
    }
    for name, call in calls.items():
        with pytest.raises(NotImplementedError, match=rf"take {name.strip()} in float32, float16 or bfloat16, got"):
            call()
