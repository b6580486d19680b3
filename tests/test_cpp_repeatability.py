"""On a CPU the same call gives the same bits: 100 times with one thread, 100 times with two, whatever memory held.

csmask's own kernels give the same bits with one thread as with two; so does l0 everywhere. Results of a matrix product
or a convolution may differ between numbers of threads: the BLAS that torch uses splits its sums by them.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from cpp_views import SmallCache, logits_of, normal, same_bits

from csmask import _cpp, _cpp_linear, functional
from csmask._ops import ops

pytest.importorskip("csmask_kernels._cpu", reason="the C++ back end is not built")

# Under a sanitizer, which is slow, the runs are about memory and not about bits.
RUNS = 3 if os.environ.get("CSMASK_CPU_MODULE") else 100
ROWS, IN, OUT = 8, 303, 257
# Blocks of 64 features, just enough for two threads, the last one smaller; twice the logits' gradient is larger than
# this, so that it is written past the caches.
CACHE = 621_000
TEMPERATURE = torch.tensor(3.0)


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    monkeypatch.setattr(_cpp, "kernels", SmallCache(CACHE))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def gradients(op, x, weight, logits, bias, **options):
    """One training step's numbers: the output, l0, and the gradients of x, logits and bias."""
    leaves = {name: t.detach().requires_grad_() for name, t in {"x": x, "logits": logits, "bias": bias}.items()}
    out, l0 = op(leaves["x"], weight, leaves["logits"], 3.0, leaves["bias"], return_l0=True, **options)
    dout = normal(*out.shape, seed=9).to(out.dtype)
    grads = torch.autograd.grad([out, l0], list(leaves.values()), [dout, torch.tensor(0.25)])
    return {"out": out.detach(), "l0": l0.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}


def linear(execution, dtype=torch.float32, transposed=False, unit=False):
    shape = (IN, OUT) if transposed else (OUT, IN)
    logits_shape = shape if not unit else (1, OUT) if transposed else (OUT, 1)
    weight, logits = normal(*shape).to(dtype), logits_of(*logits_shape)
    x, bias = normal(ROWS, IN, seed=2).to(dtype), normal(OUT, seed=3).to(dtype)
    options = {"execution": execution, "transposed": transposed, "scale": 1.5}
    return lambda: gradients(functional.masked_linear, x, weight, logits, bias, **options)


def accumulating():
    weight, logits = normal(OUT, IN), logits_of(OUT, IN).requires_grad_()
    x, bias, before = normal(ROWS, IN, seed=2).requires_grad_(), normal(OUT, seed=3), normal(OUT, IN, seed=4)

    def run():
        x.grad, logits.grad = None, before.clone()
        options = {"execution": "in_kernel", "accumulate": True, "return_l0": True}
        out, l0 = functional.masked_linear(x, weight, logits, 3.0, bias, **options)
        (out.sum() + 0.25 * l0).backward()
        return {"out": out.detach(), "l0": l0.detach(), "dx": x.grad, "dlogits": logits.grad}

    return run


def hard(dtype):
    weight, logits, x = normal(OUT, IN).to(dtype), logits_of(OUT, IN), normal(ROWS, IN, seed=2).to(dtype)
    bias = normal(OUT, seed=3).to(dtype)

    def run():
        leaf = x.detach().requires_grad_()
        out, l0 = functional.masked_linear(
            leaf, weight, logits, 3.0, bias, hard=True, execution="in_kernel", return_l0=True
        )
        return {"out": out.detach(), "l0": l0, "dx": torch.autograd.grad(out.sum(), leaf)[0]}

    return run


def conv(unit=False):
    weight, logits = normal(64, 65, 3, 3), logits_of(64, 1, 1, 1) if unit else logits_of(64, 65, 3, 3)
    x, bias = normal(2, 65, 9, 9, seed=2), normal(64, seed=3)
    return lambda: gradients(functional.masked_conv, x, weight, logits, bias, padding=1, scale=1.5)


def bitmask():
    weight, bits = normal(OUT, IN), functional.pack_mask(logits_of(OUT, IN))
    x, bias = normal(ROWS, IN, seed=2), normal(OUT, seed=3)

    def run():
        leaves = x.detach().requires_grad_(), bias.detach().requires_grad_()
        out = functional.bitmask_linear(leaves[0], weight, bits, leaves[1], scale=1.5)
        dx, dbias = torch.autograd.grad(out.square().sum(), leaves)
        return {"out": out.detach(), "dx": dx, "dbias": dbias}

    return run


PRODUCTS = {
    "linear, per_forward": linear("per_forward"),
    "linear, per_forward, bf16, transposed": linear("per_forward", torch.bfloat16, True),
    "linear, in_kernel": linear("in_kernel"),
    "linear, in_kernel, bf16, transposed": linear("in_kernel", torch.bfloat16, True),
    "linear, in_kernel, adding to grad": accumulating(),
    "linear, in_kernel, hard": hard(torch.bfloat16),
    "linear, neuron": linear("per_forward", unit=True),
    "linear, neuron, transposed": linear("in_kernel", transposed=True, unit=True),
    "conv": conv(),
    "conv, neuron": conv(unit=True),
    "bitmask_linear": bitmask(),
}


