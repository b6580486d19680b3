"""From tensors to kernel launches: what a kernel is started with, how tensors of any layout are walked, and the
launch configurations.

An op's launcher first *plans*: it picks a config and builds ``Launch`` objects, on tensors that may be on the meta
device; then it runs them. What is compiled without a GPU (``bench/compile_report.py``) is therefore what runs on one.

Configs are looked up in ``configs/<device name>.json``, then in ``configs/<architecture>.json``, then the safe default
of the caller is taken; nothing is timed at run time, ``bench/tune.py`` writes the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

CONFIG_DIRECTORY = Path(__file__).with_name("configs")


@dataclass(frozen=True)
class Launch:
    """One kernel launch: ``kernel[grid](**arguments, **constants)`` with its options.

    ``arguments`` are what the kernel takes at run time (tensors, tensor descriptors, ints, floats, None), ``constants``
    its ``tl.constexpr`` parameters. ``behind`` are the tensors that it reaches through a table of addresses, kept
    until it has run: for each row of the table, every tensor once for each access.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    behind: tuple[tuple[Tensor, ...], ...] = ()

    def options(self) -> dict[str, Any]:
        # Triton 3.10 turns fusion of products and sums off by default; results should not depend on the release.
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


_collected: list[Launch] | None = None


@contextlib.contextmanager
def collecting() -> Iterator[list[Launch]]:
    """Launches are gathered in the list that this gives, and not started: what the launchers return is garbage."""
    global _collected
    before, _collected = _collected, []
    try:
        yield _collected
    finally:
        _collected = before


def is_collecting() -> bool:
    """Whether launches are gathered in place of started."""
    return _collected is not None


def run(device: torch.device, *launches: Launch) -> list[Any]:
    """Start the launches in order on the device's current stream; a grid without programs is skipped.

    Returns:
        For each launch the compiled kernel; None where it was skipped, gathered, or interpreted.
    """
    if _collected is not None:
        _collected.extend(launches)
        return [None] * len(launches)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return run(torch.device("cuda", torch.cuda.current_device()), *launches)
    return [
        launch.kernel[launch.grid](**launch.arguments, **launch.constants, **launch.options())
        if math.prod(launch.grid)
        else None
        for launch in launches
    ]


def check_supported(**tensors: Tensor | None) -> None:
    """Raise for dtypes that the GPU kernels do not compute in: they know float32, float16 and bfloat16."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise NotImplementedError(
                f"csmask's GPU kernels take {name} in float32, float16 or bfloat16, got {tensor.dtype}; "
                'use CircuitConfig(execution="reference") for other dtypes'
            )


# Layouts


def collapse(shape: Sequence[int], *strides: Sequence[int]) -> tuple[list[int], list[list[int]]]:
    """The fewest dimensions that walk tensors of one shape and these strides, the first tensor's order deciding.

    Dimensions of size 1 vanish, dimensions are sorted by falling stride of the first tensor, and neighbours that every
    tensor holds as one are merged. At least one dimension is left.
    """
    dims = sorted((d for d in range(len(shape)) if shape[d] != 1), key=lambda d: -strides[0][d])
    sizes: list[int] = []
    walked: list[list[int]] = [[] for _ in strides]
    for d in dims:
        if sizes and all(w[-1] == s[d] * shape[d] for w, s in zip(walked, strides, strict=True)):
            sizes[-1] *= shape[d]
            for w, s in zip(walked, strides, strict=True):
                w[-1] = s[d]
        else:
            sizes.append(shape[d])
            for w, s in zip(walked, strides, strict=True):
                w.append(s[d])
    if not sizes:
        return [1], [[1] for _ in strides]
    return sizes, walked


def like(tensor: Tensor, layout: Tensor) -> Tensor:
    """A copy of ``tensor`` laid out as ``torch.empty_like(layout)``: dense, in the order of ``layout``'s strides."""
    return torch.empty_like(layout, dtype=tensor.dtype).copy_(tensor)


@dataclass(frozen=True)
class Tiling:
    """How an elementwise kernel walks its tensors: three dimensions, one program per ``block_r x block_c`` tile."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    block_r: int
    block_c: int

    @property
    def programs(self) -> int:
        outer, rows, columns = self.sizes
        return outer * triton.cdiv(rows, self.block_r) * triton.cdiv(columns, self.block_c)

    def arguments(self, *names: str) -> dict[str, int]:
        """Sizes and, for each tensor by its name in the kernel, strides: the kernel's run-time arguments."""
        found = {"rows": self.sizes[1], "columns": self.sizes[2]}
        for name, strides in zip(names, self.strides, strict=True):
            found.update({f"stride_{name}{axis}": s for axis, s in zip("brc", strides, strict=True)})
        return found


