"""What ``run`` measures on, by kind of device: shapes of layers, and the names by which rows speak of them."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """``m`` tokens through a weight ``(n, k)`` in one dtype; rows call it ``fp32 8 x 768 x 768``: M x N x K."""

    dtype: str
    m: int
    n: int
    k: int

    @property
    def name(self) -> str:
        return f"{self.dtype} {self.m} x {self.n} x {self.k}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def weights(self) -> int:
        return self.n * self.k

    @classmethod
    def parse(cls, name: str) -> Shape:
        """The shape that a row's ``x`` names."""
        dtype, sizes = name.split(" ", 1)
        m, n, k = (int(size) for size in sizes.split(" x "))
        return cls(dtype, m, n, k)


SHAPES = {
    "cpu": [
        *(Shape("fp32", m, 768, 768) for m in (8, 128, 1024)),
        *(Shape(dtype, m, 4096, 4096) for dtype in ("fp32", "bf16") for m in (16, 128, 512)),
    ],
    "cuda": [
        *(Shape("bf16", m, 4096, 4096) for m in (16, 128, 1024, 8192, 32768)),
        *(Shape("bf16", m, 14336, 4096) for m in (1024, 8192)),
    ],
}
QUICK_SHAPES = [Shape("fp32", 4, 48, 32), Shape("bf16", 4, 48, 32)]


def shapes(device: str, quick: bool, sizes: str | None, dtypes: str | None) -> list[Shape]:
    """The shapes of a device, or those that the command line names.

    Args:
        device: "cpu" or "cuda".
        quick: tiny ones.
        sizes: ``MxNxK`` by commas; all are then measured in all dtypes.
        dtypes: by commas; without sizes, those of the device's shapes that are in them.

    Raises:
        ValueError: a size or dtype that is not one, or a choice that leaves nothing.
    """
    wanted = dtypes.split(",") if dtypes else None
    if wanted and (unknown := [name for name in wanted if name not in DTYPES]):
        raise ValueError(f"dtypes must be some of {', '.join(DTYPES)}, got {', '.join(unknown)}")
    if sizes:
        found = []
        for size in sizes.split(","):
            parts = size.lower().split("x")
            if len(parts) != 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
                raise ValueError(f"shapes must be MxNxK by commas, as in 128x4096x4096,8x768x768, got {size!r}")
            m, n, k = (int(part) for part in parts)
            found += [Shape(dtype, m, n, k) for dtype in wanted or (["fp32"] if device == "cpu" else ["bf16"])]
        return found
    known = QUICK_SHAPES if quick else SHAPES[device]
    found = [shape for shape in known if not wanted or shape.dtype in wanted]
    if not found:
        raise ValueError(f"none of the shapes for {device} is in {dtypes}; name some with --shapes MxNxK")
    return found


def device_name(device: torch.device) -> str:
    """The device as rows name it: a GPU's name as torch has it, a CPU's model with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_model()}, {threads} thread{'s' if threads != 1 else ''}"


def _cpu_model() -> str:
    """The model that the operating system reports."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    if platform.system() == "Darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    return platform.processor() or platform.machine()
