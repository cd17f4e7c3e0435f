"""Checks of argument values: numbers, choices and shapes.

An integer or a float may come from numpy, or be a 0-dimensional array or tensor. A bool is neither.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """Return an integer of at least ``least`` as an int.

    Raises ValueError for any other value. Floats and bools are not integers, including 20.0 and
    True.

    >>> import torch
    >>> whole_number("steps", torch.tensor(20))
    20
    >>> whole_number("steps", 20.0, least=1)
    Traceback (most recent call last):
    ValueError: steps must be an integer of at least 1, got 20.0
    """
    whole = _index(value)
    if whole is not None and (least is None or whole >= least):
        return whole
    raise ValueError(
        f"{name} must be an integer{'' if least is None else f' of at least {least}'}, got "
        f"{value!r}"
    )


def require_integer(name: str, value: Any, advice: str = "") -> int:
    """Return an integer as Python's int.

    Raises TypeError for any other value, including bools and whole floats.

    >>> import numpy as np
    >>> require_integer("step", np.int64(3))
    3
    >>> require_integer("step", 3.0, "count optimizer steps")
    Traceback (most recent call last):
    TypeError: step must be an integer, got 3.0 (float); count optimizer steps
    """
    whole = _index(value)
    if whole is not None:
        return whole
    raise TypeError(
        f"{name} must be an integer, got {value!r} "
        f"({type(value).__name__}){f'; {advice}' if advice else ''}"
    )


def real_number(name: str, value: Any) -> float:
    """Return a number as a float, -0.0 as 0.0.

    Raises ValueError for any other value; text and bools are not numbers.

    >>> import torch
    >>> real_number("eta", torch.tensor(0.5)), real_number("eta", 1)
    (0.5, 1.0)
    """
    if (
        not _is_bool(value)
        and not isinstance(value, str | bytes | bytearray)
        and getattr(value, "ndim", 0) == 0
    ):
        try:
            return float(value) + 0.0
        except (TypeError, ValueError, OverflowError):
            pass
    raise ValueError(f"{name} must be a number, got {value!r}")


def _index(value: Any) -> int | None:
    if type(value) is int:
        return value
    if _is_bool(value) or getattr(value, "ndim", 0) != 0:
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def require(fits: bool, name: str, what: str, value: Any, advice: str = "") -> None:
    """Raise ValueError unless a value fits; the message says what it must do.

    >>> require(0 < 0.0 <= 1, "r", "be in (0, 1]", 0.0, "k-diffusion uses 1/2")
    Traceback (most recent call last):
    ValueError: r must be in (0, 1], got 0.0; k-diffusion uses 1/2
    """
    if not fits:
        raise ValueError(f"{name} must {what}, got {value}{f'; {advice}' if advice else ''}")


def one_of(name: str, value: Any, allowed: Sequence[Any]) -> Any:
    """Return ``value``; raise a ValueError that lists the allowed values if it is not allowed.

    >>> one_of("order", 5, (1, 2, 3))
    Traceback (most recent call last):
    ValueError: order must be one of 1, 2, 3, got 5
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
    return value


def require_same_shape(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """Raise ValueError unless two tensors have the same shape.

    >>> import torch
    >>> require_same_shape("noise", torch.zeros(2), "x0", torch.zeros(3))
    Traceback (most recent call last):
    ValueError: noise must have the shape of x0, (3,), got (2,)
    """
    if value.shape != like.shape:
        raise ValueError(
            f"{name} must have the shape of {like_name}, {tuple(like.shape)}, got "
            f"{tuple(value.shape)}"
        )
