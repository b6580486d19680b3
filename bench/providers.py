"""Ways to train linear layers, and the check that each passes before it is timed: for ``run`` and the GPU suite."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# By bytes of the dtype: ||got - right|| / ||right||, three times what rounding leaves (of fp32 as TF32), and less than
# one lost column of 4096 makes, 1 / sqrt(4096).
LARGEST_ERROR = {2: 6e-3, 4: 1e-3}
# And, since a norm does not see a few lost numbers among many, of each number over the root of the sum of squares of
# what it adds up, which is what rounding errors add up to: six times one rounding's.
LARGEST_ERROR_OF_ONE = {2: 0.03, 4: 4e-3}
# l0 is a sum in fp32 whatever the dtype.
LARGEST_L0_ERROR = 1e-5
# Where |T * S| is larger, plain torch's own 1 - sigmoid(T * S) has lost too many digits to be compared with that root.
SATURATED = 6.0


class Provider:
    """One way to train layers: ``forward(x) -> (out, l0 or None)`` and what an optimizer is to change.

    Args:
        parameters: what the optimizer changes, one of them or several.
        forward: of all layers; its second result, a multiple of l0, gets the gradient ``dl0``.
        start: called before the first micro-batch of a step.
        note: what to say of it beside its figures.
        optimizer: of the parameters; a fused AdamW by default.
        roundings: how often a result is rounded to the dtype on its way.
    """

    def __init__(
        self,
        parameters: nn.Parameter | Iterable[nn.Parameter],
        forward: Callable[[Tensor], tuple[Tensor, Tensor | None]],
        start: Callable[[], None] = lambda: None,
        dl0: float = 1e-8,
        note: str = "",
        optimizer: torch.optim.Optimizer | None = None,
        roundings: int = 1,
    ) -> None:
        self.parameters = [parameters] if isinstance(parameters, nn.Parameter) else list(parameters)
        self.forward, self.start, self.note, self.roundings = forward, start, note, roundings
        capturable = self.parameter.is_cuda
        self.optimizer = optimizer or torch.optim.AdamW(self.parameters, lr=1e-6, fused=True, capturable=capturable)
        self.dl0 = torch.full((), dl0, device=self.parameter.device)

    @property
    def parameter(self) -> nn.Parameter:
        """The first of the parameters, the only one of one layer."""
        return self.parameters[0]

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def micro_batch(self, x: Tensor, dout: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Forward and backward, with a gradient for the input, as a layer within a model has: ``out, l0, dx``."""
        x = x.detach().requires_grad_()
        out, l0 = self.forward(x)
        if l0 is None:
            out.backward(dout)
            return out.detach(), None, x.grad
        torch.autograd.backward([out, l0], [dout, self.dl0])
        return out.detach(), l0.detach(), x.grad

    def step(self, x: Tensor, dout: Tensor, micro_batches: int, optimizer: bool = True) -> None:
        self.zero_grad()
        self.start()
        for _ in range(micro_batches):
            self.micro_batch(x, dout)
        if optimizer:
            self.optimizer.step()


