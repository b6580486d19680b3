"""``MaskAdamW`` and ``MaskSGD``: optimizers of mask logits that make a masked layer cost what a dense one costs.

Given a circuit's ``mask_parameters()`` they put its layers in ``per_step`` execution: forward and backward run on the
masked weight as on any dense weight, and ``step()`` does the rest in one pass over each layer: the gradient of the
logits, the update, the next masked weight, its l0 sum, and the counts of kept and undecided weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from . import state_codes
from ._ops import ops
from .mask_optimizer import _MaskOptimizer, gradient_arguments, gradients
from .masked_leaf import MaskedLeaf


def _common(leaves: list[MaskedLeaf], states: list[dict[str, Any]]) -> tuple[list[Any], ...]:
    """What both step operators take between their states and their settings: two parts."""
    logits, dmasked_weights, weights, grads, temperatures, dl0s, scales = gradient_arguments(leaves)
    before = [leaf.value.detach() for leaf in leaves if leaf.value is not None]
    after = [before, dmasked_weights, weights, grads, temperatures, dl0s, scales]
    return logits, [*after, [state["step"] for state in states]]


def _lies_like(codes: Tensor, param: Tensor) -> bool:
    """Whether codes have the order in which a state of the parameter lies."""
    return codes.stride() == param.stride() or codes.stride() == torch.empty_like(param, device="meta").stride()


def _rate(group: dict[str, Any]) -> Tensor:
    lr = group["lr"]
    return lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64)


_AVERAGES = ("exp_avg", "exp_avg_sq")
# Of states in 8 bits. Not named as those of torch.optim.AdamW, which would take codes for values.
_CODES = ("exp_avg_codes", "exp_avg_sq_codes", "state_scales")


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
            ``step()`` ends the step, and takes that of layers whose logits have a penalty beside the layer in the same
            backward: their gradients wait for it. The learning rate is that at the time of backward; schedulers that
            run after ``step()`` work as ever. ``max_grad_norm`` clips by the norm of the step before, and the first
            step not at all. Raises, with what to do: several backwards per step (gradient accumulation needs
            ``lean=False``: 4 more bytes per weight in bf16, 8 in fp32), a ``GradScaler``, to clear gradients before
            ``step()``, to look at them where ``max_grad_norm`` is not given (where it is, infinity or not, there are
            none to be seen: what others clip is for it to do), l0 whose gradient comes after the layers', several
            processes. Neuron masks, masked biases, logits with hooks and layers whose base is trained too keep
            ordinary gradients.
        state_bits: 8 keeps the states of layers in ``per_step`` execution in 8 bits (``state_codes``): 2.02 bytes per
            weight instead of 8, and nearly the same circuit; those of other parameters stay as they are. States of
            either kind load into an optimizer of the other and are converted at its next step.

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
        state_bits: int = 32,
    ) -> None:
        _check_settings(lr, weight_decay)
        for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {beta}")
        if not eps >= 0.0:
            raise ValueError(f"eps must be >= 0, got {eps}")
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize,
            "state_bits": state_bits,
        }  # fmt: skip
        super().__init__(params, defaults, max_grad_norm, lean)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        bits = param_group.get("state_bits", self.defaults["state_bits"])
        if bits not in (8, 32):
            raise ValueError(f"state_bits must be 8 or 32, got {bits}")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Those of ``torch.optim.AdamW`` and of any ``state_bits`` load; the groups keep the ``state_bits`` they have.

        Raises:
            ValueError: a setting that there is not here (``amsgrad``).
        """
        bits = [group["state_bits"] for group in self.param_groups]
        # torch would convert codes to the logits' dtype, all at once.
        kept = {index: {k: v for k, v in state.items() if k in _CODES} for index, state in state_dict["state"].items()}
        rest = {index: {k: v for k, v in state.items() if k not in _CODES}
                for index, state in state_dict["state"].items()}  # fmt: skip
        super().load_state_dict({**state_dict, "state": rest})
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(saved, params, strict=True):
            for name, value in kept.get(index, {}).items():
                self.state[param][name] = value.to(param.device)
        for group, group_bits in zip(self.param_groups, bits, strict=True):
            group["state_bits"] = group_bits

    def _state_of(self, group: dict[str, Any], param: nn.Parameter, bits: int = 32) -> dict[str, Any]:
        """The parameter's state in so many bits: made, or converted where it has others."""
        state = self.state[param]

        def unit() -> Tensor:
            return state_codes.average_unit(group["betas"], state["step"])

        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            if bits == 8:
                state.update(zip(_CODES, state_codes.zeros(param), strict=True))
            else:
                state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        codes = state.get("exp_avg_codes")
        if codes is not None:
            # Codes are in a unit that the betas decide about: a schedule may have changed the first one.
            before = state.setdefault("code_betas", tuple(group["betas"]))
            if before[1] != group["betas"][1]:
                raise ValueError(
                    f"states in 8 bits were made with betas[1] = {before[1]} and cannot go on with "
                    f"{group['betas'][1]}: set it back, or train with state_bits=32"
                )
            if before != tuple(group["betas"]):
                state_codes.change_unit(codes, state_codes.average_unit(before, state["step"]), unit())
                state["code_betas"] = tuple(group["betas"])
        if codes is not None and (bits == 32 or not _lies_like(codes, param)):
            first, second, scales = (state.pop(name) for name in _CODES)
            del state["code_betas"]
            for name, average in zip(_AVERAGES, state_codes.decode(first, second, scales, unit()), strict=True):
                state[name] = torch.empty_like(param).copy_(average)
        if bits == 8 and "exp_avg" in state:
            first, second = (torch.empty_like(param).copy_(state.pop(name)) for name in _AVERAGES)
            state.update(zip(_CODES, state_codes.encode(first, second, unit(), state["step"]), strict=True))
        return state

    def _mask_step(
        self, group: dict[str, Any], leaves: list[MaskedLeaf], factor: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        bits = group["state_bits"]
        states = [self._state_of(group, leaf.mask_logits, bits) for leaf in leaves]
        torch._foreach_add_([state["step"] for state in states], 1.0)
        logits, rest = _common(leaves, states)
        averages = [[state[name] for state in states] for name in (_CODES if bits == 8 else _AVERAGES)]
        averages += [] if bits == 8 else [[]]  # no scales
        settings = (_rate(group), *group["betas"], group["eps"], group["weight_decay"], group["maximize"])
        return ops.mask_adamw_(logits, *averages, *rest, factor, *settings)

    def _step_tensors(self, group: dict[str, Any], params: list[nn.Parameter]) -> None:
        states = [self._state_of(group, param) for param in params]
        adamw(
            list(params), gradients(params), [state["exp_avg"] for state in states],
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
            list(params), gradients(params), momentums, has_sparse_grad=False, foreach=None,
            weight_decay=group["weight_decay"], momentum=group["momentum"], lr=group["lr"],
            dampening=group["dampening"], nesterov=group["nesterov"], maximize=group["maximize"],
        )  # fmt: skip
        for param, state, momentum in zip(params, states, momentums, strict=True):
            if group["momentum"]:
                state["momentum_buffer"] = momentum
                state["step"] = torch.ones((), device=param.device)


def _check_settings(lr: float | Tensor, weight_decay: float) -> None:
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr must be a number or a 0-d tensor, got shape {tuple(lr.shape)}")
    elif not lr >= 0.0:
        raise ValueError(f"lr must be >= 0, got {lr}")
    if not weight_decay >= 0.0:
        raise ValueError(f"weight_decay must be >= 0, got {weight_decay}")
