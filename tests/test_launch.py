"""Launch planning: how tensors are walked, how configs are found, and what a launch skips."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import pkgutil
import warnings
from types import SimpleNamespace

import csmask_kernels
import pytest
import torch
from csmask_kernels import launch
from csmask_kernels.launch import INTERPRETER, ElementwiseConfig, GemmConfig, Launch, Target
from hypothesis import given, settings
from hypothesis import strategies as st

H200 = Target("cuda", "90", "NVIDIA H200")


@st.composite
def tensors(draw):
    """Up to three tensors of one shape with any strides: permuted, cut out, every other entry, expanded."""
    shape = draw(st.lists(st.integers(0, 4), min_size=0, max_size=4))
    made = []
    for _ in range(draw(st.integers(1, 3))):
        order = draw(st.permutations(range(len(shape))))
        gaps = draw(st.lists(st.integers(1, 2), min_size=len(shape), max_size=len(shape)))
        base = torch.arange(math.prod(shape[d] * gaps[d] for d in order))
        base = base.view([shape[d] * gaps[d] for d in order])[tuple(slice(None, None, gaps[d]) for d in order)]
        tensor = base.permute([order.index(d) for d in range(len(shape))])
        # The first is an output, which no two entries share; the others may be broadcast.
        if made and shape and draw(st.booleans()):
            dim = draw(st.integers(0, len(shape) - 1))
            if shape[dim]:
                tensor = tensor.select(dim, 0).unsqueeze(dim).expand(shape)
        made.append(tensor)
    return made


def offsets(sizes, strides):
    """Offset of every entry, in the order in which a nest of loops over the sizes comes by."""
    found = torch.zeros([1], dtype=torch.int64)
    for size, stride in zip(sizes, strides, strict=True):
        found = (found[:, None] + torch.arange(size) * stride).flatten()
    return found


def entries(made):
    """For every entry, the offsets that it has in each tensor: what any way of walking them must keep together."""
    return sorted(zip(*(offsets(t.shape, t.stride()).tolist() for t in made), strict=True))


@settings(deadline=None, max_examples=400)
@given(tensors())
def test_collapse_walks_the_same_entries(made):
    sizes, strides = launch.collapse(made[0].shape, *(t.stride() for t in made))
    walked = [offsets(sizes, s) for s in strides]
    assert sorted(zip(*(w.tolist() for w in walked), strict=True)) == entries(made)
    if made[0].numel():
        # in the first tensor's memory order, with nothing left to merge
        assert walked[0].tolist() == sorted(walked[0].tolist())
        assert all(n != 1 for n in sizes) or sizes == [1]
        for outer in range(len(sizes) - 1):
            assert any(s[outer] != s[outer + 1] * sizes[outer + 1] for s in strides)


@pytest.mark.parametrize("made", [torch.empty(3, 5, 7), torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)])
def test_dense_tensors_collapse_to_one_dimension(made):
    assert launch.collapse(made.shape, made.stride(), made.stride()) == ([made.numel()], [[1], [1]])


def walk(tiling, strides):
    """Offsets that all programs of a tiling reach in one tensor, by the arithmetic of the kernels."""
    found = []
    _, rows, columns = tiling.sizes
    tiles_r, tiles_c = -(-rows // tiling.block_r), -(-columns // tiling.block_c)
    for pid in range(tiling.programs):
        outer = pid // (tiles_r * tiles_c)
        rs = pid // tiles_c % tiles_r * tiling.block_r + torch.arange(tiling.block_r)[:, None]
        cs = pid % tiles_c * tiling.block_c + torch.arange(tiling.block_c)[None, :]
        at = outer * strides[0] + rs * strides[1] + cs * strides[2]
        found += at[(rs < rows) & (cs < columns)].tolist()
    return found


@settings(deadline=None, max_examples=400)
@given(tensors(), st.sampled_from([1, 2, 8, 16, 64]))
def test_tile_reaches_every_entry_once(made, block):
    tiling = launch.tile(made[0].shape, block, *made)
    sizes, _ = launch.collapse(made[0].shape, *(t.stride() for t in made))
    if tiling is None:
        assert len(sizes) > 3
        return
    assert tiling.block_r * tiling.block_c == block
    assert sorted(zip(*(walk(tiling, s) for s in tiling.strides), strict=True)) == entries(made)


def test_tiles_are_square_only_where_columns_are_not_contiguous():
    flat, transposed = torch.empty(256, 512), torch.empty(512, 256).t()
    narrow = torch.empty(256, 512)[:, :8]
    tiles = {
        "flat": (flat, flat),
        "both transposed": (transposed, transposed),
        "one transposed": (flat, transposed),
        "narrow": (narrow, narrow),
    }
    found = {name: launch.tile(pair[0].shape, 4096, *pair) for name, pair in tiles.items()}
    assert {name: (tiling.block_r, tiling.block_c) for name, tiling in found.items()} == {
        "flat": (1, 4096),
        "both transposed": (1, 4096),
        "one transposed": (64, 64),
        "narrow": (512, 8),
    }


def test_tiling_names_its_arguments():
    tiling = launch.tile((4, 6), 8, torch.empty(4, 6), torch.empty(6, 4).t())
    assert tiling.arguments("out", "w") == {
        "rows": 4, "columns": 6, "stride_outb": 0, "stride_outr": 6, "stride_outc": 1,
        "stride_wb": 0, "stride_wr": 1, "stride_wc": 4,
    }  # fmt: skip


def test_like_is_dense_in_the_layouts_order():
    layout = torch.empty(8, 10, 12)[::2, ::2, ::2].permute(2, 0, 1)
    tensor = torch.arange(6 * 4 * 5, dtype=torch.float16).view(6, 4, 5)
    copy = launch.like(tensor, layout)
    assert torch.equal(copy, tensor)
    assert copy.dtype == torch.float16
    assert copy.stride() == (1, 30, 6)


@pytest.fixture
def config_directory(tmp_path, monkeypatch):
    """An empty directory of configs; what was looked up before and will be looked up here is forgotten."""
    caches = (launch.config_table, launch.get_config, launch._warn_untuned)

    def forget():
        for cache in caches:
            cache.cache_clear()

    monkeypatch.setattr(launch, "CONFIG_DIRECTORY", tmp_path)
    forget()
    yield tmp_path
    forget()


def write(directory, name, **ops):
    (directory / f"{name}.json").write_text(json.dumps({"source": "a test", "configs": ops}))


def quietly(*arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return launch.get_config(*arguments)


DEFAULT = GemmConfig(block_m=32, num_stages=2)


@pytest.mark.parametrize(
    ("m", "bucket"),
    [(0, 1), (1, 1), (3, 1), (5, 16), (16, 16), (61, 16), (66, 256), (256, 256), (10**9, 256)],
)
def test_the_nearest_bucket_by_logarithm(config_directory, m, bucket):
    # between 1 and 16 lies 4, between 16 and 256 lies 64
    write(config_directory, "sm_90", masked_linear=[{"m": b, "group_m": b} for b in (16, 256, 1)])
    assert quietly("masked_linear", H200, m, DEFAULT).group_m == bucket


def test_a_row_overrides_fields_of_the_default(config_directory):
    write(config_directory, "sm_90", masked_linear=[{"m": 1, "block_n": 128, "swap": True, "microseconds": 3.5}])
    found = quietly("masked_linear", H200, 1, DEFAULT)
    assert found == GemmConfig(block_m=32, block_n=128, swap=True, num_stages=2)
    assert quietly("materialize", H200, 1, ElementwiseConfig(block=512)) == ElementwiseConfig(block=512)


def test_the_device_before_its_family_before_the_default(config_directory, recwarn):
    write(config_directory, "NVIDIA_H200", materialize=[{"m": 1, "block": 256}])
    write(config_directory, "sm_90", materialize=[{"m": 1, "block": 512}])
    found = {
        target.name: launch.get_config("materialize", target, 1, ElementwiseConfig()).block
        for target in (H200, Target("cuda", "90", "NVIDIA H100"), Target("cuda", "80", "NVIDIA A100"), INTERPRETER)
    }
    assert found == {"NVIDIA H200": 256, "NVIDIA H100": 512, "NVIDIA A100": 4096, "interpreter": 4096}
    warned = [str(w.message) for w in recwarn]
    assert len(warned) == 2
    for message, device in zip(warned, ("NVIDIA H100 (sm_90)", "NVIDIA A100 (sm_80)"), strict=True):
        assert message.startswith(f"no launch configs measured on {device}")
        assert "python bench/tune.py" in message


def test_one_warning_per_device(config_directory, recwarn):
    warnings.simplefilter("always")
    for m in range(5):
        launch.get_config("materialize", H200, m, ElementwiseConfig())
        launch.get_config("masked_linear", H200, m, DEFAULT)
    assert len(recwarn) == 1


def test_config_lookups_of_any_batch_are_bounded():
    assert launch.get_config.cache_info().maxsize is not None


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "NVIDIA_H200"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA_A100-SXM4-80GB"),
        ("NVIDIA GeForce RTX 5090 (laptop)/x", "NVIDIA_GeForce_RTX_5090_laptop_x"),
        ("../etc", ".._etc"),
    ],
)
def test_config_file_names(device, name):
    assert launch.config_file_name(device) == name
    assert launch.config_file_name(name) == name


def test_targets():
    assert launch.target_of(torch.empty(1)) == INTERPRETER
    assert H200.family == "sm_90"
    assert H200.has_descriptors
    assert not Target("cuda", "89", "NVIDIA L4").has_descriptors
    assert Target("cuda", "120", "NVIDIA GeForce RTX 5090").has_descriptors
    amd = Target("hip", "gfx942", "AMD Instinct MI300X")
    assert (amd.family, amd.has_descriptors) == ("gfx942", False)


class Recorder:
    """Stands for a kernel: ``recorder[grid](**arguments)``."""

    def __init__(self):
        self.started = []

    def __getitem__(self, grid):
        return lambda **arguments: self.started.append((grid, arguments))


def test_run_starts_what_has_programs_in_order():
    kernel = Recorder()
    grids = [(2,), (0,), (3, 0, 4), (3, 1, 4)]
    launches = [Launch(kernel, g, {"n": i}, {"BLOCK": 8}, num_warps=2, num_stages=1) for i, g in enumerate(grids)]
    launch.run(torch.device("cpu"), *launches)
    options = {"BLOCK": 8, "num_warps": 2, "num_stages": 1, "enable_fp_fusion": True}
    assert kernel.started == [((2,), {"n": 0, **options}), ((3, 1, 4), {"n": 3, **options})]


def test_run_enters_the_tensors_device(monkeypatch):
    """Triton launches on the current device, whatever the tensors' own; the current one is restored."""
    current = [0]
    entered = []

    class Entering:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device.index)
            current.append(self.device.index)

        def __exit__(self, *_):
            current.pop()

    fake = SimpleNamespace(current_device=lambda: current[-1], device=Entering)
    monkeypatch.setattr(torch, "cuda", fake)
    kernel = Recorder()
    for index in (0, 1):
        launch.run(torch.device("cuda", index), Launch(kernel, (1,), {}, {}))
    assert len(kernel.started) == 2
    assert entered == [1]
    assert current == [0]


