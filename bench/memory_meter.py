"""How much memory a call allocates, exactly: from the allocator's own events on a CPU, from its counters on a GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Usage:
    """Bytes beyond what was allocated before a call: at most while it ran, and still when it had returned."""

    peak: int
    resident: int


def usage_of(events: Iterable[tuple[int, int]]) -> Usage:
    """The usage of ``(address, bytes)``, in order; bytes are negative where memory is freed.

    Memory that none of the events allocated counts as nothing when it is freed.
    """
    held: dict[int, int] = {}
    now = peak = 0
    for address, size in events:
        if size < 0:
            now -= held.pop(address, 0)
        elif size > 0:
            now += size - held.get(address, 0)
            held[address] = size
        peak = max(peak, now)
    return Usage(peak, now)


def measure(device: torch.device, call: Callable[[], Any]) -> Usage:
    """The usage of a call; what it returns is held until its residents are counted.

    On a CPU this sees all memory of torch's allocator, that of temporaries within operators and of C++ kernels that
    allocate through torch too; not what BLAS libraries keep for themselves. What was there before the call counts as
    nothing when the call frees it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        held = call()
        torch.cuda.synchronize()
        usage = Usage(torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before)
        del held
        return usage
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        held = call()
    del held
    return usage_of(_allocations(profiled))


def _allocations(profiled: profile) -> Iterator[tuple[int, int]]:
    """``(address, bytes)`` of allocations and frees on the CPU, in order of time."""
    assert profiled.profiler is not None
    events, found = list(profiled.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
            fields = event.extra_fields
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    return ((address, size) for _, address, size in sorted(found))
