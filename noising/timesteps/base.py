"""What a density over training time is: a map from u in (0, 1] to times of a curve, u -> 1 being noise, always.

Let u be uniform. A density is stated by its quantile function, in one of two coordinates:

    share of training time:  t = curve.time_at_quantile(Q(u)),   Q from (0, 1] to (0, 1],   on T timesteps  ⌈T Q(u)⌉ - 1,
    log SNR:                 t = curve.time(λ(u)),               on T timesteps the nearest one, clipped to the ends.

The first means another noise level on every curve, the second the same. How u is drawn is the other half: independently
for each sample, or ``stratified`` over the whole optimizer step (batch x ranks x accumulation), one sample to each of its
equal strata, which keeps the expectation and lowers the variance.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..curves.base import Curve

if TYPE_CHECKING:
    from .custom import ReversedTimesteps, WithinTimesteps
    from .importance import LossHistory

LEAST = 2.0**-53  # the least share of training time that is drawn: a clean sample has nothing to learn from
_LOG_SNR_BOUND = 200.0  # where a curve has no end in log SNR: e^100 is still finite in float64


@dataclass(frozen=True, kw_only=True)
class Timesteps(ABC):
    """A density over training time; subclasses state the times of u in (0, 1], more noise for larger u.

    >>> from alphabar.noising import Flow, UniformTimesteps
    >>> UniformTimesteps().times(torch.tensor([0.25, 1.0]), Flow())
    tensor([0.2500, 1.0000])
    """

    name: ClassVar[str]
    measures_losses: ClassVar[bool] = False
    """Whether the density follows the losses that are measured, and so needs a history in the checkpoint."""
    stratified: bool = False

    @abstractmethod
    def times(self, u: Tensor, curve: Curve) -> Tensor:
        """Return the time below which a share u of the samples lies; int64 on discrete curves; any shape."""

    def check(self, curve: Curve) -> None:  # noqa: B027  (most densities fit every curve)
        """Raise ValueError where this density does not fit the curve."""

    def history(self) -> LossHistory | None:
        """Return a new history of losses, for a density that follows them."""
        return None

    def spread(self, u: Tensor, index: Tensor, strata: Tensor | None) -> Tensor:
        """Return ``u`` in the stratum of each global index; ``strata`` is this optimizer step's permutation of them.

        >>> from alphabar.noising import UniformTimesteps
        >>> density = UniformTimesteps(stratified=True)
        >>> density.spread(torch.tensor([0.5, 0.5]), torch.arange(2), torch.tensor([1, 0]))
        tensor([0.7500, 0.2500])
        """
        if not self.stratified or strata is None:
            return u
        return (strata[index % len(strata)] + u) / len(strata)

    def within(self, low: float, high: float) -> WithinTimesteps:
        """Return this density limited to times from ``low`` to ``high``, both included.

        >>> from alphabar.noising import NoiseSchedule, UniformTimesteps
        >>> density = UniformTimesteps().within(500, 999)
        >>> density.times(torch.tensor([1e-9, 0.5, 1.0]), NoiseSchedule.linear().curve)
        tensor([500, 749, 999])
        """
        from .custom import WithinTimesteps

        return WithinTimesteps(density=self, low=low, high=high)

    def reversed(self) -> ReversedTimesteps:
        """Return this density with data and noise exchanged, as trainers have it that index a descending array with u.

        >>> from alphabar.noising import Flow, LogitNormalTimesteps
        >>> LogitNormalTimesteps(mean=1.0).reversed().times(torch.tensor([0.5]), Flow()).item() < 0.3
        True
        """
        from .custom import ReversedTimesteps

        return ReversedTimesteps(density=self)


@dataclass(frozen=True, kw_only=True)
class QuantileTimesteps(Timesteps):
    """A density stated over the share of training time, by its quantile function.

    >>> from alphabar.noising import Flow
    >>> class Late(QuantileTimesteps):
    ...     def quantile(self, u):
    ...         return u**0.5
    >>> Late().times(torch.tensor([0.25]), Flow())
    tensor([0.5000])
    """

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Return Q(u) in [0, 1], not decreasing in u; for u in [0, 1] of any shape, in float64."""

    def times(self, u: Tensor, curve: Curve) -> Tensor:
        return curve.time_at_quantile(self.quantile(u).clamp(LEAST, 1.0))


@dataclass(frozen=True, kw_only=True)
class LogSNRTimesteps(Timesteps):
    """A density stated over log SNR, λ = log(α² / σ²): the same noise levels on every curve.

    The curve's own inverse turns λ into time: clipped to the ends of the curve, and on a discrete one rounded to the nearest
    timestep.

    >>> from alphabar.noising import Cosine
    >>> class Laplace(LogSNRTimesteps):
    ...     def log_snr(self, u):
    ...         return (u - 0.5).sign() * torch.log(1 - 2 * (u - 0.5).abs())
    >>> round(Laplace().times(torch.tensor([0.5]), Cosine()).item(), 6)
    0.5
    """

    @abstractmethod
    def log_snr(self, u: Tensor) -> Tensor:
        """Return λ(u), not increasing in u; for u in [0, 1] of any shape, in float64; infinite at the ends is fine."""

    def times(self, u: Tensor, curve: Curve) -> Tensor:
        return nearest_time(self.log_snr(u), curve)


def nearest_time(log_snr: Tensor, curve: Curve) -> Tensor:
    """Return the times at which a curve has these log SNRs, those of its ends beyond them; timesteps on a discrete one.

    >>> from alphabar.noising import Flow
    >>> nearest_time(torch.tensor([0.0, -torch.inf]), Flow())
    tensor([0.5000, 1.0000])
    """
    ends = curve.log_snr(torch.tensor([curve.t_max, curve.t_min], dtype=torch.float64))
    low, high = ends.clamp(-_LOG_SNR_BOUND, _LOG_SNR_BOUND)
    t = curve.time(log_snr.clamp(low, high))
    if curve.is_discrete:
        return t.round().long().clamp(int(curve.t_min), int(curve.t_max))
    return t.clamp(curve.t_min, curve.t_max)
