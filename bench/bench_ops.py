"""Every op by itself at a moderate size, beside plain torch and a copy: pytest-benchmark's table.

    pytest bench/ --benchmark-only --benchmark-columns=median,iqr,rounds -k "materialize and fp32"

``csmask`` is the op as the CPU dispatches it, ``plain`` the same in plain torch. The copy moves 64 MiB and is the
ceiling. Each op is checked against plain torch, or the fp64 reference, before it is timed. Timings on shared machines
are noisy: compare medians of one run only; ``bench/run.py`` lets what it compares take turns.
"""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES
from gpu_inputs import elementwise_calls
from mode_bandwidth import check

from csmask import _ops, _plain, functional, reference, testing

SIZE = 1024
TOKENS = 64
CPU = torch.device("cpu")
KERNELS = list(elementwise_calls(8, 32, torch.float32, CPU, lambda name: name))
BACK_ENDS = {"csmask": lambda op: getattr(_ops.ops, op), "plain": _plain.OPS.__getitem__}
FUNCTIONS = {"csmask": functional, "plain": reference}


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_elementwise(benchmark, kernel, back_end, dtype):
    torch.manual_seed(0)
    make, size = elementwise_calls(SIZE, SIZE, DTYPES[dtype], CPU, BACK_ENDS[back_end])[kernel]
    check(kernel, SIZE, DTYPES[dtype], CPU)
    benchmark.extra_info["bytes"] = size
    benchmark(make())


@pytest.mark.parametrize("dtype", DTYPES)
def test_copy(benchmark, dtype):
    source = torch.randn((32 << 20) // DTYPES[dtype].itemsize).to(DTYPES[dtype])
    target = torch.empty_like(source)
    benchmark.extra_info["bytes"] = 2 * source.nbytes
    benchmark(lambda: target.copy_(source))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("how", ["per_forward", "in_kernel", "plain"])
@pytest.mark.parametrize("op", ["masked_linear", "masked_conv"])
def test_forward_and_backward(benchmark, op, how, dtype):
    if op == "masked_linear":
        inputs, options = testing.linear_inputs((TOKENS,), SIZE, SIZE, DTYPES[dtype]), {}
    else:
        inputs, options = testing.conv_inputs((4, 64, 28, 28), (64, 64, 3, 3), DTYPES[dtype]), {"padding": 1}
    if how != "plain":
        options["execution"] = how
    functions = FUNCTIONS.get(how, functional)
    got = testing.run(functions, op, inputs, 1.5, **options)
    testing.assert_close(
        got, *testing.oracle_and_budget(op, inputs, 1.5, **{k: options[k] for k in options if k == "padding"})
    )
    leaves = {name: tensor.requires_grad_(name != "weight") for name, tensor in inputs.items()}
    dout = torch.ones_like(got["out"])

    def train():
        arguments = (leaves["x"], leaves["weight"], leaves["mask_logits"], 1.5, leaves["bias"])
        getattr(functions, op)(*arguments, **options).backward(dout)
        for leaf in leaves.values():
            leaf.grad = None

    benchmark(train)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("how", ["csmask", "plain"])
def test_bitmask_linear(benchmark, how, dtype):
    inputs = testing.linear_inputs((TOKENS,), SIZE, SIZE, DTYPES[dtype], bias=False)
    x, weight, logits = inputs["x"], inputs["weight"], inputs["mask_logits"]
    bits = functional.pack_mask(logits)
    expected = x.double() @ torch.where(logits > 0, weight, 0).double().t()
    plain = x @ torch.where(logits > 0, weight, 0).t()
    got = functional.bitmask_linear(x, weight, bits)
    testing.assert_close({"out": got}, {"out": expected}, {"out": plain})
    hard = {
        "csmask": lambda: functional.bitmask_linear(x, weight, bits),
        "plain": lambda: reference.masked_linear(x, weight, logits, 1.5, hard=True),
    }
    benchmark(hard[how])
