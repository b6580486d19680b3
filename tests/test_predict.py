"""Predicted times: what is counted in machine code, what a multiprocessor holds, and how near measurements that is."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from csmask_kernels.launch import Launch

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))

import compile_report  # noqa: E402 - bench holds scripts, not a package
import predict  # noqa: E402
import predict_code  # noqa: E402
import predict_model  # noqa: E402
from predict_ops import BOTH  # noqa: E402

CSV = BENCH / "results" / "NVIDIA_H200.csv"
H200, A100 = "NVIDIA H200", "NVIDIA A100-SXM4-80GB"
N, K = 14336, 4096


def run_predict(*arguments, triton=None, **environment):
    """The command in a Python that compiles rather than interprets, from the bare tree."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(p) for p in (triton, ROOT, ROOT / "kernels") if p is not None]
    variables.update(environment, PYTHONPATH=os.pathsep.join(path))
    command = [sys.executable, str(BENCH / "predict.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT)


def predicted(directory, *arguments):
    """Rows of a run by op and size, and what it printed."""
    file = directory / "predict.json"
    process = run_predict(*arguments, "--json", file)
    assert process.returncode == 0, process.stderr[-2000:]
    found = json.loads(file.read_text())
    rows = {(row["op"], row["x"]): row for row in found["rows"]}
    return SimpleNamespace(rows=rows, triton=found["triton"], text=process.stdout)


@pytest.fixture(scope="module")
def h200(tmp_path_factory):
    """Every elementwise op at the size that was measured, and products that differ in form."""
    forms = (r"masked_linear(_dlogits_?)? M=(16|8192) N=4096|masked_linear M=128 N=4096|masked_linear_dx M=8192 N=4096|"
             rf"bitmask_linear M=16 N=4096|{re.escape(BOTH)} M=16 N=4096")  # fmt: skip
    return predicted(tmp_path_factory.mktemp("h200"), "--cases", rf"^([^=]* N={N} K={K}|{forms})")


# Machine code


def stand_in(grid=(1,), num_warps=4, arguments=None, **constants):
    kernel = SimpleNamespace(fn=SimpleNamespace(__name__="_kernel"))
    return Launch(kernel, grid, arguments or {}, constants, num_warps)


def sass(*lines):
    """Lines as nvdisasm prints them: those that end with a colon are labels."""
    code = enumerate(line for line in lines if not line.endswith(":"))
    return "\n".join(
        line if line.endswith(":") else "        /*{:04x}*/        {} ;".format(*next(code)) for line in lines
    )


PADDING = (".L_x_9:", "BRA `(.L_x_9)", "NOP", "NOP")
ELEMENTWISE = sass(
    "S2R R0, SR_CTAID.X",
    "MUFU.RCP R1, R0",
    ".L_x_0:",
    "LDG.E.128 R4, desc[UR4][R2.64]",
    "@!P1 LDG.E.U16 R8, desc[UR4][R6.64]",
    "MUFU.EX2 R4, R4",
    "@P2 MUFU.RCP R4, R4",
    "NOP",
    "STG.E.64 desc[UR4][R2.64], R4",
    "@P0 BRA `(.L_x_0)",
    "@P0 EXIT",
    "STG.E desc[UR4][R2.64], R5",
    "EXIT",
    *PADDING,
)


def test_loops_and_special_functions_are_counted_as_often_as_they_run():
    code = predict_code.parse(ELEMENTWISE)
    assert len(code) == 11  # neither the NOPs nor the branch to itself behind the last EXIT
    assert [(loop.first, loop.last) for loop in predict_code.loops_of(code)] == [(2, 7)]
    counts = predict_code.count(ELEMENTWISE, stand_in(PIECES=3), moved=0)
    assert (counts.instructions, counts.special) == (2 + 3 * 6 + 3, 1 + 3 * 2)
    assert (counts.flops, counts.trips) == (0, (3.0,))


def test_a_loop_without_a_known_number_goes_round_until_its_bytes_are_moved():
    assert [i.accessed for i in predict_code.parse(ELEMENTWISE) if i.accessed] == [16, 2, 8, 4]
    launch = stand_in(grid=(5, 2), num_warps=2)
    # 26 bytes of each of 64 threads of 10 programs at each pass
    assert predict_code.count(ELEMENTWISE, launch, moved=26 * 640 * 7).trips == (7.0,)


def test_the_rare_way_of_a_division_is_not_counted():
    body = ("MUFU.RCP R4, R2", "@P0 BRA `(.L_x_1)", "MOV R8, R2", "CALL.REL.NOINC `(.L_x_4)", ".L_x_1:", "EXIT")
    assert predict_code.count(sass(*body, ".L_x_4:", "FFMA R4, R4, R2, R2", *PADDING), stand_in(), 0).instructions == 3
    leaving = ("@!P3 CALL.REL.NOINC `(.L_x_2)", "BRA `(.L_x_1)", ".L_x_2:", "EXIT")  # as sm_80 leaves loops
    counts = predict_code.count(sass(".L_x_1:", "FADD R1, R1, R2", *leaving, *PADDING), stand_in(PIECES=5), 0)
    assert (counts.instructions, counts.trips) == (5 * 3 + 1, (5.0,))
    with pytest.raises(NotImplementedError, match="expected calls under a condition"):
        predict_code.count(sass("CALL.REL.NOINC `(.L_x_4)", "EXIT", ".L_x_4:", *PADDING), stand_in(), 0)


# A program of 8 warps makes tiles of 128 x 128 with steps of 32: two groups of warps, each 64 rows at two depths of 16.
STEP = ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24", "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0")
PERSISTENT = sass(
    "S2R R0, SR_CTAID.X",
    ".L_x_0:",  # one step of one tile
    "@P1 BRA `(.L_x_1)",
    "MUFU.RCP R1, R0",  # where the next tile lies: once per tile
    "IMAD R1, R1, R2, RZ",
    ".L_x_1:",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R14]",
    "@!P0 BRA `(.L_x_5)",
    ".L_x_6:",
    *STEP,
    "@!P2 BRA `(.L_x_2)",
    "STSM.16.M88.4 [R167], R88",
    "UTMASTG.2D [UR28], [UR24]",  # a tile is done
    ".L_x_2:",
    "@P3 BRA `(.L_x_0)",
    "EXIT",
    ".L_x_3:",  # for a sum of nothing
    "STS.128 [R6], RZ",
    "UTMASTG.2D [UR8], [UR6]",
    "@P0 BRA `(.L_x_3)",
    "EXIT",
    ".L_x_5:",  # waits
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R14]",
    "@!P0 BRA `(.L_x_5)",
    "BRA `(.L_x_6)",
    *PADDING,
)


