"""One Brownian path for each image, the same for every number of steps.

Stochastic samplers draw new noise in every step, so the image changes with the number of steps.
Here the noise is an increment of one path W over σ/α that depends on the image's seed: z = (W(b) -
W(a)) / sqrt(|b - a|). The noise of a long step is then the sum of the noise of the short steps
inside it, and the image converges as steps grow (Rößler's strong convergence; k-diffusion's
BrownianTreeNoiseSampler). The path is torchsde's virtual Brownian tree (Li et al. 2001.01328, §4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .inference import SeededNoise
from .knots import Knot


class BrownianNoise:
    """Standard normal noise for intervals of σ/α, from one path for each image; needs torchsde.

    ``drawn``: the noise of the run; the paths use all 64 bits of its seeds. ``knots``: the knots of
    the run; the path covers their finite σ/α. From α = 0, where σ/α is infinite, independent noise
    is drawn.

    >>> drawn = SeededNoise((1, 4), 0, torch.device("cpu"))
    >>> noise = BrownianNoise(drawn, [Knot(9, 0.1, 1.0), Knot(0, 1.0, 0.0)])
    >>> whole, first, second = noise(10.0, 0.0), noise(10.0, 4.0), noise(4.0, 0.0)
    >>> torch.allclose(10**0.5 * whole, 6**0.5 * first + 4**0.5 * second, atol=1e-4)
    True
    """

    def __init__(self, drawn: SeededNoise, knots: Sequence[Knot]) -> None:
        try:
            from torchsde import BrownianTree
        except ImportError as error:
            raise ImportError(
                "noise='brownian' needs torchsde, which is not installed: pip install "
                "'alphabar[brownian]'"
            ) from error
        highest = max(knot.sigma_ve for knot in knots if math.isfinite(knot.sigma_ve))
        start = torch.zeros(drawn.shape[1:], dtype=torch.float32)
        # twice the σ/α of the first knot: churn raises the noise above it
        self.paths: list[Callable[[float, float], Any]] = [
            BrownianTree(t0=0.0, w0=start, t1=2.0 * highest, entropy=seed) for seed in drawn.seeds
        ]
        self.drawn = drawn

    def __call__(self, start: float, end: float) -> Tensor:
        """Return the noise of the interval between two σ/α, shape (batch, ...)."""
        if not math.isfinite(start) or not math.isfinite(end):
            return self.drawn()
        low, high = min(start, end), max(start, end)
        sign = math.copysign(1 / math.sqrt(high - low), end - start)
        return torch.stack([path(low, high) * sign for path in self.paths]).to(self.drawn.device)
