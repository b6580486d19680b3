"""Settings for all tests."""

from __future__ import annotations

import os

import pytest
import torch

from csmask import _ops

# Before the first kernel is decorated: without a GPU, Triton's kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The tests' tensors are tiny: where the cores are shared, threads wait for each other far longer than they compute.
torch.set_num_threads(1)


@pytest.fixture
def triton_on_cpu():
    """For one test, CPU tensors go to the Triton kernels (in the interpreter): the whole stack as on a GPU."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU, and kernels cannot run on CPU tensors")
    library = torch.library.Library("csmask", "IMPL")
    for name in _ops.SCHEMAS:
        library.impl(name, _ops._run_triton(name), "CPU", allow_override=True)
    yield
    library._destroy()
