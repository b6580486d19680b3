"""Masked layers: a masked layer *is* the layer it was, with mask logits added and its forward replaced.

``mask_layer`` turns a module into a masked one in place, by giving it a masked subclass of its own class. Everything
that holds the module goes on holding it: parents under any name, hooks, tied weights, attributes of user-made
subclasses. ``unmask_layer`` is the inverse.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import functional, quantised, reference
from .forward_hooks import change_class
from .layer_masks import L0Record
from .leaf_linear import leaf_linear
from .masked_layer import _LAYERS, MaskedLayer, check_execution
from .masked_leaf import MaskedLeaf
from .masked_weight import MaskedWeight
from .shards import is_sharded


class MaskedLinear(MaskedLayer):
    """A masked ``torch.nn.Linear``: weight ``(out, in)``."""

    transposed = False

    def _masked_op(self, x: Tensor, **arguments: Any) -> Any:
        if self.hard and self.execution == "in_kernel" and self._can_pack():
            return self._bitmask_forward(x, arguments["bias"]), None
        return self.ops.masked_linear(x, transposed=self.transposed, **arguments)

    def _can_pack(self) -> bool:
        keeps = self.masked_weight.keep == "always" and not torch.compiler.is_compiling()
        return keeps and self.mask_unit == "weight" and not self.weight.requires_grad and not is_sharded(self.weight)

    def _bitmask_forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Evaluation in 1/8 byte per weight, not 4: the hard mask is packed, anew when the logits have changed."""
        bits = self.masked_weight.get_bits(self.mask_logits)
        scale, transposed = self.mask_scale, self.transposed
        return functional.bitmask_linear(x, self.weight, bits, bias, scale=scale, transposed=transposed)

    def _plain_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return reference.apply_linear(x, weight, bias, self.transposed)

    def _leaf_forward(self, x: Tensor, masked_weight: Tensor, bias: Tensor | None) -> Tensor:
        autocast = torch.is_autocast_enabled(x.device.type)
        if (
            torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()  # which know nothing of what waits elsewhere
            or not torch.is_grad_enabled()
            or (x.dtype != masked_weight.dtype and not autocast)
        ):
            return self._plain_forward(x, masked_weight, bias)
        assert self.leaf is not None
        return leaf_linear(x.to(masked_weight.dtype), masked_weight, bias, self.leaf, self.transposed)


class MaskedConv1D(MaskedLinear):
    """A masked ``transformers.pytorch_utils.Conv1D`` (GPT-2's linear layer): weight ``(in, out)``."""

    unit_dim = 1
    transposed = True
    fan_in = None

    def forward(self, x: Tensor) -> Tensor:  # the argument's name is the masked layer's own, as in the other types
        return super().forward(x)


