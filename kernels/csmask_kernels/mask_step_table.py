"""The tables that the kernels of ``mask_step`` read: one row for each layer with its addresses, size and place.

Layers differ in size and in where they lie, but one launch takes all that are alike in dtypes and in what they have.
"""

from __future__ import annotations

import dataclasses
import functools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import StepConfig, Target, check_supported, get_config, is_interpreted, like
from .state_codes import STATE_BLOCK as _STATE_BLOCK

# Eight entries per thread: 16 bytes of a 16-bit tensor. AMD's warps have 64 threads.
DEFAULT_CONFIGS = {"cuda": StepConfig(512, 2, 4), "hip": StepConfig(1024, 2, 4)}
# Every program looks through the first programs of all layers of its launch.
MAX_LAYERS = 511
# int64; the table lies column by column, so that the first one is read at once.
COLUMNS = ("start", "size", "index", "scale", "temperature", "dl0", "step", "logits", "weight", "dmasked_weight",
           "grad", "masked_weight", "first", "second", "state_scales")  # fmt: skip
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_SCALARS = ("temperature", "dl0", "step")
STATE_BLOCK: int = _STATE_BLOCK.value
_WRITTEN = ("logits", "masked_weight", "first", "second", "state_scales")
Row = dict[str, Tensor | None]


@dataclass(frozen=True)
class Group:
    """Layers of one launch, which are alike but for size and place: their table and what the kernel is compiled for.

    ``read`` and ``written`` are the tensors behind the table's addresses, for each layer.
    """

    table: Tensor
    layers: int
    programs: int
    constants: dict[str, Any]
    config: StepConfig
    read: tuple[tuple[Tensor, ...], ...]
    written: tuple[tuple[Tensor, ...], ...]


