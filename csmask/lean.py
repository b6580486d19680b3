"""Lean mode: the step of a layer runs inside backward, as soon as the layer's gradient is complete.

Forward makes the masked weight for the time of its product, backward makes it again, has its gradient and steps the
logits at once: of neither is there ever more than one layer's. What that rules out raises: a second gradient in one
step, and looking at gradients, which are gone when backward returns.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ._ops import ops
from .autograd import _dense_backward, _dense_forward
from .first_derivative import first_derivative_only
from .masked_leaf import LEAN_ELSE, REPLACED, SECOND, MaskedLeaf, grad_so_far, is_asked_for, wide
from .quantised import dense, empty_like

_SPENT = (
    "in lean mode the gradients are used up inside backward, so they cannot be read, scaled, clipped or cleared before "
    "optimizer.step() ends the step: call that first; use bf16 instead of a GradScaler, and to clip give the optimizer "
    "max_grad_norm=, infinity not to: then whoever looks, such as clip_grad_norm_ and transformers' Trainer, finds no "
    "gradients" + LEAN_ELSE
)


class _Use:
    """A forward whose backward has not come yet; it lives as long as the graph of that forward.

    Attributes:
        state: of the leaf at that time; None if the logits may have been written to unseen since.
    """

    def __init__(self, state: Any) -> None:
        self.state = state


class LeanLeaf(MaskedLeaf):
    """The gradient of one layer's masked weight, from a use's backward to the turn that steps the logits.

    Attributes:
        value: None but within the layer's turn.
        anchor: what autograd takes for the parameter of the operation. Were it the logits, what comes to them by other
            ways, such as a penalty, would be held back until after the turn.
        spent: whether the logits have been stepped since the optimizer's last ``step()``.
    """

    is_lean = True

    def __init__(self, weight: Any, mask_logits: nn.Parameter, temperature: Tensor, scale: float) -> None:
        super().__init__(weight, mask_logits, temperature, scale)
        self.spent = False
        self._uses: weakref.WeakSet[_Use] = weakref.WeakSet()
        with torch.inference_mode(False):
            self.anchor = torch.zeros((), device=weight.device, requires_grad=True)
        # What a backward does to logits and optimizer is none of a compiled graph's business.
        self.apply = torch.compiler.disable(LeanOp.apply)

    # The masked weight

    @torch.no_grad()
    def make(self, dtype: torch.dtype) -> Tensor:
        """The masked weight of the logits as they are now, for the caller alone."""
        mask = (dense(self.weight), self.mask_logits, self.temperature, False, self.scale)
        if self.weight.device.type == "cpu":
            masked_weight = self.empty(dtype, "masked weight")
            l0 = ops.materialize_(masked_weight, *mask)
        else:
            masked_weight, l0, _ = ops.materialize(*mask, dtype)
        self._note_l0(l0)
        return masked_weight

    def empty(self, dtype: torch.dtype, slot: str) -> Tensor:
        """Memory of the weight's shape for the time of an operation."""
        optimizer = None if self.group is None else self.group.optimizer()
        if optimizer is None or self.weight.device.type != "cpu":
            return empty_like(self.weight, dtype)
        return optimizer.transients.empty_like(self.weight, dtype, slot)

    def refresh(self) -> None:
        if self._is_stale():
            l0, _ = ops.mask_sums(self.mask_logits.detach(), self.temperature, False, self.scale, 1, False)
            self._note_l0(l0)

    def prepare(self) -> None:
        """Nothing: a forward makes all it needs, also a compiled one."""

    def _is_stale(self) -> bool:
        return self._key is None or self._key != self._state(self.weight.dtype)

    def _note_l0(self, l0: Tensor) -> None:
        if self._is_stale():
            self.flush()  # what waits belongs to old logits, which raises
            assert self.group is not None
            self.group.set_l0(self.index, l0)
            self.group.forget_counts()
            self._key = self._state(self.weight.dtype)

    def has_new_value(self, memory: Tensor) -> None:  # noqa: ARG002, not kept
        self._key = self._state(self.weight.dtype)

    def forget(self) -> None:
        super().forget()
        for use in self._uses:
            use.state = None

    # A layer's turn

    def begin_use(self) -> _Use:
        """Note a forward, for whose backward the turn has to wait."""
        use = _Use(self._state(self.weight.dtype))
        self._uses.add(use)
        return use

    def check_use(self, use: _Use) -> None:
        """Raise unless a backward now is that of the logits as they are."""
        if self.spent:
            raise RuntimeError(SECOND)
        if use.state != self._state(self.weight.dtype):
            raise RuntimeError(REPLACED)

    def receive(self, use: _Use, dmasked_weight: Tensor, memory: Tensor) -> None:
        """The gradient of one use; with that of the last one it is the layer's turn.

        Args:
            dmasked_weight: not the caller's any more; on a CPU, other layers' to write to when this returns.
            memory: of a masked weight, to be written to.
        """
        self._uses.discard(use)
        # A penalty on the logits has a way of its own to them: it may need them as they are, or its gradient may still
        # come. Then the turn is for ``step`` to take.
        takes_turn = not self._uses and not is_asked_for(self.mask_logits)
        if self._sum is not None:
            self._sum = wide(self._sum).add_(dmasked_weight)
        elif takes_turn or dmasked_weight.device.type != "cpu":
            self._sum = dmasked_weight
        else:
            self._sum = dmasked_weight.clone()
        if takes_turn:
            try:
                self._take_turn(memory)
            except BaseException:
                if self._sum is dmasked_weight:  # it waits on, and other layers write there
                    self._sum = dmasked_weight.clone()
                raise

    def take_turn(self) -> None:
        """Step the logits by what has come so far, of l0 alone or of some uses."""
        self._take_turn(self.empty(self.weight.dtype, "next masked weight"))

    @torch.no_grad()
    def _take_turn(self, memory: Tensor) -> None:
        optimizer = None if self.group is None else self.group.optimizer()
        if optimizer is None:
            super().flush()  # as without csmask's optimizers
            return
        self.value = memory
        try:
            optimizer.step_leaf(self)
        finally:
            self.value = None
        self.spent = True

    def end_step(self) -> None:
        """The optimizer's ``step()`` is over: the next gradient belongs to the next one."""
        self.spent = False
        self._uses.clear()

    # Gradients, which nobody gets to see

    def flush(self) -> None:
        """Take the turn, since what waits belongs to what is about to change."""
        if self.has_gradient:
            self.check_unchanged()
            self.take_turn()

    def reveal(self) -> None:
        """Raise where there was a gradient to see, unless the optimizer has been told how to clip."""
        optimizer = None if self.group is None else self.group.optimizer()
        if (self.spent or self.has_gradient) and (optimizer is None or optimizer.max_grad_norm is None):
            raise RuntimeError(_SPENT)

    def check_clearable(self) -> None:
        if self.spent:
            raise RuntimeError(_SPENT)

    def check_unchanged(self) -> None:
        if self.has_gradient:
            super().check_unchanged()
        if self.spent and grad_so_far(self.mask_logits) is not None:
            raise RuntimeError(SECOND)


