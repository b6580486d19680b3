"""Models with quantised layers: what identifies them, what libraries must not do to them, and how they get dense."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .quantised import BitsAndBytes4, BitsAndBytes8, Format, format_of, plain_tensors, weight_of

# Marks a Linear4bit that has been kept from repacking its weight.
_REPACKS = "_repacks_without_masks"


def is_stored_plainly(tensor: Tensor) -> bool:
    """Whether a parameter or buffer is a plain tensor, or a quantised one that consists of plain tensors."""
    name = (type(tensor).__module__.split(".")[0], type(tensor).__qualname__)
    known = name in (("bitsandbytes", "Params4bit"), ("bitsandbytes", "Int8Params"))
    return known or all(type(part) in (Tensor, nn.Parameter) for part in plain_tensors(tensor))


def hash_tensor(digest: Any, tensor: Tensor) -> None:
    """Add the bytes of a tensor, quantised or not, to a hash.

    Raises:
        NotImplementedError: there are none.
    """
    if tensor.is_meta:
        raise NotImplementedError(
            "a saved circuit holds a fingerprint of its base, and parts of this base are on the meta device, offloaded "
            "or without weights yet: load all of it first, or keep circuit.state_dict(), which goes without one then"
        )
    for part in plain_tensors(tensor):
        digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def fingerprint_of(layer: Any, kind: Format) -> dict[str, Any]:
    """Shape, format and SHA-256 of all that a quantised layer's numbers depend on."""
    digest = hashlib.sha256()
    tensors = kind.stored(layer)
    if layer.bias is not None:
        tensors = {**tensors, "bias": layer.bias}
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hash_tensor(digest, tensor)
    return {"shape": list(kind.shape(layer)), "dtype": kind.name(layer), "sha256": digest.hexdigest()}


def state_names(model: nn.Module) -> set[str]:
    """Names in ``model.state_dict()`` of scales and the like, which are neither parameters nor buffers."""
    found: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        kind = format_of(module)
        if isinstance(kind, (BitsAndBytes4, BitsAndBytes8)):
            own: dict[str, Any] = {}
            prefix = f"{name}." if name else ""
            module._save_to_state_dict(own, prefix, False)
            found |= set(own) - {f"{prefix}{tensor}" for tensor in (*module._parameters, *module._buffers)}
    return found


# What libraries would do to a base that csmask holds


def hold_formats(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights, which loses digits of their scales, at evaluations on a CPU."""
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if isinstance(format_of(module), BitsAndBytes4) and getattr(module, "support_avx512bf16_for_cpu", False):
            setattr(module, _REPACKS, module.support_avx512bf16_for_cpu)
            module.support_avx512bf16_for_cpu = False


def release_formats(model: nn.Module) -> None:
    """Undo ``hold_formats``."""
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if _REPACKS in vars(module):
            module.support_avx512bf16_for_cpu = vars(module).pop(_REPACKS)


# Export


@torch.no_grad()
def make_dense(layer: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Make an unmasked quantised layer a plain one with this weight ``(out, in)`` and bias."""
    kind = format_of(layer)
    assert kind is not None
    del layer.weight
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias)
    kind.become_dense(layer)


def float_dtype(model: nn.Module, layer: Any) -> torch.dtype:
    """The dtype that a layer of a model gets when it is made dense: the model's, by its first plain weight."""
    own = (p.dtype for p in model.parameters() if type(p) is nn.Parameter and p.is_floating_point())
    kind = format_of(layer)
    computes = torch.float32 if kind is None else kind.dtype(layer, torch.float32)
    return next(own, layer.weight.dtype if layer.weight.is_floating_point() else computes)


def weight_names(model: nn.Module) -> set[str]:
    """Names of the weights of a model that are quantised.

    Raises:
        NotImplementedError: one that cannot be dequantised.
    """
    found = set()
    for name, module in model.named_modules(remove_duplicate=False):
        kind = format_of(module)
        if kind is not None:
            refusal = kind.refusal(module)
            if refusal is not None:
                raise NotImplementedError(f"layer {name!r} cannot be made dense: {refusal}")
            found.add(f"{name}.weight" if name else "weight")
    return found


def make_model_dense(model: nn.Module) -> None:
    """Make the layers of a model that are still quantised plain ones, and have the model say so."""
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if format_of(module) is not None:
            dtype = float_dtype(model, module)
            bias = module.bias if module.bias is None else module.bias.to(dtype)
            make_dense(module, weight_of(module, dtype).dense().to(dtype), bias)
    _forget_quantisation(model)


def _forget_quantisation(model: nn.Module) -> None:
    """Take away what says to transformers that a model is quantised: none of its layers is any more."""
    for module in model.modules():
        quantiser = getattr(module, "hf_quantizer", None)
        if quantiser is not None:
            quantiser.remove_quantization_config(module)
        for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            vars(module).pop(name, None)
