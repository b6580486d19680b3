"""Layers that accelerate has hooked: a function in the layer's ``forward`` moves tensors and runs the old forward.

``from_pretrained(..., device_map=...)`` hooks the layers of a model that is spread over devices. The old forward is a
method that is bound to the layer, so it has to follow when masking gives the layer another class.
"""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

from torch import nn

_PLACES = ("forward", "_old_forward")  # "forward" alone is what a hook leaves behind that has been removed


def has_own_forward(module: nn.Module) -> bool:
    """Whether the module itself, not its class, has a forward that does something else than its class's."""
    kept = vars(module)
    if "forward" not in kept:
        return False
    hooked = "_hf_hook" in kept and "_old_forward" in kept
    return not _is_bound(kept["_old_forward" if hooked else "forward"], module)


def is_offloaded(module: nn.Module) -> bool:
    """Whether a hook holds the module's tensors elsewhere and brings them for the time of a forward."""
    return any(getattr(hook, "offload", False) for hook in _hooks(module))


def offloads_submodules(module: nn.Module) -> bool:
    """Whether a hook does so with the tensors of all that is in the module."""
    hooks = _hooks(module)
    return any(getattr(hook, "offload", False) and getattr(hook, "place_submodules", False) for hook in hooks)


def _hooks(module: nn.Module) -> list[Any]:
    hook = vars(module).get("_hf_hook")
    return list(getattr(hook, "hooks", [hook]))


def _is_bound(method: Any, module: nn.Module) -> bool:
    return inspect.ismethod(method) and method.__self__ is module and method.__func__ is type(module).forward


def change_class(module: nn.Module, cls: type) -> None:
    """``module.__class__ = cls``; the methods that hooks hold follow."""
    follow = [place for place in _PLACES if _is_bound(vars(module).get(place), module)]
    module.__class__ = cls
    for place in follow:
        vars(module)[place] = MethodType(cls.forward, module)  # type: ignore[attr-defined]
