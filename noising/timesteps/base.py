"""Densities over training time: maps from u in (0, 1] to times of a curve; u -> 1 is noise.

Let u be uniform. A density is defined by its quantile function, in one of two coordinates:

    share of training time:  t = curve.time_at_quantile(Q(u)),  Q from (0, 1] to (0, 1];
                             on T timesteps ⌈T Q(u)⌉ - 1,
    log SNR:                 t = curve.time(λ(u));
                             on T timesteps the nearest one, clipped to the ends.

The first gives a different noise level on every curve, the second gives the same one. There are two
ways to draw u: independently for each sample, or ``stratified`` over the whole optimizer step
(batch x ranks x accumulation). Stratified means one sample in each of the equal strata, which keeps
the expectation and lowers the variance. ``across=N`` spreads the strata over N optimizer steps, for
small batches: see strata.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..curves.base import Curve
from ..curves.truncated import Truncated, times_at_levels
from ..utils.bisection import bisect
from ..utils.items import make_item
from ..utils.registry import D, Registry
from ..utils.rng import permutation
from .strata import across_steps, require_across

# the smallest share of training time that is drawn: a clean sample trains nothing
LEAST = 2.0**-53
_LOG_SNR_BOUND = 200.0  # if a curve has no end in log SNR: e^100 is still finite in float64


class Resampled(NamedTuple):
    """The result of importance sampling: shape (batch,) each, on the CPU."""

    u: Tensor
    bins: Tensor
    weight: Tensor
    """1 / (N p), float32."""


class LossHistory(nn.Module, ABC):
    """The losses that a density follows.

    :meth:`resample` draws with them, :meth:`observe` records new ones, and :meth:`commit` adds the
    recorded ones.
    """

    @abstractmethod
    def resample(self, u: Tensor) -> Resampled:
        """Return resampled u with their bins and weights.

        ``u``: uniform in (0, 1], shape (batch,). The result's u are shares of the density.
        """

    @abstractmethod
    def observe(
        self, step: int, index: Tensor, drawn: Resampled, weight: Tensor, errors: Tensor
    ) -> None:
        """Record the errors of a loss and their weights, shape (batch,).

        ``index``: global indices of the samples at this step.
        """

    @abstractmethod
    def commit(self, step: int) -> None:
        """Add the losses that were recorded at other steps to the history."""


@dataclass(frozen=True, kw_only=True)
class Timesteps(ABC):
    """Base class of a density over training time.

    A subclass defines the times of u in (0, 1]; a larger u is more noise.

    >>> from alphabar.noising import Flow, UniformTimesteps
    >>> UniformTimesteps().times(torch.tensor([0.25, 1.0]), Flow())
    tensor([0.2500, 1.0000])
    """

    name: ClassVar[str]
    stratified_name: ClassVar[str | None] = None
    """The name of the stratified form in ``TIMESTEPS``; by default ``stratified_`` + name."""
    measures_losses: ClassVar[bool] = False
    """Whether the density follows measured losses; it then needs a history in the checkpoint."""
    stratified: bool = False
    across: int = 1
    """Number of optimizer steps that stratified times are spread over, a power of two."""

    @abstractmethod
    def times(self, u: Tensor, curve: Curve) -> Tensor:
        """Return the time below which a share u of the samples lies; any shape.

        int64 on discrete curves.
        """

    def check(self, curve: Curve) -> None:  # noqa: B027  (most densities fit every curve)
        """Raise ValueError if this density does not fit the curve."""

    def history(self) -> LossHistory | None:
        """Return a new history of losses, for a density that follows them."""
        return None

    def stratify(self, u: Tensor, index: Tensor, strata: Tensor | None) -> Tensor:
        """Return ``u`` in the stratum of each global index.

        ``strata`` is the permutation of the strata for this optimizer step.

        >>> from alphabar.noising import UniformTimesteps
        >>> density = UniformTimesteps(stratified=True)
        >>> density.stratify(torch.tensor([0.5, 0.5]), torch.arange(2), torch.tensor([1, 0]))
        tensor([0.7500, 0.2500])
        """
        if not self.stratified or strata is None:
            return u
        return (strata[index % len(strata)] + u) / len(strata)

    def spread(
        self, u: Tensor, index: Tensor, groups: Sequence[int], total: int, seed: int, step: int
    ) -> Tensor:
        """Return ``u``, stratified over each group of ``total`` consecutive indices of a step.

        ``groups``: the numbers of the groups that hold the indices.

        >>> from alphabar.noising import UniformTimesteps
        >>> density, u = UniformTimesteps(stratified=True), torch.full((2,), 0.5)
        >>> density.spread(u, torch.arange(2), [0], 2, seed=0, step=0).sort().values
        tensor([0.2500, 0.7500])
        """
        for group in groups:
            strata = permutation(seed, total, step=step, group=group)
            part = u
            if self.across > 1:
                cells = strata[index % total] + total * group
                part = across_steps(u, cells, seed, step, self.across)
            u = torch.where(index // total == group, self.stratify(part, index, strata), u)
        return u

    def within(self, low: float, high: float) -> WithinTimesteps:
        """Return this density limited to times from ``low`` to ``high``, both included.

        On a flow these are times before the shift; see :meth:`within_noise_levels`.

        >>> from alphabar.noising import NoiseSchedule, UniformTimesteps
        >>> density = UniformTimesteps().within(500, 999)
        >>> density.times(torch.tensor([1e-9, 0.5, 1.0]), NoiseSchedule.linear().curve)
        tensor([500, 749, 999])
        """
        return WithinTimesteps(density=self, low=low, high=high)

    def within_noise_levels(self, low: float, high: float) -> WithinNoiseLevels:
        """Return this density limited to noise levels from ``low`` to ``high``.

        On a flow these are σ after the shift: the network's timesteps over 1000, as the boundary
        of the experts of Wan 2.2.

        >>> from alphabar.noising import NoiseSchedule, UniformTimesteps
        >>> flow, u = NoiseSchedule.flow(shift=12.0), torch.tensor([1e-9, 1.0])
        >>> for density in (
        ...     UniformTimesteps().within_noise_levels(0.875, 1.0),
        ...     UniformTimesteps().within(0.875, 1.0),
        ... ):
        ...     flow.sigma(density.times(u, flow.curve))
        tensor([0.8750, 1.0000])
        tensor([0.9882, 1.0000])
        """
        return WithinNoiseLevels(density=self, low=low, high=high)

    def reversed(self) -> ReversedTimesteps:
        """Return this density with data and noise exchanged.

        Use it for recipes of trainers that index a descending array with u.

        >>> from alphabar.noising import Flow, LogitNormalTimesteps
        >>> LogitNormalTimesteps(mean=1.0).reversed().times(
        ...     torch.tensor([0.5]), Flow()
        ... ).item() < 0.3
        True
        """
        return ReversedTimesteps(density=self)


@dataclass(frozen=True, kw_only=True)
class QuantileTimesteps(Timesteps):
    """A density over the share of training time, defined by its quantile function.

    >>> from alphabar.noising import Flow
    >>> class Late(QuantileTimesteps):
    ...     def quantile(self, u):
    ...         return u**0.5
    >>> Late().times(torch.tensor([0.25]), Flow())
    tensor([0.5000])
    """

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Return Q(u) in [0, 1], not decreasing in u.

        ``u`` lies in [0, 1] and has any shape, float64.
        """

    def times(self, u: Tensor, curve: Curve) -> Tensor:
        return curve.time_at_quantile(self.quantile(u).clamp(LEAST, 1.0))


