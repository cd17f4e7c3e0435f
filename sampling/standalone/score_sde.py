"""Samplers of the score SDE paper: reverse diffusion, Euler-Maruyama, and Langevin correctors (Song et al. 2011.13456).

The predictors are tables. On any path the forward chain from a knot n up to s is x_s = a x_n + G z, with a = α_s / α_n and
G² = σ_s² - a² σ_n², and the reverse diffusion sampler (eq. 46) undoes a step of it by

    x_n = (2 - a) x_s + G² s_θ(x_s, s) + G z,    s_θ = -ε̂ / σ_s:

with a = 1 the predictor of algorithm 2 (VE), with a² = 1 - β the one of algorithm 3 (VP). The correctors (algorithms 4 and 5)
are no tables: their step size is a ratio of norms of the noise and of the network's output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ...noising import NoiseSchedule, VariancePreserving
from ...noising.utils.validation import whole_number
from ..grids import Grid
from ..inference import Run
from ..kernel import Progress, combine, perform
from ..knots import Knot
from ..methods.base import Method, one_of
from ..methods.euler import posterior_spread, renewed, transfer
from ..table import Combination, Trace
from .base import Walk

PREDICTORS = ("reverse_diffusion", "euler_maruyama")


def score_sde_vp(
    trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *, predictor: str = "reverse_diffusion"
) -> list[Combination]:
    """The score SDE paper's predictors: each undoes a step of the forward SDE, and the last one only takes noise away.

    ``reverse_diffusion`` is algorithm 3 and eq. 46, on any schedule. ``euler_maruyama`` discretizes eq. 6 in time, on
    NoiseSchedule.variance_preserving() alone, with the rate β(t) of eq. 33 and time steps of 1 / N, as ScoreSdeVpScheduler.
    """
    one_of("predictor", predictor, PREDICTORS)
    s, n = knots[i], knots[i + 1]
    trace.keeps_marginals = False  # both are of first order in the step, also for a network that knows x_0
    if predictor == "euler_maruyama":
        return [_euler_maruyama(trace, s, n, x, len(knots) - 1)]
    return [_reverse_diffusion(trace, s, n, x)]


def _reverse_diffusion(trace: Trace, s: Knot, n: Knot, x: Combination) -> Combination:
    D, e = trace.evaluate(x, s)
    if n.sigma == 0:  # Tweedie's formula, appendix G: x_s without its noise
        return n.alpha * D
    if s.alpha == 0:  # a first-order step: the posterior of x_n, given D
        r = posterior_spread(s, n)
        return transfer(x, D, s, n, r, renewed(trace, s, n, r))
    a = s.alpha / n.alpha
    G2 = s.sigma**2 - (a * n.sigma) ** 2
    return (2 - a) * x - (G2 / s.sigma) * e + math.sqrt(G2) * trace.noise(s, n)  # eq. 46, f(x) = (a - 1) x


def _euler_maruyama(trace: Trace, s: Knot, n: Knot, x: Combination, steps: int) -> Combination:
    curve = trace.schedule.curve
    if type(curve) is not VariancePreserving or curve.snr_shift_scale != 1:
        kind = f"shifted {curve.kind}" if type(curve) is VariancePreserving else curve.kind
        raise ValueError(
            f"predictor 'euler_maruyama' needs the rate β(t) of NoiseSchedule.variance_preserving(), got a {kind} schedule; "
            "use predictor='reverse_diffusion'"
        )
    _, e = trace.evaluate(x, s)
    t = s.timestep / curve.num_train_timesteps
    beta = (curve.beta_min + t * (curve.beta_max - curve.beta_min)) / steps  # β(t) |Δt|
    x_mean = (1 + 0.5 * beta) * x - (beta / s.sigma) * e  # eq. 6: x - (f - g² s_θ) |Δt|, f = -β x / 2, g² = β
    return x_mean if n.sigma == 0 else x_mean + math.sqrt(beta) * trace.noise(s, n)


@dataclass(frozen=True)
class PredictorCorrector(Walk):
    """Predictor-corrector sampling, score_sde_ve on NoiseSchedule.variance_exploding() (algorithms 2 and 4; VP: 3 and 5).

    At each of ``steps`` knots ``correct_steps`` Langevin steps of signal-to-noise ratio ``snr``, then a reverse diffusion step;
    correct_steps + 1 evaluations a step. ``norm``: 'image' takes the norms of the corrector's step size for each image, as the
    paper; 'batch' their means over the batch, as its code and ScoreSdeVeScheduler, so that an image depends on its batch.
    ``grid`` as in Sampler; 'linspace' has geometric σ from σ_max to σ_min on the VE path. Raises ValueError for bad options.

    >>> sampler = PredictorCorrector(NoiseSchedule.variance_exploding(), steps=10)
    >>> sampler(lambda x, sigma: -x / (1 + sigma.view(-1, 1) ** 2), (2, 3), seeds=0).shape
    torch.Size([2, 3])
    """

    schedule: NoiseSchedule
    steps: int = 1000
    snr: float = 0.15
    correct_steps: int = 1
    norm: str = "image"
    grid: str | Grid = "linspace"

    def __post_init__(self) -> None:
        one_of("norm", self.norm, ("image", "batch"))
        if not self.snr > 0:
            raise ValueError(f"snr must be positive, got {self.snr}; the paper uses 0.16 for VE, 0.15 is diffusers'")
        object.__setattr__(self, "correct_steps", whole_number("correct_steps", self.correct_steps, least=0))
        _ = self.knots  # bad input fails here, before any work

    def advance(self, run: Run, knots: Sequence[Knot]) -> Iterator[Progress]:
        """Run from ``run.x`` at the first of ``knots``."""
        x = run.x
        for i, (s, n) in enumerate(pairwise(knots)):
            for _ in range(self.correct_steps if s.alpha > 0 else 0):
                x = self._corrected(run, x, s, n)
            trace = Trace(self.schedule, 1)
            row = _reverse_diffusion(trace, s, n, Combination({0: 1.0})).row
            basis = [x]
            perform(trace.ops, basis, run.evaluate, lambda start, end: run.noise())
            x = combine(row, basis)
            yield Progress(i + 1, len(knots) - 1, x, trace.denoised.row, basis)

    def _corrected(self, run: Run, x: Tensor, s: Knot, n: Knot) -> Tensor:
        """Return x after one step of Langevin dynamics at the noise level of s."""
        out = run.evaluate(s.input_scale * x, s).to(x.dtype)
        score = self.schedule.prediction.to_epsilon(out, x, s.alpha, s.sigma) / -s.sigma
        z = run.noise().to(x.dtype)
        ratio = self.snr * self._norm(z) / self._norm(score)
        scale = (s.alpha / n.alpha) ** 2  # α_i of algorithm 5; 1 on the VE path
        epsilon = torch.where(ratio.isfinite(), 2 * scale * ratio**2, 0.0)  # line 4; no score, no step
        return x + epsilon * score + (2 * epsilon).sqrt() * z  # line 5

    def _norm(self, v: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(v.flatten(1), dim=1)
        return (norms if self.norm == "image" else norms.mean()).view(-1, *[1] * (v.ndim - 1))


METHODS = [
    Method(
        "score_sde_vp",
        score_sde_vp,
        order=1,
        source="2011.13456",
        stochastic=True,
        called={"ScoreSdeVpScheduler": {"predictor": "euler_maruyama", "grid": "score_sde"}},
    ),
]
