"""Grids: the points of the path that a sampler visits, from the most noise to the end.

A grid is a function (schedule, steps, **options) -> steps + 1 knots with falling noise. The network
is called at all knots but the last. Each name has one definition here; if another library's grid of
the same name differs, an option selects it.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter
from itertools import pairwise
from typing import Any

from ...noising import NoiseSchedule
from ...noising.utils.registry import lookup
from ...noising.utils.validation import whole_number
from ..knots import Knot
from ..options import check_option
from .base import GRIDS, Grid, NamedGrid, parameters_of, register_grid
from .given import CUSTOM, given_points, number_of_steps

# isort: split: the order of the registry
from .timesteps import register_timestep_grid

# isort: split
from .sigmas import TERMINAL_SIGMA, register_sigma_grid

# isort: split
from . import align_your_steps

__all__ = [
    "GRIDS",
    "TERMINAL_SIGMA",
    "Grid",
    "NamedGrid",
    "align_your_steps",
    "check_knots",
    "choose_grid",
    "grid_options",
    "make_knots",
    "number_of_knots",
    "register_grid",
    "register_sigma_grid",
    "register_timestep_grid",
    "split_options",
]

DEFAULT_GRID = "trailing"


def make_knots(
    schedule: NoiseSchedule,
    steps: int | None = None,
    grid: str | Grid | None = None,
    *,
    ascending: bool = False,
    **options: Any,
) -> tuple[Knot, ...]:
    """Return the steps + 1 knots of a named grid, a grid function or given points.

    Args:
        schedule: The schedule of the path.
        steps: An integer in 1 ... T.
        grid: A name of GRIDS or a function of the same form.
        ascending: Order the knots from the least noise to the most, for methods that run upwards.
        options: Options of the grid. ``timesteps=[...]`` or ``sigmas=[...]`` replace steps and
            grid.

    Raises:
        ValueError: ``steps`` is not an integer in 1 ... T, a grid or option is unknown, an option
            has an invalid value, or the knots are out of order.

    >>> len(make_knots(NoiseSchedule.flow(), 8, "linspace"))
    9
    >>> [k.timestep for k in make_knots(NoiseSchedule.linear(), timesteps=[900, 100])]
    [900.0, 100.0, -1.0]
    """
    steps, grid, options = choose_grid(steps, grid, options, ascending)
    steps = whole_number("steps", steps)
    if not 1 <= steps <= schedule.num_train_timesteps:
        raise ValueError(
            f"steps must be between 1 and the {schedule.num_train_timesteps} training timesteps, "
            f"got {steps}"
        )
    function = _function(grid)
    options = {
        name: check_option(lookup(f"option of grid {grid!r}", name, parameters_of(function)), value)
        for name, value in options.items()
    }
    if grid in CUSTOM and ascending:
        options = {name: value[::-1] if name == grid else value for name, value in options.items()}
    knots = check_knots(
        function(schedule, steps, **options), number_of_knots(grid, steps, schedule, **options) - 1
    )
    return knots[::-1] if ascending else knots


def choose_grid(
    steps: int | None, grid: str | Grid | None, options: Mapping[str, Any], ascending: bool = False
) -> tuple[int | None, str | Grid, dict[str, Any]]:
    """Return (steps, grid, options) from a caller's arguments.

    Given points replace a grid and set the number of steps.

    >>> choose_grid(None, None, {"sigmas": [10, 1, 0]})
    (2, 'sigmas', {'sigmas': (10.0, 1.0, 0.0)})
    """
    options = dict(options)
    steps = None if steps is None else whole_number("steps", steps)
    if not (grid is None or isinstance(grid, str) or callable(grid)):
        raise ValueError(
            f"grid must be a name or a function, got {grid!r}; points of one's own are "
            "timesteps=[...] or sigmas=[...]"
        )
    names = [name for name in CUSTOM if name in options]
    if not names:
        return steps, DEFAULT_GRID if grid is None else grid, options
    (name, *others) = names
    if others or grid not in (None, name):
        raise ValueError(
            f"{name} stand in place of a grid; leave out "
            f"{others[0] if others else f'grid {grid!r}'}"
        )
    points = given_points(name, options[name], ascending)
    counted = number_of_steps(name, points)
    if steps not in (None, counted):
        raise ValueError(
            f"{len(points)} {name} make {counted} steps, got steps={steps}; leave steps out"
        )
    return counted, name, options | {name: points}


def grid_options(grid: str | Grid) -> dict[str, Any]:
    """Return the options of a grid, with their defaults.

    >>> grid_options("karras")["rho"]
    7.0
    """
    return {name: p.default for name, p in grid_parameters(grid).items()}


def split_options(
    grid: str | Grid, options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of a grid, and the others.

    >>> split_options("karras", {"rho": 5.0, "eta": 0.5})
    ({'rho': 5.0}, {'eta': 0.5})
    """
    known = grid_parameters(grid)
    own = {name: value for name, value in options.items() if name in known}
    return own, {name: value for name, value in options.items() if name not in known}


def grid_parameters(grid: str | Grid) -> dict[str, Parameter]:
    """Return the parameters that are a grid's options, by name.

    >>> grid_parameters("karras")["rho"].annotation
    <class 'float'>
    """
    return parameters_of(_function(grid))


def number_of_knots(
    grid: str | Grid, steps: int, schedule: NoiseSchedule | None = None, **options: Any
) -> int:
    """Return the number of knots of a grid: steps + 1, except for dpm_fast.

    The steps of dpm_fast are a number of evaluations. The number of its knots depends on its ends;
    without a ``schedule``, finite σ / α is assumed.

    >>> number_of_knots("karras", 20), number_of_knots("dpm_fast", 20)
    (21, 8)
    """
    count = getattr(_function(grid), "count", None)
    return (count(steps, schedule, **options) if count else steps) + 1


def counts_evaluations(grid: str | Grid) -> bool:
    """Return whether ``steps`` of a grid is a number of evaluations.

    >>> counts_evaluations("karras"), counts_evaluations("dpm_fast")
    (False, True)
    """
    return getattr(_function(grid), "count", None) is not None


def check_knots(knots: tuple[Knot, ...], steps: int) -> tuple[Knot, ...]:
    """Return the knots, or raise ValueError unless they are steps + 1 with strictly falling noise.

    >>> len(check_knots((Knot(999, 0.0, 1.0), Knot(1, 0.8, 0.6)), 1))
    2
    """
    if len(knots) != steps + 1:
        raise ValueError(f"a grid of {steps} steps must have {steps + 1} knots, got {len(knots)}")
    for i, (k, n) in enumerate(pairwise(knots)):
        if not n.sigma_ve < k.sigma_ve:
            raise ValueError(
                f"noise must fall at every step, but σ/α goes from {k.sigma_ve:g} to "
                f"{n.sigma_ve:g} in step {i + 1} of {steps}; "
                "use fewer steps or another grid"
            )
    return knots


def _function(grid: str | Grid) -> Grid:
    return (
        grid
        if callable(grid)
        else lookup("grid", grid, {**GRIDS, **CUSTOM} if grid in tuple(CUSTOM) else GRIDS)
    )
