"""The import graph of the library, read from the syntax trees: every import counts, deferred ones
and those for type checkers too.
"""

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("noising", "sampling", "training", "callbacks")
"""The four packages; each may import those before it."""


def modules(*folders: str, root: Path = ROOT) -> list[Path]:
    return [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]


def name_of(path: Path, root: Path = ROOT) -> str:
    return path.relative_to(root).as_posix()


def module_name(path: str) -> str:
    """'noising/curves/__init__.py' -> 'noising.curves'"""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


class Import(NamedTuple):
    """One imported name: ``from module import name``; a plain ``import module`` has no name."""

    module: str  # absolute, "noising.curves" for those of the library
    name: str | None
    relative: bool
    lazy: bool  # inside a function, or for type checkers alone
    line: int


def imports(path: str, text: str) -> Iterator[Import]:
    """Yield all imports of a file of this place, ``importlib.import_module("literal")`` included."""
    package = path.split("/")[:-1]

    def absolute(level: int, module: str | None) -> str:
        base = package[: len(package) - level + 1] if level else []
        outside = ["alphabar"] * max(0, level - 1 - len(package))  # further up than the root
        return ".".join(outside + base + ([module] if module else []))

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        match node:
            case ast.Import():
                for alias in node.names:
                    yield Import(alias.name, None, False, lazy, node.lineno)
            case ast.ImportFrom():
                for alias in node.names:
                    yield Import(
                        absolute(node.level, node.module),
                        alias.name,
                        bool(node.level),
                        lazy,
                        node.lineno,
                    )
            case ast.Call(args=[ast.Constant(value=str(name)), *_]) if called(node) in (
                "import_module",
                "__import__",
            ):
                yield Import(name, None, False, lazy, node.lineno)
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

    yield from walk(ast.parse(text, filename=path), False)


def called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


@cache
def library(root: Path = ROOT) -> dict[str, tuple[str, str]]:
    """Return (path, text) of every module of the library, by its name."""
    paths = modules(*FLOORS, root=root)
    return {
        module_name(name_of(path, root)): (name_of(path, root), path.read_text(encoding="utf-8"))
        for path in paths
    }


def source_of(item: Import, known: Iterable[str]) -> str:
    """Return the module that an import takes something from: the name itself where that is a
    module.
    """
    inner = f"{item.module}.{item.name}" if item.module else str(item.name)
    return inner if inner in known else item.module


def graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Return, for every module, the modules of the library that it imports."""
    known = library(root)
    found = {
        name: {source_of(item, known) for item in imports(*file)} & known.keys()
        for name, file in known.items()
    }
    return {name: others - {name} for name, others in found.items()}


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """Return the modules of one cycle, or none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def defined(text: str) -> set[str]:
    """Return the names that a module defines at its top, and those of its literal ``__all__``."""
    names: set[str] = set()

    def collect(body: Iterable[ast.stmt]) -> None:
        for node in body:
            match node:
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                    names.add(node.name)
                case ast.Assign() | ast.AnnAssign():
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    names.update(
                        n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)
                    )
                    if (
                        any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets)
                        and node.value
                    ):
                        names.update(ast.literal_eval(node.value))
                case ast.If() | ast.Try() | ast.For() | ast.With():
                    collect(
                        [
                            child
                            for child in ast.walk(node)
                            if isinstance(child, ast.stmt) and child is not node
                        ]
                    )

    collect(ast.parse(text).body)
    return names


def borrowed(root: Path = ROOT) -> list[str]:
    """Return the names that are taken from a module that merely imports them, as 'path:line:
    module.name'.
    """
    known = library(root)
    names = {module: defined(text) for module, (_, text) in known.items()}
    found: list[str] = []
    for path, text in known.values():
        for item in imports(path, text):
            source = source_of(item, known)
            if (
                item.name
                and source == item.module in known
                and item.name not in names[source] | {"*", "__version__"}
            ):
                found.append(f"{path}:{item.line}: {source}.{item.name}")
    return found
