"""DPM-Solver++ in data prediction (Lu et al. 2211.01095), with λ = log(α / σ) and steps h = λ_n - λ_s."""

from __future__ import annotations

from collections.abc import Sequence

from .first_order import transfer
from .knots import Knot
from .methods import Method
from .table import Combination, Trace


def dpmpp_2m(trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *past: Combination) -> list[Combination]:
    """DPM-Solver++(2M) (2211.01095, algorithm 2): first order at the start and into σ = 0."""
    s, n = knots[i], knots[i + 1]
    D = E = trace.denoise(x, s)
    if past and n.sigma > 0 and knots[i - 1].alpha > 0:
        h, h_last = n.half_log_snr - s.half_log_snr, s.half_log_snr - knots[i - 1].half_log_snr
        E = D + (h / (2 * h_last)) * (D - past[0])
    return [transfer(x, E, s, n)] if n.sigma == 0 else [transfer(x, E, s, n), D]


METHODS = [
    Method(
        "dpmpp_2m",
        dpmpp_2m,
        order=2,
        source="2211.01095",
        called={"DPM++ 2M": {}, "DPMSolverMultistepScheduler": {}},
        diffusers={"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", "solver_order": 2},
    ),
]
