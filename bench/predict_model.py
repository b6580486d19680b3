"""From counts to times: what a device can do at best, how many programs it holds, and which limit a launch meets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from compile_launch import Compiled
from compile_report import bytes_of
from csmask_kernels.launch import Launch, Target, config_file_name
from predict_code import Counts, count
from table import read
from verdict import values

from csmask import cost

RESULTS = Path(__file__).resolve().parent / "results"
WARP = 32
SCHEDULERS = 4  # of a multiprocessor; each issues one instruction of a warp per cycle
# Results per cycle and multiprocessor of ex2, rcp, rsqrt and the like: CUDA C++ programming guide, table "Throughput of
# Native Arithmetic Instructions", compute capabilities 8.0 and 9.0. One instruction of a warp takes two cycles.
SPECIAL_PER_CYCLE = 16
# Seconds of a launch behind the first one of a replayed graph: two launches less took forward + backward of
# 128 x 4096 x 4096 from 1.08 to 1.02 of the 49 us of dense (NOTES.md, measured on an H200).
FURTHER_LAUNCH = 1.5e-6


@dataclass(frozen=True)
class Residency:
    """What a multiprocessor holds, and in which units it gives it away: CUDA C++ programming guide, technical
    specifications of compute capabilities 8.0 and 9.0; units: CUDA's occupancy calculator (cuda_occupancy.h).
    """

    shared: int  # bytes
    registers: int = 65536
    warps: int = 64
    programs: int = 32
    register_unit: int = 256  # per warp
    shared_unit: int = 128  # bytes
    shared_reserved: int = 1024  # bytes of each program that the system takes

    def programs_at_once(self, registers: int, shared: int, num_warps: int) -> int:
        """Programs of so many warps, registers per thread and bytes of shared memory that are resident together."""
        per_warp = math.ceil(registers * WARP / self.register_unit) * self.register_unit
        # Each scheduler has its own part of the registers.
        warps = self.registers // SCHEDULERS // per_warp * SCHEDULERS
        held = math.ceil((shared + self.shared_reserved) / self.shared_unit) * self.shared_unit
        return min(self.programs, self.warps // num_warps, warps // num_warps, self.shared // held)


RESIDENCY = {"sm_80": Residency(164 << 10), "sm_90": Residency(228 << 10)}


@dataclass(frozen=True)
class Device:
    """Ceilings of a device: Hz, bytes read + written per second, flops of 16-bit products per second, and of a call the
    seconds that are neither; with where bandwidth and rate come from.
    """

    target: Target
    clock: float
    bandwidth: float
    rate: float
    launch: float
    source: str

    @property
    def residency(self) -> Residency:
        return RESIDENCY[self.target.family]


# Clock in Hz: fp32 rate of the datasheet over multiprocessors, lanes and 2: 67 TFLOP/s / (132 x 128 x 2),
# 19.5 TFLOP/s / (108 x 64 x 2). What a device does under load is lower where it runs out of power.
_DEVICES = {
    "NVIDIA H200": (Target("cuda", "90", "NVIDIA H200", 132), 1.98e9),
    "NVIDIA H100 80GB HBM3": (Target("cuda", "90", "NVIDIA H100 80GB HBM3", 132), 1.98e9),
    "NVIDIA A100-SXM4-80GB": (Target("cuda", "80", "NVIDIA A100-SXM4-80GB", 108), 1.41e9),
}
DEVICES = tuple(_DEVICES)


def results_path(name: str) -> Path:
    """Where a device's measurements lie, if there are any."""
    return RESULTS / f"{config_file_name(name)}.csv"


def device_of(name: str) -> Device:
    """The device of this name: its ceilings as measured, else those of ``csmask.cost``.

    Raises:
        ValueError: nothing is known of the device.
    """
    if name not in _DEVICES:
        raise ValueError(
            f"expected a device of {', '.join(DEVICES)}, got {name}; multiprocessors and clock of another one go into "
            "bench/predict_model.py"
        )
    target, clock = _DEVICES[name]
    ceilings, path = cost.ceilings_of("cuda", name), results_path(name)
    rows = [{**row, "value": float(row["value"])} for row in read(path)]
    copies = values(rows, "copy", "bandwidth", "copy")
    products = values(rows, "product", "rate", "matmul")
    if copies and products:
        bandwidth = max(found["kernel"] for found in copies.values()) * 1e9
        rate = max(max(found.values()) for found in products.values()) * 1e12
        return Device(target, clock, bandwidth, rate, ceilings.launch, f"measured, {path.name}")
    # Measured on an H100; of other devices datasheet figures, of which 85 % are an assumption: it says which.
    return Device(target, clock, ceilings.bandwidth, ceilings.matrix_16, ceilings.launch, "csmask/cost.py")


@dataclass(frozen=True)
class Prediction:
    """One launch: seconds that each limit asks for, and how the device is filled."""

    kernel: str
    moved: int  # bytes
    seconds: dict[str, float]
    counts: Counts  # of one warp
    num_warps: int
    programs: int
    at_once: int
    waves: float
    registers: int
    shared: int
    constants: dict[str, int | str]  # what the kernel is compiled for, its types aside

    @property
    def bound(self) -> str:
        return max(self.seconds, key=lambda limit: self.seconds[limit])

    @property
    def longest(self) -> float:
        return self.seconds[self.bound]


def predict(launch: Launch, compiled: Compiled, device: Device) -> Prediction:
    """What a launch takes at least. Instructions and products are those of the multiprocessor with most programs."""
    moved = bytes_of(launch, compiled.ir)
    counts = count(compiled.machine, launch, moved)
    programs, multiprocessors = math.prod(launch.grid), device.target.multiprocessors
    warps = math.ceil(programs / multiprocessors) * launch.num_warps
    seconds = {
        "bytes": moved / device.bandwidth,
        "issue": warps * counts.instructions / SCHEDULERS / device.clock,
        "special": warps * counts.special * WARP / SPECIAL_PER_CYCLE / device.clock,
        "products": warps * counts.flops / (device.rate / multiprocessors),
    }
    at_once = device.residency.programs_at_once(compiled.registers, compiled.shared, launch.num_warps)
    waves = programs / (multiprocessors * max(at_once, 1))
    constants = {name: value for name, value in launch.constants.items() if isinstance(value, int | str)}
    return Prediction(
        launch.kernel.fn.__name__, moved, seconds, counts, launch.num_warps, programs, at_once, waves,
        compiled.registers, compiled.shared, constants,
    )  # fmt: skip


def total(predictions: list[Prediction], launches: int, device: Device) -> float:
    """Seconds of a call: its launches one after the other, and what ``launches`` of them take beside.

    ``launches`` counts those of torch, too, which are too small to have more than that.
    """
    return sum(p.longest for p in predictions) + device.launch + (launches - 1) * FURTHER_LAUNCH
