"""Every kernel and every shipped config compiled for GPUs that are not there, with the newest and the oldest Triton."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from csmask_kernels import launch as launches
from csmask_kernels.launch import Launch
from triton.tools.tensor_descriptor import TensorDescriptor

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))

import compile_launch  # noqa: E402 - bench holds scripts, not a package
import compile_report  # noqa: E402
import kernel_cases  # noqa: E402

TARGETS = {
    "newest": list(compile_report.targets()),
    "oldest": list(compile_report.TARGETS),
}
VERSIONS = [(version, target) for version, targets in TARGETS.items() for target in targets]


def run_python(*arguments, triton=None, **environment):
    """A Python that compiles rather than interprets, from the bare tree, with the environment's Triton or another."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(p) for p in (triton, ROOT, ROOT / "kernels") if p is not None]
    variables.update(environment, PYTHONPATH=os.pathsep.join(path))
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT)


def report(directory, targets, triton=None):
    """The rows of the report by target, and the process that made them; it runs once per session and version."""
    file = directory / "report.json"
    options = ["--targets", ",".join(targets), "--json", file]
    process = run_python(BENCH / "compile_report.py", *options, triton=triton)
    assert file.is_file(), process.stderr[-2000:]
    found = json.loads(file.read_text())
    rows = {target: [] for target in targets}
    for row in found["rows"]:
        rows[row["target"]].append(compile_report.Row(**row))
    return SimpleNamespace(process=process, triton=found["triton"], rows=rows)


@pytest.fixture(scope="session")
def newest(tmp_path_factory):
    return report(tmp_path_factory.mktemp("newest"), TARGETS["newest"])


@pytest.fixture(scope="session")
def oldest(tmp_path_factory, triton_36):
    return report(tmp_path_factory.mktemp("oldest"), TARGETS["oldest"], triton_36)


@pytest.fixture
def rows(request, version, target):
    return request.getfixturevalue(version).rows[target]


def described(rows):
    """One line for each row, so that a failure names what broke."""
    return "\n".join("  ".join(row.cells()) for row in rows)


compiled = pytest.mark.parametrize(("version", "target"), VERSIONS)


@pytest.mark.slow
@compiled
def test_every_case_compiles_within_its_bounds(rows):
    assert rows
    broken = [row for row in rows if row.broken]
    assert not broken, described(broken)


@pytest.mark.slow
@compiled
def test_nothing_spills(rows):
    spilling = [row for row in rows if row.spills != 0 or row.registers <= 0]
    assert not spilling, described(spilling)


@pytest.mark.slow
@compiled
def test_shared_memory_fits(rows, target):
    limit = compile_launch.SHARED_LIMIT[compile_report.targets()[target].family]
    large = [row for row in rows if not 0 <= row.shared <= limit]
    assert not large, described(large)


@pytest.mark.slow
@compiled
def test_products_use_matrix_instructions(rows):
    without = [row for row in rows if row.gemm and row.matrix < 1]
    assert not without, described(without)
    # That a product is found in the code is not left to the code alone.
    products = ("_masked_linear_fwd", "_masked_linear_persistent", "_masked_linear_dlogits", "_masked_conv")
    unseen = [row for row in rows if row.kernel.startswith(products) and "reduce" not in row.kernel and not row.gemm]
    assert not unseen, described(unseen)


@pytest.mark.slow
@compiled
def test_flat_kernels_move_16_bytes_at_a_time(rows):
    flat = [row for row in rows if row.case.startswith(("materialize soft", "materialize hard", "logits_grad write"))]
    assert len(flat) == 9
    # logits, weight and result; at most the temperature, dl0 and three partial sums are narrower
    narrow = [row for row in flat if row.wide < 3 or row.accesses - row.wide > 4]
    assert not narrow, described(narrow)


@pytest.mark.slow
def test_bytes_per_weight(newest):
    """What the kernels were built to move, per weight with fp32 logits: design.md's counts."""
    expected = {
        "materialize soft torch.bfloat16": 8,  # W and Wm 2 each, S 4
        "materialize soft torch.float32": 12,
        "logits_grad write torch.bfloat16": 12,  # dWm and W 2 each, S and dS 4 each
        "logits_grad add torch.bfloat16": 16,  # dS is read, too
        "mask_sums": 4,
        "mask_adamw_ torch.bfloat16": 30,  # dWm, W and Wm 2 each, S and both states 8 each
        "mask_adamw_ accumulated": 36,  # dWm and the gradient so far 4 each
        "mask_sgd_ torch.bfloat16": 22,
        "mask_grad_norms torch.bfloat16": 8,
    }
    for target in TARGETS["newest"]:
        found = {row.case: row.bytes_per_element for row in newest.rows[target] if row.case in expected}
        assert found == pytest.approx(expected, abs=0.05), target


