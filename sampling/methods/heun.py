"""Heun's method, Heun++ with weighted slopes in σ/α, and exponential Heun.

Exponential Heun uses the data prediction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..knots import Knot
from ..tracing import Combination, Trace
from .base import register_method
from .churn import churned
from .integrals import phi_2
from .steps import along, first_order_update, fresh_noise, sde_std


@register_method(
    "stochastic_karras_ve",
    order=0,
    reaches=(2, {"s_churn": 10.0, "s_noise": 1.0}),
    evaluations=2,
    source="2206.00364, algorithm 2",
    stochastic=True,
    aliases={"KarrasVeScheduler": {"grid": "exponential"}},
    defaults={"s_churn": 80.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.007},
)
@register_method(
    order=2, evaluations=2, source="2206.00364", aliases={"Heun": {}, "HeunDiscreteScheduler": {}}
)
def heun(
    trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
) -> list[Combination]:  # fmt: skip
    """Heun's second-order steps (2206.00364, algorithm 2).

    The last step into σ = 0 and a step from α = 0 are Euler's.
    """
    n = knots[i + 1]
    x, s = churned(trace, knots, i, x, s_churn, s_tmin, s_tmax, s_noise)
    D, e = trace.evaluate(x, s)
    x_n = first_order_update(x, D, s, n)
    if n.sigma == 0 or s.alpha == 0:
        return [x_n]
    _, e_n = trace.evaluate(x_n, n)
    trace.denoised = D
    # in σ/α the slope is ε̂: line 11 uses the mean of both ends
    return [along(x, D, e, 0.5 * (e + e_n), s, n)]


@register_method(order=2, evaluations=2, source="2403.03206")
def flow_heun(trace: Trace, knots: Sequence[Knot], i: int, x: Combination) -> list[Combination]:
    """Heun's steps in the time of the straight path (2403.03206, §2).

    x_n = x + (σ_n - σ_s) (u_s + u_n) / 2 with u = ε̂ - D. ``heun`` uses the mean of both slopes in
    σ / α instead; both are of order 2. On curves other than a flow, x / (α + σ) follows the
    straight path, with the time σ / (α + σ).
    """
    s, n = knots[i], knots[i + 1]
    D, e = trace.evaluate(x, s)
    x_n = first_order_update(x, D, s, n)
    if n.sigma == 0:
        return [x_n]
    D_n, e_n = trace.evaluate(x_n, n)
    trace.denoised = D
    whole, whole_n = s.alpha + s.sigma, n.alpha + n.sigma
    gone = n.sigma / whole_n - s.sigma / whole
    return [x_n + (0.5 * whole_n * gone) * ((e_n - D_n) - (e - D))]


@register_method(order=1, evaluations=3, source="k-diffusion, Heun++", aliases={"Heun++ 2": {}})
def heunpp2(
    trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
) -> list[Combination]:  # fmt: skip
    """Heun++: ε̂ at this knot and the next two, with w_j = σ̄_j / (3 σ̄_0) for the later ones.

    Source: Carzit's Heun++; sample_heunpp2. The last step but one has one later knot, with w = σ̄ /
    (2 σ̄_0), and the last step is Euler's. The weights are not a quadrature: the order is 1. If
    σ̄_0 is infinite, at zero terminal SNR, the first finite σ̄ replaces it; otherwise all weights
    would be 0.
    """
    first = next(k.sigma_ve for k in knots if k.alpha > 0)
    x, s = churned(trace, knots, i, x, s_churn, s_tmin, s_tmax, s_noise)
    D, e = trace.evaluate(x, s)
    ahead = knots[i + 1 : min(i + 3, len(knots) - 1)]  # not the last knot, which is clean
    if s.alpha == 0 or not ahead:
        return [first_order_update(x, D, s, knots[i + 1])]
    mean_e, y, D_y, k = e, x, D, s
    for n in ahead:
        y = first_order_update(y, D_y, k, n)
        D_y, e_n = trace.evaluate(y, n)
        mean_e, k = mean_e + (n.sigma_ve / ((len(ahead) + 1) * first)) * (e_n - e), n
    trace.denoised = D
    return [along(x, D, e, mean_e, s, knots[i + 1])]


@register_method(
    "exp_heun_2_x0_sde",
    order=2,
    evaluations=2,
    source="2305.14267",
    stochastic=True,
    defaults={"eta": 1.0},
    aliases={"Exp Heun 2 x0 SDE": {}},
)
@register_method(order=2, evaluations=2, source="2305.14267", aliases={"Exp Heun 2 x0": {}})
def exp_heun_2_x0(
    trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *, eta: float = 0.0
) -> list[Combination]:
    """Exponential Heun: D is linear in λ between both ends of the step, integrated exactly.

    E = D + c (D_n - D) with c = φ_2(H) / (1 - e^-H), H = (1 + η) h. This is SEEDS-2 of Gonzalez et
    al. 2305.14267 with its inner point at the end of the step; ComfyUI's sample_exp_heun_2_x0.
    ``eta`` is the strength of the SDE's noise; both stages use the same draw.
    """
    s, n = knots[i], knots[i + 1]
    D = trace.denoise(x, s)
    r = sde_std(s, n, eta)
    noise = fresh_noise(trace, s, n, r)
    x_n = first_order_update(x, D, s, n, r, noise)
    if n.sigma == 0 or s.alpha == 0:
        return [x_n]
    H = (1 + eta) * (n.half_log_snr - s.half_log_snr)
    D_n = trace.denoise(x_n, n)
    trace.denoised = D
    return [first_order_update(x, D + (phi_2(H) / -math.expm1(-H)) * (D_n - D), s, n, r, noise)]
