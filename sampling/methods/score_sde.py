"""The predictors of the score SDE paper: reverse diffusion and Euler-Maruyama.

Source: Song et al. 2011.13456. On any path the forward chain from a knot n up to s is x_s = a x_n +
G z, with a = α_s / α_n and G² = σ_s² - a² σ_n². The reverse diffusion sampler (eq. 46) reverses
this step by

    x_n = (2 - a) x_s + G² s_θ(x_s, s) + G z,    s_θ = -ε̂ / σ_s.

With a = 1 it is the predictor of algorithm 2 (VE), with a² = 1 - β that of algorithm 3 (VP).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...noising import VariancePreserving
from ...noising.utils.validation import one_of
from ..knots import Knot
from ..tracing import Combination, Trace
from .base import register_method
from .steps import first_order_update, fresh_noise, posterior_std

PREDICTORS = ("reverse_diffusion", "euler_maruyama")


@register_method(
    order=1,
    source="2011.13456",
    stochastic=True,
    aliases={"ScoreSdeVpScheduler": {"predictor": "euler_maruyama", "grid": "score_sde"}},
)
def score_sde_vp(
    trace: Trace,
    knots: Sequence[Knot],
    i: int,
    x: Combination,
    *,
    predictor: str = "reverse_diffusion",
) -> list[Combination]:
    """The predictors of the score SDE paper: each reverses a step of the forward SDE.

    The last step only removes noise. ``reverse_diffusion`` is algorithm 3 and eq. 46, on any
    schedule. ``euler_maruyama`` discretizes eq. 6 in time, only on
    NoiseSchedule.variance_preserving(), with the rate β(t) of eq. 33 and time steps of 1 / N, as
    ScoreSdeVpScheduler.
    """
    one_of("predictor", predictor, PREDICTORS)
    s, n = knots[i], knots[i + 1]
    trace.keeps_marginals = (
        False  # both are of first order in the step, even if the network knows x_0
    )
    if predictor == "euler_maruyama":
        return [_euler_maruyama(trace, s, n, x, len(knots) - 1)]
    return [reverse_diffusion_step(trace, s, n, x)]


def reverse_diffusion_step(trace: Trace, s: Knot, n: Knot, x: Combination) -> Combination:
    D, e = trace.evaluate(x, s)
    if n.sigma == 0:  # Tweedie's formula, appendix G: x_s without its noise
        return n.alpha * D
    if s.alpha == 0:  # first-order step: the posterior of x_n, given D
        r = posterior_std(s, n)
        return first_order_update(x, D, s, n, r, fresh_noise(trace, s, n, r))
    a = s.alpha / n.alpha
    G2 = s.sigma**2 - (a * n.sigma) ** 2
    # eq. 46, f(x) = (a - 1) x
    return (2 - a) * x - (G2 / s.sigma) * e + math.sqrt(G2) * trace.noise(s, n)


def _euler_maruyama(trace: Trace, s: Knot, n: Knot, x: Combination, steps: int) -> Combination:
    curve = trace.schedule.curve
    if type(curve) is not VariancePreserving or curve.snr_shift_scale != 1:
        kind = f"shifted {curve.kind}" if type(curve) is VariancePreserving else curve.kind
        raise ValueError(
            "predictor 'euler_maruyama' needs the rate β(t) of "
            f"NoiseSchedule.variance_preserving(), got a {kind} schedule; "
            "use predictor='reverse_diffusion'"
        )
    _, e = trace.evaluate(x, s)
    t = s.timestep / curve.num_train_timesteps
    beta = (curve.beta_min + t * (curve.beta_max - curve.beta_min)) / steps  # β(t) |Δt|
    # eq. 6: x - (f - g² s_θ) |Δt|, f = -β x / 2, g² = β
    x_mean = (1 + 0.5 * beta) * x - (beta / s.sigma) * e
    return x_mean if n.sigma == 0 else x_mean + math.sqrt(beta) * trace.noise(s, n)
