"""docs/: every Python block runs, in order, page by page; tables name what there is; links lead somewhere."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from csmask import CircuitConfig
from csmask.config import ABLATION_MODES, DEFAULT_HPARAMS, EXECUTIONS, MASK_UNITS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# A block in one of these languages is not Python, or cannot run here: on a GPU, in several processes.
OTHER_LANGUAGES = {"text", "console", "json", "diff"}


def blocks(page: Path) -> list[tuple[str, str]]:
    """``(language, content)`` of every fenced block."""
    return FENCE.findall(page.read_text())


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Pages may write files and change what is global."""
    monkeypatch.chdir(tmp_path)
    # What transformers' Trainer would take for one of several processes or a service to report to.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield tmp_path
    torch.compiler.reset()


@pytest.mark.parametrize("page", [p for p in PAGES if any(b[0] == "python" for b in blocks(p))], ids=lambda p: p.stem)
def test_the_python_blocks_of_a_page_run_in_order(page, elsewhere):
    namespace: dict = {"__name__": page.stem}
    for number, (language, content) in enumerate(blocks(page)):
        if language == "python":
            exec(compile(content, f"{page.name}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_block_says_what_it_is(page):
    assert page.read_text().count("```") == 2 * len(blocks(page))
    assert {language for language, _ in blocks(page)} <= OTHER_LANGUAGES | {"python"}


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    text = FENCE.sub("", page.read_text())
    found = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor:
            assert anchor in headings(file), target


def test_the_index_has_every_page():
    index = (DOCS / "README.md").read_text()
    assert set(re.findall(r"\]\((\w+\.md)\)", index)) == {page.name for page in PAGES} - {"README.md"}


def table_defaults(text: str) -> dict[str, str]:
    """First and second cell of the rows of a table that begin with a name in backticks."""
    return dict(re.findall(r"^\| `(\w+)` \| `([^`|]*)` \|", text, re.MULTILINE))


def test_the_configuration_page_names_every_setting_with_its_default():
    text = (DOCS / "configuration.md").read_text()
    fields, _, rest = text.partition("## mask_hparams")
    assert rest
    config = CircuitConfig()
    defaults = {
        field.name: repr(field.default if field.default is not dataclasses.MISSING else field.default_factory())
        for field in dataclasses.fields(config)
    }
    assert table_defaults(fields) == defaults
    hparams = {name: value for name, value in table_defaults(rest.partition("\n## ")[0]).items()}
    assert hparams == {name: repr(value) for name, value in DEFAULT_HPARAMS.items()}
    for choices in (EXECUTIONS, MASK_UNITS):
        assert all(f'"{choice}"' in text for choice in choices)


def test_the_ablations_page_names_every_mode():
    text = (DOCS / "ablations.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == set(ABLATION_MODES)


def test_the_api_reference_is_that_of_the_docstrings():
    command = [sys.executable, str(DOCS / "build_api.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
