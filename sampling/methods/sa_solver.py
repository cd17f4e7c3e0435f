"""SA-Solver: stochastic Adams predictor and corrector.

Source: Xue et al. 2309.05019, algorithm 1, eq. 14 and 17. In the noise prediction (appendix A),
with η = τ² and the polynomial through past ε̂,

    x_n = α_n/α_s x - (1 + η) α_n ∫ e^(-λ) ε̂(λ) dλ + τ σ_n sqrt(e^(2h) - 1) z.

This solves the same SDE, but its noise keeps the variance of x to first order only.
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
from .steps import first_order_update, sde_std


@register_method(
    "sa_solver_pece",
    order=2,
    evaluations=2,
    rewrites=(1,),
    source="2309.05019",
    stochastic=True,
    defaults={"predictor_order": 3, "corrector_order": 4, "pece": True},
    aliases={"SA-Solver PECE": {}},
)
@register_method(
    order=2,
    rewrites=(1,),
    source="2309.05019",
    stochastic=True,
    aliases={"SA-Solver": {}, "SASolverScheduler": {}},
)
def sa_solver(
    trace: Trace,
    knots: Sequence[Knot],
    i: int,
    x: Combination,
    *past: Combination,
    predictor_order: int = 2,
    corrector_order: int = 2,
    tau: float = 1.0,
    tau_timesteps: tuple[float, float] = (200.0, 800.0),
    lower_order_final: bool = True,
    predict_x0: bool = True,
    pece: bool = False,
) -> list[Combination]:
    """SA-Solver: stochastic Adams methods with noise of strength ``tau``.

    Memory: the x at the start of the last step, its noise (if it drew any), then the values of past
    steps.

    Args:
        tau: The strength of the noise inside ``tau_timesteps``; it is 0 outside.
        tau_timesteps: The range of the network's timesteps with noise.
        predict_x0: Interpolate the data prediction (recommended by the paper), or the noise
            prediction.
        pece: Evaluate the network again at the corrected x; this result replaces the first (PECE
            mode).
    """
    one_of("predictor_order", predictor_order, (1, 2, 3))
    one_of("corrector_order", corrector_order, (0, 1, 2, 3, 4))
    s, n, steps = knots[i], knots[i + 1], len(knots) - 1

    def strength(j: int) -> float:
        return tau**2 if tau_timesteps[0] <= knots[j].timestep <= tau_timesteps[1] else 0.0

    D, e = trace.evaluate(x, s)
    history = i if knots[0].alpha > 0 else max(i - 1, 0)
    values = [D if predict_x0 else e]
    advance = _by_data if predict_x0 else _by_noise
    if past:
        drew = sde_std(knots[i - 1], s, strength(i - 1)) > 0
        x_last, z_last, older = past[0], past[1] if drew else None, past[1 + drew :]
        values += valid_history(older, knots, i, 4)
        if corrector_order and knots[i - 1].alpha > 0:
            order = min(corrector_order, history + 1, steps - i + 2 if lower_order_final else 4)
            x = advance(x_last, values[:order], knots, i, knots[i - 1], s, strength(i - 1), z_last)
            if pece:
                D, e = trace.evaluate(x, s)
                values[0] = D if predict_x0 else e
    r = sde_std(s, n, strength(i))
    z = trace.noise(s, n) if r else None
    kept = values[: max(predictor_order, corrector_order) - 1]
    memory = [x, *([z] if z is not None else []), *kept] if n.sigma > 0 else []
    if n.sigma == 0 or s.alpha == 0:
        return [first_order_update(x, D, s, n, r, None if z is None else r * z), *memory]
    if z is not None and not predict_x0:
        trace.keeps_marginals = False
    order = min(predictor_order, history + 1, steps - i if lower_order_final else 4)
    return [advance(x, values[:order], knots, i, s, n, strength(i), z), *memory]


def _by_data(
    x: Combination, values: Sequence[Combination], knots: Sequence[Knot], i: int,
    s: Knot, n: Knot, eta: float, z: Combination | None,
) -> Combination:  # fmt: skip
    """Return x at n from x at s with data predictions at the knots i, i - 1, ...

    Eq. 14, or eq. 17 if n is knot i.
    """
    r = sde_std(s, n, eta)
    E = _mean(values, knots, i, s, n, eta, corrector=n is knots[i])
    return first_order_update(x, E, s, n, r, None if z is None else r * z)


def _by_noise(
    x: Combination, values: Sequence[Combination], knots: Sequence[Knot], i: int,
    s: Knot, n: Knot, eta: float, z: Combination | None,
) -> Combination:  # fmt: skip
    """Return x at n from x at s with noise predictions at the knots i, i - 1, ...

    See the docstring of this module.
    """
    nodes = [knots[i - j].half_log_snr for j in range(len(values))]
    weights = lagrange_integrals(nodes, s.half_log_snr, n.half_log_snr, rate=-1.0)
    y = (n.alpha / s.alpha) * x - weighted(values, [(1 + eta) * n.sigma * w for w in weights])
    if z is None:
        return y
    return (
        y
        + (math.sqrt(eta) * n.sigma * math.sqrt(math.expm1(2 * (n.half_log_snr - s.half_log_snr))))
        * z
    )


def _mean(
    values: Sequence[Combination],
    knots: Sequence[Knot],
    i: int,
    s: Knot,
    n: Knot,
    eta: float,
    corrector: bool,
) -> Combination:
    """Return the weighted mean of D from s to n (eq. 14, 17).

    D is interpolated through ``values`` at the knots i, i - 1, ...
    """
    if len(values) == 1:
        return values[0]
    H, h = 1 + eta, n.half_log_snr - s.half_log_snr
    nodes = [knots[i - j].half_log_snr for j in range(len(values))]
    weights = [H * w for w in lagrange_integrals(nodes, s.half_log_snr, n.half_log_snr, rate=H)]
    if len(values) == 2:
        # the authors' variant of order 2 differs by O(h³) and is better in few steps
        span = h if corrector else nodes[0] - nodes[1]
        shift = H * (h**2 / 2 - (H * h + math.expm1(-H * h)) / H**2) / span
        weights = [weights[0] + shift, weights[1] - shift]
    return weighted(values, [w / -math.expm1(-H * h) for w in weights])