def plain_masked_linear(x: Tensor, weight: Tensor, logits: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """What a user writes without csmask."""
    out = F.linear(x, weight * torch.sigmoid(temperature * logits).to(weight.dtype))
    return out, torch.sigmoid(temperature * logits).sum()


# The check


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a result should be, and for each of its numbers the root of the sum of squares of what it adds up."""

    right: Tensor
    magnitude: Tensor


def wrong_results(
    provider: Provider, expected: dict[str, Expected | None], inputs: Tensor, dout: Tensor, dtype: torch.dtype
) -> list[str]:
    """Results of a provider of one layer that are not near what is expected, with their relative errors.

    Two micro-batches are run, in which gradients are written and added to; afterwards the provider has no gradient.

    Args:
        expected: as ``oracle`` gives it.
        dtype: that the provider computes in.
    """
    try:
        provider.zero_grad()
        provider.start()
        provider.micro_batch(inputs, dout)
        out, l0, dx = provider.micro_batch(inputs, dout)
        got = {"out": out, "l0": l0, "dx": dx, "gradient": provider.parameter.grad}
        return _errors_over(got, expected, dtype, provider.roundings)
    finally:
        provider.zero_grad()
        provider.start()


def oracle(
    parameter: Tensor,
    weight: Tensor | None,
    temperature: Tensor,
    inputs: Tensor,
    dout: Tensor,
    dl0: float,
    l0_factor: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Expected | None]:
    """``out, l0, dx`` and, of two micro-batches, the parameter's gradient, in plain torch.

    Args:
        parameter: logits that broadcast over the weight, or, without one, the weight that is trained itself.
        weight: frozen, ``(N, K)``.
        temperature: multiplies the logits.
        inputs, dout: ``(M, K)`` and ``(M, N)``.
        dl0, l0_factor: the gradient of the second result, and what that is a multiple of l0 by.
        dtype: that everything is computed in.
    """
    right = _results(parameter, weight, temperature, inputs, dout, dl0, l0_factor, dtype)
    magnitudes = _magnitudes(parameter, weight, temperature, inputs, dout, dl0 * l0_factor, dtype)
    return {name: None if value is None else Expected(value, magnitudes[name]) for name, value in right.items()}


@torch.no_grad()
def _magnitudes(
    parameter: Tensor, weight: Tensor | None, temperature: Tensor, inputs: Tensor, dout: Tensor, dl0: float,
    dtype: torch.dtype,
) -> dict[str, Tensor]:  # fmt: skip
    x2, dout2 = inputs.to(dtype).square(), dout.to(dtype).square()
    with full_precision():
        gradient = (dout2.t() @ x2).sqrt()
        if weight is None:
            masked_weight, l0 = parameter.detach().to(dtype), torch.ones((), dtype=dtype)
        else:
            bound = SATURATED / float(temperature)
            mask = torch.sigmoid(temperature * parameter.detach().clamp(-bound, bound).to(dtype)).expand_as(weight)
            masked_weight, l0 = weight.detach().to(dtype) * mask, mask.sum()
            slope = temperature * mask * (1 - mask)
            gradient = gradient * weight.to(dtype).abs() * slope + abs(dl0) * slope
            gradient = gradient.square().sum_to_size(parameter.shape).sqrt()  # a neuron's logit adds up its weights'
        w2 = masked_weight.square()
        out, dx = (x2 @ w2.t()).sqrt(), (dout2 @ w2).sqrt()
    return {"out": out, "dx": dx, "gradient": 2 * gradient, "l0": l0}


def _results(
    parameter: Tensor, weight: Tensor | None, temperature: Tensor, inputs: Tensor, dout: Tensor, dl0: float,
    l0_factor: float, dtype: torch.dtype,
) -> dict[str, Tensor | None]:  # fmt: skip
    x = inputs.detach().to(dtype).requires_grad_()
    leaf = parameter.detach().to(dtype).requires_grad_()
    l0 = None
    with full_precision():
        if weight is None:
            out = F.linear(x, leaf)
            out.backward(dout.to(dtype))
        else:
            weight = weight.detach().to(dtype)
            out, l0 = plain_masked_linear(x, weight, leaf.expand_as(weight), temperature.to(dtype))
            l0 = l0_factor * l0
            torch.autograd.backward([out, l0], [dout.to(dtype), torch.full_like(l0, dl0)])
            l0 = l0.detach()
    assert leaf.grad is not None
    return {"out": out.detach(), "l0": l0, "dx": x.grad, "gradient": 2 * leaf.grad}


def _errors_over(
    got: dict[str, Tensor | None], expected: dict[str, Expected | None], dtype: torch.dtype, roundings: int = 1
) -> list[str]:
    limit, limit_of_one = LARGEST_ERROR[dtype.itemsize], roundings * LARGEST_ERROR_OF_ONE[dtype.itemsize]
    wrong = []
    for name, one in expected.items():
        if one is None:
            continue
        found, right = got[name], one.right
        if found is None or found.shape != right.shape:
            shape = None if found is None else tuple(found.shape)
            wrong.append(f"{name} has shape {shape}, not {tuple(right.shape)}")
            continue
        errors = found.to(right.dtype) - right
        allowed = LARGEST_L0_ERROR if name == "l0" else limit
        if not errors.norm() <= allowed * right.norm():  # NaN neither
            wrong.append(f"{name} {float(errors.norm() / right.norm()):.2g} > {allowed}")
        elif not bool((errors.abs() <= limit_of_one * one.magnitude).all()):
            worst = float((errors.abs() / one.magnitude).nan_to_num(0.0).max())
            wrong.append(f"{name} at one place {worst:.2g} > {limit_of_one}")
    return wrong


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """fp32 products in fp32, and 16-bit ones summed in fp32, so that the reference is as good as its dtype."""
    # The old names (allow_tf32) raise where the new ones were set differently before.
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    precision = (matmul.fp32_precision, conv.fp32_precision)
    reduced = (matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction)
    try:
        matmul.fp32_precision = conv.fp32_precision = "ieee"
        matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
        yield
    finally:
        matmul.fp32_precision, conv.fp32_precision = precision
        matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = reduced


# Memory


def saved_bytes(provider: Provider, inputs: Tensor, weights: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps from forward to backward, beyond input, weights, trained parameters and scalars."""
    provider.start()
    provider.forward(inputs.detach())
    # A masked weight that is kept anyway; not what autograd keeps.
    kept = [leaf.value for leaf in getattr(provider.optimizer, "leaves", ())]
    known = {t.untyped_storage().data_ptr() for t in (inputs, *weights, *provider.parameters, *kept)}
    found: dict[int, int] = {}
    alive: list[Any] = []  # an address is used by one tensor at a time

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.dim() and storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = provider.forward(inputs.detach().requires_grad_())
    del result
    return sum(found.values())
