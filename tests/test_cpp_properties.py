"""Properties of the C++ back end: ops over shapes, strides, dtypes, temperatures, threads, caches, instruction sets.

Each op against the reference in fp64 by the one tolerance rule of ``csmask.testing``; results do not depend on how the
inputs lie in memory; and no input is written to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os

import pytest
import torch
from cpp_views import BLOCK, FLOATS, STORAGE, VIEWS, SmallCache, assert_only_wrote, lay, same_bits
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from csmask import _cpp, reference, testing
from csmask._ops import ops

_cpu = pytest.importorskip("csmask_kernels._cpu", reason="the C++ back end is not built")

# Derandomized: the same examples in every run. Under a sanitizer, which is slow, fewer.
FRACTION = 4 if os.environ.get("CSMASK_CPU_MODULE") else 1


def examples(count):
    options = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
    return settings(max_examples=count // FRACTION, **options)


@dataclasses.dataclass(frozen=True)
class Machine:
    instruction_set: str
    threads: int
    cache: int

    @contextlib.contextmanager
    def running(self):
        before = _cpu.instruction_set(), torch.get_num_threads(), _cpp.kernels
        _cpu.force_instruction_set(self.instruction_set)
        torch.set_num_threads(self.threads)
        _cpp.kernels = SmallCache(self.cache)
        try:
            yield
        finally:
            _cpu.force_instruction_set(before[0])
            torch.set_num_threads(before[1])
            _cpp.kernels = before[2]


# Caches: of nothing, so that blocks are as small as they get (64 features); of a few blocks; of all there is.
MACHINES = st.builds(
    Machine,
    st.sampled_from(_cpu.instruction_sets()),
    st.sampled_from([1, 1, 2, 3]),
    st.sampled_from([0, 0, 200_000, 1 << 30]),
)
# Powers of 10 from 1e-3 to 1e4, rounded to fp32: what is tested is arithmetic, not the rounding of an argument.
TEMPERATURES = st.floats(-3, 4).map(lambda power: torch.tensor(10.0**power))
SCALES = st.sampled_from([1.0, 1.75, 0.3125])
DL0 = st.sampled_from([None, 0.0, 0.25, -3.0])
SEEDS = st.integers(0, 999)
# no elements, one, fewer than a vector, primes; a block of features and its neighbours, three of them
FEATURES = st.sampled_from([0, 1, 2, 7, 31, 63, 64, 65, 128, 131, 193])
ROWS = st.sampled_from([0, 1, 2, 5, 17, 64])
ELEMENTWISE_SHAPES = st.one_of(
    st.lists(st.sampled_from([0, 1, 1, 2, 3, 5, 16, 17]), max_size=4).map(tuple),
    st.sampled_from([(BLOCK - 1,), (BLOCK + 1,), (3, BLOCK + 1), (BLOCK + 1, 3), (37, 61), (5, 7, 61, 3), (131, 257)]),
)


class Inputs:
    """Tensors of one example, each laid out in a way of its own, and a copy of the memory that they lie in."""

    def __init__(self, draw):
        self.draw, self.memory = draw, []

    def lay(self, values):
        laid, memory = lay(values, self.draw(st.sampled_from(VIEWS)))
        self.memory.append((memory, memory.clone()))
        return laid

    def normal(self, shape, dtype):
        return self.lay(testing.seeded_normal(tuple(shape), self.draw(SEEDS), dtype))

    def expanded(self, shape, dtype):
        """Normal values, which are sometimes one number, one row or one column for all."""
        kept = self.draw(st.sampled_from([shape, shape, shape, [1] * len(shape), [1, *shape[1:]], [*shape[:-1], 1]]))
        ones = [min(n, k) for n, k in zip(shape, kept, strict=True)] if len(kept) == len(shape) else shape
        return self.normal(ones, dtype).expand(tuple(shape))

    def logits(self, shape, temperature):
        """Logits whose products with the temperature are small, saturated, far out, or exactly 0.

        None of them lies between 87.33 and 104, where exp(-x) in fp32 leaves the normal numbers and kernels give 0.
        """
        products = 3 * testing.seeded_normal(tuple(shape), self.draw(SEEDS), torch.float64).flatten()
        products[1::5] = products[1::5].sign() * 20
        products[2::7] = products[2::7].sign() * 60
        products[3::11] = products[3::11].sign() * 1e3
        products[::7] = 0
        return self.lay((products / temperature.item()).float().view(tuple(shape)))

    def assert_untouched(self):
        for memory, before in self.memory:
            storage = STORAGE[memory.dtype]
            assert torch.equal(memory.view(storage), before.view(storage)), "an input was written to"


def contiguous(*tensors):
    """The same numbers, each in fresh memory row by row."""
    return [t.clone(memory_format=torch.contiguous_format) if isinstance(t, torch.Tensor) else t for t in tensors]


def check(got, oracle, plain):
    """By the tolerance rule; where the oracle is beyond the dtype, as 1e5 in fp16, there is nothing to compare."""
    assume(all(p.isfinite().all() for p in plain.values()))
    testing.assert_close(got, oracle, plain)


# Elementwise ops


@st.composite
def masks(draw):
    """``inputs, weight shape, logits, temperature``: a logit per weight, per index of a dimension, or one for all."""
    inputs, shape, temperature = Inputs(draw), draw(ELEMENTWISE_SHAPES), draw(TEMPERATURES)
    unit = draw(st.sampled_from(["weight", "weight", "one", *range(len(shape))]))
    logits_shape = [n if unit in ("weight", d) else 1 for d, n in enumerate(shape)]
    assume(math.prod(shape) or math.prod(logits_shape) == 0 or unit != "one")
    return inputs, shape, inputs.logits(logits_shape, temperature), temperature


@examples(400)
@given(masks(), MACHINES, *[st.sampled_from(FLOATS)] * 2, st.booleans(), SCALES, st.booleans())
def test_materialize(mask, machine, weight_dtype, dtype, hard, scale, counts):
    inputs, shape, logits, temperature = mask
    weight = inputs.normal(shape, weight_dtype)
    arguments = (logits, temperature, hard, scale)
    with machine.running():
        out, l0, counted = ops.materialize(weight, *arguments, dtype, counts)
        assert out.stride() == torch.empty_like(weight).stride()
        inputs.assert_untouched()
        again, again_l0, again_counted = ops.materialize(*contiguous(weight, *arguments), dtype, counts)
    oracle = reference.materialize(weight.double(), logits.double(), temperature, hard, scale)
    plain = reference.materialize(weight, logits, temperature, hard, scale, dtype)
    pairs = [dict(zip(("out", "l0"), r, strict=True)) for r in ((out, l0), oracle, plain)]
    check(*pairs)
    assert same_bits(out, again)
    check({"l0": again_l0}, {"l0": oracle[1]}, {"l0": plain[1]})  # a sum in another order
    per_logit = reference.weights_per_logit(weight, logits)
    want = reference.mask_sums(logits, temperature, hard, scale, per_logit)[1].tolist() if counts else []
    assert counted.tolist() == again_counted.tolist() == want


@examples(150)
@given(masks(), MACHINES, *[st.sampled_from(FLOATS)] * 2, st.booleans(), SCALES)
def test_materialize_in_place(mask, machine, weight_dtype, dtype, hard, scale):
    """In memory that is there already, whatever its layout: the bits of new memory, and nothing beside it."""
    inputs, shape, logits, temperature = mask
    weight, arguments = inputs.normal(shape, weight_dtype), (logits, temperature, hard, scale)
    with machine.running():
        out, memory = lay(torch.zeros(shape, dtype=dtype), inputs.draw(st.sampled_from(VIEWS)))
        untouched, version = memory.clone(), out._version
        l0 = ops.materialize_(out, weight, *arguments)
        want, want_l0, _ = ops.materialize(weight, *arguments, dtype)
        inputs.assert_untouched()
    assert same_bits(out, want)
    assert out._version > version
    assert_only_wrote(memory, untouched, out)
    plain, oracle = (reference.materialize(w, s, *arguments[1:])[1] for w, s in (
        (weight, logits), (weight.double(), logits.double())))  # fmt: skip
    for got in (l0, want_l0):
        check({"l0": got}, {"l0": oracle}, {"l0": plain})


@examples(200)
@given(masks(), MACHINES, st.booleans(), SCALES, st.booleans(), st.sampled_from([1, 3, 768]))
def test_mask_sums(mask, machine, hard, scale, counts, per_logit):
    inputs, _, logits, temperature = mask
    arguments = (temperature, hard, scale, per_logit)
    with machine.running():
        l0, counted = ops.mask_sums(logits, *arguments, counts)
        inputs.assert_untouched()
        again, again_counted = ops.mask_sums(*contiguous(logits), *arguments, counts)
        of_materialize = ops.materialize(logits, logits, temperature, hard, scale)[1]
    plain, want = reference.mask_sums(logits, *arguments)
    oracle, _ = reference.mask_sums(logits.double(), *arguments)
    for got in (l0, again):
        check({"l0": got}, {"l0": oracle}, {"l0": plain})
    assert counted.tolist() == again_counted.tolist() == (want.tolist() if counts else [])
    # the same kernel; the weights' layout, which decides the order of the sum, may be another one than the logits'
    check({"l0": of_materialize * per_logit}, {"l0": oracle}, {"l0": plain})


@examples(400)
@given(masks(), MACHINES, *[st.sampled_from(FLOATS)] * 2, DL0, SCALES, st.booleans())
def test_logits_grad(mask, machine, weight_dtype, dwm_dtype, dl0, scale, adds):
    inputs, shape, logits, temperature = mask
    weight, dwm = inputs.normal(shape, weight_dtype), inputs.expanded(list(shape), dwm_dtype)
    dl0 = None if dl0 is None else torch.tensor(dl0)
    arguments = (dwm, weight, logits, temperature, dl0, scale)
    before = testing.seeded_normal(tuple(logits.shape), 5) if adds else torch.zeros(logits.shape)

    def run(given, start):
        if not adds:
            return ops.logits_grad(*given)
        assert ops.logits_grad_(start, *given) is None
        return start

    with machine.running():
        start, memory = lay(before, inputs.draw(st.sampled_from(VIEWS)))
        untouched = memory.clone()
        got = run(arguments, start)
        inputs.assert_untouched()
        again = run(contiguous(*arguments), before.clone())
    oracle = before.double() + reference.logits_grad(dwm.double(), weight.double(), logits.double(), *arguments[3:])
    plain = before + reference.logits_grad(*arguments)
    check({"dlogits": got}, {"dlogits": oracle}, {"dlogits": plain})
    if logits.shape == weight.shape:
        assert same_bits(got, again)
    else:
        check({"dlogits": again}, {"dlogits": oracle}, {"dlogits": plain})  # a sum in another order
    if adds:
        assert_only_wrote(memory, untouched, start)
    else:
        assert got.stride() == torch.empty_like(logits).stride()


# Linear ops, in blocks


@dataclasses.dataclass
class Linear:
    """One example: ``x (M, K)``, ``dout (M, N)``, weight and logits ``(N, K)`` or, transposed, ``(K, N)``."""

    inputs: Inputs
    x: torch.Tensor
    weight: torch.Tensor
    logits: torch.Tensor
    bias: torch.Tensor | None
    dout: torch.Tensor
    temperature: torch.Tensor
    scale: float
    transposed: bool

    @property
    def mask(self):
        return self.weight, self.logits, self.temperature

    def numbers(self, dtype=None, hard=False, dl0=None):
        """``out, l0, dx, dlogits`` of the reference, by autograd: in fp64, or as the example's dtypes have it."""

        def cast(t):
            return t if t is None or dtype is None else t.to(dtype)

        x, logits = cast(self.x.detach()).requires_grad_(), cast(self.logits.detach()).requires_grad_()
        weight, options = cast(self.weight), {"hard": hard, "scale": self.scale}
        out = reference.masked_linear(
            x, weight, logits, self.temperature, cast(self.bias), transposed=self.transposed, **options
        )
        _, l0 = reference.materialize(weight, logits, self.temperature, **options)
        dl0 = torch.tensor(0.0 if dl0 is None else dl0, dtype=l0.dtype)
        outputs, gradients = ([out], [cast(self.dout)]) if hard else ([out, l0], [cast(self.dout), dl0])
        leaves = [x] if hard else [x, logits]
        dx, *dlogits = torch.autograd.grad(outputs, leaves, gradients)
        return {"out": out.detach(), "l0": l0.detach(), "dx": dx, **({"dlogits": dlogits[0]} if dlogits else {})}

    def reordered(self, n, k):
        """The same example with its output and input features in the order of these indices, and how to undo it."""
        w, s = (t.t() if self.transposed else t for t in (self.weight, self.logits))
        units = [
            i if size > 1 else torch.zeros(size, dtype=torch.int64) for i, size in zip((n, k), s.shape, strict=True)
        ]
        w, s = w[n][:, k], s[units[0]][:, units[1]]
        w, s = (t.t() if self.transposed else t for t in (w, s))
        bias = self.bias if self.bias is None else self.bias[n]
        example = dataclasses.replace(self, x=self.x[:, k], weight=w, logits=s, bias=bias, dout=self.dout[:, n])

        def undo(name, t):
            if name == "l0":
                return t
            if name != "dlogits":
                return torch.empty_like(t).index_copy_(1, n if name == "out" else k, t)
            t = t.t() if self.transposed else t
            for dim, index in enumerate(units):
                t = torch.empty_like(t).index_copy_(dim, index, t)
            return t.t() if self.transposed else t

        return example, undo

    def plain(self, oracle, **how):
        """The reference in the example's dtypes, where it is least right of three orders of its sums.

        In which order a matrix product adds is up to the BLAS; one order alone may be right by luck.
        """
        worst = self.numbers(**how)
        for seed in (1, 2):
            generator = torch.Generator().manual_seed(seed)
            n, k = (torch.randperm(t.shape[1], generator=generator) for t in (self.dout, self.x))
            example, undo = self.reordered(n, k)
            for name, t in example.numbers(**how).items():
                other, so_far, exact = undo(name, t), worst[name], oracle[name]
                worst[name] = torch.where((other - exact).abs() > (so_far - exact).abs(), other, so_far)
        return worst

    def check(self, got, before=None, **how):
        oracle = self.numbers(torch.float64, **how)
        plain = self.plain(oracle, **how)
        if before is not None:
            oracle["dlogits"], plain["dlogits"] = oracle["dlogits"] + before.double(), plain["dlogits"] + before
        check(got, *({name: numbers[name] for name in got} for numbers in (oracle, plain)))

    def alike(self):
        """The same example, all of it contiguous."""
        x, weight, logits, bias, dout = contiguous(self.x, self.weight, self.logits, self.bias, self.dout)
        return dataclasses.replace(self, x=x, weight=weight, logits=logits, bias=bias, dout=dout)


