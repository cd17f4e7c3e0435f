"""Guards on the house itself: what is packaged, who may import whom, and that every docstring example runs."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Each floor may import those before it, never the other way.
FLOORS = ("noising", "sampling", "training", "callbacks")
NOT_PACKAGED = {"tests", "examples", "benchmarks", "docs", "runs", "build", "dist"}

# What a folder may import beside the standard library: at the head of a module, and only inside functions.
HEAVY = {"torch", "numpy", "lightning", "safetensors", "PIL", "fsspec", "tqdm"}
EXTRAS = {"accelerate", "datasets", "tensorboard", "matplotlib", "jsonargparse"}
EAGER = {"noising": {"torch", "numpy"}, "sampling": {"torch", "numpy"}, "training": HEAVY, "callbacks": HEAVY}
LAZY = {
    "noising": {"scipy"},
    "sampling": {"diffusers", "matplotlib", "torchsde"},
    "training": {"diffusers"} | EXTRAS,
    "callbacks": {"diffusers"} | EXTRAS,
}
DIFFUSERS_MODULES = ("*/*diffusers*.py", "*/*interop*.py", "training/network*.py", "training/loading.py")


def pyproject() -> dict[str, Any]:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # pytest brings tomli on 3.10
    return toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def modules(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# What is packaged


def test_every_code_folder_is_packaged() -> None:
    mapping: dict[str, str] = pyproject()["tool"]["setuptools"]["package-dir"]
    folders = {path.parent.name for path in ROOT.glob("*/*.py") if not path.parent.name.startswith(".")} - NOT_PACKAGED
    assert folders == set(FLOORS)
    assert mapping == {f"alphabar.{folder}": folder for folder in FLOORS}
    assert pyproject()["tool"]["setuptools"]["packages"] == list(mapping)


@pytest.mark.parametrize("folder", FLOORS)
def test_package_is_complete_and_flat(folder: str) -> None:
    assert (ROOT / folder / "__init__.py").is_file()
    assert (ROOT / folder / "py.typed").is_file()
    nested = [name_of(path) for path in modules(folder) if path.parent != ROOT / folder]
    assert not nested, "a nested package is absent from the wheel"


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
    assert always | extras == distributions([line for line in lines if line and not line.startswith("#")])


def test_allowed_imports_are_declared() -> None:
    always, extras = requirements()
    assert {{"PIL": "pillow"}.get(name, name) for name in set().union(*EAGER.values())} <= always
    assert set().union(*LAZY.values()) <= always | extras


@pytest.mark.slow
def test_wheel_holds_the_four_packages_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy: building in the checkout would leave (and take) stale files under build/
    kept = [path for folder in FLOORS for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    kept += [path for path in ROOT.iterdir() if path.is_file()]
    for path in kept:
        if path.is_file():
            copy = source / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(source)], check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("alphabar-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "alphabar = alphabar.training.cli:main" in archive.read(entry_points).decode()
    assert names == {f"alphabar/{name_of(path)}" for path in kept if path.is_file() and path.parent != ROOT}


# Who imports whom


class Import(NamedTuple):
    name: str  # dotted, "" for `from . import x`
    level: int  # dots in front
    lazy: bool  # inside a function, or for type checkers alone
    line: int


def imports(path: Path) -> Iterator[Import]:
    """All imports of a file, `importlib.import_module("literal")` included."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        match node:
            case ast.Import():
                for alias in node.names:
                    yield Import(alias.name, 0, lazy, node.lineno)
            case ast.ImportFrom(module=None):  # from . import x, from .. import noising
                for alias in node.names:
                    yield Import(alias.name, node.level, lazy, node.lineno)
            case ast.ImportFrom():
                yield Import(node.module or "", node.level, lazy, node.lineno)
            case ast.Call(args=[ast.Constant(value=str(name)), *_]) if called(node) in ("import_module", "__import__"):
                yield Import(name, 0, lazy, node.lineno)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                lazy = True
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                for child in node.body:
                    yield from walk(child, True)
                for child in node.orelse:
                    yield from walk(child, lazy)
                return
        for child in ast.iter_child_nodes(node):
            yield from walk(child, lazy)

    yield from walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path)), False)


def called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def offence(path: str, item: Import) -> str | None:
    """What is wrong with an import in a packaged module, or None."""
    folder, top = path.split("/")[0], item.name.split(".")[0]
    if item.level == 1 or (not item.level and top in sys.stdlib_module_names):
        return None
    if item.level:
        below = FLOORS[: FLOORS.index(folder)]
        return None if item.level == 2 and top in below else f"{folder} may import only the floors below it: {below}"
    if top in {"alphabar", *FLOORS}:
        return "inside the packages, imports of siblings are relative"
    if top == "diffusers" and not any(fnmatch(path, pattern) for pattern in DIFFUSERS_MODULES):
        return f"diffusers is for the interop modules alone: {DIFFUSERS_MODULES}"
    if top in EAGER[folder] or (item.lazy and top in LAZY[folder]):
        return None
    return f"{folder} may import {sorted(EAGER[folder])}, and inside functions {sorted(LAZY[folder])}"


@pytest.mark.parametrize("path", modules(*FLOORS), ids=name_of)
def test_import_graph(path: Path) -> None:
    found = [(item, offence(name_of(path), item)) for item in imports(path)]
    assert not [f"{name_of(path)}:{item.line}: {item.name}: {text}" for item, text in found if text]


