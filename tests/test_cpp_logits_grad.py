"""The C++ kernel of logits_grad for one logit per weight, called directly, against an fp64 oracle written here.

Logits shared by a unit's weights have a kernel of their own: ``test_cpp_neurons.py``.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from cpp_views import BLOCK, FLOATS, VIEWS, assert_only_wrote, lay, logits_of, normal, same_bits

from csmask import _cpp, testing
from csmask._ops import ops

_cpu = pytest.importorskip("csmask_kernels._cpu", reason="the C++ back end is not built")

# no dimension, one, a prime, a block and its neighbours, a linear layer's and a convolution's weight
SHAPES = [(), (1,), (7919,), (BLOCK - 1,), (BLOCK,), (BLOCK + 1,), (37, 61), (61, 3, 7, 3)]


def run(dwm, weight, logits, temperature=1.0, dl0=0.0, scale=1.0, before=None, threads=1, stream=None):
    """The kernel's dlogits: what it adds to `before`, or writes where there is none."""
    dlogits = torch.full(logits.shape, math.nan) if before is None else before.clone()
    _cpu.logits_grad(dlogits, dwm, weight, logits, temperature, dl0, scale, before is not None, threads, stream)
    return dlogits


def formula(dwm, weight, logits, temperature, dl0, scale, before, compute):
    """The same in plain torch with arithmetic in `compute`: fp64 is the oracle, fp32 gives the budget."""
    e = torch.exp(-(temperature * logits.to(compute)).abs())
    dmask = dl0 if dwm is None else dwm.to(compute) * weight.to(compute) + dl0
    dlogits = dmask * scale * temperature * e / (1 + e) ** 2
    return dlogits if before is None else before.to(compute) + dlogits


def check(*arguments, **options):
    oracle, plain = formula(*arguments, torch.float64), formula(*arguments, torch.float32)
    got = run(*arguments, **options)
    testing.assert_close({"dlogits": got}, {"dlogits": oracle}, {"dlogits": plain})


def inputs(shape, dtype=torch.float32, dwm_dtype=torch.float32):
    return normal(*shape, seed=3).to(dwm_dtype), normal(*shape).to(dtype), logits_of(*shape)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("adds", [False, True], ids=["writes", "adds"])
