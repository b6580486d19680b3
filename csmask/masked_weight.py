"""``MaskedWeight``: a layer's masked weight, kept from one use to the next while logits and temperature are unchanged.

Gradient accumulation then pays for the mask once, and backward finds what forward made. Nothing is kept by autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ._ops import ops

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
    optimizer's steps. Who writes to ``mask_logits.data`` in another way must ``drop()`` what is kept.

    Attributes:
        keep: False to keep nothing: the masked weight is then made anew at each use, which saves its memory.
    """

    def __init__(self, keep: bool = True) -> None:
        self.keep = keep
        self.drop()

    def drop(self) -> None:
        """Free the memory of what is kept."""
        self._key: tuple[Any, ...] | None = None
        self._value: tuple[Tensor, ...] | None = None

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
        masked_weight, l0 = self._keep(tensors, options, lambda: ops.materialize(*tensors, *options)[:2])
        # l0 becomes an output of autograd, which would make the kept tensor part of that graph.
        return masked_weight, l0.clone()

    def get_bits(self, mask_logits: Tensor) -> Tensor:
        """``ops.pack_mask``'s bits, kept ones if they are still right."""
        return self._keep((mask_logits,), ("bits",), lambda: (ops.pack_mask(mask_logits.detach()),))[0]

    def _keep(
        self, tensors: tuple[Tensor, ...], options: tuple[Any, ...], make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """What ``make`` gives, or what it gave when neither tensors nor options had changed since."""
        if not self.keep or not _is_tracked(*tensors):
            return make()
        key = (*(_state(t) for t in tensors), *options, _optimizer_steps)
        if self._key != key or self._value is None:
            self.drop()  # before the new one is made: never two at a time
            # It outlives this call: made under inference_mode, it could not be used in a later one with gradients.
            with torch.inference_mode(False):
                self._value = make()
            self._key = key
        return self._value

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskedWeight:
        return MaskedWeight(self.keep)

    def __getstate__(self) -> dict[str, Any]:
        return {"keep": self.keep, "_key": None, "_value": None}


def _state(tensor: Tensor) -> tuple[int, int, torch.device]:
    return tensor.data_ptr(), tensor._version, tensor.device


def _is_tracked(*tensors: Tensor) -> bool:
    """Whether changes of the tensors can be seen: no subclasses, fakes or inference tensors, no capture of a graph.

    A CUDA graph that was captured while a masked weight was kept would never compute it again.
    """
    if any(type(t) not in (Tensor, torch.nn.Parameter) or t.is_inference() for t in tensors):
        return False
    return not (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())
