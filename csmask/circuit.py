"""``CircuitModel``: a model with masks over its weights. Most of its length is the docstrings of the public API."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, quantised_base, shards, state
from .ablation import COMPLEMENT_MODES, check_ablation_mode
from .config import L0_REDUCTIONS, CircuitConfig
from .density import START, DensityControl
from .functional import check_temperature, check_weight_dtype
from .l0_rider import L0Rider
from .l0_total import total_l0
from .layers import MaskedLayer, check_execution
from .leaf_group import whole_groups
from .loss import add_to_loss, gives_labels, share_of_step
from .masked_layer import check_numbers
from .masked_weight import KEEP_MODES
from .philox import check_seed
from .recompute import checkpoint_frozen_layers, checkpointable_layers
from .signature import class_like, takes_num_items
from .surgery import (
    disable_fused_encoder_layers,
    enable_nested_tensors,
    find_masked,
    find_targets,
    swap_in,
    swap_out,
    warn_of_bypassed,
)


class CircuitModel(nn.Module):
    """A model whose chosen layers are masked, with the masks in training.

    The layers of ``model`` are masked in place (``unload()`` undoes it). The circuit starts in train mode, with soft
    masks and temperature 1; ``eval()`` gives hard masks. Attributes that the circuit does not have are the base
    model's, so ``generate``, ``config``, ``device`` or ``gradient_checkpointing_enable`` work as before.

    Args:
        config: what to mask and how; copied.
        model: any ``torch.nn.Module``.

    Attributes:
        circuit_config: the config. (``config`` is the base model's.)
        wrapped_model: the base model, whose layers are masked.
        masked_layers: the masked layers by name, in the model's order.

    Raises:
        ValueError, TypeError, NotImplementedError: a config or a layer that cannot be had; the model is as it was.

    Example::

        config = CircuitConfig(target_layers="all-linear", l0_lambda=1e-6)
        circuit = CircuitModel(config, model)
        optimizer = torch.optim.Adam(circuit.mask_parameters(), lr=0.1)
    """

    def __init__(self, config: CircuitConfig, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(config, CircuitConfig):
            raise TypeError(f"config must be a CircuitConfig, got {type(config).__name__}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if isinstance(model, CircuitModel):
            raise ValueError("model is a CircuitModel already; wrap its base, circuit.unload()")
        config = copy.deepcopy(config)
        config.validate()
        check_execution(config.execution)
        targets = find_targets(model, config.target_layers)
        if any(isinstance(module, MaskedLayer) for module in model.modules()):
            raise ValueError(
                "the model belongs to another circuit: unload() that one, or name all layers in one config"
            )
        self.circuit_config = config
        self.base_requires_grad = {n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)}
        self.base_training = {n: m.training for n, m in model.named_modules()}
        base_parameters = list(model.parameters())
        self.wrapped_model = model
        self._bypass_checked = False
        self._fingerprint: Any = None
        self._takes_num_items = takes_num_items(model)
        self.l0_rider: L0Rider | None = None
        self.register_state_dict_post_hook(state.drop_frozen)
        self.register_load_state_dict_post_hook(state.forgive_frozen)
        try:
            self.masked_layers = swap_in(targets, config)
            if config.freeze_base:
                for param in base_parameters:
                    param.requires_grad_(False)
            disable_fused_encoder_layers(model)
            quantised_base.hold_formats(model)
            self._checkpointable = checkpointable_layers(model)
            self._set_ablation(config.mask_hparams["ablation"], 0)
            self.train()
            self.l0_control = self._new_l0_control()
            self.__class__ = class_like(type(self), model)
        except BaseException:
            self._restore_base(targets.values())
            raise

    # Running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward; in train mode its loss, if it returns one, gains ``l0_lambda * l0``.

        Raises:
            RuntimeError: the config has an ``l0_target``, and nothing drives lambda.
        """
        layers = self._recomputing_layers()
        if layers:
            kwargs = self._without_cache(kwargs)
        add_l0 = self.training and self.circuit_config.add_l0
        self._record_l0(add_l0)
        try:
            with checkpoint_frozen_layers(layers) if layers else contextlib.nullcontext():
                output = self._run_base(*args, **kwargs)
            if add_l0:
                output = self._add_l0(output, args, kwargs)
        finally:
            for layer in self.masked_layers.values():
                layer.l0_record.end()
        return output

    def _record_l0(self, wanted: bool) -> None:
        """Tell the layers whether to leave the sum of their mask, which forward's kernels make anyway, for the loss."""
        for layer in self.masked_layers.values():
            layer.l0_record.begin(wanted, self.training, shards.is_sharded(layer._parameters["mask_logits"]))

    def _run_base(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or self._bypass_checked:  # a graph is to know nothing of the second
            return self.wrapped_model(*args, **kwargs)
        with warn_of_bypassed(self.wrapped_model, self.masked_layers):
            output = self.wrapped_model(*args, **kwargs)
        self._bypass_checked = True
        return output

    def _recomputing_layers(self) -> list[nn.Module]:
        if not (self.training and self.circuit_config.freeze_base):
            return []
        return [layer for layer in self._checkpointable if layer.gradient_checkpointing]

    def _without_cache(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Switch the key-value cache off, as transformers does: a layer that recomputes would write it twice."""
        if "use_cache" in inspect.signature(self.wrapped_model.forward).parameters:
            return {**kwargs, "use_cache": False}
        return kwargs

    def _add_l0(self, output: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        rider = self.l0_rider
        found: list[Tensor] = []

        def l0() -> Tensor:  # once, though it may ride and be in the loss
            if not found:
                found.append(self._total_l0())
            return found[0]

        def penalty() -> Tensor:
            total = self.l0_lambda * (l0() if rider is None else rider.watch(l0()))
            if kwargs.get("num_items_in_batch") is None or not self._takes_num_items:
                return total
            return total * share_of_step(self.wrapped_model, kwargs)

        if rider is not None:
            output = rider.mount(output, lambda: self.l0_lambda * l0())
        elif kwargs.get("num_items_in_batch") is not None:
            self._warn_without_rider(output)
        return add_to_loss(output, penalty, lambda: gives_labels(self.wrapped_model, args, kwargs))

    def _warn_without_rider(self, output: Any) -> None:
        """transformers' Trainer takes the labels out of the batch, for label smoothing or a loss function."""
        if isinstance(output, dict) and output.get("loss") is None:
            warnings.warn(
                "forward was given num_items_in_batch and no labels, so that the l0 term is in no loss: pass "
                "callbacks=[TemperatureCallback()] to the Trainer, or add circuit.l0_lambda * circuit.l0() to "
                "a loss of your own",
                stacklevel=4,
            )

    @property
    def accepts_loss_kwargs(self) -> bool:
        """For transformers' Trainer: whether the base divides its loss by a ``num_items_in_batch`` that it is given."""
        return self._takes_num_items

    # For transformers' Trainer, which refuses to train a quantised model unless something else is trained on top of it.
    _hf_peft_config_loaded = True

    def train(self, mode: bool = True, *, train_bool: bool | None = None) -> CircuitModel:
        """Soft masks (``mode=True``) or hard ones; a frozen base stays in eval: no dropout, fixed norm statistics.

        ``train_bool`` is NeuroSurgeon's name for ``mode``.
        """
        mode = mode if train_bool is None else train_bool
        if not isinstance(mode, bool):
            raise ValueError(f"training mode must be True or False, got {mode!r}")
        changes, self.training = self.training != mode, mode
        self.wrapped_model.train(mode and not self.circuit_config.freeze_base)
        for layer in self.masked_layers.values():
            if changes and layer.masked_weight.keep != "always":
                layer.masked_weight.drop()  # soft masks are of no use in evaluation, nor hard ones in training
            if changes and layer.leaf is not None:
                layer.leaf.drop_memory()
            layer.training = mode
        return self

    def to(self, *args: Any, **kwargs: Any) -> CircuitModel:
        """As any module's ``to``; logits and temperature keep fp32.

        Raises:
            TypeError: a dtype that masked layers cannot compute in; nothing is changed.
        """
        dtype = torch._C._nn._parse_to(*args, **kwargs)[1]
        if dtype is not None:
            check_weight_dtype(dtype)
        return super().to(*args, **kwargs)

    # Masks

    @property
    def _first_layer(self) -> MaskedLayer:
        """A layer to ask for what all layers have in common."""
        if not self.masked_layers:
            raise ValueError("the circuit was unloaded: it has no masked layers any more")
        return next(iter(self.masked_layers.values()))

    @property
    def temperature(self) -> float:
        """``T``, which multiplies the mask logits: one value for all layers, positive and finite."""
        return float(self._first_layer.temperature)

    @temperature.setter
    def temperature(self, value: float) -> None:
        value = check_temperature(value)
        with torch.no_grad():
            leaves = [layer.leaf for layer in self.masked_layers.values() if layer.leaf is not None]
            for leaf in leaves:
                leaf.flush()  # what waits belongs to the old temperature
            for layer in self.masked_layers.values():
                # In place: a compiled graph reads the new value without being compiled again.
                layer.temperature.fill_(value)
                if layer.leaf is not None and layer.waits:
                    layer.leaf.prepare()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, those too that wait for an optimizer."""
        leaves = [layer.leaf for layer in self.masked_layers.values() if layer.leaf is not None]
        for leaf in leaves:
            leaf.check_clearable()
        for leaf in leaves:
            leaf.discard()
        super().zero_grad(set_to_none)

    def named_mask_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """``(layer name + ".mask_logits" or ".bias_mask_logits", parameter)`` in the model's order."""
        for name, layer in self.masked_layers.items():
            yield f"{name}.mask_logits", layer.mask_logits
            if layer.bias_mask_logits is not None:
                yield f"{name}.bias_mask_logits", layer.bias_mask_logits

    def mask_parameters(self) -> list[nn.Parameter]:
        """The mask logits: what an optimizer gets."""
        return [param for _, param in self.named_mask_parameters()]

    def reset_masks(self) -> None:
        """Masks as at the beginning: logits at ``mask_init_value``, without gradients; temperature 1; lambda anew.

        A model that was masked on the meta device gets its masks by ``circuit.to_empty(device=...)``, as it gets its
        weights' memory. Where the weights come by another way (``load_state_dict(assign=True)``, accelerate's
        ``load_checkpoint_in_model``), call this afterwards: masks are made beside weights that are there. An optimizer
        is to be made after that; one that there is keeps its states.
        """
        for layer in self.masked_layers.values():
            layer.reset_masks()
        if self.l0_control is not None:
            self.l0_control.reset(self._first_layer.mask_logits.device)

    def use_masks(
        self,
        flag: bool | None = None,
        names: str | Iterable[str] | None = None,
        *,
        value: bool | None = None,
        name_list: Iterable[str] | None = None,
    ) -> None:
        """Switch masks on or, for plain dense weights, off.

        Args:
            flag: True for masks.
            names: layers as in ``target_layers`` (names, globs, regular expressions); all by default.
            value, name_list: NeuroSurgeon's keywords for ``flag`` and ``names``.

        Raises:
            ValueError: a name that is not a masked layer; nothing is switched.
        """
        flag = value if flag is None else flag
        names = name_list if names is None else names
        if not isinstance(flag, bool):
            raise TypeError(f"flag must be True or False, got {flag!r}")
        layers = self.masked_layers if names is None else find_masked(self.wrapped_model, names)
        for layer in layers.values():
            layer.use_masks = flag

    # Execution

    def set_execution(self, execution: str, names: str | Iterable[str] | None = None) -> None:
        """Choose when masks are computed, for all layers or for some; the masks stay what they are.

        Args:
            execution: ``"auto"``, ``"per_step"`` (with an optimizer of ``csmask.optim``), ``"per_forward"``,
                ``"in_kernel"`` or ``"reference"``, as in ``CircuitConfig``.
            names: layers as in ``target_layers``; all by default, and then also for checkpoints to come.

        Raises:
            ValueError: an execution that there is not, a name that is not a masked layer; nothing
                is changed.
        """
        check_execution(execution)
        layers = self.masked_layers if names is None else find_masked(self.wrapped_model, names)
        for layer in layers.values():
            layer.execution = execution
        if names is None:
            self.circuit_config.execution = execution

    def keep_masked_weights(self, when: str) -> None:
        """When ``"per_forward"`` layers keep their masked weight from one use to the next; frees what is kept now.

        Args:
            when: ``"training"`` (the default): backward finds what forward made, and so do the following micro-batches
                once a ``torch.optim`` optimizer has stepped the logits, for one masked weight more in memory (2 bytes
                per weight in bf16). ``"always"``: in evaluation too, which then costs what the dense model costs; after
                writing to ``mask_logits.data`` by hand, or replaying a CUDA graph that does, call this again.
                ``"never"``: made anew at each use, as those of quantised layers are whatever this says.
        """
        if when not in KEEP_MODES:
            raise ValueError(f"when must be one of {', '.join(map(repr, KEEP_MODES))}, got {when!r}")
        for layer in self.masked_layers.values():
            layer.masked_weight.keep = when
            layer.masked_weight.drop()

    def accumulate_in_kernel(self, flag: bool) -> None:
        """Whether kernels add to ``mask_logits.grad`` where there is a gradient already, instead of autograd.

        Saves 8 bytes of traffic per weight and the memory of one layer's gradient from the second micro-batch on. No
        effect in several processes, where DDP and FSDP need to see what autograd accumulates. Logits with hooks of
        their own, ``torch.autograd.grad`` and ``backward(inputs=...)`` go through autograd, too. Off by default.
        """
        if not isinstance(flag, bool):
            raise TypeError(f"flag must be True or False, got {flag!r}")
        for layer in self.masked_layers.values():
            layer.accumulate_in_kernel = flag

    # l0

    def l0(self, reduction: str | None = None) -> Tensor:
        """The sum of the masks now in use, differentiable while they are soft: for a loss of one's own.

        After a forward and before its backward it is the forward's own, at no pass over the logits; what is written to
        their ``data`` in between cannot be seen.

        Args:
            reduction: ``"sum"`` counts weights, ``"mean"`` divides by the number of maskable weights; by default the
                config's ``l0_reduction``.

        Returns:
            0-d fp32. Layers whose masks are switched off do not count.
        """
        reduction = self.circuit_config.l0_reduction if reduction is None else reduction
        if reduction not in L0_REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(map(repr, L0_REDUCTIONS))}, got {reduction!r}")
        l0 = self._total_l0(reduction)
        return l0 if self.l0_rider is None else self.l0_rider.watch(l0)

    def _total_l0(self, reduction: str | None = None) -> Tensor:
        """``l0()``, of whose gradient nobody hears."""
        reduction = self.circuit_config.l0_reduction if reduction is None else reduction
        layers = [layer for layer in self.masked_layers.values() if layer.use_masks]
        device = self._first_layer.mask_logits.device
        total = total_l0(layers, device)
        if reduction == "mean":
            total = total / max(1, sum(layer.maskable for layer in self.masked_layers.values()))
        return total

    @property
    def l0_lambda(self) -> float | Tensor:
        """What multiplies ``l0()`` in the loss: the config's number, or with an ``l0_target`` a 0-d fp32 tensor.

        Raises:
            RuntimeError: nothing drives lambda to the ``l0_target``.
        """
        if self.l0_control is None:
            return self.circuit_config.l0_lambda
        if not self.l0_control.driven:
            raise RuntimeError(
                f"l0_target is {self.circuit_config.l0_target}, but nothing drives lambda there: make a "
                "TemperatureSchedule(circuit, total) before the first forward and step() it after each optimizer step "
                "(or call circuit.steer_l0(progress) there)"
            )
        return self.l0_control.l0_lambda

    def steer_l0(self, progress: float) -> None:
        """Bring lambda nearer to where ``l0_target`` is met when the annealing ends; nothing without an ``l0_target``.

        ``TemperatureSchedule`` calls it; a loop that sets the temperature itself calls it after an optimizer step,
        before the temperature changes: 20 to 100 times, evenly. Weights are counted by the step of ``per_step``
        execution, and by a pass over the logits elsewhere; nothing waits for the device.

        Args:
            progress: share of the annealing that is done, in [0, 1]; 0 before the first step.
        """
        if self.l0_control is None:
            return
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must be in [0, 1], got {progress}")
        self.l0_control.driven = True
        if progress > 0:
            maskable = sum(layer.maskable for layer in self.masked_layers.values())
            self.l0_control.update(self._count() / maskable, progress)

    def _new_l0_control(self) -> DensityControl | None:
        """A controller whose lambda starts where keeping all weights adds ``START`` to the loss."""
        config = self.circuit_config
        if config.l0_target is None:
            return None
        maskable = sum(layer.maskable for layer in self.masked_layers.values())
        start = START if config.l0_reduction == "mean" else START / max(1, maskable)
        return DensityControl(config.l0_target, start, self._first_layer.mask_logits.device)

    @torch.no_grad()
    def _count(self) -> Tensor:
        """``(kept, undecided)`` weights, int64 on the device."""
        layers = list(self.masked_layers.values())
        device = self._first_layer.mask_logits.device
        total = torch.zeros(2, dtype=torch.int64, device=device)
        counted = []
        for group in whole_groups([layer.leaf for layer in layers if layer.leaf is not None and layer.waits]):
            counts = group.counts_now()
            if counts is not None:
                counted.append(group)
                total = total + counts.sum(0).to(device)
        for layer in layers:
            by_group = layer.leaf is not None and layer.leaf.group in counted
            if not by_group or layer.bias_mask_logits is not None:
                total = total + layer.mask_counts(weights=not by_group).to(device)
        return total

    def compute_l0_statistics(self) -> dict[str, Any]:
        """Sizes of the circuit (the hard mask, whatever the mode), as plain Python numbers counted in weights.

        Returns:
            ``total_l0`` and ``max_l0`` (kept and maskable weights, masked biases included), and by layer name
            ``layer2l0`` and ``layer2maxl0``.

        Raises:
            ValueError: a layer whose logits hold NaN.
        """
        _ = self._first_layer  # raises after unload()
        self.check_logits()
        kept = {name: layer.kept() for name, layer in self.masked_layers.items()}
        maskable = {name: layer.maskable for name, layer in self.masked_layers.items()}
        return {
            "total_l0": sum(kept.values()),
            "max_l0": sum(maskable.values()),
            "layer2l0": kept,
            "layer2maxl0": maskable,
        }

    def density(self) -> float:
        """Kept fraction: the circuit's weights over all maskable weights."""
        statistics = self.compute_l0_statistics()
        return statistics["total_l0"] / max(1, statistics["max_l0"])

    @torch.no_grad()
    def telemetry(self) -> dict[str, float]:
        """``l0``, ``kept_fraction``, ``undecided_fraction``, ``temperature`` and ``l0_lambda``, as they are now.

        Reads from the device. In ``per_step`` execution the sums and counts are those that the step has left.

        Raises:
            ValueError: a layer whose logits hold NaN, by its name.
        """
        maskable = max(1, sum(layer.maskable for layer in self.masked_layers.values()))
        kept, undecided = (self._count() / maskable).tolist()
        l0 = float(self.l0("sum"))
        if math.isnan(l0):
            self.check_logits()
        control = self.l0_control
        return {
            "l0": l0,
            "kept_fraction": kept,
            "undecided_fraction": undecided,
            "temperature": self.temperature,
            "l0_lambda": self.circuit_config.l0_lambda if control is None else float(control.l0_lambda),
        }

    def undecided_fraction(self) -> float:
        """Share of weights with ``|T * S| < 4``, whose soft mask is still well between 0 and 1.

        Raises:
            ValueError: a layer whose logits hold NaN, which would look decided.
        """
        self.check_logits()
        layers = self.masked_layers.values()
        return sum(layer.undecided() for layer in layers) / max(1, sum(layer.maskable for layer in layers))

    def check_logits(self) -> None:
        """Raise a ``ValueError`` that names the layer if any mask logits hold NaN; reads all of them.

        One NaN in a batch makes all that it reaches NaN. No step looks, since that would wait for the device; what
        reports does: ``telemetry()``, statistics, ``TemperatureSchedule.finished()``, ``TemperatureCallback``, saving.
        Infinite logits are masks that are decided for good.
        """
        for name, param in self.named_mask_parameters():
            check_numbers(name, param)

    # Ablation

    @property
    def ablate_mode(self) -> str:
        """The ablation mode in use."""
        return self._first_layer.ablation

    def set_ablate_mode(
        self,
        mode: str | None = None,
        seed: int | None = None,
        *,
        ablation: str | None = None,
        force_resample: bool = False,
    ) -> None:
        """Choose which weights evaluation uses.

        ======================  =============================================================================
        ``none``                the circuit C kept, the rest zero
        ``zero_ablate``         C zeroed, the rest kept
        ``random_ablate``       C replaced by random values as of a fresh layer, the rest kept
        ``randomly_sampled``    as many entries as C has, drawn from outside C, zeroed; all else kept
        ``complement_sampled``  the same, under NeuroSurgeon's name
        ``uniform_sampled``     as many entries as C has, drawn from all entries, zeroed; all else kept
        ======================  =============================================================================

        Args:
            mode: one of these.
            seed: of the draws, in [0, 2**64); by default the seed last used, at first 0.
            ablation, force_resample: NeuroSurgeon's keyword for ``mode``, and its request for a new draw (the next
                seed).

        Raises:
            ValueError: an unknown mode, masks in training, or a circuit larger than the complement to draw from. The
                mode stays as it was.
        """
        if mode is not None and ablation is not None:
            raise TypeError("give mode or ablation (NeuroSurgeon's name for it), not both")
        mode = check_ablation_mode(mode if mode is not None else ablation)
        if isinstance(seed, bool):  # NeuroSurgeon's second positional argument
            force_resample, seed = seed, None
        if seed is None:
            seed = self._first_layer.ablation_seed + bool(force_resample)
        check_seed(seed)
        if mode != "none" and any(not layer.all_hard for layer in self.masked_layers.values()):
            raise ValueError(f"ablation {mode!r} needs hard masks, but the masks are in training: call .eval() first")
        if mode in COMPLEMENT_MODES:
            for name, layer in self.masked_layers.items():
                layer.check_complement(name)
        self._set_ablation(mode, seed)

    def _set_ablation(self, mode: str, seed: int) -> None:
        for layer in self.masked_layers.values():
            layer.ablation, layer.ablation_seed = mode, seed
            layer.clear_ablation_cache()

    @contextlib.contextmanager
    def preserve_mode(self) -> Iterator[None]:
        """Restore train or eval mode, ablation, seed and switched-off masks when the ``with`` block ends."""
        state = [(layer, layer.ablation, layer.ablation_seed, layer.use_masks) for layer in self.masked_layers.values()]
        training = self.training
        try:
            yield
        finally:
            self.train(training)
            for layer, mode, seed, use_masks in state:
                layer.ablation, layer.ablation_seed, layer.use_masks = mode, seed, use_masks
                layer.clear_ablation_cache()

    # Persistence

    def save_pretrained(self, directory: str | os.PathLike, is_main_process: bool = True, **_unused: Any) -> None:
        """Save masks, config, temperature and a fingerprint of the base weights, atomically; not the base itself.

        Of a sharded circuit every process has to call this, and the first one writes.

        Args:
            directory: made if it is not there.
            is_main_process: False for processes that are not to write, where each has all of the circuit.
            _unused: what transformers' models take besides (``save_function``, ``state_dict`` ...) and is settled here.

        Raises:
            ValueError: ``directory`` is a file, or the logits hold NaN.
        """
        if is_main_process or any(shards.is_sharded(p) for p in self.parameters()):
            checkpoint.save_circuit(self, directory)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, **upload: Any) -> Any:
        """Save the circuit, without its base, and upload it to a repository of the Hugging Face Hub.

        Args:
            repo_id: as in ``"me/noun-circuit"``; made if it is not there.
            private: of a repository that is made.
            upload: further arguments of ``huggingface_hub.HfApi.upload_folder`` (``commit_message``, ``revision`` ...).

        Returns:
            What ``upload_folder`` returns.
        """
        from huggingface_hub import HfApi

        api = HfApi()
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.create_repo(repo_id, private=private, exist_ok=True)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **upload)

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, directory: str | os.PathLike, *, check_base: bool = True
    ) -> CircuitModel:
        """Put saved masks on their base model; the circuit is returned in eval mode.

        Args:
            model: the base that the masks were saved over, unmasked.
            directory: where ``save_pretrained`` wrote, or a trainer the circuit's state (``model.safetensors``).
            check_base: False to put the masks on a base with other weights of the same shapes.

        Raises:
            FileNotFoundError: no saved circuit there.
            ValueError: another base, a truncated or edited file, an unknown version. The model is as it was.
        """
        return checkpoint.load_circuit(cls, model, directory, check_base)

    def export(self) -> nn.Module:
        """A copy of the base model as a plain model: the hard mask is written into its weights.

        Its outputs equal the hard-masked circuit's exactly, with all masks on, whatever ``use_masks`` says. A tied
        weight that is masked becomes one of its own. Quantised layers, masked or not, become dense ones, in the model's
        dtype.

        Raises:
            ValueError: the logits hold NaN.
            NotImplementedError: a sharded circuit; a quantised layer that cannot be dequantised; the tied output head
                of an encoder-decoder is masked, which such a model cannot hold.
        """
        model = checkpoint.export_model(self)
        enable_nested_tensors(model)
        return model

    def unload(self) -> nn.Module:
        """Take the masks off, in place, and return the base model as it was before; the circuit is spent."""
        if self.masked_layers:
            shards.check_whole(self.parameters(), "unload()")
            self._restore_base(self.masked_layers.values())
            self.masked_layers = {}
        return self.wrapped_model

    def _restore_base(self, layers: Iterable[nn.Module]) -> None:
        swap_out(layers)
        quantised_base.release_formats(self.wrapped_model)
        enable_nested_tensors(self.wrapped_model)
        for name, param in self.wrapped_model.named_parameters(remove_duplicate=False):
            if name in self.base_requires_grad:
                param.requires_grad_(self.base_requires_grad[name])
        for name, module in self.wrapped_model.named_modules():
            module.training = self.base_training.get(name, module.training)

    # The state of a training: what is trained, with a description of what it was trained over; see ``state``

    def get_extra_state(self) -> Tensor:
        """Config and fingerprint of the base, for ``state_dict()``."""
        return state.describe(self)

    def set_extra_state(self, state_: Any) -> None:
        """Part of ``load_state_dict()``: a ``ValueError`` if the state is of another base; nothing is loaded then."""
        state.check_description(self, state_)

    def __setstate__(self, values: dict[str, Any]) -> None:
        super().__setstate__(values)
        self.__class__ = class_like(type(self), self.wrapped_model)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, after the base: rebuild it from the class that it extends.
        values = {**vars(self), "_fingerprint": None, "l0_rider": None}
        return _empty, (getattr(type(self), "_circuit_class", type(self)),), values

    def __repr__(self) -> str:
        return super().__repr__().replace(self._get_name(), "CircuitModel", 1)

    def __setattr__(self, name: str, value: Any) -> None:
        """What the base has and the circuit has not is set on the base: ``circuit.generation_config = ...``."""
        base = vars(self).get("_modules", {}).get("wrapped_model")
        is_own = base is None or name.startswith("_") or name == "forward" or hasattr(type(self), name)
        if is_own or name in vars(self) or name in self._modules or not hasattr(base, name):
            super().__setattr__(name, value)
        else:
            setattr(base, name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "wrapped_model" or name.startswith("__"):
                raise
            return getattr(self.wrapped_model, name)


def _empty(cls: type[CircuitModel]) -> CircuitModel:
    """A circuit without state, for copy and pickle, which then set it."""
    return cls.__new__(cls)
