"""Exponential integrators in the data prediction: RES, ER-SDE, SEEDS.

All of them estimate E, the weighted mean of D in the exact solution of dpm_solver.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ...noising.utils.validation import one_of
from ..knots import Knot
from ..tracing import Combination, Trace, weighted
from .base import register_method
from .dpm_solver import valid_history
from .integrals import lagrange_integrals, phi_2
from .steps import first_order_update, fresh_noise, sde_std


@register_method(
    "exponential_adams_4", order=4, source="2308.02157", defaults={"order": 4, "extrapolate": True}
)
@register_method(
    "exponential_adams", order=3, source="2308.02157", defaults={"order": 3, "extrapolate": True}
)
@register_method("res_multistep_3", order=3, source="2308.02157", defaults={"order": 3})
@register_method(order=2, source="2308.02157", aliases={"RES Multistep": {}})
def res_multistep(
    trace: Trace,
    knots: Sequence[Knot],
    i: int,
    x: Combination,
    *past: Combination,
    order: int = 2,
    eta: float = 0.0,
    extrapolate: bool = False,
) -> list[Combination]:
    """RES: D is a polynomial in λ through past values, integrated exactly.

    Source: Zhang et al. 2308.02157, eq. 8, multistep. The last step into σ = 0 goes to D, as in
    every sampler. With ``extrapolate`` it goes to the limit of D for σ to 0, from a polynomial in
    (σ/α)² through the past values. The remaining error then has the method's own order.
    """
    one_of("order", order, (1, 2, 3, 4))
    s, n = knots[i], knots[i + 1]
    D = E = trace.denoise(x, s)
    r = sde_std(s, n, eta)
    m = [D, *valid_history(past, knots, i, order)]
    if n.sigma == 0 and extrapolate:
        return [
            n.alpha
            * weighted(m, _lagrange_at_zero([knots[i - j].sigma_ve ** 2 for j in range(len(m))]))
        ]
    if n.sigma > 0 and s.alpha > 0 and len(m) > 1:
        nodes = [knots[i - j].half_log_snr for j in range(len(m))]
        H = 1 + eta
        weights = [H * w for w in lagrange_integrals(nodes, nodes[0], n.half_log_snr, rate=H)]
        E = weighted(m, [w / -math.expm1(-H * (n.half_log_snr - nodes[0])) for w in weights])
    memory = [D, *past[: order - 2]] if order > 1 else []
    return [first_order_update(x, E, s, n, r, fresh_noise(trace, s, n, r)), *memory]


def _lagrange_at_zero(nodes: Sequence[float]) -> list[float]:
    """Return the values at 0 of the Lagrange polynomials over ``nodes``."""
    return [
        math.prod(y / (y - z) for k, y in enumerate(nodes) if k != j) for j, z in enumerate(nodes)
    ]


@register_method(order=2, source="2309.06169", stochastic=True, aliases={"ER SDE": {}})
def er_sde(
    trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *past: Combination, order: int = 3
) -> list[Combination]:
    """ER-SDE-Solver-3 with the noise scale φ(σ̄) = σ̄ (e^(σ̄^0.3) + 10), σ̄ = σ/α.

    Source: Cui et al. 2309.06169, algorithm 3. Memory: the last D, then its last divided
    difference.
    """
    one_of("order", order, (1, 2, 3))
    s, n = knots[i], knots[i + 1]
    D = trace.denoise(x, s)
    if n.sigma == 0:
        return [first_order_update(x, D, s, n)]
    if s.alpha == 0:
        return [first_order_update(x, D, s, n, n.sigma, n.sigma * trace.noise(s, n)), D]
    a, b = s.sigma_ve, n.sigma_ve
    ratio = _scale(b) / _scale(a)
    keep = (n.alpha / s.alpha) * ratio
    x_n = keep * x + n.alpha * (1 - ratio) * D
    memory = [D]
    values = valid_history(past[:1], knots, i, 2)
    if values and order > 1:
        step = b - a
        slope = (D - values[0]) / (a - knots[i - 1].sigma_ve)
        area, moment = _integrals(b, a)
        x_n = x_n + n.alpha * (step + _scale(b) * area) * slope
        memory.append(slope)
        if len(past) > 1 and order > 2 and knots[i - 2].alpha > 0:
            curvature = (slope - past[1]) / ((a - knots[i - 2].sigma_ve) / 2)
            x_n = x_n + n.alpha * (step**2 / 2 + _scale(b) * moment) * curvature
    spread = n.alpha * math.sqrt(max(b**2 - (a * ratio) ** 2, 0.0))
    return [x_n + spread * trace.noise(s, n), *memory]


def _scale(y: float) -> float:
    return y * (math.exp(y**0.3) + 10)


_PANELS = np.arange(200) + 0.5


def _integrals(b: float, a: float) -> tuple[float, float]:
    """Return ∫_b^a dy / φ(y) and ∫_b^a (y - a) dy / φ(y).

    By the midpoint rule in log y, where the integrand is smooth.
    """
    low, width = math.log(b), (math.log(a) - math.log(b)) / len(_PANELS)
    y = np.exp(low + _PANELS * width)
    weights = width / (np.exp(y**0.3) + 10)  # dy / φ(y) = y d log y / φ(y)
    return float(weights.sum()), float(weights @ (y - a))


@register_method(
    order=2, evaluations=2, source="2305.14267", stochastic=True, aliases={"SEEDS-2": {}}
)
def seeds_2(
    trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *, eta: float = 1.0, r: float = 0.5
) -> list[Combination]:
    """SEEDS-2: two stages with independent noise on each interval.

    Source: Gonzalez et al. 2305.14267, algorithm 2.
    """
    s, n = knots[i], knots[i + 1]
    D = trace.denoise(x, s)
    if n.sigma == 0 or s.alpha == 0:
        spread = sde_std(s, n, eta)
        return [first_order_update(x, D, s, n, spread, fresh_noise(trace, s, n, spread))]
    path = _Path(trace, s, eta)
    m = path.extend(r, n)
    D_m = trace.denoise(first_order_update(x, D, s, m, *path.noise_at(m)), m)
    path.end(n)
    return [first_order_update(x, D + (D_m - D) / (2 * r), s, n, *path.noise_at(n))]


@register_method(
    order=2, evaluations=3, source="2305.14267", stochastic=True, aliases={"SEEDS-3": {}}
)
def seeds_3(
    trace: Trace,
    knots: Sequence[Knot],
    i: int,
    x: Combination,
    *,
    eta: float = 1.0,
    r_1: float = 1 / 3,
    r_2: float = 2 / 3,
) -> list[Combination]:
    """SEEDS-3: three stages with independent noise on each interval.

    Source: Gonzalez et al. 2305.14267, algorithm 3.
    """
    s, n = knots[i], knots[i + 1]
    D = trace.denoise(x, s)
    if n.sigma == 0 or s.alpha == 0:
        spread = sde_std(s, n, eta)
        return [first_order_update(x, D, s, n, spread, fresh_noise(trace, s, n, spread))]
    H = (1 + eta) * (n.half_log_snr - s.half_log_snr)
    path = _Path(trace, s, eta)
    m1 = path.extend(r_1, n)
    D1 = trace.denoise(first_order_update(x, D, s, m1, *path.noise_at(m1)), m1)
    m2 = path.extend(r_2, n)
    E2 = D + (r_2 / r_1 * phi_2(r_2 * H) / -math.expm1(-r_2 * H)) * (D1 - D)
    D2 = trace.denoise(first_order_update(x, E2, s, m2, *path.noise_at(m2)), m2)
    path.end(n)
    return [
        first_order_update(
            x, D + (phi_2(H) / -math.expm1(-H) / r_2) * (D2 - D), s, n, *path.noise_at(n)
        )
    ]


class _Path:
    """The accumulated noise of the SDE from s on, with independent draws for its intervals."""

    def __init__(self, trace: Trace, s: Knot, eta: float) -> None:
        self.trace, self.s, self.eta, self.last = trace, s, eta, s
        self.gathered: Combination | None = None  # divided by σ at ``last``

    def extend(self, ratio: float, n: Knot) -> Knot:
        m = self.trace.knot(self.s.half_log_snr + ratio * (n.half_log_snr - self.s.half_log_snr))
        self.end(m)
        return m

    def end(self, m: Knot) -> None:
        stretch = self.eta * (m.half_log_snr - self.last.half_log_snr)
        if stretch:
            fresh = math.sqrt(-math.expm1(-2 * stretch)) * self.trace.noise(self.last, m)
            self.gathered = (
                fresh if self.gathered is None else math.exp(-stretch) * self.gathered + fresh
            )
        self.last = m

    def noise_at(self, m: Knot) -> tuple[float, Combination | None]:
        return sde_std(
            self.s, m, self.eta
        ), None if self.gathered is None else m.sigma * self.gathered
