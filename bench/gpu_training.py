"""Stages of the GPU suite about one linear layer in training: time and memory of every way to mask it, and of none.

Baselines: ``dense`` trains the weight itself, ``eager`` masks in plain PyTorch as NeuroSurgeon 0.1.0 does (mask for
the product, mask again for l0), ``compile`` is that under ``torch.compile``; all with a fused AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_inputs import WEIGHTS, named, random_logits, shapes
from gpu_results import Context
from gpu_timing import Failure, Timing, peak_bytes
from linear_providers import LinearModel
from providers import Provider, oracle, plain_masked_linear, saved_bytes, wrong_results
from torch import Tensor

from csmask import CircuitConfig, CircuitModel, MaskAdamW, functional
from csmask._ops import ops

MICRO_BATCHES = 8
# What is said behind the mode of rows that are not replays of graphs, and of those beside ``max-autotune``.
LAUNCHED, AUTOTUNED = ", launched", ", autotuned"
# Memory is that of steps of two micro-batches, in which kept weights, gradients and new gradients meet.
MEMORY_TOKENS = 128


class KeptForStep:
    """``masked_weight.MaskedWeight`` for graphs: kept from the first micro-batch to the end of the step.

    The layers' own does not keep anything while a graph is captured, since it could not see the logits change.
    """

    def __init__(self) -> None:
        self.value: tuple[Tensor, Tensor] | None = None

    def drop(self) -> None:
        self.value = None

    def get(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        if self.value is None:
            self.value = ops.materialize(*arguments)[:2]
        return self.value[0], self.value[1].clone()

    def note_backward(self) -> None:
        """Part of ``MaskedWeight``'s interface; a step is the same however many times backward comes by."""


class Layer:
    """A frozen weight ``(n, k)`` and its logits, from which each provider is built when it is its turn."""

    def __init__(self, context: Context, n: int, k: int) -> None:
        self.device = context.device
        self.weight = (torch.randn(n, k, device=context.device) / k**0.5).to(context.dtype)
        self.temperature = torch.tensor(1.5, device=context.device)
        # Compiled for each token count: with a symbol for their number it would be a slower baseline.
        backend = "aot_eager" if context.toy else "inductor"
        self._compiled = torch.compile(plain_masked_linear, backend=backend, dynamic=False)
        # The suite captures graphs itself.
        mode = None if context.toy else "max-autotune-no-cudagraphs"
        self._autotuned = torch.compile(plain_masked_linear, backend=backend, dynamic=False, mode=mode)

    def providers(self) -> dict[str, Callable[[], Provider]]:
        """By name, what builds them: "per_step" is a model of one such layer with ``MaskAdamW``; "per_forward" makes
        the masked weight in forward and anew in backward, "kept" once per step; "neuron" has one logit per output.
        """
        return {
            "dense": self._dense,
            "eager": lambda: self._plain(plain_masked_linear),
            "compile": lambda: self._plain(self._compiled),
            "per_step": self._per_step,
            "per_forward": lambda: self._masked("per_forward"),
            "per_forward kept": lambda: self._masked("per_forward", KeptForStep()),
            "in_kernel": lambda: self._masked("in_kernel"),
            "neuron": lambda: self._masked("per_forward", unit="neuron"),
        }

    def autotuned_providers(self) -> dict[str, Callable[[], Provider]]:
        """What ``max-autotune`` makes of the compiled baseline, and beside what."""
        built = self.providers()
        kept = {name: built[name] for name in ("dense", "compile", "per_step")}
        return {**kept, "compile, max-autotune": lambda: self._plain(self._autotuned)}

    def _logits(self, unit: str = "weight") -> torch.nn.Parameter:
        n, k = self.weight.shape
        return torch.nn.Parameter(random_logits(n, 1 if unit == "neuron" else k, device=self.device))

    def _dense(self) -> Provider:
        weight = torch.nn.Parameter(self.weight.clone())
        return Provider(weight, lambda x: (F.linear(x, weight), None))

    def _plain(self, function: Callable[..., tuple[Tensor, Tensor]]) -> Provider:
        logits = self._logits()
        return Provider(logits, lambda x: function(x, self.weight, logits, self.temperature))

    def _masked(self, execution: str, kept: KeptForStep | None = None, unit: str = "weight") -> Provider:
        logits = self._logits(unit)

        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            return functional.masked_linear(
                x, self.weight, logits, self.temperature, execution=execution, kept=kept,  # type: ignore[arg-type]
                accumulate=True, return_l0=True,
            )  # fmt: skip

        # Scaling by neuron rounds what the product has rounded.
        roundings = 2 if unit == "neuron" else 1
        return Provider(logits, forward, kept.drop if kept else lambda: None, roundings=roundings)

    def _per_step(self) -> Provider:
        circuit = CircuitModel(CircuitConfig(target_layers="all", add_l0=False), LinearModel([self.weight]))
        circuit.temperature = float(self.temperature)
        (logits,) = circuit.mask_parameters()
        with torch.no_grad():
            logits.copy_(random_logits(*logits.shape, device=self.device))

        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            return circuit(x).out, circuit.l0()

        return Provider(logits, forward, optimizer=MaskAdamW([logits], lr=1e-6))


