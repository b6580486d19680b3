"""The GPU suite's stage of models: a training step of whole transformers, built from configs with random weights."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_inputs import random_logits
from gpu_results import Context
from gpu_timing import Failure, peak_bytes
from torch import Tensor, nn

from csmask import CircuitConfig, CircuitModel, MaskAdamW

EXECUTIONS = ("per_step", "auto", "per_forward", "in_kernel")
TOY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64,
}  # fmt: skip
LLAMA = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "num_attention_heads": 16,
    "vocab_size": 8192,
}  # fmt: skip


def _masked_linear(x: Tensor, weight: Tensor, mask_logits: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight * torch.sigmoid(mask_logits).to(weight.dtype), bias)


def _l0(mask_logits: Tensor) -> Tensor:
    return torch.sigmoid(mask_logits).sum()


class EagerMaskedLinear(nn.Module):
    """A linear layer masked in plain PyTorch, as NeuroSurgeon 0.1.0 does it, or that compiled: the baselines."""

    def __init__(self, linear: nn.Linear, compiled: bool) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.functions = [_compiled(f) if compiled else f for f in (_masked_linear, _l0)]
        self.mask_logits = nn.Parameter(random_logits(*linear.weight.shape, device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.functions[0](x, self.linear.weight, self.mask_logits, self.linear.bias)

    def l0(self) -> Tensor:
        return self.functions[1](self.mask_logits)


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Once for all layers: a graph for each of their shapes."""
    return torch.compile(function, dynamic=False)


def transformers(context: Context) -> None:
    """Full steps (forward, backward, AdamW) dense, eager and in every execution; skipped where transformers is not."""
    try:
        models = _models(context)
    except ImportError as error:
        context.record["reason"] = f"transformers is not there: {error}"
        return
    for name, (make, inputs) in models.items():
        x = f"{tuple(inputs['input_ids'].shape)}"
        if context.is_over(name):
            continue
        calls = {}
        base = make()
        for provider in ("dense", "eager", *EXECUTIONS):
            try:
                calls[provider] = training_step(provider, copy.deepcopy(base).eval(), inputs)  # no dropout, for nobody
            except Exception as error:  # noqa: BLE001, PERF203, recorded
                context.fail(f"{name} {provider}", Failure.of(error))
        # Launched as they are, what the host adds is part of the time; in a graph, it is not.
        for mode, graph in (("step", False), ("step in a graph", True)):
            times = context.measure(name, mode, x, calls, context.left() / 6, graph=graph)
            dense = times.get("dense")
            for provider, timing in times.items():
                if dense is not None and dense.method == timing.method:
                    context.results.add(name, provider, mode, "over dense", "x", x, timing.p50 / dense.p50)
        for provider in calls:
            if context.device.type == "cuda" and provider in times:
                peak = peak_bytes(context.device, calls[provider])
                context.results.add(name, provider, "step", "peak beside what is resident", "MiB", x, peak / 2**20)
        del calls, base


def _models(context: Context) -> dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]]:
    """By name: what builds a model, and a batch for it."""
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    shape = TOY if context.toy else LLAMA
    bert = TOY if context.toy else {"vocab_size": shape["vocab_size"]}  # BERT's defaults are BERT-base
    batches = ((1, 8), (1, 8)) if context.toy else ((2, 1024), (16, 128))

    def build(kind: type[nn.Module], config: Any) -> Callable[[], nn.Module]:
        return lambda: kind(config).to(context.device, context.dtype)

    def batch(shape: tuple[int, int], labels: Callable[[Tensor], Tensor], vocabulary: int) -> dict[str, Tensor]:
        ids = torch.randint(0, vocabulary, shape, device=context.device)
        return {"input_ids": ids, "labels": labels(ids)}  # a mask would be looked at by the host, which no graph allows

    causal = batch(batches[0], lambda ids: ids, shape["vocab_size"])
    classes = batch(batches[1], lambda ids: ids[:, 0] % 2, shape["vocab_size"])
    return {
        "llama": (build(LlamaForCausalLM, LlamaConfig(**shape, use_cache=False)), causal),
        "bert": (build(BertForSequenceClassification, BertConfig(**bert)), classes),
    }


def training_step(provider: str, model: nn.Module, inputs: dict[str, Tensor], **settings: Any) -> Callable[[], None]:
    """A full training step of the model under a provider; the settings are ``MaskAdamW``'s, for "per_step"."""
    if provider == "dense":
        parameters = [p.requires_grad_() for p in model.parameters()]
    elif provider in ("eager", "compile"):
        parameters = _mask_eagerly(model, provider == "compile")
    else:
        config = CircuitConfig(target_layers="all-linear", execution=provider, l0_lambda=1e-8)
        model = CircuitModel(config, model)
        parameters = model.mask_parameters()
        with torch.no_grad():
            for parameter in parameters:
                parameter.copy_(random_logits(*parameter.shape, device=parameter.device))
    if provider == "per_step":
        optimizer: torch.optim.Optimizer = MaskAdamW(parameters, lr=1e-6, **settings)
    else:
        on_gpu = parameters[0].is_cuda
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=on_gpu, capturable=on_gpu)
    masked = [m for m in model.modules() if isinstance(m, EagerMaskedLinear)]

    def step() -> None:
        optimizer.zero_grad()
        loss = model(**inputs).loss
        for layer in masked:
            loss = loss + 1e-8 * layer.l0()
        loss.backward()
        optimizer.step()

    return step


def _mask_eagerly(model: nn.Module, compiled: bool) -> list[nn.Parameter]:
    """Mask every linear layer but the output head, as "all-linear" does."""
    model.requires_grad_(False)
    heads = ("lm_head", "classifier")
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in heads]
    masked = []
    for name, linear in found:
        parent, _, attribute = name.rpartition(".")
        layer = EagerMaskedLinear(linear, compiled)
        setattr(model.get_submodule(parent), attribute, layer)
        masked.append(layer.mask_logits)
    return masked
