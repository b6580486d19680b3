"""``launch_planned``: an op plans its launches once for tensors that are alike, and starts the kernels found then.

To plan a launch and to have Triton look its kernel up takes the host longer than a small kernel runs, and a training of
many small layers is as fast as the host is. What is kept is the compiled kernel and all arguments that are no tensors:
they follow from the tensors' shapes, strides and dtypes, and from the op's options, its config among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .launch import Launch, is_collecting, run

# Batches of any length come by: when so many plans are kept, all are dropped.
LIMIT = 4096
# Triton compiles for pointers that are a multiple of it; those of others are rare and planned in every call.
_ALIGNMENT = 16
# For AMD, Triton compiles other kernels for tensors of up to so many bytes.
_REACH = 2**31 - 1 if torch.version.hip else None

# The launches, and the contiguous tensors that they need besides those which they are planned on.
Plan = Callable[[], tuple[Sequence[Launch], Sequence[Tensor | None]]]


@dataclass(frozen=True)
class _Start:
    """A compiled kernel, its grid, its arguments in order, and at which positions which tensor goes."""

    kernel: Any
    grid: tuple[int, ...]  # of three
    arguments: tuple[Any, ...]
    slots: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Recipe:
    starts: tuple[_Start, ...]
    scratch: tuple[tuple[torch.Size, torch.dtype] | None, ...]


_recipes: dict[Hashable, _Recipe] = {}


def launch_planned(
    op: str, device: torch.device, tensors: Sequence[Tensor | None], options: tuple[Hashable, ...], plan: Plan
) -> Sequence[Any]:
    """Start the launches that ``plan`` gives for these tensors, or gave for tensors of the same layouts.

    Args:
        op: whose plan it is.
        device: the tensors'.
        tensors: what the launches are planned on, None for what an op does without. Their values have no part in it.
        options: all else that the plan depends on but for the table of configs, which stays as it is.
        plan: what makes the launches and their scratch.

    Returns:
        The scratch, new in every call.
    """
    layouts: list[Hashable] = []
    addresses = 0
    for tensor in tensors:  # a loop and no generator: this is the way of every launch
        if tensor is not None:
            layouts.append((tensor.shape, tensor.stride(), tensor.dtype))
            addresses |= tensor.data_ptr()
        else:
            layouts.append(None)
    key = (op, device, options, *layouts, _are_in_reach(tensors))
    is_usual = addresses % _ALIGNMENT == 0 and not is_collecting()
    recipe = _recipes.get(key) if is_usual else None
    if recipe is None:
        launches, scratch = plan()
        recipe = _recipe_of(launches, run(device, *launches), tensors, scratch)
        if is_usual and recipe is not None:
            if len(_recipes) >= LIMIT:
                _recipes.clear()
            _recipes[key] = recipe
        return scratch
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _replay(recipe, device, tensors)
    return _replay(recipe, device, tensors)


def forget() -> None:
    """Plan anew from now on: the table of configs has changed."""
    _recipes.clear()


def _replay(recipe: _Recipe, device: torch.device, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    scratch = [None if s is None else torch.empty(s[0], dtype=s[1], device=device) for s in recipe.scratch]
    found = [*tensors, *scratch]
    for start in recipe.starts:
        arguments = list(start.arguments)
        for position, index in start.slots:
            arguments[position] = found[index]
        start.kernel[start.grid](*arguments)
    return scratch


def _are_in_reach(tensors: Sequence[Tensor | None]) -> tuple[bool, ...]:
    """On AMD, of which tensors 32 bits hold every offset."""
    if _REACH is None:
        return ()
    return tuple(t is not None and t.untyped_storage().nbytes() <= _REACH for t in tensors)


def _recipe_of(
    launches: Sequence[Launch],
    kernels: Sequence[Any],
    tensors: Sequence[Tensor | None],
    scratch: Sequence[Tensor | None],
) -> _Recipe | None:
    """None where nothing has been compiled, or a launch takes a tensor that is none of these: a copy, a descriptor."""
    given = [(t, index) for index, t in enumerate([*tensors, *scratch]) if t is not None]
    places = {id(t): index for t, index in given}
    if len(places) < len(given):  # the same tensor twice: which of the two an argument is cannot be seen
        return None
    starts = []
    for launch, kernel in zip(launches, kernels, strict=True):
        if not math.prod(launch.grid):
            continue
        if not hasattr(kernel, "__getitem__"):  # interpreted, or still being compiled (``triton.AsyncCompileMode``)
            return None
        named = {**launch.arguments, **launch.constants}
        arguments = [named[name] for name in launch.kernel.arg_names]
        slots = tuple((i, places[id(value)]) for i, value in enumerate(arguments) if id(value) in places)
        for position, _ in slots:
            arguments[position] = 0
        if not all(value is None or isinstance(value, (int, float, str)) for value in arguments):
            return None
        starts.append(_Start(kernel, (*launch.grid, 1, 1)[:3], tuple(arguments), slots))
    return _Recipe(tuple(starts), tuple(None if t is None else (t.shape, t.dtype) for t in scratch))
