"""Train the masks of one circuit, with a state on disk from which an interrupted training goes on unchanged."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint import write_atomically
from ..circuit import CircuitModel
from ..config import DEFAULT_L0_LAMBDA, CircuitConfig
from ..optim import MaskAdamW
from ..schedule import TemperatureSchedule
from .task import EncodedItem, Head, collate, word_states

RECORD_EVERY = 5  # steps between two looks at the hard mask
SAVE_EVERY = 50  # steps between two saves of the state, for a process that is killed
_POOL = 8  # batches that are sorted by length together


@dataclass(frozen=True)
class Settings:
    """What determines a training, besides the model, the head and the items.

    l0_lambda: weight of the mean l0 (the kept fraction) against the mean cross-entropy; not with an ``l0_target``
    l0_target: fraction of the weights to keep in the end, to which lambda is driven; None for ``l0_lambda``
    stop_undecided: stop when fewer weights than this share are undecided; None to take all steps
    init_noise: standard deviation of the noise on the logits' start value; with the batch order, what ``seed`` decides
    execution: when the mask is computed, see ``CircuitConfig``; the same numbers but for rounding
    """

    seed: int = 0
    steps: int = 150
    batch_size: int = 32
    learning_rate: float = 0.02
    l0_lambda: float = 25.0
    mask_init_value: float = 0.02
    init_noise: float = 0.005
    max_temperature: float = 200.0
    execution: str = "auto"
    l0_target: float | None = None
    stop_undecided: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.stop_undecided is not None and not 0 < self.stop_undecided <= 1:
            raise ValueError(f"stop_undecided must be in (0, 1], got {self.stop_undecided}")


def circuit_config(settings: Settings) -> CircuitConfig:
    """Masks over all linear layers, with the settings' lambda or target."""
    return CircuitConfig(
        mask_hparams={"mask_init_value": settings.mask_init_value},
        target_layers="all-linear",
        l0_reduction="mean",
        execution=settings.execution,
        l0_lambda=settings.l0_lambda if settings.l0_target is None else DEFAULT_L0_LAMBDA,
        l0_target=settings.l0_target,
    )


class Stopped(KeyboardInterrupt):
    """Ctrl-C came, the step was finished and the state is saved."""


