"""``csmask plan``: counts against sums by hand and built models, bytes against tensors and allocations that exist."""

from __future__ import annotations

import csv
import json
import socket
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from csmask import CircuitConfig, CircuitModel, _cpp, cli, plan, products
from csmask.optim import MaskAdamW

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

from memory_meter import measure  # noqa: E402 - bench holds scripts, not a package

LLAMA = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
BERT = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
TINY = {
    "llama": (LlamaForCausalLM, LlamaConfig(**LLAMA)),
    "tied": (LlamaForCausalLM, LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=96, n_positions=16, n_embd=32, n_layer=2, n_head=4)),
    "bert": (BertForMaskedLM, BertConfig(**BERT)),
}


def run(*arguments):
    result = CliRunner().invoke(cli.app, ["plan", *map(str, arguments)])
    assert "Traceback" not in result.output
    return result


def saved(folder, name):
    """A tiny model's config as ``save_pretrained`` of the model writes it, its class among it."""
    cls, config = TINY[name]
    config = type(config).from_dict({**config.to_dict(), "architectures": [cls.__name__]})
    config.save_pretrained(folder)
    return folder / "config.json"


def sizes(name, dtype=torch.bfloat16, targets="all-linear"):
    return plan.sizes_of(plan.build(plan.load_config(str(name)), dtype), targets)


# Counts


def test_llama_3_8b_by_hand():
    hidden, mlp, layers, key_value, vocabulary = 4096, 14336, 32, 8 * 128, 128256
    attention = 2 * hidden * hidden + 2 * hidden * key_value  # q, o; k, v
    masked = layers * (attention + 3 * hidden * mlp)
    rest = 2 * vocabulary * hidden + (2 * layers + 1) * hidden  # embeddings, head; norms
    assert masked == 6_979_321_856
    found = sizes("llama-3-8b")
    assert (found.masked, found.parameters) == (masked, masked + rest)
    assert (found.layers, found.largest, found.itemsize) == (7 * layers, hidden * mlp, 2)
    assert found.rest == pytest.approx(2 * rest, abs=1024)  # and the rotary frequencies


@pytest.mark.parametrize(
    ("name", "parameters", "masked"),
    [
        # the model card: 7.61B, 6.53B of them not embeddings
        ("qwen2.5-7b", 7_615_616_512, 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944)),
        # the README of Pythia's repository: 6,857,302,016 in all
        ("pythia-6.9b", 6_857_302_016, 32 * 12 * 4096**2),
        # 1.5 billion; 50,257 tokens and 1,024 positions, tied head
        ("gpt2-xl", 48 * (12 * 1600**2 + 13 * 1600) + (50257 + 1024 + 2) * 1600, 48 * 12 * 1600**2),
        # 110M; in the head of masked language modelling one linear layer is not the output embedding
        ("bert-base", 109_514_298, 12 * 12 * 768**2 + 768**2),
    ],
)
def test_published_models(name, parameters, masked):
    found = sizes(name)
    assert (found.parameters, found.masked) == (parameters, masked)


@pytest.mark.parametrize("name", TINY)
def test_counts_are_those_of_the_circuit_of_a_model_that_is_built(tmp_path, name):
    cls, config = TINY[name]
    model = cls(config)
    parameters, buffers = sum(p.numel() for p in model.parameters()), sum(b.nbytes for b in model.buffers())
    circuit = CircuitModel(CircuitConfig(target_layers="all-linear"), model)
    logits = [p.numel() for p in circuit.mask_parameters()]
    found = sizes(saved(tmp_path, name), torch.float32)
    assert found == sizes(tmp_path, torch.float32)  # the folder
    assert (found.parameters, found.masked) == (parameters, sum(logits))
    assert (found.layers, found.largest) == (len(logits), max(logits))
    assert found.rest == 4 * (parameters - sum(logits)) + buffers


