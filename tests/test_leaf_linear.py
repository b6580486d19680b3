"""``leaf_linear``: what a dense linear operation gives, and the gradients of all micro-batches in one sum."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from csmask import CircuitConfig, CircuitModel, MaskAdamW

KINDS = {"linear": lambda: nn.Linear(7, 5), "without bias": lambda: nn.Linear(7, 5, bias=False),
         "transposed": lambda: Conv1D(5, 7)}  # fmt: skip


def layer_of(kind, dtype):
    torch.manual_seed(0)
    net = nn.Sequential(KINDS[kind]()).to(dtype)
    nn.init.normal_(net[0].weight)
    circuit = CircuitModel(CircuitConfig(target_layers="all"), net)
    with torch.no_grad():
        circuit.mask_parameters()[0].normal_()
    return circuit, MaskAdamW(circuit.mask_parameters(), lr=0.1)


def inputs(dtype, count=3, shape=(2, 6, 7)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def expected(circuit, kind, xs):
    """Outputs, gradients of the inputs, and the sum of the masked weight's, all in fp64."""
    layer = circuit.masked_layers["0"]
    value = layer.leaf.current(layer.weight.dtype).detach().double().requires_grad_()
    bias = None if kind == "without bias" else layer.bias.detach().double()
    outs, dxs = [], []
    for x in xs:
        x = x.double().requires_grad_()
        out = F.linear(x, value.t() if kind == "transposed" else value, bias)
        out.square().sum().backward()
        outs.append(out.detach())
        dxs.append(x.grad)
    return outs, dxs, value.grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float64, 1e-12)])
def test_outputs_and_gradients_are_those_of_a_dense_layer(kind, dtype, limit):
    circuit, _ = layer_of(kind, dtype)
    xs = inputs(dtype)
    outs, dxs, total = expected(circuit, kind, xs)
    for x, out, dx in zip(xs, outs, dxs, strict=True):
        x.requires_grad_()
        found = circuit(x)
        found.square().sum().backward()
        assert (found - out).norm() <= limit * out.norm()
        assert (x.grad - dx).norm() <= limit * dx.norm()
    leaf = circuit.masked_layers["0"].leaf
    assert leaf.dmasked_weight.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    assert (leaf.dmasked_weight - total).norm() <= limit * total.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3])
def test_the_memory_of_a_steps_gradient_is_that_of_the_last_ones(kind, dtype, count):
    """On a CPU new memory costs more than a product of few tokens; what was in it is gone."""
    circuit, optimizer = layer_of(kind, dtype)
    leaf, places = circuit.masked_layers["0"].leaf, []
    for step in range(4):
        xs = inputs(dtype, count)
        total = expected(circuit, kind, xs)[2]
        for x in xs:
            circuit(x).square().sum().backward()
        assert (leaf.dmasked_weight - total).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * total.norm()
        places.append(leaf.dmasked_weight.data_ptr())
        assert leaf.dmasked_weight.dtype == (torch.float32 if count > 1 else dtype)
        if step % 2:
            optimizer.step()
        else:
            optimizer.zero_grad()
        assert leaf.dmasked_weight is None
    assert len(set(places[1:])) == 1
    leaf.free()
    assert leaf._memory is None


@pytest.mark.parametrize("look", ["read the gradient", "evaluate"])
def test_memory_is_not_kept_beside_what_else_there_is(look):
    """``mask_logits.grad`` is as large, and in evaluation there is no gradient."""
    circuit, _ = layer_of("linear", torch.float32)
    leaf, (logits,) = circuit.masked_layers["0"].leaf, circuit.mask_parameters()
    circuit(inputs(torch.float32, 1)[0]).sum().backward()
    assert leaf._memory is leaf.dmasked_weight
    if look == "evaluate":
        circuit.zero_grad()
        circuit.eval()
    else:
        assert logits.grad is not None
    assert leaf._memory is None
    circuit.train()
    F.linear(inputs(torch.float32, 1)[0], leaf.current(torch.float32)).sum().backward()
    assert leaf._memory is None
    assert leaf.dmasked_weight is not None


def test_a_backward_in_inference_mode_leaves_nothing_behind():
    circuit, optimizer = layer_of("linear", torch.float32)
    (x,) = inputs(torch.float32, 1)
    loss = circuit(x).square().sum()
    with torch.inference_mode(), contextlib.suppress(RuntimeError):
        loss.backward()
    optimizer.zero_grad()
    total = expected(circuit, "linear", [x, x])[2]
    for _ in range(2):
        circuit(x).square().sum().backward()
    assert (circuit.masked_layers["0"].leaf.dmasked_weight - total).norm() <= 1e-6 * total.norm()
    optimizer.step()


