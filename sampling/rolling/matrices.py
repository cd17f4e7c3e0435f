"""Sampling matrices: how many steps of the table each chunk has taken, row by row.

Diffusion Forcing (Chen et al. 2407.01392, §3.3 and appendix) writes a sampling order as a matrix
with a row for each network call and a column for each chunk. Here an entry is the number of steps
of a table that the chunk has taken: 0 is noise, the number of steps is clean. With 3 steps and 3
chunks:

    full         pyramid      autoregressive
    0 0 0        0 0 0        0 0 0
    1 1 1        1 0 0        1 0 0
    2 2 2        2 1 0        2 0 0
    3 3 3        3 2 1        3 0 0
                 3 3 2        3 1 0
                 3 3 3        ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, cast

from ...noising.utils.items import call_with_options, parse_item
from ...noising.utils.registry import Registry, lookup
from ...noising.utils.validation import whole_number

SamplingMatrix = tuple[tuple[int, ...], ...]
"""Steps taken, by row and chunk: from zeros to the number of steps, by at most one a row."""

MATRICES: Registry[Callable[..., Sequence[Sequence[int]]]] = Registry("sampling matrix")
"""Functions ``(chunks, steps, **options)`` of sampling matrices by name.

Decorate a function with ``@MATRICES.register`` to add one.
"""


def staggered(chunks: int, steps: int, lag: int) -> SamplingMatrix:
    """Return the matrix in which each chunk begins ``lag`` rows after the one before it.

    >>> staggered(2, 2, lag=1)
    ((0, 0), (1, 0), (2, 1), (2, 2))
    """
    lag = whole_number("lag", lag, least=0)
    rows = steps + (chunks - 1) * lag
    return tuple(
        tuple(min(max(row - j * lag, 0), steps) for j in range(chunks)) for row in range(rows + 1)
    )


@MATRICES.register
def full(chunks: int, steps: int) -> SamplingMatrix:
    """All chunks together: the full sequence, as a ``Sampler`` does it."""
    return staggered(chunks, steps, 0)


@MATRICES.register
def pyramid(chunks: int, steps: int, lag: int = 1) -> SamplingMatrix:
    """Each chunk ``lag`` steps ahead of the next: near ones are certain before far ones."""
    return staggered(chunks, steps, lag)


@MATRICES.register
def autoregressive(chunks: int, steps: int) -> SamplingMatrix:
    """One chunk after the other, each given the clean ones before it."""
    return staggered(chunks, steps, steps)


def resolve_matrix(
    matrix: str | Sequence[Sequence[int]] | Callable[..., Any], chunks: int, steps: int
) -> SamplingMatrix:
    """Return a matrix for a name, with or without options, a function or the entries themselves.

    Args:
        matrix: a name of ``MATRICES`` ('pyramid:lag=2'), a function of (chunks, steps), or entries,
            shape (rows + 1, chunks).
        chunks: number of chunks.
        steps: number of steps of the table.

    Raises:
        ValueError: an unknown name; entries that do not begin with zeros, end with ``steps``, or
            rise by at most 1 from row to row.

    >>> resolve_matrix("pyramid:lag=2", 2, 3)
    ((0, 0), (1, 0), (2, 0), (3, 1), (3, 2), (3, 3))
    >>> resolve_matrix([[0, 0], [2, 1], [2, 2]], 2, 2)
    Traceback (most recent call last):
    ValueError: a sampling matrix rises by 0 or 1 from row to row, got (0, 0) and then (2, 1)
    """
    if isinstance(matrix, str):
        name, options = parse_item(matrix)
        function = partial(lookup("sampling matrix", name, MATRICES), chunks, steps)
        matrix = call_with_options(f"sampling matrix {name}", function, options)
    elif callable(matrix):
        matrix = matrix(chunks, steps)
    given: Any = cast(Any, matrix).tolist() if hasattr(matrix, "tolist") else matrix
    rows = tuple(tuple(whole_number("an entry", entry) for entry in row) for row in given)
    if not rows or any(len(row) != chunks for row in rows):
        raise ValueError(
            f"a sampling matrix needs a column for each of {chunks} chunks, got rows of "
            f"{sorted({len(row) for row in rows})}"
        )
    if rows[0] != (0,) * chunks or rows[-1] != (steps,) * chunks:
        raise ValueError(
            f"a sampling matrix goes from zeros to the {steps} steps of the table in every column, "
            f"got {rows[0]} ... {rows[-1]}"
        )
    for before, after in pairwise(rows):
        if any(b - a not in (0, 1) for a, b in zip(before, after, strict=True)):
            raise ValueError(
                f"a sampling matrix rises by 0 or 1 from row to row, got {before} and then {after}"
            )
    return rows