@pytest.mark.slow
@pytest.mark.parametrize("version", TARGETS)
def test_the_report_prints_its_table_and_nothing_else(request, version):
    run = request.getfixturevalue(version)
    header, *lines = run.process.stdout.splitlines()
    assert header.split() == compile_report.HEADER
    assert len([line for line in lines if line]) == sum(map(len, run.rows.values())) + 1
    assert f"compiled with Triton {run.triton}" in lines[-1]
    assert run.process.returncode == int(any(row.broken for rows in run.rows.values() for row in rows))
    assert run.process.stderr == ""


@pytest.mark.slow
def test_the_oldest_triton_is_3_6(oldest):
    assert oldest.triton.startswith("3.6.")


@pytest.mark.filterwarnings("ignore:no launch configs measured")
@pytest.mark.parametrize("target", TARGETS["newest"])
def test_every_shipped_config_is_compiled(monkeypatch, target):
    """Each row of each table is what some case's plan chose."""
    table = launches.config_table(compile_report.targets()[target])
    reached = set()

    class Watched(dict):
        """A row that knows when it is turned into a config."""

        def items(self):
            reached.add(self.name)
            return super().items()

    watched = {op: [Watched(row) for row in rows] for op, rows in table.items()}
    for op, rows in watched.items():
        for index, row in enumerate(rows):
            row.name = (op, index, row["m"])
    monkeypatch.setattr(launches, "config_table", lambda target: watched)
    for module in list(sys.modules.values()):  # planners that look at the table themselves see the watched one
        if getattr(module, "config_table", None) is not None and module is not launches:
            monkeypatch.setattr(module, "config_table", lambda target: watched)
    launches.get_config.cache_clear()
    list(kernel_cases.cases(compile_report.targets()[target]))
    launches.get_config.cache_clear()
    missed = {row.name for rows in watched.values() for row in rows} - reached
    assert not missed, f"no case of bench/kernel_cases.py has the config of {sorted(missed)}"


def test_interpreter_is_refused():
    process = run_python(BENCH / "compile_report.py", TRITON_INTERPRET="1")
    assert process.returncode == 2
    assert "TRITON_INTERPRET is set" in process.stderr


def test_unknown_targets_are_refused():
    process = run_python(BENCH / "compile_report.py", "--targets", "sm_90,sm_1")
    assert process.returncode == 2
    assert "got sm_1" in process.stderr


# Kernels that break one bound each, and one that breaks none, in place of bench/kernel_cases.py.
BROKEN_CASES = """
    import torch
    import triton
    import triton.language as tl
    from csmask_kernels.launch import Launch

    Case = tuple[str, Launch]

    @triton.jit
    def _copy_kernel(x_ptr, out_ptr, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
        offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out_ptr + offs, tl.load(x_ptr + offs + SHIFT))

    @triton.jit
    def _spilling_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
        offs = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs)
        tl.store(out_ptr + offs, x / tl.sum(x))  # all of x is held across the sum

    @triton.jit
    def _product_kernel(x_ptr, out_ptr, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
        offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        x = tl.load(x_ptr + offs)
        tl.store(out_ptr + offs, tl.dot(x, x, input_precision=PRECISION))

    @triton.jit
    def _impossible_kernel(x_ptr, BLOCK: tl.constexpr):
        tl.static_assert(BLOCK < 8)

    def cases(target):
        x = torch.empty(1 << 20, device="meta")
        square = torch.empty(64, 64, device="meta")
        small = torch.empty(1 << 16, device="meta")
        grid = (1024,)
        yield "good copy", Launch(_copy_kernel, grid, {"x_ptr": x, "out_ptr": x}, {"SHIFT": 0, "BLOCK": 1024})
        yield "narrow copy", Launch(_copy_kernel, grid, {"x_ptr": x, "out_ptr": x}, {"SHIFT": 1, "BLOCK": 1024})
        yield "spilling", Launch(_spilling_kernel, (1,), {"x_ptr": small, "out_ptr": small}, {"BLOCK": 1 << 16}, 1)
        for precision in ("tf32", "ieee"):
            constants = {"PRECISION": precision, "BLOCK": 64}
            yield f"product {precision}", Launch(_product_kernel, (1,), {"x_ptr": square, "out_ptr": square}, constants)
        constants = {"PRECISION": "tf32", "BLOCK": 256}
        square = torch.empty(256, 256, device="meta")
        yield "large product", Launch(_product_kernel, (1,), {"x_ptr": square, "out_ptr": square}, constants, 8)
        yield "impossible", Launch(_impossible_kernel, (1,), {"x_ptr": x}, {"BLOCK": 8})
"""


