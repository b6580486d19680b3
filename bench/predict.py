"""Predict how long kernels take on a GPU that need not be there, from counts of their machine code.

    python bench/predict.py [--device "NVIDIA H200"] [--cases REGEX] [--json FILE]

From a bare source tree: ``PYTHONPATH=.:kernels python bench/predict.py``. Nothing is measured: every op is planned at
the sizes of ``bench/gpu_suite.py`` with the launch configs that the kernels find for the device, compiled, and counted.
A launch takes the longest of four times; a call takes those of its launches, one after the other, and a fixed time.
What the suite has measured on the device stands beside it. Columns, times in us:

bytes
    What the launch has to move, every tensor read once and written once, at the bandwidth of a copy.
issue
    Machine instructions of all warps, those in loops as often as the loops go round, of which each of the four
    schedulers of a multiprocessor issues one per cycle. What is passed under a condition counts as passed.
special
    Those of the special-function unit alone (ex2, rcp, sqrt), of which a warp's takes two cycles of a multiprocessor.
products
    Flops of the matrix instructions, padding included, at the rate of the fastest product that was measured.
bound
    The limit that is the longest.
registers, at once, waves
    Registers of a thread, programs that a multiprocessor holds by registers, shared memory and warps, and how often the
    grid fills the device.
launches, predicted
    Those of the call, torch's among them, and its time: with the fixed time that ``csmask.cost`` has for a product for
    the first, and 1.5 us for every further one.
measured, ratio
    The suite's time of the same call, and predicted over measured. "*": the kernel has changed since, see the header.

Not in the model: latencies, that is too few programs to hide them, and steps that wait for each other; units that take
instructions more slowly than they are issued (integers at half the rate); tensors that are read more than once; partial
sums that never leave the L2 cache; the clock that a busy device falls to.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from compile_launch import Compiled, compile_launch, signature
from csmask_kernels import launch as launches
from csmask_kernels.launch import Launch, config_path
from gpu_results import write_atomically
from predict_model import DEVICES, Device, Prediction, device_of, predict, results_path, total
from predict_ops import ELEMENTWISE, PRODUCT, PRODUCTS, Op, ops
from table import read

# By op and commit of the measurement: what the kernel of today computes otherwise.
CHANGED = {
    ("mask_adamw_ 8 bits", "0af67842098b"): "two bits of the logits have joined each state's code: more instructions",
}
LIMITS = ("bytes", "issue", "special", "products")
HEADER = ["op", "size", "kernel", *LIMITS, "bound", "registers", "at once", "waves", "launches", "predicted",
          "measured", "ratio"]  # fmt: skip


@dataclass
class Row:
    """One op at one size. Times are in seconds; ``measured`` is None where the suite has not timed just this call."""

    op: str
    x: str
    kind: str
    launches: int
    predicted: float
    predictions: list[Prediction]
    measured: float | None = None
    version: str = ""
    changed: str = ""

    @property
    def ratio(self) -> float | None:
        return None if self.measured is None else self.predicted / self.measured

    def lines(self) -> Iterator[list[str]]:
        """The table's lines: one for each of the kernels; what is of the call stands in the first."""
        star = "*" if self.changed else ""
        call = [str(self.launches), micro(self.predicted), "-", "-"]
        if self.measured is not None:
            call[2:] = [micro(self.measured) + star, f"{self.ratio:.2f}{star}"]
        for i, p in enumerate(self.predictions):
            yield [
                *((self.op, self.x) if i == 0 else ("", "")), p.kernel.strip("_").removesuffix("_kernel"),
                *(micro(p.seconds[limit]) for limit in LIMITS), p.bound, str(p.registers), str(p.at_once),
                f"{p.waves:.1f}", *(call if i == 0 else [""] * len(call)),
            ]  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        found = {**dataclasses.asdict(self), "ratio": self.ratio}
        for one, prediction in zip(found["predictions"], self.predictions, strict=True):
            one["bound"] = prediction.bound
        return found


def micro(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}"


@dataclass
class Compiler:
    """Compiles for one device, what is equal once."""

    device: Device
    found: dict[str, Compiled] = field(default_factory=dict)

    def __call__(self, launch: Launch) -> Compiled:
        key = repr((launch.kernel.fn.__qualname__, signature(launch), launch.options()))
        if key not in self.found:
            self.found[key] = compile_launch(launch, self.device.target)
        return self.found[key]


