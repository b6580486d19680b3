"""The GPU suite and ``tune``, rehearsed on the CPU: every stage runs, and what goes wrong is recorded."""

from __future__ import annotations

import contextlib
import csv
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from csmask_kernels import launch, materialize
from csmask_kernels.launch import INTERPRETER, ElementwiseConfig

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))

import compile_ahead  # noqa: E402 - bench holds scripts, not a package
import compile_report  # noqa: E402
import compile_worker  # noqa: E402
import gpu_checks  # noqa: E402
import gpu_largest  # noqa: E402
import gpu_results  # noqa: E402
import gpu_runner  # noqa: E402
import gpu_suite  # noqa: E402
import gpu_timing  # noqa: E402
import gpu_training  # noqa: E402
import gpu_transformers  # noqa: E402
import tune  # noqa: E402

STAGES = ["ceilings", "correctness", "elementwise", "training", "memory", "search", "transformers", "llama"]
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="rehearsals are for machines without a GPU")


def run_script(*arguments: str, interpret: bool) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    if interpret:
        env["TRITON_INTERPRET"] = "1"
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, cwd=ROOT, timeout=400)


def read(directory: Path) -> dict:
    return json.loads((directory / "gpu_suite.json").read_text())


# The whole suite


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """One run of every stage, in little time: correctness may not reach every op."""
    out = tmp_path_factory.mktemp("suite")
    done = run_script(str(BENCH / "gpu_suite.py"), str(out), "--rehearse", "--seconds", "200", interpret=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out, done.stdout


def test_every_stage_is_rehearsed_without_a_failure(rehearsal):
    out, printed = rehearsal
    found = read(out)
    assert list(found["stages"]) == STAGES
    for name, stage in found["stages"].items():
        assert stage["failures"] == [], name
        assert stage["status"] in ("ok", "incomplete"), name
        assert f"{name}: {stage['status']}" in printed
    assert found["about"]["rehearsal"] is True


def test_every_stage_leaves_its_figures(rehearsal):
    rows = read(rehearsal[0])["rows"]

    def values(**wanted: str) -> dict[str, list[float]]:
        kept = [row for row in rows if all(row[k] == v for k, v in wanted.items())]
        found: dict[str, list[float]] = {}
        for row in kept:
            found.setdefault(row["provider"], []).append(float(row["value"]))
        return found

    assert set(values(kernel="matmul", metric="rate")) == {"NT", "NN", "TN", "TN into fp32"}
    assert set(values(kernel="copy", metric="bandwidth")) == {"kernel", "copy_"}
    checks = values(metric="error / limit")["csmask"]
    assert len(checks) > 30
    assert max(checks) <= 1
    assert len(values(metric="of copy")["csmask"]) == 18
    providers = {"dense", "eager", "compile", "per_step", "per_forward", "per_forward kept", "in_kernel", "neuron"}
    for mode in ("forward+backward", "step", "step of 2", "forward+backward, launched", "step, launched"):
        assert set(values(kernel="masked_linear", mode=mode, metric="time")) == providers
        assert values(kernel="masked_linear", mode=mode, metric="over dense")["dense"] == [1.0]
    evaluation = values(kernel="masked_linear", mode="evaluation", metric="time")
    assert set(evaluation) == {"dense", "per_forward", "in_kernel", "bits"}
    saved = values(mode="memory", metric="saved for backward")
    assert set(saved) == providers
    assert saved["in_kernel"] == saved["per_forward"] == [0.0]
    assert saved["eager"][0] >= 8
    for model in ("llama", "bert"):
        assert set(values(kernel=model, metric="time")) == {"dense", "eager", *gpu_transformers.EXECUTIONS}
    assert values(mode="search", metric="time")["csmask"]
    assert set(values(kernel="llama-3-8b", metric="fits")) >= {"per_step", "per_forward", "eager"}


def test_what_runs_on_demand_leaves_its_figures(tmp_path):
    arguments = ["--rehearse", "--stages", "autotuned,largest", "--seconds", "600", "--seed", "5"]
    assert gpu_suite.main([str(tmp_path), *arguments]) == 0
    rows = read(tmp_path)["rows"]
    for mode in ("forward+backward, autotuned", "step, autotuned"):
        found = {r["provider"] for r in rows if (r["mode"], r["metric"]) == (mode, "over dense")}
        assert found == {"dense", "compile", "compile, max-autotune", "per_step"}
    layers = {r["provider"]: r for r in rows if (r["mode"], r["metric"]) == ("largest", "layers")}
    assert set(layers) == set(gpu_largest.WAYS)
    assert {(r["value"], r["config"]) for r in layers.values()} == {
        (gpu_largest.TOY_DEPTH, f"{gpu_largest.TOY_DEPTH + 1} layers do not fit")
    }
    toy = gpu_transformers.TOY
    per_layer = 4 * toy["hidden_size"] ** 2 + 3 * toy["hidden_size"] * toy["intermediate_size"]
    weights = {r["value"] for r in rows if r["metric"] == "masked weights"}
    assert weights == {gpu_largest.TOY_DEPTH * per_layer / 1e9}


@pytest.mark.parametrize("limit", [0, 1, 2, 9, 10, 11, 37])
@pytest.mark.parametrize("guess", [0, 1, 10, 40])
def test_the_deepest_model_is_next_to_one_that_does_not_fit(limit, guess):
    tried = []

    def fits(count: int) -> bool:
        tried.append(count)
        return count <= limit

    assert gpu_largest.deepest(fits, guess, lambda: False) == (limit, limit + 1)
    assert len(set(tried)) == len(tried) <= 14  # each takes seconds
    assert gpu_largest.deepest(fits, guess, lambda: True) == (0, None)


def test_no_checks_at_all_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        suite(str(tmp_path / "out"), "--checks", "0")
    assert "--checks must be 1 or more, got 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_few_checks_are_the_smallest_of_some_size():
    def check(size: int) -> gpu_checks.Check:
        return gpu_checks.Check("op", str(size), {"x": torch.empty(size), "bias": None}, dict, dict)

    sizes = [0, 50_000, 1, 30_000, 40_000]
    checks = [check(size) for size in sizes]
    assert [c.variant for c in gpu_checks.few(iter(checks), 2)] == ["30000", "40000"]
    assert [c.variant for c in gpu_checks.few(checks, 9)] == ["30000", "40000", "50000"]
    assert [c.variant for c in gpu_checks.few(map(check, (3, 1, 2)), 2)] == ["2", "3"]  # none is of that size
    assert list(gpu_checks.few(checks, None)) == checks


def test_csv_and_json_hold_the_same_rows(rehearsal):
    found = read(rehearsal[0])
    with (rehearsal[0] / "gpu_suite.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == (
        "kernel", "provider", "mode", "metric", "unit", "x", "value", "p20", "p50", "p80", "config", "gpu", "time",
        "version",
    )  # fmt: skip
    assert [r["kernel"] for r in rows] == [r["kernel"] for r in found["rows"]]
    for row in rows:
        assert row["gpu"] == "cpu"
        assert f"torch {torch.__version__}" in row["version"]
        assert math.isfinite(float(row["value"]))
        assert float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
    assert list(rehearsal[0].glob("*.tmp")) == []


def test_the_search_of_a_rehearsal_stays_in_its_directory(rehearsal):
    table = json.loads((rehearsal[0] / "interpreter.json").read_text())
    assert table["source"].startswith("measured on interpreter, commit ")
    assert table["configs"]["masked_linear"][0]["m"] == 16
    assert not (launch.CONFIG_DIRECTORY / "interpreter.json").exists()


# What goes wrong


def suite(*arguments: str, **options) -> int:
    return gpu_suite.main([*arguments, "--rehearse", "--seconds", "60", "--seed", "5"], **options)


def one_row(context: gpu_results.Context) -> None:
    context.results.add("kernel", "csmask", "mode", "metric", "unit", "x", 1.0)


def test_a_stage_that_fails_is_recorded_and_the_next_ones_run(tmp_path, monkeypatch, capsys):
    def broken(context):
        one_row(context)
        raise RuntimeError("a planted fault")

    stages = {"first": gpu_runner.Stage(broken, 1), "second": gpu_runner.Stage(one_row, 1)}
    monkeypatch.setattr(gpu_runner, "STAGES", stages)
    assert suite(str(tmp_path)) == 1
    found = read(tmp_path)
    assert found["stages"]["first"]["status"] == "failed"
    (failure,) = found["stages"]["first"]["failures"]
    assert failure["error"] == "RuntimeError: a planted fault"
    assert "in broken" in failure["traceback"]
    assert found["stages"]["second"]["status"] == "ok"
    assert len(found["rows"]) == 2
    assert "FAILED first: RuntimeError: a planted fault" in capsys.readouterr().out


def test_stages_share_the_time_and_say_what_they_left_out(tmp_path, monkeypatch):
    budgets = []

    def late(context):
        budgets.append(context.left())
        context.deadline = 0.0
        assert context.is_over("the rest")

    stages = {name: gpu_runner.Stage(late, share) for name, share in (("a", 3), ("b", 1))}
    monkeypatch.setattr(gpu_runner, "STAGES", stages)
    assert suite(str(tmp_path)) == 0
    assert 35 < budgets[0] < 60 * 0.95 * 3 / 4
    assert 50 < budgets[1] < 60 * 0.95  # what the first one left is the second one's
    assert read(tmp_path)["stages"]["a"]["status"] == "incomplete"
    assert read(tmp_path)["stages"]["a"]["not_run"] == ["the rest"]


def test_a_lost_device_is_left_for_a_fresh_process_that_goes_on_behind_the_op_at_fault(tmp_path, monkeypatch):
    lost = []

    def check(op: str):
        def kernel(x):
            if op == "bad":
                lost.append(op)
                raise RuntimeError("illegal memory access")
            return {"out": x * 2}

        yield gpu_checks.Check(op, "only", {"x": torch.ones(3)}, kernel, lambda x: {"out": x * 2})

    def raise_if_lost(device):
        if lost:
            raise gpu_checks.DeviceLostError("illegal memory access")

    cases = {op: (lambda op, dtype, context: check(op)) for op in ("good", "bad", "later")}
    correctness = gpu_runner.Stage(lambda context: gpu_checks.correctness(context, cases), 1)
    monkeypatch.setattr(gpu_runner, "STAGES", {"correctness": correctness, "next": gpu_runner.Stage(one_row, 1)})
    monkeypatch.setattr(gpu_checks, "raise_if_lost", raise_if_lost)
    monkeypatch.setattr(gpu_runner, "raise_if_lost", raise_if_lost)

    def restart(arguments: list[str]) -> int:
        assert arguments[arguments.index("--stages") + 1] == "correctness,next"
        lost.clear()
        return gpu_suite.main([*arguments, "--rehearse"])

    assert suite(str(tmp_path), restart=restart) == 1
    found = read(tmp_path)
    checked = found["stages"]["correctness"]["checked"]
    assert {op: tally["failed"] for op, tally in checked.items()} == {"good": 0, "bad": 1, "later": 0}
    assert checked["later"]["checks"] == len(gpu_checks.dtypes())
    assert found["stages"]["next"]["status"] == "ok"


def test_an_op_that_is_not_there_fails_alone(tmp_path):
    context = a_context(tmp_path)

    def missing(op, dtype, context):
        raise ImportError("no kernel of that name")

    def there(op, dtype, context):
        yield gpu_checks.Check(op, "only", {"x": torch.ones(3)}, lambda x: {"out": x}, lambda x: {"out": x})

    gpu_checks.correctness(context, {"missing": missing, "there": there})
    assert context.record["checked"]["missing"]["failed"] == len(gpu_checks.dtypes())
    assert context.record["checked"]["there"] == {"checks": len(gpu_checks.dtypes()), "failed": 0}
    assert {failure["error"] for failure in context.record["failures"]} == {"ImportError: no kernel of that name"}


def test_without_a_gpu_only_what_needs_none_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert gpu_suite.main([str(tmp_path), "--seconds", "60", "--stages", "ceilings,memory"]) == 0
    stages = read(tmp_path)["stages"]
    assert stages["ceilings"]["status"] == "ok"
    assert (stages["memory"]["status"], stages["memory"]["reason"]) == ("skipped", "no GPU")
    assert "no GPU" in capsys.readouterr().out


def test_an_unknown_stage_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no stage speed; there are: ceilings"):
        suite(str(tmp_path), "--stages", "speed")


# The checks themselves


def a_context(tmp_path: Path) -> gpu_results.Context:
    results = gpu_results.Results(tmp_path, "cpu")
    context = gpu_results.Context(results, gpu_timing.Clock(CPU), CPU, True, torch.float32, 3)
    context.deadline = math.inf
    return context


def unwritten(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    out[1:] = x[1:] * 2
    return out


def unsteady(x: torch.Tensor) -> torch.Tensor:
    unsteady.calls += 1
    return x * 2 * (1 + 1e-7 * (unsteady.calls % 2))


unsteady.calls = 0


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (unwritten, "out: error nan"),
        (unsteady, "out: two runs on the same inputs differ"),
        (lambda x: x * 2.001, "out: error"),
    ],
)
def test_a_check_sees_what_is_unwritten_unsteady_or_wrong(kernel, said):
    x = torch.linspace(1, 2, 64)
    good = gpu_checks.Check("op", "good", {"x": x}, lambda x: {"out": x * 2}, lambda x: {"out": x * 2})
    assert gpu_checks.run_check(good) <= 1
    bad = gpu_checks.Check("op", "bad", {"x": x}, lambda x: {"out": kernel(x)}, lambda x: {"out": x * 2})
    with pytest.raises(AssertionError, match=said):
        gpu_checks.run_check(bad)


