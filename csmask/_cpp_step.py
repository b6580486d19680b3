"""The operators of stem ``mask_step`` on a CPU: the C++ kernel layer by layer; plain torch where there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _cpp, _plain_step
from ._plain_step import Optionals, Tensors


def _have_kernel(mask_logits: Tensors, weights: Tensors, dmasked_weights: Optionals, others: Tensors = ()) -> bool:
    dtypes = {t.dtype for t in (*weights, *dmasked_weights, *others) if t is not None}
    return all(_cpp.has_kernel(logits, *dtypes) for logits in mask_logits)


def mask_grad_norms(
    mask_logits: Tensors, dmasked_weights: Optionals, weights: Tensors, grads: Optionals, temperatures: Tensors,
    dl0s: Optionals, scales: Sequence[float],
) -> Tensor:  # fmt: skip
    waiting = (mask_logits, dmasked_weights, weights, grads, temperatures, dl0s, scales)
    if not _have_kernel(mask_logits, weights, dmasked_weights):
        return _plain_step.mask_grad_norms(*waiting)
    assert _cpp.kernels is not None
    threads = torch.get_num_threads()
    return torch.tensor([
        _cpp.kernels.mask_grad_norm(logits, dwm, weight, grad, t.item(), _cpp.as_number(dl0), scale, threads)
        for logits, dwm, weight, grad, t, dl0, scale in zip(*waiting, strict=True)
    ], dtype=torch.float32)  # fmt: skip


def mask_adamw_(
    mask_logits: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, state_scales: Tensors, masked_weights: Tensors,
    dmasked_weights: Optionals, weights: Tensors, grads: Optionals, temperatures: Tensors, dl0s: Optionals,
    scales: Sequence[float], steps: Tensors, factor: Tensor | None, lr: Tensor, beta1: float, beta2: float, eps: float,
    weight_decay: float, maximize: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    waiting = (masked_weights, dmasked_weights, weights, grads, temperatures, dl0s, scales, steps)
    if not _have_kernel(mask_logits, weights, dmasked_weights, masked_weights):
        plain: tuple[Any, ...] = (*waiting, factor, lr, beta1, beta2, eps, weight_decay, maximize)
        return _plain_step.mask_adamw_(mask_logits, exp_avgs, exp_avg_sqs, state_scales, *plain)
    assert _cpp.kernels is not None
    codes = list(state_scales) if state_scales else [None] * len(mask_logits)
    states: list[tuple[Any, ...]] = list(zip(exp_avgs, exp_avg_sqs, codes, strict=True))
    settings = (lr.item(), beta1, beta2, eps, weight_decay)
    return _step_each(_cpp.kernels.mask_adamw, mask_logits, states, waiting, factor, maximize, settings)


def mask_sgd_(
    mask_logits: Tensors, momentums: Tensors, masked_weights: Tensors, dmasked_weights: Optionals, weights: Tensors,
    grads: Optionals, temperatures: Tensors, dl0s: Optionals, scales: Sequence[float], steps: Tensors,
    factor: Tensor | None, lr: Tensor, momentum: float, dampening: float, weight_decay: float, nesterov: bool,
    maximize: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    waiting = (masked_weights, dmasked_weights, weights, grads, temperatures, dl0s, scales, steps)
    settings = (momentum, dampening, weight_decay, nesterov)
    if not _have_kernel(mask_logits, weights, dmasked_weights, masked_weights):
        plain: tuple[Any, ...] = (*waiting, factor, lr, *settings, maximize)
        return _plain_step.mask_sgd_(mask_logits, momentums, *plain)
    assert _cpp.kernels is not None
    states: list[tuple[Any, ...]] = [(buffer,) for buffer in momentums] if momentum else [(None,)] * len(mask_logits)
    return _step_each(_cpp.kernels.mask_sgd, mask_logits, states, waiting, factor, maximize, (lr.item(), *settings))


def _step_each(
    kernel: Callable[..., Any], mask_logits: Tensors, states: Sequence[tuple[Any, ...]], waiting: tuple[Any, ...],
    factor: Tensor | None, maximize: bool, settings: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    times = (1.0 if factor is None else factor.item()) * (-1.0 if maximize else 1.0)
    threads = torch.get_num_threads()
    sums = [
        kernel(logits, *state, wm, dwm, w, grad, t.item(), _cpp.as_number(dl0), scale, times, step.item(), *settings,
               threads)
        for logits, state, wm, dwm, w, grad, t, dl0, scale, step in zip(mask_logits, states, *waiting, strict=True)
    ]  # fmt: skip
    l0s = torch.tensor([l0 for l0, _, _ in sums], dtype=torch.float32)
    return l0s, torch.tensor([[kept, undecided] for _, kept, undecided in sums], dtype=torch.int64)


OPS: dict[str, Callable[..., Any]] = {
    "mask_grad_norms": mask_grad_norms,
    "mask_adamw_": mask_adamw_,
    "mask_sgd_": mask_sgd_,
}
