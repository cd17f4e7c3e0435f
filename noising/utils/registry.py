"""Registries: definitions by name, open to other packages.

A decorator next to each definition adds it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

T = TypeVar("T")
D = TypeVar("D")

PLUGINS = "alphabar.plugins"
"""The entry point group for packages that register definitions.

Each entry point names a module to import.
"""


class Registry(Mapping[str, T]):
    """Definitions of one kind by name, in the order of their registration.

    :meth:`register` is the decorator for a class or a function. Installed packages register with an
    entry point of the group ``alphabar.plugins``. They are imported only when names are listed, or
    when a name is unknown.

    >>> shapes = Registry[type]("shape")
    >>> @shapes.register
    ... class Round:
    ...     name = "round"
    >>> shapes["round"] is Round, list(shapes)
    (True, ['round'])
    >>> shapes.add("round", type("Other", (), {}))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: shape 'round' is registered already, by ...Round; choose another name
    """

    def __init__(self, kind: str, attribute: str = "name") -> None:
        self.kind = kind
        self._attribute = attribute  # the class attribute that holds the name
        self._entries: dict[str, T] = {}
        self.changes = 0  # number of additions; caches of the names check it

    def add(self, name: str, entry: T) -> None:
        """Register an entry under a name.

        Raises ValueError if another definition has the name. A definition that is run again
        replaces itself.
        """
        old = self._entries.get(name, entry)
        if _origin(old) != _origin(entry):
            raise ValueError(
                f"{self.kind} {name!r} is registered already, by {_origin(old)}; choose another "
                "name"
            )
        self._entries[name] = entry
        self.changes += 1

    def register(self, entry: D) -> D:
        """Register a class as its ``name``, or a function as its own name, and return it."""
        named: Any = entry
        self.add(getattr(named, self._attribute, None) or named.__name__, named)
        return entry

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            load_plugins()
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        load_plugins()
        return iter(list(self._entries))

    def __len__(self) -> int:
        load_plugins()
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}: {', '.join(self)})"


_loaded: set[str] = set()


def load_plugins() -> None:
    """Import the modules of the entry point group ``alphabar.plugins``, once.

    Installed packages define these entry points. If a module cannot be imported, this warns and
    continues without it.

    >>> load_plugins()
    """
    if PLUGINS in _loaded:
        return
    _loaded.add(PLUGINS)  # before the imports: they use registries too
    from importlib.metadata import entry_points  # 20 ms that most runs do without

    for point in entry_points(group=PLUGINS):
        try:
            point.load()
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"the plugin {point.name!r} ({point.value}) is left out, its import fails: {text}",
                stacklevel=2,
            )


def _origin(entry: Any) -> str:
    """Return the location of a definition as 'module.name'."""
    entry = getattr(entry, "func", getattr(entry, "formula", entry))  # of a partial or a method
    named = entry if hasattr(entry, "__qualname__") else type(entry)
    return f"{named.__module__}.{named.__qualname__}"


def lookup(kind: str, name: object, known: Mapping[str, T]) -> T:
    """Return ``known[name]``.

    Raises ValueError with the kind, the given name and the nearest known name.

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
    """Return the message for an unknown name.

    >>> unknown("grid", "xyz", ["karras", "leading"])
    "unknown grid 'xyz'; known: karras, leading"
    """
    near = (
        get_close_matches(name, list(known), n=1, cutoff=0.5)
        if isinstance(name, str) and len(name) < 100
        else []
    )
    names = sorted(known)
    few = names if len(names) <= 100 else [*names[:10], f"... and {len(names) - 10} more"]
    fix = f"did you mean {near[0]!r}?" if near else "known: " + (", ".join(few) or "none")
    return f"unknown {kind} {shown(name)}; {fix}"


def shown(value: object) -> str:
    """Return a value as error messages quote it: one short line, whatever its size.

    The contents of containers and objects are not read.

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
