"""From numbers to knots: map a training index or a noise level to a point of a schedule.

There are two kinds of grid. *Timestep-spaced* grids use training indices 0 ... T - 1
(``grids.timesteps``), *σ-spaced* grids use noise levels (``grids.sigmas``). On a discrete curve the
indices are its timesteps. On a continuous one, index i is the time of the (i + 1)-th of T equal
parts (EDM: σ^(1/ρ) in equal parts; VE: log σ). A noise level is σ / α, or σ on a flow path.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from inspect import Parameter
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...noising import NoiseSchedule
from ...noising.curves.base import Curve
from ...noising.utils.registry import Registry
from ...noising.utils.validation import one_of
from ..knots import CLEAN, Knot, knots_at
from ..options import keyword_parameters

F = TypeVar("F", bound=Callable[..., Any])

Grid = Callable[..., tuple[Knot, ...]]
"""(schedule, steps, **options) -> steps + 1 knots, from the most noise to the end of sampling."""


@dataclass(frozen=True)
class NamedGrid:
    """A grid with a name: a formula for numbers, and a function that makes knots from them.

    Args:
        name: The name in GRIDS.
        formula: A formula for numbers; if ``place`` is None, ``(schedule, steps, **options)`` ->
            knots.
        place: ``place(formula with its options, schedule, steps, **shared options)`` returns the
            knots.
        defaults: New defaults for shared options.
        count: ``count(steps, schedule, **shared options)`` returns the grid's number of steps, if
            that is not the requested number.

    >>> from alphabar.sampling import GRIDS
    >>> GRIDS["karras"].parameters["rho"].default
    7.0
    """

    name: str
    formula: Callable[..., Any]
    place: Callable[..., tuple[Knot, ...]] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)
    count: Callable[..., int] | None = None

    @property
    def parameters(self) -> dict[str, Parameter]:
        """The options of the grid by name, with their types and defaults."""
        own = keyword_parameters(self.formula)
        shared = keyword_parameters(self.place) if self.place else {}
        replaced = {
            name: shared[name].replace(default=value) for name, value in self.defaults.items()
        }
        return {**own, **shared, **replaced}

    @property
    def documentation(self) -> str:
        """The docstring of the formula."""
        return inspect.getdoc(self.formula) or ""

    def __call__(self, schedule: NoiseSchedule, steps: int, **options: Any) -> tuple[Knot, ...]:
        """Return the knots."""
        if self.place is None:
            return self.formula(schedule, steps, **options)
        names = keyword_parameters(self.formula).keys()
        own = {name: value for name, value in options.items() if name in names}
        shared = {**self.defaults, **{k: v for k, v in options.items() if k not in names}}
        steps = self.count(steps, schedule, **shared) if self.count else steps
        return self.place(partial(self.formula, **own), schedule, steps, **shared)


GRIDS: Registry[NamedGrid] = Registry("grid")
"""All grids by name; ``@register_grid()`` and its two variants add one."""


def register_grid(
    place: Callable[..., tuple[Knot, ...]] | None = None,
    count: Callable[..., int] | None = None,
    **defaults: Any,
) -> Callable[[F], F]:
    """Register a function as a grid under its own name.

    The arguments are those of :class:`NamedGrid`.

    >>> @register_grid()
    ... def three(schedule, steps):
    ...     return (*knots_at(schedule, [900.0, 500.0, 100.0]), CLEAN)
    >>> from alphabar.sampling import make_knots
    >>> [knot.timestep for knot in make_knots(NoiseSchedule.linear(), 3, "three")]
    [900.0, 500.0, 100.0, -1.0]
    """

    def add(formula: F) -> F:
        GRIDS.add(formula.__name__, NamedGrid(formula.__name__, formula, place, defaults, count))
        return formula

    return add


def parameters_of(grid: Grid) -> dict[str, Parameter]:
    """Return the options of a grid, or of a function of the same form, by name."""
    return grid.parameters if isinstance(grid, NamedGrid) else keyword_parameters(grid)


FINALS = ("zero", "sigma_min", "stay", "repeat")
STANDSTILL = 1e-9
"""Relative fall of σ in a step that does not move; the noise of knots must fall."""
INTERPOLATIONS = ("log_snr", "sigma")
ROUNDINGS: Mapping[str | None, Callable[[float], float]] = {
    None: lambda t: t,
    "nearest": lambda t: float(round(t)),
    "down": lambda t: float(int(t)),
}
TOLERANCE = 0.01
"""The relative distance by which a noise level may be outside the schedule.

