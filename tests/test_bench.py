"""``bench/run.py``: its rows, the check before timing, meters, and what is left of a run that is stopped."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from csmask import functional

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))

import cases  # noqa: E402 - bench holds scripts, not a package
import linear_providers  # noqa: E402
import linear_training  # noqa: E402
import memory  # noqa: E402
import memory_meter  # noqa: E402
import mode_bandwidth  # noqa: E402
import mode_end_to_end  # noqa: E402
import providers  # noqa: E402
import roofline  # noqa: E402
import run  # noqa: E402
import table  # noqa: E402
import verdict  # noqa: E402
from gpu_results import COLUMNS, Context  # noqa: E402
from gpu_timing import Clock  # noqa: E402

CPU = torch.device("cpu")
CSMASK = ("per_step", "per_forward", "in_kernel", "auto")


def context_of(path: Path) -> Context:
    return Context(table.Table(path, "a CPU"), Clock(CPU), CPU, True, torch.float32, 0, deadline=math.inf)


# The whole run


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One run of every mode at tiny sizes, as a user starts it."""
    out = tmp_path_factory.mktemp("bench")
    command = [sys.executable, str(BENCH / "run.py"), "--quick", "--threads", "1", "--output", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=out, env={**os.environ})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return out, done.stdout


def test_every_mode_of_a_run_leaves_its_rows(quick):
    out, printed = quick
    rows = table.read(out / "cpu.csv")
    assert f"{len(rows)} rows are in {out / 'cpu.csv'}" in printed
    eager = "eager" if linear_providers.neurosurgeon() else "eager (plain)"
    for mode in ("fwd_bwd", "step", "step of 8", "memory"):
        found = {row["provider"] for row in rows if row["mode"] == mode}
        assert found == {"dense", eager, "compile", *CSMASK}, mode
    assert {row["kernel"] for row in rows if row["mode"] == "end_to_end"} == {
        "bert-base", "gpt2-small", "vit-base", "resnet-50",
    }  # fmt: skip
    assert {row["x"] for row in rows if row["mode"] == "auto"} == {shape.name for shape in cases.QUICK_SHAPES}
    for dtype in cases.DTYPES:
        of_copy = {r["kernel"] for r in rows if r["metric"] == "of copy" and r["x"].startswith(dtype)}
        assert {"materialize", "logits_grad", "mask_sums", "apply_bitmask", "pack_mask", "scale_neurons"} <= of_copy
    for row in rows:
        p20, p50, p80 = (float(row[name]) for name in ("p20", "p50", "p80"))
        assert p20 <= p50 <= p80
        assert row["gpu"].endswith(", 1 thread")
        assert row["time"] == rows[0]["time"]
    assert "targets met, in times that mean nothing" in printed


def test_ratios_are_those_of_the_times_beside_them(quick):
    rows = table.latest(table.read(quick[0] / "cpu.csv"))
    times = verdict.values(rows, "step", "time")
    ratios = verdict.values(rows, "step", "over dense")
    assert set(times) == set(ratios)
    for x, by_provider in ratios.items():
        for name, ratio in by_provider.items():
            assert ratio == pytest.approx(times[x][name] / times[x]["dense"])


def test_memory_rows_are_what_each_mode_is_known_to_keep(quick):
    rows = table.latest(table.read(quick[0] / "cpu.csv"))
    kept, saved = (verdict.values(rows, "memory", metric) for metric in ("kept", "saved for backward"))
    x = "fp32 16 x 64 x 64, 1 layer"
    assert kept[x]["per_forward"] == pytest.approx(4, abs=0.01)  # the masked weight
    assert kept[x]["per_step"] == pytest.approx(4, abs=0.01)  # too, and its gradient in place of the logits'
    assert kept[x]["in_kernel"] == pytest.approx(0, abs=0.01)
    assert kept[x]["dense"] == kept[x]["compile"] == 0
    assert all(saved[x][name] == 0 for name in ("dense", *CSMASK))
    if linear_providers.neurosurgeon():
        assert kept[x]["eager"] == 4  # the mask, an attribute of the layer
        # Beyond that and W: the mask once more, for l0, and the masked weight.
        assert saved[x]["eager"] == 12


@pytest.mark.parametrize("arguments", [["--shapes", "8x8"], ["--shapes", "0x8x8"], ["--dtypes", "fp8"],
                                       ["--dtypes", "fp16"], ["--mode", "speed"], ["--rounds", "0"]])  # fmt: skip
