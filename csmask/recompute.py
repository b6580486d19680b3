"""Gradient checkpointing under a frozen base.

A frozen base stays in eval mode, so that dropout is off and norm statistics are fixed; transformers' layers, however,
checkpoint only while ``self.training`` is set. For the time of a training forward, each layer that has checkpointing
switched on is therefore set to ``training``, and what it checkpoints runs with it unset: the layer recomputes, and no
dropout, not even a functional one in the layer's own forward, sees the flag.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def checkpointable_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that transformers can checkpoint, whether or not it is switched on."""
    return [
        module
        for module in model.modules()
        if any(base.__name__ == "GradientCheckpointingLayer" for base in type(module).__mro__)
    ]


@contextlib.contextmanager
def checkpoint_frozen_layers(layers: list[Any]) -> Iterator[None]:
    """Let frozen ``layers`` checkpoint during the ``with`` block; afterwards they are as they were."""
    originals: list[Any] = [layer._gradient_checkpointing_func for layer in layers]
    try:
        for layer, original in zip(layers, originals, strict=True):
            layer._gradient_checkpointing_func = _in_eval(layer, original)
            layer.training = True
        yield
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer._gradient_checkpointing_func = original
            layer.training = False


def _in_eval(layer: nn.Module, checkpoint: Callable) -> Callable:
    def checkpoint_in_eval(function: Callable, *args: Any, **kwargs: Any) -> Any:
        def run(*run_args: Any, **run_kwargs: Any) -> Any:
            # Also the recomputation in backward, when the flag may be unset already: restore what was there.
            training, layer.training = layer.training, False
            try:
                return function(*run_args, **run_kwargs)
            finally:
                layer.training = training

        if getattr(checkpoint, "keywords", {}).get("use_reentrant"):
            args = tuple(_requiring_grad(arg) for arg in args)
        return checkpoint(run, *args, **kwargs)

    return checkpoint_in_eval


def _requiring_grad(value: Any) -> Any:
    """A tensor that carries gradients: reentrant checkpointing gives none to the masks of a layer without such input.

    Transformers sees to that for token embeddings only, not for pixels or embeddings that the caller passes.
    """
    if torch.is_grad_enabled() and isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad:
        return value.detach().requires_grad_()
    return value
