"""Settings for all tests."""

from __future__ import annotations

import os

import torch

# Before the first kernel is decorated: without a GPU, Triton's kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The tests' tensors are tiny: where the cores are shared, threads wait for each other far longer than they compute.
torch.set_num_threads(1)
