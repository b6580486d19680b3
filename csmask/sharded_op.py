"""A masked layer whose weight and logits are sharded: each process makes its shard of the masked weight.

The shards of the masked weight are what is gathered, for the time of one operation, and its gradient is scattered: of a
weight in bf16, 2 bytes each time, where gathering weight and logits would take 6. The chain rule to the logits runs on
the shard. While a layer computes, the masked weight of the next one is on its way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import shards
from ._ops import ops
from .autograd import _dense_backward, _dense_forward
from .first_derivative import first_derivative_only


@dataclasses.dataclass(frozen=True)
class _Shard:
    """What makes a masked weight: shards of weight and logits, without history, and the mask; ``whole``: the weight."""

    whole: Any
    weight: Tensor
    logits: Tensor
    temperature: Tensor
    hard: bool
    scale: float
    dtype: torch.dtype

    @property
    def group(self) -> Any:
        return self.whole.device_mesh.get_group()

    @property
    def state(self) -> Any:
        """Changes when the masked weight does."""
        tensors = (self.weight, self.logits, self.temperature)
        return tuple((t.data_ptr(), t._version) for t in tensors)


class _Gathered:
    """A masked weight on its way: ``value`` and ``l0`` (of this process's shard) are right after ``work.wait()``."""

    @torch.no_grad()
    def __init__(self, shard: _Shard, key: Any) -> None:
        self.key, self.state = key, shard.state
        mask = (shard.weight, shard.logits, shard.temperature, shard.hard, shard.scale, shard.dtype)
        masked_weight, self.l0, _ = ops.materialize(*mask)
        rows, size = shard.whole.shape[0], shard.whole.device_mesh.size()
        per_shard = -(-rows // size)  # shards of equal size, of which the last ones may end in nothing
        self._sent = _with_rows(masked_weight, per_shard)
        received = masked_weight.new_empty((per_shard * size, *masked_weight.shape[1:]))
        self.work = _collective("all_gather_single")(received, self._sent, group=shard.group, async_op=True)
        self.value = received[:rows]


class GatherAhead:
    """Gathers masked weights, each while the layer before it computes, in the order of the pass before.

    All processes run the same layers in the same order, as their exchanges must; so they guess alike, too.
    """

    def __init__(self) -> None:
        self._after: dict[Any, tuple[Any, _Shard] | None] = {}  # by key; None where it was not always the same
        self._last: Any = None
        self._pending: _Gathered | None = None

    def begin(self, *_: Any) -> None:
        """A pass over the model begins; a hook of its forward."""
        self._last = None

    def gather(self, shard: _Shard, in_backward: bool) -> _Gathered:
        """The whole masked weight of a shard, and the next one is on its way."""
        again = not in_backward and torch._C._current_graph_task_id() != -1  # a checkpointed forward
        key = (in_backward or again, again, id(shard.whole), shard.hard, shard.dtype)
        found, self._pending = self._pending, None
        if found is not None:
            found.work.wait()
        if found is None or (found.key, found.state) != (key, shard.state):
            found = _Gathered(shard, key)
            found.work.wait()
        if self._last is not None and self._last[0] == key[0]:
            before = self._after.get(self._last, (key, shard))
            self._after[self._last] = (key, shard) if before is not None and before[0] == key else None
        self._last = key
        following = self._after.get(key)
        if following is not None:
            self._pending = _Gathered(following[1], following[0])
        return found


class ShardedUse:
    """One use of a sharded layer, in the place of ``functional``'s ``lean``.

    Args:
        weight, mask_logits: ``DTensor`` in shards along dimension 0 over a mesh of one dimension.
        temperature, hard, scale: of the mask.
        ahead: what gathers.
        reduce_dtype: in which the masked weight's gradients of all processes are added up; its own by default.

    Attributes:
        anchor: the shard of the logits.
        l0: of this shard, once the operation has run.

    Raises:
        NotImplementedError: tensors that are sharded in another way.
    """

    def __init__(
        self, weight: Any, mask_logits: Any, temperature: Tensor, hard: bool, scale: float, ahead: GatherAhead | None,
        reduce_dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        for tensor in (weight, mask_logits):
            placements = tensor.placements if shards.is_sharded(tensor) else None
            if placements is None or len(placements) != 1 or not placements[0].is_shard(dim=0):
                raise NotImplementedError(shards.OTHER_SHARDS.format(found=f"placements {placements}"))
        self.whole, self.temperature, self.hard, self.scale = weight, temperature, hard, scale
        self.weight, self.anchor, self.reduce_dtype = shards.local(weight), shards.local(mask_logits), reduce_dtype
        self.ahead = GatherAhead() if ahead is None else ahead
        self.l0: Tensor | None = None

    def apply(self, x: Tensor, mask_logits: Tensor, bias: Tensor | None, _: Any, geometry: Any) -> Tensor:
        """The operation; ``geometry`` is as in ``autograd.MaskedOp``."""
        out, self.l0 = ShardedOp.apply(x, mask_logits, bias, self, geometry)
        return out

    def gather(self, dtype: torch.dtype, in_backward: bool) -> _Gathered:
        """The whole masked weight."""
        mask = (self.weight, self.anchor.detach(), self.temperature, self.hard, self.scale)
        return self.ahead.gather(_Shard(self.whole, *mask, dtype), in_backward)

    def scatter(self, gradient: Tensor) -> Tensor:
        """This process's shard of the mean over all processes, in fp32 or higher."""
        mesh = self.whole.device_mesh
        per_shard = -(-gradient.shape[0] // mesh.size())
        gradient = gradient.to(self.reduce_dtype or gradient.dtype)
        shard = gradient.new_empty((per_shard, *gradient.shape[1:]))
        _collective("reduce_scatter_single")(
            shard, _with_rows(gradient, per_shard * mesh.size()), group=mesh.get_group()
        )
        shard = shard[: self.weight.shape[0]]
        return (shard.float() if shard.dtype.itemsize < 4 else shard) / mesh.size()


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
        gathered = use.gather(x.dtype, in_backward=False)
        out, l0 = _dense_forward(x, gathered.value, bias, geometry), gathered.l0
        if not ctx.needs_input_grad[1]:
            ctx.mark_non_differentiable(l0)
        return out, l0

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dout: Tensor | None, dl0: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, mask_logits, temperature = ctx.saved_tensors
        use, mask = ctx.use, (weight, mask_logits, temperature)
        dx = dbias = None
        dmasked_weight = weight.new_zeros(()).expand(weight.shape)  # only l0: a zero that takes no memory
        if dout is not None:
            wants = list(ctx.needs_input_grad[:3])
            masked_weight = weight.new_empty(0)
            if wants[0]:
                masked_weight = use.gather(ctx.dtype, in_backward=True).value
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
