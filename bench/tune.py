"""Measure launch configs on this GPU and write the table that the kernels look them up in.

    PYTHONPATH=.:kernels python bench/tune.py [--ops masked_linear,masked_linear_dx] [--seconds 600] [--output FILE]

For every op and bucket of sizes, the candidates that the kernel's module names are compiled, in parallel, checked
against plain torch, and timed in turns; the fastest goes to ``configs/<device>.json``. The file is written after each
bucket: stopped early (Ctrl-C, or out of time) it holds what is done, beside what was there before.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compile_ahead import compile_ahead, launches_of, replaced
from csmask_kernels import launch, replay
from csmask_kernels.launch import (
    CONFIG_DIRECTORY,
    ElementwiseConfig,
    GemmConfig,
    StepConfig,
    Target,
    config_file_name,
    config_table,
    target_of,
)
from gpu_checks import full_precision, poisoned, raise_if_lost
from gpu_inputs import WEIGHTS, elementwise_calls, random_logits, step_calls
from gpu_results import version, write_atomically
from gpu_timing import Clock, Failure, Timing
from torch import Tensor

from csmask import _plain, _plain_step, reference, state_codes
from csmask._ops import SCHEMAS, triton_kernel

LINEAR = ("masked_linear", "masked_linear_dx", "masked_linear_dlogits")
CONV = ("masked_conv", "masked_conv_dx", "masked_conv_dlogits")
ELEMENTWISE = ("materialize", "logits_grad", "scale_neurons", "scale_neurons_grad", "pack_mask", "apply_bitmask")
STEPS, BITS = ("mask_step", "mask_step_8_bits"), "bitmask_linear"
OPS = (*LINEAR, *ELEMENTWISE, *STEPS, BITS, *CONV)
# Buckets of tokens, or of a convolution's output positions, those that matter most first.
TOKENS = (16, 1024, 128, 8192, 64, 256)
FEW_TOKENS = (16, 64)
POSITIONS = (16384, 1024)
# ||out - expected|| / ||expected||, against fp32: what rounding operands of 16 bits leaves far behind.
LARGEST_ERROR = 1e-2


@dataclass(frozen=True)
class Problem:
    """One op at one size.

    Args:
        op: as the table names it.
        m: its bucket.
        candidates: configs to try, beside the one in use now.
        call: launches the op and returns its results.
        expected: the same from plain torch.
    """

    op: str
    m: int
    candidates: list[Any]
    call: Callable[[], Any]
    expected: Callable[[], Any]


@dataclass(frozen=True)
class Best:
    """The fastest config of a problem, its time, and the time of the config that the table had before."""

    op: str
    m: int
    config: Any
    timing: Timing
    default: Timing | None


@dataclass
class Found:
    """What a search found: the best configs, and what became of the candidates."""

    bests: list[Best] = field(default_factory=list)
    tallies: dict[str, dict[str, int]] = field(default_factory=dict)
    not_run: list[str] = field(default_factory=list)
    failures: list[tuple[str, Failure]] = field(default_factory=list)


# Problems


def problems(
    ops: Sequence[str], device: torch.device, target: Target, toy: bool
) -> Iterator[tuple[str, Callable[[], Problem]]]:
    """A name and a maker for every problem of the ops, in the order in which they should be solved."""
    dtype = torch.float16 if toy else torch.bfloat16
    n, k = (32, 48) if toy else WEIGHTS[0]
    tokens, positions = ((16,), (16,)) if toy else (TOKENS, POSITIONS)

    def linear(m: int) -> Iterator[tuple[str, Callable[[], Problem]]]:
        for op in (op for op in LINEAR if op in ops):
            yield f"{op} M={m}", lambda op=op: _linear(op, m, n, k, dtype, device, target)

    yield from linear(tokens[0])
    for op in (op for op in ELEMENTWISE if op in ops):
        yield op, lambda op=op: _elementwise(op, n, k, dtype, device)
    for op in (op for op in STEPS if op in ops):
        yield op, lambda op=op: _step(op, n, k, dtype, device)
    for m in tokens[:1] if toy else FEW_TOKENS:
        if BITS in ops:
            yield f"{BITS} M={m}", lambda m=m: _linear(BITS, m, n, k, dtype, device, target)
    for m in tokens[1:]:
        yield from linear(m)
    for rows in positions:
        for op in (op for op in CONV if op in ops):
            yield f"{op} M={rows}", lambda op=op, rows=rows: _conv(op, rows, dtype, device, target, toy)


def _proposals(op: str, target: Target, *sizes: int) -> list[GemmConfig]:
    """What the kernel's module, or the one of its configs, says is worth measuring; none where neither says so."""
    stem = SCHEMAS[op][1]
    for name in (f"csmask_kernels.{stem}", f"csmask_kernels.{stem}_config"):
        if importlib.util.find_spec(name) is None:
            continue
        propose = getattr(importlib.import_module(name), "candidate_configs", None)
        if propose is not None:
            named = (op,) if "op" in inspect.signature(propose).parameters else ()
            return propose(*named, target, *sizes)
    return []


