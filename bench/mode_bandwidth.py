"""Mode ``bandwidth`` of ``run``: elementwise kernels as percent of a copy's bandwidth, and the rate of products.

The copy (read and written bytes counted, buffers far larger than any cache) takes turns with each kernel. It writes to
memory that is there, while an op's result is new: on a CPU the system then clears every page of a large one, which can
take several times as long as the kernel. ``of copy`` is therefore measured in a process of its own that keeps the
memory it frees (two settings of glibc's malloc), ``of copy, new memory`` in one that does not, as users have it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import DTYPES
from gpu_inputs import elementwise_calls
from gpu_results import Context
from gpu_timing import Clock, Failure, Timing
from providers import LARGEST_ERROR
from roofline import gigabytes_per_second, percent_of_copy
from torch import Tensor

from csmask import _plain
from csmask._ops import ops

SIZE, QUICK_SIZE = 4096, 64
COPY_BYTES, QUICK_COPY_BYTES = 512 << 20, 1 << 16
PRODUCT, QUICK_PRODUCT = 2048, 64
CANCELLED = 1e-2
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


@dataclasses.dataclass
class Job:
    """One measurement: all kernels of a dtype, or a process's share of it."""

    device: str
    dtype: str
    quick: bool
    rounds: int
    seconds: float
    threads: int


@dataclasses.dataclass
class Measured:
    """Times of a kernel and of the copy that took turns with it, and the bytes of both; or what went wrong."""

    kernel: str
    size: float = 0.0
    copied: float = 0.0
    time: Timing | None = None
    copy: Timing | None = None
    failure: Failure | None = None


def tasks(context: Context, options: argparse.Namespace) -> list[tuple[str, Callable[[], None]]]:
    chosen = options.dtypes.split(",") if options.dtypes else list(DTYPES)
    rounds, seconds = (2, 0.0) if options.quick else (options.rounds, options.seconds / 6)
    found = []
    for dtype in chosen:
        job = Job(options.device, dtype, options.quick, rounds, seconds, torch.get_num_threads())
        found += [(f"bandwidth {dtype}", lambda j=job: bandwidth(context, j))]
        found += [(f"products {dtype}", lambda j=job: products(context, j))]
    return found


def bandwidth(context: Context, job: Job) -> None:
    """Measure and add rows; a kernel that is wrong is recorded as a failure and not timed."""
    size = QUICK_SIZE if job.quick else SIZE
    x = f"{job.dtype} {size} x {size}"
    if context.device.type == "cpu":
        _add(context, x, in_process_of_its_own(job), "of copy")
        _add(context, x, measure(job), "of copy, new memory")
    else:
        _add(context, x, measure(job), "of copy")


