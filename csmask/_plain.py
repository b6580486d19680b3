"""The operators of ``_ops`` in plain torch: what runs where there is no kernel, and what every kernel is compared with.

An operator may call another one: a masked linear without a kernel of its own still has the kernel of ``materialize``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import philox, reference

ops = torch.ops.csmask


def like(result: Tensor, layout: Tensor) -> Tensor:
    """``result`` in the layout that ``torch.empty_like(layout)`` has, which is what every back end returns."""
    want = torch.empty_like(layout, dtype=result.dtype)
    return result if result.stride() == want.stride() else want.copy_(result)


def counts_of(weight: Tensor, mask_logits: Tensor, temperature: Tensor, wanted: bool) -> Tensor:
    if not wanted:
        return torch.empty(0, dtype=torch.int64, device=weight.device)
    per_logit = reference.weights_per_logit(weight, mask_logits)
    return reference.mask_sums(mask_logits, temperature, False, 1.0, per_logit)[1]


def _materialize(
    weight: Tensor,
    mask_logits: Tensor,
    temperature: Tensor,
    hard: bool,
    scale: float,
    dtype: torch.dtype | None = None,
    counts: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    masked_weight, l0 = reference.materialize(weight, mask_logits, temperature, hard, scale, dtype)
    return like(masked_weight, weight), l0, counts_of(weight, mask_logits, temperature, counts)


def _materialize_(out: Tensor, *arguments: Any) -> Tensor:
    masked_weight, l0, _ = ops.materialize(*arguments, out.dtype)
    out.copy_(masked_weight)
    return l0


def _mask_sums(
    mask_logits: Tensor,
    temperature: Tensor,
    hard: bool,
    scale: float,
    weights_per_logit: int,
    counts: bool = True,
) -> tuple[Tensor, Tensor]:
    if not counts:
        l0 = reference.l0(mask_logits, temperature, hard, scale, weights_per_logit)
        return l0, torch.empty(0, dtype=torch.int64, device=mask_logits.device)
    return reference.mask_sums(mask_logits, temperature, hard, scale, weights_per_logit)


def _logits_grad(dmasked_weight: Tensor, weight: Tensor, mask_logits: Tensor, *mask: Any) -> Tensor:
    return like(reference.logits_grad(dmasked_weight, weight, mask_logits, *mask), mask_logits)


def _masked_linear(
    x: Tensor, weight: Tensor, mask_logits: Tensor, temperature: Tensor, bias: Tensor | None, hard: bool, scale: float,
    transposed: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    masked_weight, l0, _ = ops.materialize(weight, mask_logits, temperature, hard, scale, x.dtype)
    return reference.apply_linear(x, masked_weight, bias, transposed), l0


def _masked_linear_dx(
    dout: Tensor, weight: Tensor, mask_logits: Tensor, temperature: Tensor, hard: bool, scale: float, transposed: bool
) -> Tensor:
    masked_weight, _, _ = ops.materialize(weight, mask_logits, temperature, hard, scale, dout.dtype)
    return dout @ (masked_weight.t() if transposed else masked_weight)


def _masked_linear_dlogits(dout: Tensor, x: Tensor, weight: Tensor, mask_logits: Tensor, *mask: Any) -> Tensor:
    *rest, transposed = mask
    dmasked_weight = x.t() @ dout if transposed else dout.t() @ x
    return ops.logits_grad(dmasked_weight, weight, mask_logits, *rest)


def _masked_linear_backward(dout: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _linear_dx(dout, *arguments), ops.masked_linear_dlogits(dout, x, *arguments)


def _masked_linear_backward_(dlogits: Tensor, dout: Tensor, x: Tensor, *arguments: Any) -> Tensor:
    ops.masked_linear_dlogits_(dlogits, dout, x, *arguments)
    return _linear_dx(dout, *arguments)


def _linear_dx(
    dout: Tensor, weight: Tensor, mask_logits: Tensor, temperature: Tensor, _dl0: Any, scale: float, transposed: bool
) -> Tensor:
    return ops.masked_linear_dx(dout, weight, mask_logits, temperature, False, scale, transposed)


def conv_memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of a convolution's results: the input's, channels-last only where it is nothing else."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _conv_arguments(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> tuple[Any, ...]:
    return list(stride), list(padding), list(dilation), False, [0] * len(stride), 1


def _masked_conv(
    x: Tensor, weight: Tensor, mask_logits: Tensor, temperature: Tensor, bias: Tensor | None, hard: bool, scale: float,
    *geometry: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    masked_weight, l0, _ = ops.materialize(weight, mask_logits, temperature, hard, scale, x.dtype)
    out = torch.convolution(x, masked_weight, bias, *_conv_arguments(*geometry))
    return out.contiguous(memory_format=conv_memory_format(x)), l0


def _conv_backward(dout: Tensor, x: Tensor, weight: Tensor, geometry: Any, wants: list[bool]) -> tuple[Tensor, ...]:
    return torch.ops.aten.convolution_backward(dout, x, weight, None, *_conv_arguments(*geometry), wants)


def _masked_conv_dx(
    dout: Tensor, weight: Tensor, mask_logits: Tensor, temperature: Tensor, input_size: Sequence[int], hard: bool,
    scale: float, *geometry: Sequence[int],
) -> Tensor:  # fmt: skip
    masked_weight, _, _ = ops.materialize(weight, mask_logits, temperature, hard, scale, dout.dtype)
    x = dout.new_empty(1).expand(input_size)  # only its shape is used
    dx = _conv_backward(dout, x, masked_weight, geometry, [True, False, False])[0]
    return dx.contiguous(memory_format=conv_memory_format(dout))


def _masked_conv_dlogits(dout: Tensor, x: Tensor, weight: Tensor, mask_logits: Tensor, *mask: Any) -> Tensor:
    *rest, stride, padding, dilation = mask
    shaped = weight.to(dout.dtype)  # only its shape is used
    geometry = (stride, padding, dilation)
    dmasked_weight = _conv_backward(dout, x, shaped, geometry, [False, True, False])[1]
    return ops.logits_grad(dmasked_weight, weight, mask_logits, *rest)


def _scale_neurons(z: Tensor, *arguments: Any) -> Tensor:
    return like(reference.scale_neurons(z, *arguments), z)


def _scale_neurons_grad(
    dout: Tensor, z: Tensor, mask_logits: Tensor, temperature: Tensor, dl0: Tensor | None, hard: bool, scale: float,
    dim: int, weights_per_logit: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dz = like(reference.scale_neurons(dout, mask_logits, temperature, None, hard, scale, dim), z)
    if hard:
        return dz, torch.zeros_like(mask_logits)
    compute = reference.compute_dtype(z, mask_logits)
    rest = [d for d in range(z.dim()) if d != dim]
    dmask = (dout.to(compute) * z.to(compute)).sum(rest) if rest else dout.to(compute) * z.to(compute)
    if dl0 is not None:
        dmask = dmask + dl0.to(compute) * weights_per_logit
    dlogits = dmask * reference.soft_mask_derivative(mask_logits.to(compute), temperature, scale)
    return dz, dlogits.to(mask_logits.dtype)


def _apply_bitmask(weight: Tensor, bits: Tensor, scale: float, dtype: torch.dtype | None = None) -> Tensor:
    return like(reference.apply_bitmask(weight, bits, scale, dtype), weight)


def _bitmask_linear(
    x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, scale: float, transposed: bool
) -> Tensor:
    return reference.apply_linear(x, ops.apply_bitmask(weight, bits, scale, x.dtype), bias, transposed)


def _bitmask_linear_dx(dout: Tensor, weight: Tensor, bits: Tensor, scale: float, transposed: bool) -> Tensor:
    masked_weight = ops.apply_bitmask(weight, bits, scale, dout.dtype)
    return dout @ (masked_weight.t() if transposed else masked_weight)


def _philox_(out: Tensor, kind: str, seed_lo: int, seed_hi: int, stream: int, purpose: int, scale: float) -> None:
    draw = {"words": philox.random_words, "uniform": philox.random_uniform, "normal": philox.random_normal}[kind]
    values = draw(out.numel(), seed_hi << 32 | seed_lo, stream, purpose, out.device)
    out.view(-1).copy_(values if kind == "words" else values * scale)


def _adding(name: str) -> Callable[..., None]:
    """The op that adds to its first argument what the op of this name returns."""

    def add(dlogits: Tensor, *args: Any) -> None:
        dlogits.add_(getattr(ops, name)(*args))

    return add


OPS: dict[str, Callable[..., Any]] = {
    "materialize": _materialize,
    "materialize_": _materialize_,
    "mask_sums": _mask_sums,
    "logits_grad": _logits_grad,
    "logits_grad_": _adding("logits_grad"),
    "masked_linear": _masked_linear,
    "masked_linear_dx": _masked_linear_dx,
    "masked_linear_dlogits": _masked_linear_dlogits,
    "masked_linear_dlogits_": _adding("masked_linear_dlogits"),
    "masked_linear_backward": _masked_linear_backward,
    "masked_linear_backward_": _masked_linear_backward_,
    "masked_conv": _masked_conv,
    "masked_conv_dx": _masked_conv_dx,
    "masked_conv_dlogits": _masked_conv_dlogits,
    "masked_conv_dlogits_": _adding("masked_conv_dlogits"),
    "scale_neurons": _scale_neurons,
    "scale_neurons_grad": _scale_neurons_grad,
    "pack_mask": reference.pack_mask,
    "unpack_mask": reference.unpack_mask,
    "popcount": reference.popcount,
    "apply_bitmask": _apply_bitmask,
    "bitmask_linear": _bitmask_linear,
    "bitmask_linear_dx": _bitmask_linear_dx,
    "philox_": _philox_,
}
