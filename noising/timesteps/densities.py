"""Densities of training timesteps: published ones, by their quantile functions, and custom ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..curves.base import Curve
from .base import (
    LEAST,
    TIMESTEPS,
    Around,
    LogSNRTimesteps,
    QuantileTimesteps,
    ReversedTimesteps,
    Timesteps,
    nearest_time,
    require_time,
)

# distance from the edges of a bin: rounding must not reach the next bin, whose weight may be 0
_EDGE = 2.0**-40
_CHECKED = 1025  # number of points at which a custom quantile function is checked
# Esser et al. 2403.03206, below eq. 20: beyond it the map is not monotone
MODE_SCALE_MAX = 2 / (math.pi - 2)


@TIMESTEPS.register
@dataclass(frozen=True, kw_only=True)
class UniformTimesteps(QuantileTimesteps):
    """The uniform density: all times are equally likely.

    >>> UniformTimesteps(stratified=True).quantile(torch.tensor([0.75, 0.25]))
    tensor([0.7500, 0.2500])
    """

    name: ClassVar[str] = "uniform"
    stratified_name: ClassVar[str] = "stratified"

    def quantile(self, u: Tensor) -> Tensor:
        return u


@TIMESTEPS.register
@dataclass(frozen=True, kw_only=True)
class LogitNormalTimesteps(QuantileTimesteps):
    """logit(t) ~ N(mean, std²) (Esser et al. 2403.03206, eq. 19); a positive mean is more noise.

    On a flow with a shift, the shift is applied afterwards, as in SD3. Raises ValueError unless the
    mean is finite and std is positive and finite.

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


@TIMESTEPS.register
@dataclass(frozen=True, kw_only=True)
class ModeTimesteps(QuantileTimesteps):
    """Mode sampling with heavy tails: t = 1 - u' - s (cos²(π u' / 2) - 1 + u'), u' = 1 - u.

    Source: Esser et al. 2403.03206, eq. 20. Positive scales s favour the middle, negative ones the
    ends, 0 is uniform. Raises ValueError if the map is not monotone, i.e. outside -1 ... 2 / (π -
    2) = 1.7519.

    >>> ModeTimesteps(scale=1.29).quantile(torch.tensor([0.25, 0.5, 1.0]))
    tensor([0.3836, 0.5000, 1.0000])
    """

    name: ClassVar[str] = "mode"
    scale: float = 1.29

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= MODE_SCALE_MAX:
            raise ValueError(
                f"the scale of mode timesteps must lie in -1 ... {MODE_SCALE_MAX:.4f}, where the "
                "map is monotone, "
                f"got {self.scale}; SD3 uses 1.29"
            )

    def quantile(self, u: Tensor) -> Tensor:
        return u - self.scale * (torch.sin(0.5 * math.pi * u) ** 2 - u)


@TIMESTEPS.register
@dataclass(frozen=True, kw_only=True)
class CosMapTimesteps(QuantileTimesteps):
    """The density 2 / (π - 2 π t + 2 π t²) (Esser et al. 2403.03206, eq. 21).

    On a flow it gives the log SNRs of the cosine schedule. It replaces the cosmap weight on uniform
    times: with both, the weight counts twice.

    >>> CosMapTimesteps().quantile(torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64))
    tensor([0.2929, 0.5000, 1.0000], dtype=torch.float64)
    """

    name: ClassVar[str] = "cosmap"

    def quantile(self, u: Tensor) -> Tensor:
        # 1 - 1 / (tan(π u / 2) + 1) without the infinite tangent
        sine, cosine = torch.sin(0.5 * math.pi * u), torch.sin(0.5 * math.pi * (1 - u))
        return sine / (sine + cosine)


@TIMESTEPS.register
@dataclass(frozen=True, kw_only=True)
class BetaTimesteps(QuantileTimesteps):
    """t ~ Beta(a, b): a > b is more noise, a = b < 1 favours both ends, a = b = 1 is uniform.

    The quantile is the inverse of the incomplete beta function, to 1e-12. Raises ValueError unless
    a and b are positive and finite.

    >>> BetaTimesteps(a=2.0, b=1.0).quantile(torch.tensor([0.25, 1.0]))  # the root
    tensor([0.5000, 1.0000], dtype=torch.float64)
    """

    name: ClassVar[str] = "beta"
    a: float = 2.0
    b: float = 2.0

    def __post_init__(self) -> None:
        if not (0 < self.a < math.inf and 0 < self.b < math.inf):
            raise ValueError(
                f"a and b of beta timesteps must be positive and finite, got {self.a} and {self.b}"
            )

    def quantile(self, u: Tensor) -> Tensor:
        return beta_quantile(u, self.a, self.b)


