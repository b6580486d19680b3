"""What the demo prints, draws and writes: the table, the verdict, three figures and the numbers behind them.

A *run* is the plain dict that ``noun_verb`` keeps per trained mask: ``name``, ``seed``, ``evaluation`` (of
``CircuitEvaluation.to_dict``), ``layers`` (kept and maskable weights by name) and ``history``.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Run = dict[str, Any]

CONDITIONS = ("full", "circuit", "ablated", "random")
MAX_KEPT = 0.05
MAX_MISSED = 0.1  # of a target for the kept fraction
MAX_DROP = 0.03
MAX_ABLATED = 0.60
MIN_SELECTIVITY = 0.30

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLOURS = {"full": "#666666", "circuit": "#0072B2", "ablated": "#D55E00", "random": "#009E73"}
_SEED_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00")
_CONTROL_COLOUR = "#999999"
_MODULES = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention\noutput",
    "intermediate.dense": "MLP in",
    "output.dense": "MLP out",
}


@dataclass(frozen=True)
class Check:
    """One condition on the circuits: the worst value among them against its limit."""

    name: str
    value: float
    limit: float
    met: bool


def score(run: Run, condition: str) -> float:
    """Mean accuracy of a run in one of ``CONDITIONS``."""
    return float(run["evaluation"][condition]["mean"])


def kept(run: Run) -> float:
    """Kept fraction of a run's circuit."""
    return float(run["evaluation"]["circuit"]["kept"])


def selectivity(run: Run) -> float:
    """Random minus ablated accuracy of a run."""
    return float(run["evaluation"]["selectivity"])


def checks(runs: Sequence[Run], control: Run) -> list[Check]:
    """What must hold for each mask seed, and for the control; the verdict needs the two on selectivity."""
    target = runs[0].get("identity", {}).get("l0_target")
    if target is None:
        most_kept = max(kept(run) for run in runs)
        size = Check("kept fraction, at most", most_kept, MAX_KEPT, most_kept <= MAX_KEPT)
    else:
        missed = max(abs(kept(run) / target - 1) for run in (*runs, control))
        size = Check(f"kept fraction / {target} - 1, at most", missed, MAX_MISSED, missed <= MAX_MISSED)
    drop = max(score(run, "full") - score(run, "circuit") for run in runs)
    ablated = max(score(run, "ablated") for run in runs)
    least = min(selectivity(run) for run in runs)
    found = selectivity(control)
    return [
        size,
        Check("accuracy lost by the circuit (full - circuit), at most", drop, MAX_DROP, drop <= MAX_DROP),
        Check("accuracy without the circuit (ablated), at most", ablated, MAX_ABLATED, ablated <= MAX_ABLATED),
        Check("selectivity (random - ablated), at least", least, MIN_SELECTIVITY, least >= MIN_SELECTIVITY),
        Check("selectivity over shuffled weights, below", found, MIN_SELECTIVITY, found < MIN_SELECTIVITY),
    ]


def table(runs: Sequence[Run], control: Run) -> str:
    """One line per mask seed, their mean and spread (sample standard deviation), and the control."""
    columns = ("kept", *CONDITIONS, "selectivity")
    rows = [(run["name"], [kept(run), *(score(run, c) for c in CONDITIONS), selectivity(run)]) for run in runs]
    values = list(zip(*(row for _, row in rows), strict=True))
    if len(runs) > 1:
        rows.append(("mean", [statistics.fmean(column) for column in values]))
        rows.append(("spread", [statistics.stdev(column) for column in values]))
    rows.append(
        (control["name"], [kept(control), *(score(control, c) for c in CONDITIONS), selectivity(control)]),
    )
    lines = [f"{'':<18}" + "".join(f"{name:>{max(9, len(name) + 2)}}" for name in columns)]
    for name, row in rows:
        cells = [f"{row[0]:>9.2%}"]
        cells += [f"{v:>{max(9, len(c) + 2)}.3f}" for c, v in zip(columns[1:], row[1:], strict=True)]
        lines.append(f"{name:<18}" + "".join(cells))
    return "\n".join(lines)


