"""Exact answers that the tests compare with.

For data x_0 ~ N(mean, spread²) everything is known in closed form: the marginals, the best
denoiser, the probability flow. The denoiser is affine in x, so a table becomes an affine map of the
start and its draws, and mean and variance travel through it exactly. With spread 0 the data are one
point. The functions here measure; the tests judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from alphabar.noising import PREDICTIONS, NoiseSchedule, Prediction
from alphabar.sampling import Knot, Table
from alphabar.sampling.kernel import combine
from alphabar.sampling.table import compile_table
from alphabar.sampling.tracing import Draw, Evaluation, Step

Formula = Callable[..., Any]
SCHEDULES = {
    "scaled_linear": NoiseSchedule.scaled_linear(),
    "ztsnr": NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr(),
    "squaredcos": NoiseSchedule.squaredcos_cap_v2(),
    "flow": NoiseSchedule.flow(shift=3.0),
    "shifted_ztsnr": NoiseSchedule.scaled_linear(prediction="v_prediction")
    .shifted(1.7)
    .zero_terminal_snr(),
}
EVERY_SCHEDULE = SCHEDULES | {  # more curves, for the tests that are fast
    "sigmoid": NoiseSchedule.sigmoid(),
    "exp": NoiseSchedule.exp(),
    "laplace": NoiseSchedule.laplace(),
    "shifted": NoiseSchedule.scaled_linear().shifted(1.7),
    "flow_part": NoiseSchedule.flow(shift=3.0).truncated(0.0, 0.6),
    "discrete_part": NoiseSchedule.scaled_linear(prediction="v_prediction")
    .zero_terminal_snr()
    .truncated(300, 999),
    "variance_preserving": NoiseSchedule.variance_preserving(),
    "variance_preserving_shifted": NoiseSchedule.variance_preserving().shifted(0.5),
    "sub_variance_preserving": NoiseSchedule.sub_variance_preserving(),
    "variance_exploding": NoiseSchedule.variance_exploding(sigma_max=50.0),
    "karras": NoiseSchedule.karras(),
    "cosine": NoiseSchedule.cosine().shifted_for_resolution(128, 64),
}
ALL_PREDICTIONS = [kind() for kind in PREDICTIONS.values()]


def allowed(
    schedule: NoiseSchedule, predictions: Sequence[Prediction] = ALL_PREDICTIONS
) -> list[NoiseSchedule]:
    """Return the schedule with every prediction type that is well-posed on it."""
    ill_posed = ("epsilon", "score") if schedule.has_zero_terminal_snr else ()
    return [schedule.with_prediction(p) for p in predictions if p.name not in ill_posed]


@dataclass(frozen=True)
class Gaussian:
    """Data x_0 ~ N(mean, spread²)."""

    mean: float = 0.7
    spread: float = 0.4

    def marginal(self, knot: Knot) -> tuple[float, float]:
        """Mean and standard deviation of x at a knot."""
        return knot.alpha * self.mean, math.hypot(knot.alpha * self.spread, knot.sigma)

    def denoiser(self, knot: Knot) -> tuple[float, float]:
        """(a, b) of E[x_0 | x] = a x + b."""
        mean, deviation = self.marginal(knot)
        slope = self.spread**2 * knot.alpha / deviation**2
        return slope, self.mean - slope * mean

    def output(self, prediction: Prediction, knot: Knot) -> tuple[float, float]:
        """(a, b) of the network's raw output a x + b, x as it is shown to the network."""
        a, b = self.denoiser(knot)
        c0, c1 = (float(c) for c in prediction.coefficients(knot.alpha, knot.sigma))
        slope = c0 * a + c1 * (1 - knot.alpha * a) / knot.sigma
        return slope / knot.input_scale, c0 * b - c1 * knot.alpha * b / knot.sigma

    def flow(self, x: torch.Tensor, s: Knot, n: Knot) -> torch.Tensor:
        """Carry x from s to n along the exact probability flow: it keeps its place in units of the
        deviation.
        """
        (mean_s, deviation_s), (mean_n, deviation_n) = self.marginal(s), self.marginal(n)
        return mean_n + (x - mean_s) * (deviation_n / deviation_s)

    def network(self, prediction: Prediction) -> Callable[[torch.Tensor, Knot], torch.Tensor]:
        """The ideal network, in the form that the kernel calls."""

        def evaluate(x: torch.Tensor, knot: Knot) -> torch.Tensor:
            a, b = self.output(prediction, knot)
            return a * x + b

        return evaluate


