"""The GPU suite's stage of the size that users have: masks on every linear layer of Llama-3-8B's shape, random weights.

Steps of one sequence of 2048 tokens with gradient checkpointing, in every way to train the masks, from the smallest in
memory on: time, tokens per second, and peak memory, or that it does not fit.
"""

from __future__ import annotations

import gc
import inspect
import statistics
import time
from typing import Any

import torch
from gpu_results import Context
from gpu_timing import Failure, Timing
from gpu_transformers import TOY, training_step
from torch import nn

from csmask import MaskAdamW
from csmask.plan import BUILT_IN

KERNEL, TOKENS, STEPS, WARM_UP = "llama-3-8b", 2048, 20, 2
# MaskAdamW's settings, by the name of the way.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "lean, 8 bits": {"lean": True, "state_bits": 8},
    "lean": {"lean": True},
    "per_step, 8 bits": {"state_bits": 8},
    "per_step": {},
}
WAYS = (*OPTIMIZERS, "per_forward", "eager")


def llama(context: Context) -> None:
    """A row for each way and figure; skipped where transformers is not."""
    try:
        import transformers  # noqa: F401, whether it is there
    except ImportError as error:
        context.record["reason"] = f"transformers is not there: {error}"
        return
    settings = inspect.signature(MaskAdamW).parameters
    for way in WAYS:
        if context.is_over(way):
            continue
        if all(name in settings for name in OPTIMIZERS.get(way, {})):
            _run(context, way)
        forget(context)


def shape_of(context: Context) -> dict[str, Any]:
    """What fixes the model's shape: toy sizes in a rehearsal."""
    return TOY if context.toy else {k: v for k, v in BUILT_IN[KERNEL].items() if not k.startswith(("model", "arch"))}


def build(context: Context, **changes: Any) -> nn.Module:
    """The model on the device, with random weights and gradient checkpointing; ``changes`` are to its shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**shape_of(context), **changes}, use_cache=False, dtype=context.dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(context.dtype)
    try:
        with torch.device(context.device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _run(context: Context, way: str) -> None:
    tokens = 8 if context.toy else TOKENS
    x = f"1 x {tokens} tokens"
    try:
        times, peak = _train(context, way, build(context), tokens)
    except torch.OutOfMemoryError:
        context.results.add(KERNEL, way, "training", "fits", "1", x, 0.0)
        return
    except Exception as error:  # noqa: BLE001, recorded
        context.fail(f"{KERNEL} {way}", Failure.of(error))
        return
    timing = Timing.of(times, "host clock around synchronised steps")
    add = context.results.add
    add(KERNEL, way, "training", "fits", "1", x, 1.0)
    add(KERNEL, way, "training", "time", "ms", x, timing.p50, timing, timing.method)
    add(KERNEL, way, "training", "throughput", "tokens/s", x, 1e3 * tokens / timing.p50, timing)
    if context.device.type == "cuda":
        add(KERNEL, way, "training", "peak memory", "GiB", x, peak / 2**30)


def _train(context: Context, way: str, model: nn.Module, tokens: int) -> tuple[list[float], int]:
    """Milliseconds of each step, and the most bytes that were allocated."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=context.device)
    provider = "per_step" if way in OPTIMIZERS else way
    step = training_step(provider, model.train(), {"input_ids": ids, "labels": ids}, **OPTIMIZERS.get(way, {}))
    on_gpu = context.device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(2 if context.toy else STEPS + WARM_UP):
        wait()
        start = time.perf_counter()
        step()
        wait()
        times.append((time.perf_counter() - start) * 1e3)
        if context.left() < -statistics.mean(times) / 1e3:  # what has begun is worth a few figures
            break
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    return times[WARM_UP:] or times, peak


def forget(context: Context) -> None:
    """Free what nobody holds, for the next model."""
    gc.collect()
    if context.device.type == "cuda":
        torch.cuda.empty_cache()
