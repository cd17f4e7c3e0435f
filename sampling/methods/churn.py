"""Churn: raise the noise before a step (Karras et al. 2206.00364, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..knots import Knot
from ..tracing import Combination, Trace


def churned(
    trace: Trace,
    knots: Sequence[Knot],
    i: int,
    x: Combination,
    s_churn: float,
    s_tmin: float,
    s_tmax: float,
    s_noise: float,
) -> tuple[Combination, Knot]:
    """Return x̂ and its knot, raised to σ̂ = (1 + γ) σ (lines 4 to 6).

    If the churn is 0, return x and its knot.
    """
    if s_churn < 0 or s_noise < 0:
        raise ValueError(f"s_churn and s_noise must be at least 0, got {s_churn} and {s_noise}")
    s = knots[i]
    gamma = (
        min(s_churn / (len(knots) - 1), math.sqrt(2) - 1)
        if s_tmin <= s.sigma_ve <= s_tmax and s.alpha > 0
        else 0.0
    )
    if gamma == 0:
        return x, s
    raised = trace.knot(s.half_log_snr - math.log1p(gamma))
    added = s.sigma_ve * math.sqrt((1 + gamma) ** 2 - 1)
    if s_noise != 1:
        trace.keeps_marginals = False  # as in the paper: slightly more noise than the level
    return raised.alpha * (x / s.alpha + (s_noise * added) * trace.noise(raised, s)), raised
