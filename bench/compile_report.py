"""Compile every kernel case for GPUs that need not be there, print what the compiler made of it, and hold its bounds.

    python bench/compile_report.py [--targets sm_90,gfx942] [--cases REGEX] [--json FILE]

From a bare source tree: ``PYTHONPATH=.:kernels python bench/compile_report.py``; with another Triton, its directory
before these. The exit status is 1 where a bound is broken. Columns of the table:

registers, spills
    Per thread; spills in bytes. Bound: no spills.
shared / limit
    Bytes of shared memory per program, and what the device has for one. Bound: within the limit.
matrix
    Matrix instructions (HGMMA, HMMA, UTC*MMA, v_mfma). Bound: some in every kernel with a ``tl.dot``.
wide / all, tma
    Instructions that access global memory, those of 16 bytes or more per thread among them, and bulk copies. Bound for
    kernels without a ``tl.dot``, at aligned sizes: every tensor of the largest size is accessed 16 bytes at a time.
bytes, instr (per element; kernels without a ``tl.dot``)
    An element is an entry of the largest tensor, or of the largest in each row of a table of addresses. Bytes: every
    entry of a tensor that the kernel reads or writes, once for each of the two; what is broadcast counts once.
    Instructions: those in the machine code, every one taken as executed once by each thread, so that a loop counts as
    one pass.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from math import prod
from multiprocessing import get_context
from pathlib import Path

import kernel_cases
import torch
import triton
from compile_launch import SHARED_LIMIT, TARGETS, Compiled, compile_launch, signature
from csmask_kernels import launch as launches
from csmask_kernels.launch import Launch, Target

NVIDIA_ACCESS = r"\b(?:LDG|STG|LDGSTS|RED|ATOMG?)\.E[.\w]*"
AMD_ACCESS = r"^\s*(?:global|buffer|flat)_(?:load|store|atomic)\w*"
WIDE = r"\.128|\.256|x4$|_b128"
MATRIX = r"\b(?:HGMMA|HMMA|UTC\w*MMA)\b|^\s*v_s?mfma\w*"
BULK = r"\bU(?:TMA|BLK)(?:LDG|STG|REDG|CP|RED)\w*"
# An operation on a pointer or a descriptor, or what a loop carries along.
IR_POINTER = r"^\s*(?:(%\w+) = )?tt\.(\w+) (?:\w+, )?(%\w+)|\biter_args\(([^)]*)\)"
INSTRUCTION = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!NOP)\S|^\s+[vs]_\w+|^\s+(?:global|buffer|flat|ds)_\w+"


@dataclass
class Row:
    """One case compiled for one target."""

    target: str
    case: str
    kernel: str
    registers: int = -1
    spills: int = -1
    shared: int = -1
    shared_limit: int = -1
    gemm: bool = False
    matrix: int = 0
    accesses: int = 0
    wide: int = 0
    tma: int = 0
    bytes_per_element: float | None = None
    instructions_per_element: float | None = None
    broken: list[str] = dataclasses.field(default_factory=list)

    def cells(self) -> list[str]:
        per_element = (self.bytes_per_element, self.instructions_per_element)
        return [
            self.target, self.case, self.kernel, str(self.registers), str(self.spills),
            f"{self.shared}/{self.shared_limit}", str(self.matrix or ("none" if self.gemm else "-")),
            f"{self.wide}/{self.accesses}", str(self.tma or "-"),
            *("-" if x is None else f"{x:.1f}" for x in per_element), "; ".join(self.broken) or "ok",
        ]  # fmt: skip


HEADER = ["target", "case", "kernel", "registers", "spills", "shared/limit", "matrix", "wide/all", "tma", "bytes",
          "instr", "bounds"]  # fmt: skip


def targets() -> dict[str, Target]:
    """The six architectures, and every device with a file of configs, which names its architecture as ``family``.

    A device of another architecture, or of none that its file names, is left out with a warning.
    """
    found = dict(TARGETS)
    for path in sorted(launches.CONFIG_DIRECTORY.glob("*.json")):
        if path.stem not in found:
            family = json.loads(path.read_text()).get("family")
            if family in TARGETS:
                found[path.stem] = dataclasses.replace(TARGETS[family], name=path.stem)
            else:
                warnings.warn(f"{path.name}: nothing is compiled for the family {family}", stacklevel=2)
    return found


def accesses_of(launch: Launch, ir: str) -> list[torch.Tensor]:
    """The launch's tensors, each as often as the kernel's IR accesses it in different ways: reads it, writes it.

    A pointer that a loop carries along is the one that it began as; a bulk copy that adds reads and writes.
    """
    roots: dict[str, str] = {}
    found: set[tuple[str, str]] = set()
    for result, op, operand, carried in re.findall(IR_POINTER, ir, re.MULTILINE):
        for name, start in re.findall(r"(%\w+) = (%\w+)", carried):
            roots[name] = roots.get(start, start)
        root = roots.get(operand, operand)
        if op == "descriptor_reduce":
            found |= {(root.removeprefix("%"), way) for way in ("descriptor_load", op)}
        elif op in ("load", "store") or op.startswith(("atomic", "descriptor")):
            found.add((root.removeprefix("%"), op))
        elif result:
            roots[result] = root
    tensors = _tensors(launch)
    return [tensors[name] for name, _ in sorted(found) if name in tensors]


def bytes_of(launch: Launch, ir: str) -> int:
    """Bytes that the kernel has to move: every entry of a tensor that it reads or writes, once for each of the two."""
    return sum(_entries(t) * t.element_size() for t in itertools.chain(accesses_of(launch, ir), *launch.behind))


def _tensors(launch: Launch) -> dict[str, torch.Tensor]:
    """The launch's tensor arguments by name; of a tensor descriptor, the tensor that it describes."""
    arguments = {name: getattr(value, "base", value) for name, value in launch.arguments.items()}
    return {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}