def product(m, n, k, grid, **constants):
    blocks = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}
    return stand_in(grid, 8, {"M": m, "N": n, "K": k}, **{**blocks, **constants})


def test_a_products_loop_goes_round_as_its_flops_ask():
    # 4 x 4 tiles of 10 steps by 8 programs: two tiles each.
    counts = predict_code.count(PERSISTENT, product(500, 512, 320, (8,)), moved=0)
    assert counts.trips == (20.0, 0.0)
    once, per_step, per_tile, empty_sum = 2, 7, 4, 1  # of the loop for an empty sum its EXIT alone
    assert counts.instructions == once + 20 * per_step + 2 * per_tile + empty_sum
    assert counts.special == 2
    assert counts.flops * 8 == 2 * (2 * 128 * 128 * 320)


def test_a_split_sum_takes_its_share_of_the_steps():
    code = sass("S2R R0, SR_CTAID.X", ".L_x_0:", *STEP, "@P3 BRA `(.L_x_0)", "STG.E [R2], R4", "EXIT", *PADDING)
    counts = predict_code.count(code, product(128, 256, 320, (2, 4), SPLIT_K=4), moved=0)
    assert counts.trips == (3.0,)  # of 10 steps, the busiest split has 3
    assert counts.instructions == 1 + 3 * 3 + 2


def test_products_of_warps_are_known_and_others_refused():
    assert predict_code.Instruction("HMMA.16816.F32.BF16 R4, R8, R12, R4").flops == 2 * 16 * 8 * 16
    assert predict_code.Instruction("HMMA.1684.F32.TF32 R4, R8, R12, R4").flops == 2 * 16 * 8 * 4
    with pytest.raises(NotImplementedError, match=r"expected HGMMA or HMMA.*got UTCHMMA"):
        _ = predict_code.Instruction("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8]").flops
    with pytest.raises(ValueError, match="expected SASS"):
        predict_code.parse("v_mfma_f32_16x16x16_bf16 a[0:3]")


