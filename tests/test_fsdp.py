"""Circuits whose parameters are sharded over two processes: ``fully_shard`` (FSDP2)."""

from __future__ import annotations

import pytest
import torch
import two_processes
from two_processes import OPTIMIZERS, assert_close, build, by_hand, case, logits, result, rows, train

from csmask import CircuitModel, TemperatureSchedule

pytestmark = pytest.mark.dropin
ALL = {"mask_hparams": {"mask_bias": True}}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return two_processes.run("test_fsdp", tmp_path_factory.mktemp("two"))


def fsdp(circuit):
    from torch.distributed.fsdp import fully_shard

    for name in ("hidden", "gpt2", "one"):
        fully_shard(getattr(circuit.wrapped_model, name))
    return fully_shard(circuit)


def sizes(circuit) -> dict[str, object]:
    return {
        **circuit.telemetry(),
        "statistics": circuit.compute_l0_statistics(),
        "density": circuit.density(),
        "undecided": circuit.undecided_fraction(),
    }


def trained(name: str, dtype=torch.float32, **config) -> dict[str, object]:
    circuit = fsdp(build(dtype, **config))
    optimizer = OPTIMIZERS[name](circuit.mask_parameters())
    train(circuit, optimizer, circuit, dtype, torch.distributed.get_rank())
    return {"logits": logits(circuit), "sizes": sizes(circuit)}


@case
def training():
    return {name: trained(name, **ALL) for name in OPTIMIZERS}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fully_shard_trains_as_one(results, optimizer):
    got, want = result(results, "training")[optimizer], by_hand(optimizer.removeprefix("Mask"), **ALL)
    assert_close(got["logits"], logits(want))
    for name, value in sizes(want).items():
        assert got["sizes"][name] == (value if name == "statistics" else pytest.approx(value, rel=1e-5)), name
