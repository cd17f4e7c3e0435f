"""Tracing: formulas compute with symbolic linear combinations, and their operations are recorded.

The basis of a step is the state (x, then the memory of earlier steps), then one entry for each
operation of the step, in order: the output of a network evaluation, or a noise draw. Rows are
linear combinations over this basis. The prediction type is included: with D = p x + q out the table
is linear in the network's raw output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..noising import NoiseSchedule
from .knots import Knot, Points

Row = tuple[tuple[int, float], ...]
"""A linear combination: pairs of a basis index and a coefficient, without zeros."""


class Combination:
    """A linear combination of basis vectors: the values of a formula while it is traced.

    ``sizes``, if they are followed: for each term, the sum of the absolute values of its inputs. It
    bounds the rounding error of the term.

    >>> x, D = Combination({0: 1.0}), Combination({1: 1.0})
    >>> (2.0 * x - D / 4).row
    ((0, 2.0), (1, -0.25))
    >>> x = Combination({0: 1.0}, sizes={0: 1.0})
    >>> (3.0 * x - 2.0 * x).size_row
    ((0, 5.0),)
    """

    __slots__ = ("sizes", "terms")  # thousands are made for a table

    def __init__(self, terms: dict[int, float], sizes: dict[int, float] | None = None) -> None:
        self.terms = terms
        self.sizes = sizes

    def __repr__(self) -> str:
        return f"Combination({self.terms})"

    def __add__(self, other: Combination) -> Combination:
        if self.sizes is not None:
            return weighted((self, other), (1.0, 1.0))
        terms = self.terms.copy()
        for k, c in other.terms.items():
            terms[k] = terms[k] + c if k in terms else c
        return Combination(terms)

    def __sub__(self, other: Combination) -> Combination:
        if self.sizes is not None:
            return weighted((self, other), (1.0, -1.0))
        terms = self.terms.copy()
        for k, c in other.terms.items():
            terms[k] = terms[k] - c if k in terms else -c
        return Combination(terms)

    def __mul__(self, factor: float) -> Combination:
        terms = {k: factor * c for k, c in self.terms.items()}
        if self.sizes is None:
            return Combination(terms)
        size = abs(factor)
        return Combination(terms, {k: size * c for k, c in self.sizes.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Combination:
        return self * (1.0 / divisor)

    @property
    def row(self) -> Row:
        """The terms with a coefficient other than 0, in the order of the basis."""
        return _row(self.terms)

    @property
    def size_row(self) -> Row:
        """The sizes as a row, including terms with a coefficient of 0; () if not followed."""
        return _row(self.sizes) if self.sizes else ()


def weighted(values: Sequence[Combination], weights: Sequence[float]) -> Combination:
    """Return Σ w_j v_j.

    >>> weighted([Combination({0: 1.0}), Combination({1: 1.0})], [2.0, -1.0]).row
    ((0, 2.0), (1, -1.0))
    """
    terms: dict[int, float] = {}
    for value, w in zip(values, weights, strict=True):
        for k, c in value.terms.items():
            terms[k] = terms[k] + w * c if k in terms else w * c
    if values[0].sizes is None:
        return Combination(terms)
    sizes: dict[int, float] = {}
    for value, w in zip(values, weights, strict=True):
        for k, c in (value.sizes or {}).items():
            sizes[k] = sizes.get(k, 0.0) + abs(w) * c
    return Combination(terms, sizes)


def _row(terms: dict[int, float]) -> Row:
    return tuple(sorted([(k, float(c)) for k, c in terms.items() if c]))


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class Draw:
    """An operation that appends standard normal noise for an interval of σ / α.

    ``start`` and ``end`` are the ends of the interval.
    """

    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Unconditional:
    """An operation that appends the unconditional half of the last evaluation.

    Without guidance it appends the evaluation itself.
    """


@dataclass(frozen=True, slots=True)
class Unclipped:
    """An operation that appends the last evaluation before clipping.

    Without clipping it appends the evaluation itself.
    """


Operation = Evaluation | Draw | Unconditional | Unclipped


@dataclass(frozen=True, slots=True)
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

    def __init__(
        self, schedule: NoiseSchedule, state: int, points: Points | None = None, sized: bool = False
    ) -> None:
        self.schedule = schedule
        self.ops: list[Operation] = []
        self.denoised = Combination({})
        self.keeps_marginals = True
        """A formula sets this to False if x_0 + noise misses the marginal of the next knot."""
        self._points = Points(schedule) if points is None else points
        self._sized = sized
        self._drawn: list[tuple[Draw, Combination]] = []
        self.state = [self._vector(k) for k in range(state)]

    def _vector(self, k: int) -> Combination:
        return Combination({k: 1.0}, {k: 1.0} if self._sized else None)

    def _append(self, op: Operation) -> Combination:
        self.ops.append(op)
        return self._vector(len(self.state) + len(self.ops) - 1)

    def evaluate(self, x: Combination, knot: Knot) -> tuple[Combination, Combination]:
        """Record an evaluation of the network on ``x`` at ``knot``.

        Returns the estimates (D, ε̂) of x_0 and ε.
        """
        p, q = self.schedule.prediction.x0_coefficients(knot.alpha, knot.sigma)
        given = x if knot.input_scale == 1 else knot.input_scale * x
        op = Evaluation(knot, given.row, float(p), float(q), given.size_row)
        return self._estimates(x, knot, self._append(op))

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

    def _estimates(
        self, x: Combination, knot: Knot, out: Combination
    ) -> tuple[Combination, Combination]:
        c0, c1 = self.schedule.prediction.coefficients(knot.alpha, knot.sigma)
        det = c0 * knot.sigma - c1 * knot.alpha
        self.denoised = weighted((out, x), (knot.sigma / det, -c1 / det))
        return self.denoised, weighted((x, out), (c0 / det, -knot.alpha / det))

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
        return self._points.at_half_log_snr(half_log_snr)

    def time(self, knot: Knot) -> float:
        """Return the curve's time of a knot; an integer at the timesteps of a discrete curve."""
        return self._points.time(knot)

    def knot_at_time(self, t: float) -> Knot:
        """Return the point of the curve at one of its times."""
        return self._points.at_time(t)


