"""masked_linear's Triton kernels, called directly and interpreted on the CPU, against the reference in fp64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from csmask import reference, testing

pytest.importorskip("triton")
from csmask_kernels import masked_linear as ml
from csmask_kernels import masked_linear_config as configs
from csmask_kernels import replay
from csmask_kernels.launch import INTERPRETER, GemmConfig, Target

BLOCK = 16
# The forms of the kernel, with tiles so small that every test has several tiles and tails in M, N and K.
FORMS = {
    "pointer": {},
    "swap": {"swap": True},
    "split": {"split_k": 3},
    "swap-split": {"swap": True, "split_k": 2},
    "persistent": {"persistent": True},
    "persistent-swap": {"persistent": True, "swap": True},
}
# One of each kind, where a test is about what all forms share.
SOME_FORMS = ["pointer", "swap-split", "persistent"]
PERSISTENT = "_masked_linear_persistent_kernel"
POINTER = "_masked_linear_fwd_kernel"
H200 = Target("cuda", "90", "no such device", 132)


def config_of(form, **changes):
    return GemmConfig(**{"block_m": BLOCK, "block_n": BLOCK, "block_k": BLOCK, "group_m": 2} | FORMS[form] | changes)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fresh memory is NaN: an element of an output or a slot of partials that nobody writes shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(math.nan) if tensor.is_floating_point() and tensor.device.type == "cpu" else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that were launched."""
    names, run = [], replay.run

    def recording(device, *launches):
        names.extend(launch.kernel.fn.__name__ for launch in launches)
        return run(device, *launches)

    monkeypatch.setattr(replay, "run", recording)
    return names


def expected(inputs, temperature, dout, hard=False, scale=1.0, transposed=False):
    """out, l0 and dx of the reference, dx by autograd, in the dtype of the inputs."""
    x = inputs["x"].detach().requires_grad_()
    options = {"hard": hard, "scale": scale}
    weight, logits = inputs["weight"], inputs["mask_logits"]
    out = reference.masked_linear(x, weight, logits, temperature, inputs["bias"], transposed=transposed, **options)
    l0 = reference.materialize(weight, logits, temperature, **options)[1]
    (dx,) = torch.autograd.grad(out, x, dout.to(out.dtype))
    return {"out": out.detach(), "l0": l0, "dx": dx}


def run(inputs, temperature, dout, config, hard=False, scale=1.0, transposed=False):
    """out, l0 and dx of the kernels."""
    x, weight, logits, bias = (inputs[name] for name in ("x", "weight", "mask_logits", "bias"))
    temperature = torch.as_tensor(temperature)
    out, l0 = ml.masked_linear(x, weight, logits, temperature, bias, hard, scale, transposed, config)
    assert out.is_contiguous()
    assert (out.dtype, l0.dtype, l0.dim()) == (x.dtype, torch.float32, 0)
    dx = ml.masked_linear_dx(dout, weight, logits, temperature, hard, scale, transposed, config)
    assert dx.is_contiguous()
    return {"out": out, "l0": l0, "dx": dx}


def check(inputs, temperature, config, **options):
    """Runs the kernels on the inputs, holds them against the oracle and returns their result."""
    n = inputs["weight"].shape[int(options.get("transposed", False))]
    dout = testing.seeded_normal((inputs["x"].shape[0], n), 99, inputs["x"].dtype)
    got = run(inputs, temperature, dout, config, **options)
    oracle = expected(testing.to_fp64(inputs), temperature, dout, **options)
    testing.assert_close(got, oracle, expected(inputs, temperature, dout, **options))
    return got


