"""The C++ kernel of materialize, called directly, against an fp64 oracle written here."""

from __future__ import annotations

import itertools
import math
import os

import numpy as np
import pytest
import torch
from cpp_views import BLOCK, FLOATS, STORAGE, VIEWS, assert_only_wrote, lay, logits_of, normal, same_bits

_cpu = pytest.importorskip("csmask_kernels._cpu", reason="the C++ back end is not built")

# shape of the weight, dimension that has a logit per index (None: a logit per weight), and why
LAYOUTS = [
    pytest.param((), None, id="no-dimension"),
    pytest.param((1,), None, id="one"),
    pytest.param((7919,), None, id="prime"),
    pytest.param((BLOCK - 1,), None, id="block-1"),
    pytest.param((BLOCK,), None, id="block"),
    pytest.param((BLOCK + 1,), None, id="block+1"),
    pytest.param((37, 61), None, id="linear"),
    pytest.param((37, 61), 0, id="linear-neuron"),
    pytest.param((3, 2 * BLOCK + 1), 0, id="linear-neuron-longer-than-a-block"),
    pytest.param((BLOCK + 1, 1), 0, id="linear-neuron-one-input"),
    pytest.param((1, 61), 0, id="linear-neuron-one-unit"),
    pytest.param((61, 37), 1, id="conv1d-neuron"),
    pytest.param((3, BLOCK + 1), 1, id="conv1d-neuron-longer-than-a-block"),
    pytest.param((61, 3, 7, 3), 0, id="conv-neuron"),
    pytest.param((5, 300, 7), 1, id="middle-dimension"),
]


def along(logits, weight, dim):
    """The logits expanded to the weight's shape; they run along dimension `dim`, None where each weight has its own."""
    if dim is not None:
        logits = logits.view([-1 if d == dim else 1 for d in range(weight.dim())])
    return logits.expand(weight.shape)


def run(weight, logits, temperature=1.0, hard=False, scale=1.0, dtype=None, dim=None, threads=1, stream=None):
    """The kernel's (out, l0)."""
    out = torch.full(weight.shape, math.nan, dtype=dtype or weight.dtype)
    mask = (along(logits, weight, dim), temperature, hard, scale)
    return out, _cpu.materialize(weight, *mask, out, False, threads, stream)[0]


def masked(weight, logits, temperature, hard, scale, dtype, dim, compute):
    """(out, l0) in plain torch with arithmetic in `compute`: fp64 is the oracle, fp32 gives the budget."""
    logits, w = along(logits, weight, dim).to(compute), weight.to(compute)
    if hard:
        mask = (logits > 0).to(compute) * scale
        out = torch.where(logits > 0, w * scale, torch.zeros_like(w))
    else:
        mask = torch.sigmoid(temperature * logits) * scale
        out = w * mask
    return (out if compute == torch.float64 else out.to(dtype)), mask.sum()


def assert_close(name, got, oracle, reference, eps):
    """The rule of all tests: err <= 2 * (error of the reference in the tested dtype) + 2 * eps * max|oracle|."""
    budget = (reference.double() - oracle).abs().max()
    error = (got.double() - oracle).abs().max()
    limit = 2 * budget + 2 * eps * oracle.abs().max()
    assert error <= limit, f"{name}: error {error:.3e}, limit {limit:.3e}"


def inputs(shape, dim, dtype, seed=0):
    return normal(*shape, seed=seed).to(dtype), logits_of(*(shape if dim is None else (shape[dim],)), seed=seed + 1)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("temperature", [1.0, 200.0])
@pytest.mark.parametrize(("shape", "dim"), LAYOUTS)
@pytest.mark.usefixtures("isa")
def test_matches_fp64(shape, dim, temperature, hard, scale):
    for weight_dtype, dtype in itertools.product(FLOATS, FLOATS):
        weight, logits = inputs(shape, dim, weight_dtype)
        out, l0 = run(weight, logits, temperature, hard, scale, dtype, dim, threads=2)
        oracle, oracle_l0 = masked(weight, logits, temperature, hard, scale, dtype, dim, torch.float64)
        reference, reference_l0 = masked(weight, logits, temperature, hard, scale, dtype, dim, torch.float32)
        label = f"{weight_dtype} to {dtype}"
        assert_close(f"out, {label}", out, oracle, reference, torch.finfo(dtype).eps)
        assert_close(f"l0, {label}", torch.tensor(l0), oracle_l0, reference_l0, torch.finfo(torch.float32).eps)


