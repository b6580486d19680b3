"""The C++ kernels of mask_step, called directly, against the formulas in fp64 written here."""

from __future__ import annotations

import math

import pytest
import torch
from cpp_views import BLOCK, FLOATS, VIEWS, assert_only_wrote, lay, logits_of, normal, same_bits

_cpu = pytest.importorskip("csmask_kernels._cpu", reason="the C++ back end is not built")

SHAPES = [(), (1,), (7919,), (BLOCK - 1,), (BLOCK + 1,), (37, 61), (61, 3, 7, 3)]
ADAMW = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
SGD = {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1, "nesterov": False}
EPS = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-11}


def inputs(shape, dtype=torch.float32, dwm_dtype=None):
    return {
        "mask_logits": logits_of(*shape), "weight": normal(*shape).to(dtype),
        "dmasked_weight": normal(*shape, seed=3).to(dwm_dtype or dtype), "grad": normal(*shape, seed=4),
        "masked_weight": torch.full(shape, math.nan, dtype=dtype),
        "first": 0.1 * normal(*shape, seed=5), "second": 0.01 * normal(*shape, seed=6).square(), "scales": None,
    }  # fmt: skip


def gradient(given, temperature, dl0, scale, factor):
    """In fp64."""
    s = given["mask_logits"].double()
    e = torch.exp(-(temperature * s).abs())
    dwm = given["dmasked_weight"]
    dmask = dl0 if dwm is None else dwm.double() * given["weight"].double() + dl0
    total = dmask * scale * temperature * e / (1 + e) ** 2
    return (total if given["grad"] is None else total + given["grad"].double()) * factor


def expected(kind, given, temperature, dl0, scale, factor, step, o):
    g, s = gradient(given, temperature, dl0, scale, factor), given["mask_logits"].double()
    first = None if given["first"] is None else given["first"].double()
    second = None
    if kind == "adamw":
        first = o["beta1"] * first + (1 - o["beta1"]) * g
        second = o["beta2"] * given["second"].double() + (1 - o["beta2"]) * g**2
        root = (second / (1 - o["beta2"] ** step)).sqrt() + o["eps"]
        s = s * (1 - o["lr"] * o["weight_decay"]) - o["lr"] / (1 - o["beta1"] ** step) * first / root
    else:
        g = g + o["weight_decay"] * s
        if first is not None:
            first = g if step == 1 else o["momentum"] * first + (1 - o["dampening"]) * g
            g = g + o["momentum"] * first if o["nesterov"] else first
        s = s - o["lr"] * g
    return s, first, second


def run(kind, given, temperature=1.0, dl0=0.0, scale=1.0, factor=1.0, step=1, options=None, threads=1):
    """The kernel on copies: everything that it wrote, and its sums."""
    written = ("mask_logits", "masked_weight", "first", "second")
    given = {k: v.clone() if k in written and v is not None else v for k, v in given.items()}
    o = options or (ADAMW if kind == "adamw" else SGD)
    names = ("mask_logits", "first", "second", "scales") if kind == "adamw" else ("mask_logits", "first")
    rest = [given[k] for k in ("masked_weight", "dmasked_weight", "weight", "grad")]
    kernel = _cpu.mask_adamw if kind == "adamw" else _cpu.mask_sgd
    sums = kernel(*(given[k] for k in names), *rest, temperature, dl0, scale, factor, step, *o.values(), threads)
    return given, sums


def close(got, want, tolerance, name):
    if want is None:
        return
    floor = 0.1 * tolerance
    error = (got.double() - want).abs()
    assert bool((error <= tolerance * want.abs() + floor).all()), f"{name}: {float(error.max()):.3g}"


