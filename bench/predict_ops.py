"""Every op at the sizes that the GPU suite measures, planned on the meta device: what ``predict`` predicts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from compile_ahead import launches_of, replaced
from csmask_kernels.launch import Launch, Target
from gpu_inputs import WEIGHTS, elementwise_calls, named, step_calls
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from csmask._ops import triton_kernel

META = torch.device("meta")
TOKENS = (16, 128, 1024, 8192)
BOTH = "in_kernel, forward + backward"
ELEMENTWISE, PRODUCT, PRODUCTS = "elementwise", "product", "forward + backward"
# In a graph, ``mask_step_table._upload`` writes a group's table by two launches, which it does not on the meta device.
TABLE_LAUNCHES = 2
# Which rows of the suite time just this op: kernel, provider and mode. Of elementwise ops, those of their own names.
MEASURED = {
    "masked_linear hard": ("masked_linear", "in_kernel", "evaluation"),
    "bitmask_linear": ("masked_linear", "bits", "evaluation"),
    BOTH: ("masked_linear", "in_kernel", "forward+backward"),
}


@dataclass(frozen=True)
class Op:
    """An op at one size: its launches, and how many torch adds. ``measured`` is kernel, provider and mode of a row."""

    name: str
    x: str
    kind: str
    launches: tuple[Launch, ...]
    others: int
    measured: tuple[str, str, str] | None


class _CountLaunches(TorchDispatchMode):
    """Counts the calls of torch that start a kernel: those that neither allocate nor view."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        self.found += not is_view and "empty" not in func._schema.name
        return func(*args, **(kwargs or {}))


def ops(target: Target) -> Iterator[tuple[str, str, Callable[[], Op]]]:
    """Name and size of each op, and what plans it for the target: elementwise ops first, products by their tokens."""
    for n, k in WEIGHTS:
        x = f"N={n} K={k}"
        of_one = elementwise_calls(n, k, torch.bfloat16, META)
        of_layers = step_calls(n, k, torch.bfloat16, META)
        for name, (make, _) in {**of_one, **of_layers}.items():
            others = TABLE_LAUNCHES if name in of_layers else 0
            measured = (name, "csmask", "elementwise")
            yield name, x, functools.partial(_plan, name, x, ELEMENTWISE, make, target, measured, others)
    for n, k in WEIGHTS:
        for m in TOKENS:
            for name, call in product_calls(n, k, m).items():
                kind, x = (PRODUCTS if name == BOTH else PRODUCT), named(n, k, m)
                make = functools.partial(functools.partial, call)
                yield name, x, functools.partial(_plan, name, x, kind, make, target, MEASURED.get(name))


def _plan(
    name: str,
    x: str,
    kind: str,
    make: Callable[[], Callable[[], Any]],
    target: Target,
    measured: tuple[str, str, str] | None,
    others: int = 0,
) -> Op:
    with replaced("target_of", lambda _tensor: target):
        call = make()
        with _CountLaunches() as counted:
            launches = launches_of(call)
    return Op(name, x, kind, tuple(launches), counted.found + others, measured)


def product_calls(n: int, k: int, m: int) -> dict[str, Callable[[], Any]]:
    """By name, calls of the products of one layer with m tokens: bf16, fp32 logits."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    x, dout, weight, logits = empty(m, k), empty(m, n), empty(n, k), empty(n, k, dtype=torch.float32)
    temperature, dl0 = (empty(dtype=torch.float32) for _ in range(2))
    bits = empty(n * k // 32, dtype=torch.int32)
    mask, rest = (weight, logits, temperature), (1.0, False)

    def call(op: str, *arguments: Any) -> Callable[[], Any]:
        return lambda: triton_kernel(op)(*arguments)

    found = {
        "masked_linear": call("masked_linear", x, *mask, None, False, *rest),
        "masked_linear hard": call("masked_linear", x, *mask, None, True, *rest),
        "masked_linear_dx": call("masked_linear_dx", dout, *mask, False, *rest),
        "masked_linear_dlogits": call("masked_linear_dlogits", dout, x, *mask, dl0, *rest),
        "masked_linear_dlogits_": call("masked_linear_dlogits_", logits, dout, x, *mask, dl0, *rest),
        "bitmask_linear": call("bitmask_linear", x, weight, bits, None, *rest),
        "bitmask_linear_dx": call("bitmask_linear_dx", dout, weight, bits, *rest),
    }
    of_training = [found[name] for name in ("masked_linear", "masked_linear_dx", "masked_linear_dlogits")]
    return {**found, BOTH: lambda: [one() for one in of_training]}
