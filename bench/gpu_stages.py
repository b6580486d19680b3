"""Stages of the GPU suite about single kernels: ceilings, the elementwise kernels, the search of launch configs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import tune
from csmask_kernels.launch import config_file_name, target_of
from gpu_inputs import WEIGHTS, elementwise_calls, named, shapes, step_calls
from gpu_results import Context
from gpu_timing import Failure
from torch import Tensor

# Ceilings


def ceilings(context: Context) -> None:
    """Copy bandwidth, and the rates of the three products of a layer, and of the weight gradient summed in fp32."""
    copy_bandwidth(context)
    for n, k, m in shapes(context.toy):
        x = named(n, k, m)
        if context.is_over(f"products {x}"):
            continue
        calls = _products(context, n, k, m)
        flops = 2.0 * n * k * m
        for name, timing in context.measure("matmul", "product", x, calls, 2.0).items():
            context.results.add("matmul", name, "product", "rate", "TFLOP/s", x, flops / timing.p50 / 1e9, timing)


def copy_bandwidth(context: Context) -> None:
    """Bytes read and written per second by a copy of 1 GiB: by a kernel, and by ``copy_``, which a graph may leave to
    a copy engine, that is slower (2.8 of 4.3 TB/s on an H200).
    """
    copy, size = _copy(context)
    calls = {"kernel": copy, "copy_": lambda: copy.keywords["out"].copy_(copy.args[0])}
    for name, timing in context.measure("copy", "copy", "1 GiB", calls, 1.0).items():
        context.results.add("copy", name, "copy", "bandwidth", "GB/s", "1 GiB", size / timing.p50 / 1e6, timing)


def _copy(context: Context) -> tuple[functools.partial[Any], int]:
    """A kernel that reads and writes 1 GiB and has next to nothing to compute, and the bytes that it moves."""
    source = torch.randn((1 << 15) if context.toy else (1 << 28), device=context.device)
    return functools.partial(torch.neg, source, out=torch.empty_like(source)), 2 * source.nbytes


def _products(context: Context, n: int, k: int, m: int) -> dict[str, Callable[[], Any]]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=context.device, dtype=context.dtype)

    x, dout, weight = normal(m, k), normal(m, n), normal(n, k) / k**0.5
    total = torch.zeros(n, k, device=context.device)
    return {
        "NT": lambda: x @ weight.t(),
        "NN": lambda: dout @ weight,
        "TN": lambda: dout.t() @ x,
        "TN into fp32": lambda: add_product(total, dout.t(), x),
    }


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``total += a b`` with a fp32 ``total``: the weight gradient over micro-batches. ATen has it on CUDA only."""
    if a.dtype == total.dtype:
        return torch.addmm(total, a, b, out=total)
    return torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)


# Elementwise kernels


def elementwise(context: Context) -> None:
    """Every elementwise kernel beside a copy, in turns: time, and bandwidth as percent of the copy's."""
    device, dtype = context.device, context.dtype
    n, k = (32, 64) if context.toy else WEIGHTS[1]
    copy, copied = _copy(context)
    kernels = {**elementwise_calls(n, k, dtype, device), **step_calls(n, k, dtype, device)}
    for kernel, (calls, size) in kernels.items():
        if context.is_over(kernel):
            continue
        call = _launchable(context, kernel, calls)
        if call is None:
            continue
        x = f"N={n} K={k}"
        turns = {"copy": copy, "csmask": call}
        times = context.measure(kernel, "elementwise", x, turns, 0.6)
        if len(times) == 2:
            rate, ceiling = size / times["csmask"].p50, copied / times["copy"].p50
            row = (kernel, "csmask", "elementwise")
            context.results.add(*row, "bandwidth", "GB/s", x, rate / 1e6, times["csmask"])
            context.results.add(*row, "of copy", "%", x, 100 * rate / ceiling, times["csmask"])


def _launchable(context: Context, kernel: str, make: Callable[[], Callable[[], Any]]) -> Callable[[], Any] | None:
    try:
        return make()
    except Exception as error:  # noqa: BLE001, an op that is not there must not stop the others
        context.fail(kernel, Failure.of(error))
        return None


# Launch configs


def search(context: Context) -> None:
    """A short search by ``tune``; its table goes to OUT_DIR, and on a GPU where the kernels look it up."""
    target = target_of(torch.empty(0, device=context.device))
    name = f"{config_file_name(target.name)}.json"
    outputs = [context.results.directory / name]
    if not context.toy:
        outputs.append(tune.CONFIG_DIRECTORY / name)
    found = tune.search(tune.OPS, context.device, context.left, outputs, context.clock, toy=context.toy)
    for best in found.bests:
        x = f"M={best.m}"
        context.results.add(
            best.op, "csmask", "search", "time", "ms", x, best.timing.p50, best.timing, str(best.config)
        )
        if best.default is not None:
            gain = best.default.p50 / best.timing.p50
            context.results.add(best.op, "csmask", "search", "over the config before", "x", x, gain)
    context.record["candidates"] = found.tallies
    context.record["not_run"].extend(found.not_run)
    for what, failure in found.failures:
        context.fail(what, failure)
