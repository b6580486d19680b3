"""evaluate_circuit: what each row measures, what it restores, and what it refuses."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
from torch import nn

from csmask import CircuitConfig, CircuitModel, evaluate_circuit, testing


def build(mask_bias=False):
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 5))
    config = CircuitConfig(mask_hparams={"mask_bias": mask_bias}, target_layers="all-linear")
    circuit = CircuitModel(config, model)
    for seed, param in enumerate(circuit.mask_parameters()):
        param.data.copy_(testing.seeded_normal(tuple(param.shape), seed) - 0.7)
    return circuit


def weights(circuit):
    """A score that depends on every weight in use: the output for fixed inputs, summed."""
    return circuit(testing.seeded_normal((3, 6), 9)).sum()


def state(circuit):
    return (
        circuit.training,
        [(m.training, m.use_masks, m.ablation, m.ablation_seed) for m in circuit.masked_layers.values()],
        [m.training for m in circuit.wrapped_model.modules()],
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("mask_bias", [False, True])
def test_rows_are_the_four_conditions(mask_bias):
    circuit = build(mask_bias)
    seeds = [3, 1, 4, 1]
    result = evaluate_circuit(circuit, weights, seeds)

    circuit.eval()
    expected = {"circuit": weights(circuit).item()}
    circuit.set_ablate_mode("zero_ablate")
    expected["ablated"] = weights(circuit).item()
    controls = []
    for seed in seeds:
        circuit.set_ablate_mode("randomly_sampled", seed=seed)
        controls.append(weights(circuit).item())
    circuit.use_masks(False)
    expected["full"] = weights(circuit).item()
    statistics_ = circuit.compute_l0_statistics()
    kept = statistics_["total_l0"] / statistics_["max_l0"]
    circuit.unload()
    assert expected["full"] == weights(circuit).item()

    assert [row.name for row in result.rows] == ["full", "circuit", "ablated", "random"]
    for name, value in expected.items():
        row = getattr(result, name)
        assert (row.name, row.mean, row.scores, row.spread) == (name, value, (value,), 0.0)
    assert result.random.scores == tuple(controls)
    assert result.random.mean == pytest.approx(sum(controls) / 4)
    assert result.random.spread == pytest.approx(statistics.stdev(controls))
    assert result.random.spread > 0
    assert controls[1] == controls[3]
    assert len(set(expected.values()) | set(controls)) == 6
    assert [row.kept for row in result.rows] == [1.0, kept, 1 - kept, 1 - kept]
    assert 0.1 < kept < 0.5
    assert result.selectivity == result.random.mean - result.ablated.mean


def test_table_and_dict():
    scores = iter([0.9, 0.7, 0.5, 0.96, 0.99])  # two controls, ablated, circuit, full
    circuit = build()
    result = evaluate_circuit(circuit, lambda _: next(scores), seeds=range(2))
    kept = circuit.density()
    assert str(result).splitlines() == [
        "               kept     mean   spread  draws",
        "full        100.00%    0.990    0.000      1",
        f"circuit   {kept:>9.2%}    0.960    0.000      1",
        f"ablated   {1 - kept:>9.2%}    0.500    0.000      1",
        f"random    {1 - kept:>9.2%}    0.800    0.141      2",
        "selectivity (random - ablated): 0.300",
    ]
    content = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert list(content) == ["full", "circuit", "ablated", "random", "selectivity"]
    assert content["random"] == {
        "name": "random",
        "kept": 1 - kept,
        "mean": pytest.approx(0.8),
        "spread": pytest.approx(math.sqrt(0.02)),
        "scores": [0.9, 0.7],
    }


def test_five_seeds_by_default_and_any_iterable():
    calls = []
    result = evaluate_circuit(build(), lambda c: calls.append(c.ablate_mode) or 1.0)
    assert len(result.random.scores) == 5
    assert calls == ["randomly_sampled"] * 5 + ["zero_ablate", "none", "none"]
    assert result.random.spread == 0.0
    assert len(evaluate_circuit(build(), lambda _: 1.0, (s for s in (7,))).random.scores) == 1


def test_fn_may_return_anything_that_is_a_number():
    for value in (1, 0.5, True, torch.tensor(0.5), torch.tensor([0.5]), testing.seeded_normal((), 0)):
        assert evaluate_circuit(build(), lambda _, v=value: v, [0]).full.mean == float(value)


@pytest.mark.parametrize("training", [True, False])
def test_restores_what_it_found(training):
    circuit = build().train(training)
    circuit.use_masks(False, ["2"])
    if not training:
        circuit.set_ablate_mode("uniform_sampled", seed=17)
    before, soft = state(circuit), weights(circuit).item()
    seen = []
    evaluate_circuit(circuit, lambda c: seen.append((c.training, torch.is_grad_enabled(), c.use_masks)) or weights(c))
    assert state(circuit) == before
    assert weights(circuit).item() == soft
    assert {(t, g) for t, g, _ in seen} == {(False, False)}


@pytest.mark.parametrize("fails_at", [0, 1, 5, 6, 7])
def test_restores_what_it_found_when_fn_raises(fails_at):
    circuit = build()
    circuit.use_masks(False, ["0"])
    before, value = state(circuit), weights(circuit).item()
    calls = []

    def fn(circuit):
        calls.append(1)
        if len(calls) == fails_at + 1:
            circuit.train()
            circuit.use_masks(False)
            raise KeyError("from fn")
        return 1.0

    with pytest.raises(KeyError, match="from fn"):
        evaluate_circuit(circuit, fn)
    assert len(calls) == fails_at + 1
    assert state(circuit) == before
    assert weights(circuit).item() == value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, torch.tensor(math.nan)])
def test_scores_that_are_not_finite(value):
    circuit = build()
    before = state(circuit)
    with pytest.raises(ValueError, match=r"fn returned (nan|inf|-inf); it must return a finite score"):
        evaluate_circuit(circuit, lambda _: value)
    assert state(circuit) == before


def test_what_it_refuses():
    circuit = build()
    before = state(circuit)
    calls = []
    with pytest.raises(ValueError, match="seeds is empty"):
        evaluate_circuit(circuit, calls.append, [])
    with pytest.raises(ValueError, match="seed must be in"):
        evaluate_circuit(circuit, calls.append, [-1])
    circuit.masked_layers["2"].mask_logits.data[:, :6] = 1
    circuit.masked_layers["2"].mask_logits.data[:, 6:] = -1
    with pytest.raises(ValueError, match="cannot draw 30 entries from a complement of 20 in 2:"):
        evaluate_circuit(circuit, calls.append)
    with pytest.raises(ValueError, match=r"holds NaN"):
        circuit.masked_layers["2"].mask_logits.data.fill_(math.nan)
        evaluate_circuit(circuit, calls.append)
    assert calls == []  # before any work was done
    assert state(circuit) == before
    with pytest.raises(TypeError):
        evaluate_circuit(build(), lambda _: None)
