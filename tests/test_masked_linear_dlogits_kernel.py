"""masked_linear_dlogits' Triton kernels, called directly and interpreted on the CPU, against the reference in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from csmask import reference, testing

pytest.importorskip("triton")
from csmask_kernels import masked_linear_dlogits as mld
from csmask_kernels import replay
from csmask_kernels.launch import GemmConfig, Target

POINTER = "_masked_linear_dlogits_kernel"
PERSISTENT = "_masked_linear_dlogits_persistent_kernel"
FORMS = {POINTER: False, PERSISTENT: True}
SMALL = GemmConfig(block_m=16, block_n=32, block_k=16, group_m=2)
# Of x and of the weight. fp32 operands take the pointer form: bulk copies cannot transpose them for TF32 products.
FP16, MIXED, FP32 = (torch.float16,) * 2, (torch.float16, torch.float32), (torch.float32,) * 2
FORMS_AND_DTYPES = [(f, d) for f in FORMS for d in (FP16, MIXED, FP32) if f == POINTER or d != FP32]
# Tokens have a tail of one; so many tiles that the persistent form's programs make several, with tails both ways, and
# rows of whole 16 bytes, as descriptors need them.
TOKENS, N, K = 33, 40, 72
H200 = Target("cuda", "90", "no such device", 132)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fresh memory is NaN: an element of the gradient that nobody writes shows."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(math.nan))


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that were launched."""
    names, run = [], replay.run

    def recording(device, *launches):
        names.extend(launch.kernel.fn.__name__ for launch in launches)
        return run(device, *launches)

    monkeypatch.setattr(replay, "run", recording)
    return names


def inputs_of(tokens, n, k, dtype=torch.float32, weight_dtype=None, transposed=False):
    shape = (k, n) if transposed else (n, k)
    return {
        "dout": testing.seeded_normal((tokens, n), 1, dtype),
        "x": testing.seeded_normal((tokens, k), 2, dtype),
        "weight": testing.seeded_normal(shape, 3, weight_dtype or dtype),
        "mask_logits": testing.seeded_logits(shape, 4),
    }


def expected(inputs, temperature, dl0, scale, transposed, before=None):
    """``dlogits`` of the reference from its own ``dWm``, in the dtypes of the inputs."""
    dout, x, weight, logits = inputs.values()
    dwm = x.t() @ dout if transposed else dout.t() @ x
    found = reference.logits_grad(dwm, weight, logits, temperature, dl0, scale)
    return {"dlogits": found if before is None else before.to(found.dtype) + found}


def check(inputs, temperature=1.5, dl0=None, scale=1.0, transposed=False, config=SMALL, before=None):
    """Runs the kernel (added to ``before`` where there is one) and holds the result to the common rule."""
    t = torch.tensor(temperature) if isinstance(temperature, float) else temperature
    arguments = (*inputs.values(), t, dl0, scale, transposed, config)
    if before is None:
        got = mld.masked_linear_dlogits(*arguments)
    else:
        got = before.clone()
        assert mld.masked_linear_dlogits_(got, *arguments) is None
    exact = testing.to_fp64({**inputs, "dl0": dl0, "before": before})
    dl0_exact, before_exact = exact.pop("dl0"), exact.pop("before")
    oracle = expected(exact, t.double(), dl0_exact, scale, transposed, before_exact)
    testing.assert_close({"dlogits": got}, oracle, expected(inputs, t, dl0, scale, transposed, before))
    return got


@pytest.mark.parametrize(("form", "dtypes"), FORMS_AND_DTYPES)
@pytest.mark.parametrize("transposed", [False, True], ids=["nk", "kn"])
@pytest.mark.parametrize("add", [False, True], ids=["write", "add"])
@pytest.mark.parametrize("subtiles", [1, 2, 4])
def test_forms(form, subtiles, add, transposed, dtypes, launched):
    inputs = inputs_of(TOKENS, N, K, *dtypes, transposed)
    config = GemmConfig(block_m=16, block_n=32, block_k=16, group_m=2, subtiles=subtiles, persistent=FORMS[form])
    before = testing.seeded_normal(tuple(inputs["weight"].shape), 5) if add else None
    for dl0, scale in ((None, 1.0), (torch.tensor(-3.0), 1.0), (None, 1.5), (torch.tensor(0.7), 2.0)):
        check(inputs, 1.5, dl0, scale, transposed, config, before)
    assert set(launched) == {form}


@pytest.mark.parametrize("tokens", [0, 1, 7, 13, 16, 17, 33])
def test_odd_sizes(tokens):
    """Empty (the l0 term alone is left), one, primes, and the block with a tail and one short of a tail."""
    dl0 = torch.tensor(0.7)
    for n in (0, 1, 7, 13, 16, 17, 33):
        for k in (0, 1, 7, 13, 16, 17, 33):
            check(inputs_of(tokens, n, k), 1.5, dl0, config=GemmConfig(16, 16, 16, 2))


