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

from ...noising import Prediction
from ..knots import Knot
from ..table import Combination, Trace
from .base import Method, one_of


def transfer(
    x: Combination, D: Combination, s: Knot, n: Knot, r: float = 0.0, noise: Combination | None = None
) -> Combination:
    """Return x_n = α_n D + sqrt(σ_n² - r²) ε̂ + noise with ε̂ = (x - α_s D) / σ_s; ``noise`` is of spread r."""
    keep = math.sqrt(max(n.sigma**2 - r**2, 0.0)) / s.sigma
    y = keep * x + (n.alpha - keep * s.alpha) * D
    return y if noise is None else y + noise


def transfer_epsilon(x: Combination, e: Combination, s: Knot, n: Knot) -> Combination:
    """Return x_n = α_n (x - σ_s ε̂) / α_s + σ_n ε̂: the same step for a given ε̂; needs α_s > 0."""
    ratio = n.alpha / s.alpha
    return ratio * x + (n.sigma - ratio * s.sigma) * e


def along(x: Combination, D: Combination, e: Combination, mean_e: Combination, s: Knot, n: Knot) -> Combination:
    """Return the step along ``mean_e`` instead of ε̂, x_n = α_n (x - σ_s ē) / α_s + σ_n ē, from both estimates (D, ε̂) at x.

    Written as the first-order step and what the other slope adds, since near α = 0 the terms of the plain form are huge.
    """
    return transfer(x, D, s, n) + (n.sigma - n.alpha * s.sigma_ve) * (mean_e - e)


def toward(D: Combination, e: Combination, n: Knot, r: float = 0.0, noise: Combination | None = None) -> Combination:
    """Return x_n = α_n D + sqrt(σ_n² - r²) ε̂ + noise from both estimates, whether or not they make up x; ``noise`` is of spread r."""
    y = n.alpha * D + math.sqrt(max(n.sigma**2 - r**2, 0.0)) * e
    return y if noise is None else y + noise


def posterior_spread(s: Knot, n: Knot) -> float:
    """Return the standard deviation of q(x_n | x_s, x_0): DDIM's σ at η = 1 (2010.02502, eq. 16), for any curve.

    On a variance preserving path σ_n² / σ_s² (1 - α_s² / α_n²); in σ/α it is k-diffusion's sigma_up.
    """
    ratio = (s.alpha * n.sigma) / (n.alpha * s.sigma)  # sqrt(SNR_s / SNR_n)
    return n.sigma * math.sqrt(max(1 - ratio**2, 0.0))


def sde_spread(s: Knot, n: Knot, eta: float) -> float:
    """Return σ_n sqrt(1 - e^(-2ηh)), the noise that the reverse SDE of strength η adds from s to n, h = λ_n - λ_s.

    η = 1 is the posterior's spread (2211.01095, eq. 18; 2309.05019, eq. 10 with η = τ²).
    """
    if not eta or n.sigma == 0:
        return 0.0
    if s.alpha == 0:
        return n.sigma
    return n.sigma * math.sqrt(-math.expm1(-2 * eta * (n.half_log_snr - s.half_log_snr)))


def first_order(
    trace: Trace, s: Knot, n: Knot, x: Combination, eta: float = 0.0, s_noise: float = 1.0
) -> tuple[Combination, Combination]:
    """Return (x_n, D) of the step from s to n that renews η times the posterior spread."""
    D = trace.denoise(x, s)
    r = eta * posterior_spread(s, n)
    return transfer(x, D, s, n, r, renewed(trace, s, n, r, s_noise)), D


def renewed(trace: Trace, s: Knot, n: Knot, r: float, s_noise: float = 1.0) -> Combination | None:
    """Return fresh noise of spread r for the way from s to n, times ``s_noise``; nothing is drawn where r is 0."""
    if not r * s_noise:
        return None
    if s_noise != 1:
        trace.keeps_marginals = False
    return (s_noise * r) * trace.noise(s, n)


