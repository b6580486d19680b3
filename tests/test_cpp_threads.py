"""The threads of the C++ kernels: beside other Python threads, after a fork, and where no more can be had."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from cpp_views import logits_of, normal

_cpu = pytest.importorskip("csmask_kernels._cpu", reason="the C++ back end is not built")

# The children below load the installed kernels, without a sanitizer; the limits are on what it needs itself.
is_sanitized = bool(os.environ.get("CSMASK_CPU_MODULE"))
in_a_child = pytest.mark.skipif(is_sanitized, reason="its child process does not load the sanitized kernels")


def test_other_python_threads_run_meanwhile():
    weight = torch.ones(2_000_000 if is_sanitized else 20_000_000, dtype=torch.bfloat16)
    logits, out = torch.ones(weight.numel()), torch.empty_like(weight)
    spans = []

    def work():
        begin = time.perf_counter()
        _cpu.materialize(weight, logits, 1.0, False, 1.0, out, False, 1)
        spans.append(time.perf_counter() - begin)

    shares = []
    for _ in range(10):  # a busy machine may keep this thread waiting too: one good attempt is proof
        worker = threading.Thread(target=work)
        worker.start()
        longest, last = 0.0, time.perf_counter()
        while worker.is_alive():
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        worker.join()
        shares.append(longest / spans[-1])
        if shares[-1] < 0.5:
            return
    pytest.fail(f"this thread stood still for {min(shares):.0%} of the call or more: the kernel holds the GIL")


def test_python_threads_at_once():
    """Each call has its own results and no state is shared."""
    given = [(normal(40_009, seed=i), logits_of(40_009, seed=10 + i)) for i in range(4)]

    def run(weight, logits, threads):
        out, dlogits = torch.empty_like(weight), torch.empty_like(weight)
        l0 = _cpu.materialize(weight, logits, 3.0, False, 1.0, out, True, threads)
        _cpu.logits_grad(dlogits, weight, weight, logits, 3.0, 0.5, 1.0, False, threads)
        return out, dlogits, torch.tensor(l0[0])

    want, wrong = [run(*pair, 1) for pair in given], []

    def work(i):
        for _ in range(20):
            got = run(*given[i], 2)
            wrong.extend(i for a, b in zip(got, want[i], strict=True) if not torch.equal(a, b))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_after_a_fork():
    """A forked child has none of the threads that its parent's runtime counts on: it must neither wait nor crash."""
    weight, logits = np.linspace(-1, 1, 400_003, dtype=np.float32), np.linspace(-9, 9, 400_003, dtype=np.float32)
    want, got = np.full_like(weight, np.nan), np.full_like(weight, np.nan)
    l0 = _cpu.materialize(weight, logits, 1.0, False, 1.0, want, True, 2)  # the runtime has its threads now
    child = os.fork()
    if child == 0:  # nothing of pytest or torch may run here
        status = 1
        try:
            same = _cpu.materialize(weight, logits, 1.0, False, 1.0, got, True, 2) == l0
            status = 0 if same and (got == want).all() else 2
        finally:
            os._exit(status)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            break
        time.sleep(0.01)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child waits for threads that it does not have")
    # the parent goes on as before
    assert _cpu.materialize(weight, logits, 1.0, False, 1.0, got, True, 2) == l0
    assert (got == want).all()


WITHOUT_TORCH = """
import sys
import numpy as np
import csmask_kernels._cpu as cpu
weight, logits = np.linspace(-1, 1, 400_003, dtype=np.float32), np.linspace(-9, 9, 400_003, dtype=np.float32)
one, more = np.full_like(weight, np.nan), np.full_like(weight, np.nan)
l0 = cpu.materialize(weight, logits, 1.0, False, 1.0, one, True, 1)
again = cpu.materialize(weight, logits, 1.0, False, 1.0, more, True, 3)
print("torch" in sys.modules, again == l0, (one == more).all())
"""


@in_a_child
def test_without_the_runtime_that_torch_brings():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=False)
    assert done.stdout == "False True True\n", done.stdout + done.stderr


NO_MORE_THREADS = """
import resource
import numpy as np
import csmask_kernels._cpu as cpu
weight, logits = np.linspace(-1, 1, 400_000, dtype=np.float32), np.linspace(-9, 9, 400_000, dtype=np.float32)
alone, crowded = np.full_like(weight, np.nan), np.full_like(weight, np.nan)
l0 = cpu.materialize(weight, logits, 1.0, False, 1.0, alone, True, 1)
with open("/proc/self/statm") as file:
    in_use = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + (1 << 20), resource.RLIM_INFINITY))  # no room for another stack
import threading
try:
    threading.Thread(target=int).start()
    print("threads can start")
except RuntimeError:
    pass
print(cpu.materialize(weight, logits, 1.0, False, 1.0, crowded, True, 8) == l0, (alone == crowded).all())
"""


@in_a_child
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_caller_does_the_work_of_threads_that_cannot_start():
    done = subprocess.run([sys.executable, "-c", NO_MORE_THREADS], capture_output=True, text=True, check=False)
    assert done.stdout == "True True\n", done.stdout + done.stderr
