"""The kernels of ``mask_step`` against formulas in fp64 that are written here: every setting, dtype and branch."""

from __future__ import annotations

import math

import pytest
import torch
from csmask_kernels import mask_step as kernel
from csmask_kernels import mask_step_table as tables
from csmask_kernels.launch import INTERPRETER, StepConfig

from csmask import CircuitConfig, CircuitModel, MaskAdamW, MaskSGD, testing

BLOCK = 64  # small, so that tiny tensors have several programs
SMALL = StepConfig(block=BLOCK, num_warps=1, pieces=2)
# Less than a block, whole blocks, overhanging ones, one entry, none, more than one turn of the reduction; all at once.
SHAPES = [(13, 29), (BLOCK,), (5, 4, 3, 3), (1,), (0, 7), (131,), (16, 48)]
TEMPERATURES = (1.0, 3.0, 20.0)
EVERYTHING = ("dwm", "dl0", "grad")

# name: learning rate and the settings of one step, as the operators name them
ADAMW = {
    "adamw": {},
    "decay": {"weight_decay": 0.1},
    "betas": {"betas": (0.8, 0.95), "eps": 1e-3},
    "zero betas": {"betas": (0.0, 0.0), "eps": 1e-2},
    "maximize": {"maximize": True, "weight_decay": 0.1},
}
SGD = {
    "sgd": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "dampening": {"momentum": 0.8, "dampening": 0.3},
    "maximize": {"momentum": 0.9, "maximize": True},
}


def scalar(value, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype)


class Layers:
    """Seeded layers of several sizes, as the operators take them; ``has``: what each layer's gradient is made of."""

    def __init__(self, dtype=torch.float32, has=EVERYTHING, step=1, scale=1.0, shapes=SHAPES, wm_dtype=None,
                 dwm_dtype=None):  # fmt: skip
        count = len(shapes)
        has = [has] * count if not has or isinstance(has[0], str) else has
        normal = [lambda i, seed=seed, dtype=torch.float32: testing.seeded_normal(shapes[i], 10 * i + seed, dtype)
                  for seed in range(7)]  # fmt: skip
        self.logits = [testing.seeded_logits(shape, i) for i, shape in enumerate(shapes)]
        self.weights = [normal[1](i, dtype=dtype) for i in range(count)]
        self.masked = [torch.full(shape, math.nan, dtype=wm_dtype or dtype) for shape in shapes]
        self.dwms = [normal[2](i, dtype=dwm_dtype or dtype) if "dwm" in has[i] else None for i in range(count)]
        self.grads = [normal[3](i) if "grad" in has[i] else None for i in range(count)]
        self.dl0s = [scalar(0.5 + i) if "dl0" in has[i] else None for i in range(count)]
        self.temperatures = [scalar(TEMPERATURES[i % 3]) for i in range(count)]
        self.scales = [scale + 0.1 * i * (scale != 1.0) for i in range(count)]
        self.steps = [scalar(float(step + 3 * i * (step > 1))) for i in range(count)]
        self.first = [normal[4](i) * (step > 1) for i in range(count)]
        self.second = [normal[5](i).square() * (step > 1) for i in range(count)]
        self.state_scales = []

    def waiting(self):
        return (self.dwms, self.weights, self.grads, self.temperatures, self.dl0s, self.scales)

    def gradients(self):
        """In fp64, from the sigmoid itself."""
        found = []
        for s, dwm, w, grad, t, dl0, scale in zip(self.logits, *self.waiting(), strict=True):
            logits = s.double()
            m = torch.sigmoid(t.double() * logits)
            dmask = torch.zeros_like(logits) if dwm is None else dwm.double() * w.double()
            dmask = dmask + (0.0 if dl0 is None else dl0.double())
            derivative = t.double() * m * torch.sigmoid(-t.double() * logits)
            found.append(dmask * derivative * scale + (0.0 if grad is None else grad.double()))
        return found

    def expect(self, update, factor, maximize):
        """What a step makes of it, in fp64: logits, states, masked weights, l0s; and the exact counts."""
        sign = (-1.0 if maximize else 1.0) * (1.0 if factor is None else factor.item())
        found = {}
        for i, g in enumerate(self.gradients()):
            state = [self.logits[i].double(), self.first[i].double(), self.second[i].double()]
            new = update(sign * g, *state, float(self.steps[i]))
            mask = torch.sigmoid(self.temperatures[i].double() * new[0]) * self.scales[i]
            found[i] = [*new, self.weights[i].double() * mask, mask.sum()]
        return found

    def check(self, expected, l0s, counts, tolerance=2e-6):
        for i, (logits, first, second, masked, l0) in expected.items():
            got = {"logits": self.logits[i], "first": self.first[i], "second": self.second[i]}
            for (name, tensor), want in zip(got.items(), (logits, first, second), strict=True):
                torch.testing.assert_close(
                    tensor.double(), want, rtol=tolerance, atol=tolerance, msg=lambda m, n=name, i=i: f"{n} {i}: {m}"
                )
            rounding = max(torch.finfo(self.masked[i].dtype).eps, 20 * tolerance)
            torch.testing.assert_close(self.masked[i].double(), masked, rtol=rounding, atol=rounding)
            assert l0s[i].item() == pytest.approx(float(l0), rel=1e-5)
            # of the logits as they were written: one next to a bound may round to either side of it
            kept = int((self.logits[i] > 0).sum())
            undecided = int(((self.logits[i] * self.temperatures[i]).abs() < 4).sum())
            assert counts[i].tolist() == [kept, undecided]
        assert (l0s.dtype, counts.dtype) == (torch.float32, torch.int64)


