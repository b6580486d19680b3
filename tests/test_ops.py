"""The operators of torch.library: schemas, fakes and dispatch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from csmask import _cpp, _ops, reference, testing
from csmask._ops import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# shape of the weight and of the logits
LAYOUTS = {
    "weight": ((5, 7), (5, 7)),
    "neuron": ((5, 7), (5, 1)),
    "gpt2-neuron": ((5, 7), (1, 7)),
    "filter": ((4, 3, 2, 2), (4, 1, 1, 1)),
    "middle": ((4, 3, 2), (1, 3, 1)),
    "one-logit": ((5, 7), (1, 1)),
    "bias": ((5,), (5,)),
    "empty": ((0, 7), (0, 7)),
    "empty-neuron": ((0, 7), (0, 1)),
    "no-inputs": ((5, 0), (5, 1)),
}


def arguments(layout, dtype, logits_dtype=torch.float32):
    weight_shape, logits_shape = LAYOUTS[layout]
    weight = testing.seeded_normal(weight_shape, 0, dtype)
    return weight, testing.seeded_logits(logits_shape, 1, logits_dtype), torch.tensor(3.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["weight", "neuron", "filter", "empty-neuron"])
def test_opcheck_materialize(layout, dtype):
    for hard, out_dtype in ((False, None), (True, torch.float32)):
        torch.library.opcheck(torch.ops.csmask.materialize, (*arguments(layout, dtype), hard, 1.5, out_dtype))
    weight, logits, temperature = arguments(layout, dtype)
    torch.library.opcheck(
        torch.ops.csmask.materialize, (weight, logits, temperature, False, 1.0), {"dtype": torch.bfloat16}
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["weight", "neuron", "filter", "empty-neuron"])
def test_opcheck_logits_grad(layout, dtype):
    weight, logits, temperature = arguments(layout, dtype)
    for dl0 in (None, torch.tensor(0.5)):
        args = (testing.seeded_normal(tuple(weight.shape), 2, dtype), weight, logits, temperature, dl0, 1.5)
        torch.library.opcheck(torch.ops.csmask.logits_grad, args)


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_materialize_is_the_reference(layout, dtype, logits_dtype):
    weight, logits, temperature = arguments(layout, dtype, logits_dtype)
    for hard, scale, out_dtype in itertools.product((False, True), (1.0, 1.5), (None, torch.float32, torch.bfloat16)):
        got = dict(
            zip(("out", "l0"), ops.materialize(weight, logits, temperature, hard, scale, out_dtype)[:2], strict=True)
        )
        oracle = reference.materialize(weight.double(), logits.double(), 3.0, hard, scale)
        plain = reference.materialize(weight, logits, temperature, hard, scale, out_dtype)
        names = ("out", "l0")
        testing.assert_close(got, dict(zip(names, oracle, strict=True)), dict(zip(names, plain, strict=True)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fakes_say_what_the_kernels_do(layout, dtype):
    weight, logits, temperature = arguments(layout, dtype)
    # strides that are not contiguous: the results have the same
    weight, logits = weight.mT.contiguous().mT if weight.dim() > 1 else weight, logits
    real = [*ops.materialize(weight, logits, temperature, False, 1.0, None, True)]
    real.append(ops.logits_grad(weight, weight, logits, temperature, None, 1.0))
    with FakeTensorMode() as mode:
        w, s, t = (mode.from_tensor(x) for x in (weight, logits, temperature))
        fake = [*ops.materialize(w, s, t, False, 1.0, None, True), ops.logits_grad(w, w, s, t, None, 1.0)]
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.stride(), r.dtype, r.device) == (f.shape, f.stride(), f.dtype, f.device)


def test_results_are_fresh_memory():
    weight, logits, temperature = arguments("weight", torch.float32)
    before = weight.clone(), logits.clone()
    out, _, _ = ops.materialize(weight, torch.ones_like(logits), temperature, True, 1.0, None)
    assert torch.equal(out, weight)
    assert out.data_ptr() != weight.data_ptr()
    out.zero_()
    assert torch.equal(weight, before[0])
    assert torch.equal(logits, before[1])


def test_without_the_kernels_the_reference_runs(monkeypatch):
    monkeypatch.setattr(_cpp, "kernels", None)
    for layout, hard in itertools.product(("weight", "neuron"), (False, True)):
        weight, logits, temperature = arguments(layout, torch.float32)
        out, l0, _ = ops.materialize(weight, logits, temperature, hard, 1.5, torch.bfloat16)
        want, want_l0 = reference.materialize(weight, logits, temperature, hard, 1.5, torch.bfloat16)
        assert torch.equal(out, want)
        assert torch.equal(l0, want_l0)


@pytest.mark.parametrize("name", _ops.SCHEMAS)
def test_every_op_gives_the_same_without_the_kernels(name, monkeypatch):
    """An install without a compiler: what calls other ops inside must get along without kernels, too."""
    want = _outputs(name)
    monkeypatch.setattr(_cpp, "kernels", None)
    _assert_alike(_outputs(name), want)


class _Counting:
    """The C++ back end, and the names of the kernels that were called."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        if name != "last_level_cache":
            self.calls.append(name)
        return getattr(_cpp._load()[0], name)


