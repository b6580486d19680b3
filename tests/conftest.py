"""Settings for all tests."""

from __future__ import annotations

import torch

# The tests' tensors are tiny: where the cores are shared, threads wait for each other far longer than they compute.
torch.set_num_threads(1)