def test_targets_and_a_class_that_transformers_does_not_have(tmp_path):
    file = saved(tmp_path, "llama")
    assert sizes(file, targets="*.mlp.*").masked == 3 * 3 * 32 * 56
    for names in (["NoSuchModel"], ["BertForMaskedLM"], [], None, ["LlamaConfig"]):
        values = {**json.loads(file.read_text()), "architectures": names}
        file.write_text(json.dumps(values))
        model = plan.build(plan.load_config(str(file)), torch.float16)
        assert type(model).__name__ == "LlamaModel"
        assert {p.dtype for p in model.parameters()} == {torch.float16}
        assert {p.device.type for p in model.parameters()} == {"meta"}


# Bytes


class Row(nn.Sequential):
    """Linear layers in a row whose output holds a loss, so that the circuit adds its l0 to it."""

    def __init__(self, count, size, dtype):
        super().__init__(*(nn.Linear(size, size, bias=False, dtype=dtype) for _ in range(count)))

    def forward(self, x):
        out = super().forward(x)
        return {"loss": out.float().square().mean()}


def trained(count, dtype, execution, size=64):
    """A circuit, and a function that makes a training step of so many micro-batches."""
    """"lean" is that mode of ``MaskAdamW``."""
    lean = execution == "lean"
    config = CircuitConfig(target_layers="all-linear", execution="auto" if lean else execution)
    circuit = CircuitModel(config, Row(count, size, dtype))
    parameters = circuit.mask_parameters()
    waits = lean or execution == "auto"
    optimizer = MaskAdamW(parameters, lean=lean) if waits else torch.optim.AdamW(parameters, fused=True)
    x = torch.randn(2, size).to(dtype)

    def step(micro_batches, update=True):
        for _ in range(micro_batches):
            circuit(x.clone().requires_grad_())["loss"].backward()
        if update:
            optimizer.step()
            optimizer.zero_grad()

    return circuit, optimizer, step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_per_step_keeps_what_is_planned(dtype, micro_batches):
    """W, S, the leaf, AdamW's states after two steps; and the gradients that wait before the third."""
    circuit, optimizer, step = trained(3, dtype, "auto")
    step(micro_batches), step(micro_batches), step(micro_batches, update=False)
    leaves = optimizer.leaves
    masked = sum(leaf.weight.numel() for leaf in leaves)
    found = {
        "weight": [leaf.weight for leaf in leaves],
        "logits": [leaf.mask_logits for leaf in leaves],
        "masked_weight": [leaf.value for leaf in leaves],
        "gradient": [leaf.dmasked_weight for leaf in leaves],
        "states": [t for state in optimizer.state.values() for name, t in state.items() if name != "step"],
    }
    assert len(leaves) == 3
    assert len(optimizer.state) == 3
    planned = plan.WAYS["per_step (MaskAdamW)"](dtype.itemsize, micro_batches > 1)
    for name, tensors in found.items():
        assert sum(t.nbytes for t in tensors) == getattr(planned, name) * masked, name
    assert planned.resident * masked == sum(t.nbytes for tensors in found.values() for t in tensors)
    assert all(layer.masked_weight._kept is None for layer in circuit.masked_layers.values())


