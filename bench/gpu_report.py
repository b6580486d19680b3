"""The README's GPU table, docs/performance.md and a plot, from the CSV that ``bench/gpu_suite.py`` leaves.

python bench/gpu_report.py            # from bench/results/NVIDIA_H200.csv
python bench/gpu_report.py --check    # exit status 1 if a text is not what the CSV gives; writes nothing
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_results import write_atomically
from readme_table import markdown, with_table, wrapped
from table import read
from verdict import values

ROOT = Path(__file__).resolve().parent.parent
MARKERS = ("<!-- gpu-table:begin -->", "<!-- gpu-table:end -->")
COLUMNS = ("dense", "eager", "compile", "compile, max-autotune", "per_step", "per_forward kept", "per_forward",
           "in_kernel", "neuron", "bits", "auto")  # fmt: skip
README_COLUMNS = ("dense", "eager", "compile", "per_step", "per_forward kept", "in_kernel")
LINEAR = "masked_linear"
MODES = {
    "forward+backward": "Forward + backward",
    "step": "A full step of one micro-batch",
    "step of 8": "A full step of 8 micro-batches",
    "evaluation": "Evaluation under the hard mask",
    "forward+backward, launched": "Forward + backward, launched as it comes",
    "step, launched": "A full step of one micro-batch, launched as it comes",
    "forward+backward, autotuned": "Forward + backward, beside `max-autotune`",
    "step, autotuned": "A full step of one micro-batch, beside `max-autotune`",
}
ELEMENTWISE = ("materialize", "logits_grad", "mask_adamw_", "mask_adamw_ 8 bits", "mask_sgd_")
Rows = list[dict[str, Any]]
Times = dict[str, dict[str, float]]


# Targets


@dataclass(frozen=True)
class Target:
    """A bound on a figure: at most, or at least."""

    what: str
    x: str
    reached: float
    bound: float
    at_least: bool = False
    unit: str = "x"

    @property
    def met(self) -> bool:
        return self.reached >= self.bound if self.at_least else self.reached <= self.bound

    def __str__(self) -> str:
        return f"{self.reached:.2f}{self.unit} of {self.bound:.2f}{self.unit} ({self.x})"


def targets(rows: Rows) -> Iterator[Target]:
    """What is promised of a GPU, and what was reached."""
    both, steps = values(rows, "forward+backward", "time", LINEAR), values(rows, "step of 8", "time", LINEAR)
    for x, found in both.items():
        m = tokens(x)
        yield Target("per_step / dense", x, found["per_step"] / found["dense"], 1.01)
        for name, bounds in (
            ("eager", {128: 10, 1024: 2.8, 8192: 1.28}),
            ("compile", {128: 3.3, 1024: 1.45, 8192: 1.07}),
        ):
            bound = next((bound for most, bound in bounds.items() if m <= most), None)
            if bound is not None:
                yield Target(f"{name} / per_step", x, found[name] / found["per_step"], bound, at_least=True)
        if "neuron" in found:
            yield Target("neuron / dense", x, found["neuron"] / found["dense"], 0.68)
        if m <= 256:
            yield Target("in_kernel / per_forward", x, found["in_kernel"] / found["per_forward"], 1.0)
    for x, found in steps.items():
        if tokens(x) == 1024:
            yield Target("compile / per_step, step of 8", x, found["compile"] / found["per_step"], 1.6, at_least=True)
    for x, found in values(rows, "evaluation", "time", LINEAR).items():
        if tokens(x) <= 16:
            yield Target("bits / dense, evaluation", x, found["bits"] / found["dense"], 1.06)
    for kernel in ELEMENTWISE:
        for x, found in values(rows, "elementwise", "of copy", kernel).items():
            yield Target(f"{kernel} of copy", x, found["csmask"], 92, at_least=True, unit=" %")


def tokens(x: str) -> int:
    """M of ``M=16 N=4096 K=4096``."""
    found = re.match(r"M=(\d+)", x)
    if found is None:
        raise ValueError(f"expected M=... in front, got {x!r}")
    return int(found[1])


def verdict_of(rows: Rows) -> str:
    found = list(targets(rows))
    text = f"{sum(one.met for one in found)} of {len(found)} targets are met."
    missed: dict[str, list[str]] = {}
    for one in found:
        if not one.met:
            missed.setdefault(one.what, []).append(str(one))
    for what, those in missed.items():
        text += f" Missed: {what}: {', '.join(those)}."
    return wrapped(text)


# Text


def training_of(rows: Rows) -> str:
    """Steps of models of users' sizes, by way to train the masks: what does not fit has no figures."""
    lines = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows if row["mode"] == "training"):
        fits, times = values(rows, "training", "fits", kernel), values(rows, "training", "time", kernel)
        rates, peaks = values(rows, "training", "throughput", kernel), values(rows, "training", "peak memory", kernel)
        for x, ways in fits.items():
            for way, does in ways.items():
                figures = ["does not fit", "", ""]
                if does:
                    figures = [f"{peaks[x][way]:.1f} GiB", f"{times[x][way]:.0f} ms", f"{rates[x][way]:.0f}"]
                lines.append([f"{way} ({kernel}, {x})", *figures])
    return markdown(["Masks on every linear layer", "peak memory", "a step", "tokens/s"], lines) if lines else ""


