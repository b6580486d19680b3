"""``csmask plan``: the memory that training masks takes, from a model's shape alone: no weights, no GPU, no network.

The model is built on the meta device, the layers are those that ``CircuitModel`` would mask, and a table says how many
bytes each masked weight needs in each way of training. Activations come on top: they depend on batch and length.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import state_codes
from .surgery import find_targets

GIB = 2**30
GPUS = (24.0, 40.0, 80.0, 141.0)  # GiB: RTX 4090 and A10G, A100, H100, H200
DTYPES = ("bfloat16", "float16", "float32")

# What fixes the shapes, from the ``config.json`` of each model's repository on huggingface.co. The sums of parameters
# are those that the authors publish, see ``tests/test_plan.py``.
BUILT_IN: dict[str, dict[str, Any]] = {
    # meta-llama/Meta-Llama-3-8B; also arXiv 2407.21783, table 3
    "llama-3-8b": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    # Qwen/Qwen2.5-7B; also arXiv 2412.15115, table 1
    "qwen2.5-7b": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 152064, "hidden_size": 3584,
        "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    # EleutherAI/pythia-6.9b; also arXiv 2304.01373, table 1
    "pythia-6.9b": {
        "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "vocab_size": 50432, "hidden_size": 4096,
        "intermediate_size": 16384, "num_hidden_layers": 32, "num_attention_heads": 32, "tie_word_embeddings": False,
    },
    # openai-community/gpt2-xl
    "gpt2-xl": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_positions": 1024,
        "n_embd": 1600, "n_layer": 48, "n_head": 25, "tie_word_embeddings": True,
    },
    # google-bert/bert-base-uncased; also arXiv 1810.04805, section 3
    "bert-base": {
        "model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 30522, "hidden_size": 768,
        "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "tie_word_embeddings": True,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Bytes:
    """Bytes per masked weight at the peak of a training step.

    All but ``transient`` are there for every layer at once; ``transient`` is one layer's at a time.
    """

    weight: float  # W, frozen
    logits: float  # S
    gradient: float  # of the logits, dS, or of the masked weight, dWm
    masked_weight: float  # Wm, kept over the micro-batches of a step
    states: float  # of the optimizer
    saved: float  # for backward
    transient: float

    @property
    def resident(self) -> float:
        return self.weight + self.logits + self.gradient + self.masked_weight + self.states + self.saved


# What each way of training keeps. w: bytes of one weight, 2 or 4; several: whether a step has several micro-batches. In
# all of them S and, but where it says so, the two states of AdamW are fp32, and AdamW is fused: with foreach,
# torch.optim's default on GPUs, a further 4 bytes per weight come and go. On a CPU the figures are checked against what
# is allocated at the peak (``tests/test_plan.py``; the rows "memory" of ``bench/results/cpu.csv``); for a GPU they are
# derived from the tensors that the same code keeps. A new way is a function here and a row of ``WAYS``.
_FP32 = 4
_ADAMW = 2 * _FP32
_ADAMW_8_BITS = 2 + _FP32 / state_codes.BLOCK


def _beside_gradient(saved: float, several: bool) -> float:
    """What saved tensors add to the gradient: with one micro-batch, backward frees them as it makes the gradient."""
    return saved if several else max(saved - _FP32, 0)


def _eager(w: int, several: bool) -> Bytes:
    # Kept all the time: the mask, as an attribute of the layer. Until backward: the masked weight in the dtype of the
    # product, and the mask once more, which the sum for l0 computes again. In transit: the gradients of masked weight,
    # mask and logits, under autocast (16 bits) in both dtypes.
    saved = _FP32 + _beside_gradient(w + _FP32, several)
    return Bytes(w, _FP32, _FP32, 0, _ADAMW, saved, transient=2 * _FP32 + w if w < _FP32 else _FP32)


def _compiled(w: int, several: bool) -> Bytes:
    # Saved: the masked weight; the mask is computed again in backward. In transit: dWm, or dS before it is added.
    return Bytes(w, _FP32, _FP32, 0, _ADAMW, _beside_gradient(w, several), transient=_FP32 if several else w)


def _per_forward(w: int, several: bool) -> Bytes:
    # Wm is kept from a step's first micro-batch to the next step (``keep_masked_weights("never")``: in transit). In
    # transit: dWm and, where there is a dS to add to, the new one; on a CPU blocks of them.
    return Bytes(w, _FP32, _FP32, w, _ADAMW, 0, transient=w + (_FP32 if several else 0))


def _per_step(w: int, several: bool) -> Bytes:
    # No dS: dWm waits for the optimizer, whose pass needs nothing else. In transit, of several micro-batches in 16
    # bits: the first dWm, while it becomes a sum in fp32; a convolution's second one beside it, where a linear layer's
    # product adds to the sum.
    dmasked_weight = _FP32 if several else w
    transient = 2 * w if several and w < _FP32 else 0
    return Bytes(w, _FP32, dmasked_weight, w, _ADAMW, 0, transient)


def _lean(w: int, several: bool) -> Bytes | None:
    # Neither dWm nor Wm but of the layer whose turn it is; a second gradient in one step is refused.
    return None if several else Bytes(w, _FP32, 0, 0, _ADAMW, 0, transient=2 * w)


def _in_8_bits(way: Callable[[int, bool], Bytes | None]) -> Callable[[int, bool], Bytes | None]:
    def needed(w: int, several: bool) -> Bytes | None:
        found = way(w, several)
        return None if found is None else replace(found, states=_ADAMW_8_BITS)

    return needed


# None where a way cannot have several micro-batches.
WAYS: dict[str, Callable[[int, bool], Bytes | None]] = {
    "eager PyTorch (NeuroSurgeon)": _eager,
    "torch.compile": _compiled,
    "per_forward": _per_forward,
    "per_step (MaskAdamW)": _per_step,
    "lean (MaskAdamW, lean=True)": _lean,
    "states in 8 bits (per_step)": _in_8_bits(_per_step),
    "states in 8 bits (lean)": _in_8_bits(_lean),
}
_COLUMNS = ("weight", "logits", "gradient", "masked_weight", "states", "saved", "resident", "transient")
_TITLES = ("W", "S", "dS or dWm", "Wm", "AdamW", "saved", "sum", "transient")


@dataclass(frozen=True)
class Sizes:
    """What a plan needs to know of a model.

    Attributes:
        parameters: all of them, shared ones once.
        masked: weights that get a logit.
        layers: how many layers they are in.
        largest: masked weights of the largest layer.
        itemsize: bytes of one weight.
        rest: bytes of all parameters that are not masked, and of buffers.
    """

    parameters: int
    masked: int
    layers: int
    largest: int
    itemsize: int
    rest: int

    def total(self, needed: Bytes, activations: float = 0.0) -> float:
        """Bytes at the peak of a training step; ``activations`` in bytes."""
        return self.masked * needed.resident + self.largest * needed.transient + self.rest + activations


def load_config(source: str) -> Any:
    """The transformers config of a file, a model folder, or, where there is neither, a built-in name.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is not one.
    """
    from transformers import AutoConfig

    path = Path(source)
    if not path.exists():
        values = BUILT_IN.get(source.lower())
        if values is None:
            raise FileNotFoundError(
                f"there is no file or folder {source!r}, and no built-in model of that name; built-in are: "
                f"{', '.join(BUILT_IN)}"
            )
        return AutoConfig.for_model(**values)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"the folder {source!r} has no config.json")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is not JSON: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise ValueError(f"{str(file)!r} has no model_type: expected the config.json of a transformers model")
    if values.get("quantization_config"):
        raise ValueError(
            f"{str(file)!r} is of a quantised model, and what masks over one take is not counted here: take "
            "quantization_config out to plan for its weights in --dtype"
        )
    try:
        return AutoConfig.from_pretrained(str(file), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a config class raises
        raise ValueError(f"transformers cannot read {str(file)!r}: {_first_line(error)}") from error


def build(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model of a config on the meta device: of the class that it names, else what ``AutoModel`` makes of it.

    Raises:
        ValueError: transformers cannot build it.
    """
    import transformers

    try:
        names = getattr(config, "architectures", None) or [""]
        cls: Any = getattr(transformers, names[0], None)
        is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
        with torch.device("meta"):
            if is_model and isinstance(config, cls.config_class or ()):
                model = cls(config)
            else:
                model = transformers.AutoModel.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever the constructor of a foreign class raises
        message = f"transformers cannot build a {config.model_type!r} from this config: {_first_line(error)}"
        raise ValueError(message) from error
    return model.to(dtype)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def sizes_of(model: nn.Module, target_layers: list[str] | str) -> Sizes:
    """The sizes of a model, on any device, whose ``target_layers`` are to be masked, one logit per weight.

    Raises:
        ValueError, TypeError, NotImplementedError: targets that ``CircuitModel`` refuses, too.
    """
    # A weight that two layers share gets logits in each of them; it is counted twice itself, too.
    weights = [module.get_parameter("weight") for module in find_targets(model, target_layers).values()]
    itemsizes = {weight.element_size() for weight in weights}
    if len(itemsizes) > 1:
        raise ValueError(f"the weights to mask must have one dtype, got items of {sorted(itemsizes)} bytes")
    chosen = {id(weight) for weight in weights}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return Sizes(
        parameters=sum(p.numel() for p in model.parameters()),  # shared ones come once
        masked=sum(w.numel() for w in weights),
        layers=len(weights),
        largest=max(w.numel() for w in weights),
        itemsize=itemsizes.pop(),
        rest=sum(t.nbytes for t in (*rest, *model.buffers())),
    )