def adamw(layers, lr=0.02, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, maximize=False, factor=None, check=True):
    def update(g, s, first, second, step):
        s = s - lr * weight_decay * s
        first = betas[0] * first + (1 - betas[0]) * g
        second = betas[1] * second + (1 - betas[1]) * g * g
        denominator = (second / (1 - betas[1] ** step)).sqrt() + eps
        return s - lr * first / (1 - betas[0] ** step) / denominator, first, second

    expected = layers.expect(update, factor, maximize) if check else None
    found = kernel.mask_adamw_(
        layers.logits, layers.first, layers.second, layers.state_scales, layers.masked, *layers.waiting(), layers.steps,
        factor, scalar(lr, torch.float64), *betas, eps, weight_decay, maximize, config=SMALL,
    )  # fmt: skip
    if check:
        layers.check(expected, *found)
    return found


def sgd(layers, lr=0.5, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False, factor=None,
        check=True):  # fmt: skip
    def update(g, s, first, second, step):
        g = g + weight_decay * s
        if momentum:
            first = g if step == 1 else momentum * first + (1 - dampening) * g
            g = g + momentum * first if nesterov else first
        return s - lr * g, first, second

    expected = layers.expect(update, factor, maximize) if check else None
    found = kernel.mask_sgd_(
        layers.logits, layers.first if momentum else [], layers.masked, *layers.waiting(), layers.steps, factor,
        scalar(lr), momentum, dampening, weight_decay, nesterov, maximize, config=SMALL,
    )  # fmt: skip
    if check:
        layers.check(expected, *found)
    return found


steps = pytest.mark.parametrize("step", [1, 2, 300])


@steps
@pytest.mark.parametrize("settings", ADAMW.values(), ids=ADAMW)
def test_adamw(settings, step):
    adamw(Layers(step=step), **settings)


@steps
@pytest.mark.parametrize("settings", SGD.values(), ids=SGD)
def test_sgd(settings, step):
    sgd(Layers(step=step), **settings)


@pytest.mark.parametrize("optimizer", [adamw, sgd])
@pytest.mark.parametrize("dtypes", [
    {"dtype": torch.float16}, {"dtype": torch.float16, "dwm_dtype": torch.float32},
    {"dtype": torch.float32, "wm_dtype": torch.float16, "dwm_dtype": torch.float16},
], ids=str)  # fmt: skip
def test_dtypes(optimizer, dtypes):
    optimizer(Layers(**dtypes, step=2, scale=1.7))


MISSING = [("dwm",), ("dl0",), ("grad",), ("dwm", "grad"), ("dwm", "dl0"), ("dl0", "grad"), ()]


@pytest.mark.parametrize("optimizer", [adamw, sgd])
@pytest.mark.parametrize("has", MISSING, ids=str)
def test_a_gradient_of_any_parts(optimizer, has):
    optimizer(Layers(has=has, step=2, scale=1.3))


