"""DDIM, DDPM, Euler and Euler ancestral: one first-order formula (see ``steps.py``).

They differ in the amount of fresh noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...noising import Prediction
from ...noising.utils.validation import one_of
from ..knots import Knot
from ..tracing import Combination, Trace
from .base import register_method
from .churn import churned
from .steps import check_eta, first_order, first_order_update, fresh_noise, posterior_std, toward


@register_method(order=1, source="2010.02502", aliases={"DDIM": {}, "DDIMScheduler": {}})
def ddim(
    trace: Trace,
    knots: Sequence[Knot],
    i: int,
    x: Combination,
    *,
    eta: float = 0.0,
    use_clipped_model_output: bool = True,
) -> list[Combination]:
    """DDIM: down to the next knot along ε̂ (2010.02502, eq. 12, 16).

    The step renews noise of η times the posterior's standard deviation.
    ``use_clipped_model_output``: if x_0 is clipped, use the ε̂ of x and the clipped x_0 (True), or
    the network's own ε̂ (False, the default of diffusers' DDIMScheduler.step).
    """
    s, n = knots[i], knots[i + 1]
    if use_clipped_model_output:
        return [first_order(trace, s, n, x, check_eta(eta))[0]]
    D = trace.denoise(x, s)
    _, e = trace.unclipped(x, s)
    r = check_eta(eta) * posterior_std(s, n)
    return [toward(D, e, n, r, fresh_noise(trace, s, n, r))]


@register_method(order=1, source="2010.02502", inverse=True, aliases={"DDIMInverseScheduler": {}})
def ddim_inverse(
    trace: Trace,
    knots: Sequence[Knot],
    i: int,
    x: Combination,
    *,
    use_clipped_model_output: bool = True,
) -> list[Combination]:
    """DDIM run upwards, from an image to the noise that gives it (2010.02502, §4.3).

    ε̂ is evaluated at x and at the time of the next knot. ``use_clipped_model_output`` as in
    ``ddim``; DDIMInverseScheduler of diffusers has False.
    """
    s, n = knots[i], knots[i + 1]
    prediction = trace.schedule.prediction
    if s.sigma == 0 and not _tells_noise(prediction, s):
        raise ValueError(
            f"{prediction.name} predictions do not say the noise of an image that has none; start "
            "at the least noise, final='sigma_min'"
        )
    trace.keeps_marginals = False  # the start is a clean sample, whose noise a network cannot know
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


@register_method(
    order=1, source="2006.11239", stochastic=True, aliases={"DDPM": {}, "DDPMScheduler": {}}
)
def ddpm(
    trace: Trace,
    knots: Sequence[Knot],
    i: int,
    x: Combination,
    *,
    variance_type: str = "fixed_small",
) -> list[Combination]:
    """DDPM: the posterior mean, and noise of the posterior's variance or of β.

    Source: Ho et al. 2006.11239, eq. 6, 7 and §3.2. ``fixed_small`` is the posterior's variance,
    ``fixed_large`` is β = 1 - α_s²/α_n² of the step; the log forms are the same numbers, as
    improved DDPM parametrises them. Learned variances: ``sampling.LearnedVariance``.
    """
    one_of("variance_type", variance_type, VARIANCES)
    s, n = knots[i], knots[i + 1]
    D = trace.denoise(x, s)
    r = posterior_std(s, n)
    if n.sigma == 0 or variance_type.startswith("fixed_small"):
        return [first_order_update(x, D, s, n, r, fresh_noise(trace, s, n, r))]
    trace.keeps_marginals = False
    beta = 1 - (s.alpha / n.alpha) ** 2 if s.alpha else 1.0
    return [first_order_update(x, D, s, n, r, math.sqrt(beta) * trace.noise(s, n))]


@register_method(
    order=1,
    source="k-diffusion",
    stochastic=True,
    aliases={"Euler a": {}, "EulerAncestralDiscreteScheduler": {}},
)
def euler_ancestral(
    trace: Trace,
    knots: Sequence[Knot],
    i: int,
    x: Combination,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> list[Combination]:
    """Euler a: ancestral sampling with Euler steps (k-diffusion, sample_euler_ancestral)."""
    return [first_order(trace, knots[i], knots[i + 1], x, check_eta(eta), s_noise)[0]]


@register_method(
    order=1,
    source="2206.00364",
    aliases={"Euler": {}, "EulerDiscreteScheduler": {}, "EDMEulerScheduler": {}},
)
def euler(
    trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
) -> list[Combination]:  # fmt: skip
    """Euler's method on the probability flow ODE (2206.00364, algorithm 2, no correction)."""
    x, s = churned(trace, knots, i, x, s_churn, s_tmin, s_tmax, s_noise)
    D = trace.denoise(x, s)
    return [first_order_update(x, D, s, knots[i + 1])]