def test_autocast_in_backward_does_not_change_the_sums_dtype():
    circuit, _ = layer_of("linear", torch.float32)
    (x,) = inputs(torch.float32, 1)
    out = circuit(x)
    with torch.autocast("cpu", torch.bfloat16):
        out.square().sum().backward()
    assert circuit.masked_layers["0"].leaf.dmasked_weight.dtype == torch.float32


def test_a_gradient_that_somebody_holds_is_not_written_to():
    circuit, optimizer = layer_of("linear", torch.float32)
    (logits,) = circuit.mask_parameters()
    held = []
    for x in inputs(torch.float32):
        circuit(x).square().sum().backward()
        held.append((logits.grad, logits.grad.clone()))
        optimizer.step()
    assert all(torch.equal(grad, copy) for grad, copy in held)


def test_sixteen_bits_are_added_up_in_32():
    circuit, optimizer = layer_of("without bias", torch.bfloat16)
    x = torch.full((1, 7), 0.5, dtype=torch.bfloat16)
    for _ in range(300):
        circuit(x).sum().backward()
    assert torch.equal(circuit.masked_layers["0"].leaf.dmasked_weight, torch.full((5, 7), 150.0))  # in bf16: 128
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["product first", "autograd first", "in turns"])
def test_gradients_of_autograd_and_of_products_add_up(dtype, order):
    """A compiled forward leaves gradients as autograd does."""
    circuit, _ = layer_of("without bias", dtype)
    leaf = circuit.masked_layers["0"].leaf
    xs = inputs(dtype, count=4)
    total = expected(circuit, "without bias", xs)[2]
    by_product = {"product first": (0, 1), "autograd first": (2, 3), "in turns": (0, 2)}[order]
    for i, x in enumerate(xs):
        out = circuit(x) if i in by_product else F.linear(x, leaf.current(dtype))
        out.square().sum().backward()
    assert (leaf.dmasked_weight - total).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * total.norm()
    assert leaf.value.grad is None or leaf._sum is None  # of two, one would be lost


def test_inputs_that_want_no_gradient_get_none_and_the_weight_gets_its_own():
    circuit, _ = layer_of("linear", torch.float32)
    (x,) = inputs(torch.float32, count=1)
    circuit(x).sum().backward()
    assert x.grad is None
    assert circuit.masked_layers["0"].leaf.dmasked_weight is not None


def test_bias_gradients_are_those_of_a_dense_layer():
    circuit, optimizer = layer_of("linear", torch.float32)
    layer = circuit.masked_layers["0"]
    layer.bias.requires_grad_()
    (x,) = inputs(torch.float32, count=1)
    circuit(x).square().sum().backward()
    assert layer.waits
    out = F.linear(x, layer.leaf.value.detach(), layer.bias.detach())
    torch.testing.assert_close(layer.bias.grad, 2 * out.sum((0, 1)))
    optimizer.step()


def test_a_weight_that_is_replaced_before_backward_is_refused():
    circuit, optimizer = layer_of("linear", torch.float32)
    xs = inputs(torch.float32)
    out = circuit(xs[0])
    circuit(xs[1]).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="replaced since"):
        out.sum().backward()
    assert circuit.masked_layers["0"].leaf.dmasked_weight is None


def test_what_is_saved_for_backward_is_the_input_alone():
    circuit, _ = layer_of("linear", torch.float32)
    (x,) = inputs(torch.float32, count=1)
    circuit(x)  # makes the masked weight
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        circuit(x)
    assert saved == [x.shape]


@pytest.mark.parametrize("how", ["autograd.grad", "inputs"])
def test_gradients_of_the_input_alone_leave_the_masks_alone(how):
    circuit, optimizer = layer_of("linear", torch.float32)
    logits = circuit.mask_parameters()[0].detach().clone()
    (x,) = inputs(torch.float32, count=1)
    x.requires_grad_()
    loss = circuit(x).square().sum()
    if how == "inputs":
        loss.backward(inputs=[x], retain_graph=True)
        dx = x.grad
    else:
        (dx,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert (dx - expected(circuit, "linear", [x.detach()])[1][0]).norm() <= 1e-6 * dx.norm()
    leaf = circuit.masked_layers["0"].leaf
    assert leaf.dmasked_weight is None
    optimizer.step()
    assert torch.equal(circuit.mask_parameters()[0], logits)
    loss.backward()  # of the same graph, and now for all
    total = expected(circuit, "linear", [x.detach()])[2]
    assert (leaf.dmasked_weight - total).norm() <= 1e-6 * total.norm()


def test_functorch_sees_a_plain_layer():
    circuit, _ = layer_of("linear", torch.float32)
    xs = torch.stack(inputs(torch.float32))
    out = torch.func.vmap(circuit)(xs)
    torch.testing.assert_close(out, torch.stack([circuit(x) for x in xs]))