class LeanOp(torch.autograd.Function):
    """A linear operation or a convolution with the masked weight of a ``LeanLeaf``; saves its input alone.

    ``geometry`` is as in ``autograd.MaskedOp``; ``anchor``, the leaf's, is there for autograd and gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, _anchor: Tensor, bias: Tensor | None, leaf: LeanLeaf, geometry: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.leaf, ctx.geometry, ctx.dtype = leaf, geometry, x.dtype
        masked_weight = leaf.make(x.dtype)
        ctx.use = leaf.begin_use()
        return _dense_forward(x, masked_weight, bias, geometry)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        leaf = ctx.leaf
        leaf.check_use(ctx.use)
        (x,) = ctx.saved_tensors  # under checkpointing, another forward
        steps = is_asked_for(leaf.anchor)
        wants = [ctx.needs_input_grad[0], steps, ctx.needs_input_grad[2]]
        masked_weight = leaf.make(ctx.dtype) if wants[0] else leaf.empty(ctx.dtype, "masked weight")
        in_memory = steps and isinstance(ctx.geometry, bool) and x.device.type == "cpu"
        memory = leaf.empty(ctx.dtype, "gradient") if in_memory else None
        dx, dmasked_weight, dbias = _dense_backward(dout, x, masked_weight, ctx.geometry, wants, memory)
        if dmasked_weight is not None:
            leaf.receive(ctx.use, dmasked_weight, masked_weight)
        return dx, None, dbias, None, None