@pytest.mark.parametrize("optimizer", [adamw, sgd])
def test_layers_that_differ_are_stepped_together(optimizer):
    """As many kernels as there are kinds, and each result in the place of its layer."""
    layers = Layers(has=MISSING, step=2)
    layers.weights[::2] = [w.half() for w in layers.weights[::2]]
    layers.masked[::3] = [w.half() for w in layers.masked[::3]]
    optimizer(layers)


@pytest.mark.parametrize("optimizer", [adamw, sgd])
@pytest.mark.parametrize("maximize", [False, True])
def test_factor_scales_the_gradient(optimizer, maximize):
    optimizer(Layers(step=2), factor=scalar(0.125), maximize=maximize, weight_decay=0.1)


def test_learning_rate_of_the_host_and_of_the_device():
    """A number and a tensor of any dtype are the same step."""
    found = []
    for lr in (0.25, scalar(0.25), scalar(0.25, torch.float64), scalar(0.25, torch.float16)):
        layers = Layers(step=2)
        kernel.mask_sgd_(layers.logits, [], layers.masked, *layers.waiting(), layers.steps, None, lr, 0.0, 0.0, 0.0,
                         False, False, config=SMALL)  # fmt: skip
        found.append(layers.logits)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert not torch.equal(found[0][0], Layers(step=2).logits[0])
    device, elsewhere = torch.device("cpu"), torch.device("meta")
    lr = scalar(0.25)
    assert kernel._number_or_tensor(lr, device)[0] is lr
    assert kernel._number_or_tensor(lr, elsewhere) == (None, 0.25)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_scalars_of_any_dtype_are_read_as_fp32(dtype):
    found = []
    for kind in (torch.float32, dtype):
        layers = Layers(step=2)
        for name in ("temperatures", "dl0s", "steps"):
            setattr(layers, name, [t.to(kind) for t in getattr(layers, name)])
        adamw(layers, check=False)
        found.append(layers.logits)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_trajectory_is_that_of_torch():
    """Twenty steps with new gradients; torch's own optimizer in fp64 has the same logits."""
    layers = Layers(has=("dwm",), shapes=SHAPES[:3])
    params = [torch.nn.Parameter(s.double()) for s in layers.logits]
    theirs = torch.optim.AdamW(params, lr=0.02, weight_decay=0.1)
    for step in range(1, 21):
        layers.dwms = [testing.seeded_normal(tuple(s.shape), 100 * step + i) for i, s in enumerate(layers.logits)]
        layers.steps = [scalar(float(step))] * 3
        for i, param in enumerate(params):
            m = torch.sigmoid(layers.temperatures[i].double() * param.detach())
            derivative = layers.temperatures[i].double() * m * (1 - m)
            param.grad = layers.dwms[i].double() * layers.weights[i].double() * derivative
        adamw(layers, weight_decay=0.1, check=False)
        theirs.step()
    for got, want in zip(layers.logits, params, strict=True):
        torch.testing.assert_close(got.double(), want.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("has", [EVERYTHING, *MISSING], ids=str)
def test_grad_norms(has, dtype):
    layers = Layers(dtype, has, scale=1.3)
    norms = kernel.mask_grad_norms(layers.logits, *layers.waiting(), config=SMALL)
    expected = torch.stack([g.norm() for g in layers.gradients()])
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms.double(), expected, rtol=2e-6, atol=0.0)


def test_grad_norms_leave_all_as_it_is():
    layers, same = Layers(), Layers()
    kernel.mask_grad_norms(layers.logits, *layers.waiting(), config=SMALL)
    for name in ("logits", "weights", "dwms", "grads"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(layers, name), getattr(same, name), strict=True))


@pytest.mark.parametrize("optimizer", [adamw, sgd])
def test_repeats_bitwise(optimizer):
    def run():
        layers = Layers(step=2, scale=1.7)
        l0s, counts = optimizer(layers, check=False)
        norms = kernel.mask_grad_norms(layers.logits, *layers.waiting(), config=SMALL)
        return [*layers.logits, *layers.first, *layers.second, *layers.masked, l0s, counts, norms]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_more_partials_than_one_turn_adds():
    """The reduction walks the partials of a layer in several turns, and those of its neighbours are not its own."""
    programs = kernel.REDUCE_BLOCK + 3
    sizes = [(5 * BLOCK,), (programs * BLOCK - 1,), (BLOCK + 1,)]
    layers = Layers(shapes=sizes, has=("dwm",))
    for s in layers.logits:
        s.zero_()
    layers.dwms = [torch.zeros_like(d) for d in layers.dwms]
    l0s, counts = adamw(layers, check=False)
    assert l0s.tolist() == [n / 2 for (n,) in sizes]
    assert counts.tolist() == [[0, n] for (n,) in sizes]


