"""csmask: train binary masks over the weights of frozen models, to find the subnetwork that does a task.

The method is continuous sparsification (Savarese et al. 2020, https://arxiv.org/abs/1912.04427).
"""

__version__ = "0.1.0"

from typing import Any

from .circuit import CircuitModel
from .config import CircuitConfig
from .evaluate import CircuitEvaluation, evaluate_circuit
from .optim import MaskAdamW, MaskSGD
from .schedule import TemperatureSchedule

__all__ = [
    "CircuitConfig",
    "CircuitEvaluation",
    "CircuitModel",
    "MaskAdamW",
    "MaskSGD",
    "TemperatureCallback",
    "TemperatureSchedule",
    "__version__",
    "evaluate_circuit",
]


def __getattr__(name: str) -> Any:
    if name == "TemperatureCallback":  # transformers' Trainer takes seconds to import
        from .trainer import TemperatureCallback

        return TemperatureCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