@pytest.mark.parametrize("temperature", [1.0, 200.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_fp64(shape, temperature, adds):
    before = normal(*shape, seed=4) if adds else None
    for weight_dtype, dwm_dtype in itertools.product(FLOATS, FLOATS):
        dwm, weight, logits = inputs(shape, weight_dtype, dwm_dtype)
        for dl0, scale in ((0.0, 1.0), (0.75, 2.5)):
            check(dwm, weight, logits, temperature, dl0, scale, before, threads=2)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("adds", [False, True], ids=["writes", "adds"])
@pytest.mark.parametrize("shape", [(1,), (BLOCK + 1,), (37, 61)])
def test_the_gradient_of_l0_alone(shape, adds):
    before = normal(*shape, seed=4) if adds else None
    logits = logits_of(*shape)
    for temperature in (1.0, 200.0):
        check(None, None, logits, temperature, 0.75, 2.5, before, threads=2)
        zeros = torch.zeros(shape)
        assert torch.equal(
            run(None, None, logits, temperature, 0.75, 2.5, before),
            run(zeros, zeros, logits, temperature, 0.75, 2.5, before),
        )


@pytest.mark.usefixtures("isa")
def test_saturated_logits_keep_the_digits_of_their_gradient():
    """``m * (1 - m)`` in fp32 is exactly 0 from 17 on; here every digit counts, however small the gradient."""
    products = torch.tensor([0.0, 1.0, -1.0, 17.0, -17.0, 25.0, -60.0, 80.0])
    dwm, weight, _ = inputs((8,))
    for temperature in (1.0, 200.0):
        logits = products / temperature
        dlogits = run(dwm, weight, logits, temperature, 0.5)
        assert (dlogits != 0).all()
        want = formula(dwm, weight, logits, temperature, 0.5, 1.0, None, torch.float64)
        torch.testing.assert_close(dlogits.double(), want, rtol=2e-5, atol=0)


@pytest.mark.usefixtures("isa")
def test_nan_and_inf_stay_where_they_are():
    nan, inf = math.nan, math.inf
    logits = torch.tensor([0.25, 0.25, nan, inf, -inf, 3e38, 0.25, 0.25])
    dwm = torch.tensor([nan, inf, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    weight = torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0, 1.0, inf, 1.0])
    for temperature in (1.0, 200.0):  # 200 * 3e38 is infinite: the mask is decided, its derivative 0
        dlogits = run(dwm, weight, logits, temperature)
        assert dlogits[[0, 2]].isnan().all()
        assert dlogits[[1, 6]].tolist() == [-inf, inf]
        assert dlogits[3:6].tolist() == [0.0] * 3
        assert dlogits[7].isfinite()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    "shape", [(BLOCK + 5,), (37, 61), (5, BLOCK + 3), (BLOCK + 3, 5), (9, 4, 5, 7), (1, 1), (2, 0, 3)]
)
def test_any_strides_of_any_operand(shape, view):
    """The numbers of contiguous operands, bit for bit, and nothing written beside the result."""
    before = normal(*shape, seed=4)
    for weight_dtype, dwm_dtype in ((torch.float32, torch.float32), (torch.bfloat16, torch.float16)):
        operands = inputs(shape, weight_dtype, dwm_dtype)
        for adds, stream in ((False, False), (False, True), (True, None)):
            want = run(*operands, 3.0, 0.75, 1.7, before if adds else None)
            for moved in ({0}, {1}, {2}, {3}, {0, 1, 2, 3}):
                dwm, weight, logits = (
                    lay(t, view if k in moved else "contiguous")[0] for k, t in enumerate(operands, 1)
                )
                dlogits, memory = lay(before, view if 0 in moved else "contiguous")
                untouched = memory.clone()
                _cpu.logits_grad(dlogits, dwm, weight, logits, 3.0, 0.75, 1.7, adds, 2, stream)
                assert same_bits(dlogits, want), moved
                assert_only_wrote(memory, untouched, dlogits)


@pytest.mark.usefixtures("isa")
def test_every_operand_may_lie_in_another_order():
    operands = (torch.zeros(9, 4, 5, 7), *inputs((9, 4, 5, 7), torch.float16, torch.bfloat16))
    want = run(*operands[1:], 3.0, 0.75, 1.7)
    for views in itertools.permutations(["channels-last", "reversed-dims", "stepped", "cropped"]):
        dlogits, *rest = (lay(t, v)[0] for t, v in zip(operands, views, strict=True))
        _cpu.logits_grad(dlogits, *rest, 3.0, 0.75, 1.7, False, 1)
        assert same_bits(dlogits, want), views


@pytest.mark.usefixtures("isa")
def test_one_number_for_all_weights():
    """The gradient of a sum: expanded, all strides 0."""
    dwm, weight, logits = inputs((37, 61))
    for one in (dwm[:1, :1], dwm[:1], dwm[:, :1]):
        got = run(one.expand(37, 61), weight, logits, 3.0, 0.75, 1.7)
        assert same_bits(got, run(one.expand(37, 61).contiguous(), weight, logits, 3.0, 0.75, 1.7))


@pytest.mark.usefixtures("isa")
def test_threads_do_not_change_a_bit():
    dwm, weight, logits = inputs((211, 1009))  # 104 blocks: up to 13 threads have work
    for before in (None, normal(211, 1009, seed=4)):
        want = run(dwm, weight, logits, 3.0, 0.75, 1.7, before)
        for threads in (2, 3, 7, 13, 1000):
            assert same_bits(run(dwm, weight, logits, 3.0, 0.75, 1.7, before, threads), want)


def test_instruction_sets_agree():
    """In every bit where they have fused products; without them, in all but the last ones."""
    dwm, weight, logits = inputs((53, 211))
    before, results = _cpu.instruction_set(), {}
    try:
        for name in _cpu.instruction_sets():
            _cpu.force_instruction_set(name)
            results[name] = run(dwm, weight, logits, 20.0, 0.75, 1.7)
    finally:
        _cpu.force_instruction_set(before)
    first = next(iter(results.values()))
    for name, result in results.items():
        if name == "baseline":
            torch.testing.assert_close(result, first, rtol=1e-6, atol=0)
        else:
            assert same_bits(result, first), name


@pytest.mark.usefixtures("isa")
def test_unaligned_slices_and_nothing_beyond_them():
    """Every start within 64 bytes and tails of every length, stored through the caches and past them."""
    dwm_base, weight_base, logits_base = inputs((BLOCK + 40,))
    memory = torch.full((BLOCK + 40,), 7.0)
    for start, stream in itertools.product(range(17), (False, True)):
        for stop in (start, start + 1, start + 16, BLOCK, BLOCK + start, BLOCK + 21):
            rest = (dwm_base[start + 2 : stop + 2], weight_base[start:stop], logits_base[start + 1 : stop + 1])
            memory.fill_(7.0)
            _cpu.logits_grad(memory[start + 3 : stop + 3], *rest, 3.0, 0.75, 1.7, False, 1, stream)
            assert torch.equal(memory[start + 3 : stop + 3], run(*(t.clone() for t in rest), 3.0, 0.75, 1.7))
            assert (memory[: start + 3] == 7.0).all()
            assert (memory[stop + 3 :] == 7.0).all()


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("shape", [(0,), (4, 0), (0, 4)])
def test_empty(shape, adds):
    empty = torch.empty(shape)
    assert run(empty, empty.clone(), empty.clone(), 1.0, 0.5, before=empty if adds else None).shape == shape
    assert run(None, None, empty, 1.0, 0.5).shape == shape


def test_numpy_arrays_are_accepted_and_written_in_place():
    dlogits, ones = np.full(5, 2.0, dtype=np.float32), np.ones(5, dtype=np.float32)
    ones.flags.writeable = False
    _cpu.logits_grad(dlogits, ones, ones, np.zeros(5, dtype=np.float32), 4.0, 1.0, 1.0, True, 1)
    assert (dlogits == 2.0 + 2 * 4.0 / 4).all()


def test_the_op_takes_one_expanded_zero_for_no_gradient_at_all(monkeypatch):
    """A masked weight of which only l0 was used: nothing of its size is read; the numbers are the same."""
    _, weight, logits = inputs((37, 61))
    given = []

    class Kernels:
        @staticmethod
        def logits_grad(dlogits, dwm, *arguments):
            given.append(dwm is None)
            _cpu.logits_grad(dlogits, dwm, *arguments)

    monkeypatch.setattr(_cpp, "kernels", Kernels)
    mask = (weight, logits, torch.tensor(3.0), torch.tensor(0.75), 1.7)
    want = run(torch.zeros(37, 61), weight, logits, 3.0, 0.75, 1.7)
    for dwm in (torch.zeros(()).expand(37, 61), torch.zeros(37, 61), torch.ones(()).expand(37, 61)):
        got = ops.logits_grad(dwm, *mask)
        assert torch.equal(got, want) == (dwm.max() == 0)
    assert given == [True, False, False]


def _refusals():
    dlogits, dwm, weight, logits = torch.zeros(6, 4), torch.ones(6, 4), torch.ones(6, 4), torch.ones(6, 4)
    good = {"dlogits": dlogits, "dmasked_weight": dwm, "weight": weight, "mask_logits": logits, "threads": 1}
    own, floats = "dlogits must have an address of its own", "must be float32, bfloat16 or float16, got"
    long = torch.ones(60)
    return [
        ({**good, **change}, error, message)
        for change, error, message in (
            ({"dlogits": dlogits.half()}, TypeError, "dlogits must be float32, got float16"),
            ({"dlogits": dlogits.double()}, TypeError, "dlogits must be float32, got float64"),
            ({"mask_logits": logits.bfloat16()}, TypeError, "mask_logits must be float32, got bfloat16"),
            ({"weight": weight.double()}, TypeError, f"weight {floats} float64"),
            ({"dmasked_weight": dwm.int()}, TypeError, f"dmasked_weight {floats} int32"),
            ({"weight": None}, ValueError, "dmasked_weight and weight must be given together"),
            ({"dmasked_weight": None}, ValueError, "dmasked_weight and weight must be given together"),
            ({"weight": torch.ones(4, 6)}, ValueError, r"weight must have shape \(6, 4\) like dlogits, got \(4, 6\)"),
            ({"dmasked_weight": torch.ones(6, 3)}, ValueError, r"dmasked_weight must have shape \(6, 4\) like dlogits"),
            ({"mask_logits": torch.ones(6, 1)}, ValueError, r"mask_logits must have shape \(6, 4\) like dlogits"),
            ({"dlogits": torch.zeros(24)}, ValueError, r"mask_logits must have shape \(24\) like dlogits"),
            ({"dlogits": torch.zeros(4).expand(6, 4)}, ValueError, own),
            ({"dlogits": torch.zeros(60).as_strided((6, 4), (3, 1))}, ValueError, own),
            ({"dlogits": weight}, ValueError, "dlogits must not share memory with weight"),
            ({"dlogits": dwm}, ValueError, "dlogits must not share memory with dmasked_weight"),
            ({"dlogits": logits}, ValueError, "dlogits must not share memory with mask_logits"),
            (
                {"dlogits": long[:24].view(6, 4), "dmasked_weight": long.view(torch.float16)[46:70].view(6, 4)},
                ValueError,
                "dlogits must not share memory with dmasked_weight",
            ),
            ({"threads": 0}, ValueError, "threads must be >= 1, got 0"),
            ({"dlogits": None}, TypeError, "incompatible function arguments"),
            ({"mask_logits": None}, TypeError, "incompatible function arguments"),
        )
    ]


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("arguments", "error", "message"), _refusals())
def test_refuses(arguments, error, message, add):
    before = None if arguments["dlogits"] is None else arguments["dlogits"].clone()
    with pytest.raises(error, match=message):
        _cpu.logits_grad(temperature=1.0, dl0=1.0, scale=1.0, add=add, **arguments)
    assert before is None or torch.equal(arguments["dlogits"], before)
