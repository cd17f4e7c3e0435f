"""Heun's method on the probability flow ODE in σ/α (Karras et al. 2206.00364, algorithm 1).

There dx̄/dσ̄ = ε̂, so with the slopes ε̂_s and ε̂_n at both ends x̄_n = x̄ + (σ̄_n - σ̄_s) (ε̂_s + ε̂_n) / 2.
"""

from __future__ import annotations

from collections.abc import Sequence

from .first_order import first_order
from .knots import Knot
from .methods import Method
from .table import Combination, Trace


def heun(trace: Trace, knots: Sequence[Knot], i: int, x: Combination) -> list[Combination]:
    """Heun's second-order steps, with Euler's for the last into σ = 0 and from α = 0."""
    s, n = knots[i], knots[i + 1]
    x_n, D = first_order(trace, s, n, x)
    if n.sigma == 0 or s.alpha == 0:
        return [x_n]
    D_n = trace.denoise(x_n, n)
    # the mean slope is the slope of the mean estimate, ε̂ = (x - α D) / σ, taken over both ends
    slope = 0.5 * ((x - s.alpha * D) / s.sigma + (x_n - n.alpha * D_n) / n.sigma)
    trace.denoised = D
    return [n.alpha * (x / s.alpha + (n.sigma_ve - s.sigma_ve) * slope)]


METHODS = [
    Method(
        "heun",
        heun,
        order=2,
        evaluations=2,
        source="2206.00364",
        called={"Heun": {}, "HeunDiscreteScheduler": {}},
        diffusers={"_class_name": "HeunDiscreteScheduler"},
    ),
]
