"""``_MaskOptimizer``: what the optimizers of ``optim`` share, whatever their update.

Which layers are theirs, which gradients wait, clipping, the turns of lean mode, and telemetry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ._ops import ops
from .leaf_group import LeafGroup
from .masked_layer import check_numbers, layers_of
from .masked_leaf import LEAN_ELSE, MaskedLeaf, grad_so_far, leaf_of
from .quantised import dense
from .shards import in_several_processes, is_sharded, whole
from .transients import Transients


def _refuse_other_optimizers(optimizer: Optimizer, *_: Any) -> None:
    """Called before any optimizer's step: gradients that wait for one are not seen by another."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            leaf = leaf_of(param)
            if leaf is None or leaf.group is None or not (leaf.has_gradient or leaf.spent):
                continue
            owner = leaf.group.optimizer()
            if owner is not None and owner is not optimizer:
                what = "lean mode uses up" if leaf.is_lean else "per_step execution keeps"
                raise RuntimeError(
                    f"these mask logits belong to another optimizer, {type(owner).__name__}, whose {what} their "
                    f"gradients; step that one, or call circuit.set_execution('auto') to go on with "
                    f"{type(optimizer).__name__}"
                )


register_optimizer_step_pre_hook(_refuse_other_optimizers)


class _MaskOptimizer(Optimizer):
    """What both share: which layers wait, clipping, and telemetry."""

    # In lean mode clipping is one step late: a norm is known when all layers have been stepped.
    _turn_norms: list[Tensor]
    _last_factor: Tensor | None

    def __init__(self, params: Any, defaults: dict[str, Any], max_grad_norm: float | None, lean: bool) -> None:
        if not isinstance(lean, bool):
            raise TypeError(f"lean must be True or False, got {lean!r}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, or None not to clip, got {max_grad_norm}")
        self.max_grad_norm, self.lean = max_grad_norm, lean
        self.grad_norm: Tensor | None = None
        self._looks_again = False
        self._begin_turns()
        super().__init__(params, defaults)
        self._groups: list[LeafGroup] = []
        self.transients = Transients()
        self._take_layers()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if "_groups" in vars(self):  # not while it is built
            self._take_layers(len(self.param_groups) - 1)

    def _take_layers(self, first: int = 0) -> None:
        """Put the layers of the parameters in ``per_step`` execution; those of another optimizer change hands."""
        if self.lean:
            _check_one_process()
        self._check_shards()
        for i, group in list(enumerate(self.param_groups))[first:]:
            layers = [layer for layer in layers_of(group["params"]) if layer.can_wait]
            leaves = [layer.wait_for_step(self.lean) for layer in layers if self.lean or not layer.waits_lean_only]
            self._groups += [LeafGroup(those, self, i) for those in by_device(leaves)]
        for leaf in self.leaves:
            if leaf.value is None:
                leaf.refresh()  # made here, a compiled forward finds it

    def _check_shards(self) -> None:
        for group in self.param_groups:
            if group.get("state_bits", 32) != 32 and any(is_sharded(param) for param in group["params"]):
                raise ValueError(
                    "state_bits=8 has its states in blocks of whole layers, and these mask logits are sharded over "
                    "processes: use state_bits=32, of which each process holds its share"
                )

    def __getstate__(self) -> dict[str, Any]:
        state = {"max_grad_norm": self.max_grad_norm, "lean": self.lean, "_last_factor": self._last_factor}
        return {**super().__getstate__(), **state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_groups" not in vars(self):  # unpickled or copied
            last = state.get("_last_factor")
            self.grad_norm, self._groups, self.transients = None, [], Transients()
            self._begin_turns()
            self._last_factor = last
            self._take_layers()
            self._looks_again = not self._groups

    @property
    def leaves(self) -> list[MaskedLeaf]:
        return [leaf for group in self._groups for leaf in group.leaves]

    def _own_leaves(self) -> list[MaskedLeaf]:
        """Those that no other optimizer has taken over."""
        return [leaf for leaf in self.leaves if leaf.group is not None and leaf.group.optimizer() is self]

    def state_dict(self) -> dict[str, Any]:
        """The state, as of any optimizer; in lean mode with the factor that the next step is clipped by."""
        found = super().state_dict()
        return found if self._last_factor is None else {**found, "last_factor": self._last_factor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state, also one of ``torch.optim``'s namesake.

        Raises:
            ValueError: a setting that there is not here (``amsgrad``).
        """
        if any(group.get("amsgrad") for group in state_dict["param_groups"]):
            raise ValueError("the saved optimizer has amsgrad=True, which MaskAdamW does not know")
        super().load_state_dict(state_dict)
        last = state_dict.get("last_factor") if self.lean else None
        self._last_factor = None if last is None else last.clone()
        for param, state in self.state.items():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(param.device, torch.float32)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, those too that wait for this optimizer."""
        for leaf in self._own_leaves():
            leaf.check_clearable()
        for group in self._groups:
            group.discard()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all logits that have a gradient; returns the closure's loss, None without one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._looks_again:  # copied before its circuit was
            self._looks_again = False
            self._take_layers()
        mine = self._own_leaves()
        if self.leaves and not mine:
            raise RuntimeError("another optimizer has taken over the layers of this one: make a new one, or step that")
        for leaf in mine:
            if leaf.has_gradient or leaf.spent:
                leaf.check_unchanged()
        if self.lean:
            self._take_turns_left(mine)
        own = {id(leaf) for leaf in mine}
        parts = [self._parts(group, own) for group in self.param_groups]
        factor = self._clip(parts)
        for group, (waiting, others) in zip(self.param_groups, parts, strict=True):
            if factor is not None:
                for grad in gradients(others):
                    grad.mul_(factor.to(grad.device))
            if others:
                self._step_tensors(group, others)
            for leaves in by_device(waiting):
                self._step_leaves(group, leaves, factor)
        for leaf in mine:
            leaf.end_step()
        self.transients.drop()
        return loss

    def _parts(self, group: dict[str, Any], mine: set[int]) -> tuple[list[MaskedLeaf], list[nn.Parameter]]:
        """The parameters that have a gradient: as leaves of layers in ``per_step`` execution, and all others."""
        waiting, others = [], []
        for param in group["params"]:
            leaf = leaf_of(param)
            if leaf is not None and id(leaf) in mine and (leaf.value is not None or leaf.is_lean):
                if leaf.has_gradient or grad_so_far(param) is not None:
                    waiting.append(leaf)
            elif param.grad is not None:
                others.append(param)
        return waiting, others

    def _clip(self, parts: list[tuple[list[MaskedLeaf], list[nn.Parameter]]]) -> Tensor | None:
        """What to multiply every gradient with so that their norm is ``max_grad_norm`` at most: 0-d, by device."""
        if self.max_grad_norm is None:
            return None
        norms = [whole(torch.linalg.vector_norm(p.grad)) for _, others in parts for p in others]
        for waiting, _ in parts:
            norms += [ops.mask_grad_norms(*gradient_arguments(leaves)) for leaves in by_device(waiting)]
        norms += self._turn_norms
        if not norms:
            return None
        device = norms[0].device
        self.grad_norm = torch.linalg.vector_norm(torch.cat([n.reshape(-1).to(device) for n in norms]))
        if math.isinf(self.max_grad_norm):
            self._turn_norms = []
            return None
        factor = (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
        if not self.lean:
            return factor
        last = self._last_factor
        # A norm that is no number says nothing of the next step's.
        kept = torch.ones_like(factor) if last is None else last.to(factor.device)
        self._turn_norms, self._last_factor = [], torch.where(self.grad_norm.isfinite(), factor, kept)
        return last

    def _step_leaves(self, group: dict[str, Any], leaves: list[MaskedLeaf], factor: Tensor | None) -> None:
        factor = factor if factor is None else factor.to(leaves[0].weight.device)
        l0s, counts = self._mask_step(group, leaves, factor)
        owner = leaves[0].group
        assert owner is not None
        is_whole = len(leaves) == len(owner.leaves)
        if is_whole:
            owner.discard_dl0s()  # at once, and not a zero for each layer
        for leaf in leaves:
            assert leaf.value is not None
            leaf.consume_gradient()
            leaf.has_new_value(leaf.value)
        if is_whole:
            owner.set_l0s(l0s)
            owner.counts = counts
        else:
            # Some had no gradient. One by one: a list of indexes would have to come from the host.
            for i, leaf in enumerate(leaves):
                owner.set_l0(leaf.index, l0s[i])
                owner.set_counts(leaf.index, counts[i])

    # Lean mode

    def check_unscaled(self) -> None:
        """Raise if a loss that is scaled does not go with this optimizer: lean mode steps by what backward has."""
        if any(leaf.is_lean for leaf in self._own_leaves()):
            raise RuntimeError(
                "a GradScaler can neither unscale gradients that lean mode has used up inside backward nor skip that "
                "step, and what a scaled backward has stepped is spoilt: begin again with bf16 instead of a GradScaler"
                + LEAN_ELSE
            )

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What a ``GradScaler`` asks an optimizer before it looks for gradients of its parameters."""
        self.check_unscaled()
        return False

    def _begin_turns(self) -> None:
        self._turn_norms, self._last_factor = [], None

    def step_leaf(self, leaf: MaskedLeaf) -> None:
        """A layer's turn within backward: what ``step`` does, of one layer."""
        _check_one_process()
        assert leaf.group is not None
        if self.max_grad_norm is not None:
            self._turn_norms.append(ops.mask_grad_norms(*gradient_arguments([leaf])))
        self._step_leaves(self.param_groups[leaf.group.param_group], [leaf], self._last_factor)

    def _take_turns_left(self, leaves: list[MaskedLeaf]) -> None:
        """Those of layers that have a gradient and had no turn: of l0 alone, of fewer uses than forward had."""
        self.transients.drop()  # what layers have had; these ask for more
        for leaf in leaves:
            logits = leaf.mask_logits
            if leaf.has_gradient or (leaf_of(logits) is leaf and grad_so_far(logits) is not None):
                leaf.take_turn()

    def telemetry(self) -> dict[str, float]:
        """``l0``, ``kept_fraction`` and ``undecided_fraction`` of layers in ``per_step`` execution, as they are now.

        Reads from the device: everything before has to finish. The counts cost no pass of their own after a step.

        Raises:
            ValueError: a layer whose logits hold NaN, by its name.
        """
        l0 = kept = undecided = 0.0
        weights = 0
        for group in self._groups:
            for leaf in group.leaves:
                if leaf_of(leaf.mask_logits) is leaf:
                    leaf.refresh()
            counts = group.counts
            if counts is None:
                sums = [ops.mask_sums(leaf.mask_logits.detach(), leaf.temperature, False, leaf.scale, 1, True)[1]
                        for leaf in group.leaves]  # fmt: skip
                with torch.inference_mode(False):
                    counts = group.counts = torch.stack(sums).clone()
            sums = group.l0s.detach().tolist()
            if any(map(math.isnan, sums)):
                for layer in layers_of(leaf.mask_logits for leaf in group.leaves):
                    check_numbers(f"{layer.layer_name}.mask_logits", layer.mask_logits)
            l0 += sum(sums)
            k, u = counts.sum(0).tolist()
            kept, undecided = kept + k, undecided + u
            weights += sum(leaf.weight.numel() for leaf in group.leaves)
        count = max(1, weights)
        return {"l0": l0, "kept_fraction": kept / count, "undecided_fraction": undecided / count}

    def _mask_step(
        self, group: dict[str, Any], leaves: list[MaskedLeaf], factor: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _step_tensors(self, group: dict[str, Any], params: list[nn.Parameter]) -> None:
        raise NotImplementedError


def _check_one_process() -> None:
    """Raise in several processes; a process group may be there only after the optimizer."""
    if in_several_processes():
        raise RuntimeError(
            "lean mode steps layers before the gradients of several processes are averaged: give the optimizer "
            "lean=False"
        )


def by_device(leaves: Iterable[MaskedLeaf]) -> list[list[MaskedLeaf]]:
    found: dict[torch.device, list[MaskedLeaf]] = {}
    for leaf in leaves:
        found.setdefault(leaf.weight.device, []).append(leaf)
    return list(found.values())


def gradient_arguments(leaves: list[MaskedLeaf]) -> tuple[list[Any], ...]:
    """What ``mask_grad_norms`` takes."""
    logits = [leaf.mask_logits.detach() for leaf in leaves]
    return (
        logits,
        [leaf.dmasked_weight for leaf in leaves],
        [dense(leaf.weight).detach() for leaf in leaves],
        [grad_so_far(leaf.mask_logits) for leaf in leaves],
        [leaf.temperature for leaf in leaves],
        [leaf.dl0 for leaf in leaves],
        [leaf.scale for leaf in leaves],
    )


def gradients(params: Iterable[nn.Parameter]) -> list[Tensor]:
    return [param.grad for param in params if param.grad is not None]
