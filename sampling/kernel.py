"""The kernel: one function runs every table.

Coefficients are Python floats, computed in float64 and passed as kernel arguments, so a step needs
no host sync and no upload. The state is float32 or better, whatever the dtype of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from operator import itemgetter
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..noising.curves.base import is_traced
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
        factor = torch.tensor(c, dtype=torch.float64, device="cpu")

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


def resolved(
    ops: Sequence[Operation], function: Callable[[Row], RowFunction] = row_function
) -> tuple[Action, ...]:
    """Return the operations of a step, resolved; ``function`` makes those of the rows.

    >>> resolved([Draw(1.0, 0.5)])[0][1:]
    (1.0, 0.5)
    """
    return tuple(
        (Evaluation, function(op.row), op.knot)
        if isinstance(op, Evaluation)
        else (Draw, op.start, op.end)
        if isinstance(op, Draw)
        else (type(op), None, None)
        for op in ops
    )


def is_plain(x: Tensor) -> bool:
    """Return whether x has memory and values of its own: no subclass, and not traced.

    >>> is_plain(torch.ones(1)), torch.vmap(lambda x: x + is_plain(x))(torch.zeros(1))
    (True, tensor([0.]))
    """
    return type(x) is Tensor and not is_traced(x)


_LEAST = 2
"""The operations of torch from which one pass costs less, at every size."""
_ONE_THREAD = 32768
"""torch adds up to this many numbers in one thread."""


class Plan:
    """A table with its operations and rows resolved, made once for all runs of a sampler.

    >>> from alphabar.noising import NoiseSchedule
    >>> from alphabar.sampling import Sampler
    >>> plan = Plan(Sampler(NoiseSchedule.flow(), "ddim", 4).table)
    >>> [knot.timestep for knot in plan.evaluated]
    [1000.0, 750.0, 500.0, 250.0]
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        ops = [op for step in table.steps for op in step.ops]
        self.evaluated = [op.knot for op in ops if isinstance(op, Evaluation)]
        self.draws = sum(isinstance(op, Draw) for op in ops)
        self.has_halves = any(isinstance(op, Unconditional) for op in ops)
        self._fused: dict[Any, tuple[Resolved, ...]] = {}

    @cached_property
    def steps(self) -> tuple[Resolved, ...]:
        """The steps, with the operations of torch."""
        return self._resolved(row_function)

    def _resolved(self, function: Callable[[Row], RowFunction]) -> tuple[Resolved, ...]:
        return tuple(
            (resolved(step.ops, function), tuple(map(function, step.carry)), step.denoised)
            for step in self.table.steps
        )

    def steps_for(self, x: Tensor, network_dtype: torch.dtype | None) -> tuple[Resolved, ...]:
        """Return the steps for a run without gradients whose state is like ``x``.

        The operations of torch, or several of them in one pass over the memory, where that costs
        less: from two operations on, for float32 states, on the CPU only if one thread adds them.
        ``network_dtype``: of the network's input, if it is only cast to it.
        """
        if not is_plain(x):  # no address to read; a tensor made here may be fake, and is not kept
            return self._resolved(lambda row: partial(combine, row))
        passes = None
        if x.dtype == torch.float32:
            on_gpu = x.device.type == "cuda"
            alone = torch.get_num_threads() == 1 or x.numel() <= _ONE_THREAD
            passes = one_pass(x.device) if on_gpu or (x.device.type == "cpu" and alone) else None
        if passes is None:
            return self.steps
        ahead = network_dtype if passes.casts and network_dtype else x.dtype
        kind = passes.module, ahead
        if kind not in self._fused:
            self._fused[kind] = fused_steps(self.table, passes, ahead)
        return self._fused[kind]


class Passes(NamedTuple):
    """How rows are combined in one pass on a device.

    ``module``: has ``packed`` and ``combine``. ``casts``: whether a result may have another dtype.
    """

    module: Any
    casts: bool


@lru_cache(maxsize=64)
def one_pass(device: torch.device) -> Passes | None:
    """Return how rows are combined in one pass on a device, or None.

    None if the compiler is not installed or does not work here, or if its results differ from
    torch's: at all on the CPU, by more than 1e-6 on a GPU. That is found once for each device.

    Raises:
        MemoryError, torch.OutOfMemoryError: There is no memory to find it. Nothing is kept then.
    """
    on_gpu = device.type == "cuda"
    try:
        if on_gpu:
            from ..noising.utils import triton_kernels as module
        else:
            from ..noising.utils import compiled as module
        passes = Passes(module, on_gpu)
        rows = ((0, 1.0), (1, 0.3), (2, -0.7)), ((0, 0.9), (2, 1.7)), ((1, 0.6),), ()
        then = (0, 0.8), (1, -1.1)
        for count in (7, 4099):
            numbers = torch.arange(count, dtype=torch.float32, device=device)
            basis = [numbers.mul(k + 1).sin() for k in range(3)]
            exact = [row_function(row)(basis) for row in rows]
            exact.append(row_function(then)(exact))
            made = OnePass(rows, then, passes, torch.float32)(basis)
            if not all(
                torch.allclose(one, other, rtol=0, atol=1e-6) if on_gpu else torch.equal(one, other)
                for one, other in zip(made, exact, strict=True)
            ):
                return None
        return passes
    except (MemoryError, torch.OutOfMemoryError):
        raise  # nothing is kept
    except Exception:  # compilers raise errors of many kinds on platforms they do not support
        return None