def own_kernels():
    """Ops without a matrix product: name -> the results of one call."""
    w, s, dwm = normal(OUT, IN), logits_of(OUT, IN), normal(OUT, IN, seed=4)
    unit, dl0, mask = logits_of(OUT, 1), torch.tensor(0.25), (TEMPERATURE, False, 1.5)
    z, dz = normal(150, OUT, seed=5), normal(150, OUT, seed=6)
    images = normal(6, 50, 14, 15, seed=7).to(memory_format=torch.channels_last)
    bits = functional.pack_mask(s)
    half, columns = w.half(), w.t().contiguous().t()

    def in_place(op, like, *arguments):
        def run():
            target = torch.ones_like(like)
            op(target, *arguments)
            return target

        return run

    cases = {
        "materialize": lambda: ops.materialize(w, s, *mask, None, True),
        "materialize, fp16 to bf16": lambda: ops.materialize(half, s, *mask, torch.bfloat16, True),
        "materialize, strided": lambda: ops.materialize(columns, s, *mask, None, True),
        "materialize, neuron": lambda: ops.materialize(w, unit, *mask, None, True),
        "materialize, hard": lambda: ops.materialize(w, s, TEMPERATURE, True, 1.5, None, True),
        "mask_sums": lambda: ops.mask_sums(s, *mask, 1, True),
        "logits_grad": lambda: ops.logits_grad(dwm, w, s, TEMPERATURE, dl0, 1.5),
        "logits_grad, strided": lambda: ops.logits_grad(dwm.half(), columns, s, TEMPERATURE, dl0, 1.5),
        "logits_grad, neuron": lambda: ops.logits_grad(dwm, w, unit, TEMPERATURE, dl0, 1.5),
        "logits_grad_": in_place(ops.logits_grad_, s, dwm, w, s, TEMPERATURE, dl0, 1.5),
        "scale_neurons": lambda: ops.scale_neurons(z, unit[:, 0], TEMPERATURE, normal(OUT), False, 1.5, 1),
        "scale_neurons_grad": lambda: ops.scale_neurons_grad(
            dz, z, unit[:, 0], TEMPERATURE, dl0, False, 1.5, 1, IN
        ),
        "scale_neurons_grad, images": lambda: ops.scale_neurons_grad(
            images + 1, images, unit[:50, 0], TEMPERATURE, dl0, False, 1.5, 1, 9
        ),
        "pack_mask": lambda: ops.pack_mask(s),
        "unpack_mask": lambda: ops.unpack_mask(bits, [OUT, IN]),
        "popcount": lambda: ops.popcount(bits),
        "apply_bitmask": lambda: ops.apply_bitmask(w, bits, 1.5),
        **{
            f"philox_, {kind}": in_place(ops.philox_, torch.empty(70_001, dtype=dtype), kind, 7, 9, 2, 1, 0.5)
            for kind, dtype in (("words", torch.int64), ("uniform", torch.float32), ("normal", torch.bfloat16))
        },
    }  # fmt: skip
    return {name: _named(run) for name, run in cases.items()}


def _named(run):
    def named():
        result = run()
        return dict(enumerate(result if isinstance(result, tuple) else (result,)))

    return named


OWN = own_kernels()


def poison(turn):
    """Other numbers in all memory that the next run may get: freed blocks of every size, and the scratch of blocks."""
    value = (math.nan, 1e30, -7.0)[turn % 3]
    kept = [torch.full((n,), value) for n in (64, 257, 1100, 2424, 17_600, 36_000, 77_871)]
    scratch = getattr(_cpp_linear._memory, "bytes", None)
    if scratch is not None:
        scratch.fill_((0xFF, 0x7B, 0xC1)[turn % 3])
    del kept


def assert_same(got, want, what):
    assert got.keys() == want.keys()
    wrong = [name for name in want if not same_bits(got[name], want[name])]
    assert not wrong, f"{what}: {wrong} differ"


@pytest.mark.parametrize("case", [*PRODUCTS, *OWN])
def test_every_run_gives_the_same_bits(case):
    run, by_threads = {**PRODUCTS, **OWN}[case], {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        want = {name: t.clone() for name, t in run().items()}
        assert all(t.dtype == torch.int64 or t.isfinite().all() for t in want.values())
        for turn in range(RUNS - 1):
            poison(turn)
            assert_same(run(), want, f"run {turn + 2} with {threads} threads")
        by_threads[threads] = want
    independent = list(by_threads[1]) if case in OWN else [n for n in by_threads[1] if n == "l0"]
    one, two = ({name: by_threads[n][name] for name in independent} for n in (1, 2))
    assert_same(two, one, "two threads and one")


def test_the_sizes_above_make_several_blocks_with_work_for_two_threads(monkeypatch):
    """The control: without it the tests above might show nothing."""
    calls = []

    class Recording(SmallCache):
        def __getattr__(self, name):
            kernel = super().__getattr__(name)

            def record(*args):
                calls.append((name, args[0].shape, args[-1]))
                return kernel(*args)

            return record

    monkeypatch.setattr(_cpp, "kernels", Recording(CACHE))
    PRODUCTS["linear, in_kernel"]()
    forward = [shape for _, shape, _ in calls if shape[1] == IN]
    backward = [(name, shape, streams) for name, shape, streams in calls if shape[1] != IN]
    assert len(forward) == 5
    assert len(backward) == 5
    assert forward[-1].numel() < forward[0].numel()
    per_thread = 8 * 2048  # elements that are one thread's work
    assert forward[0].numel() > per_thread
    assert backward[0][1].numel() > per_thread
    assert any(streams for name, _, streams in backward if name == "logits_grad_and_mask")
