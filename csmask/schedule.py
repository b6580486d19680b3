"""Temperature schedules: from 1 to ``max_temperature`` over a training run, ending exactly there.

One call after each optimizer step drives all that changes over a training: the temperature, and lambda where a circuit
has an ``l0_target``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from .functional import check_temperature

KINDS = ("exponential", "linear")
L0_UPDATES = 50  # of lambda in an annealing, about: more change little, fewer follow late
LEAST_L0_UPDATES = 20


class HasTemperature(Protocol):
    """Anything with a ``temperature`` to set: a ``CircuitModel``."""

    temperature: float

    def check_logits(self) -> None: ...

    def undecided_fraction(self) -> float: ...


def temperature_at(t: int, total: int, max_temperature: float = 200.0, kind: str = "exponential") -> float:
    """The temperature of step or epoch ``t`` of ``total``.

    ``T_t = T_max ** (t / (total - 1))`` (exponential) or ``1 + (T_max - 1) * t / (total - 1)`` (linear), for
    ``t = 0 .. total - 1``: 1 at the first, exactly ``T_max`` at the last, and ``T_max`` from then on.

    Raises:
        TypeError: a ``total`` that is not an int.
        ValueError: ``total < 1``, ``t < 0``, a maximum below 1 or an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    if isinstance(total, bool) or not isinstance(total, int):
        raise TypeError(f"total must be an int, got {type(total).__name__}")
    if total < 1:
        raise ValueError(f"total must be at least 1, got {total}")
    if t < 0:
        raise ValueError(f"t must be >= 0, got {t}")
    if check_temperature(max_temperature) < 1:
        raise ValueError(f"max_temperature must be at least 1, where the schedule starts, got {max_temperature}")
    if t >= total - 1:
        return float(max_temperature)
    progress = t / (total - 1)
    return max_temperature**progress if kind == "exponential" else 1 + (max_temperature - 1) * progress


class TemperatureSchedule:
    """Anneals the temperature of a circuit in a plain training loop, and drives lambda to an ``l0_target``.

    It sets the temperature of ``t = 0`` when it is made; call ``step()`` at the end of every step, or of every epoch,
    whichever ``total`` counts::

        schedule = TemperatureSchedule(circuit, total=len(loader) * epochs)
        for batch in batches:
            circuit(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if schedule.finished(max_undecided=0.001):
                break

    Args:
        circuit: whose ``temperature`` is set. If its config has an ``l0_target``, so is lambda, 20 to 100 times, at no
            host synchronisation.
        total: number of steps or epochs; optimizer steps where there is an ``l0_target``, micro-batches not counted.
        max_temperature: reached exactly at the last of them.
        kind: ``"exponential"`` or ``"linear"``.

    Raises:
        TypeError, ValueError: as ``temperature_at``; fewer than 20 steps for an ``l0_target``.
    """

    def __init__(
        self, circuit: HasTemperature, total: int, max_temperature: float = 200.0, kind: str = "exponential"
    ) -> None:
        first = temperature_at(0, total, max_temperature, kind)
        self.steer_l0 = _steering_of(circuit, total)
        self.circuit = circuit
        self.total = total
        self.max_temperature = float(max_temperature)
        self.kind = kind
        self.t = 0
        circuit.temperature = first
        if self.steer_l0 is not None:
            self.steer_l0(0.0)

    @property
    def temperature(self) -> float:
        """The temperature of the present step."""
        return temperature_at(self.t, self.total, self.max_temperature, self.kind)

    def step(self) -> float:
        """Go on to the next step or epoch; returns the temperature that it has set."""
        self.t += 1
        if self.steer_l0 is not None and self.t < self.total and self.t % max(1, self.total // L0_UPDATES) == 0:
            # Before the temperature, whose change voids the counts that the optimizer's step has left.
            self.steer_l0(self.t / (self.total - 1))
        self.circuit.temperature = self.temperature
        return self.temperature

    def finished(self, max_undecided: float | None = None, every: int = 10) -> bool:
        """Whether training may stop: all steps are done, or hardly a weight is left to decide about.

        Args:
            max_undecided: stop when the share of weights with ``|T * S| < 4`` is below it, as in 0.001: the mask that
                training uses is then the hard one but for these. None for all steps.
            every: steps or epochs between two looks at the logits, which wait for the device and read all logits.

        Raises:
            ValueError: a bound outside (0, 1], ``every < 1``, or logits that hold NaN.
        """
        if max_undecided is not None and not 0 < max_undecided <= 1:
            raise ValueError(f"max_undecided must be in (0, 1], or None for all steps, got {max_undecided}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        if self.t >= self.total:
            self.circuit.check_logits()  # NaN goes on to the end, and looks pruned there
            return True
        if max_undecided is None or self.t == 0 or self.t % every:
            return False
        return self.circuit.undecided_fraction() < max_undecided

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is, for a training checkpoint."""
        return {"t": self.t, "total": self.total, "max_temperature": self.max_temperature, "kind": self.kind}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict()``; also sets the circuit's temperature."""
        temperature = temperature_at(state["t"], state["total"], state["max_temperature"], state["kind"])
        self.steer_l0 = _steering_of(self.circuit, state["total"])
        self.t, self.total = state["t"], state["total"]
        self.max_temperature, self.kind = float(state["max_temperature"]), state["kind"]
        self.circuit.temperature = temperature


def _steering_of(circuit: Any, total: int) -> Callable[[float], None] | None:
    """What drives the circuit's lambda; None if that is fixed."""
    config = getattr(circuit, "circuit_config", None)
    target = None if config is None else config.l0_target
    if target is None:
        return None
    if total < LEAST_L0_UPDATES:
        raise ValueError(
            f"l0_target needs a schedule of at least {LEAST_L0_UPDATES} optimizer steps to drive lambda, got total "
            f"{total}; count steps and not epochs, or set l0_lambda instead"
        )
    return circuit.steer_l0
