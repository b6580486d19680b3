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
    assert got["losses"] == pytest.approx(want.losses, rel=1e-5)
    assert set(got["waits"]) == {optimizer.startswith("Mask")}
    for name, value in want.telemetry().items():
        assert got["telemetry"][name] == pytest.approx(value, rel=1e-5), name


@case
def eight_bits():
    found = in_ddp("MaskAdamW", {"state_bits": 8})
    del found["optimizer"]
    return found


def test_ddp_with_states_in_8_bits(results):
    got = result(results, "eight_bits")
    want = build()
    train(want, OPTIMIZERS["MaskAdamW"](want.mask_parameters(), state_bits=8), want)
    assert_close(got["logits"], logits(want), bound=1e-4)
    assert "exp_avg_codes" in got["states"]


@case
def accelerate():
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    found = {}
    for name in ("AdamW", "MaskAdamW"):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        assert accelerator.num_processes == 2
        circuit = build()
        optimizer = OPTIMIZERS[name](circuit.mask_parameters())
        data = [{k: v[i] for k, v in rows(step).items()} for step in range(two_processes.STEPS) for i in range(8)]
        model, optimizer, loader = accelerator.prepare(circuit, optimizer, DataLoader(data, batch_size=2))
        assert model.module is circuit
        for i, batch in enumerate(loader):
            circuit.temperature = 1.0 + i // 2
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step(), optimizer.zero_grad()
        found[name] = logits(circuit)
    return found


@pytest.mark.parametrize("optimizer", ["AdamW", "MaskAdamW"])
def test_accelerate_accumulates_and_clips_as_one(results, optimizer):
    """Two processes, two micro-batches of two rows each; the norm is that of the large batch's gradient."""
    got = result(results, "accelerate")[optimizer]
    want = build(execution="reference")
    adamw = OPTIMIZERS["AdamW"](want.mask_parameters())
    for step in range(two_processes.STEPS):
        want.temperature = 1.0 + step
        want(**rows(step))["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(want.mask_parameters(), 0.05)
        assert norm > 0.06
        adamw.step(), adamw.zero_grad()
    assert_close(got, logits(want))
