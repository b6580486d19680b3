"""Targets of ``bench/run.py`` and what ``bench/report.py`` makes of its rows: the README's table and plots."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))

import readme_table  # noqa: E402 - bench holds scripts, not a package
import report  # noqa: E402
import table  # noqa: E402
import verdict  # noqa: E402
from gpu_results import COLUMNS  # noqa: E402


def row(mode, provider, x, value, metric="time", kernel="masked_linear", time="2026-01-01T00:00:00Z", gpu="a CPU"):
    values = (kernel, provider, mode, metric, "ms", x, value, value, value, value, "", gpu, time, "commit 1")
    return dict(zip(COLUMNS, map(str, values), strict=True))


def test_the_latest_run_of_each_mode_on_the_last_device_counts():
    rows = [
        row("step", "dense", "a", 1, time="2026-01-01T00:00:00Z"),
        row("memory", "dense", "a", 2, time="2026-01-01T00:00:00Z"),
        row("step", "dense", "a", 3, time="2026-01-02T00:00:00Z"),
        row("auto", "dense", "a", 4, time="2025-01-02T00:00:00Z", gpu="another"),
    ]
    assert [(r["mode"], r["value"]) for r in table.latest(rows)] == [("step", 3.0), ("memory", 2.0)]
    assert table.latest([]) == []


def test_a_run_of_some_shapes_replaces_these_and_leaves_the_rest():
    rows = [
        row("step", "dense", "a", 1, time="2026-01-01T00:00:00Z"),
        row("step", "eager", "a", 2, time="2026-01-01T00:00:00Z"),
        row("step", "dense", "b", 3, time="2026-01-01T00:00:00Z"),
        row("step", "dense", "a", 4, time="2026-01-02T00:00:00Z"),
        row("step", "dense", "a", 5, kernel="another", time="2026-01-01T00:00:00Z"),
    ]
    assert [(r["x"], r["value"]) for r in table.latest(rows)] == [("a", 4.0), ("b", 3.0), ("a", 5.0)]


# Targets


def figures(per_forward, compiled, in_kernel, x):
    by_provider = {"dense": 1.0, "compile": compiled, "per_forward": per_forward, "in_kernel": in_kernel}
    return [{**row("fwd_bwd", name, x, 0), "value": value} for name, value in by_provider.items()]


@pytest.mark.parametrize(
    ("x", "times", "expected"),
    [
        ("fp32 128 x 4096 x 4096", (0.84, 1.0, 0.84), [True, True]),
        ("fp32 128 x 4096 x 4096", (0.86, 1.0, 0.87), [False, False]),
        ("fp32 128 x 768 x 768", (0.99, 1.0, 0.9), [True, True]),
        ("bf16 512 x 4096 x 4096", (0.8, 1.0, 2.0), [True]),  # in_kernel is for few tokens
        ("fp32 1024 x 768 x 768", (1.01, 1.0, 2.0), [False]),
    ],
)
def test_targets_of_time(x, times, expected):
    per_forward, compiled, in_kernel = times
    found = verdict.verdicts(figures(per_forward, compiled, in_kernel, x))
    assert [one.met for one in found] == expected
    assert found[0].reached == pytest.approx(per_forward / compiled)
    assert f"{x}: {per_forward:.2f}x (<= " in str(found[0])
    assert str(found[0]).startswith("met" if expected[0] else "MISSED")


def test_targets_of_bandwidth_and_memory():
    def one(mode, provider, x, metric, value, kernel="masked_linear"):
        return {**row(mode, provider, x, 0, metric, kernel), "value": value}

    shape = "bf16 16 x 64 x 64"
    rows = [
        one("bandwidth", "csmask", "fp32 64 x 64", "of copy", 81.0, "materialize"),
        one("bandwidth", "csmask", "fp32 64 x 64", "of copy", 79.0, "logits_grad"),
        one("bandwidth", "csmask", "fp32 64 x 64", "of copy", 1.0, "popcount"),
    ]
    for provider, kept, scratch, several in (("per_forward", 2.0, 8.0, 8.5), ("in_kernel", 2.0, 4.0, 16.0)):
        for count, value in (("1 layer", scratch), ("4 layers", several)):
            rows.append(one("memory", provider, f"{shape}, {count}", "kept", kept))
            rows.append(one("memory", provider, f"{shape}, {count}", "scratch", value))
    found = {(v.provider, v.what.split(", ")[1].split()[0], v.x.rpartition(", ")[2]): v.met
             for v in verdict.verdicts(rows)}  # fmt: skip
    assert found == {
        ("materialize", "bandwidth", "fp32 64 x 64"): True,
        ("logits_grad", "bandwidth", "fp32 64 x 64"): False,
        ("per_forward", "bytes/weight", "1 layer"): True,
        ("in_kernel", "bytes/weight", "1 layer"): False,
        ("per_forward", "bytes/weight", "4 layers"): True,
        ("in_kernel", "bytes/weight", "4 layers"): False,
        ("per_forward", "bytes", "4 layers"): True,
        ("in_kernel", "bytes", "4 layers"): False,
    }


# The report


@pytest.fixture
def reported(tmp_path):
    """A CSV with known figures and a README with markers."""
    rows = [
        row("fwd_bwd", name, x, value)
        for x in ("fp32 8 x 768 x 768", "bf16 16 x 4096 x 4096")
        for name, value in (("dense", 2.0), ("eager", 8.0), ("compile", 4.0), ("per_forward", 3.0), ("in_kernel", 2.5))
    ]
    for dtype in ("fp32", "bf16"):
        rows.append(row("bandwidth", "torch", f"{dtype} 64 x 64", 40, "rate", "copy"))
        rows.append(row("bandwidth", "torch", f"{dtype} 8 x 8 x 8", 100, "rate", "product"))
        rows.append(row("bandwidth", "csmask", f"{dtype} 64 x 64", 85, "of copy", "materialize"))
    path = tmp_path / "bench" / "cpu.csv"
    path.parent.mkdir()
    path.write_text(table._text(rows))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{readme_table.MARKERS[0]}\n{readme_table.MARKERS[1]}\nafter\n")
    return ["--csv", str(path), "--readme", str(readme)], readme, path


def test_the_report_writes_the_table_and_both_plots(reported):
    arguments, readme, path = reported
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    text = readme.read_text()
    assert "| fp32 8 x 768 x 768 | 2 ms | 4.00x | 2.00x | 1.50x | 1.25x |" in text
    flat = " ".join(text.split())
    assert "Of the bandwidth of a copy that took turns with each: `materialize` 85 % (fp32), 85 % (bf16)." in flat
    assert "The copy, reads and writes counted, moved 40 GB/s" in flat
    assert " targets are met." in flat
    assert "](bench/cpu_ratios.png)" in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    for name in ("cpu_ratios.png", "cpu_roofline.png"):
        assert path.with_name(name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_check_finds_an_edited_table_and_writes_nothing(reported, capsys):
    arguments, readme, _ = reported
    report.main(arguments)
    assert report.main([*arguments, "--check"]) == 0
    edited = readme.read_text().replace("1.25x", "1.20x")
    readme.write_text(edited)
    assert report.main([*arguments, "--check"]) == 1
    assert "differs" in capsys.readouterr().err
    assert readme.read_text() == edited
    readme.write_text("no markers\n")
    assert report.main(arguments) == 1
    assert readme.read_text() == "no markers\n"


def test_the_memory_table_has_markers_of_its_own(reported, capsys):
    arguments, readme, path = reported
    rows = [row("training", way, "some layers", value, metric)
            for way, values in (("eager", (18, 24)), ("lean", (14, 14.2)))
            for metric, value in zip(readme_table.MEMORY_METRICS, values, strict=True)]  # fmt: skip
    path.with_name("cpu_memory.csv").write_text(table._text(rows))
    assert report.main(arguments) == 1  # no such markers
    first, last = readme_table.MEMORY_MARKERS
    readme.write_text(f"{first}\n{last}\n{readme.read_text()}")
    assert report.main(arguments) == 0
    assert readme_table.between(readme.read_text(), (first, last)).splitlines() == [
        "| Bytes per masked weight, some layers | after a step | at the peak |", "| --- | --: | --: |",
        "| eager | 18.00 | 24.00 |", "| lean | 14.00 | 14.20 |",
    ]  # fmt: skip
    assert report.main([*arguments, "--check"]) == 0
    readme.write_text(readme.read_text().replace("14.20", "14.10"))
    capsys.readouterr()
    assert report.main([*arguments, "--check"]) == 1
    assert "differs from" in capsys.readouterr().err


def test_a_report_needs_rows(tmp_path, capsys):
    assert report.main(["--csv", str(tmp_path / "none.csv"), "--check"]) == 1
    assert "python bench/run.py" in capsys.readouterr().err


def test_the_readmes_table_is_what_the_results_give():
    if not (BENCH / "results" / "cpu.csv").is_file():
        assert readme_table.between((ROOT / "README.md").read_text()) == ""
        return
    assert report.main(["--check"]) == 0


def test_the_table_names_what_misses_its_target_and_how_far_the_choice_is_off():
    rows = figures(0.9, 1.0, 0.8, "fp32 8 x 768 x 768") + figures(1.2, 1.0, 1.3, "fp32 16 x 768 x 768")
    rows.append({**row("auto", "in_kernel", "fp32 16 x 768 x 768", 0, "over best"), "value": 1.08})
    text = " ".join(readme_table.table_of(rows, "plot.png").split())
    assert "2 of 4 targets are met." in text
    assert "Missed: per_forward / compile, forward + backward: 1.20x of 1.00x (fp32 16 x 768 x 768)." in text
    assert "in_kernel / per_forward, forward + backward: 1.08x of 1.00x (fp32 16 x 768 x 768)." in text
    assert "takes 1.00x to 1.08x (fp32 16 x 768 x 768) of the time of the faster" in text


def test_per_step_is_held_to_dense_and_to_the_bytes_of_its_kernel():
    x = "fp32 128 x 4096 x 4096"
    rows = [{**row("fwd_bwd", name, x, 0), "value": value} for name, value in (("dense", 80.0), ("per_step", 81.0))]
    rows += [{**row("step", name, x, 0), "value": value} for name, value in (("compile", 130.0), ("per_step", 98.0))]
    rows.append({**row("bandwidth", "torch", "fp32 4096 x 4096", 0, "rate", kernel="copy"), "value": 40.0})
    found = {one.what: (one.reached, one.bound, one.met) for one in verdict.verdicts(rows)}
    assert found["per_step / dense, forward + backward"] == (pytest.approx(1.0125), 1.02, True)
    assert found["per_step / compile, step"] == (pytest.approx(98 / 130), 0.75, False)
    # 16,777,216 weights of 36 bytes at 40 GB/s are 15.1 ms
    assert found["per_step, step in ms"] == (98.0, pytest.approx(80 + 1.25 * 15.099, rel=1e-4), True)
