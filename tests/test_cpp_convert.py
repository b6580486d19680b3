"""The C++ kernels' conversions between fp32 and 16-bit floats, over all bit patterns, against torch's and numpy's own.

Seen through materialize: with a mask of exactly 1 it does nothing but load, convert and store.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cpp_views import lay, same_bits

_cpu = pytest.importorskip("csmask_kernels._cpu", reason="the C++ back end is not built")

SIXTEEN = [torch.bfloat16, torch.float16]


def convert(values, dtype, hard, view="contiguous"):
    """By the loop that loads and stores in one pass; where strided or hard, by loops that do one of the two."""
    source, _ = lay(values, view)
    out, _ = lay(torch.zeros(values.shape, dtype=dtype), view)
    logits = torch.full(values.shape, 30.0)  # a soft mask of exactly 1
    l0, _, _ = _cpu.materialize(source, logits, 1.0, hard, 1.0, out, False, 2)
    assert l0 == values.numel()
    return out


def every_pattern(dtype):
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


def assert_same(got, want):
    """Bit for bit; any NaN stands for any other."""
    assert torch.equal(got.isnan(), want.isnan())
    assert same_bits(got.masked_fill(got.isnan(), 0), want.masked_fill(want.isnan(), 0))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("view", ["contiguous", "stepped"])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_loads_are_exact(dtype, hard, view):
    values = every_pattern(dtype)
    assert values.unique().numel() > 60_000
    got = convert(values, torch.float32, hard, view)
    assert_same(got, values.to(torch.float32))
    if dtype == torch.float16:
        assert_same(got, torch.from_numpy(values.numpy().astype(np.float32)))
    else:
        assert_same(got, (values.view(torch.int16).to(torch.int32) << 16).view(torch.float32))


def around_ties(dtype):
    """fp32 numbers at each 16-bit one, halfway to its neighbours, next to these, and beyond the largest."""
    values = every_pattern(dtype)
    values = values[values.isfinite()].double()
    values, _ = values.sort()
    largest = values[-1]
    beyond = 2 * largest - values[-2]  # where the next one would be; what is halfway to it rounds to infinity
    neighbours = torch.cat([-beyond.view(1), values, beyond.view(1)])
    exact = torch.cat([values, (neighbours[1:] + neighbours[:-1]) / 2])
    fp32 = exact.float()
    assert torch.equal(fp32.double(), exact)  # ties are fp32 numbers, too
    far = torch.tensor([math.inf, 3e38, 1e38, 1e10, 0.0, 1e-38, 1e-45, math.nan])
    inf = torch.tensor(math.inf)
    return torch.cat([fp32, torch.nextafter(fp32, inf), torch.nextafter(fp32, -inf), far, -far])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("view", ["contiguous", "stepped"])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_stores_round_to_nearest_even(dtype, hard, view):
    values = around_ties(dtype)
    got = convert(values, dtype, hard, view)
    assert_same(got, values.to(dtype))
    if dtype == torch.float16:
        with np.errstate(over="ignore"):
            assert_same(got, torch.from_numpy(values.numpy().astype(np.float16)))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN])
def test_there_and_back(dtype, hard):
    """From each dtype to itself and to the other 16-bit one: one rounding, no second."""
    values = every_pattern(dtype) if dtype != torch.float32 else around_ties(torch.bfloat16)
    assert_same(convert(values, dtype, hard), values)
    for other in SIXTEEN:
        assert_same(convert(values, other, hard), values.to(torch.float32).to(other))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nan_stays_nan_whatever_its_payload(dtype):
    """A payload in the low bits alone must not be cut down to that of an infinity."""
    payloads = torch.cat([torch.arange(1, 1 << 14, 7), 1 << torch.arange(23)]).to(torch.int32)
    values = torch.cat([payloads | 0x7F800000, payloads | -0x00800000]).view(torch.float32)
    assert values.isnan().all()
    for hard in (False, True):
        got = convert(values, dtype, hard)
        assert got.isnan().all()
        if hard:  # a product may set the sign
            assert torch.equal(got.signbit(), values.signbit())
