"""The kernel: one function runs every table.

Coefficients are Python floats, computed in float64 and passed as kernel arguments, so a step needs
no host sync and no upload. The state is float32 or better, whatever the dtype of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from .knots import Knot
from .table import Table
from .tracing import Draw, Evaluation, Operation, Row

Evaluate = Callable[[Tensor, Knot], Tensor]
Noise = Callable[[float, float], Tensor]
Beside = Mapping[type[Operation], Callable[[], Tensor | None]]
NOTHING_BESIDE: Beside = MappingProxyType({})


def combine(row: Row, basis: Sequence[Tensor]) -> Tensor:
    """Return the linear combination of ``basis`` with the coefficients of ``row``.

    A single vector with coefficient 1 is not copied.

    >>> combine(((0, 2.0), (1, -1.0)), [torch.ones(2), torch.ones(2)])
    tensor([1., 1.])
    """
    if not row:
        return torch.zeros_like(basis[0])
    k, c = row[0]
    if len(row) == 1:
        return basis[k] if c == 1.0 else basis[k] * c
    if c == 1.0:  # the same number in one operation
        total = torch.add(basis[k], basis[row[1][0]], alpha=row[1][1])
        rest = row[2:]
    else:
        total, rest = basis[k] * c, row[1:]
    for k, c in rest:
        total.add_(basis[k], alpha=c)
    return total


class Progress:
    """The state of a sampling run after a step.

    ``step`` of ``steps``, the state ``x`` and the clean estimate ``denoised``.

    >>> Progress(1, 2, torch.ones(1), ((0, 0.5),), [torch.ones(1)]).denoised
    tensor([0.5000])
    """

    def __init__(self, step: int, steps: int, x: Tensor, row: Row, basis: Sequence[Tensor]) -> None:
        self.step, self.steps, self.x = step, steps, x
        self._row, self._basis = row, basis

    @cached_property
    def denoised(self) -> Tensor:
        """The estimate of the clean sample in this step, computed on access."""
        return combine(self._row, self._basis)


def run(
    table: Table, x: Tensor, evaluate: Evaluate, noise: Noise, beside: Beside = NOTHING_BESIDE
) -> Iterator[Progress]:
    """Run a table from ``x`` and yield after each step.

    Args:
        evaluate: ``evaluate(x, knot)`` returns the network's raw output, in the shape and device of
            ``x``.
        noise: ``noise(start, end)`` returns standard normal noise, in the shape and device of
            ``x``.
        beside: Other results of the last evaluation, by kind of operation: its unconditional half,
            its value before clipping. If one is missing or None, the evaluation itself is used.
    """
    state = [x]
    for i, step in enumerate(table.steps):
        basis = list(state)
        perform(step.ops, basis, evaluate, noise, beside)
        state = [combine(row, basis) for row in step.carry]
        yield Progress(i + 1, len(table.steps), state[0], step.denoised, basis)


def perform(
    ops: Sequence[Operation],
    basis: list[Tensor],
    evaluate: Evaluate,
    noise: Noise,
    beside: Beside = NOTHING_BESIDE,
) -> None:
    """Append the result of each operation to ``basis``, in the dtype of its first vector.

    Arguments as in :func:`run`.

    >>> basis = [torch.ones(1)]
    >>> perform([Draw(1.0, 0.5)], basis, lambda x, knot: x, lambda start, end: torch.zeros(1))
    >>> basis
    [tensor([1.]), tensor([0.])]
    """
    evaluated = basis[-1]
    for op in ops:
        new: Tensor | None
        if isinstance(op, Evaluation):
            new = evaluated = evaluate(combine(op.row, basis), op.knot)
        elif isinstance(op, Draw):
            new = noise(op.start, op.end)
        else:
            new = beside[type(op)]() if type(op) in beside else None
        basis.append((evaluated if new is None else new).to(basis[0].dtype))
