"""Masked linear operations on a CPU, block by block: the masked weight of a block is made in the cache by a C++ kernel
and handed to the matrix product that PyTorch uses, so that neither the masked weight nor its gradient goes to memory.

Forward takes blocks of output features; backward takes blocks of input features, each visited once for the input's
gradient and for that of the logits. Either way a product sums over all of its inner dimension at once, and the result
is rounded once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import _cpp, _plain

# Features per block: a multiple of the vector and tile sizes of BLAS libraries, and 256 bytes of each row or more.
_GRAIN = 64
# Bytes per weight of the logits; their gradient goes past the cache.
_LOGITS_BYTES = 4


def _block_features(rows: int, features: int, others: int, itemsize: int, block_itemsize: int) -> int:
    """How many of ``features`` make a block, with ``others`` weights each: what a visit takes fills half the cache.

    Each block's product reads the input again, of ``rows``: where these are many, that is more than what the cache
    saves, and blocks are up to four times as large.
    """
    assert _cpp.kernels is not None
    budget = _cpp.kernels.last_level_cache() // 2
    fitting = budget // max(others * (itemsize + block_itemsize + _LOGITS_BYTES), 1)
    size = min(max(fitting, 2 * rows), 4 * fitting)
    return max(1, min(features, max(size // _GRAIN, 1) * _GRAIN))


def _blocks(features: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, features)) for start in range(0, features, size))


_memory = threading.local()


def drop_scratch() -> int:
    """Free this thread's memory for blocks, and say how many bytes it had; the next op asks for it anew."""
    scratch = getattr(_memory, "bytes", None)
    _memory.bytes = None
    return 0 if scratch is None else scratch.numel()


