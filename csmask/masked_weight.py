"""``MaskedWeight``: a layer's masked weight, kept from one use to the next while logits and temperature are unchanged.

Gradient accumulation then pays for the mask once, and backward finds what forward made. Nothing is kept by autograd.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ._ops import ops

KEEP_MODES = ("training", "always", "never")

# Optimizer steps of the process, and the parameters that an optimizer has stepped. Some optimizers write to
# ``param.data``, which leaves the version counter of the parameter as it was: what is older than a step is not used.
_optimizer_steps = 0
_stepped: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


def _note_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1
    _stepped.update((id(p), p) for group in optimizer.param_groups for p in group["params"])


register_optimizer_step_post_hook(_note_step)


def optimizer_steps() -> int:
    """How often any optimizer of the process has stepped."""
    return _optimizer_steps


class MaskedWeight:
    """Keeps ``(W * m, l0)`` of one layer until an argument changes.

    Changes are seen by the tensors' identity, by their version counters, which every in-place operation of PyTorch
    moves, and by the optimizers' steps. Writing to ``mask_logits.data`` moves no counter, and hand-written loops do
    so. A soft masked weight therefore serves another forward only once a ``torch.optim`` optimizer has stepped its
    logits, and never across a step; a hard one, used in evaluation, only where ``keep`` is ``"always"``.

    Attributes:
        keep: ``"training"``, ``"always"``, or ``"never"``, which saves the memory of the masked weight.
    """

    def __init__(self, keep: str = "training") -> None:
        self.keep = keep
        self.drop()

    def drop(self) -> None:
        """Free the memory of what is kept."""
        # (key, tensors of the key, value) in one: threads that share a layer see all of it or nothing.
        self._kept: tuple[Any, tuple[Tensor, ...], tuple[Tensor, ...]] | None = None
        # A masked weight that is out of date, for its memory; at most one, popped by who writes to it.
        self._stale: list[Tensor] = []

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
            out = self._reuse(weight, dtype)
            if out is not None:
                return out, ops.materialize_(out, *tensors, hard, scale)
            return ops.materialize(*tensors, *options)[:2]

        if self.keep == "never" or (hard and self.keep != "always"):
            return make()  # type: ignore[return-value]
        in_backward = torch._C._current_graph_task_id() != -1  # backward itself, or a checkpointed forward within it
        if not (hard or in_backward or _stepped.get(id(mask_logits)) is mask_logits):
            self._retire()
        masked_weight, l0 = self._keep(tensors, options, make)
        # l0 becomes an output of autograd, which would make the kept tensor part of that graph.
        return masked_weight, l0.clone()

    def _retire(self) -> None:
        """What is kept is out of date; on a CPU its memory serves the next one: new memory is slower than kernels."""
        kept, self._kept = self._kept, None
        if kept is None or len(kept[2]) != 2 or kept[2][0].device.type != "cpu":
            return
        # Another thread may be multiplying with it: then it is left to that thread. 2: where it is held, and the call.
        held = sys.getrefcount(kept), sys.getrefcount(kept[2]), sys.getrefcount(kept[2][0])
        if held == (2, 2, 2):
            self._stale[:] = kept[2][:1]

    def _reuse(self, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Memory of a masked weight that is out of date, if this one fits into it; freed if not."""
        try:
            stale = self._stale.pop()
        except IndexError:
            return None
        fits = stale.shape == weight.shape and stale.dtype == dtype and stale.stride() == weight.stride()
        return stale if fits and stale.device == weight.device else None

    def get_bits(self, mask_logits: Tensor) -> Tensor:
        """``ops.pack_mask``'s bits, kept ones if they are still right."""
        bits = self._keep((mask_logits,), ("bits",), lambda: (ops.pack_mask(mask_logits.detach()),))[0]
        self._stale.clear()  # bits are kept to save that memory
        return bits

    def _keep(
        self, tensors: tuple[Tensor, ...], options: tuple[Any, ...], make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """What ``make`` gives, or what it gave when neither tensors nor options had changed since."""
        if not _is_tracked(*tensors):
            return make()
        key = (*(_state(t) for t in tensors), *options, _optimizer_steps)
        kept = self._kept
        if kept is not None and kept[0] == key:
            return kept[2]
        kept = None
        self._retire()  # before the new one is made: never two at a time
        # It outlives this call: made under inference_mode, it could not be used in a later one with gradients.
        if torch.is_inference_mode_enabled() or torch.is_grad_enabled():
            with torch.inference_mode(False), torch.no_grad():
                value = make()
        else:  # within a function of autograd; entering the modes takes the host as long as making a launch
            value = make()
        # The aliases hold the memory, so that no other tensor can come to lie at an address of the key.
        self._kept = (key, tuple(t.detach() for t in tensors), value)
        return value

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
