"""The ``csmask`` command."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
_PACKAGES = ("torch", "transformers", "triton", "safetensors", "numpy")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train binary masks over the weights of frozen models."""


@app.command()
def doctor() -> None:
    """Print versions, the back ends found, and why one is missing."""
    for name, value in diagnosis().items():
        typer.echo(f"{name:<18}{value}")


def diagnosis() -> dict[str, str]:
    """What ``csmask doctor`` prints, line by line."""
    import torch

    report = {"csmask": __version__, "python": platform.python_version()}
    report.update({package: _version(package) for package in _PACKAGES})
    report["threads"] = str(torch.get_num_threads())
    report["GPU"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none found"
    report.update(_back_ends())
    return report


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _back_ends() -> dict[str, str]:
    from . import _ops

    return {
        **_cpu_back_end(),
        "back end, GPU": _ops.gpu_back_end(),
        "launch configs": _ops.launch_configs(),
        "back end, others": "reference (plain torch)",
    }


def _cpu_back_end() -> dict[str, str]:
    from . import _cpp

    kernels = _cpp.kernels
    if kernels is None:
        return {
            "back end, CPU": f"reference (plain torch): the C++ kernels are not there ({_cpp.kernels_missing}); "
            "to have them, install a C++17 compiler and install csmask again"
        }
    threads = "PyTorch's own" if kernels.shares_threads() else "started for each call: no OpenMP runtime was found"
    return {
        "back end, CPU": "C++ kernels",
        "instruction set": f"{kernels.instruction_set()} (of {', '.join(kernels.instruction_sets())})",
        "kernels' threads": threads,
        "largest cache": f"{kernels.last_level_cache() / 2**20:.0f} MiB",
    }


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Seed of masks, batches and controls.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Training steps per mask; the tested number by default.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for figures, masks and numbers.")] = Path("runs/noun-verb"),
    device: Annotated[str, typer.Option(help='Torch device, such as "cpu" or "cuda".')] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    mask_seeds: Annotated[int, typer.Option(help="How many masks to train.")] = 3,
    control_head: Annotated[
        str, typer.Option(help='Head of the shuffled control: "same" as MiniLM\'s, or "refit" on the shuffled model.')
    ] = "same",
    execution: Annotated[
        str, typer.Option(help='When masks are computed: "auto", or "reference" for plain PyTorch ...')
    ] = "auto",
    l0_target: Annotated[float | None, typer.Option(help="Fraction of the weights to keep, such as 0.05.")] = None,
    stop_undecided: Annotated[
        float | None, typer.Option(help="Stop below this share of undecided weights, such as 0.001.")
    ] = None,
) -> None:
    """Find the circuit that tells nouns from verbs in a pretrained MiniLM."""
    from .demo.noun_verb import run_command

    options: dict[str, Any] = {"seed": seed, "steps": steps, "output": output, "device": device, "resume": resume}
    options.update(mask_seeds=mask_seeds, control_head=control_head, execution=execution)
    options.update(l0_target=l0_target, stop_undecided=stop_undecided)
    raise typer.Exit(run_command(**options))


@app.command("plan")
def plan_memory(
    model: Annotated[str | None, typer.Argument(help="A config.json, a model's folder, or a name of --list.")] = None,
    targets: Annotated[list[str] | None, typer.Option(help="What to mask, may be repeated; all-linear.")] = None,
    gpu: Annotated[list[float] | None, typer.Option(help="A GPU's GiB, may be repeated; 24, 40, 80, 141.")] = None,
    micro_batches: Annotated[int, typer.Option(help="Forwards and backwards per optimizer step.")] = 1,
    activations: Annotated[float, typer.Option(help="GiB of activations to add.")] = 0.0,
    dtype: Annotated[str, typer.Option(help="Of the frozen weights: bfloat16, float16 or float32.")] = "bfloat16",
    names: Annotated[bool, typer.Option("--list", help="Print the built-in models and exit.")] = False,
) -> None:
    """Say how much memory training masks takes, and which GPUs it fits: no weights are loaded, nothing downloaded."""
    from . import plan

    if names:
        for name, config in plan.BUILT_IN.items():
            typer.echo(f"{name:<18}{config['architectures'][0]}")
        return
    if model is None:
        raise typer.BadParameter("give a config.json, a model's folder, or a name of --list")
    # What the options leave out is the module's own.
    asked = (targets or ["all-linear"], gpu or list(plan.GPUS), micro_batches, activations, dtype)
    raise typer.Exit(plan.run_command(model, *asked))


def main() -> None:
    """Entry point of the ``csmask`` command."""
    app()
