"""AdamW's states in 8 bits: what a code keeps, the same codes on every back end, and trajectories beside 32 bits."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from test_optim import circuit_of, small, train

from csmask import MaskAdamW, _cpp, state_codes, testing
from csmask._ops import ops

BETAS = (0.9, 0.999)
CODES = ("exp_avg_codes", "exp_avg_sq_codes", "state_scales")


def scalar(value):
    return torch.tensor(float(value))


def states(shape, step=50, octaves=10.0):
    """Averages and squares as training leaves them: magnitudes that differ by some octaves within a block."""
    magnitudes = torch.exp2(-octaves * torch.rand(shape, generator=torch.Generator().manual_seed(1)))
    average = testing.seeded_normal(shape, 2) * magnitudes
    square = magnitudes.square() * (0.5 + testing.seeded_normal(shape, 3).square())
    return average, square, state_codes.average_unit(BETAS, scalar(step))


def round_trip(average, square, unit, step=50):
    new = state_codes.encode(average, square, unit, scalar(step))
    logits = torch.ones_like(average)
    state_codes.put_quarters(logits, new.quarters)
    return state_codes.decode(*new.codes, logits, unit)


@pytest.mark.parametrize("shape", [(1,), (255,), (256,), (257,), (7, 5, 3, 3), (0, 4)])
def test_what_a_code_keeps(shape):
    """Squares to a 64th within 10 octaves of their block's largest, a 16th within 26; averages to half a 384th."""
    average, square, unit = states(shape, octaves=12.0)
    average = average.clamp(-1.3 * unit * square.sqrt(), 1.3 * unit * square.sqrt())
    got_average, got_square = round_trip(average, square, unit)
    error = (got_square - square).abs() / square
    flat = square.flatten()
    largest = torch.cat([b.max().expand(len(b)) for b in flat.split(256) if len(b)] or [flat]).view(shape)
    assert bool((error <= torch.where(square > largest * 2.0**-10, 1 / 64, 1 / 16)).all())
    assert bool(((got_average - average).abs() <= 0.5001 / 384 * unit * got_square.sqrt()).all())


def test_what_does_not_change_keeps_its_value():
    """At any later step, and whatever the block's largest value does within its range."""
    average, square, unit = states((1000,), octaves=1.0)
    once = round_trip(average, square, unit)
    for step in range(51, 60):
        again = round_trip(*once, unit, step)
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    louder = once[1].clone()
    louder[::256] *= 16
    assert torch.equal(round_trip(once[0], louder, unit)[1], louder)


def test_rounding_is_right_on_average_and_evenly_so():
    """Over 100 steps the mean is within a tenth of a code's step; of random rounding it would be within a fifth."""
    _, square, unit = states((2048,), octaves=5.0)
    mean = torch.stack([round_trip(square, square, unit, step)[1] for step in range(100)]).double().mean(0)
    assert float(((mean - square) / square).abs().max()) < 1 / 64 / 10


def test_zeros_stay_zeros_and_nothing_else_becomes_one():
    square = torch.tensor([0.0, 1e-30, 1e-12, 1.0, 0.0])
    unit = scalar(1.0)
    got = round_trip(torch.zeros(5), square, unit)[1]
    assert torch.equal(got == 0, square == 0)
    zero = round_trip(torch.zeros(300), torch.zeros(300), unit)
    assert not any(bool(t.any()) for t in zero)


def test_logits_hold_quarters_at_no_more_than_four_bits():
    """And keep their sign and, with what is not finite, 0, at which a mask tells kept from pruned."""
    numbers = testing.seeded_normal((1000,), 4)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-44, -1e-44])
    logits, quarters = torch.cat([numbers, special]), torch.arange(1007) % 16
    before = logits.clone()
    state_codes.put_quarters(logits, quarters)
    assert bool(((logits[:1000] - numbers).abs() <= numbers.abs() * 2.0**-19).all())
    assert torch.equal(logits[:1000].view(torch.int32) & 15, quarters[:1000].int())
    assert torch.equal(logits > 0, before > 0)
    assert torch.equal(logits < 0, before < 0)
    assert torch.equal(logits[1000:1005].view(torch.int32), before[1000:1005].view(torch.int32))


