"""examples/accelerate_loop.py and examples/fsdp.py: run as a user runs them, at small size."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="the example needs accelerate")
pytest.importorskip("sklearn", reason="the example needs scikit-learn")
pytestmark = pytest.mark.dropin
EXAMPLES = Path(__file__).parents[1] / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(*arguments: str) -> dict[str, float]:
    """The numbers that a script prints."""
    unset = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    variables = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, *arguments], env={**variables, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    # A process group of gloo that is taken down aborts now and then, after all is done.
    assert done.returncode == 0 or "terminate called without an active exception" in done.stderr, done.stderr
    assert "Warning" not in done.stderr.replace("UserWarning: Can't initialize NVML", "")
    printed = re.findall(r"(\w+) (\d\.\d{3})", done.stdout)
    assert [name for name, _ in printed] == ["full", "circuit", "kept", "ablated"], done.stdout
    return {name: float(value) for name, value in printed}


@pytest.mark.parametrize("launcher", [[], TORCHRUN], ids=["one process", "two processes"])
def test_accelerate_loop(launcher, tmp_path):
    settings = ["--cpu", "--model-epochs", "6", "--mask-epochs", "8", "--output", str(tmp_path / "out")]
    result = run(*launcher, str(EXAMPLES / "accelerate_loop.py"), *settings)
    assert result["full"] > 0.85
    assert result["circuit"] > result["full"] - 0.05
    assert result["ablated"] < 0.6
    assert 0.3 < result["kept"] < 0.95
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize("how", ["shard_circuit", "fully_shard"])
def test_fsdp(how, tmp_path):
    settings = ["--model-steps", "60", "--mask-steps", "40", "--output", str(tmp_path / "out"), "--how", how]
    result = run(str(EXAMPLES / "fsdp.py"), *settings)
    assert result["full"] > 0.85
    assert result["circuit"] > 0.8
    assert result["ablated"] < 0.6
    assert 0.2 < result["kept"] < 0.7
    saved = json.loads((tmp_path / "out" / "circuit.json").read_text())
    assert saved["layers"]["blocks.0.up"]["dtype"] == "bfloat16"
