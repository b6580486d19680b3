"""The optimizers' steps on mask logits in plain torch, several layers at a time: the operators of stem ``mask_step``.

One step of a layer is: the gradient of its logits from that of its masked weight and of l0; the optimizer's update; the
masked weight of the new logits, in the memory of the old one; and the new l0 sum, kept and undecided counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference, state_codes

ops = torch.ops.csmask
Tensors = Sequence[Tensor]
Optionals = Sequence[Tensor | None]


def _gradients(
    mask_logits: Tensors, dmasked_weights: Optionals, weights: Tensors, grads: Optionals, temperatures: Tensors,
    dl0s: Optionals, scales: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    """``dS = grad + (dWm * W + dl0) * T * m * (1 - m)`` of each layer, in the logits' dtype."""
    found = []
    for logits, dwm, weight, grad, t, dl0, scale in zip(
        mask_logits, dmasked_weights, weights, grads, temperatures, dl0s, scales, strict=True
    ):
        total = torch.zeros_like(logits) if grad is None else grad.to(logits.dtype)
        if dwm is not None or dl0 is not None:
            dwm = weight.new_zeros(()).expand(weight.shape) if dwm is None else dwm
            total = total + ops.logits_grad(dwm, weight, logits, t, dl0, scale)
        found.append(total)
    return found


def mask_grad_norms(
    mask_logits: Tensors, dmasked_weights: Optionals, weights: Tensors, grads: Optionals, temperatures: Tensors,
    dl0s: Optionals, scales: Sequence[float],
) -> Tensor:  # fmt: skip
    gradients = _gradients(mask_logits, dmasked_weights, weights, grads, temperatures, dl0s, scales)
    return torch.stack([torch.linalg.vector_norm(gradient.double()) for gradient in gradients]).float()


def _mask_step(
    mask_logits: Tensors, masked_weights: Tensors, dmasked_weights: Optionals, weights: Tensors, grads: Optionals,
    temperatures: Tensors, dl0s: Optionals, scales: Sequence[float], factor: Tensor | None, maximize: bool,
    update: Callable[[int, Tensor, Tensor], None],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``update(i, logits, gradient)`` of each layer, and what follows from its new logits."""
    gradients = _gradients(mask_logits, dmasked_weights, weights, grads, temperatures, dl0s, scales)
    l0s, counts = [], []
    for i, (logits, gradient) in enumerate(zip(mask_logits, gradients, strict=True)):
        gradient = gradient if factor is None else gradient * factor.to(gradient)
        update(i, logits, -gradient if maximize else gradient)
        l0s.append(ops.materialize_(masked_weights[i], weights[i], logits, temperatures[i], False, scales[i]))
        counts.append(reference.mask_sums(logits, temperatures[i], False, scales[i])[1])
    return torch.stack(l0s), torch.stack(counts)


def mask_adamw_(
    mask_logits: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, state_scales: Tensors, masked_weights: Tensors,
    dmasked_weights: Optionals, weights: Tensors, grads: Optionals, temperatures: Tensors, dl0s: Optionals,
    scales: Sequence[float], steps: Tensors, factor: Tensor | None, lr: Tensor, beta1: float, beta2: float, eps: float,
    weight_decay: float, maximize: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``state_scales``: those of states that are ``state_codes``; empty for states in the logits' dtype."""

    def update(i: int, logits: Tensor, gradient: Tensor) -> None:
        rate, step = lr.to(logits), steps[i].to(logits)
        average, square = exp_avgs[i], exp_avg_sqs[i]
        if state_scales:
            codes = (average, square, state_scales[i])
            unit = state_codes.average_unit((beta1, beta2), steps[i] - 1)
            average, square = (t.to(logits.dtype) for t in state_codes.decode(*codes, logits, unit))
        logits.mul_(1 - rate * weight_decay)
        average.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        denominator = square.sqrt() / correction2.sqrt() + eps
        if state_scales:
            unit = state_codes.average_unit((beta1, beta2), steps[i])
            new = state_codes.encode(average, square, unit, steps[i])
            average = average + new.residue * state_codes.residue_factor(beta1, steps[i]).to(logits)
            for old, value in zip(codes, new.codes, strict=True):
                old.copy_(value)
        logits.sub_(rate / correction1 * average / denominator)
        if state_scales:
            state_codes.put_quarters(logits, new.quarters)

    return _mask_step(
        mask_logits, masked_weights, dmasked_weights, weights, grads, temperatures, dl0s, scales, factor, maximize,
        update,
    )  # fmt: skip


def mask_sgd_(
    mask_logits: Tensors, momentums: Tensors, masked_weights: Tensors, dmasked_weights: Optionals, weights: Tensors,
    grads: Optionals, temperatures: Tensors, dl0s: Optionals, scales: Sequence[float], steps: Tensors,
    factor: Tensor | None, lr: Tensor, momentum: float, dampening: float, weight_decay: float, nesterov: bool,
    maximize: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    def update(i: int, logits: Tensor, gradient: Tensor) -> None:
        gradient = gradient + weight_decay * logits
        if momentum:
            # The first step takes the gradient itself, undampened.
            first = (steps[i] <= 1).to(gradient)
            damped = gradient * (first + (1 - first) * (1 - dampening))
            momentums[i].mul_(momentum * (1 - first)).add_(damped)
            gradient = gradient + momentum * momentums[i] if nesterov else momentums[i]
        logits.sub_(lr.to(logits) * gradient)

    return _mask_step(
        mask_logits, masked_weights, dmasked_weights, weights, grads, temperatures, dl0s, scales, factor, maximize,
        update,
    )  # fmt: skip


OPS: dict[str, Callable[..., Any]] = {
    "mask_grad_norms": mask_grad_norms,
    "mask_adamw_": mask_adamw_,
    "mask_sgd_": mask_sgd_,
}
