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
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from struct import Struct, unpack_from
from typing import Any, TypeVar, overload

from ..noising import NoiseSchedule, Prediction
from ..noising.utils.atomic import write_atomically
from ..noising.utils.config_reading import mapping, read_json, word
from .fitting.provenance import Provenance
from .fitting.table_file import TABLE_NAME, steps_from_config, steps_to_config
from .knots import Knot, Points
from .tracing import (
    Combination,
    Draw,
    Evaluation,
    Forecast,
    Operation,
    Row,
    Step,
    Trace,
    Unconditional,
)


class MarginalError(ValueError):
    """A table misses the marginals of its grid."""


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
    steps: Sequence[Step]
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
            if not math.isfinite(sum([c for row in rows for _, c in row])):
                raise ValueError(
                    f"{self.name}: step {i + 1} of {len(self.steps)} has a coefficient that is not "
                    "finite; use another grid or fewer steps"
                )
        for defect, rounding in point_mass_defects(self) if self.point_mass else ():
            if defect > ROUNDINGS * rounding:
                raise MarginalError(
                    f"{self.name}: the table misses the marginals of its grid by {defect:.1e}; its "
                    "formula is wrong"
                )
        if len(self.steps) > MOST_UNPACKED and not isinstance(self.steps, PackedSteps):
            object.__setattr__(self, "steps", PackedSteps.of(self.steps))

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


MOST_UNPACKED = 256
"""The number of steps up to which a table keeps them as objects."""

_PLACE = Struct("=IQ")  # of a step: its pattern, and the place of its first number
Indices = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PackedSteps(Sequence[Step]):
    """The steps of a long table in a tenth of the memory; a step is made when it is asked for.

    Most steps differ in their numbers only. The numbers of all steps are float64 in ``numbers``;
    the rest, kinds of operations and indices of rows, is in one of the few ``patterns``.

    >>> steps = (Step((Draw(2.0, 1.0),), (((0, 0.5), (1, 0.1)),), ((0, 1.0),)),) * 3
    >>> packed = PackedSteps.of(steps)
    >>> tuple(packed) == steps, len(packed.patterns)
    (True, 1)
    """

    patterns: tuple[tuple[tuple[Any, ...], tuple[tuple[Indices, ...], ...], int], ...]
    places: bytes
    numbers: bytes

    @classmethod
    def of(cls, steps: Sequence[Step]) -> PackedSteps:
        """Return the same steps, packed."""
        patterns: dict[tuple[Any, ...], int] = {}
        places, numbers = bytearray(), array("d")
        for step in steps:
            start, ops = len(numbers), list[Any]()
            for op in step.ops:
                if isinstance(op, Evaluation):
                    k = op.knot
                    numbers.extend((k.timestep, k.alpha, k.sigma, k.input_scale, op.p, op.q))
                    ops.append(_taken((op.row, op.sizes), numbers))
                elif isinstance(op, Draw):
                    numbers.extend((op.start, op.end))
                    ops.append(Draw)
                else:
                    ops.append(op)
            rows = tuple(_taken(r, numbers) for r in (step.carry, (step.denoised,), step.sizes))
            pattern = tuple(ops), rows, len(numbers) - start
            places += _PLACE.pack(patterns.setdefault(pattern, len(patterns)), start)
        return cls(tuple(patterns), bytes(places), numbers.tobytes())

    def __len__(self) -> int:
        return len(self.places) // _PLACE.size

    @overload
    def __getitem__(self, index: int) -> Step: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Step, ...]: ...
    def __getitem__(self, index: int | slice) -> Step | tuple[Step, ...]:
        places = range(len(self))[index]
        return self._step(places) if isinstance(places, int) else tuple(map(self._step, places))

    def _step(self, place: int) -> Step:
        pattern, start = _PLACE.unpack_from(self.places, _PLACE.size * place)
        kinds, rows, count = self.patterns[pattern]
        numbers = iter(unpack_from(f"{count}d", self.numbers, 8 * start))
        ops: list[Operation] = []
        for kind in kinds:
            if isinstance(kind, tuple):
                *knot, p, q = islice(numbers, 6)
                row, sizes = _given(kind, numbers)
                ops.append(Evaluation(Knot(*knot), row, p, q, sizes))
            else:
                ops.append(Draw(*islice(numbers, 2)) if kind is Draw else kind)
        carry, (denoised,), sizes = (_given(indices, numbers) for indices in rows)
        return Step(tuple(ops), carry, denoised, sizes)


def _taken(rows: Sequence[Row], numbers: array[float]) -> tuple[Indices, ...]:
    """Append the coefficients of rows to ``numbers``; return the indices."""
    numbers.extend([c for row in rows for _, c in row])
    return tuple([tuple([k for k, _ in row]) for row in rows])


def _given(rows: Sequence[Indices], numbers: Iterator[float]) -> tuple[Row, ...]:
    """Return the rows of these indices, with coefficients from ``numbers``."""
    return tuple([tuple(zip(indices, numbers, strict=False)) for indices in rows])


VERSION = 1
"""The version of the file of a fitted table."""

MAX_DIRECTIONS = 16
"""The number of independent noises that the check of marginals keeps apart."""

ROUNDINGS = 1000
"""The largest accepted rounding error of a coefficient, in rounding units.

The Adams weights, integrals over λ, lose 60 units; a wrong formula has an error of 1e9 or more.
"""


Formula = Callable[..., list[Combination]]
T = TypeVar("T", bound=Trace)