def test_check_supported_names_the_tensor_and_the_way_out():
    launch.check_supported(weight=torch.empty(1, dtype=torch.bfloat16), bias=None)
    with pytest.raises(NotImplementedError) as raised:
        launch.check_supported(weight=torch.empty(1), bias=torch.empty(1, dtype=torch.float64))
    assert str(raised.value) == (
        "csmask's GPU kernels take bias in float32, float16 or bfloat16, got torch.float64; "
        'use CircuitConfig(execution="reference") for other dtypes'
    )


# What a launch itself takes by name (Triton 3.6 refuses "stream"), beside the compiler's options.
TRITONS_OWN = {"grid", "warmup", "stream", "device", "device_type", "num_warps", "num_stages", "num_ctas", "maxnreg"}


def test_no_kernel_takes_an_argument_of_a_name_that_launches_keep_for_themselves():
    found = {}
    for info in pkgutil.iter_modules(csmask_kernels.__path__):
        if info.name == "_cpu":
            continue
        for name, value in vars(importlib.import_module(f"csmask_kernels.{info.name}")).items():
            if name.endswith("_kernel") and hasattr(value, "fn"):
                found[name] = set(inspect.signature(value.fn).parameters)
    assert len(found) > 10
    assert {name: own for name, names in found.items() if (own := names & TRITONS_OWN)} == {}
