"""The ways to install csmask, each into a fresh environment: wheel, editable, without a compiler, and none at all.

No network: the environments see the packages of the one that runs the tests, the build backend among them, but not its
csmask.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import csmask

ROOT = Path(__file__).resolve().parents[1]
HAVE_COMPILER = shutil.which(os.environ.get("CXX", "c++")) is not None

for _module in ("scikit_build_core", "nanobind", "build"):
    pytest.importorskip(_module, reason=f"{_module} builds the package: pip install -e '.[test]'")
pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs the source tree")
needs_compiler = pytest.mark.skipif(not HAVE_COMPILER, reason="needs a C++ compiler")

# What a user would do first; the answers go back as JSON.
PROBE = """
import importlib.metadata, json, sys
import torch
import csmask, csmask_kernels
from csmask.functional import materialize
try:
    import csmask_kernels._cpu as cpu
    kernels = cpu.__file__
except ImportError:
    kernels = None
weight = torch.tensor([[1.0, -2.0], [float("inf"), 4.0]])
hard, l0 = materialize(weight, torch.tensor([[1.0, -1.0], [0.0, 2.0]]), 1.0, hard=True)
print(json.dumps({
    "csmask": csmask.__file__, "csmask_kernels": csmask_kernels.__file__, "kernels": kernels, "hard": hard.tolist(),
    "l0": l0.item(), "version": csmask.__version__,
    "installed": [str(d.locate_file("")) for d in importlib.metadata.distributions(name="csmask")],
}))
"""


def call(*command, cwd, **environment):
    """Runs a command outside this source tree and returns its output; a failure shows all of it."""
    env = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
    words, env = [str(part) for part in command], {**env, **environment}
    done = subprocess.run(
        words, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, f"{words} gave {done.returncode}\n{done.stdout}"
    return done.stdout


def probe(python, cwd, **environment):
    """The answers of PROBE, after checking those that are the same however csmask got there."""
    answer = json.loads(call(python, "-c", PROBE, cwd=cwd, **environment).splitlines()[-1])
    assert answer["hard"] == [[1.0, 0.0], [0.0, 4.0]]
    assert answer["l0"] == 2.0
    assert answer["version"] == csmask.__version__
    return answer


def make_environment(folder: Path) -> Path:
    """A fresh environment that sees the installed packages of this one, without their .pth files, and so no csmask."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    packages = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site / "packages-of-the-test-run.pth").write_text("\n".join(packages) + "\n")
    return python


def pip(python: Path, *arguments, cwd, **environment):
    return call(
        sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "--no-input", *arguments,
        cwd=cwd, **environment,
    )  # fmt: skip


OFFLINE = ("--no-index", "--no-deps", "--no-build-isolation")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution, built from this tree."""
    folder = tmp_path_factory.mktemp("sdist")
    call(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", folder, ROOT, cwd=folder)
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def source(sdist, tmp_path_factory):
    """The unpacked source distribution: what is installed comes from it, so it must be complete."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / sdist.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def build_folder(tmp_path_factory):
    """Settings that make the builds with a compiler share their object files: the second takes seconds."""
    return ("-C", f"build-dir={tmp_path_factory.mktemp('build')}")


@pytest.fixture(scope="module")
def installed(source, build_folder, tmp_path_factory):
    """(environment, its python, the wheel): a wheel with the C++ kernels, built and installed."""
    folder = tmp_path_factory.mktemp("wheel")
    python = make_environment(folder / "environment")
    pip(python, "wheel", *OFFLINE, *build_folder, "-w", folder / "dist", source, cwd=folder)
    (wheel,) = (folder / "dist").iterdir()
    pip(python, "install", *OFFLINE, wheel, cwd=folder)
    return folder / "environment", python, wheel


def python_files(root: Path) -> set[str]:
    """The Python files of both packages in a tree, as paths in a wheel."""
    found = set()
    for base, package in ((root, "csmask"), (root / "kernels", "csmask_kernels")):
        found |= {path.relative_to(base).as_posix() for path in (base / package).rglob("*.py")}
    return found


