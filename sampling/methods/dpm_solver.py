"""DPM-Solver and DPM-Solver++ multistep and in blocks, ODE and SDE.

Source: Lu et al. 2206.00927, 2211.01095. With λ = log(α / σ), h = λ_n - λ_s and the data prediction
D(λ), the solution of the reverse SDE of strength η (0: the ODE) is

    x_n = σ_n/σ_s e^(-ηh) x + α_n ∫_0^h (1 + η) e^(-(1+η)(h-u)) D(λ_s + u) du
          + σ_n sqrt(1 - e^(-2ηh)) z.

So each formula is an estimate E of the weighted mean of D over the step, followed by
``first_order_update``. With H = (1 + η) h, and D1 = h D' and D2 = h² D'' / 2 from past values, E =
D + c1 D1 + c2 D2, where

    c1 = φ_2(H) / (1 - e^-H)  ("heun")  or its limit 1/2  ("midpoint"),
    c2 = φ_3(H) / (1 - e^-H).

The exact c2 is twice this value. The published third-order formula uses this c2 and is therefore of
order 2 (measured in the tests). ``dpmpp_3m`` and ``dpmpp_3m_sde`` keep it, so that they give the
known images. The noise-prediction forms ("dpmsolver") are the same with ε for D and α, σ exchanged:
h becomes -h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...noising.utils.validation import one_of
from ..knots import Knot
from ..tracing import Combination, Trace
from .base import register_method
from .euler import ddim_inverse
from .integrals import phi_2, phi_3
from .steps import along, first_order_update, first_order_update_epsilon, fresh_noise, sde_std

ALGORITHMS = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
SOLVER_TYPES = ("midpoint", "heun")


def differences(
    m: Sequence[Combination], lambdas: Sequence[float], h: float
) -> tuple[Combination, Combination]:
    """Return D1 = h D' and D2 = h² D'' / 2 at λ_0 from two or three past values.

    Source: 2211.01095, appendix.
    """
    r0 = (lambdas[0] - lambdas[1]) / h
    first = (m[0] - m[1]) / r0
    if len(m) == 2:
        return first, 0.0 * first
    r1 = (lambdas[1] - lambdas[2]) / h
    second = (m[1] - m[2]) / r1
    return first + (r0 / (r0 + r1)) * (first - second), (first - second) / (r0 + r1)


def weighted_mean(
    m: Sequence[Combination], lambdas: Sequence[float], h: float, H: float, solver_type: str
) -> Combination:
    """Return E from the values m at past λ; H = (1 + η) h, or -(1 + η) h for noise."""
    if len(m) == 1:
        return m[0]
    D1, D2 = differences(m, lambdas, h)
    if len(m) == 2 and solver_type == "midpoint":
        return m[0] + 0.5 * D1
    whole = -math.expm1(-H)
    return m[0] + (phi_2(H) / whole) * D1 + (phi_3(H) / whole) * D2


def valid_history(
    past: Sequence[Combination], knots: Sequence[Knot], i: int, order: int
) -> list[Combination]:
    """Return the values in memory that a step may use: none older than a knot with α = 0."""
    return [m for j, m in enumerate(past[: order - 1]) if knots[i - 1 - j].alpha > 0]


def step_order(i: int, steps: int, order: int, n: Knot, lower_order_final: bool) -> int:
    """Return the order of step i: it falls to 1 at the end of short runs, and is 1 into σ = 0."""
    if n.sigma == 0:
        return 1
    return min(order, steps - i) if lower_order_final and steps < 15 else order


@register_method(order=2, source="2211.01095", aliases={"DPMSolverMultistepScheduler": {}})
def dpm_solver_multistep(
    trace: Trace,
    knots: Sequence[Knot],
    i: int,
    x: Combination,
    *past: Combination,
    order: int = 2,
    algorithm: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    eta: float | None = None,
    s_noise: float = 1.0,
) -> list[Combination]:
    """DPM-Solver(++) multistep: 2211.01095, algorithm 2, eq. 18 (SDE); 2206.00927, eq. 3.7."""
    one_of("order", order, (1, 2, 3))
    one_of("algorithm", algorithm, ALGORITHMS)
    one_of("solver_type", solver_type, SOLVER_TYPES)
    s, n, steps = knots[i], knots[i + 1], len(knots) - 1
    D, e = trace.evaluate(x, s)
    by_noise = algorithm.endswith("dpmsolver")
    value = e if by_noise else D
    used = step_order(
        i, steps, 1 if euler_at_final and i == steps - 1 else order, n, lower_order_final
    )
    m = [value, *valid_history(past, knots, i, used)]
    eta = (1.0 if algorithm.startswith("sde") else 0.0) if eta is None else eta
    memory = [value, *past[: order - 2]] if order > 1 else []
    if n.sigma == 0:
        return [first_order_update(x, D, s, n), *memory]
    if s.alpha == 0 or (len(m) == 1 and not (by_noise and eta)):
        r = sde_std(s, n, eta)
        return [first_order_update(x, D, s, n, r, fresh_noise(trace, s, n, r, s_noise)), *memory]
    h = n.half_log_snr - s.half_log_snr
    lambdas = [knots[i - j].half_log_snr for j in range(len(m))]
    if not by_noise:
        E = weighted_mean(m, lambdas, h, (1 + eta) * h, solver_type)
        r = sde_std(s, n, eta)
        return [first_order_update(x, E, s, n, r, fresh_noise(trace, s, n, r, s_noise)), *memory]
    E = weighted_mean(m, lambdas, h, -h, solver_type)
    if not eta:
        return [along(x, D, e, E, s, n), *memory]
    # SDE form of eq. 3.7: twice the drift; its noise keeps the variance to first order only
    trace.keeps_marginals = False
    drift = 2 * (n.sigma - n.alpha * s.sigma_ve) * E
    return [
        (n.alpha / s.alpha) * x
        + drift
        + (s_noise * n.sigma * math.sqrt(math.expm1(2 * h))) * trace.noise(s, n),
        *memory,
    ]


@register_method(order=2, source="2211.01095", aliases={"DPM++ 2M": {}})
def dpmpp_2m(
    trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *past: Combination
) -> list[Combination]:
    """DPM-Solver++(2M) (2211.01095, algorithm 2): first order at the start and into σ = 0."""
    return dpm_solver_multistep(trace, knots, i, x, *past, order=2, lower_order_final=False)


@register_method(order=2, source="2211.01095", aliases={"DPM++ 3M": {}})
def dpmpp_3m(
    trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *past: Combination
) -> list[Combination]:
    """DPM-Solver++(3M) in the published form (2211.01095, appendix).

    See the docstring of this module for its order.
    """
    return dpm_solver_multistep(
        trace, knots, i, x, *past, order=3, solver_type="heun", lower_order_final=False
    )


@register_method(
    order=2,
    source="2211.01095",
    stochastic=True,
    aliases={"DPM++ 2M SDE": {}, "DPM++ 2M SDE Heun": {"solver_type": "heun"}},
)
def dpmpp_2m_sde(
    trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *past: Combination,
    eta: float = 1.0, s_noise: float = 1.0, solver_type: str = "midpoint",
) -> list[Combination]:  # fmt: skip
    """SDE-DPM-Solver++(2M) (2211.01095, eq. 18; k-diffusion's sample_dpmpp_2m_sde)."""
    return dpm_solver_multistep(
        trace,
        knots,
        i,
        x,
        *past,
        order=2,
        lower_order_final=False,
        eta=eta,
        s_noise=s_noise,
        solver_type=solver_type,
    )


@register_method(order=2, source="k-diffusion", stochastic=True, aliases={"DPM++ 3M SDE": {}})
def dpmpp_3m_sde(
    trace: Trace,
    knots: Sequence[Knot],
    i: int,
    x: Combination,
    *past: Combination,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> list[Combination]:
    """SDE-DPM-Solver++(3M), k-diffusion's sample_dpmpp_3m_sde.

    It starts with the exact second-order coefficient.
    """
    return dpm_solver_multistep(
        trace,
        knots,
        i,
        x,
        *past,
        order=3,
        lower_order_final=False,
        eta=eta,
        s_noise=s_noise,
        solver_type="heun",
    )


@register_method(
    order=2,
    source="2211.01095",
    inverse=True,
    grid="linspace",
    grid_options={"final": "sigma_min"},
    aliases={"DPMSolverMultistepInverseScheduler": {}},
)
def dpm_solver_inverse(
    trace: Trace,
    knots: Sequence[Knot],
    i: int,
    x: Combination,
    *past: Combination,
    order: int = 2,
    algorithm: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> list[Combination]:
    """DPM-Solver(++) multistep run upwards, from an image to the noise that gives it.

    Source: 2211.01095, algorithm 2, h < 0. From a first knot without noise it takes the step of
    ``ddim_inverse``, and to a last knot without signal that of DDIM.
    """
    one_of("algorithm", algorithm, ALGORITHMS[:2])
    s, n = knots[i], knots[i + 1]
    if s.sigma == 0:
        return ddim_inverse(trace, knots, i, x)
    if n.alpha == 0:
        return [first_order_update(x, trace.denoise(x, s), s, n)]
    return dpm_solver_multistep(
        trace, knots, i, x, *past, order=order, algorithm=algorithm, solver_type=solver_type,
        lower_order_final=lower_order_final, euler_at_final=euler_at_final,
    )  # fmt: skip


def singlestep_orders(steps: int, order: int, last_is_clean: bool) -> list[int]:
    """Return the order of each step: blocks of 1, 2, ... order, one after the other.

    >>> singlestep_orders(7, 3, last_is_clean=True)
    [1, 2, 3, 1, 2, 3, 1]
    """
    climb = list(range(1, order + 1))
    orders = (climb * (steps // order + 1))[:steps]
    if last_is_clean and steps:
        if order > 2 and steps % order == 0:
            orders[-order:] = [*climb[:-1], 1]  # no block ends in the clean sample
        orders[-1] = 1
    return orders


@register_method(
    order=2, block=2, source="2206.00927", aliases={"DPMSolverSinglestepScheduler": {}}
)
def dpm_solver_singlestep(
    trace: Trace,
    knots: Sequence[Knot],
    i: int,
    x: Combination,
    *past: Combination,
    order: int = 2,
    algorithm: str = "dpmsolver++",
    solver_type: str = "midpoint",
) -> list[Combination]:
    """DPM-Solver(++) in blocks of ``order`` grid points, each from the block's first x.

    Source: 2206.00927, algorithms 1 and 2.
    """
    one_of("order", order, (1, 2, 3))
    one_of("algorithm", algorithm, ALGORITHMS[:3])
    one_of("solver_type", solver_type, SOLVER_TYPES)
    s, n, steps = knots[i], knots[i + 1], len(knots) - 1
    # the step from a zero-SNR knot is not part of a block
    alone = int(knots[0].alpha == 0)
    orders = [1] * alone + singlestep_orders(steps - alone, order, knots[-1].sigma == 0)
    k = orders[i]
    D, e = trace.evaluate(x, s)
    by_noise, eta = algorithm == "dpmsolver", 1.0 if algorithm.startswith("sde") else 0.0
    # memory: the block's first x, then its values, newest first
    origin, values = (
        (x, [e if by_noise else D]) if k == 1 else (past[0], [e if by_noise else D, *past[1:k]])
    )
    memory = [origin, *values] if i + 1 < steps and orders[i + 1] > 1 else []
    first = knots[i - k + 1]
    r = sde_std(first, n, eta)
    z = fresh_noise(trace, first, n, r)
    if k == 1:
        return [first_order_update(x, D, s, n, r, z), *memory]
    lambdas = [knots[i - k + 1 + j].half_log_snr for j in range(k)]
    h = n.half_log_snr - lambdas[0]
    E = _block_mean(values[::-1], lambdas, h, -h if by_noise else (1 + eta) * h, solver_type)
    return [
        first_order_update_epsilon(origin, E, first, n)
        if by_noise
        else first_order_update(origin, E, first, n, r, z),
        *memory,
    ]


def _block_mean(
    m: Sequence[Combination], lambdas: Sequence[float], h: float, H: float, solver_type: str
) -> Combination:
    """Return E from the values at a block's knots (2206.00927, eq. 3.5 and appendix B)."""
    whole = -math.expm1(-H)
    r = [(y - lambdas[0]) / h for y in lambdas]
    slope = [(m[j] - m[0]) / r[j] for j in range(1, len(m))]  # h D' estimated to each later knot
    if len(m) == 2:
        return m[0] + (0.5 if solver_type == "midpoint" else phi_2(H) / whole) * slope[0]
    if solver_type == "midpoint":
        return m[0] + (phi_2(H) / whole) * slope[1]
    r1, r2 = r[1], r[2]
    D1 = (r2 * slope[0] - r1 * slope[1]) / (r2 - r1)
    D2 = 2.0 * (slope[1] - slope[0]) / (r2 - r1)
    return m[0] + (phi_2(H) / whole) * D1 + (phi_3(H) / whole) * D2
