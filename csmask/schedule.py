"""Temperature schedules: from 1 to ``max_temperature`` over a training run, ending exactly there."""

from __future__ import annotations

from typing import Any, Protocol

from .functional import check_temperature

KINDS = ("exponential", "linear")


class HasTemperature(Protocol):
    """Anything with a ``temperature`` to set: a ``CircuitModel``."""

    temperature: float


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
    """Anneals the temperature of a circuit in a plain training loop.

    It sets the temperature of ``t = 0`` when it is made; call ``step()`` at the end of every step, or of every epoch,
    whichever ``total`` counts::

        schedule = TemperatureSchedule(circuit, total=len(loader) * epochs)
        for batch in batches:
            circuit(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    Args:
        circuit: whose ``temperature`` is set.
        total: number of steps or epochs.
        max_temperature: reached exactly at the last of them.
        kind: ``"exponential"`` or ``"linear"``.
    """

    def __init__(
        self, circuit: HasTemperature, total: int, max_temperature: float = 200.0, kind: str = "exponential"
    ) -> None:
        first = temperature_at(0, total, max_temperature, kind)
        self.circuit = circuit
        self.total = total
        self.max_temperature = float(max_temperature)
        self.kind = kind
        self.t = 0
        circuit.temperature = first

    @property
    def temperature(self) -> float:
        """The temperature of the present step."""
        return temperature_at(self.t, self.total, self.max_temperature, self.kind)

    def step(self) -> float:
        """Go on to the next step or epoch; returns the temperature that it has set."""
        self.t += 1
        self.circuit.temperature = self.temperature
        return self.temperature

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is, for a training checkpoint."""
        return {"t": self.t, "total": self.total, "max_temperature": self.max_temperature, "kind": self.kind}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict()``; also sets the circuit's temperature."""
        temperature = temperature_at(state["t"], state["total"], state["max_temperature"], state["kind"])
        self.t, self.total = state["t"], state["total"]
        self.max_temperature, self.kind = float(state["max_temperature"]), state["kind"]
        self.circuit.temperature = temperature
