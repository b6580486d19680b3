"""Correctness of every kernel on this device: what the suite's second stage runs.

A check draws random inputs, runs the launcher twice with outputs and scratch poisoned, and compares with
``csmask.reference`` in fp64 by the rule of ``csmask.testing``; the two runs must agree bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from compile_ahead import compile_ahead
from csmask_kernels.launch import is_interpreted
from gpu_results import Context
from gpu_timing import Failure
from providers import full_precision as full_precision  # others ask here for what checks need
from torch import Tensor

from csmask import testing

# Elements of all inputs from which on a check has several programs with whole blocks and a tail.
SOME_SIZE = 20_000

Values = Mapping[str, Any]
Compute = Callable[..., dict[str, Tensor]]


class DeviceLostError(RuntimeError):
    """The process can do no more work on the device: a kernel read or wrote where it must not."""


@dataclass(frozen=True)
class Check:
    """One case of one op.

    Args:
        op, variant: their names.
        inputs: tensors and None, by name, as ``kernel`` and ``expected`` take them.
        kernel: the op's launcher; returns results by name.
        expected: the same from ``csmask.reference``, in the dtype of its inputs.
        exact: results that must equal the reference's in the tested dtype bit for bit.
    """

    op: str
    variant: str
    inputs: Values
    kernel: Compute
    expected: Compute
    exact: tuple[str, ...] = ()


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New tensors hold NaN, or a number that no result has: what a kernel leaves unwritten shows."""
    names = ("empty", "empty_like", "empty_strided")
    originals = {name: getattr(torch, name) for name in names}

    def poisoning(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*args: Any, **kwargs: Any) -> Tensor:
            tensor = create(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max // 3)

        return make

    try:
        for name, create in originals.items():
            setattr(torch, name, poisoning(create))
        yield
    finally:
        for name, create in originals.items():
            setattr(torch, name, create)


def in_fp64(inputs: Values) -> dict[str, Any]:
    """Floating-point inputs as fp64; bits and None as they are."""
    return {k: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for k, t in inputs.items()}


def run_check(check: Check) -> float:
    """The largest error of a result over its limit.

    Raises:
        AssertionError: a result that is over its limit, not exact, or not the same in both runs; it says which.
    """
    plain, oracle = check.expected(**check.inputs), check.expected(**in_fp64(check.inputs))
    with poisoned():
        got, again = check.kernel(**check.inputs), check.kernel(**check.inputs)
    for name in got:
        if not torch.equal(_bits(got[name]), _bits(again[name])):
            raise AssertionError(f"{name}: two runs on the same inputs differ")
    for name in check.exact:
        if got[name].dtype != plain[name].dtype or not torch.equal(got[name], plain[name]):
            raise AssertionError(f"{name}: not the reference's {plain[name].dtype} values bit for bit")

    def inexact(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: v for k, v in values.items() if k not in check.exact}

    testing.assert_close(inexact(got), inexact(oracle), inexact(plain))
    errors = testing.errors(inexact(got), inexact(oracle), inexact(plain)).values()
    return max((error / limit for error, limit in errors if limit), default=0.0)


def _bits(tensor: Tensor) -> Tensor:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integers[tensor.element_size()]) if tensor.is_floating_point() else tensor


def dtypes() -> tuple[torch.dtype, ...]:
    """What kernels compute in; the interpreter multiplies bf16 wrongly without a word."""
    return (torch.float32, torch.float16) if is_interpreted() else (torch.bfloat16, torch.float16, torch.float32)


def correctness(context: Context, cases: Mapping[str, Callable[..., Iterable[Check]]]) -> None:
    """Run the checks of every op, in every dtype, and record each; the ops that an earlier try reached are left out.

    Raises:
        DeviceLostError: nothing further can run in this process; the op at fault is recorded as reached.
    """
    checked: dict[str, Any] = context.record.setdefault("checked", {})
    for op, make in cases.items():
        if op in checked or context.is_over(op):
            continue
        tally = checked[op] = {"checks": 0, "failed": 0}
        checks: list[tuple[Check, str]] = []
        for dtype in dtypes():
            name = str(dtype).removeprefix("torch.")
            try:
                checks += [(check, name) for check in few(make(op, dtype, context), context.checks)]
            except Exception as error:  # noqa: BLE001, an op that is not there must not stop the others
                context.fail(f"{op} {name}", Failure.of(error))
                tally["failed"] += 1
        with full_precision():
            compile_ahead(lambda c=c: c.kernel(**c.inputs) for c, _ in checks)
            for check, name in checks:
                if context.is_over(f"{op} {name} {check.variant}"):
                    continue
                tally["checks"] += 1
                if not _record(context, check, name):
                    tally["failed"] += 1
                    raise_if_lost(context.device)


def few(checks: Iterable[Check], count: int | None) -> Iterable[Check]:
    """The smallest checks of some size, where only some are to run; fewer where there are not so many."""
    if count is None:
        return checks
    by_size = sorted(checks, key=_numel)
    begin = next((i for i, check in enumerate(by_size) if _numel(check) >= SOME_SIZE), max(len(by_size) - count, 0))
    return by_size[begin : begin + count]


def _numel(check: Check) -> int:
    return sum(t.numel() for t in check.inputs.values() if isinstance(t, Tensor))


def _record(context: Context, check: Check, dtype: str) -> bool:
    """Run a check and add its row: the worst error over its limit, infinite where it could not be told."""
    worst = float("inf")
    try:
        worst = run_check(check)
    except Exception as error:  # noqa: BLE001, recorded
        context.fail(f"{check.op} {dtype} {check.variant}", Failure.of(error))
    context.results.add(check.op, "csmask", dtype, "error / limit", "1", check.variant, worst)
    return worst <= 1


def raise_if_lost(device: torch.device) -> None:
    """Raise DeviceLostError where an error was one of those after which a process gets no more work done."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.ones(1, device=device).item()
    except Exception as error:
        raise DeviceLostError(str(error).splitlines()[0]) from error
