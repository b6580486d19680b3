"""``DensityControl``: drives lambda so that a circuit keeps the fraction of weights that it is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

STATE = ("l0_lambda", "log_odds", "progress")
# Chosen on the demo and on small networks that had learnt their task: learning rates 0.005 to 0.02, 100 to 400 steps.
GAIN = 20.0  # by how much log lambda rises for each unit that the log odds are ahead of their course
PULL = 4.0  # of the course: its power; less leaves too much for the end, when the masks are decided
LEAST_LEFT = 0.4  # of the annealing: towards the end it does not hurry more
START = 0.01  # lambda times the number of weights: too low is soon made up for, too high is hardly undone
FASTEST = 60.0  # change of log lambda in an annealing, were it all as fast as at its fastest
MAX_CHANGE = 1e6  # of lambda, up or down, over its start
MAX_SEEN = 0.9  # kept fraction; above it the log odds depend on the few weights that are on their way already


def check_state(state: Any) -> dict[str, float]:
    """What ``DensityControl.state`` gave; anything else is a ``ValueError``."""
    is_whole = isinstance(state, dict) and sorted(state) == sorted(STATE)
    if not is_whole or not all(isinstance(value, float) and math.isfinite(value) for value in state.values()):
        raise ValueError(f"l0_control must hold finite numbers for {', '.join(STATE)}, got {state!r}")
    return state


class DensityControl(nn.Module):
    """Lambda, and the controller that drives it: arithmetic on the device, without a host synchronisation.

    With ``x = ln(kept / (1 - kept))`` of the kept fraction, ``x*`` that of the target, ``u`` the undecided fraction,
    and ``p`` the progress of the annealing, each update adds to ``ln(lambda)``::

        GAIN * ((x - x_before) + PULL * (x - x*) * (p - p_before) / max(LEAST_LEFT, min(1 - p_before, u)))

    but at most ``FASTEST * (p - p_before)`` either way. That is 0 on the course ``x* + (x_0 - x*) * (1 - p) ** PULL``:
    fast at first, and at the target before the masks are decided, which is when time really ends.

    Args:
        target: kept fraction to reach, in (0, 1).
        start: what lambda starts with.
        device: where it lives.

    Attributes:
        l0_lambda: 0-d fp32 buffer, what multiplies l0 in the loss.
        log_odds, progress: 0-d fp32 buffers, ``x`` and ``p`` of the last update.
        driven: whether there is anyone to call ``update``.
    """

    l0_lambda: Tensor
    log_odds: Tensor
    progress: Tensor

    def __init__(self, target: float, start: float, device: torch.device) -> None:
        super().__init__()
        self.target_log_odds = math.log(target / (1 - target))
        self.start = start
        self.driven = False
        self.reset(device)

    def reset(self, device: torch.device) -> None:
        """As at the beginning, on a device."""
        # Progress 1: the first update begins an annealing.
        for name, value in zip(STATE, (self.start, 0.0, 1.0), strict=True):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32, device=device))

    @torch.no_grad()
    def update(self, fractions: Tensor, progress: float) -> None:
        """One step of the controller, in place.

        Args:
            fractions: kept and undecided, of the masks as they are: ``(2,)``.
            progress: of the annealing, in [0, 1]; not above that of the last update where a new annealing begins.
        """
        top = max(math.log(MAX_SEEN / (1 - MAX_SEEN)), self.target_log_odds)
        kept, undecided = fractions.to(self.log_odds).unbind()
        log_odds = torch.logit(kept, eps=1e-6).clamp(max=top)
        begins = self.progress >= progress
        change = torch.where(begins, 0.0, log_odds - self.log_odds)
        before = torch.where(begins, 0.0, self.progress)
        passed = progress - before
        left = torch.minimum(1 - before, undecided).clamp(min=LEAST_LEFT)
        change = GAIN * (change + PULL * (log_odds - self.target_log_odds) * passed / left)
        change = torch.minimum(torch.maximum(change, -FASTEST * passed), FASTEST * passed)
        self.l0_lambda.mul_(torch.exp(change)).clamp_(self.start / MAX_CHANGE, self.start * MAX_CHANGE)
        self.log_odds.copy_(log_odds)
        self.progress.fill_(progress)

    def state(self) -> dict[str, float]:
        """The buffers as plain numbers, for a file."""
        return {name: float(buffer) for name, buffer in self.named_buffers()}

    @torch.no_grad()
    def load_state(self, state: dict[str, float]) -> None:
        """Go on from ``state()``."""
        for name, buffer in self.named_buffers():
            buffer.fill_(state[name])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """``.to(dtype)`` moves the buffers and leaves them in fp32, as it does the mask logits."""
        was_meta = self.l0_lambda.is_meta

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        if was_meta and not self.l0_lambda.is_meta:
            self.reset(self.l0_lambda.device)
        return self
