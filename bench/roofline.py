"""The arithmetic of ceilings: what moves, what is multiplied, and what a device could do of it."""

from __future__ import annotations

from cases import DTYPES, Shape


def percent_of_copy(size: float, ms: float, copied: float, copy_ms: float) -> float:
    """Bytes per second as percent of a copy's.

    Args:
        size: bytes that have to move in ``ms``.
        copied: bytes that the copy read and wrote in ``copy_ms``.
    """
    return 100 * (size / ms) / (copied / copy_ms)


def gigabytes_per_second(size: float, ms: float) -> float:
    return size / ms / 1e6


def linear_flops(shape: Shape) -> int:
    """Of forward + backward: three products of ``2 M N K`` each."""
    return 6 * shape.m * shape.n * shape.k


def linear_bytes(shape: Shape) -> int:
    """What dense forward + backward has to move at least: the bound that masked layers are measured by, too.

    W is read twice and its gradient written; of x and dout (read twice each), out and dx (written) all is counted.
    """
    activations = 3 * shape.m * (shape.n + shape.k)
    return (3 * shape.n * shape.k + activations) * DTYPES[shape.dtype].itemsize


def attainable(intensity: float, gigabytes: float, gigaflops: float) -> float:
    """GFLOP/s under the roof: bandwidth (GB/s) times FLOP per byte, up to the rate of products (GFLOP/s)."""
    return min(intensity * gigabytes, gigaflops)
