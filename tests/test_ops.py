"""The operators of torch.library: schemas, fakes and dispatch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from csmask import _ops, reference, testing
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
    for layout, hard in itertools.product(("weight", "neuron"), (False, True)):
        weight, logits, temperature = arguments(layout, torch.float32)
        monkeypatch.setattr(_ops, "cpu_kernels", None)
        out, l0, _ = ops.materialize(weight, logits, temperature, hard, 1.5, torch.bfloat16)
        want, want_l0 = reference.materialize(weight, logits, temperature, hard, 1.5, torch.bfloat16)
        assert torch.equal(out, want)
        assert torch.equal(l0, want_l0)


@pytest.mark.skipif(_ops.cpu_kernels is None, reason="the C++ back end is not built")
@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, 1), (torch.bfloat16, 1), (torch.float16, 0)])
def test_the_kernels_run_where_there_are_any(monkeypatch, dtype, expected):
    calls = []

    class Counting:
        @staticmethod
        def materialize(*args):
            calls.append(args)
            return 0.0

    monkeypatch.setattr(_ops, "cpu_kernels", Counting)
    ops.materialize(*arguments("weight", dtype), False, 1.0, None)
    assert len(calls) == expected


def test_reason_when_the_kernels_cannot_be_loaded(monkeypatch):
    def fail(name):
        raise ImportError(f"no {name} here")

    monkeypatch.setattr(_ops.importlib, "import_module", fail)
    assert _ops._load_cpu_kernels() == (None, "ImportError: no csmask_kernels._cpu here")


def test_every_op_has_a_kernel_for_gpus_and_there_is_no_silent_fallback(monkeypatch):
    for name in _ops.SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"csmask::{name}", "CUDA")
        assert callable(_ops.triton_kernel(name))

    def fail(name):
        raise ImportError(f"no {name} here")

    monkeypatch.setattr(_ops.importlib, "import_module", fail)
    with pytest.raises(ImportError, match=r'needs Triton >= 3\.6 .*no csmask_kernels\.materialize here.*"reference"'):
        _ops._run_triton("mask_sums")()
