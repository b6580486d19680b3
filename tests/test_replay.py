"""Launches of plans that were made before: what they start is what planning anew would start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from csmask_kernels import launch, replay
from csmask_kernels.launch import Launch

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


class Kernel:
    """Stands in for a kernel of Triton: started by name it "compiles", and what it gives is started by position."""

    arg_names = ("x_ptr", "out_ptr", "partial_ptr", "n", "BLOCK")

    def __init__(self, compiles=True):
        self.compiles = compiles
        self.planned, self.replayed = [], []

    def __getitem__(self, grid):
        def start(**arguments):
            self.planned.append((grid, [arguments[name] for name in self.arg_names]))
            return self.Compiled(self) if self.compiles else None

        return start

    class Compiled:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *arguments: self.kernel.replayed.append((grid, list(arguments)))


class Op:
    """An op of ``out = f(x)`` with partial sums, planned as the kernels' launchers do it."""

    def __init__(self, **kernel):
        self.kernel, self.plans = Kernel(**kernel), 0

    def __call__(self, x, out, *options, copies=False):
        def plan():
            self.plans += 1
            partial = torch.empty(len(x), dtype=torch.int32)
            taken = x.clone() if copies else x
            arguments = {"x_ptr": taken, "out_ptr": out, "partial_ptr": partial, "n": len(x)}
            return [Launch(self.kernel, (len(x),), arguments, {"BLOCK": 8})], (partial, None)

        return replay.launch_planned("op", CPU, (x, None, out), options, plan)


@pytest.fixture(autouse=True)
def forgotten():
    replay.forget()
    yield
    replay.forget()


def new(*shape, **options):
    return torch.empty(*shape, **options)


def test_tensors_alike_are_planned_once_and_each_call_has_its_own():
    op = Op()
    for count in range(3):
        x, out = new(5, 4), new(5)
        partial, none = op(x, out)
        assert op.plans == 1
        assert none is None
        assert (partial.shape, partial.dtype) == ((5,), torch.int32)
        grid, arguments = (op.kernel.planned if count == 0 else op.kernel.replayed)[-1]
        assert (*grid, 1, 1)[:3] == (5, 1, 1)
        assert all(a is b for a, b in zip(arguments, (x, out, partial, 5, 8), strict=True))
    assert len(op.kernel.planned) == 1
    assert len(op.kernel.replayed) == 2


@pytest.mark.parametrize(
    ("x", "out", "options"),
    [
        (new(6, 4), new(5), ()),
        (new(4, 5).t(), new(5), ()),
        (new(5, 4, dtype=torch.float16), new(5), ()),
        (new(5, 4), new(5, dtype=torch.float16), ()),
        (new(5, 4), new(5), (True,)),
        (new(5, 4), new(10)[::2], ()),
        (new(21)[1:].view(5, 4), new(5), ()),
        (new(5, 4), new(6)[1:], ()),
    ],
    ids=["shape", "strides", "dtype", "dtype of out", "options", "strides of out", "address", "address of out"],
)
def test_what_is_not_alike_is_planned(x, out, options):
    op = Op()
    op(new(5, 4), new(5))
    op(x, out, *options)
    assert op.plans == 2
    assert not op.kernel.replayed


def test_tensors_at_odd_addresses_are_planned_each_time_and_leave_no_plan():
    op = Op()
    for _ in range(2):
        op(new(21)[1:].view(5, 4), new(5))
    op(new(5, 4), new(5))
    assert op.plans == 3


@pytest.mark.parametrize("options", [{"copies": True}, {"compiles": False}], ids=str)
def test_a_launch_of_tensors_of_its_own_or_one_that_is_interpreted_is_planned_each_time(options):
    op = Op(compiles=options.get("compiles", True))
    for _ in range(3):
        op(new(5, 4), new(5), copies=options.get("copies", False))
    assert op.plans == 3


def test_one_tensor_given_twice_leaves_no_plan_for_two():
    kernel = Kernel()

    def start(x, out):
        def plan():
            arguments = {"x_ptr": x, "out_ptr": out, "partial_ptr": None, "n": 5}
            return [Launch(kernel, (1,), arguments, {"BLOCK": 8})], ()

        return replay.launch_planned("op", CPU, (x, out), (), plan)

    same = new(5)
    start(same, same)
    x, out = new(5), new(5)
    start(x, out)
    start(x, out)
    start(same, same)
    for grid, arguments in (kernel.planned[1], kernel.replayed[0]):
        assert grid[0] == 1
        assert arguments[0] is x
        assert arguments[1] is out
    assert kernel.replayed[1][1][0] is kernel.replayed[1][1][1] is same


def test_nothing_is_started_where_launches_are_collected():
    op = Op()
    op(new(5, 4), new(5))
    with launch.collecting() as found:
        op(new(5, 4), new(5))
    assert [launched.kernel for launched in found] == [op.kernel]
    assert not op.kernel.replayed
    op(new(5, 4), new(5))
    assert len(op.kernel.replayed) == 1


def test_a_launch_without_programs_is_not_started():
    op = Op()
    for _ in range(2):
        op(new(0, 4), new(0))
    assert op.plans == 1
    assert op.kernel.planned == op.kernel.replayed == []


def test_plans_are_dropped_when_there_are_many(monkeypatch):
    monkeypatch.setattr(replay, "LIMIT", 3)
    op = Op()
    for count in range(1, 6):
        op(new(count, 4), new(count))
    assert len(replay._recipes) <= 3
    op(new(5, 4), new(5))
    assert op.plans == 5


def test_a_replay_enters_the_tensors_device(monkeypatch):
    entered, current = [], [0]

    class Entering:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            entered.append(self.index)
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", Entering)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    kernel = Kernel()

    def start(index):
        x = new(5)
        arguments = {"x_ptr": x, "out_ptr": None, "partial_ptr": None, "n": 5}
        launches = [Launch(kernel, (1,), arguments, {"BLOCK": 8})]
        replay.launch_planned("op", torch.device("cuda", index), (x,), (), lambda: (launches, ()))

    for index in (0, 0, 1, 1):
        start(index)
    assert len(kernel.planned) == len(kernel.replayed) == 2  # a kernel is loaded for one device
    assert entered == [1, 1]
    assert current == [0]


@pytest.mark.parametrize("version", ["newest", "oldest"])
def test_what_ops_replay_is_what_their_plans_start(version, request):
    """In a process without the interpreter: every op that replays, compiled by Triton for a GPU that is not there."""
    triton = [] if version == "newest" else [request.getfixturevalue("triton_36")]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = (*triton, ROOT, ROOT / "kernels", ROOT / "bench", ROOT / "tests")
    env["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "replayed_ops.py")], capture_output=True, text=True, env=env, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    triton_version, *replayed = done.stdout.strip(";").split(";")
    assert triton_version.startswith("3.6.") or version == "newest"
    assert set(replayed) >= {
        "bitmask_linear", "bitmask_linear_dx", "logits_grad", "logits_grad_", "logits_grad neurons", "mask_sums",
        "masked_linear", "masked_linear_dlogits", "masked_linear_dlogits_", "masked_linear_dx", "materialize",
        "materialize one", "scale_neurons", "scale_neurons_grad",
    }  # fmt: skip


def test_a_kernel_that_is_still_being_compiled_is_not_kept():
    class Future:
        def result(self):
            return None

    op = Op()
    op.kernel.Compiled = lambda kernel: Future()
    for _ in range(2):
        op(new(5, 4), new(5))
    assert op.plans == 2