@pytest.mark.parametrize("form", FORMS)
def test_what_lies_beside_the_tensors_does_not_matter(form, launched):
    """Rows and columns past the ends, in the same storage, are NaN: a missing mask on a tail shows."""

    def window(tensor):
        around = torch.full((tensor.shape[0] + 40, tensor.shape[1] + 40), math.nan, dtype=tensor.dtype)
        around[: tensor.shape[0], : tensor.shape[1]] = tensor
        return around[: tensor.shape[0], : tensor.shape[1]]

    inputs = {name: window(t) for name, t in inputs_of(TOKENS, N, K, torch.float16).items()}
    around = torch.full((N + 40, K + 40), 7.0)
    dlogits = around[:N, :K]
    config = GemmConfig(16, 32, 16, 2, persistent=FORMS[form], subtiles=2)
    mld.masked_linear_dlogits_(dlogits, *inputs.values(), torch.tensor(1.5), None, 1.0, False, config)
    alone = check(inputs, config=config, before=torch.full((N, K), 7.0))
    assert torch.equal(dlogits, alone)
    assert (around[N:] == 7).all()
    assert (around[:, K:] == 7).all()
    assert set(launched) == {form}


def strided(tensor, layout):
    """The same numbers: in rows, in columns, or with gaps both ways."""
    if layout == "columns":
        return tensor.t().contiguous().t()
    if layout == "gaps":
        return tensor.repeat_interleave(3, 0).repeat_interleave(2, 1)[::3, ::2]
    return tensor


@pytest.mark.parametrize("transposed", [False, True], ids=["nk", "kn"])
@pytest.mark.parametrize("of_dlogits", ["rows", "columns", "gaps"])
def test_any_strides(of_dlogits, transposed):
    plain = inputs_of(17, 33, 49, torch.float16, transposed=transposed)
    names = ("dout", "x", "weight", "mask_logits")
    for layouts in (("columns",) * 4, ("gaps",) * 4, ("rows", "columns", "gaps", "columns"), ("columns", "rows") * 2):
        inputs = {n: strided(plain[n], layout) for n, layout in zip(names, layouts, strict=True)}
        check(inputs, 1.5, torch.tensor(0.7), 2.0, transposed)
        dlogits = strided(torch.ones_like(plain["mask_logits"]), of_dlogits)
        mld.masked_linear_dlogits_(dlogits, *inputs.values(), torch.tensor(1.5), None, 1.0, transposed, SMALL)
        contiguous = torch.ones(plain["mask_logits"].shape)
        mld.masked_linear_dlogits_(contiguous, *plain.values(), torch.tensor(1.5), None, 1.0, transposed, SMALL)
        torch.testing.assert_close(dlogits, contiguous, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True], ids=["nk", "kn"])
def test_result_has_the_layout_of_the_logits(transposed, launched):
    inputs = inputs_of(TOKENS, N, K, torch.float16, transposed=transposed)
    columns = {name: strided(t, "columns") if name in ("weight", "mask_logits") else t for name, t in inputs.items()}
    config = GemmConfig(16, 32, 16, 2, persistent=True)
    got = check(columns, transposed=transposed, config=config)
    assert got.stride() == columns["mask_logits"].stride()
    assert launched == [PERSISTENT]  # the weight's columns are walked as rows


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_saturated_masks_keep_their_digits(temperature, form, launched):
    """``dWm`` is exact here, so each element is as good as its own derivative: ``m * (1 - m)`` in fp32 would be 0."""
    inputs = inputs_of(8, 24, 40, torch.float16)
    inputs = {name: (t * 2).round() + (t == 0) for name, t in inputs.items()}
    z = torch.tensor([0.0, 1.0, -1.0, 17.0, -17.0, 40.0, -40.0, 80.0, -80.0])
    inputs["mask_logits"] = z[torch.arange(24 * 40) % 9].view(24, 40) / temperature
    config = GemmConfig(16, 16, 16, 2, subtiles=2, persistent=FORMS[form])
    t = torch.tensor(temperature)
    got = mld.masked_linear_dlogits(*inputs.values(), t, torch.tensor(0.25), 1.0, False, config)
    oracle = expected(testing.to_fp64(inputs), t.double(), torch.tensor(0.25).double(), 1.0, False)["dlogits"]
    assert (oracle != 0).all()
    torch.testing.assert_close(got.double(), oracle, rtol=2e-5, atol=0)
    assert launched == [form]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_temperature_of_any_dtype(dtype):
    """fp64 arithmetic on a temperature of fp64 would change the result: 0.3 is another number in fp32."""
    inputs = inputs_of(TOKENS, 16, 32)
    t = torch.tensor(0.3, dtype=dtype)
    got = mld.masked_linear_dlogits(*inputs.values(), t, None, 1.0, False, SMALL)
    assert torch.equal(got, mld.masked_linear_dlogits(*inputs.values(), t.float(), None, 1.0, False, SMALL))
    check(inputs, t.float())


