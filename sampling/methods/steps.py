"""The first-order family: one formula with different amounts of fresh noise.

From x_s = α_s D + σ_s ε̂ with the clean estimate D, and fresh noise z,

    x_n = α_n D + sqrt(σ_n² - r²) ε̂ + r z.

r = 0 is DDIM with η = 0. This is Euler's method on the probability flow ODE in σ/α, and on a flow
path Euler in time. r = η · (standard deviation of the posterior) is DDIM with η; η = 1 is DDPM's
ancestral sampling and k-diffusion's Euler a. The form x_n = α_n D + ... is finite at α_s = 0, so
every method takes this step from a zero-SNR knot.
"""

from __future__ import annotations

import math

from ...noising.utils.validation import require
from ..knots import Knot
from ..tracing import Combination, Trace, weighted


def first_order_update(
    x: Combination,
    D: Combination,
    s: Knot,
    n: Knot,
    r: float = 0.0,
    noise: Combination | None = None,
) -> Combination:
    """Return x_n = α_n D + sqrt(σ_n² - r²) ε̂ + noise with ε̂ = (x - α_s D) / σ_s.

    ``noise`` has standard deviation r.
    """
    keep = math.sqrt(max(n.sigma**2 - r**2, 0.0)) / s.sigma
    y = weighted((x, D), (keep, n.alpha - keep * s.alpha))
    return y if noise is None else y + noise


def first_order_update_epsilon(x: Combination, e: Combination, s: Knot, n: Knot) -> Combination:
    """Return x_n = α_n (x - σ_s ε̂) / α_s + σ_n ε̂: the same step for a given ε̂; needs α_s > 0."""
    ratio = n.alpha / s.alpha
    return weighted((x, e), (ratio, n.sigma - ratio * s.sigma))


def along(
    x: Combination, D: Combination, e: Combination, mean_e: Combination, s: Knot, n: Knot
) -> Combination:
    """Return the step along ``mean_e`` instead of ε̂, from both estimates (D, ε̂) at x.

    x_n = α_n (x - σ_s ē) / α_s + σ_n ē. It is computed as the first-order step plus the effect of
    the other slope, because near α = 0 the terms of the plain form are huge.
    """
    other = n.sigma - n.alpha * s.sigma_ve
    return weighted((first_order_update(x, D, s, n), mean_e - e), (1.0, other))


def toward(
    D: Combination, e: Combination, n: Knot, r: float = 0.0, noise: Combination | None = None
) -> Combination:
    """Return x_n = α_n D + sqrt(σ_n² - r²) ε̂ + noise from both estimates.

    The estimates need not combine to x. ``noise`` has standard deviation r.
    """
    y = weighted((D, e), (n.alpha, math.sqrt(max(n.sigma**2 - r**2, 0.0))))
    return y if noise is None else y + noise


def posterior_std(s: Knot, n: Knot) -> float:
    """Return the standard deviation of q(x_n | x_s, x_0), for any curve.

    This is DDIM's σ at η = 1 (2010.02502, eq. 16). On a variance preserving path its square is σ_n²
    / σ_s² (1 - α_s² / α_n²); in σ/α it is k-diffusion's sigma_up.
    """
    ratio = (s.alpha * n.sigma) / (n.alpha * s.sigma)  # sqrt(SNR_s / SNR_n)
    return n.sigma * math.sqrt(max(1 - ratio**2, 0.0))


def sde_std(s: Knot, n: Knot, eta: float) -> float:
    """Return σ_n sqrt(1 - e^(-2ηh)), h = λ_n - λ_s: the noise of the reverse SDE of strength η.

    The noise is added from s to n. η = 1 is the posterior's standard deviation (2211.01095, eq. 18;
    2309.05019, eq. 10 with η = τ²).
    """
    if not eta or n.sigma == 0:
        return 0.0
    if s.alpha == 0:
        return n.sigma
    return n.sigma * math.sqrt(-math.expm1(-2 * eta * (n.half_log_snr - s.half_log_snr)))


def first_order(
    trace: Trace, s: Knot, n: Knot, x: Combination, eta: float = 0.0, s_noise: float = 1.0
) -> tuple[Combination, Combination]:
    """Return (x_n, D) of the step from s to n; r is η times the posterior's standard deviation."""
    D = trace.denoise(x, s)
    r = eta * posterior_std(s, n)
    return first_order_update(x, D, s, n, r, fresh_noise(trace, s, n, r, s_noise)), D


def fresh_noise(
    trace: Trace, s: Knot, n: Knot, r: float, s_noise: float = 1.0
) -> Combination | None:
    """Return fresh noise of standard deviation r for the step from s to n, times ``s_noise``.

    If r is 0, nothing is drawn.
    """
    if not r * s_noise:
        return None
    if s_noise != 1:
        trace.keeps_marginals = False
    return (s_noise * r) * trace.noise(s, n)


def check_eta(eta: float) -> float:
    """Return eta; raise ValueError outside 0 ... 1, where x_n would have another variance."""
    require(0 <= eta <= 1, "eta", "be between 0 (deterministic) and 1 (ancestral)", eta)
    return eta
