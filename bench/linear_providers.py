"""Every way to train masked linear layers that ``run`` compares, each as a user would have it.

``dense`` trains the weight itself. ``eager`` is NeuroSurgeon 0.1.0: its own layer in its own ``CircuitModel``; where it
is not installed, its formula in plain PyTorch under the name ``eager (plain)``. ``compile`` is that formula under
``torch.compile``. ``per_step``, ``per_forward``, ``in_kernel`` and ``auto`` are layers of csmask's ``CircuitModel``.
``per_step`` has csmask's ``MaskAdamW``, all others a fused AdamW; the masked ones add ``L0_LAMBDA * l0`` to the loss,
as the libraries themselves do.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from cases import Shape
from gpu_inputs import random_logits
from providers import Provider, plain_masked_linear
from torch import Tensor, nn

from csmask import CircuitConfig, CircuitModel, MaskAdamW

EXECUTIONS = ("per_step", "per_forward", "in_kernel", "auto")
# Large, so that the check of the gradient sees the l0 term beside the rest; the time does not depend on it.
L0_LAMBDA = 0.1
TEMPERATURE = 1.5


def neurosurgeon() -> Any:
    """NeuroSurgeon's ``Models``, or None where it is not installed or does not work with what is."""
    try:
        return importlib.import_module("NeuroSurgeon.Models")
    except Exception:  # noqa: BLE001, whatever the import of a foreign package raises
        return None


@dataclass
class Output:
    """What libraries look for in a model's output: a loss that they add their l0 term to."""

    out: Tensor
    loss: Tensor


class LinearModel(nn.Module):
    """Linear layers in a row, without biases; its loss is 0, so that with masks it is the l0 term alone."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.linears = nn.ModuleList()
        for weight in weights:
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            self.linears.append(linear)
        self.register_buffer("no_loss", torch.zeros((), device=weights[0].device), persistent=False)

    def forward(self, x: Tensor, return_dict: bool = True) -> Output:  # noqa: ARG002, NeuroSurgeon passes it
        for linear in self.linears:
            x = linear(x)
        return Output(x, self.no_loss)


class Layers:
    """Frozen weights ``(n, k)``, as many as there are layers, and start values of their logits.

    Args:
        shape: of one layer; several need ``n == k``.
        device: that they live on.
        count: how many layers follow each other.
        quick: compile for nobody's speed, but at once.
    """

    def __init__(self, shape: Shape, device: torch.device, count: int = 1, quick: bool = False) -> None:
        if count > 1 and shape.n != shape.k:
            raise ValueError(f"layers in a row must have n == k, got {shape.name}")
        self.shape, self.device = shape, device
        size = (shape.n, shape.k)
        self.weights = [(torch.randn(size, device=device) / shape.k**0.5).to(shape.torch_dtype) for _ in range(count)]
        self.logits = [random_logits(*size, device=device) for _ in range(count)]
        self.temperature = torch.tensor(TEMPERATURE, device=device)
        # Compiled for each token count: with a symbol for their number it would be a slower baseline.
        backend = "aot_eager" if quick else "inductor"
        self._compiled = torch.compile(plain_masked_linear, backend=backend, dynamic=False)

    def providers(self) -> dict[str, Callable[[], Provider]]:
        """By name, what builds each of them; every one that is built has logits of its own."""
        models = neurosurgeon()
        return {
            "dense": self._dense,
            "eager" if models else "eager (plain)": (
                (lambda: self._neurosurgeon(models)) if models else (lambda: self._plain(plain_masked_linear))
            ),
            "compile": lambda: self._plain(self._compiled),
            **{name: (lambda name=name: self._csmask(name)) for name in EXECUTIONS},
        }

    def lean_providers(self) -> dict[str, Callable[[], Provider]]:
        """``MaskAdamW``'s lean mode, which takes one micro-batch per step and leaves no gradients to look at."""
        found: dict[str, dict[str, Any]] = {"lean": {}}
        if "state_bits" in inspect.signature(MaskAdamW).parameters:
            found["lean, 8-bit states"] = {"state_bits": 8}
        return {
            name: (lambda settings=settings: self._csmask("per_step", lean=True, **settings))
            for name, settings in found.items()
        }

    def _dense(self) -> Provider:
        weights = [nn.Parameter(weight.clone()) for weight in self.weights]

        def forward(x: Tensor) -> tuple[Tensor, None]:
            for weight in weights:
                x = F.linear(x, weight)
            return x, None

        return Provider(weights, forward)

    def _plain(self, function: Callable[..., tuple[Tensor, Tensor]]) -> Provider:
        all_logits = [nn.Parameter(logits.clone()) for logits in self.logits]

        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            total = None
            for weight, logits in zip(self.weights, all_logits, strict=True):
                x, l0 = function(x, weight, logits, self.temperature)
                total = l0 if total is None else total + l0
            return x, L0_LAMBDA * total

        return Provider(all_logits, forward, dl0=1.0)

    def _neurosurgeon(self, models: Any) -> Provider:
        hparams = {"ablation": "none", "mask_unit": "weight", "mask_bias": False, "mask_init_value": 0.0}
        config = models.CircuitConfig(
            mask_method="continuous_sparsification", mask_hparams=hparams, l0_lambda=L0_LAMBDA,
            target_layers=[f"linears.{i}" for i in range(len(self.weights))],
        )  # fmt: skip
        circuit = models.CircuitModel(config, LinearModel(self.weights)).to(self.device)
        circuit.temperature = TEMPERATURE
        all_logits = [layer.weight_mask_params for layer in circuit.wrapped_model.linears]
        # A weight that is not in fp32 fails beside an fp32 mask: its user has autocast on.
        autocast = self.shape.torch_dtype != torch.float32

        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            dtype = self.shape.torch_dtype if autocast else None
            with torch.autocast(self.device.type, dtype) if autocast else contextlib.nullcontext():
                output = circuit(x=x)
            return output.out, output.loss

        note = f"NeuroSurgeon {importlib.metadata.version('NeuroSurgeon')}{', autocast' if autocast else ''}"
        return self._started(Provider(all_logits, forward, dl0=1.0, note=note))

    def _csmask(self, execution: str, **settings: Any) -> Provider:
        per_step = execution == "per_step"
        config = CircuitConfig(target_layers="all", execution=execution, l0_lambda=L0_LAMBDA)
        circuit = CircuitModel(config, LinearModel(self.weights))
        circuit.temperature = TEMPERATURE
        parameters = circuit.mask_parameters()
        optimizer = MaskAdamW(parameters, lr=1e-6, **settings) if per_step else None

        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            output = circuit(x)
            return output.out, output.loss

        def start() -> None:
            # As an optimizer's step does: every step has new logits, also where it is left out of the time. In
            # per_step execution it has made their masked weight, too.
            if not per_step:
                torch.autograd.graph.increment_version(parameters)

        note = f"picks {self.pick()}" if execution == "auto" else ""
        return self._started(Provider(parameters, forward, start, dl0=1.0, note=note, optimizer=optimizer))

    def pick(self) -> str:
        """The execution that ``auto`` takes for this shape, as a layer in training asks for it."""
        circuit = CircuitModel(CircuitConfig(target_layers="all"), LinearModel(self.weights[:1]))
        layer = next(iter(circuit.masked_layers.values()))
        return layer.resolve_execution(
            torch.empty(self.shape.m, self.shape.k, dtype=self.shape.torch_dtype, device="meta")
        )

    def _started(self, provider: Provider) -> Provider:
        with torch.no_grad():
            for parameter, logits in zip(provider.parameters, self.logits, strict=True):
                parameter.copy_(logits)
        return provider