def vp_knots(half_log_snrs: Sequence[float]) -> tuple[Knot, ...]:
    """Knots of a variance preserving path at these λ = log(α / σ)."""
    return tuple(
        Knot(float(i), 1 / math.sqrt(1 + math.exp(-2 * h)), 1 / math.sqrt(1 + math.exp(2 * h)))
        for i, h in enumerate(half_log_snrs)
    )


def even_grid(steps: int, low: float = -2.0, high: float = 2.0) -> tuple[Knot, ...]:
    return vp_knots(np.linspace(low, high, steps + 1).tolist())


def zigzag_grid(steps: int, low: float = -2.0, high: float = 2.0) -> tuple[Knot, ...]:
    """Steps that alternate h, 3h in λ."""
    widths = np.where(np.arange(steps) % 2 == 0, 1.0, 3.0)
    return vp_knots([low, *(low + (high - low) * np.cumsum(widths) / widths.sum()).tolist()])


def traced(
    formula: Formula, knots: Sequence[Knot], prediction: Prediction, **options: Any
) -> Table:
    """A table that is not checked at birth, so that wrong formulas can be measured."""

    def method(*arguments: Any) -> Any:
        return formula(*arguments, **options)

    # where the points between the knots lie; its path is theirs
    schedule = NoiseSchedule.scaled_linear(prediction=prediction)
    return compile_table("traced", method, knots, schedule, point_mass=False)


def slope(errors: Sequence[float]) -> float:
    """The order that errors at halved steps show: the last log2 of a ratio."""
    return math.log2(errors[-2] / errors[-1])


def no_noise(start: float, end: float) -> torch.Tensor:
    raise AssertionError("a deterministic method drew noise")


DATA = Gaussian()
START = torch.tensor([[-1.3], [0.2], [2.1]], dtype=torch.float64)
V = PREDICTIONS["v_prediction"]()
COUNTS = (80, 160)
MANY = (480, 960)


WARM_UP = 6


def global_order(
    formula: Formula,
    grid: Callable[[int], tuple[Knot, ...]] = zigzag_grid,
    prediction: Prediction = V,
    rewrites: Sequence[int] = (),
    counts: Sequence[int] = MANY,
    **options: Any,
) -> float:
    """The order of the error at the end of a run, against the exact probability flow.

    As usual for methods that remember, the starting values are exact: x is put on the trajectory in
    the first steps.
    """
    return slope(
        [_global_error(traced(formula, grid(n), prediction, **options), rewrites) for n in counts]
    )


def _global_error(table: Table, rewrites: Sequence[int]) -> float:
    state, evaluate = [START], DATA.network(table.prediction)
    for i, step in enumerate(table.steps):
        state = advance(step, state, evaluate)
        if i < WARM_UP:
            put_back(state, table, i, rewrites)
    return float((state[0] - DATA.flow(START, table.knots[0], table.knots[-1])).abs().max())


def local_order(
    formula: Formula,
    prediction: Prediction = V,
    rewrites: Sequence[int] = (),
    block: int = 1,
    counts: Sequence[int] = COUNTS,
    **options: Any,
) -> float:
    """The order of the worst single step from the exact trajectory, on an irregular grid, with the
    memory kept.

    A method that climbs in blocks is judged where a block ends, and one that ``rewrites`` x with
    its next evaluation by what it has made of it then.
    """
    tables = [traced(formula, zigzag_grid(n), prediction, **options) for n in counts]
    return slope([max(local_errors(table, rewrites, block)) for table in tables])


