"""A sampler is a table.

Every Gaussian sampler's step is linear in its state x, the network's past outputs and fresh noise, with coefficients that
depend on the schedule and the grid alone. So a method is a short function in its paper's letters that computes with
symbolic linear combinations; tracing it over the knots of a grid gives the table, and one kernel runs every table.

In each step the basis is: the state (x, then what earlier steps remembered), then what this step's operations append, in
order: the output of an evaluation of the network, or a draw of noise. Rows are linear combinations over that basis.
The prediction type is folded in: with D = p x + q out the table is linear in the network's raw output.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..noising import NoiseSchedule, Prediction
from .knots import Knot, knot_at_half_log_snr, knots_at

Row = tuple[tuple[int, float], ...]
"""A linear combination: pairs of a place in the basis and a coefficient, without zeros."""


@dataclass(frozen=True)
class Combination:
    """A linear combination of basis vectors: what a formula computes with while it is traced.

    ``sizes``: for each term the sum of what went into it with all signs taken away, which says how much of it may be rounding.

    >>> x, D = Combination({0: 1.0}), Combination({1: 1.0})
    >>> (2.0 * x - D / 4).row
    ((0, 2.0), (1, -0.25))
    >>> (3.0 * x - 2.0 * x).size_row
    ((0, 5.0),)
    """

    terms: dict[int, float]
    sizes: dict[int, float] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.sizes:
            object.__setattr__(self, "sizes", {k: abs(c) for k, c in self.terms.items()})

    def __add__(self, other: Combination) -> Combination:
        terms, sizes = dict(self.terms), dict(self.sizes)
        for k, c in other.terms.items():
            terms[k] = terms.get(k, 0.0) + c
            sizes[k] = sizes.get(k, 0.0) + other.sizes[k]
        return Combination(terms, sizes)

    def __sub__(self, other: Combination) -> Combination:
        return self + -1.0 * other

    def __mul__(self, factor: float) -> Combination:
        return Combination(
            {k: factor * c for k, c in self.terms.items()}, {k: abs(factor) * c for k, c in self.sizes.items()}
        )

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Combination:
        return self * (1.0 / divisor)

    @property
    def row(self) -> Row:
        """The terms whose coefficient is not 0, in the order of the basis."""
        return tuple(sorted((k, float(c)) for k, c in self.terms.items() if c))

    @property
    def size_row(self) -> Row:
        """The sizes in the form of a row, also where a coefficient came to 0."""
        return tuple(sorted((k, float(c)) for k, c in self.sizes.items() if c))


@dataclass(frozen=True)
class Evaluation:
    """An operation that appends the network's raw output at ``knot``, for the input that ``row`` combines.

    ``row`` holds the knot's ``input_scale``; ``p`` and ``q`` give the clean estimate, D = p x + q output. ``sizes``: those of
    the row's coefficients, see ``Combination``.
    """

    knot: Knot
    row: Row
    p: float
    q: float
    sizes: Row = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class Draw:
    """An operation that appends standard normal noise; ``start`` and ``end`` name the stretch of σ / α that it drives."""

    start: float
    end: float


@dataclass(frozen=True)
class Unconditional:
    """An operation that appends the unconditional half of the evaluation before it (the same, where there is no guidance)."""


@dataclass(frozen=True)
class Unclipped:
    """An operation that appends the evaluation before it as the network gave it (the same, where nothing is clipped)."""


Operation = Evaluation | Draw | Unconditional | Unclipped


@dataclass(frozen=True)
class Step:
    """One step of a table: its operations, then the rows of the next state (x first), and the row of the clean estimate.

    ``sizes``: of the coefficients of the rows of the state, see ``Combination``.
    """

    ops: tuple[Operation, ...]
    carry: tuple[Row, ...]
    denoised: Row
    sizes: tuple[Row, ...] = field(default=(), compare=False, repr=False)


class Method(Protocol):
    """The step of a sampler: given the trace, the knots, the step's index, x and its memory, return [x_next, memory...]."""

    def __call__(
        self, trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *past: Combination
    ) -> list[Combination]: ...


