"""Bisection in float64: where a condition on a number turns false."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def bisect(holds: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bounds of the points where a condition turns false, after 80 halvings.

    Args:
        holds: the condition, elementwise; it holds at ``low``, and once false it stays false.
        low, high: bounds of any shape, float64.

    >>> zero, two = torch.zeros(2, dtype=torch.float64), torch.full((2,), 2.0, dtype=torch.float64)
    >>> bisect(lambda x: x**2 < torch.tensor([1.0, 2.0], dtype=torch.float64), zero, two)[1]
    tensor([1.0000, 1.4142], dtype=torch.float64)
    """
    for _ in range(80):
        middle = 0.5 * (low + high)
        below = holds(middle)
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low, high
