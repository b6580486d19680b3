"""The cases of ``gpu_checks``: for every op, inputs at sizes with a reason, its launcher, and what it must give."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from csmask_kernels.launch import GemmConfig, config_table, target_of
from gpu_checks import Check
from gpu_results import Context
from torch import Tensor

from csmask import reference
from csmask._ops import triton_kernel

# (M, N, K). odd: every dimension hangs over; ragged: multiples of 16 bytes, as descriptors need, but not of a tile.
LINEAR_SIZES = {
    "toy": ((5, 19, 35), (20, 24, 40), (16, 32, 32)),
    "full": ((37, 131, 259), (72, 136, 264), (256, 512, 384)),
}
# (batch, in, out, height, width, kernel): odd, few channels, even
CONV_SIZES = {
    "toy": ((1, 19, 17, 5, 6, (3, 3)), (2, 3, 5, 7, 6, (2, 3)), (1, 16, 16, 4, 4, (3, 3))),
    "full": ((2, 67, 37, 13, 11, (3, 3)), (2, 3, 21, 29, 31, (7, 7)), (4, 64, 128, 16, 16, (3, 3))),
}


class Draw:
    """Random inputs of one check, on the context's device (which may be meta): other ones in every run."""

    def __init__(self, context: Context) -> None:
        self._device = context.device
        is_meta = self._device.type == "meta"
        self._generator = None if is_meta else torch.Generator(self._device).manual_seed(context.seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self._generator, device=self._device) * scale).to(dtype)

    def logits(self, *shape: int) -> Tensor:
        """As ``csmask.testing.seeded_logits``: normal, every fifth near +-5, every seventh exactly 0."""
        logits = self.normal(*shape).flatten()
        logits[1::5] = logits[1::5].sign() * 5 + 0.1 * logits[1::5]
        logits[::7] = 0
        return logits.view(shape)

    def scalar(self, value: float) -> Tensor:
        return torch.tensor(value, device=self._device)

    def weight(self, shape: tuple[int, ...], dtype: torch.dtype, logits: Tensor, hard: bool) -> Tensor:
        """A weight; under a hard mask it is NaN where it is pruned, which must not show."""
        weight = self.normal(*shape, dtype=dtype, scale=shape[-1] ** -0.5)
        return torch.where(logits.expand(shape) > 0, weight, float("nan")).to(dtype) if hard else weight


def gemm_forms(op: str, context: Context) -> Iterator[tuple[str, GemmConfig]]:
    """The forms that a masked product has, by their configs, with tiles that the sizes below leave overhanging."""
    size, step = (16, 16) if context.toy else (64, 32)
    tile: dict[str, Any] = {"block_m": size, "block_n": size, "block_k": step}
    yield "pointer", GemmConfig(**tile)
    if op.startswith("masked_conv"):
        return
    if "dlogits" in op:
        yield "subtiles", GemmConfig(**tile, subtiles=2)
        yield "persistent", GemmConfig(**tile, persistent=True)
        yield "persistent subtiles", GemmConfig(**tile, persistent=True, subtiles=2)
        return
    yield "swap", GemmConfig(**{**tile, "block_m": 16}, swap=True)
    yield "split_k", GemmConfig(**tile, split_k=3)
    yield "split_k swap", GemmConfig(**{**tile, "block_m": 16}, split_k=2, swap=True)
    if not op.startswith("bitmask"):
        yield "persistent", GemmConfig(**tile, persistent=True)
        yield "persistent swap", GemmConfig(**{**tile, "block_m": 16}, persistent=True, swap=True)


def shipped_rows(op: str, context: Context) -> list[int]:
    """The token counts that this device's table has configs for."""
    table = config_table(target_of(torch.empty(0, device=context.device)))
    return [row["m"] for row in table.get(op, [])]


def _dl0_grad(draw: Draw) -> Tensor:
    return draw.scalar(0.25)


# Linear


