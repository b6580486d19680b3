"""What a training script may have switched on: compilation, mixed precision, checkpointing.

The training with it is that without it, in every execution and with csmask's optimizers as with torch's.
``pytest -m dropin -v`` prints the whole table of such equalities, with those of other files.
"""

from __future__ import annotations

import contextlib
import functools
import math
import shutil

import pytest
import test_optim
import torch
from models import MODELS
from test_trainer import arguments, assert_close, build, logits, losses, train
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from csmask import CircuitConfig, CircuitModel, MaskAdamW, TemperatureSchedule

pytestmark = pytest.mark.dropin

OPTIMIZERS = {
    "AdamW": lambda p, **settings: torch.optim.AdamW(p, weight_decay=0.0, **settings),
    "MaskAdamW": MaskAdamW,
    "lean": lambda p, **settings: MaskAdamW(p, lean=True, max_grad_norm=math.inf, **settings),
}


# torch.compile


def annealed(circuit, call, optimizer, steps=20, batches=test_optim.batches):
    """Training steps, each at a temperature of its own; the losses."""
    schedule, found = TemperatureSchedule(circuit, steps, 20.0), []
    for t in range(steps):
        for x, y in batches(t, 2):
            loss = call(x, y)["loss"] / 2
            loss.backward()
            found.append(float(loss.detach()))
        optimizer.step(), optimizer.zero_grad(), schedule.step()
    return found


