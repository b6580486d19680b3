"""Judging a circuit: full model, circuit, ablated circuit and random controls, side by side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from .circuit import CircuitModel


@dataclass(frozen=True)
class EvaluationRow:
    """One condition of ``evaluate_circuit``.

    Attributes:
        name: ``"full"``, ``"circuit"``, ``"ablated"`` or ``"random"``.
        kept: fraction of the maskable weights that it keeps.
        mean: of the scores.
        spread: sample standard deviation of the scores; 0 for conditions without a draw, or with only one.
        scores: one for each draw.
    """

    name: str
    kept: float
    mean: float
    spread: float
    scores: tuple[float, ...]


@dataclass(frozen=True)
class CircuitEvaluation:
    """What ``evaluate_circuit`` returns; prints as a table.

    Attributes:
        full: all weights.
        circuit: the circuit alone.
        ablated: all weights but the circuit's.
        random: all weights but as many as the circuit has, drawn from outside it.
    """

    full: EvaluationRow
    circuit: EvaluationRow
    ablated: EvaluationRow
    random: EvaluationRow

    @property
    def rows(self) -> tuple[EvaluationRow, ...]:
        """Full, circuit, ablated, random."""
        return self.full, self.circuit, self.ablated, self.random

    @property
    def selectivity(self) -> float:
        """``random.mean - ablated.mean``: how much more it hurts to remove the circuit than as many other weights.

        This, not the circuit's own score, says whether the weights matter: masks can also learn a task anew.
        """
        return self.random.mean - self.ablated.mean

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {**{row.name: asdict(row) for row in self.rows}, "selectivity": self.selectivity}

    def __str__(self) -> str:
        lines = [f"{'':<10}{'kept':>9}{'mean':>9}{'spread':>9}{'draws':>7}"]
        lines += [f"{r.name:<10}{r.kept:>9.2%}{r.mean:>9.3f}{r.spread:>9.3f}{len(r.scores):>7}" for r in self.rows]
        lines.append(f"selectivity (random - ablated): {self.selectivity:.3f}")
        return "\n".join(lines)


def evaluate_circuit(
    circuit: CircuitModel, fn: Callable[[CircuitModel], float], seeds: Iterable[int] = range(5)
) -> CircuitEvaluation:
    """Score the full model, the circuit, the model without the circuit, and the model without random circuits.

    Args:
        circuit: evaluated in eval mode; its mode, ablation and switched-off masks are restored afterwards.
        fn: scores the circuit as it stands, e.g. an accuracy; called without gradients for each condition.
        seeds: one ``randomly_sampled`` control is drawn per seed: as many entries as the circuit has, from outside it.

    Returns:
        A ``CircuitEvaluation``; ``print`` it for the table.

    Raises:
        ValueError: no seeds, a circuit of more than half the weights of a layer, or a score that is not finite.
    """
    import torch

    seeds = list(seeds)
    if not seeds:
        raise ValueError("seeds is empty: the control needs at least one draw")

    def score() -> float:
        value = float(fn(circuit))
        if not math.isfinite(value):
            raise ValueError(f"fn returned {value}; it must return a finite score")
        return value

    density = circuit.density()
    with circuit.preserve_mode(), torch.no_grad():
        circuit.eval()
        circuit.use_masks(True)
        # First, so that a circuit too large for a control fails before the work is done.
        controls = []
        for seed in seeds:
            circuit.set_ablate_mode("randomly_sampled", seed=seed)
            controls.append(score())
        circuit.set_ablate_mode("zero_ablate")
        ablated = score()
        circuit.set_ablate_mode("none")
        kept = score()
        circuit.use_masks(False)
        full = score()
    spread = statistics.stdev(controls) if len(controls) > 1 else 0.0
    return CircuitEvaluation(
        full=EvaluationRow("full", 1.0, full, 0.0, (full,)),
        circuit=EvaluationRow("circuit", density, kept, 0.0, (kept,)),
        ablated=EvaluationRow("ablated", 1 - density, ablated, 0.0, (ablated,)),
        random=EvaluationRow("random", 1 - density, statistics.fmean(controls), spread, tuple(controls)),
    )
