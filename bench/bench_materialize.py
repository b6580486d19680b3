"""``materialize`` beside the reference, plain torch and a copy of the same bytes.

    pytest bench/bench_materialize.py --benchmark-only --benchmark-columns=median,iqr,rounds

The copy is the ceiling: it moves what the op has to move. Timings on shared machines are noisy, so compare medians of
one run only. Each case is checked against the fp64 reference before it is timed.
"""

from __future__ import annotations

import pytest
import torch

from csmask import _ops, functional, reference

SHAPE = (4096, 4096)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def case(request):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPE, generator=generator).to(request.param)
    mask_logits = 5 * torch.randn(SHAPE, generator=generator)
    return weight, mask_logits, torch.tensor(1.5)


def _check(masked_weight, case):
    weight, mask_logits, temperature = case
    expected, _ = reference.materialize(weight.double(), mask_logits.double(), temperature.double())
    error = (masked_weight.double() - expected).abs().max()
    assert error <= 2 * torch.finfo(weight.dtype).eps * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", ["cpp", "reference", "plain_torch", "copy"])
def test_materialize(benchmark, case, name):
    weight, mask_logits, temperature = case
    if name == "cpp" and _ops.cpu_kernels is None:
        pytest.skip("the C++ kernels are not built")
    out, logits_out = torch.empty_like(weight), torch.empty_like(mask_logits)

    def copy():
        # Reads and writes (W's size + 4) bytes per weight; materialize reads as much and writes W's size.
        out.copy_(weight)
        logits_out.copy_(mask_logits)

    run = {
        "cpp": lambda: functional.materialize(weight, mask_logits, temperature)[0],
        "reference": lambda: reference.materialize(weight, mask_logits, temperature)[0],
        "plain_torch": lambda: weight * torch.sigmoid(temperature * mask_logits).to(weight.dtype),
        "copy": copy,
    }[name]
    if name in ("cpp", "reference"):
        _check(run(), case)
    benchmark(run)
