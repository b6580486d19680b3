"""Tensors of which each process holds a shard (``DTensor``): sums over all shards, and the whole tensor.

``fully_shard`` and ``distributed.shard_circuit`` leave parameters so. A loss is that of one process, and gradients are
averaged over processes: the gradient of a sum over shards is therefore the mean of what comes to it in each process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

OTHER_SHARDS = (
    "a masked layer takes plain inputs, and weights that are whole or sharded along dimension 0 over a mesh of one "
    "dimension, as fully_shard and shard_circuit leave them; got {found}. For tensor parallelism see "
    "docs/tensor_parallel.md"
)


def in_several_processes() -> bool:
    """Whether this is one of several processes that train together."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed and torch.distributed.get_world_size() > 1


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether a tensor is a ``DTensor``."""
    if tensor is None or type(tensor) in (Tensor, nn.Parameter) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # takes two seconds

    return isinstance(tensor, DTensor)


def local(tensor: Any) -> Tensor:
    """This process's shard, differentiable, or the tensor itself where it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Any) -> Tensor:
    """The whole tensor; of a sharded one, every process has to call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def check_whole(tensors: Iterable[Tensor], what: str) -> None:
    """Raise a ``NotImplementedError`` that names ``what``, which needs whole tensors, if one is sharded."""
    if any(is_sharded(tensor) for tensor in tensors):
        raise NotImplementedError(
            f"{what} needs whole weights, and these are sharded over processes: save_pretrained() in every process, "
            f"then, in one, CircuitModel.from_pretrained(model, directory) and {what}"
        )


class Part(NamedTuple):
    """What this process's shard adds to a sum: ``value``, 0-d or counts; the tensor, None where it is not sharded."""

    value: Tensor
    of: Any = None


def part(tensor: Tensor, count: Callable[[Tensor], Tensor]) -> Part:
    """``count`` of a tensor, or of its shard."""
    return Part(count(local(tensor)), tensor if is_sharded(tensor) else None)


def over_shards(tensor: Tensor, count: Callable[[Tensor], Tensor]) -> Tensor:
    """``count`` of a tensor, or the sum of ``count`` over its shards; every process has to call this."""
    return total([part(tensor, count)])


def total(parts: Iterable[Part], device: torch.device | None = None) -> Tensor:
    """The sum of parts, those of shards over all processes: one exchange for all tensors that are sharded alike."""
    values: dict[Any, list[Tensor]] = {}
    shard_of: dict[Any, Any] = {}
    for value, of in parts:
        key = None if of is None else (id(of.device_mesh), of.placements)
        values.setdefault(key, []).append(value if device is None else value.to(device))
        shard_of[key] = of
    result: Tensor | None = None
    for key, of in shard_of.items():
        # Two launches for any number of parts, and of one part none: counts are tensors of one dimension.
        found = values[key][0] if len(values[key]) == 1 else torch.stack(values[key]).sum(0)
        found = found if of is None else _SumOverShards.apply(found, of.device_mesh, of.placements)
        result = found if result is None else result + found
    return torch.zeros((), device=device) if result is None else result


@contextlib.contextmanager
def one_writer(shared: bool) -> Iterator[bool]:
    """Whether this process is the one that writes a file for all; where it is, the others wait for the end.

    Args:
        shared: whether all processes are here; if not, each writes for itself.
    """
    shared = shared and in_several_processes()
    try:
        yield not shared or torch.distributed.get_rank() == 0
    finally:
        if shared:
            torch.distributed.barrier()


class _SumOverShards(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, mesh: Any, placements: Any) -> Tensor:
        ctx.mesh = mesh
        value = value.clone()
        for dim, placement in enumerate(placements):
            if placement.is_shard():
                torch.distributed.all_reduce(value, group=mesh.get_group(dim))
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.clone()
        for dim in range(ctx.mesh.ndim):
            torch.distributed.all_reduce(grad, group=ctx.mesh.get_group(dim))
        return grad / ctx.mesh.size(), None, None
