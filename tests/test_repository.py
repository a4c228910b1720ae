"""The repository keeps its own promises: directions of imports, what a wheel holds, how README begins."""

from __future__ import annotations

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ipc", "broker", "workers")
MAY_IMPORT = {"ipc": {"ipc"}, "broker": {"ipc", "broker"}, "workers": {"ipc", "workers"}}
OPTIONAL = (
    "onnx",
    "onnxruntime",
    "cuda",
    "tensorrt",
    "tensorrt_lean",
    "tensorrt_rtx",
    "ray",
    "psutil",
    "pyarrow",
    "PIL",
    "cv2",
    "torch",
    "nvtx",
)
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def run(*command: str | Path, **env: str) -> str:
    """Run a command, expect it to succeed, and return what it printed."""
    result = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, **env})
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    """The [project] table of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


# --- Imports -------------------------------------------------------------------------------------


def imported_modules(source: str, package: str) -> set[str]:
    """Absolute names that `source`, a module right in `package`, imports anywhere in it.

    A name taken from a package counts as a module of it: ``from trtpool import ipc`` gives ``trtpool.ipc``.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -(node.level - 1) or None] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def violations(source: str, folder: str) -> list[str]:
    """What `source`, a file of `folder`, imports and may not."""
    wrong = []
    for name in sorted(imported_modules(source, f"trtpool.{folder}")):
        head, _, rest = name.partition(".")
        foreign = head == "trtpool" and rest.split(".")[0] in set(PACKAGES) - MAY_IMPORT[folder]
        if foreign or head in PACKAGES:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize(
    ("source", "folder", "wrong"),
    [
        ("from .errors import PoolBusy", "ipc", []),
        ("import trtpool.ipc.errors", "workers", []),
        ("from trtpool.ipc import errors", "broker", []),
        ("from trtpool.broker import core", "ipc", ["trtpool.broker.core"]),
        ("from trtpool import workers", "broker", ["trtpool.workers"]),
        ("def f():\n    from ..workers.loop import main", "broker", ["trtpool.workers.loop.main"]),
        ("from .. import broker", "workers", ["trtpool.broker"]),
        ("import ipc.errors", "workers", ["ipc.errors"]),
        ("from ipc import errors", "ipc", ["ipc.errors"]),
    ],
)
def test_the_import_check_sees_each_way_to_import(source: str, folder: str, wrong: list[str]) -> None:
    assert violations(source, folder) == wrong


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_dependencies_go_one_way(path: Path) -> None:
    assert violations(path.read_text(), path.relative_to(ROOT).parts[0]) == []


@pytest.mark.parametrize("folder", ["tests", "scripts"])
def test_developers_files_import_the_package_by_its_name(folder: str) -> None:
    wrong = {
        name_of(path): bare
        for path in (ROOT / folder).rglob("*.py")
        if (bare := {n for n in imported_modules(path.read_text(), folder) if n.split(".")[0] in PACKAGES})
    }
    assert wrong == {}


# --- What is shipped -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dists(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, and the wheel built from it, of a copy of the tree, by suffix."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    leftovers = shutil.ignore_patterns("__pycache__", "*.egg-info")  # egg-info brings a list of files
    for name in (".src", *PACKAGES):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=leftovers)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree)
    return {path.suffix: path for path in out.iterdir()}


@pytest.fixture(scope="module")
def site(dists: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel, and nothing else, is installed."""
    target = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps")
    run(*pip, "--target", target, dists[".whl"])
    return target


def test_the_wheel_holds_the_package_and_nothing_else(dists: dict[str, Path]) -> None:
    with zipfile.ZipFile(dists[".whl"]) as wheel:
        files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert files == {
        "trtpool/py.typed",
        *(f"trtpool/{path.name}" for path in (ROOT / ".src" / "trtpool").glob("*.py")),
        *(f"trtpool/{name_of(path)}" for path in SOURCES),
    }


def test_the_wheel_names_its_license_and_command(dists: dict[str, Path]) -> None:
    with zipfile.ZipFile(dists[".whl"]) as wheel:
        info = {Path(n).name: wheel.read(n).decode() for n in wheel.namelist() if ".dist-info/" in n}
    assert "License-Expression: Apache-2.0" in info["METADATA"]
    assert "The trtpool authors" in info["LICENSE"]
    entries = configparser.ConfigParser()
    entries.read_string(info["entry_points.txt"])
    assert dict(entries["console_scripts"]) == {"trtpool": "trtpool.broker.cli:main"}


def test_the_sdist_has_no_links(dists: dict[str, Path]) -> None:
    with tarfile.open(dists[".gz"]) as sdist:
        assert [member.name for member in sdist if member.issym() or member.islnk()] == []


def test_every_module_of_the_wheel_imports_without_extras(site: Path) -> None:
    modules = sorted(
        ".".join(("trtpool", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        for path in SOURCES
        if path.name != "__main__.py"
    )
    # An optional package that is installed here must not be needed: importing it is made to fail.
    code = (
        "import importlib, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        f"sys.modules.update(dict.fromkeys({OPTIONAL}))\n"
        "for name in sys.argv[2:]:\n"
        "    assert importlib.import_module(name).__file__.startswith(sys.argv[1]), name\n"
    )
    run(sys.executable, "-I", "-W", "error", "-c", code, site, *modules)


def test_the_installed_command_runs(site: Path) -> None:
    assert "Usage" in run(site / "bin" / "trtpool", "--help", PYTHONPATH=str(site))


# --- pyproject.toml and README -------------------------------------------------------------------


def test_every_requirement_is_well_formed_and_has_a_lower_bound(project: dict[str, Any]) -> None:
    extras: dict[str, list[str]] = project["optional-dependencies"]
    for text in [*project["dependencies"], *(text for extra in extras.values() for text in extra)]:
        requirement = Requirement(text)
        if requirement.name == project["name"]:
            assert requirement.extras <= extras.keys(), f"{text} names an extra that is not there"
            assert not requirement.specifier
        else:
            assert any(spec.operator == ">=" for spec in requirement.specifier), text


def test_the_version_has_an_entry_in_the_changelog(project: dict[str, Any]) -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] in (project["version"], "Unreleased")
    assert project["version"] in headings


def test_readme_begins_with_two_commands_that_exist() -> None:
    block = re.search(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert block, "README.md has no code block"
    commands = [line.removeprefix("$ ") for line in block[1].splitlines() if line and line[0] != "#"]
    assert len(commands) == 2, commands
    for command in commands:
        script = re.search(r"(?:^|\s)(?:\./)?(scripts/[\w.]+)", command)
        assert script, f"{command!r} runs no script of this repository"
        assert os.access(ROOT / script[1], os.X_OK), f"{script[1]} cannot be executed"