def compile_table(
    name: str,
    method: Formula,
    knots: Sequence[Knot],
    schedule: NoiseSchedule,
    point_mass: bool = True,
    start: int = 0,
) -> Table:
    """Trace a method over the knots of a grid, from the knot ``start`` with nothing remembered.

    From a knot with α = 0 every method takes its first-order step and keeps no memory: see
    ``first_order``.
    """

    def foresee(points: Points) -> tuple[list[float], list[float]]:
        levels: list[float] = []
        times: list[float] = []
        with suppress(ArithmeticError, ValueError):  # a formula may stumble over unknown points
            for trace, _ in _traced(
                method, knots, start, partial(Forecast, schedule, points=points)
            ):
                levels += trace.levels
                times += trace.times
        return levels, times

    points = Points(schedule, knots, foresee)

    def table(sized: bool) -> Table:
        steps: list[Step] = []
        keeps = point_mass
        for trace, carry in _traced(
            method, knots, start, partial(Trace, schedule, points=points, sized=sized)
        ):
            keeps = keeps and trace.keeps_marginals
            rows = tuple([c.row for c in carry])
            sizes = tuple([c.size_row for c in carry]) if sized else ()
            steps.append(Step(tuple(trace.ops), rows, trace.denoised.row, sizes))
        return Table(name, tuple(knots[start:]), tuple(steps), schedule.prediction, keeps)

    try:
        return table(sized=False)
    except MarginalError:  # beyond the rounding of the rows; that of their inputs may be larger
        return table(sized=True)


def _traced(
    method: Formula, knots: Sequence[Knot], start: int, new: Callable[[int], T]
) -> Iterator[tuple[T, list[Combination]]]:
    """Yield the trace of each step and the next state; ``new(states)`` makes a trace."""
    memory, last = 0, len(knots) - 2
    for i in range(start, len(knots) - 1):
        trace = new(1 + memory)
        carry = method(trace, knots, i, *trace.state)
        # no memory is needed after the last step
        carry = carry if i < last else carry[:1]
        memory = len(carry) - 1
        yield trace, carry


def point_mass_defects(table: Table) -> Iterable[tuple[float, float]]:
    """Yield, for each step, the error of its marginal when every evaluation knows x_0, and a bound.

    The bound is the part of the error that one rounding of each input can cause: the same sums with
    absolute values, including those that made the coefficients, times the rounding unit. It grows
    with the coefficients: the second evaluation of a step down from σ/α = 2e4 subtracts numbers of
    4e8, and a step from σ/α = 1348 to 4 keeps the rounding of 1348.
    """
    start = table.knots[0]
    # the state's coefficients of x_0, initial noise and draws; the magnitudes of their inputs
    state, sizes = [[start.alpha, start.sigma]], [start.alpha + start.sigma]
    for step, n in zip(table.steps, table.knots[1:], strict=True):
        draws = sum([isinstance(op, Draw) for op in step.ops])
        if len(state[0]) - 1 + draws > max(MAX_DIRECTIONS, len(state) + draws):
            state = _compressed(state)
        new = len(state[0])
        basis, bounds = [vector + [0.0] * draws for vector in state], list(sizes)
        for op in step.ops:
            if isinstance(op, Evaluation):  # D = p x + q out = x_0
                scale = -op.p / op.q / op.knot.input_scale
                out = [scale * c for c in _apply(op.row, basis)]
                out[0] += 1.0 / op.q
                basis.append(out)
                size = _size(op.sizes or op.row, bounds)
                bounds.append(1.0 / abs(op.q) + abs(scale) * size)
            elif isinstance(op, Draw):
                basis.append([0.0] * len(basis[0]))
                basis[-1][new] = 1.0
                new += 1
                bounds.append(1.0)
            else:  # the unconditional or unclipped form of the last evaluation
                basis.append(basis[-1])
                bounds.append(bounds[-1])
        state = [_apply(row, basis) for row in step.carry]
        sizes = [_size(row, bounds) for row in step.sizes or step.carry]
        x0, *noise = state[0]
        spread = math.sqrt(sum([c * c for c in noise]))
        norm = math.hypot(n.alpha, n.sigma)
        yield (
            max(abs(x0 - n.alpha), abs(spread - n.sigma)) / norm,
            sys.float_info.epsilon * sizes[0] / norm,
        )


def _file(path: str | os.PathLike[str]) -> Path:
    return Path(path, TABLE_NAME) if Path(path).is_dir() else Path(path)


def _compressed(state: Sequence[list[float]]) -> list[list[float]]:
    """Return vectors with equal coefficients of x_0 and equal products of their noise.

    The noise is over as many directions as there are vectors (Gram-Schmidt).
    """
    directions: list[list[float]] = []
    vectors: list[list[float]] = []
    for x0, *rest in state:
        shares: list[float] = []
        for direction in directions:
            share = sum([r * c for r, c in zip(rest, direction, strict=True)])
            shares.append(share)
            rest = [r - share * c for r, c in zip(rest, direction, strict=True)]
        norm = math.sqrt(sum([r * r for r in rest]))
        shares.append(norm)
        directions.append([r / norm for r in rest] if norm else rest)
        vectors.append([x0, *shares])
    return [vector + [0.0] * (len(state) + 1 - len(vector)) for vector in vectors]


def _apply(row: Row, basis: Sequence[list[float]]) -> list[float]:
    if not row:
        return [0.0] * len(basis[0])
    k, c = row[0]
    total = [c * v for v in basis[k]]
    for k, c in row[1:]:
        total = [t + c * v for t, v in zip(total, basis[k], strict=True)]
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
