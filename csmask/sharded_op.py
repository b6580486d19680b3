"""A masked layer whose weight and logits are sharded: each process makes its shard of the masked weight.

The shards of the masked weight are what is gathered, for the time of one operation, and its gradient is scattered: of a
weight in bf16, 2 bytes each time, where gathering weight and logits would take 6. The chain rule to the logits runs on
the shard.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import shards
from ._ops import ops
from .autograd import _dense_backward, _dense_forward


class ShardedUse:
    """One use of a sharded layer, in the place of ``functional``'s ``lean``.

    Args:
        weight, mask_logits: ``DTensor`` in shards along dimension 0 over a mesh of one dimension.
        temperature, hard, scale: of the mask.
        reduce_dtype: in which the masked weight's gradients of all processes are added up; its own by default.

    Attributes:
        anchor: the shard of the logits.
        l0: of this shard, once the operation has run.

    Raises:
        NotImplementedError: tensors that are sharded in another way.
    """

    def __init__(
        self, weight: Any, mask_logits: Any, temperature: Tensor, hard: bool, scale: float, reduce_dtype: Any
    ) -> None:
        for tensor in (weight, mask_logits):
            placements = tensor.placements if shards.is_sharded(tensor) else None
            if placements is None or len(placements) != 1 or not placements[0].is_shard(dim=0):
                raise NotImplementedError(shards.OTHER_SHARDS.format(found=f"placements {placements}"))
        self.whole, self.temperature, self.hard, self.scale = weight, temperature, hard, scale
        self.weight, self.anchor, self.reduce_dtype = shards.local(weight), shards.local(mask_logits), reduce_dtype
        self.l0: Tensor | None = None

    def apply(self, x: Tensor, mask_logits: Tensor, bias: Tensor | None, _: Any, geometry: Any) -> Tensor:
        """The operation; ``geometry`` is as in ``autograd.MaskedOp``."""
        out, self.l0 = ShardedOp.apply(x, mask_logits, bias, self, geometry)
        return out

    def gather(self, shard: Tensor) -> Tensor:
        """The whole of a masked weight: shards of equal size, of which the last ones may end in nothing."""
        rows, size = self.whole.shape[0], self.whole.device_mesh.size()
        per_shard = -(-rows // size)
        gathered = shard.new_empty((per_shard * size, *shard.shape[1:]))
        _collective("all_gather_single")(gathered, _with_rows(shard, per_shard), group=self._group)
        return gathered[:rows]

    def scatter(self, gradient: Tensor) -> Tensor:
        """This process's shard of the mean over all processes, in fp32 or higher."""
        size = self.whole.device_mesh.size()
        per_shard = -(-gradient.shape[0] // size)
        gradient = gradient.to(self.reduce_dtype or gradient.dtype)
        shard = gradient.new_empty((per_shard, *gradient.shape[1:]))
        _collective("reduce_scatter_single")(shard, _with_rows(gradient, per_shard * size), group=self._group)
        shard = shard[: self.weight.shape[0]]
        return (shard.float() if shard.dtype.itemsize < 4 else shard) / size

    @property
    def _group(self) -> Any:
        return self.whole.device_mesh.get_group()


def _collective(name: str) -> Callable[..., Any]:
    """Of torch 2.13, or under the name that it had before."""
    before = {"all_gather_single": "all_gather_into_tensor", "reduce_scatter_single": "reduce_scatter_tensor"}
    return getattr(torch.distributed, name, None) or getattr(torch.distributed, before[name])


def _with_rows(tensor: Tensor, rows: int) -> Tensor:
    """Contiguous, with zeros at the end where it has fewer rows."""
    if tensor.shape[0] == rows:
        return tensor.contiguous()
    padded = tensor.new_zeros((rows, *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    return padded


class ShardedOp(Function):
    """A linear operation or a convolution with the masked weight of all shards; saves its input alone, and shards."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask_logits: Tensor, bias: Tensor | None, use: ShardedUse, geometry: Any
    ) -> tuple[Tensor, Tensor]:
        # A convolution's input gradient asks for the input's shape.
        keeps_x = ctx.needs_input_grad[1] or not isinstance(geometry, bool)
        ctx.save_for_backward(x if keeps_x else None, use.weight, mask_logits, use.temperature)
        ctx.use, ctx.geometry, ctx.dtype = use, geometry, x.dtype
        ctx.set_materialize_grads(False)
        masked_weight, l0, _ = ops.materialize(
            use.weight, mask_logits, use.temperature, use.hard, use.scale, ctx.dtype
        )  # fmt: skip
        out = _dense_forward(x, use.gather(masked_weight), bias, geometry)
        if not ctx.needs_input_grad[1]:
            ctx.mark_non_differentiable(l0)
        return out, l0

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dl0: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, mask_logits, temperature = ctx.saved_tensors
        use, mask = ctx.use, (weight, mask_logits, temperature)
        dx = dbias = None
        dmasked_weight = weight.new_zeros(()).expand(weight.shape)  # only l0: a zero that takes no memory
        if dout is not None:
            wants = list(ctx.needs_input_grad[:3])
            masked_weight = weight.new_empty(0)
            if wants[0]:
                shard, _, _ = ops.materialize(*mask, use.hard, use.scale, ctx.dtype)
                masked_weight = use.gather(shard)
            elif not isinstance(ctx.geometry, bool):  # asked for its shape alone
                masked_weight = weight.new_empty((), dtype=ctx.dtype).expand(use.whole.shape)
            dx, gradient, dbias = _dense_backward(dout, x, masked_weight, ctx.geometry, wants)
            del masked_weight
            if wants[1]:
                dmasked_weight = use.scatter(gradient)
        dlogits = None
        if ctx.needs_input_grad[1]:
            dlogits = ops.logits_grad(dmasked_weight, *mask, dl0, use.scale)
        return dx, dlogits, dbias, None, None
