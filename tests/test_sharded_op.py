"""Circuits in shards (``shard_circuit``): the training of one process, and 2 bytes per weight and exchange."""

from __future__ import annotations

import pytest
import torch
import two_processes
from test_fsdp import assert_as_one, error_of, exact_of_bf16, outputs, randomize, sizes
from two_processes import OPTIMIZERS, assert_close, build, by_hand, case, logits, result, rows, train

from csmask.distributed import shard_circuit

pytestmark = pytest.mark.dropin
two_processes.CASES.clear()  # those of test_fsdp
ALL = {"mask_hparams": {"mask_bias": True}}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return two_processes.run("test_sharded_op", tmp_path_factory.mktemp("two"))


def sharded(dtype=torch.float32, **config):
    circuit = build(dtype, **config)
    ignored = shard_circuit(circuit)
    return circuit, ignored


def trained(name: str, dtype=torch.float32, settings=None, **config) -> dict[str, object]:
    circuit, _ = sharded(dtype, **config)
    optimizer = OPTIMIZERS[name](circuit.mask_parameters(), **(settings or {}))
    losses = train(circuit, optimizer, circuit, dtype, torch.distributed.get_rank())
    return {"logits": logits(circuit), "losses": losses, "sizes": sizes(circuit)}


@case
def training():
    return {name: trained(name, **ALL) for name in OPTIMIZERS}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_shards_train_as_one(results, optimizer):
    assert_as_one(result(results, "training")[optimizer], by_hand(optimizer.removeprefix("Mask"), **ALL))
