"""csmask: train binary masks over the weights of frozen models, to find the subnetwork that does a task.

The method is continuous sparsification (Savarese et al. 2020, https://arxiv.org/abs/1912.04427).
"""

__version__ = "0.1.0"

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
    "TemperatureSchedule",
    "__version__",
    "evaluate_circuit",
]