class Nothing(Combination):
    """What stands for every combination in a forecast: arithmetic gives itself."""

    def __add__(self, other: Combination) -> Combination:
        return self

    __sub__ = __add__

    def __mul__(self, factor: float) -> Combination:
        return self

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Combination:
        return self


class Forecast(Trace):
    """A trace that records only the points a formula asks for, in ``levels`` and ``times``.

    The points of a formula depend on the knots, not on x. So nothing is combined here, and a point
    that is not known yet is one of the same λ on a variance preserving path.

    >>> forecast = Forecast(schedule := NoiseSchedule.linear(), 1, Points(schedule))
    >>> round(forecast.knot(0.5).half_log_snr, 12), forecast.levels
    (0.5, [0.5])
    """

    def __init__(self, schedule: NoiseSchedule, state: int, points: Points) -> None:
        super().__init__(schedule, 0, points)
        self.denoised = Nothing({})
        self.state = [self.denoised] * state
        self.levels: list[float] = []
        self.times: list[float] = []

    def evaluate(self, x: Combination, knot: Knot) -> tuple[Combination, Combination]:
        return self.state[0], self.state[0]

    unconditional = unclipped = evaluate

    def noise(self, start: Knot, end: Knot) -> Combination:
        return self.state[0]

    def knot(self, half_log_snr: float) -> Knot:
        self.levels.append(half_log_snr)
        known = self._points.by_level.get(half_log_snr)
        return known or _variance_preserving(half_log_snr)

    def knot_at_time(self, t: float) -> Knot:
        self.times.append(t)
        return self._points.by_time.get(t) or _variance_preserving(0.0)


def _variance_preserving(half_log_snr: float) -> Knot:
    ratio = math.exp(-half_log_snr)
    alpha = 1 / math.hypot(1, ratio)
    return Knot(math.nan, alpha, alpha * ratio)


def _within(draw: Draw, a: float, b: float) -> bool:
    low, high = min(a, b), max(a, b)
    return low <= min(draw.start, draw.end) and max(draw.start, draw.end) <= high
