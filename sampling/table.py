"""A sampler is a table.

In every Gaussian sampler, a step is linear in the state x, the network's past outputs and fresh
noise. The coefficients depend only on the schedule and the grid. So a method is a short function in
the notation of its paper that computes with symbolic linear combinations. Tracing this function
over the knots of a grid gives the table, and one kernel runs every table.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..noising import NoiseSchedule, Prediction
from ..noising.utils.atomic import write_atomically
from ..noising.utils.config_reading import mapping, read_json, word
from .fitting.provenance import Provenance
from .fitting.table_file import TABLE_NAME, steps_from_config, steps_to_config
from .knots import Knot
from .tracing import Combination, Draw, Evaluation, Operation, Row, Step, Trace, Unconditional


@dataclass(frozen=True)
class Table:
    """A sampler for one schedule and grid: its knots and, for each step, operations and rows.

    The constructor checks that every coefficient is finite. With ``point_mass`` it also checks that
    x_0 + noise reaches exactly the marginal of every knot when the network knows x_0.
    ``print(table)`` shows the tableau.

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
    provenance: Provenance | None = None
    """What a fitted table was fitted to: see ``fit_table``."""

    def __post_init__(self) -> None:
        for i, step in enumerate(self.steps):
            rows = [
                *step.carry,
                step.denoised,
                *(op.row for op in step.ops if isinstance(op, Evaluation)),
            ]
            if not all(math.isfinite(c) for row in rows for _, c in row):
                raise ValueError(
                    f"{self.name}: step {i + 1} of {len(self.steps)} has a coefficient that is not "
                    "finite; use another grid or fewer steps"
                )
        if not self.point_mass:
            return
        for defect, rounding in point_mass_defects(self):
            if defect > ROUNDINGS * rounding:
                raise ValueError(
                    f"{self.name}: the table misses the marginals of its grid by {defect:.1e}; its "
                    "formula is wrong"
                )

    @property
    def evaluations(self) -> int:
        """The number of network calls."""
        return sum(isinstance(op, Evaluation) for step in self.steps for op in step.ops)

    @property
    def draws(self) -> int:
        """The number of noise draws."""
        return sum(isinstance(op, Draw) for step in self.steps for op in step.ops)

    def point_mass_defect(self) -> float:
        """Return the error of the table's marginals when all data are one point x_0.

        The denoiser is then D = x_0. From α x_0 + σ ε every step must reach mean α_n x_0 and
        standard deviation σ_n: like the consistency condition of a Runge-Kutta tableau. The error
        is relative to sqrt(α_n² + σ_n²).
        """
        return max((defect for defect, _ in point_mass_defects(self)), default=0.0)

    def to_config(self) -> dict[str, Any]:
        """Return a fitted table as plain JSON; :meth:`from_config` makes an equal one from it.

        Raises:
            ValueError: The table is not from ``fit_table``; samplers of known methods are made
                anew from their names.
        """
        if self.provenance is None:
            raise ValueError(
                f"{self.name}: only a table of fit_table is saved, which says what it was fitted "
                "to; save the name, the steps and the grid of another sampler"
            )
        return {
            "version": VERSION,
            "name": self.name,
            "provenance": self.provenance.to_config(),
            **steps_to_config(self.knots, self.steps),
        }

    @classmethod
    def from_config(cls, config: Any) -> Table:
        """Return the table of :meth:`to_config`.

        Raises:
            ValueError: A value is missing or has the wrong type.
        """
        config = mapping("a fitted table", config)
        if config.get("version") != VERSION:
            raise ValueError(
                f"a table of version {config.get('version')!r}, this alphabar reads version "
                f"{VERSION}; update alphabar, or fit the table anew"
            )
        provenance = Provenance.from_config(config.get("provenance"))
        knots, steps = steps_from_config(config)
        prediction = provenance.schedule.prediction
        return cls(word("name", config.get("name")), knots, steps, prediction, False, provenance)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a fitted table as JSON, exactly and atomically; return the file.

        Args:
            path: A file, or a folder, where the file is ``fitted_table.json``.

        Raises:
            ValueError: The table is not from ``fit_table``.
            OSError: The file cannot be written.
        """
        return write_atomically(_file(path), self.to_json())

    def to_json(self) -> str:
        """Return the text of the file of a fitted table."""
        return json.dumps(self.to_config(), indent=1) + "\n"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Table:
        """Return the table of :meth:`save`, equal to the saved one in every bit.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged; the error names it.
        """
        path = _file(path)
        config = read_json(path)
        try:
            return cls.from_config(config)
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is no fitted table: {error}") from error

    def __str__(self) -> str:
        counts = f"{len(self.steps)} steps, {self.evaluations} evaluations, {self.draws} draws"
        head = f"{self.name}: {counts}"
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


VERSION = 1
"""The version of the file of a fitted table."""

MAX_DIRECTIONS = 16
"""The number of independent noises that the check of marginals keeps apart."""

ROUNDINGS = 1000
"""The largest accepted rounding error of a coefficient, in rounding units.

