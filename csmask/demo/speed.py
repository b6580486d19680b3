"""How long the demo's training would take with eager masking: measured beside its own steps, on the same batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from .train import RECORD_EVERY, MaskTraining

LEAST_TURNS, MOST_TURNS = 3, 8
SHARE = 0.05  # of the training's seconds, after which no further turn begins


@dataclass
class Spent:
    """Optimizer steps taken by this process, and their seconds."""

    steps: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """Medians of a step's seconds, own and eager, over ``turns`` steps of each; and what was spent on the training."""

    spent: Spent
    own: float
    eager: float
    turns: int

    @property
    def eager_seconds(self) -> float:
        """What the training's steps would have taken, by the ratio of the medians."""
        return self.spent.seconds * self.eager / self.own

    def __str__(self) -> str:
        return (
            f"{self.spent.seconds:.1f} s for {self.spent.steps} steps; eager masking would take "
            f"{self.eager_seconds:.1f} s (measured over {self.turns} steps of each by turns: medians "
            f"{1e3 * self.own:.1f} and {1e3 * self.eager:.1f} ms)"
        )


def compare_with_eager(make: Callable[[str], MaskTraining], execution: str, spent: Spent) -> Comparison:
    """Time steps of two fresh trainings that take turns.

    Args:
        make: a training by ``execution``, each call on a model of its own; ``"reference"`` is eager masking: plain
            PyTorch and ``torch.optim.Adam``.
        execution: that of the training whose steps were ``spent``.
    """
    started = time.perf_counter()
    own, eager = make(execution), make("reference")
    own.step(), eager.step()  # not timed: memory and threads are new
    times: list[tuple[float, float]] = []
    while len(times) < MOST_TURNS and own.done < own.settings.steps:
        if len(times) >= LEAST_TURNS and time.perf_counter() - started > SHARE * spent.seconds:
            break
        looks = own.done % RECORD_EVERY == 0 or own.done == own.settings.steps - 1  # at the hard mask, which takes time
        pair = _seconds(own), _seconds(eager)
        if not looks:
            times.append(pair)
    if not times:
        raise ValueError(f"{own.settings.steps} steps are too few to time any")
    medians = (statistics.median(column) for column in zip(*times, strict=True))
    return Comparison(spent, next(medians), next(medians), len(times))


def _seconds(training: MaskTraining) -> float:
    """Of a step, which waits for the device itself."""
    started = time.perf_counter()
    training.step()
    return time.perf_counter() - started
