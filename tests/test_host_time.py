"""``bench/host_time.py``: what a GPU's host does for a layer is timed for every provider, with both kinds of loss."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def host_time(*arguments, **environment):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env.update(environment, PYTHONPATH=os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))))
    command = [sys.executable, str(ROOT / "bench" / "host_time.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def test_every_provider_has_its_phases_and_what_it_takes_more_than_dense():
    done = host_time("--layers", "3", "--repeats", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines() if len(line.split()) == 6 and line[0] != " "]
    names = ["dense", "eager", "per_step", "per_forward", "in_kernel", "neuron"]
    assert [row[0] for row in rows] == names * 2
    dense = {}
    for i, (name, *cells) in enumerate(rows):
        forward, backward, step, total, over = map(float, cells)
        assert min(forward, backward, step) > 0
        assert total == pytest.approx(forward + backward + step, abs=0.2)
        table = i // len(names)
        dense.setdefault(table, total)
        assert over == pytest.approx(total - dense[table], abs=0.2), name


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--layers", "0"], {}, "--layers and --repeats must be 1 or more"),
        (["--profile", "sparse"], {}, "invalid choice: 'sparse'"),
        ([], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set"),
    ],
    ids=["no layers", "unknown provider", "interpreter"],
)
def test_what_cannot_be_timed_is_refused(arguments, environment, message):
    done = host_time(*arguments, **environment)
    assert done.returncode == 2
    assert message in done.stderr
