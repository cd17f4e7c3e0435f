"""Two-evaluation methods with a point between the knots: DPM2, DPM++ 2S, DPM++ SDE.

Also their ancestral forms. An ancestral step goes down to (α_n, sqrt(σ_n² - r²)) by the ODE, then
adds noise of standard deviation r (k-diffusion).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...noising.utils.validation import require
from ..knots import Knot
from ..tracing import Combination, Trace
from .base import register_method
from .churn import churned
from .steps import along, check_eta, first_order_update, fresh_noise, posterior_std


def ancestral_target(n: Knot, r: float) -> Knot:
    """Return the point with n's signal level from which noise of standard deviation r leads to n.

    The network is not called there.
    """
    return Knot(math.nan, n.alpha, math.sqrt(max(n.sigma**2 - r**2, 0.0)))


def midpoint(trace: Trace, s: Knot, d: Knot, ratio: float = 0.5) -> Knot:
    """Return the point of the curve at the fraction ``ratio`` of the step from s to d in λ."""
    return trace.knot(s.half_log_snr + ratio * (d.half_log_snr - s.half_log_snr))


@register_method(
    order=2, evaluations=2, source="2206.00364", aliases={"DPM2": {}, "KDPM2DiscreteScheduler": {}}
)
def dpm_2(
    trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
) -> list[Combination]:  # fmt: skip
    """DPM2: the midpoint rule in σ/α with the midpoint in log σ.

    Source: 2206.00364, algorithm 2, with the point of 2206.00927.
    """
    n = knots[i + 1]
    x, s = churned(trace, knots, i, x, s_churn, s_tmin, s_tmax, s_noise)
    return [_dpm_2_step(trace, x, s, n)]


def _dpm_2_step(trace: Trace, x: Combination, s: Knot, d: Knot) -> Combination:
    D, e = trace.evaluate(x, s)
    if d.sigma == 0 or s.alpha == 0:
        return first_order_update(x, D, s, d)
    m = midpoint(trace, s, d)
    _, e_m = trace.evaluate(first_order_update(x, D, s, m), m)
    return along(x, D, e, e_m, s, d)


@register_method(
    order=2,
    evaluations=2,
    source="k-diffusion",
    stochastic=True,
    aliases={"DPM2 a": {}, "KDPM2AncestralDiscreteScheduler": {}},
)
def dpm_2_ancestral(
    trace: Trace,
    knots: Sequence[Knot],
    i: int,
    x: Combination,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> list[Combination]:
    """DPM2 a: ancestral sampling with DPM2 steps (k-diffusion's sample_dpm_2_ancestral)."""
    s, n = knots[i], knots[i + 1]
    r = check_eta(eta) * posterior_std(s, n)
    return [
        _plus(
            _dpm_2_step(trace, x, s, ancestral_target(n, r)), fresh_noise(trace, s, n, r, s_noise)
        )
    ]


@register_method(
    order=2, evaluations=2, source="2211.01095", stochastic=True, aliases={"DPM++ 2S a": {}}
)
def dpmpp_2s_ancestral(
    trace: Trace,
    knots: Sequence[Knot],
    i: int,
    x: Combination,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> list[Combination]:
    """DPM++ 2S a: ancestral sampling with DPM-Solver++(2S) steps.

    Source: 2211.01095, algorithm 1 with r_1 = 1/2; k-diffusion.
    """
    s, n = knots[i], knots[i + 1]
    r = check_eta(eta) * posterior_std(s, n)
    d = ancestral_target(n, r)
    D = trace.denoise(x, s)
    if d.sigma > 0 and s.alpha > 0:
        m = midpoint(trace, s, d)
        D = trace.denoise(first_order_update(x, D, s, m), m)
    return [_plus(first_order_update(x, D, s, d), fresh_noise(trace, s, n, r, s_noise))]


@register_method(
    order=2,
    evaluations=2,
    source="2211.01095",
    stochastic=True,
    aliases={"DPM++ SDE": {}, "DPMSolverSDEScheduler": {}},
)
def dpmpp_sde(
    trace: Trace,
    knots: Sequence[Knot],
    i: int,
    x: Combination,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
) -> list[Combination]:
    """DPM++ SDE: stochastic DPM-Solver++ with a point at the fraction r of the step.

    k-diffusion's sample_dpmpp_sde. Both noises are from one Brownian path: the second contains the
    first. Without this the method is not of weak order 2.
    """
    require(0 < r <= 1, "r", "be in (0, 1]", r, "k-diffusion uses 1/2")
    s, n = knots[i], knots[i + 1]
    check_eta(eta)
    D = trace.denoise(x, s)
    spread = eta * posterior_std(s, n)
    if n.sigma == 0 or s.alpha == 0:
        return [
            _plus(
                first_order_update(x, D, s, ancestral_target(n, spread)),
                fresh_noise(trace, s, n, spread, s_noise),
            )
        ]
    m = midpoint(trace, s, n, r)
    to_m = eta * posterior_std(s, m)
    x_m = _plus(
        first_order_update(x, D, s, ancestral_target(m, to_m)),
        fresh_noise(trace, s, m, to_m, s_noise),
    )
    D_m, _ = trace.evaluate(x_m, m)
    E = D + (D_m - D) / (2 * r)
    return [
        _plus(
            first_order_update(x, E, s, ancestral_target(n, spread)),
            fresh_noise(trace, s, n, spread, s_noise),
        )
    ]


def _plus(x: Combination, noise: Combination | None) -> Combination:
    return x if noise is None else x + noise
