"""Fills Triton's cache with what the GPU suite will launch: compiling takes a CPU longer than the checks take a GPU.

Several of these processes run beside the suite's first stage. Each plans every check and every problem of ``tune`` on
the meta device and compiles its share of the kernels for the suite's device, without touching that device itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from csmask_kernels.launch import Launch, Target

META = torch.device("meta")


def start_workers(target: Target, count: int | None = None) -> list[subprocess.Popen[bytes]]:
    """Start the processes, one for each core but two; they end by themselves."""
    count = count or max((os.cpu_count() or 1) - 2, 1)
    # They need no GPU, and must not take memory of it.
    env: dict[str, str] = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    about = json.dumps(dataclasses.asdict(target))
    command = [sys.executable, "-W", "ignore", __file__, about]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return [subprocess.Popen([*command, str(i), str(count)], env=env, **quiet) for i in range(count)]  # type: ignore[call-overload]


def planned(target: Target) -> Iterator[Launch]:
    """The launches of every check and of every candidate of ``tune``, planned for the target on the meta device."""
    import gpu_checks
    import tune
    from compile_ahead import launches_of
    from gpu_elementwise_cases import CASES
    from gpu_results import Context, Results
    from gpu_timing import Clock

    for module in [m for name, m in sys.modules.items() if hasattr(m, "target_of")]:
        module.target_of = lambda _tensor: target  # type: ignore[attr-defined]
    context = Context(Results(Path(os.devnull), target.name), Clock(META), META, False, torch.bfloat16, 0)
    for op, cases in CASES.items():
        for dtype in gpu_checks.dtypes():
            with contextlib.suppress(Exception):
                for check in cases(op, dtype, context):
                    # As the checks run: how fp32 operands are multiplied is part of a kernel.
                    with contextlib.suppress(Exception), gpu_checks.full_precision():
                        yield from launches_of(lambda c=check: c.kernel(**c.inputs))
    for _, make in tune.problems(tune.OPS, META, target, toy=False):
        with contextlib.suppress(Exception):
            problem = make()
            for config in problem.candidates:
                with contextlib.suppress(Exception), tune.using(problem.op, config):
                    yield from launches_of(problem.call)


def share_of(launches: Iterator[Launch], part: int, parts: int, signature: Callable[[Launch], Any]) -> Iterator[Launch]:
    """The launches whose kernels are this part's: each kernel is in one part only, and comes once."""
    seen = set()
    for launch in launches:
        key = zlib.crc32(repr((launch.kernel.__name__, signature(launch), launch.options())).encode())
        if key % parts == part and key not in seen:
            seen.add(key)
            yield launch


def main(about: str, part: str, parts: str) -> None:
    from compile_launch import OfflineDriver, signature

    target = Target(**json.loads(about))
    triton.runtime.driver.set_active(OfflineDriver(target))
    torch.set_num_threads(1)
    # Imported before they are planned: their look-up of the target is replaced.
    import gpu_stages  # noqa: F401

    for launch in share_of(planned(target), int(part), int(parts), signature):
        with contextlib.suppress(Exception):
            arguments = {**launch.arguments, **launch.constants, **launch.options()}
            build_launcher(target, launch.kernel.warmup(grid=launch.grid, **arguments))


def build_launcher(target: Target, kernel: Any) -> None:
    """Build what launches a compiled kernel: in some releases of Triton a C module for each signature."""
    vendor, launcher = {"cuda": ("nvidia", "CudaLauncher"), "hip": ("amd", "HIPLauncher")}[target.backend]
    driver = importlib.import_module(f"triton.backends.{vendor}.driver")
    getattr(driver, launcher)(kernel.src, kernel.metadata)


if __name__ == "__main__":
    main(*sys.argv[1:])