def _add(context: Context, x: str, found: list[Measured], metric: str) -> None:
    add, copies = context.results.add, []
    for one in found:
        if one.failure is not None or one.time is None or one.copy is None:
            context.fail(f"{one.kernel} {x}", one.failure or Failure("not timed", ""))
            continue
        row = (one.kernel, "csmask", "bandwidth")
        config = "" if metric == "of copy" else "new memory"
        add(*row, "rate", "GB/s", x, gigabytes_per_second(one.size, one.time.p50), one.time, config)
        percent = percent_of_copy(one.size, one.time.p50, one.copied, one.copy.p50)
        add(*row, metric, "%", x, percent, one.time, config)
        copies.append(one.copy)
    if copies and metric == "of copy":
        middle = sorted(copies, key=lambda timing: timing.p50)[len(copies) // 2]
        add("copy", "torch", "bandwidth", "rate", "GB/s", x, gigabytes_per_second(found[0].copied, middle.p50), middle)


def products(context: Context, job: Job) -> None:
    """The rate of a product of square matrices: the ceiling of arithmetic."""
    if job.device == "cpu" and job.dtype == "fp16":
        return  # nothing here multiplies in it
    size = QUICK_PRODUCT if job.quick else PRODUCT
    a, b = (torch.randn(size, size, device=context.device).to(DTYPES[job.dtype]) for _ in range(2))
    found = context.clock.measure({"torch": lambda: a @ b.t()}, job.seconds, graph=False)["torch"]
    x = f"{job.dtype} {size} x {size} x {size}"
    if isinstance(found, Failure):
        context.fail(f"product {x}", found)
        return
    context.results.add("product", "torch", "bandwidth", "rate", "GFLOP/s", x, 2 * size**3 / found.p50 / 1e6, found)


# Measuring


def measure(job: Job) -> list[Measured]:
    """Every elementwise kernel, checked against plain torch and then timed in turns with a copy."""
    device, dtype, n = torch.device(job.device), DTYPES[job.dtype], QUICK_SIZE if job.quick else SIZE
    source = torch.randn((QUICK_COPY_BYTES if job.quick else COPY_BYTES) // dtype.itemsize, device=device).to(dtype)
    target = torch.empty_like(source)
    clock = Clock(device, job.rounds)
    found = []
    for kernel, (call, size) in _calls(n, dtype, device, lambda op: getattr(ops, op)).items():
        one = Measured(kernel, size, 2 * source.nbytes)
        found.append(one)
        try:
            check(kernel, n, dtype, device)
            turns = {"copy": lambda: target.copy_(source), "csmask": call()}
            with torch.no_grad():
                times = clock.measure(turns, job.seconds, graph=False)
        except Exception as error:  # noqa: BLE001, recorded
            one.failure = Failure.of(error)
            continue
        for name, timing in times.items():
            if isinstance(timing, Failure):
                one.failure = timing
            elif name == "copy":
                one.copy = timing
            else:
                one.time = timing
    return found


def _calls(n: int, dtype: torch.dtype, device: torch.device, find: Callable[[str], Callable[..., Any]]) -> Any:
    """The calls on the same random tensors each time."""
    torch.manual_seed(0)
    return elementwise_calls(n, n, dtype, device, find)


def check(kernel: str, n: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise unless the op gives, up to rounding, what it gives in plain torch on the same tensors."""
    results = []
    for find in (lambda op: getattr(ops, op), _plain.OPS.__getitem__):
        call = _calls(n, dtype, device, find)[kernel][0]()
        with torch.no_grad():
            out = call()
        results.append((call.args[0],) if out is None else out if isinstance(out, (tuple, list)) else (out,))
    for i, (got, right) in enumerate(zip(*results, strict=True)):
        _compare(f"result {i}", got, right, LARGEST_ERROR[dtype.itemsize])


def _compare(name: str, got: Tensor, right: Tensor, limit: float) -> None:
    if not right.is_floating_point():
        if not torch.equal(got, right):
            raise AssertionError(f"wrong numbers, not timed: {name} is not plain torch's")
        return
    right = right.double()
    rms = float(right.square().mean().sqrt()) or 1.0
    # Each number by itself: a norm does not see a few lost ones among many. The floor is for sums that cancel.
    error = float(((got.double() - right).abs() / (right.abs() + CANCELLED * rms)).max())
    if not error <= limit:  # NaN neither
        raise AssertionError(f"wrong numbers, not timed: {name} at one place {error:.2g} > {limit}")


# A process that keeps the memory that it frees


def in_process_of_its_own(job: Job) -> list[Measured]:
    text = json.dumps(dataclasses.asdict(job))
    done = subprocess.run(
        [sys.executable, __file__, text], capture_output=True, text=True, check=False, env={**os.environ, **KEEP_MEMORY}
    )
    if done.returncode:
        raise RuntimeError(f"{Path(__file__).name} ended with {done.returncode}: {done.stderr[-500:]}")
    return [_from_dict(found) for found in json.loads(done.stdout.splitlines()[-1])]


def _from_dict(found: dict[str, Any]) -> Measured:
    parts = {"time": Timing, "copy": Timing, "failure": Failure}
    return Measured(**{k: parts[k](**v) if k in parts and v else v for k, v in found.items()})


def main(text: str) -> None:
    job = Job(**json.loads(text))
    torch.set_num_threads(job.threads)
    print(json.dumps([dataclasses.asdict(found) for found in measure(job)]))


if __name__ == "__main__":
    main(sys.argv[1])
