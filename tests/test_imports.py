"""The import rule (downwards only), read from the source; and what importing csmask loads and costs."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import csmask

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(csmask.__file__).resolve().parent
KERNELS = ROOT / "kernels"

# From the bottom up: a module imports only modules of lower levels.
LEVELS = [
    {"config", "first_derivative", "forward_hooks", "l0_rider", "philox", "products", "quantised", "reference"},
    {"shards", "signature", "state_codes"},
    {"_plain", "_plain_step"},
    {"_cpp"},
    {"_cpp_linear", "_cpp_step", "_cpp_units", "transients"},
    {"_ops"},
    {"masked_weight"},
    {"mask_sum"},
    # ablation lies below layers, whose forward uses it
    {"ablation", "autograd", "cost", "density", "masked_leaf"},
    {"leaf_group", "lean", "sharded_op"},
    {"functional", "layer_masks", "leaf_linear"},
    {"ablated_weights"},
    {"masked_layer", "quantised_base"},
    {"l0_total", "layers", "mask_optimizer", "schedule", "testing", "recompute", "loss"},
    {"surgery"},
    {"checkpoint"},
    {"state"},
    {"circuit"},
    {"distributed", "evaluate", "trainer", "optim"},
    {"demo", "plan"},
    {"cli"},
    {"__main__"},
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}


def modules(package: Path) -> list[Path]:
    return sorted(p for p in package.rglob("*.py") if "__pycache__" not in p.parts)


def stem(path: Path, package: Path) -> str:
    """The module directly below the package that a file belongs to: ``demo`` for ``demo/wordnet.py``."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def imports(path: Path, package: Path) -> list[tuple[str, str, bool]]:
    """(absolute module, imported name or "", under TYPE_CHECKING) of every import statement, at any depth."""
    parts = [package.name, *path.relative_to(package).parts[:-1]]
    found = []

    def visit(node: ast.AST, typing_only: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                visit(child, True)
            for child in node.orelse:
                visit(child, typing_only)
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, "", typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.extend((module, alias.name, typing_only) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, typing_only)

    visit(ast.parse(path.read_text()), False)
    return found


def internal(path: Path, typing_too: bool = False) -> set[str]:
    """Stems of the csmask modules that a csmask file imports."""
    stems = set()
    for module, name, typing_only in imports(path, PACKAGE):
        if module.split(".")[0] != "csmask" or (typing_only and not typing_too):
            continue
        target = [*module.split(".")[1:], name]
        if target[0] in LEVEL_OF:
            stems.add(target[0])
        elif name != "__version__":
            stems.add("__init__")
    return stems


def test_every_module_has_a_level():
    assert {stem(path, PACKAGE) for path in modules(PACKAGE)} - {"__init__"} <= set(LEVEL_OF)


def test_imports_go_down_only():
    wrong = [
        f"{stem(path, PACKAGE)} imports {target}"
        for path in modules(PACKAGE)
        if stem(path, PACKAGE) != "__init__"
        for target in internal(path) - {stem(path, PACKAGE)}
        if target != "__init__" and LEVEL_OF[target] >= LEVEL_OF[stem(path, PACKAGE)]
    ]
    assert wrong == []


def test_no_module_below_the_command_imports_the_package_itself():
    """``from csmask import CircuitModel`` inside csmask would be a circle."""
    users = {stem(path, PACKAGE) for path in modules(PACKAGE) if "__init__" in internal(path)}
    assert users <= {"cli", "demo", "__main__"}


def test_kernels_never_import_csmask():
    files = modules(KERNELS)
    assert files
    for path in files:
        assert not {m.split(".")[0] for m, _, _ in imports(path, KERNELS)} & {"csmask"}, path


def test_kernels_is_a_source_root_and_not_a_package():
    """A package of that name would hide the one that transformers imports."""
    assert KERNELS.is_dir()
    assert not (KERNELS / "__init__.py").exists()


def test_only_the_back_ends_of_ops_import_kernels():
    users = {
        stem(path, PACKAGE)
        for path in modules(PACKAGE)
        if any(m.split(".")[0] == "csmask_kernels" for m, _, _ in imports(path, PACKAGE))
        or 'import_module("csmask_kernels' in path.read_text()
    }
    assert users == {"_ops", "_cpp"}


def test_heavy_packages_are_not_imported_at_module_level():
    heavy = {
        "triton",
        "transformers",
        "matplotlib",
        "sklearn",
        "nltk",
        "typer",
        "tqdm",
        "safetensors",
        "csmask_kernels",
    }
    library = LEVEL_OF.keys() - {"cli", "demo", "__main__", "trainer"}
    for path in modules(PACKAGE):
        if stem(path, PACKAGE) not in library:
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                assert not {a.name.split(".")[0] for a in node.names} & heavy, path
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] not in heavy, path


def run(code: str) -> dict:
    paths = os.pathsep.join([str(PACKAGE.parent), str(KERNELS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_csmask_loads_neither_triton_nor_transformers():
    """Nor anything else that is not needed before the first call; torch itself is the control."""
    loaded = run(
        "import json, sys\n"
        "import torch\n"
        "before = set(sys.modules)\n"
        "import csmask\n"
        "print(json.dumps({'new': sorted(set(sys.modules) - before), 'all': sorted(sys.modules)}))"
    )
    tops = {name.split(".")[0] for name in loaded["all"]}
    assert "csmask" in tops
    assert not tops & {"triton", "transformers", "safetensors", "matplotlib", "sklearn", "typer", "nltk"}
    new = {name.split(".")[0] for name in loaded["new"]}
    assert new <= {"csmask", "csmask_kernels"} | set(sys.stdlib_module_names) | {"torch"}


def test_importing_csmask_takes_less_than_300_ms_beyond_torch():
    code = (
        "import json, time\n"
        "import torch\n"
        "start = time.perf_counter()\n"
        "import csmask\n"
        "print(json.dumps({'seconds': time.perf_counter() - start}))"
    )
    best = min(run(code)["seconds"] for _ in range(3))
    assert best < 0.3


@pytest.mark.parametrize("source", ["from .circuit import CircuitModel", "def f():\n    from . import surgery"])
def test_the_rule_finds_an_import_that_goes_up(tmp_path, source):
    """The control of the tests above."""
    package = tmp_path / "csmask"
    package.mkdir()
    (package / "layers.py").write_text(source)
    ((module, name, typing_only),) = imports(package / "layers.py", package)
    target = [*module.split(".")[1:], name][0]
    assert not typing_only
    assert LEVEL_OF[target] > LEVEL_OF["layers"]
