"""DPM-Solver with intermediate points between the knots, and DPM fast (Lu et al. 2206.00927).

DPM fast consists of these DPM-Solver steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..knots import Knot
from ..tracing import Combination, Trace
from .base import register_method
from .integrals import phi_2
from .steps import (
    along,
    check_eta,
    first_order_update,
    first_order_update_epsilon,
    fresh_noise,
    posterior_std,
)


def dpm_solver_2(
    trace: Trace,
    s: Knot,
    n: Knot,
    x: Combination,
    e: Combination,
    r1: float = 0.5,
    D: Combination | None = None,
) -> tuple[Combination, Combination]:
    """Return x_n by DPM-Solver-2, and ε̂ at the intermediate point (2206.00927, algorithm 4).

    The step uses ε̂ at s and at the fraction r_1 of the step.
    """
    m = _on_the_way(trace, s, n, r1)
    _, e1 = trace.evaluate(_step(x, D, e, e, s, m), m)
    return _step(x, D, e, e + (e1 - e) / (2 * r1), s, n), e1


def dpm_solver_3(
    trace: Trace,
    s: Knot,
    n: Knot,
    x: Combination,
    e: Combination,
    e1: Combination,
    r1: float = 1 / 3,
    r2: float = 2 / 3,
    D: Combination | None = None,
) -> Combination:
    """Return x_n by DPM-Solver-3 (2206.00927, algorithm 5).

    The step uses ε̂ at s and at the fractions r_1 (``e1``) and r_2 of the step.
    """
    h = n.half_log_snr - s.half_log_snr
    m = _on_the_way(trace, s, n, r2)
    u2 = _step(x, D, e, e + (r2 / r1) * _slope_weight(r2 * h) * (e1 - e), s, m)
    _, e2 = trace.evaluate(u2, m)
    return _step(x, D, e, e + _slope_weight(h) / r2 * (e2 - e), s, n)


def _step(
    x: Combination, D: Combination | None, e: Combination, mean_e: Combination, s: Knot, n: Knot
) -> Combination:
    """Return the step along ``mean_e``.

    With D from the same evaluation as ε̂ the step loses fewer digits near α = 0.
    """
    return (
        first_order_update_epsilon(x, mean_e, s, n) if D is None else along(x, D, e, mean_e, s, n)
    )


def _on_the_way(trace: Trace, s: Knot, n: Knot, r: float) -> Knot:
    return trace.knot(s.half_log_snr + r * (n.half_log_snr - s.half_log_snr))


def _slope_weight(h: float) -> float:
    """Return ((e^h - 1) / h - 1) / (e^h - 1), without cancellation.

    This is the mean of u / h under the weight e^(h - u).
    """
    return 1 - phi_2(h) / -math.expm1(-h)


def fast_orders(nfe: int) -> list[int]:
    """Return the orders of the steps that use ``nfe`` evaluations: threes and the rest.

    Source: 2206.00927, §3.4.

    >>> fast_orders(9), fast_orders(10), fast_orders(11)
    ([3, 3, 2, 1], [3, 3, 3, 1], [3, 3, 3, 2])
    """
    threes = nfe // 3
    return [3] * (threes - 1) + [2, 1] if nfe % 3 == 0 else [3] * threes + [nfe % 3]


def block_orders(nfe: int, from_noise: bool = False, to_clean: bool = False) -> list[int]:
    """Return the orders of the steps that use ``nfe`` evaluations; their sum is ``nfe``.

    ``from_noise``: the first knot has no signal, and its step uses one evaluation. ``to_clean``:
    the last step goes to D, where σ = 0, and uses one evaluation too. The other steps are as in
    :func:`fast_orders`. But with ``to_clean``, a multiple of 3 is split into threes only, without
    [2, 1] at the end.

    >>> (
    ...     block_orders(20),
    ...     block_orders(20, to_clean=True),
    ...     block_orders(20, from_noise=True, to_clean=True),
    ... )
    ([3, 3, 3, 3, 3, 3, 2], [3, 3, 3, 3, 3, 3, 1, 1], [1, 3, 3, 3, 3, 3, 3, 1])
    """
    between = nfe - from_noise - to_clean
    if between <= 0:
        return [1] * nfe
    threes, rest = divmod(between, 3)
    middle = [3] * threes + ([rest] if rest else []) if to_clean else fast_orders(between)
    return [1] * from_noise + middle + [1] * to_clean


@register_method(
    order=3,
    evaluations=3,
    source="2206.00927",
    grid="dpm_fast",
    steps_option="nfe",
    blocks=block_orders,
    aliases={"DPM fast": {}},
)
def dpm_fast(
    trace: Trace,
    knots: Sequence[Knot],
    i: int,
    x: Combination,
    *,
    nfe: int | None = None,
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> list[Combination]:
    """DPM fast: DPM-Solver-3 steps with a step of order 2 or 1 at the end.

    Source: 2206.00927, §3.4; k-diffusion's sample_dpm_fast. ``nfe`` is the number of evaluations;
    the sampler's ``steps`` is this number. On a grid of ``nfe`` steps, each step of the method
    covers as many grid steps as it has evaluations, and its intermediate points are at thirds of
    its λ. On the grid ``dpm_fast``, as in k-diffusion, the steps are even in λ. Without ``nfe``
    every step has order 3, except those from α = 0 and into σ = 0.
    """
    s, n, steps = knots[i], knots[i + 1], len(knots) - 1
    ends = knots[0].alpha == 0, knots[-1].sigma == 0
    orders = [3] * steps if nfe is None else block_orders(nfe, *ends)
    if len(orders) != steps:
        raise ValueError(
            f"{nfe} evaluations make {len(orders)} steps between these ends, got a grid of {steps}"
        )
    r = check_eta(eta) * posterior_std(s, n)
    # an ancestral step goes below the knot, but not below the end of the grid
    end = knots[-1]
    low = max(math.sqrt(max(n.sigma**2 - r**2, 0.0)), n.alpha * end.sigma_ve)
    d = Knot(math.nan, n.alpha, low) if r else n
    D, e = trace.evaluate(x, s)
    noise = (
        fresh_noise(trace, s, n, math.sqrt(max(n.sigma**2 - d.sigma**2, 0.0)), s_noise)
        if r
        else None
    )
    order = orders[i]
    if order == 1 or s.alpha == 0 or d.sigma == 0:
        y = first_order_update(x, D, s, d)
    elif order == 2:
        y, _ = dpm_solver_2(trace, s, d, x, e, D=D)
    else:
        _, e1 = dpm_solver_2(trace, s, d, x, e, r1=1 / 3, D=D)
        y = dpm_solver_3(trace, s, d, x, e, e1, D=D)
    return [y if noise is None else y + noise]