def linear_cases(op: str, dtype: torch.dtype, context: Context) -> Iterator[Check]:
    """masked_linear and bitmask_linear with their gradients: every form, every layout, every shipped config."""
    odd, ragged, even = LINEAR_SIZES["toy" if context.toy else "full"]
    is_bits = op.startswith("bitmask")
    for name, size in (("odd", odd), ("ragged", ragged), ("even", even), ("one token", (1, *even[1:]))):
        yield _linear(op, name, size, dtype, context)
    yield _linear(op, "scaled transposed", odd, dtype, context, scale=1.25, transposed=True)
    yield _linear(op, "even transposed", even, dtype, context, transposed=True)
    yield _linear(op, "strided", odd, dtype, context, strided=True)
    if "dlogits" not in op and not is_bits:
        yield _linear(op, "hard scaled", odd, dtype, context, hard=True, scale=1.25)
        yield _linear(op, "hard", even, dtype, context, hard=True)
        yield _linear(op, "neuron", odd, dtype, context, neuron=True)
    if not is_bits:
        yield _linear(op, "T = 200", odd, dtype, context, temperature=200.0)
        if dtype != torch.float32:
            yield _linear(op, "fp32 weight", even, dtype, context, weight_dtype=torch.float32)
    yield from _many_tiles(op, dtype, context)
    for form, config in gemm_forms(op, context):
        yield _linear(op, f"{form} odd", odd, dtype, context, config=config)
        yield _linear(op, f"{form} ragged", ragged, dtype, context, config=config)
    if dtype != torch.float16:  # its configs are bf16's
        for m in shipped_rows(op.removesuffix("_").replace("bitmask", "masked"), context):
            yield _linear(op, f"shipped M={m}", (m, *even[1:]), dtype, context)


def _many_tiles(op: str, dtype: torch.dtype, context: Context) -> Iterator[Check]:
    """Persistent programs, each with more than two tiles of the output, those at its edges overhanging."""
    configs: dict[str, GemmConfig | None] = {
        form: config for form, config in gemm_forms(op, context) if config.persistent
    }
    if configs and not context.toy:
        configs["found"] = None  # the table's, whose tiles have 256 x 128 entries at most
    # Two programs of four warps share a multiprocessor: more than 4 tiles for each of these.
    across = math.isqrt(4 * target_of(torch.empty(0, device=context.device)).multiprocessors) + 1
    for form, config in configs.items():
        side, step = (192, 64) if config is None else (config.block_n, config.block_k)
        longest, total = across * side + 8, 2 * step + 8
        sizes = {"masked_linear": (longest, longest, total), "masked_linear_dx": (longest, total, longest)}
        size = sizes.get(op, (total, longest, longest))
        for transposed in (False, True):
            layout = " transposed" if transposed else ""
            yield _linear(op, f"{form} many tiles{layout}", size, dtype, context, transposed=transposed, config=config)


def _linear(
    op: str,
    variant: str,
    size: tuple[int, int, int],
    dtype: torch.dtype,
    context: Context,
    *,
    hard: bool = False,
    scale: float = 1.0,
    transposed: bool = False,
    strided: bool = False,
    neuron: bool = False,
    temperature: float = 1.5,
    weight_dtype: torch.dtype | None = None,
    config: GemmConfig | None = None,
) -> Check:
    (m, n, k), draw = size, Draw(context)
    is_bits = op.startswith("bitmask")
    shape = (k, n) if transposed else (n, k)
    logits = draw.logits(*((1, n) if transposed else (n, 1))) if neuron else draw.logits(*shape)
    weight = draw.weight(shape, weight_dtype or dtype, logits, hard or is_bits)
    x, dout = draw.normal(m, k, dtype=dtype), draw.normal(m, n, dtype=dtype)
    if strided:
        x, dout, weight, logits = (t.t().contiguous().t() for t in (x, dout, weight, logits))
    mask: dict[str, Any] = {"weight": weight, "logits": logits, "temperature": draw.scalar(temperature)}
    needed = {"linear": {"x": x, "bias": draw.normal(n, dtype=dtype)}, "dx": {"dout": dout}}.get(
        op.removeprefix("masked_").removeprefix("bitmask_").removeprefix("linear_"), {}
    )
    if "dlogits" in op:
        needed = {"x": x, "dout": dout, "dl0": _dl0_grad(draw)}
        if op.endswith("_"):
            needed["start"] = draw.normal(*shape)
    kernel, expected = _linear_functions(op, hard or is_bits, scale, transposed, config)
    return Check(op, variant, {**mask, **needed}, kernel, expected)