def largest_of(rows: Rows) -> str:
    """The most that trains, by way to train it."""
    lines = []
    for row in rows:
        if (row["mode"], row["metric"]) != ("largest", "masked weights"):
            continue
        kernel, way, x = row["kernel"], row["provider"], row["x"]
        layers = values(rows, "largest", "layers", kernel)[x][way]
        peak = values(rows, "largest", "peak memory", kernel).get(x, {}).get(way)
        gib = "" if peak is None else f"{peak:.1f} GiB"
        lines.append([f"{way} ({x}, {row['config']})", f"{row['value']:.2f}e9", f"{layers:.0f}", gib])
    titles = ["The most masked weights that train, in layers of Llama-3-8B's width", "weights", "layers", "peak memory"]
    return markdown(titles, lines) if lines else ""


def about(rows: Rows) -> str:
    runs: dict[str, list[str]] = {}
    for row in rows:
        modes = runs.setdefault(f"{row['time'][:10]}, {row['version']}", [])
        mode = "checks" if row["metric"] == "error / limit" else row["mode"]
        if mode not in modes:
            modes.append(mode)
    told = [run if len(runs) == 1 else f"{', '.join(modes)}: {run}" for run, modes in runs.items()]
    text = (
        f"{rows[0]['gpu']}; {'; '.join(told)}; bf16, fp32 logits. Medians of replays of a CUDA graph with cold L2, all "
        "taking turns, as multiples of dense."
    )
    copies = values(rows, "copy", "bandwidth", "copy")
    products = values(rows, "product", "rate", "matmul")
    best = max(max(found.values()) for found in products.values())
    copied = ", ".join(f"{found['kernel']:.0f} GB/s" for found in copies.values())
    return wrapped(
        f"{text} A copy, reads and writes counted, moved {copied}; the best product ran at {best:.0f} TFLOP/s."
    )


def ordered(by_x: Times) -> Times:
    """By weight, then by tokens."""
    return dict(sorted(by_x.items(), key=lambda item: (*map(int, re.findall(r"[NK]=(\d+)", item[0])), tokens(item[0]))))


def _shape(x: str) -> str:
    return x.replace(" N=", " x ").replace(" K=", " x ").replace("M=", "")


def table_of(rows: Rows, mode: str, title: str, columns: tuple[str, ...], kernel: str = LINEAR) -> str:
    """Dense in ms, the others as multiples of it."""
    found = {x: times for x, times in values(rows, mode, "time", kernel).items() if "dense" in times}
    if not found:
        return ""
    found = ordered(found) if kernel == LINEAR else found
    names = [name for name in columns if any(name in times for times in found.values())]
    lines = []
    for x, times in found.items():
        cells = [
            ""
            if name not in times
            else f"{times[name]:.3g} ms"
            if name == "dense"
            else f"{times[name] / times['dense']:.2f}x"
            for name in names
        ]
        lines.append([_shape(x), *cells])
    return markdown([title, *names], lines)