@TIMESTEPS.register
@dataclass(frozen=True, kw_only=True)
class LogNormalSigmaTimesteps(LogSNRTimesteps):
    """log(σ / α) ~ N(mean, std²): EDM's density of noise levels, on any curve.

    Source: Karras et al. 2206.00364, table 1. EDM has P_mean = -1.2 and P_std = 1.2, EDM2 -0.4 and
    1.0 (2312.02696, table 6). Values beyond the ends of the curve are set to the ends; discrete
    curves use the nearest timestep. Raises ValueError unless the mean is finite and std is positive
    and finite.

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


@dataclass(frozen=True, kw_only=True)
class CustomTimesteps(QuantileTimesteps):
    """A density with a custom quantile function.

    ``function(u)`` maps [0, 1] to shares of training time in [0, 1]. It takes and returns float64
    tensors, and must not decrease; u -> 1 is noise. A Noising that gets this density raises
    ValueError if the function leaves [0, 1] or decreases.

    >>> from alphabar.noising import Flow
    >>> CustomTimesteps(function=torch.sqrt).times(torch.tensor([0.25]), Flow())
    tensor([0.5000])
    """

    name: ClassVar[str] = "custom"
    function: Callable[[Tensor], Tensor]

    def quantile(self, u: Tensor) -> Tensor:
        return self.function(u)

    def check(self, curve: Curve) -> None:
        values = self.quantile(torch.linspace(0, 1, _CHECKED, dtype=torch.float64))
        if values.shape != (_CHECKED,) or not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(
                "the quantile function of custom timesteps must return a value in [0, 1] for each "
                "u in [0, 1]; "
                "shares of training time, not timesteps"
            )
        if bool((values.diff() < 0).any()):
            raise ValueError(
                "the quantile function of custom timesteps decreases; u -> 1 must be noise: give "
                "f(1 - u)"
            )


@dataclass(frozen=True, kw_only=True)
class WeightedTimesteps(QuantileTimesteps):
    """A piecewise constant density: ``weights`` of equal bins of training time.

    The bins run from data to noise. With as many weights as a discrete schedule has timesteps, each
    is the weight of one timestep. Weights need not sum to 1; a bin of weight 0 is never drawn.
    Raises ValueError unless they are finite, not negative and not all 0.

    >>> from alphabar.noising import Flow
    >>> WeightedTimesteps(weights=(1.0, 0.0, 3.0)).times(
    ...     torch.tensor([0.125, 0.625], dtype=torch.float64), Flow()
    ... )
    tensor([0.1667, 0.8333], dtype=torch.float64)
    """

    name: ClassVar[str] = "weighted"
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", _weights("weighted timesteps", self.weights))

    def quantile(self, u: Tensor) -> Tensor:
        bins, inside = bin_of(torch.tensor(self.weights, dtype=torch.float64), u)
        return (bins + inside) / len(self.weights)


@dataclass(frozen=True, kw_only=True)
class ListedTimesteps(Timesteps):
    """Only these times of the curve, with these weights (by default equal ones).

    On discrete schedules the times are integer timesteps. Raises ValueError for repeated times, and
    for weights as in WeightedTimesteps. A Noising that gets this density raises ValueError for
    times outside its schedule.

    >>> from alphabar.noising import NoiseSchedule
    >>> density = ListedTimesteps(listed=(999, 749, 499), weights=(2.0, 1.0, 1.0))
    >>> density.times(torch.tensor([0.25, 0.5, 0.75, 1.0]), NoiseSchedule.linear().curve)
    tensor([499, 749, 999, 999])
    """

    name: ClassVar[str] = "listed"
    listed: tuple[float, ...]
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        listed = tuple(float(t) for t in _plain(self.listed))
        weights = _weights("listed timesteps", _plain(self.weights) or [1.0] * len(listed))
        if len(weights) != len(listed):
            raise ValueError(
                f"listed timesteps need one weight for each, got {len(weights)} for {len(listed)}"
            )
        if len(set(listed)) != len(listed):
            raise ValueError("listed timesteps repeat; give each once, with the sum of its weights")
        order = sorted(range(len(listed)), key=listed.__getitem__)
        object.__setattr__(self, "listed", tuple(listed[i] for i in order))
        object.__setattr__(self, "weights", tuple(weights[i] for i in order))

    def times(self, u: Tensor, curve: Curve) -> Tensor:
        bins, _ = bin_of(torch.tensor(self.weights, dtype=torch.float64), u)
        listed = torch.tensor(self.listed, dtype=torch.float64)
        return (listed.long() if curve.is_discrete else listed)[bins]

    def check(self, curve: Curve) -> None:
        for t in self.listed:
            require_time("a listed timestep", t, curve)


@dataclass(frozen=True, kw_only=True)
class NoiseLevelTimesteps(Around):
    """A density over the noise level σ of the flow path, independent of the schedule's shift.

    σ = low + (high - low) · s q / (1 + (s - 1) q), where s is ``shift`` and q is the share that
    ``density`` draws. kohya's Flux and SD3 scripts draw this way: uniformly (``--timestep_sampling
    uniform``), as a sigmoid of a normal (``sigmoid``), and with a shift of training alone
    (``--training_shift``). On curves that are not flows, σ means σ / (α + σ). Raises ValueError
    unless ``density`` is a density over training time, s is positive and 0 <= low < high <= 1.

    >>> from alphabar.noising import NoiseSchedule, UniformTimesteps
    >>> flow = NoiseSchedule.flow(shift=3.0)
    >>> t = NoiseLevelTimesteps(density=UniformTimesteps()).times(
    ...     torch.tensor([0.25, 0.75]), flow.curve
    ... )
    >>> flow.sigma(t)
    tensor([0.2500, 0.7500], dtype=torch.float64)
    """

    name: ClassVar[str] = "noise_level"
    shift: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.density, QuantileTimesteps | ReversedTimesteps):
            raise ValueError(
                f"{self.density.name} timesteps are no density over training time, e.g. uniform, "
                "logit_normal"
            )
        if not 0 < self.shift < math.inf or not 0 <= self.low < self.high <= 1:
            raise ValueError(
                "noise level timesteps need a positive shift and 0 <= low < high <= 1, "
                f"got {self.shift}, {self.low} and {self.high}"
            )

    def times(self, u: Tensor, curve: Curve) -> Tensor:
        assert isinstance(self.density, QuantileTimesteps | ReversedTimesteps)
        q = self.density.quantile(u.double()).clamp(LEAST, 1.0)
        level = self.low + (self.high - self.low) * self.shift * q / (1 + (self.shift - 1) * q)
        return nearest_time(2 * ((1 - level).log() - level.log()), curve)


def beta_quantile(u: Tensor, a: float, b: float) -> Tensor:
    """Return x with I_x(a, b) = u, the quantile of the Beta distribution.

    Shape and device of ``u``; float64. Raises ValueError unless a and b are positive and u lies in
    [0, 1].

    >>> beta_quantile(
    ...     torch.tensor([0.0, 0.5, 0.75, 1.0]), 0.5, 0.5
    ... )  # the arcsine law: sin²(π u / 2)
    tensor([0.0000, 0.5000, 0.8536, 1.0000], dtype=torch.float64)
    """
    from scipy.special import betaincinv

    if not (a > 0 and b > 0):
        raise ValueError(
            f"alpha and beta must be positive, got {a} and {b}; the published schedule has 0.6 for "
            "both"
        )
    u = u.double()
    if not bool(((u >= 0) & (u <= 1)).all()):
        raise ValueError("quantiles are of probabilities in [0, 1]")
    return torch.as_tensor(betaincinv(a, b, u.cpu().numpy()), dtype=torch.float64).to(u.device)


def bin_of(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bin of u in [0, 1] and the position inside it in (0, 1).

    A bin is drawn with probability ∝ ``weights``.

    >>> bin_of(
    ...     torch.tensor([1.0, 3.0], dtype=torch.float64),
    ...     torch.tensor([0.25, 0.625], dtype=torch.float64),
    ... )
    (tensor([0, 1]), tensor([1.0000, 0.5000], dtype=torch.float64))
    """
    upper = weights.cumsum(0)
    upper = upper / upper[-1]
    u = u.double().clamp(min=LEAST)
    # the first bin whose upper edge is not below u; its weight is not 0
    bins = torch.searchsorted(upper, u.contiguous())
    lower = torch.cat([upper.new_zeros(1), upper[:-1]])
    return bins, ((u - lower[bins]) / (upper - lower)[bins]).clamp(_EDGE, 1 - _EDGE)


def _weights(what: str, weights: Sequence[float] | Tensor) -> tuple[float, ...]:
    values = tuple(float(w) for w in _plain(weights))
    if not values or not all(0 <= w < math.inf for w in values) or not sum(values) > 0:
        raise ValueError(
            f"the weights of {what} must be finite, not negative and not all 0, got "
            f"{str(values)[:80]}"
        )
    return values


def _plain(values: Sequence[float] | Tensor) -> Sequence[float]:
    return values.flatten().tolist() if isinstance(values, Tensor) else values


def _require_normal(what: str, mean: float, std: float, usual: str) -> None:
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise ValueError(
            f"{what} need a finite mean and a positive, finite std, got {mean} and {std}; {usual}"
        )
