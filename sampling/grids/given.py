"""Grids of given points: ``timesteps=[...]`` or ``sigmas=[...]`` instead of a named grid."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...noising import NoiseSchedule
from ...noising.curves.base import Curve
from ...noising.utils.bisection import bisect
from ...noising.utils.validation import real_number
from ..knots import CLEAN, Knot, knots_at
from .base import final_knot, knots_at_indices, knots_at_levels


def at_timesteps(
    schedule: NoiseSchedule,
    steps: int,
    *,
    timesteps: Sequence[float] = (),
    interpolation: str = "log_snr",
    final: str = "zero",
) -> tuple[Knot, ...]:
    """Call the network at these timesteps in its own unit (``Sampler.timesteps``), falling.

    The end is ``final``. For a fraction of a discrete timestep, ``interpolation`` selects the
    interpolation (see ``knots_at_indices``).

    >>> [k.timestep for k in at_timesteps(NoiseSchedule.flow(shift=3.0), 2, timesteps=[1000, 500])]
    [1000.0, 500.0, -1.0]
    """
    curve, given = schedule.curve, torch.tensor(timesteps, dtype=torch.float64)
    first, last = _network_times(curve)
    for i, t in enumerate(timesteps):
        if not first <= t <= last:
            raise ValueError(
                f"timesteps[{i}] = {t:g} is outside {first:g} ... {last:g} of this {curve.kind} "
                "schedule"
            )
    if curve.is_discrete:
        return (
            *knots_at_indices(schedule, given - first, interpolation),
            final_knot(schedule, final),
        )
    knots = knots_at(schedule, time_at_timestep(curve, given))
    return (
        *(replace(k, timestep=float(t)) for k, t in zip(knots, timesteps, strict=True)),
        final_knot(schedule, final),
    )


def at_sigmas(
    schedule: NoiseSchedule,
    steps: int,
    *,
    sigmas: Sequence[float] = (),
    rounding: str | None = None,
    final: str = "zero",
) -> tuple[Knot, ...]:
    """Call the network at these noise levels, falling: σ / α, or σ on a flow path.

    inf where α is 0. The end is ``final``. A last value of 0 is the clean end, as in k-diffusion.
    ``rounding`` as in σ-spaced grids.

    >>> [k.sigma_ve for k in at_sigmas(NoiseSchedule.karras(), 2, sigmas=[80.0, 1.0, 0.0])]
    [80.0, 1.0, 0.0]
    """
    levels = torch.tensor(sigmas, dtype=torch.float64)
    if sigmas[-1] == 0:
        return (*knots_at_levels(schedule, levels[:-1], rounding=rounding), CLEAN)
    return (*knots_at_levels(schedule, levels, rounding=rounding), final_knot(schedule, final))


CUSTOM = {"timesteps": at_timesteps, "sigmas": at_sigmas}
"""The options that replace a grid: the option's name is the grid's name."""


def given_points(name: str, values: Any, ascending: bool = False) -> tuple[float, ...]:
    """Return given points as floats, checked to be finite numbers that fall at every step.

    If ``ascending``, they must rise. The first sigma (if rising, the last) may be infinite.

    Raises:
        ValueError: The points do not meet these conditions.

    >>> given_points("timesteps", [999, 400, 500])
    Traceback (most recent call last):
    ValueError: timesteps must fall at every step, but timesteps[2] = 500 comes after ...
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a sequence of numbers, got {values!r}")
    listed = values.tolist() if isinstance(values, Tensor) else list(values)
    try:
        points = tuple(real_number(name, v) for v in listed)
    except ValueError:
        raise ValueError(f"{name} must be a sequence of numbers, got {listed!r}") from None
    if not points or (name == "sigmas" and set(points) == {0.0}):
        raise ValueError(
            f"{name} must hold at least one "
            f"{'noise level above 0' if name == 'sigmas' else 'timestep'}"
        )
    word, sign = ("rise", -1) if ascending else ("fall", 1)
    for i, (a, b) in enumerate(pairwise(points)):
        if not sign * a > sign * b:
            raise ValueError(
                f"{name} must {word} at every step, but {name}[{i + 1}] = {b:g} comes after "
                f"{name}[{i}] = {a:g}"
            )
    bad = [i for i, v in enumerate(points) if math.isnan(v) or (name == "sigmas" and v < 0)]
    if bad:
        raise ValueError(
            f"{name} must be numbers of at least 0, got {name}[{bad[0]}] = {points[bad[0]]:g}"
        )
    return points


def number_of_steps(name: str, points: Sequence[float]) -> int:
    """Return the number of steps of given points: each is a network call, except a sigma of 0.

    >>> number_of_steps("sigmas", (14.6, 1.0, 0.0))
    2
    """
    return len(points) - (name == "sigmas" and 0.0 in points)


def time_at_timestep(curve: Curve, timesteps: Tensor) -> Tensor:
    """Return the times at which a curve gives the network these timesteps.

    >>> time_at_timestep(
    ...     NoiseSchedule.flow().curve, torch.tensor([250.0], dtype=torch.float64)
    ... ).item()
    0.25
    """
    low, high = torch.full_like(timesteps, curve.t_min), torch.full_like(timesteps, curve.t_max)
    return bisect(lambda t: curve.timestep(t) < timesteps, low, high)[1]


def _network_times(curve: Curve) -> tuple[float, float]:
    first, last = curve.timestep(
        torch.tensor([curve.t_min, curve.t_max], dtype=torch.float64)
    ).tolist()
    return first, last
