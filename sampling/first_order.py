"""The first-order family: one formula, told apart by how much noise it renews.

From x_s = α_s D + σ_s ε̂ with the clean estimate D, and fresh noise z,

    x_n = α_n D + sqrt(σ_n² - r²) ε̂ + r z.

r = 0 is DDIM with η = 0, which is Euler's method on the probability flow ODE in σ/α, and on a flow path Euler in time.
r = η · (posterior spread) is DDIM with η; η = 1 is DDPM's ancestral sampling and k-diffusion's Euler a.
The form x_n = α_n D + ... is finite at α_s = 0, so every method takes this step from a zero-SNR knot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .knots import Knot
from .methods import Method
from .table import Combination, Trace


def transfer(
    x: Combination, D: Combination, s: Knot, n: Knot, r: float = 0.0, z: Combination | None = None
) -> Combination:
    """Return x_n = α_n D + sqrt(σ_n² - r²) ε̂ + r z with ε̂ = (x - α_s D) / σ_s."""
    keep = math.sqrt(max(n.sigma**2 - r**2, 0.0)) / s.sigma
    y = keep * x + (n.alpha - keep * s.alpha) * D
    return y if z is None else y + r * z


def posterior_spread(s: Knot, n: Knot) -> float:
    """Return the standard deviation of q(x_n | x_s, x_0): DDIM's σ at η = 1 (2010.02502, eq. 16), for any curve.

    On a variance preserving path σ_n² / σ_s² (1 - α_s² / α_n²); in σ/α it is k-diffusion's sigma_up.
    """
    ratio = (s.alpha * n.sigma) / (n.alpha * s.sigma)  # sqrt(SNR_s / SNR_n)
    return n.sigma * math.sqrt(max(1 - ratio**2, 0.0))


def first_order(trace: Trace, s: Knot, n: Knot, x: Combination, eta: float = 0.0) -> tuple[Combination, Combination]:
    """Return (x_n, D) of the step from s to n that renews η times the posterior spread."""
    D = trace.denoise(x, s)
    r = eta * posterior_spread(s, n)
    return transfer(x, D, s, n, r, trace.noise(s, n) if r else None), D


def check_eta(eta: float) -> float:
    """Return eta, or raise ValueError outside 0 ... 1, where the spread of x_n could not be kept."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 (deterministic) and 1 (ancestral), got {eta}")
    return eta


def ddim(trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *, eta: float = 0.0) -> list[Combination]:
    """DDIM (Song et al. 2010.02502, eq. 12 and 16)."""
    return [first_order(trace, knots[i], knots[i + 1], x, check_eta(eta))[0]]


def ddpm(trace: Trace, knots: Sequence[Knot], i: int, x: Combination) -> list[Combination]:
    """DDPM's ancestral sampling with the posterior variance (Ho et al. 2006.11239, eq. 6 and 7)."""
    return [first_order(trace, knots[i], knots[i + 1], x, 1.0)[0]]


def euler(trace: Trace, knots: Sequence[Knot], i: int, x: Combination) -> list[Combination]:
    """Euler's method on the probability flow ODE (Karras et al. 2206.00364, algorithm 1 without its correction)."""
    return [first_order(trace, knots[i], knots[i + 1], x)[0]]


def euler_ancestral(
    trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *, eta: float = 1.0
) -> list[Combination]:
    """Ancestral sampling with Euler steps (k-diffusion, sample_euler_ancestral)."""
    return [first_order(trace, knots[i], knots[i + 1], x, check_eta(eta))[0]]


METHODS = [
    Method(
        "ddim",
        ddim,
        order=1,
        source="2010.02502",
        called={"DDIM": {}, "DDIMScheduler": {}},
        diffusers={"_class_name": "DDIMScheduler"},
    ),
    Method(
        "ddpm",
        ddpm,
        order=1,
        source="2006.11239",
        stochastic=True,
        called={"DDPM": {}, "DDPMScheduler": {}},
        diffusers={"_class_name": "DDPMScheduler", "variance_type": "fixed_small"},
    ),
    Method(
        "euler",
        euler,
        order=1,
        source="2206.00364",
        called={"Euler": {}, "EulerDiscreteScheduler": {}},
        diffusers={"_class_name": "EulerDiscreteScheduler"},
    ),
    Method(
        "euler_ancestral",
        euler_ancestral,
        order=1,
        source="k-diffusion",
        stochastic=True,
        called={"Euler a": {}, "EulerAncestralDiscreteScheduler": {}},
        diffusers={"_class_name": "EulerAncestralDiscreteScheduler"},
    ),
]
