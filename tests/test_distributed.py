"""Two processes with half of the rows each train the masks that one process trains: DDP, Accelerate."""

from __future__ import annotations

import pytest
import torch
import two_processes
from two_processes import OPTIMIZERS, assert_close, build, by_hand, case, logits, result, rows, train

pytestmark = pytest.mark.dropin


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return two_processes.run("test_distributed", tmp_path_factory.mktemp("two"))


def in_ddp(optimizer: str, settings=None, **config):
    circuit = build(**config)
    optimizer = OPTIMIZERS[optimizer](circuit.mask_parameters(), **(settings or {}))
    model = torch.nn.parallel.DistributedDataParallel(circuit)
    losses = train(model, optimizer, circuit, rank=torch.distributed.get_rank())
    return {
        "logits": logits(circuit),
        "losses": losses,
        "waits": [layer.waits for layer in circuit.masked_layers.values()],
        "telemetry": circuit.telemetry(),
        "optimizer": optimizer,
        "states": {k for state in optimizer.state.values() for k in state},
    }


@case
def ddp():
    found = {}
    for name in OPTIMIZERS:
        found[name] = in_ddp(name, mask_hparams={"mask_bias": True})
        del found[name]["optimizer"]
    return found


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ddp_trains_as_one(results, optimizer):
    got = result(results, "ddp")[optimizer]
    want = by_hand(optimizer.removeprefix("Mask"), mask_hparams={"mask_bias": True})
    assert_close(got["logits"], logits(want))
    assert set(got["waits"]) == {optimizer.startswith("Mask")}
    for name, value in want.telemetry().items():
        assert got["telemetry"][name] == pytest.approx(value, rel=1e-5), name
