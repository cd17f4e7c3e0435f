"""Densities of one's own, and densities around others: limited to a range, or with the direction of other trainers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ..curves.base import Curve
from .base import LEAST, QuantileTimesteps, Timesteps, nearest_time

_EDGE = 2.0**-40  # kept from the edges of a bin, so that no rounding leads into its neighbour, which may have weight 0
_CHECKED = 1025  # points at which a quantile function of one's own is looked at


@dataclass(frozen=True, kw_only=True)
class CustomTimesteps(QuantileTimesteps):
    """A density by its quantile function: ``function(u)`` from [0, 1] to shares of training time in [0, 1].

    It takes and returns float64 tensors, and must not decrease; u -> 1 is noise. ValueError, when the density is first
    given to a Noising, where it leaves [0, 1] or decreases.

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
                "the quantile function of custom timesteps must return a value in [0, 1] for each u in [0, 1]; "
                "shares of training time, not timesteps"
            )
        if bool((values.diff() < 0).any()):
            raise ValueError("the quantile function of custom timesteps decreases; u -> 1 must be noise: give f(1 - u)")


@dataclass(frozen=True, kw_only=True)
class WeightedTimesteps(QuantileTimesteps):
    """A piecewise constant density: ``weights`` of equal bins of training time, from data to noise.

    With as many weights as a discrete schedule has timesteps, each is the weight of one timestep. Weights need not sum to 1,
    a bin of weight 0 is never drawn. ValueError unless they are finite, not negative and not all 0.

    >>> from alphabar.noising import Flow
    >>> WeightedTimesteps(weights=(1.0, 0.0, 3.0)).times(torch.tensor([0.125, 0.625], dtype=torch.float64), Flow())
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
    """Only these times of the curve, with these weights (equal ones when not given).

    On discrete schedules the times are integer timesteps. ValueError for times that repeat or, when the density is given to a
    Noising, lie outside its schedule, and for weights as in WeightedTimesteps.

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
            raise ValueError(f"listed timesteps need one weight for each, got {len(weights)} for {len(listed)}")
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
            _require_time("a listed timestep", t, curve)


@dataclass(frozen=True, kw_only=True)
class _Around(Timesteps):
    """A density around another; stratified where that is."""

    density: Timesteps

    def __post_init__(self) -> None:
        if self.density.measures_losses:
            raise ValueError(
                f"{self.density.name} timesteps go around other densities, not into them; "
                f"give them density={type(self).__name__}(...)"
            )
        object.__setattr__(self, "stratified", self.stratified or self.density.stratified)

    def check(self, curve: Curve) -> None:
        self.density.check(curve)


@dataclass(frozen=True, kw_only=True)
class WithinTimesteps(_Around):
    """``density`` given that the time lies in ``low`` ... ``high``, both included; times of the curve.

    On discrete schedules these are integer timesteps (kohya's --max_timestep is excluded there: give it less 1), on
    flows t in 0 ... 1 before any shift. The density inside keeps its shape: it is cut, not squeezed. ValueError unless
    low < high, and, when it is given to a Noising, where the range leaves the schedule or the density has nothing in it.

    >>> from alphabar.noising import LogitNormalTimesteps, NoiseSchedule
    >>> density = WithinTimesteps(density=LogitNormalTimesteps(), low=0, high=499)
    >>> density.times(torch.tensor([1.0]), NoiseSchedule.linear().curve)
    tensor([499])
    """

    name: ClassVar[str] = "within"
    _known: ClassVar[tuple[Curve, tuple[float, float]] | None] = (
        None  # an instance's shares of the curve it was checked for
    )
    low: float
    high: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low < self.high:
            raise ValueError(f"a range of timesteps needs low < high, got {self.low} and {self.high}")

    def times(self, u: Tensor, curve: Curve) -> Tensor:
        known = self._known  # torch.compile, which no cache stops, would trace the search
        same = known is not None and known[0] is curve
        first, last = known[1] if known is not None and same else _shares(self.density, curve, self.low, self.high)
        t = self.density.times(first + u * (last - first), curve)
        low, high = (int(self.low), int(self.high)) if curve.is_discrete else (self.low, self.high)
        return t.clamp(low, high)  # where u was rounded to the share below

    def check(self, curve: Curve) -> None:
        super().check(curve)
        _require_time("low", self.low, curve)
        _require_time("high", self.high, curve)
        object.__setattr__(self, "_known", (curve, _shares(self.density, curve, self.low, self.high)))


