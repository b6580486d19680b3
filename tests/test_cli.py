"""The csmask command: what it prints, how it ends, and that ``python -m csmask`` is the same."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import csmask
from csmask import _cpp, _ops, cli
from csmask.demo import noun_verb


def invoke(*arguments):
    return CliRunner().invoke(cli.app, list(arguments))


def lines(result):
    """The report of doctor as {name: value}."""
    assert result.exit_code == 0, result.output
    return {line[:18].strip(): line[18:] for line in result.output.splitlines()}


def test_version():
    result = invoke("--version")
    assert (result.exit_code, result.output) == (0, f"{csmask.__version__}\n")


def test_python_m_is_the_same():
    for arguments in (["--version"], ["doctor"]):
        command = [sys.executable, "-m", "csmask", *arguments]
        child = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(csmask.__file__).parents[1]
        )
        here = invoke(*arguments).output
        if arguments == ["doctor"]:  # the number of threads is the process's own
            child.stdout, here = (
                "".join(s for s in t.splitlines() if s[:7] != "threads") for t in (child.stdout, here)
            )
        assert child.stdout == here


def test_the_installed_command_is_main():
    try:
        scripts = metadata.distribution("csmask").entry_points.select(group="console_scripts", name="csmask")
    except metadata.PackageNotFoundError:
        pytest.skip("csmask is not installed, only on the path")
    assert [s.load() for s in scripts] == [cli.main]


def test_help_without_a_command():
    for arguments in ((), ("--help",)):
        result = invoke(*arguments)
        assert all(word in result.output for word in ("demo", "doctor", "--version"))
    assert invoke("--help").exit_code == 0


@pytest.mark.parametrize("arguments", [("nothing",), ("doctor", "--fix"), ("demo", "--steps", "many")])
def test_unknown_words_are_usage_errors(arguments):
    assert invoke(*arguments).exit_code == 2


def test_doctor_prints_versions_and_back_ends():
    report = lines(invoke("doctor"))
    assert report["csmask"] == csmask.__version__
    assert report["python"] == platform.python_version()
    assert report["torch"] == metadata.version("torch")
    assert report["threads"] == str(torch.get_num_threads())
    assert report["back end, others"] == "reference (plain torch)"
    assert list(report) == list(cli.diagnosis())


def test_doctor_with_the_kernels(monkeypatch):
    class Kernels:
        instruction_sets = staticmethod(lambda: ["avx512", "baseline"])
        instruction_set = staticmethod(lambda: "avx512")
        shares_threads = staticmethod(lambda: True)
        last_level_cache = staticmethod(lambda: 32 << 20)

    monkeypatch.setattr(_cpp, "kernels", Kernels)
    report = lines(invoke("doctor"))
    assert report["back end, CPU"] == "C++ kernels"
    assert report["instruction set"] == "avx512 (of avx512, baseline)"
    assert report["kernels' threads"] == "PyTorch's own"
    assert report["largest cache"] == "32 MiB"
    Kernels.shares_threads = staticmethod(lambda: False)
    assert lines(invoke("doctor"))["kernels' threads"] == "started for each call: no OpenMP runtime was found"


def test_doctor_says_why_there_are_no_kernels(monkeypatch):
    monkeypatch.setattr(_cpp, "kernels", None)
    monkeypatch.setattr(_cpp, "kernels_missing", "ImportError: no compiler was there")
    text = lines(invoke("doctor"))["back end, CPU"]
    assert text.startswith("reference (plain torch)")
    assert "ImportError: no compiler was there" in text
    assert "install a C++17 compiler and install csmask again" in text


def test_doctor_says_what_runs_on_a_gpu(monkeypatch):
    if not torch.cuda.is_available():
        assert lines(invoke("doctor"))["back end, GPU"] == "Triton kernels, for when there is a GPU"
        assert lines(invoke("doctor"))["launch configs"] == "none in use: no GPU"
    launch = _ops.importlib.import_module("csmask_kernels.launch")
    target = launch.Target("cuda", "90", "NVIDIA H9000")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launch, "target_of", lambda _tensor: target)
    monkeypatch.setattr(torch, "empty", lambda *_args, **_options: None)
    assert _ops.gpu_back_end() == "Triton kernels for sm_90"
    assert _ops.launch_configs().endswith("configs/sm_90.json (of all sm_90, not measured)")
    monkeypatch.setattr(launch, "config_path", lambda _target: launch.CONFIG_DIRECTORY / "NVIDIA_H9000.json")
    assert _ops.launch_configs().endswith("configs/NVIDIA_H9000.json (measured on NVIDIA H9000)")
    monkeypatch.setattr(launch, "config_path", lambda _target: None)
    assert _ops.launch_configs() == "general ones: there is no table for NVIDIA H9000 (sm_90)"

    def fail(name):
        raise ImportError("no triton here")

    monkeypatch.setattr(_ops.importlib, "import_module", fail)
    assert _ops.gpu_back_end().startswith("none: csmask's GPU kernel for materialize needs Triton >= 3.6")


def test_doctor_names_a_package_that_is_missing(monkeypatch):
    version = metadata.version

    def without_triton(name):
        if name == "triton":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(cli.metadata, "version", without_triton)
    assert lines(invoke("doctor"))["triton"] == "not installed"


def test_demo_passes_its_options_on(monkeypatch, tmp_path):
    calls = []
    masks = {"mask_seeds": noun_verb.MASK_SEEDS, "control_head": "same", "execution": "auto"}
    masks.update(l0_target=None, stop_undecided=None)
    monkeypatch.setattr(noun_verb, "run_command", lambda **options: calls.append(options) or 0)
    result = invoke("demo", "--seed", "3", "--steps", "7", "--output", str(tmp_path), "--device", "cuda", "--resume")
    assert result.exit_code == 0, result.output
    assert calls == [{"seed": 3, "steps": 7, "output": tmp_path, "device": "cuda", "resume": True, **masks}]
    assert invoke("demo").exit_code == 0
    assert calls[1] == {
        "seed": 0,
        "steps": None,
        "output": Path(noun_verb.DEFAULT_OUTPUT),
        "device": "cpu",
        "resume": False,
        **masks,
    }
    assert invoke("demo", "--l0-target", "0.05", "--stop-undecided", "0.001").exit_code == 0
    assert calls[2] == {**calls[1], "l0_target": 0.05, "stop_undecided": 0.001}


@pytest.mark.parametrize(
    ("error", "status"),
    [(ImportError("pip install it"), 1), (ValueError("a bad option"), 1), (KeyboardInterrupt(), 130)],
)
def test_demo_ends_with_a_line_not_a_traceback(monkeypatch, error, status):
    def fail(**_):
        raise error

    monkeypatch.setattr(noun_verb, "run", fail)
    result = invoke("demo")
    assert result.exit_code == status
    assert str(error) in result.output
    assert "Traceback" not in result.output
