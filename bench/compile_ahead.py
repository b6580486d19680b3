"""Compile the kernels that calls would launch, in several threads, before the calls are made: a GPU's time is short."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from csmask_kernels import launch as launches
from csmask_kernels.launch import Launch

Call = Callable[[], Any]


@contextlib.contextmanager
def launching_with(run: Callable[..., None]) -> Iterator[None]:
    """Every op's launcher gives its launches to ``run(device, *launches)`` instead of starting them."""
    original = launches.run
    kernels = [m for name, m in sys.modules.items() if name.startswith("csmask_kernels.")]
    patched = [m for m in kernels if getattr(m, "run", None) is original]
    try:
        for module in patched:
            module.run = run  # type: ignore[attr-defined]
        yield
    finally:
        for module in patched:
            module.run = original  # type: ignore[attr-defined]


def launches_of(call: Call) -> list[Launch]:
    """The launches that a call of launchers would make; what it returns is garbage and dropped."""
    found: list[Launch] = []
    with launching_with(lambda _device, *planned: found.extend(planned)):
        call()
    return found


def compile_ahead(calls: Iterable[Call], workers: int | None = None) -> None:
    """Fill Triton's caches for the calls. What cannot be planned or compiled fails later, where it is called for."""
    planned: list[Launch] = []
    for call in calls:
        with contextlib.suppress(Exception):
            planned.extend(launches_of(call))
    mode = getattr(triton, "AsyncCompileMode", None)
    if mode is None or not torch.cuda.is_available() or launches.is_interpreted():
        return
    with (
        contextlib.suppress(Exception),
        ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as executor,
        mode(executor, ignore_errors=True),
    ):
        for launch in planned:
            with contextlib.suppress(Exception):
                launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.constants, **launch.options())