def test_logits_that_somebody_changed_cost_less_than_a_step_of_the_codes():
    average, square, unit = states((1000,), octaves=2.0)
    average = average.clamp(-1.3 * unit * square.sqrt(), 1.3 * unit * square.sqrt())
    codes = state_codes.encode(average, square, unit, scalar(50)).codes
    for logits in (torch.full((1000,), 5.0), testing.seeded_normal((1000,), 4)):
        got_average, got_square = state_codes.decode(*codes, logits, unit)
        assert bool(((got_square - square).abs() < square / 16).all())
        assert bool(((got_average / got_square.sqrt() - average / square.sqrt()).abs() < 2 * unit / 96).all())


@pytest.mark.parametrize("special", [0.0, math.inf])
def test_logits_that_can_hold_nothing_stay_as_they_are(request, monkeypatch, special):
    """On every back end: a learning rate of 0 leaves 0 pruned, and what is infinite stays so."""

    def call():
        arguments = layers(shapes=((300,),), grads_only=True)
        arguments[0][0].fill_(special)
        ops.mask_adamw_(*arguments, [scalar(1)], None, scalar(0.0), *BETAS, 1e-8, 0.0, False)
        assert bool(arguments[2][0].any())
        return arguments[0][0]

    for logits in back_ends(request, monkeypatch, call):
        assert bool((logits == special).all())


def layers(shapes=((16, 40), (7, 5, 3, 3), (257,), (0, 4)), dtype=torch.float32, grads_only=False):
    """Arguments of ``mask_adamw_`` but for its settings; with nothing but ``grad``, what is coded is exact."""
    count = len(shapes)
    logits = [testing.seeded_logits(shape, i) for i, shape in enumerate(shapes)]
    codes = [state_codes.zeros(s) for s in logits]
    weights = [testing.seeded_normal(shape, 10 + i, dtype) for i, shape in enumerate(shapes)]
    dwms = [None if grads_only else testing.seeded_normal(shape, 20 + i, dtype) for i, shape in enumerate(shapes)]
    grads = [testing.seeded_normal(shape, 30 + i) for i, shape in enumerate(shapes)]
    masked = [torch.full_like(w, math.nan) for w in weights]
    waiting = (masked, dwms, weights, grads, [scalar(2.0)] * count, [None] * count, [1.0] * count)
    return [logits, *([c[k] for c in codes] for k in range(3)), *waiting]


def run(arguments, steps=3, betas=BETAS, changing=True):
    arguments = copy.deepcopy(arguments)
    for step in range(1, steps + 1):
        if changing:
            for i, grad in enumerate(arguments[7]):
                grad.copy_(testing.seeded_normal(tuple(grad.shape), 100 * step + i))
        counts = [scalar(step)] * len(arguments[0])
        ops.mask_adamw_(*arguments, counts, None, scalar(0.02), *betas, 1e-8, 0.01, False)
    return arguments


