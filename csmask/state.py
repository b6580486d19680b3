"""What ``CircuitModel.state_dict()`` holds: what is trained, and what it was trained over.

A frozen base is in no training checkpoint. The state of a circuit is its mask logits, temperature, lambda's controller,
PEFT's adapters, any base parameters that are trained beside them, and as ``_extra_state`` the config with a fingerprint
of the base, in JSON. Trainers of every kind therefore write small checkpoints, which ``CircuitModel.from_pretrained``
reads, too.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import __version__, quantised, quantised_base
from .checkpoint import BASE, FORMAT, FORMAT_VERSION, fingerprint, read_description, rest_fingerprint
from .config import CircuitConfig
from .surgery import adapter_parameters

if TYPE_CHECKING:
    from .circuit import CircuitModel


def frozen_names(circuit: CircuitModel) -> set[str]:
    """Names in ``circuit.state_dict()``'s manner of all that does not belong to the circuit's state."""
    model = circuit.wrapped_model
    own = {
        id(tensor)
        for layer in circuit.masked_layers.values()
        for tensor in (layer.mask_logits, layer.bias_mask_logits, layer.temperature)
        if tensor is not None
    } | adapter_parameters(model)
    frozen: set[str] = set()
    seen: set[int] = set()
    tensors = [
        *model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)
    ]  # fmt: skip
    for name, tensor in tensors:
        # In a base that is trained, what was frozen before it was masked is not: all that is not PEFT's, for one.
        is_trained = not circuit.circuit_config.freeze_base and circuit.base_requires_grad.get(name, True)
        is_state = id(tensor) in own or tensor.requires_grad or is_trained
        # Of a tied weight, and of a layer with two names, the first name stands for all.
        if not is_state or id(tensor) in seen:
            frozen.add(BASE + name)
        seen.add(id(tensor))
    if circuit.circuit_config.freeze_base:
        frozen |= {BASE + name for name in quantised_base.state_names(model)}
    return frozen


def drop_frozen(circuit: CircuitModel, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """A hook of ``state_dict()``."""
    for name in frozen_names(circuit):
        state.pop(prefix + name, None)


def forgive_frozen(circuit: CircuitModel, incompatible: Any) -> None:
    """A hook of ``load_state_dict()``: what ``drop_frozen`` drops is not missing."""
    frozen = frozen_names(circuit) | {"_extra_state"}

    def is_frozen(name: str) -> bool:
        while name not in frozen:
            _, dot, name = name.partition(".")  # a circuit within another module: its names have a prefix here
            if not dot:
                return False
        return True

    missing = incompatible.missing_keys
    missing[:] = [name for name in missing if not is_frozen(name)]


def describe(circuit: CircuitModel) -> Tensor:
    """The config and the base's fingerprint: JSON as uint8, on the CPU."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "csmask_version": __version__,
        "circuit_config": circuit.circuit_config.to_dict(),
        "base": base_fingerprint(circuit),
    }
    return torch.frombuffer(bytearray(json.dumps(content, allow_nan=False).encode()), dtype=torch.uint8)


def base_fingerprint(circuit: CircuitModel, afresh: bool = False) -> dict[str, Any] | None:
    """Fingerprint of all that is in no state of the circuit, kept until it changes; None where there is none.

    A base that is trained is in the state itself; one that is on the meta device or sharded has no bytes at hand.

    Args:
        afresh: look at all bytes: what writes to ``param.data`` is not seen otherwise.
    """
    if not circuit.circuit_config.freeze_base:
        return None
    model, layers = circuit.wrapped_model, circuit.masked_layers
    logits = {id(p) for p in circuit.mask_parameters()}
    tensors = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in logits and not t.requires_grad]
    if any(t.is_meta or not quantised_base.is_stored_plainly(t) for t in tensors):
        return None
    temperatures = {id(layer.temperature) for layer in layers.values()}
    plain = [part for t in tensors if id(t) not in temperatures for part in quantised.plain_tensors(t)]
    key = tuple((t.data_ptr(), t._version) for t in plain)
    if afresh or circuit._fingerprint is None or circuit._fingerprint[0] != key:
        kept = names_beside_masks(circuit)
        found = {
            "rest_sha256": rest_fingerprint(model, layers.values(), kept),
            "beside": sorted(kept),
            "layers": {name: fingerprint(layer) for name, layer in layers.items()},
        }
        circuit._fingerprint = (key, found)
    return circuit._fingerprint[1]


def names_beside_masks(circuit: CircuitModel) -> set[str]:
    """Names, in the base's manner, of what the state holds of the base, and of all that shares its memory."""
    frozen = frozen_names(circuit)
    masked = {id(param) for layer in circuit.masked_layers.values() for param in layer.parameters(recurse=False)}
    named = dict(circuit.wrapped_model.named_parameters(remove_duplicate=False))
    return {
        name
        for name, param in named.items()
        if id(param) not in masked and (BASE + name not in frozen or param.requires_grad)
    }


def check_description(circuit: CircuitModel, state: Any) -> None:
    """Raise unless the state was saved from masks of this kind over this base; nothing is loaded yet."""
    content = read_description(state)
    _check_kind(CircuitConfig.from_dict(content["circuit_config"]), circuit.circuit_config)
    saved, own = content["base"], base_fingerprint(circuit, afresh=True)
    if saved is None or own is None or saved == own:
        return
    layers, found = saved["layers"], own["layers"]
    if list(layers) != list(found):
        which = ", ".join(sorted(set(layers) ^ set(found))[:4]) or "their order"
        raise ValueError(f"the state belongs to a circuit over other layers: {which}")
    other = [name for name in layers if layers[name] != found[name]][:4]
    if not other and saved["beside"] != own["beside"]:
        return  # another part of the base is trained here: what both have frozen is not known apart
    raise ValueError(
        f"wrong base model: the state was saved over other weights of "
        f"{', '.join(other) or 'another layer than the masked ones'}; load that base, or pop "
        '"_extra_state" from the state to put the masks on this one'
    )


def _check_kind(saved: CircuitConfig, own: CircuitConfig) -> None:
    """Raise where logits of one config would mean something else in the other."""
    names = ["mask_unit", "mask_bias", "rescale"]
    if saved.mask_hparams["rescale"]:
        names.append("mask_init_value")  # the scale of rescaled masks
    for name in names:
        if saved.mask_hparams[name] != own.mask_hparams[name]:
            raise ValueError(
                f"the state was saved from masks with {name}={saved.mask_hparams[name]!r}, and this circuit has "
                f"{name}={own.mask_hparams[name]!r}: make it from the saved config"
            )
