"""The convolution kernels against the reference in fp64, in Triton's interpreter where there is no GPU.

Tiles are 16 x 16 x 16, so that tiny tensors have several tiles in every direction, and tails.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from csmask import testing

pytest.importorskip("triton")

from csmask_kernels import masked_conv as conv
from csmask_kernels import masked_conv_dlogits as conv_dlogits
from csmask_kernels.launch import INTERPRETER, GemmConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = GemmConfig(block_m=16, block_n=16, block_k=16, split_k=1, num_warps=1, num_stages=1)
DL0 = 0.25  # what testing.run weighs l0 with


@dataclass(frozen=True)
class Case:
    """One convolution: shapes ``(batch, channels, height, width)`` and ``(out, channels, kernel height, width)``."""

    x: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    dtype: torch.dtype = torch.float32
    temperature: float = 1.0
    mask_unit: str = "weight"
    bias: bool = True
    mask: dict[str, Any] = field(default_factory=dict)  # hard, scale

    def geometry(self) -> tuple[tuple[int, int], ...]:
        return self.stride, self.padding, self.dilation

    def expected(self, inputs: dict[str, Tensor | None]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        names = ("stride", "padding", "dilation")
        options = dict(zip(names, self.geometry(), strict=True))
        return testing.oracle_and_budget("masked_conv", inputs, self.temperature, **options, **self.mask)


GEOMETRIES = {
    "3x3": Case((2, 17, 5, 4), (17, 17, 3, 3), padding=(1, 1)),  # 17: one over the block, in both kinds of channels
    "stem": Case((1, 3, 11, 9), (5, 3, 7, 7), stride=(2, 2), padding=(3, 3)),  # few channels: flattened, with a tail
    "1x1": Case((3, 16, 3, 3), (5, 16, 1, 1)),
    "1x1 strided": Case((1, 5, 5, 6), (3, 5, 1, 1), stride=(2, 2)),  # three of four pixels have no gradient
    "1-d": Case((2, 5, 1, 19), (3, 5, 1, 3), padding=(0, 1)),
    "even": Case((1, 17, 6, 5), (3, 17, 2, 4), stride=(2, 1), padding=(1, 2)),
    "dilated": Case((1, 5, 7, 9), (17, 5, 3, 3), padding=(2, 2), dilation=(2, 2)),
    "stride and dilation share a factor": Case((1, 17, 9, 8), (5, 17, 3, 2), stride=(2, 3), dilation=(4, 2)),
    "and share none": Case((1, 17, 9, 7), (5, 17, 2, 2), stride=(2, 2), dilation=(3, 5)),  # a phase begins at tap 1
    "one channel": Case((3, 1, 5, 5), (1, 1, 3, 3), stride=(2, 1), padding=(1, 0)),
    "kernel as large as the image": Case((3, 17, 3, 3), (17, 17, 3, 3)),
    "stride over the kernel": Case((1, 17, 7, 7), (5, 17, 2, 2), stride=(3, 3), padding=(1, 1)),
}


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def strided(tensor: Tensor) -> Tensor:
    """The same numbers in an order of dimensions that no format has, with gaps."""
    wide = torch.empty(
        (*(n + 1 for n in tensor.permute(2, 0, 3, 1).shape[:-1]), 2 * tensor.shape[1]), dtype=tensor.dtype
    )
    view = wide.to(tensor.device)[1:, 1:, 1:, ::2].permute(1, 3, 0, 2)
    return view.copy_(tensor)


# Several tiles in every direction, at the least work.
SMALL = Case((1, 17, 5, 5), (17, 17, 2, 1))

LAYOUTS = {
    "channels-first": (torch.Tensor.contiguous,) * 3,
    "channels-last": (channels_last,) * 3,
    "channels-last with contiguous logits": (channels_last, channels_last, torch.Tensor.contiguous),
    "channels-first with channels-last weight": (torch.Tensor.contiguous, channels_last, channels_last),
    "strided": (strided,) * 3,
}


def call(case: Case, inputs: dict[str, Tensor | None], layout: str, config: GemmConfig = CONFIG) -> dict[str, Tensor]:
    """All four operations on ``inputs`` in a layout: what ``testing.run`` gives but for dweight and dbias."""
    image, kernel, unit = LAYOUTS[layout]
    x, weight, logits, bias = (None if t is None else t.to(DEVICE) for t in inputs.values())
    x, weight, logits = image(x), kernel(weight), unit(logits)
    temperature = torch.tensor(case.temperature, device=DEVICE)
    hard, scale = case.mask.get("hard", False), case.mask.get("scale", 1.0)
    out, l0 = conv.masked_conv(x, weight, logits, temperature, bias, hard, scale, *case.geometry(), config=config)
    dout = image(testing.seeded_normal(tuple(out.shape), 99, out.dtype).to(DEVICE))
    dx = conv.masked_conv_dx(dout, weight, logits, temperature, x.shape, hard, scale, *case.geometry(), config=config)
    got = {"out": out, "l0": l0, "dx": dx}
    if not hard and case.mask_unit == "weight":
        dl0 = torch.tensor(DL0, device=DEVICE)
        got["dlogits"] = conv_dlogits.masked_conv_dlogits(
            dout, x, weight, logits, temperature, dl0, scale, *case.geometry(), config=config
        )
    return {name: tensor.cpu() for name, tensor in got.items()}


def make(case: Case) -> dict[str, Tensor | None]:
    return testing.conv_inputs(case.x, case.weight, case.dtype, mask_unit=case.mask_unit, bias=case.bias)


def check(case: Case, layout: str, config: GemmConfig = CONFIG) -> None:
    inputs = make(case)
    oracle, plain = case.expected(inputs)
    got = call(case, inputs, layout, config)
    testing.assert_close(got, {name: oracle[name] for name in got}, {name: plain[name] for name in got})


@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_geometry(name, layout):
    check(GEOMETRIES[name], layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [3, 17])
def test_every_layout(layout, channels):
    check(Case((2, channels, 5, 4), (17, channels, 3, 2), stride=(2, 1), padding=(1, 1), bias=False), layout)


@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_dtypes_and_temperatures(dtype, temperature, layout):
    check(Case((1, 17, 4, 5), (5, 17, 3, 3), dtype=dtype, temperature=temperature, mask={"scale": 1.5}), layout)


@pytest.mark.parametrize("mask_unit", ["weight", "neuron"])
@pytest.mark.parametrize("mask", [{}, {"hard": True}, {"hard": True, "scale": 1.5}], ids=str)
@pytest.mark.parametrize("channels", [3, 17])
def test_mask_units_and_kinds(channels, mask, mask_unit):
    case = Case((1, channels, 4, 5), (17, channels, 3, 3), padding=(1, 1), mask_unit=mask_unit, mask=mask)
    for layout in ("channels-first", "channels-last"):
        check(case, layout)


def test_the_configs_by_default():
    check(GEOMETRIES["3x3"], "channels-last", config=None)


def test_weight_of_another_dtype():
    """Under autocast x is fp16 and the weight fp32: the masked weight is rounded to fp16, once."""
    case = Case((1, 17, 4, 5), (5, 17, 3, 3), dtype=torch.float16, bias=False)
    inputs = make(case)
    inputs["weight"] = inputs["weight"].float() + 1e-5
    oracle, plain = case.expected(inputs)
    for layout in ("channels-first", "channels-last"):
        got = call(case, inputs, layout)
        testing.assert_close(got, {name: oracle[name] for name in got}, {name: plain[name] for name in got})


def test_results_have_the_layout_of_their_inputs():
    case = SMALL
    for layout, memory_format in (("channels-first", torch.contiguous_format), ("channels-last", torch.channels_last)):
        got = call(case, make(case), layout)
        for name in ("out", "dx", "dlogits"):
            assert got[name].is_contiguous(memory_format=memory_format), (layout, name)
    assert call(case, make(case), "strided")["out"].is_contiguous()


@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
@pytest.mark.parametrize("channels", [3, 17])
def test_l0_counts_every_weight_once(channels, layout):
    """Several tiles of pixels, of output channels and of the sum: each weight is seen often and counted once."""
    case = Case((3, channels, 5, 5), (35, channels, 3, 1), mask={"hard": True})
    inputs = make(case)
    assert call(case, inputs, layout)["l0"] == (inputs["mask_logits"] > 0).sum()


@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
def test_a_pruned_weight_is_zero_whatever_it_holds(layout):
    """Hard masks select: inf and NaN under a pruned logit (0, negative or NaN) leave no trace."""
    case = Case((1, 17, 4, 5), (5, 17, 3, 3), mask={"hard": True})
    inputs = make(case)
    inputs["mask_logits"].view(-1)[3] = float("nan")
    pruned = ~(inputs["mask_logits"] > 0)
    clean = inputs | {"weight": inputs["weight"].masked_fill(pruned, 0.0)}
    inputs["weight"] = inputs["weight"].masked_fill(pruned, float("inf"))
    inputs["weight"].view(-1)[3] = float("nan")
    got, expected = call(case, inputs, layout), call(case, clean, layout)
    for name in ("out", "dx"):
        assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("channels", [3, 17])
def test_an_empty_batch(channels):
    """No pixels: l0 is the sum of the mask all the same, and the logits' gradient comes from l0 alone."""
    case = Case((0, channels, 5, 4), (17, channels, 3, 3))
    got = call(case, make(case), "channels-first")
    one = replace(case, x=(1, channels, 5, 4))
    inputs = make(one) | {"x": torch.zeros(one.x)}
    oracle, plain = one.expected(inputs)
    names = ("l0", "dlogits")
    testing.assert_close({n: got[n] for n in names}, {n: oracle[n] for n in names}, {n: plain[n] for n in names})
    assert got["out"].shape == (0, 17, 3, 2)
    assert got["dx"].shape == (0, channels, 5, 4)