class MaskedQuantisedLinear(MaskedLinear):
    """A masked linear layer whose weight is stored in 8 or 4 bits: each operation dequantises, masks and uses it.

    The numbers are those of a plain linear layer that has the dequantised weight. Between two operations there is
    nothing dense of the weight's size, and autograd saves none: backward dequantises once more. So no masked weight is
    kept, and an optimizer's step makes none ahead.
    """

    waits_lean_only = True

    def base_weight(self, dtype: torch.dtype | None = None) -> Any:
        return quantised.weight_of(self, torch.get_default_dtype() if dtype is None else dtype)

    def mask_arguments(self, x: Tensor) -> dict[str, Any]:
        arguments = super().mask_arguments(x)
        if self.ops is reference:
            arguments["weight"] = quantised.dense(arguments["weight"])
        else:
            arguments["kept"] = None
        return arguments

    def _can_pack(self) -> bool:
        return False

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())  # torch.nn calls it ``input``, bitsandbytes ``x``
        kind = quantised.format_of(self)
        if not self.use_masks or kind is None or not kind.casts:
            return super().forward(x)
        return super().forward(x.to(kind.dtype(self, x.dtype))).to(x.dtype)

    def _masked_op(self, x: Tensor, **arguments: Any) -> Any:
        return super()._masked_op(x, **{**arguments, "bias": self._bias_for(x, arguments["bias"])})

    def _plain_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._plain_forward(x, weight, self._bias_for(x, bias))

    def _bias_for(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        kind = quantised.format_of(self)
        return bias.to(x.dtype) if bias is not None and kind is not None and kind.casts else bias

    def _weight_for(self, leaf: MaskedLeaf, x: Tensor) -> Any:
        weight = self.base_weight(x.dtype)
        return leaf.weight if weight.is_like(leaf.weight) else weight

    def ablated_parameters(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
        try:
            return super().ablated_parameters(dtype)
        finally:
            self.clear_ablation_cache()  # as large as the weight


class _MaskedConv(MaskedLayer):
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    stride: tuple[int, ...]
    groups: int

    def resolve_execution(self, x: Tensor) -> str:
        # Grouped convolutions have no kernel with the mask inside.
        return "per_forward" if self.groups > 1 else super().resolve_execution(x)

    def _masked_op(self, x: Tensor, **arguments: Any) -> Any:
        return self.ops.masked_conv(
            x,
            **arguments,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,
        )

    def _rows(self, x: Tensor) -> int:
        # Positions of the input over the strides: the output's, but for its edges.
        dims = self.weight.dim() - 2
        batch = x.shape[0] if x.dim() == dims + 2 else 1
        return batch * math.prod(x.shape[-dims:]) // math.prod(self.stride)

    def _plain_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class MaskedConv1d(_MaskedConv):
    """A masked ``torch.nn.Conv1d``: weight ``(out, in / groups, kernel)``."""


class MaskedConv2d(_MaskedConv):
    """A masked ``torch.nn.Conv2d``: weight ``(out, in / groups, *kernel)``; a neuron is a filter."""


_MASKED_TYPES: dict[type, type[MaskedLayer]] = {
    nn.Linear: MaskedLinear,
    nn.Conv1d: MaskedConv1d,
    nn.Conv2d: MaskedConv2d,
}
# By name: the libraries need not be imported to mask models that do not use them.
_MASKED_NAMES: dict[tuple[str, str], type[MaskedLayer]] = {
    ("transformers.pytorch_utils", "Conv1D"): MaskedConv1D,
    ("bitsandbytes.nn.modules", "Linear4bit"): MaskedQuantisedLinear,
    ("bitsandbytes.nn.modules", "Linear8bitLt"): MaskedQuantisedLinear,
}


def maskable_type(cls: type) -> tuple[type, type[MaskedLayer]] | None:
    """``(layer type, masked type)`` for a type that can be masked or a subclass of one; None for any other."""
    for base in cls.__mro__:
        if base in _MASKED_TYPES:
            return base, _MASKED_TYPES[base]
        if (base.__module__, base.__qualname__) in _MASKED_NAMES:
            return base, _MASKED_NAMES[base.__module__, base.__qualname__]
    return None


def keeps_forward(cls: type) -> bool:
    """Whether a maskable type or subclass computes what the type itself computes: no part of forward is overridden."""
    found = maskable_type(cls)
    parts = ("forward", "_conv_forward", "__call__")
    return found is not None and all(getattr(cls, p, None) is getattr(found[0], p, None) for p in parts)


@functools.cache
def masked_class(cls: type, is_quantised: bool = False) -> type[MaskedLayer]:
    """The masked subclass of ``cls``, a maskable type or a subclass of one, for a weight that is quantised or not."""
    found = maskable_type(cls)
    if found is None:
        raise TypeError(f"{cls.__name__} cannot be masked")
    kind = MaskedQuantisedLinear if is_quantised else found[1]
    rebuild = _rebuild_quantised if is_quantised else _rebuild
    own: dict[str, Any] = {"_unmasked_class": cls, "_rebuild": staticmethod(rebuild), "__module__": __name__}
    if issubclass(kind, MaskedQuantisedLinear):
        # When to dequantise is none of a compiled graph's business. Not a decorator: that would load the compiler.
        own["forward"] = torch.compiler.disable(kind.forward)
    return type(f"Masked{cls.__name__}", (kind, cls), own)


def _rebuild_quantised(cls: type) -> MaskedLayer:
    return _rebuild(cls, True)


def _rebuild(cls: type, is_quantised: bool = False) -> MaskedLayer:
    """An empty masked layer of a class, for copy and pickle, which then set its state."""
    masked = masked_class(cls, is_quantised)
    layer = masked.__new__(masked)
    _LAYERS.add(layer)
    return layer


def mask_shapes(module: Any, mask_unit: str, mask_bias: bool) -> dict[str, torch.Size]:
    """Shapes of the parameters that ``mask_layer`` would add to a layer, by name."""
    unit_dim = masked_class(type(module)).unit_dim  # type: ignore[arg-type]
    shape = quantised.shape_of(module)
    shapes = {"mask_logits": shape if mask_unit == "weight" else shape[unit_dim : unit_dim + 1]}
    if mask_bias and module.bias is not None:
        shapes["bias_mask_logits"] = module.bias.shape
    return shapes


def mask_layer(
    module: Any,
    *,
    mask_unit: str = "weight",
    mask_bias: bool = False,
    mask_init_value: float = 0.0,
    rescale: bool = False,
    execution: str = "auto",
    layer_index: int = 0,
    layer_name: str = "",
) -> MaskedLayer:
    """Mask one layer in place and return it.

    Args:
        module: an ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d``, transformers ``Conv1D``, or a subclass that keeps its
            forward; a linear layer that torchao or bitsandbytes has quantised. Its parameters stay the objects they
            are; the logits are made on the weight's device.
        mask_unit, mask_bias, mask_init_value, rescale, execution: as in ``CircuitConfig``. A layer without a bias has
            none to mask.
        layer_index: which random stream the layer's ablations draw from.
        layer_name: what messages call it.

    Raises:
        TypeError: not a layer that can be masked.
        ValueError: already masked.
    """
    if isinstance(module, MaskedLayer):
        raise ValueError("the layer is masked already")
    is_quantised = quantised.format_of(module) is not None
    masked = masked_class(type(module), is_quantised)  # type: ignore[arg-type]
    check_execution(execution)
    shapes = mask_shapes(module, mask_unit, mask_bias)
    device = module.weight.device

    def logits(shape: torch.Size) -> nn.Parameter:
        return nn.Parameter(torch.full(shape, mask_init_value, dtype=torch.float32, device=device))

    mask_logits = logits(shapes["mask_logits"])
    bias_mask_logits = logits(shapes["bias_mask_logits"]) if "bias_mask_logits" in shapes else None
    change_class(module, masked)
    module.mask_unit = mask_unit
    module.mask_init_value = mask_init_value
    module.mask_scale = 1 + math.exp(-mask_init_value) if rescale else 1.0  # 1 / sigmoid(mask_init_value)
    module.masked_weight = MaskedWeight("never" if is_quantised else "training")
    module.leaf = None
    module.execution = execution
    module.accumulate_in_kernel = False
    module.l0_record = L0Record()
    module.layer_index, module.layer_name = layer_index, layer_name
    module.use_masks = True
    module.ablation, module.ablation_seed = "none", 0
    module.clear_ablation_cache()
    module.register_parameter("mask_logits", mask_logits)
    module.register_parameter("bias_mask_logits", bias_mask_logits)
    _LAYERS.add(module)
    module.register_buffer("temperature", torch.ones((), dtype=torch.float32, device=device))
    return module


def unmask_layer(module: Any) -> nn.Module:
    """Undo ``mask_layer``, even one that was cut short: the layer has its own class again, and no logits."""
    leaf = getattr(module, "leaf", None)
    if leaf is not None:
        leaf.release()
    _LAYERS.discard(module)
    for name in ("mask_logits", "bias_mask_logits"):
        module._parameters.pop(name, None)
    module._buffers.pop("temperature", None)
    for name in _OWN_ATTRIBUTES:
        vars(module).pop(name, None)
    change_class(module, module._unmasked_class)
    return module


_SETTINGS = (
    "mask_unit", "mask_init_value", "mask_scale", "_execution", "layer_index", "layer_name", "accumulate_in_kernel"
)  # fmt: skip
_STATE = ("use_masks", "ablation", "ablation_seed", "_ablation_cache", "masked_weight", "l0_record", "leaf")
_OWN_ATTRIBUTES = (*_SETTINGS, *_STATE)


def taken_attribute(module: nn.Module) -> str | None:
    """A name that a masked layer needs for itself and the layer has already, if there is one."""
    own = {"mask_logits", "bias_mask_logits", "temperature", *_OWN_ATTRIBUTES, *dir(MaskedLayer)} - set(dir(nn.Module))
    return next((name for name in sorted(own) if hasattr(module, name)), None)
