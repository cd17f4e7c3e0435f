"""The kernel: one function runs every table.

Coefficients are Python floats, computed in float64, that travel as kernel arguments: a step makes
no host sync and no upload. The state is kept in float32 or better, whatever the dtype of the
network.
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
    """Return the linear combination of ``basis`` that ``row`` states; a single vector with
    coefficient 1 is not copied.

    >>> combine(((0, 2.0), (1, -1.0)), [torch.ones(2), torch.ones(2)])
    tensor([1., 1.])
    """
    if not row:
        return torch.zeros_like(basis[0])
    (k, c), *rest = row
    if c == 1.0 and not rest:
        return basis[k]
    total = basis[k] * c
    for k, c in rest:
        total.add_(basis[k], alpha=c)
    return total


class Progress:
    """Where a sampling run stands after a step: ``step`` of ``steps``, ``x`` there, and the clean
    estimate ``denoised``.

    >>> Progress(1, 2, torch.ones(1), ((0, 0.5),), [torch.ones(1)]).denoised
    tensor([0.5000])
    """

    def __init__(self, step: int, steps: int, x: Tensor, row: Row, basis: Sequence[Tensor]) -> None:
        self.step, self.steps, self.x = step, steps, x
        self._row, self._basis = row, basis

    @cached_property
    def denoised(self) -> Tensor:
        """The estimate of the clean sample that this step used, computed when asked for."""
        return combine(self._row, self._basis)


def run(
    table: Table, x: Tensor, evaluate: Evaluate, noise: Noise, beside: Beside = NOTHING_BESIDE
) -> Iterator[Progress]:
    """Run a table from ``x``, yielding after each step.

    ``evaluate(x, knot)`` returns the network's raw output, ``noise(start, end)`` standard normal
    noise; both in the shape and device of ``x``. ``beside`` gives what the last evaluation left
    besides its result, for each kind of operation that asks for it: its unconditional half, what it
    was before clipping. Where that is missing or None, it is the evaluation itself.
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
    """Append to ``basis`` what each operation gives, in the dtype of its first vector; arguments as
    in :func:`run`.

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