def bits_of(logits):
    """The packed mask of ``pack_mask``'s definition, written out in numpy."""
    kept = np.packbits((logits > 0).numpy().reshape(-1), bitorder="little")
    return torch.from_numpy(np.pad(kept, (0, -len(kept) % 4)).view(np.int32))


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize(("bias", "scale"), [(True, 1.0), (False, 1.25)], ids=["bias", "scaled"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_the_reference(form, bias, scale, hard, transposed, launched):
    inputs = testing.linear_inputs((2 * BLOCK + 1,), 52, 36, torch.float32, transposed=transposed, bias=bias)
    check(inputs, 1.0, config_of(form), hard=hard, scale=scale, transposed=transposed)
    kernels = [PERSISTENT] if "persistent" in form else [POINTER]
    assert launched == (kernels + ["_masked_linear_reduce_kernel"] * ("split" in form)) * 2


@pytest.mark.parametrize("form", ["pointer", "swap-split"])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        pytest.param(1, 1, 1, id="one"),
        pytest.param(1, 33, 7, id="one-token"),
        pytest.param(7, 1, 33, id="one-output"),
        pytest.param(33, 13, 1, id="one-input"),
        pytest.param(13, 7, 13, id="primes"),
        pytest.param(BLOCK, BLOCK, BLOCK, id="block"),
        pytest.param(BLOCK + 1, BLOCK + 1, BLOCK + 1, id="block+1"),
        pytest.param(BLOCK - 1, 33, BLOCK - 1, id="block-1"),
        pytest.param(0, 17, 13, id="no-token"),
        pytest.param(5, 0, 13, id="no-output"),
        pytest.param(5, 17, 0, id="no-input"),
    ],
)
def test_odd_sizes(form, m, n, k):
    check(testing.linear_inputs((m,), k, n, torch.float32), 1.0, config_of(form))


@pytest.mark.parametrize("form", SOME_FORMS)
@pytest.mark.parametrize(("x_dtype", "w_dtype"), [("float16",) * 2, ("float16", "float32"), ("float32", "float16")])
def test_dtypes(form, x_dtype, w_dtype):
    """Under autocast x is narrower than the weight; the masked weight is rounded to x's dtype, once."""
    inputs = testing.linear_inputs((BLOCK + 1,), 40, 24, getattr(torch, x_dtype), bias=False)
    inputs["weight"] = inputs["weight"].to(getattr(torch, w_dtype))
    if x_dtype == w_dtype:
        check(inputs, 1.0, config_of(form))
        return
    # F.linear under autograd takes one dtype: the plain reference is the product with the rounded masked weight.
    dout = testing.seeded_normal((BLOCK + 1, 24), 99, inputs["x"].dtype)
    got = run(inputs, 1.0, dout, config_of(form))
    masked, l0 = reference.materialize(inputs["weight"], inputs["mask_logits"], 1.0, dtype=inputs["x"].dtype)
    plain = {"out": inputs["x"] @ masked.t(), "l0": l0, "dx": dout @ masked}
    testing.assert_close(got, expected(testing.to_fp64(inputs), 1.0, dout), plain)