def batch_order(lengths: Sequence[int], batch_size: int, steps: int, generator: torch.Generator) -> list[list[int]]:
    """Which items each step uses: shuffled epochs, in batches of similar length so that little is padded."""
    if len(lengths) < batch_size:
        raise ValueError(f"a batch of {batch_size} needs as many items, got {len(lengths)}")
    batches: list[list[int]] = []
    while len(batches) < steps:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        order = order[: len(order) // batch_size * batch_size]
        epoch: list[list[int]] = []
        for i in range(0, len(order), _POOL * batch_size):
            pool = sorted(order[i : i + _POOL * batch_size], key=lambda index: lengths[index])
            epoch += [pool[j : j + batch_size] for j in range(0, len(pool), batch_size)]
        batches += [epoch[i] for i in torch.randperm(len(epoch), generator=generator).tolist()]
    return batches[:steps]


class MaskTraining:
    """The training of a circuit's masks: ``loss = cross-entropy + lambda * mean l0``, Adam, annealed temperature.

    circuit: as it was made from the base with ``circuit_config(settings)``; its logits get the seed's noise here
    head: reads the circuit's states; frozen
    items: training items
    settings: see there
    path: where the state is kept
    data_digest: tells items and head from others, for ``load``
    """

    def __init__(
        self,
        circuit: CircuitModel,
        head: Head,
        items: Sequence[EncodedItem],
        settings: Settings,
        path: Path,
        data_digest: str = "",
    ) -> None:
        self.circuit, self.head, self.items, self.settings, self.path = circuit, head, items, settings, path
        self.identity = {**asdict(settings), "data": data_digest}
        generator = torch.Generator().manual_seed(settings.seed)
        with torch.no_grad():
            for param in circuit.mask_parameters():
                param.add_((settings.init_noise * torch.randn(param.shape, generator=generator)).to(param.device))
        lengths = [len(item.ids) for item in items]
        self.batches = batch_order(lengths, settings.batch_size, settings.steps, generator)
        self.device = circuit.mask_parameters()[0].device
        self.optimizer: torch.optim.Optimizer
        if settings.execution in ("auto", "per_step"):
            self.optimizer = MaskAdamW(circuit.mask_parameters(), lr=settings.learning_rate)
        else:
            fused = self.device.type in ("cpu", "cuda")
            self.optimizer = torch.optim.Adam(circuit.mask_parameters(), lr=settings.learning_rate, fused=fused)
        self.schedule = TemperatureSchedule(circuit, settings.steps, settings.max_temperature)
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0  # of the steps that were taken here

    @property
    def finished(self) -> bool:
        """Whether all steps are taken, or the masks are decided as far as asked for."""
        return self.schedule.finished(self.settings.stop_undecided)

    @property
    def done(self) -> int:
        """Steps taken."""
        return len(self.history)

    def step(self) -> dict[str, float]:
        """One optimizer step; returns and records loss, cross-entropy, l0, temperature and, at times, more."""
        started = time.perf_counter()
        batch = collate([self.items[i] for i in self.batches[self.done]], self.device)
        temperature = self.circuit.temperature
        cross_entropy = F.binary_cross_entropy_with_logits(self.head(word_states(self.circuit, batch)), batch.labels)
        l0 = self.circuit.l0()
        loss = cross_entropy + self.circuit.l0_lambda * l0
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        row = {
            "step": self.done,
            "loss": loss.item(),
            "cross_entropy": cross_entropy.item(),
            "l0": l0.item(),
            "temperature": temperature,
        }
        if self.done % RECORD_EVERY == 0 or self.done == self.settings.steps - 1:
            row["kept"] = self.circuit.density()
            row["undecided"] = self.circuit.undecided_fraction()
            if self.settings.l0_target is not None:
                row["l0_lambda"] = float(self.circuit.l0_lambda)
        self.history.append(row)
        self.schedule.step()
        self.seconds += time.perf_counter() - started
        return row

    def run(self, on_step: Callable[[dict[str, float]], None], stop: threading.Event) -> None:
        """Take the remaining steps, saving the state now and then, at the end, and when ``stop`` is set.

        Raises:
            Stopped: ``stop`` was set; the state is saved.
        """
        while not self.finished:
            if stop.is_set():
                self.save()
                raise Stopped
            on_step(self.step())
            if self.done % SAVE_EVERY == 0:
                self.save()
        self.save()
        if stop.is_set():
            raise Stopped

    def save(self) -> None:
        """Write logits, optimizer state, schedule and history into one file, atomically."""
        tensors = {name: param.detach().cpu() for name, param in self.circuit.named_mask_parameters()}
        if self.circuit.l0_control is not None:
            tensors.update({f"l0_control.{key}": value.cpu() for key, value in self.circuit.l0_control.named_buffers()})
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors.update({f"adam.{index}.{key}": value.cpu() for key, value in values.items()})
        state = {"identity": self.identity, "schedule": self.schedule.state_dict(), "history": self.history}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, safetensors.torch.save(tensors, metadata={"state": json.dumps(state)}))

    def load(self) -> None:
        """Go on from the saved state.

        Raises:
            ValueError: the file is damaged, or is of a training with other settings or data.
        """
        state, tensors = read_state(self.path)
        check_identity(self.path, state["identity"], self.identity)
        with torch.no_grad():
            for name, param in self.circuit.named_mask_parameters():
                param.copy_(tensors[name])
            if self.circuit.l0_control is not None:
                for name, buffer in self.circuit.l0_control.named_buffers():
                    buffer.copy_(tensors[f"l0_control.{name}"])
        adam: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, index, key = name.split(".")
                adam.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": adam})
        self.schedule.load_state_dict(state["schedule"])
        self.history = state["history"]


def read_state(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The parts of a state file; reading it executes nothing."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            state = json.loads(file.metadata()["state"])
            return state, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (safetensors.SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a whole training state ({error}): start anew without --resume") from error


def check_identity(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise unless a saved training had the settings and items of this one."""
    differing = [f"{k} {found.get(k)!r}, now {v!r}" for k, v in expected.items() if found.get(k) != v]
    if differing:
        raise ValueError(
            f"cannot resume: {path} was written with {'; '.join(differing)}. "
            "Resume with the same options, or start anew without --resume"
        )


@contextlib.contextmanager
def stop_between_steps() -> Iterator[threading.Event]:
    """Within the block, the first Ctrl-C (or SIGTERM) sets the event that this yields; the second interrupts at once.

    An interrupt in the middle of a step would leave some logits updated and others not.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals belong to the main thread
        return

    def ask_to_stop(_signal: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
