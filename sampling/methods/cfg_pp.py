"""CFG++ in methods of higher order.

These are DPM++ 2M and 2S a, RES, gradient estimation, and Euler with a history. Chung et al.
2406.08070 (algorithm 2) go to the guided estimate D along ε̂_u, the noise that belongs to the
unconditional estimate U. In σ̄ = σ/α and x̄ = x/α this is

    x̄_n = D + σ̄_n ε̂_u = U + σ̄_n/σ̄_s (x̄ - U) + (D - U).

So every method here takes its own step on the unconditional path and adds the full guidance D - U
once in each step. The total guidance of a run therefore depends on its number of steps, and scales
are 0 ... 2. At a scale of 1, D is the conditional estimate, and U is still the unconditional one if
its input is given. Without this input U is D, and each method is the one without CFG++; the
declared order is for this case. The last step goes to D, as in the first-order forms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..knots import Knot
from ..tracing import Combination, Trace
from .base import register_method
from .dpm2 import ancestral_target, midpoint
from .dpm_solver import valid_history
from .integrals import phi_2
from .steps import check_eta, first_order_update, fresh_noise, posterior_std, sde_std, toward


@register_method(order=1, source="2406.08070", stochastic=True, aliases={"Euler a CFG++": {}})
def euler_ancestral_cfg_pp(
    trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *, eta: float = 1.0
) -> list[Combination]:
    """Euler a with CFG++: to the guided D along the unconditional ε̂.

    Source: Chung et al. 2406.08070, algorithm 2.
    """
    s, n = knots[i], knots[i + 1]
    D = trace.denoise(x, s)
    if n.sigma == 0:
        return [n.alpha * D]
    _, e = trace.unconditional(x, s)
    r = check_eta(eta) * posterior_std(s, n)
    return [toward(D, e, n, r, fresh_noise(trace, s, n, r))]


@register_method(
    order=1, source="2406.08070", aliases={"DDIM CFG++": {}, "Euler CFG++": {}, "euler_cfg_pp": {}}
)
def ddim_cfg_pp(trace: Trace, knots: Sequence[Knot], i: int, x: Combination) -> list[Combination]:
    """DDIM / Euler with CFG++: to the guided D along the unconditional ε̂.

    Source: Chung et al. 2406.08070, algorithm 2.
    """
    return euler_ancestral_cfg_pp(trace, knots, i, x, eta=0.0)


@register_method(order=2, source="2406.08070", aliases={"DPM++ 2M CFG++": {}})
def dpmpp_2m_cfg_pp(
    trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *past: Combination
) -> list[Combination]:
    """DPM++ 2M with CFG++: the step along U, with the slope (D - U_last) / 2r.

    Source: 2406.08070, appendix; sample_dpmpp_2m_cfg_pp. The published slope uses the guided D and
    the last unconditional estimate, which adds a small amount of guidance.
    """
    s, n = knots[i], knots[i + 1]
    D, _, U, _ = _both(trace, x, s)
    x_n = first_order_update(x, U, s, n) + n.alpha * (D - U)
    if n.sigma == 0 or s.alpha == 0 or not valid_history(past, knots, i, 2):
        return [x_n, U]
    h = n.half_log_snr - s.half_log_snr
    r = (s.half_log_snr - knots[i - 1].half_log_snr) / h
    return [x_n + (n.alpha * -math.expm1(-h) / (2 * r)) * (D - past[0]), U]


@register_method(
    order=2, evaluations=2, source="2406.08070", stochastic=True, aliases={"DPM++ 2S a CFG++": {}}
)
def dpmpp_2s_ancestral_cfg_pp(
    trace: Trace,
    knots: Sequence[Knot],
    i: int,
    x: Combination,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> list[Combination]:
    """DPM++ 2S a with CFG++: both stages along U, then the guidance of the first stage.

    sample_dpmpp_2s_ancestral_cfg_pp.
    """
    s, n = knots[i], knots[i + 1]
    r = check_eta(eta) * posterior_std(s, n)
    d = ancestral_target(n, r)
    D, _, U, _ = _both(trace, x, s)
    E = U
    if d.sigma > 0 and s.alpha > 0:
        m = midpoint(trace, s, d)
        E = _both(trace, first_order_update(x, U, s, m), m)[2]
        trace.denoised = D
    return [
        first_order_update(x, E, s, d, 0.0, fresh_noise(trace, s, n, r, s_noise))
        + n.alpha * (D - U)
    ]


@register_method(
    "res_multistep_ancestral_cfg_pp",
    order=2,
    source="2308.02157",
    stochastic=True,
    defaults={"eta": 1.0},
)
@register_method(order=2, source="2308.02157", aliases={"RES Multistep CFG++": {}})
def res_multistep_cfg_pp(
    trace: Trace,
    knots: Sequence[Knot],
    i: int,
    x: Combination,
    *past: Combination,
    eta: float = 0.0,
) -> list[Combination]:
    """RES with CFG++: U is linear in λ through its last value, integrated exactly.

    Source: 2308.02157, eq. 8; sample_res_multistep_cfg_pp. The guidance is added to x before the
    step and is reduced by it; the first step, of order 1, adds it in full.
    """
    s, n = knots[i], knots[i + 1]
    D, _, U, _ = _both(trace, x, s)
    if n.sigma == 0:
        return [n.alpha * D]
    r = sde_std(s, n, eta)
    noise = fresh_noise(trace, s, n, r)
    if s.alpha == 0 or not valid_history(past, knots, i, 2):
        return [first_order_update(x, U, s, n, r, noise) + n.alpha * (D - U), U]
    h = n.half_log_snr - s.half_log_snr
    H, last = (1 + eta) * h, s.half_log_snr - knots[i - 1].half_log_snr
    E = U + (phi_2(H) / -math.expm1(-H) * h / last) * (U - past[0])
    return [first_order_update(x + s.alpha * (D - U), E, s, n, r, noise), U]


@register_method(order=1, source="2306.04848", aliases={"Gradient Estimation CFG++": {}})
def gradient_estimation_cfg_pp(
    trace: Trace,
    knots: Sequence[Knot],
    i: int,
    x: Combination,
    *past: Combination,
    gamma: float = 2.0,
) -> list[Combination]:
    """Gradient estimation with CFG++: to D along γ ε̂_u + (1 - γ) ε̂_u,last.

    Source: 2306.04848, eq. 9; 2406.08070.
    """
    s, n = knots[i], knots[i + 1]
    D, _, _, e_u = _both(trace, x, s)
    x_n = n.alpha * D + n.sigma * e_u
    if n.sigma == 0 or s.alpha == 0 or not valid_history(past, knots, i, 2):
        return [x_n, e_u]
    return [x_n + ((gamma - 1) * (n.sigma - n.alpha * s.sigma_ve)) * (e_u - past[0]), e_u]


@register_method(order=0, source="ComfyUI", aliases={"CFG++ UD10 AB": {}})
def cfgpp_ud10_ab(
    trace: Trace,
    knots: Sequence[Knot],
    i: int,
    x: Combination,
    *past: Combination,
    history: float = 0.25,
    unconditional_history: float = 0.1,
    extrapolate: float = 1.0,
) -> list[Combination]:
    """Euler CFG++ with a history (ComfyUI's sample_cfgpp_ud10_ab; no paper).

    The change of ε̂_u is multiplied by σ̄_n, not by the length of the step. So with
    ``unconditional_history`` more steps do not approach the flow, and the declared order is 0;
    without it the order is 1. Memory: the last slope v of the whole step, D, ε̂_u.

    Args:
        history: The fraction of the second-order Adams-Bashforth step in σ̄ that is mixed into
            Euler's.
        unconditional_history: The fraction of the change of ε̂_u that is added to it.
        extrapolate: The last step goes from D by this fraction towards the line through the last
            two D at σ̄ = 0.
    """
    s, n = knots[i], knots[i + 1]
    D, e, _, e_u = _both(trace, x, s)
    if s.alpha == 0:
        return [n.alpha * D + n.sigma * e_u]
    if not past:
        return [n.alpha * D + n.sigma * e_u, _slope(e, e_u, s, n), D, e_u]
    v_last, D_last, e_last = past
    step, step_last = n.sigma_ve - s.sigma_ve, s.sigma_ve - knots[i - 1].sigma_ve
    if n.sigma == 0:
        return [n.alpha * (D - (extrapolate * s.sigma_ve / step_last) * (D - D_last))]
    mean_e = e_u + (unconditional_history * step / step_last) * (e_u - e_last)
    v = _slope(e, mean_e, s, n)
    # Adams-Bashforth 2: Euler's step plus step² / (2 step_last) times the change of slope
    added = (n.alpha * history * step**2 / (2 * step_last)) * (v - v_last)
    return [n.alpha * D + n.sigma * mean_e + added, v, D, e_u]


def _slope(e: Combination, e_u: Combination, s: Knot, n: Knot) -> Combination:
    """Return (x̄_n - x̄) / (σ̄_n - σ̄_s) of the CFG++ step x̄_n = D + σ̄_n ε̂_u.

    Here x̄ = D + σ̄_s ε̂.
    """
    return e + (n.sigma_ve / (n.sigma_ve - s.sigma_ve)) * (e_u - e)


def _both(
    trace: Trace, x: Combination, s: Knot
) -> tuple[Combination, Combination, Combination, Combination]:
    """Evaluate once; return the guided (D, ε̂) and the unconditional (U, ε̂_u)."""
    return *trace.evaluate(x, s), *trace.unconditional(x, s)
