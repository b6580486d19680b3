"""What the GPU suite writes, rows as they come into one JSON and one CSV, and what each stage is given to work with."""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.metadata
import io
import json
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gpu_timing import Clock, Failure, Timing

COLUMNS = (
    "kernel", "provider", "mode", "metric", "unit", "x", "value", "p20", "p50", "p80", "config", "gpu", "time",
    "version",
)  # fmt: skip
SAVE_EVERY = 2.0  # seconds


def write_atomically(path: Path, text: str) -> None:
    """Replace the file as a whole: whoever stops the run finds the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    scratch.write_text(text)
    scratch.replace(path)


@functools.cache
def commit() -> str:
    """The source tree's git commit, with ``+`` where files differ from it; "unknown" in a tree without git, unless the
    variable CSMASK_COMMIT says whose copy it is.
    """
    if os.environ.get("CSMASK_COMMIT"):
        return os.environ["CSMASK_COMMIT"]
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=20
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def version() -> str:
    """Commit and releases that a figure belongs to."""
    try:
        triton = f"triton {importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:  # a CPU needs none
        triton = "no triton"
    return f"commit {commit()}, torch {torch.__version__}, {triton}"


def now() -> str:
    """The time as rows give it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class Results:
    """Rows and stages of a run, on disk at most SAVE_EVERY seconds after they were added.

    Args:
        directory: gets ``gpu_suite.json`` and ``gpu_suite.csv``.
        gpu: the device's name as torch gives it, or "cpu".
        resume: go on with what ``directory`` holds.
        about: more to write beside the rows.
    """

    def __init__(self, directory: Path, gpu: str, resume: bool = False, **about: Any) -> None:
        self.directory, self.gpu, self.version = directory, gpu, version()
        self.rows: list[dict[str, Any]] = []
        self.stages: dict[str, dict[str, Any]] = {}
        self.about = about
        self.moment: str | None = None  # the time of all rows, where they are to be known by it
        self._saved = 0.0
        if resume and self.json_path.is_file():
            found = json.loads(self.json_path.read_text())
            self.rows, self.stages = found["rows"], found["stages"]
            self.about = {**found["about"], **about}

    @property
    def json_path(self) -> Path:
        return self.directory / "gpu_suite.json"

    def add(
        self,
        kernel: str,
        provider: str,
        mode: str,
        metric: str,
        unit: str,
        x: str,
        value: float,
        timing: Timing | None = None,
        config: str = "",
    ) -> None:
        """One row: ``value`` in ``unit``; percentiles are those of ``timing`` in ms, without one ``value`` itself."""
        spread = (value,) * 3 if timing is None else (timing.p20, timing.p50, timing.p80)
        moment = self.moment or now()
        values = (kernel, provider, mode, metric, unit, x, value, *spread, config, self.gpu, moment, self.version)
        self.rows.append(dict(zip(COLUMNS, values, strict=True)))
        if time.monotonic() > self._saved + SAVE_EVERY:
            self.save()

    def find(self, **wanted: str) -> list[dict[str, Any]]:
        """Rows with these values."""
        return [row for row in self.rows if all(row[k] == v for k, v in wanted.items())]

    def save(self) -> None:
        content = {
            "gpu": self.gpu, "version": self.version, "about": self.about, "stages": self.stages, "rows": self.rows,
        }  # fmt: skip
        # NaN and infinity are no JSON: a figure that is none is an error to be seen, not a file that nobody can read.
        write_atomically(self.json_path, json.dumps(_finite(content), indent=1, allow_nan=False))
        table = io.StringIO()
        writer = csv.DictWriter(table, COLUMNS)
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.directory / "gpu_suite.csv", table.getvalue())
        self._saved = time.monotonic()


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {k: _finite(v) for k, v in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(v) for v in content]
    if isinstance(content, float) and not -float("inf") < content < float("inf"):
        return str(content)
    return content


@dataclasses.dataclass
class Context:
    """What a stage works with.

    Attributes:
        results, clock, device: where figures go, what times, where tensors are.
        toy: rehearse at sizes for the interpreter.
        dtype: of weights and activations where only one is measured.
        seed: of this run's random data.
        checks: how many of an op's checks to run in each dtype; None for all.
        deadline: when the stage should end, by ``time.monotonic()``.
        record: the stage's entry in the results: failures and what there was no time for.
    """

    results: Results
    clock: Clock
    device: torch.device
    toy: bool
    dtype: torch.dtype
    seed: int
    checks: int | None = None
    deadline: float = 0.0
    record: dict[str, Any] = dataclasses.field(default_factory=lambda: {"failures": [], "not_run": []})

    def left(self) -> float:
        """Seconds that the stage has left."""
        return self.deadline - time.monotonic()

    def is_over(self, what: str) -> bool:
        """Whether the stage's time is up; what it then leaves out is recorded."""
        if self.left() > 0:
            return False
        self.record["not_run"].append(what)
        return True

    def fail(self, what: str, failure: Failure) -> None:
        self.record["failures"].append({"what": what, "error": failure.message, "traceback": failure.trace})
        self.results.save()

    def measure(
        self,
        kernel: str,
        mode: str,
        x: str,
        calls: Mapping[str, Any],
        seconds: float,
        graph: bool = True,
        config: str | Mapping[str, str] = "",
    ) -> dict[str, Timing]:
        """Time the providers' calls in turns and add a row for each; those that fail are recorded and left out.

        ``config`` is what the rows say beside the method: one text, or one by provider.
        """
        times = {}
        seconds = 0.0 if self.toy else min(seconds, max(self.left(), 0.1))
        for provider, found in self.clock.measure(calls, seconds, graph).items():
            if isinstance(found, Failure):
                self.fail(f"{kernel} {provider} {mode} {x}", found)
                continue
            times[provider] = found
            said = config if isinstance(config, str) else config.get(provider, "")
            how = ", ".join(filter(None, (said, found.method)))
            self.results.add(kernel, provider, mode, "time", "ms", x, found.p50, found, how)
        return times
