"""Loss weights, stated once on the x_0 error.

A loss is one function w_x0(SNR) >= 0 on ||Δx_0||². An output error Δout is an x_0 error (σ / det) Δout (see prediction.py),
so the weight on ||Δout||² that means the same is w_x0 σ² / det². A scheme here states W = w_x0 σ² in α² and σ², never
dividing by SNR, and the weight is W / det²: finite at both ends of the schedule, and the same objective for every target.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .registry import lookup


@dataclass(frozen=True, kw_only=True)
class Weighting(ABC):
    """A weighting scheme; subclasses state W(α², σ²) = w_x0 σ².

    ``floor`` is a lower bound of the weight on the target, for schemes that are 0 at a zero-SNR terminal step.

    >>> one = torch.tensor([1.0])
    >>> MinSNR(gamma=5.0)(alpha=0.8 * one, sigma=0.6 * one, det=-one)  # v: min(SNR, 5) / (SNR + 1)
    tensor([0.6400])
    """

    name: ClassVar[str]
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not self.floor >= 0:
            raise ValueError(f"floor must be at least 0, got {self.floor}")

    @abstractmethod
    def numerator(self, alpha2: Tensor, sigma2: Tensor, det2: Tensor) -> Tensor:
        """Return W = w_x0 σ², given α², σ² and det²."""

    def __call__(self, alpha: Tensor, sigma: Tensor, det: Tensor) -> Tensor:
        """Return the weight on the squared error of the target whose determinant is ``det``; shape of ``alpha``."""
        det2 = torch.as_tensor(det, dtype=alpha.dtype, device=alpha.device) ** 2
        weight = self.numerator(alpha**2, sigma**2, det2) / det2
        return weight.clamp(min=self.floor) if self.floor else weight


@dataclass(frozen=True, kw_only=True)
class Uniform(Weighting):
    """1 on the target: the plain loss of whatever the network predicts. The only scheme that depends on the target.

    >>> Uniform()(torch.tensor([0.6]), torch.tensor([0.8]), torch.tensor([-0.6]))
    tensor([1.])
    """

    name: ClassVar[str] = "uniform"

    def numerator(self, alpha2: Tensor, sigma2: Tensor, det2: Tensor) -> Tensor:
        return det2


@dataclass(frozen=True, kw_only=True)
class SNR(Weighting):
    """w_x0 = SNR: the plain epsilon loss, whatever the network predicts (Salimans & Ho 2202.00512, §4).

    >>> SNR()(torch.tensor([0.6]), torch.tensor([0.8]), torch.tensor([-0.6]))
    tensor([1.])
    """

    name: ClassVar[str] = "snr"

    def numerator(self, alpha2: Tensor, sigma2: Tensor, det2: Tensor) -> Tensor:
        return alpha2


@dataclass(frozen=True, kw_only=True)
class MinSNR(Weighting):
    """w_x0 = min(SNR, γ) (Hang et al. 2303.09556, eq. 7 and 8); γ > 0.

    For epsilon this is min(SNR, γ) / SNR, for v min(SNR, γ) / (SNR + 1).

    >>> MinSNR(gamma=0.0)
    Traceback (most recent call last):
    ValueError: snr gamma must be positive and finite, got 0.0; the paper uses 5
    """

    name: ClassVar[str] = "min_snr"
    gamma: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.gamma < float("inf"):
            raise ValueError(f"snr gamma must be positive and finite, got {self.gamma}; the paper uses 5")

    def numerator(self, alpha2: Tensor, sigma2: Tensor, det2: Tensor) -> Tensor:
        return torch.minimum(alpha2, self.gamma * sigma2)


WEIGHTINGS: Mapping[str, type[Weighting]] = {scheme.name: scheme for scheme in (Uniform, SNR, MinSNR)}
"""Every weighting scheme by its name; a new one is a class above and a word in this line."""


def resolve_weighting(weighting: str | Weighting) -> Weighting:
    """Return the scheme for a name or an object; an unknown name is a ValueError that offers the nearest one.

    >>> resolve_weighting("min_snr")
    MinSNR(floor=0.0, gamma=5.0)
    """
    return weighting if isinstance(weighting, Weighting) else lookup("weighting", weighting, WEIGHTINGS)()