# the C++ kernels that an op calls on a CPU, where it has any
CPP_KERNELS = {
    "materialize": {"materialize"},
    "materialize_": {"materialize"},
    "mask_sums": {"mask_sums"},
    "logits_grad": {"logits_grad"},
    "logits_grad_": {"logits_grad"},
    "masked_linear": {"materialize"},
    "masked_linear_dx": {"materialize"},
    "masked_linear_dlogits": {"logits_grad"},
    "masked_linear_dlogits_": {"logits_grad"},
    "masked_linear_backward": {"logits_grad_and_mask"},
    "masked_linear_backward_": {"logits_grad_and_mask"},
    "masked_conv": {"materialize"},
    "masked_conv_dx": {"materialize"},
    "masked_conv_dlogits": {"logits_grad"},
    "masked_conv_dlogits_": {"logits_grad"},
    "scale_neurons": {"scale_neurons"},
    "scale_neurons_grad": {"scale_neurons_grad"},
    "pack_mask": {"pack_mask"},
    "unpack_mask": {"unpack_mask"},
    "popcount": {"popcount"},
    "apply_bitmask": {"apply_bitmask"},
    "bitmask_linear": {"apply_bitmask"},
    "bitmask_linear_dx": {"apply_bitmask"},
    "philox_": {"philox_"},
    "mask_grad_norms": {"mask_grad_norm"},
    "mask_adamw_": {"mask_adamw"},
    "mask_sgd_": {"mask_sgd"},
}


@pytest.mark.skipif(_cpp.kernels is None, reason="the C++ back end is not built")
@pytest.mark.parametrize("name", _ops.SCHEMAS)
def test_the_kernels_run_where_there_are_any(name, monkeypatch):
    counting = _Counting()
    monkeypatch.setattr(_cpp, "kernels", counting)
    _outputs(name)
    assert set(counting.calls) == CPP_KERNELS[name]


@pytest.mark.skipif(_cpp.kernels is None, reason="the C++ back end is not built")
@pytest.mark.parametrize(
    ("dtype", "calls"),
    [(torch.float32, ["materialize"]), (torch.bfloat16, ["materialize"]), (torch.float16, ["materialize"]),
     (torch.float64, [])],
)  # fmt: skip
def test_dtypes_without_a_kernel_run_in_plain_torch(monkeypatch, dtype, calls):
    counting = _Counting()
    monkeypatch.setattr(_cpp, "kernels", counting)
    ops.materialize(*arguments("weight", dtype), False, 1.0, None)
    assert counting.calls == calls
    ops.materialize(*arguments("weight", dtype, torch.float64), False, 1.0, None)  # fp64 logits: none for any weight
    assert counting.calls == calls


@pytest.mark.parametrize("name", [name for name, (schema, _) in _ops.SCHEMAS.items() if "(a!)" in schema])
def test_autograd_sees_what_an_op_writes_to(name):
    first, *rest = _every_op()[name]
    written = first[0] if isinstance(first, list) else first
    x = torch.ones_like(written, requires_grad=True) if written.is_floating_point() else None
    out = None if x is None else x * written  # saved for backward
    before = written._version
    getattr(ops, name)(first, *rest)
    assert written._version > before
    if out is not None:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
    with torch.inference_mode():
        getattr(ops, name)([t.clone() for t in first] if isinstance(first, list) else first.clone(), *rest)


def test_reason_when_the_kernels_cannot_be_loaded(monkeypatch):
    def fail(name):
        raise ImportError(f"no {name} here")

    monkeypatch.setattr(_cpp.importlib, "import_module", fail)
    assert _cpp._load() == (None, "ImportError: no csmask_kernels._cpu here")


# Ops that are no kernel of their own on a GPU: others do their work there.
MADE_OF_OTHERS = {"materialize_", "masked_linear_backward", "masked_linear_backward_"}


def test_every_op_has_a_kernel_for_gpus_and_there_is_no_silent_fallback(monkeypatch):
    assert {name for name, (_, file) in _ops.SCHEMAS.items() if file is None} == MADE_OF_OTHERS
    for name in _ops.SCHEMAS.keys() - MADE_OF_OTHERS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"csmask::{name}", "CUDA")
        assert callable(_ops.triton_kernel(name))

    def fail(name):
        raise ImportError(f"no {name} here")

    monkeypatch.setattr(_ops.importlib, "import_module", fail)
    with pytest.raises(ImportError, match=r'needs Triton >= 3\.6 .*no csmask_kernels\.materialize here.*"reference"'):
        _ops._run_triton("mask_sums")()