def _scratch(like: Tensor, size: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Memory for blocks of ``size`` of the 2-d tensor's dimension ``dim``, rows contiguous where its rows are.

    It is this thread's, the same for all layers: to ask for it anew each time costs page faults.
    """
    shape = [size if d == dim else n for d, n in enumerate(like.shape)]
    is_transposed = like.stride(0) < like.stride(1)
    nbytes = shape[0] * shape[1] * dtype.itemsize
    if getattr(_memory, "bytes", None) is None or _memory.bytes.numel() < nbytes:
        with torch.inference_mode(False):  # it outlives this call
            _memory.bytes = torch.empty(nbytes, dtype=torch.uint8)
    flat = _memory.bytes[:nbytes].view(dtype)
    return flat.view(shape[1], shape[0]).t() if is_transposed else flat.view(shape)


def masked_linear(
    x: Tensor, weight: Tensor, mask_logits: Tensor, temperature: Tensor, bias: Tensor | None, hard: bool, scale: float,
    transposed: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if not _has_kernel(mask_logits, weight, x):
        return _plain.OPS["masked_linear"](x, weight, mask_logits, temperature, bias, hard, scale, transposed)
    assert _cpp.kernels is not None
    w, logits = _oriented(weight, mask_logits, transposed)
    out = x.new_empty(x.shape[0], w.shape[0])
    size = _block_features(len(x), w.shape[0], w.shape[1], w.element_size(), x.element_size())
    x = _for_products(x)
    scratch, t, l0 = _scratch(w, size, 0, x.dtype), temperature.item(), 0.0
    for block in _blocks(w.shape[0], size):
        wm = scratch[: block.stop - block.start]
        l0 += _cpp.kernels.materialize(
            w[block], logits[block], t, hard, scale, wm, False, torch.get_num_threads(), False
        )[0]
        _product(x, wm.t(), bias if bias is None else bias[block], out[:, block])
    return out, torch.tensor(l0, dtype=torch.float32)


def masked_linear_dx(
    dout: Tensor, weight: Tensor, mask_logits: Tensor, temperature: Tensor, hard: bool, scale: float, transposed: bool
) -> Tensor:
    if not _has_kernel(mask_logits, weight, dout):
        return _plain.OPS["masked_linear_dx"](dout, weight, mask_logits, temperature, hard, scale, transposed)
    w, logits = _oriented(weight, mask_logits, transposed)
    dx = dout.new_empty(dout.shape[0], w.shape[1])
    _visit(dout, w, logits, temperature.item(), hard, scale, dx=dx)
    return dx


def bitmask_linear(
    x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, scale: float, transposed: bool
) -> Tensor:
    if not _has_kernel(None, weight, x):
        return _plain.OPS["bitmask_linear"](x, weight, bits, bias, scale, transposed)
    w, steps = _with_bit_steps(weight, transposed)
    x, out = _for_products(x), x.new_empty(x.shape[0], w.shape[0])
    size = _block_features(len(x), w.shape[0], w.shape[1], w.element_size(), x.element_size())
    scratch = _scratch(w, size, 0, x.dtype)
    for block in _blocks(w.shape[0], size):
        wm = scratch[: block.stop - block.start]
        _select(w[block], bits, block.start * steps[0], steps, scale, wm)
        _product(x, wm.t(), bias if bias is None else bias[block], out[:, block])
    return out


def bitmask_linear_dx(dout: Tensor, weight: Tensor, bits: Tensor, scale: float, transposed: bool) -> Tensor:
    if not _has_kernel(None, weight, dout):
        return _plain.OPS["bitmask_linear_dx"](dout, weight, bits, scale, transposed)
    w, steps = _with_bit_steps(weight, transposed)
    dout, dx = _for_products(dout), dout.new_empty(dout.shape[0], w.shape[1])
    size = _block_features(len(dout), w.shape[1], w.shape[0], w.element_size(), dout.element_size())
    scratch = _scratch(w, size, 1, dout.dtype)
    for block in _blocks(w.shape[1], size):
        wm = scratch[:, : block.stop - block.start]
        _select(w[:, block], bits, block.start * steps[1], steps, scale, wm)
        _product(dout, wm, None, dx[:, block])
    return dx


def _with_bit_steps(weight: Tensor, transposed: bool) -> tuple[Tensor, tuple[int, int]]:
    """The weight as ``(N, K)``, and how far its next row's bit and its next column's are."""
    w, row_length = weight.detach(), weight.shape[1]
    return (w.t(), (1, row_length)) if transposed else (w, (row_length, 1))


def _select(w: Tensor, bits: Tensor, start: int, steps: tuple[int, int], scale: float, out: Tensor) -> None:
    assert _cpp.kernels is not None
    _cpp.kernels.apply_bitmask(w, bits, start, *steps, scale, out, torch.get_num_threads(), False)


def masked_linear_dlogits(dout: Tensor, x: Tensor, weight: Tensor, mask_logits: Tensor, *mask: Any) -> Tensor:
    if not _has_kernel(mask_logits, weight, dout, x):
        return _plain.OPS["masked_linear_dlogits"](dout, x, weight, mask_logits, *mask)
    dlogits = _cpp.empty_like(mask_logits)
    _backward(None, dlogits, False, dout, x, weight, mask_logits, *mask)
    return dlogits


def masked_linear_dlogits_(
    dlogits: Tensor, dout: Tensor, x: Tensor, weight: Tensor, mask_logits: Tensor, *mask: Any
) -> None:
    if _has_kernel(mask_logits, weight, dout, x):
        _backward(None, dlogits, True, dout, x, weight, mask_logits, *mask)
    else:
        _plain.OPS["masked_linear_dlogits_"](dlogits, dout, x, weight, mask_logits, *mask)


def masked_linear_backward(
    dout: Tensor, x: Tensor, weight: Tensor, mask_logits: Tensor, *mask: Any
) -> tuple[Tensor, Tensor]:
    if not _has_kernel(mask_logits, weight, dout, x):
        return _plain.OPS["masked_linear_backward"](dout, x, weight, mask_logits, *mask)
    dx, dlogits = x.new_empty(x.shape), _cpp.empty_like(mask_logits)
    _backward(dx, dlogits, False, dout, x, weight, mask_logits, *mask)
    return dx, dlogits


def masked_linear_backward_(
    dlogits: Tensor, dout: Tensor, x: Tensor, weight: Tensor, mask_logits: Tensor, *mask: Any
) -> Tensor:
    if not _has_kernel(mask_logits, weight, dout, x):
        return _plain.OPS["masked_linear_backward_"](dlogits, dout, x, weight, mask_logits, *mask)
    dx = x.new_empty(x.shape)
    _backward(dx, dlogits, True, dout, x, weight, mask_logits, *mask)
    return dx


def _backward(
    dx: Tensor | None, dlogits: Tensor, add: bool, dout: Tensor, x: Tensor, weight: Tensor, mask_logits: Tensor,
    temperature: Tensor, dl0: Tensor | None, scale: float, transposed: bool,
) -> None:  # fmt: skip
    w, logits = _oriented(weight, mask_logits, transposed)
    dlogits = dlogits.t() if transposed else dlogits
    _visit(dout, w, logits, temperature.item(), False, scale, dx, x, dlogits, _cpp.as_number(dl0), add)


def _has_kernel(mask_logits: Tensor | None, *tensors: Tensor) -> bool:
    return _cpp.has_kernel(mask_logits, *(t.dtype for t in tensors))


def _oriented(weight: Tensor, mask_logits: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """Weight and logits as ``(N, K)``, whichever way they lie in memory."""
    logits = mask_logits.detach().expand_as(weight)
    return (weight.detach().t(), logits.t()) if transposed else (weight.detach(), logits)


def _for_products(rows: Tensor) -> Tensor:
    """``rows`` as a BLAS takes it: what it cannot take it would copy for every block."""
    return rows if 1 in rows.stride() and 0 not in rows.stride() else rows.contiguous()


def _product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def _visit(
    dout: Tensor, w: Tensor, logits: Tensor, temperature: float, hard: bool, scale: float, dx: Tensor | None = None,
    x: Tensor | None = None, dlogits: Tensor | None = None, dl0: float = 0.0, add: bool = False,
) -> None:  # fmt: skip
    """Write the gradients that are asked for: ``dx (M, K)``, and from ``x (M, K)`` ``dlogits (N, K)`` or add to it."""
    kernels, threads = _cpp.kernels, torch.get_num_threads()
    assert kernels is not None
    dout, x = _for_products(dout), x if x is None else _for_products(x)
    size = _block_features(len(dout), w.shape[1], w.shape[0], w.element_size(), dout.element_size())
    scratch = _scratch(w, size, 1, dout.dtype)
    streams = dlogits is not None and 2 * dlogits.nbytes > kernels.last_level_cache()
    for block in _blocks(w.shape[1], size):
        weights, block_logits = w[:, block], logits[:, block]
        wm = scratch[:, : block.stop - block.start]
        if x is not None and dlogits is not None:
            # The gradient first: when the logits have had theirs, the masked weight takes its place in the same pass.
            _product(dout.t(), x[:, block], None, wm)
            gradient = kernels.logits_grad if dx is None else kernels.logits_grad_and_mask
            gradient(dlogits[:, block], wm, weights, block_logits, temperature, dl0, scale, add, threads, streams)
        elif dx is not None:
            kernels.materialize(weights, block_logits, temperature, hard, scale, wm, False, threads, False)
        if dx is not None:
            _product(dout, wm, None, dx[:, block])


OPS: dict[str, Callable[..., Any]] = {
    "masked_linear": masked_linear,
    "masked_linear_dx": masked_linear_dx,
    "masked_linear_dlogits": masked_linear_dlogits,
    "masked_linear_dlogits_": masked_linear_dlogits_,
    "bitmask_linear": bitmask_linear,
    "bitmask_linear_dx": bitmask_linear_dx,
    "masked_linear_backward": masked_linear_backward,
    "masked_linear_backward_": masked_linear_backward_,
}
