"""The GPU's tables say what its CSV says, and which targets that meets."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import gpu_report  # noqa: E402 - bench holds scripts, not a package
from gpu_results import COLUMNS  # noqa: E402

from csmask import cost  # noqa: E402

CSV = BENCH / "results" / "NVIDIA_H200.csv"


def row(provider, mode, value, x="M=16 N=64 K=32", metric="time", kernel="masked_linear"):
    filled = dict.fromkeys(COLUMNS, "")
    return {**filled, "kernel": kernel, "provider": provider, "mode": mode, "metric": metric, "x": x, "value": value,
            "gpu": "a GPU", "time": "2026-01-01T00:00:00Z", "version": "commit abc"}  # fmt: skip


TIMES = {"dense": 2.0, "eager": 30.0, "compile": 7.0, "per_step": 2.1, "per_forward": 6.0, "per_forward kept": 5.0,
         "in_kernel": 7.5, "neuron": 1.2}  # fmt: skip


def test_readme_and_page_are_what_the_csv_gives():
    assert CSV.is_file()
    assert gpu_report.main(["--check"]) == 0


def test_every_figure_of_the_csv_is_of_the_device_in_its_name():
    with CSV.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {r["gpu"] for r in rows} == {"NVIDIA H200"}
    assert {r["kernel"] for r in rows} >= {"masked_linear", "mask_adamw_", "materialize", "copy", "llama", "llama-3-8b"}


def test_targets_are_ratios_of_one_measurement():
    rows = [row(name, "forward+backward", ms) for name, ms in TIMES.items()]
    found = {t.what: t for t in gpu_report.targets(rows)}
    expected = {
        "per_step / dense": (1.05, False), "eager / per_step": (30 / 2.1, True), "compile / per_step": (7 / 2.1, True),
        "neuron / dense": (0.6, True), "in_kernel / per_forward": (1.25, False),
    }  # fmt: skip
    assert {what: (t.reached, t.met) for what, t in found.items()} == {
        what: (pytest.approx(ratio), met) for what, (ratio, met) in expected.items()
    }


@pytest.mark.parametrize(("m", "wanted"), [(16, 3.3), (128, 3.3), (1024, 1.45), (8192, 1.07), (32768, None)])
def test_bounds_go_by_tokens(m, wanted):
    rows = [row(name, "forward+backward", ms, x=f"M={m} N=64 K=32") for name, ms in TIMES.items()]
    bounds = {t.what: t.bound for t in gpu_report.targets(rows)}
    assert bounds.get("compile / per_step") == wanted
    assert ("in_kernel / per_forward" in bounds) == (m <= 256)


def test_percentages_are_at_least():
    rows = [row("csmask", "elementwise", percent, metric="of copy", kernel=kernel)
            for kernel, percent in (("materialize", 91.9), ("mask_adamw_", 92.0))]  # fmt: skip
    assert {t.what: t.met for t in gpu_report.targets(rows)} == {
        "materialize of copy": False,
        "mask_adamw_ of copy": True,
    }


def test_what_does_not_fit_has_no_figures():
    figures = [("lean", 1.0, "fits"), ("eager", 0.0, "fits"), ("lean", 12.3, "time"), ("lean", 650.4, "throughput"),
               ("lean", 60.05, "peak memory")]  # fmt: skip
    rows = [row(way, "training", value, "1 x 8 tokens", metric, "m") for way, value, metric in figures]
    lines = gpu_report.training_of(rows).splitlines()[2:]
    assert lines == [
        "| lean (m, 1 x 8 tokens) | 60.0 GiB | 12 ms | 650 |",
        "| eager (m, 1 x 8 tokens) | does not fit |  |  |",
    ]


def test_the_largest_models_are_a_table():
    figures = [("lean", 12.5, "masked weights"), ("lean", 57, "layers"), ("lean", 130.25, "peak memory"),
               ("eager", 3.7, "masked weights"), ("eager", 17, "layers")]  # fmt: skip
    rows = [row(way, "largest", value, "1 x 8 tokens", metric, "m") for way, value, metric in figures]
    for one in rows:
        one["config"] = "58 layers do not fit" if one["provider"] == "lean" else "no more were tried"
    assert gpu_report.largest_of(rows).splitlines()[2:] == [
        "| lean (1 x 8 tokens, 58 layers do not fit) | 12.50e9 | 57 | 130.2 GiB |",
        "| eager (1 x 8 tokens, no more were tried) | 3.70e9 | 17 |  |",
    ]
    assert gpu_report.largest_of([]) == ""


def test_what_is_missed_is_named_with_its_figure():
    text = gpu_report.verdict_of([row(name, "forward+backward", ms) for name, ms in TIMES.items()])
    assert text.startswith("3 of 5 targets are met.")
    assert "per_step / dense: 1.05x of 1.01x" in text.replace("\n", " ")


def test_without_a_csv_it_says_what_to_run(tmp_path, capsys):
    assert gpu_report.main(["--csv", str(tmp_path / "none.csv")]) == 1
    assert "gpu_suite.py" in capsys.readouterr().err


def test_auto_picks_what_was_measured_faster():
    """Of the two executions that need no optimizer of csmask's, at every shape of the GPU's table."""
    with CSV.open(newline="") as file:
        rows = [{**r, "value": float(r["value"])} for r in csv.DictReader(file)]
    times = gpu_report.values(rows, "forward+backward", "time")
    ceilings = cost.ceilings_of("cuda", "NVIDIA H200")
    assert len(times) == 10
    for x, found in times.items():
        m, n, k = (int(part.split("=")[1]) for part in x.split())
        pick = cost.choose(m, torch.empty(n, k, dtype=torch.bfloat16, device="meta"), ceilings, trains=True)
        measured = {"per_forward": found["per_forward kept"], "in_kernel": found["in_kernel"]}
        assert measured[pick] == min(measured.values()), x