def test_logits_of_two_bytes_give_a_gradient_of_two_bytes(launched):
    inputs = inputs_of(TOKENS, N, K, torch.float16)
    inputs["mask_logits"] = inputs["mask_logits"].half()
    check(inputs, config=GemmConfig(16, 32, 16, 2, persistent=True))
    assert launched == [POINTER]  # one rounding: a reduce-add would round twice


@pytest.mark.parametrize("form", FORMS)
def test_not_a_number_stays_where_it_is(form):
    inputs = inputs_of(TOKENS, N, K, torch.float16)
    config = GemmConfig(16, 32, 16, 2, subtiles=2, persistent=FORMS[form])
    arguments = (torch.tensor(1.5), None, 1.0, False, config)
    clean = mld.masked_linear_dlogits(*inputs.values(), *arguments)
    inputs["mask_logits"][5, 7] = math.nan
    inputs["weight"][20, 60] = math.inf
    got = mld.masked_linear_dlogits(*inputs.values(), *arguments)
    assert got[5, 7].isnan()
    assert got[20, 60].isinf()
    got[5, 7], got[20, 60] = clean[5, 7], clean[20, 60]
    assert torch.equal(got, clean)


@pytest.mark.parametrize("form", FORMS)
def test_adding_rounds_once_and_is_repeatable_bit_for_bit(form):
    inputs = inputs_of(TOKENS, N, K, torch.float16)
    config = GemmConfig(16, 32, 16, 2, subtiles=4, persistent=FORMS[form])
    arguments = (*inputs.values(), torch.tensor(1.5), torch.tensor(0.7), 1.5, False, config)
    written = mld.masked_linear_dlogits(*arguments)
    assert torch.equal(written, mld.masked_linear_dlogits(*arguments))
    before = testing.seeded_normal((N, K), 5)
    added = before.clone()
    mld.masked_linear_dlogits_(added, *arguments)
    assert torch.equal(added, before + written)


def test_default_config():
    """Without a config the safe default runs, whose tiles are larger than these tensors."""
    inputs = inputs_of(13, 70, 67, torch.float16)
    arguments = (torch.tensor(1.5), None, 1.0, False)
    got = mld.masked_linear_dlogits(*inputs.values(), *arguments)
    assert torch.equal(got, mld.masked_linear_dlogits(*inputs.values(), *arguments, mld.UNALIGNED_CONFIG))
    check(inputs, config=None)


def test_other_dtypes_are_refused():
    inputs = testing.to_fp64(inputs_of(5, 6, 7))
    with pytest.raises(NotImplementedError, match=r"take dout in float32, float16 or bfloat16, got torch\.float64"):
        mld.masked_linear_dlogits(*inputs.values(), torch.tensor(1.0), None, 1.0, False)


def planned(n, k, dtype=torch.bfloat16, target=H200, config=None, add=True):
    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    logits = empty(n, k, dtype=torch.float32)
    tensors = (empty(4096, n), empty(4096, k), empty(n, k), logits, empty(dtype=torch.float32), None, 1.0, False)
    return mld.plan(*tensors, logits, add, target, config)


def test_persistent_form_only_where_descriptors_can_be_made():
    large = GemmConfig(128, 256, 64, subtiles=4, num_warps=8, persistent=True)
    launch = planned(4096, 4096, config=large)
    assert launch.kernel.fn.__name__ == PERSISTENT
    assert launch.grid == (132,)
    assert launch.constants["REDUCE"]
    ampere = Target("cuda", "80", "no such device", 108)
    unaligned, old = planned(4096, 4099, config=large), planned(4096, 4096, target=ampere, config=large)
    for other, safe in ((unaligned, mld.UNALIGNED_CONFIG), (old, mld.DEFAULT_CONFIG)):
        assert other.kernel.fn.__name__ == POINTER
        assert other.constants == planned(4096, 4096, config=safe).constants  # the large tiles would spill there
    fp32 = planned(4096, 4096, torch.float32, config=large)
    assert fp32.kernel.fn.__name__ == POINTER
    assert (fp32.constants["BLOCK_R"], fp32.constants["BLOCK_C"], fp32.constants["BLOCK_M"]) == (128, 128, 32)


@pytest.mark.filterwarnings("ignore:no launch configs measured")
def test_small_weights_get_smaller_tiles():
    """768 x 768 has 18 tiles of 128 x 256 for 132 multiprocessors, but 144 of 64 x 64."""
    launch = planned(768, 768)
    assert (launch.constants["BLOCK_R"], launch.constants["BLOCK_C"]) == (64, 64)
    assert planned(4096, 4096).constants["BLOCK_C"] >= 128


@pytest.mark.parametrize("tokens", [1, 16, 128, 8192])
def test_candidates(tokens):
    candidates = mld.candidate_configs(H200, tokens, 4096, 4096)
    assert 3 <= len(candidates) <= 10
    assert len(set(candidates)) == len(candidates)
    assert any(c.persistent for c in candidates) == (tokens > 64)
    inputs = inputs_of(3, 17, 9, torch.float16)
    for config in mld.candidate_configs(H200, tokens, 17, 9):
        check(inputs, config=config)