@st.composite
def linears(draw, units=False):
    inputs, temperature, transposed = Inputs(draw), draw(TEMPERATURES), draw(st.booleans())
    m, n, k = draw(ROWS), draw(FEATURES), draw(FEATURES)
    weight_dtype, dtype = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(FLOATS))
    shape = (k, n) if transposed else (n, k)
    unit = draw(st.sampled_from(["weight", 0, 1])) if units else "weight"
    logits_shape = [size if unit in ("weight", d) else min(size, 1) for d, size in enumerate(shape)]
    return Linear(
        inputs,
        inputs.expanded([m, k], dtype),
        inputs.normal(shape, weight_dtype),
        inputs.logits(logits_shape, temperature),
        draw(st.sampled_from([None, inputs.normal([n], dtype)])),
        inputs.expanded([m, n], dtype),
        temperature,
        draw(SCALES),
        transposed,
    )


@examples(250)
@given(linears(units=True), MACHINES, st.booleans())
def test_masked_linear(linear, machine, hard):
    def run(example):
        out, l0 = ops.masked_linear(
            example.x, *example.mask, example.bias, hard, example.scale, example.transposed
        )  # fmt: skip
        return {"out": out, "l0": l0}

    with machine.running():
        got = run(linear)
        linear.inputs.assert_untouched()
        again = run(linear.alike())
    linear.check(got, hard=hard)
    linear.check(again, hard=hard)


