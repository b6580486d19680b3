"""What an execution costs, from byte counts and ceilings, and the choice that ``execution="auto"`` makes of it.

Times are of forward + backward of one layer, in seconds. They are estimates for choosing between executions, not
promises; the ceilings say where they come from; ``bench/gpu_suite.py`` and ``bench/run.py`` measure them on a device.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from . import _cpp

# Bytes per weight beside those of the dense operation, with fp32 logits; w = bytes of one weight.
#   materialize (2w + 4): reads W and S, writes Wm; once per forward, once more in backward where Wm is not kept
#   logits_grad (2w + 8): reads dWm, W and S, writes dS
#   in_kernel (4 + 4 + 8): reads S beside W in forward, input gradient and the epilogue that writes dS in place of dWm
# A CPU takes weights in blocks that stay in the cache, see ``_predict_in_blocks``.
_LOGIT = 4
# How much faster "in_kernel" has to be: a masked weight in memory also serves the further micro-batches of a step.
_MARGIN = 0.01


EXECUTIONS = ("per_forward", "in_kernel")


@dataclass(frozen=True)
class Ceilings:
    """A device's limits: copy bandwidth (bytes read + written per second), matrix rates and mask rate per second."""

    bandwidth: float
    matrix_16: float  # FLOP/s of bf16 and fp16 products
    matrix_32: float  # FLOP/s of fp32 products
    masks: float  # soft masks per second in a kernel's prologue, behind its loads
    launch: float = 0.0  # seconds that a product takes beyond its traffic and arithmetic
    masked: tuple[float, float] = (1.0, 1.0)  # of bandwidth and matrix rate, what a product with masks inside reaches
    in_blocks: bool = False  # whether masks are made block by block before each block's product, as on a CPU


# masks: two special-function operations each (ex2 and rcp), 16 per cycle and multiprocessor on NVIDIA since sm_70
# (CUDA C++ programming guide, arithmetic throughput): derived.
# launch and masked: fitted to bench/results/NVIDIA_H200.csv, and taken for other GPUs as they are.
_LAUNCH, _MASKED = 7e-6, (0.85, 0.4)
CEILINGS = {
    # copy and bf16 rate: measured on one H200 and one H100 80GB HBM3 through PyTorch 2.11; fp32: datasheet
    "H200": Ceilings(4.3e12, 7.9e14, 6.7e13, 1.85e12, _LAUNCH, _MASKED),
    "H100": Ceilings(3.0e12, 8.0e14, 6.7e13, 1.85e12, _LAUNCH, _MASKED),
    # datasheets, at 85 % of peak
    "B200": Ceilings(6.8e12, 1.9e15, 6.8e13, 2.2e12, _LAUNCH, _MASKED),
    "A100": Ceilings(1.7e12, 2.6e14, 1.7e13, 1.2e12, _LAUNCH, _MASKED),
    "MI300X": Ceilings(4.5e12, 1.1e15, 1.4e14, 2.4e12, _LAUNCH, _MASKED),
    # measured on 2 cores of an AMD EPYC with AVX-512, PyTorch 2.13: a copy, products of 4096 x 4096 with 512 rows, and
    # mask_sums. More cores raise all four; what is chosen depends on their ratios.
    "cpu": Ceilings(4.2e10, 7e11, 1.7e11, 8e9, in_blocks=True),
}
CEILINGS["cuda"] = CEILINGS["A100"]  # any other GPU


@functools.cache
def ceilings_of(device_type: str, device_name: str = "") -> Ceilings:
    """The ceilings of a device by its type and the name that torch reports."""
    for name, ceilings in CEILINGS.items():
        if name.isupper() and name in device_name.upper():
            return ceilings
    return CEILINGS.get(device_type, CEILINGS["cpu"])


