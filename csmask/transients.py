"""``Transients``: memory for what one layer at a time has, the same for all layers of a lean optimizer.

For CPUs, where memory that is new costs page faults; a GPU's allocator keeps it for the next one to ask.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from . import _cpp


class Transients:
    """Memory by thread and by slot, what it is for: no larger than the largest layer."""

    def __init__(self) -> None:
        self._memory: dict[tuple[int, str], Tensor] = {}

    def empty_like(self, weight: Any, dtype: torch.dtype, slot: str) -> Tensor:
        """``torch.empty_like(weight, dtype=dtype)`` where the slot's last tensor was."""
        key, nbytes = (threading.get_ident(), slot), weight.numel() * dtype.itemsize
        memory = self._memory.get(key)
        if memory is None or memory.numel() < nbytes:
            with torch.inference_mode(False):  # it outlives this call
                memory = self._memory[key] = _cpp.in_huge_pages(torch.empty(nbytes, dtype=torch.uint8))
        strides = weight.stride()
        if isinstance(weight, Tensor) and not weight.is_contiguous():
            strides = torch.empty_like(weight, device="meta").stride()
        return memory[:nbytes].view(dtype).as_strided(weight.shape, strides)

    def drop(self) -> None:
        """Free the memory, that of other threads too; what is in use lives on with its users."""
        self._memory.clear()
