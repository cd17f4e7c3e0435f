"""Churn: raising the noise a little before a step (Karras et al. 2206.00364, algorithm 2), and the methods made with it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..knots import Knot
from ..table import Combination, Trace
from .base import Method
from .euler import along, transfer


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
    """Return x̂ and its knot, raised to σ̂ = (1 + γ) σ (lines 4 to 6), or x and its knot where no churn is due."""
    if s_churn < 0 or s_noise < 0:
        raise ValueError(f"s_churn and s_noise must be at least 0, got {s_churn} and {s_noise}")
    s = knots[i]
    gamma = min(s_churn / (len(knots) - 1), math.sqrt(2) - 1) if s_tmin <= s.sigma_ve <= s_tmax and s.alpha > 0 else 0.0
    if gamma == 0:
        return x, s
    raised = trace.knot(s.half_log_snr - math.log1p(gamma))
    added = s.sigma_ve * math.sqrt((1 + gamma) ** 2 - 1)
    if s_noise != 1:
        trace.keeps_marginals = False  # as the paper wants it: a little more noise than the level says
    return raised.alpha * (x / s.alpha + (s_noise * added) * trace.noise(raised, s)), raised


def euler(
    trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
) -> list[Combination]:  # fmt: skip
    """Euler's method on the probability flow ODE (2206.00364, algorithm 2 without its correction)."""
    x, s = churned(trace, knots, i, x, s_churn, s_tmin, s_tmax, s_noise)
    D, _ = trace.evaluate(x, s)
    return [transfer(x, D, s, knots[i + 1])]


def heun(
    trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
) -> list[Combination]:  # fmt: skip
    """Heun's second-order steps (2206.00364, algorithm 2), with Euler's for the last into σ = 0 and from α = 0."""
    n = knots[i + 1]
    x, s = churned(trace, knots, i, x, s_churn, s_tmin, s_tmax, s_noise)
    D, e = trace.evaluate(x, s)
    x_n = transfer(x, D, s, n)
    if n.sigma == 0 or s.alpha == 0:
        return [x_n]
    _, e_n = trace.evaluate(x_n, n)
    trace.denoised = D
    # in σ/α the slope is ε̂: line 11 with the mean of both ends
    return [along(x, D, e, 0.5 * (e + e_n), s, n)]


def flow_heun(trace: Trace, knots: Sequence[Knot], i: int, x: Combination) -> list[Combination]:
    """Heun's steps in the time of the straight path, x_n = x + (σ_n - σ_s) (u_s + u_n) / 2 with u = ε̂ - D (2403.03206, §2).

    ``heun`` takes the mean of both slopes in σ / α instead; both are of order 2. On other curves than a flow x / (α + σ) follows
    the straight path, with the time σ / (α + σ).
    """
    s, n = knots[i], knots[i + 1]
    D, e = trace.evaluate(x, s)
    x_n = transfer(x, D, s, n)
    if n.sigma == 0:
        return [x_n]
    D_n, e_n = trace.evaluate(x_n, n)
    trace.denoised = D
    whole, whole_n = s.alpha + s.sigma, n.alpha + n.sigma
    gone = n.sigma / whole_n - s.sigma / whole
    return [x_n + (0.5 * whole_n * gone) * ((e_n - D_n) - (e - D))]


METHODS = [
    Method(
        "euler",
        euler,
        order=1,
        source="2206.00364",
        called={"Euler": {}, "EulerDiscreteScheduler": {}, "EDMEulerScheduler": {}},
    ),
    Method(
        "heun",
        heun,
        order=2,
        evaluations=2,
        source="2206.00364",
        called={"Heun": {}, "HeunDiscreteScheduler": {}},
    ),
    Method(
        "stochastic_karras_ve",
        heun,
        order=0,
        reaches=(2, {"s_churn": 10.0, "s_noise": 1.0}),
        evaluations=2,
        source="2206.00364, algorithm 2",
        stochastic=True,
        called={"KarrasVeScheduler": {"grid": "exponential"}},
        defaults={"s_churn": 80.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.007},
    ),
    Method(
        "flow_heun",
        flow_heun,
        order=2,
        evaluations=2,
        source="2403.03206",
    ),
]
