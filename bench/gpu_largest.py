"""The GPU suite's stage of size: the most masked weights that train on this GPU, by way to train them.

Layers of Llama-3-8B's width are added until a step of one sequence of 2048 tokens, with gradient checkpointing, does
not fit any more. Runs only if it is asked for: ``--stages largest``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_llama import KERNEL as SHAPE
from gpu_llama import OPTIMIZERS, TOKENS, forget, shape_of
from gpu_llama import build as build_llama
from gpu_results import Context
from gpu_timing import Failure
from gpu_transformers import training_step

from csmask import plan

KERNEL = f"{SHAPE}'s width"
# What ``csmask plan`` calls the ways.
WAYS = {
    "eager": "eager PyTorch (NeuroSurgeon)",
    "compile": "torch.compile",
    "per_forward": "per_forward",
    "per_step": "per_step (MaskAdamW)",
    "lean": "lean (MaskAdamW, lean=True)",
    "per_step, 8 bits": "states in 8 bits (per_step)",
    "lean, 8 bits": "states in 8 bits (lean)",
}
ACTIVATIONS = 4.0  # GiB, where the search begins: logits of 2048 tokens over Llama's vocabulary, and their gradients
TOY_DEPTH = 2
# What libraries say where memory is used up beside PyTorch's allocator.
FULL = ("out of memory", "ALLOC_FAILED", "NOT_INITIALIZED")


def largest(context: Context) -> None:
    """For each way the deepest model that trained, its masked weights and its peak memory."""
    try:
        first, second = (_sizes(context, depth) for depth in (1, 2))
    except ImportError as error:
        context.record["reason"] = f"transformers is not there: {error}"
        return
    per_layer = second.masked - first.masked
    context.clock.free()
    for way, planned in WAYS.items():
        if context.is_over(way):
            continue
        peaks: dict[int, int] = {}
        try:
            guess = _guess(context, planned, first, second)
            # First of all while there is memory: libraries and compiled code are loaded at their first use.
            if not _fits(context, way, 1, peaks):
                raise RuntimeError("a model of one layer does not fit")
            depth, above = deepest(lambda n, w=way, p=peaks: _fits(context, w, n, p), guess, lambda: context.left() < 0)
        except Exception as error:  # noqa: BLE001, recorded
            context.fail(f"{KERNEL} {way}", Failure.of(error))
            continue
        if depth == 0:
            context.record["not_run"].append(f"{way}: none of those that were tried fits, the smallest has {above}")
            continue
        tried = f"{above} layers do not fit" if above else "no more were tried"
        x = f"1 x {8 if context.toy else TOKENS} tokens"
        weights = (first.masked + (depth - 1) * per_layer) / 1e9
        row = (KERNEL, way, "largest")
        context.results.add(*row, "layers", "1", x, depth, config=tried)
        context.results.add(*row, "masked weights", "1e9", x, weights, config=tried)
        if context.device.type == "cuda":
            context.results.add(*row, "peak memory", "GiB", x, peaks[depth] / 2**30, config=tried)


def deepest(fits: Callable[[int], bool], guess: int, is_over: Callable[[], bool]) -> tuple[int, int | None]:
    """The largest count that was found to fit, and the smallest that was found not to; 0 and None where none was.

    Counts are tried from ``guess`` on in growing strides, then by halves, until the two are neighbours or it is over.
    One that fails otherwise ends the search, if there is one that fits; if not, its exception is raised.
    """
    low, high, count, stride = 0, None, max(guess, 1), 1
    while not is_over():
        try:
            does = fits(count)
        except Exception:
            if low == 0:
                raise
            break
        if does:
            low = count
        else:
            high = count
        if high is not None and high - low == 1:
            break
        if high is None:
            count = low + stride
        elif low == 0:
            count = max(high - stride, 1)
        else:
            count = (low + high) // 2
        stride *= 2
    return low, high


def _sizes(context: Context, depth: int) -> plan.Sizes:
    from transformers import LlamaConfig

    config = LlamaConfig(**{**shape_of(context), "num_hidden_layers": depth}, architectures=["LlamaForCausalLM"])
    return plan.sizes_of(plan.build(config, context.dtype), "all-linear")


def _guess(context: Context, planned: str, first: plan.Sizes, second: plan.Sizes) -> int:
    """How many layers fit by ``csmask plan``."""
    if context.device.type != "cuda":
        return 1
    needed = plan.WAYS[planned](first.itemsize, False)
    assert needed is not None
    one, two = (sizes.total(needed, ACTIVATIONS * 2**30) for sizes in (first, second))
    memory = torch.cuda.get_device_properties(context.device).total_memory
    return int((memory - one) / (two - one)) + 1


def _fits(context: Context, way: str, depth: int, peaks: dict[int, int]) -> bool:
    """Whether two steps of a model of that depth run: the second has the optimizer's states from the beginning."""
    on_gpu = context.device.type == "cuda"
    try:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        elif depth > TOY_DEPTH:  # a rehearsal has no limit of its own
            raise torch.OutOfMemoryError
        step = _step(context, way, depth)
        for _ in range(2):
            step()
        if on_gpu:
            torch.cuda.synchronize()
            peaks[depth] = torch.cuda.max_memory_allocated()
        return True
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in FULL):
            return False
        raise
    finally:
        step = None
        forget(context)


def _step(context: Context, way: str, depth: int) -> Callable[[], Any]:
    model = build_llama(context, num_hidden_layers=depth).train()
    ids = torch.randint(0, model.config.vocab_size, (1, 8 if context.toy else TOKENS), device=context.device)
    provider = "per_step" if way in OPTIMIZERS else way
    return training_step(provider, model, {"input_ids": ids, "labels": ids}, **OPTIMIZERS.get(way, {}))
