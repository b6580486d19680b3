"""The C++ kernels of bit-packed hard masks, bit for bit against numpy's ``packbits``."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from csmask import _cpp_units

_cpu = pytest.importorskip("csmask_kernels._cpu", reason="the C++ back end is not built")

BLOCK = 2048  # elements per unit of work
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# no dimension, no entry, one, a word and its neighbours, a block and its neighbours, a prime, several dimensions, rows
# of whole words, more than one thread's share
SHAPES = [
    (), (0,), (3, 0), (1,), (31,), (32,), (33,), (BLOCK - 1,), (BLOCK,), (BLOCK + 1,), (7919,), (7, 13), (2, 3, 5, 7),
    (11, 64), (60, 1009),
]  # fmt: skip
# name: a view of memory whose order is not the logical one; t makes a contiguous tensor of a shape
LAYOUTS = {
    "transposed": lambda t: t(67, 101).t(),
    "transposed-less-than-a-word": lambda t: t(5, 3).t(),
    "transposed-longer-than-a-block": lambda t: t(BLOCK + 3, 5).t(),
    "channels-last": lambda t: t(3, 5, 4, 7).to(memory_format=torch.channels_last),
    "permuted": lambda t: t(3, 37, 5).permute(1, 2, 0),
    "every-other": lambda t: t(9, 140)[:, ::2],
    "every-other-row": lambda t: t(18, 70)[1::2],
    "cropped": lambda t: t(4, 5, 6, 7)[1:, 1:4, 1:4, 2:6],
    "expanded": lambda t: t(9, 1).expand(9, 70),
}


@pytest.fixture(params=_cpu.instruction_sets())
def isa(request):
    """Runs the test once per instruction set that this CPU has."""
    before = _cpu.instruction_set()
    _cpu.force_instruction_set(request.param)
    yield request.param
    _cpu.force_instruction_set(before)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def logits_of(*shape):
    logits = normal(*shape, seed=1)
    logits.view(-1)[::5] = 0.0
    return logits


def packed_in_numpy(kept):
    """int32 words of a boolean tensor, in its logical order."""
    flat = kept.numpy().reshape(-1)
    padded = np.concatenate([flat, np.zeros(-flat.size % 32, dtype=bool)])
    return torch.from_numpy(np.packbits(padded, bitorder="little").view("<i4").astype(np.int32))


def pack(logits, threads=1):
    bits = torch.full(((logits.numel() + 31) // 32,), -77, dtype=torch.int32)
    _cpu.pack_mask(logits, bits, threads)
    return bits


def unpack(bits, shape, threads=1):
    out = torch.full(shape, 77, dtype=torch.uint8).view(torch.bool)
    _cpu.unpack_mask(bits, out, threads)
    return out


def apply(weight, bits, start=0, row_step=None, col_step=1, scale=1.0, dtype=None, threads=1, stream=None, out=None):
    if out is None:
        out = torch.empty_like(weight, dtype=dtype or weight.dtype).fill_(math.nan)
    row_step = (weight.shape[-1] if weight.dim() else 1) if row_step is None else row_step
    _cpu.apply_bitmask(weight, bits, start, row_step, col_step, scale, out, threads, stream)
    return out


def selected(weight, kept, scale, dtype):
    """The oracle: the product, exact in fp64, rounded to fp32 and then to the result's dtype; a select."""
    product = (weight.double() * scale).float()
    return torch.where(kept, product, torch.zeros(())).to(dtype)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_pack_unpack_and_popcount(shape, dtype):
    logits = logits_of(*shape).to(dtype)
    bits = pack(logits, threads=2)
    assert torch.equal(bits, packed_in_numpy(logits > 0))
    kept = unpack(bits, shape, threads=2)
    assert torch.equal(kept, logits > 0)
    # a bool of another value than 0 or 1 is not one
    assert kept.numel() == 0 or kept.view(torch.uint8).max() <= 1
    assert _cpu.popcount(bits, 2) == int((logits > 0).sum())


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packing_follows_the_logical_order(layout):
    logits = LAYOUTS[layout](logits_of)
    for dtype in FLOATS:
        assert torch.equal(pack(logits.to(dtype)), packed_in_numpy(logits > 0))


@pytest.mark.usefixtures("isa")
def test_packing_of_edge_values():
    special = torch.tensor([math.nan, 0.0, -0.0, 1e-40, math.inf, -math.inf, -math.nan, -1e-40] * 5)
    assert torch.equal(pack(special), packed_in_numpy(torch.tensor([0, 0, 0, 1, 1, 0, 0, 0] * 5, dtype=torch.bool)))
    assert pack(torch.ones(64)).tolist() == [-1, -1]