# Time


def training(context: Context) -> None:
    """Forward + backward, full steps of 1 and of 8 micro-batches, and evaluation, at every shape.

    Replays of graphs; forward + backward and steps also launched as they come, where the host's time is part of it.
    """
    todo = shapes(context.toy)
    layers: dict[tuple[int, int], Layer] = {}
    for i, (n, k, m) in enumerate(todo):
        x = named(n, k, m)
        if context.is_over(x):
            continue
        if (n, k) not in layers:
            layers.clear()
            torch.compiler.reset()
            layers[n, k] = Layer(context, n, k)
        _train_shape(context, layers[n, k], m, x, context.left() / (len(todo) - i))
        if context.device.type == "cuda":
            torch.cuda.empty_cache()


def _train_shape(context: Context, layer: Layer, m: int, x: str, seconds: float) -> None:
    n, k = layer.weight.shape
    inputs = torch.randn(m, k, device=context.device).to(context.dtype)
    dout = torch.randn(m, n, device=context.device).to(context.dtype)
    built = _checked(context, layer, layer.providers(), inputs, dout)
    modes: dict[str, dict[str, Any]] = {"forward+backward": {"micro_batches": 1, "optimizer": False}}
    modes["step"] = {"micro_batches": 1}
    several = 2 if context.toy else MICRO_BATCHES
    modes[f"step of {several}"] = {"micro_batches": several}
    for mode, arguments in modes.items():
        if context.is_over(f"{mode} {x}"):
            continue
        calls = {name: (lambda p=p, a=arguments: p.step(inputs, dout, **a)) for name, p in built.items()}
        _add_ratios(context, mode, x, context.measure("masked_linear", mode, x, calls, seconds / 7))
        if arguments["micro_batches"] == 1 and not context.is_over(f"{mode}{LAUNCHED} {x}"):
            times = context.measure("masked_linear", mode + LAUNCHED, x, calls, seconds / 14, graph=False)
            _add_ratios(context, mode + LAUNCHED, x, times)
    if not context.is_over(f"evaluation {x}"):
        times = context.measure("masked_linear", "evaluation", x, _evaluation(context, layer, inputs, x), seconds / 8)
        _add_ratios(context, "evaluation", x, times)


def autotuned(context: Context) -> None:
    """Forward + backward and full steps of the compiled baseline under ``max-autotune``, which compiles for minutes."""
    for n, k, m in shapes(context.toy)[:3]:
        x = named(n, k, m)
        if context.is_over(x):
            continue
        torch.compiler.reset()
        layer = Layer(context, n, k)
        inputs = torch.randn(m, k, device=context.device).to(context.dtype)
        dout = torch.randn(m, n, device=context.device).to(context.dtype)
        built = _checked(context, layer, layer.autotuned_providers(), inputs, dout)
        for mode, optimizer in (("forward+backward", False), ("step", True)):
            if context.is_over(f"{mode}{AUTOTUNED} {x}"):
                continue
            arguments = (inputs, dout, 1, optimizer)
            calls = {name: (lambda p=p, a=arguments: p.step(*a)) for name, p in built.items()}
            times = context.measure("masked_linear", mode + AUTOTUNED, x, calls, 3.0)
            _add_ratios(context, mode + AUTOTUNED, x, times)


def _checked(
    context: Context, layer: Layer, makers: dict[str, Callable[[], Provider]], inputs: Tensor, dout: Tensor
) -> dict[str, Provider]:
    """The providers that can be built and whose numbers are right."""
    built = {}
    for name, make in makers.items():
        try:
            provider = make()
        except Exception as error:  # noqa: BLE001, recorded
            context.fail(f"{name} {named(*layer.weight.shape, len(inputs))}", Failure.of(error))
            continue
        if _is_right(context, layer, name, provider, inputs, dout):
            built[name] = provider
    return built