class OnePass:
    """Rows over a basis and a row over their results, combined in one pass over the memory.

    A row that is one vector with coefficient 1 is not copied.

    Args:
        rows: The rows over the basis.
        then: A row over the results, whose result comes last; or None.
        passes: How.
        dtype: Of the last result.
    """

    def __init__(
        self, rows: Sequence[Row], then: Row | None, passes: Passes, dtype: torch.dtype
    ) -> None:
        self.used = sorted({k for row in rows for k, _ in row})
        place = {k: i for i, k in enumerate(self.used)}
        combined = [[(place[k], c) for k, c in row] for row in rows if operations(row)]
        self.kept = [None if operations(row) else row[0][0] for row in rows]
        if then is not None:
            numbers = iter(range(len(self.used), len(self.used) + len(combined)))
            at = [next(numbers) if k is None else place[k] for k in self.kept]
            combined.append([(at[k], c) for k, c in then])
            self.kept.append(None)
        self.combine, self.rows = passes.module.combine, passes.module.packed(combined)
        self.dtypes = [torch.float32] * len(combined)
        if then is not None:
            self.dtypes[-1] = dtype

    def __call__(self, basis: Sequence[Tensor]) -> list[Tensor]:
        """Return the results."""
        given = [basis[k] for k in self.used] or [basis[0]]
        given = [one if one.is_contiguous() else one.contiguous() for one in given]
        like = given[0]
        made = [torch.empty_like(like, dtype=dtype) for dtype in self.dtypes]
        self.combine(given, made, self.rows)
        fresh = iter(made)
        return [next(fresh) if k is None else basis[k] for k in self.kept]


Carry = tuple[RowFunction, ...] | OnePass
Resolved = tuple[tuple[Action, ...], Carry, Row]
"""A step: its operations, the rows of the next state, and the row of the clean estimate."""


def operations(row: Row) -> int:
    """Return the operations of torch that a row takes.

    >>> [operations(row) for row in (((0, 1.0),), ((0, 2.0),), ((0, 1.0), (1, 2.0)), ())]
    [0, 1, 1, 1]
    """
    if not row:
        return 1
    return len(row) - (row[0][1] == 1.0)


def fused_steps(table: Table, passes: Passes, dtype: torch.dtype) -> tuple[Resolved, ...]:
    """Return the steps of a table with rows in one pass where that costs less.

    The pass that makes the next state makes the input of the next evaluation too, of this dtype; it
    is then the last vector of the state, and that evaluation takes it off.
    """
    made: list[Resolved] = []
    waiting = False
    for step, later in zip(table.steps, [*table.steps[1:], None], strict=True):
        actions = list(resolved(step.ops))
        for i, op in enumerate(step.ops):
            if isinstance(op, Evaluation):
                if i == 0 and waiting:
                    actions[0] = Evaluation, list.pop, op.knot
                elif operations(op.row) >= _LEAST:
                    alone = OnePass((op.row,), None, passes, torch.float32)
                    actions[i] = Evaluation, lambda basis, alone=alone: alone(basis)[0], op.knot
        first = later.ops[0] if later is not None and later.ops else None
        then = first.row if isinstance(first, Evaluation) else None
        if then is not None and not operations(then) and dtype == torch.float32:
            then = None  # the state itself
        total = sum(map(operations, step.carry)) + (
            0 if then is None else operations(then) + (dtype != torch.float32)
        )
        waiting = total >= _LEAST and then is not None
        carry = (
            OnePass(step.carry, then, passes, dtype)
            if total >= _LEAST
            else tuple(map(row_function, step.carry))
        )
        made.append((tuple(actions), carry, step.denoised))
    return tuple(made)


def run(
    table: Table | Sequence[Resolved],
    x: Tensor,
    evaluate: Evaluate,
    noise: Noise,
    beside: Beside = NOTHING_BESIDE,
) -> Iterator[Progress]:
    """Run a table, or the steps of a plan, from ``x`` and yield after each step.

    Args:
        evaluate: ``evaluate(x, knot)`` returns the network's raw output, in the shape and device of
            ``x``.
        noise: ``noise(start, end)`` returns standard normal noise, in the shape and device of
            ``x``.
        beside: Other results of the last evaluation, by kind of operation: its unconditional half,
            its value before clipping. If one is missing or None, the evaluation itself is used.
    """
    steps = Plan(table).steps if isinstance(table, Table) else table
    state = [x]
    for i, (actions, carry, denoised) in enumerate(steps):
        basis = state
        _act(actions, basis, evaluate, noise, beside)
        state = _next(carry, basis)
        yield Progress(i + 1, len(steps), state[0], denoised, basis)


def final(
    steps: Sequence[Resolved], start: list[Tensor], evaluate: Evaluate, noise: Noise, beside: Beside
) -> Tensor:
    """Return x after the last step: :func:`run` without a stop after each step.

    ``start``: a list of x alone, which is emptied: its memory is free after the first step.

    >>> from alphabar.noising import NoiseSchedule
    >>> from alphabar.sampling import Sampler
    >>> plan = Plan(Sampler(NoiseSchedule.flow(), "euler", 2).table)
    >>> final(plan.steps, [torch.ones(1)], lambda x, knot: x, lambda start, end: x, {})
    tensor([0.2500])
    """
    state = [start.pop()]
    for actions, carry, _ in steps:
        basis = state
        _act(actions, basis, evaluate, noise, beside)
        state = _next(carry, basis)
    return state[0]


def _next(carry: Carry, basis: list[Tensor]) -> list[Tensor]:
    if isinstance(carry, OnePass):
        return carry(basis)
    return [carry[0](basis)] if len(carry) == 1 else [row(basis) for row in carry]


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