@pytest.mark.usefixtures("isa")
def test_popcount_of_every_kind_of_word():
    words = [0, -1, 1 << 30, -(1 << 31), 0x55555555, 0x0F0F0F0F, *(1 << i for i in range(31)), *range(256)]
    want = [(w & 0xFFFFFFFF).bit_count() for w in words]
    bits = torch.tensor(words, dtype=torch.int32)
    assert [_cpu.popcount(bits[i : i + 1], 1) for i in range(len(words))] == want
    assert _cpu.popcount(bits, 1) == sum(want)
    assert _cpu.popcount(bits[::3], 1) == sum(want[::3])
    full = torch.full((20 * BLOCK + 1,), -1, dtype=torch.int32)  # more bits than 16 bits count, in several threads
    assert _cpu.popcount(full, 3) == 32 * (20 * BLOCK + 1)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1.75])
@pytest.mark.parametrize("shape", SHAPES)
def test_apply(shape, scale, stream):
    logits = logits_of(*shape)
    bits = packed_in_numpy(logits > 0)
    for weight_dtype in FLOATS:
        weight = normal(*shape).to(weight_dtype)
        for dtype in FLOATS:
            got = apply(weight, bits, scale=scale, dtype=dtype, threads=2, stream=stream)
            assert torch.equal(got, selected(weight, logits > 0, scale, dtype)), (weight_dtype, dtype)
            assert not got[logits <= 0].signbit().any()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_apply_to_weights_of_any_layout(layout, stream):
    weight = LAYOUTS[layout](normal)
    logits = logits_of(*weight.shape)
    bits = packed_in_numpy(logits > 0)
    for scale, dtype in ((1.0, torch.float32), (1.0, torch.float16), (1.75, torch.float32)):
        want = selected(weight, logits > 0, scale, dtype)
        assert torch.equal(apply(weight, bits, scale=scale, dtype=dtype, stream=stream), want)
        if layout != "expanded":
            strided = LAYOUTS[layout](lambda *shape: torch.full(shape, math.nan)).to(dtype)
            apply(weight, bits, scale=scale, out=strided, stream=stream)
            assert torch.equal(strided, want)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_apply_keeps_every_bit(dtype, stream):
    """Denormals, both zeros and NaNs with payloads, signalling ones too; what is pruned is +0, whatever it was."""
    storage = torch.int32 if dtype == torch.float32 else torch.int16
    extent = 1 << (8 * dtype.itemsize - 1)
    patterns = torch.randint(-extent, extent, (97, 65), generator=torch.Generator().manual_seed(1)).to(storage)
    patterns[0, :6] = torch.tensor([0, 1, -1, -extent, -extent + 1, extent - 1]).to(storage)
    kept = logits_of(97, 65) > 0
    bits = packed_in_numpy(kept)
    want = torch.where(kept, patterns, torch.zeros_like(patterns))
    assert torch.equal(apply(patterns.view(dtype), bits, stream=stream).view(storage), want)
    columns = patterns.t().contiguous().t()
    assert torch.equal(apply(columns.view(dtype), bits, stream=stream).view(storage), want)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("scale", [1.0, 1.75])
def test_apply_selects(scale):
    special = torch.tensor([math.nan, math.inf, -math.inf, -2.0, -0.0], dtype=torch.float32)
    out = apply(torch.cat([special, special]), torch.tensor([0b1111100000], dtype=torch.int32), scale=scale)
    assert out[:5].tolist() == [0.0] * 5
    assert not out[:5].signbit().any()
    assert out[5].isnan()
    assert out[6:].tolist() == [math.inf, -math.inf, -2.0 * scale, 0.0]
    assert out[9].signbit()


