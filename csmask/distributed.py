"""``shard_circuit``: masks over a model whose weights and logits are spread over processes.

Each process holds its share of the rows of weights, logits and optimizer states. Forward and backward gather masked
weights, not weights and logits; see ``sharded_op``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .circuit import CircuitModel
from .masked_layer import MaskedLayer
from .sharded_op import GatherAhead
from .shards import is_sharded


def shard_circuit(
    circuit: CircuitModel, mesh: Any = None, *, reduce_dtype: torch.dtype | None = None
) -> set[nn.Parameter]:
    """Spread the weights and logits of all masked layers over processes, in place.

    Each becomes a ``DTensor`` in shards along its dimension 0, on the mesh's device; any optimizer that steps DTensors
    trains them. Masked weights are gathered, each while the layer before it runs, and freed after their use, in forward
    and again in backward, and their gradients are averaged over processes where they are scattered. The logits of
    biases, which stay whole, are averaged as their gradients come. Call this in every process, with the same circuit,
    before the optimizer is made.
    What else the model holds stays whole; ``fully_shard`` takes it where it is told to ignore what this returns::

        ignored = shard_circuit(circuit, mesh)
        for block in circuit.blocks:
            fully_shard(block, mesh=mesh, ignored_params=ignored)
        fully_shard(circuit, mesh=mesh, ignored_params=ignored)

    Per weight in bf16 a process receives 2 bytes in forward, 2 in backward and 2 of gradients, less one share of each;
    ``fully_shard`` alone gathers 6, 6 and 4.

    Args:
        circuit: with masks of unit ``"weight"`` over frozen weights.
        mesh: a ``DeviceMesh`` of one dimension; by default all processes, on the type of device that the circuit is on.
        reduce_dtype: in which gradients of masked weights are added up over processes; by default in their own.

    Returns:
        The sharded parameters.

    Raises:
        RuntimeError: no process group.
        ValueError: a mesh of more dimensions, trained weights, masks of unit ``"neuron"``, execution ``"reference"``,
            an optimizer that has been made already, weights that are quantised or sharded already.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise RuntimeError("shard_circuit needs a process group: call torch.distributed.init_process_group() first")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(circuit, CircuitModel):
        raise TypeError(f"shard_circuit takes a CircuitModel, got {type(circuit).__name__}")
    layers = circuit.masked_layers
    if not layers:
        raise ValueError("the circuit was unloaded: it has no masked layers any more")
    for name, layer in layers.items():
        _check(name, layer)
    if mesh is None:
        device_type = circuit.mask_parameters()[0].device.type
        mesh = init_device_mesh(device_type, (torch.distributed.get_world_size(),))
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, got {mesh.ndim}: to shard within replicas use fully_shard")
    if mesh.size() != torch.distributed.get_world_size():
        raise ValueError(
            f"mesh must hold all {torch.distributed.get_world_size()} processes, got {mesh.size()}: gradients are not "
            "averaged over others; to shard within replicas use fully_shard"
        )
    device = torch.device(mesh.device_type)
    if device.type != "cpu":
        device = torch.device(device.type, torch.accelerator.current_device_index())

    def sharded(param: nn.Parameter) -> nn.Parameter:
        chunks = param.detach().chunk(mesh.size())
        mine = mesh.get_local_rank()
        rows = chunks[mine] if mine < len(chunks) else param.detach()[:0]
        shape, stride = param.shape, torch.empty(param.shape, device="meta").stride()
        local = rows.to(device, copy=True, memory_format=torch.contiguous_format)
        found = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        return nn.Parameter(found, requires_grad=param.requires_grad)

    ahead = GatherAhead()
    made: dict[int, nn.Parameter] = {}
    for layer in layers.values():
        for name in ("weight", "mask_logits"):
            param = getattr(layer, name)
            if id(param) not in made:
                made[id(param)] = sharded(param)
            setattr(layer, name, made[id(param)])
        for tensor in (layer.bias, layer.bias_mask_logits, layer.temperature):
            if tensor is not None:
                tensor.data = tensor.data.to(device)
        layer.gather_ahead, layer.reduce_dtype = ahead, reduce_dtype
        layer.masked_weight.drop()
        if layer.bias_mask_logits is not None:
            layer.bias_mask_logits.register_post_accumulate_grad_hook(_Average(mesh))
    circuit.register_forward_pre_hook(ahead.begin)
    return set(made.values())


class _Average:
    """Averages a gradient that has come to a parameter; what earlier micro-batches brought is the same everywhere."""

    def __init__(self, mesh: Any) -> None:
        self.mesh = mesh

    def __call__(self, param: Tensor) -> None:
        assert param.grad is not None
        torch.distributed.all_reduce(param.grad, group=self.mesh.get_group())
        param.grad /= self.mesh.size()


def _check(name: str, layer: MaskedLayer) -> None:
    if is_sharded(layer.weight):
        problem = "it is sharded already"
    elif layer.weight.is_meta:
        problem = "its weight is on the meta device: load it first"
    elif type(layer.weight) is not nn.Parameter:
        problem = "its weight is quantised"
    elif layer.mask_unit != "weight":
        problem = 'it has a logit for each neuron, no masked weight to gather: use mask_unit="weight", or fully_shard'
    elif layer.weight.requires_grad:
        problem = "its weight is trained, too: freeze the base, or use fully_shard"
    elif layer.execution == "reference":
        problem = 'its execution is "reference": choose "auto"'
    elif layer.leaf is not None:
        problem = "a csmask optimizer was made for it: make the optimizer afterwards"
    else:
        return
    raise ValueError(f"shard_circuit cannot shard layer {name!r}: {problem}")
