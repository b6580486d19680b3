"""A circuit in the place of its base model: for callers, copies, hooks, pipelines, adapters and automatic classes."""

from __future__ import annotations

import copy
import inspect
import io
import json
import logging
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from models import MODELS, PlainModel, every_family, randomize_logits
from torch import Tensor, nn

from csmask import CircuitConfig, CircuitModel, MaskAdamW
from csmask.layers import MaskedLayer


def make_circuit(name: str, targets: str | list[str] = "all", **config) -> CircuitModel:
    circuit = CircuitModel(CircuitConfig(target_layers=targets, **config), MODELS[name].build())
    randomize_logits(circuit)
    return circuit


def flat(output) -> list[Tensor]:
    """All tensors of an output, in its order."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for value in values for tensor in flat(value)]


def assert_same_output(got, want) -> None:
    assert type(got) is type(want)
    got, want = flat(got), flat(want)
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


# Its class


@every_family
def test_the_class_is_named_after_the_base_and_has_its_signature(tiny):
    base = tiny.build()
    circuit = CircuitModel(CircuitConfig(target_layers="all"), base)
    assert isinstance(circuit, CircuitModel)
    assert type(circuit).__name__ == circuit._get_name() == type(base).__name__
    assert inspect.signature(circuit.forward) == inspect.signature(base.forward)
    assert next(iter(inspect.signature(type(circuit).forward).parameters)) == "self"
    other = CircuitModel(CircuitConfig(target_layers="all"), tiny.build())
    assert type(other) is type(circuit)
    assert repr(circuit).startswith("CircuitModel(")


class Extended(CircuitModel):
    """A user's subclass with state and methods of its own."""

    def __init__(self, config, model, extra: int) -> None:
        super().__init__(config, model)
        self.extra = extra

    def doubled(self) -> int:
        return 2 * self.extra


class OwnArguments(CircuitModel):
    def forward(self, input_ids, weight=1.0, **kwargs):
        output = super().forward(input_ids, **kwargs)
        output.loss = output.loss * weight
        return output


def test_subclasses_of_circuit_model():
    tiny = MODELS["bert"]
    circuit = Extended(CircuitConfig(target_layers="all"), tiny.build(), 4)
    assert isinstance(circuit, Extended)
    assert type(circuit).__name__ == "BertForSequenceClassification"
    for other in (copy.deepcopy(circuit), copy.copy(circuit), pickle.loads(pickle.dumps(circuit))):
        assert type(other) is type(circuit)
        assert other.doubled() == 8
    own = OwnArguments(CircuitConfig(target_layers="all"), tiny.build())
    assert list(inspect.signature(own.forward).parameters) == ["input_ids", "weight", "kwargs"]
    batch = tiny.batch(0)
    assert torch.equal(own(**batch, weight=3.0).loss, own(**batch).loss * 3.0)


class Unhashable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x, sizes=[1, 2]):  # noqa: B006, a default that cannot be hashed is the point
        return self.layer(x) * len(sizes)


