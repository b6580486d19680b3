"""Writes docs/api.md, the API reference, from the docstrings.

python docs/build_api.py            # writes docs/api.md
python docs/build_api.py --check    # exit status 1 if docs/api.md is not what the docstrings give; writes nothing
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "api.md"
SECTIONS = ("Args", "Attributes", "Returns", "Raises")
# What each module is for is its docstring; of csmask it is the names that it exports.
MODULES = (
    "csmask", "csmask.evaluate", "csmask.trainer", "csmask.distributed", "csmask.schedule", "csmask.functional",
    "csmask.reference", "csmask.testing",
)  # fmt: skip
HIDDEN = {"step_leaf"}  # called by layers that csmask has made, and by nobody else
INTRODUCTION = """# API reference

Written by `python docs/build_api.py` from the docstrings. `W`: frozen weight, `S`: mask logits, `T`: temperature, which
multiplies them.
"""


def public_objects(module: Any) -> list[tuple[str, Any]]:
    """Names that the module exports, or else its own functions and classes in the order of the source."""
    names = getattr(module, "__all__", None)
    if names is not None:
        return [(name, getattr(module, name)) for name in names if not name.startswith("_")]
    exported = {id(value) for _, value in public_objects(importlib.import_module("csmask"))}
    own = [
        (name, value)
        for name, value in vars(module).items()
        if (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
        and not name.startswith("_")
        and not getattr(value, "_is_protocol", False)
        and id(value) not in exported
        and value.__doc__
    ]
    return sorted(own, key=lambda item: inspect.getsourcelines(item[1])[1])


def members(cls: type) -> list[tuple[str, Any]]:
    """Methods and properties that csmask documents, in the order of the source, those of base classes last."""
    found: dict[str, tuple[tuple[int, int], Any]] = {}
    modules = [base.__module__ for base in cls.__mro__]
    for base in cls.__mro__:
        for name, value in vars(base).items():
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if name.startswith("_") or name in found or name in HIDDEN or not inspect.isfunction(function):
                continue
            # torch replaces an optimizer's step() by one that wraps it, in the class of the first instance.
            function = inspect.unwrap(function)
            if function.__doc__ and function.__module__.startswith("csmask"):
                found[name] = (modules.index(function.__module__), function.__code__.co_firstlineno), value
    return [(name, value) for name, (_, value) in sorted(found.items(), key=lambda item: item[1][0])]


def default_of(parameter: inspect.Parameter, owner: Any) -> str:
    if dataclasses.is_dataclass(owner):
        field = {field.name: field for field in dataclasses.fields(owner)}[parameter.name]
        if field.default_factory is not dataclasses.MISSING:
            return repr(field.default_factory())
    return repr(parameter.default)


def signature(name: str, function: Callable, owner: Any = None) -> str:
    """``name(a: int, *, b: str = 'x') -> int``, in one line or with a line for each argument."""
    found = inspect.signature(function)
    parts, keyword_only = [], False
    for parameter in found.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            parts.append("*")
        text = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "") + parameter.name
        keyword_only = keyword_only or parameter.kind is parameter.VAR_POSITIONAL
        if parameter.annotation is not parameter.empty:
            text += f": {parameter.annotation}"
        if parameter.default is not parameter.empty:
            text += f" = {default_of(parameter, owner)}"
        parts.append(text)
    returns = "" if owner is not None or found.return_annotation is found.empty else f" -> {found.return_annotation}"
    line = f"{name}({', '.join(parts)}){returns}"
    return line if len(line) <= 100 else f"{name}(\n    " + ",\n    ".join(parts) + f",\n){returns}"


def inline(text: str) -> str:
    """One line of Markdown: double backticks of docstrings are single ones there."""
    return re.sub(r"``(.+?)``", r"`\1`", " ".join(text.split()))


def blocks_of(lines: list[str]) -> Iterator[list[str]]:
    """Runs of lines between empty ones."""
    block: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line)
        elif block:
            yield block
            block = []


def entries(body: list[str]) -> list[str]:
    """``name: text`` of a section, its continuations joined, as a list."""
    found: list[str] = []
    for line in body:
        if line.startswith(" ") and found:
            found[-1] += " " + line.strip()
        elif line.strip():
            found.append(line)
    items = []
    for entry in found:
        names, colon, text = entry.partition(": ")
        items.append(f"- `{names}`: {inline(text)}" if colon and "`" not in names else f"- {inline(entry)}")
    return items


def terms(block: list[str]) -> list[str]:
    """Lines of which each explains itself in indented ones, as a list."""
    found: list[str] = []
    for line in block:
        if line.startswith(" "):
            found[-1] += " " + line.strip()
        else:
            found.append(f"- {line}:")
    return [inline(item) for item in found]


def markdown(doc: str) -> list[str]:
    """A docstring in Markdown: paragraphs, sections and tables as lists, indented examples as they are."""
    out: list[str] = []
    for block in blocks_of(inspect.cleandoc(doc).splitlines()):
        title = block[0].rstrip(":")
        if title in SECTIONS and block[0].endswith(":"):
            body = textwrap.dedent("\n".join(block[1:])).splitlines()
            out += [f"**{title}**", "", *([inline(" ".join(body))] if title == "Returns" else entries(body)), ""]
        elif block[0].startswith("==="):
            cells = [re.split(r" {2,}", row) for row in block[1:-1]]
            out += [f"- {inline(name)}: {inline(text)}" for name, text in cells]
            out.append("")
        elif any(line.startswith(" ") for line in block[1:]) and not block[0].startswith(" "):
            out += [*terms(block), ""]
        elif block[0].startswith(" "):
            out += ["```text", *textwrap.dedent("\n".join(block)).splitlines(), "```", ""]
        else:
            text = inline(" ".join(block))
            out += [re.sub(r"::$", ":", text), ""]
    return out


def describe(name: str, value: Any, level: int) -> list[str]:
    """Heading, signature and docstring of a function, a property or a class with its members."""
    heading = f"{'#' * level} {name}"
    if isinstance(value, property):
        return [heading, "", *(["Can be set.", ""] if value.fset else []), *markdown(value.__doc__ or ""), ""]
    function = value.__func__ if isinstance(value, classmethod) else value
    short = name.rpartition(".")[2]
    is_class = inspect.isclass(value)
    shown = signature(short, function.__init__ if is_class else function, value if is_class else None)
    lines = [heading, "", "```text", shown, "```", "", *markdown(value.__doc__ or ""), ""]
    if is_class:
        for member, content in members(value):
            lines += describe(f"{short}.{member}", content, level + 1)
    return lines


def reference() -> str:
    """The page."""
    lines = [INTRODUCTION]
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        lines += [f"## {module_name}", "", *markdown(module.__doc__), ""]
        prefix = module_name.removeprefix("csmask").removeprefix(".")
        for name, value in public_objects(module):
            lines += describe(f"{prefix}.{name}" if prefix else name, value, 3)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or check it; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit status 1 if docs/api.md is stale; writes nothing")
    text = reference()
    if not parser.parse_args(arguments).check:
        PAGE.write_text(text)
        return 0
    if PAGE.exists() and PAGE.read_text() == text:
        return 0
    print("docs/api.md is not what the docstrings give: run python docs/build_api.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
