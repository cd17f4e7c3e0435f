"""Rows for a parametrisation in which every two values meet, instead of the full product.

What two parameters do to each other is seen; what only three together do is not, so a test whose
parameters work in threes keeps its product.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any


def all_pairs(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows with a value of each axis, every two values of different axes in at least one; the same
    rows each time.

    Greedy: a row starts with the first pair that has not met, and each further value is the one
    that meets most that it has not.
    """
    left = {
        (i, a, j, b): None
        for i, j in combinations(range(len(axes)), 2)
        for a, b in product(range(len(axes[i])), range(len(axes[j])))
    }
    rows = []
    while left:
        i, a, j, b = next(iter(left))
        row = {i: a, j: b}
        for k in range(len(axes)):
            if k not in row:
                row[k] = max(
                    range(len(axes[k])),
                    key=lambda c, k=k: sum(pair in left for pair in met(row, k, c)),
                )
        for k, c in row.items():
            for pair in met(row, k, c):
                left.pop(pair, None)
        rows.append(tuple(axes[k][row[k]] for k in range(len(axes))))
    return rows


def met(row: dict[int, int], k: int, c: int) -> list[tuple[int, int, int, int]]:
    """The pairs that value c of axis k makes with a row."""
    return [(i, a, k, c) if i < k else (k, c, i, a) for i, a in row.items() if i != k]