def _table(rows: list[list[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def report(sizes: Sizes, gpus: Iterable[float] = GPUS, micro_batches: int = 1, activations: float = 0.0) -> str:
    """The plan as text.

    Args:
        sizes: of the model.
        gpus: memory of GPUs in GiB.
        micro_batches: how many forwards and backwards make a step.
        activations: their GiB, which are added.

    Raises:
        ValueError: a size that is not positive.
    """
    gpus = list(gpus)
    for gpu in gpus:
        _check_size("--gpu", gpu, gpu > 0, "positive")
    _check_size("--activations", activations, activations >= 0, "0 or more")
    if micro_batches < 1:
        raise ValueError(f"--micro-batches must be 1 or more, got {micro_batches}")
    found = {name: way(sizes.itemsize, micro_batches > 1) for name, way in WAYS.items()}
    needs = {name: needed for name, needed in found.items() if needed is not None}
    left_out = [f"{name} has one micro-batch per step." for name in found if name not in needs]
    per_weight = [["bytes per masked weight", *_TITLES]]
    per_weight += [[name, *(f"{getattr(n, column):.4g}" for column in _COLUMNS)] for name, n in needs.items()]
    totals = [["all together", "GiB", *(f"in {gpu:g} GiB" for gpu in gpus)]]
    for name, needed in needs.items():
        total = sizes.total(needed) / GIB + activations
        totals.append([name, f"{total:.1f}", *("fits" if total <= gpu else "does not fit" for gpu in gpus)])
    added = f"{activations:g} GiB for activations" if activations else "nothing for activations (--activations GiB)"
    lines = [
        f"{sizes.parameters:,} parameters, {sizes.masked:,} of them masked, in {sizes.layers} layers of at most "
        f"{sizes.largest:,}",
        f"the rest of the model takes {sizes.rest / GIB:.2f} GiB; micro-batches per step: {micro_batches}",
        "",
        *_table(per_weight),
        "Of every layer at once, but transient: of one layer at a time, at most of the largest.",
        *left_out,
        "",
        *_table(totals),
        "",
        f"In it: masks, the rest of the model, and {added}.",
        "Not in it: the CUDA context and fragments; and the 4 bytes per masked weight that torch.optim.AdamW takes on",
        "GPUs for a moment unless it is fused=True.",
    ]
    return "\n".join(lines)


def _check_size(name: str, size: float, is_right: bool, wanted: str) -> None:
    if not (is_right and math.isfinite(size)):
        raise ValueError(f"{name} must be {wanted} GiB, got {size:g}")


def run_command(
    source: str, targets: list[str], gpus: list[float], micro_batches: int, activations: float, dtype: str
) -> int:
    """The command: prints a plan, or an error in one line; returns the exit status."""
    try:
        if dtype not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        model = build(load_config(source), getattr(torch, dtype))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sizes = sizes_of(model, targets)
        text = report(sizes, gpus, micro_batches, activations)
    except (OSError, ValueError, TypeError, NotImplementedError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    print(f"{source}: {type(model).__name__} in {dtype}; logits and, but for 8 bits, AdamW's states in float32\n{text}")
    return 0