@examples(150)
@given(linears(units=True), MACHINES, st.booleans())
def test_masked_linear_dx(linear, machine, hard):
    with machine.running():
        for example in (linear, linear.alike()):
            arguments = (example.dout, *example.mask, hard, example.scale, example.transposed)
            linear.check({"dx": ops.masked_linear_dx(*arguments)}, hard=hard)
            linear.inputs.assert_untouched()


@examples(250)
@given(linears(), MACHINES, DL0, st.sampled_from(["dlogits", "dlogits_", "backward", "backward_"]))
def test_masked_linear_backward(linear, machine, dl0, op):
    """The two gradients, alone and together, returned and added to what is there."""
    run = getattr(ops, f"masked_linear_{op}")
    before = testing.seeded_normal(tuple(linear.logits.shape), 5) if op.endswith("_") else None
    with machine.running():
        for example in (linear, linear.alike()):
            arguments = (example.dout, example.x, *example.mask, None if dl0 is None else torch.tensor(dl0))
            arguments = (*arguments, example.scale, example.transposed)
            if before is None:
                result = run(*arguments)
                got = dict(zip(("dx", "dlogits"), result, strict=True)) if op == "backward" else {"dlogits": result}
                assert got["dlogits"].stride() == torch.empty_like(example.logits).stride()
            else:
                dlogits, memory = lay(before, linear.inputs.draw(st.sampled_from(VIEWS)))
                untouched = memory.clone()
                dx = run(dlogits, *arguments)
                got = {"dlogits": dlogits} if op == "dlogits_" else {"dx": dx, "dlogits": dlogits}
                assert_only_wrote(memory, untouched, dlogits)
            linear.check(got, before, dl0=dl0)
            linear.inputs.assert_untouched()