class Trace:
    """What a method calls while it is traced: ``denoise``, ``evaluate`` and ``noise`` record an operation and return what it
    appends; ``knot`` finds points of the curve between the grid's knots.

    >>> trace = Trace(NoiseSchedule.scaled_linear(prediction="sample"), state=1)
    >>> trace.denoise(Combination({0: 1.0}), Knot(999, 0.6, 0.8)).row  # the network's output is x_0 itself
    ((1, 1.0),)
    """

    def __init__(self, schedule: NoiseSchedule, state: int) -> None:
        self.schedule = schedule
        self.ops: list[Operation] = []
        self.denoised = Combination({})
        self.keeps_marginals = True
        """A formula that does not carry x_0 + noise to exactly the marginal of the next knot says so by setting this."""
        self._state = state
        self._drawn: list[tuple[Draw, Combination]] = []

    def _append(self, op: Operation) -> Combination:
        self.ops.append(op)
        return Combination({self._state + len(self.ops) - 1: 1.0})

    def evaluate(self, x: Combination, knot: Knot) -> tuple[Combination, Combination]:
        """Record an evaluation of the network on ``x`` at ``knot``; return the estimates (D, ε̂) of x_0 and ε."""
        return self._estimates(x, knot, self._append(self._evaluation(x, knot)))

    def denoise(self, x: Combination, knot: Knot) -> Combination:
        """Record an evaluation of the network on ``x`` at ``knot``; return the clean estimate D of x_0."""
        return self.evaluate(x, knot)[0]

    def unconditional(self, x: Combination, knot: Knot) -> tuple[Combination, Combination]:
        """Return (D, ε̂) of the unconditional half of the last evaluation, which was of ``x`` at ``knot``: no further call."""
        return self._beside(x, knot, Unconditional())

    def unclipped(self, x: Combination, knot: Knot) -> tuple[Combination, Combination]:
        """Return (D, ε̂) of the last evaluation, which was of ``x`` at ``knot``, before any clipping: no further call."""
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

    def _estimates(self, x: Combination, knot: Knot, out: Combination) -> tuple[Combination, Combination]:
        c0, c1 = self.schedule.prediction.coefficients(knot.alpha, knot.sigma)
        det = c0 * knot.sigma - c1 * knot.alpha
        self.denoised = (knot.sigma / det) * out - (c1 / det) * x
        return self.denoised, (c0 / det) * x - (knot.alpha / det) * out

    def noise(self, start: Knot, end: Knot) -> Combination:
        """Record standard normal noise for the way from ``start`` to ``end``, as one Brownian path in σ/α would drive it.

        Draws of one step that overlap are not independent: a way that begins with one already drawn reuses that and draws
        only the rest, so that every recorded draw is an independent increment.
        """
        a, b = start.sigma_ve, end.sigma_ve
        inside = [(d, z) for d, z in self._drawn if _within(d, a, b)]
        if not inside:
            return self._draw(a, b)
        draw, z = inside[-1]
        rest = [(d.start, d.end) for d in (Draw(a, draw.start), Draw(draw.end, b)) if d.start != d.end]
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
        """Return the point of the curve with this λ = log(α / σ), also a little past the curve's ends."""
        return knot_at_half_log_snr(self.schedule, half_log_snr)

    def time(self, knot: Knot) -> float:
        """Return the curve's own time of a knot; an integer on a discrete curve's timesteps."""
        log_snr = torch.tensor([2 * knot.half_log_snr], dtype=torch.float64)
        t = self.schedule.curve.time(log_snr).item()
        return float(round(t)) if abs(t - round(t)) < 1e-9 else t

    def knot_at_time(self, t: float) -> Knot:
        """Return the point of the curve at one of its own times."""
        return knots_at(self.schedule, [t])[0]