def _linear_functions(
    op: str, hard: bool, scale: float, transposed: bool, config: GemmConfig | None
) -> tuple[Callable[..., dict[str, Tensor]], Callable[..., dict[str, Tensor]]]:
    launch, options = functools.partial(triton_kernel(op), config=config), (scale, transposed)

    def masked_weight(weight: Tensor, logits: Tensor, temperature: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return reference.materialize(weight, logits, temperature, hard, scale, dtype)

    def out(x: Tensor, weight: Tensor, logits: Tensor, temperature: Tensor, bias: Tensor) -> dict[str, Tensor]:
        wm, l0 = masked_weight(weight, logits, temperature, x.dtype)
        found = {"out": reference.apply_linear(x, wm, bias, transposed)}
        return found if op == "bitmask_linear" else {**found, "l0": l0}

    def dx(dout: Tensor, weight: Tensor, logits: Tensor, temperature: Tensor) -> dict[str, Tensor]:
        wm, _ = masked_weight(weight, logits, temperature, dout.dtype)
        return {"dx": dout @ (wm.t() if transposed else wm)}

    def dlogits(
        dout: Tensor, x: Tensor, weight: Tensor, logits: Tensor, temperature: Tensor, dl0: Tensor,
        start: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        dwm = x.t() @ dout if transposed else dout.t() @ x
        found = reference.logits_grad(dwm, weight, logits, temperature, dl0, scale)
        return {"dlogits": found if start is None else found + start}

    def kernel(weight: Tensor, logits: Tensor, temperature: Tensor, **rest: Tensor) -> dict[str, Tensor]:
        if op == "masked_linear":
            found, l0 = launch(rest["x"], weight, logits, temperature, rest["bias"], hard, *options)
            return {"out": found, "l0": l0}
        if op == "masked_linear_dx":
            return {"dx": launch(rest["dout"], weight, logits, temperature, hard, *options)}
        if op == "bitmask_linear":
            return {"out": launch(rest["x"], weight, reference.pack_mask(logits), rest["bias"], *options)}
        if op == "bitmask_linear_dx":
            return {"dx": launch(rest["dout"], weight, reference.pack_mask(logits), *options)}
        arguments = (rest["dout"], rest["x"], weight, logits, temperature, rest["dl0"], *options)
        if "start" not in rest:
            return {"dlogits": launch(*arguments)}
        total = rest["start"].clone()
        launch(total, *arguments)
        return {"dlogits": total}

    return kernel, dlogits if "dlogits" in op else dx if op.endswith("dx") else out


# Convolution


def conv_cases(op: str, dtype: torch.dtype, context: Context) -> Iterator[Check]:
    """masked_conv and its gradients: both memory formats, geometry, few and many channels, every shipped config."""
    odd, few, even = CONV_SIZES["toy" if context.toy else "full"]
    for channels_last in (False, True):
        layout = "channels-last" if channels_last else "channels-first"
        for name, size in (("odd", odd), ("few channels", few), ("even", even)):
            yield _conv(op, f"{name} {layout}", size, dtype, context, channels_last=channels_last)
        yield _conv(
            op, f"strided {layout}", odd, dtype, context, channels_last=channels_last, stride=(2, 1), padding=(1, 2)
        )
        yield _conv(
            op, f"dilated {layout}", odd, dtype, context, channels_last=channels_last, dilation=(1, 2), scale=1.25
        )
        for form, config in gemm_forms(op, context):
            yield _conv(op, f"{form} {layout}", odd, dtype, context, channels_last=channels_last, config=config)
    if "dlogits" not in op:
        yield _conv(op, "hard scaled", odd, dtype, context, hard=True, scale=1.25, padding=(1, 1))
        yield _conv(op, "neuron", odd, dtype, context, neuron=True)
    if dtype != torch.float16:
        for rows in shipped_rows(op.removesuffix("_"), context):
            size = (max(rows // 256, 1), *even[1:3], 18, 18, (3, 3))
            yield _conv(op, f"shipped rows={rows}", size, dtype, context, channels_last=True)


def _conv(
    op: str,
    variant: str,
    size: tuple[Any, ...],
    dtype: torch.dtype,
    context: Context,
    *,
    hard: bool = False,
    scale: float = 1.0,
    neuron: bool = False,
    channels_last: bool = False,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    config: GemmConfig | None = None,
) -> Check:
    (batch, channels, out_channels, height, width, window), draw = size, Draw(context)
    shape = (out_channels, channels, *window)
    logits = draw.logits(out_channels, 1, 1, 1) if neuron else draw.logits(*shape)
    weight = draw.weight(shape, dtype, logits, hard)
    x = draw.normal(batch, channels, height, width, dtype=dtype)
    geometry = (stride, padding, dilation)
    out_size = F.conv2d(x[:, :1].float(), weight[:1, :1].float(), None, *geometry).shape[2:]
    dout = draw.normal(batch, out_channels, *out_size, dtype=dtype)
    if channels_last:
        x, dout, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, dout, weight))
        logits = logits if neuron else logits.contiguous(memory_format=torch.channels_last)
    inputs: dict[str, Any] = {"weight": weight, "logits": logits, "temperature": draw.scalar(1.5), "x": x, "dout": dout}
    if op == "masked_conv":
        inputs["bias"] = draw.normal(out_channels, dtype=dtype)
    if "dlogits" in op:
        inputs["dl0"] = _dl0_grad(draw)
    if op.endswith("_"):
        inputs["start"] = torch.empty_like(logits).copy_(draw.normal(*shape))
    return Check(op, variant, inputs, *_conv_functions(op, hard, scale, geometry, config))


def _conv_functions(
    op: str, hard: bool, scale: float, geometry: tuple[Any, ...], config: GemmConfig | None
) -> tuple[Callable[..., dict[str, Tensor]], Callable[..., dict[str, Tensor]]]:
    launch = functools.partial(triton_kernel(op), config=config)

    def expected(weight: Tensor, logits: Tensor, temperature: Tensor, **rest: Tensor) -> dict[str, Tensor]:
        x, dout = rest["x"], rest["dout"]
        wm, l0 = reference.materialize(weight, logits, temperature, hard, scale, x.dtype)
        if op == "masked_conv":
            return {"out": F.conv2d(x, wm, rest["bias"], *geometry), "l0": l0}
        if op == "masked_conv_dx":
            return {"dx": torch.nn.grad.conv2d_input(x.shape, wm, dout, *geometry)}
        dwm = torch.nn.grad.conv2d_weight(x, weight.shape, dout, *geometry)
        found = reference.logits_grad(dwm, weight, logits, temperature, rest["dl0"], scale)
        return {"dlogits": found + rest["start"] if "start" in rest else found}

    def kernel(weight: Tensor, logits: Tensor, temperature: Tensor, **rest: Tensor) -> dict[str, Tensor]:
        x, dout, mask = rest["x"], rest["dout"], (weight, logits, temperature)
        if op == "masked_conv":
            out, l0 = launch(x, *mask, rest["bias"], hard, scale, *geometry)
            return {"out": out, "l0": l0}
        if op == "masked_conv_dx":
            return {"dx": launch(dout, *mask, list(x.shape), hard, scale, *geometry)}
        arguments = (dout, x, *mask, rest["dl0"], scale, *geometry)
        if "start" not in rest:
            return {"dlogits": launch(*arguments)}
        total = rest["start"].clone()
        launch(total, *arguments)
        return {"dlogits": total}

    return kernel, expected
