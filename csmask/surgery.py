"""Finding the layers that a config names, and masking them: by module type and name, never by model class."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import re
import warnings
from collections.abc import Iterable, Iterator, Set

import torch
from torch import nn

from . import quantised
from .config import CircuitConfig
from .forward_hooks import has_own_forward, is_offloaded, offloads_submodules
from .layers import MaskedLayer, keeps_forward, mask_layer, maskable_type, taken_attribute, unmask_layer
from .shards import is_sharded

_WILDCARDS = frozenset("*?[")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Heads that transformers' classification and question-answering models put beside the backbone; PEFT leaves the first
# two out of "all-linear" too.
_HEAD_NAMES = ("classifier", "score", "qa_outputs")

# Marks a torch.nn.TransformerEncoder whose nested tensors surgery has switched off.
_NESTED_BEFORE = "_nested_tensor_before_masks"


def module_names(model: nn.Module) -> dict[str, nn.Module]:
    """Every name that reaches a module, aliases included, in traversal order."""
    return dict(model.named_modules(remove_duplicate=False))


def find_targets(model: nn.Module, target_layers: list[str] | str) -> dict[str, nn.Module]:
    """The layers that ``target_layers`` names, each once, under its first name, in the model's order.

    Raises:
        ValueError: a target that matches nothing (the message names the nearest layers), or nothing to mask.
        TypeError: a layer that cannot be masked.
        NotImplementedError: a layer whose forward is not the one csmask knows.
    """
    targets = [target_layers] if isinstance(target_layers, str) else target_layers
    if not targets:
        raise ValueError('target_layers is empty: name the layers to mask, or use "all-linear" or "all"')
    if any(is_sharded(param) for param in model.parameters()):
        raise ValueError("the model is sharded already: make the CircuitModel of the whole model first, then shard it")
    names = module_names(model)
    places = Places(names)
    chosen: set[int] = set()
    for target in targets:
        if target in ("all-linear", "all"):
            matches = _all_layers(model, names, places, linear_only=target == "all-linear")
        else:
            matches = _match(target, names, places.adapters)
        for name in matches:
            check_layer(name, names[name], places)
        chosen.update(id(names[name]) for name in matches)
    return {name: module for name, module in model.named_modules() if id(module) in chosen}


def find_masked(model: nn.Module, names: str | Iterable[str]) -> dict[str, MaskedLayer]:
    """The masked layers that ``names`` names, as ``target_layers`` does; "wrapped_model." may stand in front.

    Raises:
        ValueError: a name that is no layer or an unmasked one, or a pattern that matches no masked layer.
    """
    reachable = module_names(model)
    found: dict[str, MaskedLayer] = {}
    for target in [names] if isinstance(names, str) else names:
        matches = _match(target.removeprefix("wrapped_model."), reachable)
        masked = {name: module for name in matches if isinstance(module := reachable[name], MaskedLayer)}
        if not masked:
            candidates = [n for n, m in reachable.items() if isinstance(m, MaskedLayer)]
            near = difflib.get_close_matches(matches[0], candidates, n=3, cutoff=0.0)
            raise ValueError(f"layer {matches[0]!r} is not masked; masked layers like it: {', '.join(near)}")
        found.update(masked)
    return found


def _match(target: str, names: dict[str, nn.Module], adapters: Set[int] = frozenset()) -> list[str]:
    """Names of the maskable modules that one target string matches; of any module where it is an exact name."""
    if target.startswith("re:"):
        pattern = re.compile(target[3:])
        matched = [n for n in names if pattern.fullmatch(n) or pattern.fullmatch(f"{n}.weight")]
    elif target in names:
        return [target]
    elif target.removesuffix(".weight") in names:
        return [target.removesuffix(".weight")]
    elif target.endswith(".bias") and target.removesuffix(".bias") in names:
        raise ValueError(
            f"target layer {target!r} is a bias: name its layer, and mask its bias too with "
            "mask_hparams={'mask_bias': True}"
        )
    elif _WILDCARDS & set(target):
        matched = [n for n in names if fnmatch.fnmatchcase(n, target) or fnmatch.fnmatchcase(f"{n}.weight", target)]
    else:
        matched = []
    matched = [n for n in matched if id(names[n]) not in adapters or _base_layer(names[n]) is not None]
    maskable = [n for n in matched if maskable_type(type(names[n])) or isinstance(names[n], MaskedLayer)]
    adapted = [n for n in matched if _base_layer(names[n]) is not None and f"{n}.base_layer" not in matched]
    if adapted:
        raise TypeError(f"target layer {target!r}: {_ADAPTED.format(name=adapted[0])}")
    if matched and not maskable:
        kinds = sorted({type(names[n]).__name__ for n in matched})
        raise TypeError(f"target layer {target!r} matches only layers that cannot be masked: {', '.join(kinds)}")
    if not maskable:
        raise ValueError(f"target layer {target!r} matches no layer{_nearest(target, names)}")
    return maskable


def _nearest(target: str, names: dict[str, nn.Module]) -> str:
    """The maskable layers whose names are most like the target, as the end of a message."""
    candidates = [n for n, m in names.items() if n and maskable_type(type(m))]
    if not candidates:
        return "; the model has no layer that can be masked"
    wanted = target.removeprefix("re:").removesuffix(".weight")
    leaf = wanted.rsplit(".", 1)[-1]
    # Of layers in a row, all of the number that was asked for: names within a block move, too.
    number = re.findall(r"\d+", wanted)
    of_number = [n for n in candidates if number and re.findall(r"\d+", n)[: len(number)] == number]
    if of_number:
        return f"; nearest: {', '.join(difflib.get_close_matches(wanted, of_number, n=7, cutoff=0.0))}"
    # Names move between releases mostly by a prefix: the same tail counts for more than the same spelling.
    same_tail = [n for n in candidates if n == leaf or n.endswith(f".{leaf}")]
    near = difflib.get_close_matches(wanted, same_tail, n=3, cutoff=0.0) if same_tail else []
    near += [n for n in difflib.get_close_matches(wanted, candidates, n=3, cutoff=0.4) if n not in near]
    return f"; nearest: {', '.join((near or candidates)[:4])}"


class Places:
    """What the place of a layer in its model says about it: ids of modules, found in one walk.

    Attributes:
        uncalled: output projections of ``torch.nn.MultiheadAttention``, which uses their weights itself.
        offloaded: layers whose tensors accelerate's hooks bring for the time of a forward.
        adapters: what PEFT has put beside the layers of the base.
    """

    def __init__(self, names: dict[str, nn.Module]) -> None:
        self.uncalled: set[int] = set()
        self.offloaded: set[int] = set()
        self.adapters: set[int] = set()
        for module in {id(m): m for m in names.values()}.values():
            if isinstance(module, nn.MultiheadAttention):
                self.uncalled.add(id(module.out_proj))
            if offloads_submodules(module):
                self.offloaded.update(map(id, module.modules()))
            elif is_offloaded(module):
                self.offloaded.add(id(module))
            base_layer = _base_layer(module)
            if base_layer is not None:
                self.adapters.update({id(m) for m in module.modules()} - {id(m) for m in base_layer.modules()})


_ADAPTED = "{name!r} is a layer with PEFT's adapters beside it; to mask the layer itself, name '{name}.base_layer'"


def _base_layer(module: nn.Module) -> nn.Module | None:
    """The layer that one of PEFT's tuner layers wraps."""
    # By its attributes: PEFT is imported by those who use it.
    return module._modules.get("base_layer") if hasattr(module, "adapter_layer_names") else None


