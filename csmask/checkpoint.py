"""Saving, loading and exporting circuits: masks only, in safetensors, written atomically; loading executes nothing.

A saved circuit is two files. ``circuit.json`` holds the config, the temperature, a fingerprint of the base with each
masked layer's base weights, and the name and digest of the second file, ``masks-<digest>.safetensors``. Replacing
``circuit.json`` is the one step that makes a save take effect, so a save cut short at any point leaves the previous
one whole. A circuit with an ``l0_target`` adds the state of the controller of its lambda.

``circuit.state_dict()`` written to ``model.safetensors``, as training scripts do, can be loaded as a circuit, too.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Container, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import __version__, quantised, quantised_base
from .config import CircuitConfig
from .density import check_state
from .functional import check_temperature
from .layers import MaskedLayer, mask_shapes, unmask_layer
from .shards import check_whole, is_sharded, one_writer, whole
from .surgery import enable_fused_encoder_layer, find_targets, module_names

if TYPE_CHECKING:
    from .circuit import CircuitModel

CIRCUIT_FILE = "circuit.json"
FORMAT = "csmask-circuit"
FORMAT_VERSION = 1
STATE_FILE = "model.safetensors"  # what transformers' Trainer and Accelerate write
BASE = "wrapped_model."  # before the base's names in a circuit's state
DAMAGED = "the state of a circuit is damaged: _extra_state is not what state_dict() gave"
_KEYS = {
    "format",
    "format_version",
    "csmask_version",
    "circuit_config",
    "temperature",
    "masks_file",
    "masks_sha256",
    "rest_sha256",
    "layers",
}


def fingerprint(layer: Any) -> dict[str, Any]:
    """Shape, dtype and SHA-256 of a layer's base weight and bias: what a mask was trained for."""
    kind = quantised.format_of(layer)
    if kind is not None:
        return quantised_base.fingerprint_of(layer, kind)
    digest = hashlib.sha256()
    for param in (layer.weight, layer.bias):
        if param is not None:
            quantised_base.hash_tensor(digest, whole(param.detach()))
    shape, dtype = list(layer.weight.shape), str(layer.weight.dtype).removeprefix("torch.")
    return {"shape": shape, "dtype": dtype, "sha256": digest.hexdigest()}


def rest_fingerprint(model: nn.Module, masked: Iterable[nn.Module] = (), trained: Container[str] = ()) -> str:
    """SHA-256 of all of a model's parameters and persistent buffers but those of masked layers and trained ones."""
    ids = {id(layer) for layer in masked}
    prefixes = tuple(f"{name}." if name else "" for name, module in module_names(model).items() if id(module) in ids)
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor) and not name.startswith(prefixes) and name not in trained:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            quantised_base.hash_tensor(digest, whole(tensor))
    return digest.hexdigest()


def save_circuit(circuit: CircuitModel, directory: str | os.PathLike) -> None:
    """Write the masks, config, temperature and base fingerprint of a circuit into ``directory``; see the module."""
    import safetensors.torch

    path = Path(directory)
    if path.exists() and not path.is_dir():
        raise ValueError(f"save_pretrained needs a directory, got the file {path}")
    circuit.check_logits()
    masks = {name: whole(p.detach()).cpu().contiguous() for name, p in circuit.named_mask_parameters()}
    data = safetensors.torch.save(masks)
    digest = hashlib.sha256(data).hexdigest()
    content: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "csmask_version": __version__,
        "circuit_config": circuit.circuit_config.to_dict(),
        "temperature": circuit.temperature,
        "masks_file": f"masks-{digest[:16]}.safetensors",
        "masks_sha256": digest,
        "rest_sha256": rest_fingerprint(circuit.wrapped_model, circuit.masked_layers.values()),
        "layers": {name: fingerprint(layer) for name, layer in circuit.masked_layers.items()},
    }
    if circuit.l0_control is not None:
        content["l0_control"] = circuit.l0_control.state()
    if not circuit.circuit_config.freeze_base:
        warnings.warn(
            "the base was trained too (freeze_base=False), and a saved circuit holds masks only: "
            "save the base's weights as well, or export()",
            stacklevel=3,
        )
    with one_writer(any(is_sharded(p) for p in circuit.parameters())) as writes:
        if writes:
            _write(path, content, data)