def every_nth_float(first, last, n):
    """Every n-th fp32 number from first to last: all exponents, and mantissas of every kind."""
    bits = np.arange(np.float32(first).view(np.uint32), np.float32(last).view(np.uint32) + 1, n, dtype=np.uint32)
    return bits.view(np.float32)


def in_ulp(got, oracle):
    """Errors in units of the last place that the true value has in fp32."""
    return np.abs(got.astype(np.float64) - oracle) / np.exp2(np.frexp(oracle)[1] - 24.0)


@pytest.mark.usefixtures("isa")
def test_sigmoid_is_within_2_41_ulp():
    magnitude = every_nth_float(2.0**-30, 87.33, 991)
    x = np.concatenate([magnitude, -magnitude, np.float32([0.0, -0.0, 60.0, -60.0, 87.33, -87.33])])
    out, _ = run(torch.ones(x.size), torch.from_numpy(x))
    e = np.exp(-np.abs(x.astype(np.float64)))
    errors = in_ulp(out.numpy(), np.where(x < 0, e, 1.0) / (1.0 + e))
    assert errors.max() <= 2.41, f"{errors.max():.3f} ulp at x = {x[errors.argmax()]!r}"


@pytest.mark.usefixtures("isa")
def test_exp_is_within_1_03_ulp():
    """From 17.33 on ``1 + e`` is 1, and the mask of ``-a``, as well as the derivative at it, is ``exp(-a)`` itself."""
    a = every_nth_float(17.33, 87.33, 1 if os.environ.get("CSMASK_LARGE_TESTS") else 53)
    oracle = np.exp(-a.astype(np.float64))
    assert (np.float32(1) + oracle.astype(np.float32) == 1).all()
    logits, ones, dlogits = torch.from_numpy(-a), torch.ones(a.size), torch.full((a.size,), math.nan)
    out, _ = run(ones, logits)
    _cpu.logits_grad(dlogits, ones, ones, logits, 1.0, 0.0, 1.0, False, 1)
    for name, got in {"mask": out, "derivative": dlogits}.items():
        errors = in_ulp(got.numpy(), oracle)
        assert errors.max() <= 1.03, f"{name}: {errors.max():.3f} ulp at a = {a[errors.argmax()]!r}"


@pytest.mark.usefixtures("isa")
def test_sigmoid_far_out():
    far = [87.4, 88.0, 89.0, 103.0, 104.0, 127.0, 128.0, 1e3, 1e4, 1e10, 3e38, math.inf]
    logits = torch.tensor(far + [-x for x in far])
    for temperature in (1.0, 200.0):  # 200 * 3e38 overflows to inf, which is still a mask of 1 or 0
        out, l0 = run(torch.ones(len(logits)), logits, temperature)
        assert torch.equal(out, (logits > 0).float())
        assert l0 == len(far)
    out, _ = run(torch.ones(3), torch.tensor([-1e-38, 0.0, 1e-38]), 200.0)
    assert torch.equal(out, torch.full((3,), 0.5))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_inf(dtype):
    nan, inf = math.nan, math.inf
    weight = torch.tensor([nan, inf, -inf, nan, inf, -inf, -2.0, -0.0, 3.0, 3.0], dtype=dtype)
    logits = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, 0.0, -1.0, -1.0, nan, inf])
    for scale in (1.0, 2.0):
        out, l0 = run(weight, logits, hard=True, scale=scale)
        want = torch.tensor([nan, inf, -inf, 0, 0, 0, 0, 0, 0, 3 * scale], dtype=dtype)
        assert torch.equal(out.nan_to_num(77.0), want.nan_to_num(77.0))
        assert not out[3:9].signbit().any()
        assert l0 == 4 * scale
    out, l0 = run(weight, logits, hard=False)
    assert out[[0, 3, 8]].isnan().all()
    assert not out[[1, 2, 4, 5, 6, 7, 9]].isnan().any()
    assert math.isnan(l0)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [None, 0])