@pytest.mark.parametrize("execution", ["per_forward", "in_kernel", "reference", "per_step"])
def test_a_compiled_circuit_trains_as_an_eager_one(execution):
    """One graph, with no break in it, for 20 temperatures and as many steps."""
    torch.compiler.reset()
    counters.clear()
    optimizer = OPTIMIZERS["MaskAdamW" if execution == "per_step" else "AdamW"]
    got, want = test_optim.circuit_of(execution), test_optim.circuit_of(execution)
    mine, theirs = (optimizer(c.mask_parameters(), lr=0.02) for c in (got, want))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(got, backend=counter, fullgraph=True)
    losses_ = annealed(got, compiled, mine)
    assert counter.frame_count == 1
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1, counters
    test_optim.assert_same_training(got, want, losses_, annealed(want, want, theirs))
    # Nor does what a script does between steps compile anything anew.
    ((x, y),) = test_optim.batches(0, 1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got(x, y), got.telemetry(), got.eval(), got(x, y), got.train()
        compiled(x, y)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_trains_as_eager():
    torch.compiler.reset()
    found = []
    for compiled in (True, False):
        circuit = test_optim.small("per_forward")
        optimizer = OPTIMIZERS["AdamW"](circuit.mask_parameters(), lr=0.02)
        call = torch.compile(circuit, fullgraph=True) if compiled else circuit
        for t in range(6):
            circuit.temperature = 1.0 + t
            (call(test_optim.X).square().sum() + 0.1 * circuit.l0()).backward()
            optimizer.step(), optimizer.zero_grad()
        found.append(circuit.mask_parameters())
    test_optim.assert_close(*found)


# Mixed precision


AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
FAMILIES = ("bert", "gpt2", "resnet")  # linear layers, GPT-2's, convolutions


def mixed(family, optimizer, amp=None, scaler=None, clip=None, execution="auto", steps=range(6), norms=None):
    """A circuit after training steps of two micro-batches under autocast, and its optimizer."""
    tiny = MODELS[family]
    config = CircuitConfig(target_layers=list(tiny.targets), l0_lambda=1e-3, execution=execution)
    circuit = CircuitModel(config, tiny.build())
    optimizer = OPTIMIZERS[optimizer](circuit.mask_parameters(), lr=0.02, eps=1e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=False) if scaler is None else scaler
    for t in steps:
        circuit.temperature = 1.0 + t / 4
        for micro in range(2):
            with contextlib.nullcontext() if amp is None else torch.autocast("cpu", amp):
                loss = circuit(**tiny.batch(2 * t + micro)).loss / 2
            scaler.scale(loss).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(circuit.mask_parameters(), clip)
            norms.append(float(norm))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return circuit, optimizer


def assert_near(got, want, bound):
    """Layer by layer, within a bound of how far the logits went from 0."""
    for (name, a), b in zip(got.named_mask_parameters(), want.mask_parameters(), strict=True):
        error = float((a - b).detach().norm() / b.detach().norm())
        assert error <= bound, f"{name}: {error:.2g}"


@pytest.mark.parametrize("clip", [None, 2e-3], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("optimizer", ["AdamW", "MaskAdamW"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("amp", AMP)
def test_amp_trains_as_fp32(amp, family, optimizer, clip):
    """fp16 with a loss that is scaled; the numbers of the reference, plain torch under torch's AdamW, unscaled."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if amp == "fp16" else None
    norms = [[], [], []]
    got, _ = mixed(family, optimizer, AMP[amp], scaler, clip, norms=norms[0])
    unscaled, _ = mixed(family, "AdamW", AMP[amp], None, clip, "reference", norms=norms[1])
    fp32, _ = mixed(family, "AdamW", None, None, clip, "reference", norms=norms[2])
    eps = torch.finfo(AMP[amp]).eps
    assert_near(got, unscaled, eps)
    assert_near(got, fp32, 2 * eps)
    assert (logits(got) - logits(fp32)).norm() > 1e-3 * eps * logits(fp32).norm()  # autocast is on
    assert norms[0] == pytest.approx(norms[2], rel=4 * eps)
    assert all(norm > 1.1 * clip for norm in norms[0])  # and clips


def test_max_grad_norm_clips_what_the_scaler_has_unscaled(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "clipping", lambda p, **settings: MaskAdamW(p, max_grad_norm=2e-3, **settings))
    got, optimizer = mixed("bert", "clipping", torch.float16, torch.amp.GradScaler("cpu", init_scale=2.0**10))
    norms = []
    want, _ = mixed("bert", "AdamW", torch.float16, None, 2e-3, "reference", norms=norms)
    assert_near(got, want, torch.finfo(torch.float16).eps)
    assert float(optimizer.grad_norm) == pytest.approx(norms[-1], rel=1e-3)


@pytest.mark.parametrize("clip", [None, 2e-3], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("optimizer", ["AdamW", "MaskAdamW"])
@pytest.mark.parametrize("execution", ["per_forward", "in_kernel", "auto"])
def test_a_step_that_overflows_is_skipped(execution, optimizer, clip):
    """A scale at which fp16 overflows, then one at which it does not: as if the first step had not been."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**34, backoff_factor=2.0**-24)
    skipped, state = mixed("bert", optimizer, torch.float16, scaler, clip, execution, range(1), norms=[])
    assert scaler.get_scale() == 2.0**10
    assert all(torch.equal(p, torch.zeros_like(p)) for p in skipped.mask_parameters())
    assert not state.state
    assert all(p.grad is None for p in skipped.mask_parameters())
    assert skipped.telemetry()["l0"] == pytest.approx(logits(skipped).numel() / 2)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**34, backoff_factor=2.0**-24)
    got, state = mixed("bert", optimizer, torch.float16, scaler, clip, execution, range(5), norms=[])
    want, _ = mixed("bert", "AdamW", torch.float16, None, clip, "reference", range(1, 5), norms=[])
    assert {float(s["step"]) for s in state.state.values()} == {4.0}
    assert_near(got, want, torch.finfo(torch.float16).eps)


# Gradient checkpointing


BLOCKS = {"bert": "bert.encoder.layer", "opt": "model.decoder.layers"}  # OPT's blocks drop out by themselves


@functools.cache
def checkpointed(family, optimizer, folder, use_reentrant=None):
    """Logits and losses of a run of the Trainer, and how often each block ran; None: without checkpointing."""
    circuit, calls = build(family), []
    blocks = circuit.get_submodule(f"wrapped_model.{BLOCKS[family]}")
    for i, block in enumerate(blocks):
        first = next(m for m in block.modules() if hasattr(m, "mask_logits"))
        first.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    is_on = use_reentrant is not None
    args = arguments(
        folder, 4, 1 if optimizer == "lean" else 2, num_train_epochs=1, gradient_checkpointing=is_on,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant} if is_on else None,
    )  # fmt: skip
    made = OPTIMIZERS[optimizer](circuit.mask_parameters(), lr=0.05, eps=1e-4)
    trainer = train(circuit, args, family, optimizers=(made, None))
    return logits(circuit), losses(trainer), [calls.count(i) for i in range(len(blocks))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("family", BLOCKS)
def test_checkpointing_by_training_arguments(family, optimizer, use_reentrant, folder):
    """``TrainingArguments(gradient_checkpointing=True)``: every block runs twice, with dropout off."""
    got, got_losses, calls = checkpointed(family, optimizer, folder, use_reentrant)
    want, want_losses, calls_without = checkpointed(family, optimizer, folder)
    assert (calls_without, calls) == ([4, 4], [8, 8])
    assert_close(got, want, bound=1e-4)
    assert got_losses == pytest.approx(want_losses, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["AdamW", "MaskAdamW"])
def test_a_compiled_trainer_trains_as_an_eager_one(optimizer, tmp_path):
    """``TrainingArguments(torch_compile=True)``, with ``TemperatureCallback``."""
    torch.compiler.reset()
    runs = []
    for compiled in (True, False):
        circuit = build("vit")
        args = arguments(
            tmp_path, 4, num_train_epochs=2, torch_compile=compiled,
            torch_compile_backend="aot_eager" if compiled else None,
        )  # fmt: skip
        made = OPTIMIZERS[optimizer](circuit.mask_parameters(), lr=0.05, eps=1e-4)
        trainer = train(circuit, args, "vit", optimizers=(made, None))
        runs.append((logits(circuit), losses(trainer)))
    (got, got_losses), (want, want_losses) = runs
    assert_close(got, want, bound=1e-4)
    assert got_losses == pytest.approx(want_losses, rel=1e-5)
