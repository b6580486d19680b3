"""Operator schemas, shape functions and dispatch: the tensor's device picks the back end.

CUDA and ROCm run the Triton kernels of ``csmask_kernels``, one file per op; CPU runs the C++ kernels (``_cpp``) where
they are built; all else runs plain torch (``_plain``). Autograd lives above, in
``functional``. Shapes and dtypes were checked there.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _cpp, _cpp_linear, _cpp_step, _cpp_units, _plain, _plain_step, reference

ops = torch.ops.csmask
_LIBRARY = torch.library.Library("csmask", "DEF")
_MASK = "Tensor weight, Tensor mask_logits, Tensor temperature"
_GEOMETRY = "int[] stride, int[] padding, int[] dilation"
# Of several layers: the gradients of their masked weights and logits so far, and what turns them into those of logits.
_WAITING = "Tensor?[] dmasked_weights, Tensor[] weights, Tensor?[] grads, Tensor[] temperatures, Tensor?[] dl0s"
_STEP = f"Tensor(d!)[] masked_weights, {_WAITING}, float[] scales, Tensor[] steps, Tensor? factor, Tensor lr"

# op: (arguments and results, the Triton kernel's file or None)
SCHEMAS: dict[str, tuple[str, str | None]] = {
    "materialize": (
        f"({_MASK}, bool hard, float scale, ScalarType? dtype=None, bool counts=False) -> (Tensor, Tensor, Tensor)",
        "materialize",
    ),
    # The masked weight in memory that is there already, which only a CPU's kernels need: where it is no kernel, a copy.
    "materialize_": (f"(Tensor(a!) out, {_MASK}, bool hard, float scale) -> Tensor", None),
    "mask_sums": (
        "(Tensor mask_logits, Tensor temperature, bool hard, float scale, int weights_per_logit, bool counts=True)"
        " -> (Tensor, Tensor)",
        "materialize",
    ),
    "logits_grad": (f"(Tensor dmasked_weight, {_MASK}, Tensor? dl0, float scale) -> Tensor", "logits_grad"),
    "logits_grad_": (
        f"(Tensor(a!) dlogits, Tensor dmasked_weight, {_MASK}, Tensor? dl0, float scale) -> ()",
        "logits_grad",
    ),
    "masked_linear": (
        f"(Tensor x, {_MASK}, Tensor? bias, bool hard, float scale, bool transposed) -> (Tensor, Tensor)",
        "masked_linear",
    ),
    "masked_linear_dx": (
        f"(Tensor dout, {_MASK}, bool hard, float scale, bool transposed) -> Tensor",
        "masked_linear",
    ),
    "masked_linear_dlogits": (
        f"(Tensor dout, Tensor x, {_MASK}, Tensor? dl0, float scale, bool transposed) -> Tensor",
        "masked_linear_dlogits",
    ),
    "masked_linear_dlogits_": (
        f"(Tensor(a!) dlogits, Tensor dout, Tensor x, {_MASK}, Tensor? dl0, float scale, bool transposed) -> ()",
        "masked_linear_dlogits",
    ),
    # Both gradients of a masked linear operation at once: where that is no kernel of its own, two.
    "masked_linear_backward": (
        f"(Tensor dout, Tensor x, {_MASK}, Tensor? dl0, float scale, bool transposed) -> (Tensor, Tensor)",
        None,
    ),
    "masked_linear_backward_": (
        f"(Tensor(a!) dlogits, Tensor dout, Tensor x, {_MASK}, Tensor? dl0, float scale, bool transposed) -> Tensor",
        None,
    ),
    "masked_conv": (
        f"(Tensor x, {_MASK}, Tensor? bias, bool hard, float scale, {_GEOMETRY}) -> (Tensor, Tensor)",
        "masked_conv",
    ),
    "masked_conv_dx": (
        f"(Tensor dout, {_MASK}, SymInt[] input_size, bool hard, float scale, {_GEOMETRY}) -> Tensor",
        "masked_conv",
    ),
    "masked_conv_dlogits": (
        f"(Tensor dout, Tensor x, {_MASK}, Tensor? dl0, float scale, {_GEOMETRY}) -> Tensor",
        "masked_conv_dlogits",
    ),
    "masked_conv_dlogits_": (
        f"(Tensor(a!) dlogits, Tensor dout, Tensor x, {_MASK}, Tensor? dl0, float scale, {_GEOMETRY}) -> ()",
        "masked_conv_dlogits",
    ),
    "scale_neurons": (
        "(Tensor z, Tensor mask_logits, Tensor temperature, Tensor? bias, bool hard, float scale, int dim) -> Tensor",
        "scale_neurons",
    ),
    "scale_neurons_grad": (
        "(Tensor dout, Tensor z, Tensor mask_logits, Tensor temperature, Tensor? dl0, bool hard, float scale, int dim,"
        " int weights_per_logit) -> (Tensor, Tensor)",
        "scale_neurons",
    ),
    "pack_mask": ("(Tensor mask_logits) -> Tensor", "bitmask"),
    "unpack_mask": ("(Tensor bits, SymInt[] size) -> Tensor", "bitmask"),
    "popcount": ("(Tensor bits) -> Tensor", "bitmask"),
    "apply_bitmask": ("(Tensor weight, Tensor bits, float scale, ScalarType? dtype=None) -> Tensor", "bitmask"),
    "bitmask_linear": (
        "(Tensor x, Tensor weight, Tensor bits, Tensor? bias, float scale, bool transposed) -> Tensor",
        "masked_linear",
    ),
    "bitmask_linear_dx": (
        "(Tensor dout, Tensor weight, Tensor bits, float scale, bool transposed) -> Tensor",
        "masked_linear",
    ),
    "mask_grad_norms": (f"(Tensor[] mask_logits, {_WAITING}, float[] scales) -> Tensor", "mask_step"),
    "mask_adamw_": (
        # Of states in 8 bits there are scales, too: a tensor per layer, else none.
        "(Tensor(a!)[] mask_logits, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(e!)[] state_scales, "
        f"{_STEP}, float beta1, float beta2, float eps, float weight_decay, bool maximize) -> (Tensor, Tensor)",
        "mask_step",
    ),
    "mask_sgd_": (
        f"(Tensor(a!)[] mask_logits, Tensor(b!)[] momentums, {_STEP}, float momentum, float dampening,"
        " float weight_decay, bool nesterov, bool maximize) -> (Tensor, Tensor)",
        "mask_step",
    ),
    "philox_": (
        "(Tensor(a!) out, str kind, int seed_lo, int seed_hi, int stream, int purpose, float scale) -> ()",
        "philox",
    ),
}


# Back ends


def triton_kernel(name: str) -> Callable[..., Any]:
    """The launcher of an op's Triton kernel, which has the op's own signature.

    Raises:
        ImportError: Triton or the kernels are not installed; the message says what to do. There is no silent fallback.
    """
    try:
        module = importlib.import_module(f"csmask_kernels.{SCHEMAS[name][1]}")
    except ImportError as error:
        raise ImportError(
            f"csmask's GPU kernel for {name} needs Triton >= 3.6 and csmask_kernels ({error}): pip install triton and "
            'install csmask again, or use CircuitConfig(execution="reference")'
        ) from error
    return getattr(module, name)


def gpu_back_end() -> str:
    """One line on the GPU back end: what it is, or why there is none."""
    try:
        triton_kernel("materialize")
        launch = importlib.import_module("csmask_kernels.launch")
    except ImportError as error:
        return f"none: {error}"
    if not torch.cuda.is_available():
        return "Triton kernels, for when there is a GPU"
    return f"Triton kernels for {launch.target_of(torch.empty(0, device='cuda')).family}"


def launch_configs() -> str:
    """One line on the launch configs in use: the table's file, or why there is none."""
    if not torch.cuda.is_available():
        return "none in use: no GPU"
    try:
        launch = importlib.import_module("csmask_kernels.launch")
    except ImportError as error:
        return f"none: {error}"
    target = launch.target_of(torch.empty(0, device="cuda"))
    path = launch.config_path(target)
    if path is None:
        return f"general ones: there is no table for {target.name} ({target.family})"
    whose = f"measured on {target.name}" if path.stem != target.family else f"of all {target.family}, not measured"
    return f"{path} ({whose})"


