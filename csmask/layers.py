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

from . import ablation, functional, reference


class MaskedLayer(nn.Module):
    """What all masked layers share; mixed in before the class of the layer that is masked, by ``mask_layer`` only.

    Attributes:
        mask_logits: parameter ``S``, fp32: the weight's shape, or ``(units,)`` for unit ``"neuron"``.
        bias_mask_logits: parameter, fp32, the bias's shape; None where the bias is not masked.
        temperature: 0-d fp32 buffer ``T``; multiplies the logits.
        use_masks: False to use the plain dense weights.
        ablation, ablation_seed: the ablation mode of evaluation and the seed of its draws.
    """

    # Dimension of the weight that counts output units (neurons, filters).
    unit_dim = 0

    _unmasked_class: type
    weight: nn.Parameter
    bias: nn.Parameter | None
    mask_logits: nn.Parameter
    bias_mask_logits: nn.Parameter | None
    temperature: Tensor
    mask_unit: str
    mask_scale: float
    execution: str
    layer_index: int
    use_masks: bool
    ablation: str
    ablation_seed: int

    @property
    def hard(self) -> bool:
        """Whether the weight mask now in use is the hard one: in evaluation, or while its logits are not trained."""
        return self.is_hard(self.mask_logits)

    def is_hard(self, logits: Tensor) -> bool:
        """Whether the mask that these logits give is the hard one; weight and bias logits can be frozen apart."""
        return not (self.training and logits.requires_grad)

    @property
    def all_hard(self) -> bool:
        """Whether no mask of this layer, weight or bias, is soft: what an ablation needs."""
        return self.hard and (self.bias_mask_logits is None or self.is_hard(self.bias_mask_logits))

    @property
    def circuit(self) -> Tensor:
        """Boolean ``S > 0``, shape of ``mask_logits``."""
        return self.mask_logits.detach() > 0

    @property
    def unit_logits(self) -> Tensor:
        """``mask_logits`` in the shape that broadcasts over the weight."""
        return self._broadcast(self.mask_logits)

    def _broadcast(self, entries: Tensor) -> Tensor:
        """Entries of the mask unit in the shape that broadcasts over the weight."""
        if self.mask_unit == "weight":
            return entries
        shape = [1] * self.weight.dim()
        shape[self.unit_dim] = -1
        return entries.view(shape)

    @property
    def maskable(self) -> int:
        """Number of weights (and masked bias terms) that the mask decides about."""
        return self.weight.numel() + (0 if self.bias_mask_logits is None else self.bias_mask_logits.numel())

    def kept(self) -> int:
        """Number of weights (and masked bias terms) in the circuit, whatever mode the layer is in."""
        per_logit = reference.weights_per_logit(self.weight, self.mask_logits)
        bias = 0 if self.bias_mask_logits is None else int((self.bias_mask_logits > 0).sum())
        return int(self.circuit.sum()) * per_logit + bias

    def undecided(self, bound: float = 4.0) -> int:
        """Number of weights (and masked bias terms) with ``|T * S| < bound``: their soft mask is neither 0 nor 1."""
        per_logit = reference.weights_per_logit(self.weight, self.mask_logits)
        count = int(((self.temperature * self.mask_logits.detach()).abs() < bound).sum()) * per_logit
        if self.bias_mask_logits is not None:
            count += int(((self.temperature * self.bias_mask_logits.detach()).abs() < bound).sum())
        return count

    def l0(self) -> Tensor:
        """Sum of the mask now in use, counted in weights: 0-d fp32, differentiable while the mask is soft."""
        per_logit = reference.weights_per_logit(self.weight, self.mask_logits)
        l0 = functional.l0(self._in_use(self.mask_logits), self.temperature, self.hard, self.mask_scale, per_logit)
        if self.bias_mask_logits is not None:
            logits, hard = self._in_use(self.bias_mask_logits), self.is_hard(self.bias_mask_logits)
            l0 = l0 + functional.l0(logits, self.temperature, hard, self.mask_scale)
        return l0

    def _in_use(self, logits: Tensor) -> Tensor:
        """The logits as forward takes them: a hard mask has no gradient, so evaluation need build no graph."""
        return logits.detach() if self.is_hard(logits) else logits

    @property
    def ops(self) -> Any:
        """The module whose operations this layer runs: ``functional``, or ``reference`` in plain torch."""
        if self.execution == "reference" or (self.execution == "auto" and self.weight.is_cuda):
            return reference
        return functional

    def mask_arguments(self) -> dict[str, Any]:
        """What every masked operation takes besides its input and geometry."""
        return {
            "weight": self.weight,
            "mask_logits": self._broadcast(self._in_use(self.mask_logits)),
            "temperature": self.temperature,
            "bias": self.masked_bias(),
            "hard": self.hard,
            "scale": self.mask_scale,
        }

    def masked_bias(self) -> Tensor | None:
        """The bias that the layer adds: masked where the layer masks biases."""
        if self.bias is None or self.bias_mask_logits is None:
            return self.bias
        logits, hard = self._in_use(self.bias_mask_logits), self.is_hard(self.bias_mask_logits)
        return self.ops.materialize(self.bias, logits, self.temperature, hard, self.mask_scale)[0]

    def hard_masked_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias under the hard mask: the numbers that evaluation uses."""
        weight, bias = self.weight, self.bias
        weight, _ = self.ops.materialize(weight, self.unit_logits, self.temperature, True, self.mask_scale)
        if bias is not None and self.bias_mask_logits is not None:
            bias, _ = self.ops.materialize(bias, self.bias_mask_logits, self.temperature, True, self.mask_scale)
        return weight, bias

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002, the argument's name in torch.nn
        if not self.use_masks:
            return super().forward(input)
        if self.ablation == "none":
            return self._masked_forward(input)
        if not self.all_hard:
            raise ValueError(
                f"ablation {self.ablation!r} needs hard masks, but the masks are in training: call .eval() first, "
                "or set_ablate_mode('none')"
            )
        weight, bias = self.ablated_parameters()
        return self._plain_forward(input, weight, bias)

    def _masked_forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _plain_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def ablated_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias under the layer's ablation mode; draws are kept until the mode, seed or circuit changes."""
        weight = self._ablate(self.weight, self.circuit, "weight")
        if self.bias is None or self.bias_mask_logits is None:
            return weight, self.bias
        return weight, self._ablate(self.bias, self.bias_mask_logits.detach() > 0, "bias")

    def _ablate(self, param: Tensor, circuit: Tensor, which: str) -> Tensor:
        key = (self.ablation, self.ablation_seed, self.layer_index, param.dtype)
        cached = self._ablation_cache.get(which)
        # The circuit is compared by content: no way of changing the logits can leave an old draw in use.
        if cached is None or cached[0] != key or not torch.equal(cached[1], circuit):
            stream = 2 * self.layer_index + (which == "bias")
            # Draws outlive this forward: made under inference_mode, they would fail in a later one with gradients.
            with torch.inference_mode(False), torch.no_grad():
                circuit = circuit.clone()
                kept = ablation.kept_entries(self.ablation, circuit, self.ablation_seed, stream)
                values = None
                if self.ablation == "random_ablate":
                    values = ablation.random_values(param.detach(), self.fan_in, self.ablation_seed, stream)
            cached = self._ablation_cache[which] = (key, circuit, kept, values)
        kept = self._broadcast(cached[2]) if which == "weight" else cached[2]
        return torch.where(kept, param, torch.zeros_like(param) if cached[3] is None else cached[3])

    @property
    def fan_in(self) -> int | None:
        """Inputs per output unit, for the initialisation's bound."""
        return math.prod(self.weight.shape[1:])

    def check_complement(self, name: str) -> None:
        """Raise if the circuit of this layer is larger than the complement that a control is drawn from."""
        ablation.check_complement(self.circuit, f" in {name}")
        if self.bias_mask_logits is not None:
            ablation.check_complement(self.bias_mask_logits.detach() > 0, f" in {name}.bias")

    def clear_ablation_cache(self) -> None:
        """Drop drawn masks and values."""
        self._ablation_cache: dict[str, tuple] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """``.to(dtype)``, ``.half()`` ... move the logits but never lower their dtype: bf16 loses small updates."""
        own = [self.mask_logits, self.bias_mask_logits, self.temperature]
        own += [p.grad for p in own if p is not None]
        keep = {id(t) for t in own if t is not None}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in keep and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        self.clear_ablation_cache()
        return super()._apply(move, recurse)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The masked class of a user's subclass is made at run time: rebuild it from the class that it masks.
        state = dict(self.__dict__, _ablation_cache={})
        return _rebuild, (self._unmasked_class,), state

    def extra_repr(self) -> str:
        masked = f"mask_unit={self.mask_unit!r}"
        if self.bias_mask_logits is not None:
            masked += ", mask_bias=True"
        return ", ".join(filter(None, [super().extra_repr(), masked]))


