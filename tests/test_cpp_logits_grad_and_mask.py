"""The C++ kernel that takes a gradient and leaves the masked weight in its place: to the bit what two kernels give."""

from __future__ import annotations

import itertools

import pytest
import torch
from cpp_views import BLOCK, FLOATS, VIEWS, assert_only_wrote, lay, logits_of, normal, same_bits

_cpu = pytest.importorskip("csmask_kernels._cpu", reason="the C++ back end is not built")

SHAPES = [(), (1,), (7919,), (BLOCK - 1,), (BLOCK + 1,), (37, 61), (2, 0, 3), (61, 3, 7, 3)]
MASK = (3.0, 0.75, 1.7)  # temperature, dl0, scale


def by_two_kernels(dwm, weight, logits, before=None):
    """dlogits and the masked weight; ``test_cpp_logits_grad`` and ``test_materialize`` hold these against fp64."""
    dlogits = torch.zeros(logits.shape) if before is None else before.clone()
    _cpu.logits_grad(dlogits, dwm, weight, logits, *MASK, before is not None, 1)
    masked_weight = torch.empty(dwm.shape, dtype=dwm.dtype)
    _cpu.materialize(weight, logits, MASK[0], False, MASK[2], masked_weight, False, 1)
    return dlogits, masked_weight


def inputs(shape, dtype=torch.float32, dwm_dtype=torch.float32):
    return normal(*shape, seed=3).to(dwm_dtype), normal(*shape).to(dtype), logits_of(*shape)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("adds", [False, True], ids=["writes", "adds"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_dtype_threads_and_special_numbers(shape, adds):
    before = normal(*shape, seed=4) if adds else None
    for weight_dtype, dwm_dtype in itertools.product(FLOATS, FLOATS):
        dwm, weight, logits = inputs(shape, weight_dtype, dwm_dtype)
        if logits.numel() > 30:
            for tensor, places in ((logits, range(5)), (weight, range(4, 9)), (dwm, range(8, 13))):
                values = (float("nan"), float("inf"), float("-inf"), 0.0, -0.0)
                tensor.view(-1)[list(places)] = torch.tensor(values, dtype=tensor.dtype)
        want = by_two_kernels(dwm, weight, logits, before)
        for threads, stream in ((1, False), (3, None), (2, True)):
            dlogits = torch.full(shape, 9.0) if before is None else before.clone()
            taken = dwm.clone()
            _cpu.logits_grad_and_mask(dlogits, taken, weight, logits, *MASK, adds, threads, stream)
            assert same_bits(dlogits, want[0]), (weight_dtype, dwm_dtype, threads)
            assert same_bits(taken, want[1]), (weight_dtype, dwm_dtype, threads)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", [(BLOCK + 5,), (37, 61), (5, BLOCK + 3), (9, 4, 5, 7)])
def test_any_strides_and_nothing_written_beside_them(shape, view):
    for weight_dtype, dwm_dtype in ((torch.float32, torch.float32), (torch.bfloat16, torch.float16)):
        operands = inputs(shape, weight_dtype, dwm_dtype)
        want = by_two_kernels(*operands)
        for moved in ({0}, {1}, {2}, {3}, {0, 1, 2, 3}):
            (dwm, taken), (weight, _), (logits, _) = (
                lay(t, view if k in moved else "contiguous") for k, t in enumerate(operands, 1)
            )
            dlogits, memory = lay(torch.zeros(shape), view if 0 in moved else "contiguous")
            untouched = memory.clone(), taken.clone()
            _cpu.logits_grad_and_mask(dlogits, dwm, weight, logits, *MASK, False, 2)
            assert same_bits(dlogits, want[0]), moved
            assert same_bits(dwm, want[1]), moved
            assert_only_wrote(memory, untouched[0], dlogits)
            assert_only_wrote(taken, untouched[1], dwm)


def _refusals():
    dlogits, dwm, weight, logits = torch.zeros(6, 4), torch.ones(6, 4), torch.ones(6, 4), torch.ones(6, 4)
    good = {"dlogits": dlogits, "dmasked_weight": dwm, "weight": weight, "mask_logits": logits, "threads": 1}
    own = "dmasked_weight must have an address of its own"
    return [
        ({**good, **change}, error, message)
        for change, error, message in (
            ({"dmasked_weight": torch.ones(4).expand(6, 4)}, ValueError, own),
            ({"dmasked_weight": torch.ones(60).as_strided((6, 4), (3, 1))}, ValueError, own),
            ({"dmasked_weight": weight}, ValueError, "dmasked_weight must not share memory with weight"),
            ({"dmasked_weight": logits}, ValueError, "dmasked_weight must not share memory with mask_logits"),
            ({"dmasked_weight": dlogits}, ValueError, "dlogits must not share memory with dmasked_weight"),
            ({"dmasked_weight": dwm.double()}, TypeError, "dmasked_weight must be float32, bfloat16 or float16"),
            ({"dmasked_weight": torch.ones(6, 3)}, ValueError, r"dmasked_weight must have shape \(6, 4\) like dlogits"),
            ({"weight": torch.ones(4, 6)}, ValueError, r"weight must have shape \(6, 4\) like dlogits"),
            ({"dlogits": dlogits.half()}, TypeError, "dlogits must be float32, got float16"),
            ({"threads": 0}, ValueError, "threads must be >= 1, got 0"),
            ({"dmasked_weight": None}, TypeError, "incompatible function arguments"),
            ({"weight": None}, TypeError, "incompatible function arguments"),
        )
    ]


@pytest.mark.parametrize(("arguments", "error", "message"), _refusals())
def test_refuses_and_changes_nothing(arguments, error, message):
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(error, match=message):
        _cpu.logits_grad_and_mask(temperature=1.0, dl0=1.0, scale=1.0, add=False, **arguments)
    assert all(torch.equal(arguments[name], value) for name, value in before.items())


def test_memory_that_may_not_be_written_to_is_refused():
    block = torch.ones(6).numpy()
    block.flags.writeable = False
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _cpu.logits_grad_and_mask(torch.zeros(6), block, torch.ones(6), torch.ones(6), *MASK, False, 1)
