"""Launches of every kernel at shapes that stand for its use, planned on the meta device: what is compiled offline."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from csmask_kernels import logits_grad, materialize
from csmask_kernels.launch import Launch, Target

Case = tuple[str, Launch]


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor of the meta device."""
    return torch.empty(shape, dtype=dtype, device="meta")


TEMPERATURE = empty(dtype=torch.float32)


def materialize_cases(target: Target) -> Iterator[Case]:
    """Flat and strided; soft, hard and scaled; with and without counts; the sums alone."""
    logits = empty(4096, 4096, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        weight = empty(4096, 4096, dtype=dtype)
        for hard in (False, True):
            name = f"materialize {'hard' if hard else 'soft'} {dtype}"
            yield name, materialize.plan(weight, logits, TEMPERATURE, hard, 1.0, weight, hard, target)[0]
    weight = empty(4096, 4096)
    yield "materialize transposed", materialize.plan(weight.t(), logits, TEMPERATURE, False, 1.5, weight.t(), True, target)[0]
    neuron = empty(4096, 1, dtype=torch.float32).expand(4096, 4096)
    yield "materialize neuron", materialize.plan(weight, neuron, TEMPERATURE, False, 1.0, weight, False, target)[0]
    yield "mask_sums", materialize.plan(None, logits, TEMPERATURE, False, 1.0, None, True, target)[0]


def logits_grad_cases(target: Target) -> Iterator[Case]:
    """Written and added; flat, strided, per unit in both orientations."""
    logits, dl0 = empty(4096, 4096, dtype=torch.float32), empty(dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        w = empty(4096, 4096, dtype=dtype)
        for add in (False, True):
            name = f"logits_grad {'add' if add else 'write'} {dtype}"
            yield name, logits_grad.plan(w, w, logits, TEMPERATURE, dl0, 1.0, logits, add, target)
    w = empty(4096, 4096)
    yield "logits_grad transposed", logits_grad.plan(w.t(), w.t(), logits, TEMPERATURE, None, 1.5, logits, False, target)
    for shape in ((4096, 1), (1, 4096)):
        unit = empty(*shape, dtype=torch.float32)
        yield f"logits_grad unit {shape}", logits_grad.plan(w, w, unit, TEMPERATURE, dl0, 1.0, unit, False, target)


FAMILIES = (materialize_cases, logits_grad_cases)


def cases(target: Target) -> Iterator[Case]:
    """Every case of every family for one target."""
    for family in FAMILIES:
        yield from family(target)