def local_errors(table: Table, rewrites: Sequence[int] = (), block: int = 1) -> Iterator[float]:
    state, evaluate = [START], DATA.network(table.prediction)
    for i, step in enumerate(table.steps):
        state = advance(step, state, evaluate)
        if (i + 1) % block:
            continue
        place, at = (rewrites[0], i) if rewrites else (0, i + 1)
        if i >= WARM_UP and place < len(state):
            yield float(
                (state[place] - DATA.flow(START, table.knots[0], table.knots[at])).abs().max()
            )
        put_back(state, table, i, rewrites)


def put_back(state: list[torch.Tensor], table: Table, i: int, rewrites: Sequence[int]) -> None:
    """Put x after step i, and the earlier x that the memory holds, on the exact trajectory."""
    state[0] = DATA.flow(START, table.knots[0], table.knots[i + 1])
    for place in rewrites:
        if place < len(state):
            state[place] = DATA.flow(START, table.knots[0], table.knots[i])


def advance(
    step: Step, state: list[torch.Tensor], evaluate: Callable[[torch.Tensor, Knot], torch.Tensor]
) -> list[torch.Tensor]:
    basis = list(state)
    for op in step.ops:
        assert not isinstance(op, Draw), "a deterministic method drew noise"
        basis.append(
            evaluate(combine(op.row, basis), op.knot) if isinstance(op, Evaluation) else basis[-1]
        )
    return [combine(row, basis) for row in step.carry]


def moments(table: Table, data: Gaussian) -> Iterator[tuple[float, float]]:
    """Mean and variance of x after each step, from the exact marginal of the first knot, without
    sampling.
    """
    mean, deviation = data.marginal(table.knots[0])
    unit = np.eye(2 + table.draws)  # the coordinates: 1, the noise of the start, then each draw
    state, drawn = [mean * unit[0] + deviation * unit[1]], 1
    for step in table.steps:
        basis = list(state)
        for op in step.ops:
            if isinstance(op, Evaluation):
                a, b = data.output(table.prediction, op.knot)
                basis.append(a * _row(op.row, basis) + b * unit[0])
            elif isinstance(op, Draw):
                drawn += 1
                basis.append(unit[drawn])
            else:  # the unconditional half of the evaluation before, without guidance the same
                basis.append(basis[-1])
        state = [_row(row, basis) for row in step.carry]
        yield float(state[0][0]), float(state[0][1:] @ state[0][1:])


def _row(row: Sequence[tuple[int, float]], basis: Sequence[np.ndarray]) -> np.ndarray:
    return sum((c * basis[k] for k, c in row), np.zeros_like(basis[0]))


def weak_order(
    formula: Formula,
    grid: Callable[[int], tuple[Knot, ...]] = even_grid,
    prediction: Prediction = V,
    **options: Any,
) -> float:
    """The order in which mean and variance at the end approach the exact ones."""
    return slope([_weak_error(traced(formula, grid(n), prediction, **options)) for n in COUNTS])


def _weak_error(table: Table) -> float:
    *_, (mean, variance) = moments(table, DATA)
    exact_mean, deviation = DATA.marginal(table.knots[-1])
    return max(abs(mean - exact_mean), abs(variance - deviation**2))


def point_mass_defect(table: Table) -> float:
    """How far a table is from the marginals of its knots when the network knows x_0, worst step."""
    point = Gaussian(mean=1.0, spread=0.0)
    return max(
        max(abs(mean - n.alpha), abs(math.sqrt(variance) - n.sigma)) / math.hypot(n.alpha, n.sigma)
        for (mean, variance), n in zip(moments(table, point), table.knots[1:], strict=True)
    )


def amplification(table: Table) -> float:
    """How much a table can enlarge a rounding error of its start: its rows with all signs taken
    away, worst step.
    """
    point = Gaussian(mean=1.0, spread=0.0)
    state, worst = [1.0], 1.0
    for step in table.steps:
        basis = list(state)
        for op in step.ops:
            if isinstance(op, Evaluation):
                a, b = point.output(table.prediction, op.knot)
                basis.append(abs(a) * sum(abs(c) * basis[k] for k, c in op.row) + abs(b))
            else:
                basis.append(1.0)
        state = [sum(abs(c) * basis[k] for k, c in row) for row in step.carry]
        worst = max(worst, *basis, *state)
    return worst
