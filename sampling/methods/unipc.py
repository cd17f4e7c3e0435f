"""UniPC: a predictor and a corrector that share one formula.

Source: Zhao et al. 2302.04867, algorithms 5 to 8, B(h) version.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...noising.utils.validation import one_of
from ..knots import Knot
from ..tracing import Combination, Trace
from .base import register_method
from .dpm_solver import valid_history
from .steps import first_order_update, first_order_update_epsilon


@register_method(
    "unipc_3",
    order=2,
    reaches=(4, {"lower_order_final": False}),
    rewrites=(1,),
    source="2302.04867",
    defaults={"order": 3},
)
@register_method(
    order=2,
    reaches=(3, {"lower_order_final": False}),
    rewrites=(1,),
    source="2302.04867",
    aliases={"UniPC": {}, "UniPCMultistepScheduler": {}},
)
def unipc(
    trace: Trace,
    knots: Sequence[Knot],
    i: int,
    x: Combination,
    *past: Combination,
    order: int = 2,
    solver_type: str = "bh2",
    predict_x0: bool = True,
    lower_order_final: bool = True,
    disable_corrector: Sequence[int] = (),
) -> list[Combination]:
    """UniPC-p: correct the last step with this step's evaluation, then predict the next.

    Memory: the x at the start of the last step, then the values of past steps.
    """
    one_of("order", order, (1, 2, 3))
    one_of("solver_type", solver_type, ("bh1", "bh2"))
    s, n, steps = knots[i], knots[i + 1], len(knots) - 1
    D, e = trace.evaluate(x, s)
    value = D if predict_x0 else e

    # the order of the predictor at step j; the corrector of a step has the same order
    def used(j: int) -> int:
        history = j if knots[0].alpha > 0 else max(j - 1, 0)
        return min(order, steps - j, history + 1) if lower_order_final else min(order, history + 1)

    if past and i - 1 not in disable_corrector and knots[i - 1].alpha > 0:
        x = _advance(
            past[0],
            knots,
            i - 1,
            past[1 : 1 + used(i - 1)],
            s,
            solver_type,
            predict_x0,
            corrected=value,
        )
    values = [value, *valid_history(past[1:], knots, i, order)]
    alone = n.sigma == 0 or s.alpha == 0
    x_n = (
        first_order_update(x, D, s, n)
        if alone
        else _advance(x, knots, i, values[: used(i)], n, solver_type, predict_x0)
    )
    return [x_n, x, *values[:order]] if n.sigma > 0 else [x_n]


def _advance(
    x: Combination,
    knots: Sequence[Knot],
    i: int,
    values: Sequence[Combination],
    n: Knot,
    solver_type: str,
    predict_x0: bool,
    corrected: Combination | None = None,
) -> Combination:
    """Return x at n from x at knot i: UniP (eq. 3), or UniC (eq. 4) if ``corrected`` is given.

    ``corrected`` is the value at n.
    """
    s, p = knots[i], len(values)
    h = n.half_log_snr - s.half_log_snr
    hh = -h if predict_x0 else h
    B = hh if solver_type == "bh1" else math.expm1(hh)
    ratios = [(knots[i - j].half_log_snr - s.half_log_snr) / h for j in range(1, p)]
    residuals = [(values[j] - values[0]) / ratios[j - 1] for j in range(1, p)]
    if corrected is not None:
        ratios, residuals = [*ratios, 1.0], [*residuals, corrected - values[0]]
    total = (
        first_order_update(x, values[0], s, n)
        if predict_x0
        else first_order_update_epsilon(x, values[0], s, n)
    )
    scale = (n.alpha if predict_x0 else n.sigma) * B
    for rho, residual in zip(_rhos(ratios, hh, B), residuals, strict=True):
        total = total - (scale * rho) * residual
    return total


def _rhos(ratios: Sequence[float], hh: float, B: float) -> list[float]:
    """Return ρ of R ρ = b (eq. 5); a single ratio gets 1/2, which keeps the order (§3.3)."""
    if len(ratios) <= 1:
        return [0.5] * len(ratios)
    b, factorial = [], 1.0
    h_phi = math.expm1(hh) / hh - 1
    for k in range(1, len(ratios) + 1):
        b.append(h_phi * factorial / B)
        factorial *= k + 1
        h_phi = h_phi / hh - 1 / factorial
    return _solved(ratios, b)


def _solved(r: Sequence[float], b: list[float]) -> list[float]:
    """Return ρ with Σ_j r_j^k ρ_j = b_k, k = 0, 1, ... (Björck & Pereyra 1970)."""
    last = len(r) - 1
    for k in range(last):
        for j in range(last, k, -1):
            b[j] -= r[k] * b[j - 1]
    for k in range(last - 1, -1, -1):
        for j in range(k + 1, last + 1):
            b[j] /= r[j] - r[j - k - 1]
        for j in range(k, last):
            b[j] -= b[j + 1]
    return b
