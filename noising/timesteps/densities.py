"""Densities of training timesteps from the literature, each by its quantile function."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..utils.beta_distribution import beta_quantile
from .base import LogSNRTimesteps, QuantileTimesteps

MODE_SCALE_MAX = 2 / (math.pi - 2)  # Esser et al. 2403.03206, below eq. 20: beyond it the map is not monotone


@dataclass(frozen=True, kw_only=True)
class UniformTimesteps(QuantileTimesteps):
    """Every time equally often.

    >>> UniformTimesteps(stratified=True).quantile(torch.tensor([0.75, 0.25]))
    tensor([0.7500, 0.2500])
    """

    name: ClassVar[str] = "uniform"

    def quantile(self, u: Tensor) -> Tensor:
        return u


@dataclass(frozen=True, kw_only=True)
class LogitNormalTimesteps(QuantileTimesteps):
    """logit(t) ~ N(mean, std²) (Esser et al. 2403.03206, eq. 19); a positive mean is more noise.

    On a flow with a shift the shift acts on top, as in SD3. ValueError unless the mean is finite and std positive and finite.

    >>> LogitNormalTimesteps(mean=1.0).quantile(torch.tensor([0.5, 1.0], dtype=torch.float64))
    tensor([0.7311, 1.0000], dtype=torch.float64)
    """

    name: ClassVar[str] = "logit_normal"
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _require_normal("logit-normal timesteps", self.mean, self.std, "SD3 uses 0 and 1")

    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


@dataclass(frozen=True, kw_only=True)
class ModeTimesteps(QuantileTimesteps):
    """Mode sampling with heavy tails: t = 1 - u' - s (cos²(π u' / 2) - 1 + u') (Esser et al. 2403.03206, eq. 20), u' = 1 - u.

    Positive scales s favour the middle, negative ones the ends, 0 is uniform. ValueError where the map is not monotone,
    outside -1 ... 2 / (π - 2) = 1.7519.

    >>> ModeTimesteps(scale=1.29).quantile(torch.tensor([0.25, 0.5, 1.0]))
    tensor([0.3836, 0.5000, 1.0000])
    """

    name: ClassVar[str] = "mode"
    scale: float = 1.29

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= MODE_SCALE_MAX:
            raise ValueError(
                f"the scale of mode timesteps must lie in -1 ... {MODE_SCALE_MAX:.4f}, where the map is monotone, "
                f"got {self.scale}; SD3 uses 1.29"
            )

    def quantile(self, u: Tensor) -> Tensor:
        return u - self.scale * (torch.sin(0.5 * math.pi * u) ** 2 - u)


@dataclass(frozen=True, kw_only=True)
class CosMapTimesteps(QuantileTimesteps):
    """The density 2 / (π - 2 π t + 2 π t²): on a flow, the log SNRs of the cosine schedule (Esser et al. 2403.03206, eq. 21).

    It replaces the cosmap weight on uniform times: with both, the weight counts twice.

    >>> CosMapTimesteps().quantile(torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64))
    tensor([0.2929, 0.5000, 1.0000], dtype=torch.float64)
    """

    name: ClassVar[str] = "cosmap"

    def quantile(self, u: Tensor) -> Tensor:
        # 1 - 1 / (tan(π u / 2) + 1) without the infinite tangent
        sine, cosine = torch.sin(0.5 * math.pi * u), torch.sin(0.5 * math.pi * (1 - u))
        return sine / (sine + cosine)


@dataclass(frozen=True, kw_only=True)
class BetaTimesteps(QuantileTimesteps):
    """t ~ Beta(a, b): a > b is more noise, a = b < 1 favours both ends, 1 and 1 is uniform.

    The quantile is the inverse of the incomplete beta function, to 1e-12. ValueError unless a and b are positive and finite.

    >>> BetaTimesteps(a=2.0, b=1.0).quantile(torch.tensor([0.25, 1.0]))  # the root
    tensor([0.5000, 1.0000], dtype=torch.float64)
    """

    name: ClassVar[str] = "beta"
    a: float = 2.0
    b: float = 2.0

    def __post_init__(self) -> None:
        if not (0 < self.a < math.inf and 0 < self.b < math.inf):
            raise ValueError(f"a and b of beta timesteps must be positive and finite, got {self.a} and {self.b}")

    def quantile(self, u: Tensor) -> Tensor:
        return beta_quantile(u, self.a, self.b)


@dataclass(frozen=True, kw_only=True)
class LogNormalSigmaTimesteps(LogSNRTimesteps):
    """log(σ / α) ~ N(mean, std²): EDM's density of noise levels (Karras et al. 2206.00364, table 1), on any curve.

    EDM has P_mean = -1.2 and P_std = 1.2, EDM2 -0.4 and 1.0 (2312.02696, table 6). What lies past the ends of the curve falls
    on the ends; discrete curves take the nearest timestep. ValueError unless the mean is finite and std positive and finite.

    >>> from alphabar.noising import Karras
    >>> LogNormalSigmaTimesteps().times(torch.tensor([0.5, 1.0], dtype=torch.float64), Karras())
    tensor([ 0.3012, 80.0000], dtype=torch.float64)
    """

    name: ClassVar[str] = "lognormal_sigma"
    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        _require_normal("lognormal noise levels", self.mean, self.std, "EDM uses -1.2 and 1.2")

    def log_snr(self, u: Tensor) -> Tensor:
        return -2 * (self.mean + self.std * torch.special.ndtri(u))


def _require_normal(what: str, mean: float, std: float, usual: str) -> None:
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise ValueError(f"{what} need a finite mean and a positive, finite std, got {mean} and {std}; {usual}")
