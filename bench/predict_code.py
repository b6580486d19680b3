"""How often a kernel's machine instructions are executed: NVIDIA's SASS, its loops, and what they count up to."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from csmask_kernels.launch import Launch

_LINE = re.compile(r"^\s*(?P<label>\.L\w+):|^\s+/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?\w+\s+)?(?P<text>[^;]*?)\s*;")
_TARGET = re.compile(r"^BRA\b.*`\((\.L\w+)\)")
# HGMMA: M x N x K of four warps together. HMMA: 16816 is 16 x 8 x 16 of one warp.
_GROUP_PRODUCT = re.compile(r"^HGMMA\.(\d+)x(\d+)x(\d+)\.")
_WARP_PRODUCT = re.compile(r"^HMMA\.(16)(8)(\d+)\.")
_OTHER_PRODUCT = re.compile(r"^(?:UTC\w*MMA|[IDQ]G?MMA|OMMA)\b")
_WARPS_OF_GROUP = 4
_GLOBAL = re.compile(r"^(?:LDG|STG|LDGSTS)\.E(\S*)")
_WRITES = re.compile(r"^(?:STG|RED|ATOMG?|UTMASTG|UTMAREDG|UBLKRED)\b")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its text without the predicate that guards it, and where a branch goes, as an index."""

    text: str
    target: int | None = None
    guarded: bool = False

    @property
    def is_special(self) -> bool:
        """Whether the special-function unit computes it: ex2, rcp, sqrt and the like."""
        return self.text.startswith("MUFU")

    @property
    def flops(self) -> float:
        """Of the matrix product that one warp contributes."""
        for pattern, warps in ((_GROUP_PRODUCT, _WARPS_OF_GROUP), (_WARP_PRODUCT, 1)):
            if found := pattern.match(self.text):
                return 2 * math.prod(map(int, found.groups())) / warps
        if _OTHER_PRODUCT.match(self.text):
            raise NotImplementedError(
                f"expected HGMMA or HMMA, whose sizes are in their names, got {self.text}: teach bench/predict_code.py "
                "how large it is, or choose a device of sm_80 or sm_90"
            )
        return 0.0

    @property
    def accessed(self) -> int:
        """Bytes of global memory that one thread reads or writes."""
        found = _GLOBAL.match(self.text)
        if found is None:
            return 0
        width = re.search(r"\.[US]?(8|16|64|128|256)\b", found[1])
        return int(width[1]) // 8 if width else 4


@dataclass(frozen=True)
class Loop:
    """Instructions from the first to the last, which branches back."""

    first: int
    last: int

    def __contains__(self, index: int) -> bool:
        return self.first <= index <= self.last


@dataclass(frozen=True)
class Product:
    """A launch's matrix product in tiles: flops of one, padding included, and how many the busiest program makes."""

    flops: float
    tiles: int


@dataclass(frozen=True)
class Counts:
    """What one warp of the busiest program executes."""

    instructions: float
    special: float
    flops: float
    trips: tuple[float, ...]  # of each loop, where it is entered


def parse(machine: str) -> list[Instruction]:
    """The instructions that do the work: without NOPs, and without what lies behind the last EXIT, where the code is
    padded and where threads spin while a bulk copy is on its way.
    """
    labels: dict[str, int] = {}
    lines: list[tuple[str, bool]] = []
    for line in machine.splitlines():
        found = _LINE.match(line)
        if found is None:
            continue
        if found["label"]:
            labels[found["label"]] = len(lines)
        elif found["text"] != "NOP":
            lines.append((found["text"], found["guard"] is not None))
    exits = [i for i, (text, guarded) in enumerate(lines) if text == "EXIT" and not guarded]
    if not exits:
        raise ValueError("expected SASS of nvdisasm with an EXIT, got none: was the kernel compiled for NVIDIA?")
    code = []
    for text, guarded in lines[: exits[-1] + 1]:
        if text.startswith(("BRX", "JMP")):
            raise NotImplementedError(f"expected branches within the kernel, got {text}: not counted yet")
        target = _TARGET.match(text)
        code.append(Instruction(text, labels[target[1]] if target else None, guarded))
    return code


def loops_of(code: Sequence[Instruction]) -> list[Loop]:
    """Loops by their branches back, outer ones first; of several branches to one place, the last."""
    ends: dict[int, int] = {}
    for index, instruction in enumerate(code):
        if instruction.target is not None and instruction.target <= index:
            ends[instruction.target] = index
    return sorted((Loop(*ends) for ends in ends.items()), key=lambda loop: (loop.first, -loop.last))


