"""``LeafGroup``: the layers that one optimizer steps on one device, and the l0 sums of all of them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from .masked_leaf import REPLACED, SECOND, MaskedLeaf, refuse_graph, weakly

_LATE = (
    "the gradient of l0 came after layers had been stepped inside backward: in lean mode take circuit.l0() after the "
    "forward whose loss it is added to, and run one backward for their sum; or give the optimizer lean=False"
)


class LeafGroup:
    """The leaves that one optimizer steps on one device, and the l0 sums of all of them as one leaf of autograd.

    Attributes:
        leaves: in the order of the sums.
        l0s: fp32, one sum for each; requires grad. Another tensor of the same memory each time that they change.
        dl0s: the gradients of the sums that wait; None where there are none.
        counts: int64 ``(leaves, 2)``, kept and undecided weights as the last step left them; None before it.
        optimizer: a weak reference to the optimizer.
        param_group: which of the optimizer's parameter groups the logits are in.
    """

    counts: Tensor | None
    _known_counts: dict[int, Tensor]  # by index of the leaf

    def __init__(self, leaves: list[MaskedLeaf], optimizer: Any, param_group: int) -> None:
        self.leaves, self.param_group = leaves, param_group
        self.optimizer = weakref.ref(optimizer)
        with torch.inference_mode(False):
            self._memory = torch.zeros(len(leaves), device=leaves[0].mask_logits.device)
        self.forget_counts()
        self.dl0s: Tensor | None = None
        self._parts: tuple[Tensor | None, tuple[Tensor, ...]] = (None, ())
        self.has_new_l0s()
        for i, leaf in enumerate(leaves):
            leaf.free()  # of another optimizer's group
            leaf.group, leaf.index = self, i

    def has_new_l0s(self) -> None:
        """From now on another leaf of autograd: gradients of an earlier one belong to other masks."""
        with torch.inference_mode(False):
            self.l0s = self._memory.detach().requires_grad_()
        self.l0s.register_post_accumulate_grad_hook(weakly(self._note_dl0))

    def set_l0(self, index: int, l0: Tensor) -> None:
        """The sum of one leaf."""
        with torch.no_grad():
            self._memory[index] = l0
        self.has_new_l0s()

    def set_l0s(self, l0s: Tensor) -> None:
        with torch.no_grad():
            self._memory.copy_(l0s)
        self.has_new_l0s()

    def set_counts(self, index: int, counts: Tensor) -> None:
        """Those of one leaf: of no use before all of them are known."""
        if self.counts is not None:
            self.counts[index] = counts
            return
        self._known_counts[index] = counts
        if len(self._known_counts) == len(self.leaves):
            self.counts = torch.stack([self._known_counts[i] for i in range(len(self.leaves))])

    def forget_counts(self) -> None:
        """Masks have changed, and nobody has counted."""
        self.counts = None
        self._known_counts = {}

    def l0(self) -> Tensor:
        """The sum over all leaves, 0-d, whose gradient waits with those of the masked weights."""
        if not torch.compiler.is_compiling():
            for leaf in self.leaves:
                leaf.refresh()
        return self.l0s.sum()

    def counts_now(self) -> Tensor | None:
        """``counts``, unless logits or temperature have changed since that step."""
        for leaf in self.leaves:
            leaf.refresh()
        return self.counts

    def _note_dl0(self, l0s: Tensor) -> None:
        grad, l0s.grad = l0s.grad, None
        refuse_graph()
        if any(leaf.spent for leaf in self.leaves):
            raise RuntimeError(SECOND if l0s is self.l0s else _LATE)
        if l0s is not self.l0s:
            raise RuntimeError(REPLACED)
        self.dl0s = grad if self.dl0s is None or grad is None else self.dl0s + grad
        for leaf in self.leaves:
            if leaf.group is self:
                leaf.dl0_waits = True

    def dl0(self, index: int) -> Tensor | None:
        """The gradient of one sum that waits: 0-d."""
        if self.dl0s is None:
            return None
        if self._parts[0] is not self.dl0s:
            self._parts = self.dl0s, self.dl0s.unbind()
        return self._parts[1][index]

    def discard_dl0s(self) -> None:
        """Drop the gradients of all sums."""
        self.dl0s, self._parts = None, (None, ())

    def discard(self) -> None:
        """Drop all that waits."""
        self.discard_dl0s()
        for leaf in self.leaves:
            if leaf.group is self:
                leaf.discard()


def whole_groups(leaves: list[MaskedLeaf]) -> list[LeafGroup]:
    """The groups of which all leaves are among these."""
    given = {id(leaf) for leaf in leaves}
    groups = {id(leaf.group): leaf.group for leaf in leaves if leaf.group is not None}
    return [
        group for group in groups.values() if all(id(leaf) in given and leaf.group is group for leaf in group.leaves)
    ]