def _run_triton(name: str) -> Callable[..., Any]:
    find = functools.cache(triton_kernel)  # which keeps no failure

    def launch(*args: Any, **kwargs: Any) -> Any:
        return find(name)(*args, **kwargs)

    return launch


def _counting_writes(name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
    """``compute``; where it writes to its first arguments, autograd is told, which does not see kernels write."""
    count = SCHEMAS[name][0].count("!)")
    if not count:
        return compute

    def run(*args: Any, **kwargs: Any) -> Any:
        result = compute(*args, **kwargs)
        for written in args[:count]:
            tensors = [written] if isinstance(written, Tensor) else written
            torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
        return result

    return run


def _without_grad(compute: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return compute(*args, **kwargs)

    return run


_PLAIN_OPS = {**_plain.OPS, **_plain_step.OPS}
_CPU_OPS = {**_cpp.OPS, **_cpp_linear.OPS, **_cpp_step.OPS, **_cpp_units.OPS}
for _name, (_schema, _triton_file) in SCHEMAS.items():
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, _without_grad(_PLAIN_OPS[_name]), "CompositeExplicitAutograd")
    if _triton_file is not None:
        _LIBRARY.impl(_name, _counting_writes(_name, _run_triton(_name)), "CUDA")
    if _name in _CPU_OPS:
        _LIBRARY.impl(_name, _counting_writes(_name, _without_grad(_CPU_OPS[_name])), "CPU")


# Shapes, dtypes and layouts of the results: the same on every device


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"csmask::{name}")