@functools.cache
def predict(
    execution: str, rows: int, in_features: int, out_features: int, itemsize: int, ceilings: Ceilings, kept: bool = True
) -> float:
    """Seconds of forward + backward of one masked linear operation on ``rows`` tokens, one logit per weight.

    Args:
        execution: ``"per_forward"`` or ``"in_kernel"``.
        rows, in_features, out_features: M, K, N; a convolution has B*OH*OW, C*kh*kw, O.
        itemsize: bytes of one weight: 2 or 4.
        ceilings: of the device.
        kept: whether the masked weight is kept between forward and backward.
    """
    weights = in_features * out_features
    rate = ceilings.matrix_32 if itemsize == 4 else ceilings.matrix_16
    activations = rows * (in_features + out_features) * itemsize
    flops = 2 * rows * weights

    def traffic(weight_bytes: float) -> float:
        return (weights * weight_bytes + activations) / ceilings.bandwidth

    def masked(weight_bytes: float, tiles: int) -> float:
        # Masks are made while operands are on their way, and products wait for them.
        bandwidth, matrix = ceilings.masked
        return max(traffic(weight_bytes) / bandwidth, weights * tiles / ceilings.masks) + flops / rate / matrix

    if ceilings.in_blocks and execution in EXECUTIONS:
        return _predict_in_blocks(execution, flops / rate, weights, itemsize, activations, ceilings, kept)
    if execution == "per_forward":
        materialize = (2 * itemsize + _LOGIT) * (1 if kept else 2)
        logits_grad = 2 * itemsize + 2 * _LOGIT
        dense = traffic(itemsize) + flops / rate + ceilings.launch
        return 3 * dense + weights * (materialize + logits_grad) / ceilings.bandwidth
    if execution == "in_kernel":
        # Every tile of 128 rows computes the masks of its weights again.
        tiles = -(-rows // 128)
        return 2 * masked(itemsize + _LOGIT, tiles) + masked(itemsize + 2 * _LOGIT, 1)
    raise ValueError(f"no cost known for execution {execution!r}")


def _predict_in_blocks(
    execution: str, arithmetic: float, weights: int, itemsize: int, activations: int, ceilings: Ceilings, kept: bool
) -> float:
    """Passes over the weight and products take turns; a product finds a block in the cache, a masked weight in memory.

    Bytes per weight: materialize 2w + 4, two products w, logits' gradient w + 8 (dWm is never in memory); in_kernel
    w + 4 forward, and w + 8 backward, whose one visit gives the masked weight and the gradient.
    """

    def elementwise(weight_bytes: int) -> float:
        return weights * max(weight_bytes / ceilings.bandwidth, 1 / ceilings.masks)

    products = 3 * max(arithmetic, activations / ceilings.bandwidth)
    if execution == "per_forward":
        materialize = elementwise(2 * itemsize + _LOGIT) * (1 if kept else 2)
        from_memory = 2 * weights * itemsize / ceilings.bandwidth
        return materialize + products + from_memory + elementwise(itemsize + 2 * _LOGIT)
    return elementwise(itemsize + _LOGIT) + products + elementwise(itemsize + 2 * _LOGIT)


def choose(rows: int | None, weight: torch.Tensor, ceilings: Ceilings, trains: bool, kept: bool = True) -> str:
    """The execution that is predicted faster for a weight of one logit each.

    Args:
        rows: tokens, or output positions of a convolution; None where it is not known (while compiling).
        weight: ``(out, ...)`` or ``(in, out)``; only sizes and dtype are read.
        ceilings: of the weight's device.
        trains: whether masks are soft. Hard masks do not change between forwards: a masked weight that is kept makes
            every forward but the first one a dense one, so they are ``"per_forward"``.
        kept: whether the masked weight may be kept.
    """
    has_kernel = weight.dim() in (2, 3, 4)
    if ceilings.in_blocks:
        has_kernel = weight.dim() == 2 and _cpp.has_kernel(None, weight.dtype)
    if rows is None or not trains or not has_kernel:
        return "per_forward"
    out_features = weight.shape[0]
    in_features = weight.numel() // max(out_features, 1)
    sizes = (rows, in_features, out_features, min(weight.element_size(), 4), ceilings, kept)
    per_forward, in_kernel = (predict(execution, *sizes) for execution in EXECUTIONS)
    return "in_kernel" if in_kernel < (1 - _MARGIN) * per_forward else "per_forward"
