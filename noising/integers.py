"""Counters that must be integers: numpy's and torch's are as good as Python's, bools and floats are mistakes."""

from __future__ import annotations

import operator
from typing import Any


def require_integer(name: str, value: Any, advice: str = "") -> int:
    """Return an integer as Python's int; TypeError for anything else, bools and whole floats included.

    >>> import numpy as np
    >>> require_integer("step", np.int64(3))
    3
    >>> require_integer("step", 3.0, "count optimizer steps")
    Traceback (most recent call last):
    TypeError: step must be an integer, got 3.0 (float); count optimizer steps
    """
    if type(value) is int:
        return value
    kind = type(value).__name__
    # a tensor's dtype decides: operator.index takes those of bool as well
    if not kind.startswith("bool") and "bool" not in str(getattr(value, "dtype", "")):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} must be an integer, got {value!r} ({kind}){f'; {advice}' if advice else ''}")