def test_no_filters():
    case = Case((1, 3, 5, 4), (0, 3, 3, 3), bias=False)
    got = call(case, make(case), "channels-first")
    assert got["l0"] == 0
    assert torch.equal(got["dx"], torch.zeros(case.x))
    assert got["dlogits"].shape == (0, 3, 3, 3)


SPLIT = replace(CONFIG, split_k=8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [3, 17])
def test_split_pixels(channels, layout):
    """Two images of 11 x 13 pixels: splits begin and end within images, and the last is shorter."""
    case = Case((2, channels, 11, 13), (5, channels, 1, 2), padding=(0, 1))
    x, weight, logits, _ = make(case).values()
    dout = torch.empty(2, 5, 11, 14)
    t = torch.tensor(1.0)
    launches = conv_dlogits.plan(
        dout, x, weight, logits, t, None, 1.0, *case.geometry(), logits, False, INTERPRETER, SPLIT
    )
    assert len(launches) == 2
    assert launches[1].arguments["splits"] > 2
    check(case, layout, SPLIT)


@pytest.mark.parametrize("config", [CONFIG, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("channels", [3, 17])
def test_dlogits_added_in_place(channels, config):
    """``masked_conv_dlogits_`` adds what the other writes, into any layout; without dl0, its part is missing."""
    case = Case((2, channels, 7, 5), (17, channels, 3, 2), mask={"scale": 1.5})
    inputs = make(case)
    oracle, plain = case.expected(inputs)
    x, weight, logits, _ = inputs.values()
    dout = testing.seeded_normal(tuple(oracle["out"].shape), 99)
    start = testing.seeded_normal(case.weight, 7)
    x, weight, logits, dout, start = (t.to(DEVICE) for t in (x, weight, logits, dout, start))
    temperature = torch.tensor(1.0, dtype=torch.float16, device=DEVICE)
    for dl0 in (torch.tensor(DL0, device=DEVICE), None):
        arguments = (dout, x, weight, logits, temperature, dl0, 1.5, *case.geometry())
        written = conv_dlogits.masked_conv_dlogits(*arguments, config=config)
        for layout in (torch.Tensor.contiguous, channels_last, strided):
            total = layout(start.clone())
            conv_dlogits.masked_conv_dlogits_(total, *arguments, config=config)
            assert torch.equal(total, start + written)
        of_l0 = 0.0 if dl0 is not None else DL0 * testing.reference.soft_mask_derivative(logits.cpu(), 1.0, 1.5)
        testing.assert_close(
            {"dlogits": written.cpu() + of_l0}, {"dlogits": oracle["dlogits"]}, {"dlogits": plain["dlogits"]}
        )


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, fresh memory holds NaN."""
    for name in ("empty", "empty_like"):
        fresh = getattr(torch, name)

        def filled(*args: Any, _fresh: Any = fresh, **kwargs: Any) -> Tensor:
            tensor = _fresh(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, filled)


@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
@pytest.mark.parametrize("name", ["even", "stem", "1x1 strided"])
def test_every_slot_is_written(name, layout, monkeypatch):
    """Results, l0 partials and partial sums of splits come from uninitialised memory."""
    case = GEOMETRIES[name]
    inputs = make(case)
    oracle, plain = case.expected(inputs)
    poison(monkeypatch)
    for config in (CONFIG, SPLIT):
        got = call(case, inputs, layout, config)
        testing.assert_close(got, {n: oracle[n] for n in got}, {n: plain[n] for n in got})


def far_apart(tensor: Tensor) -> Tensor:
    """The same numbers, 2**30 elements and more from image to image; memory that is not touched is free."""
    strides = (2**30 + 8, *tensor[0].contiguous().stride())
    extent = (tensor.shape[0] - 1) * strides[0] + tensor[0].numel()
    return torch.empty(extent, dtype=tensor.dtype, device=tensor.device).as_strided(tensor.shape, strides).copy_(tensor)


def test_offsets_beyond_32_bits(monkeypatch):
    monkeypatch.setitem(LAYOUTS, "far apart", (far_apart, torch.Tensor.contiguous, torch.Tensor.contiguous))
    check(Case((3, 3, 2, 2), (3, 3, 1, 2), dtype=torch.float16), "far apart")


@pytest.mark.parametrize("module", [conv, conv_dlogits], ids=["products", "dlogits"])
def test_candidate_configs_work(module):
    """What ``bench/tune.py`` would try fits the sizes that it asks for, and computes the same."""
    case = Case((1, 33, 5, 5), (33, 33, 1, 1))
    inputs = make(case)
    oracle, plain = case.expected(inputs)
    for op in ("masked_conv", "masked_conv_dx") if module is conv else ("masked_conv_dlogits",):
        found = module.candidate_configs(op, INTERPRETER, 25, 33, 33)
        assert 0 < len(found) <= 8
        for config in found:
            got = call(case, inputs, "channels-last", config)
            testing.assert_close(got, {n: oracle[n] for n in got}, {n: plain[n] for n in got})
        assert 0 < len(module.candidate_configs(op, INTERPRETER, 65536, 512, 512)) <= 8


def test_bitwise_repeatable():
    case = Case((1, 3, 11, 13), (17, 3, 2, 2))
    first, second = (call(case, make(case), "channels-last", SPLIT) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_unsupported_dtypes_are_named():
    case = Case((1, 3, 4, 4), (5, 3, 3, 3), dtype=torch.float64)
    x, weight, logits, bias = make(case).values()
    t = torch.tensor(1.0)
    with pytest.raises(NotImplementedError, match=r"take x in float32, float16 or bfloat16, got torch\.float64"):
        conv.masked_conv(x, weight, logits, t, bias, False, 1.0, *case.geometry())
    with pytest.raises(NotImplementedError, match="take dout in float32"):
        conv.masked_conv_dx(x, weight, logits, t, x.shape, False, 1.0, *case.geometry())
    with pytest.raises(NotImplementedError, match="take dout in float32"):
        conv_dlogits.masked_conv_dlogits(x, x, weight, logits, t, None, 1.0, *case.geometry())
