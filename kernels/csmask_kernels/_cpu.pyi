from typing import Any

def apply_bitmask(
    weight: Any,
    bits: Any,
    start: int,
    row_step: int,
    col_step: int,
    scale: float,
    out: Any,
    threads: int,
    stream: bool | None = None,
) -> None: ...
def force_instruction_set(name: str) -> None: ...
def instruction_set() -> str: ...
def instruction_sets() -> list[str]: ...
def last_level_cache() -> int: ...
def logits_grad(
    dlogits: Any,
    dmasked_weight: Any,
    weight: Any,
    mask_logits: Any,
    temperature: float,
    dl0: float,
    scale: float,
    add: bool,
    threads: int,
    stream: bool | None = None,
) -> None: ...
def logits_grad_and_mask(
    dlogits: Any,
    dmasked_weight: Any,
    weight: Any,
    mask_logits: Any,
    temperature: float,
    dl0: float,
    scale: float,
    add: bool,
    threads: int,
    stream: bool | None = None,
) -> None: ...
def logits_grad_units(
    dlogits: Any,
    dmasked_weight: Any,
    weight: Any,
    mask_logits: Any,
    dim: int,
    temperature: float,
    dl0: float,
    scale: float,
    add: bool,
    threads: int,
) -> None: ...
def mask_adamw(
    mask_logits: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    state_scales: Any,
    masked_weight: Any,
    dmasked_weight: Any,
    weight: Any,
    grad: Any,
    temperature: float,
    dl0: float,
    scale: float,
    factor: float,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    threads: int,
) -> tuple[float, int, int]: ...
def mask_grad_norm(
    mask_logits: Any,
    dmasked_weight: Any,
    weight: Any,
    grad: Any,
    temperature: float,
    dl0: float,
    scale: float,
    threads: int,
) -> float: ...
def mask_sgd(
    mask_logits: Any,
    momentum_buffer: Any,
    masked_weight: Any,
    dmasked_weight: Any,
    weight: Any,
    grad: Any,
    temperature: float,
    dl0: float,
    scale: float,
    factor: float,
    step: float,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    threads: int,
) -> tuple[float, int, int]: ...
def mask_sums(
    mask_logits: Any, temperature: float, hard: bool, scale: float, counts: bool, threads: int
) -> tuple[float, int, int]: ...
def materialize(
    weight: Any,
    mask_logits: Any,
    temperature: float,
    hard: bool,
    scale: float,
    out: Any,
    counts: bool,
    threads: int,
    stream: bool | None = None,
) -> tuple[float, int, int]: ...
def pack_mask(mask_logits: Any, bits: Any, threads: int) -> None: ...
def philox_(
    out: Any,
    kind: str,
    seed_lo: int,
    seed_hi: int,
    stream: int,
    purpose: int,
    scale: float,
    threads: int,
    first_block: int = 0,
    past_caches: bool | None = None,
) -> None: ...
def popcount(bits: Any, threads: int) -> int: ...
def prefer_huge_pages(address: int, bytes: int) -> None: ...  # noqa: A002
def scale_neurons(
    z: Any,
    mask_logits: Any,
    temperature: float,
    bias: Any,
    hard: bool,
    scale: float,
    dim: int,
    out: Any,
    threads: int,
    stream: bool | None = None,
) -> None: ...
def scale_neurons_grad(
    dout: Any,
    z: Any,
    mask_logits: Any,
    temperature: float,
    dl0: float,
    scale: float,
    dim: int,
    dz: Any,
    dlogits: Any,
    threads: int,
    stream: bool | None = None,
) -> None: ...
def unpack_mask(bits: Any, out: Any, threads: int) -> None: ...
def shares_threads() -> bool: ...
