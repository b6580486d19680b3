"""Adding the l0 term to the loss in whatever a model's forward returns, once per optimizer step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

# Arguments beside "labels", "next_sentence_label" ... that make a transformers model compute a loss.
_LABEL_NAMES = ("start_positions", "end_positions", "return_loss")


def add_to_loss(
    output: Any,
    penalty: Callable[[], Tensor],
    has_labels: Callable[[], bool],
) -> Any:
    """``output`` with ``penalty()`` added to its loss, if it has one.

    Args:
        output: a transformers ``ModelOutput``, a dict, a named tuple or an object with a ``loss``; or a plain tuple
            (``return_dict=False``), whose first element is the loss if it is one number and has a gradient, or labels
            were given.
        penalty: 0-d, called only if there is a loss.
        has_labels: whether labels were given; called only for a plain tuple.

    Raises:
        ValueError: a loss that is not one number, to whose elements the term would be added over and over.
    """
    if isinstance(output, tuple) and not hasattr(output, "_fields"):
        first = output[0] if output else None
        if not isinstance(first, Tensor) or first.dim() or not (first.requires_grad or has_labels()):
            return output
        return (first + penalty().to(first.device), *output[1:])
    is_dict = isinstance(output, dict)
    loss = output.get("loss") if is_dict else getattr(output, "loss", None)
    if loss is None:
        return output
    # torch.nn.DataParallel's replicas are given num_items_in_batch as (1, 1), which shapes their loss.
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"the model's loss must be one number (a 0-d tensor) for the l0 term to be added, got {what}; "
            "reduce it, or set add_l0=False and add circuit.l0() yourself"
        )
    loss = loss + penalty().to(loss.device)
    if isinstance(output, tuple):
        return output._replace(loss=loss)  # type: ignore[attr-defined]
    if is_dict:
        output["loss"] = loss  # a ModelOutput sets its attribute along with the key
    else:
        output.loss = loss
    return output


def gives_labels(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a call gives the model what it computes a loss from, under transformers' names for it."""
    given = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
    return any(
        value is not None and value is not False and ("label" in name or name in _LABEL_NAMES)
        for name, value in given.items()
    )


def share_of_step(model: nn.Module, kwargs: dict[str, Any]) -> Tensor | float:
    """The share that a micro-batch has in an optimizer step: of its labels, if their number in the step is given.

    A model that is given ``num_items_in_batch`` divides the sum of its labels' losses by it, and the losses of a step's
    micro-batches, in all processes, are added up: so are these shares, to 1.
    """
    total = kwargs.get("num_items_in_batch")
    shifted = kwargs.get("shift_labels")
    labels = kwargs.get("labels") if shifted is None else shifted
    if total is None or not isinstance(labels, Tensor):
        return 1.0
    if isinstance(total, Tensor):
        total = total.reshape(())
    if shifted is None and _shifts_labels(model):
        labels = labels[..., 1:]  # the first token of a row is no target
    return labels.ne(-100).sum() / total


def _shifts_labels(model: nn.Module) -> bool:
    """Whether it is a causal language model, by its loss: transformers' Trainer counts labels by the same rule."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    is_causal = LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss
    return is_causal and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
