"""``first_derivative_only``: backwards whose results cannot be differentiated again, and say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_SECOND = (
    "masked operations have first derivatives only, and this one would be a second (create_graph=True): "
    "circuit.set_execution('reference') has all of them, without csmask's kernels"
)


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A ``backward`` whose results raise when they are differentiated, with what to do.

    ``torch.autograd.function.once_differentiable`` has them raise only if a gradient that came in has a graph. If none
    has, they depend on weight and logits all the same, and a term of the second derivative would be missing unseen.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        found = found if isinstance(found, tuple) else (found,)
        refuse: Any = torch._C._functions.DelayedError(_SECOND.encode(), len(found))
        return refuse(*(None if grad is None else grad.detach().requires_grad_() for grad in found))

    return run
