"""The sums of a mask: l0 and the counts of the C++ kernels materialize and mask_sums, which share their code."""

from __future__ import annotations

import math

import pytest
import torch
from cpp_views import BLOCK, VIEWS, lay, logits_of, normal

_cpu = pytest.importorskip("csmask_kernels._cpu", reason="the C++ back end is not built")

SHAPES = [(), (1,), (7919,), (BLOCK - 1,), (BLOCK,), (BLOCK + 1,), (37, 61), (61, 3, 7, 3), (0,), (3, 0)]


def sums(logits, temperature=1.0, hard=False, scale=1.0, counts=True, threads=1):
    return _cpu.mask_sums(logits, temperature, hard, scale, counts, threads)


def sums_of_materialize(logits, temperature=1.0, hard=False, scale=1.0, counts=True, threads=1):
    weight, out = torch.ones_like(logits), torch.full_like(logits, math.nan)
    return _cpu.materialize(weight, logits, temperature, hard, scale, out, counts, threads)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_fp64(shape, hard):
    logits = logits_of(*shape)
    for temperature, scale in ((0.5, 1.0), (3.0, 1.7), (200.0, 1.0)):
        l0, kept, undecided = sums(logits, temperature, hard, scale)
        s = logits.double()
        mask = scale * ((s > 0).double() if hard else torch.sigmoid(temperature * s))
        # each mask within 3 ulp, summed in fp32 over 16 elements at most
        assert l0 == pytest.approx(mask.sum().item(), rel=1e-6)
        assert kept == int((s > 0).sum())
        # exact: no product lies within fp32's rounding of the bound
        assert undecided == int(((temperature * s).abs() < 4).sum())


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bits_of_materialize(shape, view):
    logits, _ = lay(logits_of(*shape), view)
    for hard in (False, True):
        for counts in (False, True):
            given = (logits, 3.0, hard, 1.7, counts)
            # a result that lies as the logits do: sums run in the order of memory
            out, _ = lay(torch.zeros(shape), view)
            assert sums(*given) == _cpu.materialize(torch.ones(shape), *given[:-1], out, counts, 1)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("summed", [sums, sums_of_materialize])
def test_counts(summed):
    nan, inf = math.nan, math.inf
    below = torch.nextafter(torch.tensor(4.0), torch.tensor(0.0)).item()
    logits = torch.tensor([0.0, -0.0, 1e-40, -1e-40, nan, inf, -inf, 4.0, -4.0, below, -below, 1.0, -1.0])
    assert summed(logits)[1:] == (5, 8)
    # T = 4: 1 and -1 are decided; what is kept does not depend on T
    assert summed(logits, temperature=4.0)[1:] == (5, 4)
    assert summed(logits, hard=True)[1:] == (5, 8)
    assert summed(logits, counts=False)[1:] == (0, 0)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("summed", [sums, sums_of_materialize])
def test_threads_do_not_change_a_bit(summed):
    logits = logits_of(211, 1009)  # 104 blocks: up to 13 threads have work
    want = summed(logits, 3.0, scale=1.7)
    assert all(summed(logits, 3.0, scale=1.7, threads=n) == want for n in (2, 3, 7, 13, 1000))
    assert want[1:] == (int((logits > 0).sum()), int(((3.0 * logits).abs() < 4).sum()))


@pytest.mark.parametrize("summed", [sums, sums_of_materialize])
def test_counts_of_logits_that_several_weights_share(summed):
    logits = torch.tensor([[1.0], [-1.0], [5.0]]).expand(3, 5000)
    assert summed(logits, 2.0, hard=True, threads=2) == (10_000.0, 10_000, 10_000)


def test_sums_keep_their_digits():
    """One running fp32 sum over 3M masks of 1e-4 would be off by 1e-3 or so."""
    logits = torch.full((3_000_017,), math.log(1e-4 / (1 - 1e-4)))
    assert sums(logits, threads=2)[0] == pytest.approx(torch.sigmoid(logits.double()).sum().item(), rel=1e-6)
    # large masks beside small ones, in every lane
    logits = normal(500_009) * 20
    assert sums(logits)[0] == pytest.approx(torch.sigmoid(logits.double()).sum().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mask_logits": torch.ones(3).bfloat16()}, TypeError, "mask_logits must be float32, got bfloat16"),
        ({"mask_logits": torch.ones(3).double()}, TypeError, "mask_logits must be float32, got float64"),
        ({"threads": 0}, ValueError, "threads must be >= 1, got 0"),
        ({"mask_logits": [1.0]}, TypeError, "incompatible function arguments"),
    ],
)
def test_refuses(change, error, message):
    good = {"mask_logits": torch.ones(3), "temperature": 1.0, "hard": False, "scale": 1.0, "counts": True, "threads": 1}
    with pytest.raises(error, match=message):
        _cpu.mask_sums(**{**good, **change})
