"""Names that people know a sampler by: our own, the A1111 and k-diffusion names, diffusers' class names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..noising.registry import unknown
from . import dpmpp, first_order, heun
from .methods import Method

METHODS: Mapping[str, Method] = {
    method.name: method for family in (first_order, heun, dpmpp) for method in family.METHODS
}
"""Every method by its name; a new family is a file with a list METHODS and a word in this line."""

GRID_SUFFIXES = {"karras": "karras"}
"""Last words of a name that stand for a grid, as in 'DPM++ 2M Karras'."""


def resolve_method(name: str | Method) -> tuple[Method, dict[str, Any]]:
    """Return the method of a name and the options, ``grid`` among them, that the name implies.

    Case and the kind of separator do not matter. Raises ValueError for an unknown name, with the nearest one.

    >>> method, implied = resolve_method("DPM++ 2M Karras")
    >>> method.name, implied
    ('dpmpp_2m', {'grid': 'karras'})
    >>> resolve_method("dpm2m")
    Traceback (most recent call last):
    ValueError: unknown method 'dpm2m'; did you mean 'dpmpp_2m'?
    """
    if isinstance(name, Method):
        return name, {}
    known = _known_names()
    key = _key(name)
    if key in known:
        return known[key]
    stem, _, last = key.rpartition("_")
    if last in GRID_SUFFIXES and stem in known:
        method, implied = known[stem]
        return method, implied | {"grid": GRID_SUFFIXES[last]}
    raise ValueError(unknown("method", name, [*METHODS, *(called for m in METHODS.values() for called in m.called)]))


def _known_names() -> dict[str, tuple[Method, dict[str, Any]]]:
    names: dict[str, tuple[Method, dict[str, Any]]] = {}
    for method in METHODS.values():
        names[_key(method.name)] = (method, {})
        names |= {_key(called): (method, dict(implied)) for called, implied in method.called.items()}
    return names


def _key(name: object) -> str:
    return str(name).strip().casefold().replace("++", "pp").replace(" ", "_").replace("-", "_")