def _is_right(context: Context, layer: Layer, name: str, provider: Provider, inputs: Tensor, dout: Tensor) -> bool:
    """Whether the provider computes what it is timed for; if not, a failure is recorded.

    Two micro-batches, in which gradients are written and added to, are compared with plain torch in fp32.
    """
    x, weight = named(*layer.weight.shape, len(inputs)), None if name == "dense" else layer.weight
    try:
        expected = oracle(provider.parameter, weight, layer.temperature, inputs, dout, float(provider.dl0))
        wrong = wrong_results(provider, expected, inputs, dout, context.dtype)
        if wrong:
            raise AssertionError(f"wrong numbers: {', '.join(wrong)}")
    except Exception as error:  # noqa: BLE001, recorded
        context.fail(f"{name} {x}", Failure.of(error))
        return False
    return True


def _add_ratios(context: Context, mode: str, x: str, times: dict[str, Timing]) -> None:
    """Beside each time, its ratio to dense in this very measurement, if both were timed by the same method: without a
    graph a time has launch gaps.
    """
    dense = times.get("dense")
    for name, timing in times.items():
        if dense is not None and timing.method == dense.method:
            context.results.add("masked_linear", name, mode, "over dense", "x", x, timing.p50 / dense.p50)


def _evaluation(context: Context, layer: Layer, inputs: Tensor, x: str) -> dict[str, Callable[[], Any]]:
    """Forwards under a hard mask: dense, by a masked weight made each time, in the kernel, and from packed bits."""
    logits, weight, t = layer._logits().detach(), layer.weight, layer.temperature
    calls: dict[str, Callable[[], Any]] = {"dense": lambda: F.linear(inputs, weight)}
    for execution in ("per_forward", "in_kernel"):
        calls[execution] = lambda e=execution: functional.masked_linear(
            inputs, weight, logits, t, hard=True, execution=e
        )
    try:
        bits = functional.pack_mask(logits)
        calls["bits"] = lambda: functional.bitmask_linear(inputs, weight, bits)
    except Exception as error:  # noqa: BLE001, recorded
        context.fail(f"bits {x}", Failure.of(error))
    return {name: torch.no_grad()(call) for name, call in calls.items()}


# Memory


def memory(context: Context) -> None:
    """Bytes per weight of each provider: resident after a step, at the peak, and saved for backward."""
    for n, k in [(32, 48)] if context.toy else WEIGHTS:
        layer = Layer(context, n, k)
        m = 16 if context.toy else MEMORY_TOKENS
        inputs = torch.randn(m, k, device=context.device).to(context.dtype)
        dout = torch.randn(m, n, device=context.device).to(context.dtype)
        for name, make in layer.providers().items():
            x = named(n, k, m)
            if context.is_over(f"{name} {x}"):
                continue
            try:
                _measure_memory(context, name, x, make, inputs, dout, layer.weight)
            except Exception as error:  # noqa: BLE001, recorded
                context.fail(f"{name} {x}", Failure.of(error))
        torch.compiler.reset()


def _measure_memory(
    context: Context, name: str, x: str, make: Callable[[], Provider], inputs: Tensor, dout: Tensor, weight: Tensor
) -> None:
    device, held = context.device, []

    def grow() -> None:
        provider = make()
        for _ in range(2):
            provider.step(inputs, dout, 2)
        held.append(provider)

    grow()  # libraries' workspaces and compiled code are made, and do not count
    held.clear()
    before = _allocated(device)
    peak = peak_bytes(device, grow)
    # dense trains a copy of its own and needs no other; the others share the frozen weight, which is theirs too.
    frozen = 0 if name == "dense" else weight.nbytes
    resident = _allocated(device) - before + frozen
    saved = saved_bytes(held[0], inputs, [weight])
    if device.type == "cuda":
        context.results.add("masked_linear", name, "memory", "resident", "bytes/weight", x, resident / weight.numel())
        context.results.add(
            "masked_linear", name, "memory", "peak", "bytes/weight", x, (peak + frozen) / weight.numel()
        )
    context.results.add(
        "masked_linear", name, "memory", "saved for backward", "bytes/weight", x, saved / weight.numel()
    )


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0