Published tables are rounded. Such a level is set to the schedule's end.
"""


@lru_cache(maxsize=256)
def lowest_time(curve: Curve) -> float:
    """Return the time of the least noise in training.

    This is the curve's first time, or index 0 if the first time is clean.

    >>> lowest_time(NoiseSchedule.flow().curve), lowest_time(NoiseSchedule.karras().curve)
    (0.001, 0.002)
    """
    first = torch.tensor([curve.t_min], dtype=torch.float64)
    return (
        curve.t_min
        if float(curve.sigma(first)) > 0
        else float(curve.time_at_index(torch.zeros_like(first)))
    )


def final_knot(schedule: NoiseSchedule, final: str) -> Knot:
    """Return the end of sampling: the clean sample, or the least noise of training.

    "zero" is the clean sample; the others are the least noise, or the last point of a grid.

    >>> final_knot(NoiseSchedule.scaled_linear(), "sigma_min").timestep
    0.0
    """
    one_of("final", final, FINALS)
    return CLEAN if final == "zero" else knots_at(schedule, [lowest_time(schedule.curve)])[0]


def standing_still(knot: Knot) -> Knot:
    """Return the end of a step from ``knot`` that does not move.

    >>> standing_still(Knot(0.0, 0.8, 0.6)).sigma < 0.6
    True
    """
    return replace(knot, sigma=knot.sigma * (1 - STANDSTILL))


def knots_at_indices(
    schedule: NoiseSchedule, index: Tensor, interpolation: str = "log_snr"
) -> tuple[Knot, ...]:
    """Return the knots at (fractional) training indices, shape (steps,).

    Between the timesteps of a discrete schedule log SNR is linear. With ``interpolation="sigma"``,
    σ / α is linear, as numpy.interp in the Euler family of diffusers. In the interval that ends in
    zero SNR the curve's own interpolation is used in both cases.

    >>> schedule, index = NoiseSchedule.scaled_linear(), torch.tensor([998.5], dtype=torch.float64)
    >>> [
    ...     round(knots_at_indices(schedule, index, how)[0].sigma_ve, 5)
    ...     for how in ("log_snr", "sigma")
    ... ]
    [14.57039, 14.57046]
    """
    one_of("interpolation", interpolation, INTERPOLATIONS)
    curve = schedule.curve
    time = curve.time_at_index(index)
    knots = knots_at(schedule, time)
    if interpolation == "log_snr":
        return knots
    if not curve.is_discrete:
        raise ValueError(
            f"interpolation='sigma' is for discrete schedules; a {curve.kind} curve is exact at "
            "every time"
        )
    low, high = curve.sigma_ve(time.floor()), curve.sigma_ve(time.ceil())
    between = (low + (time - time.floor()) * (high - low)).tolist()
    inside = ((time.frac() > 0) & high.isfinite()).tolist()
    return tuple(
        _at_ratio(k, s) if there else k for k, s, there in zip(knots, between, inside, strict=True)
    )


def _at_ratio(knot: Knot, ratio: float) -> Knot:
    norm = (1 + ratio**2) ** 0.5  # variance preserving, as discrete schedules are
    return replace(knot, alpha=1 / norm, sigma=ratio / norm)


def with_rounded_times(
    schedule: NoiseSchedule, knots: tuple[Knot, ...], rounding: str | None
) -> tuple[Knot, ...]:
    """Return the knots with integer timesteps for the network, at the same noise levels.

    >>> knots = knots_at(NoiseSchedule.linear(), [7.6])
    >>> with_rounded_times(NoiseSchedule.linear(), knots, "down")[0].timestep
    7.0
    """
    one_of("rounding", rounding, tuple(ROUNDINGS))
    if not rounding:
        return knots
    if not (schedule.curve.is_discrete or schedule.curve.is_flow):
        raise ValueError(
            f"rounding={rounding!r} is for discrete schedules; a {schedule.curve.kind} network "
            "takes any time"
        )
    return tuple(replace(k, timestep=ROUNDINGS[rounding](k.timestep)) for k in knots)


@lru_cache(maxsize=256)
def level_at(curve: Curve, t: float, ratio: bool) -> float:
    """Return the noise level at a time: σ / α, or σ on a flow path unless ``ratio``.

    It is infinite where α is 0.

    >>> [round(level_at(NoiseSchedule.flow().curve, 0.75, ratio), 6) for ratio in (False, True)]
    [0.75, 3.0]
    """
    time = torch.tensor([t], dtype=torch.float64)
    return float((curve.sigma_ve if ratio else curve.noise_level)(time))


def knots_at_levels(
    schedule: NoiseSchedule, levels: Tensor, ratio: bool = False, rounding: str | None = None
) -> tuple[Knot, ...]:
    """Return the knots at noise levels, shape (steps,), in the unit of :func:`level_at`.

    inf is the terminal time. ``rounding`` ("nearest" or "down") gives the network an integer
    timestep and does not change the level, as in diffusers.

    Raises:
        ValueError: A level is more than 1 % outside the training range of the schedule.

    >>> levels = torch.tensor([14.615, 1.0], dtype=torch.float64)
    >>> [
    ...     (k.timestep, round(k.sigma_ve, 4))
    ...     for k in knots_at_levels(NoiseSchedule.scaled_linear(), levels, rounding="nearest")
    ... ]
    [(999.0, 14.6146), (354.0, 1.0)]
    """
    curve = schedule.curve
    low, high = level_at(curve, curve.t_min, ratio), level_at(curve, curve.t_max, ratio)
    for level in levels.tolist():
        if not low / (1 + TOLERANCE) <= level <= high * (1 + TOLERANCE):
            raise ValueError(
                f"noise level {level:g} is outside {low:g} ... {high:g}, which this schedule was "
                "trained on; "
                "lay the grid inside"
            )
    inside = levels.clamp(low, high)
    times = curve.time(-2 * inside.log()) if ratio else curve.time_at_noise_level(inside)
    if curve.is_discrete:  # the inverse of a table level is its index, up to rounding
        times = torch.where((times - times.round()).abs() < 1e-9, times.round(), times)
    knots = knots_at(schedule, torch.where(levels >= high, curve.t_max, times))
    return with_rounded_times(schedule, knots, rounding)
