"""Options of formulas: the keyword-only parameters of a function.

The type of each value is checked before any work.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from inspect import Parameter
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import numpy as np

from ..noising.utils.validation import real_number, whole_number


def keyword_parameters(function: Callable[..., Any]) -> dict[str, Parameter]:
    """Return the keyword-only parameters of a function by name, with their types.

    >>> def karras(schedule, steps, *, rho: float = 7.0): ...
    >>> keyword_parameters(karras)["rho"].annotation
    <class 'float'>
    """
    return dict(_parameters(function))


@lru_cache(maxsize=512)
def _parameters(function: Callable[..., Any]) -> tuple[tuple[str, Parameter], ...]:
    try:
        signature = inspect.signature(function, eval_str=True)
    except NameError:
        # a name imported only for type checkers: the types are unknown
        plain = inspect.signature(function).parameters.values()
        signature = inspect.Signature([p.replace(annotation=p.empty) for p in plain])
    found = signature.parameters.values()
    return tuple((p.name, p) for p in found if p.kind is p.KEYWORD_ONLY)


def check_option(parameter: Parameter, value: Any) -> Any:
    """Return an option's value as Python's bool, int, float, str or tuple.

    Numbers may come from numpy or as 0-dimensional tensors; a bool is not a number. For other types
    any value is accepted.

    Raises:
        ValueError: The value has another type.

    >>> check_option(Parameter("rho", Parameter.KEYWORD_ONLY, annotation=float | None), 7)
    7.0
    >>> check_option(Parameter("order", Parameter.KEYWORD_ONLY, annotation=int), True)
    Traceback (most recent call last):
    ValueError: order must be an integer, got True
    """
    return _check(parameter.name, parameter.annotation, value)


def _check(name: str, kind: Any, value: Any) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and NoneType in parts:
            return None
        return _check(name, next(part for part in parts if part is not NoneType), value)
    if origin in (tuple, Sequence):
        return _sequence(name, parts, value)
    return KINDS.get(kind, _plain)(name, value)


def _sequence(name: str, kinds: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    values = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(values, list | tuple | range):
        raise ValueError(f"{name} must be a sequence, got {value!r}")
    if len(kinds) == 1 or kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(values)
    if len(values) != len(kinds):
        raise ValueError(f"{name} must hold {len(kinds)} values, got {value!r}")
    pairs = zip(kinds, values, strict=True)
    return tuple(_check(f"{name}[{i}]", kind, part) for i, (kind, part) in enumerate(pairs))


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


KINDS: Mapping[Any, Callable[[str, Any], Any]] = {
    bool: _bool,
    int: whole_number,
    float: real_number,
    str: _text,
}
"""The check of a value, by type."""
