"""Few-step samplers of distilled models: consistency models, LCM, TCD.

All of them go to x_0 and then back to a lower noise level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..knots import Knot
from ..tracing import Combination, Trace
from .base import register_method
from .steps import check_eta


@register_method(
    order=0,
    source="2303.01469",
    stochastic=True,
    aliases={"Consistency": {}, "CMStochasticIterativeScheduler": {}},
)
def consistency(
    trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *, s_noise: float = 1.0
) -> list[Combination]:
    """Multistep consistency sampling: x_n = D + sqrt(σ_n² - σ_min²) z.

    Source: Song et al. 2303.01469, algorithm 1.
    """
    s, n = knots[i], knots[i + 1]
    D = trace.denoise(x, s)
    trace.keeps_marginals = False
    lowest = knots[-1].sigma if knots[-1].sigma > 0 else knots[-2].sigma
    r = math.sqrt(max(n.sigma**2 - (n.alpha * lowest) ** 2, 0.0))
    return [n.alpha * D + (s_noise * r) * trace.noise(s, n) if r else n.alpha * D]


@register_method(
    order=0,
    source="2310.04378",
    stochastic=True,
    grid="lcm",
    aliases={"LCM": {}, "LCMScheduler": {}},
)
def lcm(
    trace: Trace,
    knots: Sequence[Knot],
    i: int,
    x: Combination,
    *,
    timestep_scaling: float = 10.0,
    sigma_data: float = 0.5,
) -> list[Combination]:
    """LCM: x_n = α_n f + σ_n z with f = c_skip x + c_out D.

    Source: Luo et al. 2310.04378, eq. 9 and algorithm 3.
    """
    s, n = knots[i], knots[i + 1]
    D = trace.denoise(x, s)
    trace.keeps_marginals = False  # c_skip x keeps a small part of the noise
    scaled = s.timestep * timestep_scaling
    c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    c_out = scaled / math.sqrt(scaled**2 + sigma_data**2)
    f = c_out * D + c_skip * x
    trace.denoised = f
    return [n.alpha * f + n.sigma * trace.noise(s, n) if n.sigma else n.alpha * f]


@register_method(
    order=0,
    source="2402.19159",
    stochastic=True,
    grid="lcm",
    aliases={"TCD": {}, "TCDScheduler": {}},
)
def tcd(
    trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *, eta: float = 0.3
) -> list[Combination]:
    """TCD: down to time (1 - γ) t_n by the network, then up to t_n by noise; γ is ``eta``.

    Source: Zheng et al. 2402.19159, algorithm 4.
    """
    s, n = knots[i], knots[i + 1]
    check_eta(eta)
    D, e = trace.evaluate(x, s)
    t_min = trace.schedule.curve.t_min
    if n.sigma == 0:  # the authors' last step goes to the first timestep
        low = trace.knot_at_time(t_min)
        trace.keeps_marginals = False
        return [low.alpha * D + low.sigma * e]
    t = t_min + (1 - eta) * (trace.time(n) - t_min)
    low = trace.knot_at_time(math.floor(t) if trace.schedule.curve.is_discrete else t) if eta else n
    y = low.alpha * D + low.sigma * e
    if not eta:
        return [y]
    up = n.alpha / low.alpha
    return [up * y + math.sqrt(max(n.sigma**2 - (up * low.sigma) ** 2, 0.0)) * trace.noise(low, n)]
