"""The Philox kernel equals ``csmask.philox`` and ``ablation.random_values`` bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from csmask_kernels import philox as kernel
from csmask_kernels.launch import ElementwiseConfig

from csmask import ablation, philox

SMALL = ElementwiseConfig(block=64, num_warps=1)
# 1, a prime, a block less one, a block, a block and one, several blocks with a tail that is not a multiple of 4
COUNTS = [1, 7, 63, 64, 65, 331]
SEEDS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 0x9E3779B97F4A7C15, 2**64 - 1]
DRAWS = {"words": philox.random_words, "uniform": philox.random_uniform, "normal": philox.random_normal}


def halves(seed):
    return seed & 0xFFFFFFFF, seed >> 32


def filled(count, dtype):
    """What ``philox_`` must overwrite everywhere."""
    return torch.full((count,), -77, dtype=dtype)


def draw(kind, count, seed, stream, purpose, scale=1.0, dtype=torch.float32):
    out = filled(count, torch.int64 if kind == "words" else dtype)
    kernel.philox_(out, kind, *halves(seed), stream, purpose, scale, SMALL)
    return out


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("count", COUNTS)
def test_every_count(kind, count):
    want = DRAWS[kind](count, 0x0123456789ABCDEF, 5, 2)
    assert torch.equal(draw(kind, count, 0x0123456789ABCDEF, 5, 2), want)
    assert want.unique().numel() > count // 2  # the draws are not all the same


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("stream", "purpose"), [(0, 0), (1, 1), (3, 2), (2**32 - 1, 2**31)])
def test_every_seed_stream_and_purpose(kind, seed, stream, purpose):
    assert torch.equal(draw(kind, 41, seed, stream, purpose), DRAWS[kind](41, seed, stream, purpose))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("fan_in", [None, 1, 3, 768, 4096])
def test_random_values_of_the_ablation(fan_in, dtype):
    """Conv1D's normal weights where ``fan_in`` is None, a linear layer's uniform ones otherwise."""
    param = torch.empty(19, 23, dtype=dtype)
    want = ablation.random_values(param, fan_in, 2**64 - 3, 9)
    got = torch.full_like(param, math.nan)
    kind, scale = ("normal", ablation.GPT2_INIT_STD) if fan_in is None else ("uniform", 1 / math.sqrt(fan_in))
    kernel.philox_(got, kind, *halves(2**64 - 3), 9, ablation._PURPOSE_VALUES, scale, SMALL)
    assert torch.equal(got, want)


def test_products_are_rounded_one_after_the_other():
    """The control: with the two factors multiplied first, some value differs in its last bit."""
    count, scale = 4096, ablation.GPT2_INIT_STD
    plain = philox.random_normal(count, 3, 0, 2)
    want = plain * scale
    mean, inverse_std = 2040, (16 * (256**2 - 1) / 12) ** -0.5
    merged = (plain / inverse_std).round() * (inverse_std * scale)
    assert (plain / inverse_std).round().abs().max() < mean
    assert not torch.equal(merged, want)
    assert torch.equal(draw("normal", count, 3, 0, 2, scale), want)


def test_an_empty_tensor_is_left_alone():
    assert draw("uniform", 0, 1, 0, 0).numel() == 0


def test_default_config():
    out = filled(2500, torch.float32).view(50, 50)
    kernel.philox_(out, "uniform", *halves(17), 1, 2, 0.5)
    assert torch.equal(out.view(-1), philox.random_uniform(2500, 17, 1, 2) * 0.5)


@triton.jit
def _block_kernel(index_ptr, out_ptr, seed_lo, seed_hi, stream, purpose, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    w0, w1, w2, w3 = kernel.philox_block(tl.load(index_ptr + offs), seed_lo, seed_hi, stream, purpose)
    tl.store(out_ptr + offs * 4, w0.to(tl.int64))
    tl.store(out_ptr + offs * 4 + 1, w1.to(tl.int64))
    tl.store(out_ptr + offs * 4 + 2, w2.to(tl.int64))
    tl.store(out_ptr + offs * 4 + 3, w3.to(tl.int64))


def test_blocks_beyond_32_bits_use_the_second_counter():
    """No tensor is large enough to reach them in a test: the device function is given their indices."""
    index = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**33 + 7, 2**40 + 2**32 - 1])
    out = torch.full((8, 4), -1, dtype=torch.int64)
    _block_kernel[(1,)](index, out, 11, -5, 3, 2, BLOCK=8)
    counters = (index & 0xFFFFFFFF, index >> 32, torch.full_like(index, 3), torch.full_like(index, 2))
    want = torch.stack(philox.philox4x32(counters, (11, 2**32 - 5)), dim=1)
    assert torch.equal(out, want)


def test_known_answer():
    """Random123's ``kat_vectors``: counter and key all ones, which are index 2**64 - 1 and so forth."""
    index = torch.full((8,), -1, dtype=torch.int64)
    out = torch.full((8, 4), -1, dtype=torch.int64)
    _block_kernel[(1,)](index, out, -1, -1, -1, -1, BLOCK=8)
    assert out[0].tolist() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize(("kind", "dtype"), [("uniform", torch.float64), ("normal", torch.int64)])
def test_other_dtypes_are_refused(kind, dtype):
    with pytest.raises(NotImplementedError, match="float32, float16 or bfloat16"):
        kernel.philox_(filled(3, dtype), kind, 0, 0, 0, 0, 1.0)


def test_one_kernel_for_all_seeds():
    """The seed's words come as int32 whatever their value: an int64 would be compiled anew."""
    for word in (0, 1, 2**31 - 1, 2**31, 2**32 - 1):
        launch = kernel.plan(filled(3, torch.float32), "uniform", word, word, 0, 0, 1.0, None, SMALL)
        assert -(2**31) <= launch.arguments["seed_lo"] < 2**31
        assert launch.arguments["seed_lo"] % 2**32 == word
        assert launch.arguments["seed_hi"] == launch.arguments["seed_lo"]