def test_exact_results_are_compared_bit_for_bit():
    x = torch.linspace(1, 2, 64)
    check = gpu_checks.Check("op", "bad", {"x": x}, lambda x: {"n": x + 1e-7}, lambda x: {"n": x}, ("n",))
    with pytest.raises(AssertionError, match="n: not the reference's"):
        gpu_checks.run_check(check)


def test_no_launch_is_left_out_after_compiling_ahead():
    weight, logits, t = torch.randn(8, 8), torch.randn(8, 8), torch.tensor(1.0)
    planned = compile_ahead.launches_of(lambda: materialize.materialize(weight, logits, t, False, 1.0))
    assert [p.kernel for p in planned] == [materialize._materialize_kernel]
    out, _, _ = materialize.materialize(weight, logits, t, False, 1.0)
    torch.testing.assert_close(out, weight * torch.sigmoid(logits))


def test_a_kernel_that_is_imported_while_a_function_is_replaced_gets_it_and_then_the_real_one(monkeypatch):
    name, asked = "csmask_kernels.bitmask", []
    monkeypatch.delitem(sys.modules, name, raising=False)

    def recording(op, *arguments):
        asked.append(op)
        return original(op, *arguments)

    original = launch.get_config
    with compile_ahead.replaced("get_config", recording):
        (planned,) = compile_ahead.launches_of(lambda: importlib.import_module(name).pack_mask(torch.randn(8)))
    assert planned.kernel.__name__ == "_pack_mask_kernel"
    assert asked == ["pack_mask"]
    assert sys.modules[name].get_config is launch.get_config is original