class SelfArgument(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(module, x, **self):  # noqa: N805, an argument that a method cannot have beside its own
        return module.layer(x)


def test_bases_with_unusual_forwards():
    x = torch.randn(2, 3)
    config = CircuitConfig(target_layers="all")
    circuit = CircuitModel(config, Unhashable())
    assert inspect.signature(circuit.forward) == inspect.signature(Unhashable().forward)
    assert torch.equal(circuit(x, sizes=[1]) * 2, circuit(x))
    assert torch.equal(copy.deepcopy(circuit)(x), circuit(x))
    circuit = CircuitModel(config, SelfArgument())
    assert torch.equal(circuit(x), circuit.wrapped_model(x))
    circuit = CircuitModel(config, nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    assert list(circuit.masked_layers) == ["0", "2"]
    assert torch.equal(circuit(x), circuit.wrapped_model(x))
    assert torch.equal(circuit(input=x), circuit(x))


def test_a_forward_that_is_replaced_on_the_base_itself():
    base = PlainModel()
    plain = base.forward
    base.forward = lambda x, scale=1.0: plain(x) * scale
    circuit = CircuitModel(CircuitConfig(target_layers="all"), base)
    x = torch.randn(3, 4, 5)
    assert list(inspect.signature(circuit.forward).parameters) == ["x", "scale"]
    assert torch.equal(circuit(x, scale=2.0), circuit(x) * 2)
    base.forward = lambda x: plain(x) + 1  # later, too
    assert torch.equal(circuit(x), plain(x) + 1)


def test_data_parallel_runs_the_circuit():
    circuit = make_circuit("bert")
    batch = MODELS["bert"].batch(0)
    want = circuit(**batch)
    assert torch.equal(nn.DataParallel(circuit)(**batch).loss, want.loss)
    replica = circuit._replicate_for_data_parallel()
    assert type(replica) is type(circuit)
    assert torch.equal(replica(**batch).loss, want.loss)


# Its calls


@every_family
@pytest.mark.parametrize("return_dict", [True, False])
def test_outputs_are_those_of_the_exported_model(tiny, return_dict):
    circuit = make_circuit(tiny.name).eval()
    exported = circuit.export()
    batch = tiny.batch(0)
    arguments = inspect.signature(circuit.wrapped_model.forward).parameters
    options = {"return_dict": return_dict, "output_hidden_states": True}
    if "output_attentions" in arguments or ("kwargs" in arguments and tiny.name != "resnet"):
        circuit.set_attn_implementation("eager")  # of the base, and of nothing else
        exported.set_attn_implementation("eager")
        options["output_attentions"] = True
    with torch.no_grad():
        got, want = circuit(**batch, **options), exported(**batch, **options)
    assert isinstance(got, tuple) != return_dict
    assert_same_output(got, want)
    if return_dict:
        assert len(got.hidden_states) > 2
        assert tiny.name == "resnet" or len(got.attentions) == 2
    # By position, in the base's order.
    given = [batch.get(name) for name in arguments if name != "kwargs"]
    while given and given[-1] is None:
        given.pop()
    assert_same_output(circuit(*given), exported(*given))


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_training_adds_the_term_once_whatever_is_asked_for(name, return_dict):
    circuit = make_circuit(name, l0_lambda=1e-3)
    batch = MODELS[name].batch(0)
    output = circuit(**batch, return_dict=return_dict, output_hidden_states=True)
    circuit.circuit_config.add_l0 = False
    plain = circuit(**batch, return_dict=return_dict, output_hidden_states=True)
    torch.testing.assert_close(output[0], plain[0] + 1e-3 * circuit.l0())
    assert_same_output(list(output[1:]) if not return_dict else flat(output)[1:], flat(plain)[1:])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "bart"])
def test_generate_with_a_cache_gives_what_the_exported_model_gives(name, beams):
    circuit = make_circuit(name, "all-linear").eval()
    exported = circuit.export()
    ids = MODELS[name].batch(0)["input_ids"]
    options = {"min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    options["attention_mask"] = torch.ones_like(ids)
    lengths: list[int] = []
    decoder = circuit.get_decoder() if name == "bart" else circuit.wrapped_model
    embedding = decoder.get_input_embeddings() if name != "bart" else decoder.embed_tokens
    handle = embedding.register_forward_pre_hook(lambda _module, args: lengths.append(args[0].shape[-1]))
    got = circuit.generate(ids, **options)
    handle.remove()
    assert lengths[-5:] == [1] * 5  # with the cache, a step is one token
    assert torch.equal(got, exported.generate(ids, **options))
    assert torch.equal(got, circuit.generate(ids, **options, use_cache=False))
    assert not torch.equal(got, MODELS[name].build().generate(ids, **options))
    # The same while a circuit is in training: soft masks, and the base's own cache.
    circuit.train()
    circuit.temperature = 1e4
    assert torch.equal(circuit.generate(ids, **options), circuit.generate(ids, **options, use_cache=False))


# Pipelines


def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[BOS]"] + [f"w{i}" for i in range(47)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


PIPELINES = {
    "text-classification": ("bert", {"top_k": None}),
    "text-generation": ("gpt2", {"max_new_tokens": 5, "do_sample": False}),
    "feature-extraction": ("modernbert", {}),
    "image-classification": ("vit", {}),
}


@pytest.mark.parametrize("task", PIPELINES)
def test_pipelines_take_a_circuit_and_give_what_the_exported_model_gives(task, caplog):
    from PIL import Image
    from transformers import pipeline
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    name, options = PIPELINES[task]
    circuit = make_circuit(name).eval()
    if task == "image-classification":
        pixels = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3), dtype=np.uint8)
        inputs = [Image.fromarray(image) for image in pixels]
        tools = {"image_processor": ViTImageProcessorPil(size={"height": 8, "width": 8})}
    else:
        inputs, tools = ["w1 w2 w3 w4", "w7 w8 w9 w3"], {"tokenizer": tiny_tokenizer()}
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        run = pipeline(task, model=circuit, device="cpu", **tools)
        got = run(inputs, batch_size=2, **options)
    finally:
        logger.removeHandler(caplog.handler)
    assert run.model is circuit
    assert not [record for record in caplog.records if "not supported" in record.getMessage()]
    assert got == pipeline(task, model=circuit.export(), device="cpu", **tools)(inputs, batch_size=2, **options)
    assert got != pipeline(task, model=MODELS[name].build(), device="cpu", **tools)(inputs, batch_size=2, **options)


