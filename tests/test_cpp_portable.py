"""The C++ kernels compile where there is no x86, as far as a compiler for x86 can tell."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[1] / "kernels" / "cpu"
KERNELS = ["bitmask", "logits_grad", "mask_step", "materialize", "philox", "scale_neurons", "table"]


def test_every_kernel_source_is_tried():
    includers = [p.stem for p in SOURCES.glob("*.cpp") if '#include "ops.h"' in p.read_text()]
    assert sorted(includers) == KERNELS


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_the_headers_of_x86(name):
    command = ["c++", "-std=c++17", "-U__SSE2__", "-DCSMASK_ISA=neon", "-fsyntax-only", f"{SOURCES / name}.cpp"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
