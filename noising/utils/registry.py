"""Names that resolve: one look-up for every registry, with an error that offers the nearest right name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")


def lookup(kind: str, name: object, known: Mapping[str, T]) -> T:
    """Return ``known[name]``, or raise a ValueError that names the kind, what was given and the nearest known name.

    >>> lookup("method", "heun", {"heun": 1, "ddim": 2})
    1
    >>> lookup("method", "huen", {"heun": 1, "ddim": 2})
    Traceback (most recent call last):
    ValueError: unknown method 'huen'; did you mean 'heun'?
    """
    if isinstance(name, str) and name in known:
        return known[name]
    raise ValueError(unknown(kind, name, known))


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """Word the complaint about an unknown name.

    >>> unknown("grid", "xyz", ["karras", "leading"])
    "unknown grid 'xyz'; known: karras, leading"
    """
    near = get_close_matches(name, list(known), n=1, cutoff=0.5) if isinstance(name, str) and len(name) < 100 else []
    names = sorted(known)
    few = names if len(names) <= 100 else [*names[:10], f"... and {len(names) - 10} more"]
    mend = f"did you mean {near[0]!r}?" if near else "known: " + (", ".join(few) or "none")
    return f"unknown {kind} {shown(name)}; {mend}"


def shown(value: object) -> str:
    """Return a value as messages quote it: in one short line, whatever its size, and without a look into what it holds.

    >>> shown("karas"), shown([0] * 1000), shown(10**30)
    ("'karas'", 'a list of 1000', 'an integer of 100 bits')
    """
    if isinstance(value, str):
        return repr(value) if len(value) <= 80 else f"{value[:60]!r}... of {len(value)} letters"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    name = type(value).__name__
    article = "an" if name[0] in "aeiouAEIOU" else "a"
    sized = isinstance(value, list | tuple | dict | set | bytes)
    return f"{article} {name} of {len(value)}" if sized else f"{article} {name}"
