"""``MaskedLayer``: what all masked layers share, from choosing the execution to ablation."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import cost, functional, reference, shards
from .ablated_weights import AblatedWeights
from .autograd import KeptMaskedWeight
from .config import EXECUTIONS
from .layer_masks import L0Record
from .lean import LeanLeaf
from .mask_sum import late_sum
from .masked_leaf import MaskedLeaf
from .masked_weight import MaskedWeight
from .quantised import dense
from .sharded_op import GatherAhead, ShardedUse
from .shards import over_shards

# Every masked layer there is: an optimizer is given logits, and asks which layers they belong to.
_LAYERS: weakref.WeakSet[MaskedLayer] = weakref.WeakSet()


def layers_of(params: Iterable[Tensor]) -> list[MaskedLayer]:
    """The layers whose weight logits are among the parameters, in the parameters' order."""
    by_logits = {id(getattr(layer, "mask_logits", None)): layer for layer in _LAYERS}
    return [by_logits[id(param)] for param in params if id(param) in by_logits]


def check_numbers(name: str, mask_logits: Tensor) -> None:
    """Raise a ``ValueError`` that names the logits if they hold NaN; infinite ones are masks decided for good."""
    if over_shards(mask_logits.detach(), lambda s: torch.isnan(s).any().int()):
        raise ValueError(
            f"{name} holds NaN: the training diverged, or a batch held NaN; go back to a checkpoint, and lower the "
            "learning rate or look at the batches"
        )


def check_execution(execution: str) -> str:
    """The execution, if this version has one of that name."""
    if execution not in EXECUTIONS:
        raise ValueError(f"execution must be one of {', '.join(map(repr, EXECUTIONS))}, got {execution!r}")
    return execution


