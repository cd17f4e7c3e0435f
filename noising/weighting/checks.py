"""Checks of weights together with a density of times and a schedule.

They find ends of the schedule that have weight 0, and weights without a finite mean.

The mean of the weight over the drawn samples is ∫ w(t(u)) du over u in (0, 1). Only the ends of u
can make it infinite. Over octaves of the distance d from an end, d in 2^-(k+1) ... 2^-k, a weight
that grows as d^-p contributes 2^-k(1 - p). The mean is finite if the octaves shrink (p < 1), and
infinite if they stay equal or grow. The checked octaves lie further out than any sample of a
training is likely to lie, but within the range of float64 and of the exact α, σ of a curve.
"""

from __future__ import annotations

import warnings

import torch

from ..schedule import NoiseSchedule
from ..timesteps.base import Timesteps
from .base import Weighting

_OCTAVES = torch.arange(28, 49, 4, dtype=torch.float64)
_SHRINKS = 2.0**-0.03  # ratio of one octave to the next: p = 0.97 still has a mean


def warn_of_weights(weighting: Weighting, timesteps: Timesteps, schedule: NoiseSchedule) -> None:
    """Warn if the first sampling step has weight 0, or if the weight has no finite mean.

    The mean is taken over the times.

    >>> from alphabar.noising import UniformTimesteps, MinSNR
    >>> warn_of_weights(MinSNR(floor=0.1), UniformTimesteps(), NoiseSchedule.flow())
    """
    curve = schedule.curve
    if (
        float(_weights(weighting, schedule, torch.tensor([curve.t_max], dtype=torch.float64)))
        == 0.0
    ):
        zero_snr = ", where SNR is 0" if schedule.has_zero_terminal_snr else ""
        warnings.warn(
            f"weighting {weighting.name!r} is 0 at t = {curve.t_max:g}{zero_snr}: the step that "
            "sampling starts from "
            "gets no gradient; give it a floor (floor=0.05, as a flag --loss_weight_floor 0.05), "
            "or use weighting 'uniform'",
            stacklevel=3,
        )
    end = end_without_mean(weighting, timesteps, schedule)
    if end is not None:
        warnings.warn(
            f"weighting {weighting.name!r} on prediction {schedule.prediction.name!r} has no "
            "finite mean under "
            f"{timesteps.name!r} timesteps: it grows without bound towards t = {end:g}, and a few "
            "samples there will outweigh "
            "all others; keep the times away from that end (UniformTimesteps().within(...), "
            "'logit_normal'), or use a "
            "weighting that is bounded there, e.g. 'uniform' or 'min_snr'",
            stacklevel=3,
        )


def end_without_mean(
    weighting: Weighting, timesteps: Timesteps, schedule: NoiseSchedule
) -> float | None:
    """Return the time at which the weight grows too fast for a finite mean over the times.

    Returns None if the mean is finite.

    >>> from alphabar.noising import SNR, UniformTimesteps
    >>> flow = NoiseSchedule.flow()
    >>> (
    ...     end_without_mean(SNR(), UniformTimesteps(), flow),
    ...     end_without_mean(SNR(), UniformTimesteps(), flow.with_prediction("sample")),
    ... )
    (None, 0.0)
    """
    curve = schedule.curve
    if curve.is_discrete:
        return None  # the mean of a finite number of finite weights is finite
    distance = 0.75 * 2.0**-_OCTAVES
    for end, u in ((curve.t_min, distance), (curve.t_max, 1 - distance)):
        weight = _weights(weighting, schedule, timesteps.times(u, curve).double())
        octaves = weight * distance
        if not bool(weight.isfinite().all()):
            return end
        growth = octaves[1:] / octaves[:-1].clamp(min=torch.finfo(torch.float64).tiny)
        if float(octaves[-1]) > 0 and bool(
            (growth > _SHRINKS ** float(_OCTAVES[1] - _OCTAVES[0])).all()
        ):
            return end
    return None


def _weights(weighting: Weighting, schedule: NoiseSchedule, t: torch.Tensor) -> torch.Tensor:
    """Return the weights on the schedule's target at float64 times."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    det, fraction = schedule.prediction.determinant(alpha, sigma), schedule.curve.fraction(t)
    return weighting(alpha, sigma, det, fraction).detach()
