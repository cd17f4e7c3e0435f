"""Clipping: keep the clean estimate inside the range of the data at every network evaluation.

Clipping is not linear, so a table cannot contain it. But it only changes the result of an
evaluation. For a fixed x, a change Δx_0 of x_0 changes the network's output by Δout = (det / σ)
Δx_0 (see noising.prediction). So the clipped estimate is converted back into the raw output,
exactly, for every prediction type, and the tables do not change. ε̂ changes too: it is computed
from x and the clipped x_0, as in DDPM and in DDIM with ``use_clipped_model_output=True``. With
False, DDIM, its inverse and RePaint also use the ε̂ before clipping, which is kept separately.
TCDScheduler of diffusers has these settings but does not clip.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..noising import Prediction
from ..noising.utils.validation import require
from .kernel import Evaluate
from .knots import Knot

Change = Callable[[Tensor], Tensor]
"""A change of the clean estimate: (batch, ...) -> the same shape."""


@dataclass(frozen=True)
class Clip:
    """Clip x_0 to -limit ... limit: ``clip_sample`` and ``clip_sample_range`` in diffusers.

    Raises:
        ValueError: The limit is not positive.

    >>> Clip(1.0)(torch.tensor([-3.0, 0.5]))
    tensor([-1.0000,  0.5000])
    """

    limit: float = 1.0

    def __post_init__(self) -> None:
        what, advice = "be a positive limit of |x_0|", "images in [-1, 1] have 1.0"
        require(self.limit > 0, "clip", what, self.limit, advice)

    def __call__(self, x0: Tensor) -> Tensor:
        return x0.clamp(-self.limit, self.limit)


@dataclass(frozen=True)
class DynamicThreshold:
    """Clip x_0 to -s ... s and divide by s, where s is a quantile of each image's |x_0|.

    Source: Saharia et al. 2205.11487, §2.3. For pixels in [-1, 1], not for latents.

    Args:
        ratio: The quantile.
        max_value: The largest s; s is at least 1. diffusers' ``sample_max_value``, whose default
            there is 1: plain clipping.

    Raises:
        ValueError: A value is out of range.

    >>> DynamicThreshold(ratio=1.0)(torch.tensor([[-3.0, 1.5]]))
    tensor([[-1.0000,  0.5000]])
    """

    ratio: float = 0.995
    max_value: float = float("inf")

    def __post_init__(self) -> None:
        what = "the ratio of a dynamic threshold"
        require(0 < self.ratio <= 1, what, "be in (0, 1]", self.ratio, "Imagen uses 0.995")
        what = "be at least 1, the range of the data"
        require(self.max_value >= 1, "max_value", what, self.max_value)

    def __call__(self, x0: Tensor) -> Tensor:
        s = x0.flatten(1).abs().quantile(self.ratio, dim=1).clamp(1.0, self.max_value)
        s = s.view(-1, *[1] * (x0.ndim - 1))
        return torch.maximum(torch.minimum(x0, s), -s) / s


def resolve_clip(clip: float | Change) -> Change:
    """Return the change for a limit; return a given change as it is.

    >>> resolve_clip(2)
    Clip(limit=2.0)
    """
    return clip if callable(clip) else Clip(float(clip))


def clipped(evaluate: Evaluate, prediction: Prediction, change: Change) -> Evaluate:
    """Return ``evaluate`` with the changed clean estimate converted back into the raw output.

    The result has float32 or better.

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
        if q == 0:  # x is the clean sample; the output has no effect on x_0
            return out
        x0 = (p / knot.input_scale) * x + q * out
        return out + (change(x0) - x0) / q

    return evaluated
