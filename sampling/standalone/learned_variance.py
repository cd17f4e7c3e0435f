"""DDPM with a variance that the network learned (Nichol & Dhariwal 2102.09672).

A table cannot express it: the standard deviation of the noise is an output of the network, with a
value for each pixel, and not a number of the schedule. The mean is linear and is traced with the
formula of the tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from ...noising import NoiseSchedule
from ...noising.utils.validation import one_of
from ..grids import Grid
from ..inference import Run
from ..kernel import Progress, combine, perform
from ..knots import Knot
from ..methods.steps import first_order_update, posterior_std
from ..tracing import Combination, Trace
from .base import GridSampler, register_standalone

VARIANCE_TYPES = ("learned_range", "learned", "learned_log")


@register_standalone("ddpm_learned_variance", order=1, source="2102.09672")
@dataclass(frozen=True)
class LearnedVariance(GridSampler):
    """Draw samples with a network that outputs its prediction and a variance.

    The output has twice the channels of x. Called like a Sampler. Guidance is applied to the
    prediction; the variance is that of the conditional half.

    Args:
        variance_type: The meaning of the second half. 'learned_range': v in [-1, 1] interpolates
            between the logarithms of the posterior's variance and of β (eq. 15, with (v + 1) / 2
            for its v). 'learned': the variance itself, positive, as in diffusers. 'learned_log':
            its logarithm, as in guided-diffusion.
        steps, grid: As in Sampler.

    Raises:
        ValueError: The type is unknown, or the output has no second half.

    >>> import torch
    >>> sampler = LearnedVariance(NoiseSchedule.linear(), steps=5)
    >>> sampler(lambda x, t: torch.cat([x, 0 * x], 1), (2, 3, 4, 4), seeds=0).shape
    torch.Size([2, 3, 4, 4])
    """

    output_multiple: ClassVar[int] = 2
    schedule: NoiseSchedule
    steps: int = 250
    variance_type: str = "learned_range"
    grid: str | Grid = "trailing"

    def __post_init__(self) -> None:
        one_of("variance_type", self.variance_type, VARIANCE_TYPES)
        _ = self.knots  # invalid input fails here, before any work

    def advance(self, run: Run, knots: Sequence[Knot]) -> Iterator[Progress]:
        """Run from ``run.x`` at the first of ``knots``."""
        assert run.head is not None
        x = run.x
        for i, (s, n) in enumerate(pairwise(knots)):
            trace, state = Trace(self.schedule, 1), Combination({0: 1.0})
            mean = first_order_update(state, trace.denoise(state, s), s, n, posterior_std(s, n))
            basis = [x]
            perform(trace.ops, basis, run.evaluate, lambda start, end: run.noise())
            x = combine(mean.row, basis)
            if n.sigma > 0:
                x = x + self.spread(run.head(1).to(x.dtype), s, n) * run.noise().to(x.dtype)
            yield Progress(i + 1, len(knots) - 1, x, trace.denoised.row, basis)

    def spread(self, v: Tensor, s: Knot, n: Knot) -> Tensor:
        """Return the standard deviation of x_n on the step from s to n.

        ``v`` is the second half of the network's output.

        >>> import torch
        >>> sampler = LearnedVariance(NoiseSchedule.linear())
        >>> s, n = sampler.knots[100:102]
        >>> bool(abs(sampler.spread(torch.tensor(-1.0), s, n) - posterior_std(s, n)) < 1e-7)
        True
        """
        if self.variance_type == "learned":
            return v.sqrt()
        if self.variance_type == "learned_log":
            return (0.5 * v).exp()
        # variance of the forward chain from n to s: 1 - α_s² / α_n² if VP
        beta = s.sigma**2 - (s.alpha * n.sigma / n.alpha) ** 2
        log_small, log_large = 2 * math.log(posterior_std(s, n)), math.log(beta)
        return (0.5 * (log_small + 0.5 * (v + 1) * (log_large - log_small))).exp()  # eq. 15