def _write(path: Path, content: dict[str, Any], data: bytes) -> None:
    path.mkdir(parents=True, exist_ok=True)
    write_atomically(path / content["masks_file"], data)
    write_atomically(path / CIRCUIT_FILE, _with_digest(content))
    for stale in path.glob("masks-*.safetensors"):
        if re.fullmatch(r"masks-[0-9a-f]{16}\.safetensors", stale.name) and stale.name != content["masks_file"]:
            stale.unlink(missing_ok=True)  # another process may have been quicker


def load_circuit(
    cls: type[CircuitModel], model: nn.Module, directory: str | os.PathLike, check_base: bool
) -> CircuitModel:
    """Read, check and only then wrap ``model``; see ``CircuitModel.from_pretrained``."""
    path = Path(directory)
    is_state = (path / STATE_FILE).is_file() and not (path / CIRCUIT_FILE).is_file()
    content, masks = _read_state(path / STATE_FILE) if is_state else _read(path)
    config = CircuitConfig.from_dict(content["circuit_config"])
    temperature = check_temperature(content["temperature"])
    control = None if config.l0_target is None else check_state(content.get("l0_control"))
    names = _target_layers(model, config, content["layers"])
    targets = find_targets(model, names)
    _check_base_model(targets, content["layers"], check_base)
    if check_base and rest_fingerprint(model, targets.values()) != content["rest_sha256"]:
        raise ValueError(
            "wrong base model: the masked layers are those that the masks were saved over, but other weights of the "
            "model (a head, embeddings, norms ...) are not; load that base, or pass check_base=False"
        )
    _check_masks(path, masks, targets, config)
    circuit = cls(dataclasses.replace(config, target_layers=names), model)
    circuit.circuit_config.target_layers = config.target_layers
    with torch.no_grad():
        for name, param in circuit.named_mask_parameters():
            param.copy_(masks[name])
    circuit.temperature = temperature
    if circuit.l0_control is not None and control is not None:
        circuit.l0_control.load_state(control)
    return circuit.eval()


def _target_layers(model: nn.Module, config: CircuitConfig, layers: dict[str, Any]) -> list[str] | str:
    """The config's, but for regular expressions of a file that somebody has sent, which may run for years."""
    given = [config.target_layers] if isinstance(config.target_layers, str) else config.target_layers
    if not any(target.startswith("re:") for target in given):
        return config.target_layers
    known = module_names(model)
    if any(name not in known for name in layers):
        strangers = [name for name in layers if name not in known][:4]
        raise ValueError(f"wrong base model: it differs from the saved circuit in its layers: {', '.join(strangers)}")
    return list(layers)


