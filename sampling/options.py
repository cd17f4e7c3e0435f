"""Options as plain values: each is checked against the annotation of the parameter that takes it, before any work."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import Any

import numpy as np

from ..noising.utils.validation import real_number, whole_number


def plain_option(parameter: Parameter, value: Any) -> Any:
    """Return what an option is set to as Python's own bool, int, float, str or tuple, or raise ValueError where it is none.

    Numbers may come from numpy or as 0-dimensional tensors; a bool is no number. Annotations that say none of these kinds let any
    value pass.

    >>> plain_option(Parameter("rho", Parameter.KEYWORD_ONLY, annotation="float | None"), 7)
    7.0
    >>> plain_option(Parameter("order", Parameter.KEYWORD_ONLY, annotation="int"), True)
    Traceback (most recent call last):
    ValueError: order must be an integer, got True
    """
    words = _words(parameter.annotation)
    if value is None and "None" in words:
        return None
    kind, *parts = words
    if kind in ("Sequence", "tuple") and parts and parts[0] in KINDS:
        return _sequence(parameter.name, value, parts, any_length=kind == "Sequence")
    return KINDS.get(kind, _plain)(parameter.name, value)


def _words(annotation: Any) -> list[str]:
    text = annotation.__name__ if type(annotation) is type else str(annotation)
    return re.findall(r"\w+", re.sub(r"\b\w+\.", "", text)) or [""]


def _sequence(name: str, value: Any, kinds: list[str], any_length: bool) -> tuple[Any, ...]:
    values = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(values, list | tuple | range):
        raise ValueError(f"{name} must be a sequence, got {value!r}")
    if any_length:
        kinds = [kinds[0]] * len(values)
    if len(values) != len(kinds):
        raise ValueError(f"{name} must hold {len(kinds)} values, got {value!r}")
    return tuple(
        KINDS[kind](f"{name}[{i}]", part)
        for i, (kind, part) in enumerate(zip(kinds, values, strict=True))
    )


def _bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a name, got {value!r}")
    return str(value)


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    return tuple(_plain(name, part) for part in value) if isinstance(value, list) else value


KINDS: Mapping[str, Callable[[str, Any], Any]] = {
    "bool": _bool,
    "int": whole_number,
    "float": real_number,
    "str": _text,
}
"""How a value is read for the first word of an annotation."""
