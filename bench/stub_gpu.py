"""``stub_gpu``: csmask's GPU path on tensors of the CPU, with kernels that are compiled and then not run.

All that the host does for a launch is done, up to the call of the driver: it can be timed, and what would be started
can be looked at. The results are garbage.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import triton
from compile_launch import SHARED_LIMIT, OfflineDriver
from csmask_kernels import replay
from csmask_kernels.launch import Target, is_interpreted
from gpu_runner import triton_on_cpu

from csmask import _ops, autograd, masked_weight


class StubDriver(OfflineDriver):
    """A Triton driver for a GPU that is not there.

    Attributes:
        started: of every launch what was compiled, its grid and its arguments, if they are to be kept.
    """

    def __init__(self, target: Target, keep: bool = False) -> None:
        super().__init__(target)
        self.started: list[tuple[Any, tuple[int, ...], tuple[Any, ...]]] = []
        self.utils = mock.Mock()
        self.utils.load_binary.return_value = (1, 1, 32, 0, 1024)  # module, function, registers, spills, threads
        self.utils.get_device_properties.return_value = {"max_shared_mem": SHARED_LIMIT[target.family]}
        self.launcher_cls = self._keeping if keep else self._dropping

    def _keeping(self, source: Any, metadata: Any) -> Any:
        about = (source.fn.__name__, source.signature, source.constants, source.attrs)
        compiled = *map(str, about), metadata.num_warps, metadata.num_stages
        # grid, stream, function, metadata, launch metadata, two hooks, and then the kernel's own arguments
        return lambda *given: self.started.append((compiled, given[:3], given[9:]))

    def _dropping(self, _source: Any, _metadata: Any) -> Any:
        return lambda *_given: None


@contextlib.contextmanager
def stub_gpu(target: Target, keep: bool = False) -> Iterator[StubDriver]:
    """Within it, ops on tensors of the CPU plan, compile and "launch" for the target.

    Raises:
        RuntimeError: Triton interprets its kernels in this process.
    """
    if is_interpreted():
        raise RuntimeError("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    driver, config = StubDriver(target, keep), triton.runtime.driver
    before = config._active

    # Functions, for a mock takes longer than what is timed.
    def always(_tensor: Any) -> Target:
        return target

    def never(*_: Any) -> None:
        return None

    for name in _ops.SCHEMAS:
        if _ops.SCHEMAS[name][1] is not None:
            _ops.triton_kernel(name)  # imported, so that the look-up of its target is replaced
    modules = [m for n, m in list(sys.modules.items()) if n.startswith("csmask_kernels.") and hasattr(m, "target_of")]
    with contextlib.ExitStack() as stack:
        stack.enter_context(triton_on_cpu())
        for module in modules:
            stack.enter_context(mock.patch.object(module, "target_of", always))
        # What is different on a CPU.
        stack.enter_context(mock.patch.object(autograd, "_IN_BLOCKS", ()))
        stack.enter_context(mock.patch.object(masked_weight.MaskedWeight, "_reuse", never))
        config._active = driver
        replay.forget()
        try:
            yield driver
        finally:
            config._active = before
            replay.forget()
