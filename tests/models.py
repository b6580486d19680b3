"""One table of tiny models for the tests: real transformers classes on small configs, seeded weights, no downloads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

VOCABULARY = 50
HIDDEN = 32


def _bert(dropout: float) -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=16,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=3,
        )
    )


def _gpt2(dropout: float) -> nn.Module:
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=HIDDEN,
            n_layer=2,
            n_head=2,
            n_positions=16,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
        )
    )
    model.loss_type = "ForCausalLM"  # transformers does not know it from the class's name, and says so at every call
    return model


def _llama(dropout: float) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            attention_dropout=dropout,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
        )
    )


def _modernbert(dropout: float) -> nn.Module:
    return ModernBertForSequenceClassification(
        ModernBertConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            local_attention=8,
            attention_dropout=dropout,
            mlp_dropout=dropout,
            embedding_dropout=dropout,
            classifier_dropout=dropout,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
            num_labels=3,
        )
    )


def _opt(dropout: float) -> nn.Module:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            ffn_dim=48,
            num_attention_heads=2,
            max_position_embeddings=16,
            word_embed_proj_dim=HIDDEN,
            dropout=dropout,
            attention_dropout=dropout,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        )
    )


def _bart(dropout: float) -> nn.Module:
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY,
            d_model=HIDDEN,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=16,
            dropout=dropout,
            attention_dropout=dropout,
            activation_dropout=dropout,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        )
    )


def _resnet(dropout: float) -> nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=3,
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 2],
            layer_type="basic",
            num_labels=3,
        )
    )


def _vit(dropout: float) -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            image_size=8,
            patch_size=4,
            num_channels=3,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=3,
        )
    )


class PlainModel(nn.Module):
    """No transformers anywhere: conv1d, batch norm, functional dropout, two linears; returns a bare tensor."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.norm = nn.BatchNorm1d(6)
        self.hidden = nn.Linear(6 * 5, 8)
        self.head = nn.Linear(8, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(8))
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))  # (B, 6, 5)
        x = torch.relu(self.hidden(x.flatten(1))) * self.scale
        x = nn.functional.dropout(x, self.dropout, self.training)
        return self.head(x)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _tokens(seed: int, rows: int = 3, length: int = 6) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=_generator(seed))


def _text_classes(seed: int) -> dict[str, Tensor]:
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1, 4:] = 0
    return {"input_ids": _tokens(seed), "attention_mask": mask, "labels": torch.tensor([0, 1, 2])}


def _language(seed: int) -> dict[str, Tensor]:
    ids = _tokens(seed)
    return {"input_ids": ids, "labels": ids}


def _translation(seed: int) -> dict[str, Tensor]:
    return {"input_ids": _tokens(seed), "labels": _tokens(seed + 1000)}


def _images(seed: int) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(3, 3, 8, 8, generator=_generator(seed)),
        "labels": torch.tensor([0, 1, 2]),
    }