def tile(shape: Sequence[int], block: int, *tensors: Tensor) -> Tiling | None:
    """A tiling of ``block`` elements for tensors of one shape; None where they need more than three dimensions."""
    sizes, strides = collapse(shape, *(t.stride() for t in tensors))
    if len(sizes) > 3:
        return None
    missing = 3 - len(sizes)
    sizes = [1] * missing + sizes
    strides = [[0] * missing + s for s in strides]
    rows, columns = sizes[1:]
    if rows == 1:
        block_r, block_c = 1, block
    elif all(s[2] == 1 or s[2] == 0 for s in strides):
        block_c = min(block, triton.next_power_of_2(max(columns, 1)))
        block_r = block // block_c
    else:
        # Some tensor is contiguous along the rows: a square tile gives both sides whole cache lines.
        block_c = 1 << (block.bit_length() // 2)
        block_r = block // block_c
    return Tiling(tuple(sizes), tuple(tuple(s) for s in strides), block_r, block_c)


# Launch configurations


@dataclass(frozen=True)
class ElementwiseConfig:
    """Elements per program, and its warps."""

    block: int = 4096
    num_warps: int = 8


@dataclass(frozen=True)
class StepConfig(ElementwiseConfig):
    """As ``ElementwiseConfig`` of one piece; a program walks so many of them, 65535 elements at most."""

    block: int = 1024
    num_warps: int = 2
    pieces: int = 1


@dataclass(frozen=True)
class GemmConfig:
    """Tile sizes of a masked matrix product, as ``out[M, N] = sum over K``, and how its programs are arranged.

    Args:
        block_m, block_n, block_k: tile of the output and step along the sum.
        group_m: tiles of M that are walked together, for reuse in L2.
        split_k: programs that share one output tile; their fp32 partial sums are added in a fixed order. 0 for as many
            as fill the device.
        swap: compute the transposed tile, so that the masked weight is the left operand: few tokens.
        persistent: tensor descriptors and a grid of one program per multiprocessor (sm_90 and later).
        subtiles: pieces in which the epilogue of the weight gradient works, against register spills.
    """

    block_m: int = 64
    block_n: int = 64
    block_k: int = 32
    group_m: int = 8
    split_k: int = 1
    swap: bool = False
    persistent: bool = False
    subtiles: int = 1
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Target:
    """What kernels are compiled for: ``backend`` ("cuda", "hip" or "interpreter"), architecture, name of the device."""

    backend: str
    arch: str
    name: str
    multiprocessors: int = 132

    @property
    def has_descriptors(self) -> bool:
        """Whether host tensor descriptors and bulk copies are there: NVIDIA from sm_90 on."""
        return self.backend == "cuda" and int(self.arch) >= 90

    @property
    def family(self) -> str:
        """The name of the architecture's config file: ``sm_90``, ``gfx942``."""
        return f"sm_{self.arch}" if self.backend == "cuda" else self.arch


INTERPRETER = Target("interpreter", "interpreter", "interpreter", multiprocessors=4)


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels (``TRITON_INTERPRET=1``), on tensors of any device."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        backend, arch = "hip", properties.gcnArchName.split(":")[0]
    else:
        backend, arch = "cuda", f"{properties.major}{properties.minor}"
    return Target(backend, arch, properties.name, properties.multi_processor_count)


def target_of(tensor: Tensor) -> Target:
    """The target that a tensor's kernels run on."""
    if tensor.device.type != "cuda" or is_interpreted():
        return INTERPRETER
    return _cuda_target(tensor.device.index)


def fp32_products(target: Target, convolution: bool = False) -> str:
    """How tensor cores multiply fp32 operands, as ``tl.dot``'s ``input_precision``: tf32 where torch allows it for its
    own matrix products (or convolutions), three tf32 products, which are close to fp32, otherwise."""
    if target.backend != "cuda":
        return "ieee"
    torch_setting = torch.backends.cudnn.conv if convolution else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    return "tf32" if torch_setting.fp32_precision == "tf32" else "tf32x3"


def config_file_name(device_name: str) -> str:
    """``NVIDIA H200`` -> ``NVIDIA_H200``: what ``bench/tune.py`` calls the device's table, without ``.json``."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", device_name).strip("_")


def config_path(target: Target) -> Path | None:
    """The file of the target's launch configs: its device's, else its architecture's; None where there is neither."""
    for name in (config_file_name(target.name), target.family):
        path = CONFIG_DIRECTORY / f"{name}.json"
        if path.is_file():
            return path
    return None


@functools.cache
def config_table(target: Target) -> dict[str, list[dict[str, Any]]]:
    """The target's launch configs: op -> rows with a bucket ``m`` each; empty where there is no file."""
    path = config_path(target)
    if target.backend != "interpreter" and (path is None or path.stem == target.family):
        _warn_untuned(target)
    return json.loads(path.read_text())["configs"] if path else {}


@functools.cache
def _warn_untuned(target: Target) -> None:
    warnings.warn(
        f"no launch configs measured on {target.name} ({target.family}): csmask's kernels run with general ones; "
        "python bench/tune.py measures and writes configs for this device",
        stacklevel=2,
    )


@functools.lru_cache(maxsize=4096)  # batches of any length come by: not without a bound
def get_config(op: str, target: Target, m: int, default: Any) -> Any:
    """The config of an op for ``m`` tokens (or elements): the nearest bucket in the target's table, else ``default``.

    Args:
        op: name of the table's row, the kernel's stem.
        target: what the kernel runs on.
        m: tokens (rows of the input); buckets are compared by their logarithm.
        default: an ``ElementwiseConfig`` or ``GemmConfig`` that works everywhere; fields that a row lacks are its.
    """
    rows = config_table(target).get(op)
    if not rows:
        return default

    def distance(row: dict[str, Any]) -> tuple[float, int]:
        # Of two as near, the larger: its tiles have room for all rows, and make every mask once.
        return abs(math.log2(max(row["m"], 1)) - math.log2(max(m, 1))), -row["m"]

    nearest = min(rows, key=distance)
    fields = {field.name for field in dataclasses.fields(default)}
    return dataclasses.replace(default, **{name: value for name, value in nearest.items() if name in fields})
