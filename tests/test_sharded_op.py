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


def sharded(dtype=torch.float32, reduce_dtype=None, **config):
    circuit = build(dtype, **config)
    ignored = shard_circuit(circuit, reduce_dtype=reduce_dtype)
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


KINDS = {
    "a loss of one's own": {"add_l0": False, **ALL},
    "in_kernel": {"execution": "in_kernel"},
    "rescaled": {"mask_hparams": {"rescale": True}},
    "mean": {"l0_reduction": "mean", "l0_lambda": 0.3},
}


@case
def kinds():
    return {name: trained("SGD", **config) for name, config in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_circuit_trains_as_one(results, kind):
    assert_as_one(result(results, "kinds")[kind], by_hand("SGD", **{**KINDS[kind], "execution": "reference"}))


@case
def with_fully_shard():
    """The rest of the model is FSDP's: biases and their logits, and layers that are not masked."""
    from torch.distributed.fsdp import fully_shard

    circuit, ignored = sharded(target_layers=["hidden", "gpt2", "one"], **ALL)
    for name in ("hidden", "gpt2"):
        fully_shard(getattr(circuit.wrapped_model, name), ignored_params=ignored)
    fully_shard(circuit, ignored_params=ignored)
    optimizer = OPTIMIZERS["AdamW"](circuit.mask_parameters())
    losses = train(circuit, optimizer, circuit, rank=torch.distributed.get_rank())
    return {"logits": logits(circuit), "losses": losses, "sizes": sizes(circuit)}


def test_beside_fully_shard(results):
    want = by_hand("AdamW", target_layers=["hidden", "gpt2", "one"], **ALL)
    assert_as_one(result(results, "with_fully_shard"), want)


@case
def bf16():
    return {str(dtype): trained("SGD", torch.bfloat16, reduce_dtype=dtype) for dtype in (None, torch.float32)}


@pytest.mark.parametrize("reduce_dtype", ["None", "torch.float32"])
def test_a_base_in_bf16(results, reduce_dtype):
    """The error against fp32 weights of the same values, in two processes, is that of one process, or near it."""
    got, exact = result(results, "bf16")[reduce_dtype]["logits"], exact_of_bf16()
    budget = (logits(by_hand("SGD", torch.bfloat16)) - exact).abs().max()
    assert (got - exact).abs().max() <= 2 * budget


@case
def accumulated():
    """Two micro-batches of two rows in each process."""
    circuit, _ = sharded(**ALL)
    optimizer, rank = OPTIMIZERS["SGD"](circuit.mask_parameters()), torch.distributed.get_rank()
    for step in range(two_processes.STEPS):
        circuit.temperature = 1.0 + step
        batch = rows(step, rank=rank)
        for half in range(2):
            part = {name: value[2 * half : 2 * half + 2] for name, value in batch.items()}
            (circuit(**part)["loss"] / 2).backward()
        optimizer.step(), optimizer.zero_grad()
    return logits(circuit)


def test_micro_batches_add_up(results):
    assert_close(result(results, "accumulated"), logits(by_hand("SGD", **ALL)))


@case
def evaluation():
    circuit, _ = sharded()
    randomize(circuit)
    return outputs(circuit)


def test_evaluation_and_ablations_are_those_of_one(results):
    got, want = result(results, "evaluation"), build()
    randomize(want)
    for mode, out in outputs(want).items():
        torch.testing.assert_close(got[mode], out, msg=mode)


@case
def saved():
    """Shards are saved by torch.distributed.checkpoint and loaded by FSDP's circuit; and the whole by itself."""
    import torch.distributed.checkpoint as dcp
    from test_fsdp import fsdp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    rank, folder = torch.distributed.get_rank(), two_processes.folder
    circuit, _ = sharded(**ALL)
    train(circuit, OPTIMIZERS["AdamW"](circuit.mask_parameters()), circuit, rank=rank)
    state = get_model_state_dict(circuit)
    dcp.save({"model": state}, checkpoint_id=folder / "shards")
    other = fsdp(build(**ALL))
    loaded = {"model": get_model_state_dict(other)}
    dcp.load(loaded, checkpoint_id=folder / "shards")
    set_model_state_dict(other, loaded["model"])
    circuit.save_pretrained(folder / "circuit")
    errors = [error_of(circuit.export), error_of(circuit.unload), error_of(lambda: shard_circuit(circuit))]
    return {"logits": logits(other), "temperature": other.temperature, "folder": folder, "errors": errors}


def test_shards_are_saved(results):
    from csmask import CircuitModel

    got, want = result(results, "saved"), by_hand("AdamW", **ALL)
    assert_close(got["logits"], logits(want))
    assert got["temperature"] == want.temperature
    circuit = CircuitModel.from_pretrained(build().unload(), got["folder"] / "circuit")
    assert_close(logits(circuit), logits(want))
    for error, text in zip(got["errors"], ("export() needs", "unload() needs", "sharded already"), strict=True):
        assert text in error


@case
def refused():
    from torch.distributed.device_mesh import init_device_mesh

    from csmask import MaskAdamW

    def made_first():
        circuit = build()
        made_first.optimizer = MaskAdamW(circuit.mask_parameters())
        shard_circuit(circuit)

    def eight_bits():
        MaskAdamW(sharded()[0].mask_parameters(), state_bits=8)

    return {
        "use state_bits=32": error_of(eight_bits),
        "neuron": error_of(lambda: shard_circuit(build(mask_hparams={"mask_unit": "neuron"}))),
        "trained": error_of(lambda: shard_circuit(build(freeze_base=False))),
        "reference": error_of(lambda: shard_circuit(build(execution="reference"))),
        "make the optimizer afterwards": error_of(made_first),
        "one dimension, got 2": error_of(lambda: shard_circuit(build(), init_device_mesh("cpu", (1, 2)))),
    }


def test_what_cannot_be_sharded_says_so(results):
    for text, error in result(results, "refused").items():
        assert error.startswith("ValueError: ")
        assert text in error
    with pytest.raises(RuntimeError, match="needs a process group"):
        shard_circuit(build())


@case
def exchanged():
    """Bytes that each process receives in one forward and backward, by collective."""
    from torch.distributed.fsdp import fully_shard
    from torch.utils._python_dispatch import TorchDispatchMode

    from csmask import CircuitConfig, CircuitModel

    counts: dict[str, dict] = {}

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.name()
            if name.startswith("c10d::"):
                tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if torch.is_tensor(t)]
                found = counts[how]
                found[name] = found.get(name, 0) + max(t.nbytes for t in tensors)
            return function(*args, **(kwargs or {}))

    for how in ("shard_circuit", "fully_shard"):
        net = torch.nn.Sequential(*(torch.nn.Linear(16, 16, bias=False) for _ in range(3))).bfloat16()
        circuit = CircuitModel(CircuitConfig(target_layers="all"), net)
        if how == "fully_shard":
            for layer in net:
                fully_shard(layer)
            fully_shard(circuit)
        else:
            shard_circuit(circuit)
        counts[how] = {}
        with Counting():
            circuit(torch.ones(4, 16, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    return counts


def test_two_bytes_per_weight_are_gathered(results):
    weights = 3 * 16 * 16
    for how, gathered, scattered in (("shard_circuit", 2 + 2, 2), ("fully_shard", 6 + 6, 4)):
        got = result(results, "exchanged")[how]
        assert got.pop("c10d::_allgather_base_") == gathered * weights, how
        assert got.pop("c10d::_reduce_scatter_base_") == scattered * weights, how
        assert not got