def _within(draw: Draw, a: float, b: float) -> bool:
    low, high = min(a, b), max(a, b)
    return low <= min(draw.start, draw.end) and max(draw.start, draw.end) <= high


@dataclass(frozen=True)
class Table:
    """A sampler for one schedule and grid: its knots and, for each step, its operations and rows.

    A table checks itself at birth: every coefficient is finite, and with ``point_mass`` it carries x_0 + noise to exactly
    the marginal of every knot when the network knows x_0. ``print(table)`` shows the tableau.

    >>> from alphabar.noising import NoiseSchedule
    >>> from alphabar.sampling import Sampler
    >>> table = Sampler(NoiseSchedule.scaled_linear(), "dpmpp_2m", steps=3).table
    >>> table.evaluations, table.draws
    (3, 0)
    >>> print(table)  # doctest: +ELLIPSIS
    dpmpp_2m: 3 steps, 3 evaluations, 0 draws
    step 1  t = 999    sigma/alpha = 14.6146
      out0 = network(x)
      x    = ...
    """

    name: str
    knots: tuple[Knot, ...]
    steps: tuple[Step, ...]
    prediction: Prediction
    point_mass: bool = True

    def __post_init__(self) -> None:
        for i, step in enumerate(self.steps):
            rows = [*step.carry, step.denoised, *(op.row for op in step.ops if isinstance(op, Evaluation))]
            if not all(math.isfinite(c) for row in rows for _, c in row):
                raise ValueError(
                    f"{self.name}: step {i + 1} of {len(self.steps)} has a coefficient that is not finite; use another grid or fewer steps"
                )
        if not self.point_mass:
            return
        for defect, rounding in point_mass_defects(self):
            if defect > ROUNDINGS * rounding:
                raise ValueError(
                    f"{self.name}: the table misses the marginals of its grid by {defect:.1e}; its formula is wrong"
                )

    @property
    def evaluations(self) -> int:
        """How many times the network is called."""
        return sum(isinstance(op, Evaluation) for step in self.steps for op in step.ops)

    @property
    def draws(self) -> int:
        """How many times noise is drawn."""
        return sum(isinstance(op, Draw) for step in self.steps for op in step.ops)

    def point_mass_defect(self) -> float:
        """Return how far the table is from the exact marginals when all data are one point x_0.

        The denoiser is then D = x_0, and from α x_0 + σ ε every step must arrive at mean α_n x_0 and spread σ_n: the
        analogue of the consistency condition of a Runge-Kutta tableau. Relative to the spread that went in.
        """
        return max((defect for defect, _ in point_mass_defects(self)), default=0.0)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Return a matplotlib Figure of the knots and of every step's coefficients; written to ``path`` where it is given."""
        from .plotting import plot_table

        return plot_table(self, path)

    def __str__(self) -> str:
        head = f"{self.name}: {len(self.steps)} steps, {self.evaluations} evaluations, {self.draws} draws"
        lines = [head]
        memory = 0
        for i, (step, knot) in enumerate(zip(self.steps, self.knots, strict=False)):
            names = ["x", *(f"m{j}" for j in range(memory))]
            lines.append(f"step {i + 1}  t = {knot.timestep:<6g} sigma/alpha = {knot.sigma_ve:.6g}")
            for op in step.ops:
                name, what = _operation(op, i, names)
                name += "'" * sum(n.startswith(name) for n in names)
                lines.append(f"  {name:<4} = {what}")
                names.append(name)
            memory = len(step.carry) - 1
            for j, row in enumerate(step.carry):
                lines.append(f"  {'x' if j == 0 else f'm{j - 1}':<4} = {_shown(row, names)}")
        return "\n".join(lines)


ROUNDINGS = 1000
"""How many roundings a coefficient may be made of: the Adams weights, integrals over λ, lose 60 units; a wrong formula is off by
1e9 or more."""