def _signals(seed: int) -> dict[str, Tensor]:
    return {"x": torch.randn(3, 4, 5, generator=_generator(seed))}


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """A row of the table: how to build the model and a batch of it, and which layers the tests mask."""

    name: str
    builder: Callable[[float], nn.Module]
    batch: Callable[[int], dict[str, Tensor]]
    # A module path, a glob and a parameter name, so that every form of target meets every family.
    targets: tuple[str, ...]
    block: str = ""

    def build(self, dropout: float = 0.0, seed: int = 0) -> nn.Module:
        """The model in eval mode, as ``from_pretrained`` returns one; norm statistics and biases are not trivial."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.builder(dropout)
            with torch.no_grad():
                for name, param in model.named_parameters():
                    if name.endswith("bias"):
                        param.normal_(std=0.1)
                    elif param.dim() > 1:
                        # transformers starts at 0.02, where tiny models compute next to nothing.
                        param.normal_(std=param[0].numel() ** -0.5)
                for name, buffer in model.named_buffers():
                    if name.endswith("running_mean"):
                        buffer.normal_(std=0.1)
                    elif name.endswith("running_var"):
                        buffer.uniform_(0.5, 2.0)
        return model.eval()


MODELS = {
    tiny.name: tiny
    for tiny in (
        TinyModel(
            "bert",
            _bert,
            _text_classes,
            (
                "bert.encoder.layer.0.attention.self.query",
                "bert.encoder.layer.*.output.dense",
                "bert.encoder.layer.1.intermediate.dense.weight",
            ),
            "bert.encoder.layer",
        ),
        TinyModel(
            "gpt2",
            _gpt2,
            _language,
            ("transformer.h.0.attn.c_attn", "transformer.h.*.mlp.c_proj", "transformer.h.1.mlp.c_fc.weight"),
            "transformer.h",
        ),
        TinyModel(
            "resnet",
            _resnet,
            _images,
            (
                "resnet.embedder.embedder.convolution",
                "resnet.encoder.stages.0.*.convolution",
                "resnet.encoder.stages.1.layers.0.layer.0.convolution.weight",
            ),
        ),
        TinyModel("vit", _vit, _images, ("vit.embeddings.patch_embeddings.projection", "all-linear"), ""),
        TinyModel(
            "llama",
            _llama,
            _language,
            ("model.layers.0.self_attn.q_proj", "model.layers.*.mlp.*_proj", "model.layers.1.self_attn.v_proj.weight"),
            "model.layers",
        ),
        TinyModel(
            "modernbert",
            _modernbert,
            _text_classes,
            ("model.layers.0.attn.Wqkv", "model.layers.*.mlp.Wo", "model.layers.1.mlp.Wi.weight"),
            "model.layers",
        ),
        TinyModel(
            "opt",
            _opt,
            _language,
            ("model.decoder.layers.0.self_attn.q_proj", "model.decoder.layers.*.fc1"),
            "model.decoder.layers",
        ),
        TinyModel(
            "bart",
            _bart,
            _translation,
            ("model.encoder.layers.*.fc2", "model.decoder.layers.*.encoder_attn.v_proj"),
            "",
        ),
        TinyModel("plain", PlainModel, _signals, ("conv", "hidden.weight", "he*")),
    )
}
FAMILIES = ("bert", "gpt2", "resnet", "vit", "llama", "modernbert")
every_family = pytest.mark.parametrize("tiny", [MODELS[name] for name in FAMILIES], ids=FAMILIES)
every_model = pytest.mark.parametrize("tiny", list(MODELS.values()), ids=list(MODELS))


def randomize_logits(circuit: nn.Module, seed: int = 7, std: float = 1.0) -> None:
    """Logits of both signs and some exact zeros: masks that are neither full nor empty."""
    generator = _generator(seed)
    with torch.no_grad():
        for param in circuit.mask_parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * std)
            param.view(-1)[::7] = 0.0


def snapshot(model: nn.Module) -> dict[str, object]:
    """All of a model that surgery could change: classes, parameter objects and flags, modes, hooks, values."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        "classes": {n: type(m) for n, m in model.named_modules(remove_duplicate=False)},
        "training": {n: m.training for n, m in model.named_modules(remove_duplicate=False)},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules(remove_duplicate=False)},
        "hooks": {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks))
            for n, m in model.named_modules(remove_duplicate=False)
        },
        "parameter_ids": {n: id(p) for n, p in parameters.items()},
        "requires_grad": {n: p.requires_grad for n, p in parameters.items()},
        "state": {n: t.clone() for n, t in model.state_dict().items()},
    }


def assert_same_snapshot(before: dict[str, object], after: dict[str, object]) -> None:
    """Equal snapshots, tensors to the bit."""
    for key in before:
        if key != "state":
            assert before[key] == after[key], key
    assert list(before["state"]) == list(after["state"])
    for name, tensor in before["state"].items():
        assert tensor.dtype == after["state"][name].dtype, name
        assert torch.equal(tensor, after["state"][name]), name
