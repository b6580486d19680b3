from typing import Any

def materialize(
    weight: Any,
    mask_logits: Any,
    temperature: float,
    hard: bool,
    scale: float,
    units: int,
    inner: int,
    out: Any,
    threads: int,
) -> float: ...
def instruction_set() -> str: ...
def instruction_sets() -> list[str]: ...
def force_instruction_set(name: str) -> None: ...