def row_of(op: Op, device: Device, compiler: Compiler, measurements: Sequence[dict[str, str]]) -> Row:
    """The prediction of an op, beside the last row of the measurements that is of the same call."""
    predictions = [predict(launch, compiler(launch), device) for launch in op.launches]
    count = len(op.launches) + op.others
    row = Row(op.name, op.x, op.kind, count, total(predictions, count, device), predictions)
    for found in measurements:
        call = (found["kernel"], found["provider"], found["mode"])
        if (call, found["x"], found["metric"]) == (op.measured, op.x, "time"):
            row.measured, row.version = float(found["value"]) / 1e3, found["version"]
    commit = re.search(r"commit (\w+)", row.version)
    row.changed = CHANGED.get((op.name, commit[1]), "") if commit else ""
    return row


def rows_of(device: Device, pattern: str = "") -> Iterator[Row]:
    """Rows of all ops whose name and size match."""
    compiler, measurements = Compiler(device), read(results_path(device.target.name))
    with warnings.catch_warnings():
        # The header says which table of configs it is.
        warnings.filterwarnings("ignore", message="no launch configs measured")
        for name, x, plan in ops(device.target):
            if re.search(pattern, f"{name} {x}"):
                yield row_of(plan(), device, compiler, measurements)


def header(device: Device, rows: Iterable[Row]) -> str:
    """What the figures are of: ceilings and where they come from, configs, releases, and the measurements' commits."""
    path = config_path(device.target)
    lines = [
        f"{device.target.name}: copy {device.bandwidth / 1e9:.0f} GB/s, products {device.rate / 1e12:.0f} TFLOP/s "
        f"({device.source}); {device.target.multiprocessors} multiprocessors at {device.clock / 1e9:.2f} GHz "
        f"(datasheet); {device.launch * 1e6:.1f} us fixed (csmask/cost.py)",
        f"predicted, not measured: with Triton {triton.__version__} and {path.name if path else 'no launch configs'}",
    ]
    versions: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.version:
            versions.setdefault(row.version, {})[row.kind] = None
    lines += [f"measured, {', '.join(kinds)}: {version}" for version, kinds in versions.items()]
    changed = {row.op: row.changed for row in rows if row.changed}
    lines += [f"* changed since it was measured: {op}: {what}" for op, what in changed.items()]
    return "\n".join(lines)


def table(rows: Iterable[Row]) -> str:
    lines = [HEADER, *(line for row in rows for line in row.lines())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def summary(rows: Sequence[Row]) -> str:
    """Median and range of predicted / measured for each kind of call, without kernels that have changed."""
    lines = []
    for kind in (ELEMENTWISE, PRODUCT, PRODUCTS):
        ratios = [row.ratio for row in rows if row.kind == kind and row.ratio is not None and not row.changed]
        if ratios:
            spread = f"median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}"
            lines.append(f"predicted / measured, {kind}: {spread} ({len(ratios)} rows)")
    return "\n".join(lines) or "nothing of this was measured on this device"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=DEVICES[0], help=f"one of {', '.join(DEVICES)}; default: %(default)s")
    parser.add_argument("--cases", default="", help="only ops whose name and size match this regular expression")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    options = parser.parse_args(arguments)
    if launches.is_interpreted():
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    try:
        device = device_of(options.device)
        re.compile(options.cases)
    except (ValueError, re.error) as error:
        parser.error(str(error))
    rows = list(rows_of(device, options.cases))
    if not rows:
        known = ", ".join(dict.fromkeys(name for name, _, _ in ops(device.target)))
        parser.error(f"no case matches {options.cases!r}, which is searched for in names and sizes as in 'materialize "
                     f"N=4096 K=4096'; ops: {known}")  # fmt: skip
    print(f"{header(device, rows)}\n\n{table(rows)}\n\n{summary(rows)}")
    if options.json:
        about = {"device": device.target.name, "triton": triton.__version__, "rows": [row.as_json() for row in rows]}
        write_atomically(options.json, json.dumps(about, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