# Copies


def a_step(circuit: CircuitModel, optimizer: torch.optim.Optimizer, batch: dict) -> Tensor:
    loss = circuit(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def in_mode(mode: str) -> tuple[CircuitModel, object]:
    """A circuit in one of the states that a script can leave it in, and what has to stay alive with it."""
    circuit = make_circuit("bert", "all-linear", execution="auto" if mode != "in_kernel" else "in_kernel")
    batch = MODELS["bert"].batch(0)
    alive: object = None
    circuit.temperature = 3.0
    if mode == "after a forward":
        alive = circuit(**batch)
    elif mode in ("after backward", "in_kernel"):
        circuit(**batch).loss.backward()
    elif mode.startswith("per_step"):
        optimizer = alive = MaskAdamW(circuit.mask_parameters(), lr=0.01, lean="lean" in mode)
        a_step(circuit, optimizer, batch)
        if "waiting" in mode:
            circuit(**batch).loss.backward()
    elif mode == "ablated":
        circuit.eval().set_ablate_mode("random_ablate", seed=3)
        circuit(**batch)
    elif mode == "kept":
        circuit.eval().keep_masked_weights("always")
        circuit(**batch)
    elif mode == "off":
        circuit.use_masks(False, "*.attention.*")
    return circuit, alive


MODES = (
    "fresh", "after a forward", "after backward", "in_kernel", "per_step", "per_step, waiting", "per_step, lean",
    "kept", "ablated", "off",
)  # fmt: skip


def saved_and_loaded(circuit: CircuitModel) -> CircuitModel:
    file = io.BytesIO()
    torch.save(circuit, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda circuit: pickle.loads(pickle.dumps(circuit)),
    "torch.save": saved_and_loaded,
    "copy": copy.copy,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("mode", MODES)
def test_copies_in_every_mode(mode, how):
    circuit, _alive = in_mode(mode)
    batch = MODELS["bert"].batch(1)
    other = COPIES[how](circuit)
    assert type(other) is type(circuit)
    assert other.training is circuit.training
    with torch.no_grad():
        want = circuit(**batch)
        assert_same_output(other(**batch), want)
    assert {name: t.tolist() for name, t in other.state_dict().items()} == {
        name: t.tolist() for name, t in circuit.state_dict().items()
    }
    assert (other.temperature, other.ablate_mode) == (circuit.temperature, circuit.ablate_mode)
    if how == "copy":
        return
    # A copy shares nothing, and each trains on.
    assert not {id(p) for p in other.parameters()} & {id(p) for p in circuit.parameters()}
    with torch.no_grad():
        for param in other.mask_parameters():
            param.neg_()
        assert_same_output(circuit(**batch), want)
    other.train()
    other.set_ablate_mode("none")
    optimizer = MaskAdamW(other.mask_parameters(), lr=0.1)
    losses = [float(a_step(other, optimizer, batch)) for _ in range(4)]
    assert losses[-1] < losses[0]
    with torch.no_grad():
        assert_same_output(circuit(**batch), want)


@pytest.mark.parametrize("mode", ["after backward", "per_step", "per_step, waiting"])
def test_a_copy_does_not_disturb_the_training_that_it_is_taken_from(mode):
    def go_on(copied: bool) -> list[Tensor]:
        circuit, optimizer = in_mode(mode)
        if optimizer is None:
            optimizer = torch.optim.AdamW(circuit.mask_parameters(), lr=0.01)
        if copied:
            copy.deepcopy(circuit)
            pickle.dumps(circuit)
        optimizer.step()
        optimizer.zero_grad()
        for seed in range(3):
            a_step(circuit, optimizer, MODELS["bert"].batch(seed))
        return [param.detach().clone() for param in circuit.mask_parameters()]

    for got, want in zip(go_on(True), go_on(False), strict=True):
        assert torch.equal(got, want)


def test_a_pickle_is_read_by_a_process_that_has_made_no_circuit(tmp_path):
    """The circuit's class is made at run time, under a name that no module holds."""
    torch.manual_seed(0)
    circuit = CircuitModel(CircuitConfig(target_layers="all"), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    randomize_logits(circuit)
    torch.save(circuit, tmp_path / "circuit.pt")
    code = (
        "import sys, json, torch\n"
        "circuit = torch.load(sys.argv[1], weights_only=False)\n"
        "out = circuit(torch.ones(1, 3))\n"
        "print(json.dumps([type(circuit).__name__, out.tolist(), sorted(circuit.state_dict())]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "circuit.pt")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    name, out, state = json.loads(done.stdout.splitlines()[-1])
    assert name == "Sequential"
    torch.testing.assert_close(torch.tensor(out), circuit(torch.ones(1, 3)))
    assert state == sorted(circuit.state_dict())


# Hooks: what tools that read and edit activations do


def blocks(circuit: CircuitModel) -> list[str]:
    """Masked layers, and the modules that hold them."""
    names = list(circuit.masked_layers)
    return sorted({*names, *(name.rpartition(".")[0] for name in names)} - {""})


def cache_of(model: nn.Module, names: list[str], batch: dict) -> dict[str, Tensor]:
    cache: dict[str, Tensor] = {}
    handles = []
    for name in names:

        def keep(_module, _args, output, name=name):
            cache[name] = flat(output)[0].detach().clone()

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return cache


def patched(model: nn.Module, name: str, value: Tensor, batch: dict) -> Tensor:
    def put(_module, _args, output):
        if isinstance(output, Tensor):
            return value
        rest = output[1:] if isinstance(output, tuple) else None
        return (value, *rest) if rest is not None else type(output)(value)

    handle = model.get_submodule(name).register_forward_hook(put)
    with torch.no_grad():
        logits = model(**batch).logits
    handle.remove()
    return logits


@every_family
def test_activations_are_cached_and_patched_as_in_the_exported_model(tiny):
    circuit = make_circuit(tiny.name).eval()
    exported = circuit.export()
    base = circuit.wrapped_model
    names = blocks(circuit)
    clean, corrupted = tiny.batch(0), tiny.batch(1)
    cache = cache_of(base, names, clean)
    want = cache_of(exported, names, clean)
    assert cache.keys() == want.keys()
    assert set(circuit.masked_layers) <= cache.keys()
    for name in cache:
        assert torch.equal(cache[name], want[name]), name
    moved = 0
    corrupt = circuit(**corrupted).logits
    for name in list(circuit.masked_layers)[:6]:
        # Activations of the clean run in the corrupted one, and out of it again.
        logits = patched(base, name, cache[name], corrupted)
        assert torch.equal(logits, patched(exported, name, cache[name], corrupted)), name
        moved += not torch.equal(logits, corrupt)
        assert torch.equal(patched(circuit, f"wrapped_model.{name}", cache[name], corrupted), logits)
        assert torch.equal(circuit(**corrupted).logits, corrupt)
    assert moved > 1
    assert circuit.get_submodule(names[-1]) is base.get_submodule(names[-1])


@pytest.mark.parametrize("execution", ["per_forward", "in_kernel", "per_step"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_hooks_that_edit_are_part_of_the_gradient(name, execution):
    """Steering and ablating activations while masks train; the oracle is plain PyTorch."""
    tiny = MODELS[name]
    batch = tiny.batch(0)

    def run(how: str) -> tuple[list[Tensor], list[Tensor]]:
        circuit = make_circuit(name, "all-linear", execution=how if how != "per_step" else "auto", l0_lambda=1e-4)
        if how == "per_step":
            optimizer = MaskAdamW(circuit.mask_parameters(), lr=0.0)
            assert optimizer is not None
        layers = list(circuit.masked_layers.values())
        seen: list[Tensor] = []
        layers[0].register_forward_hook(lambda _module, _args, output: output * 1.5 + 0.1)
        layers[2].register_forward_pre_hook(lambda _module, args: (args[0] * 0.5,))
        layers[3].register_full_backward_hook(lambda _module, _dx, dout: seen.append(dout[0].clone()))
        layers[4].register_forward_hook(lambda _module, _args, output: output.register_hook(seen.append) and None)
        loss = circuit(**batch).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in circuit.mask_parameters())], seen

    (got, seen), (want, want_seen) = run(execution), run("reference")
    assert len(seen) == len(want_seen) == 2
    for a, b in zip([*got, *seen], [*want, *want_seen], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_hooks_on_logits_see_gradients_in_every_execution():
    for execution in ("per_forward", "in_kernel", "reference"):
        circuit = make_circuit("llama", "all-linear", execution=execution)
        seen = []
        param = circuit.mask_parameters()[0]
        param.register_hook(lambda grad, seen=seen: seen.append(grad.clone()))
        circuit(**MODELS["llama"].batch(0)).loss.backward()
        assert len(seen) == 1
        assert torch.equal(seen[0], param.grad)


# PEFT's adapters


ATTENTION = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
MLP = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"]
ADAPTED = {"other layers": MLP, "the same layers": ATTENTION}
ORDERS = ("adapters, then masks", "masks, then adapters", "add_adapter")


def lora(**options):
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)


def fill_adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Adapters that do something, by the layer that they belong to: the B of LoRA starts at 0."""
    found = {}
    for name, param in model.named_parameters():
        if "lora_" in name:
            key = name[name.index("layers.") :].replace(".default.weight", "")
            generator = torch.Generator().manual_seed(len(found))
            with torch.no_grad():
                param.copy_(torch.randn(param.shape, generator=generator) * 0.3)
            param.requires_grad_(True)
            found[key] = param
    assert len(found) == 8
    return found


def adapted_circuit(order: str, layers: list[str], **config) -> tuple[nn.Module, CircuitModel, dict]:
    """What a script calls, the circuit in it, and the adapters; all of them in training."""
    from peft import get_peft_model

    model = MODELS["llama"].build()
    if order == "adapters, then masks":
        model = get_peft_model(model, lora())
        found = {name.removesuffix(".weight").removesuffix(".base_layer") for name, _ in model.named_parameters()}
        where = {n.partition("base_model.model.")[2]: n for n in found if "lora_" not in n}
        names = [f"{where[n]}.base_layer" if n in ATTENTION else where[n] for n in layers]
        outer = circuit = CircuitModel(CircuitConfig(target_layers=names, **config), model)
    else:
        circuit = CircuitModel(CircuitConfig(target_layers=layers, **config), model)
        if order == "add_adapter":
            circuit.add_adapter(lora())
            outer = circuit
        else:
            outer = get_peft_model(circuit, lora())
        # PEFT trains adapters alone: logits that do not train are hard masks.
        assert all(layer.hard for layer in circuit.masked_layers.values())
        for param in circuit.mask_parameters():
            param.requires_grad_(True)
    randomize_logits(circuit)
    return outer, circuit, fill_adapters(outer)


def adapted_by_hand(circuit: CircuitModel, mask) -> tuple[nn.Module, dict]:
    """PEFT over the base with dense masked weights, and no csmask."""
    from peft import get_peft_model

    model = MODELS["llama"].build()
    with torch.no_grad():
        for name, layer in circuit.masked_layers.items():
            name = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            weight = model.get_submodule(name).weight
            weight.copy_(weight * mask(layer.mask_logits))
    model = get_peft_model(model, lora())
    return model, fill_adapters(model)


@pytest.mark.parametrize("which", ADAPTED)
@pytest.mark.parametrize("order", ORDERS)
def test_adapters_and_masks_are_those_of_peft_over_dense_masked_weights(order, which):
    outer, circuit, adapters = adapted_circuit(order, ADAPTED[which], l0_lambda=1e-4)
    batch = MODELS["llama"].batch(0)
    dense, dense_adapters = adapted_by_hand(circuit, torch.sigmoid)
    loss, want = outer(**batch).loss, dense(**batch).loss
    torch.testing.assert_close(loss, want + 1e-4 * circuit.l0())
    loss.backward()
    want.backward()
    assert adapters.keys() == dense_adapters.keys()
    for name in adapters:
        assert dense_adapters[name].grad.abs().max() > 1e-5, name
        torch.testing.assert_close(adapters[name].grad, dense_adapters[name].grad, rtol=1e-4, atol=1e-6)
    assert all(param.grad.abs().max() > 0 for param in circuit.mask_parameters())
    outer.eval()
    dense, _ = adapted_by_hand(circuit, lambda logits: (logits > 0).float())
    with torch.no_grad():
        want = dense.eval()(**batch).logits
        assert torch.equal(outer(**batch).logits, want)
    # The exported model has the adapters, and they may be merged there.
    exported = circuit.export()
    assert not any(isinstance(module, MaskedLayer) for module in exported.modules())
    assert torch.equal(exported(**batch).logits, want)
    if order == "adapters, then masks":
        merged = exported.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, want, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, MaskedLayer) for module in circuit.unload().modules())


@pytest.mark.parametrize("fused", [False, True], ids=["Adam", "MaskAdamW"])
@pytest.mark.parametrize("order", ORDERS)
def test_adapters_train_beside_masks(order, fused):
    def train(execution: str) -> tuple[dict, list[Tensor]]:
        outer, circuit, adapters = adapted_circuit(order, [*ATTENTION, *MLP], execution=execution, l0_lambda=1e-4)
        settings = {"lr": 0.02, "weight_decay": 0.0}
        masks = (MaskAdamW if fused else torch.optim.AdamW)(circuit.mask_parameters(), **settings)
        optimizers = [masks, torch.optim.AdamW(list(adapters.values()), **settings)]
        losses = []
        for seed in range(3):
            loss = outer(**MODELS["llama"].batch(seed)).loss
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        return adapters, [*losses, *(p.detach() for p in circuit.mask_parameters()), *adapters.values()]

    adapters, got = train("auto")
    before, want = train("reference")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    untrained = fill_adapters(adapted_circuit(order, MLP)[0])
    for name in adapters:
        assert (adapters[name] - untrained[name]).abs().max() > 0.02, name
    assert before.keys() == adapters.keys()


def test_what_freeze_base_says_about_adapters():
    """Adapters that are there before the masks belong to the base; those that come later do not."""
    from peft import get_peft_model

    def over_adapters(freeze_base: bool) -> CircuitModel:
        model = get_peft_model(MODELS["llama"].build(), lora(lora_dropout=0.5))
        names = [f"base_model.model.{name}" for name in MLP]
        return CircuitModel(CircuitConfig(target_layers=names, freeze_base=freeze_base), model)

    def training(circuit: nn.Module) -> set[str]:
        return {
            "lora" if "lora_" in n else n.rpartition(".")[2] for n, p in circuit.named_parameters() if p.requires_grad
        }

    circuit = over_adapters(True)
    assert training(circuit) == {"mask_logits"}
    assert not any(module.training for module in circuit.wrapped_model.modules() if isinstance(module, nn.Dropout))
    circuit = over_adapters(False)
    assert training(circuit) == {"mask_logits", "lora"}
    assert all(module.training for module in circuit.wrapped_model.modules() if isinstance(module, nn.Dropout))
    circuit = make_circuit("llama", MLP)
    circuit.add_adapter(lora())
    assert training(circuit) == {"lora"}  # PEFT freezes all else, masks too


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("freeze_base", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_the_state_holds_masks_and_adapters_and_no_frozen_base(order, freeze_base, trained):
    outer, circuit, adapters = adapted_circuit(order, [*ATTENTION, *MLP], freeze_base=freeze_base)
    circuit.temperature = 7.0
    if not trained:
        for param in adapters.values():
            param.requires_grad_(False)
    batch = MODELS["llama"].batch(0)
    state = outer.state_dict()
    kinds = {name: "lora" if "lora_" in name else name.rpartition(".")[2] for name in state}
    names = {kind: [n for n in kinds if kinds[n] == kind] for kind in set(kinds.values())}
    assert (len(names["lora"]), len(names["mask_logits"]), len(names["temperature"])) == (8, 4, 4)
    # PEFT over a circuit with freeze_base=False freezes a base that was in training before: it stays in the state.
    if order == "adapters, then masks" or freeze_base:
        assert names.keys() == {"lora", "mask_logits", "temperature", "_extra_state"}
    other, other_circuit, other_adapters = adapted_circuit(order, [*ATTENTION, *MLP], freeze_base=freeze_base)
    if not trained:
        for param in other_adapters.values():
            param.requires_grad_(False)
    with torch.no_grad():
        for param in other_circuit.mask_parameters():
            param.zero_()
        if trained:  # as a description of the base, frozen adapters are compared
            for param in other_adapters.values():
                param.zero_()
    other.load_state_dict(state)
    assert other_circuit.temperature == 7.0
    assert torch.equal(other(**batch).loss, outer(**batch).loss)


def test_adapters_over_a_circuit_are_saved_and_loaded_by_peft(tmp_path):
    from peft import PeftModel

    outer, circuit, adapters = adapted_circuit("masks, then adapters", [*ATTENTION, *MLP])
    circuit.eval()
    batch = MODELS["llama"].batch(0)
    want = outer(**batch).logits
    for param in adapters.values():
        param.requires_grad_(False)  # as PEFT does with loaded ones
    outer.save_pretrained(tmp_path)
    again = make_circuit("llama", [*ATTENTION, *MLP]).eval()
    loaded = PeftModel.from_pretrained(again, tmp_path)
    assert torch.equal(loaded(**batch).logits, want)
    assert not torch.equal(make_circuit("llama", [*ATTENTION, *MLP]).eval()(**batch).logits, want)


@pytest.mark.parametrize("which", ADAPTED)
def test_a_circuit_with_adapters_is_loaded_over_a_base_that_has_them(which, tmp_path):
    from peft import PeftModel

    _, circuit, adapters = adapted_circuit("adapters, then masks", ADAPTED[which])
    batch = MODELS["llama"].batch(0)
    want = circuit.eval()(**batch).logits
    circuit.save_pretrained(tmp_path / "masks")
    circuit.wrapped_model.save_pretrained(tmp_path / "adapters")
    base = PeftModel.from_pretrained(MODELS["llama"].build(), tmp_path / "adapters")
    loaded = CircuitModel.from_pretrained(base, tmp_path / "masks")
    assert torch.equal(loaded(**batch).logits, want)
    with torch.no_grad():
        next(iter(adapters.values())).mul_(2)
    circuit.wrapped_model.save_pretrained(tmp_path / "others")
    others = PeftModel.from_pretrained(MODELS["llama"].build(), tmp_path / "others")
    with pytest.raises(ValueError, match="wrong base model"):
        CircuitModel.from_pretrained(others, tmp_path / "masks")


def test_targets_in_a_model_with_adapters():
    from peft import get_peft_model

    def model() -> nn.Module:
        return get_peft_model(MODELS["llama"].build(), lora())

    def masked(targets) -> list[str]:
        circuit = CircuitModel(CircuitConfig(target_layers=targets), model())
        return [name.removeprefix("base_model.model.model.layers.") for name in circuit.masked_layers]

    plain = list(make_circuit("llama", "all-linear").masked_layers)
    for targets in ("all-linear", "all", "*_proj*", "re:.*layers.*"):
        found = masked(targets)
        # The base's layers, adapters not among them, and a wrapped one under the name that it has now.
        assert [f"model.layers.{n.removesuffix('.base_layer')}" for n in found] == plain, targets
        assert sum(name.endswith(".base_layer") for name in found) == 4
    assert masked("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default") == [
        "0.self_attn.q_proj.lora_A.default"
    ]
    for target in ("base_model.model.model.layers.0.self_attn.q_proj", "*.q_proj", "*.self_attn.*_proj"):
        with pytest.raises(TypeError, match=r"name 'base_model.model.model.layers.0.self_attn.q_proj.base_layer'"):
            masked(target)


# Automatic classes


@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet", "vit", "llama", "modernbert", "bart"])
def test_an_exported_model_is_loaded_by_the_automatic_class_of_its_head(name, tmp_path):
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
    )

    heads = {
        "bert": AutoModelForSequenceClassification,
        "modernbert": AutoModelForSequenceClassification,
        "gpt2": AutoModelForCausalLM,
        "llama": AutoModelForCausalLM,
        "bart": AutoModelForSeq2SeqLM,
        "resnet": AutoModelForImageClassification,
        "vit": AutoModelForImageClassification,
    }
    tiny = MODELS[name]
    circuit = make_circuit(name).eval()
    circuit.export().save_pretrained(tmp_path)
    loaded, info = heads[name].from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(tiny.build())
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    batch = tiny.batch(0)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).logits, circuit(**batch).logits)
        backbone = AutoModel.from_pretrained(tmp_path).eval()
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        want = getattr(circuit.wrapped_model, circuit.wrapped_model.base_model_prefix)(**inputs)
        assert torch.equal(flat(backbone(**inputs))[0], flat(want)[0])
