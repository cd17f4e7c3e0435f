"""Guards on the house itself: what is packaged, who may import whom, and that every docstring
example runs.
"""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from import_graph import FLOORS, modules, name_of
from registries import restored
from test_import_graph import EAGER, LAZY

ROOT = Path(__file__).resolve().parent.parent

NOT_PACKAGED = {"tests", "examples", "benchmarks", "docs", "runs", "build", "dist"}


def pyproject() -> dict[str, Any]:
    # pytest brings tomli on 3.10
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


# What is packaged


def test_every_folder_with_code_is_packaged() -> None:
    mapping: dict[str, str] = pyproject()["tool"]["setuptools"]["package-dir"]
    roots = {
        path.parent.name for path in ROOT.glob("*/*.py") if not path.parent.name.startswith(".")
    } - NOT_PACKAGED
    assert roots == set(FLOORS)
    assert mapping == {f"alphabar.{floor}": floor for floor in FLOORS}
    folders = sorted({name_of(path.parent) for path in modules(*FLOORS)})
    assert sorted(pyproject()["tool"]["setuptools"]["packages"]) == [
        "alphabar." + f.replace("/", ".") for f in folders
    ]


@pytest.mark.parametrize("folder", sorted({path.parent for path in modules(*FLOORS)}), ids=name_of)
def test_a_folder_is_a_package_of_at_most_12_files(folder: Path) -> None:
    assert (folder / "__init__.py").is_file()
    assert (folder / "py.typed").is_file() == (folder.parent == ROOT)
    assert len(list(folder.glob("*.py"))) <= 12 or folder.name == "methods"


def test_contributing_shows_every_folder() -> None:
    lines = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
    tree = [line.strip().split()[0].rstrip("/") for line in lines if re.match(r" +\w+/ {2,}", line)]
    assert sorted(tree) == sorted(path.name for path in {path.parent for path in modules(*FLOORS)})


def test_no_code_at_the_root() -> None:
    assert not list(ROOT.glob("*.py")), "alphabar is a namespace package: its root holds no modules"


def distributions(lines: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", line)[0].lower() for line in lines}


def requirements() -> tuple[set[str], set[str]]:
    """What alphabar needs, and what its extras add."""
    project = pyproject()["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return distributions(project["dependencies"]), distributions(extras) - {"alphabar"}


def test_direct_dependencies_are_pinned() -> None:
    always, extras = requirements()
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert always | extras == distributions(
        [line for line in lines if line and not line.startswith("#")]
    )


def test_allowed_imports_are_declared() -> None:
    always, extras = requirements()
    assert {{"PIL": "pillow"}.get(name, name) for name in set().union(*EAGER.values())} <= always
    assert {{"ot": "pot"}.get(name, name) for name in set().union(*LAZY.values())} <= (
        always | extras
    )


@pytest.mark.slow
def test_wheel_holds_the_four_packages_and_nothing_else(tmp_path: Path) -> None:
    # a copy: building in the checkout would leave (and take) stale files under build/
    source = tmp_path / "source"
    kept = [
        path
        for folder in FLOORS
        for path in (ROOT / folder).rglob("*")
        if "__pycache__" not in path.parts
    ]
    kept += [path for path in ROOT.iterdir() if path.is_file()]
    for path in kept:
        if path.is_file():
            copy = source / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    subprocess.run([*build, str(source)], check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("alphabar-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "alphabar = alphabar.training.cli:main" in archive.read(entry_points).decode()
    assert names == {
        f"alphabar/{name_of(path)}" for path in kept if path.is_file() and path.parent != ROOT
    }


GENERATED = {"_build", "gallery", "reference", "pictures"}  # in docs, by make docs


@pytest.mark.slow
def test_sdist_holds_the_sources_and_nothing_that_is_made(tmp_path: Path) -> None:
    source = tmp_path / "source"
    folders = [*FLOORS, "tests", "examples", "benchmarks", "docs"]
    kept = {
        path.relative_to(ROOT).as_posix(): path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not {"__pycache__", "lightning_logs", *GENERATED} & {*path.parts}
    }
    root = {path.name: path for path in ROOT.iterdir() if path.is_file() and path.name[0] != "."}
    for name, path in (kept | root).items():
        copy = source / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    for name in [f"docs/{x}/a.md" for x in GENERATED] + ["runs/a.ckpt", "tests/__pycache__/a.pyc"]:
        (source / name).parent.mkdir(parents=True)
        (source / name).touch()
    build = f"from setuptools.build_meta import build_sdist as b; b({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("alphabar-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    made = {name for name in names if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert names - made == set(kept | root)


# Docstrings


def packaged_modules() -> list[str]:
    """Names of all modules, found without importing any: an import error fails its own test only."""
    inside = [
        pkgutil.walk_packages([str(ROOT / folder)], f"alphabar.{folder}.") for folder in FLOORS
    ]
    return sorted(
        [f"alphabar.{folder}" for folder in FLOORS]
        + [info.name for found in inside for info in found]
    )


def public_names(folder: str) -> list[str]:
    """The literal `__all__` of a package, read without importing it."""
    file = ROOT / folder / "__init__.py"
    body = ast.parse(file.read_text(encoding="utf-8")).body if file.is_file() else []
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


@pytest.mark.parametrize("name", packaged_modules())
def test_docstring_examples_hold(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name.endswith(".triton_kernels"):
        pytest.importorskip("triton", reason="triton is not installed: make test-kernels")
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)  # examples may write files
    with restored():
        result = doctest.testmod(
            module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        )
    assert result.failed == 0, (
        f"{result.failed} of {result.attempted} examples failed: see the captured output"
    )


@pytest.mark.parametrize("folder", FLOORS)
def test_package_lists_its_public_names(folder: str) -> None:
    names, package = public_names(folder), importlib.import_module(f"alphabar.{folder}")
    assert names, f"{folder}/__init__.py needs a literal __all__"
    assert [name for name in names if not hasattr(package, name)] == []


@pytest.mark.parametrize(
    ("folder", "name"), [(folder, name) for folder in FLOORS for name in public_names(folder)]
)
def test_public_name_shows_an_example(folder: str, name: str) -> None:
    value = getattr(importlib.import_module(f"alphabar.{folder}"), name)
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        value = type(value)  # a constant or a registry has the docstring of its type
        if not value.__module__.startswith("alphabar."):
            return
    assert ">>>" in (value.__doc__ or ""), (
        f"alphabar.{folder}.{name} has no example in its docstring"
    )


# Hygiene

LEFTOVERS = re.compile(
    "|".join(["/wo" + "rk/", r"\.\./sha" + "red", r"\bTO" + r"DO\b", r"\bFIX" + r"ME\b"])
)


def test_no_leftovers() -> None:
    folders = [*FLOORS, "tests", "examples", "benchmarks", "docs", ".ci", ".github"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")] + list(
        ROOT.iterdir()
    )
    found = []
    for path in files:
        # .git: a file in a worktree; _build: the site with the code of its theme
        if path.is_file() and not {"__pycache__", ".git", "_build"} & set(path.parts):
            lines = path.read_text(encoding="utf-8", errors="ignore").splitlines()
            found += [
                f"{name_of(path)}:{i}: {line}"
                for i, line in enumerate(lines, 1)
                if LEFTOVERS.search(line)
            ]
    assert not found
