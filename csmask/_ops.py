"""Operator schemas, shape functions and dispatch: the tensor's device picks the back end.

CPU runs the C++ kernels of ``csmask_kernels._cpu`` where they are built, and the plain-torch reference otherwise.
CUDA and ROCm have no kernels in this version and say so rather than fall back. Autograd lives above, in
``functional``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import reference

_LIBRARY = torch.library.Library("csmask", "DEF")
_LIBRARY.define(
    "materialize(Tensor weight, Tensor mask_logits, Tensor temperature, bool hard, float scale, ScalarType? dtype=None)"
    " -> (Tensor masked_weight, Tensor l0)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "logits_grad(Tensor dmasked_weight, Tensor weight, Tensor mask_logits, Tensor temperature, Tensor? dl0,"
    " float scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _load_cpu_kernels() -> tuple[ModuleType | None, str]:
    """The C++ back end, or None and the reason why there is none."""
    try:
        return importlib.import_module("csmask_kernels._cpu"), ""
    except ImportError as error:
        return None, f"{type(error).__name__}: {error}"


cpu_kernels, cpu_kernels_missing = _load_cpu_kernels()

_CPU_DTYPES = (torch.float32, torch.bfloat16)


def _materialize_cpu(
    weight: Tensor, mask_logits: Tensor, temperature: Tensor, hard: bool, scale: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    dtype = dtype or weight.dtype
    has_kernel = weight.dtype in _CPU_DTYPES and dtype in _CPU_DTYPES and mask_logits.dtype == torch.float32
    if cpu_kernels is None or not has_kernel:
        return _materialize_reference(weight, mask_logits, temperature, hard, scale, dtype)
    out = torch.empty(weight.shape, dtype=dtype)
    l0 = cpu_kernels.materialize(
        weight.detach().contiguous(),
        mask_logits.detach().contiguous(),
        temperature.item(),
        hard,
        scale,
        mask_logits.numel(),
        _inner_size(weight, mask_logits),
        out,
        torch.get_num_threads(),
    )
    return out, torch.tensor(l0, dtype=torch.float32)


def _inner_size(weight: Tensor, mask_logits: Tensor) -> int:
    """How many consecutive weights of the contiguous weight share one logit."""
    if mask_logits.shape == weight.shape:
        return 1
    unit_dim = max(range(weight.dim()), key=lambda d: mask_logits.shape[d])
    return max(1, weight.shape[unit_dim + 1 :].numel())


def _materialize_reference(
    weight: Tensor, mask_logits: Tensor, temperature: Tensor, hard: bool, scale: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        masked_weight, l0 = reference.materialize(weight, mask_logits, temperature, hard, scale, dtype)
    return masked_weight.contiguous(), l0


def _logits_grad_reference(
    dmasked_weight: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor,
    dl0: Tensor | None,
    scale: float,
) -> Tensor:
    with torch.no_grad():
        return reference.logits_grad(dmasked_weight, weight, mask_logits, temperature, dl0, scale).contiguous()


def _cuda_missing(name: str) -> Callable[..., NoReturn]:
    def raise_missing(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"csmask has no GPU kernel for {name} in this version; "
            'use CircuitConfig(execution="reference"), or "auto", which picks it on a GPU'
        )

    return raise_missing


for _name, _default in (("materialize", _materialize_reference), ("logits_grad", _logits_grad_reference)):
    _LIBRARY.impl(_name, _default, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _cuda_missing(_name), "CUDA")
_LIBRARY.impl("materialize", _materialize_cpu, "CPU")


@torch.library.register_fake("csmask::materialize")
def _materialize_fake(
    weight: Tensor,
    mask_logits: Tensor,
    _temperature: Tensor,
    _hard: bool,
    _scale: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    compute = reference.compute_dtype(weight, mask_logits)
    masked_weight = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device)
    return masked_weight, weight.new_empty((), dtype=compute)


@torch.library.register_fake("csmask::logits_grad")
def _logits_grad_fake(
    _dmasked_weight: Tensor,
    _weight: Tensor,
    mask_logits: Tensor,
    _temperature: Tensor,
    _dl0: Tensor | None,
    _scale: float,
) -> Tensor:
    return torch.empty(mask_logits.shape, dtype=mask_logits.dtype, device=mask_logits.device)


def materialize(
    weight: Tensor, mask_logits: Tensor, temperature: Tensor, hard: bool, scale: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """``csmask::materialize``: see ``reference.materialize``."""
    return torch.ops.csmask.materialize(weight, mask_logits, temperature, hard, scale, dtype)


def logits_grad(
    dmasked_weight: Tensor,
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor,
    dl0: Tensor | None,
    scale: float,
) -> Tensor:
    """``csmask::logits_grad``: see ``reference.logits_grad``."""
    return torch.ops.csmask.logits_grad(dmasked_weight, weight, mask_logits, temperature, dl0, scale)
