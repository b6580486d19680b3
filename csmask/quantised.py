"""Quantised base weights: how a masked layer gets at the numbers of a weight that is stored in 8 or 4 bits.

The layers are torchao's (an ``nn.Linear`` whose weight is a tensor subclass) and bitsandbytes' (``Linear4bit``,
``Linear8bitLt``). Neither library is imported here: one that made a layer is there already. A ``Format`` says how the
weight of a layer is dequantised; a ``QuantisedWeight`` is what masked operations take in place of a dense weight, and
is dense only while one of them runs.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class QuantisedWeight:
    """The weight of a quantised layer: its shape, dtype and device, and the numbers whenever they are asked for.

    Args:
        source: the layer's parameter.
        shape: ``(out, in)``, whatever the shape that it is stored in.
        dtype: of the dequantised weight.
        dequantise: gives the weight in any float dtype.
    """

    requires_grad = False

    def __init__(self, source: Tensor, shape: torch.Size, dtype: torch.dtype, dequantise: Callable[[], Tensor]) -> None:
        self.source, self.shape, self.dtype, self._dequantise = source, shape, dtype, dequantise
        self.device, self.is_meta = source.device, source.is_meta

    def is_like(self, other: Any) -> bool:
        """Whether another one gives the same numbers."""
        same = isinstance(other, QuantisedWeight) and other.source is self.source
        return same and (other.dtype, other.device) == (self.dtype, self.device)

    def stride(self) -> tuple[int, ...]:
        return self.shape[1], 1

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()

    def element_size(self) -> int:
        return self.dtype.itemsize

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The dequantised weight, rounded to ``dtype``: new memory, the caller's own."""
        return self._dequantise().detach().to(self.dtype).contiguous()


def dense(weight: Tensor | QuantisedWeight) -> Tensor:
    """The weight as a tensor, made now where it is quantised."""
    return weight.dense() if isinstance(weight, QuantisedWeight) else weight


def empty_like(weight: Tensor | QuantisedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a dense tensor of the weight's shape and device."""
    if isinstance(weight, QuantisedWeight):
        return torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device)
    return torch.empty_like(weight, dtype=dtype)


class Format:
    """How one kind of quantised linear layer stores its weight.

    Attributes:
        casts: whether the layer takes input of any float dtype, computes in ``dtype`` and casts its output back.
    """

    casts = True

    def refusal(self, layer: Any) -> str | None:
        """Why this layer cannot be masked; None if it can."""
        raise NotImplementedError

    def name(self, layer: Any) -> str:
        """What the weight is stored as, for the fingerprint of a base."""
        raise NotImplementedError

    def shape(self, layer: Any) -> torch.Size:
        """``(out, in)``."""
        return torch.Size((layer.out_features, layer.in_features))

    def dtype(self, layer: Any, x_dtype: torch.dtype) -> torch.dtype:
        """What the layer computes in on input of a dtype."""
        raise NotImplementedError

    def dequantiser(self, layer: Any) -> Callable[[], Tensor]:
        """What gives the dense weight ``(out, in)``; holds the stored tensors, not the layer."""
        raise NotImplementedError

    def stored(self, layer: Any) -> dict[str, Tensor]:
        """The plain tensors that the weight is stored in, by name."""
        raise NotImplementedError

    def become_dense(self, layer: Any) -> None:
        """Make an unmasked layer, whose weight has been replaced by a dense one, a plain layer."""
        raise NotImplementedError


class TorchAO(Format):
    """An ``nn.Linear`` whose weight is one of torchao's tensors: int8, int4 in int8, float8, NF4 ..."""

    casts = False  # as nn.Linear

    def refusal(self, layer: Any) -> str | None:
        weight, kind = layer.weight, type(layer.weight).__name__
        settings = ("act_quant_kwargs", "act_quant_scale", "act_pre_scale", "activation_quantization")
        if any(getattr(weight, name, None) is not None for name in settings):
            return (
                f"its {kind} quantises the layer's input as well, which a mask over the dequantised weight would leave "
                "out: quantise weights only (Int8WeightOnlyConfig, IntxWeightOnlyConfig ...)"
            )
        if self._reader(weight) is None:
            return f"torchao's {kind} cannot be dequantised: use a config whose weights can (Int8WeightOnlyConfig ...)"
        return None

    def name(self, layer: Any) -> str:
        return f"torchao {type(layer.weight).__name__} {str(layer.weight.dtype).removeprefix('torch.')}"

    def dtype(self, layer: Any, x_dtype: torch.dtype) -> torch.dtype:
        # Some of torchao's tensors keep their dtype when a model is moved to another one, and take input of that.
        return layer.weight.dtype if torch.is_autocast_enabled(layer.weight.device.type) else x_dtype

    def dequantiser(self, layer: Any) -> Callable[[], Tensor]:
        reader = self._reader(layer.weight)
        assert reader is not None
        return reader

    def stored(self, layer: Any) -> dict[str, Tensor]:
        return dict(_flatten(layer.weight))

    def become_dense(self, layer: Any) -> None:
        vars(layer).pop("extra_repr", None)  # which shows the quantised weight

    @staticmethod
    def _reader(weight: Any) -> Callable[[], Tensor] | None:
        if hasattr(weight, "get_original_weight"):  # NF4, whose dequantize is another function
            return weight.get_original_weight
        own = getattr(type(weight), "dequantize", None)
        return None if own is None or own is Tensor.dequantize else weight.dequantize