def test_workers_compile_each_kernel_once_for_a_gpu_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    target = json.dumps({"backend": "cuda", "arch": "90", "name": "H100-like", "multiprocessors": 132})
    done = run_script(str(BENCH / "compile_worker.py"), target, "3", "400", interpret=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("*.cubin"))

    launches = [launch.Launch(materialize._materialize_kernel, (1,), {}, {"i": i % 7}) for i in range(21)]
    parts = [list(compile_worker.share_of(iter(launches), p, 3, lambda launched: launched.constants)) for p in range(3)]
    assert sorted(launched.constants["i"] for part in parts for launched in part) == list(range(7))


@pytest.mark.parametrize("fault", ["none", "dx", "NaN"])
def test_a_provider_is_timed_only_if_its_numbers_are_right(tmp_path, fault):
    context = a_context(tmp_path)
    layer = gpu_training.Layer(context, 8, 16)
    provider = layer.providers()["eager"]()
    forward = provider.forward

    def broken(x):
        out, l0 = forward(x)
        return {"none": out, "dx": out - x[:, :8] + x[:, :8].detach(), "NaN": out * math.nan}[fault], l0

    provider.forward = broken
    right = gpu_training._is_right(context, layer, "eager", provider, torch.randn(4, 16), torch.randn(4, 8))
    assert right == (fault == "none")
    assert len(context.record["failures"]) == (fault != "none")
    assert provider.parameter.grad is None