@pytest.mark.skipif(_cpp.kernels is None, reason="plain torch has temporaries that the kernels do not have")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("micro_batches", [1, 2, 3])
@pytest.mark.parametrize(("way", "execution"), [
    ("per_forward", "per_forward"), ("per_step (MaskAdamW)", "auto"), ("lean (MaskAdamW, lean=True)", "lean"),
])  # fmt: skip
def test_the_peak_of_a_step_is_what_is_planned(dtype, micro_batches, way, execution):
    """One layer and four tell what every layer holds from what one at a time does."""
    planned = plan.WAYS[way](dtype.itemsize, micro_batches > 1)
    if planned is None:
        assert execution == "lean"
        return
    peaks = {}
    for count in (1, 4):
        _, _, step = trained(count, dtype, execution, 1024)
        step(micro_batches), step(micro_batches)  # and what a thread keeps for all layers is there
        circuit, _, step = trained(count, dtype, execution, 1024)
        weights = sum(p.numel() for p in circuit.mask_parameters())
        before = dtype.itemsize * weights + 4 * weights
        if execution == "auto":
            before += dtype.itemsize * weights  # the leaf, which the optimizer's first forward makes
            circuit(torch.randn(2, 1024).to(dtype))
        usage = measure(torch.device("cpu"), lambda s=step: [s(micro_batches) for _ in range(3)])
        peaks[count] = (before + usage.peak) / weights
    of_all, of_one = (4 * peaks[4] - peaks[1]) / 3, (peaks[1] - peaks[4]) * 4 / 3
    assert of_all == pytest.approx(planned.resident, abs=0.1)  # activations
    # At most: a CPU takes a weight's gradient in blocks, where a GPU has it whole.
    adds_in_blocks = execution == "auto" and micro_batches > 1 and dtype.itemsize == 2
    blocks = 3 * products._BLOCK_BYTES / 1024**2 if adds_in_blocks else 0  # in 16 bits and in fp32
    assert of_one <= planned.transient + blocks + 0.3
    if execution == "lean":
        assert of_one >= planned.transient - 0.3
    if execution == "auto":
        assert of_one >= planned.transient / 2 - 0.3  # these layers are linear