def export_model(circuit: CircuitModel) -> nn.Module:
    """A copy of the base model without csmask, the hard mask written into its weights; see ``CircuitModel.export``."""
    check_whole(circuit.parameters(), "export()")
    circuit.check_logits()
    were_quantised = quantised_base.weight_names(circuit.wrapped_model)
    # Quantised weights, which give way to dense ones, are not copied.
    shared = [circuit.wrapped_model.get_parameter(name) for name in were_quantised]
    model: Any = copy.deepcopy(circuit.wrapped_model, {id(weight): weight for weight in shared})
    owners: dict[int, int] = {}
    for module in model.modules():
        for param in module._parameters.values():
            if param is not None:
                owners[id(param)] = owners.get(id(param), 0) + 1
    output = getattr(model, "get_output_embeddings", lambda: None)()
    for layer in [m for m in model.modules() if isinstance(m, MaskedLayer)]:
        # The other users of a tied weight go on with the unmasked one: the layer gets a parameter of its own.
        if owners[id(layer.weight)] > 1 and layer is output:
            if getattr(model.config, "is_encoder_decoder", False):
                raise NotImplementedError(
                    "export() of an encoder-decoder with a masked output head that is tied to the embeddings: such "
                    "models scale by whether they are tied, and reload tied weights from one; untie the head first"
                )
            model.config.tie_word_embeddings = False
            if layer.bias is not None and owners[id(layer.bias)] > 1:  # BERT ties the head's bias by the same switch
                layer.bias = nn.Parameter(layer.bias.detach().clone())
        write_hard_mask(layer, quantised_base.float_dtype(model, layer))
    if were_quantised:
        quantised_base.make_model_dense(model)
    for name, param in model.named_parameters():
        if name not in were_quantised:
            param.requires_grad_(circuit.base_requires_grad.get(name, True))
    return model.eval()


@torch.no_grad()
def write_hard_mask(layer: MaskedLayer, dtype: torch.dtype | None = None) -> nn.Module:
    """Unmask a layer and give it its hard-masked weight (and bias, where masked) as parameters.

    Args:
        dtype: of the dense weight of a layer that is quantised.
    """
    weight, bias = layer.hard_masked_parameters(dtype)
    masked_bias = bias if layer.bias_mask_logits is not None else None
    enable_fused_encoder_layer(layer)
    unmask_layer(layer)
    if dtype is not None and quantised.format_of(layer) is not None:
        quantised_base.make_dense(layer, weight.to(dtype), bias if bias is None else bias.to(dtype))
        return layer
    layer.weight = nn.Parameter(weight.contiguous())
    if masked_bias is not None:
        layer.bias = nn.Parameter(masked_bias)
    return layer


def _with_digest(content: dict[str, Any]) -> bytes:
    return json.dumps({**content, "sha256": _digest(content)}, indent=2, allow_nan=False).encode()


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write through a temporary file in the same directory: readers see the old content or the new, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of ``circuit.json`` and the mask tensors, both checked against their digests."""
    import safetensors.torch

    file = path / CIRCUIT_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{path} holds no saved circuit: {CIRCUIT_FILE} is not there")
    try:
        content = json.loads(file.read_text(), parse_constant=_refuse_constant)
    except ValueError as error:
        raise ValueError(f"{file} is truncated or not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{file} is not a csmask circuit")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {version!r}, this csmask ({__version__}) reads {FORMAT_VERSION}: "
            f"load it with the csmask that wrote it ({content.get('csmask_version')})"
        )
    digest = content.pop("sha256", None)
    if set(content) - {"l0_control"} != _KEYS or digest != _digest(content):
        raise ValueError(f"{file} was edited or damaged after it was saved: its digest does not match")
    _check_types(file, content)
    masks = path / Path(content["masks_file"]).name
    if not masks.is_file():
        raise FileNotFoundError(f"{path} holds no {masks.name}, which {CIRCUIT_FILE} names")
    data = masks.read_bytes()
    if hashlib.sha256(data).hexdigest() != content["masks_sha256"]:
        raise ValueError(f"{masks} is truncated, edited or damaged: its digest does not match {CIRCUIT_FILE}")
    return content, safetensors.torch.load(data)


def _read_state(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What ``_read`` gives, from a file of ``circuit.state_dict()``."""
    import safetensors.torch

    try:
        tensors = safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is truncated or damaged: {error}") from error
    if "_extra_state" not in tensors:
        raise FileNotFoundError(f"{file.parent} holds no saved circuit, and {file.name} is not the state of one")
    content = read_description(tensors.pop("_extra_state"))
    base = content.pop("base")
    if not isinstance(base, dict) or base.get("beside") != []:
        raise ValueError(
            f"{file} is the state of a circuit that was trained with parts of its base, or in shards: wrap the base "
            "with CircuitModel and load_state_dict() it"
        )
    temperatures = [t for name, t in tensors.items() if name.endswith(".temperature")]
    control = {n.removeprefix("l0_control."): float(t) for n, t in tensors.items() if n.startswith("l0_control.")}
    masks = {n.removeprefix(BASE): t for n, t in tensors.items() if n.endswith("mask_logits")}
    del base["beside"]
    content.update(base, temperature=float(temperatures[0]) if temperatures else None)
    _check_types(file, content)
    return {**content, "l0_control": control} if control else content, masks


