"""What autograd keeps for backward in a BERT-base-shaped encoder: nothing of a weight's size but W and S themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from csmask import CircuitConfig, CircuitModel

BATCH, TOKENS = 1, 8


def encoder() -> nn.Module:
    """12 layers of width 768; the linear layers of the encoder hold 85M weights."""
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=64), add_pooling_layer=False).eval()


def saved_of_a_weights_size(model: nn.Module, forward) -> tuple[int, int]:
    """Bytes that autograd keeps in tensors of a weight's size: in parameters, and beyond them. Backward runs too.

    Activations here have 8 x 3072 numbers at most, the smallest weight 768 x 768.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.nbytes() >= 4 * 768 * 768:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = forward()
    loss.backward()
    in_parameters = sum(size for address, size in kept.items() if address in parameters)
    return in_parameters, sum(kept.values()) - in_parameters


def batch() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(BATCH * TOKENS).view(BATCH, TOKENS) % 64}


@pytest.mark.parametrize("keep", ["training", "never"])
@pytest.mark.parametrize("execution", ["per_forward", "in_kernel", "auto"])
def test_nothing_of_a_weights_size_is_saved(execution, keep):
    config = CircuitConfig(target_layers="all-linear", execution=execution, l0_lambda=1e-6)
    circuit = CircuitModel(config, encoder())
    circuit.keep_masked_weights(keep)
    maskable = sum(layer.maskable for layer in circuit.masked_layers.values())
    assert maskable == 12 * (4 * 768 * 768 + 2 * 768 * 3072)

    def forward():
        return circuit(**batch()).last_hidden_state.square().mean() + 1e-6 * circuit.l0()

    parameters, beyond = saved_of_a_weights_size(circuit, forward)
    assert beyond == 0
    assert parameters == 8 * maskable  # W and S themselves, which are there anyway
    assert all(p.grad is not None for p in circuit.mask_parameters())


def test_the_same_encoder_masked_by_neurosurgeon_saves_12_bytes_per_weight():
    """The control of the test above: W (4 bytes), and beyond it the mask and the masked weight (8 bytes)."""
    masking = pytest.importorskip("NeuroSurgeon.Masking", reason="make test installs NeuroSurgeon 0.1.0")
    model = encoder()
    for p in model.parameters():
        p.requires_grad_(False)
    maskable = 0
    for module in list(model.encoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, masking.ContSparseLinear.from_layer(child))
                maskable += child.weight.numel()
    model.encoder.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()

    parameters, beyond = saved_of_a_weights_size(model, lambda: model(**batch()).last_hidden_state.square().mean())
    assert maskable == 12 * (4 * 768 * 768 + 2 * 768 * 3072)
    assert parameters == 4 * maskable
    # The first block's query, key and value have no input gradient, and so keep no masked weight.
    assert beyond == 8 * maskable - 3 * 4 * 768 * 768
