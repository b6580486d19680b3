"""The README's CPU table as text, from rows of ``bench/run.py``."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from verdict import BANDWIDTH_KERNELS, Verdict, values, verdicts

MARKERS = ("<!-- cpu-table:begin -->", "<!-- cpu-table:end -->")
MEMORY_MARKERS = ("<!-- memory-table:begin -->", "<!-- memory-table:end -->")
MEMORY_METRICS = ("after a step", "at the peak")
COLUMNS = ("dense", "eager", "eager (plain)", "compile", "per_step", "per_forward", "in_kernel", "auto")
# What rows call a measurement, and the README's sentence about it.
LINEAR_MODES = {
    "fwd_bwd": "Forward + backward of one linear layer",
    "step of 8": "A step of 8 micro-batches with AdamW",
}
Rows = list[dict[str, Any]]


def table_of(rows: Rows, plot: str) -> str:
    """Everything between the markers: about the run, tables of times and ratios to dense, bandwidth, memory."""
    parts = [_about(rows)]
    for mode, title in LINEAR_MODES.items():
        parts += _times(rows, mode, "masked_linear", f"{title}, M x N x K")
    models = [row["kernel"] for row in rows if row["mode"] == "end_to_end"]
    parts += _models(rows, list(dict.fromkeys(models)))
    parts += [_bandwidth(rows), _memory(rows)]
    if any(row["mode"] == "fwd_bwd" for row in rows):
        parts.append(f"![Time over dense, by shape]({plot})")
    parts += [_targets(rows), _auto(rows)]
    return "\n\n".join(part for part in parts if part)


def memory_table(rows: Rows) -> str:
    """Bytes per masked weight by way of training, from rows of ``bench/memory.py``, which come in its order."""
    sizes = list(dict.fromkeys(row["x"] for row in rows))
    figures = {(row["x"], row["provider"], row["metric"]): float(row["value"]) for row in rows}
    parts = []
    for x in sizes:
        ways = list(dict.fromkeys(row["provider"] for row in rows if row["x"] == x))
        lines = [[way, *(f"{figures[x, way, metric]:.2f}" for metric in MEMORY_METRICS)] for way in ways]
        parts.append(markdown([f"Bytes per masked weight, {x}", *MEMORY_METRICS], lines))
    return "\n\n".join(parts)


def between(readme: str, markers: tuple[str, str] = MARKERS) -> str | None:
    """What stands between the markers now; None where they are not."""
    found = re.search(f"{re.escape(markers[0])}\n(.*?)\n?{re.escape(markers[1])}", readme, re.DOTALL)
    return found[1] if found else None


def with_table(readme: str, table: str, markers: tuple[str, str] = MARKERS) -> str:
    """The README with another text between its markers."""
    before, rest = readme.split(markers[0], 1)
    after = rest.split(markers[1], 1)[1]
    return f"{before}{markers[0]}\n{table}\n{markers[1]}{after}"


def _about(rows: Rows) -> str:
    modes: dict[str, list[str]] = {}
    for row in rows:
        names = modes.setdefault(f"{row['time'][:10]}, {row['version']}", [])
        if row["mode"] not in names:
            names.append(row["mode"])
    runs = [about if len(modes) == 1 else f"{', '.join(names)}: {about}" for about, names in modes.items()]
    repeats = "Medians of interleaved repeats, as multiples of dense in the same run."
    return wrapped(f"{rows[0]['gpu']}; {'; '.join(runs)}. {repeats}")


def wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False))


def markdown(header: list[str], lines: list[list[str]]) -> str:
    align = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, align, *lines))


def _cells(times: dict[str, float], providers: list[str]) -> list[str]:
    dense = times["dense"]
    return [
        "" if name not in times else _milliseconds(dense) if name == "dense" else f"{times[name] / dense:.2f}x"
        for name in providers
    ]


def _milliseconds(ms: float) -> str:
    return f"{ms:.3g} ms" if ms < 1000 else f"{ms / 1000:.3g} s"


def _present(by_x: dict[str, dict[str, float]]) -> list[str]:
    return [name for name in COLUMNS if any(name in times for times in by_x.values())]


def _times(rows: Rows, mode: str, kernel: str, title: str) -> list[str]:
    found = {x: times for x, times in values(rows, mode, "time", kernel).items() if "dense" in times}
    if not found:
        return []
    providers = _present(found)
    return [markdown([title, *providers], [[x, *_cells(times, providers)] for x, times in found.items()])]


def _models(rows: Rows, models: list[str]) -> list[str]:
    found = {}
    for model in models:
        for x, times in values(rows, "end_to_end", "time", model).items():
            if "dense" in times:
                found[f"{model}, {x}"] = times
    if not found:
        return []
    providers = _present(found)
    header = ["A training step of a whole model", *providers]
    return [markdown(header, [[x, *_cells(times, providers)] for x, times in found.items()])]


def _bandwidth(rows: Rows) -> str:
    copies = values(rows, "bandwidth", "rate", "copy")
    if not copies:
        return ""
    rates = ", ".join(f"{found['torch']:.0f} GB/s ({x.split()[0]})" for x, found in copies.items())
    text = f"Of the bandwidth of a copy that took turns with each: {_percents(rows, 'of copy')}."
    text += f" The copy, reads and writes counted, moved {rates} in the middle of its turns."
    new = _percents(rows, "of copy, new memory")
    if new:
        text += f" Where the result is new memory, which the system clears first while the copy's is there: {new}."
    return wrapped(text)


def _percents(rows: Rows, metric: str) -> str:
    parts = []
    for kernel in BANDWIDTH_KERNELS:
        reached = values(rows, "bandwidth", metric, kernel)
        named = [f"{found['csmask']:.0f} % ({x.split()[0]})" for x, found in reached.items()]
        parts += [f"`{kernel}` {', '.join(named)}"] if named else []
    return "; ".join(parts)


def _targets(rows: Rows) -> str:
    """How many targets are met, and each one that is not, with what was reached and what was asked for."""
    found = verdicts(rows)
    if not found:
        return ""
    text = f"{sum(one.met for one in found)} of {len(found)} targets are met."
    missed: dict[str, list[Verdict]] = {}
    for one in found:
        if not one.met:
            missed.setdefault(one.what, []).append(one)
    for what, those in missed.items():
        reached = ", ".join(f"{one.reached:.2f}{one.unit} of {one.bound:.2f}{one.unit} ({one.x})" for one in those)
        text += f" Missed: {what}: {reached}."
    return wrapped(text)


def _auto(rows: Rows) -> str:
    over = [(value, x) for x, by in values(rows, "auto", "over best").items() for value in by.values()]
    if not over:
        return ""
    worst, where = max(over)
    return wrapped(
        f"What `auto` picks without `per_step` takes 1.00x to {worst:.2f}x ({where}) of the time of the faster one of "
        "`per_forward` and `in_kernel` in forward + backward."
    )


def _memory(rows: Rows) -> str:
    """Kept and scratch bytes of one layer, and scratch of several in a row, by provider."""
    kept, scratch = values(rows, "memory", "kept"), values(rows, "memory", "scratch")
    lines = []
    several = next((x.rpartition(", ")[2] for x in scratch if not x.endswith(", 1 layer")), "")
    providers = _present(kept)
    for x in kept:
        shape, _, count = x.rpartition(", ")
        if count != "1 layer":
            continue
        for what, found in (("kept", kept[x]), ("scratch", scratch[x]), (several, scratch.get(f"{shape}, {several}"))):
            if found:
                label = f"{shape}, {what if what != several else f'scratch of {several}'}"
                lines.append([label, *(f"{found[name]:.1f}" if name in found else "" for name in providers)])
    if not lines:
        return ""
    return markdown(["Bytes per weight of a layer beyond W, S, S.grad", *providers], lines)
