"""The C++ kernel of materialize, called directly, against an fp64 oracle written here."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

_cpu = pytest.importorskip("csmask_kernels._cpu", reason="the C++ back end is not built")

BLOCK = 2048  # elements per block of the kernel: its unit of work and of the l0 partials
DTYPES = [torch.float32, torch.bfloat16]
# shape of the weight, dimension that has a logit per index (None: a logit per weight), and why
LAYOUTS = [
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


@pytest.fixture(params=_cpu.instruction_sets())
def isa(request):
    """Runs the test once per instruction set that this CPU has."""
    before = _cpu.instruction_set()
    _cpu.force_instruction_set(request.param)
    assert _cpu.instruction_set() == request.param
    yield request.param
    _cpu.force_instruction_set(before)


def run(weight, logits, temperature=1.0, hard=False, scale=1.0, dtype=None, dim=None, threads=1):
    """The kernel's (out, l0); `dim` is the dimension that the logits run along, None where each weight has its own."""
    units, inner = weight.numel(), 1
    if dim is not None:
        units, inner = weight.shape[dim], math.prod(weight.shape[dim + 1 :])
    out = torch.full(weight.shape, math.nan, dtype=dtype or weight.dtype)
    l0 = _cpu.materialize(weight, logits, temperature, hard, scale, units, inner, out, threads)
    return out, l0


def masked(weight, logits, temperature, hard, scale, dtype, dim, compute):
    """(out, l0) in plain torch with arithmetic in `compute`: fp64 is the oracle, fp32 gives the budget."""
    if dim is not None:
        logits = logits.view([-1 if d == dim else 1 for d in range(weight.dim())])
    logits, w = logits.to(compute).expand(weight.shape), weight.to(compute)
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
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    logits = torch.randn(shape if dim is None else shape[dim], generator=generator)
    logits.view(-1)[::5] = 0.0
    return weight, logits


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("temperature", [1.0, 200.0])
@pytest.mark.parametrize(("shape", "dim"), LAYOUTS)
@pytest.mark.usefixtures("isa")
def test_matches_fp64(shape, dim, temperature, hard, scale):
    for weight_dtype, dtype in itertools.product(DTYPES, DTYPES):
        weight, logits = inputs(shape, dim, weight_dtype)
        out, l0 = run(weight, logits, temperature, hard, scale, dtype, dim, threads=2)
        oracle, oracle_l0 = masked(weight, logits, temperature, hard, scale, dtype, dim, torch.float64)
        reference, reference_l0 = masked(weight, logits, temperature, hard, scale, dtype, dim, torch.float32)
        label = f"{weight_dtype} to {dtype}"
        assert_close(f"out, {label}", out, oracle, reference, torch.finfo(dtype).eps)
        assert_close(f"l0, {label}", torch.tensor(l0), oracle_l0, reference_l0, torch.finfo(torch.float32).eps)


@pytest.mark.usefixtures("isa")
def test_sigmoid_is_within_2_5_ulp():
    # every 991st fp32 of [2^-30, 87.33], both signs: all exponents, and mantissas of every kind
    bits = np.arange(np.float32(2.0**-30).view(np.uint32), np.float32(87.33).view(np.uint32) + 1, 991, dtype=np.uint32)
    magnitude = bits.view(np.float32)
    x = np.concatenate([magnitude, -magnitude, np.float32([0.0, -0.0, 60.0, -60.0, 87.33, -87.33])])
    out, _ = run(torch.ones(x.size), torch.from_numpy(x))
    e = np.exp(-np.abs(x.astype(np.float64)))
    oracle = np.where(x < 0, e, 1.0) / (1.0 + e)
    ulp = np.exp2(np.frexp(oracle)[1] - 24.0)
    errors = np.abs(out.numpy().astype(np.float64) - oracle) / ulp
    assert errors.max() <= 2.5, f"{errors.max():.2f} ulp at x = {x[errors.argmax()]!r}"


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
@pytest.mark.parametrize("dtype", DTYPES)
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
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [None, 0])
def test_hard_keeps_every_bit(dtype, dim):
    # denormals, both zeros and NaNs with payloads among them
    storage, extent = (torch.int32, 1 << 31) if dtype == torch.float32 else (torch.int16, 1 << 15)
    bits = torch.randint(-extent, extent, (97, 65), generator=torch.Generator().manual_seed(1)).to(storage)
    bits[0, :6] = torch.tensor([0, 1, -1, -extent, -extent + 1, extent - 1]).to(storage)
    logits = torch.randn(bits.shape if dim is None else (97,), generator=torch.Generator().manual_seed(2))
    out, l0 = run(bits.view(dtype), logits, hard=True, dim=dim)
    kept = (logits > 0) if dim is None else (logits > 0)[:, None].expand(bits.shape)
    assert torch.equal(out.view(storage), torch.where(kept, bits, torch.zeros_like(bits)))
    assert l0 == kept.sum().item()


