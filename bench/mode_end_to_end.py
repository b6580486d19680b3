"""Mode ``end_to_end`` of ``run``: a training step (forward, backward, AdamW) of whole models with random weights.

BERT-base, GPT-2 small, ViT-base and ResNet-50 from their configs, batches of 8, in eval mode (no dropout, for nobody).
``dense`` trains everything; the others train masks over every linear layer (of ResNet: everything) but the output head.
``eager`` is NeuroSurgeon's own ``CircuitModel``; where it cannot mask a model, ``eager (plain)`` is its formula on the
model's own forward, and ``config`` says why. All masked ones start from the same logits and must have the loss of plain
torch and its gradient of every layer's logits.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from gpu_inputs import random_logits
from gpu_results import Context
from gpu_timing import Clock, Failure
from linear_providers import neurosurgeon
from torch import Tensor, nn

from csmask import CircuitConfig, CircuitModel, MaskAdamW

EXECUTIONS = ("per_step", "per_forward", "auto")
BATCH, TOKENS = 8, 128
ROUNDS = 3
# So large that losses and gradients would show a lost l0 term; the time does not depend on it.
L0_LAMBDA = 1e-7
# Relative. Between orders of summation in fp32 the losses of these models differ by some 1e-6, and the gradients of
# ResNet-50, with its ReLUs, by up to 7e-3: so far are plain torch's own from those in fp64. What 1e-3
# forbids is one lost output unit of a layer: 1 / sqrt(3072) and more.
LARGEST_LOSS_ERROR = 1e-4
LARGEST_GRADIENT_ERROR, LARGEST_GRADIENT_ERROR_RESNET = 1e-3, 2e-2
Step = Callable[[], Tensor]


@dataclasses.dataclass
class Training:
    """What is timed, the parameters that it changes, and the loss that it takes down."""

    step: Step
    parameters: list[nn.Parameter]
    loss: Step


@dataclasses.dataclass
class Case:
    """A model to build, a batch for it, what of it is masked, and what rows call the batch."""

    make: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    targets: str
    x: str
    gradient_error: float = LARGEST_GRADIENT_ERROR


def tasks(context: Context, options: argparse.Namespace) -> list[tuple[str, Callable[[], None]]]:
    rounds = 1 if options.quick else min(options.rounds, ROUNDS)
    context = dataclasses.replace(context, clock=Clock(context.device, rounds, rounds))
    names = ("bert-base", "gpt2-small", "vit-base", "resnet-50")
    return [(f"end to end {name}", lambda n=name: end_to_end(context, n)) for name in names]


def end_to_end(context: Context, name: str) -> None:
    """Time the steps of one model in turns; a provider with another loss or gradient is recorded and not timed."""
    torch.manual_seed(0)
    case = cases(context.device, context.toy)[name]
    base = case.make().to(context.device).eval()
    logits = _logits(base, case.targets)
    expected = _plain_results(base, logits, case.inputs)
    calls: dict[str, Step] = {}
    notes: dict[str, str] = {}
    for provider, make in _providers(base, logits, case, notes).items():
        try:
            training = make()
            if provider != "dense":
                check(training, *expected, case.gradient_error)
            calls[provider] = training.step
        except Exception as error:  # noqa: BLE001, PERF203, recorded
            context.fail(f"{name} {provider}", Failure.of(error))
    del expected
    times = context.measure(name, "end_to_end", case.x, calls, float("inf"), graph=False, config=notes)
    for provider, timing in times.items():
        if "dense" in times:
            ratio = timing.p50 / times["dense"].p50
            context.results.add(
                name, provider, "end_to_end", "over dense", "x", case.x, ratio, None, notes.get(provider, "")
            )


def check(
    training: Training,
    expected_loss: float,
    expected_gradients: dict[str, Tensor],
    largest_error: float = LARGEST_GRADIENT_ERROR,
) -> None:
    """Raise unless the loss and every gradient are near what is expected; the parameters have none afterwards."""
    loss = training.loss()
    loss.backward()
    gradients = [parameter.grad for parameter in training.parameters]
    for parameter in training.parameters:
        parameter.grad = None
    found = float(loss.detach())
    if not abs(found - expected_loss) <= LARGEST_LOSS_ERROR * abs(expected_loss):
        raise AssertionError(f"wrong numbers, not timed: the loss is {found:.7g}, plain torch's {expected_loss:.7g}")
    for got, (name, right) in zip(gradients, expected_gradients.items(), strict=True):
        error = None if got is None else (got - right).norm()
        if error is None or not error <= largest_error * right.norm():  # NaN neither
            found = "is not there" if error is None else f"{float(error / right.norm()):.2g} > {largest_error}"
            raise AssertionError(f"wrong numbers, not timed: the gradient of {name} {found}")


def cases(device: torch.device, quick: bool) -> dict[str, Case]:
    """The models by name; tiny ones of the same kinds where it is to be quick."""
    import transformers as hf

    hf.logging.set_verbosity_error()
    batch, tokens = (2, 8) if quick else (BATCH, TOKENS)
    image = 32 if quick else 224

    def config(kind: Any, **tiny: Any) -> Any:
        return kind(**tiny) if quick else kind()

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = config(hf.BertConfig, **small, vocab_size=64)
    gpt2 = config(hf.GPT2Config, n_embd=32, n_layer=1, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0)
    vit = config(hf.ViTConfig, **small, image_size=image)
    resnet = config(hf.ResNetConfig, embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1])  # default: ResNet-50
    ids = torch.randint(0, bert.vocab_size, (batch, tokens), device=device)  # GPT-2 knows more of them
    pixels = torch.randn(batch, 3, image, image, device=device)
    labels = torch.arange(batch, device=device) % 2
    text, pictures = f"{batch} x {tokens} tokens", f"{batch} x {image} x {image} pixels"
    return {
        "bert-base": Case(
            lambda: hf.BertForSequenceClassification(bert), {"input_ids": ids, "labels": labels}, "all-linear", text
        ),
        "gpt2-small": Case(lambda: hf.GPT2LMHeadModel(gpt2), {"input_ids": ids, "labels": ids}, "all-linear", text),
        "vit-base": Case(
            lambda: hf.ViTForImageClassification(vit),
            {"pixel_values": pixels, "labels": labels}, "all-linear", pictures,
        ),
        "resnet-50": Case(
            lambda: hf.ResNetForImageClassification(resnet),
            {"pixel_values": pixels, "labels": labels}, "all", pictures, LARGEST_GRADIENT_ERROR_RESNET,
        ),
    }  # fmt: skip


def _logits(base: nn.Module, targets: str) -> dict[str, Tensor]:
    """Start values by the name of each layer that csmask masks."""
    circuit = CircuitModel(CircuitConfig(target_layers=targets), base)
    shapes = {name: layer.weight.shape for name, layer in circuit.masked_layers.items()}
    device = next(base.parameters()).device
    circuit.unload()
    return {name: random_logits(*shape, device=device) for name, shape in shapes.items()}


def plain_loss(model: nn.Module, logits: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """The loss with its l0 term, in plain torch, whatever the kinds of layers; ``T = 1``."""
    masks = {name: torch.sigmoid(values) for name, values in logits.items()}
    weights = {f"{name}.weight": model.get_submodule(name).weight * mask for name, mask in masks.items()}
    output = torch.func.functional_call(model, weights, (), inputs)
    return output.loss + L0_LAMBDA * sum(torch.sigmoid(values).sum() for values in logits.values())


def _plain_results(
    model: nn.Module, logits: dict[str, Tensor], inputs: dict[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradient of every layer's logits."""
    leaves = {name: values.clone().requires_grad_() for name, values in logits.items()}
    loss = plain_loss(model, leaves, inputs)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return float(loss.detach()), dict(zip(leaves, gradients, strict=True))