def check_eta(eta: float) -> float:
    """Return eta, or raise ValueError outside 0 ... 1, where the spread of x_n could not be kept."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 (deterministic) and 1 (ancestral), got {eta}")
    return eta


def ddim(
    trace: Trace,
    knots: Sequence[Knot],
    i: int,
    x: Combination,
    *,
    eta: float = 0.0,
    use_clipped_model_output: bool = True,
) -> list[Combination]:
    """DDIM: down to the next knot along the network's own ε̂, renewing η of the posterior spread (2010.02502, eq. 12, 16).

    ``use_clipped_model_output``: where x_0 is clipped, take the ε̂ that x and the clipped x_0 imply (True), or go on along the
    network's own (False, as diffusers' DDIMScheduler.step does unless told otherwise).
    """
    s, n = knots[i], knots[i + 1]
    if use_clipped_model_output:
        return [first_order(trace, s, n, x, check_eta(eta))[0]]
    D = trace.denoise(x, s)
    _, e = trace.unclipped(x, s)
    r = check_eta(eta) * posterior_spread(s, n)
    return [toward(D, e, n, r, renewed(trace, s, n, r))]


def ddim_inverse(
    trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *, use_clipped_model_output: bool = True
) -> list[Combination]:
    """DDIM run upwards, from an image to the noise that gives it: ε̂ at x, asked for at the time of the next knot (2010.02502, §4.3).

    ``use_clipped_model_output`` as in ``ddim``; DDIMInverseScheduler of diffusers has False.
    """
    s, n = knots[i], knots[i + 1]
    prediction = trace.schedule.prediction
    if s.sigma == 0 and not _tells_noise(prediction, s):
        raise ValueError(
            f"{prediction.name} predictions do not say the noise of an image that has none; start at the least noise, final='sigma_min'"
        )
    trace.keeps_marginals = False  # it starts from a clean sample, whose noise no network can know
    at = Knot(n.timestep, s.alpha, s.sigma, s.input_scale)
    D, e = trace.evaluate(x, at)
    if not use_clipped_model_output:
        _, e = trace.unclipped(x, at)
    return [toward(D, e, n)]


def _tells_noise(prediction: Prediction, s: Knot) -> bool:
    try:
        return bool(prediction.coefficients(s.alpha, s.sigma)[1] != 0)
    except ZeroDivisionError:  # a score, -ε / σ
        return False


VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")


def ddpm(
    trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *, variance_type: str = "fixed_small"
) -> list[Combination]:
    """DDPM: the posterior mean, and noise of the posterior's variance or of β (Ho et al. 2006.11239, eq. 6, 7 and §3.2).

    ``fixed_small`` is the posterior's, ``fixed_large`` β = 1 - α_s²/α_n² of the step; the log forms are the same numbers, as
    improved DDPM parametrises them. Learned variances: ``sampling.learned_variance``.
    """
    one_of("variance_type", variance_type, VARIANCES)
    s, n = knots[i], knots[i + 1]
    D = trace.denoise(x, s)
    r = posterior_spread(s, n)
    if n.sigma == 0 or variance_type.startswith("fixed_small"):
        return [transfer(x, D, s, n, r, renewed(trace, s, n, r))]
    trace.keeps_marginals = False
    beta = 1 - (s.alpha / n.alpha) ** 2 if s.alpha else 1.0
    return [transfer(x, D, s, n, r, math.sqrt(beta) * trace.noise(s, n))]


def euler_ancestral(
    trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *, eta: float = 1.0, s_noise: float = 1.0
) -> list[Combination]:
    """Euler a: ancestral sampling with Euler steps (k-diffusion, sample_euler_ancestral)."""
    return [first_order(trace, knots[i], knots[i + 1], x, check_eta(eta), s_noise)[0]]


def euler_ancestral_cfg_pp(
    trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *, eta: float = 1.0
) -> list[Combination]:
    """Euler a with CFG++: to the guided D along the unconditional ε̂ (Chung et al. 2406.08070, algorithm 2)."""
    s, n = knots[i], knots[i + 1]
    D = trace.denoise(x, s)
    if n.sigma == 0:
        return [n.alpha * D]
    _, e = trace.unconditional(x, s)
    r = check_eta(eta) * posterior_spread(s, n)
    return [toward(D, e, n, r, renewed(trace, s, n, r))]


def ddim_cfg_pp(trace: Trace, knots: Sequence[Knot], i: int, x: Combination) -> list[Combination]:
    """DDIM / Euler with CFG++: to the guided D along the unconditional ε̂ (Chung et al. 2406.08070, algorithm 2)."""
    return euler_ancestral_cfg_pp(trace, knots, i, x, eta=0.0)


METHODS = [
    Method(
        "ddim",
        ddim,
        order=1,
        source="2010.02502",
        called={"DDIM": {}, "DDIMScheduler": {}},
    ),
    Method(
        "ddim_inverse",
        ddim_inverse,
        order=1,
        source="2010.02502",
        inverse=True,
        called={"DDIMInverseScheduler": {}},
    ),
    Method(
        "ddim_cfg_pp",
        ddim_cfg_pp,
        order=1,
        source="2406.08070",
        called={"DDIM CFG++": {}, "Euler CFG++": {}, "euler_cfg_pp": {}},
    ),
    Method(
        "ddpm",
        ddpm,
        order=1,
        source="2006.11239",
        stochastic=True,
        called={"DDPM": {}, "DDPMScheduler": {}},
    ),
    Method(
        "euler_ancestral",
        euler_ancestral,
        order=1,
        source="k-diffusion",
        stochastic=True,
        called={"Euler a": {}, "EulerAncestralDiscreteScheduler": {}},
    ),
    Method(
        "euler_ancestral_cfg_pp",
        euler_ancestral_cfg_pp,
        order=1,
        source="2406.08070",
        stochastic=True,
        called={"Euler a CFG++": {}},
    ),
]