@pytest.fixture(scope="module")
def controls(tmp_path_factory):
    directory = tmp_path_factory.mktemp("controls")
    (directory / "kernel_cases.py").write_text(textwrap.dedent(BROKEN_CASES))
    file = directory / "report.json"
    path = [str(directory), str(BENCH)]
    code = f"import sys; sys.path[:0] = {path}; import compile_report; sys.exit(compile_report.main())"
    process = run_python("-c", code, "--targets", "sm_90", "--json", file)
    assert process.returncode == 1, process.stderr
    assert process.stdout.splitlines()[-1].endswith("bounds broken: 5")
    return {row["case"]: row for row in json.loads(file.read_text())["rows"]}


def test_the_report_lets_good_kernels_pass(controls):
    assert controls["good copy"]["broken"] == controls["product tf32"]["broken"] == []
    assert controls["good copy"]["bytes_per_element"] == 8
    assert controls["good copy"]["wide"] == controls["good copy"]["accesses"] == 4
    assert controls["product tf32"]["matrix"] > 0


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("narrow copy", "2 large tensors, but only 2 of"),
        ("spilling", "spills "),
        ("product ieee", "no matrix instructions"),
        ("large product", "shared memory 524288 > 232448"),
        ("impossible", "does not compile (CompileTimeAssertionFailure"),
    ],
)
def test_the_report_finds_broken_bounds(controls, case, message):
    assert any(message in broken for broken in controls[case]["broken"]), controls[case]


def stand_in(*names):
    return SimpleNamespace(arg_names=[*names, "BLOCK"])


def test_signature_is_what_tritons_launcher_would_specialise():
    half = torch.empty(64, 64, dtype=torch.float16)
    arguments = {
        "none": None, "one": 1, "seven": 7, "stride": 4096, "zero": 0, "large": 2**31, "least": -(2**31), "scale": 0.5,
        "unit_scale": 1.0, "aligned": half, "unaligned": half[:, 1:], "words": torch.empty(3, dtype=torch.int64),
        "flags": torch.empty(3, dtype=torch.bool), "wide": torch.empty(2, dtype=torch.float64),
        "tiles": TensorDescriptor(half, [64, 64], [64, 1], [16, 32]),
    }  # fmt: skip
    names = list(arguments)
    types, constants, attributes = compile_launch.signature(
        Launch(stand_in(*names), (1,), arguments, {"BLOCK": 128}), "cuda"
    )
    assert types == {
        "none": "constexpr", "one": "constexpr", "seven": "i32", "stride": "i32", "zero": "i32", "large": "i64",
        "least": "i32", "scale": "fp32", "unit_scale": "fp32", "aligned": "*fp16", "unaligned": "*fp16",
        "words": "*i64", "flags": "*i1", "wide": "*fp64", "tiles": "tensordesc<fp16[16, 32]>", "BLOCK": "constexpr",
    }  # fmt: skip
    assert list(types) == [*names, "BLOCK"]
    assert constants == {"none": None, "one": 1, "BLOCK": 128}
    by_16 = {names.index(n) for n in ("stride", "zero", "large", "least", "aligned", "words", "flags", "wide")}
    assert attributes == {(i,): [["tt.divisibility", 16]] for i in by_16}


def test_signature_tells_amd_where_32_bit_offsets_reach():
    small = torch.empty(2**29 - 1, device="meta")
    arguments = {"small": small, "unaligned": small[1:], "large": torch.empty(2**29, device="meta")}
    launch = Launch(stand_in(*arguments), (1,), arguments, {"BLOCK": 128})
    divisible, reached = ["tt.divisibility", 16], ["tt.pointer_range", 32]
    assert compile_launch.signature(launch, "hip")[2] == {
        (0,): [divisible, reached],
        (1,): [reached],
        (2,): [divisible],
    }


def test_signature_refuses_what_no_kernel_takes():
    with pytest.raises(TypeError, match="name: a kernel cannot take a str"):
        compile_launch.signature(Launch(stand_in("name"), (1,), {"name": "x"}, {"BLOCK": 128}))


@pytest.mark.slow
def test_the_oldest_tritons_interpreter_agrees(triton_36):
    """A part of the elementwise kernels' tests, under Triton 3.6."""
    code = (
        "import sys, triton, pytest; assert triton.__version__.startswith('3.6.'), triton.__version__; "
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    chosen = "test_hard_mask_selects or test_repeats_bitwise or (test_logits_grad and 1.0-1.0-dl0)"
    options = ["-q", "-p", "no:cacheprovider", "tests/test_elementwise_kernels.py", "-k", chosen]
    process = run_python("-c", code, *options, triton=triton_36, TRITON_INTERPRET="1")
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-2000:]
    assert " passed" in process.stdout
