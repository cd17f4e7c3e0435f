"""Generate the reference: a page for every public name, from the lists ``__all__``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGES = {
    "alphabar.noising": "Schedules, noising, weights, densities, noise and losses.",
    "alphabar.sampling": "Samplers, methods and grids.",
    "alphabar.training": "Previews, averages, flags, checkpoints and the Lightning module.",
    "alphabar.callbacks": "Callbacks of Lightning.",
}


def public_names(package: str) -> list[str]:
    """Return the public names of a package, in alphabetical order without regard to case."""
    return sorted(importlib.import_module(package).__all__, key=str.lower)


def summary(package: str, name: str) -> str:
    """Return the first line of the documentation of a public name.

    Raises:
        ValueError: the name has no documentation.
    """
    value = getattr(importlib.import_module(package), name)
    if not _documented(value):
        return f"The names: {', '.join(value)}." if isinstance(value, Mapping) else f"`{value}`"
    text = inspect.getdoc(value)
    if not text:
        raise ValueError(f"{package}.{name} has no docstring; write one")
    return text.splitlines()[0]


def place(package: str, name: str) -> str:
    """Return the full name of a public name where it is defined, for example ``a.b.c.Sampler``."""
    value = getattr(importlib.import_module(package), name)
    return f"{value.__module__}.{value.__qualname__}"


def _documented(value: Any) -> bool:
    return inspect.isclass(value) or inspect.isroutine(value)


def _page(package: str, name: str) -> str:
    value = getattr(importlib.import_module(package), name)
    head = f"# {name}\n\n```python\nfrom {package} import {name}\n```\n\n"
    if not _documented(value):
        return f"{head}{summary(package, name)}\n"
    kind = "autoclass" if inspect.isclass(value) else "autofunction"
    again = package != _first_package(name)
    options = "   :no-index:\n" if again else ""
    if inspect.isclass(value):
        options += _inherited(value)
    return f"{head}```{{eval-rst}}\n.. {kind}:: {place(package, name)}\n{options}```\n"


def _inherited(value: type) -> str:
    """Return the option for members of base classes that have no page of their own."""
    public = {name for package in PACKAGES for name in public_names(package)}
    own = [c.__module__.startswith("alphabar.") and c.__name__ not in public for c in value.__mro__]
    if not any(own[1:]):
        return ""
    shown = [c.__name__ for c, is_own in zip(value.__mro__[1:], own[1:], strict=True) if not is_own]
    return f"   :inherited-members: {', '.join(shown)}\n"


def _first_package(name: str) -> str:
    return next(package for package in PACKAGES if name in public_names(package))


def files() -> list[str]:
    """Return the pages that ``write`` makes, below docs/."""
    shorts = {package: package.rpartition(".")[2] for package in PACKAGES}
    pages = [f"{short}/{name}" for p, short in shorts.items() for name in public_names(p)]
    return [f"reference/{page}.md" for page in ["index", *shorts.values(), *pages]]


def write(folder: Path) -> None:
    """Write the pages and their index."""
    index = ["# Reference", "", "Every public name, by the package that it is imported from.", ""]
    for package, what in PACKAGES.items():
        short = package.rpartition(".")[2]
        names = public_names(package)
        lines = [f"# {package}", "", what, "", "| name | |", "|---|---|"]
        lines += [f"| [{name}]({short}/{name}.md) | {summary(package, name)} |" for name in names]
        lines += ["", "```{toctree}", ":hidden:", "", *(f"{short}/{n}" for n in names), "```"]
        write_text(folder / f"{short}.md", "\n".join(lines))
        for name in names:
            write_text(folder / short / f"{name}.md", _page(package, name))
    index += ["```{toctree}", ":maxdepth: 1", ""]
    index += [package.rpartition(".")[2] for package in PACKAGES]
    write_text(folder / "index.md", "\n".join([*index, "```"]))


def write_text(path: Path, text: str) -> None:
    """Write a file, unless it has this text: Sphinx reads changed files again."""
    write_bytes(path, (text + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, unless it has this content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_bytes() != content:
        path.write_bytes(content)