@pytest.mark.parametrize(("provider", "way"), [("eager", "eager PyTorch (NeuroSurgeon)"), ("compile", "torch.compile")])
@pytest.mark.parametrize(("dtype", "itemsize"), [("bf16", 2), ("fp32", 4)])
def test_baselines_are_as_the_benchmark_measured_them(provider, way, dtype, itemsize):
    """Two micro-batches per step."""
    with (BENCH / "results" / "cpu.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if r["mode"] == "memory" and r["metric"] == "peak with AdamW"]
    rows = [r for r in rows if r["time"] == max(other["time"] for other in rows)]  # of the last run
    planned = plan.WAYS[way](itemsize, True)
    for count in (1, 4):
        x = f"{dtype} 16 x 4096 x 4096, {count} layer{'s' if count > 1 else ''}"
        (peak,) = [float(r["value"]) for r in rows if r["provider"] == provider and r["x"] == x]
        assert peak == pytest.approx(planned.resident + planned.transient / count, abs=0.05)


@pytest.mark.parametrize(("several", "bf16", "fp32"), [(False, 24, 28), (True, 28, 32)])
def test_backward_of_one_micro_batch_frees_what_eager_masking_saved(several, bf16, fp32):
    """As measured with NeuroSurgeon 0.1.0: peaks of one layer and of four with one micro-batch and with two."""
    eager = plan.WAYS["eager PyTorch (NeuroSurgeon)"]
    assert (eager(2, several).resident, eager(4, several).resident) == (bf16, fp32)


# The command


def test_the_table_and_what_fits():
    result = run("llama-3-8b", "--gpu", 80, "--gpu", 119.5)
    assert result.exit_code == 0, result.output
    text = result.output
    assert "8,030,261,248 parameters, 6,979,321,856 of them masked, in 224 layers of at most 58,720,256" in text
    rows = {line[:29].strip(): line[29:].split() for line in text.splitlines()}
    per_step = [line.split()[2:] for line in text.splitlines() if line.startswith("per_step")]
    assert per_step[0] == ["2", "4", "2", "2", "8", "0", "18", "0"]
    gib = (6_979_321_856 * 18 + 2 * (8_030_261_248 - 6_979_321_856)) / 2**30
    assert per_step[1] == [f"{gib:.1f}", "does", "not", "fit", "fits"]
    assert set(plan.WAYS) <= set(rows)
    assert "nothing for activations" in text


def test_options_reach_the_plan(tmp_path):
    saved(tmp_path, "gpt2")
    found = sizes(tmp_path, torch.float32, ["*.c_fc", "*.c_proj"])
    result = run(
        tmp_path, "--targets", "*.c_fc", "--targets", "*.c_proj", "--dtype", "float32", "--micro-batches", 2,
        "--activations", 3, "--gpu", 2.5, "--gpu", 3.5,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"{found.masked:,} of them masked, in 6 layers" in result.output
    assert "3 GiB for activations" in result.output
    assert "micro-batches per step: 2" in result.output
    assert "lean (MaskAdamW, lean=True) has one micro-batch per step." in result.output
    per_step = [line.split()[2:] for line in result.output.splitlines() if line.startswith("per_step")]
    assert per_step == [["4", "4", "4", "4", "8", "0", "24", "0"], ["3.0", "does", "not", "fit", "fits"]]


def test_list():
    result = run("--list")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.output.splitlines()] == list(plan.BUILT_IN)
    assert run().exit_code == 2


def test_a_layer_that_is_left_out_is_named(monkeypatch):
    class Left(nn.Linear):
        def forward(self, x):
            return x

    model = nn.Sequential(nn.Linear(4, 4), Left(4, 4)).to("meta")
    monkeypatch.setattr(plan, "build", lambda *_: model)
    result = run("bert-base")
    assert result.exit_code == 0
    assert "warning: not masked: 1 (Left has a forward of its own" in result.output


def test_a_weight_of_another_size_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"one dtype, got items of \[2, 4\] bytes"):
        plan.sizes_of(model, "all-linear")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not JSON", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        ("[1]", "has no model_type"),
        ('{"hidden_size": 8}', "has no model_type"),
        ('{"model_type": 3}', "has no model_type"),
        ('{"model_type": "nothing"}', "transformers cannot read"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "transformers cannot"),
        ('{"model_type": "llama", "quantization_config": {"bits": 4}}', "is of a quantised model"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, text, message):
    file = tmp_path / "config.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = run(file)
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert message in result.output
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/config.json"], "there is no file or folder 'no/such/config.json', and no built-in model"),
        (["bert-base", "--targets", "nothing"], "target layer 'nothing' matches no layer; nearest: "),
        (["bert-base", "--targets", "*.LayerNorm"], "cannot be masked"),
        (["bert-base", "--gpu", "0"], "--gpu must be positive GiB, got 0"),
        (["bert-base", "--gpu", "-3"], "--gpu must be positive GiB, got -3"),
        (["bert-base", "--gpu", "nan"], "--gpu must be positive GiB, got nan"),
        (["bert-base", "--gpu", "inf"], "--gpu must be positive GiB, got inf"),
        (["bert-base", "--activations", "-1"], "--activations must be 0 or more GiB, got -1"),
        (["bert-base", "--micro-batches", "0"], "--micro-batches must be 1 or more, got 0"),
        (["bert-base", "--dtype", "int8"], "--dtype must be one of bfloat16, float16, float32, got 'int8'"),
    ],
)
def test_errors_are_one_line(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert len(result.output.splitlines()) == 1


def test_an_empty_folder(tmp_path):
    assert "has no config.json" in run(tmp_path).output


@pytest.mark.parametrize(("model_type", "status"), [("mine", 1), ("llama", 0)])
def test_nothing_is_fetched_and_no_code_of_a_config_runs(tmp_path, monkeypatch, model_type, status):
    """A config that names code of its own is read as what transformers knows, or refused."""
    asked, mark = [], tmp_path / "ran"
    monkeypatch.setattr(socket.socket, "connect", lambda _socket, address: asked.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: asked.append(address) or [])
    code = {"AutoConfig": "own.Own", "AutoModel": "own.OwnModel"}
    values = {**LLAMA, "model_type": model_type, "auto_map": code}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "own.py").write_text(f"open({str(mark)!r}, 'w')")
    result = run(tmp_path)
    assert result.exit_code == status, result.output
    assert ("transformers cannot read" in result.output) == bool(status)
    assert not asked
    assert not mark.exists()


def test_the_readme_shows_what_is_printed():
    readme = (BENCH.parent / "README.md").read_text()
    shown = readme.partition("$ csmask plan llama-3-8b\n")[2].partition("```")[0]
    lines = [line for line in shown.splitlines() if line not in ("", "...")]
    printed = run("llama-3-8b").output.splitlines()
    assert len(lines) == 19
    assert [line for line in printed if line in lines] == lines