class MaskedLayer(AblatedWeights):
    """What all masked layers share; mixed in before the class of the layer that is masked, by ``mask_layer`` only.

    Attributes:
        mask_logits: parameter ``S``, fp32: the weight's shape, or ``(units,)`` for unit ``"neuron"``.
        bias_mask_logits: parameter, fp32, the bias's shape; None where the bias is not masked.
        temperature: 0-d fp32 buffer ``T``; multiplies the logits.
        use_masks: False to use the plain dense weights.
        ablation, ablation_seed: the ablation mode of evaluation and the seed of its draws.
        execution: when the mask is computed; see ``CircuitConfig``.
        layer_name, layer_index: for messages, and which random stream ablations draw from.
        accumulate_in_kernel: add the logits' gradient to ``mask_logits.grad`` inside the kernel, without autograd.
    """

    # Whether per_step execution is for lean mode only: a masked weight that stays is larger than the base.
    waits_lean_only = False

    _unmasked_class: type
    _rebuild: Callable[[type], MaskedLayer]
    weight: nn.Parameter
    mask_init_value: float
    accumulate_in_kernel: bool
    gather_ahead: GatherAhead | None = None  # see ``sharded_op``
    reduce_dtype: torch.dtype | None = None
    layer_name: str
    masked_weight: MaskedWeight
    _execution: str
    leaf: MaskedLeaf | None
    use_masks: bool

    def base_weight(self, dtype: torch.dtype | None = None) -> Any:  # noqa: ARG002, for layers whose weight is quantised
        """The unmasked weight for input of a dtype: a tensor, or where it is quantised a ``QuantisedWeight``."""
        return self.weight

    @property
    def execution(self) -> str:
        """When the mask is computed: one of ``CircuitConfig``'s values; can be set, which takes effect at once."""
        return self._execution

    @execution.setter
    def execution(self, execution: str) -> None:
        check_execution(execution)
        self.masked_weight.drop()
        if self.leaf is not None and execution != "per_step":
            self.leaf.release()
        elif self.leaf is not None:
            self.leaf.bind(self.base_weight(), self.mask_logits, self.temperature)
        self._execution = execution

    # per_step: the masked weight as a leaf of autograd, whose gradient waits for an optimizer of ``optim``

    @property
    def can_wait(self) -> bool:
        """Whether ``per_step`` execution fits: a logit for each weight, of a frozen weight that is not sharded."""
        if shards.is_sharded(self.weight) or shards.is_sharded(self.mask_logits):
            return False
        # The step walks weight and logits side by side; a weight that was channels_last before surgery lies otherwise.
        weight = self.base_weight()
        lie_alike = weight.stride() == self.mask_logits.stride()
        fits = self.mask_unit == "weight" and not weight.requires_grad and not weight.is_meta
        return self._execution in ("auto", "per_step") and fits and lie_alike

    def wait_for_step(self, lean: bool = False) -> MaskedLeaf:
        """Go over to ``per_step`` execution, and give what the gradients wait in to the optimizer that calls this."""
        kind = LeanLeaf if lean else MaskedLeaf
        if self.leaf is not None and type(self.leaf) is not kind:
            self.leaf.release()
            self.leaf.group = None  # its optimizer has no more to do with it
            self.leaf = None
        if self.leaf is None:
            self.leaf = kind(self.base_weight(), self.mask_logits, self.temperature, self.mask_scale)
        self.execution = "per_step"
        return self.leaf

    @property
    def waits(self) -> bool:
        """Whether a forward now is one of ``per_step`` execution."""
        leaf = self.leaf
        if leaf is None or self._execution != "per_step":
            return False
        # Each forward comes by here: nn.Module finds its attributes slowly.
        weight, logits = self._parameters["weight"], self._parameters["mask_logits"]
        assert weight is not None
        assert logits is not None
        if weight.requires_grad or self.is_hard(logits):
            return False
        if leaf.mask_logits is not logits or logits._backward_hooks or logits._post_accumulate_grad_hooks:
            return False  # hooks want to see the gradient when it comes
        return leaf.has_optimizer

    @property
    def ops(self) -> Any:
        """The module whose operations this layer runs: ``functional``, or ``reference`` in plain torch."""
        return reference if self.execution == "reference" else functional

    def resolve_execution(self, x: Tensor) -> str:
        """``"per_forward"`` or ``"in_kernel"`` for this input: what ``"auto"`` picks, or the execution itself."""
        if self.waits:
            return "per_step"
        if self.execution not in ("auto", "per_step"):
            return self.execution
        device = self.weight.device
        # While compiling, the number of rows is a symbol that a choice would pin to one value.
        if torch.compiler.is_compiling() or self.mask_unit != "weight" or device.type not in ("cpu", "cuda"):
            return "per_forward"
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        ceilings = cost.ceilings_of(device.type, name)
        weight = self.base_weight(x.dtype)
        return cost.choose(self._rows(x), weight, ceilings, not self.hard, self.masked_weight.keep != "never")

    def _rows(self, x: Tensor) -> int:
        """How many times each weight is used on this input: tokens, or positions of a convolution's output."""
        return x.shape[:-1].numel()

    def mask_arguments(self, x: Tensor) -> dict[str, Any]:
        """What every masked operation takes besides its input and geometry."""
        arguments = {
            "weight": self.base_weight(x.dtype),
            "mask_logits": self._broadcast(self._in_use(self.mask_logits)),
            "temperature": self.temperature,
            "hard": self.hard,
            "scale": self.mask_scale,
        }
        if self.ops is functional:
            # What is kept or added to outside the graph is none of a compiled graph's business.
            eager = not torch.compiler.is_compiling()
            arguments.update(
                execution=self.resolve_execution(x),
                kept=self.masked_weight if eager and not self.l0_record.gathered else None,
                accumulate=self.accumulate_in_kernel and eager and not shards.in_several_processes(),
                return_l0=True,
            )
        return arguments

    def masked_bias(self) -> tuple[Tensor | None, Tensor | None]:
        """The bias that the layer adds, masked where the layer masks biases, and then the sum of its mask."""
        if self.bias is None or self.bias_mask_logits is None:
            return self.bias, None
        logits, hard = self._in_use(self.bias_mask_logits), self.is_hard(self.bias_mask_logits)
        return self.ops.materialize(self.bias, logits, self.temperature, hard, self.mask_scale)

    def _masked_forward(self, x: Tensor) -> Tensor:
        if self.waits:
            return self._per_step_forward(x)
        if shards.is_sharded(self._parameters["weight"]):
            if torch.compiler.is_compiling():
                torch._dynamo.graph_break()
            return self._sharded_forward(x)
        bias, bias_l0 = self.masked_bias()
        result = self._masked_op(x, bias=bias, **self.mask_arguments(x))
        if self.ops is reference:
            return result
        out, l0 = result
        record = self.l0_record
        if record.wanted and record.value is None and l0 is not None:
            record.value = l0 if bias_l0 is None else l0 + bias_l0
        if record.leaves_late and record.late is None and l0 is not None:
            record.late = late_sum(l0, self.mask_logits, self.temperature)
        return out

    def _per_step_forward(self, x: Tensor) -> Tensor:
        leaf = self.leaf
        assert leaf is not None
        weight = self._weight_for(leaf, x)
        if leaf.weight is not weight or leaf.temperature is not self.temperature:
            leaf.free()
            leaf.bind(weight, self.mask_logits, self.temperature)
        bias: Tensor | None = self.bias
        if bias is not None and self.bias_mask_logits is not None:
            bias, bias_l0 = self.masked_bias()
            record = self.l0_record
            if record.wanted and record.bias_value is None:
                record.bias_value = bias_l0
        if isinstance(leaf, LeanLeaf):
            mask = {"weight": weight, "mask_logits": self.mask_logits, "temperature": self.temperature}
            return self._masked_op(x, **mask, bias=bias, scale=self.mask_scale, lean=leaf)
        dtype, device = weight.dtype, x.device.type
        if torch.is_autocast_enabled(device) and x.is_floating_point() and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        # While compiling: the setter of the temperature and the optimizer keep it up to date.
        compiling = torch.compiler.is_compiling() and leaf.value is not None
        masked_weight = leaf.value if compiling else leaf.current(dtype)
        assert masked_weight is not None
        if shards.in_several_processes():
            return self._shared_forward(x, masked_weight, bias)
        return self._leaf_forward(x, masked_weight, bias)

    def _shared_forward(self, x: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """Gradients of several processes are averaged where autograd leaves them: none wait in the leaf."""
        assert self.leaf is not None
        mask = (self.weight, self.mask_logits, self.temperature, self.mask_scale)
        masked_weight, l0 = KeptMaskedWeight.apply(*mask, value.detach(), self.leaf.l0)
        record = self.l0_record
        if record.wanted and record.value is None:
            record.value = l0 if record.bias_value is None else l0 + record.bias_value
        return self._plain_forward(x, masked_weight, bias)

    def _sharded_forward(self, x: Tensor) -> Tensor:
        mask = {"weight": self.weight, "mask_logits": self.mask_logits, "temperature": self.temperature}
        if shards.is_sharded(x):
            raise NotImplementedError(shards.OTHER_SHARDS.format(found="an input that is a DTensor"))
        if self.execution == "reference":
            raise ValueError('execution "reference" needs whole weights, and these are sharded: choose "auto"')
        use = ShardedUse(
            self.weight, self._in_use(self.mask_logits), self.temperature, self.hard, self.mask_scale,
            self.gather_ahead, self.reduce_dtype,
        )  # fmt: skip
        bias, bias_l0 = self.masked_bias()
        out = self._masked_op(x, **mask, bias=bias, scale=self.mask_scale, lean=use)
        record = self.l0_record
        if record.wanted and record.value is None:
            record.value, record.bias_value, record.shard_of = use.l0, bias_l0, self.weight
        return out

    def _weight_for(self, leaf: MaskedLeaf, x: Tensor) -> Any:  # noqa: ARG002, for layers whose weight is quantised
        """What a forward on ``x`` has the leaf bound to."""
        return self.weight

    def _leaf_forward(self, x: Tensor, masked_weight: Tensor, bias: Tensor | None) -> Tensor:
        """``_plain_forward``; a layer may bring the masked weight's gradient to the leaf in its own way."""
        return self._plain_forward(x, masked_weight, bias)

    def _masked_op(self, x: Tensor, **arguments: Any) -> Any:
        raise NotImplementedError

    def hard_masked_parameters(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias under the hard mask: the numbers that evaluation uses on input of a dtype."""
        weight, bias = dense(self.base_weight(dtype)), self.bias
        weight, _ = self.ops.materialize(weight, self.unit_logits, self.temperature, True, self.mask_scale)
        if bias is not None and self.bias_mask_logits is not None:
            bias, _ = self.ops.materialize(bias, self.bias_mask_logits, self.temperature, True, self.mask_scale)
        return weight, bias

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002, the argument's name in torch.nn
        if not self.use_masks and shards.is_sharded(self._parameters["weight"]):
            return self._plain_forward(input, shards.whole(self.weight), self.bias)
        if not self.use_masks:
            return super().forward(input)
        if self.ablation == "none":
            return self._masked_forward(input)
        if not self.all_hard:
            raise ValueError(
                f"ablation {self.ablation!r} needs hard masks, but the masks are in training: call .eval() first, "
                "or set_ablate_mode('none')"
            )
        weight, bias = self.ablated_parameters(input.dtype)
        return self._plain_forward(input, weight, bias)

    def _plain_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def reset_masks(self) -> None:
        """Logits, temperature and gradient as at the beginning; off the meta device once the weight is off it."""
        leaves_meta = self.mask_logits.is_meta and not self.weight.is_meta
        if leaves_meta and self.leaf is not None:
            self.leaf.release()
        for name in ("mask_logits", "bias_mask_logits"):
            logits = self._parameters[name]
            if logits is None:
                continue
            if leaves_meta:
                empty = torch.empty_like(logits, device=self.weight.device)
                self._parameters[name] = logits = nn.Parameter(empty, logits.requires_grad)
            logits.grad = None
            logits.fill_(self.mask_init_value)
        if leaves_meta:
            self.temperature = torch.empty_like(self.temperature, device=self.weight.device)
        self.temperature.fill_(1.0)
        if self.leaf is not None and self.waits:
            self.leaf.prepare()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """``.to(dtype)``, ``.half()`` ... move the logits but never lower their dtype: bf16 loses small updates.

        ``to_empty()`` of a layer that is on the meta device gives its masks their first values: there were none.
        """
        was_meta = self.mask_logits.is_meta
        if self.leaf is not None:
            self.leaf.release()  # what waits goes along as any gradient does
        own = [self.mask_logits, self.bias_mask_logits, self.temperature]
        own += [p.grad for p in own if p is not None]
        keep = {id(t) for t in own if t is not None}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in keep and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        self.clear_ablation_cache()
        self.masked_weight.drop()
        try:
            return super()._apply(move, recurse)
        finally:
            if self.leaf is not None and self._execution == "per_step":
                self.leaf.bind(self.base_weight(), self.mask_logits, self.temperature)
            if was_meta and not self.mask_logits.is_meta:
                self.reset_masks()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.leaf is not None and self.waits and not self.leaf.has_gradient:
            self.leaf.prepare()

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()
        # One of each for each device and thread.
        replica.masked_weight, replica.l0_record = MaskedWeight(self.masked_weight.keep), L0Record()
        replica.leaf = None
        return replica

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The masked class of a user's subclass is made at run time: rebuild it from the class that it masks.
        state = dict(self.__dict__, _ablation_cache={}, l0_record=L0Record(), leaf=None)
        return self._rebuild, (self._unmasked_class,), state

    def extra_repr(self) -> str:
        masked = f"mask_unit={self.mask_unit!r}"
        if self.bias_mask_logits is not None:
            masked += ", mask_bias=True"
        return ", ".join(filter(None, [super().extra_repr(), masked]))
