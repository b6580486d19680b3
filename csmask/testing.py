"""Seeded inputs and the one tolerance rule, shared by tests and benchmarks.

The rule: the oracle is the reference in fp64 on the very inputs of the tested dtype, the budget is the error of the
reference in the tested dtype, and a result passes if ``err <= 2 * budget + 4 * eps * max|oracle|``, tensor by tensor
(``out, dx, dweight, dlogits, dbias, l0``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import reference

# The "c" of the rule: room for a result that is exact in the reference but rounded once or twice elsewhere.
EPS_FACTOR = 4


def seeded_normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values that depend on ``shape`` and ``seed`` only: drawn in fp64 on the CPU, then rounded to ``dtype``."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def seeded_logits(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Mask logits as in training: normal around 0, some saturated near +-5, some exactly 0."""
    logits = seeded_normal(shape, seed, dtype).flatten()
    logits[1::5] = logits[1::5].sign() * 5 + 0.1 * logits[1::5]
    logits[::7] = 0
    return logits.view(shape)


def unit_shape(weight_shape: tuple[int, ...], mask_unit: str, unit_dim: int = 0) -> tuple[int, ...]:
    """The shape of the logits that mask a weight: its own, or 1 in all dimensions but the one of the units."""
    if mask_unit == "weight":
        return weight_shape
    return tuple(n if d == unit_dim else 1 for d, n in enumerate(weight_shape))


