"""Continuous curves: closed forms of α and σ over a time in [0, 1] (EDM: over σ itself)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..utils.validation import require
from .base import (
    CURVES,
    Curve,
    check_times,
    evaluation_dtype,
    require_count,
    require_factor,
    require_range,
)
from .shifts import shift_noise_level


@CURVES.register
@dataclass(frozen=True, kw_only=True)
class Flow(Curve):
    """Rectified flow: x_t = (1 - σ) x_0 + σ ε with σ = s t / (1 + (s - 1) t) and t in [0, 1].

    Source: Esser et al. 2403.03206, §5.3. The time input of the network is num_train_timesteps · σ,
    as in diffusers for SD3 and Flux.

    >>> Flow(shift=3.0).sigma(torch.tensor([0.0, 0.5, 1.0]))
    tensor([0.0000, 0.7500, 1.0000])
    """

    kind: ClassVar[str] = "flow"
    is_flow: ClassVar[bool] = True
    shift: float = 1.0

    def __post_init__(self) -> None:
        require_count(self.num_train_timesteps)
        require_factor("shift", self.shift, "1 is no shift, SD3 uses 3")

    def alpha(self, t: Tensor) -> Tensor:
        check_times(self, t)
        t = t.to(evaluation_dtype(t))
        return (1 - t) / (1 + (self.shift - 1) * t)

    def sigma(self, t: Tensor) -> Tensor:
        check_times(self, t)
        t = t.to(evaluation_dtype(t))
        return shift_noise_level(t, self.shift)

    def time(self, log_snr: Tensor) -> Tensor:
        return self.time_at_noise_level(torch.sigmoid(-0.5 * log_snr.to(evaluation_dtype(log_snr))))

    def alpha_sigma_at(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(0.5 * log_snr), torch.sigmoid(-0.5 * log_snr)

    def grid_coordinate(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma

    def time_at_noise_level(self, level: Tensor) -> Tensor:
        return level / (self.shift - (self.shift - 1) * level)

    def timestep(self, t: Tensor) -> Tensor:
        return self.num_train_timesteps * self.sigma(t)

    def shifted(self, factor: float) -> Flow:
        # shifts of σ multiply
        return replace(self, shift=self.shift * require_factor("factor", factor))


@CURVES.register
@dataclass(frozen=True, kw_only=True)
class VariancePreserving(Curve):
    """The VP SDE: α = exp(-t² (β_max - β_min) / 4 - t β_min / 2), σ² = 1 - α².

    Source: Song et al. 2011.13456, eq. 33. Times run from ``t_min`` (ε of the paper, 1e-3) to 1.
    The time input of the network is t · num_train_timesteps; the code of the paper uses 999.
    ``snr_shift_scale`` divides the SNR.

    >>> VariancePreserving().alpha(torch.tensor([1.0])).item() < 0.007
    True
    """

    kind: ClassVar[str] = "variance_preserving"
    beta_min: float = 0.1
    beta_max: float = 20.0
    eps: float = 1e-3
    snr_shift_scale: float = 1.0

    def __post_init__(self) -> None:
        require_count(self.num_train_timesteps)
        require_factor("snr_shift_scale", self.snr_shift_scale, "1 is no shift")
        if not 0 < self.beta_min < self.beta_max or not 0 <= self.eps <= 1 - 1e-6:
            raise ValueError(
                f"need 0 < beta_min < beta_max and 0 <= eps < 1, got {self.beta_min}, "
                f"{self.beta_max}, {self.eps}"
            )

    @property
    def t_min(self) -> float:
        return self.eps

    def alpha(self, t: Tensor) -> Tensor:
        return self._levels(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        return self._levels(t)[1]

    def time(self, log_snr: Tensor) -> Tensor:
        # -log α = log(1 + e^-λ) / 2 equals a quadratic in t; solve for its root
        value = log_snr.to(evaluation_dtype(log_snr)) + math.log(self.snr_shift_scale)
        return self._root(0.5 * torch.nn.functional.softplus(-value))

    def shifted(self, factor: float) -> VariancePreserving:
        return replace(
            self, snr_shift_scale=self.snr_shift_scale * require_factor("factor", factor) ** 2
        )

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = self.log_alpha(t)
        alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
        if self.snr_shift_scale == 1:
            return alpha, sigma
        sigma = math.sqrt(self.snr_shift_scale) * sigma
        norm = torch.hypot(alpha, sigma)
        return alpha / norm, sigma / norm

    def log_alpha(self, t: Tensor) -> Tensor:
        """Return log α(t) of the SDE, before any shift of its SNR."""
        check_times(self, t)
        t = t.to(evaluation_dtype(t))
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def _root(self, c: Tensor) -> Tensor:
        a, b = 0.25 * (self.beta_max - self.beta_min), 0.5 * self.beta_min
        return (2 * c / (b + (b**2 + 4 * a * c).sqrt())).clamp(self.t_min, self.t_max)


@CURVES.register
@dataclass(frozen=True, kw_only=True)
class SubVariancePreserving(VariancePreserving):
    """The sub-VP SDE: the α of VP, and σ = 1 - α² (Song et al. 2011.13456, eq. 29 and 33).

    ``snr_shift_scale`` divides the SNR, and moves α along the path σ = 1 - α².

    >>> SubVariancePreserving().sigma(torch.tensor([1.0])).item() > 0.99
    True
    """

    kind: ClassVar[str] = "sub_variance_preserving"

    def time(self, log_snr: Tensor) -> Tensor:
        value = log_snr.to(evaluation_dtype(log_snr)) + math.log(self.snr_shift_scale)
        return self._root(-_sub_vp_alpha(value).log())

    def alpha_sigma_at(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        alpha = _sub_vp_alpha(log_snr)
        return alpha, alpha * (-0.5 * log_snr).exp()

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = self.log_alpha(t)
        alpha, sigma = log_alpha.exp(), -torch.expm1(2 * log_alpha)
        if self.snr_shift_scale == 1:
            return alpha, sigma
        return self.alpha_sigma_at(2 * (log_alpha - sigma.log()) - math.log(self.snr_shift_scale))


def _sub_vp_alpha(log_snr: Tensor) -> Tensor:
    # α / (1 - α²) = e^(λ/2) = r, so α = 2 r / (1 + sqrt(1 + 4 r²)); written in 1 / r it does not
    # overflow near data
    r = (-0.5 * log_snr.to(evaluation_dtype(log_snr))).exp()
    return 2 / (r + (r**2 + 4).sqrt())


@CURVES.register
@dataclass(frozen=True, kw_only=True)
class VarianceExploding(Curve):
    """The VE SDE: α = 1, σ = σ_min (σ_max / σ_min)^t (Song et al. 2011.13456, eq. 30).

    The time input of the network is σ itself, as for the models of the paper.

    >>> VarianceExploding().sigma(torch.tensor([0.0, 1.0]))
    tensor([1.0000e-02, 1.3480e+03])
    """

    kind: ClassVar[str] = "variance_exploding"
    sigma_min: float = 0.01
    sigma_max: float = 1348.0

    def __post_init__(self) -> None:
        require_count(self.num_train_timesteps, least=2)
        require_range(self.sigma_min, self.sigma_max)

    def alpha(self, t: Tensor) -> Tensor:
        check_times(self, t)
        return torch.ones_like(t, dtype=evaluation_dtype(t))

    def sigma(self, t: Tensor) -> Tensor:
        check_times(self, t)
        return (
            self.sigma_min
            * (t.to(evaluation_dtype(t)) * math.log(self.sigma_max / self.sigma_min)).exp()
        )

    def time(self, log_snr: Tensor) -> Tensor:
        t = (-0.5 * log_snr.to(evaluation_dtype(log_snr)) - math.log(self.sigma_min)) / math.log(
            self.sigma_max / self.sigma_min
        )
        return t.clamp(self.t_min, self.t_max)

    def alpha_sigma_at(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(log_snr), (-0.5 * log_snr).exp()

    def timestep(self, t: Tensor) -> Tensor:
        return self.sigma(t)

    def fraction(self, t: Tensor) -> Tensor:
        return t

    def time_at_index(self, index: Tensor) -> Tensor:
        return index / (self.num_train_timesteps - 1)

    def shifted(self, factor: float) -> VarianceExploding:
        s = require_factor("factor", factor)
        return replace(self, sigma_min=s * self.sigma_min, sigma_max=s * self.sigma_max)


@CURVES.register
@dataclass(frozen=True, kw_only=True)
class Karras(Curve):
    """EDM: α = 1, σ = t; the network input is x / sqrt(σ² + σ_d²) at time log(σ) / 4.

    Source: Karras et al. 2206.00364, table 1. Training indices have the spacing of the sampler's
    grid: σ^(1/ρ) is even from σ_min to σ_max (eq. 5).

    >>> Karras().timestep(torch.tensor([1.0, 80.0]))
    tensor([0.0000, 1.0955])
    """

    kind: ClassVar[str] = "karras"
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    rho: float = 7.0

    def __post_init__(self) -> None:
        require_count(self.num_train_timesteps, least=2)
        require_range(self.sigma_min, self.sigma_max)
        require_factor("sigma_data", self.sigma_data, "EDM uses 0.5")
        require(0.5 <= self.rho <= 100, "rho", "lie between 0.5 and 100", self.rho, "EDM uses 7")

    @property
    def t_min(self) -> float:
        return self.sigma_min

    @property
    def t_max(self) -> float:
        return self.sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        check_times(self, t)
        return torch.ones_like(t, dtype=evaluation_dtype(t))

    def sigma(self, t: Tensor) -> Tensor:
        check_times(self, t)
        return t.to(evaluation_dtype(t))

    def time(self, log_snr: Tensor) -> Tensor:
        return (-0.5 * log_snr.to(evaluation_dtype(log_snr))).exp().clamp(self.t_min, self.t_max)

    def alpha_sigma_at(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(log_snr), (-0.5 * log_snr).exp()

    def timestep(self, t: Tensor) -> Tensor:
        return 0.25 * t.to(evaluation_dtype(t)).log()

    def fraction(self, t: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        # the inverse of time_at_quantile
        return ((t.to(evaluation_dtype(t)) ** (1 / self.rho) - low) / (high - low)).clamp(0, 1)

    def input_scale(self, t: Tensor) -> Tensor:
        return (t.to(evaluation_dtype(t)) ** 2 + self.sigma_data**2).rsqrt()

    def time_at_index(self, index: Tensor) -> Tensor:
        return self.time_at_quantile(index / (self.num_train_timesteps - 1))

    def time_at_quantile(self, u: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        sigma = ((low + u * (high - low)) ** self.rho).clamp(self.t_min, self.t_max)
        # for some σ_max the power misses t_max by a rounding
        return torch.where(u >= 1, self.t_max, sigma)

    def shifted(self, factor: float) -> Karras:
        s = require_factor("factor", factor)  # the time is σ, so the range of σ moves
        return replace(self, sigma_min=s * self.sigma_min, sigma_max=s * self.sigma_max)


@CURVES.register
@dataclass(frozen=True, kw_only=True)
class Cosine(Curve):
    """The continuous cosine schedule: α = cos(π t / 2), σ = sin(π t / 2), t in [0, 1].

    Source: 2202.00512, §3. ``log_snr_shift`` is added to log SNR, for another resolution: 2 log(64
    / d) for d pixels (Hoogeboom et al. 2301.11093, eq. 4).

    >>> Cosine().log_snr(torch.tensor([0.5])).abs().item() < 1e-6
    True
    """

    kind: ClassVar[str] = "cosine"
    log_snr_shift: float = 0.0

    def __post_init__(self) -> None:
        require_count(self.num_train_timesteps)
        shift, advice = self.log_snr_shift, "0 is none, 2 log(64 / d) is for d pixels"
        require(abs(shift) <= 60, "log_snr_shift", "lie between -60 and 60", shift, advice)

    def alpha(self, t: Tensor) -> Tensor:
        return self._levels(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        return self._levels(t)[1]

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        check_times(self, t)
        t = t.to(evaluation_dtype(t))
        # sin(π (1 - t) / 2) is the cosine, exactly 0 at t = 1
        a = torch.sin(0.5 * math.pi * (1 - t)) * math.exp(0.5 * self.log_snr_shift)
        b = torch.sin(0.5 * math.pi * t)
        norm = torch.hypot(a, b)
        return a / norm, b / norm

    def time(self, log_snr: Tensor) -> Tensor:
        value = log_snr.to(evaluation_dtype(log_snr)) - self.log_snr_shift
        return (2 / math.pi) * torch.atan((-0.5 * value).exp())

    def shifted(self, factor: float) -> Cosine:
        return replace(
            self, log_snr_shift=self.log_snr_shift - 2 * math.log(require_factor("factor", factor))
        )
