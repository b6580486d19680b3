"""Ablation modes as pure functions of the circuit and a seed.

The circuit ``C`` is a boolean tensor over the entries of the mask logits (``S > 0``), ``n`` its size. Weights and
neurons alike are drawn entry by entry, so a control ablates as many units as the circuit has. Draws use one Philox
stream per layer and parameter and one purpose per kind of draw: equal seeds draw equal masks on every device and in
every process.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import philox
from ._ops import ops
from .config import ABLATION_MODES

# Modes that draw n entries; "complement_sampled" is NeuroSurgeon's name for what csmask calls "randomly_sampled".
COMPLEMENT_MODES = ("randomly_sampled", "complement_sampled")

_PURPOSE_COMPLEMENT, _PURPOSE_UNIFORM, _PURPOSE_VALUES = 0, 1, 2
_NOT_ELIGIBLE = torch.iinfo(torch.int64).max
# Default initialisation of transformers' Conv1D; its biases start at 0.
GPT2_INIT_STD = 0.02


def check_ablation_mode(mode: str | None) -> str:
    """The mode, if there is one of that name."""
    if mode is None or mode not in ABLATION_MODES:
        raise ValueError(f"ablation mode must be one of {', '.join(map(repr, ABLATION_MODES))}, got {mode!r}")
    return mode


def check_complement(circuit: Tensor, where: str = "") -> None:
    """Raise if the circuit has more entries than its complement, from which a control of its size is drawn."""
    n, rest = int(circuit.sum()), int((~circuit).sum())
    if n > rest:
        raise ValueError(
            f"cannot draw {n} entries from a complement of {rest}{where}: the circuit keeps more than half of the "
            "entries; train a sparser one or use 'uniform_sampled'"
        )


def sample_entries(eligible: Tensor, n: int, seed: int, stream: int, purpose: int) -> Tensor:
    """A boolean tensor with exactly ``n`` of the eligible entries set, every such set equally likely.

    Each entry has a random 31-bit key; the ``n`` smallest (key, index) pairs among the eligible entries are chosen.

    Args:
        eligible: boolean, any shape, fewer than 2**32 entries.
        n: between 0 and the number of eligible entries.
        seed, stream, purpose: what the keys are drawn from.
    """
    if n == 0:
        return torch.zeros_like(eligible)
    words = torch.empty(eligible.numel(), dtype=torch.int64, device=eligible.device)
    _draw_(words, "words", seed, stream, purpose)
    index = torch.arange(eligible.numel(), dtype=torch.int64, device=eligible.device)
    order = torch.where(eligible.flatten(), ((words >> 1) << 32) | index, _NOT_ELIGIBLE)
    threshold = torch.kthvalue(order, n).values
    return (order <= threshold).view(eligible.shape)


def kept_entries(mode: str, circuit: Tensor, seed: int, stream: int) -> Tensor:
    """Which entries keep their weights under an ablation mode.

    Args:
        mode: one of ``ABLATION_MODES``.
        circuit: boolean, ``S > 0``.
        seed: in [0, 2**64).
        stream: of the layer's weight or bias.

    Returns:
        Boolean, shape of ``circuit``. Under ``"random_ablate"`` the entries not kept get random values.

    Raises:
        ValueError: an unknown mode, or a circuit larger than the complement it is drawn from.
    """
    check_ablation_mode(mode)
    if mode == "none":
        return circuit
    if mode in ("zero_ablate", "random_ablate"):
        return ~circuit
    n = int(circuit.sum())
    if mode == "uniform_sampled":
        return ~sample_entries(torch.ones_like(circuit), n, seed, stream, _PURPOSE_UNIFORM)
    check_complement(circuit)
    return ~sample_entries(~circuit, n, seed, stream, _PURPOSE_COMPLEMENT)


def random_values(param: Tensor, fan_in: int | None, seed: int, stream: int) -> Tensor:
    """Values distributed as a fresh layer's: shape, dtype and device of ``param``.

    Args:
        param: the weight or bias to draw for.
        fan_in: for linear and convolution layers, whose weights and biases start uniform on
            ``+-1 / sqrt(fan_in)``; None for GPT-2's ``Conv1D``, whose weights start normal with standard deviation
            0.02 and whose biases start at 0.
        seed, stream: what is drawn from.
    """
    if fan_in is None and param.dim() == 1:
        return torch.zeros_like(param)
    values = torch.empty(param.shape, dtype=param.dtype, device=param.device)
    if fan_in is None:
        _draw_(values, "normal", seed, stream, _PURPOSE_VALUES, GPT2_INIT_STD)
    else:
        bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        _draw_(values, "uniform", seed, stream, _PURPOSE_VALUES, bound)
    return values


def _draw_(out: Tensor, kind: str, seed: int, stream: int, purpose: int, scale: float = 1.0) -> None:
    """Fill ``out`` with draws: ``philox.random_words``, ``_uniform`` or ``_normal`` (times ``scale``) on any device."""
    philox.check_seed(seed)
    ops.philox_(out, kind, seed & 0xFFFFFFFF, seed >> 32, stream, purpose, scale)
