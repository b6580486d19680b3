"""``AblatedWeights``: the weights of one layer under its ablation mode, drawn once and kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import ablation, shards
from .layer_masks import LayerMasks
from .quantised import dense


class AblatedWeights(LayerMasks):
    """The part of a ``MaskedLayer`` that draws for ablations."""

    bias: nn.Parameter | None
    ablation: str
    ablation_seed: int
    layer_index: int

    def ablated_parameters(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias under the layer's ablation mode; draws are kept until the mode, seed or circuit changes.

        Args:
            dtype: of the input, which a quantised weight is dequantised for.
        """
        weight = self._ablate(shards.whole(dense(self.base_weight(dtype))), shards.whole(self.circuit), "weight")
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
        return math.prod(self.base_weight().shape[1:])

    def check_complement(self, name: str) -> None:
        """Raise if the circuit of this layer is larger than the complement that a control is drawn from."""
        ablation.check_complement(shards.whole(self.circuit), f" in {name}")
        if self.bias_mask_logits is not None:
            ablation.check_complement(shards.whole(self.bias_mask_logits.detach()) > 0, f" in {name}.bias")

    def clear_ablation_cache(self) -> None:
        """Drop drawn masks and values."""
        self._ablation_cache: dict[str, tuple] = {}