def _is_dense(tensor: Tensor) -> bool:
    """Whether its entries lie side by side in some order."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _same_layout(tensor: Tensor, logits: Tensor) -> bool:
    if tensor.stride() == logits.stride():
        return True
    pairs = zip(tensor.shape, tensor.stride(), logits.stride(), strict=True)
    return tensor.numel() == 0 or all(a == b for n, a, b in pairs if n != 1)


def _check(index: int, logits: Tensor, tensors: Row) -> None:
    """Raise for what cannot be walked along with the logits, or not changed where it lies."""
    if not (logits.is_contiguous() or _is_dense(logits) or logits.numel() == 0):
        raise ValueError(
            f"layer {index}: expected mask_logits without gaps, got strides {logits.stride()} at shape "
            f"{tuple(logits.shape)}; make them contiguous"
        )
    scales, blocks = tensors.get("state_scales"), triton.cdiv(logits.numel(), STATE_BLOCK)
    if scales is not None and (scales.shape, scales.dtype, scales.device) != (
        (blocks,), torch.float32, logits.device,
    ):  # fmt: skip
        raise ValueError(
            f"layer {index}: expected state_scales of shape ({blocks},) in float32 on {logits.device}, got "
            f"{tuple(scales.shape)} in {scales.dtype} on {scales.device}; load the optimizer's state anew"
        )
    for name, tensor in tensors.items():
        if tensor is None or name == "state_scales":
            continue
        if tensor.shape != logits.shape:
            raise ValueError(
                f"layer {index}: expected {name} of the mask_logits' shape {tuple(logits.shape)}, got "
                f"{tuple(tensor.shape)}; per_step execution takes one logit per weight"
            )
        if tensor.device != logits.device:
            raise ValueError(f"layer {index}: expected {name} on {logits.device}, got {tensor.device}; move it there")
        if name in ("dmasked_weight", "grad"):
            continue  # copied where they lie otherwise
        if not _same_layout(tensor, logits):
            raise ValueError(
                f"layer {index}: expected {name} with the mask_logits' strides {logits.stride()}, got "
                f"{tensor.stride()}; make both contiguous, or both channels_last"
            )
        codes = {"first": torch.int8, "second": torch.uint8}
        if name in codes and tensor.dtype != (dtype := logits.dtype if scales is None else codes[name]):
            whose = "the mask_logits' dtype" if scales is None else "8 bits, with scales,"
            raise ValueError(
                f"layer {index}: expected optimizer state in {whose} {dtype}, got "
                f"{tensor.dtype}; load the optimizer's state after the model has its dtype"
            )


def _on_device(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, torch.float32)


def _rows(columns: dict[str, Sequence[Any]]) -> Iterator[tuple[float, Row]]:
    """Scale and tensors of each layer, by column, checked and where the kernels can read them."""
    names = list(columns)
    for index, values in enumerate(zip(*columns.values(), strict=True)):
        row: dict[str, Any] = dict(zip(names, values, strict=True))
        logits, scale = row["logits"], row.pop("scale")
        scalars = {name: _on_device(row.pop(name, None), logits.device) for name in ("temperature", "dl0", "step")}
        check_supported(mask_logits=logits, weight=row["weight"], masked_weight=row.get("masked_weight"),
                        dmasked_weight=row["dmasked_weight"])  # fmt: skip
        _check(index, logits, row)
        dwm, grad = row["dmasked_weight"], row["grad"]
        if dwm is not None and not _same_layout(dwm, logits):
            row["dmasked_weight"] = like(dwm, logits)
        if grad is not None and not (_same_layout(grad, logits) and grad.dtype == logits.dtype):
            row["grad"] = like(grad.to(logits.dtype), logits)
        yield scale, {**row, **scalars}


def _upload(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """A table on the device, without waiting for it."""
    if device.type == "meta":
        return torch.empty(len(numbers), dtype=torch.int64, device=device)
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.int64)
    if is_interpreted():
        raise NotImplementedError(
            "Triton's interpreter reads host memory, and mask_step's tables hold addresses of the device: move the "
            "model to the CPU, or unset TRITON_INTERPRET"
        )
    if torch.cuda.is_current_stream_capturing():
        # A graph would read host memory again at each replay: these kernels have the numbers among their arguments.
        table = torch.zeros(len(numbers), dtype=torch.int64, device=device)
        torch._foreach_add_(list(table.unbind()), list(numbers))
        return table
    return torch.tensor(numbers, dtype=torch.int64).pin_memory().to(device, non_blocking=True)


@functools.lru_cache(maxsize=64)
def _cached_table(numbers: tuple[int, ...], device: torch.device, _stream: int) -> Tensor:
    return _upload(numbers, device)


def _table(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """The table of these numbers; one that was used lately is there already.

    A graph writes its own at each replay: one that is cached here may be gone by then.
    """
    if device.type == "meta" or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return _upload(numbers, device)
    return _cached_table(numbers, device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)


def _constants_of(row: Row) -> tuple[tuple[str, Any], ...]:
    """What a kernel for this layer is compiled for."""
    beside = (*_SCALARS, "state_scales")
    walked = [tensor for name, tensor in row.items() if tensor is not None and name not in beside]
    types = {"S_TYPE": "logits", "W_TYPE": "weight", "WM_TYPE": "masked_weight", "DWM_TYPE": "dmasked_weight"}
    found: dict[str, Any] = {}
    for constant, name in types.items():
        tensor = row.get(name)
        found[constant] = None if tensor is None else _TYPES[tensor.dtype]
    found.update(HAS_GRAD=row["grad"] is not None, HAS_DL0=row["dl0"] is not None)
    # Sizes too: the last 16 bytes are then there as a whole.
    found["ALIGNED"] = all(t.data_ptr() % 16 == 0 and t.numel() % 16 == 0 for t in walked)
    return tuple(found.items())


def plan_groups(columns: dict[str, Sequence[Any]], target: Target, config: StepConfig | None) -> list[Group]:
    """Tables for the layers, by what their kernels are compiled for.

    Args:
        columns: by the names of ``COLUMNS``, for each layer its tensors, None where there is none, and its scale.
    """
    members: dict[Any, list[tuple[int, float, Row]]] = {}
    for index, (scale, row) in enumerate(_rows(columns)):
        members.setdefault(_constants_of(row), []).append((index, scale, row))
    return [
        _group(dict(constants), layers[i : i + MAX_LAYERS], target, config)
        for constants, layers in members.items()
        for i in range(0, len(layers), MAX_LAYERS)
    ]


def _group(
    constants: dict[str, Any], layers: list[tuple[int, float, Row]], target: Target,
    config: StepConfig | None,
) -> Group:  # fmt: skip
    sizes = [row["logits"].numel() for _, _, row in layers]  # type: ignore[union-attr]
    default = DEFAULT_CONFIGS.get(target.backend, DEFAULT_CONFIGS["cuda"])
    has_codes = layers[0][2].get("state_scales") is not None
    if config is None:
        config = get_config("mask_step", target, sum(sizes), default)
        # With codes there is more to compute for fewer bytes.
        config = get_config("mask_step_8_bits", target, sum(sizes), config) if has_codes else config
    if has_codes and config.block % STATE_BLOCK:
        config = dataclasses.replace(config, block=STATE_BLOCK)  # a scale is one program's
    count = triton.next_power_of_2(len(layers) + 1)
    table = [[0] * count for _ in COLUMNS]
    programs = 0
    for i, ((index, scale, row), size) in enumerate(zip(layers, sizes, strict=True)):
        bits = struct.unpack("<i", struct.pack("<f", scale))[0]
        addresses = [0 if (tensor := row.get(name)) is None else tensor.data_ptr() for name in COLUMNS[4:]]
        for column, value in zip(table, (programs, size, index, bits, *addresses), strict=True):
            column[i] = value
        programs += triton.cdiv(size, config.block * config.pieces)
    # Behind the last layer: where its programs end, and a first program that there is not.
    table[0][len(layers) :] = [programs] * (count - len(layers))
    device = layers[0][2]["logits"].device  # type: ignore[union-attr]
    numbers = tuple(value for column in table for value in column)
    given = [{name: t for name, t in row.items() if t is not None} for _, _, row in layers]
    read = tuple(tuple(t for name, t in row.items() if name != "masked_weight") for row in given)
    written = tuple(tuple(t for name, t in row.items() if name in _WRITTEN) for row in given)
    constants.update(ROWS=count, BLOCK=config.block, PIECES=config.pieces)
    return Group(_table(numbers, device), len(layers), programs, constants, config, read, written)
