"""The kernel: one function runs every table.

Coefficients are Python floats, computed in float64 and passed as kernel arguments, so a step needs
no host sync and no upload. The state is float32 or better, whatever the dtype of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from operator import itemgetter
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .knots import Knot
from .table import Table
from .tracing import Draw, Evaluation, Operation, Row, Unconditional

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


RowFunction = Callable[[Sequence[Tensor]], Tensor]


def row_function(row: Row) -> RowFunction:
    """Return :func:`combine` for one row, with all that does not depend on the basis done before.

    A product with a number makes a tensor of it, which costs more than the product of a small
    state; here it is made once. The bits are the same.

    >>> row_function(((0, 2.0), (1, -0.5)))([torch.ones(2), torch.ones(2)])
    tensor([1.5000, 1.5000])
    """
    if not row:
        return lambda basis: torch.zeros_like(basis[0])
    (k, c), rest = row[0], row[1:]
    if c == 1.0:
        if not rest:
            return itemgetter(k)
        (j, d), rest = rest[0], rest[1:]
        if not rest:
            return lambda basis: torch.add(basis[k], basis[j], alpha=d)

        def first(basis: Sequence[Tensor]) -> Tensor:
            return torch.add(basis[k], basis[j], alpha=d)
    else:
        factor = torch.tensor(c, dtype=torch.float64)

        def first(basis: Sequence[Tensor]) -> Tensor:
            return torch.mul(basis[k], factor)

        if not rest:
            return first

    def combined(basis: Sequence[Tensor]) -> Tensor:
        total = first(basis)
        for i, a in rest:
            total.add_(basis[i], alpha=a)
        return total

    return combined


Action = tuple[type[Operation], Any, Any]
"""An operation, resolved: its kind; an evaluation's row function and knot, a draw's interval."""


def resolved(ops: Sequence[Operation]) -> tuple[Action, ...]:
    """Return the operations of a step, resolved.

    >>> resolved([Draw(1.0, 0.5)])[0][1:]
    (1.0, 0.5)
    """
    return tuple(
        (Evaluation, row_function(op.row), op.knot)
        if isinstance(op, Evaluation)
        else (Draw, op.start, op.end)
        if isinstance(op, Draw)
        else (type(op), None, None)
        for op in ops
    )


class Plan:
    """A table with its operations and rows resolved, made once for all runs of a sampler.

    >>> from alphabar.noising import NoiseSchedule
    >>> from alphabar.sampling import Sampler
    >>> plan = Plan(Sampler(NoiseSchedule.flow(), "heun", 3).table)
    >>> [knot.timestep for knot in plan.evaluated]
    [1000.0, 666.6666666666667, 666.6666666666667, 333.3333333333333, 333.3333333333333]
    """

    def __init__(self, table: Table) -> None:
        self.steps = tuple(
            (resolved(step.ops), tuple(map(row_function, step.carry)), step.denoised)
            for step in table.steps
        )
        ops = [op for step in table.steps for op in step.ops]
        self.evaluated = [op.knot for op in ops if isinstance(op, Evaluation)]
        self.draws = sum(isinstance(op, Draw) for op in ops)
        self.has_halves = any(isinstance(op, Unconditional) for op in ops)


def run(
    table: Table | Plan,
    x: Tensor,
    evaluate: Evaluate,
    noise: Noise,
    beside: Beside = NOTHING_BESIDE,
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
    steps = (table if isinstance(table, Plan) else Plan(table)).steps
    state = [x]
    for i, (actions, carry, denoised) in enumerate(steps):
        basis = state
        _act(actions, basis, evaluate, noise, beside)
        state = [row(basis) for row in carry]
        yield Progress(i + 1, len(steps), state[0], denoised, basis)


def final(plan: Plan, x: Tensor, evaluate: Evaluate, noise: Noise, beside: Beside) -> Tensor:
    """Return x after the last step of a plan: :func:`run` without a stop after each step.

    >>> from alphabar.noising import NoiseSchedule
    >>> from alphabar.sampling import Sampler
    >>> plan = Plan(Sampler(NoiseSchedule.flow(), "euler", 2).table)
    >>> final(plan, torch.ones(1), lambda x, knot: x, lambda start, end: x, {})
    tensor([0.2500])
    """
    state = [x]
    for actions, carry, _ in plan.steps:
        basis = state
        _act(actions, basis, evaluate, noise, beside)
        state = [carry[0](basis)] if len(carry) == 1 else [row(basis) for row in carry]
    return state[0]


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
    _act(resolved(ops), basis, evaluate, noise, beside)


def _act(
    actions: Sequence[Action], basis: list[Tensor], evaluate: Evaluate, noise: Noise, beside: Beside
) -> None:
    evaluated, dtype = basis[-1], basis[0].dtype
    for kind, first, second in actions:
        new: Tensor | None
        if kind is Evaluation:
            new = evaluated = evaluate(first(basis), second)
        elif kind is Draw:
            new = noise(first, second)
        else:
            new = beside[kind]() if kind in beside else None
            if new is None:
                new = evaluated
        basis.append(new if new.dtype is dtype else new.to(dtype))
