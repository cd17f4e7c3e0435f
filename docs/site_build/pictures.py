"""Draw the pictures of the pages: each is a function that returns a figure of matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .gallery import svg
from .reference import write_text

PICTURES: dict[str, Callable[[], Any]] = {}


def picture(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register a function that draws ``docs/pictures/<name>``, an SVG file."""
    if not name.endswith(".svg") or name in PICTURES:
        raise ValueError(f"a picture needs a name of its own that ends in .svg, got {name!r}")

    def register(draw: Callable[[], Any]) -> Callable[[], Any]:
        PICTURES[name] = draw
        return draw

    return register


def files() -> list[str]:
    """Return the files that ``write`` makes, below docs/."""
    return [f"pictures/{name}" for name in PICTURES]


def write(folder: Path) -> None:
    """Draw all pictures."""
    for name, draw in PICTURES.items():
        write_text(folder / name, svg(draw()))