# rows and columns of a (70, 133) matrix: its corners, words cut in two, one column, one row, one element, nothing
BLOCKS = [
    (slice(0, 70), slice(0, 133)), (slice(3, 40), slice(5, 133)), (slice(0, 70), slice(31, 33)),
    (slice(69, 70), slice(100, 133)), (slice(10, 60), slice(64, 65)), (slice(69, 70), slice(132, 133)),
    (slice(1, 69), slice(32, 96)), (slice(5, 5), slice(0, 133)),
]  # fmt: skip


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("rows", "cols"), BLOCKS)
def test_apply_to_a_block(rows, cols):
    weight, kept = normal(70, 133), logits_of(70, 133) > 0
    bits = packed_in_numpy(kept)
    start = rows.start * 133 + cols.start
    for scale, dtype in ((1.0, torch.float32), (1.75, torch.bfloat16)):
        want = selected(weight, kept, scale, dtype)[rows, cols]
        block = weight[rows, cols]
        assert torch.equal(apply(block, bits, start, 133, 1, scale, dtype), want)
        assert torch.equal(apply(block.t(), bits, start, 1, 133, scale, dtype), want.t())
        # from columns to rows: the bits of a run lie a row apart
        out = torch.full((want.shape[1], want.shape[0]), math.nan, dtype=dtype)
        apply(block, bits, start, 133, 1, scale, out=out.t())
        assert torch.equal(out.t(), want)
        backwards = apply(block.flip(0), bits, start + (block.shape[0] - 1) * 133, -133, 1, scale, dtype)
        assert torch.equal(backwards, want.flip(0))


@pytest.mark.usefixtures("isa")
def test_bits_may_be_strided():
    weight, kept = normal(7, 61), logits_of(7, 61) > 0
    bits = packed_in_numpy(kept).repeat_interleave(3)
    bits[1::3], bits[2::3] = -1, 0x5A5A5A5A
    assert torch.equal(apply(weight, bits[::3]), selected(weight, kept, 1.0, torch.float32))
    assert torch.equal(unpack(bits[::3], (7, 61)), kept)


@pytest.mark.usefixtures("isa")
def test_threads_do_not_change_a_bit():
    logits, weight = logits_of(211, 1009), normal(211, 1009)  # 104 blocks: up to 13 threads have work
    bits = pack(logits)
    for threads in (2, 3, 7, 1000):
        assert torch.equal(pack(logits, threads), bits)
        assert torch.equal(unpack(bits, logits.shape, threads), logits > 0)
        assert _cpu.popcount(bits, threads) == int((logits > 0).sum())
        assert torch.equal(apply(weight, bits, scale=1.75, threads=threads), apply(weight, bits, scale=1.75))


@pytest.mark.usefixtures("isa")
def test_nothing_beyond_a_slice_is_read_or_written():
    logits, words = torch.full((BLOCK + 8,), math.inf), torch.full((70,), 7, dtype=torch.int32)
    logits[3:68] = logits_of(65)
    _cpu.pack_mask(logits[3:68], words[2:5], 1)
    assert torch.equal(words[2:5], packed_in_numpy(logits[3:68] > 0))
    assert (words[:2] == 7).all()
    assert (words[5:] == 7).all()
    kept = torch.ones(80, dtype=torch.uint8) * 9
    _cpu.unpack_mask(words[2:5], kept.view(torch.bool)[3:68], 1)
    assert torch.equal(kept[3:68].view(torch.bool), logits[3:68] > 0)
    assert (kept[:3] == 9).all()
    assert (kept[68:] == 9).all()
    for stream in (False, True):
        out = torch.full((BLOCK + 8,), 9.0)
        apply(torch.ones(65), words[2:5], out=out[3:68], stream=stream)
        assert torch.equal(out[3:68], (logits[3:68] > 0).float())
        assert (out[:3] == 9).all()
        assert (out[68:] == 9).all()


def test_the_operators():
    for shape in SHAPES:
        logits, weight = logits_of(*shape), normal(*shape).half()
        want = packed_in_numpy(logits > 0)
        for dtype in (torch.float32, torch.float64):  # the latter has no kernel
            assert torch.equal(_cpp_units.pack_mask(logits.to(dtype).requires_grad_()), want)
            got = _cpp_units.apply_bitmask(weight.to(dtype).requires_grad_(), want, 1.75, dtype)
            assert torch.equal(got, torch.where(logits > 0, weight.to(dtype) * 1.75, 0))
        assert torch.equal(_cpp_units.unpack_mask(want, shape), logits > 0)
        count = _cpp_units.popcount(want)
        assert (count.dtype, count.shape) == (torch.int64, ())
        assert count == (logits > 0).sum()
        assert torch.equal(_cpp_units.apply_bitmask(weight, want, 1.0), torch.where(logits > 0, weight, 0))
    weight = normal(3, 5, 4, 7).to(memory_format=torch.channels_last)
    got = _cpp_units.apply_bitmask(weight, packed_in_numpy(weight > 0), 1.0)
    assert got.stride() == weight.stride()
    assert torch.equal(got, weight.relu())
    assert torch.equal(_cpp_units.unpack_mask(torch.full((9,), -1, dtype=torch.int32), (33,)), torch.ones(33) > 0)


