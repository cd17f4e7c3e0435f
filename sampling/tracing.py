"""Tracing: formulas compute with symbolic linear combinations, and their operations are recorded.

The basis of a step is the state (x, then the memory of earlier steps), then one entry for each
operation of the step, in order: the output of a network evaluation, or a noise draw. Rows are
linear combinations over this basis. The prediction type is included: with D = p x + q out the table
is linear in the network's raw output.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..noising import NoiseSchedule
from .knots import Knot, knot_at_half_log_snr, knots_at

Row = tuple[tuple[int, float], ...]
"""A linear combination: pairs of a basis index and a coefficient, without zeros."""


class Combination:
    """A linear combination of basis vectors: the values of a formula while it is traced.

    ``sizes``: for each term, the sum of the absolute values of its inputs. It bounds the rounding
    error of the term.

    >>> x, D = Combination({0: 1.0}), Combination({1: 1.0})
    >>> (2.0 * x - D / 4).row
    ((0, 2.0), (1, -0.25))
    >>> (3.0 * x - 2.0 * x).size_row
    ((0, 5.0),)
    """

    __slots__ = ("sizes", "terms")  # thousands are made for a table

    def __init__(self, terms: dict[int, float], sizes: dict[int, float] | None = None) -> None:
        self.terms = terms
        self.sizes = {k: abs(c) for k, c in terms.items()} if sizes is None else sizes

    def __repr__(self) -> str:
        return f"Combination({self.terms})"

    def __add__(self, other: Combination) -> Combination:
        terms, sizes, more = self.terms.copy(), self.sizes.copy(), other.sizes
        for k, c in other.terms.items():
            terms[k] = terms.get(k, 0.0) + c
            sizes[k] = sizes.get(k, 0.0) + more[k]
        return Combination(terms, sizes)

    def __sub__(self, other: Combination) -> Combination:
        terms, sizes, more = self.terms.copy(), self.sizes.copy(), other.sizes
        for k, c in other.terms.items():
            terms[k] = terms.get(k, 0.0) - c
            sizes[k] = sizes.get(k, 0.0) + more[k]
        return Combination(terms, sizes)

    def __mul__(self, factor: float) -> Combination:
        size = abs(factor)
        return Combination(
            {k: factor * c for k, c in self.terms.items()},
            {k: size * c for k, c in self.sizes.items()},
        )

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Combination:
        return self * (1.0 / divisor)

    @property
    def row(self) -> Row:
        """The terms with a coefficient other than 0, in the order of the basis."""
        return tuple(sorted((k, float(c)) for k, c in self.terms.items() if c))

    @property
    def size_row(self) -> Row:
        """The sizes as a row, including terms with a coefficient of 0."""
        return tuple(sorted((k, float(c)) for k, c in self.sizes.items() if c))


@dataclass(frozen=True)
class Evaluation:
    """An operation that appends the network's raw output at ``knot`` for the input ``row``.

    ``row`` includes the knot's ``input_scale``. ``p`` and ``q`` give the clean estimate, D = p x +
    q output. ``sizes``: the sizes of the row's coefficients, see ``Combination``.
    """

    knot: Knot
    row: Row
    p: float
    q: float
    sizes: Row = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class Draw:
    """An operation that appends standard normal noise for an interval of σ / α.

    ``start`` and ``end`` are the ends of the interval.
    """

    start: float
    end: float


@dataclass(frozen=True)
class Unconditional:
    """An operation that appends the unconditional half of the last evaluation.

    Without guidance it appends the evaluation itself.
    """


@dataclass(frozen=True)
class Unclipped:
    """An operation that appends the last evaluation before clipping.

    Without clipping it appends the evaluation itself.
    """


Operation = Evaluation | Draw | Unconditional | Unclipped


@dataclass(frozen=True)
class Step:
    """One step of a table: its operations, the next state's rows (x first), the estimate's row.

    ``denoised`` is the row of the clean estimate. ``sizes``: the sizes of the coefficients of the
    state's rows, see ``Combination``.
    """

    ops: tuple[Operation, ...]
    carry: tuple[Row, ...]
    denoised: Row
    sizes: tuple[Row, ...] = field(default=(), compare=False, repr=False)


class Trace:
    """The object that a method calls while it is traced.

    ``denoise``, ``evaluate`` and ``noise`` record an operation and return its result; ``knot``
    finds points of the curve between the knots of the grid.

    >>> trace = Trace(NoiseSchedule.scaled_linear(prediction="sample"), state=1)
    >>> trace.denoise(
    ...     Combination({0: 1.0}), Knot(999, 0.6, 0.8)
    ... ).row  # the network's output is x_0 itself
    ((1, 1.0),)
    """

    def __init__(self, schedule: NoiseSchedule, state: int) -> None:
        self.schedule = schedule
        self.ops: list[Operation] = []
        self.denoised = Combination({})
        self.keeps_marginals = True
        """A formula sets this to False if x_0 + noise misses the marginal of the next knot."""
        self._state = state
        self._drawn: list[tuple[Draw, Combination]] = []

    def _append(self, op: Operation) -> Combination:
        self.ops.append(op)
        return Combination({self._state + len(self.ops) - 1: 1.0})

    def evaluate(self, x: Combination, knot: Knot) -> tuple[Combination, Combination]:
        """Record an evaluation of the network on ``x`` at ``knot``.

        Returns the estimates (D, ε̂) of x_0 and ε.
        """
        return self._estimates(x, knot, self._append(self._evaluation(x, knot)))

    def denoise(self, x: Combination, knot: Knot) -> Combination:
        """Record an evaluation of the network on ``x`` at ``knot``; return the clean estimate D."""
        return self.evaluate(x, knot)[0]

    def unconditional(self, x: Combination, knot: Knot) -> tuple[Combination, Combination]:
        """Return (D, ε̂) of the unconditional half of the last evaluation, without a further call.

        The last evaluation must be at ``x`` and ``knot``.
        """
        return self._beside(x, knot, Unconditional())

    def unclipped(self, x: Combination, knot: Knot) -> tuple[Combination, Combination]:
        """Return (D, ε̂) of the last evaluation before any clipping, without a further call.

        The last evaluation must be at ``x`` and ``knot``.
        """
        return self._beside(x, knot, Unclipped())

    def _beside(self, x: Combination, knot: Knot, op: Operation) -> tuple[Combination, Combination]:
        denoised = self.denoised
        estimates = self._estimates(x, knot, self._append(op))
        self.denoised = denoised
        return estimates

    def _evaluation(self, x: Combination, knot: Knot) -> Evaluation:
        p, q = self.schedule.prediction.x0_coefficients(knot.alpha, knot.sigma)
        given = knot.input_scale * x
        return Evaluation(knot, given.row, float(p), float(q), given.size_row)

    def _estimates(
        self, x: Combination, knot: Knot, out: Combination
    ) -> tuple[Combination, Combination]:
        c0, c1 = self.schedule.prediction.coefficients(knot.alpha, knot.sigma)
        det = c0 * knot.sigma - c1 * knot.alpha
        self.denoised = (knot.sigma / det) * out - (c1 / det) * x
        return self.denoised, (c0 / det) * x - (knot.alpha / det) * out

    def noise(self, start: Knot, end: Knot) -> Combination:
        """Record standard normal noise for the step from ``start`` to ``end``.

        The noise is an increment of one Brownian path in σ/α. Overlapping draws of one step are not
        independent: an interval that contains an earlier draw reuses it and draws only the rest. So
        every recorded draw is an independent increment.
        """
        a, b = start.sigma_ve, end.sigma_ve
        inside = [(d, z) for d, z in self._drawn if _within(d, a, b)]
        if not inside:
            return self._draw(a, b)
        draw, z = inside[-1]
        rest = [
            (d.start, d.end) for d in (Draw(a, draw.start), Draw(draw.end, b)) if d.start != d.end
        ]
        total = (abs(draw.end - draw.start) ** 0.5) * z
        for low, high in rest:
            total = total + (abs(high - low) ** 0.5) * self._draw(low, high)
        return total / abs(b - a) ** 0.5

    def _draw(self, a: float, b: float) -> Combination:
        draw = Draw(a, b)
        z = self._append(draw)
        self._drawn.append((draw, z))
        return z

    def knot(self, half_log_snr: float) -> Knot:
        """Return the point of the curve with this λ = log(α / σ).

        The point may be slightly outside the curve's range.
        """
        return knot_at_half_log_snr(self.schedule, half_log_snr)

    def time(self, knot: Knot) -> float:
        """Return the curve's time of a knot; an integer at the timesteps of a discrete curve."""
        log_snr = torch.tensor([2 * knot.half_log_snr], dtype=torch.float64)
        t = self.schedule.curve.time(log_snr).item()
        return float(round(t)) if abs(t - round(t)) < 1e-9 else t

    def knot_at_time(self, t: float) -> Knot:
        """Return the point of the curve at one of its times."""
        return knots_at(self.schedule, [t])[0]


def _within(draw: Draw, a: float, b: float) -> bool:
    low, high = min(a, b), max(a, b)
    return low <= min(draw.start, draw.end) and max(draw.start, draw.end) <= high
