"""``MaskAdamW`` and ``MaskSGD``: optimizers of mask logits that make a masked layer cost what a dense one costs.

Given a circuit's ``mask_parameters()`` they put its layers in ``per_step`` execution: forward and backward run on the
masked weight as on any dense weight, and ``step()`` does the rest in one pass over each layer: the gradient of the
logits, the update, the next masked weight, its l0 sum, and the counts of kept and undecided weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.optim.sgd import sgd

from ._ops import ops
from .masked_layer import in_several_processes, layers_of
from .masked_leaf import LeafGroup, MaskedLeaf, grad_so_far, leaf_of


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
        self._begin_turns()
        super().__init__(params, defaults)
        self._groups: list[LeafGroup] = []
        self._take_layers()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if "_groups" in vars(self):  # not while it is built
            self._take_layers(len(self.param_groups) - 1)

    def _take_layers(self, first: int = 0) -> None:
        """Put the layers of the parameters in ``per_step`` execution; those of another optimizer change hands."""
        if self.lean and in_several_processes():
            raise RuntimeError(
                "lean mode steps layers before the gradients of several processes are averaged: give the optimizer "
                "lean=False"
            )
        for i, group in list(enumerate(self.param_groups))[first:]:
            leaves = [layer.wait_for_step(self.lean) for layer in layers_of(group["params"]) if layer.can_wait]
            self._groups += [LeafGroup(those, self, i) for those in _by_device(leaves)]
        for leaf in self.leaves:
            if leaf.value is None:
                leaf.refresh()  # made here, a compiled forward finds it

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "max_grad_norm": self.max_grad_norm, "lean": self.lean}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_groups" not in vars(self):  # unpickled or copied
            self.grad_norm, self._groups = None, []
            self._begin_turns()
            self._take_layers()

    @property
    def leaves(self) -> list[MaskedLeaf]:
        return [leaf for group in self._groups for leaf in group.leaves]

    def _own_leaves(self) -> list[MaskedLeaf]:
        """Those that no other optimizer has taken over."""
        return [leaf for leaf in self.leaves if leaf.group is not None and leaf.group.optimizer() is self]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Those of ``torch.optim``'s namesake load, too.

        Raises:
            ValueError: a setting that there is not here (``amsgrad``).
        """
        if any(group.get("amsgrad") for group in state_dict["param_groups"]):
            raise ValueError("the saved optimizer has amsgrad=True, which MaskAdamW does not know")
        super().load_state_dict(state_dict)
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
        """One step of all logits that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
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
                for grad in _gradients(others):
                    grad.mul_(factor.to(grad.device))
            if others:
                self._step_tensors(group, others)
            for leaves in _by_device(waiting):
                self._step_leaves(group, leaves, factor)
        for leaf in mine:
            leaf.end_step()
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
        norms = [torch.linalg.vector_norm(p.grad) for _, others in parts for p in others]
        for waiting, _ in parts:
            norms += [ops.mask_grad_norms(*_gradient_arguments(leaves)) for leaves in _by_device(waiting)]
        norms += self._turn_norms
        if not norms:
            return None
        device = norms[0].device
        self.grad_norm = torch.linalg.vector_norm(torch.cat([n.reshape(-1).to(device) for n in norms]))
        factor = (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
        if not self.lean:
            return factor
        last, self._turn_norms, self._last_factor = self._last_factor, [], factor
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

    def _begin_turns(self) -> None:
        self._turn_norms, self._last_factor = [], None

    def step_leaf(self, leaf: MaskedLeaf) -> None:
        """A layer's turn within backward: what ``step`` does, of one layer."""
        assert leaf.group is not None
        if self.max_grad_norm is not None:
            self._turn_norms.append(ops.mask_grad_norms(*_gradient_arguments([leaf])))
        self._step_leaves(self.param_groups[leaf.group.param_group], [leaf], self._last_factor)

    def _take_turns_left(self, leaves: list[MaskedLeaf]) -> None:
        """Those of layers that have a gradient and had no turn: of l0 alone, of fewer uses than forward had."""
        for leaf in leaves:
            logits = leaf.mask_logits
            if leaf.has_gradient or (leaf_of(logits) is leaf and grad_so_far(logits) is not None):
                leaf.take_turn()

    def telemetry(self) -> dict[str, float]:
        """``l0``, ``kept_fraction`` and ``undecided_fraction`` of layers in ``per_step`` execution, as they are now.

        Reads from the device: everything before has to finish. The counts cost no pass of their own after a step.
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
            l0 += float(group.l0s.detach().sum())
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


def _by_device(leaves: Iterable[MaskedLeaf]) -> list[list[MaskedLeaf]]:
    found: dict[torch.device, list[MaskedLeaf]] = {}
    for leaf in leaves:
        found.setdefault(leaf.weight.device, []).append(leaf)
    return list(found.values())


def _gradient_arguments(leaves: list[MaskedLeaf]) -> tuple[list[Any], ...]:
    """What ``mask_grad_norms`` takes."""
    logits = [leaf.mask_logits.detach() for leaf in leaves]
    return (
        logits,
        [leaf.dmasked_weight for leaf in leaves],
        [leaf.weight.detach() for leaf in leaves],
        [grad_so_far(leaf.mask_logits) for leaf in leaves],
        [leaf.temperature for leaf in leaves],
        [leaf.dl0 for leaf in leaves],
        [leaf.scale for leaf in leaves],
    )


def _common(leaves: list[MaskedLeaf], states: list[dict[str, Any]]) -> tuple[list[Any], ...]:
    """What both step operators take between their states and their settings: two parts."""
    logits, dmasked_weights, weights, grads, temperatures, dl0s, scales = _gradient_arguments(leaves)
    before = [leaf.value.detach() for leaf in leaves if leaf.value is not None]
    after = [before, dmasked_weights, weights, grads, temperatures, dl0s, scales]
    return logits, [*after, [state["step"] for state in states]]


def _rate(group: dict[str, Any]) -> Tensor:
    lr = group["lr"]
    return lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64)


class MaskAdamW(_MaskOptimizer):
    """AdamW for mask logits, whose step is one pass that also makes the next masked weight.

    Formulas and states are those of ``torch.optim.AdamW``; but ``step`` uses the gradients of layers in ``per_step``
    execution up: without ``zero_grad`` between two steps they do not add up.

    Args:
        params: ``circuit.mask_parameters()``, or parameter groups of them; other parameters get an ordinary AdamW step.
        lr: learning rate, a number or a 0-d tensor.
        betas, eps: as in AdamW (arXiv 1711.05101).
        weight_decay: decoupled; 0, since to pull logits to 0 is to undecide them.
        max_grad_norm: clip the norm of all gradients to it, as ``torch.nn.utils.clip_grad_norm_`` does, at a pass over
            the gradients; that function works too, at the cost of ``per_forward`` execution.
        maximize: go up.
        lean: step each layer inside backward, as soon as its gradient is complete: neither masked weights nor
            gradients stay in memory, only weights, logits and states (14 bytes per weight where weights are bf16).
            ``step()`` ends the step. The learning rate is that at the time of backward; schedulers that run after
            ``step()`` work as ever. ``max_grad_norm`` clips by the norm of the step before, and the first step not at
            all. Raises, with what to do: several backwards per step (gradient accumulation needs ``lean=False``: 4
            more bytes per weight in bf16, 8 in fp32), to clear gradients before ``step()``, to look at them where
            ``max_grad_norm`` is not given (where it is, infinity or not, there are none to be seen: what others clip
            is for it to do), l0 whose gradient comes after the layers', several processes. Neuron masks, masked
            biases, logits with hooks and layers whose base is trained too keep ordinary gradients.

    Raises:
        ValueError: a setting out of its range.
        TypeError: ``lean`` that is no bool.
        RuntimeError: in ``step``, weights, logits or temperature that changed since backward.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        max_grad_norm: float | None = None,
        maximize: bool = False,
        lean: bool = False,
    ) -> None:
        _check_settings(lr, weight_decay)
        for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {beta}")
        if not eps >= 0.0:
            raise ValueError(f"eps must be >= 0, got {eps}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, max_grad_norm, lean)

    def _state_of(self, param: nn.Parameter) -> dict[str, Any]:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state

    def _mask_step(
        self, group: dict[str, Any], leaves: list[MaskedLeaf], factor: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        states = [self._state_of(leaf.mask_logits) for leaf in leaves]
        torch._foreach_add_([state["step"] for state in states], 1.0)
        logits, rest = _common(leaves, states)
        averages = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")]
        settings = (_rate(group), *group["betas"], group["eps"], group["weight_decay"], group["maximize"])
        return ops.mask_adamw_(logits, *averages, *rest, factor, *settings)

    def _step_tensors(self, group: dict[str, Any], params: list[nn.Parameter]) -> None:
        states = [self._state_of(param) for param in params]
        adamw(
            list(params), _gradients(params), [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states], [], [state["step"] for state in states],
            foreach=None, capturable=params[0].is_cuda, amsgrad=False, beta1=group["betas"][0],
            beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            maximize=group["maximize"],
        )  # fmt: skip


class MaskSGD(_MaskOptimizer):
    """SGD for mask logits, whose step is one pass that also makes the next masked weight.

    Formulas and states are those of ``torch.optim.SGD``; ``step`` uses gradients up, as ``MaskAdamW``'s.

    Args:
        params, max_grad_norm, maximize, lean: as in ``MaskAdamW``.
        lr: learning rate, a number or a 0-d tensor.
        momentum, dampening, weight_decay, nesterov: as in ``torch.optim.SGD``.

    Raises:
        ValueError: a setting out of its range.
        RuntimeError: in ``step``, weights, logits or temperature that changed since backward.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        max_grad_norm: float | None = None,
        maximize: bool = False,
        lean: bool = False,
    ) -> None:
        _check_settings(lr, weight_decay)
        if not momentum >= 0.0:
            raise ValueError(f"momentum must be >= 0, got {momentum}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(f"nesterov needs momentum > 0 and dampening 0, got {momentum} and {dampening}")
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov, "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, defaults, max_grad_norm, lean)

    def _state_of(self, group: dict[str, Any], param: nn.Parameter) -> dict[str, Any]:
        state = self.state[param]
        is_new = state.get("momentum_buffer") is None
        if "step" not in state or (group["momentum"] and is_new):
            # torch.optim.SGD's own states count no steps; a buffer that is there has had its first.
            state["step"] = torch.full((), 0.0 if is_new else 1.0, device=param.device)
        if group["momentum"] and is_new:
            state["momentum_buffer"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state

    def _mask_step(
        self, group: dict[str, Any], leaves: list[MaskedLeaf], factor: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        states = [self._state_of(group, leaf.mask_logits) for leaf in leaves]
        torch._foreach_add_([state["step"] for state in states], 1.0)
        logits, rest = _common(leaves, states)
        momentums = [state["momentum_buffer"] for state in states] if group["momentum"] else []
        settings = (group["momentum"], group["dampening"], group["weight_decay"], group["nesterov"], group["maximize"])
        return ops.mask_sgd_(logits, momentums, *rest, factor, _rate(group), *settings)

    def _step_tensors(self, group: dict[str, Any], params: list[nn.Parameter]) -> None:
        states = [self.state[param] for param in params]
        momentums = [state.get("momentum_buffer") for state in states]
        sgd(
            list(params), _gradients(params), momentums, has_sparse_grad=False, foreach=None,
            weight_decay=group["weight_decay"], momentum=group["momentum"], lr=group["lr"],
            dampening=group["dampening"], nesterov=group["nesterov"], maximize=group["maximize"],
        )  # fmt: skip
        for param, state, momentum in zip(params, states, momentums, strict=True):
            if group["momentum"]:
                state["momentum_buffer"] = momentum
                state["step"] = torch.ones((), device=param.device)


def _gradients(params: Iterable[nn.Parameter]) -> list[Tensor]:
    return [param.grad for param in params if param.grad is not None]


def _check_settings(lr: float | Tensor, weight_decay: float) -> None:
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr must be a number or a 0-d tensor, got shape {tuple(lr.shape)}")
    elif not lr >= 0.0:
        raise ValueError(f"lr must be >= 0, got {lr}")
    if not weight_decay >= 0.0:
        raise ValueError(f"weight_decay must be >= 0, got {weight_decay}")
