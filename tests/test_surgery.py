"""Finding the layers that a config names, swapping masks in and out, and leaving a model alone when that fails."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from models import MODELS, PlainModel, assert_same_snapshot, every_family, every_model, randomize_logits, snapshot
from torch import nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from csmask import CircuitConfig, CircuitModel, layers, surgery
from csmask.surgery import find_targets

BERT_LINEARS = [
    f"bert.encoder.layer.{i}.{leaf}"
    for i in range(2)
    for leaf in (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
]
QUERY = "bert.encoder.layer.{}.attention.self.query"
TARGET_FORMS = {
    "module path": (QUERY.format(0), [QUERY.format(0)]),
    "parameter name": (QUERY.format(1) + ".weight", [QUERY.format(1)]),
    "glob over layers": (QUERY.format("*"), [QUERY.format(0), QUERY.format(1)]),
    "glob over parameters": ("*.query.weight", [QUERY.format(0), QUERY.format(1)]),
    "glob with a class": ("bert.encoder.layer.[!0].*.key", ["bert.encoder.layer.1.attention.self.key"]),
    "glob with ?": (
        "bert.encoder.layer.?.output.dense",
        ["bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.output.dense"],
    ),
    "regex": (r"re:.*\.layer\.1\..*(query|value)", [QUERY.format(1), QUERY.format(1).replace("query", "value")]),
    "regex over parameters": (r"re:.*layer\.0.*query\.weight", [QUERY.format(0)]),
    "all-linear": ("all-linear", [*BERT_LINEARS, "bert.pooler.dense"]),
    "all": ("all", [*BERT_LINEARS, "bert.pooler.dense"]),
    "the head by its name": ("classifier", ["classifier"]),
    "list": (["classifier", QUERY.format(1), QUERY.format(0)], [QUERY.format(0), QUERY.format(1), "classifier"]),
    "overlapping list": (["*.query", QUERY.format(1) + ".weight", "re:.*query"], [QUERY.format(0), QUERY.format(1)]),
    "one-item list": (["all-linear"], [*BERT_LINEARS, "bert.pooler.dense"]),
}


@pytest.mark.parametrize("form", TARGET_FORMS)
def test_every_form_of_target_finds_exactly_its_layers_in_the_models_order(form):
    target, expected = TARGET_FORMS[form]
    model = MODELS["bert"].build()
    assert list(find_targets(model, target)) == expected
    circuit = CircuitModel(CircuitConfig(target_layers=target), model)
    assert list(circuit.masked_layers) == expected
    masked = [n for n, m in model.named_modules() if isinstance(m, layers.MaskedLayer)]
    assert masked == expected


def test_a_regular_expression_must_match_the_whole_name():
    with pytest.raises(ValueError, match="matches no layer"):
        find_targets(MODELS["bert"].build(), "re:query")


# What PEFT's "all-linear" would leave out: the output embedding, and the head of a classification model.
LEAVES = {
    "gpt2": ("transformer.h", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    "llama": ("model.layers", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")),
    "llama mlp": ("model.layers", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
    "modernbert": ("model.layers", ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo")),
    "vit": ("vit.layers", (*(f"attention.{i}_proj" for i in "qkvo"), "mlp.fc1", "mlp.fc2")),
}
LINEARS = {name: [f"{stem}.{i}.{leaf}" for i in range(2) for leaf in leaves] for name, (stem, leaves) in LEAVES.items()}
# Family -> (linear layers, convolutions).
ALL_TARGETS = {
    "bert": ([*BERT_LINEARS, "bert.pooler.dense"], []),
    "gpt2": (LINEARS["gpt2"], []),
    "llama": ([*LINEARS["llama"], *LINEARS["llama mlp"]], []),
    "modernbert": ([*LINEARS["modernbert"], "head.dense"], []),
    "vit": (LINEARS["vit"], ["vit.embeddings.patch_embeddings.projection"]),
    "resnet": (
        None,
        [
            "resnet.embedder.embedder.convolution",
            "resnet.encoder.stages.0.layers.0.layer.0.convolution",
            "resnet.encoder.stages.0.layers.0.layer.1.convolution",
            "resnet.encoder.stages.1.layers.0.shortcut.convolution",
            "resnet.encoder.stages.1.layers.0.layer.0.convolution",
            "resnet.encoder.stages.1.layers.0.layer.1.convolution",
            "resnet.encoder.stages.1.layers.1.layer.0.convolution",
            "resnet.encoder.stages.1.layers.1.layer.1.convolution",
        ],
    ),
}


@every_family
def test_all_and_all_linear_leave_out_heads_and_embeddings(tiny):
    linear, convolutions = ALL_TARGETS[tiny.name]
    model = tiny.build()
    if linear is None:
        with pytest.raises(ValueError, match="no linear layer that can be masked"):
            find_targets(model, "all-linear")
    else:
        assert sorted(find_targets(model, "all-linear")) == sorted(linear)
    assert sorted(find_targets(model, "all")) == sorted([*(linear or []), *convolutions])


def test_all_of_a_plain_model_has_no_head_to_leave_out():
    assert list(find_targets(PlainModel(), "all")) == ["conv", "hidden", "head"]
    assert list(find_targets(PlainModel(), "all-linear")) == ["hidden", "head"]


def test_a_model_that_is_itself_one_layer():
    torch.manual_seed(0)
    linear = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    circuit = CircuitModel(CircuitConfig(target_layers="all", mask_hparams={"mask_init_value": 1.0}), linear).eval()
    assert torch.equal(circuit(x), torch.nn.functional.linear(x, linear.weight, linear.bias))
    assert circuit.unload() is linear
    assert type(linear) is nn.Linear


@pytest.mark.parametrize(
    ("target", "error", "text"),
    [
        ("bert.encoder.layer.0.attention.self.querry", ValueError, "nearest: .*layer.0.attention.self.query"),
        ("encoder.layer.1.output.dense", ValueError, "nearest: .*bert.encoder.layer.1.output.dense"),
        ("bert.encoder.layer.7.output.dense", ValueError, "nearest: "),
        ("nothing.like.it", ValueError, "matches no layer"),
        ("*.no_such", ValueError, "matches no layer"),
        ("re:no_such.*", ValueError, "matches no layer"),
        ("bert.encoder.layer.0.output.LayerNorm", TypeError, "LayerNorm is not a Linear"),
        ("bert.embeddings.word_embeddings", TypeError, "Embedding is not a Linear"),
        ("bert.embeddings.word_embeddings.weight", TypeError, "Embedding is not a Linear"),
        ("bert.encoder", TypeError, "BertEncoder is not a Linear"),
        ("*LayerNorm", TypeError, "matches only layers that cannot be masked: LayerNorm"),
        ("classifier.bias", ValueError, "is a bias: name its layer.*mask_bias"),
        ([], ValueError, "target_layers is empty"),
        (["classifier", "nothing"], ValueError, "'nothing' matches no layer"),
    ],
)
def test_a_target_that_cannot_be_masked_is_named_and_the_model_untouched(target, error, text):
    model = MODELS["bert"].build()
    before = snapshot(model)
    with pytest.raises(error, match=text):
        CircuitModel(CircuitConfig(target_layers=target), model)
    assert_same_snapshot(before, snapshot(model))


def test_a_model_with_nothing_to_mask():
    with pytest.raises(ValueError, match="the model has no layer that can be masked"):
        find_targets(nn.Sequential(nn.ReLU()), "all")
    with pytest.raises(ValueError, match="the model has no layer that can be masked"):
        find_targets(nn.Sequential(nn.ReLU()), "fc")


# Failed calls


class InjectedError(Exception):
    pass


def _fail_at(monkeypatch, owner, name, call):
    """Let the ``call``-th call of a function fail, after it has done its work."""
    original, count = getattr(owner, name), itertools.count()

    def fail(*args, **kwargs):
        result = original(*args, **kwargs)
        if next(count) == call:
            raise InjectedError(name)
        return result

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize("trained", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (torch, "full", 0),
        (torch, "full", 3),
        (surgery, "mask_layer", 0),
        (surgery, "mask_layer", 2),
        (nn.Module, "register_parameter", 3),
        (nn.Module, "register_buffer", 1),
        ("circuit", "swap_in", 0),
        ("circuit", "disable_fused_encoder_layers", 0),
        ("circuit", "checkpointable_layers", 0),
        ("CircuitModel", "_set_ablation", 0),
        ("CircuitModel", "train", 0),
    ],
)
def test_an_exception_at_any_stage_leaves_the_model_as_it_was(monkeypatch, owner, name, call, trained):
    if owner == "circuit":
        owner = __import__("csmask.circuit", fromlist=["circuit"])
    elif owner == "CircuitModel":
        owner = CircuitModel
    model = MODELS["bert"].build().train(trained)
    model.classifier.weight.requires_grad_(False)
    model.encoder_layer = nn.TransformerEncoderLayer(8, 2, 8)
    before = snapshot(model)
    config = CircuitConfig(
        target_layers=["all-linear", "encoder_layer.linear1"], mask_hparams={"mask_bias": True, "mask_unit": "neuron"}
    )
    with monkeypatch.context() as patch:
        _fail_at(patch, owner, name, call)
        with pytest.raises(InjectedError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            CircuitModel(config, model)
    assert_same_snapshot(before, snapshot(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CircuitModel(config, model)  # and it can be masked all the same


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was():
    model = PlainModel()
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="no bias to mask in head"):
            CircuitModel(CircuitConfig(target_layers="all", mask_hparams={"mask_bias": True}), model)
    assert_same_snapshot(before, snapshot(model))


@pytest.mark.parametrize(
    ("config", "model", "error", "text"),
    [
        ({"target_layers": "all"}, PlainModel(), TypeError, "config must be a CircuitConfig, got dict"),
        (CircuitConfig(target_layers="all"), PlainModel, TypeError, "model must be a torch.nn.Module, got type"),
        (PlainModel(), CircuitConfig(target_layers="all"), TypeError, "config must be a CircuitConfig"),
    ],
)
def test_arguments_that_are_not_what_they_should_be(config, model, error, text):
    with pytest.raises(error, match=text):
        CircuitModel(config, model)
    if isinstance(model, PlainModel):
        assert type(model.conv) is nn.Conv1d


def test_a_masked_model_is_not_masked_twice():
    model = PlainModel()
    circuit = CircuitModel(CircuitConfig(target_layers="hidden"), model)
    with pytest.raises(ValueError, match="is a CircuitModel already"):
        CircuitModel(CircuitConfig(target_layers="all"), circuit)
    before = snapshot(model)
    for targets in ("hidden", ["head", "hidden"], "h*"):
        with pytest.raises(ValueError, match="'hidden' cannot be masked: it is masked already"):
            CircuitModel(CircuitConfig(target_layers=targets), model)
    assert_same_snapshot(before, snapshot(model))


def test_a_config_changed_after_the_model_was_made_does_not_change_it():
    config = CircuitConfig(target_layers=["hidden"])
    circuit = CircuitModel(config, PlainModel())
    config.target_layers.append("head")
    config.l0_lambda = 5.0
    assert circuit.circuit_config.target_layers == ["hidden"]
    assert circuit.circuit_config.l0_lambda == 1e-8


def test_a_config_made_bad_after_it_was_built_is_refused():
    config = CircuitConfig(target_layers=["hidden"])
    config.mask_hparams["mask_unit"] = "filter"
    model = PlainModel()
    before = snapshot(model)
    with pytest.raises(ValueError, match="mask_unit"):
        CircuitModel(config, model)
    assert_same_snapshot(before, snapshot(model))


# Layers that look maskable and are not


class OwnForward(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight * 2, self.bias)


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 2, bias)


class OwnCall(nn.Linear):
    def __call__(self, x):
        return super().__call__(x) * 2


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.fine = nn.Linear(4, 4)
        self.layer = layer

    def forward(self, x):
        return self.layer(self.fine(x))


def _instance_forward() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    return layer


def _pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)


def _integer() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


def _attribute(name: str, value: object):
    def make() -> nn.Module:
        layer = nn.Linear(4, 4)
        setattr(layer, name, value)
        return layer

    return make


class HasMethod(nn.Linear):
    def kept(self):
        return "mine"


@pytest.mark.parametrize("target", [["fine", "layer"], ["fine", "l*er"]], ids=["name", "glob"])
@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: OwnForward(4, 4), NotImplementedError, "OwnForward has a forward of its own"),
        (lambda: OwnConvForward(4, 4, 1), NotImplementedError, "OwnConvForward has a forward of its own"),
        (lambda: OwnCall(4, 4), NotImplementedError, "OwnCall has a forward of its own"),
        (_instance_forward, NotImplementedError, "Linear has a forward of its own"),
        (lambda: nn.LazyLinear(4), NotImplementedError, "LazyLinear.weight is not a plain parameter"),
        (_pruned, NotImplementedError, "weight is not a plain parameter"),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            NotImplementedError,
            "weight is not a plain parameter",
        ),
        (_integer, TypeError, "dtype torch.int8"),
        (_attribute("temperature", 2.0), ValueError, "attribute 'temperature' already"),
        (_attribute("mask_logits", None), ValueError, "attribute 'mask_logits' already"),
        (_attribute("ablation", "study"), ValueError, "attribute 'ablation' already"),
        (_attribute("fan_in", 4), ValueError, "attribute 'fan_in' already"),
        (lambda: HasMethod(4, 4), ValueError, "attribute 'kept' already"),
    ],
)
def test_a_layer_that_csmask_would_get_wrong_is_refused_by_name(make, error, text, target):
    model = Holder(make())
    before = [type(m) for m in model.modules()]
    with pytest.raises(error, match=text) as caught:
        CircuitModel(CircuitConfig(target_layers=target), model)
    assert "'layer'" in str(caught.value)
    assert [type(m) for m in model.modules()] == before
    assert not hasattr(model.fine, "use_masks")


def test_all_leaves_such_layers_out_and_says_which():
    model = Holder(OwnForward(4, 4))
    with pytest.warns(UserWarning, match=r"not masked: layer \(OwnForward has a forward of its own"):
        assert list(find_targets(model, "all")) == ["fine"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.alias = self.attention.out_proj
        self.fine = nn.Linear(8, 8)


def test_out_proj_of_multihead_attention_is_refused_under_any_name():
    """``nn.MultiheadAttention`` reads the weight of ``out_proj`` without calling it: a mask there would do nothing."""
    model = Attention()
    for target in ("attention.out_proj", "alias", "a*"):
        with pytest.raises(NotImplementedError, match="MultiheadAttention uses its weight without calling it"):
            CircuitModel(CircuitConfig(target_layers=target), model)
    with pytest.warns(UserWarning, match="not masked: .*out_proj"):
        assert list(find_targets(model, "all-linear")) == ["fine"]
    alone = nn.MultiheadAttention(8, 2)
    with pytest.raises(NotImplementedError, match="MultiheadAttention"):
        find_targets(alone, "out_proj")


# What surgery keeps


@every_model
def test_masking_swaps_classes_in_place_and_unload_undoes_it(tiny):
    model = tiny.build().requires_grad_(True)
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    circuit = CircuitModel(CircuitConfig(target_layers=list(tiny.targets)), model)
    after = snapshot(model)
    # The same modules under the same names with the same parameter objects and values: only logits are new.
    assert list(after["classes"]) == list(before["classes"])
    for name, kind in after["classes"].items():
        assert issubclass(kind, before["classes"][name]), name
    new = set(after["parameter_ids"]) - set(before["parameter_ids"])
    assert new == {name for name, _ in circuit.named_mask_parameters()}
    assert before["parameter_ids"].items() <= after["parameter_ids"].items()
    assert all(torch.equal(after["state"][k], v) for k, v in before["state"].items())
    assert set(after["state"]) - set(before["state"]) == new | {f"{n}.temperature" for n in circuit.masked_layers}
    # Frozen, all of it, whatever it is called; and only the masks are trained.
    assert {n for n, p in model.named_parameters() if p.requires_grad} == new
    assert circuit.unload() is model
    assert_same_snapshot(before, snapshot(model))


def test_unload_gives_the_numbers_of_the_base_again():
    tiny = MODELS["bert"]
    model = tiny.build()
    expected = model(**tiny.batch(0)).logits
    circuit = CircuitModel(CircuitConfig(target_layers="all-linear"), model)
    randomize_logits(circuit)
    circuit.eval()
    circuit.set_ablate_mode("zero_ablate")
    assert not torch.equal(circuit(**tiny.batch(0)).logits, expected)
    assert torch.equal(circuit.unload()(**tiny.batch(0)).logits, expected)
    again = CircuitModel(CircuitConfig(target_layers="all-linear"), model)
    assert again.ablate_mode == "none"


def test_hooks_on_a_masked_layer_go_on_running():
    model = PlainModel()
    seen = []
    model.hidden.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    circuit = CircuitModel(CircuitConfig(target_layers="hidden"), model)
    circuit(torch.randn(2, 4, 5))
    circuit.unload()(torch.randn(2, 4, 5))
    assert seen == [(2, 8), (2, 8)]


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.inner = nn.Module()
        self.inner.again = self.first

    def forward(self, x):
        return self.inner.again(torch.tanh(self.first(x)))


@pytest.mark.parametrize("target", ["first", "inner.again", ["inner.again", "first"], "all", "*again"])
def test_a_module_reached_by_two_names_is_masked_at_both_and_counted_once(target):
    torch.manual_seed(0)
    model = TwoNames()
    circuit = CircuitModel(CircuitConfig(target_layers=target), model)
    randomize_logits(circuit)
    assert list(circuit.masked_layers) == ["first"]
    assert circuit.compute_l0_statistics()["max_l0"] == 16
    assert len(circuit.mask_parameters()) == 1
    assert model.first is model.inner.again
    x = torch.randn(3, 4)
    layer = model.first
    weight = (layer.weight * torch.sigmoid(layer.mask_logits)).detach()
    dense = nn.functional.linear(torch.tanh(nn.functional.linear(x, weight, layer.bias)), weight, layer.bias)
    torch.testing.assert_close(circuit(x), dense, rtol=1e-5, atol=1e-6)
    for name in ("inner.again", "first", "wrapped_model.inner.again"):
        circuit.use_masks(False, name)
        assert layer.use_masks is False
        circuit.use_masks(True)


def test_tied_head_is_masked_and_the_embedding_is_not():
    tiny = MODELS["gpt2"]
    model = tiny.build()
    embedding = model.transformer.wte
    assert model.lm_head.weight is embedding.weight
    ids = tiny.batch(0)["input_ids"]
    embedded = embedding(ids)
    hidden = model.transformer(ids).last_hidden_state
    circuit = CircuitModel(CircuitConfig(target_layers="lm_head"), model)
    randomize_logits(circuit)
    circuit.eval()
    assert type(embedding) is nn.Embedding
    assert model.lm_head.weight is embedding.weight
    assert torch.equal(embedding(ids), embedded)
    assert torch.equal(model.transformer(ids).last_hidden_state, hidden)
    weight = torch.where(model.lm_head.mask_logits > 0, embedding.weight, torch.zeros(()))
    assert not torch.equal(weight, embedding.weight)
    assert torch.equal(circuit(ids).logits, nn.functional.linear(hidden, weight))


def test_two_layers_that_share_a_weight_have_masks_of_their_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    circuit = CircuitModel(CircuitConfig(target_layers="all"), model).eval()
    with torch.no_grad():
        model[0].mask_logits.fill_(1.0)
    x = torch.randn(2, 4)
    first = nn.functional.linear(x, model[0].weight, model[0].bias)
    assert torch.equal(circuit(x), nn.functional.linear(first, torch.zeros(4, 4), model[1].bias))
    assert circuit.compute_l0_statistics()["total_l0"] == 16
    assert circuit.compute_l0_statistics()["max_l0"] == 32


def test_freezing_takes_parameters_of_every_name():
    class Odd(PlainModel):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(2))
            self.lists = nn.ParameterList([nn.Parameter(torch.ones(1))])

    circuit = CircuitModel(CircuitConfig(target_layers="hidden"), Odd())
    assert [n for n, p in circuit.named_parameters() if p.requires_grad] == ["wrapped_model.hidden.mask_logits"]
    unfrozen = CircuitModel(CircuitConfig(target_layers="hidden", freeze_base=False), Odd())
    assert all(p.requires_grad for p in unfrozen.parameters())


# torch.nn.TransformerEncoderLayer


def _encoder(layers_: int = 2) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers_).eval()


@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("autograd", [False, True], ids=["no_grad", "grad"])
def test_the_fused_path_of_torch_encoder_layers_does_not_bypass_the_masks(padding, autograd):
    """In evaluation torch reads ``linear1.weight`` in one fused kernel; the masks must be used all the same."""
    targets = [f"layers.{i}.linear{j}" for i in range(2) for j in (1, 2)]
    model, dense = _encoder(), _encoder()
    circuit = CircuitModel(CircuitConfig(target_layers=targets), model)
    randomize_logits(circuit)
    circuit.eval()
    with torch.no_grad():
        for name in targets:
            kept = (model.get_submodule(name).mask_logits > 0).float()
            dense.get_submodule(name).weight.mul_(kept)
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = True
    inputs = {"src_key_padding_mask": mask} if padding else {}
    with torch.set_grad_enabled(autograd), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out, expected = circuit(x, **inputs), dense(x, **inputs)
    keep = ~mask if padding else torch.ones(3, 5, dtype=torch.bool)
    torch.testing.assert_close(out[keep], expected[keep], rtol=1e-4, atol=1e-5)


def test_a_frozen_torch_encoder_trains_masks_on_padded_input():
    """A frozen encoder is in eval mode, where torch turns padded input into nested tensors, which have no gradient."""
    targets = [f"layers.{i}.linear{j}" for i in range(2) for j in (1, 2)]
    circuit = CircuitModel(CircuitConfig(target_layers=targets), _encoder())
    randomize_logits(circuit)
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = True
    out = circuit(x, src_key_padding_mask=mask)
    out[~mask].square().sum().backward()
    gradients = [p.grad for p in circuit.mask_parameters()]
    # The padded positions are left out: a batch of the unpadded rows gives the same gradients.
    circuit.zero_grad()
    rows = [circuit(x[:1]), circuit(x[1:2, :3]), circuit(x[2:])]
    sum(row.square().sum() for row in rows).backward()
    for gradient, param in zip(gradients, circuit.mask_parameters(), strict=True):
        torch.testing.assert_close(gradient, param.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["unload", "export"])
def test_unmasked_encoder_layers_keep_their_fused_path_and_it_is_given_back(method):
    model = _encoder()
    before = snapshot(model)
    circuit = CircuitModel(CircuitConfig(target_layers="layers.0.linear1"), model)
    assert not any(m._forward_pre_hooks for m in model.layers[1].modules())
    assert any(m._forward_pre_hooks for m in model.layers[0].modules())
    assert not model.use_nested_tensor
    after = snapshot(getattr(circuit, method)())
    for key in ("classes", "attributes", "hooks", "training", "requires_grad"):
        assert after[key] == before[key], key
    assert getattr(circuit, method)().use_nested_tensor


# use_masks by name


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (None, ["conv", "hidden", "head"]),
        ("hidden", ["hidden"]),
        ("hidden.weight", ["hidden"]),
        ("wrapped_model.hidden", ["hidden"]),
        (["conv", "wrapped_model.head.weight"], ["conv", "head"]),
        ("h*", ["hidden", "head"]),
        ("re:h.*n", ["hidden"]),
        ("*", ["conv", "hidden", "head"]),
        ([], []),
    ],
)
def test_use_masks_takes_the_names_that_target_layers_takes(names, expected):
    circuit = CircuitModel(CircuitConfig(target_layers="all"), PlainModel())
    circuit.use_masks(False, names)
    assert [n for n, layer in circuit.masked_layers.items() if not layer.use_masks] == expected
    circuit.use_masks(True, names)
    assert all(layer.use_masks for layer in circuit.masked_layers.values())


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ("hiden", "'hiden' matches no layer; nearest: .*hidden"),
        (["conv", "hiden"], "'hiden' matches no layer"),
        (["conv", "norm"], "'norm' is not masked"),
        (["conv", "head"], "'head' is not masked; masked layers like it: "),
        ("he*", "'he\\*' matches no masked layer|'head' is not masked"),
        ("x*", "matches no layer"),
    ],
)
def test_use_masks_with_a_wrong_name_changes_nothing(names, text):
    circuit = CircuitModel(CircuitConfig(target_layers=["conv", "hidden"]), PlainModel())
    with pytest.raises(ValueError, match=text):
        circuit.use_masks(False, names)
    assert all(layer.use_masks for layer in circuit.masked_layers.values())
    with pytest.raises(TypeError, match="flag must be True or False"):
        circuit.use_masks("conv")


def test_a_pattern_in_use_masks_means_the_masked_layers_it_matches():
    """Unmasked layers that a glob or an expression also matches are no concern of use_masks."""
    for names in ("h*", "*", "re:.*"):
        circuit = CircuitModel(CircuitConfig(target_layers=["conv", "hidden"]), PlainModel())
        circuit.use_masks(False, names)
        assert circuit.masked_layers["hidden"].use_masks is False


def test_gpt2_conv1d_is_found_by_type_in_any_model():
    model = nn.Sequential(Conv1D(6, 4), nn.ReLU(), nn.Linear(6, 2))
    assert list(find_targets(model, "all-linear")) == ["0", "2"]
    CircuitModel(CircuitConfig(target_layers="0", mask_hparams={"mask_unit": "neuron"}), model)
    assert model[0].mask_logits.shape == (6,)