def verdict(runs: Sequence[Run], control: Run) -> str:
    """The checks and what follows from selectivity."""
    results = checks(runs, control)
    lines = [f"  {'yes' if c.met else 'NO ':<4}{c.name} {c.limit:.2f}: {c.value:.3f}" for c in results]
    circuit, shuffled = results[3], results[4]
    if circuit.met and shuffled.met:
        text = (
            f"found a circuit. Removing it costs at least {circuit.value:.2f} accuracy more than removing as many\n"
            f"random weights; over shuffled weights, read by the same head, {shuffled.value:.2f} more."
        )
    elif not circuit.met:
        text = (
            f"no circuit shown. Removing it costs only {circuit.value:.2f} accuracy more than removing as many\n"
            f"random weights, where {MIN_SELECTIVITY:.2f} is asked for."
        )
    else:
        text = (
            f"not conclusive. Over shuffled weights it is {shuffled.value:.2f},\n"
            f"not below {MIN_SELECTIVITY:.2f}: it does not tell a circuit found from one learned."
        )
    lines.append(f"Verdict, from selectivity: {text}")
    accuracy, frozen = score(control, "circuit"), score(control, "full")
    if accuracy > frozen + 0.1:
        lines.append(
            f"(The circuit's own accuracy would not tell: the mask brought shuffled weights from {frozen:.2f} "
            f"to {accuracy:.2f}.)"
        )
    return "\n".join(lines)


def metrics(runs: Sequence[Run], control: Run) -> dict[str, Any]:
    """The numbers of table, verdict and figures but the training curves."""
    results = checks(runs, control)
    return {
        "runs": [{k: v for k, v in run.items() if k != "history"} for run in (*runs, control)],
        "checks": [asdict(check) for check in results],
        "circuit_found": results[3].met and results[4].met,
    }


def draw(runs: Sequence[Run], control: Run, directory: Path) -> list[Path]:
    """Write ``accuracy.png``, ``kept.png`` and ``training.png`` into the directory."""
    figures = {"accuracy": accuracy_figure, "kept": kept_figure, "training": training_figure}
    paths = []
    for name, make in figures.items():
        path = directory / f"{name}.png"
        make(runs, control).savefig(path, dpi=150)
        paths.append(path)
    return paths


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def accuracy_figure(runs: Sequence[Run], control: Run) -> Figure:
    """The four accuracies with every single score, over MiniLM and over shuffled weights, and the selectivity."""
    figure = _figure(9, 4.4)
    left, right = figure.subplots(1, 2, sharey=True)
    seeds = "1 mask seed" if len(runs) == 1 else f"{len(runs)} mask seeds"
    for axes, shown, title in ((left, runs, f"MiniLM, {seeds}"), (right, [control], "Shuffled weights (control)")):
        for x, condition in enumerate(CONDITIONS):
            scores = [s for run in shown for s in run["evaluation"][condition]["scores"]]
            mean = statistics.fmean(scores)
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            axes.bar(x, mean, width=0.62, color=_COLOURS[condition], alpha=0.85)
            if spread:
                axes.errorbar(x, mean, spread, color="black", capsize=4, linewidth=1)
            offsets = [0.4 * (i / (len(scores) - 1) - 0.5) if len(scores) > 1 else 0.0 for i in range(len(scores))]
            axes.scatter(
                [x + o for o in offsets], scores, s=11, color="white", edgecolor="black", linewidth=0.6, zorder=3
            )
            axes.text(x, max([*scores, mean + spread]) + 0.02, f"{mean:.3f}", ha="center", fontsize=9)
        share = statistics.fmean(kept(run) for run in shown)
        axes.set_xticks(range(4), ["full", f"circuit\n({share:.1%} kept)", "circuit\nremoved", "random\nremoved"])
        value = statistics.fmean(selectivity(run) for run in shown)
        axes.set_title(f"{title}\nselectivity {value:.2f}", fontsize=11)
        axes.axhline(0.5, color="black", linestyle=":", linewidth=1)
        _tidy(axes)
    right.text(1.5, 0.505, "chance", fontsize=8, ha="center", va="bottom")  # in the gap between two bars
    left.set(ylim=(0, 1.09), ylabel="accuracy on unseen lemmas")
    figure.supxlabel(
        "bars: mean and standard deviation over mask seeds and random draws; points: every score", fontsize=8
    )
    return figure


