"""Saving, loading, exporting and unloading circuits; every error leaves the model exactly as it was."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import pickle
import shutil
import stat

import pytest
import safetensors.torch
import torch
from models import MODELS, PlainModel, assert_same_snapshot, every_family, randomize_logits, snapshot
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from csmask import CircuitConfig, CircuitModel, checkpoint, testing

pytestmark = pytest.mark.filterwarnings("ignore:mask_bias. no bias to mask")
PLAIN = MODELS["plain"]


def build(tiny=PLAIN, model=None, **hparams):
    circuit = CircuitModel(
        CircuitConfig(mask_hparams=hparams, target_layers=list(tiny.targets)), tiny.build() if model is None else model
    )
    randomize_logits(circuit)
    circuit.temperature = 17.3
    return circuit


def logits_of(output):
    return output if isinstance(output, torch.Tensor) else output.logits


@torch.no_grad()
def numbers(model, tiny=PLAIN, seed=3):
    batch = {k: v for k, v in tiny.batch(seed).items() if k != "labels"}
    return logits_of(model(**batch))


@pytest.fixture
def saved(tmp_path):
    """A saved circuit over the plain model: its folder and the circuit."""
    circuit = build(mask_bias=True)
    circuit.save_pretrained(tmp_path / "circuit")
    return tmp_path / "circuit", circuit


def refused(folder, error, message, model=None, **options):
    """Loading fails with this error and the model is exactly as it was."""
    model = PLAIN.build() if model is None else model
    model.train()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        CircuitModel.from_pretrained(model, folder, **options)
    assert_same_snapshot(before, snapshot(model))


# Round trip


@pytest.mark.parametrize("unit", ["weight", "neuron"])
@every_family
def test_round_trip(tiny, unit, tmp_path):
    circuit = build(tiny, mask_unit=unit, mask_bias=True, mask_init_value=0.05, rescale=True)
    circuit.save_pretrained(tmp_path)
    loaded = CircuitModel.from_pretrained(tiny.build(), tmp_path)
    assert loaded.circuit_config == circuit.circuit_config
    assert loaded.temperature == circuit.temperature
    masks = dict(circuit.named_mask_parameters())
    assert {n: p.shape for n, p in loaded.named_mask_parameters()} == {n: p.shape for n, p in masks.items()}
    for name, param in loaded.named_mask_parameters():
        assert torch.equal(param.view(torch.int32), masks[name].view(torch.int32)), name
        assert param.requires_grad
    assert not loaded.training
    assert torch.equal(numbers(loaded, tiny), numbers(circuit.eval(), tiny))
    assert torch.equal(numbers(loaded.train(), tiny), numbers(circuit.train(), tiny))


def test_extreme_numbers_come_back_bit_for_bit(tmp_path):
    circuit = build()
    values = [0.0, -0.0, 1e-45, -1e-45, 3.4e38, math.pi, math.inf, -math.inf]
    circuit.masked_layers["conv"].mask_logits.data.view(-1)[: len(values)] = torch.tensor(values)
    for temperature in (1e-30, 1 / 3, 200.0, 3e38):
        circuit.temperature = temperature
        circuit.save_pretrained(tmp_path)
        loaded = CircuitModel.from_pretrained(PLAIN.build(), tmp_path)
        assert loaded.temperature == circuit.temperature
        first, second = circuit.masked_layers["conv"].mask_logits, loaded.masked_layers["conv"].mask_logits
        assert torch.equal(first.view(torch.int32), second.view(torch.int32))


def test_training_goes_on_after_loading(saved):
    folder, circuit = saved
    loaded = CircuitModel.from_pretrained(PLAIN.build(), folder).train()

    def step(model):
        optimizer = torch.optim.SGD(model.mask_parameters(), lr=0.1)
        (model(**PLAIN.batch(0)).square().mean() + 1e-3 * model.l0()).backward()
        optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.mask_parameters()])

    assert torch.equal(step(loaded), step(circuit.train()))


def test_what_is_saved_is_the_circuit_whatever_mode_it_is_in(saved, tmp_path):
    folder, circuit = saved
    want = numbers(circuit.eval())
    for param in circuit.mask_parameters():
        param.data.sub_(0.8)
    sparse = numbers(circuit)
    circuit.set_ablate_mode("randomly_sampled", seed=3)
    numbers(circuit)
    circuit.use_masks(False, ["hidden"])
    circuit.save_pretrained(tmp_path / "other")
    loaded = CircuitModel.from_pretrained(PLAIN.build(), tmp_path / "other")
    assert loaded.ablate_mode == "none"
    assert torch.equal(numbers(loaded), sparse)
    assert torch.equal(numbers(CircuitModel.from_pretrained(PLAIN.build(), folder)), want)


def test_only_masks_are_on_disk(saved):
    folder, circuit = saved
    masks = dict(circuit.named_mask_parameters())
    files = sorted(path.name for path in folder.iterdir())
    assert files[0] == "circuit.json"
    assert len(files) == 2
    stored = safetensors.torch.load_file(folder / files[1])
    assert set(stored) == set(masks)
    assert sum(p.numel() for p in masks.values()) < sum(p.numel() for p in circuit.wrapped_model.parameters()) / 1.9
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size < 4 * sum(p.numel() for p in masks.values()) + 3000


def test_two_saves_write_the_same_bytes(saved, tmp_path):
    folder, circuit = saved
    circuit.save_pretrained(str(tmp_path / "deep" / "er é"))
    for path in folder.iterdir():
        assert (tmp_path / "deep" / "er é" / path.name).read_bytes() == path.read_bytes()


def test_files_have_the_usual_permissions(saved):
    umask = os.umask(0)
    os.umask(umask)
    for path in saved[0].iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_nothing_is_pickled(tmp_path, monkeypatch):
    circuit, model = build(), PLAIN.build()

    def refuse(*args, **kwargs):
        raise AssertionError("pickle was used")

    with monkeypatch.context() as patch:
        for owner, names in (
            (pickle, ("load", "loads", "dump", "dumps", "Unpickler", "Pickler")),
            (torch, ("load", "save")),
        ):
            for name in names:
                patch.setattr(owner, name, refuse)
        circuit.save_pretrained(tmp_path)
        CircuitModel.from_pretrained(model, tmp_path)


# Saving


def test_an_interrupted_save_leaves_the_previous_or_the_new_one(saved, tmp_path, monkeypatch):
    folder, circuit = saved
    (folder / "notes.txt").write_text("not csmask's")
    old = [p.detach().clone() for p in circuit.mask_parameters()], circuit.temperature
    randomize_logits(circuit, seed=8)
    circuit.temperature = 200.0
    new = [p.detach().clone() for p in circuit.mask_parameters()], 200.0
    states, copying = [], []

    def photograph(function):
        def call(*args, **kwargs):
            if not copying:  # copytree makes such calls itself
                copying.append(True)
                states.append(tmp_path / f"state{len(states)}")
                shutil.copytree(folder, states[-1])
                copying.clear()
            return function(*args, **kwargs)

        return call

    # what a kill just before any of these calls would leave on disk
    with monkeypatch.context() as patch:
        for name in ("replace", "unlink", "fsync", "chmod"):
            patch.setattr(os, name, photograph(getattr(os, name)))
        circuit.save_pretrained(folder)
    assert len(states) >= 5
    found = []
    for state in [*states, folder]:
        loaded = CircuitModel.from_pretrained(PLAIN.build(), state)
        got = [p.detach() for p in loaded.mask_parameters()], loaded.temperature
        for which in (old, new):
            if got[1] == which[1]:
                assert all(torch.equal(a, b) for a, b in zip(got[0], which[0], strict=True))
                found.append("old" if which is old else "new")
    assert found == ["old"] * found.count("old") + ["new"] * found.count("new")
    assert len(found) == len(states) + 1
    assert found[-1] == "new"
    assert found.count("old") >= 4
    assert len(list(folder.iterdir())) == 3  # the old masks are gone, other files are left alone


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_save_that_fails_cleans_up(saved, monkeypatch, fails_at):
    folder, circuit = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    randomize_logits(circuit, seed=8)
    calls, replace = [], os.replace

    def failing(source, target, **options):
        calls.append(target)
        if len(calls) == fails_at:
            raise OSError(28, "No space left on device")
        return replace(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="No space left"):
            circuit.save_pretrained(folder)
    assert len(calls) == fails_at
    now = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert before.items() <= now.items()
    assert not [name for name in now if name.startswith(".")]
    CircuitModel.from_pretrained(PLAIN.build(), folder)


def test_saves_that_are_refused_write_nothing(saved, tmp_path):
    folder, circuit = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ValueError, match="needs a directory, got the file"):
        circuit.save_pretrained(file)
    circuit.masked_layers["hidden"].bias_mask_logits.data[0] = math.nan
    with pytest.raises(ValueError, match=r"hidden\.bias_mask_logits holds NaN"):
        circuit.save_pretrained(folder)
    with pytest.raises(ValueError, match="holds NaN"):
        circuit.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert file.read_text() == "x"


def test_a_trained_base_is_warned_about(tmp_path):
    config = CircuitConfig(target_layers=list(PLAIN.targets), freeze_base=False)
    circuit = CircuitModel(config, PLAIN.build())
    with pytest.warns(UserWarning, match="the base was trained too"):
        circuit.save_pretrained(tmp_path)


# Damage


def test_truncated_masks(saved):
    folder, _ = saved
    (masks,) = folder.glob("masks-*.safetensors")
    data = masks.read_bytes()
    for length in [*range(40), *range(40, len(data), 97), len(data) - 1]:
        masks.write_bytes(data[:length])
        with pytest.raises(ValueError, match="is truncated, edited or damaged"):
            checkpoint._read(folder)
    refused(folder, ValueError, "is truncated, edited or damaged")
    masks.write_bytes(data + b"\0")
    refused(folder, ValueError, "is truncated, edited or damaged")
    masks.write_bytes(data)
    CircuitModel.from_pretrained(PLAIN.build(), folder)


def test_any_edited_byte_of_the_masks(saved):
    folder, _ = saved
    (masks,) = folder.glob("masks-*.safetensors")
    data = masks.read_bytes()
    for position in [*range(16), *range(16, len(data), 61), len(data) - 1]:
        edited = bytearray(data)
        edited[position] ^= 1 << (position % 8)
        masks.write_bytes(edited)
        with pytest.raises(ValueError, match="is truncated, edited or damaged"):
            checkpoint._read(folder)
    refused(folder, ValueError, "is truncated, edited or damaged")


def test_truncated_json(saved):
    folder, _ = saved
    file = folder / "circuit.json"
    data = file.read_bytes()
    for length in [0, 1, 2, *range(3, len(data) - 1, 41), len(data) - 1]:
        file.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"circuit\.json is truncated or not JSON"):
            checkpoint._read(folder)
    refused(folder, ValueError, "is truncated or not JSON")


def test_any_edited_byte_of_the_json_is_an_error_or_harmless(saved):
    folder, _ = saved
    file = folder / "circuit.json"
    data = file.read_bytes()
    content = checkpoint._read(folder)[0]
    answers = harmless = 0
    for position in range(len(data)):
        edited = bytearray(data)
        edited[position] ^= (1, 2, 16, 128)[position % 4]
        file.write_bytes(edited)
        try:
            found = checkpoint._read(folder)[0]
        except ValueError as error:
            answers += str(file) in str(error)
        else:
            assert found == content  # white space that is still white space
            answers += 1
            harmless += 1
    assert answers == len(data)  # each error names the file
    assert harmless < 0.3 * len(data)


def edit(folder, change, digest=True):
    """Change circuit.json; with digest, as somebody would who knows how it is made."""
    content = json.loads((folder / "circuit.json").read_text())
    content.pop("sha256")
    change(content)
    text = checkpoint._with_digest(content) if digest else json.dumps({**content, "sha256": "0" * 64}).encode()
    (folder / "circuit.json").write_bytes(text)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(temperature=18.0),
        lambda c: c.update(temperature=float("nan")),
        lambda c: c["circuit_config"].update(l0_lambda=1.0),
        lambda c: c["layers"]["hidden"].update(sha256="0" * 64),
        lambda c: c.pop("temperature"),
        lambda c: c.update(extra=1),
        lambda c: c.pop("masks_sha256"),
        lambda c: None,
    ],
)
def test_edited_json(saved, change):
    edit(saved[0], change, digest=False)
    refused(saved[0], ValueError, r"circuit\.json (was edited or damaged|is truncated or not JSON)")


def _rename(content):
    content["layers"] = {f"x{n}": v for n, v in content["layers"].items()}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: c.update(format_version=2), ValueError, r"format version 2, this csmask \(0\.1\.0\) reads 1"),
        (lambda c: c.pop("format_version"), ValueError, "format version None"),
        (lambda c: c.update(format_version="1"), ValueError, "format version '1'"),
        (lambda c: c.update(format="peft"), ValueError, "is not a csmask circuit"),
        (lambda c: c.update(extra=1), ValueError, "was edited or damaged"),
        (lambda c: c.pop("layers"), ValueError, "was edited or damaged"),
        (lambda c: c.update(temperature=-1.0), ValueError, "temperature must be a positive finite number"),
        (lambda c: c["circuit_config"].update(l0_lambda=-1), ValueError, "l0_lambda must be >= 0"),
        (lambda c: c["circuit_config"].update(unknown=1), ValueError, "no 'unknown'; known"),
        (lambda c: c["circuit_config"].update(target_layers=["nowhere"]), ValueError, "'nowhere' matches no layer"),
        (lambda c: c["circuit_config"].update(target_layers=["conv"]), ValueError, "wrong base model: .*head, hidden"),
        (
            lambda c: c["circuit_config"]["mask_hparams"].update(mask_bias=False),
            ValueError,
            "do not fit.*bias_mask_logits",
        ),
        (
            lambda c: c["circuit_config"]["mask_hparams"].update(mask_unit="neuron"),
            ValueError,
            "do not fit the saved config",
        ),
        (_rename, ValueError, "wrong base model: it differs from the saved circuit in its layers"),
        (lambda c: c.update(masks_file="masks-0.safetensors"), FileNotFoundError, "holds no masks-0.safetensors"),
    ],
)
def test_json_of_another_making(saved, change, error, message):
    edit(saved[0], change)
    refused(saved[0], error, message)


def test_masks_are_read_from_the_folder_only(saved, tmp_path):
    folder, _ = saved
    (masks,) = folder.glob("masks-*.safetensors")
    shutil.move(masks, tmp_path / masks.name)
    for name in (f"../{masks.name}", str(tmp_path / masks.name)):
        edit(folder, lambda c, name=name: c.update(masks_file=name))
        refused(folder, FileNotFoundError, f"holds no {masks.name}")


@pytest.mark.parametrize("text", ["[]", "null", "3", '"csmask-circuit"', "{}", '{"format": 1}', "\x00", "é"])
def test_json_that_is_something_else(saved, text):
    (saved[0] / "circuit.json").write_bytes(text.encode("latin-1"))
    refused(saved[0], ValueError, "is not a csmask circuit|is truncated or not JSON")


def test_masks_of_another_making(saved):
    folder, circuit = saved
    good = {n: p.detach() for n, p in circuit.named_mask_parameters()}
    name = next(iter(good))
    bad = {
        "do not fit.*conv.mask_logits": {n: t for n, t in good.items() if n != name},
        "do not fit.*more": {**good, "more": torch.ones(2)},
        "do not fit the saved config at conv.mask_logits": {**good, name: torch.ones(2, 2)},
        "conv.mask_logits holds NaN": {**good, name: good[name] * math.nan},
    }
    for message, masks in bad.items():
        data = safetensors.torch.save(masks)
        file = json.loads((folder / "circuit.json").read_text())["masks_file"]
        (folder / file).write_bytes(data)
        edit(folder, lambda c, data=data: c.update(masks_sha256=hashlib.sha256(data).hexdigest()))
        refused(folder, ValueError, message)


def test_not_there(saved, tmp_path):
    folder, _ = saved
    refused(tmp_path / "nowhere", FileNotFoundError, r"holds no saved circuit: circuit\.json is not there")
    refused(tmp_path, FileNotFoundError, r"holds no saved circuit")
    refused(folder / "circuit.json", FileNotFoundError, "holds no saved circuit")
    (masks,) = folder.glob("masks-*.safetensors")
    masks.unlink()
    refused(folder, FileNotFoundError, f"holds no {masks.name}, which circuit.json names")


# The base


def _one_ulp(model):
    weight = model.hidden.weight.data
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))


def _sign_of_zero(model):
    model.conv.bias.data[0] = -0.0


@pytest.mark.parametrize("change", [_one_ulp, lambda m: m.conv.bias.data.add_(1), lambda m: m.head.weight.data.neg_()])
def test_a_base_with_other_weights(saved, change):
    model = PLAIN.build()
    change(model)
    refused(saved[0], ValueError, "wrong base model: the weights of (conv|hidden|head) are not those", model)
    want = [p.detach() for p in saved[1].mask_parameters()]
    loaded = CircuitModel.from_pretrained(model, saved[0], check_base=False)
    assert all(torch.equal(a, b) for a, b in zip(loaded.mask_parameters(), want, strict=True))


def test_a_base_of_another_dtype(saved):
    refused(
        saved[0],
        ValueError,
        r"wrong base dtype: conv.weight is bfloat16, the masks were saved over float32; load the base in that dtype",
        PLAIN.build().bfloat16(),
    )
    loaded = CircuitModel.from_pretrained(PLAIN.build().bfloat16(), saved[0], check_base=False)
    assert torch.equal(loaded.masked_layers["conv"].mask_logits, saved[1].masked_layers["conv"].mask_logits)


@pytest.mark.parametrize("check_base", [True, False])
def test_a_base_of_other_shapes_or_layers(saved, check_base):
    wider = PLAIN.build()
    wider.hidden, wider.head = nn.Linear(30, 9), nn.Linear(9, 3, bias=False)
    message = r"wrong base model: hidden.weight has shape \[9, 30\], saved with \[8, 30\]"
    refused(saved[0], ValueError, message, wider, check_base=check_base)
    more = PLAIN.build()
    more.he_too = nn.Linear(2, 2)
    refused(saved[0], ValueError, "wrong base model: .*in its layers: he_too", more, check_base=check_base)
    less = PLAIN.build()
    del less.head
    refused(saved[0], ValueError, r"target layer 'he\*' matches no layer", less, check_base=check_base)
    message = "target layer 'conv' matches no layer"
    refused(saved[0], ValueError, message, nn.Sequential(nn.Linear(3, 3)), check_base=check_base)
    renamed = PLAIN.build()
    renamed.heads = renamed.head
    del renamed.head
    message = "wrong base model: .*in its layers: head, heads"
    refused(saved[0], ValueError, message, renamed, check_base=check_base)
    unbiased = PLAIN.build()
    unbiased.hidden.bias = None
    message = "wrong base model" if check_base else "do not fit the saved config at hidden.bias_mask_logits"
    refused(saved[0], ValueError, message, unbiased, check_base=check_base)


def test_regular_expressions_of_a_file_are_not_run(tmp_path):
    """One that backtracks without an end; the layers that it has matched are in the file."""
    circuit = CircuitModel(CircuitConfig(target_layers=["re:hid.*", "conv"]), PLAIN.build())
    circuit.save_pretrained(tmp_path)
    file = tmp_path / "circuit.json"
    content = json.loads(file.read_text())
    del content["sha256"]
    content["circuit_config"]["target_layers"] = ["re:(([a-z0-9_.]+)+)+!", "conv"]
    file.write_bytes(checkpoint._with_digest(content))
    loaded = CircuitModel.from_pretrained(PLAIN.build(), tmp_path)
    assert list(loaded.masked_layers) == ["conv", "hidden"]
    assert loaded.circuit_config.target_layers == content["circuit_config"]["target_layers"]
    less = PLAIN.build()
    del less.hidden
    refused(tmp_path, ValueError, "wrong base model: .*in its layers: hidden", less)


@pytest.mark.parametrize(
    "change",
    [lambda c: c.update(layers=[]), lambda c: c["layers"].update(conv={}), lambda c: c.update(masks_file=5)],
)
def test_contents_of_another_form_are_damage(tmp_path, change):
    CircuitModel(CircuitConfig(target_layers=["conv"]), PLAIN.build()).save_pretrained(tmp_path)
    file = tmp_path / "circuit.json"
    content = json.loads(file.read_text())
    del content["sha256"]
    change(content)
    file.write_bytes(checkpoint._with_digest(content))
    refused(tmp_path, ValueError, "is damaged: it does not describe masked layers", PLAIN.build())


def test_a_base_that_is_masked_already(saved):
    folder, circuit = saved
    before = snapshot(circuit.wrapped_model)
    with pytest.raises(ValueError, match="it is masked already"):
        CircuitModel.from_pretrained(circuit.wrapped_model, folder)
    assert_same_snapshot(before, snapshot(circuit.wrapped_model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_fingerprints_of_every_dtype(dtype, tmp_path):
    build(model=PLAIN.build().to(dtype)).save_pretrained(tmp_path)
    CircuitModel.from_pretrained(PLAIN.build().to(dtype), tmp_path)
    model = PLAIN.build().to(dtype)
    model.conv.weight.data.view(-1)[7] *= 1.01
    refused(tmp_path, ValueError, "the weights of conv are not those", model)


def test_fingerprint_sees_numbers_not_memory_layout():
    layer = nn.Conv2d(4, 6, 3)
    other = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    assert checkpoint.fingerprint(other) == checkpoint.fingerprint(layer)
    other.bias.data[0] += 1
    assert checkpoint.fingerprint(other) != checkpoint.fingerprint(layer)


# Export and unload


def assert_plain(model):
    """Nothing of csmask is in the model: classes, keys, attributes."""
    for name, module in model.named_modules(remove_duplicate=False):
        assert not any(c.__module__.startswith("csmask") for c in type(module).__mro__), name
        assert not {"mask_logits", "bias_mask_logits", "temperature", "ablation", "mask_unit"} & set(dir(module)), name
    assert not [k for k in model.state_dict() if "mask_logits" in k or k.endswith("temperature")]


@pytest.mark.parametrize("options", [{}, {"mask_unit": "neuron", "mask_bias": True}, {"rescale": True}], ids=str)
@every_family
def test_export_is_a_plain_model_with_the_very_numbers(tiny, options, tmp_path):
    base = tiny.build()
    full, keys = numbers(base, tiny), list(base.state_dict())
    circuit = build(tiny, model=base, **options).eval()
    want = numbers(circuit, tiny)
    assert not torch.equal(want, full)
    exported = circuit.export()
    assert type(exported) is type(tiny.build())
    assert_plain(exported)
    assert list(exported.state_dict()) == keys
    assert not exported.training
    assert torch.equal(numbers(exported, tiny), want)
    exported.save_pretrained(tmp_path)
    loaded = type(exported).from_pretrained(tmp_path).eval()
    assert torch.equal(numbers(loaded, tiny), want)
    # the export is a copy: neither changes the other
    for param in exported.parameters():
        param.data.zero_()
    assert torch.equal(numbers(circuit, tiny), want)
    circuit.unload()
    assert torch.equal(numbers(circuit.wrapped_model, tiny), full)


def tied_models():
    small = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    gpt2 = GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    llama = LlamaConfig(**small, intermediate_size=48, tie_word_embeddings=True)
    bert = BertConfig(**small, intermediate_size=48, max_position_embeddings=16)
    return {
        "gpt2": (lambda: GPT2LMHeadModel(gpt2), "lm_head", "transformer.wte"),
        "llama": (lambda: LlamaForCausalLM(llama), "lm_head", "model.embed_tokens"),
        "bert-mlm": (lambda: BertForMaskedLM(bert), "cls.predictions.decoder", "bert.embeddings.word_embeddings"),
    }


@pytest.mark.parametrize("mask_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", tied_models())
def test_export_with_a_tied_head(name, mask_bias, tmp_path):
    make, head, embedding = tied_models()[name]
    torch.manual_seed(0)
    base = make().eval()
    for param in base.parameters():
        param.data = torch.randn(param.shape) * 0.2
    base.tie_weights()
    assert base.get_submodule(head).weight is base.get_submodule(embedding).weight
    ids = {"input_ids": torch.arange(12).view(2, 6)}
    full = base(**ids).logits
    config = CircuitConfig(mask_hparams={"mask_bias": mask_bias}, target_layers=[head])
    circuit = CircuitModel(config, base)
    randomize_logits(circuit)
    with torch.no_grad():
        want = circuit.eval()(**ids).logits
        exported = circuit.export()
        assert_plain(exported)
        assert torch.equal(exported(**ids).logits, want)
        # the embedding has gone on with the unmasked weight
        assert torch.equal(exported.get_submodule(embedding).weight, base.get_submodule(embedding).weight)
        assert not torch.equal(exported.get_submodule(head).weight, base.get_submodule(head).weight)
        exported.save_pretrained(tmp_path)
        loaded = type(exported).from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(**ids).logits, want)
        assert not loaded.config.tie_word_embeddings
        loaded.tie_weights()  # as resizing or a Trainer may do at any time
        assert torch.equal(loaded(**ids).logits, want)
        assert base.config.tie_word_embeddings  # the circuit's own base is as it was
        circuit.unload()
        assert torch.equal(base(**ids).logits, full)
        assert base.get_submodule(head).weight is base.get_submodule(embedding).weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": "same", "kernel_size": (4, 2)},
        {"padding": "same", "kernel_size": 4, "padding_mode": "circular"},
        {"padding": "same", "kernel_size": (2, 3), "dilation": 3, "groups": 2},
        {"padding": (1, 2), "kernel_size": 3, "stride": 2, "padding_mode": "reflect"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_export_of_convolutions(options, dtype):
    model = nn.Sequential(nn.Conv2d(4, 6, **options), nn.ReLU(), nn.Conv2d(6, 2, 1)).to(dtype).eval()
    circuit = CircuitModel(CircuitConfig(mask_hparams={"mask_bias": True}, target_layers="all"), model).eval()
    randomize_logits(circuit)
    x = testing.seeded_normal((2, 4, 11, 10), 0, dtype)
    with torch.no_grad():
        exported = circuit.export()
        assert_plain(exported)
        assert torch.equal(exported(x), circuit(x))
        assert torch.equal(exported(x[0]), circuit(x[0]))


def test_export_holds_the_hard_mask_whatever_the_circuit_is_doing():
    circuit = build(mask_bias=True).eval()
    for param in circuit.mask_parameters():
        param.data.sub_(0.8)
    want = numbers(circuit)
    circuit.set_ablate_mode("zero_ablate")
    assert torch.equal(numbers(circuit.export()), want)
    circuit.set_ablate_mode("none")
    circuit.use_masks(False)
    assert torch.equal(numbers(circuit.export()), want)
    circuit.use_masks(True)
    circuit.train()
    assert torch.equal(numbers(circuit.export()), want)
    assert circuit.training
    circuit.masked_layers["conv"].mask_logits.data.view(-1)[0] = math.nan
    with pytest.raises(ValueError, match=r"conv\.mask_logits holds NaN"):
        circuit.export()


def test_export_can_be_trained_as_the_base_could():
    model = PLAIN.build()
    model.scale.requires_grad_(False)
    exported = build(model=model).export()
    assert {n: p.requires_grad for n, p in exported.named_parameters()} == {
        n: n != "scale" for n, _ in PLAIN.build().named_parameters()
    }
    pickle.loads(pickle.dumps(exported))
    assert type(exported) is PlainModel


def test_a_layer_reached_by_two_names_is_exported_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.append(model[0])
    circuit = CircuitModel(CircuitConfig(target_layers="all-linear"), model).eval()
    randomize_logits(circuit)
    exported = circuit.export()
    assert exported[2] is exported[0]
    x = testing.seeded_normal((3, 4), 0)
    assert torch.equal(exported(x), circuit(x))


@pytest.mark.parametrize("training", [True, False])
@every_family
def test_unload_restores_the_base(tiny, training):
    model = tiny.build().train(training)
    for i, param in enumerate(model.parameters()):
        param.requires_grad_(i % 2 == 0)
    before = snapshot(model)
    circuit = build(tiny, model=model, mask_bias=True)
    numbers(circuit, tiny)
    circuit.eval()
    for param in circuit.mask_parameters():
        param.data.sub_(1)
    circuit.set_ablate_mode("random_ablate")
    numbers(circuit, tiny)
    assert circuit.unload() is model
    assert_same_snapshot(before, snapshot(model))
    again = build(tiny, model=model)  # and it can be masked again
    again.unload()
    assert_same_snapshot(before, snapshot(model))


def test_another_head_is_a_wrong_base(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    circuit = CircuitModel(CircuitConfig(target_layers="0"), model)
    circuit.save_pretrained(tmp_path)
    base = circuit.unload()
    assert CircuitModel.from_pretrained(base, tmp_path).unload() is base
    with torch.no_grad():
        base[2].weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"wrong base model: .*other weights"):
        CircuitModel.from_pretrained(base, tmp_path)
    assert type(base[0]) is torch.nn.Linear
    CircuitModel.from_pretrained(base, tmp_path, check_base=False).unload()


def test_saving_removes_only_masks_that_csmask_named(tmp_path):
    circuit = CircuitModel(CircuitConfig(target_layers="0"), torch.nn.Sequential(torch.nn.Linear(4, 4)))
    (tmp_path / "masks-mine.safetensors").write_bytes(b"mine")
    circuit.save_pretrained(tmp_path)
    with torch.no_grad():
        circuit.mask_parameters()[0].add_(1)
    circuit.save_pretrained(tmp_path)
    assert (tmp_path / "masks-mine.safetensors").read_bytes() == b"mine"
    assert len(list(tmp_path.glob("masks-*.safetensors"))) == 2


def test_a_tied_masked_head_of_an_encoder_decoder_is_not_exported():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, tie_word_embeddings=True)
    model = T5ForConditionalGeneration(config)
    assert model.lm_head.weight is model.shared.weight
    circuit = CircuitModel(CircuitConfig(target_layers="lm_head"), model)
    with pytest.raises(NotImplementedError, match="encoder-decoder"):
        circuit.export()
    circuit.unload()