The Adams weights, integrals over λ, lose 60 units; a wrong formula has an error of 1e9 or more.
"""


def compile_table(
    name: str,
    method: Callable[..., list[Combination]],
    knots: Sequence[Knot],
    schedule: NoiseSchedule,
    point_mass: bool = True,
    start: int = 0,
) -> Table:
    """Trace a method over the knots of a grid, from the knot ``start`` with nothing remembered.

    From a knot with α = 0 every method takes its first-order step and keeps no memory: see
    ``first_order``.
    """
    steps: list[Step] = []
    memory = 0
    for i in range(start, len(knots) - 1):
        state = [Combination({k: 1.0}) for k in range(1 + memory)]
        trace = Trace(schedule, len(state))
        carry = method(trace, knots, i, *state)
        # no memory is needed after the last step
        carry = carry if i < len(knots) - 2 else carry[:1]
        point_mass = point_mass and trace.keeps_marginals
        memory = len(carry) - 1
        rows, sizes = tuple(c.row for c in carry), tuple(c.size_row for c in carry)
        steps.append(Step(tuple(trace.ops), rows, trace.denoised.row, sizes))
    return Table(name, tuple(knots[start:]), tuple(steps), schedule.prediction, point_mass)


def point_mass_defects(table: Table) -> Iterable[tuple[float, float]]:
    """Yield, for each step, the error of its marginal when every evaluation knows x_0, and a bound.

    The bound is the part of the error that one rounding of each input can cause: the same sums with
    absolute values, including those that made the coefficients, times the rounding unit. It grows
    with the coefficients: the second evaluation of a step down from σ/α = 2e4 subtracts numbers of
    4e8, and a step from σ/α = 1348 to 4 keeps the rounding of 1348.
    """
    start = table.knots[0]
    # the state's coefficients of x_0, initial noise and draws; the magnitudes of their inputs
    state, sizes = [{0: start.alpha, 1: start.sigma}], [start.alpha + start.sigma]
    drawn = 1
    for step, n in zip(table.steps, table.knots[1:], strict=True):
        basis, bounds = list(state), list(sizes)
        for op in step.ops:
            if isinstance(op, Evaluation):  # D = p x + q out = x_0
                scale = -op.p / op.q / op.knot.input_scale
                out = {k: scale * c for k, c in _apply(op.row, basis).items()}
                out[0] = out.get(0, 0.0) + 1.0 / op.q
                basis.append(out)
                size = _size(op.sizes or op.row, bounds)
                bounds.append(1.0 / abs(op.q) + abs(scale) * size)
            elif isinstance(op, Draw):
                drawn += 1
                basis.append({drawn: 1.0})
                bounds.append(1.0)
            else:  # the unconditional or unclipped form of the last evaluation
                basis.append(basis[-1])
                bounds.append(bounds[-1])
        state = [_apply(row, basis) for row in step.carry]
        sizes = [_size(row, bounds) for row in step.sizes or step.carry]
        if drawn > MAX_DIRECTIONS:
            state, drawn = _compressed(state)
        x0 = state[0].get(0, 0.0)
        spread = math.sqrt(sum([c * c for k, c in state[0].items() if k]))
        norm = math.hypot(n.alpha, n.sigma)
        yield (
            max(abs(x0 - n.alpha), abs(spread - n.sigma)) / norm,
            sys.float_info.epsilon * sizes[0] / norm,
        )


def _file(path: str | os.PathLike[str]) -> Path:
    return Path(path, TABLE_NAME) if Path(path).is_dir() else Path(path)


def _compressed(state: Sequence[dict[int, float]]) -> tuple[list[dict[int, float]], int]:
    """Return vectors with equal coefficients of x_0 and equal products of their noise.

    The noise is over at most as many directions as there are vectors (Gram-Schmidt). Returns the
    number of directions too.
    """
    directions: list[dict[int, float]] = []
    vectors: list[dict[int, float]] = []
    for vector in state:
        rest = {k: c for k, c in vector.items() if k}
        shares: list[float] = []
        for direction in directions:
            share = sum([rest.get(k, 0.0) * c for k, c in direction.items()])
            shares.append(share)
            for k, c in direction.items():
                rest[k] = rest.get(k, 0.0) - share * c
        norm = math.sqrt(sum([c * c for c in rest.values()]))
        if norm:
            directions.append({k: c / norm for k, c in rest.items()})
            shares.append(norm)
        vectors.append({0: vector.get(0, 0.0)} | dict(enumerate(shares, 1)))
    return vectors, len(directions)


def _apply(row: Row, basis: Sequence[dict[int, float]]) -> dict[int, float]:
    total: dict[int, float] = {}
    for k, c in row:
        for part, value in basis[k].items():
            total[part] = total.get(part, 0.0) + c * value
    return total


def _size(row: Row, bounds: Sequence[float]) -> float:
    return sum([abs(c) * bounds[k] for k, c in row])


def _operation(op: Operation, i: int, names: Sequence[str]) -> tuple[str, str]:
    if isinstance(op, Evaluation):
        return f"out{i}", f"network({_shown(op.row, names)})"
    if isinstance(op, Draw):
        return f"z{i}", "noise"
    return f"out{i}", "its unconditional half" if isinstance(
        op, Unconditional
    ) else "itself, unclipped"


def _shown(row: Row, names: Sequence[str]) -> str:
    if len(row) == 1 and row[0][1] == 1.0:
        return names[row[0][0]]
    return " ".join(f"{c:+.6g} {names[k]}" for k, c in row) or "0"
