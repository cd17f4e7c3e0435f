"""Grids: which points of the path a sampler visits, from the most noise to the clean sample.

A grid is a function (schedule, steps, **options) -> steps + 1 knots, strictly descending in noise, the last one clean.
One name has one definition here; where a peer's grid of the same name differs, an option says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..noising import NoiseSchedule
from ..noising.registry import lookup
from .knots import CLEAN, Knot, knots_at

SIGMA_CAP = 4096.0
"""Where σ-spaced grids take an infinite σ / α to lie when they space the other knots (2**12; diffusers clamps ᾱ to 2**-24)."""

Grid = Callable[..., tuple[Knot, ...]]


def linspace(
    schedule: NoiseSchedule, steps: int, *, rounded: bool = False, drop_last: bool = False
) -> tuple[Knot, ...]:
    """Space timesteps evenly from the last to the first (2305.08891, table 2), then the clean sample.

    ``rounded``: integer timesteps, as DDIM and DDPM in diffusers. ``drop_last``: lay one point more and leave out the
    lowest, as DPMSolverMultistepScheduler.

    >>> [k.timestep for k in linspace(NoiseSchedule.linear(), 3)]
    [999.0, 499.5, 0.0, -1.0]
    """
    last, points = schedule.num_train_timesteps - 1, steps + drop_last
    # counted up from 0 as numpy does, so that the ties of rounding fall as in diffusers
    index = torch.arange(points - 1, drop_last - 1, -1, dtype=torch.float64) * (last / max(points - 1, 1))
    index[0] = last
    return _at_indices(schedule, index.round() if rounded else index)


def leading(schedule: NoiseSchedule, steps: int, *, steps_offset: int = 0, drop_last: bool = False) -> tuple[Knot, ...]:
    """Take every (T // steps)-th timestep from the first on (2305.08891, table 2); it never visits the last one.

    ``steps_offset`` is added to each; Stable Diffusion uses 1. ``drop_last`` as in :func:`linspace`.

    >>> [k.timestep for k in leading(NoiseSchedule.linear(), 4, steps_offset=1)]
    [751.0, 501.0, 251.0, 1.0, -1.0]
    """
    points = steps + drop_last
    stride = schedule.num_train_timesteps // points
    index = stride * torch.arange(points - 1, drop_last - 1, -1, dtype=torch.float64) + steps_offset
    if float(index[0]) > schedule.num_train_timesteps - 1:
        raise ValueError(
            f"steps_offset {steps_offset} puts the first of {steps} steps past the last timestep; lower it, or use 'trailing'"
        )
    return _at_indices(schedule, index)


def trailing(schedule: NoiseSchedule, steps: int) -> tuple[Knot, ...]:
    """Count down from the last timestep in even strides (2305.08891, table 2): sampling starts where training ended.

    >>> [k.timestep for k in trailing(NoiseSchedule.linear(), 4)]
    [999.0, 749.0, 499.0, 249.0, -1.0]
    """
    count = schedule.num_train_timesteps
    stride = count - (count - count / steps)  # as numpy.arange rounds it, so that the ties of rounding fall as in diffusers
    position = count - torch.arange(steps, dtype=torch.float64) * stride
    return _at_indices(schedule, (position.round() if schedule.curve.is_discrete else position) - 1)


def karras(
    schedule: NoiseSchedule,
    steps: int,
    *,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> tuple[Knot, ...]:
    """Space σ^(1/ρ) evenly (Karras et al. 2206.00364, eq. 5), σ being σ / α, or σ on a flow path.

    ``sigma_min`` and ``sigma_max`` default to the schedule's first and last training timestep. On a schedule with zero
    terminal SNR the first knot is that terminal step itself, and the others are spaced as from σ = 4096.

    >>> [round(k.sigma_ve, 3) for k in karras(NoiseSchedule.scaled_linear(), 3)]
    [14.615, 1.274, 0.029, 0.0]
    """
    if not rho > 0:
        raise ValueError(f"rho must be positive, got {rho}; Karras et al. use 7")
    low, high = _noise_range(schedule, sigma_min, sigma_max)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return _at_noise_levels(
        schedule, (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho, sigma_max is None
    )


GRIDS: Mapping[str, Grid] = {"linspace": linspace, "leading": leading, "trailing": trailing, "karras": karras}
"""Every grid by its name; a new one is a function above and a word here."""


def make_knots(schedule: NoiseSchedule, steps: int, grid: str | Grid = "trailing", **options: Any) -> tuple[Knot, ...]:
    """Return the steps + 1 knots of a named grid (or of a function of the same form), checked.

    Raises ValueError for steps that are no integer in 1 ... T, an unknown grid or option, and knots out of order.

    >>> len(make_knots(NoiseSchedule.flow(), 8, "linspace"))
    9
    """
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise ValueError(f"steps must be an integer, got {steps!r}")
    if not 1 <= steps <= schedule.num_train_timesteps:
        raise ValueError(
            f"steps must be between 1 and the {schedule.num_train_timesteps} training timesteps, got {steps}"
        )
    function = lookup("grid", grid, GRIDS) if not callable(grid) else grid
    for name in options:
        lookup(f"option of grid {grid!r}", name, grid_options(function))
    return check_knots(function(schedule, steps, **options), steps)


def grid_options(grid: str | Grid) -> dict[str, Any]:
    """Return the options that a grid has, with their defaults.

    >>> grid_options("karras")["rho"]
    7.0
    """
    function = lookup("grid", grid, GRIDS) if not callable(grid) else grid
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_knots(knots: tuple[Knot, ...], steps: int) -> tuple[Knot, ...]:
    """Return the knots, or raise ValueError where they are not steps + 1 with strictly falling noise.

    >>> len(check_knots((Knot(1, 0.6, 0.8), CLEAN), 1))
    2
    """
    if len(knots) != steps + 1:
        raise ValueError(f"a grid of {steps} steps must have {steps + 1} knots, got {len(knots)}")
    for i, (k, n) in enumerate(pairwise(knots)):
        if not n.sigma_ve < k.sigma_ve:
            raise ValueError(
                f"noise must fall at every step, but σ/α goes from {k.sigma_ve:g} to {n.sigma_ve:g} in step {i + 1} of {steps}; "
                "use fewer steps or another grid"
            )
    return knots


def _at_indices(schedule: NoiseSchedule, index: Tensor) -> tuple[Knot, ...]:
    return (*knots_at(schedule, schedule.curve.time_at_index(index)), CLEAN)


def _noise_range(schedule: NoiseSchedule, sigma_min: float | None, sigma_max: float | None) -> tuple[float, float]:
    curve = schedule.curve
    ends = curve.noise_level(
        curve.time_at_index(torch.tensor([0.0, schedule.num_train_timesteps - 1.0], dtype=torch.float64))
    ).tolist()
    low = ends[0] if sigma_min is None else float(sigma_min)
    high = min(ends[1], SIGMA_CAP) if sigma_max is None else float(sigma_max)
    if not 0 < low < high:
        raise ValueError(f"need 0 < sigma_min < sigma_max, got {low:g} and {high:g}")
    return low, high


def _at_noise_levels(schedule: NoiseSchedule, levels: Tensor, from_terminal: bool) -> tuple[Knot, ...]:
    times = schedule.curve.time_at_noise_level(levels)
    if from_terminal:
        times[0] = schedule.curve.t_max  # exactly, also where α is 0 there and σ / α infinite
    return (*knots_at(schedule, times), CLEAN)