@pytest.mark.usefixtures("isa")
def test_bf16_rounds_to_nearest_even():
    # every upper half of an fp32 with the lower halves around a tie
    upper = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16
    bits = upper | np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    weight = torch.from_numpy(bits.view(np.float32))
    out, _ = run(weight, torch.ones(weight.shape), hard=True, dtype=torch.bfloat16)
    want = weight.to(torch.bfloat16)
    assert torch.equal(out.isnan(), weight.isnan())
    assert torch.equal(out.view(torch.int16)[~weight.isnan()], want.view(torch.int16)[~weight.isnan()])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bf16_is_the_fp32_result_rounded_once(dtype):
    weight, logits = inputs((41, 129), None, dtype)
    exact, _ = run(weight, logits, 3.0, dtype=torch.float32)
    rounded, _ = run(weight, logits, 3.0, dtype=torch.bfloat16)
    assert torch.equal(rounded, exact.to(torch.bfloat16))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_threads_do_not_change_a_bit(dim, hard):
    weight, logits = inputs((211, 1009), dim, torch.float32)  # 104 blocks: up to 7 threads have work
    out, l0 = run(weight, logits, 3.0, hard, 1.7, dim=dim)
    for threads in (1, 2, 3, 7, 1000):
        again, l0_again = run(weight, logits, 3.0, hard, 1.7, dim=dim, threads=threads)
        assert torch.equal(again.view(torch.int32), out.view(torch.int32))
        assert l0_again == l0


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_instruction_sets_agree_in_every_bit(dim):
    weight, logits = inputs((53, 211), dim, torch.float32)
    before, results = _cpu.instruction_set(), []
    try:
        for name in _cpu.instruction_sets():
            _cpu.force_instruction_set(name)
            results.append([run(weight, logits, 20.0, hard, 1.7, dim=dim) for hard in (False, True)])
    finally:
        _cpu.force_instruction_set(before)
    for result in results[1:]:
        for (out, l0), (first_out, first_l0) in zip(result, results[0], strict=True):
            assert torch.equal(out, first_out)
            assert l0 == first_l0


@pytest.mark.usefixtures("isa")
def test_unaligned_slices_and_nothing_beyond_them():
    base, logits_base = inputs((BLOCK + 8,), None, torch.float32)
    out = torch.full((BLOCK + 8,), 7.0)
    for start in (1, 3):
        for stop in (start + 1, BLOCK, BLOCK + 5):
            weight, logits = base[start:stop], logits_base[start + 1 : stop + 1]
            out.fill_(7.0)
            l0 = _cpu.materialize(weight, logits, 1.0, False, 1.0, weight.numel(), 1, out[start + 2 : stop + 2], 1)
            want, want_l0 = run(weight.clone(), logits.clone())
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
def test_empty(hard):
    empty = torch.empty(0)
    assert _cpu.materialize(empty, empty, 1.0, hard, 1.0, 0, 1, empty.clone(), 2) == 0.0
    assert _cpu.materialize(torch.empty(4, 0), torch.ones(4), 1.0, hard, 1.0, 4, 1, torch.empty(4, 0), 2) == 0.0


def test_numpy_arrays_are_accepted_and_written_in_place():
    out = np.full(5, np.nan, dtype=np.float32)
    weight = np.arange(5, dtype=np.float32)
    weight.flags.writeable = False
    assert _cpu.materialize(weight, np.ones(5, dtype=np.float32), 1.0, True, 1.0, 5, 1, out, 1) == 5.0
    assert (out == weight).all()