def test_hard_keeps_every_bit(dtype, dim, view):
    # denormals, both zeros and NaNs with payloads among them
    storage, extent = STORAGE[dtype], 1 << (8 * dtype.itemsize - 1)
    bits = torch.randint(-extent, extent, (97, 65), generator=torch.Generator().manual_seed(1)).to(storage)
    bits[0, :6] = torch.tensor([0, 1, -1, -extent, -extent + 1, extent - 1]).to(storage)
    logits = logits_of(*(bits.shape if dim is None else (97,)), seed=2)
    out, l0 = run(lay(bits, view, 0)[0].view(dtype), logits, hard=True, dim=dim)
    kept = (logits > 0) if dim is None else (logits > 0)[:, None].expand(bits.shape)
    assert torch.equal(out.view(storage), torch.where(kept, bits, torch.zeros_like(bits)))
    assert l0 == kept.sum().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", FLOATS)
def test_sixteen_bits_are_the_fp32_result_rounded_once(weight_dtype, dtype):
    weight, logits = inputs((41, 129), None, weight_dtype)
    exact, _ = run(weight, logits, 3.0, dtype=torch.float32)
    rounded, _ = run(weight, logits, 3.0, dtype=dtype)
    assert torch.equal(rounded, exact.to(dtype))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_threads_do_not_change_a_bit(dim, hard):
    weight, logits = inputs((211, 1009), dim, torch.float32)  # 104 blocks: up to 13 threads have work
    out, l0 = run(weight, logits, 3.0, hard, 1.7, dim=dim)
    for threads in (1, 2, 3, 7, 13, 1000):
        again, l0_again = run(weight, logits, 3.0, hard, 1.7, dim=dim, threads=threads)
        assert same_bits(again, out)
        assert l0_again == l0


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_instruction_sets_agree(dim):
    """In every bit where they have fused products; a soft mask without them differs in its last bits."""
    weight, logits = inputs((53, 211), dim, torch.float32)
    before, results = _cpu.instruction_set(), {}
    try:
        for name in _cpu.instruction_sets():
            _cpu.force_instruction_set(name)
            results[name] = [run(weight, logits, 20.0, hard, 1.7, dim=dim) for hard in (False, True)]
    finally:
        _cpu.force_instruction_set(before)
    (soft, l0), hard = next(iter(results.values()))
    for name, result in results.items():
        assert torch.equal(result[1][0], hard[0]), name
        assert result[1][1] == hard[1], name
        if name == "baseline":
            torch.testing.assert_close(result[0][0], soft, rtol=5 * 2.0**-23, atol=0)  # 2 x 2.41 ulp
            assert result[0][1] == pytest.approx(l0, rel=1e-6)
        else:
            assert torch.equal(result[0][0], soft), name
            assert result[0][1] == l0, name


# shapes of 1, 2 and 4 dimensions; sizes of 1, more than a block in the last dimension, more rows than a block
SHAPES = [(BLOCK + 5,), (37, 61), (5, BLOCK + 3), (BLOCK + 3, 5), (9, 4, 5, 7), (6, 1, 3, 1), (1, 1), (2, 0, 3)]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_strides_of_any_operand(shape, view):
    """The numbers of contiguous operands, bit for bit, and nothing written beside the result."""
    for weight_dtype, dtype in ((torch.float32, torch.float32), (torch.bfloat16, torch.float16)):
        weight, logits = inputs(shape, None, weight_dtype)
        for hard, scale, stream in ((False, 1.7, False), (False, 1.0, True), (True, 1.0, False), (True, 1.7, True)):
            want, want_l0 = run(weight, logits, 3.0, hard, scale, dtype)
            for moved in ({0}, {1}, {2}, {0, 1, 2}):
                w, s = (lay(t, view if k in moved else "contiguous")[0] for k, t in ((1, weight), (2, logits)))
                out, memory = lay(torch.zeros(shape, dtype=dtype), view if 0 in moved else "contiguous")
                before = memory.clone()
                l0, _, _ = _cpu.materialize(w, s, 3.0, hard, scale, out, False, 2, stream)
                assert same_bits(out, want), moved
                assert_only_wrote(memory, before, out)
                assert l0 == pytest.approx(want_l0, rel=1e-6)  # a sum in the order of out


