"""Items: a name with options, e.g. ``min_snr:gamma=5``, in code, flags and YAML."""

from __future__ import annotations

import inspect
import re
from ast import literal_eval
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from .registry import Registry, lookup

T = TypeVar("T")


def parse_item(text: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of an item.

    An item is ``name`` or ``name:option=value,option=value``. Values are numbers, true, false,
    none, or words. A name may contain colons if no option follows. Raises ValueError for an option
    without a value, and for an option that is given twice.

    >>> parse_item("min_snr:gamma=5,floor=0.1"), parse_item("flow")
    (('min_snr', {'gamma': 5, 'floor': 0.1}), ('flow', {}))
    """
    found = re.fullmatch(r"([^=]*?):(\w+=.*|)", text)
    if not found:
        return text, {}
    options: dict[str, Any] = {}
    for part in filter(None, _parts(found[2])):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals or not value or name in options:
            what = "is given twice" if name in options else "has no value"
            raise ValueError(
                f"option {name!r} of {text!r} {what}; write name:option=value,option=value"
            )
        options[name] = _value(value)
    return found[1], options


def _parts(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def make_item(text: object, registry: Registry[Any]) -> Any:
    """Return the object that an item describes, made by its registry entry.

    Raises ValueError for an unknown name or option; the message gives the nearest one.

    >>> from alphabar.noising import WEIGHTINGS
    >>> make_item("min_snr:gamma=2", WEIGHTINGS)
    MinSNR(floor=0.0, gamma=2)
    """
    name, options = parse_item(text) if isinstance(text, str) else (text, {})
    return make_named(name, options, registry)


def make_named(name: object, options: Mapping[str, Any], registry: Registry[Any]) -> Any:
    """Return the object of a registry entry's name and options.

    Errors as in :func:`make_item`.

    >>> from alphabar.noising import WEIGHTINGS
    >>> make_named("min_snr", {"gamma": 2.0}, WEIGHTINGS)
    MinSNR(floor=0.0, gamma=2.0)
    """
    return call_with_options(
        f"{registry.kind} {name}", lookup(registry.kind, name, registry), options
    )


def call_with_options(what: str, make: Callable[..., T], options: Mapping[str, Any]) -> T:
    """Return ``make(**options)``.

    Raises ValueError for an option that is unknown, missing, or of a wrong type.

    >>> call_with_options("weighting p2", lambda gamma=1.0: gamma, {"gama": 2.0})
    Traceback (most recent call last):
    ValueError: unknown option of weighting p2 'gama'; did you mean 'gamma'?
    """
    known = inspect.signature(make).parameters
    for option in options:
        lookup(f"option of {what}", option, known)
    missing = [p.name for p in known.values() if p.default is p.empty and p.name not in options]
    if missing:
        raise ValueError(
            f"{what} needs {', '.join(missing)}; write e.g. {what.split()[-1]}:{missing[0]}=..."
        )
    try:
        return make(**options)
    except TypeError as error:  # e.g. a word in place of a number
        given = ", ".join(f"{k}={v!r}" for k, v in options.items())
        raise ValueError(f"{what} does not take {given}: {error}") from error
