"""Predictor-corrector sampling with Langevin correctors (Song et al. 2011.13456).

Algorithms 2 to 5. A table cannot express a corrector: its step size is a ratio of norms of the
noise and of the network's output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ...noising import NoiseSchedule
from ...noising.utils.validation import one_of, require, whole_number
from ..grids import Grid
from ..inference import Run
from ..kernel import Progress, combine, perform
from ..knots import Knot
from ..methods.score_sde import reverse_diffusion_step
from ..tracing import Combination, Trace
from .base import GridSampler, register_standalone


@register_standalone(
    "score_sde_ve",
    order=1,
    source="2011.13456",
    evaluations=2,
    aliases={"ScoreSdeVeScheduler": {"norm": "batch"}},
)
@dataclass(frozen=True)
class PredictorCorrector(GridSampler):
    """Predictor-corrector sampling: algorithms 2 and 4 for VE, 3 and 5 for VP.

    score_sde_ve is this sampler on NoiseSchedule.variance_exploding(). Each step has
    ``correct_steps`` Langevin steps, then one reverse diffusion step: correct_steps + 1
    evaluations.

    Args:
        steps: The number of knots with a step.
        snr: The signal-to-noise ratio of the Langevin steps.
        correct_steps: The number of Langevin steps at each knot.
        norm: How the norms of the corrector's step size are taken. 'image': for each image, as in
            the paper. 'batch': their means over the batch, as in its code and ScoreSdeVeScheduler;
            an image then depends on its batch.
        grid: As in Sampler; 'linspace' has geometric σ from σ_max to σ_min on the VE path.

    Raises:
        ValueError: An option is invalid.

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
        advice = "the paper uses 0.16 for VE, 0.15 is diffusers'"
        require(self.snr > 0, "snr", "be positive", self.snr, advice)
        object.__setattr__(
            self, "correct_steps", whole_number("correct_steps", self.correct_steps, least=0)
        )
        _ = self.knots  # invalid input fails here, before any work

    def advance(self, run: Run, knots: Sequence[Knot]) -> Iterator[Progress]:
        """Run from ``run.x`` at the first of ``knots``."""
        x = run.x
        for i, (s, n) in enumerate(pairwise(knots)):
            for _ in range(self.correct_steps if s.alpha > 0 else 0):
                x = self._corrected(run, x, s, n)
            trace = Trace(self.schedule, 1)
            row = reverse_diffusion_step(trace, s, n, Combination({0: 1.0})).row
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
        # line 4; without a score there is no step
        epsilon = torch.where(ratio.isfinite(), 2 * scale * ratio**2, 0.0)
        return x + epsilon * score + (2 * epsilon).sqrt() * z  # line 5

    def _norm(self, v: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(v.flatten(1), dim=1)
        return (norms if self.norm == "image" else norms.mean()).view(-1, *[1] * (v.ndim - 1))
