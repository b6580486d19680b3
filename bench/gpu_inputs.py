"""What the GPU suite and ``tune`` measure on: sizes, random data, and the calls of the elementwise kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from csmask import reference, state_codes
from csmask._ops import triton_kernel

# (N, K) of the weight and M tokens; bench/results and the targets speak of these.
WEIGHTS = ((4096, 4096), (14336, 4096))
TOKENS = (16, 128, 1024, 8192, 32768)


def shapes(toy: bool) -> list[tuple[int, int, int]]:
    """``(N, K, M)``: sizes that matter most first, for where the time runs out."""
    if toy:
        return [(32, 48, 16)]
    order = sorted(TOKENS, key=lambda m: (16, 1024, 8192, 128, 32768).index(m))
    return [(n, k, m) for n, k in WEIGHTS for m in order]


def named(n: int, k: int, m: int) -> str:
    return f"M={m} N={n} K={k}"


def random_logits(*shape: int, device: torch.device) -> Tensor:
    """Logits as training leaves them: most near +-5, with a spread of 1."""
    logits = torch.randn(shape, device=device)
    return logits.add_(torch.randn(shape, device=device).sign_().mul_(5.0))


def step_calls(n: int, k: int, dtype: torch.dtype, device: torch.device, rate: float = 1e-3) -> Any:
    """As ``elementwise_calls``, of the optimizers' kernels on two layers of ``(n // 2, k)``, at a learning rate."""
    layers = range(2)

    def tensors(like: torch.dtype) -> list[Tensor]:
        return [torch.randn(n // 2, k, device=device).to(like) for _ in layers]

    logits, states = [random_logits(n // 2, k, device=device) for _ in layers], [tensors(torch.float32) for _ in "ab"]
    masked, dmasked, weights = (tensors(dtype) for _ in range(3))
    t, dl0, step, lr = (torch.tensor(x, device=device) for x in (1.5, 1e-8, 3.0, rate))
    states[1] = [second.square() for second in states[1]]
    waiting = (dmasked, weights, [None, None], [t, t], [dl0, dl0], [1.0, 1.0])
    step_of = (masked, *waiting, [step, step], None, lr)
    size, w = (n // 2) * 2 * k, weights[0].element_size()

    def launcher(op: str, *arguments: Any) -> Callable[[], Callable[[], Any]]:
        return lambda: functools.partial(triton_kernel(op), *arguments)

    adamw, sgd = (0.9, 0.999, 1e-8, 0.0, False), (0.9, 0.0, 0.0, False, False)
    unit = state_codes.average_unit(adamw[:2], step)
    codes = [state_codes.encode(*pair, unit, step).codes for pair in zip(*states, strict=True)]
    columns = [list(column) for column in zip(*codes, strict=True)]
    return {
        "mask_adamw_": (launcher("mask_adamw_", logits, *states, [], *step_of, *adamw), size * (3 * w + 24)),
        "mask_adamw_ 8 bits": (
            launcher("mask_adamw_", [s.clone() for s in logits], *columns, *step_of, *adamw),
            size * (3 * w + 12 + 8 / state_codes.BLOCK),
        ),
        "mask_sgd_": (launcher("mask_sgd_", logits, states[0], *step_of, *sgd), size * (3 * w + 16)),
        "mask_grad_norms": (launcher("mask_grad_norms", logits, *waiting), size * (2 * w + 4)),
    }


def elementwise_calls(
    n: int,
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    find: Callable[[str], Callable[..., Any]] = triton_kernel,
) -> dict[str, tuple[Callable[[], Callable[[], Any]], float]]:
    """By name: what makes the call of a kernel on a weight ``(n, k)``, and the bytes that it has to move.

    ``find`` gives an op's function by its name: the launcher of its Triton kernel by default.
    """
    weight, dweight = (torch.randn(n, k, device=device).to(dtype) for _ in range(2))
    logits, total = random_logits(n, k, device=device), torch.randn(n, k, device=device)
    t, dl0 = torch.tensor(1.5, device=device), torch.tensor(1e-8, device=device)
    bits, unit, bias = (
        reference.pack_mask(logits),
        random_logits(k, device=device),
        torch.randn(k, device=device).to(dtype),
    )
    size, w = n * k, weight.element_size()
    mask, soft, grads = (weight, logits, t), (False, 1.0), (dweight, weight, logits, t, dl0, 1.0)

    def launcher(op: str, *arguments: Any) -> Callable[[], Callable[[], Any]]:
        def make() -> Callable[[], Any]:
            return functools.partial(find(op), *arguments)

        return make

    return {
        "materialize": (launcher("materialize", *mask, *soft), size * (2 * w + 4)),
        "materialize hard": (launcher("materialize", *mask, True, 1.0), size * (2 * w + 4)),
        "materialize with counts": (launcher("materialize", *mask, *soft, None, True), size * (2 * w + 4)),
        "mask_sums": (launcher("mask_sums", logits, t, *soft, 1), size * 4),
        "logits_grad": (launcher("logits_grad", *grads), size * (2 * w + 8)),
        "logits_grad_": (launcher("logits_grad_", total, *grads), size * (2 * w + 12)),
        "scale_neurons": (launcher("scale_neurons", weight, unit, t, bias, *soft, 1), size * 2 * w),
        "scale_neurons_grad": (
            launcher("scale_neurons_grad", dweight, weight, unit, t, dl0, *soft, 1, n), size * 3 * w,
        ),
        "pack_mask": (launcher("pack_mask", logits), size * (4 + 1 / 8)),
        "unpack_mask": (launcher("unpack_mask", bits, (n, k)), size * (1 + 1 / 8)),
        "popcount": (launcher("popcount", bits), size / 8),
        "apply_bitmask": (launcher("apply_bitmask", weight, bits, 1.0), size * (2 * w + 1 / 8)),
        "philox_ uniform": (launcher("philox_", total, "uniform", 1, 2, 3, 4, 1.0), size * 4),
        "philox_ normal": (launcher("philox_", total, "normal", 1, 2, 3, 4, 1.0), size * 4),
    }  # fmt: skip