def _refusals():
    weight, logits, bits = torch.ones(6, 8), torch.ones(6, 8), torch.zeros(2, dtype=torch.int32)
    kept = torch.zeros(6, 8, dtype=torch.bool)
    apply_ = {"weight": weight, "bits": bits, "start": 0, "row_step": 8, "col_step": 1, "out": torch.zeros(6, 8)}
    apply_ |= {"scale": 1.0, "threads": 1}
    pack_ = {"mask_logits": logits, "bits": bits, "threads": 1}
    unpack_ = {"bits": bits, "out": kept, "threads": 1}
    count_ = {"bits": bits, "threads": 1}
    shared = torch.zeros(64)
    beyond = "must give bits among the 64 of bits, got"
    return [
        ("pack_mask", pack_, {"bits": bits.long()}, TypeError, "bits must be int32, got int64"),
        ("pack_mask", pack_, {"bits": bits.view(torch.uint8)}, TypeError, "bits must be int32, got uint8"),
        ("pack_mask", pack_, {"bits": bits[:1]}, ValueError, "bits must have 2 elements, got 1"),
        ("pack_mask", pack_, {"bits": bits.view(1, 2)}, ValueError, "bits must have 1 dimension, got 2"),
        ("pack_mask", pack_, {"bits": torch.zeros(4, dtype=torch.int32)[::2]}, ValueError, "bits must be contiguous"),
        ("pack_mask", pack_, {"mask_logits": logits.double()}, TypeError, "mask_logits must be float32, bfloat16 or"),
        ("pack_mask", pack_, {"threads": 0}, ValueError, "threads must be >= 1, got 0"),
        ("pack_mask", pack_, {"mask_logits": shared, "bits": shared.view(torch.int32)[:2]}, ValueError, "share memory"),
        ("unpack_mask", unpack_, {"out": kept.byte()}, TypeError, "out must be bool"),
        ("unpack_mask", unpack_, {"out": kept[:2]}, ValueError, "bits must have 1 elements, got 2"),
        ("unpack_mask", unpack_, {"out": kept.t()}, ValueError, "out must be contiguous"),
        ("unpack_mask", unpack_, {"out": bits.view(torch.bool), "bits": bits[:1]}, ValueError, "share memory"),
        ("popcount", count_, {"bits": bits.float()}, TypeError, "bits must be int32, got float32"),
        ("popcount", count_, {"threads": -1}, ValueError, "threads must be >= 1, got -1"),
        ("apply_bitmask", apply_, {"weight": weight.double()}, TypeError, "weight must be float32, bfloat16 or"),
        ("apply_bitmask", apply_, {"out": torch.zeros(8, 6)}, ValueError, r"weight must have shape \(8, 6\) like out"),
        ("apply_bitmask", apply_, {"out": torch.zeros(1).expand(6, 8)}, ValueError, "an address of its own"),
        ("apply_bitmask", apply_, {"out": weight}, ValueError, "out must not share memory with weight"),
        ("apply_bitmask", apply_, {"bits": bits.long()}, TypeError, "bits must be int32, got int64"),
        ("apply_bitmask", apply_, {"bits": bits[:1]}, ValueError, "among the 32 of bits, got 0 to 47"),
        ("apply_bitmask", apply_, {"start": 17}, ValueError, f"{beyond} 17 to 64"),
        ("apply_bitmask", apply_, {"start": -1}, ValueError, f"{beyond} -1 to 46"),
        ("apply_bitmask", apply_, {"row_step": -8}, ValueError, f"{beyond} -40 to 7"),
        ("apply_bitmask", apply_, {"col_step": 8}, ValueError, f"{beyond} 0 to 96"),
        ("apply_bitmask", apply_, {"threads": 0}, ValueError, "threads must be >= 1, got 0"),
    ]


@pytest.mark.parametrize(("name", "arguments", "change", "error", "message"), _refusals())
def test_refuses(name, arguments, change, error, message):
    arguments = {**arguments, **change}
    results = [n for n in ("out", "bits") if n in arguments]
    before = [arguments[n].clone() for n in results]
    with pytest.raises(error, match=message):
        getattr(_cpu, name)(**arguments)
    assert all(torch.equal(arguments[n], b) for n, b in zip(results, before, strict=True))
