"""Exact equality of samplers: same values, same types, same sign of zero.

Python has 1 == 1.0 == True and 0.0 == -0.0, and dataclasses may leave fields out of their
comparison. Tables are cached by sampler, so a comparison that is too loose would return the table
of another sampler.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from torch import Tensor


def exact(value: Any) -> Hashable:
    """Return a hashable key that equals another key only if values and types are the same.

    Containers, arrays and dataclasses (with every field) are compared by their contents, functions
    and other objects by their own equality, and unhashable objects by identity.

    >>> exact(1) == exact(1), exact(1) == exact(True), exact([0.0]) == exact([-0.0])
    (True, False, False)
    """
    kind = type(value)
    if isinstance(value, float):
        return kind, float(value).hex()
    if isinstance(value, list | tuple):
        return kind, tuple(map(exact, value))
    if isinstance(value, Mapping):
        return kind, frozenset((exact(key), exact(part)) for key, part in value.items())
    if isinstance(value, set | frozenset):
        return kind, frozenset(map(exact, value))
    if isinstance(value, partial):
        return kind, exact(value.func), exact(value.args), exact(value.keywords)
    if isinstance(value, Tensor) or (hasattr(value, "dtype") and hasattr(value, "tolist")):
        return kind, str(value.dtype), tuple(value.shape), exact(value.tolist())
    if is_dataclass(value) and not isinstance(value, type):
        return kind, tuple(exact(getattr(value, field.name)) for field in fields(value))
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return kind, value


class _Same:
    """An object that is equal only to itself."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)
