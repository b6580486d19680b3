"""``CircuitConfig``: defaults, every kind of bad value, and the exact round trip through JSON."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csmask import CircuitConfig
from csmask.config import ABLATION_MODES, EXECUTIONS, L0_REDUCTIONS, MASK_UNITS

HPARAM_DEFAULTS = {
    "ablation": "none",
    "mask_bias": False,
    "mask_init_value": 0.0,
    "mask_unit": "weight",
    "rescale": False,
}


def test_defaults_are_the_documented_ones():
    assert dataclasses.asdict(CircuitConfig()) == {
        "mask_method": "continuous_sparsification",
        "mask_hparams": HPARAM_DEFAULTS,
        "target_layers": [],
        "freeze_base": True,
        "add_l0": True,
        "l0_lambda": 1e-8,
        "execution": "auto",
        "l0_reduction": "sum",
        "l0_target": None,
    }


@pytest.mark.parametrize("key", HPARAM_DEFAULTS)
def test_a_missing_hparam_takes_its_default(key):
    given_values = {"ablation": "zero_ablate", "mask_bias": True, "mask_init_value": 0.5, "mask_unit": "neuron"}
    given_values = {**given_values, "rescale": True}
    del given_values[key]
    assert CircuitConfig(mask_hparams=given_values).mask_hparams == {**given_values, key: HPARAM_DEFAULTS[key]}


def test_the_callers_objects_are_neither_kept_nor_changed():
    hparams, targets = {"mask_bias": True}, ["a"]
    config = CircuitConfig(mask_hparams=hparams, target_layers=targets)
    assert hparams == {"mask_bias": True}
    hparams["mask_bias"] = "no"
    targets.append("b")
    assert config.mask_hparams["mask_bias"] is True
    assert config.target_layers == ["a"]
    assert CircuitConfig().mask_hparams is not CircuitConfig().mask_hparams


def test_an_unknown_key_lists_the_known_ones():
    with pytest.raises(ValueError, match="has no 'mask_units'; known: ") as caught:
        CircuitConfig(mask_hparams={"mask_units": "weight"})
    assert all(key in str(caught.value) for key in HPARAM_DEFAULTS)
    with pytest.raises(ValueError, match=r"has no 'targets'; known: .*target_layers"):
        CircuitConfig.from_dict({"targets": []})
    with pytest.raises(ValueError, match="'prune_percentage'"):
        CircuitConfig(mask_hparams={"prune_percentage": 0.5})


@pytest.mark.parametrize("method", ["hard_concrete", "magnitude_pruning"])
def test_methods_to_come_say_so(method):
    with pytest.raises(NotImplementedError, match=f"'{method}' is not in this version.*continuous_sparsification"):
        CircuitConfig(mask_method=method)


BAD_VALUES = [
    ("mask_method", "continuous", ValueError, "continuous_sparsification"),
    ("mask_method", None, ValueError, "continuous_sparsification"),
    ("mask_method", ["continuous_sparsification"], ValueError, "must be one of"),
    ("mask_hparams", None, TypeError, "must be a dict"),
    ("mask_hparams", [("mask_bias", True)], TypeError, "must be a dict"),
    ("mask_hparams", {1: 2}, ValueError, "known"),
    ("target_layers", None, TypeError, "string or a list"),
    ("target_layers", 3, TypeError, "string or a list"),
    ("target_layers", ["a", 3], TypeError, "string or a list"),
    ("target_layers", [["a"]], TypeError, "string or a list"),
    ("target_layers", {"a"}, TypeError, "string or a list"),
    ("target_layers", {"a": 1}, TypeError, "string or a list"),
    ("target_layers", "", ValueError, "empty name"),
    ("target_layers", ["a", " "], ValueError, "empty name"),
    ("target_layers", "re:(", ValueError, "not a valid regular expression"),
    ("target_layers", ["a", "re:*"], ValueError, "not a valid regular expression"),
    ("freeze_base", 1, TypeError, "True or False"),
    ("freeze_base", "yes", TypeError, "True or False"),
    ("freeze_base", None, TypeError, "True or False"),
    ("add_l0", 0, TypeError, "True or False"),
    ("l0_lambda", -1e-8, ValueError, ">= 0"),
    ("l0_lambda", math.nan, ValueError, "finite"),
    ("l0_lambda", math.inf, ValueError, "finite"),
    ("l0_lambda", 10**400, ValueError, "finite"),
    ("l0_lambda", "1e-8", TypeError, "number"),
    ("l0_lambda", True, TypeError, "number"),
    ("l0_lambda", None, TypeError, "number"),
    ("l0_lambda", 1j, TypeError, "number"),
    ("execution", "fast", ValueError, "per_forward"),
    ("execution", None, ValueError, "per_forward"),
    ("l0_reduction", "none", ValueError, "'sum', 'mean'"),
    ("l0_reduction", None, ValueError, "'sum', 'mean'"),
]
BAD_VALUES += [("l0_target", value, ValueError, "between 0 and 1") for value in (0, 1, 0.0, 1.0, -0.1, 5)]
BAD_VALUES += [("l0_target", value, ValueError, "finite") for value in (math.nan, math.inf)]
BAD_VALUES += [("l0_target", value, TypeError, "number") for value in ("0.05", True, [0.05])]
BAD_HPARAMS = [
    ("ablation", "zero", ValueError, "zero_ablate"),
    ("ablation", None, ValueError, "zero_ablate"),
    ("ablation", False, ValueError, "zero_ablate"),
    ("mask_bias", "False", TypeError, "True or False"),
    ("mask_bias", 1, TypeError, "True or False"),
    ("mask_bias", None, TypeError, "True or False"),
    ("mask_init_value", "0", TypeError, "number"),
    ("mask_init_value", None, TypeError, "number"),
    ("mask_init_value", False, TypeError, "number"),
    ("mask_init_value", math.nan, ValueError, "finite"),
    ("mask_init_value", -math.inf, ValueError, "finite"),
    ("mask_init_value", 1e39, ValueError, "float32"),
    ("mask_unit", "filter", ValueError, "'weight', 'neuron'"),
    ("mask_unit", 0, ValueError, "'weight', 'neuron'"),
    ("rescale", 1.0, TypeError, "True or False"),
]


@pytest.mark.parametrize(("name", "value", "error", "text"), BAD_VALUES, ids=lambda value: repr(value)[:20])
def test_a_bad_value_is_named_when_the_config_is_built(name, value, error, text):
    with pytest.raises(error, match=text) as caught:
        CircuitConfig(**{name: value})
    assert name in str(caught.value)


@pytest.mark.parametrize(("name", "value", "error", "text"), BAD_HPARAMS, ids=lambda value: repr(value)[:20])
def test_a_bad_hparam_is_named_when_the_config_is_built(name, value, error, text):
    with pytest.raises(error, match=text) as caught:
        CircuitConfig(mask_hparams={name: value})
    assert name in str(caught.value)


def test_rescale_needs_a_sigmoid_that_is_not_zero():
    with pytest.raises(ValueError, match="rescale divides by sigmoid"):
        CircuitConfig(mask_hparams={"rescale": True, "mask_init_value": -81.0})
    CircuitConfig(mask_hparams={"rescale": True, "mask_init_value": -80.0})
    CircuitConfig(mask_hparams={"rescale": False, "mask_init_value": -81.0})


def test_a_value_changed_after_it_was_built_is_checked_by_validate():
    config = CircuitConfig()
    config.l0_lambda = -1.0
    with pytest.raises(ValueError, match="l0_lambda"):
        config.validate()


@pytest.mark.parametrize("l0_lambda", [1e-6, 0.0, 1])
def test_a_target_and_a_lambda_of_ones_own_exclude_each_other(l0_lambda):
    with pytest.raises(ValueError, match=f"l0_target drives lambda itself, but l0_lambda is {float(l0_lambda)}: leave"):
        CircuitConfig(l0_target=0.05, l0_lambda=l0_lambda)
    config = CircuitConfig(l0_target=0.05)
    assert (config.l0_target, config.l0_lambda) == (0.05, 1e-8)
    config.l0_lambda = l0_lambda
    with pytest.raises(ValueError, match="l0_target drives lambda itself"):
        config.validate()


finite = st.floats(allow_nan=False, allow_infinity=False)
names = st.text(min_size=1).filter(lambda s: s.strip() and not s.startswith("re:"))
hparams = st.fixed_dictionaries(
    {},
    optional={
        "ablation": st.sampled_from(ABLATION_MODES),
        "mask_bias": st.booleans(),
        "mask_init_value": st.floats(-80, 3e38) | st.integers(-80, 80),
        "mask_unit": st.sampled_from(MASK_UNITS),
        "rescale": st.booleans(),
    },
)
configs = st.builds(
    CircuitConfig,
    mask_hparams=hparams,
    target_layers=names | st.lists(names) | st.just("re:a.*[0-9]+"),
    freeze_base=st.booleans(),
    add_l0=st.booleans(),
    l0_lambda=finite.filter(lambda x: x >= 0) | st.integers(0, 10**9),
    execution=st.sampled_from(EXECUTIONS),
    l0_reduction=st.sampled_from(L0_REDUCTIONS),
) | st.builds(CircuitConfig, l0_target=st.floats(0, 1, exclude_min=True, exclude_max=True))


@settings(max_examples=200, deadline=None, database=None)
@given(configs)
def test_json_round_trip_is_exact(config):
    text = config.to_json()
    again = CircuitConfig.from_json(text)
    assert again == config
    assert again.to_json() == text
    assert CircuitConfig.from_dict(json.loads(text)) == config
    assert CircuitConfig.from_dict(config.to_dict()) == config
    # == holds between 1 and 1.0 and True; repr does not.
    assert repr(again) == repr(config)


def test_to_dict_is_a_deep_copy_and_from_dict_keeps_none_of_its_argument():
    config = CircuitConfig(target_layers=["a"])
    values = config.to_dict()
    again = CircuitConfig.from_dict(values)
    values["mask_hparams"]["mask_bias"] = True
    values["target_layers"].append("b")
    for one in (config, again):
        assert one.mask_hparams == HPARAM_DEFAULTS
        assert one.target_layers == ["a"]
    assert copy.deepcopy(config) == config


@pytest.mark.parametrize("text", ["[]", "3", '"config"', "null"])
def test_json_that_is_not_an_object_is_refused(text):
    with pytest.raises(ValueError, match="must be an object"):
        CircuitConfig.from_json(text)


def test_broken_json_and_bad_values_in_json_are_refused():
    with pytest.raises(ValueError, match="Expecting"):
        CircuitConfig.from_json("{")
    with pytest.raises(ValueError, match="l0_lambda must be finite"):
        CircuitConfig.from_json('{"l0_lambda": NaN}')