def test_an_argument_that_means_nothing_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        run.parse(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err


def test_shapes_are_the_tables_rows_or_those_asked_for():
    names = [shape.name for shape in cases.shapes("cpu", False, None, None)]
    assert names[0] == "fp32 8 x 768 x 768"
    assert names[-1] == "bf16 512 x 4096 x 4096"
    assert len(names) == 9
    asked = cases.shapes("cpu", False, "3x5x7", "bf16,fp16")
    assert asked == [cases.Shape("bf16", 3, 5, 7), cases.Shape("fp16", 3, 5, 7)]
    assert [cases.Shape.parse(shape.name) for shape in asked] == asked


# The gate


@pytest.mark.parametrize("fault", ["out", "a lost tail", "dx", "dlogits", "l0", "l0's gradient"])
def test_a_wrong_provider_is_not_timed_and_the_exit_status_says_so(tmp_path, monkeypatch, capsys, fault):
    right = functional.masked_linear

    def wrong(x, weight, mask_logits, *args, execution="per_forward", **kwargs):
        if execution != "in_kernel":
            return right(x, weight, mask_logits, *args, execution=execution, **kwargs)
        out, l0 = right(x, weight, mask_logits, *args, execution=execution, **kwargs)
        if fault == "out":
            return out * 1.05, l0
        if fault == "a lost tail":
            return torch.cat([out[:, :-1], torch.zeros_like(out[:, -1:])], 1), l0
        if fault == "dx":
            return out + 0.05 * (x - x.detach()).sum(), l0
        if fault == "dlogits":
            return out + 0.05 * (mask_logits - mask_logits.detach()).sum(), l0
        return out, l0 * 1.05 if fault == "l0" else l0.detach() + 0 * (l0 - l0.detach())

    monkeypatch.setattr(functional, "masked_linear", wrong)
    arguments = ["--quick", "--mode", "fwd_bwd", "--dtypes", "fp32", "--output", str(tmp_path)]
    assert run.main(arguments) == 1
    assert "FAILED in_kernel fp32 4 x 48 x 32: AssertionError: wrong numbers, not timed" in capsys.readouterr().err
    timed = {row["provider"] for row in table.read(tmp_path / "cpu.csv")}
    assert "in_kernel" not in timed
    assert {"dense", "compile", "per_forward"} <= timed


@pytest.mark.parametrize(("fault", "message"), [
    ("numbers", "out at one place"), ("input feature", "out"), ("output feature", "dx"), ("l0", "l0 "),
])  # fmt: skip
def test_a_few_lost_numbers_among_many_are_seen(fault, message):
    """16 of 2,097,152 are an error of 0.003 by norm, of which rounding in bf16 is allowed 0.006."""
    torch.manual_seed(0)
    t, (m, n, k) = torch.tensor(1.5), (512, 4096, 1024)
    inputs, dout, weight, logits = torch.randn(m, k), torch.randn(m, n), torch.randn(n, k), torch.randn(n, k)
    found = providers.oracle(logits, weight, t, inputs, dout, 1.0)
    got = {name: one.right.clone() for name, one in found.items()}
    assert providers._errors_over(got, found, torch.bfloat16) == []
    masked_weight = weight * torch.sigmoid(t * logits)
    if fault == "numbers":
        got["out"].view(-1)[-16:] = 0
        assert (got["out"] - found["out"].right).norm() < 0.006 * found["out"].right.norm()
    elif fault == "input feature":
        got["out"] -= inputs[:, -1:] * masked_weight[:, -1]
    elif fault == "output feature":
        got["dx"] -= dout[:, -1:] * masked_weight[-1]
    else:
        got["l0"] = got["l0"] - torch.sigmoid(t * logits[-2:]).sum()
    (wrong,) = providers._errors_over(got, found, torch.bfloat16)
    assert wrong.startswith(message)


def test_numbers_that_are_zero_as_they_should_be_pass():
    inputs, dout = torch.randn(4, 6), torch.randn(4, 5)
    inputs[:, 2] = 0
    found = providers.oracle(torch.randn(5, 6), None, torch.tensor(1.0), inputs, dout, 1.0)
    got = {name: None if one is None else one.right for name, one in found.items()}
    assert providers._errors_over(got, found, torch.float32) == []


@pytest.mark.parametrize("fault", ["loss", "gradient", "no gradient"])
def test_a_whole_model_with_a_wrong_loss_or_gradient_is_not_timed(fault):
    logits = {"a": torch.randn(3), "b": torch.randn(4)}
    leaves = {name: torch.nn.Parameter(values) for name, values in logits.items()}

    def loss():
        loss = sum(leaf.square().sum() for leaf in leaves.values())
        if fault == "loss":
            return loss + 1
        return loss + 0.01 * (leaves["b"] - leaves["b"].detach()).sum() if fault == "gradient" else loss

    training = mode_end_to_end.Training(loss, list(leaves.values()), loss)
    expected = sum(values.square().sum() for values in logits.values()).item()
    gradients = {name: 2 * values for name, values in logits.items()}
    if fault == "no gradient":
        leaves["b"].requires_grad_(False)
    with pytest.raises(AssertionError, match="not timed: the " + ("loss is" if fault == "loss" else "gradient of b")):
        mode_end_to_end.check(training, expected, gradients)


def test_a_kernel_that_is_wrong_has_no_bandwidth(tmp_path, monkeypatch):
    right = mode_bandwidth._plain.OPS["logits_grad"]
    monkeypatch.setitem(mode_bandwidth._plain.OPS, "logits_grad", lambda *args: 1.1 * right(*args))
    context = context_of(tmp_path / "cpu.csv")
    job = mode_bandwidth.Job("cpu", "fp32", True, 1, 0.0, 1)
    found = {one.kernel: one for one in mode_bandwidth.measure(job)}
    assert "wrong numbers" in found["logits_grad"].failure.message
    assert found["materialize"].failure is None
    mode_bandwidth._add(context, "fp32 64 x 64", list(found.values()), "of copy")
    assert {row["kernel"] for row in context.results.rows} == {*found, "copy"} - {"logits_grad"}
    assert len(context.record["failures"]) == 1


def test_a_model_with_another_loss_is_not_timed(tmp_path, monkeypatch):
    right = functional.masked_linear
    monkeypatch.setattr(functional, "masked_linear", lambda *a, **k: [1.1 * r for r in right(*a, **k)])
    context = context_of(tmp_path / "cpu.csv")
    mode_end_to_end.end_to_end(context, "vit-base")
    failed = {failure["what"] for failure in context.record["failures"]}
    assert failed == {"vit-base per_forward", "vit-base auto"}
    timed = {row["provider"] for row in context.results.rows}
    assert timed - {"per_step"} in ({"dense", "eager"}, {"dense", "eager (plain)"})


def test_without_neurosurgeon_its_formula_takes_its_place_under_another_name(tmp_path, monkeypatch):
    monkeypatch.setattr(linear_providers, "neurosurgeon", lambda: None)
    monkeypatch.setattr(mode_end_to_end, "neurosurgeon", lambda: None)
    context = context_of(tmp_path / "cpu.csv")
    linear_training.training(context, cases.QUICK_SHAPES[:1], ["fwd_bwd"], 0.0)
    for name in ("gpt2-small", "resnet-50"):  # Conv1D and convolutions
        mode_end_to_end.end_to_end(context, name)
    assert context.record["failures"] == []
    rows = context.results.find(provider="eager (plain)", metric="time")
    assert [row["kernel"] for row in rows] == ["masked_linear", "gpt2-small", "resnet-50"]
    assert rows[-1]["config"] == "NeuroSurgeon is not there, perf_counter"
    assert context.results.find(provider="eager") == []


def test_a_model_that_neurosurgeon_cannot_mask_says_why(tmp_path, monkeypatch):
    class Refuses:
        CircuitConfig = dict

        def CircuitModel(self, config, model):  # noqa: N802, NeuroSurgeon's name
            raise ValueError("not a supported layer type")

    monkeypatch.setattr(mode_end_to_end, "neurosurgeon", Refuses)
    context = context_of(tmp_path / "cpu.csv")
    mode_end_to_end.end_to_end(context, "vit-base")
    (timed,) = context.results.find(provider="eager (plain)", metric="time")
    assert timed["config"] == "NeuroSurgeon: ValueError: not a supported layer type, perf_counter"


def test_every_provider_starts_from_the_same_logits_and_each_has_its_own():
    layers = linear_providers.Layers(cases.QUICK_SHAPES[0], CPU, quick=True)
    built = {name: make() for name, make in layers.providers().items() if name != "dense"}
    for provider in built.values():
        assert torch.equal(provider.parameter, layers.logits[0])
    assert len({provider.parameter.data_ptr() for provider in built.values()}) == len(built)
    inputs, dout = linear_training.batch(layers)
    built["per_forward"].step(inputs, dout, 1)
    assert not torch.equal(built["per_forward"].parameter, layers.logits[0])
    assert torch.equal(built["in_kernel"].parameter, layers.logits[0])


def test_forward_and_backward_pays_for_the_mask_each_time(monkeypatch):
    """A masked weight that was kept from the step before, whose logits are the same, would be a time without masks."""
    layers = linear_providers.Layers(cases.QUICK_SHAPES[0], CPU, quick=True)
    provider, (inputs, dout) = layers.providers()["per_forward"](), linear_training.batch(layers)
    for _ in range(2):  # an optimizer has stepped: from now on masked weights are kept, each in the memory of the last
        provider.step(inputs, dout, 1)
    made = []
    ops = mode_bandwidth.ops
    monkeypatch.setattr("csmask.masked_weight.ops", Counting(ops, made))
    provider.step(inputs, dout, 1, optimizer=False)
    provider.step(inputs, dout, 1, optimizer=False)
    assert made == ["materialize_"] * 2
    provider.step(inputs, dout, 8)
    assert made == ["materialize_"] * 3


class Counting:
    def __init__(self, ops, made: list[str]) -> None:
        self.ops, self.made = ops, made

    def materialize_(self, *args):
        self.made.append("materialize_")
        return self.ops.materialize_(*args)


# The table of rows


def test_rows_are_added_to_what_is_there_and_the_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("gpu_results.SAVE_EVERY", math.inf)
    path = tmp_path / "cpu.csv"
    first = table.Table(path, "a CPU")
    first.add("masked_linear", "dense", "step", "time", "ms", "x, y", 1.0)
    first.save()
    second = table.Table(path, "a CPU")
    second.add("masked_linear", "dense", "step", "time", "ms", "z", 2.0)
    first.add("masked_linear", "eager", "step", "time", "ms", "z", 3.0)
    first.save()
    before = path.read_text()
    # Stopped while it writes: the old file is there, whole.
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        second.save()
    assert path.read_text() == before
    monkeypatch.undo()
    second.save()
    second.save()
    assert path.read_text().startswith(before)
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    assert tuple(lines[0]) == COLUMNS
    assert [(line[1], line[5], float(line[6])) for line in lines[1:]] == [
        ("dense", "x, y", 1.0), ("eager", "z", 3.0), ("dense", "z", 2.0),
    ]  # fmt: skip


def test_a_file_of_other_columns_is_refused(tmp_path):
    path = tmp_path / "cpu.csv"
    path.write_text("kernel,speed\nmasked_linear,1\n")
    with pytest.raises(ValueError, match=r"must have the columns kernel,provider,mode.*got kernel,speed.*--output"):
        table.Table(path, "a CPU")
    assert path.read_text() == "kernel,speed\nmasked_linear,1\n"


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    measured = linear_training.time_providers
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measured(*args, **kwargs)

    monkeypatch.setattr(linear_training, "time_providers", interrupted)
    assert run.main(["--quick", "--mode", "fwd_bwd", "--mode", "step", "--output", str(tmp_path)]) == 130
    assert "stopped: what was measured is in" in capsys.readouterr().out
    assert {row["mode"] for row in table.read(tmp_path / "cpu.csv")} == {"fwd_bwd"}


# Meters and arithmetic


def test_the_meter_counts_bytes_at_the_peak_and_at_the_end():
    """1,000 + 2,000 floats, the first freed, 500 more: the peak is 12,000 bytes, and 10,000 are left."""
    before = [torch.ones(4096)]

    def call():
        a, b = torch.empty(1000), torch.empty(2000)
        del a
        before.clear()  # what was there before counts as nothing
        return b, torch.empty(500)

    assert memory_meter.measure(CPU, call) == memory_meter.Usage(12_000, 10_000)
    # Inside an operator: x * x is 4 MB beside the sum of 4 bytes, and gone when the call returns.
    x = torch.ones(1_000_000)
    assert memory_meter.measure(CPU, lambda: (x * x).sum()) == memory_meter.Usage(4_000_004, 4)


def test_the_meters_arithmetic_knows_addresses():
    events = [(1, 10), (2, 5), (1, -10), (3, 3), (9, -100), (2, -5), (1, 2)]
    assert memory_meter.usage_of(events) == memory_meter.Usage(15, 5)


def test_what_layers_in_a_row_hold_together_shows_in_their_scratch(tmp_path):
    """Eager masking saves 12 bytes per weight of every layer from forward to backward; csmask one layer's scratch."""
    from mode_memory import LAYERS, memory

    context, shape = context_of(tmp_path / "cpu.csv"), cases.Shape("fp32", 1, 64, 64)
    for count in (1, LAYERS):
        memory(context, shape, count)
    assert context.record["failures"] == []
    scratch = verdict.values(context.results.rows, "memory", "scratch")
    one, several = scratch[f"{shape.name}, 1 layer"], scratch[f"{shape.name}, {LAYERS} layers"]
    for name in ("per_forward", "in_kernel"):
        assert several[name] < one[name] + 1
    assert several["compile"] > one["compile"] + 3 * 8 - 1


def test_bytes_per_masked_weight_of_every_way_of_training(tmp_path, capsys):
    """As derived from the tensors of each way, over so many layers that one's scratch is a fourth of a byte."""
    assert memory.main(["--weights", "2.6e6", "--size", "256", "--quick", "--output", str(tmp_path)]) == 0
    rows = table.read(tmp_path / "cpu_memory.csv")
    x = "bf16, 40 layers of 256 x 256"
    after, peak = (verdict.values(rows, memory.MODE, metric)[x] for metric in memory.MEMORY_METRICS)
    # W and S; the states; what a way keeps: masks (eager), masked weights (per_forward, per_step) and, on a CPU, the
    # memory of their gradient (per_step)
    expected = {"compile": 14, "per_forward": 16, "per_step": 18, "lean": 14}
    if linear_providers.neurosurgeon():
        expected["eager"] = 18
    for way, size in expected.items():
        assert float(after[way]) == pytest.approx(size, abs=0.5), way
    assert float(peak["lean"]) == pytest.approx(14, abs=0.5)
    assert float(peak["per_step"]) == pytest.approx(18, abs=0.5)
    assert float(peak["per_forward"]) >= 20
    printed = capsys.readouterr().out
    assert f"| Bytes per masked weight, {x} | after a step | at the peak |" in printed
    assert f"| lean | {float(after['lean']):.2f} | {float(peak['lean']):.2f} |" in printed


def test_a_way_that_fails_is_said_and_the_others_are_measured(tmp_path, capsys, monkeypatch):
    def broken(_layers):
        raise ValueError("no such way")

    monkeypatch.setattr(linear_providers.Layers, "lean_providers", lambda layers: {"lean": lambda: broken(layers)})
    arguments = ["--weights", "1", "--size", "32", "--quick", "--output", str(tmp_path)]
    assert memory.main(arguments) == 1
    assert "FAILED lean: ValueError: no such way" in capsys.readouterr().err
    assert {row["provider"] for row in table.read(tmp_path / "cpu_memory.csv")} >= {"per_forward", "per_step"}


def test_percent_of_copy_and_the_roof_by_hand():
    # 32 MB in 2 ms is 16 GB/s; 200 MB in 10 ms is 20 GB/s.
    assert roofline.gigabytes_per_second(32e6, 2.0) == pytest.approx(16.0)
    assert roofline.percent_of_copy(32e6, 2.0, 200e6, 10.0) == pytest.approx(80.0)
    shape = cases.Shape("bf16", 10, 20, 30)
    assert roofline.linear_flops(shape) == 36_000
    # W twice and dW: 3 * 600 numbers; x, x, dx and dout, dout, out: 3 * 10 * 50.
    assert roofline.linear_bytes(shape) == 2 * (1800 + 1500)
    assert roofline.attainable(2.0, 40.0, 150.0) == 80.0
    assert roofline.attainable(10.0, 40.0, 150.0) == 150.0


def test_bandwidth_rows_are_those_of_the_times(tmp_path):
    from gpu_timing import Timing

    context = context_of(tmp_path / "cpu.csv")
    found = mode_bandwidth.Measured("materialize", 32e6, 200e6, Timing(2, 2, 2, 5, "m"), Timing(10, 10, 10, 5, "m"))
    mode_bandwidth._add(context, "fp32 64 x 64", [found], "of copy")
    values = {(r["kernel"], r["metric"]): r["value"] for r in context.results.rows}
    assert values == {
        ("materialize", "rate"): pytest.approx(16.0),
        ("materialize", "of copy"): pytest.approx(80.0),
        ("copy", "rate"): pytest.approx(20.0),
    }


# Profiles


def test_a_missed_target_is_profiled_on_request(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verdict, "OVER_COMPILE_SMALL", 0.0)
    arguments = ["--quick", "--mode", "fwd_bwd", "--dtypes", "fp32", "--output", str(tmp_path)]
    assert run.main([*arguments, "--profile"]) == 0
    printed = capsys.readouterr().out
    assert "MISSED per_forward / compile" in printed
    assert "csmask::materialize" in printed


def test_a_quick_run_does_not_write_among_the_results(capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(["--quick", "--mode", "fwd_bwd"])
    assert "give it an --output of its own" in capsys.readouterr().err
