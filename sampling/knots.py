"""Knots: the points of the path that a sampler visits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..noising import NoiseSchedule


@dataclass(frozen=True, slots=True)  # thousands are made
class Knot:
    """One point of the path: signal α, noise σ, and the time and input scale for the network.

    >>> Knot(timestep=999, alpha=0.0, sigma=1.0).half_log_snr
    -inf
    """

    timestep: float
    alpha: float
    sigma: float
    input_scale: float = 1.0

    @property
    def half_log_snr(self) -> float:
        """λ = log(α / σ), as in the DPM-Solver papers; infinite at both ends."""
        if self.sigma == 0:
            return math.inf
        return -math.inf if self.alpha == 0 else math.log(self.alpha / self.sigma)

    @property
    def sigma_ve(self) -> float:
        """σ / α, the ``sigma`` of k-diffusion; infinite where α is 0."""
        return math.inf if self.alpha == 0 else self.sigma / self.alpha


CLEAN = Knot(timestep=-1.0, alpha=1.0, sigma=0.0)
"""The end of sampling: the clean sample. The network is not called there."""


def knots_at(schedule: NoiseSchedule, times: Tensor | Sequence[float]) -> tuple[Knot, ...]:
    """Return the knots at these times of the schedule's curve, computed in float64.

    >>> [round(k.sigma, 2) for k in knots_at(NoiseSchedule.flow(), [1.0, 0.25])]
    [1.0, 0.25]
    """
    t = torch.as_tensor(times, dtype=torch.float64)
    curve = schedule.curve
    columns = curve.timestep(t), *curve.alpha_sigma(t), curve.input_scale(t)
    return tuple(
        Knot(*values) for values in zip(*(column.tolist() for column in columns), strict=True)
    )


def knots_at_half_log_snr(schedule: NoiseSchedule, levels: Sequence[float]) -> tuple[Knot, ...]:
    """Return the points of the schedule's path with these λ = log(α / σ), computed in float64.

    λ may be outside the range of the schedule's time.

    >>> (knot,) = knots_at_half_log_snr(NoiseSchedule.scaled_linear(), [0.0])
    >>> round(knot.alpha**2, 6), 200 < knot.timestep < 400
    (0.5, True)
    """
    curve, log_snr = schedule.curve, 2 * torch.tensor(levels, dtype=torch.float64)
    t = curve.time(log_snr)
    columns = curve.timestep(t), *curve.alpha_sigma_at(log_snr), curve.input_scale(t)
    return tuple(
        Knot(*values) for values in zip(*(column.tolist() for column in columns), strict=True)
    )


def knot_at_half_log_snr(schedule: NoiseSchedule, half_log_snr: float) -> Knot:
    """Return the point of the schedule's path with this λ = log(α / σ).

    >>> round(knot_at_half_log_snr(NoiseSchedule.flow(), 0.0).timestep)
    500
    """
    return knots_at_half_log_snr(schedule, [half_log_snr])[0]


class Points:
    """Points of a schedule's path between the knots of a grid, looked up many at once.

    Args:
        schedule: The schedule of the path.
        knots: The knots of the grid; their times are looked up together.
        foresee: ``foresee(points)`` returns the λ and the times that will be asked for, if known.

    >>> points = Points(NoiseSchedule.linear(), foresee=lambda points: ([0.0, 1.0], []))
    >>> round(points.at_half_log_snr(0.0).timestep), len(points.by_level)
    (258, 2)
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        knots: Sequence[Knot] = (),
        foresee: Callable[[Points], tuple[Sequence[float], Sequence[float]]] | None = None,
    ) -> None:
        self.schedule = schedule
        self.by_level: dict[float, Knot] = {}
        self.by_time: dict[float, Knot] = {}
        self._knots, self._times = knots, dict[float, float]()
        self._foresee, self._left = foresee, MAX_FORECASTS

    def at_half_log_snr(self, level: float) -> Knot:
        """Return the point of the curve with this λ = log(α / σ)."""
        if level not in self.by_level:
            self._look_up([level], [])
        return self.by_level[level]

    def at_time(self, t: float) -> Knot:
        """Return the point of the curve at one of its times."""
        if t not in self.by_time:
            self._look_up([], [t])
        return self.by_time[t]

    def time(self, knot: Knot) -> float:
        """Return the curve's time of a knot; an integer at the timesteps of a discrete curve."""
        level = knot.half_log_snr
        if level not in self._times:
            levels = [level, *(y.half_log_snr for y in self._knots if y.alpha and y.sigma)]
            log_snr = 2 * torch.tensor(levels, dtype=torch.float64)
            for y, t in zip(levels, self.schedule.curve.time(log_snr).tolist(), strict=True):
                self._times[y] = float(round(t)) if abs(t - round(t)) < 1e-9 else t
        return self._times[level]

    def _look_up(self, levels: Sequence[float], times: Sequence[float]) -> None:
        if self._foresee is not None and self._left:
            self._left -= 1
            more, later = self._foresee(self)
            levels, times = [*levels, *more], [*times, *later]
        levels = list(dict.fromkeys(y for y in levels if y not in self.by_level))
        times = list(dict.fromkeys(t for t in times if t not in self.by_time))
        if levels:
            found = knots_at_half_log_snr(self.schedule, levels)
            self.by_level.update(zip(levels, found, strict=True))
        if times:
            self.by_time.update(zip(times, knots_at(self.schedule, times), strict=True))


MAX_FORECASTS = 4
"""Points that depend on other points (of a churned step) take a forecast more each."""


def start_scale(first: Knot, init_noise: str) -> float:
    """Return the factor of the standard normal noise at the first knot.

    "marginal": sqrt(α² + σ²), for data of unit variance. "sigma": σ. "unit": 1.

    >>> [start_scale(Knot(999.0, 0.6, 0.8), kind) for kind in ("marginal", "sigma", "unit")]
    [1.0, 0.8, 1.0]
    """
    scales = {"sigma": first.sigma, "unit": 1.0}
    return scales.get(init_noise, math.hypot(first.alpha, first.sigma))