@pytest.mark.parametrize("form", SOME_FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_saturated_masks_and_every_temperature_dtype(form, dtype):
    inputs = testing.linear_inputs((BLOCK + 1,), 36, 20, torch.float32)
    assert (inputs["mask_logits"] == 0).any()
    got = check(inputs, torch.tensor(200.0, dtype=dtype), config_of(form))
    # logits of exactly 0 are undecided at any temperature
    kept = (inputs["mask_logits"] > 0).sum() + (inputs["mask_logits"] == 0).sum() / 2
    assert abs(got["l0"] - kept) < 5


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("form", SOME_FORMS)
def test_neuron_logits(form, hard, transposed, launched):
    """A logit per output unit: stride 0 along the inputs, which no tensor descriptor has."""
    inputs = testing.linear_inputs((9,), 20, 36, torch.float32, mask_unit="neuron", transposed=transposed)
    check(inputs, 1.0, config_of(form), hard=hard, transposed=transposed)
    assert PERSISTENT not in launched


@pytest.mark.parametrize("form", SOME_FORMS)
def test_layouts(form, launched):
    """Strided, transposed and unaligned tensors, read where they are; the persistent form leaves these to the other."""
    inputs = testing.linear_inputs((BLOCK + 1,), 36, 20, torch.float32)
    x, weight, logits = (inputs[name] for name in ("x", "weight", "mask_logits"))
    wide, padded = torch.zeros(20, 73), torch.zeros(20, 37)
    wide[:, 1::2], padded[:, :36] = logits, weight
    layouts = [
        {"x": x.t().contiguous().t()},
        {"weight": weight.t().contiguous().t()},
        {"mask_logits": wide[:, 1::2]},
        {"weight": padded[:, :36]},
        {"x": x[:1].expand(BLOCK + 1, 36)},
        {"weight": torch.cat((torch.zeros(1), weight.flatten()))[1:].view(20, 36)},
    ]
    for layout in layouts:
        check(inputs | layout, 1.0, config_of(form))
        assert launched[0] == POINTER
    check(
        inputs | {n: t.t().contiguous().t() for n, t in (("weight", weight), ("mask_logits", logits))},
        1.0,
        config_of(form),
    )
    assert (launched[-1] == PERSISTENT) == ("persistent" in form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("m", "transposed"), [(0, False), (1, True), (2 * BLOCK + 1, False)])
def test_every_weight_is_counted_once(form, m, transposed):
    """Sums of ones and zeros are exact; a soft mask of padding would add 1/2 per logit that is not there."""
    inputs = testing.linear_inputs((m,), 3 * BLOCK + 4, BLOCK + 4, torch.float32, transposed=transposed)
    x, weight, logits = (inputs[name] for name in ("x", "weight", "mask_logits"))
    temperature, config = torch.tensor(1.0), config_of(form)
    _, l0 = ml.masked_linear(x, weight, logits, temperature, None, True, 1.0, transposed, config)
    assert l0 == (logits > 0).sum()
    _, l0 = ml.masked_linear(x, weight, torch.zeros_like(logits), temperature, None, False, 1.0, transposed, config)
    assert l0 == logits.numel() / 2


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize(
    ("block", "n", "k"),
    [
        pytest.param(16, 36, 44, id="rows-and-tiles-of-part-words"),
        pytest.param(32, 36, 41, id="rows-of-part-words"),
        pytest.param(16, 64, 96, id="tiles-of-part-words"),
        pytest.param(32, 96, 160, id="whole-words"),
    ],
)
@pytest.mark.parametrize("form", SOME_FORMS)
def test_bits_equal_the_hard_mask(form, block, n, k, transposed):
    inputs = testing.linear_inputs((BLOCK + 1,), k, n, torch.float32, transposed=transposed)
    config = config_of(form, block_n=block, block_k=block)
    x, weight, bits = inputs["x"], inputs["weight"], bits_of(inputs["mask_logits"])
    dout = testing.seeded_normal((BLOCK + 1, n), 99)
    options = {"hard": True, "scale": 1.25, "transposed": transposed}
    got = {
        "out": ml.bitmask_linear(x, weight, bits, inputs["bias"], 1.25, transposed, config),
        "dx": ml.bitmask_linear_dx(dout, weight, bits, 1.25, transposed, config),
    }
    oracle, plain = expected(testing.to_fp64(inputs), 1.0, dout, **options), expected(inputs, 1.0, dout, **options)
    testing.assert_close(got, {n: oracle[n] for n in got}, {n: plain[n] for n in got})


def test_words_are_loaded_whole_where_they_can_be():
    weight = torch.zeros(64, 96)
    mask = ml.bits_mask(weight, torch.zeros(64 * 3, dtype=torch.int32), 1.0)
    whole, part = GemmConfig(block_n=64, block_k=32), GemmConfig(block_n=16, block_k=16)
    assert mask.kind(64, 96, whole) == "words_k"
    assert mask.transposed().kind(96, 64, whole) == "words_n"
    assert mask.kind(64, 96, part) == mask.transposed().kind(96, 64, part) == "bits"
    assert mask.kind(64, 90, whole) == mask.transposed().kind(90, 64, whole) == "bits"


@pytest.mark.parametrize("form", FORMS)
def test_pruned_weights_are_nothing(form):
    """Under a hard mask logits of 0 and NaN prune, and a pruned inf or NaN is +0."""
    inputs = testing.linear_inputs((5,), 20, 36, torch.float32)
    logits, weight = inputs["mask_logits"].clone(), inputs["weight"].clone()
    logits[0, :3] = torch.tensor([math.nan, 0.0, -math.inf])
    weight[0, :3] = torch.tensor([math.inf, math.nan, -math.inf])
    clean = weight.masked_fill(~(logits > 0), 0.0)
    dout = testing.seeded_normal((5, 36), 99)
    got = run(inputs | {"weight": weight, "mask_logits": logits}, 1.0, dout, config_of(form), hard=True)
    want = run(inputs | {"weight": clean, "mask_logits": logits}, 1.0, dout, config_of(form), hard=True)
    assert all(torch.equal(got[name], want[name]) and got[name].isfinite().all() for name in got)
    bits = ml.bitmask_linear(inputs["x"], weight, bits_of(logits), inputs["bias"], 1.0, False, config_of(form))
    if "persistent" not in form:
        assert torch.equal(bits, want["out"])


@pytest.mark.parametrize("form", FORMS)
def test_repeatable_bit_by_bit(form):
    inputs = testing.linear_inputs((BLOCK + 1,), 132, 36, torch.float32)
    dout = testing.seeded_normal((BLOCK + 1, 36), 99)
    first, second = (run(inputs, 1.3, dout, config_of(form), scale=1.25) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("m", [3, 70])
def test_the_config_that_is_chosen(m, launched):
    """No config given: few tiles are split to fill the multiprocessors, of which the interpreter claims four."""
    check(testing.linear_inputs((m,), 530, 70, torch.float32), 1.0, None)
    assert launched.count("_masked_linear_reduce_kernel") == int(m == 3)


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def chosen(target, x, weight, logits=None):
    logits = meta(*weight.shape, dtype=torch.float32) if logits is None else logits
    mask = ml.logits_mask(weight, logits, meta(dtype=torch.float32), False, 1.0)
    return configs.choose_config("masked_linear", target, x, weight, mask)


@pytest.mark.filterwarnings("ignore:no launch configs measured")
@pytest.mark.parametrize("family", ["cuda 80", "cuda 90", "cuda 100", "cuda 120", "hip gfx942", "hip gfx950"])
@pytest.mark.parametrize("m", [1, 16, 300, 8192])
def test_the_table_s_config_is_fitted(m, family):
    """fp32 operands halve the step of K, and few fp32 tokens take a tile whose registers do not spill.

    Few tiles are split until they fill the multiprocessors, and not further.
    """
    backend, arch = family.split()
    target = Target(backend, arch, "no such device", 132)
    x, weight = meta(m, 4096), meta(4096, 4096)
    narrow = chosen(target, x, weight)
    for wide in ((x.float(), weight), (x, weight.float()), (x.float(), weight.float())):
        is_small = narrow.block_m <= 64 and wide[0].dtype == torch.float32
        if is_small:
            assert chosen(target, *wide) == configs.fit_dtypes(configs.FP32_CONFIG, *wide)
        else:
            assert chosen(target, *wide).block_k == max(narrow.block_k // 2, 16)
    transposed = meta(4096, 4096, dtype=torch.float32).t()
    assert chosen(target, x.float(), transposed) == configs.fit_dtypes(configs.FP32_CONFIG, x.float(), transposed)
    filled = configs.fill(narrow, target, m, 4096, 4096)
    programs = -(-m // filled.block_m) * -(-4096 // filled.block_n) * filled.split_k
    assert filled.split_k == 1 or programs <= 132
    if m == 1:
        assert programs > 132 - 132 / 3
        assert 4096 / filled.split_k >= 4 * filled.block_k


def test_persistence_needs_a_tile_for_each_multiprocessor(monkeypatch):
    row = {"m": 16, "block_m": 128, "block_n": 128, "persistent": True}
    monkeypatch.setattr(configs, "get_config", lambda *_: GemmConfig(**{k: v for k, v in row.items() if k != "m"}))
    enough = chosen(H200, meta(128 * 12, 768), meta(128 * 11, 768))
    few = chosen(H200, meta(128 * 12, 768), meta(128 * 10, 768))
    assert (enough.persistent, enough.split_k) == (True, 1)
    assert (few.persistent, few.split_k) == (False, 0)


def test_tensors_that_are_not_loaded_16_bytes_at_a_time_get_small_tiles(monkeypatch):
    row = GemmConfig(block_m=256, block_n=256, block_k=64, persistent=True)
    monkeypatch.setattr(configs, "get_config", lambda *_: row)
    assert chosen(H200, meta(8192, 4096), meta(4096, 4096)) == row
    assert chosen(H200, meta(8192, 4104), meta(4096, 4104)) == row  # whole 16 bytes, which the TMA unit asks for
    assert chosen(H200, meta(8192, 4097), meta(4096, 4097)) == configs.DEFAULT_CONFIG
    neuron = meta(4096, 1, dtype=torch.float32)
    assert chosen(H200, meta(8192, 4096), meta(4096, 4096), neuron) == configs.DEFAULT_CONFIG
    narrow_out = chosen(H200, meta(8192, 4096), meta(4097, 4096))
    assert (narrow_out.block_m, narrow_out.block_n, narrow_out.persistent) == (128, 128, False)


@pytest.mark.parametrize("family", ["cuda 80", "cuda 90", "cuda 100", "cuda 120", "hip gfx942", "hip gfx950"])
def test_candidates_are_few_different_and_suit_the_tokens(family):
    backend, arch = family.split()
    target = Target(backend, arch, "no such device", 132)
    for m in (1, 16, 64, 256, 1024, 8192):
        found = ml.candidate_configs("masked_linear", target, m, 4096, 4096)
        assert 2 <= len(found) <= 12
        assert len(set(found)) == len(found)
        assert all(config.block_m <= max(2 * m, 16) for config in found)
        assert target.has_descriptors or not any(config.persistent for config in found)


def test_a_given_config_is_not_changed():
    config = config_of("split", split_k=7)
    x, weight, logits = torch.zeros(3, 20), torch.zeros(5, 20), torch.zeros(5, 20)
    mask = ml.logits_mask(weight, logits, torch.tensor(1.0), False, 1.0)
    launches, (l0, _) = ml.plan(x, weight, mask, None, torch.zeros(3, 5), True, INTERPRETER, config)
    assert (launches[0].grid, launches[1].constants["SPLIT_K"], l0.shape) == ((1, 7), 7, (1, 7))


@pytest.mark.parametrize("name", ["x", "weight", "mask_logits", "bias"])
def test_other_dtypes_are_refused(name):
    inputs = testing.linear_inputs((3,), 5, 4, torch.float32)
    inputs[name] = inputs[name].double()
    with pytest.raises(NotImplementedError, match=f"{name} in float32.*float64"):
        ml.masked_linear(
            *(inputs[n] for n in ("x", "weight", "mask_logits")), torch.tensor(1.0), inputs["bias"], False, 1.0, False
        )


@pytest.mark.parametrize("name", ["x", "weight", "mask_logits"])
def test_offsets_beyond_2_to_31(name):
    """Rows that lie 2**30 + 8 elements apart in memory that is reserved but, between them, never touched."""
    inputs = testing.linear_inputs((4,), 6, 4, torch.float16, bias=False)
    inputs["mask_logits"] = inputs["mask_logits"].half()
    stride = 2**30 + 8
    far = torch.from_numpy(np.empty(3 * stride + 6, dtype=np.float16)).as_strided((4, 6), (stride, 1))
    far.copy_(inputs[name])
    check(inputs | {name: far}, 1.0, config_of("pointer"))


@pytest.mark.parametrize("split_k", [1, 2])
def test_a_bias_may_be_strided(split_k):
    inputs = testing.linear_inputs((5,), 40, 8, torch.float32)
    config = GemmConfig(block_m=16, block_n=16, block_k=16, split_k=split_k)
    for bias in (testing.seeded_normal((8, 3), 9)[:, 1], testing.seeded_normal((1,), 9).expand(8)):
        mask = (inputs["mask_logits"], torch.tensor(2.0))
        got, _ = ml.masked_linear(inputs["x"], inputs["weight"], *mask, bias, False, 1.0, False, config)
        want = reference.masked_linear(inputs["x"], inputs["weight"], *mask, bias)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