def test_sdist_holds_what_a_build_needs(source):
    files = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    assert python_files(source) == python_files(ROOT)
    sources = {f"kernels/cpu/{path.name}" for path in (ROOT / "kernels/cpu").iterdir()}
    assert sources
    assert sources | {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "csmask/py.typed"} <= files
    assert "kernels/__init__.py" not in files
    assert not [name for name in files if name.endswith((".so", ".pyc")) or name.startswith((".venv", "build/"))]


@needs_compiler
def test_wheel_contents(installed):
    names = set(zipfile.ZipFile(installed[2]).namelist())
    assert {name for name in names if name.endswith(".py")} == python_files(ROOT)
    assert [name for name in names if name.startswith("csmask_kernels/_cpu.") and name.endswith(".so")]
    assert "csmask/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "kernels", "csmask_kernels/cpu"))]
    info = f"csmask-{csmask.__version__}.dist-info"
    assert f"{info}/licenses/LICENSE" in names
    metadata = HeaderParser().parsestr(zipfile.ZipFile(installed[2]).read(f"{info}/METADATA").decode())
    assert metadata["Version"] == csmask.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    required = [line.split(";")[0].strip() for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert {"torch>=2.10", "transformers>=5", "triton>=3.6"} <= set(required)


@needs_compiler
def test_wheel_install(installed, tmp_path):
    environment, python, _ = installed
    answer = probe(python, tmp_path)
    assert Path(answer["csmask"]).is_relative_to(environment)
    assert Path(answer["kernels"]).is_relative_to(environment)
    assert Path(answer["installed"][0]).is_relative_to(environment)
    said = call(environment / "bin" / "csmask", "--version", cwd=tmp_path)
    assert said.splitlines()[-1] == csmask.__version__
    assert "C++ kernels" in call(python, "-m", "csmask", "doctor", cwd=tmp_path)


@needs_compiler
def test_editable_install(source, build_folder, tmp_path):
    python = make_environment(tmp_path / "environment")
    pip(python, "install", *OFFLINE, *build_folder, "-e", source, cwd=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in ("", os.pathsep.join([str(source), str(source / "kernels")])):  # also with the bare tree's PYTHONPATH
        answer = probe(python, elsewhere, PYTHONPATH=path)
        assert Path(answer["csmask"]) == source / "csmask" / "__init__.py"
        assert Path(answer["kernels"]).is_relative_to(tmp_path)
        assert Path(answer["installed"][0]).is_relative_to(tmp_path)
    added = source / "csmask" / "added_later.py"
    added.write_text("value = 41 + 1\n")
    assert call(python, "-c", "from csmask.added_later import value; print(value)", cwd=elsewhere).strip() == "42"
    added.unlink()
    assert not list(source.rglob("*.so")), "an editable install leaves the source tree as it was"


def test_install_without_a_compiler(source, tmp_path):
    python = make_environment(tmp_path / "environment")
    missing = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    said = pip(python, "wheel", "-v", *OFFLINE, "-w", tmp_path / "dist", source, cwd=tmp_path, **missing)
    assert "the C++ back end could not be built" in said
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name == f"csmask-{csmask.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if name.endswith(".py")} == python_files(ROOT)
    assert not [name for name in names if name.endswith(".so")]
    pip(python, "install", *OFFLINE, wheel, cwd=tmp_path)
    answer = probe(python, tmp_path)
    assert Path(answer["csmask"]).is_relative_to(tmp_path / "environment")
    assert answer["kernels"] is None
    doctor = call(python, "-m", "csmask", "doctor", cwd=tmp_path)
    assert "the C++ kernels are not there (ModuleNotFoundError: No module named 'csmask_kernels._cpu')" in doctor


def test_bare_tree(source, tmp_path):
    python = make_environment(tmp_path / "environment")
    answer = probe(python, source, PYTHONPATH=f".{os.pathsep}kernels")
    assert Path(answer["csmask"]) == source / "csmask" / "__init__.py"
    assert Path(answer["csmask_kernels"]) == source / "kernels" / "csmask_kernels" / "__init__.py"
    assert answer["kernels"] is None
    said = call(python, "-m", "csmask", "--version", cwd=source, PYTHONPATH=f".{os.pathsep}kernels")
    assert said.splitlines()[-1] == csmask.__version__