def test_bytes_follow_pointers_that_a_loop_carries():
    """Each of the first two is read in a loop, from a pointer that moves along; the third is added to."""
    ir = """
      %left_4 = tt.splat %left_ptr : !tt.ptr<bf16>
      %right_5 = tt.splat %right_ptr : !tt.ptr<bf16>
      %acc:3 = scf.for %k = %c0 to %M step %c64 iter_args(%left_9 = %left_4, %at = %right_5, %acc_7 = %cst) -> (f32) {
        %a = tt.load %left_9, %mask : tensor<64x64x!tt.ptr<bf16>>
        %b = tt.load %at, %mask : tensor<64x64x!tt.ptr<bf16>>
      }
      tt.descriptor_reduce add, %out_desc[%r, %c], %ds : !tt.tensordesc<tensor<128x64xf32>>
    """
    tensors = {
        "left_ptr": torch.empty(3, 5),
        "right_ptr": torch.empty(7),
        "out_desc": torch.empty(11, dtype=torch.half),
    }
    launch = stand_in(arguments={**tensors, "unread_ptr": torch.empty(13)})
    assert compile_report.bytes_of(launch, ir) == 4 * 15 + 4 * 7 + 2 * (2 * 11)


# Occupancy


@pytest.mark.parametrize(
    ("family", "registers", "shared", "warps", "programs"),
    [
        ("sm_90", 32, 0, 8, 8),  # 64 warps by registers
        ("sm_90", 16, 0, 8, 8),  # 64 warps, though registers would do for 128
        ("sm_90", 32, 0, 1, 32),  # no more programs than 32
        ("sm_90", 40, 0, 4, 12),  # 1280 registers of a warp: 12 of each scheduler's 16384
        ("sm_90", 33, 0, 4, 12),  # 1056, of which 256 are given at once: 1280
        ("sm_90", 192, 0, 2, 4),  # 6144: 2 for each, though 65536 would do for 10
        ("sm_90", 128, 0, 4, 4),  # 4096: 4 for each
        ("sm_90", 129, 0, 4, 3),  # 4352: 3 for each
        ("sm_90", 255, 0, 8, 1),  # 8192: 2 for each
        ("sm_90", 168, 0, 8, 1),  # 5376: 3 for each are 12 warps, which are one program of 8
        ("sm_90", 32, 113 << 10, 4, 2),  # 1 KiB of each program is the system's: 2 x 114 are all 228
        ("sm_90", 32, (113 << 10) + 1, 4, 1),
        ("sm_90", 32, 227 << 10, 4, 1),
        ("sm_90", 32, (227 << 10) + 1, 4, 0),
        ("sm_80", 32, 100 << 10, 4, 1),
        ("sm_80", 32, 81 << 10, 4, 2),
    ],
)
def test_programs_at_once(family, registers, shared, warps, programs):
    assert predict_model.RESIDENCY[family].programs_at_once(registers, shared, warps) == programs


# Times


def test_what_is_bound_by_bytes_takes_their_time(h200):
    with CSV.open(newline="") as file:
        (copy,) = [float(r["value"]) for r in csv.DictReader(file)
                   if (r["kernel"], r["provider"], r["metric"]) == ("copy", "kernel", "bandwidth")]  # fmt: skip
    row = h200.rows["logits_grad", f"N={N} K={K}"]
    (launch,) = row["predictions"]
    moved = N * K * (2 + 2 + 4 + 4) + 2 * 4  # dWm, W, S and dS; T and dl0
    assert (launch["bound"], launch["moved"]) == ("bytes", moved)
    # csmask.cost: 7 us beside bytes and arithmetic
    assert row["predicted"] == pytest.approx(moved / (copy * 1e9) + 7e-6, rel=1e-9)


def test_a_soft_mask_is_two_special_functions(h200):
    """ex2 and rcp for each weight, and two numbers more per thread, at 16 per cycle of 132 multiprocessors."""
    (launch,) = h200.rows["materialize", f"N={N} K={K}"]["predictions"]
    per_weight = launch["counts"]["special"] * 32 * launch["num_warps"] * launch["programs"] / (N * K)
    assert per_weight == pytest.approx(2, rel=0.05)
    assert launch["seconds"]["special"] == pytest.approx(per_weight * N * K / (16 * 132 * 1.98e9), rel=0.01)