def back_ends(request, monkeypatch, call):
    """What a call gives in C++, in plain torch and in Triton."""
    found = [call()]
    with monkeypatch.context() as patch:
        patch.setattr(_cpp, "kernels", None)
        found.append(call())
    request.getfixturevalue("triton_on_cpu")
    return [*found, call()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_back_ends_agree(request, monkeypatch, dtype):
    """Gradients differ in their last bits, which brings a code to its neighbour here and there."""
    arguments = layers(dtype=dtype)
    want, *others = back_ends(request, monkeypatch, lambda: run(arguments))
    for got in others:
        for name, a, b in zip(("logits", "averages", "squares", "scales"), got, want, strict=False):
            for x, y in zip(a, b, strict=True):
                if name == "logits":
                    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
                elif name == "scales":
                    assert torch.equal(x, y)
                elif x.numel():
                    assert float((x != y).float().mean()) <= 0.01
                    assert int((x.int() - y.int()).abs().max()) <= 1 + 4 * (name == "averages")


def test_equal_states_have_equal_codes_everywhere(request, monkeypatch):
    """Betas of a half make averages of one gradient exact: the squares' codes are then the same to the last one.

    Those of averages hang on a root and a quotient, whose last bits differ on GPUs.
    """
    arguments = layers(grads_only=True)
    want, *others = back_ends(request, monkeypatch, lambda: run(arguments, 1, (0.5, 0.5), changing=False))
    for got in others:
        assert all(torch.equal(a, b) for a, b in zip(got[2] + got[3], want[2] + want[3], strict=True))
        for a, b in zip(got[1], want[1], strict=True):
            assert int((a != b).sum()) <= a.numel() // 100
    grad = arguments[7][0]
    unit = state_codes.average_unit((0.5, 0.5), scalar(1))
    exact = state_codes.encode(grad * 0.5, grad.square() * 0.5, unit, scalar(1))
    assert torch.equal(want[2][0], exact.exp_avg_sq)
    assert torch.equal(want[1][0], exact.exp_avg)
    assert torch.equal(want[0][0].view(torch.int32) & state_codes.QUARTERS, exact.quarters)


def relative(got, want):
    a, b = (torch.cat([p.detach().flatten() for p in c.mask_parameters()]) for c in (got, want))
    return float((a - b).norm() / b.norm()), float(((a > 0) == (b > 0)).float().mean())


def follow(gradients, lr=0.01, bits=8):
    """Logits and the second state after steps with these gradients, a number each, in one block of 300 weights."""
    logits, weight = torch.zeros(300), torch.ones(300)
    if bits == 8:
        first, second, scales = ([t] for t in state_codes.zeros(logits))
    else:
        first, second, scales = [torch.zeros(300)], [torch.zeros(300)], []
    for step, gradient in enumerate(gradients, 1):
        grad = gradient * torch.linspace(0.1, 1.0, 300)
        ops.mask_adamw_([logits], first, second, scales, [weight.clone()], [None], [weight], [grad], [scalar(1)],
                        [None], [1.0], [scalar(step)], None, scalar(lr), *BETAS, 1e-8, 0.0, False)  # fmt: skip
    if bits == 8:
        unit = state_codes.average_unit(BETAS, scalar(len(gradients)))
        second = [state_codes.decode(first[0], second[0], scales[0], logits, unit)[1]]
    return logits, second[0]


@pytest.mark.parametrize("gradients", [
    [1.0] * 600, [1.0] * 100 + [3.0] * 500, [3.0] * 100 + [1.0] * 500, [1.0, -0.5] * 300, [1.0] * 300 + [0.0] * 300,
], ids=["alike", "growing", "falling", "in turns", "ending"])  # fmt: skip
def test_small_changes_are_not_lost(gradients):
    """A step changes the second state by less than its rounding takes; all the same it follows, and so do the logits.

    Rounded to the nearest it is 23 to 75 % off and the logits 5 to 32 %; without the residues of the first state the
    logits are 0.3 to 2.7 % off.
    """
    logits, second = follow(gradients)
    want, exact = follow(gradients, bits=32)
    assert float(((second - exact) / exact).abs().max()) <= 0.05
    assert float(((second - exact) / exact).mean().abs()) <= 0.004
    assert float((logits - want).abs().max() / want.abs().max()) <= 0.014
    assert float((logits - want).norm() / want.norm()) <= 0.0045


@pytest.mark.parametrize("config", [
    {}, {"mask_bias": True}, {"rescale": True}, {"dtype": torch.bfloat16}, {"dtype": torch.float16},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.01}, {"weight_decay": 0.1}, {"maximize": True}], ids=str)
def test_trajectory_beside_that_of_32_bits(config, options):
    """Within 0.6 % of the logits after 60 annealed steps, and on which side of 0 they are within one in a thousand."""
    found = []
    for bits in (32, 8):
        circuit = circuit_of(**config)
        optimizer = MaskAdamW(circuit.mask_parameters(), lr=0.02, state_bits=bits, **options)
        train(circuit, optimizer, 60, anneal=True, dtype=config.get("dtype", torch.float32))
        found.append(circuit)
    error, agreement = relative(found[1], found[0])
    assert error <= 0.006, error
    assert agreement >= 0.999, agreement


