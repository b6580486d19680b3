"""The operators of ``_ops`` on a CPU by the C++ kernels of ``csmask_kernels._cpu``, each with the op's own signature.

An operator falls back to ``_plain`` where there is no kernel for it: fp64, or an install without the C++ back end.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _plain, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGE = 4 << 20  # bytes: two huge pages


def _load() -> tuple[ModuleType | None, str]:
    """The C++ back end, or None and the reason why there is none."""
    try:
        return importlib.import_module("csmask_kernels._cpu"), ""
    except ImportError as error:
        return None, f"{type(error).__name__}: {error}"


kernels, kernels_missing = _load()


def has_kernel(mask_logits: Tensor | None, *dtypes: torch.dtype) -> bool:
    """Whether the C++ kernels are there and know these dtypes of weights, inputs and results, and of the logits."""
    if kernels is None or (mask_logits is not None and mask_logits.dtype != torch.float32):
        return False
    return all(dtype in DTYPES for dtype in dtypes)


def empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``torch.empty_like``, in huge pages where it is large: new memory is paid for page by page, when written to."""
    return in_huge_pages(torch.empty_like(tensor, dtype=dtype or tensor.dtype))


def in_huge_pages(new: Tensor) -> Tensor:
    """A dense tensor that nothing has been written to, in huge pages where it is large."""
    if kernels is not None and new.nbytes >= _LARGE:
        kernels.prefer_huge_pages(new.data_ptr(), new.nbytes)
    return new


def as_number(scalar: Tensor | None) -> float:
    """A 0-d tensor's value; 0 for none."""
    return 0.0 if scalar is None else scalar.item()


def materialize(
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor,
    hard: bool,
    scale: float,
    dtype: torch.dtype | None = None,
    counts: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = dtype or weight.dtype
    if kernels is None or not has_kernel(mask_logits, weight.dtype, dtype):
        return _plain.OPS["materialize"](weight, mask_logits, temperature, hard, scale, dtype, counts)
    out = empty_like(weight, dtype)
    logits, threads = mask_logits.detach().expand_as(weight), torch.get_num_threads()
    sums = kernels.materialize(weight.detach(), logits, temperature.item(), hard, scale, out, counts, threads)
    return out, *_as_tensors(sums, counts)


def materialize_(
    out: Tensor, weight: Tensor, mask_logits: Tensor, temperature: Tensor, hard: bool, scale: float
) -> Tensor:
    if kernels is None or not has_kernel(mask_logits, weight.dtype, out.dtype):
        return _plain.OPS["materialize_"](out, weight, mask_logits, temperature, hard, scale)
    logits, threads = mask_logits.detach().expand_as(weight), torch.get_num_threads()
    sums = kernels.materialize(weight.detach(), logits, temperature.item(), hard, scale, out, False, threads)
    return _as_tensors(sums, False)[0]


def mask_sums(
    mask_logits: Tensor,
    temperature: Tensor,
    hard: bool,
    scale: float,
    weights_per_logit: int,
    counts: bool = True,
) -> tuple[Tensor, Tensor]:
    """By the kernel of ``materialize``, whose sum is then this one to the bit."""
    if kernels is None or not has_kernel(mask_logits):
        return _plain.OPS["mask_sums"](mask_logits, temperature, hard, scale, weights_per_logit, counts)
    threads = torch.get_num_threads()
    sums = kernels.mask_sums(mask_logits.detach(), temperature.item(), hard, scale, counts, threads)
    l0, counted = _as_tensors(sums, counts)
    return l0 * weights_per_logit, counted * weights_per_logit


def _as_tensors(sums: tuple[float, int, int], counts: bool) -> tuple[Tensor, Tensor]:
    l0, *counted = sums
    return torch.tensor(l0, dtype=torch.float32), torch.tensor(counted if counts else [], dtype=torch.int64)


def logits_grad(
    dmasked_weight: Tensor, weight: Tensor, mask_logits: Tensor, temperature: Tensor, dl0: Tensor | None, scale: float
) -> Tensor:
    dlogits = empty_like(mask_logits)
    if _write_logits_grad(False, dlogits, dmasked_weight, weight, mask_logits, temperature, dl0, scale):
        return dlogits
    return _plain.OPS["logits_grad"](dmasked_weight, weight, mask_logits, temperature, dl0, scale)


def logits_grad_(dlogits: Tensor, *arguments: Any) -> None:
    if not _write_logits_grad(True, dlogits, *arguments):
        dlogits.add_(_plain.OPS["logits_grad"](*arguments))


def _write_logits_grad(
    add: bool, dlogits: Tensor, dmasked_weight: Tensor, weight: Tensor, mask_logits: Tensor, temperature: Tensor,
    dl0: Tensor | None, scale: float,
) -> bool:  # fmt: skip
    """Whether there is a kernel; if so, it has run."""
    if kernels is None or not has_kernel(mask_logits, weight.dtype, dmasked_weight.dtype):
        return False
    if mask_logits.shape != weight.shape:
        return _write_unit_grad(dlogits, dmasked_weight, weight, mask_logits, temperature, dl0, scale, add)
    given = (dmasked_weight.detach(), weight.detach())
    kernels.logits_grad(
        dlogits, *(None, None) if _is_zero(dmasked_weight) else given, mask_logits.detach(), temperature.item(),
        as_number(dl0), scale, add, torch.get_num_threads(),
    )  # fmt: skip
    return True


def _write_unit_grad(
    dlogits: Tensor, dmasked_weight: Tensor, weight: Tensor, mask_logits: Tensor, temperature: Tensor,
    dl0: Tensor | None, scale: float, add: bool,
) -> bool:  # fmt: skip
    """The same where the weights of a unit share a logit: its gradient is a sum over them."""
    dims = [d for d, size in enumerate(mask_logits.shape) if size != 1]
    if kernels is None or len(dims) > 1 or mask_logits.dim() != weight.dim():
        return False
    threads, logits, grad = torch.get_num_threads(), mask_logits.detach().view(-1), dlogits.view(-1)
    dl0_of_unit = as_number(dl0) * reference.weights_per_logit(weight, mask_logits)
    if _is_zero(dmasked_weight):
        kernels.logits_grad(grad, None, None, logits, temperature.item(), dl0_of_unit, scale, add, threads)
        return True
    given = (dmasked_weight.detach(), weight.detach())
    if not dims:  # one logit for all weights: a dimension of one unit
        given, dims = (given[0].unsqueeze(0), given[1].unsqueeze(0)), [0]
    mask = (logits, dims[0], temperature.item(), dl0_of_unit, scale)
    kernels.logits_grad_units(grad, *given, *mask, add, threads)
    return True


def _is_zero(tensor: Tensor) -> bool:
    """Whether this is one zero, expanded: the gradient of a masked weight of which only l0 was used."""
    return tensor.dim() > 0 and tensor.numel() > 0 and not any(tensor.stride()) and tensor.flatten()[0].item() == 0


OPS: dict[str, Callable[..., Any]] = {
    "materialize": materialize,
    "materialize_": materialize_,
    "mask_sums": mask_sums,
    "logits_grad": logits_grad,
    "logits_grad_": logits_grad_,
}
