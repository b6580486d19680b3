"""Masking large models: no work and no memory beyond the logits, models without weights, models spread over devices."""

from __future__ import annotations

import copy
import sys
import time

import pytest
import torch
from models import MODELS, assert_same_snapshot, randomize_logits, snapshot
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from csmask import CircuitConfig, CircuitModel, MaskAdamW, TemperatureSchedule
from csmask.plan import build, load_config


class Allocations(TorchDispatchMode):
    """Counts operations, and the bytes of memory that they made, by device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def storages(values) -> dict[int, Tensor]:
            return {t.untyped_storage()._cdata: t for t in tree_leaves(values) if isinstance(t, Tensor)}

        out = func(*args, **(kwargs or {}))
        self.operations += 1
        for key, tensor in storages(out).items():
            if key not in storages((args, kwargs)):
                size, device = tensor.untyped_storage().nbytes(), tensor.device.type
                self.bytes[device] = self.bytes.get(device, 0) + size
        return out


# Work and memory of surgery


def test_masking_8_billion_weights_touches_none_of_them():
    model = build(load_config("llama-3-8b"), torch.bfloat16)
    before = {id(param) for param in model.parameters()}
    start = time.perf_counter()
    with Allocations() as count:
        circuit = CircuitModel(CircuitConfig(target_layers="all-linear"), model)
    seconds = time.perf_counter() - start
    layers = list(circuit.masked_layers.values())
    maskable = sum(layer.maskable for layer in layers)
    assert (len(layers), maskable) == (224, 6_979_321_856)
    assert count.bytes.keys() == {"meta"}
    assert count.bytes["meta"] == 4 * maskable + 4 * len(layers)
    assert count.operations <= 8 * len(layers)
    assert before < {id(param) for param in model.parameters()}
    assert seconds < 20  # it takes a tenth of a second; what is excluded is work for each weight
    with Allocations() as count:
        circuit.eval()
        circuit.train()
        circuit.set_execution("in_kernel")
        circuit.use_masks(False, "*.mlp.*")
        circuit.unload()
    assert (count.operations, count.bytes) == (0, {})


def test_the_work_of_surgery_grows_with_the_number_of_layers_and_not_with_its_square():
    def calls(size: int) -> int:
        model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)) for _ in range(size)))
        counted = 0

        def count(_frame, event, _argument) -> None:
            nonlocal counted
            counted += event in ("call", "c_call")

        before = sys.getprofile()
        sys.setprofile(count)
        try:
            CircuitModel(CircuitConfig(target_layers=["all-linear", "*.0", "re:.*0"]), model).unload()
        finally:
            sys.setprofile(before)
        return counted

    calls(2)
    assert calls(800) < 4.5 * calls(200)


@pytest.mark.parametrize("unit", ["weight", "neuron"])
def test_surgery_makes_the_logits_and_no_second_copy_of_a_weight(unit):
    model = MODELS["vit"].build()
    pointers = {name: param.data_ptr() for name, param in model.named_parameters()}
    config = CircuitConfig(target_layers="all", mask_hparams={"mask_unit": unit, "mask_bias": True})
    with Allocations() as count:
        circuit = CircuitModel(config, model)
    logits = sum(4 * param.numel() for param in circuit.mask_parameters())
    assert count.bytes == {"cpu": logits + 4 * len(circuit.masked_layers)}
    with Allocations() as count:
        circuit.eval()
        circuit.set_ablate_mode("zero_ablate")
        circuit.set_ablate_mode("none")
        circuit.train()
        circuit.unload()
    assert count.bytes == {}
    assert {name: param.data_ptr() for name, param in model.named_parameters()} == pointers


# Models without weights: masked on the meta device, given memory and weights afterwards


@pytest.fixture
def memory_is_nan():
    """What ``torch.empty`` gives holds NaN, so that nothing is right by chance."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


HPARAMS = (
    {"mask_init_value": 0.05},
    {"mask_unit": "neuron", "mask_bias": True, "mask_init_value": -0.3, "rescale": True},
)


def pair(name: str, hparams: dict, **config) -> tuple[CircuitModel, CircuitModel]:
    """A circuit on the meta device, and the one that it is to become."""
    settings = CircuitConfig(target_layers="all-linear", mask_hparams=hparams, **config)
    with torch.device("meta"):
        model = MODELS[name].builder(0.0).eval()
    return CircuitModel(settings, model), CircuitModel(settings, MODELS[name].build())


def bring_buffers(circuit: CircuitModel, want: CircuitModel) -> None:
    """Those that are in no checkpoint, which loaders compute anew."""
    for name, buffer in want.wrapped_model.named_buffers():
        if not name.endswith("temperature"):
            module, _, leaf = name.rpartition(".")
            circuit.wrapped_model.get_submodule(module)._buffers[leaf] = buffer.clone()