def test_lean_steps_are_the_same():
    found = []
    for lean in (False, True):
        circuit = circuit_of()
        optimizer = MaskAdamW(circuit.mask_parameters(), lr=0.02, state_bits=8, lean=lean)
        train(circuit, optimizer, 5)
        found.append([p.detach() for p in circuit.mask_parameters()])
        assert all("exp_avg_codes" in optimizer.state[p] for p in circuit.mask_parameters())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_bytes_of_the_states():
    circuit = circuit_of()
    optimizer = MaskAdamW(circuit.mask_parameters(), state_bits=8)
    train(circuit, optimizer, 1)
    for param in circuit.mask_parameters():
        state = optimizer.state[param]
        assert set(state) == {"step", "code_betas", *CODES}
        blocks = -(-param.numel() // 256)
        assert sum(state[name].nbytes for name in CODES) == 2 * param.numel() + 4 * blocks


def test_parameters_of_no_waiting_layer_keep_32_bits_and_groups_may_differ():
    circuit = circuit_of()
    params = circuit.mask_parameters()
    other = torch.nn.Parameter(torch.ones(3))
    groups = [{"params": params[:2], "state_bits": 32}, {"params": params[2:]}, {"params": [other]}]
    optimizer = MaskAdamW(groups, lr=0.02, state_bits=8)
    other.grad = torch.ones(3)
    train(circuit, optimizer, 1)
    other.grad = torch.ones(3)
    optimizer.step()
    assert all("exp_avg" in optimizer.state[p] for p in (*params[:2], other))
    assert all("exp_avg_codes" in optimizer.state[p] for p in params[2:])
    for bits in (16, 0, None):
        with pytest.raises(ValueError, match=f"state_bits must be 8 or 32, got {bits}"):
            MaskAdamW(params, state_bits=bits)


@pytest.mark.parametrize("how", ["state dict", "file", "deepcopy"])
def test_saved_and_loaded_training_goes_on_bit_for_bit(how):
    whole = circuit_of()
    optimizer = MaskAdamW(whole.mask_parameters(), lr=0.02, state_bits=8)
    train(whole, optimizer, 4)
    if how == "deepcopy":
        again, resumed = copy.deepcopy((whole, optimizer))
    else:
        again = circuit_of()
        again.load_state_dict(copy.deepcopy(whole.state_dict()))
        resumed = MaskAdamW(again.mask_parameters(), lr=0.02, state_bits=8)
        saved = copy.deepcopy(optimizer.state_dict())
        if how == "file":
            buffer = io.BytesIO()
            torch.save(saved, buffer)
            buffer.seek(0)
            saved = torch.load(buffer)
        resumed.load_state_dict(saved)
    for p in resumed.param_groups[0]["params"]:
        assert resumed.state[p]["exp_avg_codes"].dtype == torch.int8
        assert resumed.state[p]["exp_avg_sq_codes"].dtype == torch.uint8
    train(whole, optimizer, 3)
    train(again, resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(again.mask_parameters(), whole.mask_parameters(), strict=True))


@pytest.mark.parametrize(("before", "after"), [(8, 32), (32, 8)])
def test_states_of_the_other_kind_are_converted(before, after):
    """The optimizer keeps its own state_bits, and goes on as if it had kept what it was given."""
    first = circuit_of()
    source = MaskAdamW(first.mask_parameters(), lr=0.02, state_bits=before)
    train(first, source, 30)
    second = circuit_of()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    target = MaskAdamW(second.mask_parameters(), lr=0.02, state_bits=after)
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    assert target.param_groups[0]["state_bits"] == after
    train(first, source, 10)
    train(second, target, 10)
    assert all(("exp_avg" in target.state[p]) is (after == 32) for p in second.mask_parameters())
    assert relative(second, first)[0] <= 0.01


def test_a_layer_that_waits_no_longer_gets_its_states_back():
    circuit, want = circuit_of(), circuit_of()
    optimizer = MaskAdamW(circuit.mask_parameters(), lr=0.02, state_bits=8)
    theirs = MaskAdamW(want.mask_parameters(), lr=0.02)
    for c, o in ((circuit, optimizer), (want, theirs)):
        train(c, o, 10)
        c.set_execution("per_forward")
        train(c, o, 10)
    assert all("exp_avg" in optimizer.state[p] for p in circuit.mask_parameters())
    assert relative(circuit, want)[0] <= 0.03


def test_codes_of_another_layout_are_laid_anew():
    logits = testing.seeded_normal((8, 4, 3, 3), 0)
    average, square, unit = states((8, 4, 3, 3), octaves=4.0)
    circuit = small()
    optimizer = MaskAdamW(circuit.mask_parameters(), state_bits=8)
    param = torch.nn.Parameter(logits.to(memory_format=torch.channels_last))
    new = state_codes.encode(average, square, unit, scalar(50))
    state_codes.put_quarters(param.detach(), new.quarters)
    optimizer.state[param] = {"step": scalar(50), **dict(zip(CODES, new.codes, strict=True))}
    want = state_codes.decode(*new.codes, param.detach(), unit)
    state = optimizer._state_of(optimizer.param_groups[0], param, 8)
    assert state["exp_avg_codes"].stride() == param.stride()
    got = state_codes.decode(*(state[name] for name in CODES), param.detach(), unit)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.02)