# Providers


def _providers(
    base: nn.Module, logits: dict[str, Tensor], case: Case, notes: dict[str, str]
) -> dict[str, Callable[[], Training]]:
    def copied() -> nn.Module:
        return copy.deepcopy(base)

    found: dict[str, Callable[[], Training]] = {"dense": lambda: _dense(copied(), case.inputs)}
    models = neurosurgeon()
    reason = "NeuroSurgeon is not there"
    if models:
        try:  # built here already: its name in the table depends on whether it can be
            circuit = _neurosurgeon(models, copied(), logits, case.inputs)
            found["eager"] = lambda: circuit
            notes["eager"] = "NeuroSurgeon"
        except Exception as error:  # noqa: BLE001, recorded beside the figures
            reason = f"NeuroSurgeon: {Failure.of(error).message}"
    if "eager" not in found:
        found["eager (plain)"] = lambda: _plain(copied().requires_grad_(False), logits, case.inputs)
        notes["eager (plain)"] = reason
    for execution in EXECUTIONS:
        found[execution] = lambda e=execution: _csmask(e, copied(), logits, case)
    return found


def _training(
    parameters: list[nn.Parameter], loss_of: Step, optimizer: torch.optim.Optimizer | None = None
) -> Training:
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=1e-6, fused=True)

    def step() -> Tensor:
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # others take their turns now, and all their models are in memory
        return loss.detach()

    return Training(step, parameters, loss_of)


def _dense(model: nn.Module, inputs: dict[str, Tensor]) -> Training:
    return _training(list(model.requires_grad_().parameters()), lambda: model(**inputs).loss)


def _plain(model: nn.Module, logits: dict[str, Tensor], inputs: dict[str, Tensor]) -> Training:
    parameters = {name: nn.Parameter(values.clone()) for name, values in logits.items()}
    return _training(list(parameters.values()), lambda: plain_loss(model, parameters, inputs))


def _neurosurgeon(models: Any, model: nn.Module, logits: dict[str, Tensor], inputs: dict[str, Tensor]) -> Training:
    hparams = {"ablation": "none", "mask_unit": "weight", "mask_bias": False, "mask_init_value": 0.0}
    config = models.CircuitConfig(mask_hparams=hparams, target_layers=list(logits), l0_lambda=L0_LAMBDA)
    circuit = models.CircuitModel(config, model).to(next(model.parameters()).device)
    parameters = [circuit.wrapped_model.get_submodule(name).weight_mask_params for name in logits]
    _start(parameters, logits)
    return _training(parameters, lambda: circuit(**inputs).loss)


def _csmask(execution: str, model: nn.Module, logits: dict[str, Tensor], case: Case) -> Training:
    config = CircuitConfig(target_layers=case.targets, execution=execution, l0_lambda=L0_LAMBDA)
    circuit = CircuitModel(config, model)
    parameters = circuit.mask_parameters()
    _start(parameters, logits)
    optimizer = MaskAdamW(parameters, lr=1e-6) if execution == "per_step" else None
    return _training(parameters, lambda: circuit(**case.inputs).loss, optimizer)


@torch.no_grad()
def _start(parameters: list[nn.Parameter], logits: dict[str, Tensor]) -> None:
    for parameter, values in zip(parameters, logits.values(), strict=True):
        parameter.copy_(values)
