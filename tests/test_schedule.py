"""Temperature schedules: the formula, its ends, resuming, and what is refused."""

from __future__ import annotations

import math

import pytest
from torch import nn

from csmask import CircuitConfig, CircuitModel, TemperatureSchedule
from csmask.schedule import temperature_at


class Holder:
    """Records what is set."""

    def __init__(self):
        self.__dict__["set"] = []

    def __setattr__(self, name, value):
        assert name == "temperature"
        self.set.append(value)


@pytest.mark.parametrize("maximum", [1.0, 2, 200.0, 217.3, 1e6])
@pytest.mark.parametrize("total", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_formula_and_exact_ends(kind, total, maximum):
    holder = Holder()
    schedule = TemperatureSchedule(holder, total, maximum, kind)
    for t in range(1, total):
        assert schedule.step() == holder.set[-1]
        assert schedule.t == t
    assert len(holder.set) == total
    assert holder.set[-1] == maximum  # exactly, not nearly
    if total > 1:
        assert holder.set[0] == 1.0
    for t, value in enumerate(holder.set):
        share = t / (total - 1) if total > 1 else 1.0
        want = math.exp(share * math.log(maximum)) if kind == "exponential" else 1 + (maximum - 1) * share
        assert value == pytest.approx(want, rel=1e-12)
        assert type(value) is float
    assert holder.set == sorted(holder.set)
    assert [schedule.step() for _ in range(3)] == [maximum] * 3  # and stays there


def test_defaults():
    holder = Holder()
    TemperatureSchedule(holder, 3).step()
    assert holder.set == [1.0, pytest.approx(math.sqrt(200))]


def test_on_a_circuit_and_resumed():
    def build():
        circuit = CircuitModel(CircuitConfig(target_layers="all"), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
        return circuit, TemperatureSchedule(circuit, total=9, max_temperature=50.0, kind="linear")

    circuit, schedule = build()
    straight = [circuit.temperature] + [(schedule.step(), circuit.temperature)[1] for _ in range(8)]
    assert straight[0] == 1.0
    assert straight[-1] == 50.0
    assert all(float(m.temperature) == 50.0 for m in circuit.modules() if hasattr(m, "mask_logits"))

    circuit, schedule = build()
    for _ in range(4):
        schedule.step()
    state = schedule.state_dict()
    assert state == {"t": 4, "total": 9, "max_temperature": 50.0, "kind": "linear"}
    resumed = CircuitModel(CircuitConfig(target_layers="all"), nn.Linear(3, 4))
    other = TemperatureSchedule(resumed, total=2)
    other.load_state_dict(state)
    assert resumed.temperature == straight[4]
    assert [(other.step(), resumed.temperature)[1] for _ in range(4)] == straight[5:]
    assert other.state_dict() == {**state, "t": 8}
    assert all(type(v) in (int, float, str) for v in state.values())  # any file format holds it


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "total must be at least 1, got 0"),
        ((-3,), ValueError, "total must be at least 1, got -3"),
        ((2.5,), TypeError, "total must be an int, got float"),
        ((True,), TypeError, "total must be an int, got bool"),
        ((5, 0.5), ValueError, "max_temperature must be at least 1.*got 0.5"),
        ((5, -200), ValueError, "temperature must be a positive finite number.*got -200"),
        ((5, math.nan), ValueError, "temperature must be a positive finite number.*got nan"),
        ((5, math.inf), ValueError, "temperature must be a positive finite number.*got inf"),
        ((5, 200.0, "cosine"), ValueError, "kind must be one of 'exponential', 'linear', got 'cosine'"),
    ],
)
def test_bad_values(arguments, error, message):
    holder = Holder()
    with pytest.raises(error, match=message):
        TemperatureSchedule(holder, *arguments)
    assert holder.set == []  # nothing was set


def test_a_bad_state_changes_nothing():
    holder = Holder()
    schedule = TemperatureSchedule(holder, 5)
    schedule.step()
    before = schedule.state_dict(), list(holder.set)
    for change in ({"t": -1}, {"total": 0}, {"kind": "cosine"}, {"max_temperature": math.nan}):
        with pytest.raises(ValueError, match=r"t must be >= 0|total|kind|temperature"):
            schedule.load_state_dict({**schedule.state_dict(), **change})
        assert (schedule.state_dict(), holder.set) == before


def test_temperature_at_a_negative_step():
    with pytest.raises(ValueError, match="t must be >= 0, got -1"):
        temperature_at(-1, 5)
