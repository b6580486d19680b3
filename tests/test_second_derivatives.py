"""Second derivatives: those of plain torch, or an error that says where they are to be had; never a wrong number."""

from __future__ import annotations

import pytest
import torch
from test_optim import batches, circuit_of
from torch import nn

from csmask import CircuitConfig, CircuitModel, MaskAdamW

REFUSED = r"first derivatives only.*set_execution\('reference'\)"


def penalised(circuit: CircuitModel) -> torch.Tensor:
    """A loss with a penalty on the gradient of its input."""
    ((x, y),) = batches(0, 1)
    x.requires_grad_()
    loss = circuit(x, y)["loss"]
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + dx.square().sum().log()  # both small: the logarithm's derivative is not


def optimizer_of(circuit: CircuitModel, lean: bool = False) -> MaskAdamW:
    return MaskAdamW(circuit.mask_parameters(), lr=0.02, lean=lean)


def test_per_step_has_those_of_its_inputs_gradients():
    """Convolutions, linear layers either way round, and one that is used twice."""
    got, want = circuit_of(), circuit_of("reference")
    optimizer = optimizer_of(got)
    penalised(got).backward()
    penalised(want).backward()
    ((x, y),) = batches(0, 1)
    plain = circuit_of("reference")
    plain(x, y)["loss"].backward()
    for (name, a), b, without in zip(
        got.named_mask_parameters(), want.mask_parameters(), plain.mask_parameters(), strict=True
    ):
        assert (a.grad - b.grad).norm() <= 1e-5 * b.grad.norm(), name
        assert (without.grad - b.grad).norm() >= 1e-2 * b.grad.norm(), name  # the penalty has its part
    optimizer.step()


@pytest.mark.parametrize("execution", ["per_forward", "in_kernel", "lean", "neuron"])
def test_they_are_refused_elsewhere_before_anything_is_stepped(execution):
    config = {"mask_unit": "neuron"} if execution == "neuron" else {"execution": execution}
    circuit = circuit_of(**({} if execution == "lean" else config))
    optimizer = optimizer_of(circuit, lean=True) if execution == "lean" else None
    before = [p.detach().clone() for p in circuit.mask_parameters()]
    loss = penalised(circuit)
    with pytest.raises(RuntimeError, match=REFUSED):
        loss.backward()
    assert all(torch.equal(p, b) for p, b in zip(circuit.mask_parameters(), before, strict=True))
    if optimizer is not None:
        optimizer.step()
    circuit.zero_grad()
    circuit.set_execution("reference")  # as it says
    want = circuit_of("reference", **({"mask_unit": "neuron"} if execution == "neuron" else {}))
    for c in (circuit, want):
        penalised(c).backward()
    for a, b in zip(circuit.mask_parameters(), want.mask_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("execution", ["per_forward", "in_kernel"])
@pytest.mark.parametrize("unit", ["weight", "neuron"])
def test_a_part_that_would_be_missing_is_refused_too(execution, unit):
    """The gradient that comes to the masked layer is all ones and has no graph, but what leaves it depends on S."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    config = CircuitConfig(target_layers="2", execution=execution, mask_hparams={"mask_unit": unit})
    circuit = CircuitModel(config, net)
    x = torch.randn(5, 4).requires_grad_()
    (dx,) = torch.autograd.grad(circuit(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        dx.square().sum().backward()


def test_l0_has_a_first_derivative_only_outside_the_reference():
    for execution, outcome in (("per_forward", REFUSED), ("reference", None)):
        circuit = circuit_of(execution)
        (grad, *_) = torch.autograd.grad(circuit.l0(), circuit.mask_parameters(), create_graph=True)
        if outcome is None:
            assert float(torch.autograd.grad(grad.sum(), circuit.mask_parameters()[0])[0].abs().sum()) > 0
            continue
        with pytest.raises(RuntimeError, match=outcome):
            grad.sum().backward()


@pytest.mark.parametrize("what", ["linear", "convolution", "l0"])
def test_a_gradient_that_waits_has_no_graph_and_says_so(what):
    torch.manual_seed(0)
    layer, shape = (nn.Conv1d(4, 3, 2), (2, 4, 5)) if what == "convolution" else (nn.Linear(4, 3), (2, 4))
    circuit = CircuitModel(CircuitConfig(target_layers="all"), nn.Sequential(layer))
    optimizer = optimizer_of(circuit)
    x = torch.randn(shape)
    loss = circuit.l0() if what == "l0" else circuit(x).square().sum()
    message = r"waits for the optimizer as a number.*create_graph=True.*set_execution\('reference'\)"
    with pytest.raises(RuntimeError, match=message):
        loss.backward(create_graph=True)
    assert all(p.grad is None for p in circuit.mask_parameters())
    circuit(x).square().sum().backward()  # and all is well again
    optimizer.step()
