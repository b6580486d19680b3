"""``L0Rider``: the l0 term in losses that are computed outside of a circuit's forward.

transformers' Trainer computes some itself: with label smoothing, a ``compute_loss_func`` or a ``compute_loss`` of a
subclass. Forward then returns no loss that the term could be added to, or one that nobody uses.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class L0Rider:
    """Brings the gradient of the l0 term into each optimizer step once.

    The term rides on the outputs of forward: they stay what they are, and when a gradient comes to one of them, that of
    the term has come, too. Nothing rides in a step in which a gradient has come to the term in forward's own loss, or
    to what ``circuit.l0()`` gave after the forward.

    Attributes:
        scale: of the loss, that of a ``GradScaler``.
        is_active: whether an optimizer step is being prepared.
        has_entered: whether the term's gradient has come in this step.
    """

    def __init__(self, scale: Callable[[], Tensor | float] = lambda: 1.0) -> None:
        self.scale = scale
        self.is_active = self.has_entered = self._is_mounted = self._is_compiled = self._has_warned = False

    def begin_step(self) -> None:
        """Called before the first micro-batch of an optimizer step."""
        self.is_active, self.has_entered, self._is_mounted = True, False, False

    def end_step(self) -> None:
        """Called after an optimizer step; warns, once, if the term had no part in it."""
        missed = self.is_active and self._is_mounted and not (self.has_entered or self._is_compiled)
        self.is_active = False
        if missed and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "the l0 term had no part in this optimizer step: no gradient came to the circuit's outputs or its "
                "loss. Add circuit.l0_lambda * circuit.l0() to the loss, or set add_l0=False",
                stacklevel=3,
            )

    def watch(self, l0: Tensor) -> Tensor:
        """``l0``, which tells the rider when a gradient comes to it."""
        if not self.is_active or not l0.requires_grad or torch.compiler.is_compiling():
            return l0
        return _Watched.apply(l0, self)

    def mount(self, output: Any, term: Callable[[], Tensor]) -> Any:
        """``output``, whose tensors take the gradient of ``term()`` along."""
        if not self.is_active or not torch.is_grad_enabled():
            return output
        if torch.compiler.is_compiling():
            return self._mount_compiled(output, term)
        carried: list[Tensor] = []

        def collect(tensor: Tensor) -> Tensor:
            carried.append(tensor)
            return tensor

        _map(output, collect)
        value = term()
        if not carried or not value.requires_grad:
            return output
        self._is_mounted = True
        found = iter(_Ride.apply(self, value, *carried))
        return _map(output, lambda _: next(found))

    def _mount_compiled(self, output: Any, term: Callable[[], Tensor]) -> Any:
        """In a graph, whose backward tells nobody anything: on the first forward of a step that returns no loss."""
        self._is_compiled = True
        loss = output.get("loss") if isinstance(output, dict) else None
        if loss is not None or self._is_mounted or not isinstance(output, (dict, Tensor)):
            return output
        self._is_mounted = True
        if isinstance(output, Tensor):
            return _CompiledRide.apply(output, term().to(output.device), self.scale)
        for key in ("logits", *output):
            if _has_gradient(output.get(key)):
                output[key] = _CompiledRide.apply(output[key], term().to(output[key].device), self.scale)
                break
        return output


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad


def _map(output: Any, change: Callable[[Tensor], Any], is_top: bool = True) -> Any:
    """``output`` with its tensors that have a gradient changed, but its loss: in place where it can be."""
    if _has_gradient(output):
        return change(output)
    if isinstance(output, dict):
        for key in output:
            if key != "loss" and output[key] is not None:
                output[key] = _map(output[key], change, False)
    elif isinstance(output, tuple):
        is_loss = is_top and len(output) > 0 and isinstance(output[0], Tensor) and output[0].dim() == 0
        names = getattr(output, "_fields", [None] * len(output))
        values = [
            value if name == "loss" or (i == 0 and is_loss) else _map(value, change, False)
            for i, (name, value) in enumerate(zip(names, output, strict=True))
        ]
        return type(output)(*values) if hasattr(output, "_fields") else tuple(values)
    elif is_top and hasattr(output, "__dict__"):
        for name, value in vars(output).items():
            if name != "loss" and _has_gradient(value):
                setattr(output, name, change(value))
    return output


class _Watched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, l0: Tensor, rider: L0Rider) -> Tensor:
        ctx.rider = rider
        return l0.view_as(l0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.rider.has_entered = True
        return grad, None


class _Ride(torch.autograd.Function):
    """Gradients pass, and the first that come in an optimizer step bring the term's."""

    @staticmethod
    def forward(ctx: Any, rider: L0Rider, term: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.rider, ctx.options = rider, {"dtype": term.dtype, "device": term.device}
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        rider, dterm = ctx.rider, None
        if rider.is_active and not rider.has_entered and any(grad is not None for grad in grads):
            rider.has_entered = True
            dterm = torch.as_tensor(rider.scale(), **ctx.options).reshape(())
        return None, dterm, *grads


class _CompiledRide(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, term: Tensor, scale: Callable[[], Tensor | float]) -> Tensor:
        ctx.scale, ctx.options = scale, {"dtype": term.dtype, "device": term.device}
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.as_tensor(ctx.scale(), **ctx.options).reshape(()), None
