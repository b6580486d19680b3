"""Runs the stages of the GPU suite: each in its share of the time, whatever became of the one before."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from compile_worker import start_workers
from csmask_kernels.launch import target_of
from gpu_checks import DeviceLostError, correctness, raise_if_lost
from gpu_elementwise_cases import CASES
from gpu_largest import largest
from gpu_llama import llama
from gpu_results import Context, Results
from gpu_stages import ceilings, elementwise, search
from gpu_summary import summary
from gpu_timing import Clock, Failure
from gpu_training import autotuned, memory, training
from gpu_transformers import transformers

from csmask import _ops, _plain

# Part of the time that no stage gets, for what they do beyond their deadlines: clocks are read between measurements.
RESERVE = 0.05


@dataclass(frozen=True)
class Stage:
    """``run(context)``, its share of the time (in any unit), whether it means anything without a GPU, and whether it
    runs only when it is asked for.
    """

    run: Callable[[Context], None]
    share: float
    needs_gpu: bool = True
    on_demand: bool = False


STAGES = {
    "ceilings": Stage(ceilings, 7, needs_gpu=False),
    "correctness": Stage(lambda context: correctness(context, CASES), 27),
    "elementwise": Stage(elementwise, 6),
    "training": Stage(training, 30),
    "memory": Stage(memory, 5),
    "search": Stage(search, 15),
    "transformers": Stage(transformers, 10),
    "llama": Stage(llama, 15),
    "autotuned": Stage(autotuned, 15, on_demand=True),
    "largest": Stage(largest, 15, on_demand=True),
}


def run(options: argparse.Namespace, began: float, restart: Callable[[list[str]], Any]) -> int:
    """Run the stages that the options ask for and print the summary; 1 if one of them failed, else 0."""
    wanted = options.stages.split(",") if options.stages else [n for n in STAGES if not STAGES[n].on_demand]
    if unknown := [name for name in wanted if name not in STAGES]:
        raise SystemExit(f"no stage {', '.join(unknown)}; there are: {', '.join(STAGES)}")
    device = torch.device("cuda" if torch.cuda.is_available() and not options.rehearse else "cpu")
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    results = Results(options.output, gpu, options.resume, seed=options.seed, rehearsal=options.rehearse)
    if device.type == "cpu" and not options.rehearse:
        print("no GPU: only the stages that need none are run; --rehearse runs all of them at toy sizes")
    workers = []
    if device.type == "cuda" and {"correctness", "search"} & set(wanted):
        workers = start_workers(target_of(torch.empty(0, device=device)))
    clock = Clock(device)
    with triton_on_cpu() if options.rehearse else contextlib.nullcontext():
        for i, name in enumerate(wanted):
            left = options.seconds * (1 - RESERVE) - (time.monotonic() - began)
            budget = left * STAGES[name].share / sum(STAGES[n].share for n in wanted[i:])
            if device.type == "cpu" and STAGES[name].needs_gpu and not options.rehearse:
                results.stages[name] = {"status": "skipped", "reason": "no GPU", "failures": [], "not_run": []}
                continue
            if name in ("correctness", "search"):
                _await(workers, budget / 3)
            if not _run_stage(_context(results, clock, name, budget, options), name):
                continue
            # Correctness goes on behind the op at fault; of any other stage nothing more is to be had.
            rest = wanted[i:] if name == "correctness" else wanted[i + 1 :]
            _await(workers, 0.0)
            if rest:
                print("the device is lost to this process: going on in a fresh one", flush=True)
                return restart([
                    str(options.output), "--resume", "--seed", str(options.seed + 1), "--stages", ",".join(rest),
                    "--seconds", str(max(options.seconds - (time.monotonic() - began), 1.0)),
                    *(["--checks", str(options.checks)] if options.checks else []),
                ])  # fmt: skip
    _await(workers, 0.0)
    results.save()
    print(summary(results))
    return int(any(stage["status"] == "failed" for stage in results.stages.values()))


def _await(workers: list[subprocess.Popen[bytes]], seconds: float) -> None:
    """Let the compiling processes end in so many seconds; those that do not go on, or are stopped if it is 0."""
    end = time.monotonic() + seconds
    for worker in workers:
        if seconds == 0.0:
            worker.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(max(end - time.monotonic(), 0.1))


def _context(results: Results, clock: Clock, name: str, budget: float, options: argparse.Namespace) -> Context:
    is_gpu = clock.device.type == "cuda"
    dtype = torch.bfloat16 if is_gpu else torch.float32
    context = Context(results, clock, clock.device, not is_gpu, dtype, options.seed)
    context.deadline = time.monotonic() + budget
    context.checks = options.checks
    if options.resume and name in results.stages:
        context.record = results.stages[name]
    results.stages[name] = context.record
    context.record.update(status="running", budget_s=round(budget, 1))
    return context


def _run_stage(context: Context, name: str) -> bool:
    """Run one stage and record how it went; True if the device is lost to this process."""
    print(f"{name} ({context.left():.0f} s) ...", flush=True)
    start, lost, record = time.monotonic(), False, context.record
    try:
        STAGES[name].run(context)
        raise_if_lost(context.device)
    except Exception as error:  # noqa: BLE001, recorded, and the next stage runs
        context.fail(name, Failure.of(error))
        lost = isinstance(error, DeviceLostError) or _is_lost(context.device)
    record["seconds"] = round(record.get("seconds", 0.0) + time.monotonic() - start, 1)
    record["status"] = _status(record)
    context.results.save()
    return lost


def _is_lost(device: torch.device) -> bool:
    try:
        raise_if_lost(device)
    except DeviceLostError:
        return True
    return False


def _status(record: dict[str, Any]) -> str:
    if record["failures"]:
        return "failed"
    if "reason" in record:
        return "skipped"
    return "incomplete" if record["not_run"] else "ok"


@contextlib.contextmanager
def triton_on_cpu() -> Iterator[None]:
    """The CPU's operators are the Triton kernels, so that what is above them is as on a GPU: in the interpreter, or as
    ``stub_gpu`` has them.
    """
    torch.set_num_threads(1)
    library = torch.library.Library("csmask", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about overriding, which is meant
            for name in _ops.SCHEMAS:
                has_kernel = _ops.SCHEMAS[name][1] is not None  # others are made of ops that have one
                compute = _ops._run_triton(name) if has_kernel else _ops._without_grad(_plain.OPS[name])
                library.impl(name, _ops._counting_writes(name, compute), "CPU", allow_override=True)
        yield
    finally:
        library._destroy()
