"""One Brownian path for each image, the same for every number of steps.

Stochastic samplers draw a new number for every step, so the picture changes with their number.
Taken as increments of one path W over σ/α that belongs to the image's seed, z = (W(b) - W(a)) /
sqrt(|b - a|), the noise of a long step is the sum of that of the short ones inside it, and the
picture settles as steps grow (Rößler's strong convergence; k-diffusion's BrownianTreeNoiseSampler).
The path is torchsde's virtual Brownian tree (Li et al. 2001.01328, §4).
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
    """Standard normal noise for stretches of σ/α, from one path for each image; needs the package
    torchsde.

    ``drawn``: the noise of the run, whose seeds are the paths', all 64 bits of them. ``knots``: of
    the run, whose finite σ/α the path spans. From α = 0, where σ/α is infinite, noise is drawn as
    always.

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
                "noise='brownian' needs the package torchsde: pip install torchsde"
            ) from error
        highest = max(knot.sigma_ve for knot in knots if math.isfinite(knot.sigma_ve))
        start = torch.zeros(drawn.shape[1:], dtype=torch.float32)
        # twice as far as the first knot: churn goes there
        self.paths: list[Callable[[float, float], Any]] = [
            BrownianTree(t0=0.0, w0=start, t1=2.0 * highest, entropy=seed) for seed in drawn.seeds
        ]
        self.drawn = drawn

    def __call__(self, start: float, end: float) -> Tensor:
        """Return the noise of the stretch between two σ/α, shape (batch, ...)."""
        if not math.isfinite(start) or not math.isfinite(end):
            return self.drawn()
        low, high = min(start, end), max(start, end)
        sign = math.copysign(1 / math.sqrt(high - low), end - start)
        return torch.stack([path(low, high) * sign for path in self.paths]).to(self.drawn.device)
