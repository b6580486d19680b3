"""The l0 sum in autograd: by a pass over the logits, or as the forward of a layer has just made it.

A layer's kernels make the sum anyway, and the node of its operation takes the gradient of the sum along. A loss that is
put together after the forward (``circuit.l0()``) has it from there: ``LateSum`` is what a forward leaves, ``late_sums``
gives nodes of their own, which leave their gradient to the layers' nodes where these run later in the same backward and
make the logits' gradients themselves where they do not. None of it holds a layer's graph: that is freed as ever.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import masked_weight
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
        dlogits = _sum_grad(mask_logits, temperature, dl0, ctx.scale, ctx.weights_per_logit)
        return dlogits, None, None, None, None


def _sum_grad(mask_logits: Tensor, temperature: Tensor, dl0: Tensor, scale: float, weights_per_logit: int) -> Tensor:
    zero = mask_logits.new_zeros(()).expand(mask_logits.shape)  # takes no memory
    # Two tensors of it: a launch is kept for tensors that are told apart.
    return ops.logits_grad(zero, zero.detach(), mask_logits, temperature, dl0 * weights_per_logit, scale)


class LateSum:
    """What a layer's forward leaves for a loss that is put together later; see ``late_sum``."""

    __slots__ = ("_node", "_of", "_seen", "is_spent", "value")

    def __init__(self, l0: Tensor, mask_logits: Tensor, temperature: Tensor) -> None:
        assert l0.grad_fn is not None
        self.value, self._node = l0.detach(), weakref.ref(l0.grad_fn)
        # Themselves, not what lies at their address: the node's gradient goes to this tensor and to no alias of it.
        self._of = weakref.ref(mask_logits), weakref.ref(temperature)
        self._seen = _seen(mask_logits, temperature)
        self.is_spent = False

    @property
    def node(self) -> Any:
        """The node; None where its graph is gone."""
        return self._node()

    def is_of(self, mask_logits: Tensor, temperature: Tensor) -> bool:
        """Whether the sum is of these masks as they are now, and the node is there and has not run."""
        node = self.node
        if node is None or node.ran_in or self.is_spent:
            return False
        is_same = self._of[0]() is mask_logits and self._of[1]() is temperature
        return is_same and self._seen == _seen(mask_logits, temperature)


def late_sum(l0: Tensor, mask_logits: Tensor, temperature: Tensor) -> LateSum | None:
    """What a forward may leave of its l0: None in evaluation, in a compiled graph, or of a node that takes none.

    Args:
        l0: the sum, an output of a node that ``expect`` has prepared and whose backward calls ``take``.
        mask_logits, temperature: what it is the sum of.
    """
    if torch.compiler.is_compiling() or not hasattr(l0.grad_fn, "late_dl0s"):
        return None
    return LateSum(l0, mask_logits, temperature)


def _seen(mask_logits: Tensor, temperature: Tensor) -> tuple[Any, ...]:
    """What there is to see of a change of the masks, and on a GPU where work is queued.

    Only edges of the graph have streams wait for each other, and a CUDA graph would have a sum of before its capture.
    """
    queue = None
    if mask_logits.is_cuda:
        queue = torch.cuda.current_stream(mask_logits.device), torch.cuda.is_current_stream_capturing()
    addresses = mask_logits.data_ptr(), temperature.data_ptr()
    return *addresses, mask_logits._version, temperature._version, masked_weight.optimizer_steps(), queue


def expect(ctx: Any) -> None:
    """Of the forward of a function whose backward calls ``take``."""
    # By graph task: several may run through one graph, one within another or in threads.
    ctx.late_dl0s = {}
    ctx.ran_in = set()


def take(ctx: Any, dl0: Tensor | None) -> Tensor | None:
    """The gradient of a node's sum: ``dl0``, of its own output, and what ``late_sums`` left in this backward."""
    if torch.compiler.is_compiling():  # nothing is late in a graph
        return dl0
    task = torch._C._current_graph_task_id()
    ctx.ran_in.add(task)
    late = ctx.late_dl0s.pop(task, None)
    if late is None or dl0 is None:
        return dl0 if late is None else late
    return dl0 + late


class LateUse(NamedTuple):
    """One layer's part in ``late_sums``."""

    late: LateSum
    mask_logits: Tensor
    temperature: Tensor
    scale: float
    weights_per_logit: int


def late_sums(uses: list[LateUse]) -> list[Tensor]:
    """The sums, 0-d and differentiable, of layers whose ``LateSum`` is of their masks; one node for all of them."""
    return list(_LateSums.apply(uses, *(use.mask_logits for use in uses))) if uses else []


class _LateSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, uses: list[LateUse], *logits: Tensor) -> tuple[Tensor, ...]:
        ctx.uses = uses
        ctx.save_for_backward(*logits, *(use.temperature for use in uses))
        ctx.set_materialize_grads(False)
        # Of several the caller makes one; one by itself may be written to by whoever gets it.
        return tuple(use.late.value.detach() if len(uses) > 1 else use.late.value.clone() for use in uses)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *dl0s: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, count = ctx.saved_tensors, len(dl0s)
        compiled, task = _is_compiled(), torch._C._current_graph_task_id()
        found: list[Tensor | None] = []
        for use, logits, temperature, dl0 in zip(ctx.uses, saved[:count], saved[count:], dl0s, strict=True):
            use.late.is_spent = True  # the logits are about to be trained, though their node may never run
            dlogits = None
            if dl0 is not None and (compiled or not _leave(use.late.node, task, dl0)):
                dlogits = _sum_grad(logits, temperature, dl0, use.scale, use.weights_per_logit)
            found.append(dlogits)
        return None, *found


def _leave(node: Any, task: int, dl0: Tensor) -> bool:
    """Leave the gradient to a layer's node, if that is still to run in this backward.

    Made before this one, it runs later, unless its own gradient came sooner by another thread or device.
    """
    if node is None or task in node.ran_in or not torch._C._will_engine_execute_node(node):
        return False
    earlier = node.late_dl0s.get(task)
    node.late_dl0s[task] = dl0 if earlier is None else earlier + dl0
    return True


def _is_compiled() -> bool:
    """Whether the backward is being compiled (compiled autograd), where nodes are traced and not run."""
    if torch.compiler.is_compiling():
        return True
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return module is not None and (module.compiled_autograd_enabled or module.in_compiled_autograd_region)
