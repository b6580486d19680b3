"""``total_l0``: the l0 of many layers, from wherever each has it already."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import shards
from .leaf_group import whole_groups
from .mask_sum import LateUse, late_sums
from .masked_layer import MaskedLayer


def total_l0(layers: Sequence[MaskedLayer], device: torch.device) -> Tensor:
    """The sum of the masks now in use, 0-d fp32 and differentiable while they are soft.

    Layers that wait for their optimizer have it from its step, the others from their last forward if that is still to
    be differentiated; of what is left, the logits are read.
    """
    waiting = [] if shards.in_several_processes() else [layer for layer in layers if layer.waits]
    groups = whole_groups([layer.leaf for layer in waiting if layer.leaf is not None])
    parts = [shards.Part(group.l0()) for group in groups]
    late = _late_l0s(layers)
    for layer in layers:
        if layer.leaf is not None and layer.leaf.group in groups:
            parts += [] if layer.bias_mask_logits is None else [layer.bias_l0_part()]
        elif layer not in late:
            parts += layer.l0_parts()
        else:
            # Added up as forward adds them up, to the bit.
            l0 = late[layer]
            parts.append(shards.Part(l0 if layer.bias_mask_logits is None else l0 + layer.bias_l0_part().value))
    return shards.total(parts, device)


def _late_l0s(layers: Sequence[MaskedLayer]) -> dict[MaskedLayer, Tensor]:
    """What the last forward left, by layer; on each device one node for all of its layers."""
    by_device: dict[torch.device, list[tuple[MaskedLayer, LateUse]]] = {}
    if torch.compiler.is_compiling():  # in a graph forward leaves nothing
        return {}
    for layer in layers:
        use = layer.late_use()
        if use is not None:
            by_device.setdefault(use.mask_logits.device, []).append((layer, use))
    found: dict[MaskedLayer, Tensor] = {}
    for pairs in by_device.values():
        found.update(zip((layer for layer, _ in pairs), late_sums([use for _, use in pairs]), strict=True))
    return found