# Clocks


def test_timings_have_percentiles_and_failures_their_traceback():
    timing = gpu_timing.Timing.of([float(i) for i in range(11)], "events")
    assert (timing.p20, timing.p50, timing.p80, timing.samples) == (2.0, 5.0, 8.0, 11)

    def fails():
        raise ValueError("planted")

    found = gpu_timing.Clock(CPU).measure({"bad": fails, "good": lambda: None}, 0.0)
    assert found["good"].p20 >= 0
    assert found["bad"].message == "ValueError: planted"
    assert "in fails" in found["bad"].trace


class FakeCuda:
    """As much of ``torch.cuda`` as a clock uses; a captured call is replayed, and time passes with each run."""

    def __init__(self) -> None:
        self.now, self.calls, self.captured = 0.0, [], None

    def event(self, enable_timing):
        event = type("Event", (), {"synchronize": lambda e: None, "elapsed_time": lambda e, end: end.at - e.at})()
        event.record = lambda: setattr(event, "at", self.now)
        return event

    @contextlib.contextmanager
    def graph(self, graph):
        graph.start = len(self.calls)
        yield
        graph.recorded = self.calls[graph.start :]

    def install(self, monkeypatch) -> None:
        stream = type("Stream", (), {"wait_stream": lambda s, other: None})
        graph = type("Graph", (), {"replay": lambda g: [self.run(name) for name in g.recorded]})
        for name, value in {
            "Stream": stream, "current_stream": stream, "stream": lambda s: contextlib.nullcontext(),
            "synchronize": lambda: None, "CUDAGraph": graph, "graph": self.graph, "Event": self.event,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    def run(self, name: str) -> None:
        self.now += {"short": 1.0, "long": 3.0}[name]
        self.calls.append(name)


@pytest.mark.parametrize("graph", [True, False])
def test_a_gpus_clock_times_replays_between_events_in_turns(monkeypatch, graph):
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    clock = gpu_timing.Clock(CPU)
    clock.is_gpu, clock._flushed, clock._min_rounds = True, torch.zeros(4), gpu_timing.MIN_ROUNDS
    found = clock.measure({n: (lambda n=n: cuda.run(n)) for n in ("short", "long")}, 0.0, graph)
    assert {name: timing.p50 for name, timing in found.items()} == {"short": 1.0, "long": 3.0}
    assert found["long"].method == ("graph" if graph else "events")
    assert found["long"].samples == gpu_timing.MIN_ROUNDS
    # Each round begins with another.
    assert cuda.calls[-6:] == ["short", "long", "long", "short", "short", "long"]


# tune


@pytest.fixture
def config_directory(tmp_path, monkeypatch):
    """Where configs are looked up, for one test."""
    for module in (launch, tune):
        monkeypatch.setattr(module, "CONFIG_DIRECTORY", tmp_path)
    caches = (launch.config_table, launch.get_config)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def test_tune_writes_a_table_that_the_kernels_read(config_directory):
    ops = ("materialize", "masked_linear_dlogits")
    file = config_directory / "interpreter.json"
    file.write_text(json.dumps({"source": "", "configs": {"logits_grad": [{"m": 1, "block": 256, "num_warps": 4}]}}))
    found = tune.search(ops, CPU, lambda: 1.0, [file], toy=True)
    assert found.failures == []
    assert [best.op for best in found.bests] == ["masked_linear_dlogits", "materialize"]
    for best in found.bests:
        assert best.timing.p50 <= best.default.p50
        assert launch.get_config(best.op, INTERPRETER, best.m, type(best.config)(num_warps=16)) == best.config
    # What was there and was not measured is still there.
    assert launch.get_config("logits_grad", INTERPRETER, 1, ElementwiseConfig()) == ElementwiseConfig(256, 4)


def test_what_is_compiled_offline_has_the_devices_that_tune_wrote_tables_for(config_directory):
    device = launch.Target("cuda", "90", "NVIDIA H200", 132)
    rows = {"materialize": [{"m": 64, "block": 512, "num_warps": 4}]}
    tune.write_table(config_directory / "NVIDIA_H200.json", rows, device)
    tune.write_table(config_directory / "interpreter.json", {}, INTERPRETER)
    (config_directory / "by_hand.json").write_text(json.dumps({"source": "", "configs": {}}))
    with pytest.warns(UserWarning, match="nothing is compiled for the family") as warned:
        found = compile_report.targets()
    assert len(warned) == 2
    assert set(found) == {*compile_report.TARGETS, "NVIDIA_H200"}
    assert found["NVIDIA_H200"].family == "sm_90"
    assert launch.config_path(found["NVIDIA_H200"]) == config_directory / "NVIDIA_H200.json"


def test_tune_discards_what_fails_or_is_wrong():
    x, asked = torch.ones(64), []

    def call() -> torch.Tensor:
        config = launch.get_config("op", INTERPRETER, 64, ElementwiseConfig(32, 4))
        asked.append(config.block)
        if config.block == 128:
            raise RuntimeError("out of registers")
        return torch.full_like(x, float("nan")) if config.block == 64 else x * 2

    found = tune.Found()
    candidates = [ElementwiseConfig(block, 4) for block in (64, 128, 256)]
    best = tune.solve(tune.Problem("op", 64, candidates, call, lambda: x * 2), gpu_timing.Clock(CPU), 0.0, found)
    assert set(asked) == {32, 64, 128, 256}
    assert best.config.block in (32, 256)
    assert found.tallies == {"op M=64": {"wrong": 1, "failed": 1, "timed": 2}}


@pytest.mark.parametrize("fault", ["wrong l0", "raises"])
def test_a_config_in_use_that_is_wrong_is_a_failure(fault):
    def call() -> tuple[torch.Tensor, torch.Tensor]:
        config = launch.get_config("op", INTERPRETER, 64, ElementwiseConfig(32, 4))
        bad = config.block == 32
        if bad and fault == "raises":
            raise RuntimeError("out of registers")
        return torch.ones(64), torch.tensor(3.0 if bad else 2.0)

    found = tune.Found()
    problem = tune.Problem("op", 64, [ElementwiseConfig(64, 4)], call, lambda: (torch.ones(64), torch.tensor(2.0)))
    if fault == "raises":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tune, "config_in_use", lambda op, call: ElementwiseConfig(32, 4))
            best = tune.solve(problem, gpu_timing.Clock(CPU), 0.0, found)
    else:
        best = tune.solve(problem, gpu_timing.Clock(CPU), 0.0, found)
    assert best.config.block == 64
    ((what, failure),) = found.failures
    assert "op M=64" in what
    assert "out of registers" in failure.message or "the config in use gives wrong numbers" in failure.message