def _scalar(like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty((), dtype=dtype)


@_fake("materialize")
def _materialize_fake(
    weight: Tensor,
    mask_logits: Tensor,
    _temperature: Tensor,
    _hard: bool,
    _scale: float,
    dtype: torch.dtype | None = None,
    counts: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty_like(weight, dtype=dtype or weight.dtype)
    return out, _l0_fake(weight, mask_logits), weight.new_empty(2 if counts else 0, dtype=torch.int64)


@_fake("materialize_")
def _materialize_in_place_fake(_out: Tensor, weight: Tensor, mask_logits: Tensor, *_mask: Any) -> Tensor:
    return _l0_fake(weight, mask_logits)


def _l0_fake(weight: Tensor, mask_logits: Tensor) -> Tensor:
    return weight.new_empty((), dtype=reference.compute_dtype(weight, mask_logits))


@_fake("mask_sums")
def _mask_sums_fake(
    mask_logits: Tensor,
    _temperature: Tensor,
    _hard: bool,
    _scale: float,
    _weights_per_logit: int,
    counts: bool = True,
) -> tuple[Tensor, Tensor]:
    return _l0_fake(mask_logits, mask_logits), mask_logits.new_empty(2 if counts else 0, dtype=torch.int64)


@_fake("logits_grad")
def _logits_grad_fake(_dmasked_weight: Tensor, _weight: Tensor, mask_logits: Tensor, *_mask: Any) -> Tensor:
    return torch.empty_like(mask_logits)


@_fake("masked_linear")
def _masked_linear_fake(x: Tensor, weight: Tensor, mask_logits: Tensor, *mask: Any) -> tuple[Tensor, Tensor]:
    transposed = mask[-1]
    return x.new_empty((x.shape[0], weight.shape[1 if transposed else 0])), _l0_fake(weight, mask_logits)


@_fake("masked_linear_dx")
def _masked_linear_dx_fake(dout: Tensor, weight: Tensor, *mask: Any) -> Tensor:
    transposed = mask[-1]
    return dout.new_empty((dout.shape[0], weight.shape[0 if transposed else 1]))


@_fake("masked_linear_dlogits")
def _masked_linear_dlogits_fake(_dout: Tensor, _x: Tensor, _weight: Tensor, mask_logits: Tensor, *_mask: Any) -> Tensor:
    return torch.empty_like(mask_logits)


@_fake("masked_linear_backward")
def _masked_linear_backward_fake(
    _dout: Tensor, x: Tensor, _weight: Tensor, mask_logits: Tensor, *_mask: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(mask_logits)


@_fake("masked_linear_backward_")
def _masked_linear_backward_in_place_fake(_dlogits: Tensor, _dout: Tensor, x: Tensor, *_mask: Any) -> Tensor:
    return x.new_empty(x.shape)


@_fake("masked_conv")
def _masked_conv_fake(
    x: Tensor, weight: Tensor, mask_logits: Tensor, _temperature: Tensor, _bias: Tensor | None, _hard: bool,
    _scale: float, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    walked = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in walked]
    out = x.new_empty((x.shape[0], weight.shape[0], *size))
    return out.contiguous(memory_format=_plain.conv_memory_format(x)), _l0_fake(weight, mask_logits)


@_fake("masked_conv_dx")
def _masked_conv_dx_fake(
    dout: Tensor, _weight: Tensor, _mask_logits: Tensor, _temperature: Tensor, input_size: Sequence[int], *_mask: Any
) -> Tensor:
    return dout.new_empty(list(input_size)).contiguous(memory_format=_plain.conv_memory_format(dout))


@_fake("masked_conv_dlogits")
def _masked_conv_dlogits_fake(_dout: Tensor, _x: Tensor, _weight: Tensor, mask_logits: Tensor, *_mask: Any) -> Tensor:
    return torch.empty_like(mask_logits)


@_fake("scale_neurons")
def _scale_neurons_fake(z: Tensor, *_mask: Any) -> Tensor:
    return torch.empty_like(z)


@_fake("scale_neurons_grad")
def _scale_neurons_grad_fake(_dout: Tensor, z: Tensor, mask_logits: Tensor, *_mask: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), torch.empty_like(mask_logits)


@_fake("pack_mask")
def _pack_mask_fake(mask_logits: Tensor) -> Tensor:
    return mask_logits.new_empty((mask_logits.numel() + 31) // 32, dtype=torch.int32)


@_fake("unpack_mask")
def _unpack_mask_fake(bits: Tensor, size: Sequence[int]) -> Tensor:
    return bits.new_empty(list(size), dtype=torch.bool)


@_fake("popcount")
def _popcount_fake(bits: Tensor) -> Tensor:
    return bits.new_empty((), dtype=torch.int64)


@_fake("apply_bitmask")
def _apply_bitmask_fake(weight: Tensor, _bits: Tensor, _scale: float, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(weight, dtype=dtype or weight.dtype)


@_fake("bitmask_linear")
def _bitmask_linear_fake(x: Tensor, weight: Tensor, *mask: Any) -> Tensor:
    transposed = mask[-1]
    return x.new_empty((x.shape[0], weight.shape[1 if transposed else 0]))


@_fake("bitmask_linear_dx")
def _bitmask_linear_dx_fake(dout: Tensor, weight: Tensor, *mask: Any) -> Tensor:
    return _masked_linear_dx_fake(dout, weight, *mask)


@_fake("mask_grad_norms")
def _mask_grad_norms_fake(mask_logits: Sequence[Tensor], *_waiting: Any) -> Tensor:
    return mask_logits[0].new_empty(len(mask_logits), dtype=torch.float32)


def _mask_step_fake(mask_logits: Sequence[Tensor], *_step: Any) -> tuple[Tensor, Tensor]:
    count = len(mask_logits)
    return mask_logits[0].new_empty(count), mask_logits[0].new_empty((count, 2), dtype=torch.int64)


for _name in ("mask_adamw_", "mask_sgd_"):
    torch.library.register_fake(f"csmask::{_name}", _mask_step_fake)
for _name in ("logits_grad_", "masked_linear_dlogits_", "masked_conv_dlogits_", "philox_"):
    torch.library.register_fake(f"csmask::{_name}", lambda *_args: None)
