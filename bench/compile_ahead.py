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
from csmask_kernels import replay
from csmask_kernels.launch import Launch

Call = Callable[[], Any]


@contextlib.contextmanager
def replaced(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """A function of ``csmask_kernels.launch`` replaced in every module of kernels that has imported it by its name."""
    original = getattr(launches, name)

    def put(old: Any, new: Any) -> None:
        replay.forget()
        for module in [m for n, m in sys.modules.items() if n.startswith("csmask_kernels.")]:
            if getattr(module, name, None) is old:
                setattr(module, name, new)

    put(original, function)
    try:
        yield
    finally:
        put(function, original)  # modules that were imported in the meantime have it too


def launches_of(call: Call) -> list[Launch]:
    """The launches that a call of launchers would make; what it returns is garbage and dropped."""
    with launches.collecting() as found:
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