def _refusals():
    weight, logits, out = torch.ones(6, 4), torch.ones(6, 4), torch.ones(6, 4)
    good = {"weight": weight, "mask_logits": logits, "units": 24, "inner": 1, "out": out, "threads": 1}
    cases = {
        "strided weight": ({"weight": torch.ones(4, 6).t()}, ValueError, "weight must be contiguous"),
        "strided logits": ({"mask_logits": torch.ones(6, 8)[:, ::2]}, ValueError, "mask_logits must be contiguous"),
        "strided out": ({"out": torch.ones(6, 8)[:, ::2]}, ValueError, "out must be contiguous"),
        "expanded logits": ({"mask_logits": torch.ones(1).expand(24)}, ValueError, "mask_logits must be contiguous"),
        "fp64 weight": ({"weight": weight.double()}, TypeError, "weight must be float32 or bfloat16, got float64"),
        "fp16 out": ({"out": out.half()}, TypeError, "out must be float32 or bfloat16, got float16"),
        "int weight": ({"weight": weight.int()}, TypeError, "weight must be float32 or bfloat16, got int32"),
        "bf16 logits": ({"mask_logits": logits.bfloat16()}, TypeError, "mask_logits must be float32, got bfloat16"),
        "short out": ({"out": torch.ones(23)}, ValueError, "out must have 24 elements, got 23"),
        "long out": ({"out": torch.ones(25)}, ValueError, "out must have 24 elements, got 25"),
        "few logits": ({"mask_logits": torch.ones(6)}, ValueError, "mask_logits must have 24 elements, got 6"),
        "wrong inner": ({"mask_logits": torch.ones(6), "units": 6, "inner": 3}, ValueError, r"multiple of .* = 6 \* 3"),
        "wrong units": ({"mask_logits": torch.ones(5), "units": 5}, ValueError, r"multiple of .* = 5 \* 1, got 24"),
        "no units": ({"mask_logits": torch.ones(0), "units": 0}, ValueError, "multiple of"),
        "inner 0": ({"inner": 0}, ValueError, "inner and threads >= 1, got 24, 0, 1"),
        "no thread": ({"threads": 0}, ValueError, "inner and threads >= 1, got 24, 1, 0"),
        "out is weight": ({"out": weight}, ValueError, "out must not share memory with weight"),
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
        _cpu.materialize(temperature=1.0, hard=False, scale=1.0, **arguments)
    assert torch.equal(arguments["out"], before)


def test_read_only_out_is_refused():
    out = np.ones(3, dtype=np.float32)
    out.flags.writeable = False
    with pytest.raises(TypeError):
        _cpu.materialize(np.ones(3, dtype=np.float32), np.ones(3, dtype=np.float32), 1.0, False, 1.0, 3, 1, out, 1)
    assert (out == 1).all()


def test_unknown_instruction_set_is_refused():
    before = _cpu.instruction_set()
    assert before == _cpu.instruction_sets()[0]
    with pytest.raises(ValueError, match=r"one that this CPU can run \(.*\), got mmx"):
        _cpu.force_instruction_set("mmx")
    assert _cpu.instruction_set() == before


def test_other_python_threads_run_meanwhile():
    weight = torch.ones(20_000_000, dtype=torch.bfloat16)
    logits, out = torch.ones(weight.numel()), torch.empty_like(weight)
    spans = []

    def work():
        begin = time.perf_counter()
        _cpu.materialize(weight, logits, 1.0, False, 1.0, weight.numel(), 1, out, 1)
        spans.append(time.perf_counter() - begin)

    shares = []
    for _ in range(10):  # a busy machine may keep this thread waiting too: one good attempt is proof
        worker = threading.Thread(target=work)
        worker.start()
        longest, last = 0.0, time.perf_counter()
        while worker.is_alive():
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        worker.join()
        shares.append(longest / spans[-1])
        if shares[-1] < 0.5:
            return
    pytest.fail(f"this thread stood still for {min(shares):.0%} of the call or more: the kernel holds the GIL")


NO_MORE_THREADS = """
import resource
import numpy as np
import csmask_kernels._cpu as cpu
weight, logits = np.linspace(-1, 1, 400_000, dtype=np.float32), np.linspace(-9, 9, 400_000, dtype=np.float32)
alone, crowded = np.full_like(weight, np.nan), np.full_like(weight, np.nan)
l0 = cpu.materialize(weight, logits, 1.0, False, 1.0, weight.size, 1, alone, 1)
with open("/proc/self/statm") as file:
    in_use = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + (1 << 20), resource.RLIM_INFINITY))  # no room for another stack
import threading
try:
    threading.Thread(target=int).start()
    print("threads can start")
except RuntimeError:
    pass
print(cpu.materialize(weight, logits, 1.0, False, 1.0, weight.size, 1, crowded, 8) == l0, (alone == crowded).all())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_caller_does_the_work_of_threads_that_cannot_start():
    done = subprocess.run([sys.executable, "-c", NO_MORE_THREADS], capture_output=True, text=True, check=False)
    assert done.stdout == "True True\n", done.stdout + done.stderr


@pytest.mark.skipif(not os.environ.get("CSMASK_LARGE_TESTS"), reason="needs 10 GB: set CSMASK_LARGE_TESTS=1")
def test_more_than_2_31_elements():
    rows, columns = 3, (1 << 30) + 1
    weight = torch.ones(rows, columns, dtype=torch.bfloat16)
    out, l0 = run(weight, torch.tensor([1.0, -1.0, 1.0]), hard=True, dim=0, threads=2)
    assert l0 == 2 * columns
    assert out[0].min() == 1
    assert out[1].max() == 0
    assert out[2].min() == 1
