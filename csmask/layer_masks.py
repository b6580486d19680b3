"""``LayerMasks``: the masks of one layer as numbers, soft or hard, with their sums and counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import reference, shards
from .mask_sum import LateSum, LateUse
from .shards import Part, over_shards


class L0Record:
    """Where forward leaves the sum of its mask for the loss, if it is wanted; setting a module's attribute is slow.

    Attributes:
        wanted: whether a forward of the circuit is on its way that adds l0 to its loss itself.
        leaves_late: whether one is on its way after which ``late`` may be asked for.
        gathered: whether the weight is whole only for the time of a use: then the masked weight is not kept, either.
    """

    def __init__(self) -> None:
        self.wanted = self.leaves_late = False
        self.value: Tensor | None = None
        self.bias_value: Tensor | None = None  # where that of the weights waits elsewhere, or is of a shard
        self.shard_of: Tensor | None = None  # that the value is of
        self.late: LateSum | None = None
        self.gathered = False

    def begin(self, wanted: bool, leaves_late: bool, gathered: bool) -> None:
        """A forward of the circuit begins."""
        self.end()
        self.wanted, self.leaves_late, self.late, self.gathered = wanted, leaves_late, None, gathered

    def end(self) -> None:
        """It is over: what was left for its own loss has been taken, or is not needed."""
        self.wanted = self.leaves_late = False
        self.value = self.bias_value = self.shard_of = None

    def __reduce__(self) -> tuple[Any, ...]:
        return L0Record, ()  # what a forward left is of no use to a copy of the layer


class LayerMasks(nn.Module):
    """The part of a ``MaskedLayer`` that says which mask is in use and what it adds up to."""

    # Dimension of the weight that counts output units (neurons, filters).
    unit_dim = 0

    mask_logits: nn.Parameter
    bias_mask_logits: nn.Parameter | None
    temperature: Tensor
    mask_unit: str
    mask_scale: float
    l0_record: L0Record

    @property
    def ops(self) -> Any:
        """The module whose operations this layer runs."""
        raise NotImplementedError

    def base_weight(self, dtype: torch.dtype | None = None) -> Any:
        """The unmasked weight for input of a dtype: a tensor, or where it is quantised a ``QuantisedWeight``."""
        raise NotImplementedError

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
        shape = [1] * self.base_weight().dim()
        shape[self.unit_dim] = -1
        return entries.view(shape)

    @property
    def maskable(self) -> int:
        """Number of weights (and masked bias terms) that the mask decides about."""
        return self.base_weight().numel() + (0 if self.bias_mask_logits is None else self.bias_mask_logits.numel())

    def kept(self) -> int:
        """Number of weights (and masked bias terms) in the circuit, whatever mode the layer is in."""
        return int(self.mask_counts()[0])

    def undecided(self) -> int:
        """Number of weights (and masked bias terms) with ``|T * S| < 4``: their soft mask is neither 0 nor 1."""
        return int(self.mask_counts()[1])

    def mask_counts(self, weights: bool = True) -> Tensor:
        """int64 ``(kept, undecided)`` in one pass over the logits; only those of the bias with ``weights=False``."""
        counts = torch.zeros(2, dtype=torch.int64, device=self.mask_logits.device)
        if weights:
            per_logit = reference.weights_per_logit(self.base_weight(), self.mask_logits)
            counts = self._counts_of(self.mask_logits, per_logit)
        return counts if self.bias_mask_logits is None else counts + self._counts_of(self.bias_mask_logits)

    def _counts_of(self, logits: Tensor, per_logit: int = 1) -> Tensor:
        sums = self.ops.mask_sums
        return over_shards(logits.detach(), lambda s: sums(s, self.temperature, weights_per_logit=per_logit)[1])

    def l0(self) -> Tensor:
        """Sum of the mask now in use, counted in weights: 0-d fp32, differentiable while the mask is soft."""
        return shards.total(self.l0_parts(recorded=False))

    def l0_parts(self, recorded: bool = True) -> list[Part]:
        """``l0()`` in parts, without a pass over the logits where the last forward, told by ``l0_record``, left one."""
        record, bias_logits = self.l0_record, self.bias_mask_logits
        l0, record.value = record.value if recorded else None, None
        # Under reentrant checkpointing forward runs without gradients: its sum knows nothing of the logits.
        if l0 is not None and l0.requires_grad == any(not self.is_hard(p) for p in self._logits()):
            if record.shard_of is None or bias_logits is None:
                return [Part(l0, record.shard_of)]
            return [Part(l0, record.shard_of), self.bias_l0_part()]
        weights = self._l0_of(self.mask_logits, reference.weights_per_logit(self.base_weight(), self.mask_logits))
        if bias_logits is None:
            return [weights]
        biases = self.bias_l0_part()
        # Added up as forward adds them up, to the bit.
        whole = weights.of is None and biases.of is None
        return [Part(weights.value + biases.value)] if whole else [weights, biases]

    def late_use(self) -> LateUse | None:
        """The l0 of the weights that the last forward left, for a loss that is put together after it."""
        record, logits = self.l0_record, self.mask_logits
        late = record.late
        if late is None or record.value is not None or self.is_hard(logits) or not late.is_of(logits, self.temperature):
            return None
        per_logit = reference.weights_per_logit(self.base_weight(), logits)
        return LateUse(late, logits, self.temperature, self.mask_scale, per_logit)

    def bias_l0_part(self) -> Part:
        """The bias's part of ``l0()``, which the last forward may have left by itself."""
        l0, self.l0_record.bias_value = self.l0_record.bias_value, None
        logits = self.bias_mask_logits
        assert logits is not None
        return self._l0_of(logits) if l0 is None or l0.requires_grad == self.is_hard(logits) else Part(l0)

    def _l0_of(self, logits: Tensor, per_logit: int = 1) -> Part:
        mask = (self.temperature, self.is_hard(logits), self.mask_scale, per_logit)
        return shards.part(self._in_use(logits), lambda s: self.ops.l0(s, *mask))

    def _logits(self) -> list[nn.Parameter]:
        return [p for p in (self.mask_logits, self.bias_mask_logits) if p is not None]

    def _in_use(self, logits: Tensor) -> Tensor:
        """The logits as forward takes them: a hard mask has no gradient, so evaluation need build no graph."""
        return logits.detach() if self.is_hard(logits) else logits
