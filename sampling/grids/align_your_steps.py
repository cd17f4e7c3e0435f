"""Align Your Steps: grids that are optimised for one model each.

Source: Sabour et al. 2404.14507, tables in the appendix.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch

from ...noising import NoiseSchedule
from ...noising.utils.registry import lookup
from ..knots import Knot
from .base import final_knot, knots_at_levels, register_grid

STABLE_DIFFUSION_TIMESTEPS = {
    "sd15": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0),
    "sdxl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0),
}
"""The published timesteps of ten steps and their end, for the betas of Stable Diffusion."""

SIGMAS = {"svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002)}
"""The published noise levels of ten steps and their end, for Stable Video Diffusion."""


@lru_cache
def published_sigmas(variant: str) -> tuple[float, ...]:
    """Return the eleven σ / α of a published table.

    Published timesteps are converted with the betas of Stable Diffusion.

    >>> [round(s, 3) for s in published_sigmas("sd15")][:3]
    [14.615, 6.475, 3.864]
    """
    published = lookup("variant", variant, {**STABLE_DIFFUSION_TIMESTEPS, **SIGMAS})
    if variant in SIGMAS:
        return published
    return tuple(
        NoiseSchedule.scaled_linear()
        .sigma_ve(torch.tensor(published, dtype=torch.float64))
        .tolist()
    )


@register_grid()
def align_your_steps(
    schedule: NoiseSchedule,
    steps: int,
    *,
    variant: str = "sd15",
    drop_last: bool = True,
    rounding: str | None = None,
    final: str = "zero",
) -> tuple[Knot, ...]:
    """Use the noise levels that are optimised for a model: "sd15", "sdxl" or "svd".

    Source: Sabour et al. 2404.14507. For a number of steps other than ten the published levels are
    interpolated, linearly in log σ over the step. On other schedules the knots have the same σ / α.
    With zero terminal SNR the first knot is the terminal step.

    Args:
        variant: The model.
        drop_last: End after the last but one level, as its authors, ComfyUI and diffusers do; A1111
            keeps the last (False).
        rounding, final: As in σ-spaced grids.

    Raises:
        ValueError: The schedule does not contain the levels.

    >>> from alphabar.sampling import make_knots
    >>> [
    ...     round(k.timestep)
    ...     for k in make_knots(NoiseSchedule.scaled_linear(), 10, "align_your_steps")
    ... ]
    [999, 850, 736, 645, 545, 455, 343, 233, 124, 24, -1]
    """
    table = np.log(published_sigmas(variant))
    at = np.linspace(0, len(table) - 1, steps + drop_last)[:steps]
    levels = torch.from_numpy(np.exp(np.interp(at, np.arange(len(table)), table)))
    if schedule.has_zero_terminal_snr:
        levels[0] = math.inf
    knots = knots_at_levels(schedule, levels, ratio=True, rounding=rounding)
    return (*knots, final_knot(schedule, final))