def compile_table(
    name: str,
    method: Callable[..., list[Combination]],
    knots: Sequence[Knot],
    schedule: NoiseSchedule,
    point_mass: bool = True,
) -> Table:
    """Trace a method over the knots of a grid.

    From a knot with α = 0 every method takes its first-order step and remembers nothing: see ``first_order``.
    """
    steps: list[Step] = []
    memory = 0
    for i in range(len(knots) - 1):
        state = [Combination({k: 1.0}) for k in range(1 + memory)]
        trace = Trace(schedule, len(state))
        carry = method(trace, knots, i, *state)
        carry = carry if i < len(knots) - 2 else carry[:1]  # nothing is remembered after the last step
        point_mass = point_mass and trace.keeps_marginals
        memory = len(carry) - 1
        rows, sizes = tuple(c.row for c in carry), tuple(c.size_row for c in carry)
        steps.append(Step(tuple(trace.ops), rows, trace.denoised.row, sizes))
    return Table(name, tuple(knots), tuple(steps), schedule.prediction, point_mass)


def point_mass_defects(table: Table) -> Iterable[tuple[float, float]]:
    """Yield, for each step, how far it ends from the exact marginal when every evaluation knows x_0, and how much of that one
    rounding of each number that went in may be: the same sums with all signs taken away, those that made the coefficients
    included, times the rounding unit. It grows with the coefficients: the second evaluation of a step down from σ/α = 2e4
    subtracts numbers of 4e8, and a step from σ/α = 1348 to 4 keeps the rounding of 1348.
    """
    start = table.knots[0]
    # what the state holds of x_0, the initial noise, then each draw; and how large the numbers were that it was made of
    state, sizes = [Combination({0: start.alpha, 1: start.sigma})], [start.alpha + start.sigma]
    drawn = 1
    for step, n in zip(table.steps, table.knots[1:], strict=True):
        basis, bounds = list(state), list(sizes)
        for op in step.ops:
            if isinstance(op, Evaluation):  # D = p x + q out = x_0
                x, scale = _apply(op.row, basis) / op.knot.input_scale, op.knot.input_scale
                basis.append((Combination({0: 1.0}) - op.p * x) / op.q)
                bounds.append((1.0 + abs(op.p) * _size(op.sizes or op.row, bounds) / scale) / abs(op.q))
            elif isinstance(op, Draw):
                drawn += 1
                basis.append(Combination({drawn: 1.0}))
                bounds.append(1.0)
            else:  # the unconditional or unclipped form of the evaluation before
                basis.append(basis[-1])
                bounds.append(bounds[-1])
        state = [_apply(row, basis) for row in step.carry]
        sizes = [_size(row, bounds) for row in step.sizes or step.carry]
        x0, spread = state[0].terms.get(0, 0.0), math.sqrt(sum(c * c for k, c in state[0].terms.items() if k))
        norm = math.hypot(n.alpha, n.sigma)
        yield max(abs(x0 - n.alpha), abs(spread - n.sigma)) / norm, sys.float_info.epsilon * sizes[0] / norm


def _apply(row: Row, basis: Sequence[Combination]) -> Combination:
    total: dict[int, float] = {}
    for k, c in row:
        for part, value in basis[k].terms.items():
            total[part] = total.get(part, 0.0) + c * value
    return Combination(total)


def _size(row: Row, bounds: Sequence[float]) -> float:
    return sum(abs(c) * bounds[k] for k, c in row)


def _operation(op: Operation, i: int, names: Sequence[str]) -> tuple[str, str]:
    if isinstance(op, Evaluation):
        return f"out{i}", f"network({_shown(op.row, names)})"
    if isinstance(op, Draw):
        return f"z{i}", "noise"
    return f"out{i}", "its unconditional half" if isinstance(op, Unconditional) else "itself, unclipped"


def _shown(row: Row, names: Sequence[str]) -> str:
    if len(row) == 1 and row[0][1] == 1.0:
        return names[row[0][0]]
    return " ".join(f"{c:+.6g} {names[k]}" for k, c in row) or "0"
