"""``MaskedWeight``: a layer's masked weight, kept from one use to the next while logits and temperature are unchanged.

Gradient accumulation then pays for the mask once, and backward finds what forward made. Nothing is kept by autograd.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ._ops import ops

KEEP_MODES = ("training", "always", "never")

# Counts optimizer steps of the process. Some optimizers write to ``param.data``, which leaves the version counter of
# the parameter as it was; a masked weight that is older than a step is therefore never used.
_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


class MaskedWeight:
    """Keeps ``(W * m, l0)`` of one layer until an argument changes.

    Changes are seen by the tensors' version counters, which every in-place operation of PyTorch moves, and by the
    optimizers' steps. Writing to ``mask_logits.data`` moves no counter. So a soft masked weight is used in another
    forward only while gradients accumulate, that is while ``mask_logits.grad`` is there and nothing but backward has
    changed it; a hard one, used in evaluation, only where ``keep`` is ``"always"``.

    Attributes:
        keep: ``"training"``, ``"always"``, or ``"never"``, which saves the memory of the masked weight.
    """

    def __init__(self, keep: str = "training") -> None:
        self.keep = keep
        self.drop()

    def drop(self) -> None:
        """Free the memory of what is kept."""
        self._key: tuple[Any, ...] | None = None
        self._value: tuple[Tensor, ...] | None = None
        self._grad: Any = lambda: None
        self._grad_version = self._backwards = 0

    def get(
        self,
        weight: Tensor,
        mask_logits: Tensor,
        temperature: Tensor,
        hard: bool,
        scale: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """``ops.materialize``'s masked weight and l0, kept ones if they are still right; not to be written to."""
        tensors, options = (weight, mask_logits, temperature), (hard, scale, dtype)

        def make() -> tuple[Tensor, ...]:
            return ops.materialize(*tensors, *options)[:2]

        if self.keep == "never" or (hard and self.keep != "always"):
            return make()  # type: ignore[return-value]
        in_backward = torch._C._current_graph_task_id() != -1  # backward itself, or a checkpointed forward within it
        if not (hard or in_backward or self._accumulates(mask_logits.grad if mask_logits.is_leaf else None)):
            self.drop()
        masked_weight, l0 = self._keep(tensors, options, make)
        # l0 becomes an output of autograd, which would make the kept tensor part of that graph.
        return masked_weight, l0.clone()

    def get_bits(self, mask_logits: Tensor) -> Tensor:
        """``ops.pack_mask``'s bits, kept ones if they are still right."""
        return self._keep((mask_logits,), ("bits",), lambda: (ops.pack_mask(mask_logits.detach()),))[0]

    def note_backward(self) -> None:
        """Backward has come by: it is about to change the logits' gradient once."""
        self._backwards += 1

    def _accumulates(self, grad: Tensor | None) -> bool:
        """Whether the gradient is one that only backward has changed since the last forward."""
        known, version, backwards = self._grad() is grad, self._grad_version, self._backwards
        if grad is None:
            return False
        self._grad, self._grad_version, self._backwards = weakref.ref(grad), grad._version, 0
        # One that is new was put there by backward and not touched since, or its version would not be 0.
        return grad._version == (version + backwards if known else 0) and backwards > 0

    def _keep(
        self, tensors: tuple[Tensor, ...], options: tuple[Any, ...], make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """What ``make`` gives, or what it gave when neither tensors nor options had changed since."""
        if not _is_tracked(*tensors):
            return make()
        key = (*(_state(t) for t in tensors), *options, _optimizer_steps)
        if self._key != key or self._value is None:
            self._value = None  # before the new one is made: never two at a time
            # It outlives this call: made under inference_mode, it could not be used in a later one with gradients.
            with torch.inference_mode(False):
                self._value = make()
            self._key = key
        return self._value

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskedWeight:
        return MaskedWeight(self.keep)

    def __reduce__(self) -> tuple[Any, ...]:
        return MaskedWeight, (self.keep,)


def _state(tensor: Tensor) -> tuple[int, int, torch.device]:
    return tensor.data_ptr(), tensor._version, tensor.device


def _is_tracked(*tensors: Tensor) -> bool:
    """Whether changes of the tensors can be seen: no subclasses, fakes or inference tensors, no capture of a graph.

    A CUDA graph that was captured while a masked weight was kept would never compute it again.
    """
    if any(type(t) not in (Tensor, torch.nn.Parameter) or t.is_inference() for t in tensors):
        return False
    return not (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())