def adapter_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters and buffers that PEFT has put beside those of the base."""
    adapters = Places(module_names(model)).adapters
    return {
        id(tensor)
        for module in model.modules()
        if id(module) in adapters
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    }


def _all_layers(model: nn.Module, names: dict[str, nn.Module], places: Places, linear_only: bool) -> list[str]:
    """Every layer that can be masked, output heads and adapters excluded; says which layers it had to leave out."""
    left_out = _heads(model) | places.adapters
    found, skipped = [], []
    for name, module in names.items():
        kind = maskable_type(type(module))
        if kind is None or id(module) in left_out or (linear_only and kind[0] in (nn.Conv1d, nn.Conv2d)):
            continue
        if isinstance(module, MaskedLayer):
            check_layer(name, module, places)  # raises: none to leave out, the model has a circuit
        reason = unmaskable_reason(module, places)
        if reason is None:
            found.append(name)
        else:
            skipped.append(f"{name} ({reason[1]})")
    if skipped:
        warnings.warn(f"not masked: {'; '.join(skipped)}", stacklevel=2)
    if not found:
        raise ValueError(f"the model has no {'linear layer' if linear_only else 'layer'} that can be masked")
    return found


def _heads(model: nn.Module) -> set[int]:
    """Ids of the output heads: the output embedding, and classification heads of transformers models, whole."""
    heads: set[int] = set()
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    if get_output_embeddings is None:
        return heads
    output = get_output_embeddings()
    if output is not None:
        heads.update(id(m) for m in output.modules())
    for name in _HEAD_NAMES:
        head = getattr(model, name, None)
        if isinstance(head, nn.Module):
            heads.update(id(m) for m in head.modules())
    return heads


def check_layer(name: str, module: nn.Module, places: Places) -> None:
    """Raise unless the layer of this name can be masked."""
    if _base_layer(module) is not None:
        raise TypeError(_ADAPTED.format(name=name))
    reason = unmaskable_reason(module, places)
    if reason is not None:
        error, text = reason
        raise error(f"layer {name!r} cannot be masked: {text}")


def unmaskable_reason(module: nn.Module, places: Places) -> tuple[type[Exception], str] | None:
    """Why a layer cannot be masked, as an error type and its text; None if it can."""
    if isinstance(module, MaskedLayer):
        return ValueError, "it is masked already; unload() the circuit that it belongs to first"
    kind = type(module).__name__
    if maskable_type(type(module)) is None:
        return (
            TypeError,
            f"{kind} is not a Linear, Conv1d, Conv2d, GPT-2 Conv1D or one quantised by torchao or bitsandbytes",
        )
    if not keeps_forward(type(module)) or has_own_forward(module):
        return NotImplementedError, f"{kind} has a forward of its own, which would not use the mask"
    if id(module) in places.uncalled:
        return NotImplementedError, "torch.nn.MultiheadAttention uses its weight without calling it"
    if id(module) in places.offloaded:
        return NotImplementedError, (
            "its weight is offloaded (device_map) and comes for the time of a forward, where masks cannot follow it; "
            "give it a device of its own, or leave it out of target_layers"
        )
    weight = module._parameters.get("weight")
    if weight is None or isinstance(weight, nn.parameter.UninitializedParameter):
        return NotImplementedError, f"{kind}.weight is not a plain parameter (lazy or parametrized)"
    storage = quantised.format_of(module)
    refusal = None if storage is None else storage.refusal(module)
    if refusal is not None:
        return NotImplementedError, refusal
    if storage is None and quantised.is_torchao(type(weight)):
        return NotImplementedError, f"csmask masks quantised weights of linear layers only, not those of a {kind}"
    if storage is None and weight.dtype not in _FLOATS:
        return TypeError, f"its weight has dtype {weight.dtype}, not float16, bfloat16, float32 or float64"
    taken = taken_attribute(module)
    if taken is not None:
        return ValueError, f"it has an attribute {taken!r} already, which a masked layer needs"
    return None


def swap_in(targets: dict[str, nn.Module], config: CircuitConfig) -> dict[str, MaskedLayer]:
    """Mask the target layers in place; if one fails, the caller undoes all of them with ``swap_out``."""
    hparams = config.mask_hparams
    if hparams["mask_bias"]:
        bare = [name for name, module in targets.items() if module.bias is None]
        if bare:
            warnings.warn(f"mask_bias: no bias to mask in {', '.join(bare)}", stacklevel=3)
    masked: dict[str, MaskedLayer] = {}
    for index, (name, module) in enumerate(targets.items()):
        masked[name] = mask_layer(
            module,
            mask_unit=hparams["mask_unit"],
            mask_bias=hparams["mask_bias"],
            mask_init_value=hparams["mask_init_value"],
            rescale=hparams["rescale"],
            execution=config.execution,
            layer_index=index,
            layer_name=name,
        )
    return masked


def swap_out(layers: Iterable[nn.Module]) -> None:
    """Unmask, in place, those of the layers that are masked."""
    for layer in layers:
        if isinstance(layer, MaskedLayer):
            enable_fused_encoder_layer(layer)
            unmask_layer(layer)


def disable_fused_encoder_layers(model: nn.Module) -> None:
    """Keep ``torch.nn.TransformerEncoderLayer`` from its fused path, which in evaluation bypasses its linear layers.

    The path is taken only by a layer without forward hooks, so masked layers inside one get a hook that does nothing.
    Nor may a frozen ``torch.nn.TransformerEncoder``, always in eval mode, make nested tensors of padded input: without
    the fused path they have no gradient.
    """
    for encoder in model.modules():
        if not isinstance(encoder, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            continue
        masked = [layer for layer in encoder.modules() if isinstance(layer, MaskedLayer)]
        if isinstance(encoder, nn.TransformerEncoderLayer):
            for layer in masked:
                layer.register_forward_pre_hook(_do_nothing)
        elif masked and encoder.use_nested_tensor:
            encoder.use_nested_tensor = False
            setattr(encoder, _NESTED_BEFORE, True)


def enable_nested_tensors(model: nn.Module) -> None:
    """Undo what ``disable_fused_encoder_layers`` did to the encoders of a model."""
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and vars(encoder).pop(_NESTED_BEFORE, False):
            encoder.use_nested_tensor = True


def enable_fused_encoder_layer(layer: nn.Module) -> None:
    """Remove what ``disable_fused_encoder_layers`` put on a layer."""
    for key, hook in list(layer._forward_pre_hooks.items()):
        if hook is _do_nothing:
            del layer._forward_pre_hooks[key]


def _do_nothing(_module: nn.Module, _args: tuple) -> None:
    return None


@contextlib.contextmanager
def warn_of_bypassed(model: nn.Module, layers: dict[str, MaskedLayer]) -> Iterator[None]:
    """Warn at the end of the ``with`` block of masked layers that were not called though what holds them was.

    Some modules use the weight of a layer without calling it (a fused attention or scan): a mask has no effect there.
    A layer whose holder did not run either, such as an idle expert, is not named.
    """
    called: set[int] = set()
    holders = {name: model.get_submodule(name.rpartition(".")[0]) if name else None for name in layers}

    def note(module: nn.Module, _args: tuple) -> None:
        called.add(id(module))

    watched = {id(m): m for m in (*layers.values(), *holders.values()) if m is not None}
    handles = [module.register_forward_pre_hook(note) for module in watched.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    bypassed = [n for n, layer in layers.items() if id(holders[n]) in called and id(layer) not in called]
    if bypassed:
        warnings.warn(
            f"masked but not called in the first forward: {', '.join(bypassed)}. Either this input does not need them, "
            "or the module that holds them reads their weights itself, and then their masks have no effect: leave "
            "them out of target_layers",
            stacklevel=4,
        )
