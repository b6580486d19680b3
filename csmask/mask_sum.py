"""The l0 sum in autograd: by a pass over the logits, or as the forward of a layer has just made it.

A layer's kernels make the sum anyway, and the node of its operation takes the gradient of the sum along. A loss that is
put together after the forward (``circuit.l0()``) has it from there: ``LateSum`` is what a forward leaves, ``late_sums``
gives nodes of their own, which leave their gradient to the layers' nodes where these run later in the same backward and
make the logits' gradients themselves where they do not. None of it holds a layer's graph: that is freed as ever.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._ops import ops
from .first_derivative import first_derivative_only


class MaskSum(torch.autograd.Function):
    """The l0 sum by itself: one pass over the logits forward, one backward."""

    @staticmethod
    def forward(
        ctx: Any, mask_logits: Tensor, temperature: Tensor, hard: bool, scale: float, weights_per_logit: int
    ) -> Tensor:
        ctx.save_for_backward(mask_logits, temperature)
        ctx.hard, ctx.scale, ctx.weights_per_logit = hard, scale, weights_per_logit
        l0, _ = ops.mask_sums(mask_logits, temperature, hard, scale, weights_per_logit, False)
        if hard:
            ctx.mark_non_differentiable(l0)
        return l0

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dl0: Tensor) -> tuple[Tensor | None, ...]:
        mask_logits, temperature = ctx.saved_tensors
        zero = mask_logits.new_zeros(()).expand(mask_logits.shape)  # takes no memory
        per_logit = dl0 * ctx.weights_per_logit
        return ops.logits_grad(zero, zero, mask_logits, temperature, per_logit, ctx.scale), None, None, None, None


def _sum_grad(mask_logits: Tensor, temperature: Tensor, dl0: Tensor, scale: float, weights_per_logit: int) -> Tensor:
    zero = mask_logits.new_zeros(()).expand(mask_logits.shape)  # takes no memory
    return ops.logits_grad(zero, zero, mask_logits, temperature, dl0 * weights_per_logit, scale)


class LateSum:
    """What a layer's forward leaves for a loss that is put together later.

    Args:
        l0: the sum, an output of a node whose backward calls ``take``.
        mask_logits, temperature: of the layer.
    """

    __slots__ = ("_node", "_of", "value")

    def __init__(self, l0: Tensor, mask_logits: Tensor, temperature: Tensor) -> None:
        assert l0.grad_fn is not None
        self.value = l0.detach()
        self._node = weakref.ref(l0.grad_fn)
        self._of = _state(mask_logits), _state(temperature)

    def node(self, mask_logits: Tensor, temperature: Tensor) -> Any:
        """The layer's node; None where it has run, or is gone, or the sum is of other masks than there are now."""
        node: Any = self._node()
        is_to_run = node is not None and node.ran_in is None
        return node if is_to_run and self._of == (_state(mask_logits), _state(temperature)) else None


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor._version


def expect(ctx: Any) -> None:
    """Of the forward of a function whose backward calls ``take``."""
    ctx.ran_in = ctx.late_dl0 = None


def take(ctx: Any, dl0: Tensor | None) -> Tensor | None:
    """The gradient of a node's sum: ``dl0``, of its own output, and what ``late_sums`` left in this backward."""
    if torch.compiler.is_compiling():  # nothing is late in a graph
        return dl0
    late, ctx.late_dl0 = ctx.late_dl0, None
    ctx.ran_in = torch._C._current_graph_task_id()
    if late is None or late[0] != ctx.ran_in:
        return dl0
    return late[1] if dl0 is None else dl0 + late[1]


class LateUse(NamedTuple):
    """One layer's part in ``late_sums``."""

    late: LateSum
    mask_logits: Tensor
    temperature: Tensor
    scale: float
    weights_per_logit: int


def late_sums(uses: list[LateUse]) -> list[Tensor]:
    """The sums, 0-d and differentiable, of layers whose ``LateSum`` still has a node; one node for all of them."""
    return list(_LateSums.apply(uses, *(use.mask_logits for use in uses))) if uses else []


class _LateSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, uses: list[LateUse], *logits: Tensor) -> tuple[Tensor, ...]:
        ctx.uses = uses
        ctx.save_for_backward(*logits, *(use.temperature for use in uses))
        ctx.set_materialize_grads(False)
        return tuple(use.late.value.detach() for use in uses)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *dl0s: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, count, task = ctx.saved_tensors, len(dl0s), torch._C._current_graph_task_id()
        found: list[Tensor | None] = []
        for use, logits, temperature, dl0 in zip(ctx.uses, saved[:count], saved[count:], dl0s, strict=True):
            node: Any = use.late._node()
            # Made before this one, the node runs after it, unless its gradient came by another device and sooner.
            runs = node is not None and node.ran_in != task and torch._C._will_engine_execute_node(node)
            if dl0 is None or runs:
                found.append(None)
            else:
                found.append(_sum_grad(logits, temperature, dl0, use.scale, use.weights_per_logit))
            if dl0 is not None and runs:
                earlier = node.late_dl0
                is_same = earlier is not None and earlier[0] == task
                node.late_dl0 = task, earlier[1] + dl0 if is_same else dl0
        return None, *found
