"""The main job: the circuit that tells nouns from verbs in MiniLM, and the evidence that it is one.

1. Sentences with a homograph come from WordNet; no test lemma occurs in training (``task``).
2. MiniLM's blocks 0 to 2 are frozen, and a logistic head reads the word's state behind them.
3. A mask over the 18 linear layers (5.3 million weights) is trained per mask seed (``train``).
4. ``evaluate_circuit`` compares the full model, the circuit, the model without the circuit, and the model without as
   many random weights. Selectivity is the difference of the last two.
5. The same is done over weights shuffled within each matrix, with the same head. Masks can *learn* a task: that
   circuit is accurate as well, but removing it hurts little more than removing random weights.

What the control can say: with MiniLM's head, shuffled weights are near chance before any mask, so an accurate circuit
over them is one that the mask made. It does not bound selectivity. A head refitted on the shuffled model
(``control_head="refit"``) reads real embeddings through random layers and gets .80 to .82 right; removing the circuit
of *that* model costs .28 to .36 more than removing random weights (mask seeds 0 to 2), nearly all that it had.
Selectivity says that a model's ability rests on these weights, not that pretraining put it there.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .. import __version__
from ..checkpoint import rest_fingerprint, write_atomically
from ..circuit import CircuitModel
from ..evaluate import evaluate_circuit
from ..philox import check_seed
from . import report
from .speed import Comparison, Spent, compare_with_eager
from .task import (
    Batch,
    EncodedItem,
    Head,
    accuracy,
    digest,
    encode,
    evaluation_batches,
    fit_head_on,
    load_minilm,
    shuffle_weights,
    wordnet_items,
)
from .train import RECORD_EVERY, MaskTraining, Settings, check_identity, circuit_config, stop_between_steps
from .wordnet import WordNetNotFoundError, find_wordnet

DEFAULT_OUTPUT = Path("runs/noun-verb")
MASK_SEEDS = 3
CONTROL_DRAWS = 3  # random circuits per mask seed
CONTROL_HEADS = ("same", "refit")


@dataclass(frozen=True)
class Task:
    """A frozen model, the head that reads it, and encoded items."""

    model: nn.Module
    head: Head
    train: list[EncodedItem]
    test: list[EncodedItem]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device


def prepare(device: str = "cpu") -> Task:
    """Find WordNet, load MiniLM, and fit the head on the frozen model; prints what it found."""
    wordnet = find_wordnet(download=True)
    train, test = wordnet_items(wordnet)
    model, tokenizer = load_minilm(device)
    for name, items in (("training", train), ("test", test)):
        lemmas = len({item.example.lemma for item in items})
        print(f"{len(items)} {name} sentences of {lemmas} homographs, half nouns and half verbs")
    encoded = encode(tokenizer, train)
    task = Task(model, fit_head_on(model, encoded, device), encoded, encode(tokenizer, test))
    print(f"Sentences from {wordnet}; MiniLM's blocks 0 to 2 and a logistic head, both frozen from here on\n")
    return task


def find_circuit(
    task: Task,
    settings: Settings,
    directory: Path,
    *,
    resume: bool,
    name: str,
    batches: Sequence[Batch],
    spent: Spent,
) -> report.Run:
    """Train the masks of one seed, judge them, save them; or read the result where ``resume`` finds it finished.

    Steps and seconds of the training are added to ``spent``.

    Raises:
        Stopped: Ctrl-C; the state is in ``directory``.
    """
    result, state = directory / "run.json", directory / "training.safetensors"
    if not resume:
        result.unlink(missing_ok=True)
        state.unlink(missing_ok=True)
    data = digest(task.train, task.test, task.head.weight.tolist(), task.head.bias.item(), rest_fingerprint(task.model))
    circuit = CircuitModel(circuit_config(settings), task.model)
    try:
        training = MaskTraining(circuit, task.head, task.train, settings, state, data)
        if resume and result.exists():
            finished: report.Run = json.loads(result.read_text())
            check_identity(result, finished["identity"], training.identity)
            print(f"{name}: finished before")
            return finished
        if resume and state.exists():
            training.load()
        before = training.done
        _train(training, name)
        spent.steps, spent.seconds = spent.steps + training.done - before, spent.seconds + training.seconds
        circuit.eval()
        circuit.save_pretrained(directory / "masks")
        run = _judge(training, name, batches)
    finally:
        circuit.unload()
    write_atomically(result, json.dumps(run, indent=1).encode())
    state.unlink(missing_ok=True)
    return run


def _train(training: MaskTraining, name: str) -> None:
    """Run a training under a progress bar."""
    weights = sum(layer.maskable for layer in training.circuit.masked_layers.values())
    looked: dict[str, float] = {}  # the latest of each number: some are not measured at every step
    for row in training.history:
        looked.update(row)
    with (
        stop_between_steps() as stop,
        tqdm(
            total=training.settings.steps,
            initial=training.done,
            desc=name,
            unit="step",
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
            bar_format="{desc}: {percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
        ) as bar,
    ):

        def show(row: dict[str, float]) -> None:
            looked.update(row)
            text = f"loss {row['loss']:.3f}, l0 {weights * row['l0']:,.0f}, T {row['temperature']:.1f}"
            text += f", kept {looked['kept']:.1%}, undecided {looked['undecided']:.1%}"
            bar.set_postfix_str(text, refresh=False)
            bar.update()

        training.run(show, stop)
    if training.done < training.settings.steps:
        bound = training.settings.stop_undecided
        print(f"{name}: stopped after {training.done} steps, less than {bound:.2%} undecided")


def _judge(training: MaskTraining, name: str, batches: Sequence[Batch]) -> report.Run:
    circuit, head = training.circuit, training.head
    try:
        evaluation = evaluate_circuit(circuit, lambda model: accuracy(model, head, batches), range(CONTROL_DRAWS))
    except ValueError as error:
        raise ValueError(f"{name} cannot be judged: {error}. Train for more steps than {training.done}") from error
    statistics = circuit.compute_l0_statistics()
    layers = {
        layer: {"kept": count, "weights": statistics["layer2maxl0"][layer]}
        for layer, count in statistics["layer2l0"].items()
    }
    return {
        "name": name,
        "seed": training.settings.seed,
        "identity": training.identity,
        "evaluation": evaluation.to_dict(),
        "layers": layers,
        "history": training.history,
    }


def find_circuits(
    task: Task,
    settings: Settings,
    output: Path,
    *,
    resume: bool = False,
    mask_seeds: int = MASK_SEEDS,
    control_head: str = "same",
) -> tuple[list[report.Run], report.Run, Spent]:
    """Circuits for ``mask_seeds`` seeds from ``settings.seed`` on, and the control over shuffled weights."""
    spent = Spent()
    options: dict[str, Any] = {
        "resume": resume, "batches": evaluation_batches(task.test, task.device), "spent": spent
    }  # fmt: skip
    runs = []
    for seed in range(settings.seed, settings.seed + mask_seeds):
        own, name = replace(settings, seed=seed), f"mask seed {seed}"
        runs.append(find_circuit(task, own, output / f"seed-{seed}", name=name, **options))
    shuffled = shuffle_weights(task.model, settings.seed)
    head = fit_head_on(shuffled, task.train, task.device) if control_head == "refit" else task.head
    control_task, folder = replace(task, model=shuffled, head=head), output / f"shuffled-{settings.seed}"
    control = find_circuit(control_task, settings, folder, name="shuffled weights", **options)
    return runs, control, spent


def _compare_with_eager(task: Task, settings: Settings, spent: Spent) -> Comparison | None:
    """None where nothing was trained here, or eagerly, or in too few steps to time any."""
    if not spent.steps or settings.execution == "reference" or settings.steps < 2 * RECORD_EVERY:
        return None

    def make(execution: str) -> MaskTraining:
        own = replace(settings, execution=execution)
        circuit = CircuitModel(circuit_config(own), copy.deepcopy(task.model))
        return MaskTraining(circuit, task.head, task.train, own, Path())

    return compare_with_eager(make, settings.execution, spent)


def run(
    seed: int = 0,
    steps: int | None = None,
    output: str | Path = DEFAULT_OUTPUT,
    device: str = "cpu",
    resume: bool = False,
    *,
    mask_seeds: int = MASK_SEEDS,
    control_head: str = "same",
    execution: str = "auto",
    l0_target: float | None = None,
    stop_undecided: float | None = None,
    task: Task | None = None,
) -> dict[str, Any]:
    """Run the demo: train, judge, print, draw and save.

    seed: the first mask seed (noise on the logits, order of the batches), and the seed of the shuffled control
    steps: optimizer steps per mask; None for the tested number
    output: folder for figures, numbers and masks
    device: torch device; on a CPU equal seeds give equal results
    resume: go on with an interrupted run of the same options
    mask_seeds: how many masks to train, with seeds ``seed``, ``seed + 1`` ...
    control_head: the head of the shuffled control, ``"same"`` as MiniLM's or ``"refit"`` on the shuffled model
    execution: when the masks are computed, see ``CircuitConfig``; ``"reference"`` is plain PyTorch
    l0_target: fraction of the weights to keep, to which lambda is driven; None for the tested lambda
    stop_undecided: stop a mask's training when fewer weights than this share are undecided
    task: instead of WordNet and MiniLM

    Returns what it writes to ``metrics.json``.

    Raises:
        WordNetNotFoundError, ImportError: data, model or matplotlib is missing; the text says how to get it.
        ValueError: bad options, or a state to resume from that is damaged or of other options.
        KeyboardInterrupt: Ctrl-C; what is done is kept, and ``resume=True`` goes on.
    """
    started = time.perf_counter()
    _check_options(device, mask_seeds, control_head, seed)
    settings = Settings(seed=seed, execution=execution, l0_target=l0_target, stop_undecided=stop_undecided)
    settings = settings if steps is None else replace(settings, steps=steps)
    circuit_config(settings)  # a wrong value is an error before there is a folder
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    task = prepare(device) if task is None else task
    try:
        runs, control, spent = find_circuits(
            task, settings, output, resume=resume, mask_seeds=mask_seeds, control_head=control_head
        )
    except KeyboardInterrupt as interrupt:
        print(f"\nInterrupted. What is done is in {output}; the same command with --resume goes on.", file=sys.stderr)
        raise interrupt
    speed = _compare_with_eager(task, settings, spent)
    numbers = {
        **report.metrics(runs, control),
        "control_head": control_head,
        "versions": {"csmask": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "seconds": time.perf_counter() - started,
        "speed": None if speed is None else asdict(speed),
    }
    write_atomically(output / "metrics.json", json.dumps(numbers, indent=1).encode())
    figures = report.draw(runs, control, output)
    print(f"\n{report.table(runs, control)}\n\n{report.verdict(runs, control)}\n")
    print(f"Figures  {', '.join(str(path) for path in figures)}")
    print(f"Numbers  {output / 'metrics.json'}; per mask, with the training curve, {output / '*' / 'run.json'}")
    print(f"Masks    {output / '*' / 'masks'}, for CircuitModel.from_pretrained")
    if speed is not None:
        print(f"Training {speed}")
    print(f"Took {numbers['seconds']:.0f} s")
    return numbers


def _check_options(device: str, mask_seeds: int, control_head: str, seed: int) -> None:
    check_seed(seed)
    if seed + mask_seeds > 2**63:
        raise ValueError(f"seed must be below 2**63 - {mask_seeds}, got {seed}")
    if mask_seeds < 1:
        raise ValueError(f"mask_seeds must be at least 1, got {mask_seeds}")
    if control_head not in CONTROL_HEADS:
        raise ValueError(f"control_head must be one of {', '.join(CONTROL_HEADS)}, got {control_head!r}")
    try:
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:  # an unknown name, or a build of torch without that device
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    try:
        import matplotlib.figure  # noqa: F401, before the training rather than after it
    except ImportError as error:
        raise ImportError('the demo draws figures with matplotlib: pip install "csmask[demo]"') from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status of ``run_command``."""
    parser = argparse.ArgumentParser(description="Find the circuit that tells nouns from verbs in MiniLM.")
    parser.add_argument("--seed", type=int, default=0, help="first mask seed (default 0)")
    parser.add_argument("--steps", type=int, help=f"steps per mask (default {Settings.steps})")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help=f"folder (default {DEFAULT_OUTPUT})")
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run of the same options")
    parser.add_argument("--mask-seeds", type=int, default=MASK_SEEDS, help=f"masks to train (default {MASK_SEEDS})")
    parser.add_argument(
        "--control-head",
        choices=CONTROL_HEADS,
        default="same",
        help="head of the shuffled control: MiniLM's own, or one refitted on the shuffled model (default same)",
    )
    parser.add_argument(
        "--execution", default="auto", help='when masks are computed; "reference" is plain PyTorch (default auto)'
    )
    parser.add_argument("--l0-target", type=float, help="fraction of the weights to keep (default: a fixed lambda)")
    parser.add_argument("--stop-undecided", type=float, help="stop below this share of undecided weights, as 0.001")
    return run_command(**vars(parser.parse_args(argv)))


def run_command(**options: Any) -> int:
    """``run`` as a command: errors as one line; returns the exit status, 0, 1 for an error or 130 for Ctrl-C."""
    try:
        run(**options)
    except (WordNetNotFoundError, ImportError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
