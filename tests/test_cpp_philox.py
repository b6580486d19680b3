"""The C++ kernel of ``philox_``: published vectors, an implementation in numpy, and every bit of its output."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from csmask import philox
from csmask._ops import ops

_cpu = pytest.importorskip("csmask_kernels._cpu", reason="the C++ back end is not built")

M32 = 0xFFFFFFFF
BLOCK = 2048  # elements per unit of work
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# none, one, a block of words and its neighbours, a vector of 16 blocks of words and its neighbours, a prime, the unit
# of work and its neighbours, more than one thread's share
COUNTS = [0, 1, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1009, BLOCK - 1, BLOCK, BLOCK + 1, 10 * BLOCK + 7]
# kat_vectors of Random123 (https://github.com/DEShawResearch/random123), philox4x32 10
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((M32,) * 4, (M32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.fixture(params=_cpu.instruction_sets())
def isa(request):
    """Runs the test once per instruction set that this CPU has."""
    before = _cpu.instruction_set()
    _cpu.force_instruction_set(request.param)
    yield request.param
    _cpu.force_instruction_set(before)


def words_in_numpy(count, seed, stream, purpose, first_block=0):
    """Philox4x32-10 after the paper's figure, on uint64 arrays that hold 32-bit words."""
    blocks = first_block + np.arange((count + 3) // 4, dtype=np.uint64)
    x0, x1 = blocks & M32, blocks >> np.uint64(32)
    x2, x3 = np.full_like(blocks, stream), np.full_like(blocks, purpose)
    k0, k1 = np.uint64(seed & M32), np.uint64(seed >> 32)
    for round_ in range(10):
        if round_:
            k0, k1 = (k0 + np.uint64(0x9E3779B9)) & M32, (k1 + np.uint64(0xBB67AE85)) & M32
        product0, product1 = np.uint64(0xD2511F53) * x0, np.uint64(0xCD9E8D57) * x2
        x0, x1, x2, x3 = (
            (product1 >> np.uint64(32)) ^ x1 ^ k0,
            product1 & M32,
            (product0 >> np.uint64(32)) ^ x3 ^ k1,
            product0 & M32,
        )
    return np.stack([x0, x1, x2, x3], axis=1).astype(np.int64).reshape(-1)[:count]


def values_in_numpy(kind, count, seed, stream, purpose, scale):
    """fp32 arithmetic, one rounding after another: what every back end must give to the bit."""
    if kind == "uniform":
        numerators = 2 * (words_in_numpy(count, seed, stream, purpose) >> 8) + 1 - 2**24
        return numerators.astype(np.float32) * np.float32(2.0**-24) * np.float32(scale)
    words = words_in_numpy(4 * count, seed, stream, purpose).reshape(-1, 4)
    sums = sum(((words >> shift) & 0xFF).sum(axis=1) for shift in (0, 8, 16, 24))
    return (sums - 2040).astype(np.float32) * np.float32((16 * (256**2 - 1) / 12) ** -0.5) * np.float32(scale)


def draw(kind, count, seed=0, stream=0, purpose=0, scale=1.0, dtype=torch.float32, threads=1, **options):
    out = torch.full((count,), -77, dtype=torch.int64 if kind == "words" else dtype)
    if kind != "words":
        out.fill_(math.nan)
    _cpu.philox_(out, kind, seed & M32, seed >> 32, stream, purpose, scale, threads, **options)
    return out


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    c0, c1, stream, purpose = counter
    got = draw("words", 4, key[1] << 32 | key[0], stream, purpose, first_block=c1 << 32 | c0)
    assert tuple(got.tolist()) == words


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("count", COUNTS)
def test_words(count):
    for seed, stream, purpose in ((0, 0, 0), (2**64 - 1, 7, 2), (2**32 + 5, M32, 2**31)):
        got = draw("words", count, seed, stream, purpose, threads=2)
        assert torch.equal(got, torch.from_numpy(words_in_numpy(count, seed, stream, purpose)))


@pytest.mark.usefixtures("isa")
def test_blocks_beyond_32_bits_use_the_second_counter():
    """No tensor is large enough to reach them in a test; a carry inside a vector of 16 blocks is among them."""
    for first in (2**32 - 5, 2**32, 2**33 + 7, 2**63 - 3):
        got = draw("words", 133, 11, 3, 2, first_block=first)
        assert torch.equal(got, torch.from_numpy(words_in_numpy(133, 11, 3, 2, first)))
        for kind in ("uniform", "normal"):
            assert torch.equal(
                draw(kind, 40, 11, 3, 2, first_block=first)[:4], draw(kind, 4, 11, 3, 2, first_block=first)
            )


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("past_caches", [False, True])
@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_values_to_the_bit_in_every_dtype(kind, past_caches):
    for count in COUNTS:
        for scale in (1.0, 0.02, 1 / math.sqrt(768)):
            want = torch.from_numpy(values_in_numpy(kind, count, 0x0123456789ABCDEF, 5, 2, scale))
            for dtype in FLOATS:
                got = draw(kind, count, 0x0123456789ABCDEF, 5, 2, scale, dtype, threads=2, past_caches=past_caches)
                assert torch.equal(got, want.to(dtype)), (count, scale, dtype)
    assert want.unique().numel() > count // 20  # the draws are not all the same


@pytest.mark.usefixtures("isa")
def test_uniform_is_open_and_normal_is_normal():
    uniform, normal = draw("uniform", 100_000, 1).double(), draw("normal", 100_000, 1).double()
    assert uniform.abs().max() < 1
    assert uniform.mean().abs() < 0.01
    assert abs(uniform.var() - 1 / 3) < 0.01
    assert normal.mean().abs() < 0.02
    assert abs(normal.var() - 1) < 0.02


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", ["words", "uniform", "normal"])
def test_threads_do_not_change_a_bit(kind):
    count = 40 * BLOCK + 13  # up to 5 threads have work
    first = draw(kind, count, 3, 1, 2, 0.5)
    for threads in (2, 3, 5, 100):
        assert torch.equal(draw(kind, count, 3, 1, 2, 0.5, threads=threads), first)


@pytest.mark.parametrize("kind", ["words", "uniform", "normal"])
def test_nothing_beyond_a_slice(kind):
    dtype = torch.int64 if kind == "words" else torch.float16
    for past_caches in (False, True):
        whole = torch.full((BLOCK + 100,), 7, dtype=dtype)
        part = whole[3 : BLOCK + 40]
        _cpu.philox_(part, kind, 1, 2, 3, 4, 1.0, 1, past_caches=past_caches)
        assert torch.equal(part, draw(kind, BLOCK + 37, 2 << 32 | 1, 3, 4, dtype=torch.float16))
        assert (whole[:3] == 7).all()
        assert (whole[BLOCK + 40 :] == 7).all()


def test_the_operator_draws_what_csmask_philox_draws():
    seed = 2**63 + 12345
    for kind, plain in (
        ("words", philox.random_words), ("uniform", philox.random_uniform), ("normal", philox.random_normal)
    ):  # fmt: skip
        for dtype in (torch.int64,) if kind == "words" else (*FLOATS, torch.float64):
            out = torch.full((37, 11), -77, dtype=dtype)
            version = out._version
            ops.philox_(out, kind, seed & M32, seed >> 32, 4, 2, 0.25)
            want = plain(407, seed, 4, 2)
            assert torch.equal(out.view(-1), want if kind == "words" else (want * 0.25).to(dtype)), dtype
            assert out._version > version  # autograd must know that it changed
    with torch.inference_mode():
        out = torch.empty(5)
        ops.philox_(out, "normal", 1, 2, 3, 4, 1.0)
        assert torch.equal(out, philox.random_normal(5, 2 << 32 | 1, 3, 4))


def _refusals():
    out, words = torch.zeros(6), torch.zeros(6, dtype=torch.int64)
    good = {"out": out, "kind": "normal", "seed_lo": 1, "seed_hi": 2, "stream": 3, "purpose": 4, "threads": 1}
    cases = {
        "kind": ({"kind": "cauchy"}, ValueError, "kind must be 'words', 'uniform' or 'normal', got 'cauchy'"),
        "strided": ({"out": torch.zeros(6, 2)[:, 0]}, ValueError, "out must be contiguous, got stride 2"),
        "expanded": ({"out": torch.zeros(1).expand(6)}, ValueError, "out must be contiguous, got stride 0"),
        "fp64": ({"out": out.double()}, TypeError, "out must be float32, bfloat16 or float16, got float64"),
        "int-values": ({"out": words}, TypeError, "out must be float32, bfloat16 or float16, got int64"),
        "float-words": ({"kind": "words"}, TypeError, "out must be int64, got float32"),
        "int32-words": ({"kind": "words", "out": words.int()}, TypeError, "out must be int64, got int32"),
        "seed": ({"seed_lo": 2**32}, ValueError, r"seed_lo must be in \[0, 2\*\*32\), got 4294967296"),
        "negative-seed": ({"seed_hi": -1}, ValueError, r"seed_hi must be in \[0, 2\*\*32\), got -1"),
        "stream": ({"stream": -5}, ValueError, r"stream must be in \[0, 2\*\*32\), got -5"),
        "purpose": ({"purpose": 2**40}, ValueError, r"purpose must be in \[0, 2\*\*32\), got 1099511627776"),
        "no-thread": ({"threads": 0}, ValueError, "threads must be >= 1, got 0"),
        "list": ({"out": [1.0]}, TypeError, "incompatible function arguments"),
    }
    return [pytest.param({**good, **change}, error, text, id=name) for name, (change, error, text) in cases.items()]


@pytest.mark.parametrize(("arguments", "error", "message"), _refusals())
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        _cpu.philox_(**arguments, scale=1.0)
    if isinstance(arguments["out"], torch.Tensor):
        assert not arguments["out"].any()  # nothing was written
