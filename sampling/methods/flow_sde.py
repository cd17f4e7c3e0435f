"""Stochastic samplers of flow models for reinforcement learning: Flow-GRPO and CPS.

Both add noise to Euler's step of the flow, so that a step has a density (``sampling/rollouts``). On
the flow path x = (1 - t) x_0 + t ε with velocity v = ε̂ - D. Every other path is the flow path
times α + σ, with t = σ / (α + σ), so they run on every schedule. The last step only removes noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...noising.utils.validation import require
from ..knots import Knot
from ..tracing import Combination, Trace
from .base import register_method
from .steps import first_order_update, fresh_noise


@register_method(order=1, source="2505.05470", stochastic=True, aliases={"Flow-GRPO": {}})
def flow_sde(
    trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *, noise_level: float = 0.7
) -> list[Combination]:
    """Flow-GRPO: Euler-Maruyama on the SDE with the marginals of the flow (2505.05470, eq. 9).

    x_n = x + [v + σ_t² / (2t) (x + (1 - t) v)] Δt + σ_t sqrt(|Δt|) z, σ_t = a sqrt(t / (1 - t)).
    In the first step 1 - t is that of the next t. The paper's code does so where t is 1; here it
    is so from every first t, since just below 1 the noise has no bound.
    ``noise_level`` is a; 0 is Euler's method. The steps keep the marginals to first order only: few
    steps leave too much noise.
    """
    require(noise_level >= 0, "noise_level", "be at least 0", noise_level, "the paper uses 0.7")
    s, n = knots[i], knots[i + 1]
    D, e = trace.evaluate(x, s)
    if not noise_level or n.sigma == 0:
        return [first_order_update(x, D, s, n)]
    trace.keeps_marginals = False
    t, t_next = (k.sigma / (k.alpha + k.sigma) for k in (s, n))
    clean = 1 - t if i else 1 - t_next
    r2 = noise_level**2 * t / clean * (t - t_next)  # σ_t² |Δt|
    # x + v Δt = (1 - t_n) D + t_n ε̂ and x + (1 - t) v = ε̂
    y = (1 - t_next) * D + (t_next - r2 / (2 * t)) * e + math.sqrt(r2) * trace.noise(s, n)
    return [(n.alpha + n.sigma) * y]


@register_method(order=0, source="2509.05952", stochastic=True, aliases={"Flow-CPS": {}})
def flow_cps(
    trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *, noise_level: float = 0.7
) -> list[Combination]:
    """CPS: a DDIM step that renews the share sin(noise_level π / 2) of the next noise level.

    Source: coefficients-preserving sampling, Wang & Yu 2509.05952. ``noise_level`` 0 is Euler's
    method, 1 renews all noise. The noise of a step does not shrink with the step: for few steps.
    """
    require(0 <= noise_level <= 1, "noise_level", "be between 0 and 1", noise_level)
    s, n = knots[i], knots[i + 1]
    r = n.sigma * math.sin(noise_level * math.pi / 2)
    return [first_order_update(x, trace.denoise(x, s), s, n, r, fresh_noise(trace, s, n, r))]
