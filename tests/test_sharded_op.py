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

    def unloaded():
        circuit = build()
        circuit.unload()
        shard_circuit(circuit)

    def without_weights():
        circuit = build().to("meta")
        hooks = len(circuit._forward_pre_hooks)
        error = error_of(lambda: shard_circuit(circuit))
        assert len(circuit._forward_pre_hooks) == hooks
        raise ValueError(error)

    replicas = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    return {
        "must hold all 2 processes, got 1": error_of(lambda: shard_circuit(build(), replicas["shard"])),
        "it has no masked layers any more": error_of(unloaded),
        "on the meta device: load it first": error_of(without_weights),
        "takes a CircuitModel, got str": error_of(lambda: shard_circuit("circuit")),
        "use state_bits=32": error_of(eight_bits),
        "neuron": error_of(lambda: shard_circuit(build(mask_hparams={"mask_unit": "neuron"}))),
        "trained": error_of(lambda: shard_circuit(build(freeze_base=False))),
        "reference": error_of(lambda: shard_circuit(build(execution="reference"))),
        "make the optimizer afterwards": error_of(made_first),
        "one dimension, got 2": error_of(lambda: shard_circuit(build(), init_device_mesh("cpu", (1, 2)))),
    }


def test_what_cannot_be_sharded_says_so(results):
    for text, error in result(results, "refused").items():
        assert error.startswith(("ValueError: ", "TypeError: "))
        assert text in error
    with pytest.raises(RuntimeError, match="needs a process group"):
        shard_circuit(build())


@case
def exchanged():
    """What each process exchanges in a forward and backward, and when: the first, and the third one.

    Returns by way and pass: (name, bytes) of collectives, and the names of matrix products between them.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.utils._python_dispatch import TorchDispatchMode

    from csmask import CircuitConfig, CircuitModel

    found: dict[str, list[list]] = {}

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.name()
            if name.startswith("c10d::"):
                tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if torch.is_tensor(t)]
                events.append((name.removeprefix("c10d::_"), max(t.nbytes for t in tensors)))
            elif name in ("aten::mm", "aten::addmm"):
                events.append(("product", 0))
            return function(*args, **(kwargs or {}))

    for how in ("shard_circuit", "in fp32", "fully_shard"):
        net = torch.nn.Sequential(*(torch.nn.Linear(16, 16, bias=False) for _ in range(3))).bfloat16()
        circuit = CircuitModel(CircuitConfig(target_layers="all"), net)
        if how == "fully_shard":
            for layer in net:
                fully_shard(layer)
            fully_shard(circuit)
        else:
            shard_circuit(circuit, reduce_dtype=torch.float32 if how == "in fp32" else None)
        found[how] = []
        for _ in range(3):
            events = []
            with Counting():
                circuit(torch.ones(4, 16, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
            found[how].append(events)
    return found


def test_two_bytes_per_weight_are_gathered(results):
    weights = 3 * 16 * 16
    for how, gathered, scattered in (("shard_circuit", 4, 2), ("in fp32", 4, 4), ("fully_shard", 12, 4)):
        for events in (result(results, "exchanged")[how][i] for i in (0, 2)):
            assert sum(n for name, n in events if name == "allgather_base_") == gathered * weights, how
            assert sum(n for name, n in events if name == "reduce_scatter_base_") == scattered * weights, how
            assert {name for name, _ in events} <= {"allgather_base_", "reduce_scatter_base_", "product"}


def test_the_next_masked_weight_is_on_its_way_while_a_layer_computes(results):
    """From the second pass on, when the order is known: at every product but the last layer's, one is asked for."""
    first, _, third = (
        "".join({"allgather_base_": "g", "reduce_scatter_base_": "s", "product": "p"}[name] for name, _ in events)
        for events in result(results, "exchanged")["shard_circuit"]
    )
    assert first == "gp" * 3 + "gpps" * 3
    assert third == "ggpgpp" + "ggppsgppspps"


class Wanderer(torch.nn.Module):
    """Runs its layers in whatever order it is told."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(3))

    def forward(self, x, order):
        for i in order:
            x = torch.tanh(self.layers[i](x))
        return x


def wander(shard: bool) -> list[torch.Tensor]:
    """Outputs and gradients, with changes that make what is on its way out of date."""
    from csmask import CircuitConfig, CircuitModel

    circuit = CircuitModel(CircuitConfig(target_layers="all", mask_hparams={"mask_init_value": 0.3}), Wanderer())
    if shard:
        shard_circuit(circuit)
    layers = circuit.wrapped_model.layers
    found = []
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    for step, order in enumerate([(0, 1, 2), (0, 1, 2), (0, 2), (0, 0, 1, 2, 1), (2, 1, 0), (2, 1, 0), (0, 1, 2)]):
        circuit.train(step != 4)
        found.append(circuit(x, order).detach())
        if step != 4:
            circuit(x, order).square().sum().backward()
        # The second layer's weight is asked for while the first computes: then its logits change.
        hidden = layers[0](x)
        with torch.no_grad():
            circuit.temperature = 1.5 + step
            for param in circuit.mask_parameters():
                param.mul_(-0.9)
        found.append(layers[1](hidden).detach())
    return [*found, *(two_processes.whole(p.grad) for p in circuit.mask_parameters())]


@case
def wandering():
    return wander(shard=True)


def test_an_order_that_changes_is_only_slower(results):
    for got, want in zip(result(results, "wandering"), wander(shard=False), strict=True):
        torch.testing.assert_close(got, want)


@case
def transformer():
    """A Llama that checkpoints, and whose blocks are FSDP's units, by every way of training in several processes."""
    from models import MODELS
    from torch.distributed.fsdp import fully_shard

    rank, found = torch.distributed.get_rank(), {}
    for how in ("ddp", "fully_shard", "shard_circuit"):
        circuit = llama()
        ignored = shard_circuit(circuit) if how == "shard_circuit" else None
        if how != "ddp":
            for block in circuit.wrapped_model.get_submodule(MODELS["llama"].block):
                fully_shard(block, ignored_params=ignored)
            fully_shard(circuit, ignored_params=ignored)
        model = torch.nn.parallel.DistributedDataParallel(circuit) if how == "ddp" else circuit
        optimizer = OPTIMIZERS["MaskAdamW"](circuit.mask_parameters())
        for step in range(3):
            model(**MODELS["llama"].batch(2 * step + rank)).loss.backward()
            optimizer.step(), optimizer.zero_grad()
        found[how] = logits(circuit)
    return found


def llama(**config):
    from models import MODELS

    from csmask import CircuitConfig, CircuitModel

    settings = {"target_layers": "all-linear", "l0_lambda": 1e-3, "mask_hparams": {"mask_init_value": 0.1}, **config}
    circuit = CircuitModel(CircuitConfig(**settings), MODELS["llama"].build(dropout=0.1))
    circuit.gradient_checkpointing_enable({"use_reentrant": False})
    return circuit


@pytest.mark.parametrize("how", ["ddp", "fully_shard", "shard_circuit"])
def test_a_transformer_that_checkpoints(results, how):
    from models import MODELS

    want = llama(execution="reference")
    optimizer = OPTIMIZERS["AdamW"](want.mask_parameters())
    for step in range(3):
        halves = [MODELS["llama"].batch(2 * step + rank) for rank in range(2)]
        want(**{name: torch.cat([half[name] for half in halves]) for name in halves[0]}).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    assert_close(result(results, "transformer")[how], logits(want))