@dataclass(frozen=True, kw_only=True)
class ReversedTimesteps(_Around):
    """``density`` with data and noise exchanged: t -> 1 - t, for recipes of trainers that have it so.

    The diffusers examples for SD3 and Flux and kohya's Flux script use u as an index into timesteps that descend: there a
    positive logit mean is less noise. With their numbers, this is their density. Here too a larger u is more noise. ValueError
    for densities that are stated in noise levels or in timesteps, which have no such direction.

    >>> from alphabar.noising import LogitNormalTimesteps
    >>> ReversedTimesteps(density=LogitNormalTimesteps(mean=1.0)).quantile(torch.tensor([0.5]))
    tensor([0.2689])
    """

    name: ClassVar[str] = "reversed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.density, QuantileTimesteps | ReversedTimesteps):
            raise ValueError(
                f"{self.density.name} timesteps have no direction to reverse; reverse a density over training time, e.g. "
                "LogitNormalTimesteps(mean=1.0).reversed(), and limit its range afterwards"
            )

    def quantile(self, u: Tensor) -> Tensor:
        """Return 1 - Q(1 - u)."""
        assert isinstance(self.density, QuantileTimesteps | ReversedTimesteps)
        return 1 - self.density.quantile(1 - u)

    def times(self, u: Tensor, curve: Curve) -> Tensor:
        return curve.time_at_quantile(self.quantile(u).clamp(LEAST, 1.0))


@dataclass(frozen=True, kw_only=True)
class NoiseLevelTimesteps(_Around):
    """A density over the noise level σ of the flow path itself, whatever the shift of the schedule.

    σ = low + (high - low) · s q / (1 + (s - 1) q) with the share q that ``density`` draws. kohya's Flux and SD3 scripts draw so:
    uniformly (``--timestep_sampling uniform``), as a sigmoid of a normal (``sigmoid``), and with a shift of training alone
    (``--training_shift``). On curves that are no flow σ stands for σ / (α + σ). ValueError unless ``density`` is one over training
    time, s is positive and 0 <= low < high <= 1.

    >>> from alphabar.noising import NoiseSchedule, UniformTimesteps
    >>> flow = NoiseSchedule.flow(shift=3.0)
    >>> t = NoiseLevelTimesteps(density=UniformTimesteps()).times(torch.tensor([0.25, 0.75]), flow.curve)
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
                f"{self.density.name} timesteps are no density over training time, e.g. uniform, logit_normal"
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


def bin_of(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bin, drawn with probability ∝ ``weights``, and the place inside it in (0, 1), of u in [0, 1].

    >>> bin_of(torch.tensor([1.0, 3.0], dtype=torch.float64), torch.tensor([0.25, 0.625], dtype=torch.float64))
    (tensor([0, 1]), tensor([1.0000, 0.5000], dtype=torch.float64))
    """
    upper = weights.cumsum(0)
    upper = upper / upper[-1]
    u = u.double().clamp(min=LEAST)
    bins = torch.searchsorted(upper, u.contiguous())  # the first whose upper edge is not below u: its weight is not 0
    lower = torch.cat([upper.new_zeros(1), upper[:-1]])
    return bins, ((u - lower[bins]) / (upper - lower)[bins]).clamp(_EDGE, 1 - _EDGE)


@lru_cache(maxsize=64)
def _shares(density: Timesteps, curve: Curve, low: float, high: float) -> tuple[float, float]:
    """Return the shares of samples whose time is below ``low`` and not above ``high``."""
    first = _largest(lambda u: float(density.times(u, curve)) < low)
    last = _largest(lambda u: float(density.times(u, curve)) <= high)
    if not first < last:
        raise ValueError(f"{density.name} timesteps have none within {low:g} ... {high:g}; widen the range")
    return first, last


def _largest(holds: Callable[[Tensor], bool]) -> float:
    """Return the largest u in [0, 1] for which a condition holds that, once false, stays false."""
    low, high = 0.0, 1.0
    if holds(torch.tensor(high, dtype=torch.float64)):
        return high
    for _ in range(64):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if holds(torch.tensor(middle, dtype=torch.float64)) else (low, middle)
    return low


def _require_time(what: str, t: float, curve: Curve) -> None:
    if not curve.t_min <= t <= curve.t_max or (curve.is_discrete and t != int(t)):
        kind = "an integer timestep" if curve.is_discrete else "a time"
        raise ValueError(
            f"{what} must be {kind} in {curve.t_min:g} ... {curve.t_max:g} of this {curve.kind} schedule, got {t}"
        )


def _weights(what: str, weights: Sequence[float] | Tensor) -> tuple[float, ...]:
    values = tuple(float(w) for w in _plain(weights))
    if not values or not all(0 <= w < math.inf for w in values) or not sum(values) > 0:
        raise ValueError(f"the weights of {what} must be finite, not negative and not all 0, got {str(values)[:80]}")
    return values


def _plain(values: Sequence[float] | Tensor) -> Sequence[float]:
    return values.flatten().tolist() if isinstance(values, Tensor) else values
