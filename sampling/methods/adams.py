"""Linear multistep methods in the noise prediction ε̂.

LMS, DEIS, PLMS / PNDM, iPNDM and gradient estimation. In σ̄ = σ/α the flow is dx̄/dσ̄ = ε̂(σ̄), so
x_n = α_n (x/α_s + ∫ ε̂ dσ̄). The methods differ in the extrapolation of ε̂ over the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...noising.utils.validation import one_of
from ..knots import Knot
from ..tracing import Combination, Trace, weighted
from .base import register_method
from .dpm_solver import valid_history
from .integrals import lagrange_integrals
from .steps import along, first_order_update

ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def _shares(weights: Sequence[float]) -> list[float]:
    """Return the weights divided by their sum, which is the length of the step."""
    total = math.fsum(weights)
    return [w / total for w in weights]


@register_method(order=4, source="k-diffusion", aliases={"LMS": {}, "LMSDiscreteScheduler": {}})
def lms(
    trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *past: Combination, order: int = 4
) -> list[Combination]:
    """LMS: Adams-Bashforth on the grid, ε̂ a polynomial in σ/α (k-diffusion's sample_lms)."""
    one_of("order", order, (1, 2, 3, 4))
    s, n = knots[i], knots[i + 1]
    D, e = trace.evaluate(x, s)
    memory = [e, *past[: order - 2]] if order > 1 else []
    if s.alpha == 0:
        return [first_order_update(x, D, s, n), *memory]
    m = [e, *valid_history(past, knots, i, order)]
    nodes = [knots[i - j].sigma_ve for j in range(len(m))]
    weights = lagrange_integrals(nodes, s.sigma_ve, n.sigma_ve)
    return [along(x, D, e, weighted(m, _shares(weights)), s, n), *memory]


@register_method(order=3, source="2204.13902", aliases={"DEIS": {}, "DEISMultistepScheduler": {}})
def deis(
    trace: Trace,
    knots: Sequence[Knot],
    i: int,
    x: Combination,
    *past: Combination,
    order: int = 3,
    lower_order_final: bool = True,
) -> list[Combination]:
    """DEIS: ε̂ is a polynomial in log(σ/α), with the exact exponential weight.

    Source: Zhang & Chen 2204.13902, eq. 14, "log ρ".
    """
    one_of("order", order, (1, 2, 3))
    s, n, steps = knots[i], knots[i + 1], len(knots) - 1
    D, e = trace.evaluate(x, s)
    memory = [e, *past[: order - 2]] if order > 1 else []
    if s.alpha == 0 or n.sigma == 0:
        return [first_order_update(x, D, s, n), *memory]
    used = min(order, steps - i) if lower_order_final and steps < 15 else order
    m = [e, *valid_history(past, knots, i, used)]
    nodes = [-knots[i - j].half_log_snr for j in range(len(m))]  # log ρ, ρ = σ/α and dρ = ρ d log ρ
    weights = lagrange_integrals(nodes, nodes[0], -n.half_log_snr, rate=1.0)
    return [along(x, D, e, weighted(m, _shares(weights)), s, n), *memory]


@register_method(
    order=1, source="2202.09778", aliases={"iPNDM": {}, "IPNDMScheduler": {"grid": "sine_squared"}}
)
def ipndm(
    trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *past: Combination, order: int = 4
) -> list[Combination]:
    """iPNDM: Adams-Bashforth weights of an even grid in the DDIM update, starting at order 1.

    Source: 2202.09778; 2204.13902, §3.3.
    """
    one_of("order", order, (1, 2, 3, 4))
    s, n = knots[i], knots[i + 1]
    D, e = trace.evaluate(x, s)
    memory = [e, *past[: order - 2]] if order > 1 else []
    if s.alpha == 0:
        return [first_order_update(x, D, s, n), *memory]
    m = [e, *valid_history(past, knots, i, order)]
    return [along(x, D, e, weighted(m, ADAMS_BASHFORTH[len(m)]), s, n), *memory]


@register_method(order=4, source="2204.13902", aliases={"iPNDM-v": {}})
def ipndm_v(
    trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *past: Combination, order: int = 4
) -> list[Combination]:
    """iPNDM-v: iPNDM with the Adams-Bashforth weights of the actual grid, and D for the last step.

    Source: 2204.13902, §3.3. The weights are exact, as in ``lms``. The published code (ComfyUI's
    sample_ipndm_v, from diff-sampler) has three errors in its expansion: a bracket of the third
    weight, and a sign and a ratio of steps of the fourth. With these errors the weights sum to one
    only if the grid is even in σ/α, and the order is 2.
    """
    if knots[i + 1].sigma == 0:
        one_of("order", order, (1, 2, 3, 4))
        return [first_order_update(x, trace.denoise(x, knots[i]), knots[i], knots[i + 1])]
    return lms(trace, knots, i, x, *past, order=order)


@register_method(order=1, source="2306.04848", aliases={"Gradient Estimation": {}})
def gradient_estimation(
    trace: Trace,
    knots: Sequence[Knot],
    i: int,
    x: Combination,
    *past: Combination,
    gamma: float = 2.0,
) -> list[Combination]:
    """Gradient estimation: ε̄ = γ ε̂ + (1 - γ) ε̂_last (Permenter & Yuan 2306.04848, eq. 9)."""
    s, n = knots[i], knots[i + 1]
    D, e = trace.evaluate(x, s)
    if s.alpha == 0 or n.sigma == 0 or not valid_history(past, knots, i, 2):
        return [first_order_update(x, D, s, n), e]
    return [along(x, D, e, e + (gamma - 1) * (e - past[0]), s, n), e]


COMBINED = ("epsilon", "output")


def _combined(trace: Trace, D: Combination, e: Combination, k: Knot, combine: str) -> Combination:
    """Return the value of an evaluation at k that a step combines: ε̂ or the network's output."""
    if combine == "epsilon":
        return e
    c0, c1 = trace.schedule.prediction.coefficients(k.alpha, k.sigma)
    # outputs of several knots are different combinations of (x_0, ε)
    trace.keeps_marginals = trace.keeps_marginals and c0 == 0
    return c0 * D + c1 * e


def _as_epsilon(
    trace: Trace, value: Combination, x: Combination, s: Knot, combine: str
) -> Combination:
    """Return the ε̂ at x and s of a combined value."""
    if combine == "epsilon":
        return value
    c0, c1 = trace.schedule.prediction.coefficients(s.alpha, s.sigma)
    return (c0 * x - s.alpha * value) / (c0 * s.sigma - c1 * s.alpha)


@register_method(order=1, source="2202.09778", aliases={"PLMS": {}})
def plms(
    trace: Trace,
    knots: Sequence[Knot],
    i: int,
    x: Combination,
    *past: Combination,
    combine: str = "epsilon",
) -> list[Combination]:
    """PLMS: pseudo linear multistep, with one pseudo improved Euler step at the start.

    Source: Liu et al. 2202.09778, eq. 12 and 22. ``combine``: "epsilon", or the network's "output"
    for any prediction type, as in PNDMScheduler of diffusers.
    """
    one_of("combine", combine, COMBINED)
    s, n = knots[i], knots[i + 1]
    D, e = trace.evaluate(x, s)
    if s.alpha == 0:
        return [first_order_update(x, D, s, n)]
    value = _combined(trace, D, e, s, combine)
    if not past:
        x_n = first_order_update(x, D, s, n)
        if n.sigma > 0:
            mean = 0.5 * (value + _combined(trace, *trace.evaluate(x_n, n), n, combine))
            trace.denoised = D
            x_n = along(x, D, e, _as_epsilon(trace, mean, x, s, combine), s, n)
        return [x_n, value]
    m = [value, *past]
    mean = weighted(m, ADAMS_BASHFORTH[len(m)])
    return [along(x, D, e, _as_epsilon(trace, mean, x, s, combine), s, n), *m[:3]]


@register_method(order=1, source="2202.09778", aliases={"PNDM": {}, "PNDMScheduler": {}})
def pndm(
    trace: Trace,
    knots: Sequence[Knot],
    i: int,
    x: Combination,
    *past: Combination,
    combine: str = "epsilon",
) -> list[Combination]:
    """PNDM: three pseudo Runge-Kutta steps of order 4, then PLMS.

    Source: Liu et al. 2202.09778, algorithm 2 and eq. 13. ``combine`` as in ``plms``.
    """
    one_of("combine", combine, COMBINED)
    s, n = knots[i], knots[i + 1]
    if (past and (len(past) == 3 or n.sigma == 0)) or s.alpha == 0:
        return plms(trace, knots, i, x, *past, combine=combine)
    D, e = trace.evaluate(x, s)
    if n.sigma == 0:
        return [first_order_update(x, D, s, n)]
    m = trace.knot_at_time(0.5 * (trace.time(s) + trace.time(n)))

    def stage(value: Combination, k: Knot) -> Combination:
        x_k = along(x, D, e, _as_epsilon(trace, value, x, s, combine), s, k)
        return _combined(trace, *trace.evaluate(x_k, k), k, combine)

    v1 = _combined(trace, D, e, s, combine)
    v2 = stage(v1, m)
    v3 = stage(v2, m)
    v4 = stage(v3, n)
    trace.denoised = D
    mean = weighted([v1, v2, v3, v4], [1 / 6, 1 / 3, 1 / 3, 1 / 6])
    return [along(x, D, e, _as_epsilon(trace, mean, x, s, combine), s, n), v1, *past]