def linear_inputs(
    rows: tuple[int, ...],
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    *,
    mask_unit: str = "weight",
    transposed: bool = False,
    bias: bool = True,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """``x (*rows, K)``, ``weight (N, K)`` (``(K, N)`` when ``transposed``), ``mask_logits``, ``bias (N,)`` or None."""
    shape = (in_features, out_features) if transposed else (out_features, in_features)
    return {
        "x": seeded_normal((*rows, in_features), seed, dtype),
        "weight": seeded_normal(shape, seed + 1, dtype),
        "mask_logits": seeded_logits(unit_shape(shape, mask_unit, int(transposed)), seed + 2),
        "bias": seeded_normal((out_features,), seed + 3, dtype) if bias else None,
    }


def conv_inputs(
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    mask_unit: str = "weight",
    bias: bool = True,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """``x``, ``weight (out, in / groups, *kernel)``, ``mask_logits``, ``bias (out,)`` or None."""
    return {
        "x": seeded_normal(x_shape, seed, dtype),
        "weight": seeded_normal(weight_shape, seed + 1, dtype),
        "mask_logits": seeded_logits(unit_shape(weight_shape, mask_unit), seed + 2),
        "bias": seeded_normal(weight_shape[:1], seed + 3, dtype) if bias else None,
    }


def to_fp64(inputs: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The same numbers in fp64: the inputs of the oracle."""
    return {name: None if tensor is None else tensor.double() for name, tensor in inputs.items()}


def run(
    ops: Any, op: str, inputs: Mapping[str, Tensor | None], temperature: float, **options: Any
) -> dict[str, Tensor]:
    """Forward and backward of one masked operation, with the gradient of ``l0`` among the gradients.

    Args:
        ops: ``functional`` or ``reference``.
        op: ``"masked_linear"`` or ``"masked_conv"``.
        inputs: as ``linear_inputs`` or ``conv_inputs`` make them; not changed.
        temperature: multiplies the logits.
        options: of the operation (``hard``, ``scale``, ``transposed``, ``stride`` ...).

    Returns:
        ``out``, ``l0`` and, where they exist, ``dx``, ``dweight``, ``dlogits``, ``dbias``.
    """
    execution = options.pop("execution", None)
    how = {"execution": execution} if execution and ops is not reference and ops is not _ScaledOutput else {}
    leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in inputs.items()}
    weight, mask_logits = leaves["weight"], leaves["mask_logits"]
    hard, scale = options.get("hard", False), options.get("scale", 1.0)
    out = getattr(ops, op)(leaves["x"], weight, mask_logits, temperature, leaves["bias"], **options, **how)
    _, l0 = ops.materialize(weight, mask_logits, temperature, hard, scale)
    names = {"x": "dx", "weight": "dweight", "mask_logits": "dlogits", "bias": "dbias"}
    wanted = {names[n]: t for n, t in leaves.items() if t is not None and not (hard and n == "mask_logits")}
    outputs = [(out, seeded_normal(tuple(out.shape), 99, out.dtype)), (l0, torch.tensor(0.25, dtype=l0.dtype))]
    outputs = [(o, g) for o, g in outputs if o.requires_grad]
    grads = torch.autograd.grad([o for o, _ in outputs], list(wanted.values()), [g for _, g in outputs])
    return {"out": out.detach(), "l0": l0.detach(), **dict(zip(wanted, grads, strict=True))}


def oracle_and_budget(
    op: str, inputs: Mapping[str, Tensor | None], temperature: float, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What ``run`` gives for the reference: in fp64, and in the dtype of the inputs.

    With one logit per neuron the reference has two formulas, a masked weight and a scaled output. They are equal but
    for rounding; the second is the one that ``functional`` computes, so its error is the budget.
    """
    oracle = run(reference, op, to_fp64(inputs), temperature, **options)
    logits, weight = inputs["mask_logits"], inputs["weight"]
    assert logits is not None
    assert weight is not None
    scaled = logits.shape != weight.shape and not options.get("hard", False)
    return oracle, run(_ScaledOutput if scaled else reference, op, inputs, temperature, **options)


class _ScaledOutput:
    """The reference's operations with one logit per neuron: the dense operation, its output scaled."""

    materialize = staticmethod(reference.materialize)

    @staticmethod
    def masked_linear(x: Tensor, weight: Tensor, mask_logits: Tensor, temperature: float, bias: Tensor | None,
                      *, transposed: bool = False, scale: float = 1.0, hard: bool = False) -> Tensor:  # fmt: skip
        z = reference.apply_linear(x, weight.to(x.dtype), None, transposed)
        return reference.scale_neurons(z, mask_logits.flatten(), temperature, bias, hard, scale)

    @staticmethod
    def masked_conv(x: Tensor, weight: Tensor, mask_logits: Tensor, temperature: float, bias: Tensor | None,
                    *, scale: float = 1.0, hard: bool = False, **geometry: Any) -> Tensor:  # fmt: skip
        kept = torch.ones_like(mask_logits)
        z = reference.masked_conv(x, weight, kept, 1.0, None, hard=True, **geometry)
        return reference.scale_neurons(z, mask_logits.flatten(), temperature, bias, hard, scale, dim=1 - weight.dim())


def errors(
    got: Mapping[str, Tensor], oracle: Mapping[str, Tensor], plain: Mapping[str, Tensor]
) -> dict[str, tuple[float, float]]:
    """``name -> (error, limit)`` by the rule of this module; ``plain`` is the reference's result in the tested dtype.

    Raises:
        ValueError: names, shapes or dtypes that differ, or an oracle that is not finite.
    """
    if set(got) != set(oracle) or set(got) != set(plain):
        raise ValueError(f"expected the tensors {sorted(oracle)}, got {sorted(got)} (plain: {sorted(plain)})")
    found = {}
    for name, expected in oracle.items():
        for what, tensor in (("result", got[name]), ("plain reference", plain[name])):
            if tensor.shape != expected.shape:
                raise ValueError(f"{name}: expected shape {tuple(expected.shape)}, {what} has {tuple(tensor.shape)}")
        if got[name].dtype != plain[name].dtype:
            raise ValueError(f"{name}: expected dtype {plain[name].dtype}, got {got[name].dtype}")
        if not torch.isfinite(expected).all():
            raise ValueError(f"{name}: the oracle is not finite")
        budget = _largest(plain[name].double() - expected)
        limit = 2 * budget + EPS_FACTOR * torch.finfo(got[name].dtype).eps * _largest(expected)
        found[name] = (_largest(got[name].double() - expected), limit)
    return found


def _largest(tensor: Tensor) -> float:
    """``max|tensor|``: 0 for an empty tensor, NaN if there is one."""
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def assert_close(got: Mapping[str, Tensor], oracle: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> None:
    """Raise an ``AssertionError`` that names every tensor over its limit; see ``errors``."""
    # "not <=" rather than ">": a NaN is over every limit.
    wrong = [
        f"{n}: error {e:.3e} > {limit:.3e}" for n, (e, limit) in errors(got, oracle, plain).items() if not e <= limit
    ]
    if wrong:
        raise AssertionError("; ".join(wrong))
