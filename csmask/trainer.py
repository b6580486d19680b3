"""``TemperatureCallback``: what transformers' Trainer needs to train a circuit, beside the circuit itself."""

from __future__ import annotations

import math
import sys
import warnings
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .circuit import CircuitModel
from .l0_rider import L0Rider
from .mask_optimizer import _MaskOptimizer
from .schedule import TemperatureSchedule, temperature_at

UNITS = ("step", "epoch")


class TemperatureCallback(TrainerCallback):
    """Anneals the temperature of a circuit over a training run of transformers' ``Trainer``.

    ``Trainer(model=circuit, args=args, train_dataset=..., callbacks=[TemperatureCallback()])`` is all there is to it.
    The temperature follows from the step that the run is at: a resumed run goes on where it was. What the Trainer logs
    gains ``l0``, ``kept_fraction``, ``undecided_fraction``, ``temperature`` and ``l0_lambda``. Where the loss is not
    the one of the circuit's forward (label smoothing, ``compute_loss_func``) the l0 term's gradient enters with that of
    the outputs, once per optimizer step, unless the function takes ``circuit.l0()`` itself; logged losses are then
    without the term.

    Args:
        max_temperature: reached exactly in the last step or epoch.
        kind: ``"exponential"`` or ``"linear"``.
        per: ``"step"`` changes the temperature after each optimizer step, ``"epoch"`` after each epoch.
        max_undecided: stop when the share of weights with ``|T * S| < 4`` is below it; None for all steps.
        log: False to leave the logs as they are. Reporting integrations that ``report_to`` names see logs before any
            other callback; to have these values there, pass them as callbacks after this one.

    Raises:
        ValueError, TypeError: a setting that the schedule does not take; in training, a model without a circuit, an
            ``l0_target`` with ``per="epoch"``, or, before a log, an evaluation or a save, logits that hold NaN.
        RuntimeError: fp16 with an optimizer in lean mode.
    """

    def __init__(
        self,
        max_temperature: float = 200.0,
        kind: str = "exponential",
        per: str = "step",
        max_undecided: float | None = None,
        log: bool = True,
    ) -> None:
        temperature_at(0, 1, max_temperature, kind)
        if per not in UNITS:
            raise ValueError(f"per must be one of {', '.join(map(repr, UNITS))}, got {per!r}")
        if max_undecided is not None and not 0 < max_undecided <= 1:
            raise ValueError(f"max_undecided must be in (0, 1], or None for all steps, got {max_undecided}")
        self.max_temperature, self.kind, self.per = float(max_temperature), kind, per
        self.max_undecided, self.log = max_undecided, log
        self.circuit: CircuitModel | None = None
        self.schedule: TemperatureSchedule | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.circuit = circuit = circuit_in(kwargs["model"])
        wrapper = kwargs.get("optimizer")
        scaler, optimizer = getattr(wrapper, "scaler", None), getattr(wrapper, "optimizer", wrapper)
        if scaler is not None and isinstance(optimizer, _MaskOptimizer):
            optimizer.check_unscaled()
        total, done = state.max_steps, state.global_step
        if self.per == "epoch":
            if circuit.circuit_config.l0_target is not None:
                raise ValueError("l0_target counts optimizer steps: use TemperatureCallback(per='step')")
            if state.num_train_epochs >= sys.maxsize:  # what transformers makes of a dataset without a length
                raise ValueError("the training dataset has no length to count epochs by: use per='step'")
            total, done = math.ceil(state.num_train_epochs), int(state.epoch or 0)
        settings = {"total": total, "max_temperature": self.max_temperature, "kind": self.kind}
        self.schedule = TemperatureSchedule(circuit, **settings)
        self.schedule.load_state_dict({**settings, "t": done})
        if circuit.circuit_config.add_l0 and any(p.requires_grad for p in circuit.mask_parameters()):
            circuit.l0_rider = L0Rider() if scaler is None else L0Rider(scaler.get_scale)
        if isinstance(kwargs["model"], nn.Module) and hasattr(kwargs["model"], "peft_config"):
            _check_adapters(kwargs["model"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.circuit is not None and self.circuit.l0_rider is not None:
            self.circuit.l0_rider.begin_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.schedule is not None
        if self.circuit is not None and self.circuit.l0_rider is not None:
            self.circuit.l0_rider.end_step()
        self._check_logits(control)
        if self.per == "step":
            self.schedule.step()
            if self.max_undecided is not None and self.schedule.finished(self.max_undecided):
                control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.schedule is not None
        self._check_logits(control)
        if self.per == "epoch":
            self.schedule.step()
            if self.max_undecided is not None and self.schedule.finished(self.max_undecided, every=1):
                control.should_training_stop = True

    def _check_logits(self, control: TrainerControl) -> None:
        """Before anything is logged, evaluated, saved or done: NaN would go on, and looks pruned in evaluation."""
        assert self.circuit is not None
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self.circuit.check_logits()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        # Those of a training step: evaluation has logs, too, and so has the end.
        if not self.log or self.circuit is None or logs is None or "loss" not in logs:
            return
        telemetry = self.circuit.telemetry()
        logs.update(telemetry)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(telemetry)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.circuit is not None:
            self.circuit.l0_rider = None


def _check_adapters(model: nn.Module) -> None:
    if not isinstance(model, CircuitModel):
        warnings.warn(
            "the Trainer's model is a PEFT model over a circuit, whose checkpoints hold adapters and no masks: mask "
            "the model with adapters instead, CircuitModel(config, get_peft_model(model, ...))",
            stacklevel=3,
        )


def circuit_in(model: nn.Module) -> CircuitModel:
    """The circuit that a model is or, compiled or wrapped for several processes, holds.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if isinstance(module, CircuitModel):
            return module
    raise ValueError(
        f"TemperatureCallback anneals a circuit, and the Trainer's model, a {type(model).__name__}, is none and holds "
        "none: pass model=CircuitModel(config, model)"
    )
