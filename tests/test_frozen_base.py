"""A frozen base: parameters, dropout and norm statistics stand still, and gradient checkpointing still recomputes."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
from models import MODELS, PlainModel, TinyModel, randomize_logits
from torch import nn

from csmask import CircuitConfig, CircuitModel

CHECKPOINTING = ("bert", "gpt2", "opt", "bart", "llama", "modernbert", "vit")
checkpointing_models = pytest.mark.parametrize("tiny", [MODELS[name] for name in CHECKPOINTING], ids=CHECKPOINTING)
reentrant = pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
DROPOUT = 0.5


def make_circuit(tiny: TinyModel, dropout: float = DROPOUT, **config) -> CircuitModel:
    config = CircuitConfig(target_layers="all-linear", mask_hparams={"mask_bias": True}, l0_lambda=1e-3, **config)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="mask_bias")
        circuit = CircuitModel(config, tiny.build(dropout))
    randomize_logits(circuit)
    return circuit


def enable_checkpointing(model: nn.Module, use_reentrant: bool) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})


def checkpointed_blocks(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if any(c.__name__ == "GradientCheckpointingLayer" for c in type(m).__mro__)]


def count_calls(circuit: CircuitModel) -> list[int]:
    """One counter per checkpointed block, of the calls of its first masked layer."""
    counts = []
    for index, block in enumerate(checkpointed_blocks(circuit.wrapped_model)):
        counts.append(0)

        def count(module, args, index=index):
            counts[index] += 1

        next(m for m in block.modules() if hasattr(m, "mask_logits")).register_forward_pre_hook(count)
    return counts


def loss_and_gradients(circuit: CircuitModel, batch: dict) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    circuit.zero_grad()
    loss = circuit(**batch).loss
    loss.backward()
    return loss.detach(), [None if p.grad is None else p.grad.clone() for p in circuit.mask_parameters()]


def assert_same_gradients(tiny: TinyModel, use_reentrant: bool, gradients: list, expected: list) -> None:
    """To the bit without reentrant blocks.

    Those run forward without gradients, so the l0 term's gradient is added by a kernel of its own, rounded once more;
    and they add up the gradients of BART's encoder output in another order.
    """
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert gradient is not None
        if use_reentrant:
            rtol = 1e-4 if tiny.name == "bart" else 1e-6
            torch.testing.assert_close(gradient, wanted, rtol=rtol, atol=rtol / 10 * wanted.abs().max().item())
        else:
            assert torch.equal(gradient, wanted)


@pytest.mark.dropin
@reentrant
@checkpointing_models
def test_checkpointing_recomputes_every_block_with_the_same_numbers(tiny, use_reentrant):
    batch = tiny.batch(1)
    plain = make_circuit(tiny)
    checkpointed = make_circuit(tiny)
    enable_checkpointing(checkpointed, use_reentrant)
    expected_loss, expected = loss_and_gradients(plain, batch)
    counts = count_calls(checkpointed)
    assert len(counts) == (4 if tiny.name == "bart" else 2)

    loss = checkpointed(**batch).loss
    assert counts == [1] * len(counts)
    loss.backward()
    assert counts == [2] * len(counts), "a block was not recomputed in backward"

    assert torch.equal(loss, expected_loss)
    assert_same_gradients(tiny, use_reentrant, [p.grad for p in checkpointed.mask_parameters()], expected)
    # Nothing is left behind that a deepcopy, an evaluation or the next step would see.
    assert not any(m.training for m in checkpointed.wrapped_model.modules() if not hasattr(m, "mask_logits"))
    assert torch.equal(copy.deepcopy(checkpointed)(**batch).loss, expected_loss)


@pytest.mark.dropin
@reentrant
@checkpointing_models
def test_dropout_is_off_while_blocks_recompute(tiny, use_reentrant):
    """Bitwise: two forwards agree, and agree with the same weights in a model that has no dropout at all."""
    batch = tiny.batch(2)
    circuit = make_circuit(tiny)
    dropouts = [m for m in circuit.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    assert dropouts or "dropout" in inspect.getsource(inspect.getmodule(type(circuit.wrapped_model)))
    without = make_circuit(tiny, dropout=0.0)
    without.load_state_dict(circuit.state_dict())
    enable_checkpointing(circuit, use_reentrant)
    expected_loss, expected = loss_and_gradients(without, batch)
    for _ in range(2):
        loss, gradients = loss_and_gradients(circuit, batch)
        assert torch.equal(loss, expected_loss)
        assert_same_gradients(tiny, use_reentrant, gradients, expected)


@pytest.mark.parametrize("name", ["bert", "gpt2", "opt", "bart"])
def test_dropout_of_these_models_is_real(name):
    """The control of the tests above: the same models trained as a whole do drop out."""
    tiny = MODELS[name]
    circuit = make_circuit(tiny, freeze_base=False)
    batch = tiny.batch(2)
    assert not torch.equal(circuit(**batch).loss, circuit(**batch).loss)


def test_checkpointing_without_inputs_that_require_grad():
    """Reentrant checkpointing drops all gradients if no input requires one; given embeddings do not."""
    tiny = MODELS["gpt2"]
    batch = tiny.batch(3)
    circuit = make_circuit(tiny)
    embeddings = circuit.get_input_embeddings()(batch["input_ids"]).detach()
    inputs = {"inputs_embeds": embeddings, "labels": batch["labels"]}
    expected_loss, expected = loss_and_gradients(circuit, inputs)
    enable_checkpointing(circuit, use_reentrant=True)
    loss, gradients = loss_and_gradients(circuit, inputs)
    assert torch.equal(loss, expected_loss)
    assert_same_gradients(tiny, True, gradients, expected)


def test_checkpointing_every_other_block_and_off_again():
    tiny = MODELS["bert"]
    circuit = make_circuit(tiny)
    enable_checkpointing(circuit, use_reentrant=False)
    blocks = checkpointed_blocks(circuit.wrapped_model)
    blocks[1].gradient_checkpointing = False
    counts = count_calls(circuit)
    circuit(**tiny.batch(0)).loss.backward()
    assert counts == [2, 1]
    blocks[0].gradient_checkpointing = False
    circuit(**tiny.batch(0)).loss.backward()
    assert counts == [3, 2]


def test_evaluation_does_not_checkpoint():
    tiny = MODELS["bert"]
    circuit = make_circuit(tiny).eval()
    enable_checkpointing(circuit, use_reentrant=False)
    calls = []
    for block in checkpointed_blocks(circuit.wrapped_model):
        block._gradient_checkpointing_func = lambda *args, **kwargs: calls.append(args)
    circuit(**tiny.batch(0))
    assert calls == []


def test_checkpointing_ignores_the_cache_that_the_caller_asks_for():
    """A cache written in the forward would be written again when a block recomputes."""
    tiny = MODELS["gpt2"]
    circuit = make_circuit(tiny)
    expected_loss, expected = loss_and_gradients(circuit, tiny.batch(4))
    enable_checkpointing(circuit, use_reentrant=False)
    loss, gradients = loss_and_gradients(circuit, {**tiny.batch(4), "use_cache": True})
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_a_failing_forward_leaves_checkpointing_as_it_was():
    tiny = MODELS["bert"]
    circuit = make_circuit(tiny)
    enable_checkpointing(circuit, use_reentrant=False)
    blocks = checkpointed_blocks(circuit.wrapped_model)
    functions = [block._gradient_checkpointing_func for block in blocks]

    def fail(module, args):
        raise RuntimeError("injected")

    handle = blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="injected"):
        circuit(**tiny.batch(0))
    handle.remove()
    assert [block._gradient_checkpointing_func for block in blocks] == functions
    assert not any(block.training for block in blocks)
    assert torch.equal(circuit(**tiny.batch(0)).loss, circuit(**tiny.batch(0)).loss)


def test_unfrozen_base_checkpoints_as_it_always_did():
    """``freeze_base=False``: the base trains, so dropout is on, and a recomputed block repeats its dropout."""
    tiny = MODELS["bert"]
    losses, gradients = [], []
    for checkpointing in (False, True):
        circuit = make_circuit(tiny, freeze_base=False)
        if checkpointing:
            enable_checkpointing(circuit, use_reentrant=False)
        counts = count_calls(circuit)
        torch.manual_seed(0)
        loss = circuit(**tiny.batch(0)).loss
        loss.backward()
        assert counts == [1 + checkpointing] * 2
        losses.append(loss)
        gradients.append([p.grad for p in circuit.parameters()])
    assert torch.equal(*losses)
    for a, b in zip(*gradients, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_dropout_and_batch_norm_of_a_frozen_base_stand_still():
    circuit = CircuitModel(CircuitConfig(target_layers="all"), PlainModel(dropout=DROPOUT))
    randomize_logits(circuit)
    x = MODELS["plain"].batch(0)["x"]
    before = {k: v.clone() for k, v in circuit.wrapped_model.norm.state_dict().items()}
    assert torch.equal(circuit(x), circuit(x))
    after = circuit.wrapped_model.norm.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not circuit.wrapped_model.norm.training
    assert circuit.training
    assert all(layer.training for layer in circuit.masked_layers.values())


def test_dropout_and_batch_norm_of_a_trained_base_move():
    circuit = CircuitModel(CircuitConfig(target_layers="all", freeze_base=False), PlainModel(dropout=DROPOUT))
    x = MODELS["plain"].batch(0)["x"]
    before = circuit.wrapped_model.norm.running_mean.clone()
    assert not torch.equal(circuit(x), circuit(x))
    assert not torch.equal(before, circuit.wrapped_model.norm.running_mean)
    assert circuit.wrapped_model.norm.training
    circuit.eval()
    assert torch.equal(circuit(x), circuit(x))
    assert not circuit.wrapped_model.norm.training


@pytest.mark.parametrize("tiny", list(MODELS.values()), ids=list(MODELS))
def test_a_training_step_leaves_every_base_tensor_bitwise_as_it_was(tiny):
    circuit = CircuitModel(CircuitConfig(target_layers=list(tiny.targets), l0_lambda=1e-4), tiny.build(DROPOUT))
    masks = {f"wrapped_model.{name}" for name, _ in circuit.named_mask_parameters()}
    before = {name: tensor.clone() for name, tensor in circuit.state_dict().items()}
    optimizer = torch.optim.AdamW(circuit.parameters(), lr=0.1, weight_decay=0.5)
    output = circuit(**tiny.batch(0))
    loss = output.square().mean() if isinstance(output, torch.Tensor) else output.loss
    loss.backward()
    optimizer.step()
    changed = {name for name, tensor in circuit.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == masks
