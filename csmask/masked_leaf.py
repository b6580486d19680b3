"""``MaskedLeaf``: a layer's masked weight as a leaf of autograd, for ``per_step`` execution.

Between two steps of an optimizer the masked weight is constant. Forward and backward are then those of a dense layer
whose weight it is; its gradient waits here for the optimizer of ``optim``, which turns it into that of the logits, the
update and the next masked weight in one pass. Whoever asks for ``mask_logits.grad`` before that gets it, at a pass of
its own: clipping, ``GradScaler`` and loops that look at gradients see what they would see without this.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._ops import ops
from .products import add_product, product
from .quantised import QuantisedWeight, dense

if TYPE_CHECKING:
    from .leaf_group import LeafGroup

# By id of the logits; an entry lasts as long as its leaf.
_LEAVES: weakref.WeakValueDictionary[int, MaskedLeaf] = weakref.WeakValueDictionary()
_raw_grad: Any = torch.Tensor.grad
_raw_data: Any = torch.Tensor.data
REPLACED = (
    "the masked weight that this forward ran on has been replaced since: run backward before optimizer.step(), before "
    "a change of temperature, execution, dtype or optimizer, and with one dtype for a layer between two steps"
)
LEAN_ELSE = "; lean=False keeps gradients until step(), at 4 more bytes per weight in bf16 and 8 in fp32"
SECOND = (
    "a second gradient came for mask logits that were stepped inside backward: in lean mode call optimizer.step() "
    "after each backward, without gradient accumulation, and checkpoint layers that are used twice with "
    "use_reentrant=False" + LEAN_ELSE
)
_CHANGED = (
    "{what} changed after a backward whose gradient still waits for the optimizer: call optimizer.step() or "
    "optimizer.zero_grad() first (setting circuit.temperature takes the gradient along)"
)
_NO_GRAPH = (
    "in per_step execution the gradient of the logits waits for the optimizer as a number, without the graph that "
    "backward(create_graph=True) asks for: to differentiate it, call circuit.set_execution('reference'). What "
    "torch.autograd.grad(loss, inputs, create_graph=True) gives can be differentiated"
)


def leaf_of(mask_logits: Tensor) -> MaskedLeaf | None:
    """The leaf that the gradient of these logits waits in, if they have one."""
    leaf = _LEAVES.get(id(mask_logits))
    return leaf if leaf is not None and leaf.mask_logits is mask_logits else None


def grad_so_far(mask_logits: Tensor) -> Tensor | None:
    """``mask_logits.grad`` as it is, without what waits in a leaf."""
    return _raw_grad.__get__(mask_logits)


def weakly(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """The method, without keeping its object: cycles through a tensor's hooks are beyond the garbage collector."""
    reference = weakref.WeakMethod(method)

    def hook(tensor: Tensor) -> None:
        alive = reference()
        if alive is None:  # its optimizer has been replaced since the forward
            tensor.grad = None
            raise RuntimeError(REPLACED)
        alive(tensor)

    return hook


