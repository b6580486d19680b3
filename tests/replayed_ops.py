"""A script of ``test_replay``: prints Triton's version, and the ops that start, unplanned, what planning starts."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
from compile_launch import TARGETS
from csmask_kernels import replay
from stub_gpu import StubDriver, stub_gpu

from csmask._ops import SCHEMAS, triton_kernel

TARGET = dataclasses.replace(TARGETS["sm_90"], name="NVIDIA H200")
M, N, K = 16, 48, 64


def inputs() -> dict[str, torch.Tensor]:
    bf16 = {"dtype": torch.bfloat16}
    columns = {
        "weight columns": torch.randn(K, N, **bf16).t(),
        "one": torch.randn(1, 1),
        "one weight": torch.ones(1, 1),
    }
    return {
        **columns,
        "x": torch.randn(M, K, **bf16), "dout": torch.randn(M, N, **bf16), "weight": torch.randn(N, K, **bf16),
        "dmasked_weight": torch.randn(N, K, **bf16), "mask_logits": torch.randn(N, K), "dlogits": torch.zeros(N, K),
        "temperature": torch.tensor(2.0), "bias": torch.randn(N, **bf16), "dl0": torch.tensor(0.5),
        "bits": torch.randint(-9, 9, (N * K // 32,), dtype=torch.int32), "z": torch.randn(M, N, **bf16),
        "neurons": torch.randn(N), "neuron rows": torch.randn(N, 1),
    }  # fmt: skip


MASK, HARD_SCALE = ("weight", "mask_logits", "temperature"), (False, 1.25)
CALLS: dict[str, tuple[Any, ...]] = {
    "materialize": (*MASK, *HARD_SCALE),
    "mask_sums": ("mask_logits", "temperature", *HARD_SCALE, 1, False),
    "logits_grad": ("dmasked_weight", *MASK, "dl0", 1.25),
    "logits_grad_": ("dlogits", "dmasked_weight", *MASK, "dl0", 1.25),
    "masked_linear": ("x", *MASK, "bias", *HARD_SCALE, False),
    "masked_linear_dx": ("dout", *MASK, *HARD_SCALE, False),
    "masked_linear_dlogits": ("dout", "x", *MASK, "dl0", 1.25, False),
    "masked_linear_dlogits_": ("dlogits", "dout", "x", *MASK, "dl0", 1.25, False),
    "bitmask_linear": ("x", "weight", "bits", "bias", 1.25, False),
    "bitmask_linear_dx": ("dout", "weight", "bits", 1.25, False),
    "scale_neurons": ("z", "neurons", "temperature", "bias", *HARD_SCALE, 1),
    "scale_neurons_grad": ("dout", "z", "neurons", "temperature", "dl0", *HARD_SCALE, 1, K),
    "materialize hard": (*MASK, True, 1.0),
    "materialize columns": ("weight columns", *MASK[1:], *HARD_SCALE),
    "materialize one": ("one weight", "one", "temperature", *HARD_SCALE),
    "logits_grad without dl0": ("dmasked_weight", *MASK, None, 1.0),
    "logits_grad neurons": ("dmasked_weight", "weight", "neuron rows", "temperature", "dl0", 1.25),
    "masked_linear transposed": ("dout", *MASK, None, *HARD_SCALE, True),
    "scale_neurons_grad hard": ("dout", "z", "neurons", "temperature", None, True, 1.0, 1, K),
}
assert {name.split()[0] for name in CALLS} < set(SCHEMAS)


def started(driver: StubDriver, op: str, tensors: dict[str, torch.Tensor]) -> list[Any]:
    """What a call starts: grids and arguments, a tensor by its name or, where the op made it, by its layout."""
    named = {t.data_ptr(): name for name, t in tensors.items()}
    driver.started.clear()
    result = triton_kernel(op.split()[0])(*[tensors.get(a, a) if isinstance(a, str) else a for a in CALLS[op]])
    results = [r for r in (result if isinstance(result, tuple) else (result,)) if r is not None and r.numel() > 1]
    named |= {t.data_ptr(): f"result {i}" for i, t in enumerate(results)}

    def described(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return type(value), value
        return named.get(value.data_ptr(), "scratch"), value.shape, value.stride(), value.dtype

    return [(compiled, grid, [described(v) for v in arguments]) for compiled, grid, arguments in driver.started]


def main() -> None:
    print(triton.__version__, end=";")
    with stub_gpu(TARGET, keep=True) as driver:
        for op in sorted(CALLS):
            replay.forget()
            first = started(driver, op, inputs())
            assert first, op
            assert replay._recipes, f"{op} left no plan"
            kept = dict(replay._recipes)
            other = inputs()
            replayed = started(driver, op, other)
            assert dict(replay._recipes) == kept, f"{op} was planned anew"
            replay.forget()
            assert replayed == started(driver, op, other) == first, f"{op}: {replayed} is not {first}"
            print(op, end=";")


if __name__ == "__main__":
    main()