def kept_figure(runs: Sequence[Run], control: Run) -> Figure:
    """Kept fraction per block and kind of layer: MiniLM (mean and spread over seeds) beside the control."""
    figure = _figure(10.5, 3.6)
    panels = figure.subplots(1, 2)
    maps = [_layer_map([run]) for run in (*runs, control)]
    top = max(max(row) for found in maps for row in found)
    image = None
    for axes, shown, title in ((panels[0], list(runs), "MiniLM"), (panels[1], [control], "Shuffled weights (control)")):
        mean = _layer_map(shown)
        image = axes.imshow(mean, cmap="Blues", vmin=0, vmax=top, aspect="auto")
        for row, values in enumerate(mean):
            for column, value in enumerate(values):
                each = [_layer_map([run])[row][column] for run in shown]
                text = f"{value:.1%}" + (f"\n± {100 * statistics.stdev(each):.1f}" if len(each) > 1 else "")
                colour = "white" if value > 0.65 * top else "black"
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(len(_MODULES)), list(_MODULES.values()), fontsize=8)
        axes.set_yticks(range(len(mean)), [f"block {i}" for i in range(len(mean))])
        share = statistics.fmean(kept(run) for run in shown)
        seeds = "" if len(shown) == 1 else f"\n(mean and spread of {len(shown)} mask seeds)"
        axes.set_title(f"{title}: {share:.2%} of the weights kept{seeds}", fontsize=11)
    if image is not None:
        bar = figure.colorbar(image, ax=panels, format=lambda value, _: f"{value:.0%}", pad=0.01)
        bar.set_label("kept fraction")
    return figure


def _layer_map(runs: Sequence[Run]) -> list[list[float]]:
    """Mean kept fraction over runs: one row per block, one column per kind of layer."""
    cells: dict[tuple[int, str], float] = {}
    for run in runs:
        for name, counts in run["layers"].items():
            match = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", name)
            if match is None:
                raise ValueError(f"{name} is not a layer of a BERT block")
            key = int(match[1]), match[2]
            cells[key] = cells.get(key, 0.0) + counts["kept"] / counts["weights"] / len(runs)
    return [[cells[block, kind] for kind in _MODULES] for block in range(1 + max(block for block, _ in cells))]


def training_figure(runs: Sequence[Run], control: Run) -> Figure:
    """Cross-entropy, kept fraction, l0 and undecided fraction over the steps, with the temperature above."""
    figure = _figure(10.5, 6.4)
    panels = figure.subplots(2, 2, sharex=True).flatten()
    styles = [(run, _SEED_COLOURS[i % len(_SEED_COLOURS)], "-") for i, run in enumerate(runs)]
    for run, colour, line in (*styles, (control, _CONTROL_COLOUR, "--")):
        history = run["history"]
        steps = [row["step"] for row in history]
        looked = [row for row in history if "kept" in row]
        at = [row["step"] for row in looked]
        style = {"color": colour, "linestyle": line, "linewidth": 1.6}
        panels[0].plot(steps, [row["cross_entropy"] for row in history], color=colour, alpha=0.22, linewidth=0.8)
        panels[0].plot(steps, _smooth([row["cross_entropy"] for row in history]), label=run["name"], **style)
        panels[1].plot(steps, [row["l0"] for row in history], **style)
        panels[1].plot(at, [row["kept"] for row in looked], color=colour, linestyle=":", linewidth=1.3)
        panels[2].plot(at, [row["undecided"] for row in looked], **style)
    panels[3].plot(steps, [row["temperature"] for row in history], color="black", linewidth=1.6)
    panels[0].set(title="cross-entropy on the batch, and its running median", yscale="log")
    panels[0].legend(fontsize=8, frameon=False, loc="lower left")
    panels[1].set(title="share of the weights in use", yscale="log")
    panels[1].plot([], [], color="black", label="soft mask (mean l0)")
    panels[1].plot([], [], color="black", linestyle=":", label="hard mask (kept)")
    panels[1].legend(fontsize=8, frameon=False)
    panels[2].set(title="share of undecided weights (|T·S| < 4)", xlabel="step", ylim=(0, 1.03))
    panels[3].set(title="temperature", xlabel="step", yscale="log")
    panels[1].yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    panels[1].yaxis.set_minor_formatter(lambda value, _: f"{value:.3g}" if f"{value:e}"[0] in "25" else "")
    panels[3].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for axes in panels:
        axes.title.set_fontsize(11)
        _tidy(axes)
    return figure


def _smooth(values: Sequence[float], window: int = 9) -> list[float]:
    """Centred running median, over fewer values at the ends: single batches reach far."""
    half = window // 2
    return [statistics.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
