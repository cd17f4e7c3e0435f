"""Knots: the points of the path that a sampler visits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..noising import NoiseSchedule


@dataclass(frozen=True)
class Knot:
    """One point of the path: signal α, noise σ, and the time and input scale for the network.

    >>> Knot(timestep=999, alpha=0.0, sigma=1.0).half_log_snr
    -inf
    """

    timestep: float
    alpha: float
    sigma: float
    input_scale: float = 1.0

    @cached_property
    def half_log_snr(self) -> float:
        """λ = log(α / σ), as in the DPM-Solver papers; infinite at both ends."""
        if self.sigma == 0:
            return math.inf
        return -math.inf if self.alpha == 0 else math.log(self.alpha / self.sigma)

    @cached_property
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
    columns = curve.timestep(t), curve.alpha(t), curve.sigma(t), curve.input_scale(t)
    return tuple(
        Knot(*values) for values in zip(*(column.tolist() for column in columns), strict=True)
    )


def knot_at_half_log_snr(schedule: NoiseSchedule, half_log_snr: float) -> Knot:
    """Return the point of the schedule's path with this λ = log(α / σ), computed in float64.

    λ may be outside the range of the schedule's time.

    >>> knot = knot_at_half_log_snr(NoiseSchedule.scaled_linear(), 0.0)
    >>> round(knot.alpha**2, 6), 200 < knot.timestep < 400
    (0.5, True)
    """
    curve, log_snr = schedule.curve, torch.tensor([2 * half_log_snr], dtype=torch.float64)
    t = curve.time(log_snr)
    alpha, sigma = curve.alpha_sigma_at(log_snr)
    return Knot(curve.timestep(t).item(), alpha.item(), sigma.item(), curve.input_scale(t).item())


def start_scale(first: Knot, init_noise: str) -> float:
    """Return the factor of the standard normal noise at the first knot.

    "marginal": sqrt(α² + σ²), for data of unit variance. "sigma": σ. "unit": 1.

    >>> [start_scale(Knot(999.0, 0.6, 0.8), kind) for kind in ("marginal", "sigma", "unit")]
    [1.0, 0.8, 1.0]
    """
    scales = {"sigma": first.sigma, "unit": 1.0}
    return scales.get(init_noise, math.hypot(first.alpha, first.sigma))