@pytest.mark.skipif(_cpp.kernels is None, reason="the C++ back end is not built")
def test_codes_that_do_not_fit_are_refused_before_anything_is_written():
    for change, error, message in (
        ({1: torch.zeros(16, 40, dtype=torch.uint8)}, TypeError, "first must be int8, got uint8"),
        ({2: torch.zeros(16, 40, dtype=torch.int8)}, TypeError, "second must be uint8, got int8"),
        ({3: torch.zeros(2)}, ValueError, "state_scales must have 3 elements, got 2"),
        ({1: torch.zeros(40, 16, dtype=torch.int8).mT}, ValueError, "without gaps and in the order of mask_logits"),
    ):
        arguments = layers(shapes=((16, 40),))
        for index, tensor in change.items():
            arguments[index] = [tensor]
        before = arguments[0][0].clone()
        with pytest.raises(error, match=message):
            run(arguments, 1)
        assert torch.equal(arguments[0][0], before)


@pytest.mark.parametrize("bad", [math.inf, -math.nan, math.nan, 1e30, 2e19])
def test_a_gradient_that_is_no_number_spoils_no_neighbour(request, monkeypatch, bad):
    """What it does to its own logit is what it does in 32 bits; the others of its block go on, on every back end."""

    def call():
        arguments = layers(shapes=((300,),), grads_only=True)
        arguments[7][0][7] = bad
        return run(arguments, 1, changing=False), run(run_on(arguments), 3)

    def run_on(arguments):
        first = run(arguments, 1, changing=False)
        first[7][0][7] = 1.0
        return first

    for once, later in back_ends(request, monkeypatch, call):
        assert bool(once[3][0].isfinite().all())
        others = torch.arange(300) != 7
        for arguments in (once, later):
            assert bool(arguments[0][0][others].isfinite().all())
            averages, squares = state_codes.decode(
                *(arguments[k][0] for k in (1, 2, 3, 0)), state_codes.average_unit(BETAS, scalar(3))
            )
            assert bool(averages.isfinite().all())
            assert bool(squares.isfinite().all())


def test_codes_follow_betas_that_change():
    """As ``OneCycleLR`` changes them: codes are in a unit that betas decide about."""
    moved = {}
    for bits in (8, 32):
        circuit = circuit_of()
        optimizer = MaskAdamW(circuit.mask_parameters(), lr=0.01, state_bits=bits)
        train(circuit, optimizer, steps=40)
        before = [p.detach().clone() for p in circuit.mask_parameters()]
        for beta in (0.85, 0.5, 0.95):
            optimizer.param_groups[0]["betas"] = (beta, 0.999)
            train(circuit, optimizer, steps=2)
        moved[bits] = torch.cat([(p - b).flatten() for p, b in zip(circuit.mask_parameters(), before, strict=True)])
    assert float((moved[8] - moved[32]).norm() / moved[32].norm()) < 0.02


def test_another_second_beta_is_refused():
    circuit = circuit_of()
    optimizer = MaskAdamW(circuit.mask_parameters(), lr=0.01, state_bits=8)
    train(circuit, optimizer, steps=2)
    before = [p.detach().clone() for p in circuit.mask_parameters()]
    optimizer.param_groups[0]["betas"] = (0.9, 0.99)
    with pytest.raises(ValueError, match="state_bits=32"):
        train(circuit, optimizer, steps=1)
    assert all(torch.equal(p, b) for p, b in zip(circuit.mask_parameters(), before, strict=True))


def test_the_range_in_which_small_gradients_train_beside_large_ones():
    """Down to a ten-thousandth of the largest of its block; what is further below moves too slowly."""
    shares = torch.cat([torch.ones(1), torch.full((299,), 1e-4)])
    moved = {}
    for bits in (8, 32):
        logits, weight = torch.zeros(300), torch.ones(300)
        first, second, scales = (
            ([torch.zeros(300)], [torch.zeros(300)], []) if bits == 32 else ([t] for t in state_codes.zeros(logits))
        )
        for step in range(1, 61):
            ops.mask_adamw_([logits], first, second, scales, [weight.clone()], [None], [weight], [shares.clone()],
                            [scalar(1)], [None], [1.0], [scalar(step)], None, scalar(0.01), *BETAS, 1e-12, 0.0,
                            False)  # fmt: skip
        moved[bits] = logits
    assert float((moved[8] - moved[32]).norm() / moved[32].norm()) < 0.03
