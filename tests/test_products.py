"""Products added up in fp32, on this machine: in one piece or in blocks, in memory that there is."""

from __future__ import annotations

import pytest
import torch

from csmask import products

SIZES = [(7, 5, 3), (1, 1, 1), (64, 2, 33), (5, 0, 4), (0, 3, 4)]  # N, M, K


def operands(n, m, k, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, m, generator=generator).to(dtype), torch.randn(m, k, generator=generator).to(dtype))


@pytest.fixture(params=[1, 40, 1 << 21], ids=lambda size: f"blocks of {size} bytes")
def block_bytes(request, monkeypatch):
    monkeypatch.setattr(products, "_BLOCK_BYTES", request.param)


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("dtype", "into"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32),
     (torch.float16, torch.float32), (torch.float64, torch.float64)],
)  # fmt: skip
def test_sums_of_products_against_fp64(size, dtype, into):
    pairs = [operands(*size, dtype, seed) for seed in range(3)]
    total = products.product(*pairs[0], into)
    for pair in pairs[1:]:
        assert products.add_product(total, *pair) is total
    assert total.dtype == into
    # A product is rounded to its operands' dtype, a sum to its own.
    eps = torch.finfo(dtype).eps
    oracle = sum(a.double() @ b.double() for a, b in pairs)
    magnitude = sum(a.double().abs() @ b.double().abs() for a, b in pairs)
    assert ((total.double() - oracle).abs() <= 4 * eps * magnitude).all()


def test_sixteen_bit_products_are_added_in_fp32():
    """In bf16 a sum of ones stops at 256."""
    a, b = torch.ones(2, 1, dtype=torch.bfloat16), torch.ones(1, 3, dtype=torch.bfloat16)
    total = products.product(a, b, torch.float32)
    for _ in range(999):
        products.add_product(total, a, b)
    assert torch.equal(total, torch.full((2, 3), 1000.0))


@pytest.mark.parametrize("into", [torch.bfloat16, torch.float32])
def test_memory_is_used_where_it_fits(into):
    a, b = operands(4, 2, 3, torch.bfloat16)
    want = products.product(a, b, into)
    memory = torch.full((4, 3), float("nan"), dtype=into)
    assert products.product(a, b, into, memory) is memory
    assert torch.equal(memory, want)
    for other in (torch.full((3, 4), 9.0, dtype=into), torch.full((4, 3), 9.0, dtype=torch.float64)):
        got = products.product(a, b, into, other)
        assert torch.equal(got, want)
        assert (other == 9.0).all()