def elementwise_of(rows: Rows) -> str:
    lines = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows if row["mode"] == "elementwise"):
        for x, found in values(rows, "elementwise", "of copy", kernel).items():
            rate = values(rows, "elementwise", "bandwidth", kernel)[x]["csmask"]
            lines.append([f"`{kernel}`", x, f"{rate:.0f} GB/s", f"{found['csmask']:.0f} %"])
    return markdown(["Elementwise kernel", "weight", "bandwidth", "of a copy"], lines) if lines else ""


def memory_of(rows: Rows) -> str:
    metrics = ("resident", "peak", "saved for backward")
    lines = []
    by_metric = {metric: values(rows, "memory", metric, LINEAR) for metric in metrics}
    for x, resident in by_metric["resident"].items():
        names = [name for name in COLUMNS if name in resident]
        lines += [[f"{name}, {x}", *(f"{by_metric[metric][x][name]:.1f}" for metric in metrics)] for name in names]
    return markdown(["Bytes per weight of one layer", *metrics], lines) if lines else ""


def models_of(rows: Rows) -> list[str]:
    kernels = dict.fromkeys(row["kernel"] for row in rows if row["mode"] == "step in a graph")
    titles = {"step in a graph": "in a CUDA graph", "step": "launched as it comes"}
    return [
        table_of(rows, mode, f"A step of {kernel}, {title}", COLUMNS, kernel)
        for mode, title in titles.items()
        for kernel in kernels
    ]


def short(rows: Rows, plot: str) -> str:
    """What the README says."""
    parts = [about(rows), table_of(rows, "forward+backward", f"{MODES['forward+backward']}, M x N x K", README_COLUMNS)]
    parts += [training_of(rows), f"![Time over dense, by shape]({plot})", verdict_of(rows)]
    return "\n\n".join(part for part in parts if part)


def whole(rows: Rows, plot: str) -> str:
    """docs/performance.md."""
    parts = ["# Performance on a GPU", f"Written by `python bench/gpu_report.py`. {''}".strip(), about(rows)]
    parts += [table_of(rows, mode, f"{title}, M x N x K", COLUMNS) for mode, title in MODES.items()]
    parts += [
        f"![Time over dense, by shape]({plot})",
        elementwise_of(rows),
        *models_of(rows),
        training_of(rows),
        largest_of(rows),
        memory_of(rows),
    ]
    parts += [verdict_of(rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def draw(rows: Rows, path: Path) -> None:
    """``plots.ratios`` of what layers do in training: there the masked weight is kept."""
    from plots import ratios

    names = {name: name for name in ("dense", "eager", "compile", "per_step", "in_kernel")}
    names["per_forward kept"] = "per_forward"
    found = [r for r in rows if (r["mode"], r["kernel"]) == ("forward+backward", LINEAR) and r["provider"] in names]
    places = {x: i for i, x in enumerate(ordered(values(rows, "forward+backward", "time", LINEAR)))}
    found.sort(key=lambda row: places.get(row["x"], len(places)))
    named = [{**r, "mode": "fwd_bwd", "provider": names[r["provider"]], "x": f"bf16 {_shape(r['x'])}"} for r in found]
    ratios(named, path)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=ROOT / "bench" / "results" / "NVIDIA_H200.csv")
    parser.add_argument("--check", action="store_true", help="compare only")
    options = parser.parse_args(arguments)
    rows: Rows = [{**row, "value": float(row["value"])} for row in read(options.csv)]
    if not rows:
        print(f"{options.csv} has no rows: run python bench/gpu_suite.py on a GPU first", file=sys.stderr)
        return 1
    readme, page = ROOT / "README.md", ROOT / "docs" / "performance.md"
    plot = f"bench/results/{options.csv.stem}_ratios.png"
    wanted = {readme: with_table(readme.read_text(), short(rows, plot), MARKERS), page: whole(rows, f"../{plot}")}
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
    if options.check:
        for path in stale:
            print(f"{path}: differs from {options.csv}; run python bench/gpu_report.py", file=sys.stderr)
        return int(bool(stale))
    draw(rows, ROOT / plot)
    for path, text in wanted.items():
        write_atomically(path, text)
    print("\n".join(str(path) for path in (*wanted, ROOT / plot)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
