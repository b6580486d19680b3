"""The end of the GPU suite's output: what went wrong, the ceilings, and every ratio that is promised, in short."""

from __future__ import annotations

from typing import Any

from gpu_results import Results

MAX_FAILURES = 12
SHOWN = ("M=16 ", "M=1024 ")


def summary(results: Results) -> str:
    lines = [f"{results.gpu}, {results.version}, seed {results.about.get('seed')}"]
    if results.about.get("rehearsal"):
        lines.append("rehearsal: toy sizes in an interpreter; no time below means anything")
    for name, stage in results.stages.items():
        detail = [
            f"{len(stage[k])} {label}" for k, label in (("failures", "failed"), ("not_run", "not run")) if stage[k]
        ]
        detail += [stage["reason"]] if "reason" in stage else []
        lines.append(f"{name}: {stage['status']} in {stage.get('seconds', 0):.0f} s {', '.join(detail)}".rstrip())
    lines += _copy(results) + _correctness(results) + _elementwise(results) + _ratios(results) + _memory(results)
    lines += _search(results)
    failures = [f for stage in results.stages.values() for f in stage["failures"]]
    lines += [f"FAILED {f['what']}: {f['error'][:160]}" for f in failures[:MAX_FAILURES]]
    if len(failures) > MAX_FAILURES:
        lines.append(f"... and {len(failures) - MAX_FAILURES} more in {results.json_path.name}")
    return "\n".join(lines)


def _copy(results: Results) -> list[str]:
    copies = results.find(metric="bandwidth", kernel="copy", provider="kernel")
    rates = results.find(metric="rate")
    best = max(rates, key=lambda row: row["value"], default=None)
    found = [f"copy {row['value']:.0f} GB/s" for row in copies[-1:]]
    return (
        [", ".join(found + ([f"best product {best['value']:.0f} TFLOP/s ({best['x']})"] if best else []))]
        if found
        else []
    )


def _correctness(results: Results) -> list[str]:
    checked = results.stages.get("correctness", {}).get("checked", {})
    wrong = [f"{op} {tally['failed']} of {tally['checks']}" for op, tally in checked.items() if tally["failed"]]
    total = sum(tally["checks"] for tally in checked.values())
    return [f"{total} checks of {len(checked)} ops, wrong: {', '.join(wrong) or 'none'}"] if checked else []


def _search(results: Results) -> list[str]:
    tallies = results.stages.get("search", {}).get("candidates", {}).values()
    counts = ", ".join(f"{sum(tally[kind] for tally in tallies)} {kind}" for kind in ("timed", "wrong", "failed"))
    return [f"candidates of the search: {counts}"] if tallies else []


def _elementwise(results: Results) -> list[str]:
    rows = results.find(metric="of copy")
    return ["percent of copy: " + ", ".join(f"{r['kernel']} {r['value']:.0f}" for r in rows)] if rows else []


def _ratios(results: Results) -> list[str]:
    """A line for each kernel, mode and size (not all of them): dense in ms, the others as multiples of it."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in results.find(metric="over dense"):
        key = (row["kernel"], row["mode"], row["x"])
        if row["mode"] in ("step", "evaluation") and row["x"].startswith("M=") and not row["x"].startswith(SHOWN):
            continue
        if row["provider"] == "dense":
            time = results.find(metric="time", provider="dense", kernel=key[0], mode=key[1], x=key[2])[-1]
            lines[key] = [f"dense {time['value']:.3f} ms"]
        else:
            lines.setdefault(key, []).append(f"{row['provider']} {row['value']:.2f}x")
    return [f"{' '.join(key)}: {', '.join(parts)}" for key, parts in lines.items()]


def _memory(results: Results) -> list[str]:
    found: dict[str, dict[str, Any]] = {}
    for row in results.find(mode="memory"):
        found.setdefault(row["provider"], {})[row["metric"]] = row["value"]  # the last, largest weight
    short = {"resident": "resident", "peak": "peak", "saved for backward": "saved"}
    parts = [f"{p} " + " ".join(f"{short[m]} {v:.1f}" for m, v in values.items()) for p, values in found.items()]
    return [f"bytes per weight: {'; '.join(parts)}"] if parts else []
