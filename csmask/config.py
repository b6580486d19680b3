"""``CircuitConfig``: what is masked and how."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import sys
from dataclasses import dataclass, field
from typing import Any

MASK_METHODS = ("continuous_sparsification",)
PLANNED_MASK_METHODS = ("hard_concrete", "magnitude_pruning")
ABLATION_MODES = (
    "none",
    "zero_ablate",
    "random_ablate",
    "randomly_sampled",
    "complement_sampled",
    "uniform_sampled",
)
MASK_UNITS = ("weight", "neuron")
EXECUTIONS = ("auto", "per_step", "per_forward", "in_kernel", "reference")
L0_REDUCTIONS = ("sum", "mean")
DEFAULT_L0_LAMBDA = 1e-8
FLOAT32_MAX = float.fromhex("0x1.fffffep+127")

DEFAULT_HPARAMS: dict[str, Any] = {
    "ablation": "none",
    "mask_bias": False,
    "mask_init_value": 0.0,
    "mask_unit": "weight",
    "rescale": False,
}


@dataclass
class CircuitConfig:
    """The configuration of a ``CircuitModel``; every value is checked when it is built.

    Args:
        mask_method: ``"continuous_sparsification"`` (https://arxiv.org/abs/1912.04427).
        mask_hparams: any of ``ablation`` (an ablation mode, ``"none"``), ``mask_bias`` (mask biases too, ``False``),
            ``mask_init_value`` (start value of the logits, ``0.0``), ``mask_unit`` (``"weight"`` or ``"neuron"``: one
            logit per output unit), ``rescale`` (divide the mask by ``sigmoid(mask_init_value)``, ``False``). Missing
            keys take these defaults.
        target_layers: one string or a list: module path, parameter name, glob, ``re:``-prefixed regular expression,
            ``"all-linear"`` or ``"all"`` (both without the output head).
        freeze_base: freeze every base parameter, and keep dropout off and norm statistics fixed in train mode.
        add_l0: add ``l0_lambda * l0`` to any loss that the base's forward returns, in train mode.
        l0_lambda: weight of the l0 term, >= 0; where lambda is driven by ``l0_target``, leave it out.
        execution: when the mask is computed: ``"auto"``, ``"per_step"``, ``"per_forward"``, ``"in_kernel"`` or
            ``"reference"`` (plain torch). They give the same numbers.
        l0_reduction: ``"sum"``, or ``"mean"``: divided by the number of maskable weights.
        l0_target: fraction of the maskable weights, in (0, 1), to keep when the annealing ends: a
            ``TemperatureSchedule`` then drives lambda along with the temperature. ``None`` for a fixed lambda.

    Raises:
        ValueError, TypeError: a value or a key that is not one of these.
        NotImplementedError: a mask method that this version does not have.
    """

    mask_method: str = "continuous_sparsification"
    mask_hparams: dict[str, Any] = field(default_factory=dict)
    target_layers: list[str] | str = field(default_factory=list)
    freeze_base: bool = True
    add_l0: bool = True
    l0_lambda: float = DEFAULT_L0_LAMBDA
    execution: str = "auto"
    l0_reduction: str = "sum"
    l0_target: float | None = None

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check every value and complete ``mask_hparams``; called again when a model is wrapped."""
        if self.mask_method in PLANNED_MASK_METHODS:
            raise NotImplementedError(
                f"mask_method {self.mask_method!r} is not in this version; use {MASK_METHODS[0]!r}"
            )
        _check_choice("mask_method", self.mask_method, MASK_METHODS)
        _check_choice("execution", self.execution, EXECUTIONS)
        _check_choice("l0_reduction", self.l0_reduction, L0_REDUCTIONS)
        for name in ("freeze_base", "add_l0"):
            _check_bool(name, getattr(self, name))
        self.l0_lambda = _check_number("l0_lambda", self.l0_lambda)
        if self.l0_lambda < 0:
            raise ValueError(f"l0_lambda must be >= 0, got {self.l0_lambda}")
        self._check_target()
        self.target_layers = _check_targets(self.target_layers)
        self.mask_hparams = _complete_hparams(self.mask_hparams)

    def _check_target(self) -> None:
        if self.l0_target is None:
            return
        self.l0_target = _check_number("l0_target", self.l0_target)
        if not 0 < self.l0_target < 1:
            raise ValueError(f"l0_target must be a fraction between 0 and 1, or None, got {self.l0_target}")
        if self.l0_lambda != DEFAULT_L0_LAMBDA:
            raise ValueError(
                f"l0_target drives lambda itself, but l0_lambda is {self.l0_lambda}: leave l0_lambda out, or l0_target"
            )

    def to_dict(self) -> dict[str, Any]:
        """A plain dict, a deep copy."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CircuitConfig:
        """The inverse of ``to_dict``; an unknown key is a ``ValueError`` that lists the known ones."""
        known = [f.name for f in dataclasses.fields(cls)]
        _check_keys("CircuitConfig", values, known)
        return cls(**copy.deepcopy(values))

    def to_json(self) -> str:
        """JSON text; ``from_json`` gives back an equal config."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> CircuitConfig:
        """The inverse of ``to_json``."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"a CircuitConfig in JSON must be an object, got {type(values).__name__}")
        return cls.from_dict(values)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _check_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if abs(value) > sys.float_info.max or math.isnan(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def _check_keys(what: str, values: Any, known: list[str]) -> None:
    if not isinstance(values, dict):
        raise TypeError(f"{what} must be a dict, got {type(values).__name__}")
    unknown = [k for k in values if k not in known]
    if unknown:
        raise ValueError(f"{what} has no {', '.join(map(repr, unknown))}; known: {', '.join(known)}")


def _check_targets(targets: Any) -> list[str] | str:
    names = [targets] if isinstance(targets, str) else targets
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
        raise TypeError(f"target_layers must be a string or a list of strings, got {targets!r}")
    for name in names:
        if not name.strip():
            raise ValueError("target_layers holds an empty name")
        if name.startswith("re:"):
            try:
                re.compile(name[3:])
            except re.error as error:
                raise ValueError(f"target_layers: {name!r} is not a valid regular expression: {error}") from error
    return targets if isinstance(targets, str) else list(names)


def _complete_hparams(hparams: Any) -> dict[str, Any]:
    _check_keys("mask_hparams", hparams, list(DEFAULT_HPARAMS))
    complete = {**DEFAULT_HPARAMS, **hparams}
    _check_choice("mask_hparams['ablation']", complete["ablation"], ABLATION_MODES)
    _check_choice("mask_hparams['mask_unit']", complete["mask_unit"], MASK_UNITS)
    for name in ("mask_bias", "rescale"):
        _check_bool(f"mask_hparams[{name!r}]", complete[name])
    complete["mask_init_value"] = _check_number("mask_hparams['mask_init_value']", complete["mask_init_value"])
    if abs(complete["mask_init_value"]) > FLOAT32_MAX:
        raise ValueError(f"mask_init_value must be a float32 number, got {complete['mask_init_value']}")
    if complete["rescale"] and complete["mask_init_value"] < -80:
        raise ValueError(
            "rescale divides by sigmoid(mask_init_value), which is 0 in fp32 below -80: "
            f"got mask_init_value {complete['mask_init_value']}"
        )
    return complete
