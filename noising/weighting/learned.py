"""Learned uncertainty: the loss w / e^u · error + u with a trained u(noise level).

Source: Karras et al. 2312.02696, eq. 21. At the minimum over u, e^u = E[w error] at each noise
level, and the loss is 1 + log E[w error]. Every noise level then counts by its relative error, and
the static weight w cancels. w matters only until u has converged, and where w is 0: the loss there
is 0, u included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..utils.rng import Draws, Stream
from ..utils.validation import require
from .base import WEIGHTINGS, Around, Weighting
from .schemes import EDM

# bound of |c_noise|, log(σ / α) = ±20: α = 0 and σ = 0 lie beyond any other float32 level, but at a
# finite value
WIDEST = 5.0


class LogVariance(nn.Module):
    """u(α, σ): a linear layer on random Fourier features of c_noise = log(σ / α) / 4.

    Source: 2312.02696, eq. 75. u starts at 0. Features and phases are drawn from ``seed``; they are
    buffers, saved and loaded with the weights. It is computed in float32 or better, under autocast
    too.

    >>> LogVariance(channels=8)(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    tensor([0., 0.], grad_fn=<AddBackward0>)
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, channels: int = 128, seed: int = 0) -> None:
        super().__init__()
        draws = Draws(seed, [0], step=0, stream=Stream.FEATURES)
        self.register_buffer("frequencies", 2 * math.pi * draws.normal(channels)[0])
        self.register_buffer("phases", 2 * math.pi * draws.uniform(channels)[0])
        self.weight = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return u, shape of ``alpha``."""
        c_noise = ((sigma.log() - alpha.log()) / 4).clamp(-WIDEST, WIDEST)
        dtype = c_noise.dtype
        phase = c_noise[..., None] * self.frequencies.to(dtype) + self.phases.to(dtype)
        features = math.sqrt(2) * phase.cos()
        # not nn.Linear: autocast would run it in half precision
        return (features * self.weight.to(dtype)).sum(-1) + self.bias.to(dtype)


@WEIGHTINGS.register
@dataclass(frozen=True, kw_only=True)
class LearnedUncertainty(Around):
    """The weights of ``weighting`` divided by a learned variance of the loss: w / e^u · error + u.

    Source: Karras et al. 2312.02696, eq. 21. ``Noising`` makes the module that learns u, as its
    submodule ``log_variance``. Add ``noising.parameters()`` to the optimizer, without weight decay,
    as DiffusionModule does. All of these parameters take part in every loss, so
    DistributedDataParallel may wrap a module that contains the Noising. If it wraps the network
    alone, average the gradients of these parameters too.

    Args:
        weighting: the weighting to divide, in closed form, or its name.
        channels: number of Fourier features.
        seed: seed of the features.

    >>> from alphabar.noising import NoiseSchedule, Noising
    >>> noising = Noising(NoiseSchedule.flow(), LearnedUncertainty(channels=16))
    >>> sorted(noising.state_dict())
    ['log_variance.bias', 'log_variance.frequencies', 'log_variance.phases', 'log_variance.weight']
    """

    name: ClassVar[str] = "learned_uncertainty"
    weighting: Weighting = field(default_factory=EDM)
    channels: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        count, advice = self.channels, "the paper uses 128"
        require(count >= 1, "channels", "be at least 1", count, advice)

    def on_target(
        self, alpha: Tensor, sigma: Tensor, det: Tensor, fraction: Tensor | None
    ) -> Tensor:
        return self.weighting(alpha, sigma, det, fraction)

    def log_variance(self) -> LogVariance:
        return LogVariance(self.channels, self.seed)