@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_full_precision_works_beside_the_newer_settings_and_restores_them(setting):
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = (matmul.fp32_precision, conv.fp32_precision)
    try:
        matmul.fp32_precision = conv.fp32_precision = setting
        with gpu_checks.full_precision():
            assert (matmul.fp32_precision, conv.fp32_precision) == ("ieee", "ieee")
        assert (matmul.fp32_precision, conv.fp32_precision) == (setting, setting)
    finally:
        matmul.fp32_precision, conv.fp32_precision = before


def test_tune_keeps_what_is_done_when_it_is_stopped_or_out_of_time(config_directory):
    file = config_directory / "interpreter.json"

    def stop_after_one(items):
        yield items[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune.search(("materialize", "logits_grad"), CPU, lambda: 1.0, [file], toy=True, progress=stop_after_one)
    assert list(json.loads(file.read_text())["configs"]) == ["materialize"]
    found = tune.search(("materialize",), CPU, lambda: -1.0, [file], toy=True)
    assert found.not_run == ["materialize"]


def test_tune_from_the_command_line(tmp_path):
    file = tmp_path / "table.json"
    done = run_script(str(BENCH / "tune.py"), "--ops", "pack_mask", "--output", str(file), interpret=True)
    assert done.returncode == 0, done.stderr
    assert "pack_mask M=1536:" in done.stdout
    assert json.loads(file.read_text())["configs"]["pack_mask"][0]["m"] == 1536
    assert "needs --output" in run_script(str(BENCH / "tune.py"), interpret=True).stderr
