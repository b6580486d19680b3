"""Compile a planned kernel launch for a GPU that need not be there, and read what the compiler made of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from csmask_kernels.launch import Launch, Target
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

TARGETS = {
    "sm_80": Target("cuda", "80", "A100-like", 108),
    "sm_90": Target("cuda", "90", "H100-like", 132),
    "sm_100": Target("cuda", "100", "B200-like", 148),
    "sm_120": Target("cuda", "120", "RTX-5090-like", 170),
    "gfx942": Target("hip", "gfx942", "MI300X-like", 304),
    "gfx950": Target("hip", "gfx950", "MI355X-like", 256),
}
# Shared memory that a program may have, in bytes: CUDA C++ programming guide, table of compute capabilities; CDNA ISA.
SHARED_LIMIT = {
    "sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10,
    "gfx950": 160 << 10,
}  # fmt: skip
_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.uint8: "u8", torch.int8: "i8", torch.bool: "i1",
}  # fmt: skip


class OfflineDriver:
    """As much of a Triton driver as compiling asks for; nothing can be launched with it."""

    def __init__(self, target: Target) -> None:
        arch = int(target.arch) if target.backend == "cuda" else target.arch
        self.target = GPUTarget(target.backend, arch, 32 if target.backend == "cuda" else 64)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int = 0) -> int:
        return 0


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel costs; ``registers`` and ``spills`` (bytes) are per thread, -1 where unknown."""

    registers: int
    spills: int
    shared: int
    assembly: str  # PTX or AMD GCN assembly
    machine: str  # SASS, or the same as ``assembly``
    ir: str  # Triton's own, before a layout is chosen

    def count(self, pattern: str) -> int:
        """Matches of the regular expression in the machine code."""
        return len(re.findall(pattern, self.machine, re.MULTILINE))


def signature(
    launch: Launch, backend: str = "cuda"
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list]]:
    """Types, constants and alignments of a launch's arguments, as Triton's own launcher would specialise them."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    attributes: dict[tuple[int, ...], list] = {}
    for index, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            types[name] = "constexpr"
            continue
        value = launch.arguments[name]
        aligned = False
        if value is None or (isinstance(value, int) and value == 1):
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name] = f"*{_TYPES[value.dtype]}"
            aligned = value.storage_offset() * value.element_size() % 16 == 0
            if backend == "hip" and value.untyped_storage().nbytes() < 2**31:  # 32-bit offsets: buffer instructions
                attributes[(index,)] = [["tt.pointer_range", 32]]
        elif isinstance(value, TensorDescriptor):
            shape = ", ".join(map(str, value.block_shape))
            types[name] = f"tensordesc<{_TYPES[value.base.dtype]}[{shape}]>"
        elif isinstance(value, int):
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            raise TypeError(f"{name}: a kernel cannot take a {type(value).__name__}")
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16], *attributes.get((index,), [])]
    return types, constants, attributes


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Compile the launch's kernel for the target with the launch's own types, constants and options."""
    types, constants, attributes = signature(launch, target.backend)
    source = ASTSource(launch.kernel, types, constexprs=constants, attrs=attributes)
    driver, config = OfflineDriver(target), triton.runtime.driver
    # Kernels ask the driver what they are compiled for. To reset it there would have to be one for this machine.
    before, config._active = config._active, driver
    try:
        kernel = triton.compile(source, target=driver.target, options=launch.options())
    finally:
        config._active = before
    shared = kernel.metadata.shared
    if target.backend == "hip":
        assembly = kernel.asm["amdgcn"]
        found = {k: int(v) for k, v in re.findall(r"\.(vgpr_count|vgpr_spill_count|agpr_count):\s+(\d+)", assembly)}
        return Compiled(
            found["vgpr_count"], found["vgpr_spill_count"] * 4, shared, assembly, assembly, kernel.asm["ttir"]
        )
    cubin = kernel.asm["cubin"]
    return Compiled(*_resources(cubin), shared, kernel.asm["ptx"], _disassemble(cubin), kernel.asm["ttir"])


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _read_cubin(tool: str, cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_tool(tool), *options, file.name], capture_output=True, text=True, check=True).stdout


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack, which is where spilled registers go, per thread."""
    text = _read_cubin("cuobjdump", cubin, "--dump-resource-usage")
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    return int(registers[1]) if registers else -1, int(stack[1]) if stack else -1


def _disassemble(cubin: bytes) -> str:
    return _read_cubin("nvdisasm", cubin, "--print-code", "--no-dataflow")
