"""Everything that is to be known of csmask on a GPU, in one command of at most eight minutes.

    PYTHONPATH=.:kernels python bench/gpu_suite.py [OUT_DIR] [--seconds 480] [--stages ceilings,correctness,...]

Stages: ``ceilings`` (copy bandwidth, matrix rates), ``correctness`` of every kernel in every dtype, ``elementwise``
kernels as percent of copy bandwidth, ``training`` (forward + backward and full steps beside eager, torch.compile and
dense), ``memory`` (peaks and residents), ``search`` (launch configs for this device), ``transformers`` (a step of whole
models), ``llama`` (steps of Llama-3-8B's shape); and, only where ``--stages`` names them, ``autotuned`` (the compiled
baseline under ``max-autotune``) and ``largest`` (the most masked weights that train). Each has a share of the time; one
that fails is recorded and the next one runs. Figures are written as they come to ``OUT_DIR/gpu_suite.json`` and
``.csv``; a summary is printed last. Exit status 1 says that something failed.

Needs torch, triton and this source tree (``transformers``, ``llama`` and ``largest`` transformers too); nothing need be
installed, no network. Without a GPU only what needs none runs. ``--rehearse`` (or ``TRITON_INTERPRET=1``) runs every
stage on the CPU at toy sizes, in Triton's interpreter: its times mean nothing.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEFAULT_OUTPUT = Path(__file__).with_name("results")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", nargs="?", type=Path, default=DEFAULT_OUTPUT, metavar="OUT_DIR")
    parser.add_argument("--seconds", type=float, default=480, help="for everything (480)")
    parser.add_argument("--stages", help="some of the stages, in the order they should run in, by commas")
    parser.add_argument("--rehearse", action="store_true", help="every stage on the CPU at toy sizes")
    parser.add_argument("--seed", type=int, default=time.time_ns() & 0xFFFFFF, help="of the random data (the time)")
    parser.add_argument(
        "--checks", type=int, metavar="N",
        help="correctness only of the N smallest cases of each op and dtype that are larger than a few blocks: for "
        "compute-sanitizer, under which kernels take up to a thousand times as long",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="add to the figures that OUT_DIR holds")
    options = parser.parse_args(arguments)
    if options.checks is not None and options.checks < 1:
        parser.error(f"--checks must be 1 or more, got {options.checks}")
    return options


def main(arguments: list[str], restart: Callable[[list[str]], Any] | None = None) -> int:
    """Run the suite; see the module's docstring.

    Args:
        arguments: of the command line.
        restart: runs the suite anew in a fresh process with these arguments, after a kernel has left this one without
            a device, and returns its status; by default it takes this process's place.
    """
    began = time.monotonic()
    options = parse(arguments)
    options.rehearse |= os.environ.get("TRITON_INTERPRET") == "1"
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    # Here, since Triton looks for the interpreter's switch when a kernel is defined.
    import gpu_runner

    # A kernel that hangs cannot be interrupted: the traceback is printed, and what was measured is on disk.
    patience = 600 if options.rehearse else 30  # an interpreter on a busy machine may hang for long and yet be well
    faulthandler.dump_traceback_later(options.seconds + patience, exit=True, file=sys.__stderr__)
    try:
        return gpu_runner.run(options, began, restart or _replace_process)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _replace_process(arguments: list[str]) -> None:
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, __file__, *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