def test_saturated_logits_have_a_derivative():
    """``m * (1 - m)`` in fp32 is exactly 0 from ``T * S = 17``; the kernel keeps full relative precision to 80."""
    layers = Layers(shapes=[(6,)], has=("dwm",))
    layers.logits = [torch.tensor([17.0, -17.0, 30.0, -30.0, 80.0, -80.0]) / 10]
    layers.temperatures = [scalar(10.0)]
    norms = []
    for i in range(6):
        layers.dwms = [torch.zeros(6)]
        layers.dwms[0][i] = 1e20
        norms.append(kernel.mask_grad_norms(layers.logits, *layers.waiting(), config=SMALL)[0])
        torch.testing.assert_close(norms[-1].double(), layers.gradients()[0].norm(), rtol=1e-5, atol=0.0)
    assert min(norms) > 0


def test_bias_corrections_are_precise():
    """``1 - 0.99999**step`` has five digits less in fp32 than this."""
    for step in (1, 2, 2999, 3001, 29999, 30001, 10**6):
        for betas in ((0.9999, 0.99999), (0.9999, 0.0)):
            layers = Layers(shapes=[(5,)], has=("grad",), step=2)
            layers.steps = [scalar(float(step))]
            layers.logits[0].zero_()
            adamw(layers, lr=1.0, betas=betas)


def test_what_hangs_over_is_left_alone():
    """Neighbours in memory of all that is written, at offsets that are not aligned."""
    layers = Layers(shapes=[(131,), (BLOCK - 1,)], step=2)
    buffers = []
    for name in ("logits", "first", "second", "masked"):
        for i, tensor in enumerate(getattr(layers, name)):
            buffer = torch.full((tensor.numel() + 10,), 7.0)
            getattr(layers, name)[i] = buffer[5:-5].copy_(tensor)
            buffers.append(buffer)
    adamw(layers)
    for buffer in buffers:
        assert torch.equal(torch.cat([buffer[:5], buffer[-5:]]), torch.full((10,), 7.0))


def in_layout(tensor, layout):
    return torch.empty_like(layout, dtype=tensor.dtype).copy_(tensor)


@pytest.mark.parametrize("optimizer", [adamw, sgd])
def test_layouts(optimizer):
    """Everything transposed or channels-last; gradients in a layout of their own are copied, expanded ones too."""
    shapes = [(13, 29), (5, 4, 3, 3), (6, 10)]
    like = [torch.empty(29, 13).t(), torch.empty(5, 4, 3, 3).to(memory_format=torch.channels_last), torch.empty(6, 10)]
    layers = Layers(shapes=shapes, step=2)
    for name in ("logits", "weights", "masked", "first", "second"):
        setattr(layers, name, [in_layout(t, x) for t, x in zip(getattr(layers, name), like, strict=True)])
    layers.grads[0] = layers.grads[0].double()
    layers.dwms[2] = torch.ones(()).expand(6, 10)
    layers.grads[2] = testing.seeded_normal((6, 20), 5)[:, ::2]
    optimizer(layers, **({"momentum": 0.9} if optimizer is sgd else {}))
    assert [t.stride() for t in layers.logits] == [t.stride() for t in like]


def test_what_cannot_be_walked_is_refused():
    def refused(error, message, **changes):
        layers = Layers(shapes=[(4, 6)], step=2)
        for name, value in changes.items():
            setattr(layers, name, [value])
        with pytest.raises(error, match=message):
            adamw(layers, check=False)
        assert layers.masked[0].isnan().all()

    transposed = torch.ones(6, 4).t()
    refused(ValueError, r"layer 0: expected weight with the mask_logits' strides \(6, 1\), got", weights=transposed)
    refused(ValueError, "expected masked_weight with", masked=torch.full((6, 4), math.nan).t())
    refused(ValueError, "expected first with", first=transposed)
    refused(ValueError, "optimizer state in the mask_logits' dtype", second=torch.ones(4, 6, dtype=torch.float16))
    refused(ValueError, "without gaps", logits=torch.ones(4, 12)[:, ::2])
    refused(ValueError, "one logit per weight", logits=torch.ones(4, 1))
    refused(ValueError, r"expected dmasked_weight of the mask_logits' shape \(4, 6\)", dwms=torch.ones(6))
    refused(NotImplementedError, "take weight in float32, float16 or bfloat16", weights=torch.ones(4, 6).double())
    meta = torch.ones(4, 6, device="meta")
    refused(ValueError, "expected weight on cpu, got meta", weights=meta)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(7, 12), torch.nn.Linear(12, 5)

    def forward(self, x):
        return {"loss": self.second(torch.tanh(self.first(x))).square().mean()}