def _every_op():
    """One call of every operator: its arguments, made anew each time."""
    w, s, t = arguments("weight", torch.float32)  # (5, 7)
    x, dout = testing.seeded_normal((3, 7), 2), testing.seeded_normal((3, 5), 3)
    bias, dl0 = testing.seeded_normal((5,), 4), torch.tensor(0.5)
    cw, cs, _ = arguments("filter", torch.float32)  # (4, 3, 2, 2); one logit per filter
    cs = testing.seeded_logits((4, 3, 2, 2), 5)
    cx = testing.seeded_normal((2, 3, 5, 6), 6).to(memory_format=torch.channels_last)
    geometry = ([1, 2], [1, 0], [1, 1])
    cout = testing.seeded_normal((2, 4, 6, 3), 7)
    z, logits = testing.seeded_normal((2, 5, 3, 4), 8), testing.seeded_logits((5,), 9)
    bits = reference.pack_mask(s)
    waiting = ([w * 3, cw], [w, cw], [s * 2, None], [t, t], [dl0, None], [1.5, 1.0])  # of two layers
    state = [[u.square() for u in (w, cw)] for _ in range(4)]
    step = ([torch.tensor(2.0)] * 2, torch.tensor(0.5), torch.tensor(0.1))
    return {
        "materialize": (w, s, t, False, 1.5, None, True),
        "materialize_": (torch.zeros_like(w), w, s, t, False, 1.5),
        "mask_sums": (s, t, False, 1.5, 3),
        "logits_grad": (w, w, s, t, dl0, 1.5),
        "logits_grad_": (torch.ones_like(s), w, w, s, t, dl0, 1.5),
        "masked_linear": (x, w, s, t, bias, False, 1.5, False),
        "masked_linear_dx": (dout, w, s, t, False, 1.5, False),
        "masked_linear_dlogits": (dout, x, w, s, t, dl0, 1.5, False),
        "masked_linear_dlogits_": (torch.ones_like(s), dout, x, w, s, t, dl0, 1.5, False),
        "masked_linear_backward": (dout, x, w, s, t, dl0, 1.5, False),
        "masked_linear_backward_": (torch.ones_like(s), dout, x, w, s, t, dl0, 1.5, False),
        "masked_conv": (cx, cw, cs, t, bias[:4], False, 1.5, *geometry),
        "masked_conv_dx": (cout, cw, cs, t, list(cx.shape), False, 1.5, *geometry),
        "masked_conv_dlogits": (cout, cx, cw, cs, t, dl0, 1.5, *geometry),
        "masked_conv_dlogits_": (torch.ones_like(cs), cout, cx, cw, cs, t, dl0, 1.5, *geometry),
        "scale_neurons": (z, logits, t, bias, False, 1.5, 1),
        "scale_neurons_grad": (z * 2, z, logits, t, dl0, False, 1.5, 1, 7),
        "pack_mask": (s,),
        "unpack_mask": (bits, [5, 7]),
        "popcount": (bits,),
        "apply_bitmask": (w, bits, 1.5),
        "bitmask_linear": (x, w, bits, bias, 1.5, False),
        "bitmask_linear_dx": (dout, w, bits, 1.5, False),
        "philox_": (torch.ones(5, 3), "uniform", 7, 9, 2, 1, 0.5),
        "mask_grad_norms": ([s, cs], *waiting),
        "mask_adamw_": ([s * 1, cs * 1], *state[:2], [], state[2], *waiting, *step, 0.9, 0.99, 1e-8, 0.1, False),
        "mask_sgd_": ([s * 1, cs * 1], *state[:2], *waiting, *step, 0.9, 0.1, 0.1, False, True),
    }  # fmt: skip


def test_every_op_is_listed():
    assert set(_every_op()) == set(_ops.SCHEMAS)


@pytest.mark.parametrize("name", _ops.SCHEMAS)
def test_opcheck(name):
    torch.library.opcheck(getattr(ops, name), _every_op()[name])


@pytest.mark.usefixtures("triton_on_cpu")
@pytest.mark.parametrize("name", _ops.SCHEMAS)
def test_opcheck_of_the_gpu_kernels(name):
    torch.library.opcheck(getattr(ops, name), _every_op()[name])


def _outputs(name):
    """What an op returns, and what it writes to."""
    args = _every_op()[name]
    result = getattr(ops, name)(*args)
    results = [] if result is None else [*result] if isinstance(result, tuple) else [result]
    for written in args[: _ops.SCHEMAS[name][0].count("!)")]:
        results += [t.clone() for t in (written if isinstance(written, list) else [written])]
    return results


def _assert_alike(got, want):
    """Numbers, shapes, layouts and dtypes; the tolerance rule has its place in the tests of each kernel."""
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert (g.dtype, g.stride()) == (w.dtype, w.stride())
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", _ops.SCHEMAS)
def test_the_gpu_kernels_give_what_the_cpu_gives(name, request):
    want = _outputs(name)
    request.getfixturevalue("triton_on_cpu")
    _assert_alike(_outputs(name), want)