class MaskedLinear(MaskedLayer):
    """A masked ``torch.nn.Linear``: weight ``(out, in)``."""

    def _masked_forward(self, x: Tensor) -> Tensor:
        return self.ops.masked_linear(x, **self.mask_arguments())

    def _plain_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return reference.apply_linear(x, weight, bias, transposed=False)


class MaskedConv1D(MaskedLayer):
    """A masked ``transformers.pytorch_utils.Conv1D`` (GPT-2's linear layer): weight ``(in, out)``."""

    unit_dim = 1
    fan_in = None

    def forward(self, x: Tensor) -> Tensor:  # the argument's name is the masked layer's own, as in the other types
        return super().forward(x)

    def _masked_forward(self, x: Tensor) -> Tensor:
        return self.ops.masked_linear(x, transposed=True, **self.mask_arguments())

    def _plain_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return reference.apply_linear(x, weight, bias, transposed=True)


class _MaskedConv(MaskedLayer):
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def _masked_forward(self, x: Tensor) -> Tensor:
        return self.ops.masked_conv(
            x,
            **self.mask_arguments(),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,
        )

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
# By name: transformers need not be imported to mask models that do not use it.
_GPT2_CONV1D = ("transformers.pytorch_utils", "Conv1D")


def maskable_type(cls: type) -> tuple[type, type[MaskedLayer]] | None:
    """``(layer type, masked type)`` for a type that can be masked or a subclass of one; None for any other."""
    for base in cls.__mro__:
        if base in _MASKED_TYPES:
            return base, _MASKED_TYPES[base]
        if (base.__module__, base.__qualname__) == _GPT2_CONV1D:
            return base, MaskedConv1D
    return None


