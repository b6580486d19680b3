"""A circuit over several processes that each hold a share of the model: FSDP2.

A small network in bf16 is masked, and weights, mask logits and optimizer states are spread over two processes.
There are two ways, and this script trains by either:

* ``fully_shard`` alone (``--how fully_shard``): as for any model; gathers weights and logits, 6 bytes per weight;
* ``shard_circuit`` for what is masked and ``fully_shard`` for the rest: gathers masked weights, 2 bytes per weight.

The task is made up: which of 4 regions of the plane do the first two of 16 numbers lie in? Run
``python examples/fsdp.py``, which starts two processes on the CPU and takes a quarter of a minute, or
``torchrun --nproc-per-node 8 examples/fsdp.py`` on GPUs.
"""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from csmask import CircuitConfig, CircuitModel, MaskAdamW, TemperatureSchedule
from csmask.distributed import shard_circuit


class Block(nn.Module):
    """A residual block, the unit that FSDP gathers at once."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Network(nn.Module):
    """16 numbers to 4 classes."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(16, width), nn.Linear(width, 4)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.to(self.stem.weight.dtype))
        for block in self.blocks:
            x = block(x)
        return self.head(x).float()


def rows(count: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and classes: the sign of the first number, and whether it is nearer to 0 than the second."""
    x = torch.randn(count, 16, generator=torch.Generator().manual_seed(seed)).to(device)
    return x, 2 * (x[:, 0] > 0).long() + (x[:, 0].abs() < x[:, 1].abs()).long()


def base_model(steps: int, device: torch.device) -> nn.Module:
    """A model that has learnt the task; in life, ``from_pretrained`` in every process."""
    torch.manual_seed(0)
    model = Network().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        x, y = rows(256, step, device)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step(), optimizer.zero_grad()
    for param in model.parameters():
        dist.broadcast(param.detach(), 0)  # every process has the same
    return model.bfloat16()


def shard(circuit: CircuitModel, how: str, device: torch.device) -> None:
    """Spread the circuit's parameters over all processes; optimizers are made afterwards."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    ignored = shard_circuit(circuit, mesh) if how == "shard_circuit" else None
    for block in circuit.blocks:
        fully_shard(block, mesh=mesh, ignored_params=ignored)
    fully_shard(circuit, mesh=mesh, ignored_params=ignored)


def train(circuit: CircuitModel, steps: int, device: torch.device) -> None:
    """Each process trains on its own rows; gradients are averaged, and the l0 term counts once."""
    optimizer = MaskAdamW(circuit.mask_parameters(), lr=0.05)
    schedule = TemperatureSchedule(circuit, total=steps)
    for step in range(steps):
        seed = 10**6 + dist.get_world_size() * step + dist.get_rank()
        x, y = rows(256 // dist.get_world_size(), seed, device)
        loss = nn.functional.cross_entropy(circuit(x), y) + circuit.l0_lambda * circuit.l0()
        loss.backward()
        optimizer.step(), optimizer.zero_grad(), schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, device: torch.device) -> float:
    """On rows that no training has seen; the same in every process."""
    x, y = rows(1000, 10**9, device)
    return (model.eval()(x).argmax(-1) == y).float().mean().item()


def work(options: argparse.Namespace) -> dict[str, float]:
    """What every process does."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    model = base_model(options.model_steps, device)
    result = {"full": accuracy(model, device)}
    config = CircuitConfig(target_layers="all", mask_hparams={"mask_init_value": 0.05}, l0_lambda=1e-5)
    circuit = CircuitModel(config, model)
    shard(circuit, options.how, device)
    train(circuit, options.mask_steps, device)
    result |= {"circuit": accuracy(circuit, device), "kept": circuit.density()}
    circuit.set_ablate_mode("zero_ablate")
    result["ablated"] = accuracy(circuit, device)
    if dist.get_rank() == 0:
        print(", ".join(f"{name} {value:.3f}" for name, value in result.items()), flush=True)
    circuit.save_pretrained(options.output)  # gathers: every process calls it, and one writes
    dist.destroy_process_group()
    return result


def one_of(rank: int, port: int, processes: int, options: argparse.Namespace) -> None:
    """What torchrun does for a process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    work(options)


def main(arguments: Sequence[str] | None = None) -> None:
    """Under torchrun one of its processes; else start two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--how", choices=["shard_circuit", "fully_shard"], default="shard_circuit")
    parser.add_argument("--model-steps", type=int, default=300)
    parser.add_argument("--mask-steps", type=int, default=150)
    parser.add_argument("--output", type=Path, default=Path("runs/fsdp"))
    options = parser.parse_args(arguments)
    if "RANK" in os.environ:
        work(options)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(one_of, (port, 2, options), nprocs=2)


if __name__ == "__main__":
    main()
