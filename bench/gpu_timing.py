"""Clocks: how long calls take on a GPU (CUDA events around graph replays, cold L2) or a CPU."""

from __future__ import annotations

import math
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
# Read between timed calls to push their data out of L2. Read, not written: dirty lines would be written back on the
# next call's time. Four times the largest L2 of a GPU so far (60 to 126 MB).
FLUSH_BYTES = 512 << 20
MIN_ROUNDS, MAX_ROUNDS = 5, 60
# On a CPU a turn goes on for as long, so that a call finds the caches as its own last one left them, as in a loop.
TURN_MS, MAX_CALLS, PROBES = 20.0, 50, 3
REPLAYED = "graph"  # how a call is timed, in words


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: median, 20th and 80th percentile of ``samples`` turns, and how they were run."""

    p20: float
    p50: float
    p80: float
    samples: int
    method: str

    @classmethod
    def of(cls, samples: list[float], method: str) -> Timing:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1, method)
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(fifths[0], statistics.median(samples), fifths[3], len(samples), method)


@dataclass(frozen=True)
class Failure:
    """An exception as text: held itself, its frames would keep a call's tensors alive."""

    message: str
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        lines = str(error).strip().splitlines() or [""]
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        return cls(f"{type(error).__name__}: {lines[0][:300]}", trace[-6000:])


class Clock:
    """Times calls on one device. Those of one measurement take turns, so that a drift of the clocks meets them all.

    Args:
        device: that the calls run on.
        min_rounds, max_rounds: how often each call is timed at least and at most; at least 5 times on a GPU by default.
    """

    def __init__(self, device: torch.device, min_rounds: int | None = None, max_rounds: int = MAX_ROUNDS) -> None:
        self.device = device
        self.is_gpu = device.type == "cuda"
        # Of a CPU, one is enough for a rehearsal.
        self._min_rounds = min_rounds or (MIN_ROUNDS if self.is_gpu else 1)
        self._max_rounds = max(self._min_rounds, max_rounds)
        # Random, though only read: data decide about power, and power about clocks.
        self._flushed: Tensor | None = None
        self._fill()

    def _fill(self) -> None:
        if self.is_gpu and self._flushed is None:
            self._flushed = torch.randn(FLUSH_BYTES // 4, device=self.device)

    def free(self) -> None:
        """Free the clock's own memory until it next measures."""
        self._flushed = None

    def measure(self, calls: Mapping[str, Call], seconds: float, graph: bool = True) -> dict[str, Timing | Failure]:
        """Time each call as often as ``seconds`` and the rounds allow; one that raises gives a Failure.

        Args:
            calls: by name; each leaves nothing behind that the next one needs.
            seconds: for all of them together, their warm-up not counted.
            graph: capture each call in a CUDA graph and time the replays, which leaves launch gaps out; where a call
                cannot be captured, its launches are timed as they come.
        """
        self._fill()
        found: dict[str, Timing | Failure] = {}
        runs: dict[str, tuple[Call, str, int]] = {}
        for name, call in calls.items():
            try:
                runs[name] = self._prepare(call, graph)
            except Exception as error:  # noqa: BLE001, PERF203, recorded by the caller
                found[name] = self._failure(error)
        samples: dict[str, list[float]] = {name: [] for name in runs}
        end = time.perf_counter() + seconds
        for done in range(self._max_rounds):
            # Each round begins with another call: none is always the one that follows the slowest.
            turns = list(runs.items())
            first = done % max(len(turns), 1)
            for name, (run, method, calls_per_turn) in turns[first:] + turns[:first]:
                try:
                    samples[name].append(self._turn(run, calls_per_turn, method == REPLAYED))
                except Exception as error:  # noqa: BLE001, PERF203, recorded by the caller
                    found[name] = self._failure(error)
                    del runs[name]
            if time.perf_counter() > end and done + 1 >= self._min_rounds:
                break
        found.update({name: Timing.of(samples[name], method) for name, (_, method, _) in runs.items()})
        return {name: found[name] for name in calls}

    def _turn(self, run: Call, calls: int, hides_launch: bool = False) -> float:
        """Milliseconds of a call, on a CPU the mean of several, on a GPU with or without its first launch."""
        if not self.is_gpu:
            start = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - start) * 1e3 / calls
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        assert self._flushed is not None
        # Queued before the call, it also hides what the host takes, for as long as it runs itself.
        self._flushed.sum()
        if not hides_launch:
            torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def _prepare(self, call: Call, graph: bool) -> tuple[Call, str, int]:
        """The call warmed up, and where it can be captured its replay; the method's name; and how many make a turn."""
        if not self.is_gpu:
            call()
            fastest = self._turn(call, 1) if self._max_rounds > 2 else TURN_MS
            if fastest < TURN_MS:  # one probe may meet something else that runs
                fastest = min(fastest, *(self._turn(call, 1) for _ in range(PROBES - 1)))
            calls = math.ceil(TURN_MS / max(fastest, TURN_MS / MAX_CALLS))
            return call, "perf_counter", calls
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        if not graph:
            return call, "events", 1
        captured = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(captured):
                call()
            captured.replay()
            torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001, whatever forbids capture: the call can still be timed
            torch.cuda.synchronize()
            call()
            return call, f"events, no graph: {type(error).__name__}", 1
        return captured.replay, REPLAYED, 1

    def _failure(self, error: Exception) -> Failure:
        failure = Failure.of(error)
        error.__traceback__ = None
        if self.is_gpu and isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        return failure


def peak_bytes(device: torch.device, call: Call) -> int:
    """Most device memory allocated while the call runs, beyond what was allocated before; 0 where it cannot be told."""
    if device.type != "cuda":
        call()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