@pytest.mark.usefixtures("triton_on_cpu")
@pytest.mark.parametrize(("mine", "theirs", "settings"), [
    (MaskAdamW, torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
    (MaskSGD, torch.optim.SGD, {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.0}),
], ids=["adamw", "sgd"])  # fmt: skip
def test_training_is_that_of_torch(mine, theirs, settings):
    """The whole stack as on a GPU: clipping, two micro-batches, l0 and annealing."""
    trained = []
    for optimizer_class in (mine, theirs):
        torch.manual_seed(0)
        execution = "auto" if optimizer_class is mine else "reference"
        config = CircuitConfig(target_layers="all", l0_lambda=1e-2, execution=execution)
        circuit = CircuitModel(config, Net())
        params = list(circuit.mask_parameters())
        clips = {"max_grad_norm": 0.05} if optimizer_class is mine else {}
        optimizer = optimizer_class(params, **settings, **clips)
        for step in range(6):
            circuit.temperature = 1.5**step
            optimizer.zero_grad()
            for batch in range(2):
                circuit(testing.seeded_normal((4, 7), 10 * step + batch))["loss"].backward()
            if not clips:
                torch.nn.utils.clip_grad_norm_(params, 0.05)
            optimizer.step()
        trained.append([p.detach().clone() for p in params])
        if clips:
            assert all(layer.waits for layer in circuit.masked_layers.values())
            kept = sum(int((p > 0).sum()) for p in params) / sum(p.numel() for p in params)
            assert optimizer.telemetry()["kept_fraction"] == pytest.approx(kept)
    for got, want in zip(*trained, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


# Tables


def groups_of(layers):
    columns = kernel._waiting(layers.logits, *layers.waiting(), masked_weight=layers.masked, step=layers.steps)
    return tables.plan_groups(columns, INTERPRETER, SMALL)


def test_a_table_that_is_there_is_not_made_again():
    tables._cached_table.cache_clear()
    layers = Layers(shapes=SHAPES[:3])
    first = groups_of(layers)
    second = groups_of(layers)
    assert [g.table.data_ptr() for g in first] == [g.table.data_ptr() for g in second]
    assert tables._cached_table.cache_info().misses == len(first)
    layers.scales = [2.0, *layers.scales[1:]]
    third = groups_of(layers)
    assert tables._cached_table.cache_info().misses > len(first)
    assert not torch.equal(torch.cat([g.table for g in first]), torch.cat([g.table for g in third]))


def test_layers_that_are_alike_share_a_launch():
    layers = Layers(shapes=[(16, 16)] * 5)
    (group,) = groups_of(layers)
    assert (group.layers, group.programs, group.constants["ROWS"]) == (5, 10, 8)
    assert group.constants["ALIGNED"]
    layers.weights[3] = layers.weights[3].half()
    layers.grads[4] = None
    assert sorted(g.layers for g in groups_of(layers)) == [1, 1, 3]


def test_aligned_means_all_of_it():
    base = torch.zeros(257)
    assert base.data_ptr() % 16 == 0
    layers = Layers(shapes=[(16, 16)])
    assert groups_of(layers)[0].constants["ALIGNED"]
    for name in ("weights", "dwms", "grads", "masked"):
        layers = Layers(shapes=[(16, 16)])
        setattr(layers, name, [base[1:].view(16, 16)])
        assert not groups_of(layers)[0].constants["ALIGNED"], name
    assert not groups_of(Layers(shapes=[(16, 15), (3, 3)]))[-1].constants["ALIGNED"]


def test_more_layers_than_one_table_has(monkeypatch):
    monkeypatch.setattr(tables, "MAX_LAYERS", 3)
    layers = Layers(shapes=[(7, i + 1) for i in range(8)], step=2)
    assert [g.layers for g in groups_of(layers)] == [3, 3, 2]
    adamw(layers)
