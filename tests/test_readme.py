"""The README's examples run as printed."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"


def test_the_python_blocks_run_in_order_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 2
    namespace: dict = {}
    exec(compile(blocks[0], "README.md", "exec"), namespace)
    table = capsys.readouterr().out
    assert re.search(r"circuit +\d", table)
    assert "selectivity" in table
    circuit, batch, model = namespace["circuit"], namespace["batch"], namespace["model"]
    assert 0 < circuit.density() < 0.5
    circuit.eval()
    kept = circuit(**batch).logits
    exec(compile(blocks[1], "README.md", "exec"), namespace)
    assert (tmp_path / "my-circuit").is_dir()
    assert torch.equal(namespace["plain"](**batch).logits, kept)
    assert circuit.wrapped_model is model