def keeps_forward(cls: type) -> bool:
    """Whether a maskable type or subclass computes what the type itself computes: no part of forward is overridden."""
    found = maskable_type(cls)
    parts = ("forward", "_conv_forward", "__call__")
    return found is not None and all(getattr(cls, p, None) is getattr(found[0], p, None) for p in parts)


@functools.cache
def masked_class(cls: type) -> type[MaskedLayer]:
    """The masked subclass of ``cls``, a maskable type or a subclass of one."""
    found = maskable_type(cls)
    if found is None:
        raise TypeError(f"{cls.__name__} cannot be masked")
    return type(f"Masked{cls.__name__}", (found[1], cls), {"_unmasked_class": cls, "__module__": __name__})


def _rebuild(cls: type) -> MaskedLayer:
    """An empty masked layer of a class, for copy and pickle, which then set its state."""
    masked = masked_class(cls)
    return masked.__new__(masked)


def mask_shapes(module: Any, mask_unit: str, mask_bias: bool) -> dict[str, torch.Size]:
    """Shapes of the parameters that ``mask_layer`` would add to a layer, by name."""
    unit_dim = masked_class(type(module)).unit_dim  # type: ignore[arg-type]
    shape = module.weight.shape
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
) -> MaskedLayer:
    """Mask one layer in place and return it.

    Args:
        module: an ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d``, transformers ``Conv1D``, or a subclass that keeps its
            forward. Its parameters stay the objects they are; the logits are made on the weight's device.
        mask_unit, mask_bias, mask_init_value, rescale, execution: as in ``CircuitConfig``. A layer without a bias has
            none to mask.
        layer_index: which random stream the layer's ablations draw from.

    Raises:
        TypeError: not a layer that can be masked.
        ValueError: already masked.
    """
    if isinstance(module, MaskedLayer):
        raise ValueError("the layer is masked already")
    masked = masked_class(type(module))  # type: ignore[arg-type]
    shapes = mask_shapes(module, mask_unit, mask_bias)
    device = module.weight.device

    def logits(shape: torch.Size) -> nn.Parameter:
        return nn.Parameter(torch.full(shape, mask_init_value, dtype=torch.float32, device=device))

    mask_logits = logits(shapes["mask_logits"])
    bias_mask_logits = logits(shapes["bias_mask_logits"]) if "bias_mask_logits" in shapes else None
    module.__class__ = masked
    module.mask_unit = mask_unit
    module.mask_scale = 1 + math.exp(-mask_init_value) if rescale else 1.0  # 1 / sigmoid(mask_init_value)
    module.execution = execution
    module.layer_index = layer_index
    module.use_masks = True
    module.ablation, module.ablation_seed = "none", 0
    module.clear_ablation_cache()
    module.register_parameter("mask_logits", mask_logits)
    module.register_parameter("bias_mask_logits", bias_mask_logits)
    module.register_buffer("temperature", torch.ones((), dtype=torch.float32, device=device))
    return module


def unmask_layer(module: Any) -> nn.Module:
    """Undo ``mask_layer``, even one that was cut short: the layer has its own class again, and no logits."""
    for name in ("mask_logits", "bias_mask_logits"):
        module._parameters.pop(name, None)
    module._buffers.pop("temperature", None)
    for name in _OWN_ATTRIBUTES:
        vars(module).pop(name, None)
    module.__class__ = module._unmasked_class
    return module


_SETTINGS = ("mask_unit", "mask_scale", "execution", "layer_index")
_OWN_ATTRIBUTES = (*_SETTINGS, "use_masks", "ablation", "ablation_seed", "_ablation_cache")


def taken_attribute(module: nn.Module) -> str | None:
    """A name that a masked layer needs for itself and the layer has already, if there is one."""
    own = {"mask_logits", "bias_mask_logits", "temperature", *_OWN_ATTRIBUTES, *vars(MaskedLayer)} - set(dir(nn.Module))
    return next((name for name in sorted(own) if hasattr(module, name)), None)
