"""The kernels of bit-packed hard masks: bit for bit what the reference gives."""

from __future__ import annotations

import math

import pytest
import torch
from csmask_kernels import bitmask as kernel
from csmask_kernels.launch import ElementwiseConfig

from csmask import reference, testing

# Two words per program.
SMALL = ElementwiseConfig(block=64, num_warps=1)
# no entry, one, a word less one, a word, a word and one, a block and one, a prime, several dimensions
SHAPES = [(), (0,), (3, 0), (1,), (31,), (32,), (33,), (65,), (7, 13), (2, 3, 5, 7), (11, 32)]

# name: a view of fresh memory, whose logical order is not the one of the memory
LAYOUTS = {
    "transposed": lambda t: t(13, 37).t(),
    "transposed-less-than-a-word": lambda t: t(5, 3).t(),
    "channels-last": lambda t: t(3, 5, 4, 7).to(memory_format=torch.channels_last),
    "permuted": lambda t: t(3, 37, 5).permute(1, 2, 0),
    "every-other": lambda t: t(9, 14)[:, ::2],
    "cropped": lambda t: t(4, 5, 6, 7)[:, :, 1:4, 2:6],
    "cropped-everywhere-copied": lambda t: t(4, 5, 6, 7)[1:, 1:4, 1:4, 2:6],
    "expanded": lambda t: t(9, 1).expand(9, 7),
}


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory holds NaN, or -77 in integers, so that a slot that nobody writes shows."""

    def fill(tensor):
        return tensor.fill_(math.nan if tensor.is_floating_point() else -77)

    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, _new=allocate, **kwargs: fill(_new(*args, **kwargs)))


def logits_of(*shape):
    return testing.seeded_logits(shape, 1)


def weights_of(*shape):
    return testing.seeded_normal(shape, 0)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("config", [SMALL, None], ids=["small", "default"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_pack_unpack_and_popcount(shape, dtype, config):
    logits = logits_of(*shape).to(dtype)
    bits = kernel.pack_mask(logits, config)
    assert bits.dtype == torch.int32
    assert torch.equal(bits, reference.pack_mask(logits))
    kept = kernel.unpack_mask(bits, shape, config)
    assert kept.dtype == torch.bool
    assert torch.equal(kept, logits > 0)
    assert kept.view(torch.uint8).max().item() <= 1 if kept.numel() else True  # a bool of another value is not one
    count = kernel.popcount(bits, config)
    assert (count.dtype, count.shape) == (torch.int64, ())
    assert count == (logits > 0).sum()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packing_follows_the_logical_order(layout):
    logits = LAYOUTS[layout](logits_of)
    assert torch.equal(kernel.pack_mask(logits, SMALL), reference.pack_mask(logits))


def test_packing_of_edge_values():
    special = torch.tensor([math.nan, 0.0, -0.0, 1e-40, math.inf, -math.inf])
    assert kernel.pack_mask(special, SMALL).tolist() == [0b011000]
    assert kernel.pack_mask(torch.ones(64), SMALL).tolist() == [-1, -1]


@pytest.mark.usefixtures("poisoned")
def test_popcount_of_every_kind_of_word():
    words = [0, -1, 1 << 30, -(1 << 31), 0x55555555, 0x0F0F0F0F, *(1 << i for i in range(31)), *range(256)]
    bits = torch.tensor(words, dtype=torch.int32)
    want = sum((w & 0xFFFFFFFF).bit_count() for w in words)
    assert kernel.popcount(bits, SMALL) == want
    assert kernel.popcount(bits) == want
    assert kernel.popcount(bits[::2], SMALL) == sum((w & 0xFFFFFFFF).bit_count() for w in words[::2])
    for word in words:
        assert kernel.popcount(torch.tensor([word], dtype=torch.int32), SMALL) == (word & 0xFFFFFFFF).bit_count()


def check_apply(weight, logits, scale, dtype, config):
    bits = reference.pack_mask(logits)
    want = reference.apply_bitmask(weight, bits, scale, dtype)
    got = kernel.apply_bitmask(weight, bits, scale, dtype, config)
    assert got.dtype == want.dtype
    assert got.stride() == torch.empty_like(weight).stride()
    assert torch.equal(got, want)
    assert not got[logits <= 0].signbit().any()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("config", [SMALL, None], ids=["small", "default"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1.7])
@pytest.mark.parametrize("shape", SHAPES)
def test_apply(shape, scale, dtype, config):
    check_apply(weights_of(*shape).to(dtype), logits_of(*shape), scale, None, config)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("config", [SMALL, None], ids=["small", "default"])
@pytest.mark.parametrize("scale", [1.0, 1.7])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
def test_apply_to_weights_of_any_layout(layout, scale, config):
    weight = LAYOUTS[layout](weights_of)
    check_apply(weight, LAYOUTS[layout](logits_of), scale, None, config)
    check_apply(weight.half(), logits_of(*weight.shape), scale, torch.float32, config)


def test_apply_selects():
    """A pruned weight is +0 whatever it was, a kept one keeps its bits unless it is scaled."""
    weight = torch.tensor([math.nan, math.inf, -math.inf, -2.0, -0.0, math.nan, -math.inf, -0.0, 1e-40, 3.0])
    bits = torch.tensor([0b1111100000], dtype=torch.int32)
    for w in (weight, weight.repeat_interleave(2)[::2]):
        out = kernel.apply_bitmask(w, bits, 1.0, None, SMALL)
        assert out[:5].tolist() == [0.0] * 5
        assert not out[:5].signbit().any()
        assert torch.equal(out[5:].view(torch.int32), weight[5:].view(torch.int32))
        out = kernel.apply_bitmask(w, bits, 2.0, torch.float16, SMALL)
        assert out[:5].tolist() == [0.0] * 5
        assert out[6:].tolist() == [-math.inf, 0.0, 0.0, 6.0]


def test_other_dtypes_are_refused():
    with pytest.raises(NotImplementedError, match="take mask_logits in float32"):
        kernel.pack_mask(torch.ones(3, dtype=torch.float64))
    bits = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="take weight in float32"):
        kernel.apply_bitmask(torch.ones(3, dtype=torch.float64), bits, 1.0)
    with pytest.raises(NotImplementedError, match="take masked_weight in float32"):
        kernel.apply_bitmask(torch.ones(3), bits, 1.0, torch.float64)