OFFENCES = [
    ("noising/a.py", "import PIL"),
    ("noising/a.py", "def f():\n    from diffusers import UNet2DModel"),
    ("noising/a.py", "from ..sampling import Sampler"),
    ("noising/a.py", "from .. import sampling"),
    ("sampling/a.py", "from alphabar.noising import NoiseSchedule"),
    ("sampling/a.py", "from noising import NoiseSchedule"),
    ("sampling/a.py", "import lightning"),
    ("sampling/interop.py", "import diffusers"),
    ("sampling/a.py", "def f():\n    import diffusers"),
    ("sampling/a.py", "def f():\n    import importlib\n    importlib.import_module('diffusers.schedulers')"),
    ("sampling/a.py", "from ...alphabar import noising"),
    ("training/a.py", "from ..callbacks import ValidationSampling"),
    ("training/a.py", "try:\n    import datasets\nexcept ImportError:\n    datasets = None"),
    ("training/a.py", "import pytorch_lightning"),
]
ALLOWED = [
    ("noising/a.py", "import math\nimport torch.nn.functional as F\nfrom . import curves\nfrom .curves import Flow"),
    ("sampling/a.py", "from ..noising.schedule import NoiseSchedule\nfrom .. import noising\nimport numpy as np"),
    ("sampling/interop.py", "def f():\n    from diffusers import DDIMScheduler"),
    ("sampling/diffusers_config.py", "if TYPE_CHECKING:\n    from diffusers import DDIMScheduler"),
    ("training/a.py", "from lightning import LightningModule\nfrom ..sampling import Sampler"),
    ("callbacks/a.py", "from ..training import DiffusionModule\ndef f():\n    import matplotlib.pyplot"),
]


@pytest.mark.parametrize(("path", "text", "right"), [(*c, False) for c in OFFENCES] + [(*c, True) for c in ALLOWED])
def test_import_graph_guard_itself(tmp_path: Path, path: str, text: str, right: bool) -> None:
    file = tmp_path / "module.py"
    file.write_text(text, encoding="utf-8")
    assert all(offence(path, item) is None for item in imports(file)) is right


@pytest.mark.parametrize("path", modules("tests", "examples", "benchmarks"), ids=name_of)
def test_tests_and_examples_import_the_installed_package(path: Path) -> None:
    bare = [f"{name_of(path)}:{item.line}: {item.name}" for item in imports(path) if item.name.split(".")[0] in FLOORS]
    assert not bare, "a second copy of every class: import alphabar.<folder>"


def test_importing_alphabar_loads_nothing_heavy() -> None:
    """What the static guard cannot see: a function that is called while a module is imported."""
    code = """
import sys
import alphabar.noising, alphabar.sampling
assert not {"lightning", "diffusers"} & sys.modules.keys()
import alphabar.training, alphabar.callbacks
assert not {"diffusers", "datasets", "accelerate"} & sys.modules.keys()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# Docstrings


def packaged_modules() -> list[str]:
    """Names of all modules, found without importing any: an import error fails its own test only."""
    inside = [pkgutil.walk_packages([str(ROOT / folder)], f"alphabar.{folder}.") for folder in FLOORS]
    return sorted([f"alphabar.{folder}" for folder in FLOORS] + [info.name for found in inside for info in found])


def public_names(folder: str) -> list[str]:
    """The literal `__all__` of a package, read without importing it."""
    file = ROOT / folder / "__init__.py"
    body = ast.parse(file.read_text(encoding="utf-8")).body if file.is_file() else []
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


@pytest.mark.parametrize("name", packaged_modules())
def test_docstring_examples_hold(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)  # examples may write files
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples failed: see the captured output"


@pytest.mark.parametrize("folder", FLOORS)
def test_package_lists_its_public_names(folder: str) -> None:
    names, package = public_names(folder), importlib.import_module(f"alphabar.{folder}")
    assert names, f"{folder}/__init__.py needs a literal __all__"
    assert [name for name in names if not hasattr(package, name)] == []


@pytest.mark.parametrize(("folder", "name"), [(folder, name) for folder in FLOORS for name in public_names(folder)])
def test_public_name_shows_an_example(folder: str, name: str) -> None:
    value = getattr(importlib.import_module(f"alphabar.{folder}"), name)
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        value = type(value)  # a constant or a registry has the docstring of its type
        if not value.__module__.startswith("alphabar."):
            return
    assert ">>>" in (value.__doc__ or ""), f"alphabar.{folder}.{name} has no example in its docstring"


# Hygiene

LEFTOVERS = re.compile("|".join(["/wo" + "rk/", r"\.\./sha" + "red", r"\bTO" + r"DO\b", r"\bFIX" + r"ME\b"]))


def test_no_leftovers() -> None:
    folders = [*FLOORS, "tests", "examples", "benchmarks", "docs", ".ci", ".github"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")] + list(ROOT.iterdir())
    found = []
    for path in files:
        if path.is_file() and not {"__pycache__", ".git"} & set(path.parts):  # .git: a file in a worktree
            lines = path.read_text(encoding="utf-8", errors="ignore").splitlines()
            found += [f"{name_of(path)}:{i}: {line}" for i, line in enumerate(lines, 1) if LEFTOVERS.search(line)]
    assert not found
