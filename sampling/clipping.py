"""Clipping: keeping the clean estimate inside the range of the data, at every evaluation of the
network.

No table can do this, for it is not linear; but it changes only what an evaluation returns. With x
kept, moving x_0 by Δx_0 moves the network's output by Δout = (det / σ) Δx_0 (see
noising.prediction), so the clipped estimate is folded back into the raw output, exactly, for every
prediction type, and the tables know nothing of it. ε̂ moves along: it is what x and the clipped x_0
imply, as DDPM has it and DDIM with ``use_clipped_model_output=True``. With False DDIM, its inverse
and RePaint ask for the ε̂ before clipping as well, which is kept beside. TCDScheduler of diffusers
has the settings and clips nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..noising import Prediction
from .kernel import Evaluate
from .knots import Knot

Change = Callable[[Tensor], Tensor]
"""What is done to a clean estimate: (batch, ...) -> the same shape."""


@dataclass(frozen=True)
class Clip:
    """Clip x_0 to -limit ... limit: ``clip_sample`` and ``clip_sample_range`` in diffusers.

    Raises ValueError unless the limit is positive.

    >>> Clip(1.0)(torch.tensor([-3.0, 0.5]))
    tensor([-1.0000,  0.5000])
    """

    limit: float = 1.0

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(
                f"clip must be a positive limit of |x_0|, got {self.limit}; images in [-1, 1] have "
                "1.0"
            )

    def __call__(self, x0: Tensor) -> Tensor:
        return x0.clamp(-self.limit, self.limit)


@dataclass(frozen=True)
class DynamicThreshold:
    """Clip x_0 to -s ... s and divide by s, s being a quantile of each image's |x_0| (Saharia et
    al. 2205.11487, §2.3).

    ``ratio``: which quantile. s is at least 1, and at most ``max_value`` (diffusers'
    ``sample_max_value``, which is 1 by default there: plain clipping). For pixels in [-1, 1], not
    for latents. Raises ValueError for values out of range.

    >>> DynamicThreshold(ratio=1.0)(torch.tensor([[-3.0, 1.5]]))
    tensor([[-1.0000,  0.5000]])
    """

    ratio: float = 0.995
    max_value: float = float("inf")

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(
                f"the ratio of a dynamic threshold must be in (0, 1], got {self.ratio}; Imagen "
                "uses 0.995"
            )
        if not self.max_value >= 1:
            raise ValueError(
                f"max_value must be at least 1, the range of the data, got {self.max_value}"
            )

    def __call__(self, x0: Tensor) -> Tensor:
        s = x0.flatten(1).abs().quantile(self.ratio, dim=1).clamp(1.0, self.max_value)
        s = s.view(-1, *[1] * (x0.ndim - 1))
        return torch.maximum(torch.minimum(x0, s), -s) / s


def resolve_clip(clip: float | Change) -> Change:
    """Return the change for a limit, or the change itself.

    >>> resolve_clip(2)
    Clip(limit=2.0)
    """
    return clip if callable(clip) else Clip(float(clip))


def clipped(evaluate: Evaluate, prediction: Prediction, change: Change) -> Evaluate:
    """Return ``evaluate`` with the clean estimate changed and folded back into the raw output, in
    float32 or better.

    >>> from alphabar.noising import PREDICTIONS
    >>> f = clipped(lambda x, knot: 0 * x, PREDICTIONS["epsilon"](), Clip(1.0))
    >>> f(
    ...     torch.tensor([[3.0]]), Knot(0, alpha=0.6, sigma=0.8)
    ... )  # x_0 = 3 / 0.6 -> 1, so ε = (3 - 0.6) / 0.8
    tensor([[3.]])
    """

    def evaluated(x: Tensor, knot: Knot) -> Tensor:
        out = evaluate(x, knot)
        out = out.to(torch.promote_types(out.dtype, x.dtype))
        # x_0 = p x_t + q out, q = σ / det
        p, q = prediction.x0_coefficients(knot.alpha, knot.sigma)
        if q == 0:  # x is the clean sample itself, of which the output says nothing
            return out
        x0 = (p / knot.input_scale) * x + q * out
        return out + (change(x0) - x0) / q

    return evaluated
