"""csmask beside NeuroSurgeon 0.1.0, ``torch.compile`` and dense training, on this machine, in one command.

    python bench/run.py --device cpu [--mode fwd_bwd --mode step ...] [--shapes 128x4096x4096] [--dtypes fp32,bf16]

Modes, all by default: ``bandwidth`` (elementwise kernels as percent of a copy's bandwidth, and the rate of matrix
products), ``fwd_bwd`` (forward + backward of one linear layer), ``step`` (with AdamW, of 1 and of 8 micro-batches),
``memory`` (bytes per masked weight), ``auto`` (what the cost model picks, beside the best) and ``end_to_end`` (a step
of BERT, GPT-2, ViT and ResNet). What is compared takes turns within one measurement: medians with 20th and 80th
percentiles, of which only ratios within one run mean anything. A provider is checked against plain torch first; one
that is wrong is not timed, is reported, and makes the exit status 1.

Rows are appended to ``OUTPUT/<device>.csv`` as they come, and Ctrl-C keeps them. Last come the targets, each met or
missed with the ratio reached; ``--profile`` prints where the time of a missed one goes. ``bench/report.py`` draws the
plots and writes the README's table.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

# Before torch is loaded: its profiler writes to stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from cases import device_name, shapes
from gpu_results import Context, version
from gpu_timing import Clock, Failure
from table import Table
from tqdm import tqdm

DEFAULT_OUTPUT = Path(__file__).with_name("results")
MODES = ("bandwidth", "fwd_bwd", "step", "memory", "auto", "end_to_end")
MAX_ROUNDS = 200


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--mode", action="append", choices=MODES, help="one of them, repeatable (all)")
    parser.add_argument("--shapes", metavar="MxNxK,...", help="of the layer, tokens first (performance tables' rows)")
    parser.add_argument("--dtypes", metavar="fp32,bf16,...", help="only these (the tables')")
    parser.add_argument("--rounds", type=int, default=7, help="each call is timed at least so often (7)")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each measurement, beyond the rounds (6)")
    parser.add_argument("--threads", type=int, help="of torch (its own choice)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, two rounds: to try it; the times mean nothing"
    )
    parser.add_argument("--profile", action="store_true", help="print where the time of missed targets goes")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIR", help="(bench/results)")
    options = parser.parse_args(arguments)
    options.mode = [mode for mode in MODES if not options.mode or mode in options.mode]
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if options.quick and options.output == DEFAULT_OUTPUT:
        parser.error(
            "--quick times nothing that means anything: give it an --output of its own, such as --output /tmp/quick"
        )
    try:
        options.shapes = shapes(options.device, options.quick, options.shapes, options.dtypes)
    except ValueError as error:
        parser.error(str(error))
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use, and there is none; use --device cpu")
    return options


def main(arguments: list[str]) -> int:
    """Run the benchmark; see the module's docstring. 130 after Ctrl-C, 1 if something failed, else 0."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    results = Table(options.output / f"{options.device}.csv", device_name(device))
    clock = Clock(device, 2 if options.quick else options.rounds, 2 if options.quick else MAX_ROUNDS)
    context = Context(results, clock, device, options.quick, torch.float32, 0, deadline=float("inf"))
    print(f"{results.gpu}; {version()}")
    if options.quick:
        print("--quick: tiny sizes; no time below means anything")
    stopped = False
    try:
        _run(context, options)
    except KeyboardInterrupt:
        stopped = True
    finally:
        results.save()
    print(f"{'stopped: what was measured is' if stopped else f'{len(results.rows)} rows are'} in {results.path}")
    _judge(context, options, not stopped and options.profile)
    failures = context.record["failures"]
    for failure in failures:
        print(f"FAILED {failure['what']}: {failure['error']}", file=sys.stderr)
    return 130 if stopped else int(bool(failures))


def _judge(context: Context, options: argparse.Namespace, profile: bool) -> None:
    """Print the targets that were measured, met or missed, and on request the profiles of those that were missed."""
    from profile_rows import profile_of
    from verdict import verdicts

    found = verdicts(context.results.rows) if options.device == "cpu" else []
    for one in found:
        print(one)
    missed = [one for one in found if not one.met]
    if found:
        print(f"{len(found) - len(missed)} of {len(found)} targets met{', in times that mean nothing' * options.quick}")
    for one in missed if profile else []:
        print(profile_of(one, context.device, options.quick))


def _run(context: Context, options: argparse.Namespace) -> None:
    tasks = _tasks(context, options)
    progress = tqdm(tasks, unit="part", file=sys.stderr, disable=None)
    for name, task in progress:
        progress.set_description(name)
        before = len(context.results.rows)
        try:
            task()
        except Exception as error:  # noqa: BLE001, recorded, and the next one runs
            context.fail(name, Failure.of(error))
        for line in lines(context.results.rows[before:]):
            tqdm.write(line, file=sys.stdout)


def _tasks(context: Context, options: argparse.Namespace) -> list[tuple[str, Callable[[], None]]]:
    """Everything that is to be done, in pieces after each of which the rows are on disk."""
    from linear_training import training

    tasks: list[tuple[str, Callable[[], None]]] = []
    linear = [mode for mode in options.mode if mode in ("fwd_bwd", "step")]
    for mode in options.mode:
        if mode in linear:
            if mode == linear[0]:
                tasks += [(s.name, _bind(training, context, [s], linear, options.seconds)) for s in options.shapes]
        else:
            make = importlib.import_module(f"mode_{mode}").tasks
            tasks += make(context, options)
    return tasks


def _bind(function: Callable[..., None], *arguments: object) -> Callable[[], None]:
    return lambda: function(*arguments)


def lines(rows: list[dict]) -> list[str]:
    """What is printed of new rows: for each measurement the first provider's time and the others' ratios to it."""
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows:
        if row["metric"] == "time":
            groups.setdefault((row["kernel"], row["mode"], row["x"]), []).append(row)
    printed = []
    for (kernel, mode, x), timed in groups.items():
        first = timed[0]
        ratios = [f"{row['provider']} {row['value'] / first['value']:.2f}x" for row in timed[1:]]
        parts = [f"{first['provider']} {first['value']:.3g} ms", *ratios]
        printed.append(f"{kernel} {mode} {x}: {', '.join(parts)}")
    others: dict[tuple[str, str, str, str], list[str]] = {}
    for row in rows:
        if row["metric"] not in ("time", "over dense"):
            key = (row["kernel"], row["provider"], row["mode"], row["x"])
            others.setdefault(key, []).append(f"{row['metric']} {row['value']:.3g} {row['unit']}")
    return printed + [f"{' '.join(key)}: {', '.join(parts)}" for key, parts in others.items()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