def weights_of(want: CircuitModel) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in copy.deepcopy(want).unload().state_dict().items()}


def all_at_once(circuit: CircuitModel, want: CircuitModel) -> None:
    circuit.to_empty(device="cpu")
    circuit.wrapped_model.load_state_dict(weights_of(want), strict=False)


def layer_by_layer(circuit: CircuitModel, want: CircuitModel) -> None:
    weights = weights_of(want)
    for name, module in [*circuit.wrapped_model.named_modules(), ("", circuit.l0_control)]:
        if module is None:
            continue
        module.to_empty(device="cpu", recurse=False)
        for leaf, param in module.named_parameters(recurse=False):
            if f"{name}.{leaf}" in weights:
                with torch.no_grad():
                    param.copy_(weights[f"{name}.{leaf}"])


def by_assignment(circuit: CircuitModel, want: CircuitModel) -> None:
    circuit.wrapped_model.load_state_dict(weights_of(want), strict=False, assign=True)
    circuit.wrapped_model.tie_weights()
    circuit.reset_masks()


def by_accelerate(circuit: CircuitModel, want: CircuitModel, folder) -> None:
    from accelerate import load_checkpoint_in_model

    copy.deepcopy(want).unload().save_pretrained(folder)
    load_checkpoint_in_model(circuit.wrapped_model, folder, device_map={"": "cpu"})
    circuit.wrapped_model.tie_weights()
    circuit.reset_masks()


