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
def own_loss():
    found = in_ddp("MaskAdamW", add_l0=False, mask_hparams={"mask_bias": True})
    del found["optimizer"]
    return found


def test_a_loss_of_ones_own(results):
    """With l0 in shares of a half and one and a half."""
    got, want = result(results, "own_loss"), by_hand("AdamW", add_l0=False, mask_hparams={"mask_bias": True})
    assert_close(got["logits"], logits(want))
    assert got["losses"] == pytest.approx(want.losses, rel=1e-5)


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


# Tensor parallelism, by hand: docs/tensor_parallel.md


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        torch.distributed.all_reduce(grad)
        return grad


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


class Mlp(torch.nn.Module):
    """Two linear layers; with a rank, the half of them that one of two processes holds."""

    def __init__(self, rank: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        whole = [torch.nn.Linear(6, 8), torch.nn.Linear(8, 5)]
        self.rank, mine = rank, slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
        width = 8 if rank is None else 4
        self.up, self.down = torch.nn.Linear(6, width), torch.nn.Linear(width, 5, bias=not rank)
        with torch.no_grad():
            self.up.weight.copy_(whole[0].weight[mine]), self.up.bias.copy_(whole[0].bias[mine])
            self.down.weight.copy_(whole[1].weight[:, mine])
            if not rank:
                self.down.bias.copy_(whole[1].bias)

    def forward(self, x):
        x = x if self.rank is None else _Copy.apply(x)
        x = self.down(torch.tanh(self.up(x)))
        return x if self.rank is None else _Sum.apply(x)


def one_step(unit: str, rank: int | None) -> dict[str, torch.Tensor]:
    """Output, loss with l0, gradients and l0; of two processes put together again."""
    from csmask import CircuitConfig, CircuitModel

    hparams = {"mask_bias": True, "mask_unit": unit}
    circuit = CircuitModel(CircuitConfig(target_layers="all", mask_hparams=hparams), Mlp(rank))
    up, down = circuit.masked_layers.values()
    # Of each parameter the dimension that is split, if one is.
    split = {"up": 0, "up bias": 0, "down": 1 if unit == "weight" else None, "down bias": None}
    params = {"up": up.mask_logits, "up bias": up.bias_mask_logits, "down": down.mask_logits}
    if not rank:
        params["down bias"] = down.bias_mask_logits
    for i, (name, param) in enumerate(params.items()):
        shape = list(param.shape)
        if rank is not None and split[name] is not None:
            shape[split[name]] *= 2
        values = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        if shape != list(param.shape):
            values = values.narrow(split[name], 4 * rank, 4)
        with torch.no_grad():
            param.copy_(values)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(9), requires_grad=True)
    out, l0 = circuit(x), circuit.l0()
    l0 = l0 if rank is None else _Sum.apply(l0)
    (out.square().mean() + 0.01 * l0).backward()
    found = {"out": out, "l0": l0, "dx": x.grad, **{name: param.grad for name, param in params.items()}}
    if rank is None:
        return found
    if unit == "neuron":
        torch.distributed.all_reduce(found["down"])
    for name, dim in split.items():
        if dim is not None:
            parts = [torch.empty_like(found[name]) for _ in range(2)]
            torch.distributed.all_gather(parts, found[name].contiguous())
            found[name] = torch.cat(parts, dim)
    return {name: value.detach() for name, value in found.items()}


@case
def tensor_parallel():
    return {unit: one_step(unit, torch.distributed.get_rank()) for unit in ("weight", "neuron")}


@pytest.mark.parametrize("unit", ["weight", "neuron"])
def test_a_column_and_a_row_split_are_the_whole_layers(results, unit):
    got, want = result(results, "tensor_parallel")[unit], one_step(unit, None)
    assert list(got) == list(want)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value.detach(), msg=name)


@case
def dtensors_of_tensor_parallelism():
    """torch's own styles: refused in words."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    from csmask import CircuitConfig, CircuitModel

    found = []
    for layer, style in (("up", ColwiseParallel), ("down", RowwiseParallel)):
        circuit = CircuitModel(CircuitConfig(target_layers="all"), Mlp())
        parallelize_module(circuit.wrapped_model, init_device_mesh("cpu", (2,)), {layer: style()})
        try:
            circuit(torch.zeros(2, 6))
            found.append("none")
        except NotImplementedError as error:
            found.append(str(error))
    return found


def test_other_shards_are_refused(results):
    for error in result(results, "dtensors_of_tensor_parallelism"):
        assert "see docs/tensor_parallel.md" in error