@dataclass(frozen=True, kw_only=True)
class LogSNRTimesteps(Timesteps):
    """A density over log SNR, λ = log(α² / σ²): the same noise levels on every curve.

    The inverse of the curve converts λ to time. The time is clipped to the ends of the curve, and
    rounded to the nearest timestep on a discrete one.

    >>> from alphabar.noising import Cosine
    >>> class Laplace(LogSNRTimesteps):
    ...     def log_snr(self, u):
    ...         return (u - 0.5).sign() * torch.log(1 - 2 * (u - 0.5).abs())
    >>> round(Laplace().times(torch.tensor([0.5]), Cosine()).item(), 6)
    0.5
    """

    @abstractmethod
    def log_snr(self, u: Tensor) -> Tensor:
        """Return λ(u), not increasing in u; it may be infinite at the ends.

        ``u`` lies in [0, 1] and has any shape, float64.
        """

    def times(self, u: Tensor, curve: Curve) -> Tensor:
        return nearest_time(self.log_snr(u), curve)


def nearest_time(log_snr: Tensor, curve: Curve) -> Tensor:
    """Return the times of these log SNRs on a curve; timesteps on a discrete one.

    A log SNR beyond an end of the curve gives the time of that end.

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


def take_strata(outer: Timesteps, inner: Timesteps) -> None:
    """Make a density that wraps another one stratified as that one is."""
    object.__setattr__(outer, "stratified", outer.stratified or inner.stratified)
    object.__setattr__(outer, "across", max(outer.across, inner.across))


@dataclass(frozen=True, kw_only=True)
class Around(Timesteps):
    """A density that wraps another one; it is stratified if the inner density is."""

    density: Timesteps

    def __post_init__(self) -> None:
        if self.density.measures_losses:
            raise ValueError(
                f"{self.density.name} timesteps go around other densities, not into them; "
                f"give them density={type(self).__name__}(...)"
            )
        take_strata(self, self.density)

    def check(self, curve: Curve) -> None:
        self.density.check(curve)


@dataclass(frozen=True, kw_only=True)
class WithinTimesteps(Around):
    """``density`` conditioned on times in ``low`` ... ``high``, both included; times of the curve.

    On discrete schedules the limits are integer timesteps (kohya's --max_timestep is excluded
    there: subtract 1), on flows they are t in 0 ... 1 before any shift; :class:`WithinNoiseLevels`
    takes σ after it. The density is cut to the range, not rescaled to it. Raises ValueError unless
    low < high. A Noising that gets this density raises ValueError if the range leaves the schedule,
    or if the density has no mass in it.

    >>> from alphabar.noising import LogitNormalTimesteps, NoiseSchedule
    >>> density = WithinTimesteps(density=LogitNormalTimesteps(), low=0, high=499)
    >>> density.times(torch.tensor([1.0]), NoiseSchedule.linear().curve)
    tensor([499])
    """

    name: ClassVar[str] = "within"
    _known: ClassVar[tuple[Curve, tuple[float, float]] | None] = (
        None  # per instance: the shares on the curve that it was checked for
    )
    low: float
    high: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low < self.high:
            raise ValueError(
                f"a range of timesteps needs low < high, got {self.low} and {self.high}"
            )

    def times(self, u: Tensor, curve: Curve) -> Tensor:
        known = self._known  # torch.compile ignores caches and would trace the search
        same = known is not None and known[0] is curve
        first, last = (
            known[1]
            if known is not None and same
            else _shares(self.density, curve, self.low, self.high)
        )
        t = self.density.times(first + u * (last - first), curve)
        low, high = (int(self.low), int(self.high)) if curve.is_discrete else (self.low, self.high)
        return t.clamp(low, high)  # if rounding moved u to the share below

    def check(self, curve: Curve) -> None:
        super().check(curve)
        require_time("low", self.low, curve)
        require_time("high", self.high, curve)
        object.__setattr__(
            self, "_known", (curve, _shares(self.density, curve, self.low, self.high))
        )


@dataclass(frozen=True, kw_only=True)
class WithinNoiseLevels(Around):
    """``density`` conditioned on noise levels in ``low`` ... ``high``.

    A noise level is σ after any shift on a flow, σ / α on other curves, so the range does not
    depend on the shift; that of :class:`WithinTimesteps` does. On a part of a schedule, ``density``
    is that of the whole one. Raises ValueError unless low < high. A Noising that gets this density
    raises ValueError as for WithinTimesteps.

    >>> from alphabar.noising import LogitNormalTimesteps, NoiseSchedule
    >>> schedule = NoiseSchedule.flow(shift=5.0)
    >>> expert = schedule.truncated(noise_level_min=0.9)
    >>> density = WithinNoiseLevels(density=LogitNormalTimesteps(), low=0.9, high=1.0)
    >>> u = torch.tensor([1e-9, 1.0], dtype=torch.float64)
    >>> expert.sigma(density.times(u, expert.curve))
    tensor([0.9000, 1.0000], dtype=torch.float64)
    """

    name: ClassVar[str] = "within_noise_levels"
    _known: ClassVar[tuple[Curve, Curve, WithinTimesteps] | None] = None  # as in WithinTimesteps
    low: float
    high: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low < self.high:
            raise ValueError(
                f"a range of noise levels needs low < high, got {self.low} and {self.high}"
            )

    def times(self, u: Tensor, curve: Curve) -> Tensor:
        known = self._known
        _, whole, within = known if known is not None and known[0] is curve else self._on(curve)
        t = within.times(u, whole)
        return t.clamp(int(curve.t_min), int(curve.t_max)) if curve.is_discrete else t

    def check(self, curve: Curve) -> None:
        known = self._on(curve)
        known[2].check(known[1])
        object.__setattr__(self, "_known", known)

    def _on(self, curve: Curve) -> tuple[Curve, Curve, WithinTimesteps]:
        low, high = times_at_levels(curve, self.low, self.high)
        whole = curve.curve if isinstance(curve, Truncated) else curve
        return curve, whole, WithinTimesteps(density=self.density, low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class ReversedTimesteps(Around):
    """``density`` with data and noise exchanged: t -> 1 - t.

    The diffusers examples for SD3 and Flux and kohya's Flux script use u as an index into
    descending timesteps, so a positive logit mean is less noise there. With their numbers, this
    class gives their density. Here too a larger u is more noise. Raises ValueError for densities
    that are defined in noise levels or in timesteps, which have no such direction.

    >>> from alphabar.noising import LogitNormalTimesteps
    >>> ReversedTimesteps(density=LogitNormalTimesteps(mean=1.0)).quantile(torch.tensor([0.5]))
    tensor([0.2689])
    """

    name: ClassVar[str] = "reversed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.density, QuantileTimesteps | ReversedTimesteps):
            raise ValueError(
                f"{self.density.name} timesteps have no direction to reverse; reverse a density "
                "over training time, e.g. "
                "LogitNormalTimesteps(mean=1.0).reversed(), and limit its range afterwards"
            )

    def quantile(self, u: Tensor) -> Tensor:
        """Return 1 - Q(1 - u)."""
        assert isinstance(self.density, QuantileTimesteps | ReversedTimesteps)
        return 1 - self.density.quantile(1 - u)

    def times(self, u: Tensor, curve: Curve) -> Tensor:
        return curve.time_at_quantile(self.quantile(u).clamp(LEAST, 1.0))


class TimestepRegistry(Registry[Callable[..., Timesteps]]):
    """The densities by name, each with its stratified form.

    >>> TIMESTEPS["stratified"]()
    UniformTimesteps(stratified=True, across=1)
    """

    def register(self, entry: D) -> D:
        """Register a class as ``name``, and its stratified form as ``stratified_name``."""
        super().register(entry)
        kind: Any = entry
        self.add(kind.stratified_name or f"stratified_{kind.name}", partial(kind, stratified=True))
        return entry


TIMESTEPS = TimestepRegistry("timestep density")
"""The densities by name, each also with the prefix ``stratified_``.

