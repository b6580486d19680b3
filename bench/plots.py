"""Plots of ``bench/run.py``'s rows: bars of time over dense by shape, and a roofline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from cases import Shape
from roofline import attainable, linear_bytes, linear_flops
from verdict import values

Rows = list[dict[str, Any]]
# Okabe and Ito's colours, which colour-blind readers tell apart; with each a marker, for black and white.
STYLES = {
    "dense": ("#000000", "s"),
    "eager": ("#D55E00", "v"),
    "eager (plain)": ("#D55E00", "v"),
    "compile": ("#E69F00", "^"),
    "per_step": ("#CC79A7", "P"),
    "per_forward": ("#0072B2", "o"),
    "in_kernel": ("#009E73", "D"),
}
BARS = [name for name in STYLES if name != "dense"]
CAPTION = {"fontsize": 8, "color": "#555555"}


PANELS = {
    "fwd_bwd": "Forward + backward of one masked linear layer",
    "step": "A step with AdamW",
    "step of 8": "A step of 8 micro-batches with AdamW",
}


def ratios(rows: Rows, path: Path) -> bool:
    """Time over dense, a group of bars for each shape, a panel for each mode; False where there are no such rows."""
    panels = {mode: {x: times for x, times in values(rows, mode, "time").items() if "dense" in times}
              for mode in PANELS}  # fmt: skip
    panels = {mode: found for mode, found in panels.items() if found}
    given = {name for found in panels.values() for times in found.values() for name in times}
    providers = [name for name in BARS if name in given]
    if "fwd_bwd" not in panels or not providers:
        return False
    columns = max(len(found) for found in panels.values())
    figure, all_axes = plt.subplots(
        len(panels), 1, figsize=(max(8.0, 1.45 * columns + 1), 0.4 + 4.2 * len(panels)), squeeze=False,
        constrained_layout=True,
    )  # fmt: skip
    for axes, (mode, found) in zip(all_axes[:, 0], panels.items(), strict=True):
        _bars(axes, found, providers)
        axes.set_title(f"{PANELS[mode]} (tokens x out x in); lower is better", fontsize=11)
    all_axes[0][0].legend(ncols=len(providers), frameon=False, loc="upper right")
    _save(figure, rows, path)
    return True


def _bars(axes: Any, found: dict[str, dict[str, float]], providers: list[str]) -> None:
    width = 0.8 / len(providers)
    for i, name in enumerate(providers):
        heights = {j: times[name] / times["dense"] for j, times in enumerate(found.values()) if name in times}
        places = [j + (i - (len(providers) - 1) / 2) * width for j in heights]
        above = [height - 1 for height in heights.values()]
        axes.bar(places, above, width * 0.92, bottom=1, color=STYLES[name][0], label=name)
        for place, height in zip(places, heights.values(), strict=True):
            text = f"{height:.1f}" if height >= 2 else f"{height:.2f}"
            axes.annotate(
                text, (place, max(height, 1)), (0, 2), textcoords="offset points", ha="center", fontsize=7, rotation=90
            )
    axes.axhline(1, color="black", linewidth=1)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.8), high * 1.5)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}x" if value in (2, 5) else "")
    axes.set_xticks(range(len(found)), [x.replace(" ", "\n", 1) for x in found])
    axes.tick_params(axis="x", length=0, labelsize=8.5)
    axes.set_ylabel("time over dense")
    axes.spines[["top", "right"]].set_visible(False)
    axes.annotate("dense = 1", (1, 1), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                  va="center", fontsize=8, annotation_clip=False)  # fmt: skip


def roofline(rows: Rows, path: Path) -> bool:
    """Achieved GFLOP/s over FLOP per byte, under the roof that the run measured; False where it measured none."""
    products = values(rows, "bandwidth", "rate", "product")
    copies = values(rows, "bandwidth", "rate", "copy")
    times = values(rows, "fwd_bwd", "time")
    peak = {x.split()[0]: found["torch"] for x, found in products.items()}
    copy = {x.split()[0]: found["torch"] for x, found in copies.items()}
    dtypes = [d for d in peak if d in copy and any(x.startswith(f"{d} ") for x in times)]
    if not dtypes:
        return False
    figure, all_axes = plt.subplots(
        1, len(dtypes), figsize=(5.8 * len(dtypes), 5.0), squeeze=False, sharey=True, constrained_layout=True
    )
    for axes, dtype in zip(all_axes[0], dtypes, strict=True):
        shapes = {x: Shape.parse(x) for x in times if x.startswith(f"{dtype} ")}
        _roof(axes, copy[dtype], peak[dtype], [linear_flops(s) / linear_bytes(s) for s in shapes.values()])
        for i, (name, (color, marker)) in enumerate(STYLES.items()):
            aside = 1.02 ** (i - len(STYLES) / 2)  # equal ones would hide each other
            points = [
                (aside * linear_flops(shape) / linear_bytes(shape), linear_flops(shape) / times[x][name] / 1e6)
                for x, shape in shapes.items()
                if name in times[x]
            ]
            if points:
                axes.scatter(*zip(*points, strict=True), color=color, marker=marker, s=36, label=name, zorder=3)
        for x, shape in shapes.items():
            intensity = linear_flops(shape) / linear_bytes(shape)
            lowest = min(linear_flops(shape) / ms / 1e6 for name, ms in times[x].items() if name in STYLES)
            axes.annotate(x.split(" ", 1)[1].replace(" x ", "x"), (intensity, lowest), (0, -7),
                          textcoords="offset points", rotation=90, ha="center", va="top", fontsize=7)  # fmt: skip
        axes.set_title(f"{dtype}: copy {copy[dtype]:.0f} GB/s, products {peak[dtype]:.0f} GFLOP/s", fontsize=11)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("FLOP per byte that dense training has to move")
    low, high = all_axes[0][0].get_ylim()  # of all of them
    all_axes[0][0].set_ylim(low / 5, high * 1.2)  # room for the shapes' names
    all_axes[0][0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    all_axes[0][0].set_ylabel("forward + backward, GFLOP/s of its three products")
    all_axes[0][-1].legend(frameon=False, loc="lower right")
    _save(figure, rows, path)
    return True


def _roof(axes: Any, copy: float, peak: float, intensities: list[float]) -> None:
    ridge = peak / copy
    ends = [min(*intensities, ridge) / 1.6, ridge, max(*intensities, ridge) * 1.6]
    axes.plot(ends, [attainable(x, copy, peak) for x in ends], color="#777777", linewidth=1.5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(True, which="major", color="#EEEEEE")
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, rows: Rows, path: Path) -> None:
    row = next(row for row in rows if row["mode"] == "fwd_bwd")
    figure.supxlabel(f"{row['gpu']}; {row['version']}; {row['time'][:10]}", x=0.01, ha="left", **CAPTION)
    figure.savefig(path, dpi=150)
    plt.close(figure)
