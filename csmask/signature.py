"""A circuit with the signature of its base: code that inspects a model finds in the circuit what it finds in the base.

transformers' Trainer keeps the columns of a dataset that ``forward`` has an argument for, finds labels by the name of
the model's class and its arguments, and counts labels for models whose loss takes their number.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any

from torch import nn


def class_like(cls: type, model: nn.Module) -> type:
    """A subclass of ``cls``, a circuit's class, with the name of the model's class and its forward's signature.

    A user's subclass of ``CircuitModel`` whose forward names arguments keeps that signature.
    """
    original: Any = getattr(cls, "_circuit_class", cls)
    model = _without_adapters(model)
    try:
        signature = inspect.signature(model.forward)
        own = list(inspect.signature(original.forward).parameters.values())[1:]
    except (TypeError, ValueError):  # a forward written in C
        return original
    if any(p.name == "self" for p in signature.parameters.values()):
        return original
    if any(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in own):
        signature = signature.replace(parameters=own)
    arguments = original, type(model).__name__, signature
    try:
        return _class_like(*arguments)
    except TypeError:  # defaults that cannot be hashed
        return _class_like.__wrapped__(*arguments)


@functools.lru_cache(maxsize=256)
def _class_like(cls: Any, name: str, signature: inspect.Signature) -> type:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return cls.forward(self, *args, **kwargs)

    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = list(signature.parameters.values())
    if parameters and parameters[0].kind is not inspect.Parameter.POSITIONAL_ONLY:
        itself = itself.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = signature.replace(parameters=[itself, *parameters])  # type: ignore[attr-defined]
    forward.__doc__ = cls.forward.__doc__
    own = {"forward": forward, "_circuit_class": cls, "__module__": cls.__module__, "__doc__": cls.__doc__}
    made = type(name, (cls,), own)
    made.__qualname__ = f"{cls.__qualname__}[{name}]"
    return made


def takes_num_items(model: nn.Module) -> bool:
    """Whether the loss that a transformers model returns is divided by the ``num_items_in_batch`` that it is given.

    transformers takes a ``**kwargs`` in forward for that, but many forwards (BERT's, BART's, T5's) compute the mean of
    the labels at hand all the same: of those, a Trainer that accumulates gradients would add up means.
    """
    model = _without_adapters(model)
    declared = getattr(model, "accepts_loss_kwargs", None)
    if declared is not None:
        return bool(declared)
    if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values()):
        return False
    if getattr(getattr(model, "config", None), "problem_type", None) in _MEANS:
        return False
    return any(_uses_num_items(cls) for cls in _forwards(type(model)))


def _without_adapters(model: nn.Module) -> nn.Module:
    """The model that PEFT's wrappers pass everything on to."""
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


_NUM_ITEMS = "num_items_in_batch"
_MEANS = ("regression", "multi_label_classification")  # whose losses are means of the batch at hand


def _forwards(cls: type) -> list[Any]:
    """The forward of a class, and those of its bases that it passes its arguments on to."""
    found = []
    for base in cls.__mro__:
        if "forward" in vars(base) and base is not nn.Module:
            found.append(inspect.unwrap(vars(base)["forward"]))
            if "super().forward" not in _source(found[-1]):
                break
    return found


@functools.lru_cache(maxsize=256)
def _source(forward: Any) -> str:
    try:
        return textwrap.dedent(inspect.getsource(forward))
    except (OSError, TypeError):
        return ""


@functools.lru_cache(maxsize=256)
def _uses_num_items(forward: Any) -> bool:
    """Whether a forward names the number, or passes its ``**kwargs`` on together with labels or to a loss."""
    try:
        tree = ast.parse(_source(forward))
    except SyntaxError:
        return True
    if not tree.body:
        return True  # as transformers assumes
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.arg)) and getattr(node, "id", getattr(node, "arg", "")) == _NUM_ITEMS:
            return True
        if isinstance(node, ast.keyword) and node.arg == _NUM_ITEMS:
            return True
        if not isinstance(node, ast.Call) or not any(keyword.arg is None for keyword in node.keywords):
            continue
        function = ast.unparse(node.func)
        if function == "super().forward":  # looked at by itself
            continue
        given = {keyword.arg for keyword in node.keywords} | {ast.unparse(arg) for arg in node.args}
        if "loss" in function.lower() or "labels" in given:
            return True
    return False