def product_of(launch: Launch) -> Product:
    """The product that a launch of ``masked_linear`` or ``masked_linear_dlogits`` computes."""
    given, constants = launch.arguments, launch.constants
    names = ("R", "C", "M") if "R" in given else ("M", "N", "K")
    blocks = [constants.get(f"BLOCK_{name}") for name in names]
    if not all(name in given for name in names) or None in blocks:
        raise NotImplementedError(f"expected a product of masked_linear's, got {launch.kernel.fn.__name__}")
    splits = constants.get("SPLIT_K", 1)
    rows, columns, steps = (math.ceil(given[name] / block) for name, block in zip(names, blocks, strict=True))
    steps = math.ceil(steps / splits)
    tiles = rows * columns * splits
    return Product(2.0 * math.prod(blocks) * steps, math.ceil(tiles / math.prod(launch.grid)))


def count(machine: str, launch: Launch, moved: float) -> Counts:
    """Count what a warp of the launch executes.

    A loop around matrix instructions goes round as often as the launch's product needs them; where it writes results,
    it makes tile after tile, and what a branch skips in it is passed once for each. Beside such a loop, one without
    matrix instructions stands for an empty sum and is not entered. Other loops go round ``PIECES`` times, or as often
    as their accesses need to move ``moved`` bytes, the launch's. What is passed under a condition counts as passed, but
    for calls of subroutines: divisions make them for numbers that their short form does not take, which are rare.
    """
    code = parse(machine)
    loops = loops_of(code)
    passes = [1.0] * len(code)
    flops = [instruction.flops for instruction in code]
    if any(flops):
        product = product_of(launch)
        trips = _product_trips(loops, flops, product, launch.num_warps)
    else:
        product, trips = None, [_trips(code, loop, launch, moved) for loop in loops]
    for loop, times in zip(loops, trips, strict=True):
        for index in range(loop.first, loop.last + 1):
            passes[index] *= times
        if product is not None and any(_WRITES.match(code[i].text) for i in range(loop.first, loop.last + 1)):
            for index in _skippable(code, loop):
                passes[index] = min(passes[index], float(product.tiles))
    for index in _rare(code):
        passes[index] = 0.0
    return Counts(
        sum(passes),
        sum(times for times, instruction in zip(passes, code, strict=True) if instruction.is_special),
        0.0 if product is None else product.flops * product.tiles / launch.num_warps,
        tuple(trips),
    )


def _product_trips(loops: Sequence[Loop], flops: Sequence[float], product: Product, warps: int) -> list[float]:
    """How often each loop goes round, each time it is entered."""
    around = [loop for loop in loops if any(flops[loop.first : loop.last + 1])]
    outside = sum(f for i, f in enumerate(flops) if not any(i in loop for loop in around))
    wanted = product.flops * product.tiles / warps - outside
    if not around:
        return [0.0] * len(loops)
    inner = min(around, key=lambda loop: loop.last - loop.first)
    if len(around) > 2 or any(inner.first not in loop or inner.last not in loop for loop in around):
        raise NotImplementedError(f"expected one loop with matrix instructions, or one within another, got {around}")
    total = wanted / sum(flops[inner.first : inner.last + 1])
    found = {outer: float(product.tiles) for outer in around if outer != inner}
    found[inner] = total / math.prod(found.values())
    return [found.get(loop, 0.0) for loop in loops]


def _skippable(code: Sequence[Instruction], loop: Loop) -> set[int]:
    """What a forward branch within the loop goes around, but for matrix instructions."""
    found: set[int] = set()
    for part in _branched_around(code):
        if part.start - 1 in loop and part.stop in loop and not any(code[i].flops for i in part):
            found.update(part)
    return found


def _rare(code: Sequence[Instruction]) -> set[int]:
    """What a branch goes around and a subroutine is called in.

    A call that is guarded itself is one instruction: on sm_80, loops are left by them.
    """
    found: set[int] = set()
    for index, instruction in enumerate(code):
        if instruction.text.startswith("CALL") and not instruction.guarded:
            around = [part for part in _branched_around(code) if index in part]
            if not around:
                raise NotImplementedError(f"expected calls under a condition, got {instruction.text}: not counted yet")
            found.update(min(around, key=len))
    return found


def _branched_around(code: Sequence[Instruction]) -> Iterator[range]:
    """What lies between a branch and a place further on that it goes to."""
    for index, instruction in enumerate(code):
        if instruction.target is not None and instruction.target > index:
            yield range(index + 1, instruction.target)


def _trips(code: Sequence[Instruction], loop: Loop, launch: Launch, moved: float) -> float:
    """How often a loop of an elementwise kernel goes round."""
    if "PIECES" in launch.constants:
        return float(launch.constants["PIECES"])
    accessed = sum(code[i].accessed for i in range(loop.first, loop.last + 1))
    threads = 32 * launch.num_warps * math.prod(launch.grid)
    return max(moved / (accessed * threads), 1.0) if accessed else 1.0