class BitsAndBytes4(Format):
    """bitsandbytes' ``Linear4bit``: nf4 or fp4, two weights in a byte, the scales quantised again or not."""

    def refusal(self, layer: Any) -> str | None:
        state = self._state(layer)
        if state is None:
            return "its weight has not been quantised yet: move the model to its device first"
        if getattr(state, "packing_format_for_cpu", False):
            return (
                "an evaluation on this CPU has repacked its weight, with scales rounded to bfloat16: load the model "
                "again and mask it before the first forward"
            )
        if tuple(state.shape) != tuple(self.shape(layer)):
            expected = tuple(self.shape(layer))
            return f"its weight must have been quantised as (out, in) = {expected}, got {tuple(state.shape)}"
        return None

    def name(self, layer: Any) -> str:
        return f"bitsandbytes {self._state(layer).quant_type}"

    def dtype(self, layer: Any, x_dtype: torch.dtype) -> torch.dtype:
        return layer.compute_dtype or x_dtype

    def dequantiser(self, layer: Any) -> Callable[[], Tensor]:
        function = sys.modules["bitsandbytes"].functional.dequantize_4bit
        return functools.partial(function, layer.weight.data, self._state(layer))

    def stored(self, layer: Any) -> dict[str, Tensor]:
        return {"weight": layer.weight.data, **self._state(layer).as_dict(packed=True)}

    def become_dense(self, layer: Any) -> None:
        _become_linear(layer)

    @staticmethod
    def _state(layer: Any) -> Any:
        return getattr(layer.weight, "quant_state", None) or layer.quant_state


class BitsAndBytes8(Format):
    """bitsandbytes' ``Linear8bitLt``: int8 with a scale for each output; masked, its input is not quantised."""

    def refusal(self, layer: Any) -> str | None:
        if layer.state.has_fp16_weights:
            return "its weight is kept in 16 bits and quantised at each use: build it with has_fp16_weights=False"
        if layer.weight.dtype != torch.int8 or self._stored(layer)[1] is None:
            return "its weight has not been quantised yet: move the model to its device first"
        return None

    def name(self, layer: Any) -> str:  # noqa: ARG002, they are all alike
        return "bitsandbytes int8"

    def dtype(self, layer: Any, x_dtype: torch.dtype) -> torch.dtype:  # noqa: ARG002, as the layer's own forward
        return x_dtype

    def dequantiser(self, layer: Any) -> Callable[[], Tensor]:
        function = sys.modules["bitsandbytes"].functional.int8_vectorwise_dequant
        return functools.partial(function, *self._stored(layer))

    def stored(self, layer: Any) -> dict[str, Tensor]:
        return dict(zip(("weight", "SCB"), self._stored(layer), strict=True))

    def become_dense(self, layer: Any) -> None:
        _become_linear(layer)

    @staticmethod
    def _stored(layer: Any) -> tuple[Tensor, Any]:
        """Weight and scales; the scales move from the weight to the layer's state at its first forward."""
        scales = getattr(layer.weight, "SCB", None)
        return layer.weight.data, layer.state.SCB if scales is None else scales


def format_of(layer: Any) -> Format | None:
    """The format of a layer's weight; None where it is not quantised, or in a way that csmask does not know."""
    weight: Any = layer._parameters.get("weight") if isinstance(layer, nn.Module) else None
    return None if weight is None else _format_of(type(layer), type(weight))  # type: ignore[arg-type]


@functools.cache
def _format_of(layer_type: type, weight_type: type) -> Format | None:
    names = {(base.__module__.split(".")[0], base.__qualname__) for base in layer_type.__mro__}
    if ("bitsandbytes", "Linear4bit") in names:
        return BitsAndBytes4()
    if ("bitsandbytes", "Linear8bitLt") in names:
        return BitsAndBytes8()
    if issubclass(layer_type, nn.Linear) and is_torchao(weight_type):
        return TorchAO()
    return None


def is_torchao(tensor_type: type) -> bool:
    """Whether these are quantised tensors of torchao."""
    return any(base.__module__.split(".")[0] == "torchao" for base in tensor_type.__mro__)


def weight_of(layer: Any, x_dtype: torch.dtype) -> QuantisedWeight:
    """The weight of a quantised layer for input of a dtype."""
    kind = format_of(layer)
    assert kind is not None
    return QuantisedWeight(layer.weight, kind.shape(layer), kind.dtype(layer, x_dtype), kind.dequantiser(layer))


def shape_of(layer: Any) -> torch.Size:
    """The shape of a layer's weight as operations see it, quantised or not."""
    kind = format_of(layer)
    return layer.weight.shape if kind is None else kind.shape(layer)


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensor itself, or those that a quantised one of torchao's consists of."""
    return [part for _, part in _flatten(tensor)] if is_torchao(type(tensor)) else [tensor]


def _flatten(tensor: Any, name: str = "weight") -> Iterator[tuple[str, Tensor]]:
    if not is_torchao(type(tensor)):
        yield name, tensor
        return
    for inner in tensor.__tensor_flatten__()[0]:
        yield from _flatten(getattr(tensor, inner), f"{name}.{inner}")


def _become_linear(layer: Any) -> None:
    plain = vars(nn.Linear(1, 1, device="meta"))
    for name in set(vars(layer)) - set(plain):
        vars(layer).pop(name)
    for key, hook in list(layer._load_state_dict_pre_hooks.items()):
        if getattr(getattr(hook, "hook", hook), "__module__", "").startswith("bitsandbytes"):
            del layer._load_state_dict_pre_hooks[key]
    layer.__class__ = nn.Linear