@examples(60)
@given(linears(), MACHINES, DL0)
def test_gradients_together_are_those_alone(linear, machine, dl0):
    """One visit per block gives the bits that two give: of the logits' gradient, and of the input's."""
    rest = (*linear.mask, None if dl0 is None else torch.tensor(dl0), linear.scale, linear.transposed)
    with machine.running():
        dx, dlogits = ops.masked_linear_backward(linear.dout, linear.x, *rest)
        alone = ops.masked_linear_dlogits(linear.dout, linear.x, *rest)
        dx_alone = ops.masked_linear_dx(linear.dout, *linear.mask, False, linear.scale, linear.transposed)
    assert same_bits(dlogits, alone)
    assert same_bits(dx, dx_alone)


@examples(150)
@given(linears(), MACHINES, st.booleans())
def test_bitmask_linear(linear, machine, backward):
    """Packed bits give what the hard mask they were packed from gives."""
    with machine.running():
        for example in (linear, linear.alike()):
            bits = ops.pack_mask(example.logits)
            rest = (example.weight, bits, *(() if backward else (example.bias,)), example.scale, example.transposed)
            if backward:
                linear.check({"dx": ops.bitmask_linear_dx(example.dout, *rest)}, hard=True)
            else:
                linear.check({"out": ops.bitmask_linear(example.x, *rest)}, hard=True)
            linear.inputs.assert_untouched()


def test_small_caches_make_several_blocks(monkeypatch):
    """The control: with the caches above, what has 131 features takes three blocks, the last of 3."""
    shapes = []

    class Recording(SmallCache):
        def __getattr__(self, name):
            kernel = super().__getattr__(name)

            def record(weight, *rest):
                shapes.append(tuple(weight.shape))
                return kernel(weight, *rest)

            return record

    monkeypatch.setattr(_cpp, "kernels", Recording(0))
    weight, x, t = testing.seeded_normal((131, 7), 0), testing.seeded_normal((5, 7), 1), torch.tensor(3.0)
    ops.masked_linear(x, weight, weight, t, None, False, 1.0, False)
    assert shapes == [(64, 7), (64, 7), (3, 7)]
    shapes.clear()
    ops.masked_linear_dx(x, weight.t(), weight.t(), t, False, 1.0, False)
    assert shapes == [(7, 64), (7, 64), (7, 3)]