@pytest.mark.usefixtures("isa")
def test_every_operand_may_lie_in_another_order():
    weight, logits = inputs((9, 4, 5, 7), None, torch.float32)
    want, _ = run(weight, logits, 3.0, False, 1.7)
    for views in itertools.permutations(["channels-last", "reversed-dims", "stepped", "cropped"], 3):
        (out, memory), (w, _), (s, _) = (
            lay(t, v) for t, v in zip((torch.zeros_like(want), weight, logits), views, strict=True)
        )
        before = memory.clone()
        _cpu.materialize(w, s, 3.0, False, 1.7, out, False, 1)
        assert same_bits(out, want)
        assert_only_wrote(memory, before, out)


@pytest.mark.usefixtures("isa")
def test_unaligned_slices_and_nothing_beyond_them():
    """Every start within 64 bytes and tails of every length, stored through the caches and past them."""
    base, logits_base = inputs((BLOCK + 40,), None, torch.float32)
    out = torch.full((BLOCK + 40,), 7.0)
    for start, stream in itertools.product(range(17), (False, True)):
        for stop in (start, start + 1, start + 16, BLOCK, BLOCK + start, BLOCK + 21):
            weight, logits = base[start:stop], logits_base[start + 1 : stop + 1]
            out.fill_(7.0)
            l0, _, _ = _cpu.materialize(weight, logits, 1.0, False, 1.0, out[start + 2 : stop + 2], False, 1, stream)
            want, want_l0 = run(weight.clone(), logits.clone(), stream=False)
            assert torch.equal(out[start + 2 : stop + 2], want)
            assert l0 == want_l0
            assert (out[: start + 2] == 7.0).all()
            assert (out[stop + 2 :] == 7.0).all()


def test_l0_of_many_small_masks_keeps_its_digits():
    # one running fp32 sum over 3M masks of 1e-4 would be off by 1e-3 or so
    logits = torch.full((3_000_017,), math.log(1e-4 / (1 - 1e-4)))
    _, l0 = run(torch.zeros_like(logits), logits, threads=2)
    assert l0 == pytest.approx(torch.sigmoid(logits.double()).sum().item(), rel=1e-6)


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("shape", [(0,), (4, 0), (0, 4), (2, 0, 3)])
def test_empty(shape, hard):
    empty = torch.empty(shape)
    assert _cpu.materialize(empty, empty.clone(), 1.0, hard, 1.0, empty.clone(), True, 2) == (0.0, 0, 0)


def test_numpy_arrays_are_accepted_and_written_in_place():
    out = np.full(5, np.nan, dtype=np.float32)
    weight = np.arange(5, dtype=np.float32)
    weight.flags.writeable = False
    assert _cpu.materialize(weight, np.ones(5, dtype=np.float32), 1.0, True, 1.0, out, False, 1) == (5.0, 0, 0)
    assert (out == weight).all()


def _refusals():
    weight, logits, out = torch.ones(6, 4), torch.ones(6, 4), torch.zeros(6, 4)
    good = {"weight": weight, "mask_logits": logits, "out": out, "threads": 1}
    long, own = torch.ones(60), "out must have an address of its own for each element"
    floats = "must be float32, bfloat16 or float16, got"
    cases = {
        "fp64 weight": ({"weight": weight.double()}, TypeError, f"weight {floats} float64"),
        "fp64 out": ({"out": out.double()}, TypeError, f"out {floats} float64"),
        "int weight": ({"weight": weight.int()}, TypeError, f"weight {floats} int32"),
        "bool out": ({"out": out.bool()}, TypeError, f"out {floats} bool"),
        "bf16 logits": ({"mask_logits": logits.bfloat16()}, TypeError, "mask_logits must be float32, got bfloat16"),
        "short out": (
            {"out": torch.zeros(5, 4)},
            ValueError,
            r"weight must have shape \(5, 4\) like out, got \(6, 4\)",
        ),
        "flat out": ({"out": torch.zeros(24)}, ValueError, r"weight must have shape \(24\) like out, got \(6, 4\)"),
        "turned out": ({"out": torch.zeros(4, 6)}, ValueError, r"weight must have shape \(4, 6\) like out"),
        "few logits": ({"mask_logits": torch.ones(6, 1)}, ValueError, r"shape \(6, 4\) like out, got \(6, 1\)"),
        "no logits": ({"mask_logits": torch.ones(0)}, ValueError, r"mask_logits must have shape \(6, 4\) like out"),
        "no thread": ({"threads": 0}, ValueError, "threads must be >= 1, got 0"),
        "less than no thread": ({"threads": -3}, ValueError, "threads must be >= 1, got -3"),
        "expanded out": ({"out": torch.zeros(4).expand(6, 4)}, ValueError, f"{own}, got stride 0"),
        "overlapping rows": ({"out": torch.zeros(60).as_strided((6, 4), (3, 1))}, ValueError, f"{own}, got stride 3"),
        "overlapping columns": ({"out": torch.zeros(60).as_strided((6, 4), (2, 3))}, ValueError, own),
        "out is weight": ({"out": weight}, ValueError, "out must not share memory with weight"),
        "out is logits": ({"out": logits}, ValueError, "out must not share memory with mask_logits"),
        "out ends in weight": (
            {"weight": long[23:47].view(6, 4), "out": long[:24].view(6, 4)},
            ValueError,
            "out must not share memory with weight",
        ),
        "out ends in strided logits": (
            {"mask_logits": long[:48:2].view(6, 4), "out": long[36:60].view(6, 4)},
            ValueError,
            "out must not share memory with mask_logits",
        ),
        "list": ({"weight": [1.0] * 24}, TypeError, "incompatible function arguments"),
        "meta": ({"weight": torch.ones(6, 4, device="meta")}, TypeError, "incompatible function arguments"),
    }
    return [
        pytest.param({**good, **change}, error, message, id=name.replace(" ", "-"))
        for name, (change, error, message) in cases.items()
    ]


