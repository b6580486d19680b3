"""Settings for all tests."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

from csmask import _cpp, _ops, autograd

# Before the first kernel is decorated: without a GPU, Triton's kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The tests' tensors are tiny: where the cores are shared, threads wait for each other far longer than they compute.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Tests of the kernels by themselves use CPU tensors: they need the interpreter, also where there is a GPU."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    reason = "needs Triton's interpreter (TRITON_INTERPRET=1); bench/gpu_suite.py checks the kernels on the GPU"
    for item in items:
        if item.path.stem.endswith(("_kernel", "_kernels")) or "triton_on_cpu" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=_cpp.kernels.instruction_sets() if _cpp.kernels else [])
def isa(request):
    """Runs the test once per instruction set that this CPU has."""
    before = _cpp.kernels.instruction_set()
    _cpp.kernels.force_instruction_set(request.param)
    assert _cpp.kernels.instruction_set() == request.param
    yield request.param
    _cpp.kernels.force_instruction_set(before)


@pytest.fixture
def triton_on_cpu(monkeypatch):
    """For one test, CPU tensors go to the Triton kernels (in the interpreter): the whole stack as on a GPU."""
    monkeypatch.setattr(autograd, "_IN_BLOCKS", ())
    library = torch.library.Library("csmask", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that kernels are overridden is the point
        for name in _ops.SCHEMAS:
            has_kernel = _ops.SCHEMAS[name][1] is not None  # others are made of ops that have one
            run = _ops._run_triton(name) if has_kernel else _ops._without_grad(_ops._PLAIN_OPS[name])
            library.impl(name, run, "CPU", allow_override=True)
    yield
    library._destroy()


@pytest.fixture(scope="session")
def triton_36():
    """A directory that holds Triton 3.6 and a NumPy that it knows, and nothing else."""
    for directory in (os.environ.get("CSMASK_TRITON_36"), Path(sys.prefix) / "triton-3.6"):
        if directory and (Path(directory) / "triton").is_dir():
            return Path(directory)
    pytest.skip(
        "no Triton 3.6: `make test` installs it, or: pip install --no-deps --target DIR triton==3.6.0 'numpy<2.4'; "
        "export CSMASK_TRITON_36=DIR"
    )