def _entries(tensor: torch.Tensor) -> int:
    """How many entries a tensor has in memory: a broadcast dimension counts once."""
    return prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)


def _aligned(tensor: torch.Tensor) -> bool:
    """Whether every row of the tensor, along the dimension in which it is contiguous, is whole pieces of 16 bytes."""
    dims = [(n, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1]
    rows = [n for n, s in dims if s == 1] + [s for _, s in dims if s != 1]
    return any(s == 1 for _, s in dims) and all(x % 16 == 0 for x in (*rows, tensor.storage_offset()))


def measure(target: str, case: str, launch: Launch, compiled: Compiled, limit: int) -> Row:
    """The row of a compiled case, with the bounds that it breaks."""
    backend = targets()[target].backend
    accesses = re.findall(NVIDIA_ACCESS if backend == "cuda" else AMD_ACCESS, compiled.machine, re.MULTILINE)
    wide = [access for access in accesses if re.search(WIDE, access)]
    row = Row(
        target, case, launch.kernel.fn.__name__, compiled.registers, compiled.spills, compiled.shared, limit,
        gemm="tt.dot" in compiled.ir, matrix=compiled.count(MATRIX), accesses=len(accesses), wide=len(wide),
        tma=compiled.count(BULK),
    )  # fmt: skip
    if row.spills != 0:
        row.broken.append(f"spills {row.spills} bytes")
    if row.shared > limit:
        row.broken.append(f"shared memory {row.shared} > {limit}")
    if row.gemm:
        if not row.matrix:
            row.broken.append("no matrix instructions")
        return row
    tensors = accesses_of(launch, compiled.ir)
    rows = launch.behind or (tensors,)
    elements = sum(max(map(_entries, found)) for found in rows)
    threads = launch.num_warps * (32 if backend == "cuda" else 64) * prod(launch.grid)
    row.bytes_per_element = bytes_of(launch, compiled.ir) / elements
    row.instructions_per_element = compiled.count(INSTRUCTION) * threads / elements
    # Not those of a byte per entry: beside 16-bit tensors a thread's share of them is 8 bytes.
    rows = [[t for t in found if t.element_size() > 1] for found in rows]
    large = [t for found in rows for t in found if _entries(t) == max(map(_entries, found))]
    if row.tma or not all(map(_aligned, large)):
        return row
    if re.search(r"\bscf\.(?:for|while)\b", compiled.ir):  # how often it runs is not in the code: one for each tensor
        enough = len(wide) >= max(sum(_entries(t) == max(map(_entries, found)) for t in found) for found in rows)
    else:
        widely = sum(32 if ".256" in access else 16 for access in wide) * threads
        enough = widely >= sum(_entries(t) * t.element_size() for t in large)
    if not enough:
        row.broken.append(f"{len(large)} large tensors, but only {row.wide} of {row.accesses} accesses have 16 bytes")
    return row


def _quiet() -> None:
    # Targets here are architectures: that nothing was measured on a device of that name is no news.
    warnings.filterwarnings("ignore", message="no launch configs measured")


@functools.cache
def _cases(target: str) -> list[kernel_cases.Case]:
    _quiet()
    return list(kernel_cases.cases(targets()[target]))


def report_case(target: str, index: int) -> Row:
    """Compile one case; one that does not compile breaks a bound as well."""
    case, launch = _cases(target)[index]
    found = targets()[target]
    limit = SHARED_LIMIT[found.family]
    try:
        return measure(target, case, launch, compile_launch(launch, found), limit)
    except Exception as error:  # noqa: BLE001 - the compiler raises what it likes, and the other rows are wanted
        reason = f"{type(error).__name__}: {error}".strip().splitlines()
        row = Row(target, case, launch.kernel.fn.__name__, shared_limit=limit)
        return dataclasses.replace(row, broken=[f"does not compile ({' '.join(reason)[:200]})"])


def report(names: Sequence[str], pattern: str = "", workers: int | None = None) -> Iterator[Row]:
    """Rows of all cases of these targets whose name matches, by one process per core; what is equal compiles once."""
    jobs = [(n, i) for n in names for i, (case, _) in enumerate(_cases(n)) if re.search(pattern, case)]
    first: dict[str, tuple[str, int]] = {}
    same = [first.setdefault(_identity(*job), job) for job in jobs]
    with ProcessPoolExecutor(workers or len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        rows = dict(zip(first.values(), pool.map(report_case, *zip(*first.values(), strict=True)), strict=True))
    for (target, index), other in zip(jobs, same, strict=True):
        yield dataclasses.replace(rows[other], case=_cases(target)[index][0])


def _identity(target: str, index: int) -> str:
    """All that a row depends on but its name: the kernel, how it is specialised, and how large its tensors are."""
    launch = _cases(target)[index][1]
    tensors = [*_tensors(launch).values(), *itertools.chain(*launch.behind)]
    arguments = [(t.shape, t.stride(), t.dtype, t.storage_offset()) for t in tensors]
    specialised = signature(launch, targets()[target].backend)
    return repr((target, launch.kernel.fn.__qualname__, launch.grid, specialised, launch.options(), arguments))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(targets()), help="comma-separated; default: %(default)s")
    parser.add_argument("--cases", default="", help="only cases whose name matches this regular expression")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    options = parser.parse_args()
    if launches.is_interpreted():
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    names = options.targets.split(",")
    unknown = set(names) - set(targets())
    if unknown:
        parser.error(f"--targets must be of {', '.join(targets())}, got {', '.join(sorted(unknown))}")
    rows = list(report(names, options.cases))
    if not rows:
        parser.error(f"no case matches {options.cases!r}")
    table = [HEADER, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    broken = Counter(row.target for row in rows if row.broken)
    print(f"\n{len(rows)} kernels compiled with Triton {triton.__version__}; bounds broken: {broken.total()}")
    if options.json:
        found = {"triton": triton.__version__, "rows": [dataclasses.asdict(row) for row in rows]}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