@pytest.mark.parametrize(("arguments", "error", "message"), _refusals())
def test_refuses(arguments, error, message):
    before = arguments["out"].clone()
    with pytest.raises(error, match=message):
        _cpu.materialize(temperature=1.0, hard=False, scale=1.0, counts=False, **arguments)
    assert torch.equal(arguments["out"], before)


def test_neighbours_are_not_refused():
    memory = torch.ones(72)
    weight, out, logits = (memory[i : i + 24].view(6, 4) for i in (0, 24, 48))
    assert _cpu.materialize(weight, logits, 1.0, True, 2.0, out, False, 1)[0] == 48
    assert memory.tolist() == [1.0] * 24 + [2.0] * 24 + [1.0] * 24


def test_read_only_out_is_refused():
    ones, out = np.ones(3, dtype=np.float32), np.ones(3, dtype=np.float32)
    out.flags.writeable = False
    with pytest.raises(TypeError):
        _cpu.materialize(ones, ones, 1.0, False, 1.0, out, False, 1)
    assert (out == 1).all()


def test_unknown_instruction_set_is_refused():
    before = _cpu.instruction_set()
    assert before == _cpu.instruction_sets()[0]
    with pytest.raises(ValueError, match=r"one that this CPU can run \(.*\), got mmx"):
        _cpu.force_instruction_set("mmx")
    assert _cpu.instruction_set() == before


@pytest.mark.skipif(not os.environ.get("CSMASK_LARGE_TESTS"), reason="needs 10 GB: set CSMASK_LARGE_TESTS=1")
def test_more_than_2_31_elements():
    rows, columns = 3, (1 << 30) + 1
    weight = torch.ones(rows, columns, dtype=torch.bfloat16)
    out, l0 = run(weight, torch.tensor([1.0, -1.0, 1.0]), hard=True, dim=0, threads=2)
    assert l0 == 2 * columns
    assert out[0].min() == 1
    assert out[1].max() == 0
    assert out[2].min() == 1


def test_reversed_memory_counts_as_shared_where_it_is():
    """NumPy's negative strides: the first element is the last in memory."""
    memory = np.ones(31, dtype=np.float32)
    weight, logits = memory[15::-1], np.full(16, 30.0, dtype=np.float32)
    untouched = memory.copy()
    for out in (memory[:16], memory[4:20], memory[15:]):
        with pytest.raises(ValueError, match="out must not share memory with weight"):
            _cpu.materialize(weight, logits, 1.0, False, 1.0, out, False, 1)
        np.testing.assert_array_equal(memory, untouched)
    apart = np.zeros(16, dtype=np.float32)
    memory[:16] = np.arange(16)
    _cpu.materialize(weight, logits, 1.0, False, 1.0, apart, False, 1)
    np.testing.assert_array_equal(apart, np.arange(15, -1, -1))