def test_instructions_are_issued_four_at_a_time(h200):
    (launch,) = h200.rows["philox_ normal", f"N={N} K={K}"]["predictions"]
    assert launch["bound"] == "issue"
    warps = -(-launch["programs"] // 132) * launch["num_warps"]  # of the multiprocessor that has most
    assert launch["seconds"]["issue"] == pytest.approx(launch["counts"]["instructions"] * warps / 4 / 1.98e9)


def test_an_optimizers_launches_and_passes(h200):
    """Of 24 bytes of logits and states and 6 of W, dWm and Wm; besides its two, torch writes the table of a graph."""
    row = h200.rows["mask_adamw_", f"N={N} K={K}"]
    step, _ = row["predictions"]
    assert step["moved"] == pytest.approx(30 * N * K, rel=1e-3)
    assert step["counts"]["trips"] == [step["constants"]["PIECES"]]
    assert row["launches"] == 4
    assert row["predicted"] == pytest.approx(
        sum(max(p["seconds"].values()) for p in row["predictions"]) + 7e-6 + 3 * 1.5e-6
    )


@pytest.mark.parametrize(("op", "m"), [("masked_linear", 16), ("masked_linear", 128), ("bitmask_linear", 16),
                                       ("masked_linear", 8192), ("masked_linear_dx", 8192)])  # fmt: skip
def test_flops_and_blocks_agree_on_the_steps(h200, op, m):
    """The number that follows from the matrix instructions is the one that the kernel's blocks say."""
    launch = h200.rows[op, f"M={m} N=4096 K=4096"]["predictions"][0]
    constants = launch["constants"]
    tiles = -(-m // constants["BLOCK_M"]) * -(-4096 // constants["BLOCK_N"]) * constants.get("SPLIT_K", 1)
    steps = 4096 // constants["BLOCK_K"] // constants.get("SPLIT_K", 1)
    assert max(launch["counts"]["trips"]) == -(-tiles // launch["programs"]) * steps
    padded = 2 * m * 4096 * 4096
    assert launch["counts"]["flops"] * launch["num_warps"] * launch["programs"] >= padded
    assert launch["seconds"]["products"] >= padded / 818.5e12


@pytest.mark.parametrize(("op", "m", "per_weight"), [("masked_linear_dlogits", 16, 2 + 4 + 4),
                                                     ("masked_linear_dlogits_", 16, 2 + 4 + 8),
                                                     ("masked_linear_dlogits_", 8192, 2 + 4 + 8),
                                                     ("masked_linear", 8192, 2 + 4)])  # fmt: skip
def test_products_read_and_write_each_tensor_once(h200, op, m, per_weight):
    (launch,) = h200.rows[op, f"M={m} N=4096 K=4096"]["predictions"]
    assert launch["moved"] == pytest.approx(per_weight * 4096 * 4096 + 2 * 2 * m * 4096, rel=1e-4)


def test_forward_and_backward_are_their_launches(h200):
    names = ("masked_linear", "masked_linear_dlogits")
    both = h200.rows[BOTH, "M=16 N=4096 K=4096"]
    launches = [p["seconds"] for p in both["predictions"]]
    assert len(launches) == 5  # two splits of K are added up
    parts = [p["seconds"] for name in names for p in h200.rows[name, "M=16 N=4096 K=4096"]["predictions"]]
    assert [launches[i] for i in (0, 1, 4)] == parts


# The band: how far one model without constants of any kernel may be from what was measured. The integers of normal
# draws go at half the rate at which instructions are issued, which is not in it.
BAND, BAND_OF_INTEGERS = (0.8, 1.25), (0.5, 1.0)


def elementwise_rows():
    with CSV.open(newline="") as file:
        return [r for r in csv.DictReader(file)
                if (r["provider"], r["mode"], r["metric"]) == ("csmask", "elementwise", "time")]  # fmt: skip


def test_elementwise_kernels_are_predicted_within_a_band(h200):
    measured = {r["kernel"]: float(r["value"]) * 1e-3 for r in elementwise_rows()}
    ratios = {op: row["predicted"] / measured[op] for (op, x), row in h200.rows.items() if x == f"N={N} K={K}"}
    assert len(ratios) == len(measured) >= 18
    outside = {
        op: ratio
        for op, ratio in ratios.items()
        if not (bounds := BAND_OF_INTEGERS if op == "philox_ normal" else BAND)[0] <= ratio <= bounds[1]
    }
    assert not outside
    assert ratios == {op: pytest.approx(h200.rows[op, f"N={N} K={K}"]["ratio"]) for op in ratios}


# What is printed


def test_the_header_says_what_was_measured_when(h200):
    versions = {r["kernel"]: r["version"] for r in elementwise_rows()}
    changed = [op for op, commit in predict.CHANGED if f"commit {commit}," in versions[op]]
    header, rows, summary = h200.text.strip().split("\n\n")
    assert f"predicted, not measured: with Triton {h200.triton} and NVIDIA_H200.json" in header
    for version in versions.values():
        assert any(line.startswith("measured, elementwise") and version in line for line in header.splitlines())
    assert [line.split(": ")[1] for line in header.splitlines() if line.startswith("* changed")] == changed
    assert [line.split("  ")[0] for line in rows.splitlines() if "*" in line] == changed
    assert f"({len(versions) - len(changed)} rows)" in summary.splitlines()[0]


def row(ratio, kind=predict.ELEMENTWISE, changed=""):
    return predict.Row("op", "N=1", kind, 1, ratio, [], 1.0, "commit abc", changed)


def test_the_summary_is_median_and_range_by_kind():
    rows = [row(1.1), row(0.5), row(0.9), row(9.0, changed="all of it"), row(0.25, predict.PRODUCT)]
    assert predict.summary(rows).splitlines() == [
        "predicted / measured, elementwise: median 0.90, 0.50 to 1.10 (3 rows)",
        "predicted / measured, product: median 0.25, 0.25 to 0.25 (1 rows)",
    ]
    assert predict.summary([]) == "nothing of this was measured on this device"


def test_another_device_has_its_own_ceilings(tmp_path):
    found = predicted(tmp_path, "--device", A100, "--cases", "(materialize|mask_sgd_|masked_linear M=16) N=4096")
    assert f"{A100}: copy 1700 GB/s, products 260 TFLOP/s (csmask/cost.py)" in found.text
    assert "sm_80.json" in found.text
    assert "nothing of this was measured on this device" in found.text
    (launch,) = found.rows["materialize", "N=4096 K=4096"]["predictions"]
    assert launch["seconds"]["bytes"] == pytest.approx(launch["moved"] / 1.7e12)
    step = found.rows["mask_sgd_", "N=4096 K=4096"]["predictions"][0]
    assert step["counts"]["trips"] == [step["constants"]["PIECES"]]
    launch = found.rows["masked_linear", "M=16 N=4096 K=4096"]["predictions"][0]
    assert launch["counts"]["trips"][0] == 4096 / launch["constants"]["BLOCK_K"] / launch["constants"]["SPLIT_K"]


def test_the_oldest_triton_counts_the_same_loops(tmp_path):
    directory = Path(os.environ.get("CSMASK_TRITON_36") or Path(sys.prefix) / "triton-3.6")
    if not (directory / "triton").is_dir():
        pytest.skip("no Triton 3.6: `make test` installs it, see tests/test_kernels_compile.py")
    file = tmp_path / "old.json"
    process = run_predict("--cases", "masked_linear M=8192 N=4096|mask_sgd_ N=4096", "--json", file, triton=directory)
    assert process.returncode == 0, process.stderr[-2000:]
    found = json.loads(file.read_text())
    assert found["triton"].startswith("3.6.")
    step, persistent = (one["predictions"][0] for one in found["rows"])
    assert step["counts"]["trips"] == [step["constants"]["PIECES"]]
    assert (
        max(persistent["counts"]["trips"]) == -(-8192 // 256 * 32 // 132) * 4096 // persistent["constants"]["BLOCK_K"]
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--device", "NVIDIA T4"], {}, "expected a device of NVIDIA H200, "),
        (["--cases", "nothing like it"], {}, "no case matches 'nothing like it'"),
        (["--cases", "("], {}, "missing )"),
        ([], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set"),
    ],
)
def test_what_cannot_be_predicted_is_said(arguments, environment, message):
    process = run_predict(*arguments, **environment)
    assert process.returncode == 2
    assert message in process.stderr
    assert "Traceback" not in process.stderr
