"""examples/billion.py: a small run trains, counts its memory, and fails where that is over the limit."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[1] / "examples" / "billion.py"
SMALL = ["--blocks", "1", "--hidden", "128", "--tokens", "8"]


@pytest.fixture(scope="module")
def billion():
    spec = importlib.util.spec_from_file_location("billion", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_model_is_what_it_says_and_never_in_another_dtype(billion):
    model = billion.build(2, 256)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    blocks = [p for name, p in model.named_parameters() if "proj" in name]
    # q, o; k, v of one head of four; the MLP
    assert sum(p.numel() for p in blocks) == 2 * (2 * 256**2 + 2 * 256 * 64 + 3 * 256 * 1024)
    options = billion.parse([])
    hidden, heads = options.hidden, options.hidden // 256
    per_block = 2 * hidden**2 + 2 * hidden * heads * 64 + 12 * hidden**2
    assert options.blocks * per_block >= 1e9


@pytest.mark.parametrize(("limit", "status"), [("1000", 0), ("0.01", 1)])
def test_a_small_run_steps_every_layer_and_tells_its_peak(billion, capsys, monkeypatch, limit, status):
    optimizers = []

    class Watched(billion.MaskAdamW):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            optimizers.append(self)

    monkeypatch.setattr(billion, "MaskAdamW", Watched)
    assert billion.main([*SMALL, "--steps", "2", "--limit", limit]) == status
    out, err = capsys.readouterr()
    assert "245,760 masked weights in 7 layers" in out
    assert re.search(r"step 1: loss \d", out)
    assert re.search(rf"peak memory: \d+\.\d+ GiB, .*; {'over' if status else 'within'} {limit} GiB", out)
    assert "28/28" in err  # forward and backward of each layer, twice
    assert optimizers[0].lean
    assert {float(state["step"]) for state in optimizers[0].state.values()} == {2.0}
    assert len(optimizers[0].state) == 7