def read_description(state: Any) -> dict[str, Any]:
    """What ``state.describe`` gave; anything else is a ``ValueError``."""
    try:
        content = json.loads(bytes(state.cpu().to(torch.uint8).tolist()))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(DAMAGED) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(DAMAGED)
    base = content.get("base")
    is_whole = isinstance(base, dict) and set(base) == {"rest_sha256", "beside", "layers"}
    if not (base is None or (is_whole and isinstance(base["layers"], dict))) or "circuit_config" not in content:
        raise ValueError(DAMAGED)
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"the state of a circuit has format version {content.get('format_version')!r}, this csmask ({__version__}) "
            f"reads {FORMAT_VERSION}: load it with the csmask that wrote it ({content.get('csmask_version')})"
        )
    return content


def _check_types(file: Path, content: dict[str, Any]) -> None:
    """Raise unless what the file describes has the form of ``save_circuit``: anyone can compute digests anew."""
    layers = content["layers"]
    is_whole = isinstance(layers, dict) and all(
        isinstance(layer, dict) and set(layer) == {"shape", "dtype", "sha256"} for layer in layers.values()
    )
    if not is_whole or not isinstance(content.get("masks_file", ""), str):
        raise ValueError(f"{file} is damaged: it does not describe masked layers as save_pretrained() does")


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def _check_masks(path: Path, masks: dict[str, Tensor], targets: dict[str, nn.Module], config: CircuitConfig) -> None:
    """Raise unless the tensors are free of NaN and just those that the config's masks on these layers consist of."""
    hparams = config.mask_hparams
    expected = {
        f"{name}.{param}": shape
        for name, module in targets.items()
        for param, shape in mask_shapes(module, hparams["mask_unit"], hparams["mask_bias"]).items()
    }
    wrong = sorted(set(expected) ^ set(masks)) or [n for n in expected if masks[n].shape != expected[n]]
    if wrong:
        raise ValueError(f"{path}: the masks do not fit the saved config at {', '.join(wrong[:4])}")
    for name, logits in masks.items():
        if torch.isnan(logits).any():
            raise ValueError(f"{path}: {name} holds NaN")


def _check_base_model(targets: dict[str, Any], saved: dict[str, dict[str, Any]], check_base: bool) -> None:
    """Raise unless the model has the layers, shapes and (with ``check_base``) weights that the masks were made for."""
    if list(targets) != list(saved):
        difference = sorted(set(targets) ^ set(saved))[:4] or ["(their order)"]
        raise ValueError(f"wrong base model: it differs from the saved circuit in its layers: {', '.join(difference)}")
    for name, layer in targets.items():
        shape = list(quantised.shape_of(layer))
        if shape != saved[name]["shape"]:
            raise ValueError(f"wrong base model: {name}.weight has shape {shape}, saved with {saved[name]['shape']}")
    if not check_base:
        return
    for name, layer in targets.items():
        found = fingerprint(layer)
        if found["dtype"] != saved[name]["dtype"]:
            raise ValueError(
                f"wrong base dtype: {name}.weight is {found['dtype']}, the masks were saved over "
                f"{saved[name]['dtype']}; load the base in that dtype, or pass check_base=False"
            )
        if found["sha256"] != saved[name]["sha256"]:
            raise ValueError(
                f"wrong base model: the weights of {name} are not those that the masks were saved over; "
                "load that base, or pass check_base=False to put the masks on this one"
            )
