"""Runs cases in two processes that train together (gloo, on the CPU): started once for all cases of a test file."""

from __future__ import annotations

import datetime
import importlib
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from csmask import CircuitConfig, CircuitModel

TESTS = Path(__file__).parent
L0_LAMBDA = 2e-3  # the term is about as large as the loss
STEPS, ROWS = 4, 8
CASES: dict[str, Callable[[], object]] = {}
folder = Path()  # that the cases write to


def case(function: Callable[[], object]) -> Callable[[], object]:
    """Mark what both processes run; what rank 0 returns is the result."""
    CASES[function.__name__] = function
    return function


class Net(nn.Module):
    """Every type of layer, with sizes that two processes cannot halve; returns loss and logits as a dict."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.conv = nn.Conv1d(2, 3, 3, padding=1)
        self.hidden = nn.Linear(12, 7)
        self.gpt2 = Conv1D(8, 7)  # weight (7, 8)
        self.one = nn.Linear(8, 1)
        self.head = nn.Linear(8, 5, bias=False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        x = torch.tanh(self.hidden(torch.tanh(self.conv(x)).flatten(1)))
        x = torch.tanh(self.gpt2(x))
        logits = self.head(x) + self.one(x)
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits.float(), labels)}
        return {"logits": logits, **loss}


def build(dtype: torch.dtype = torch.float32, **config) -> CircuitModel:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for param in net.parameters():
            param.normal_(std=0.5)
    hparams = {"mask_init_value": 0.1, **config.pop("mask_hparams", {})}
    settings = {"target_layers": "all", "l0_lambda": L0_LAMBDA, "mask_hparams": hparams, **config}
    return CircuitModel(CircuitConfig(**settings), net.to(dtype))


def rows(step: int, dtype: torch.dtype = torch.float32, rank: int | None = None) -> dict[str, torch.Tensor]:
    """A batch of 8 rows, or a rank's half of it."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, 2, 4, generator=generator).to(dtype)
    labels = torch.randint(5, (ROWS,), generator=generator)
    chosen = slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
    return {"x": x[chosen], "labels": labels[chosen]}


def mean(loss: torch.Tensor) -> float:
    """Of all processes."""
    loss = loss.detach().clone()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(loss)
        loss /= torch.distributed.get_world_size()
    return loss.item()


def train(model, optimizer, circuit, dtype=torch.float32, rank=None, steps=STEPS, first=0) -> list[float]:
    """Logged losses; a circuit without the l0 term in its loss gets it by hand, in each process another share of it."""
    losses = []
    for step in range(first, first + steps):
        circuit.temperature = 1.0 + step
        loss = model(**rows(step, dtype, rank))["loss"]
        if not circuit.circuit_config.add_l0:
            loss = loss + (1.0 if rank is None else 0.5 + rank) * L0_LAMBDA * circuit.l0()
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(mean(loss))
    return losses


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Of a sharded tensor the whole."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def logits(circuit: CircuitModel) -> torch.Tensor:
    return torch.cat([whole(p.detach()).flatten() for p in circuit.mask_parameters()])


def by_hand(optimizer: str = "AdamW", dtype=torch.float32, settings=None, **config) -> CircuitModel:
    """The same training in one process, in plain torch."""
    circuit = build(dtype, **{"execution": "reference", **config})
    stepper = OPTIMIZERS[optimizer](circuit.mask_parameters(), **(settings or {}))
    circuit.losses = train(circuit, stepper, circuit, dtype)
    return circuit


def _optimizers() -> dict[str, Callable]:
    import csmask

    adamw, sgd = {"lr": 0.1, "eps": 1e-4, "weight_decay": 0.01}, {"lr": 2.0, "momentum": 0.5}
    classes = {
        "AdamW": (torch.optim.AdamW, adamw), "MaskAdamW": (csmask.MaskAdamW, adamw),
        "SGD": (torch.optim.SGD, sgd), "MaskSGD": (csmask.MaskSGD, sgd),
    }  # fmt: skip
    return {name: lambda p, c=c, d=d, **more: c(p, **{**d, **more}) for name, (c, d) in classes.items()}


OPTIMIZERS = _optimizers()


def assert_close(got: torch.Tensor, want: torch.Tensor, start: float = 0.1, bound: float = 1e-5) -> None:
    """What training moved, within a bound of the largest move."""
    error, moved = (got - want).abs().max(), (want - start).abs().max()
    assert moved > 1e-3
    assert error <= bound * moved + 1e-7, f"{error:.3g} of {moved:.3g}"


def run(module: str, path: Path) -> dict[str, object]:
    """Run the cases of a module in two processes; the results by name, a traceback (str) where one failed."""
    processes = []
    for rank in range(2):
        # Accelerate asks for an address, which nobody listens at.
        variables = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": "1",
                     "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}  # fmt: skip
        command = [sys.executable, "-c", f"import two_processes; two_processes.one_of_two({module!r}, {str(path)!r})"]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, env=variables, stdout=pipe, stderr=subprocess.STDOUT, text=True))
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return torch.load(path / "results.pt", weights_only=False)


def one_of_two(module: str, path: str) -> None:
    """What each of two processes runs."""
    global folder
    folder = Path(path)
    torch.set_num_threads(1)
    # A file to meet at: a port that is found free may be taken a moment later.
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=int(os.environ["RANK"]), world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    importlib.import_module(module)
    results = {}
    for name, function in CASES.items():
        try:
            results[name] = function()
        except Exception:  # noqa: BLE001, the test of this case shows it
            results[name] = traceback.format_exc()
        torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.barrier()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)  # a process group of gloo that is taken down by Python aborts now and then


def result(results: dict[str, object], name: str) -> object:
    """What a case returned."""
    found = results[name]
    assert not isinstance(found, str), found
    return found