def _linear(op: str, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device, target: Target) -> Problem:
    x, dout = (torch.randn(m, size, device=device).to(dtype) for size in (k, n))
    weight, logits = (torch.randn(n, k, device=device) / k**0.5).to(dtype), random_logits(n, k, device=device)
    t, dl0 = torch.tensor(1.5, device=device), torch.tensor(1e-8, device=device)
    kernel, mask, bits = triton_kernel(op), (weight, logits, t), reference.pack_mask(logits)
    calls = {
        "masked_linear": lambda: kernel(x, *mask, None, False, 1.0, False),
        "masked_linear_dx": lambda: kernel(dout, *mask, False, 1.0, False),
        "masked_linear_dlogits": lambda: kernel(dout, x, *mask, dl0, 1.0, False),
        BITS: lambda: kernel(x, weight, bits, None, 1.0, False),
    }

    def expected() -> Any:
        if op == BITS:
            return x.float() @ reference.materialize(*mask, True, dtype=torch.float32)[0].t()
        if op == "masked_linear_dlogits":
            return reference.logits_grad(dout.float().t() @ x.float(), *mask, dl0)
        masked_weight, l0 = reference.materialize(*mask, dtype=torch.float32)
        return (x.float() @ masked_weight.t(), l0) if op == "masked_linear" else dout.float() @ masked_weight

    sizes = (m, k, n) if op == "masked_linear_dx" else (m, n, k)
    return Problem(op, m, _proposals(op, target, *sizes), calls[op], expected)