@pytest.mark.parametrize("way", [all_at_once, layer_by_layer, by_assignment, by_accelerate])
@pytest.mark.parametrize("hparams", HPARAMS, ids=["weight", "neuron"])
@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.usefixtures("memory_is_nan")
@pytest.mark.filterwarnings("ignore:mask_bias")
def test_a_model_masked_without_weights_is_the_one_masked_with_them(name, hparams, way, tmp_path):
    circuit, want = pair(name, hparams, l0_target=0.3)
    assert {t.device.type for t in (*circuit.parameters(), *circuit.l0_control.buffers())} == {"meta"}
    objects = [id(param) for param in circuit.mask_parameters()]
    way(*(circuit, want, tmp_path)[: way.__code__.co_argcount])
    bring_buffers(circuit, want)
    for param in circuit.wrapped_model.parameters():
        param.requires_grad_(any(param is p for p in circuit.mask_parameters()))
    assert len(objects) == len(want.mask_parameters())
    assert all(param.dtype == torch.float32 for param in circuit.mask_parameters())
    assert circuit.temperature == 1.0
    assert circuit.l0_control.state() == want.l0_control.state()
    state, wanted = circuit.state_dict(), want.state_dict()
    assert state.keys() == wanted.keys()
    for key in wanted:
        assert torch.equal(state[key], wanted[key]), key
    # And they train alike.
    batch = MODELS[name].batch(0)
    for each in (circuit, want):
        optimizer = MaskAdamW(each.mask_parameters(), lr=0.05)
        schedule = TemperatureSchedule(each, total=20)
        for _ in range(3):
            each(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    for got, expected in zip(circuit.mask_parameters(), want.mask_parameters(), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(circuit.eval()(**batch).logits, want.eval()(**batch).logits)


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("memory_is_nan")
def test_shards_made_on_the_meta_device_get_their_masks_too(one_process):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor

    circuit, want = pair("llama", HPARAMS[0])
    for block in circuit.wrapped_model.model.layers:
        fully_shard(block, mesh=one_process)
    fully_shard(circuit, mesh=one_process)
    circuit.to_empty(device="cpu")
    weights = weights_of(want)
    for name, param in circuit.wrapped_model.named_parameters():
        if name in weights:
            with torch.no_grad():
                param.copy_(distribute_tensor(weights[name], one_process, param.placements))
    bring_buffers(circuit, want)
    batch = MODELS["llama"].batch(0)
    loss, expected = circuit(**batch).loss, want(**batch).loss
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected)
    assert circuit.temperature == 1.0
    for got, other in zip(circuit.mask_parameters(), want.mask_parameters(), strict=True):
        assert isinstance(got, DTensor)
        assert torch.equal(got.full_tensor(), other)
        torch.testing.assert_close(got.grad.full_tensor(), other.grad)


@pytest.mark.usefixtures("memory_is_nan")
def test_moving_a_circuit_that_has_weights_keeps_its_masks():
    circuit, _ = pair("bert", HPARAMS[0])
    circuit.to_empty(device="cpu")
    randomize_logits(circuit)
    circuit.temperature = 5.0
    before = [param.detach().clone() for param in circuit.mask_parameters()]
    for move in (lambda c: c.to("cpu"), lambda c: c.bfloat16(), lambda c: c.float(), lambda c: c.to(torch.float16)):
        move(circuit)
        assert all(torch.equal(a, b) for a, b in zip(before, circuit.mask_parameters(), strict=True))
        assert circuit.temperature == 5.0


@pytest.mark.parametrize("how", ["per_step", "per_step, waiting", "per_forward", "eval"])
def test_reset_masks_begins_anew(how):
    config = CircuitConfig(target_layers="all-linear", mask_hparams={"mask_init_value": 0.1}, l0_target=0.2)
    batch = MODELS["bert"].batch(0)

    def train(circuit: CircuitModel, fused: bool = True, steps: int = 3) -> list[Tensor]:
        optimizer = (MaskAdamW if fused else torch.optim.AdamW)(circuit.mask_parameters(), lr=0.05)
        schedule = TemperatureSchedule(circuit, total=20)
        losses = []
        for _ in range(steps):
            loss = circuit(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.detach())
        if "waiting" in how:
            circuit(**batch).loss.backward()
        return [*losses, *(param.detach().clone() for param in circuit.mask_parameters())]

    circuit = CircuitModel(config, MODELS["bert"].build())
    train(circuit, fused=how.startswith("per_step"))
    if how == "eval":
        circuit.eval()
    circuit.reset_masks()
    assert circuit.training is (how != "eval")
    assert circuit.temperature == 1.0
    assert all(param.grad is None and (param == torch.tensor(0.1)).all() for param in circuit.mask_parameters())
    fresh = CircuitModel(config, MODELS["bert"].build())
    assert circuit.l0_control.state() == fresh.l0_control.state()
    for got, want in zip(train(circuit.train()), train(fresh), strict=True):
        assert torch.equal(got, want)


# Models spread over devices by accelerate, whose hooks move what a layer needs


def parts(place: str = "cpu") -> dict[str, str]:
    """A device for each part of the Llama, the second block's to choose."""
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers.0", "model.layers.1", "lm_head")
    return {name: place if name == "model.layers.1" else "cpu" for name in names}


def hooked(model: nn.Module | None = None) -> nn.Module:
    """A Llama with a hook on each layer, as one that is spread over several GPUs has them."""
    from accelerate import dispatch_model

    model = dispatch_model(MODELS["llama"].build() if model is None else model, parts(), force_hooks=True)
    assert "forward" in vars(model.get_submodule("model.layers.0.mlp.up_proj"))
    return model


def mask(model: nn.Module, targets="all-linear", **config) -> CircuitModel:
    circuit = CircuitModel(CircuitConfig(target_layers=targets, **config), model)
    randomize_logits(circuit)
    return circuit


def numbers(circuit: CircuitModel) -> list[Tensor]:
    """Loss and gradients in training, outputs of evaluation, ablation and the exported model; a fused step."""
    batch = MODELS["llama"].batch(0)
    loss = circuit.train()(**batch).loss
    loss.backward()
    found = [loss, *(param.grad.clone() for param in circuit.mask_parameters())]
    circuit.zero_grad()
    optimizer = MaskAdamW(circuit.mask_parameters(), lr=0.05)
    for _ in range(2):
        circuit(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found += [param.detach().clone() for param in circuit.mask_parameters()]
    circuit.eval()
    found += [circuit(**batch).logits, circuit.generate(batch["input_ids"], max_new_tokens=3, do_sample=False)]
    exported = circuit.export()
    assert not any("Masked" in type(module).__name__ for module in exported.modules())
    found.append(exported(**batch).logits)
    circuit.set_ablate_mode("zero_ablate")
    found.append(circuit(**batch).logits)
    found.append(copy.deepcopy(circuit)(**batch).logits)
    circuit.set_ablate_mode("none")
    return [tensor.detach() for tensor in found]


def assert_same_numbers(got: CircuitModel, want: CircuitModel) -> None:
    for a, b in zip(numbers(got), numbers(want), strict=True):
        assert torch.equal(a, b)


def test_hooks_of_accelerate_run_the_masked_layer_and_unload_gives_them_back():
    model = hooked()
    before = snapshot(model)
    circuit = mask(model)
    seen = []
    layer = circuit.masked_layers["model.layers.0.mlp.up_proj"]
    hook, run = layer._hf_hook, layer._hf_hook.pre_forward
    hook.pre_forward = lambda module, *args, **kwargs: seen.append(module) or run(module, *args, **kwargs)
    assert_same_numbers(circuit, mask(MODELS["llama"].build()))
    assert layer in seen
    del hook.pre_forward
    base = circuit.unload()
    assert base is model
    assert_same_snapshot(before, snapshot(base))
    batch = MODELS["llama"].batch(0)
    assert torch.equal(base(**batch).logits, MODELS["llama"].build()(**batch).logits)


@pytest.mark.parametrize("removed", ["before masking", "while masked"])
def test_hooks_that_are_removed_leave_layers_that_can_be_masked_and_unmasked(removed):
    from accelerate.hooks import remove_hook_from_submodules

    model = hooked()
    if removed == "before masking":
        remove_hook_from_submodules(model)
    circuit = mask(model)
    if removed == "while masked":
        remove_hook_from_submodules(model)
    assert_same_numbers(circuit, mask(MODELS["llama"].build()))
    circuit.unload()
    assert_same_numbers(mask(model), mask(MODELS["llama"].build()))


def test_hooks_that_come_after_the_masks():
    circuit = mask(MODELS["llama"].build())
    hooked(circuit.wrapped_model)
    assert_same_numbers(circuit, mask(MODELS["llama"].build()))
    base = circuit.unload()
    batch = MODELS["llama"].batch(0)
    assert torch.equal(base(**batch).logits, MODELS["llama"].build()(**batch).logits)


def test_a_forward_that_a_user_put_under_a_hook_is_refused():
    from accelerate.hooks import ModelHook, add_hook_to_module

    layer = nn.Linear(3, 3)
    layer.forward = lambda x: x
    add_hook_to_module(layer, ModelHook())
    with pytest.raises(NotImplementedError, match="has a forward of its own"):
        mask(nn.Sequential(layer), "0")


def test_from_pretrained_with_a_device_map(tmp_path):
    from transformers import LlamaForCausalLM

    MODELS["llama"].build().save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", device_map={"": "cpu"})
    circuit = mask(model)
    assert_same_numbers(circuit, mask(MODELS["llama"].build()))
    circuit.save_pretrained(tmp_path / "circuit")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "base", device_map={"": "cpu"})
    loaded = CircuitModel.from_pretrained(again, tmp_path / "circuit")
    batch = MODELS["llama"].batch(0)
    assert torch.equal(loaded(**batch).logits, circuit.eval()(**batch).logits)


def offloaded(how: str, folder) -> nn.Module:
    """A Llama whose second block is on a disk, or as a whole in memory that a hook of the block brings it from."""
    from accelerate import dispatch_model
    from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
    from transformers import LlamaForCausalLM

    model = MODELS["llama"].build()
    if how == "disk":
        return dispatch_model(model, parts("disk"), main_device="cpu", offload_dir=folder)
    if how == "from_pretrained":
        model.save_pretrained(folder / "base")
        options = {"device_map": parts("disk"), "offload_folder": folder / "offload"}
        return LlamaForCausalLM.from_pretrained(folder / "base", **options).eval()
    hook = AlignDevicesHook("cpu", offload=True, place_submodules=True)
    block = model.get_submodule("model.layers.1")
    add_hook_to_module(block, hook if how == "block" else SequentialHook(hook))
    return model


@pytest.mark.parametrize("how", ["disk", "from_pretrained", "block", "sequential"])
def test_offloaded_layers_are_refused_by_name_and_others_masked(how, tmp_path):
    batch = MODELS["llama"].batch(0)
    model = offloaded(how, tmp_path)
    classes = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(NotImplementedError, match=r"model\.layers\.1\.mlp\.up_proj.*offloaded"):
        mask(model, ["model.layers.0.*", "model.layers.1.mlp.up_proj"])
    assert {name: type(module) for name, module in model.named_modules()} == classes
    with pytest.warns(UserWarning, match=r"not masked: model\.layers\.1\.self_attn\.q_proj \(its weight is offloaded"):
        circuit = mask(model)
    want = mask(MODELS["llama"].build(), "model.layers.0.*")
    assert list(circuit.masked_layers) == list(want.masked_layers)
    loss, expected = circuit(**batch).loss, want(**batch).loss
    assert torch.equal(loss, expected)
    # What is behind the masked block is there no more when gradients come back; evaluation needs none.
    with torch.no_grad():
        assert torch.equal(circuit.eval()(**batch).logits, want.eval()(**batch).logits)
    with pytest.raises(NotImplementedError, match="meta device"):
        circuit.save_pretrained(tmp_path / "circuit")
    assert not (tmp_path / "circuit").exists()
    state = circuit.state_dict()
    assert {name for name in state if not name.startswith("wrapped_model.model.layers.0.")} == {"_extra_state"}
    want.load_state_dict(state)
