"""The C++ kernels with one logit per unit, forward, backward and for shared weights, against fp64 oracles made here."""

from __future__ import annotations

import math

import pytest
import torch

from csmask import _cpp, _cpp_units, testing

_cpu = pytest.importorskip("csmask_kernels._cpu", reason="the C++ back end is not built")

BLOCK = 2048  # elements per block
TILE_UNITS = 1024  # units per tile of the sums where there are few rows
TILE = 32768  # elements per tile of the sums
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(*shape):
    return normal(*shape).to(memory_format=torch.channels_last)


# name: z and the dimension of its units
LAYOUTS = {
    "one": (normal(1, 1), 1),
    "vector": (normal(19), 0),
    "one-row": (normal(1, 2 * TILE_UNITS + 1), 1),
    "one-unit": (normal(3 * BLOCK + 1, 1), 1),
    "rows-shorter-than-a-lane": (normal(1009, 7), 1),
    "block-1": (normal(3, BLOCK - 1), 1),
    "block": (normal(3, BLOCK), 1),
    "block+1": (normal(3, BLOCK + 1), 1),
    "tile-1": (normal(5, TILE_UNITS - 1), 1),
    "tile+1": (normal(5, TILE_UNITS + 1), 1),
    "tiles-both-ways": (normal(70, TILE_UNITS + 1), 1),
    "rows-too-many-to-cut": (normal(257, TILE_UNITS + 1), 1),
    "many-rows": (normal(TILE // 61 * 3 + 1, 61), 1),  # more than three tiles of rows
    "more-rows-than-64-tiles": (normal(70 * TILE // 512 + 1, 512), 1),
    "sequences": (normal(2, 5, 19), 2),
    "units-first": (normal(7, 40, 6), 0),
    "conv1d": (normal(3, 5, 701), 1),
    "conv1d-one-lane-of-sums": (normal(3, 5, 256), 1),
    "conv1d-inner-longer-than-a-tile": (normal(2, 3, TILE + 1), 1),
    "conv1d-two-units-per-tile": (normal(2, 5, TILE // 2 - 1), 1),
    "channels-first": (normal(9, 50, 7, 9), 1),
    "channels-last": (images(9, 50, 7, 9), 1),
    "one-pixel": (normal(9, 50, 1, 1), 1),
    "transposed": (normal(190, 37).t(), 1),
    "every-other-unit": (normal(11, 140)[:, ::2], 1),
    "cropped": (normal(3, 5, 9, 9)[:, 1:, 1:8, 2:9], 1),
    "expanded": (normal(1, 37).expand(9, 37), 1),
    "no-rows": (torch.empty(0, 5), 1),
    "no-units": (torch.empty(5, 0), 1),
    "no-pixels": (torch.empty(2, 5, 0), 1),
}
SMALL = [name for name, (z, _) in LAYOUTS.items() if z.numel() < 20_000]
# Those with work for several threads, cut along units, rows or both.
SEVERAL_TILES = [
    "one-row", "tiles-both-ways", "rows-too-many-to-cut", "many-rows", "more-rows-than-64-tiles", "channels-first",
    "channels-last", "conv1d-two-units-per-tile",
]  # fmt: skip
# name: hard, scale, bias
MASKS = {
    "soft": (False, 1.0, False),
    "soft-scaled-bias": (False, 1.7, True),
    "hard": (True, 1.0, False),
    "hard-scaled-bias": (True, 1.7, True),
}


@pytest.fixture(params=_cpu.instruction_sets())
def isa(request):
    """Runs the test once per instruction set that this CPU has."""
    before = _cpu.instruction_set()
    _cpu.force_instruction_set(request.param)
    yield request.param
    _cpu.force_instruction_set(before)


def along(vector, z, dim):
    return vector.view([-1 if d == dim else 1 for d in range(z.dim())])


def formulas(z, dout, logits, bias, temperature, hard, scale, dim, dl0, compute):
    """``out``, ``dz``, ``dlogits`` with arithmetic in `compute`: fp64 is the oracle, fp32 rounded gives the budget."""
    zc, doutc, s = z.to(compute), dout.to(compute), logits.to(compute)
    mask = (s > 0).to(compute) * scale if hard else torch.sigmoid(temperature * s) * scale
    mask, keeps = along(mask, z, dim), along(s > 0, z, dim)
    out, dz = (torch.where(keeps, t * scale, 0) if hard else t * mask for t in (zc, doutc))
    if bias is not None:
        out = out + along(bias.to(compute), z, dim)
    sums = (zc * doutc).transpose(0, dim).reshape(z.shape[dim], -1).sum(1) if z.numel() else torch.zeros_like(s)
    e = torch.exp(-(temperature * s).abs())
    dlogits = torch.zeros_like(s) if hard else (sums + dl0) * scale * temperature * e / (1 + e) ** 2
    if compute == torch.float64:
        return {"out": out, "dz": dz, "dlogits": dlogits}
    return {"out": out.to(z.dtype), "dz": dz.to(z.dtype), "dlogits": dlogits}


def poisoned(like, dtype=None):
    return torch.empty_like(like, dtype=dtype or like.dtype).fill_(math.nan)


def forward(z, logits, temperature, bias, hard, scale, dim, threads=1, stream=None, out=None):
    out = poisoned(z) if out is None else out
    _cpu.scale_neurons(z, logits, temperature, bias, hard, scale, dim, out, threads, stream)
    return out


def backward(dout, z, logits, temperature, dl0, scale, dim, threads=1, stream=None, dz=None):
    dz, dlogits = poisoned(z) if dz is None else dz, poisoned(logits)
    _cpu.scale_neurons_grad(dout, z, logits, temperature, dl0, scale, dim, dz, dlogits, threads, stream)
    return dz, dlogits


def inputs_of(z, dim, bias=True, dtype=torch.float32):
    """z in `dtype` and in its own strides, dout, logits, bias."""
    units = z.shape[dim]
    z = _restrided(z, dtype)
    dout = torch.empty_like(z).copy_(normal(*z.shape, seed=3))
    bias = normal(units, seed=2).to(dtype) if bias else None
    return z, dout, testing.seeded_logits((units,), 1), bias


def _restrided(z, dtype):
    """The same numbers in another dtype: `to` would make a strided tensor dense."""
    if z.numel() == 0:
        return z.to(dtype)
    storage = torch.zeros(1 + sum((n - 1) * s for n, s in zip(z.shape, z.stride(), strict=True)), dtype=dtype)
    view = storage.as_strided(z.shape, z.stride())
    if 0 in z.stride():  # expanded: the first row is all there is
        view[0].copy_(z[0])
    else:
        view.copy_(z)
    return view


def check(z, dout, logits, bias, temperature, hard, scale, dim, dl0, **options):
    arguments = (z, dout, logits, bias, temperature, hard, scale, dim, dl0)
    oracle, plain = formulas(*arguments, torch.float64), formulas(*arguments, torch.float32)
    got = {"out": forward(z, logits, temperature, bias, hard, scale, dim, **options)}
    if hard:
        got["dz"], got["dlogits"] = forward(dout, logits, temperature, None, True, scale, dim), torch.zeros_like(logits)
    else:
        got["dz"], got["dlogits"] = backward(dout, z, logits, temperature, dl0, scale, dim, **options)
    testing.assert_close(got, oracle, plain)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_fp64(layout, mask):
    (z, dim), (hard, scale, bias) = LAYOUTS[layout], MASKS[mask]
    for dtype in FLOATS:
        z_, dout, logits, b = inputs_of(z, dim, bias, dtype)
        assert z_.dtype == dtype
        assert z_.stride() == z.stride()
        for temperature in (3.0, 200.0) if layout in SMALL else (3.0,):
            check(z_, dout, logits, b, temperature, hard, scale, dim, 1.75, threads=2)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("layout", SMALL)
def test_streaming_changes_nothing(layout):
    z, dim = LAYOUTS[layout]
    for dtype in FLOATS:
        z_, dout, logits, bias = inputs_of(z, dim, True, dtype)
        one, other = (forward(z_, logits, 3.0, bias, False, 1.7, dim, stream=s) for s in (False, True))
        assert torch.equal(one, other)
        one, other = (backward(dout, z_, logits, 3.0, 1.0, 1.7, dim, stream=s) for s in (False, True))
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("layout", ["channels-first", "channels-last", "conv1d", "many-rows"])
def test_every_operand_may_lie_in_another_order(layout):
    z, dim = LAYOUTS[layout]
    z, dout, logits, bias = inputs_of(z, dim)
    want = forward(z, logits, 3.0, bias, False, 1.7, dim)
    want_dz, want_dlogits = backward(dout, z, logits, 3.0, 1.0, 1.7, dim)
    turned = z.transpose(0, -1).contiguous().transpose(0, -1)
    dout_turned = dout.transpose(0, -1).contiguous().transpose(0, -1)
    for a, b in ((turned, dout), (z, dout_turned), (turned, dout_turned)):
        assert torch.equal(forward(a, logits, 3.0, bias, False, 1.7, dim, out=poisoned(b)), want)
        dz, dlogits = backward(b, a, logits, 3.0, 1.0, 1.7, dim, dz=poisoned(z))
        assert torch.equal(dz, want_dz)
        assert torch.equal(dlogits, want_dlogits)  # in the order of dz
        dz, dlogits = backward(b, a, logits, 3.0, 1.0, 1.7, dim, dz=poisoned(turned))
        assert torch.equal(dz, want_dz)
        torch.testing.assert_close(dlogits, want_dlogits, rtol=1e-5, atol=1e-4)
    # the gradient of a sum: one number for all elements
    ones = torch.ones(()).expand(z.shape)
    assert torch.equal(backward(ones, z, logits, 3.0, 1.0, 1.7, dim)[1],
                       backward(torch.ones_like(z), z, logits, 3.0, 1.0, 1.7, dim)[1])  # fmt: skip


@pytest.mark.usefixtures("isa")
def test_mixed_dtypes():
    z, dout, logits, bias = inputs_of(normal(9, 70), 1)
    for z_dtype in FLOATS:
        for other in FLOATS:
            a, b = z.to(z_dtype), dout.to(other)
            got = forward(a, logits, 3.0, bias.to(other), False, 1.7, 1, out=poisoned(z, other))
            exact = forward(a.float(), logits, 3.0, bias.to(other).float(), False, 1.7, 1)
            assert torch.equal(got, exact.to(other))  # the fp32 result, rounded once
            dz, dlogits = backward(b, a, logits, 3.0, 1.0, 1.7, 1, dz=poisoned(z, other))
            want_dz, want_dlogits = backward(b.float(), a.float(), logits, 3.0, 1.0, 1.7, 1)
            assert torch.equal(dz, want_dz.to(other))
            assert torch.equal(dlogits, want_dlogits)


@pytest.mark.usefixtures("isa")
def test_a_hard_mask_selects():
    nan, inf = math.nan, math.inf
    z = torch.tensor([[nan, inf, -inf, -2.0, -0.0, nan, 3.0, -3.0], [nan, -inf, inf, -5.0, 1.0, 1.0, inf, -7.0]])
    logits = torch.tensor([-1.0, 0.0, nan, -0.0, -5.0, -1e-40, 1e-40, inf])
    bias = torch.arange(1.0, 9.0)
    for scale in (1.0, 1.5):
        for inner in (1, 3):  # units side by side, and a value of each for several elements
            spread = z.repeat_interleave(inner, 1).view(2, 8, inner)
            out = forward(spread, logits, 5.0, None, True, scale, 1)[:, :, 0]
            assert out[:, :6].tolist() == [[0.0] * 6] * 2
            assert not out[:, :6].signbit().any()
            assert out[:, 6:].tolist() == [[3 * scale, -3 * scale], [inf, -7 * scale]]
            out = forward(spread, logits, 5.0, bias, True, scale, 1)[:, :, 0]
            assert out[0].tolist() == [1, 2, 3, 4, 5, 6, 7 + 3 * scale, 8 - 3 * scale]


@pytest.mark.usefixtures("isa")
def test_an_infinite_or_nan_element_stays_in_its_unit():
    for shape in ((5, 40), (5, 40, 21)):
        z, dout, logits, _ = inputs_of(normal(*shape), 1)
        z[3, 7], z[2, 11] = math.nan, math.inf
        dz, dlogits = backward(dout, z, logits, 3.0, 1.0, 1.0, 1)
        assert dz.isfinite().all()
        assert (~dlogits.isfinite()).nonzero().flatten().tolist() == [7, 11]


@pytest.mark.usefixtures("isa")
def test_saturated_logits_keep_the_digits_of_their_gradient():
    products = torch.tensor([0.0, 1.0, -1.0, 17.0, -17.0, 25.0, -60.0, 80.0])
    z, dout = normal(5, 8), normal(5, 8, seed=3)
    for temperature in (1.0, 200.0):
        logits = products / temperature
        _, dlogits = backward(dout, z, logits, temperature, 0.5, 1.0, 1)
        t = temperature * logits.double()
        e = torch.exp(-t.abs())
        want = ((z.double() * dout.double()).sum(0) + 0.5) * temperature * e / (1 + e) ** 2
        assert (dlogits != 0).all()
        torch.testing.assert_close(dlogits.double(), want, rtol=1e-4, atol=0)


@pytest.mark.usefixtures("isa")
def test_the_sum_with_the_bias_is_rounded_once():
    """``0.75 * (1 + 2**-10)`` lies between two fp16 numbers; less 0.75, it is one."""
    z, bias = torch.tensor([[1 + 2.0**-10]], dtype=torch.float16), torch.tensor([-0.75], dtype=torch.float16)
    assert forward(z, torch.zeros(1), 1.0, bias, False, 1.5, 1).item() == 0.75 * 2.0**-10


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("shape", [(300_007, 3), (3, 300_007), (1, 3, 300_007), (300_007, 1)])
def test_long_sums_keep_their_digits(shape):
    """One running fp32 sum of 300,007 products near 1 would be off by 1e-3 or so, relatively."""
    z = 1 + 0.01 * normal(*shape)
    dim = len(shape) - 2 if shape[-1] > 3 else 1
    logits = torch.zeros(shape[dim])
    _, dlogits = backward(z, z, logits, 1.0, 0.0, 1.0, dim, threads=2)
    want = (z.double() ** 2).sum([d for d in range(z.dim()) if d != dim]) / 4
    torch.testing.assert_close(dlogits.double(), want, rtol=3e-7, atol=0)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("layout", SEVERAL_TILES)
def test_threads_do_not_change_a_bit(layout):
    z, dim = LAYOUTS[layout]
    z, dout, logits, bias = inputs_of(z, dim)
    for hard in (False, True):
        want = forward(z, logits, 3.0, bias, hard, 1.7, dim)
        assert all(torch.equal(forward(z, logits, 3.0, bias, hard, 1.7, dim, threads=n), want) for n in (2, 3, 7, 99))
    want_dz, want_dlogits = backward(dout, z, logits, 3.0, 1.0, 1.7, dim)
    for threads in (1, 2, 2, 3, 7, 99):
        dz, dlogits = backward(dout, z, logits, 3.0, 1.0, 1.7, dim, threads=threads)
        assert torch.equal(dz, want_dz)
        assert torch.equal(dlogits, want_dlogits)


@pytest.mark.parametrize("layout", SMALL)
def test_instruction_sets_agree(layout):
    """In every bit where masks do: soft ones of a set without fused products differ in their last bits."""
    z, dim = LAYOUTS[layout]
    z, dout, logits, bias = inputs_of(z, dim)
    before, results = _cpu.instruction_set(), {}
    try:
        for name in _cpu.instruction_sets():
            _cpu.force_instruction_set(name)
            hard = forward(z, logits, 3.0, bias, True, 1.7, dim)
            at_zero = backward(dout, z, torch.zeros_like(logits), 3.0, 1.0, 1.7, dim)
            soft = forward(z, logits, 3.0, bias, False, 1.7, dim)
            results[name] = (hard, *at_zero), (soft, *backward(dout, z, logits, 3.0, 1.0, 1.7, dim))
    finally:
        _cpu.force_instruction_set(before)
    first = next(iter(results.values()))
    for name, (exact, soft) in results.items():
        assert all(torch.equal(a, b) for a, b in zip(exact, first[0], strict=True)), name
        for a, b in zip(soft, first[1], strict=True):
            assert torch.equal(a, b) if name != "baseline" else torch.allclose(a, b, rtol=1e-5, atol=1e-6), name


@pytest.mark.usefixtures("isa")
def test_vectors_may_be_strided():
    z, dout, _, _ = inputs_of(normal(7, 5), 1)
    logits, bias = testing.seeded_logits((5, 2), 1)[:, 1], normal(5, 3, seed=2)[:, 2]
    for s, b in ((logits, bias), (logits[:1].expand(5), bias[:1].expand(5))):
        for hard in (False, True):
            got = forward(z, s, 3.0, b, hard, 1.7, 1)
            assert torch.equal(got, forward(z, s.contiguous(), 3.0, b.contiguous(), hard, 1.7, 1))
        dlogits = torch.full((5, 4), 9.0)
        _cpu.scale_neurons_grad(dout, z, s, 3.0, 1.0, 1.7, 1, poisoned(z), dlogits[:, 2], 1)
        assert torch.equal(dlogits[:, 2], backward(dout, z, s.contiguous(), 3.0, 1.0, 1.7, 1)[1])
        assert (dlogits[:, [0, 1, 3]] == 9).all()


@pytest.mark.usefixtures("isa")
def test_nothing_beyond_a_slice_is_written():
    z, dout, logits, _ = inputs_of(normal(40, 61), 1)
    for stream in (False, True):
        for part in (slice(3, 64), slice(0, 61)):
            whole = torch.full((42, 70), 7.0)
            view = whole[1:41, part]
            forward(z, logits, 3.0, None, False, 1.7, 1, stream=stream, out=view)
            backward(dout, z, logits, 3.0, 1.0, 1.7, 1, stream=stream, dz=view)
            assert torch.equal(view, backward(dout, z, logits, 3.0, 1.0, 1.7, 1)[0])
            view.fill_(7.0)
            assert (whole == 7).all()


# Logits that weights share

# name: the weight and the dimension of its units
WEIGHTS = {
    "linear": (normal(37, 610), 0),
    "gpt2": (normal(610, 37), 1),
    "conv": (normal(37, 5, 3, 3), 0),
    "conv-channels-last": (images(37, 5, 3, 3), 0),
    "middle": (normal(5, 300, 7), 1),
    "transposed": (normal(610, 37).t(), 0),
    "every-other": (normal(37, 610)[:, ::2], 0),
    "one-weight-per-unit": (normal(610, 1), 0),
    "one-unit": (normal(1, 4099), 0),
    "no-inputs": (torch.empty(5, 0), 0),
    "no-units": (torch.empty(0, 5), 0),
    "several-tiles": (normal(3, 2 * TILE + 1), 0),
}


def shared(weight, dim):
    """Logits in the shape that masks the weight, 1 in every dimension but one."""
    return along(testing.seeded_logits((weight.shape[dim],), 1), weight, dim)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("name", WEIGHTS)
def test_shared_logits(name):
    weight, dim = WEIGHTS[name]
    logits = shared(weight, dim)
    dwm = torch.empty_like(weight).copy_(normal(*weight.shape, seed=3))
    dl0 = 0.25 * (weight.numel() // max(1, logits.numel()))
    for w_dtype in FLOATS:
        for d_dtype in FLOATS:
            w, d = weight.to(w_dtype), dwm.to(d_dtype)
            arguments = (w, d, logits.flatten(), None, 3.0, False, 1.7, dim, dl0)
            oracle, plain = formulas(*arguments, torch.float64), formulas(*arguments, torch.float32)
            got = {}
            for threads in (1, 2, 7):
                dlogits = poisoned(logits.flatten())
                _cpu.logits_grad_units(dlogits, d, w, logits.flatten(), dim, 3.0, dl0, 1.7, False, threads)
                assert torch.equal(got.setdefault("dlogits", dlogits), dlogits)
            testing.assert_close(got, {"dlogits": oracle["dlogits"]}, {"dlogits": plain["dlogits"]})
            added = torch.full_like(got["dlogits"], 0.5)
            _cpu.logits_grad_units(added, d, w, logits.flatten(), dim, 3.0, dl0, 1.7, True, 1)
            assert torch.equal(added, 0.5 + got["dlogits"])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("name", ["linear", "gpt2", "conv", "middle"])
def test_shared_logits_of_a_gradient_in_another_order(name):
    weight, dim = WEIGHTS[name]
    logits, dwm = shared(weight, dim).flatten(), normal(*weight.shape, seed=3)
    turned = dwm.transpose(0, -1).contiguous().transpose(0, -1)
    want, got = poisoned(logits), poisoned(logits)
    _cpu.logits_grad_units(want, dwm, weight, logits, dim, 3.0, 1.0, 1.7, False, 1)
    _cpu.logits_grad_units(got, turned, weight, logits, dim, 3.0, 1.0, 1.7, False, 1)
    assert torch.equal(got, want)  # in the order of the weight


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_operator_with_shared_logits(name, monkeypatch):
    weight, dim = WEIGHTS[name]
    logits = shared(weight, dim)
    dwm = torch.empty_like(weight).copy_(normal(*weight.shape, seed=3))
    temperature, dl0 = torch.tensor(3.0), torch.tensor(0.25)
    count = weight.numel() // max(1, logits.numel())
    arguments = (weight, dwm, logits.flatten(), None, 3.0, False, 1.7, dim, 0.25 * count)
    oracle, plain = (formulas(*arguments, d)["dlogits"].view(logits.shape) for d in (torch.float64, torch.float32))
    monkeypatch.setitem(_cpp._plain.OPS, "logits_grad", None)  # the kernels are there: no way round them
    got = _cpp.logits_grad(dwm, weight.requires_grad_(), logits.requires_grad_(), temperature, dl0, 1.7)
    testing.assert_close({"dlogits": got}, {"dlogits": oracle}, {"dlogits": plain})
    added = torch.ones_like(logits, requires_grad=False)
    _cpp.logits_grad_(added, dwm, weight, logits, temperature, dl0, 1.7)
    assert torch.equal(added, 1 + got)
    zero = torch.zeros(()).expand(weight.shape)
    only_l0 = _cpp.logits_grad(zero, weight, logits, temperature, dl0, 1.7)
    dense = _cpp.logits_grad(torch.zeros(weight.shape), weight, logits, temperature, dl0, 1.7)
    torch.testing.assert_close(only_l0, dense, rtol=1e-6, atol=0)
    without = _cpp.logits_grad(torch.zeros(weight.shape), weight, logits, temperature, None, 1.7)
    assert not without.any()


def test_one_logit_for_all_weights():
    weight, dwm, logits = normal(5, 7), normal(5, 7, seed=3), torch.tensor([[0.3]])
    got = _cpp.logits_grad(dwm, weight, logits, torch.tensor(2.0), torch.tensor(0.5), 1.0)
    m = torch.sigmoid(2 * logits.double())
    want = ((dwm.double() * weight.double()).sum() + 0.5 * 35) * 2 * m * (1 - m)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("mask", MASKS)
def test_the_operators(mask, dtype):
    """Those without a kernel, fp64, come out of the same call; negative dimensions too."""
    hard, scale, bias = MASKS[mask]
    for layout in ("channels-last", "transposed", "vector", "no-rows", "cropped"):
        z, dim = LAYOUTS[layout]
        z, logits = z.to(dtype).requires_grad_(), testing.seeded_logits((z.shape[dim],), 1).requires_grad_()
        dout = normal(*z.shape, seed=3).to(dtype)
        b = normal(z.shape[dim], seed=2).to(dtype).requires_grad_() if bias else None
        temperature, dl0 = torch.tensor(3.0), torch.tensor(0.25)
        arguments = (z, dout, logits, b, 3.0, hard, scale, dim, 0.25 * 7)
        oracle, plain = formulas(*arguments, torch.float64), formulas(*arguments, torch.float32)
        with torch.no_grad():
            out = _cpp_units.scale_neurons(z, logits, temperature, b, hard, scale, dim - z.dim())
            dz, dlogits = _cpp_units.scale_neurons_grad(dout, z, logits, temperature, dl0, hard, scale, dim, 7)
        assert out.stride() == dz.stride() == torch.empty_like(z).stride()
        assert (out.dtype, dz.dtype, dlogits.dtype) == (dtype, dtype, torch.float32)
        got = {"out": out, "dz": dz, "dlogits": dlogits}
        oracle, plain = ({n: t.detach() for n, t in d.items()} for d in (oracle, plain))
        testing.assert_close(got, oracle, plain)


def _refusals():
    z, vector, out = torch.ones(6, 4), torch.ones(4), torch.zeros(6, 4)
    both = {"z": z, "mask_logits": vector, "dim": 1, "threads": 1}
    forward_ = {**both, "out": out, "bias": None, "hard": False}
    backward_ = {**both, "dout": z, "dl0": 0.0, "dz": out, "dlogits": torch.zeros(4)}
    shared_ = {"dlogits": torch.zeros(4), "dmasked_weight": z, "weight": z, "mask_logits": vector, "dim": 1}
    shared_ |= {"dl0": 0.0, "add": False, "threads": 1}
    long = torch.zeros(24)
    one = torch.zeros(1)
    f, b, s = "scale_neurons", "scale_neurons_grad", "logits_grad_units"
    return [
        (f, forward_, {"z": z.double()}, TypeError, "z must be float32, bfloat16 or float16, got float64"),
        (f, forward_, {"out": out.int()}, TypeError, "out must be float32, bfloat16 or float16, got int32"),
        (f, forward_, {"mask_logits": vector.bfloat16()}, TypeError, "mask_logits must be float32, got bfloat16"),
        (f, forward_, {"bias": vector.double()}, TypeError, "bias must be float32, bfloat16 or float16, got float64"),
        (f, forward_, {"bias": torch.ones(6)}, ValueError, r"bias must have shape \(4,\) to match dimension 1 of z"),
        (f, forward_, {"mask_logits": torch.ones(1, 4)}, ValueError, r"mask_logits must have shape \(4,\) to match"),
        (
            f,
            forward_,
            {"dim": 0},
            ValueError,
            r"shape \(6,\) to match dimension 0 of z, got 1 dimensions and 4 elements",
        ),
        (f, forward_, {"dim": 2}, ValueError, "dim must be one of the 2 dimensions of z, counted from 0, got 2"),
        (f, forward_, {"dim": -1}, ValueError, "counted from 0, got -1"),
        (f, forward_, {"out": torch.zeros(4, 6)}, ValueError, r"z must have shape \(4, 6\) like out, got \(6, 4\)"),
        (f, forward_, {"out": torch.zeros(4).expand(6, 4)}, ValueError, "out must have an address of its own"),
        (f, forward_, {"z": out}, ValueError, "out must not share memory with z"),
        (f, forward_, {"mask_logits": out[0]}, ValueError, "out must not share memory with mask_logits"),
        (f, forward_, {"bias": out[5]}, ValueError, "out must not share memory with bias"),
        (f, forward_, {"threads": 0}, ValueError, "threads must be >= 1, got 0"),
        (b, backward_, {"dout": torch.ones(4, 6)}, ValueError, r"dout must have shape \(6, 4\) like dz"),
        (b, backward_, {"dout": out}, ValueError, "dz must not share memory with dout"),
        (b, backward_, {"dlogits": torch.zeros(6)}, ValueError, r"dlogits must have shape \(4,\) to match dimension 1"),
        (b, backward_, {"dlogits": torch.zeros(4).half()}, TypeError, "dlogits must be float32, got float16"),
        (b, backward_, {"dlogits": one.expand(4)}, ValueError, "dlogits must have an address of its own"),
        (b, backward_, {"dlogits": out[0]}, ValueError, "dz must not share memory with dlogits"),
        (b, backward_, {"mask_logits": long[:4], "dlogits": long[3:7]}, ValueError, "share memory with mask_logits"),
        (s, shared_, {"weight": torch.ones(4, 6)}, ValueError, r"mask_logits must have shape \(6,\) to match dim"),
        (s, shared_, {"dmasked_weight": torch.ones(4, 6)}, ValueError, r"dmasked_weight must have shape \(6, 4\)"),
        (s, shared_, {"dmasked_weight": long.view(6, 4), "dlogits": long[:4]}, ValueError, "must not share memory"),
        (s, shared_, {"dim": 5}, ValueError, "dim must be one of the 2 dimensions of weight"),
    ]


@pytest.mark.parametrize(("name", "arguments", "change", "error", "message"), _refusals())
def test_refuses(name, arguments, change, error, message):
    arguments = {**arguments, **change}
    results = [n for n in ("out", "dz", "dlogits") if n in arguments]
    before = [arguments[n].clone() for n in results]
    with pytest.raises(error, match=message):
        getattr(_cpu, name)(**arguments, temperature=1.0, scale=1.0)
    assert all(torch.equal(arguments[n], b) for n, b in zip(results, before, strict=True))
