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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..noising import Prediction
from .knots import Knot

Row = tuple[tuple[int, float], ...]
"""A linear combination: pairs of a place in the basis and a coefficient, without zeros."""


@dataclass(frozen=True)
class Combination:
    """A linear combination of basis vectors: what a formula computes with while it is traced.

    >>> x, D = Combination({0: 1.0}), Combination({1: 1.0})
    >>> (2.0 * x - D / 4).row
    ((0, 2.0), (1, -0.25))
    """

    terms: dict[int, float]

    def __add__(self, other: Combination) -> Combination:
        keys = {**self.terms, **other.terms}
        return Combination({k: self.terms.get(k, 0.0) + other.terms.get(k, 0.0) for k in keys})

    def __sub__(self, other: Combination) -> Combination:
        return self + -1.0 * other

    def __mul__(self, factor: float) -> Combination:
        return Combination({k: factor * c for k, c in self.terms.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Combination:
        return self * (1.0 / divisor)

    @property
    def row(self) -> Row:
        """The terms whose coefficient is not 0, in the order of the basis."""
        return tuple(sorted((k, float(c)) for k, c in self.terms.items() if c))


@dataclass(frozen=True)
class Evaluation:
    """An operation that appends the network's raw output at ``knot``, for the input that ``row`` combines.

    ``p`` and ``q`` give the clean estimate, D = p input + q output.
    """

    knot: Knot
    row: Row
    p: float
    q: float


@dataclass(frozen=True)
class Draw:
    """An operation that appends standard normal noise; ``start`` and ``end`` name the stretch of σ / α that it drives."""

    start: float
    end: float


@dataclass(frozen=True)
class Step:
    """One step of a table: its operations, then the rows of the next state (x first), and the row of the clean estimate."""

    ops: tuple[Evaluation | Draw, ...]
    carry: tuple[Row, ...]
    denoised: Row


class Method(Protocol):
    """The step of a sampler: given the trace, the knots, the step's index, x and its memory, return [x_next, memory...]."""

    def __call__(
        self, trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *past: Combination
    ) -> list[Combination]: ...


class Trace:
    """What a method calls while it is traced: ``denoise`` and ``noise`` record an operation and return its combination.

    >>> from alphabar.noising.prediction import Sample
    >>> trace = Trace(Sample(), state=1)
    >>> trace.denoise(Combination({0: 1.0}), Knot(999, 0.6, 0.8)).row  # the network's output is x_0 itself
    ((1, 1.0),)
    """

    def __init__(self, prediction: Prediction, state: int) -> None:
        self.prediction = prediction
        self.ops: list[Evaluation | Draw] = []
        self.denoised = Combination({})
        self._state = state

    def _append(self, op: Evaluation | Draw) -> Combination:
        self.ops.append(op)
        return Combination({self._state + len(self.ops) - 1: 1.0})

    def denoise(self, x: Combination, knot: Knot) -> Combination:
        """Record an evaluation of the network on ``x`` at ``knot``; return the clean estimate D of x_0."""
        p, q = self.prediction.x0_coefficients(knot.alpha, knot.sigma)
        out = self._append(Evaluation(knot, x.row, float(p), float(q)))
        self.denoised = p * x + q * out
        return self.denoised

    def noise(self, start: Knot, end: Knot) -> Combination:
        """Record a draw of standard normal noise for the way from ``start`` to ``end``."""
        return self._append(Draw(start.sigma_ve, end.sigma_ve))


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
        largest = 1.0
        for i, step in enumerate(self.steps):
            rows = [*step.carry, step.denoised, *(op.row for op in step.ops if isinstance(op, Evaluation))]
            if not all(math.isfinite(c) for row in rows for _, c in row):
                raise ValueError(
                    f"{self.name}: step {i + 1} of {len(self.steps)} has a coefficient that is not finite; use another grid or fewer steps"
                )
            largest = max([largest, *(abs(c) for row in rows for _, c in row)])
        # rounding grows with the coefficients: heun's first step down from σ / α = 2e4 has some of 2e4
        if self.point_mass and (defect := self.point_mass_defect()) > 1e-9 * largest:
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
        return max(point_mass_defects(self), default=0.0)

    def __str__(self) -> str:
        head = f"{self.name}: {len(self.steps)} steps, {self.evaluations} evaluations, {self.draws} draws"
        lines = [head]
        memory = 0
        for i, (step, knot) in enumerate(zip(self.steps, self.knots, strict=False)):
            names = ["x", *(f"m{j}" for j in range(memory))]
            lines.append(f"step {i + 1}  t = {knot.timestep:<6g} sigma/alpha = {knot.sigma_ve:.6g}")
            for op in step.ops:
                is_evaluation = isinstance(op, Evaluation)
                name = f"out{i}" if is_evaluation else f"z{i}"
                name += "'" * sum(n.startswith(name) for n in names)
                lines.append(
                    f"  {name:<4} = " + (f"network({_shown(op.row, names)})" if isinstance(op, Evaluation) else "noise")
                )
                names.append(name)
            memory = len(step.carry) - 1
            for j, row in enumerate(step.carry):
                lines.append(f"  {'x' if j == 0 else f'm{j - 1}':<4} = {_shown(row, names)}")
        return "\n".join(lines)


def compile_table(
    name: str,
    method: Callable[..., list[Combination]],
    knots: Sequence[Knot],
    prediction: Prediction,
    point_mass: bool = True,
) -> Table:
    """Trace a method over the knots of a grid.

    From a knot with α = 0 every method takes its first-order step and remembers nothing: see ``first_order``.
    """
    steps: list[Step] = []
    memory = 0
    for i in range(len(knots) - 1):
        state = [Combination({k: 1.0}) for k in range(1 + memory)]
        trace = Trace(prediction, len(state))
        carry = method(trace, knots, i, *state)
        memory = len(carry) - 1
        steps.append(Step(tuple(trace.ops), tuple(c.row for c in carry), trace.denoised.row))
    return Table(name, tuple(knots), tuple(steps), prediction, point_mass)


def point_mass_defects(table: Table) -> Iterable[float]:
    """Yield, for each step, how far it ends from the exact marginal when every evaluation knows x_0."""
    start = table.knots[0]
    # vectors over (x_0, the initial noise, then each draw): what the state holds of each
    state: list[Combination] = [Combination({0: start.alpha, 1: start.sigma})]
    drawn = 1
    for step, n in zip(table.steps, table.knots[1:], strict=True):
        basis = list(state)
        for op in step.ops:
            if isinstance(op, Draw):
                drawn += 1
                basis.append(Combination({drawn: 1.0}))
            else:  # D = p x + q out = x_0
                basis.append((Combination({0: 1.0}) - op.p * _apply(op.row, basis)) / op.q)
        state = [_apply(row, basis) for row in step.carry]
        x = state[0].terms
        spread = math.sqrt(sum(c * c for k, c in x.items() if k))
        yield max(abs(x.get(0, 0.0) - n.alpha), abs(spread - n.sigma)) / math.hypot(n.alpha, n.sigma)


def _apply(row: Row, basis: Sequence[Combination]) -> Combination:
    total = Combination({})
    for k, c in row:
        total = total + c * basis[k]
    return total


def _shown(row: Row, names: Sequence[str]) -> str:
    if len(row) == 1 and row[0][1] == 1.0:
        return names[row[0][0]]
    return " ".join(f"{c:+.6g} {names[k]}" for k, c in row) or "0"