def refuse_graph() -> None:
    """Within backward: raise if the gradients that it leaves are to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(_NO_GRAPH)


def is_asked_for(leaf: Tensor) -> bool:
    """Within backward: whether it is for the leaf too, as those of ``torch.autograd.grad`` need not be."""
    return leaf.requires_grad and torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(leaf).node)


class DeferredLogits(nn.Parameter):
    """Mask logits whose gradient may wait in a leaf: to read ``grad`` fetches it from there, to set it drops it."""

    @property
    def grad(self) -> Tensor | None:
        leaf = leaf_of(self)
        if leaf is not None:
            leaf.reveal()
        return _raw_grad.__get__(self)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        leaf = leaf_of(self)
        if leaf is not None:
            leaf.check_clearable()
            leaf.discard()
        _raw_grad.__set__(self, value)

    @grad.deleter
    def grad(self) -> None:
        self.grad = None

    # What is written through ``data`` moves no version counter.

    @property
    def data(self) -> Tensor:
        self._expect_writes()
        return _raw_data.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        self._expect_writes()
        _raw_data.__set__(self, value)

    def _expect_writes(self) -> None:
        leaf = leaf_of(self)
        if leaf is not None:
            leaf.flush()
            leaf.forget()

    # Copies have no leaf: they are parameters like any other.

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            values = self.detach().clone(memory_format=torch.preserve_format)
            memo[id(self)] = nn.Parameter(values, self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)


def wide(total: Tensor) -> Tensor:
    """A sum in fp32 or higher: many gradients of 16 bits are not added up in 16."""
    return total.float() if total.dtype.itemsize < 4 else total


class MaskedLeaf:
    """The masked weight of one layer, one logit per weight, and the gradients that wait for the optimizer.

    Args:
        weight: frozen; in lean mode it may be quantised.
        mask_logits: of the weight's shape; from now on reading their ``grad`` fetches what waits here.
        temperature: 0-d.
        scale: of the mask.

    Attributes:
        value: the masked weight, a tensor without history that requires grad; None until it is asked for. Another
            tensor of the same memory each time that it changes.
        group, index: what the leaf belongs to, and its place there; None and 0 until an optimizer takes it.
        dl0_waits: whether a gradient of the group's l0 waits that this layer's logits have not had yet.
        is_lean, spent: see ``lean.LeanLeaf``.
    """

    is_lean = False
    spent = False

    def __init__(self, weight: Any, mask_logits: nn.Parameter, temperature: Tensor, scale: float) -> None:
        self.scale = scale
        self.bind(weight, mask_logits, temperature)
        self.group: LeafGroup | None = None
        self.index = 0
        self.dl0_waits = False
        self.value: Tensor | None = None
        self._sum: Tensor | None = None
        # On a CPU, that of the last step's sum: to ask for it anew costs page faults.
        self._memory: Tensor | None = None
        # Whether products of several micro-batches have come since the last step, and did so before it.
        self._has_several = self._had_several = False
        self._key: Any = None

    def bind(self, weight: Any, mask_logits: nn.Parameter, temperature: Tensor) -> None:
        """Wait for the gradient of these tensors; a module that is moved to a device gets new ones."""
        self.weight, self.mask_logits, self.temperature = weight, mask_logits, temperature
        mask_logits.__class__ = DeferredLogits
        _LEAVES[id(mask_logits)] = self

    def release(self) -> None:
        """Free the masked weight and wait no longer: the logits are a parameter like any other, until ``bind``."""
        self.free()
        self.mask_logits.__class__ = nn.Parameter
        _LEAVES.pop(id(self.mask_logits), None)

    @property
    def has_optimizer(self) -> bool:
        """Whether there is still an optimizer to wait for."""
        return self.group is not None and self.group.optimizer() is not None

    # The masked weight

    def current(self, dtype: torch.dtype) -> Tensor:
        """The masked weight in a dtype, that of the logits and temperature as they are now; requires grad.

        Raises:
            RuntimeError: weight, logits or temperature have changed while a gradient waits that belongs to old ones.
        """
        if self.value is None or self._key != self._state(dtype):
            self._make(dtype)
        assert self.value is not None
        return self.value

    @property
    def l0(self) -> Tensor:
        """The sum of this layer's mask as last made: 0-d, without history."""
        assert self.group is not None
        return self.group.l0s.detach()[self.index]

    def refresh(self) -> None:
        """Bring masked weight and l0 up to date where logits or temperature have changed."""
        self.current(self.weight.dtype if self.value is None else self.value.dtype)

    def prepare(self) -> None:
        """``refresh`` for compiled forwards, which do not look."""
        self.refresh()

    def _state(self, dtype: torch.dtype) -> Any:
        weight, logits, temperature = self.weight, self.mask_logits, self.temperature
        # A quantised weight is another object where it is another weight.
        where = (id(weight), 0) if isinstance(weight, QuantisedWeight) else (weight.data_ptr(), weight._version)
        return (
            dtype, *where, logits.data_ptr(), logits._version, temperature.data_ptr(), temperature._version,
        )  # fmt: skip

    @torch.no_grad()
    def _make(self, dtype: torch.dtype) -> None:
        self.flush()  # what waits has this dtype or belongs to another one; old logits' raises
        mask = (self.weight, self.mask_logits, self.temperature, False, self.scale)
        old = None if self.value is None else self.value.detach()
        if old is not None and (old.dtype, old.device, old.shape) == (dtype, self.weight.device, self.weight.shape):
            l0 = ops.materialize_(old, *mask)
        else:
            with torch.inference_mode(False), torch.no_grad():
                old, l0, _ = ops.materialize(*mask, dtype)
        assert self.group is not None
        if self._key is None or self._key[1:] != self._state(dtype)[1:]:  # more has changed than the dtype
            self.group.set_l0(self.index, l0)
            self.group.forget_counts()
        self.has_new_value(old)

    def has_new_value(self, memory: Tensor) -> None:
        """The masked weight has been written, and is that of the logits and temperature as they are now.

        From now on it is another leaf of autograd: gradients of an earlier one belong to another masked weight.
        """
        with torch.inference_mode(False):
            self.value = memory.detach().requires_grad_()
        self.value.register_post_accumulate_grad_hook(weakly(self._receive))
        self._key = self._state(memory.dtype)

    def forget(self) -> None:
        """Make the masked weight again at its next use: the logits may have been written to unseen."""
        self._key = None

    def free(self) -> None:
        """Free the masked weight, which is made again when it is asked for; what waits goes to the logits' ``grad``."""
        self.flush()
        self.value = self._key = self._memory = None
        if self.group is not None:
            self.group.has_new_l0s()  # gradients of an l0 that was taken before would come too late

    # The gradients that wait

    def _receive(self, value: Tensor) -> None:
        """Called by autograd; left alone, it would add up the 16-bit gradients of several micro-batches in 16 bits."""
        grad = value.grad
        if value is not self.value:
            value.grad = None
            raise RuntimeError(REPLACED)
        if torch.is_grad_enabled():
            value.grad = None
            refuse_graph()
        if self._memory is not self._sum:
            self.drop_memory()  # autograd brings its own
        if grad is None or (self._sum is None and grad.dtype.itemsize >= 4):
            return
        value.grad = None
        self._sum = grad if self._sum is None else wide(self._sum).add_(grad)

    def check_value(self, value: Tensor | None) -> None:
        """Raise unless a forward ran on the masked weight that there is now."""
        if value is None or value is not self.value:
            raise RuntimeError(REPLACED)

    def receive_product(self, a: Tensor, b: Tensor) -> None:
        """Add ``a b``, the gradient of one micro-batch ``(out, in)``, to what waits; called within backward."""
        refuse_graph()
        if torch.is_inference_mode_enabled():  # the sum outlives it
            with torch.inference_mode(False), torch.no_grad():
                self.receive_product(a, b)
            return
        value = self.value
        assert value is not None
        total, value.grad = self.dmasked_weight, None
        self._has_several = total is not None
        if total is None:
            dtype = torch.float32 if self._had_several and value.dtype.itemsize < 4 else value.dtype
            self._sum = product(a, b, dtype, self._memory)
        else:
            self._sum = add_product(wide(total), a, b)
        if value.device.type == "cpu":
            self._memory = self._sum

    @property
    def has_gradient(self) -> bool:
        """Whether a gradient waits."""
        return self.dmasked_weight is not None or self.dl0_waits

    def consume_gradient(self) -> None:
        """An optimizer has taken the gradient: what waited, and what had come to the logits before."""
        self._had_several = self._has_several
        self.discard()
        _raw_grad.__set__(self.mask_logits, None)

    @property
    def dmasked_weight(self) -> Tensor | None:
        """The masked weight's gradient so far: of one micro-batch in its own dtype, of several in fp32 or higher."""
        if self._sum is not None:
            return self._sum
        return None if self.value is None else self.value.grad

    @property
    def dl0(self) -> Tensor | None:
        """The gradient of this layer's l0 so far: 0-d."""
        return self.group.dl0(self.index) if self.group is not None and self.dl0_waits else None

    def take_turn(self) -> None:
        """Step the logits by what waits."""
        raise NotImplementedError

    def end_step(self) -> None:
        """The optimizer's ``step()`` is over."""

    def reveal(self) -> None:
        """Called when ``mask_logits.grad`` is read."""
        if self.has_gradient:
            self.flush()

    def check_clearable(self) -> None:
        """Raise where what there was of a gradient cannot be taken back."""

    def check_unchanged(self) -> None:
        """Raise unless what waits belongs to the weight, logits and temperature as they are now."""
        if self._key is None:
            return
        names = ("dtype", "weight", "weight", "mask_logits", "mask_logits", "temperature", "temperature")
        pairs = zip(names, self._key, self._state(self._key[0]), strict=True)
        changed = dict.fromkeys(name for name, before, now in pairs if before != now)
        if changed:
            raise RuntimeError(_CHANGED.format(what=" and ".join(changed)))

    @torch.no_grad()
    def flush(self) -> None:
        """Add what waits to ``mask_logits.grad``.

        Raises:
            RuntimeError: it belongs to other logits, another temperature or weight than there are now.
        """
        dmasked_weight, dl0 = self.dmasked_weight, self.dl0
        if dmasked_weight is None and dl0 is None:
            return
        self.check_unchanged()
        weight = dense(self.weight)
        if dmasked_weight is None:  # only l0: a zero that takes no memory
            dmasked_weight = weight.new_zeros(()).expand(weight.shape)
        grad = grad_so_far(self.mask_logits)
        chain = (dmasked_weight, weight, self.mask_logits, self.temperature, dl0, self.scale)
        if grad is None:
            _raw_grad.__set__(self.mask_logits, ops.logits_grad(*chain))
        else:
            ops.logits_grad_(grad, *chain)
        self.discard()
        self.drop_memory()  # whoever looks once will look again: there is that of ``grad`` now

    def drop_memory(self) -> None:
        """Free what is kept for the next gradient."""
        self._memory = None

    def discard(self) -> None:
        """Drop what waits."""
        self._sum = None
        if self.value is not None:
            self.value.grad = None
        dl0 = self.dl0
        if dl0 is not None:
            dl0.zero_()  # the gradients of others may still wait there
        self.dl0_waits = False