Decorate a class with ``@TIMESTEPS.register`` to add one.
"""


def resolve_timesteps(timesteps: str | Timesteps) -> Timesteps:
    """Return the density for a name, with or without options, or an object.

    Raises ValueError for an unknown name or option, and for strata across a number of steps that is
    no power of two.

    >>> from alphabar.noising import LogitNormalTimesteps
    >>> resolve_timesteps("stratified_logit_normal:mean=1,across=64")
    LogitNormalTimesteps(stratified=True, across=64, mean=1, std=1.0)
    """
    density = timesteps if isinstance(timesteps, Timesteps) else make_item(timesteps, TIMESTEPS)
    require_across(density.across, density.stratified)
    return density


def require_time(what: str, t: float, curve: Curve) -> None:
    """Raise ValueError for a time outside the curve.

    >>> from alphabar.noising import Flow
    >>> require_time("low", 2.0, Flow())
    Traceback (most recent call last):
    ValueError: low must be a time in 0 ... 1 of this flow schedule, got 2.0
    """
    if not curve.t_min <= t <= curve.t_max or (curve.is_discrete and t != int(t)):
        kind = "an integer timestep" if curve.is_discrete else "a time"
        raise ValueError(
            f"{what} must be {kind} in {curve.t_min:g} ... {curve.t_max:g} of this {curve.kind} "
            f"schedule, got {t}"
        )


@lru_cache(maxsize=64)
def _shares(density: Timesteps, curve: Curve, low: float, high: float) -> tuple[float, float]:
    """Return the shares of samples with time < ``low`` and with time <= ``high``."""
    first = _largest(lambda u: density.times(u, curve) < low)
    last = _largest(lambda u: density.times(u, curve) <= high)
    if not first < last:
        raise ValueError(
            f"{density.name} timesteps have none within {low:g} ... {high:g}; widen the range"
        )
    return first, last


def _largest(holds: Callable[[Tensor], Tensor]) -> float:
    """Return the largest u in [0, 1] for which a condition holds; once false, it stays false."""
    one = torch.ones((), dtype=torch.float64)
    return 1.0 if holds(one) else float(bisect(holds, torch.zeros_like(one), one)[0])
