"""docs/: every Python block runs, in order, page by page; tables name what there is; links lead somewhere."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import csmask
from csmask import CircuitConfig, functional, plan, reference, testing
from csmask.config import ABLATION_MODES, DEFAULT_HPARAMS, EXECUTIONS, MASK_UNITS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# A block in one of these languages is not Python, or cannot run here: on a GPU, in several processes.
OTHER_LANGUAGES = {"", "text", "console", "json", "diff", "bash"}


def blocks(page: Path) -> list[tuple[str, str]]:
    """``(language, content)`` of every fenced block."""
    return FENCE.findall(page.read_text())


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Pages may write files and change what is global."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
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
    hparams = table_defaults(rest.partition("\n## ")[0])
    assert hparams == {name: repr(value) for name, value in DEFAULT_HPARAMS.items()}
    for choices in (EXECUTIONS, MASK_UNITS):
        assert all(f'"{choice}"' in text for choice in choices)


def test_the_ablations_page_names_every_mode():
    text = (DOCS / "ablations.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == set(ABLATION_MODES)


def test_the_plan_of_the_scale_page_is_what_is_computed():
    """Bytes per masked weight, bf16, one micro-batch."""
    names = ("weight", "logits", "gradient", "masked_weight", "states", "saved", "resident")
    expected = {}
    for way, needed in plan.WAYS.items():
        found = needed(2, False)
        expected[way] = [f"{getattr(found, name):.4g}" for name in names]
    text = (DOCS / "training_at_scale.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert {row[0]: row[1:] for row in rows[2:]} == expected


@pytest.fixture(scope="module")
def build_api():
    spec = importlib.util.spec_from_file_location("build_api", DOCS / "build_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_api_reference_is_that_of_the_docstrings():
    """In a process of its own, as CI runs it."""
    command = [sys.executable, str(DOCS / "build_api.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_stale_reference_is_noticed_and_written_anew(build_api, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build_api, "PAGE", tmp_path / "api.md")
    assert build_api.main(["--check"]) == 1
    assert "run python docs/build_api.py" in capsys.readouterr().err
    assert build_api.main([]) == 0
    assert build_api.main(["--check"]) == 0
    assert build_api.PAGE.read_text() == (DOCS / "api.md").read_text()
    monkeypatch.setattr(csmask.CircuitModel.density, "__doc__", "Another meaning.")
    assert build_api.main(["--check"]) == 1


def test_the_reference_names_what_is_public():
    text = (DOCS / "api.md").read_text()
    found = set(re.findall(r"^###+ (\S+)$", text, re.MULTILINE))
    assert {name for name in csmask.__all__ if name != "__version__"} <= found
    for module in (functional, reference, testing):
        stem = module.__name__.partition(".")[2]
        own = {name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
        assert {f"{stem}.{name}" for name in own if not name.startswith("_")} <= found
    methods = {f"CircuitModel.{name}" for name, value in vars(csmask.CircuitModel).items() if callable(value)}
    assert {name for name in methods if "._" not in name} <= found
    # Signatures and what docstrings say of arguments and attributes.
    assert "\n    lr: float | Tensor = 0.001,\n    betas: tuple[float, float] = (0.9, 0.999),\n" in text
    assert "\n- `max_grad_norm`: clip the norm of all gradients to it," in text
    assert "\n- `circuit_config`: the config." in text