def _conv(op: str, rows: int, dtype: torch.dtype, device: torch.device, target: Target, toy: bool) -> Problem:
    channels, size = (16, 4) if toy else (256, 16)
    padding = ((1, 1), (1, 1), (1, 1))  # stride, padding, dilation
    image = torch.channels_last
    x, dout = (
        torch.randn(rows // size**2, channels, size, size, device=device).to(dtype, memory_format=image)
        for _ in range(2)
    )
    shape = (channels, channels, 3, 3)
    weight = (torch.randn(shape, device=device) / (9 * channels) ** 0.5).to(dtype, memory_format=image)
    logits = random_logits(*shape, device=device).contiguous(memory_format=image)
    t, dl0 = torch.tensor(1.5, device=device), torch.tensor(1e-8, device=device)
    kernel, mask = triton_kernel(op), (weight, logits, t)
    calls = {
        "masked_conv": lambda: kernel(x, *mask, None, False, 1.0, *padding),
        "masked_conv_dx": lambda: kernel(dout, *mask, list(x.shape), False, 1.0, *padding),
        "masked_conv_dlogits": lambda: kernel(dout, x, *mask, dl0, 1.0, *padding),
    }

    def expected() -> Any:
        masked_weight, l0 = reference.materialize(*mask, dtype=torch.float32)
        if op == "masked_conv":
            return F.conv2d(x.float(), masked_weight, None, *padding), l0
        if op == "masked_conv_dx":
            return torch.nn.grad.conv2d_input(x.shape, masked_weight, dout.float(), *padding)
        dweight = torch.nn.grad.conv2d_weight(x.float(), shape, dout.float(), *padding)
        return reference.logits_grad(dweight, *mask, dl0)

    return Problem(op, rows, _proposals(op, target, rows, channels, channels), calls[op], expected)


def _elementwise(op: str, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """Blocks of 1024 to 8192 elements with 4 or 8 warps."""
    make, _ = elementwise_calls(n, k, dtype, device)[op]
    call = make()
    blocks = [ElementwiseConfig(1 << e, warps) for e in range(10, 14) for warps in (4, 8)]
    assert isinstance(call, functools.partial)
    return Problem(op, n * k, blocks, call, functools.partial(_plain.OPS[op], *call.args))


def _step(op: str, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """AdamW's step, which speaks for SGD's: 4, 8 or 16 elements to a thread, in pieces that follow each other."""
    has_codes = op != STEPS[0]
    call = step_calls(n, k, dtype, device, rate=0.0)["mask_adamw_ 8 bits" if has_codes else "mask_adamw_"][0]()
    assert isinstance(call, functools.partial)
    masked = call.args[4]

    def expected() -> Any:
        # At a rate of 0 every run leaves the logits as they are: those of all candidates have the same results.
        arguments = [[t.clone() for t in tensors] for tensors in call.args[:5]]
        results = _plain_step.OPS["mask_adamw_"](*arguments, *call.args[5:])
        return (*results, *arguments[4])

    blocks = [
        StepConfig(32 * warps * entries, warps, pieces)
        for entries in (4, 8, 16) for warps in (1, 2, 4) for pieces in (1, 2, 4, 8)
        if not has_codes or 32 * warps * entries % state_codes.BLOCK == 0
    ]  # fmt: skip
    return Problem(op, n * k, blocks, lambda: (*call(), *masked), expected)


def _results(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


# The search


def config_in_use(op: str, call: Callable[[], Any]) -> Any:
    """The config that a call of the op finds now, before it is fitted to the call's sizes and dtypes."""
    original, found = launch.get_config, []

    def record(asked: str, *arguments: Any) -> Any:
        config = original(asked, *arguments)
        if asked == op:
            found.append(config)
        return config

    with replaced("get_config", record):
        launches_of(call)
    return found[0]


def using(op: str, config: Any) -> contextlib.AbstractContextManager[None]:
    """The kernels find this config for the op, as if the table had it; the other ops find their own."""
    original = launch.get_config
    return replaced("get_config", lambda asked, *arguments: config if asked == op else original(asked, *arguments))


def solve(problem: Problem, clock: Clock, seconds: float, found: Found) -> Best | None:
    """The fastest of the problem's candidates that compile and give the right numbers; None if none does.

    Candidates that do not are counted; the config in use is what users run, and is recorded as a failure as well.
    """

    def run(config: Any) -> Any:
        with using(problem.op, config):
            return problem.call()

    in_use = config_in_use(problem.op, problem.call)
    candidates = list(dict.fromkeys([in_use, *problem.candidates]))
    compile_ahead([lambda c=c: run(c) for c in candidates])
    with full_precision():
        expected = _results(problem.expected())
    what = f"{problem.op} M={problem.m}"
    tally = found.tallies.setdefault(what, {"wrong": 0, "failed": 0, "timed": 0})
    calls: dict[str, Callable[[], Any]] = {}
    configs = {str(config): config for config in candidates}
    for name, config in configs.items():
        try:
            with poisoned():
                out = _results(run(config))
            if _is_right(out, expected):
                # The results are dropped, so that no call of a graph keeps those of another alive.
                calls[name] = lambda c=config: (run(c), None)[1]
            else:
                tally["wrong"] += 1
                if config == in_use:
                    error = AssertionError(f"the config in use gives wrong numbers: {config}")
                    found.failures.append((what, Failure.of(error)))
        except Exception as error:  # noqa: BLE001, PERF203, out of shared memory, registers, or what the compiler can do
            tally["failed"] += 1
            if config == in_use:
                found.failures.append((f"{what}, the config in use", Failure.of(error)))
            raise_if_lost(clock.device)
    times = {k: t for k, t in clock.measure(calls, seconds).items() if isinstance(t, Timing)}
    tally["timed"] = len(times)
    if not times:
        return None
    name = min(times, key=lambda k: times[k].p50)
    return Best(problem.op, problem.m, configs[name], times[name], times.get(str(in_use)))


def _is_right(results: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether every result is near what it must be; integers, packed bits among them, must be equal."""
    return len(results) == len(expected) and all(map(_is_near, results, expected))


def _is_near(out: Tensor, expected: Tensor) -> bool:
    if not out.is_floating_point():
        return torch.equal(out, expected)
    error = (out.float() - expected.float()).norm()
    return out.shape == expected.shape and bool(error <= LARGEST_ERROR * expected.float().norm())  # NaN is not


def search(
    ops: Sequence[str],
    device: torch.device,
    left: Callable[[], float],
    outputs: Sequence[Path],
    clock: Clock | None = None,
    toy: bool = False,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = lambda items: items,
) -> Found:
    """Solve the ops' problems while there is time, and write the table after each.

    Args:
        ops: some of OPS.
        device: where to measure.
        left: seconds that are left.
        outputs: files that get the table.
        clock, toy: the device's clock, if there is one already; sizes for the interpreter.
        progress: wraps the list of problems, to show how far the search is.
    """
    clock, found = clock or Clock(device), Found()
    target = target_of(torch.empty(0, device=device))
    table = {op: list(rows) for op, rows in config_table(target).items()}
    names = list(problems(ops, device, target, toy))
    for name, make in progress(names):
        if left() <= 0:
            found.not_run.append(name)
            continue
        try:
            best = solve(make(), clock, 0.3 if toy else 1.5, found)
        except Exception as error:  # noqa: BLE001, one op must not stop the others
            found.failures.append((name, Failure.of(error)))
            raise_if_lost(device)
            continue
        if best is not None:
            found.bests.append(best)
            _enter(table, best)
            for path in outputs:
                write_table(path, table, target)
    launch.config_table.cache_clear()
    launch.get_config.cache_clear()
    replay.forget()
    return found


def _enter(table: dict[str, list[dict[str, Any]]], best: Best) -> None:
    rows = [row for row in table.get(best.op, []) if row["m"] != best.m]
    rows.append({"m": best.m, **dataclasses.asdict(best.config)})
    table[best.op] = sorted(rows, key=lambda row: row["m"])


def write_table(path: Path, table: dict[str, list[dict[str, Any]]], target: Target) -> None:
    """Write a table in the form that ``launch.config_table`` reads."""
    about = {"source": f"measured on {target.name}, {version()}", "family": target.family}
    content = {**about, "configs": table}
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", default=",".join(OPS), help="by commas (all)")
    parser.add_argument("--seconds", type=float, default=600, help="after which no further problem is begun (600)")
    parser.add_argument("--output", type=Path, help="the table (configs/<device>.json beside the kernels)")
    options = parser.parse_args(arguments)
    ops = options.ops.split(",")
    if unknown := [op for op in ops if op not in OPS]:
        parser.error(f"no op {', '.join(unknown)}; there are: {', '.join(OPS)}")
    toy = launch.is_interpreted()
    if not toy and not torch.cuda.is_available():
        parser.error("no GPU to measure on; TRITON_INTERPRET=1 rehearses on the CPU")
    if toy and options.output is None:
        parser.error("a rehearsal needs --output: its table must not be looked up")
    device = torch.device("cpu" if toy else "cuda")
    output = (
        options.output or CONFIG_DIRECTORY / f"{config_file_name(target_of(torch.empty(0, device=device)).name)}.json"
    )
    end = time.monotonic() + options.seconds
    try:
        found = search(ops, device, lambda: end - time.monotonic(), [output], toy=toy, progress=_progress())
    except KeyboardInterrupt:
        print(f"stopped; what is done is in {output}")
        return 130
    for best in found.bests:
        before = f" (before: {best.default.p50:.4f})" if best.default else ""
        print(f"{best.op} M={best.m}: {best.timing.p50:.4f} ms{before} {best.config}")
    for what, tally in found.tallies.items():
        if tally["wrong"] or tally["failed"]:
            print(f"{what}: candidates {', '.join(f'{count} {kind}' for kind, count in tally.items())}")
    for what, failure in found.failures:
        print(f"{what}: {failure.message}")
    if found.not_run:
        print(f"no time for: {', '.join(found.not_run)}")
    return int(bool(found.failures))


def _progress() -> Callable[[Iterable[Any]], Iterable[Any]]:
    try:
        from tqdm import tqdm
    except ImportError:
        return lambda items: items
    return lambda items: tqdm(items, unit="problem")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