def check(kind, given, temperature=1.0, dl0=0.0, scale=1.0, factor=1.0, step=1, options=None, threads=2):
    o = options or (ADAMW if kind == "adamw" else SGD)
    got, (l0, kept, undecided) = run(kind, given, temperature, dl0, scale, factor, step, options, threads)
    s, first, second = expected(kind, given, temperature, dl0, scale, factor, step, o)
    tolerance = 2e-6 * max(1.0, temperature / 5)  # T * S is rounded, and its exponential tells
    close(got["mask_logits"], s, tolerance, "logits")
    close(got["first"], first, tolerance, "first")
    if kind == "adamw":
        close(got["second"], second, 2 * tolerance, "second")
    new = got["mask_logits"].double()  # what follows is of the logits as they are in fp32
    mask = scale * torch.sigmoid(temperature * new)
    assert l0 == pytest.approx(float(mask.sum()), rel=1e-6)
    assert kept == int((new > 0).sum())
    assert undecided == int(((temperature * got["mask_logits"]).abs() < 4).sum())
    if got["masked_weight"] is not None:
        want = given["weight"].double() * mask
        close(got["masked_weight"], want, 4 * EPS[got["masked_weight"].dtype] + 1e-6, "masked weight")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("temperature", [1.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_fp64(shape, temperature, kind):
    for dtype in FLOATS:
        for step, dl0, scale, factor in ((1, 0.0, 1.0, 1.0), (7, 0.75, 2.5, -0.3)):
            check(kind, inputs(shape, dtype), temperature, dl0, scale, factor, step)
    check(kind, inputs(shape, torch.bfloat16, torch.float32), temperature)  # gradients of several micro-batches


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize(
    "missing", [["grad"], ["dmasked_weight"], ["grad", "dmasked_weight"], ["masked_weight"]], ids=str
)
def test_what_is_not_there_is_zero_or_not_written(kind, missing):
    given = inputs((37, 61))
    for dl0 in (0.0, 0.5):
        check(kind, {**given, **dict.fromkeys(missing)}, 2.0, dl0, step=3)


@pytest.mark.parametrize("options", [
    {**SGD, "nesterov": True, "dampening": 0.0}, {**SGD, "momentum": 0.0}, {**SGD, "weight_decay": 0.0},
])  # fmt: skip
@pytest.mark.parametrize("step", [1, 2])
def test_settings_of_sgd(options, step):
    given = inputs((37, 61))
    check("sgd", given if options["momentum"] else {**given, "first": None}, step=step, options=options)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("view", VIEWS)
def test_any_strides_give_the_same_bits_and_nothing_else_is_written(kind, view):
    given = inputs((7, 5, 300), torch.bfloat16)
    want, sums = run(kind, given, 2.0, 0.5, step=2)
    o = ADAMW if kind == "adamw" else SGD
    laid = {name: lay(values, view) for name, values in given.items() if values is not None}
    names = ("mask_logits", "first", "second") if kind == "adamw" else ("mask_logits", "first")
    before = {name: memory.clone() for name, (_, memory) in laid.items()}
    kernel = _cpu.mask_adamw if kind == "adamw" else _cpu.mask_sgd
    rest = [laid[k][0] for k in ("masked_weight", "dmasked_weight", "weight", "grad")]
    states = [laid[k][0] for k in names] + ([None] if kind == "adamw" else [])
    got = kernel(*states, *rest, 2.0, 0.5, 1.0, 1.0, 2, *o.values(), 2)
    assert got[1:] == sums[1:]
    assert got[0] == pytest.approx(sums[0], rel=1e-6)  # summed in the order of memory
    for name in (*names, "masked_weight"):
        assert same_bits(laid[name][0].contiguous(), want[name]), name
        assert_only_wrote(laid[name][1], before[name], laid[name][0])
    for name in ("dmasked_weight", "weight", "grad"):
        assert same_bits(laid[name][1], before[name]), name


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_bits_do_not_depend_on_threads(kind):
    given = inputs((100_003,))
    want, sums = run(kind, given, 2.0, 0.5, step=2)
    for threads in (1, 2, 3, 7):
        got, found = run(kind, given, 2.0, 0.5, step=2, threads=threads)
        assert found == sums
        assert all(same_bits(got[k], want[k]) for k in ("mask_logits", "masked_weight", "first", "second"))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("missing", [[], ["grad"], ["dmasked_weight"]], ids=str)
def test_the_norm_is_that_of_the_gradient(missing):
    for shape in SHAPES:
        given = {**inputs(shape, torch.bfloat16), **dict.fromkeys(missing)}
        arrays = [given[k] for k in ("mask_logits", "dmasked_weight", "weight", "grad")]
        got = _cpu.mask_grad_norm(*arrays, 2.0, 0.5, 1.5, 2)
        assert got == pytest.approx(float(gradient(given, 2.0, 0.5, 1.5, 1.0).norm()), rel=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_nothing_is_done_for_empty_tensors(kind):
    _, sums = run(kind, inputs((0, 5)))
    assert sums == (0.0, 0, 0)


def _refusals():
    shared = torch.ones(48)
    return [
        ({"mask_logits": torch.ones(6, 4).half()}, TypeError, "mask_logits must be float32"),
        ({"first": torch.ones(6, 4).double()}, TypeError, "first must be float32"),
        ({"weight": torch.ones(6, 4).double()}, TypeError, "weight must be float32, bfloat16 or float16"),
        ({"grad": torch.ones(6, 4).bfloat16()}, TypeError, "grad must be float32"),
        ({"dmasked_weight": torch.ones(6, 4).int()}, TypeError, "dmasked_weight must be float32, bfloat16 or float16"),
        ({"weight": torch.ones(4, 6)}, ValueError, r"weight must have shape \(6, 4\) like mask_logits, got \(4, 6\)"),
        ({"second": torch.ones(6)}, ValueError, r"second must have shape \(6, 4\) like mask_logits"),
        ({"first": torch.ones(4).expand(6, 4)}, ValueError, "first must have an address of its own"),
        ({"mask_logits": shared[:24].view(6, 4), "first": shared[20:44].view(6, 4)}, ValueError,
         "first must not share memory with mask_logits"),
        ({"masked_weight": shared[:24].view(6, 4), "weight": shared[20:44].view(6, 4)}, ValueError,
         "masked_weight must not share memory with weight"),
    ]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), _refusals())
def test_refuses_and_writes_nothing(change, error, message):
    given = {**inputs((6, 4)), **change}
    del given["scales"]
    before = {name: tensor.clone() for name, tensor in given.items()}
    rest = [given[k] for k in ("masked_weight", "dmasked_weight", "weight", "grad")]
    with pytest.raises(error, match=message):
        _cpu.mask_adamw(given["mask_logits"], given["first"], given["second"], None, *rest, 1.0, 0.0, 1.0, 1.0, 1,
                        *ADAMW.values(), 1)  # fmt: skip
    for name, tensor in given.items():
        assert torch.equal(tensor.nan_to_num(5.0), before[name].nan_to_num(5.0)), name


def test_refuses_threads_and_steps_below_one():
    given = inputs((6, 4))
    names = ("mask_logits", "first", "second", "scales", "masked_weight", "dmasked_weight", "weight", "grad")
    arrays = [given[k] for k in names]
    with pytest.raises(ValueError, match="threads must be >= 1, got 0"):
        _cpu.mask_adamw(*arrays, 1.0, 0.0, 1.0, 1.0, 1, *ADAMW.values(), 0)
    with pytest.raises(ValueError, match="step must be >= 1"):
        _cpu.mask_adamw(*arrays, 1.0, 0.0, 1.0, 1.0, 0, *ADAMW.values(), 1)
